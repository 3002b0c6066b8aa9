"""
Flow-matching pretraining of one diffusion model on captioned images, https://arxiv.org/abs/2210.02747

    x_sigma = (1 - sigma) x0 + sigma eps,      loss = mean (v(x_sigma, sigma, prompt) - (eps - x0))^2

sigma is logit-normal (Stable Diffusion 3, https://arxiv.org/abs/2403.03206, eq. 19); a share of the captions is
replaced by the empty one, so that the model can be guided. The autoencoder and the text encoders stay frozen. Images
are either drawn on the fly (the shapes world, of which there is no end) or come from a .jsonl or .parquet file with
captions.

CPU or 1 GPU:  python pretrain.py --num-iterations 500                  a few minutes more for tiny-flux
8 GPUs:        torchrun --nproc_per_node 8 pretrain.py --model flux --data captions.parquet --reward "" --dtype bf16 \\
                   --resolution 512 --lora-rank 64 --batch-size 8 --micro-batch-size 2 --checkpoint-activations \\
                   --no-keep-unsharded
From nothing:  runs/tiny_flux.sh, which made the tiny-flux that is shipped
"""

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import models
import rewards
from data import prompts as prompt_data
from data import shapes
from kernels.sde_step import fold_seed, philox_normal
from models import checkpoint, parallel, run_folder

# Shape suffixes: B images of a tile, C H W latent.

NOISE, SIGMA, DROP, EVAL, EVAL_LOSS = range(5)  # what a random number is for: the second key of every seed
EVAL_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the validation loss, taken in turn by the images


@dataclass
class Args:
    model: str = "tiny-flux"
    """alias (see models/__init__.py), hub id or folder in diffusers layout"""
    data: str = "shapes"
    """captioned images: shapes (drawn on the fly), or a .jsonl or .parquet file with images"""
    eval_prompts: str = ""
    """held-out captions for evaluation, in the forms of flow_grpo.py (empty = a tenth of --data, chosen by hash)"""
    reward: str = "shapes"
    """reward that judges the samples of an evaluation (empty = pictures only)"""
    out: str = ""
    """run folder (empty = outputs/pretrain-<time>)"""
    resume: str = ""
    """run folder to continue, bit for bit; only --num-iterations --eval-every --save-every --track may change"""
    seed: int = 1
    """seed of images and noise; runs with one seed are the same run"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """what the model computes in; trained weights are fp32 either way"""

    num_iterations: int = 500
    """optimizer steps"""
    batch_size: int = 128
    """images per optimizer step and rank"""
    micro_batch_size: int = 128
    """images per forward and backward; lower it if memory runs out"""
    resolution: int = 32
    """height and width, in pixels"""
    text_dropout: float = 0.1
    """share of captions replaced by the empty one"""
    sigma_mean: float = 0.0
    """mean of logit(sigma)"""
    sigma_std: float = 1.0
    """standard deviation of logit(sigma)"""

    learning_rate: float = 1e-4
    """AdamW learning rate"""
    warmup_updates: int = 20
    """optimizer steps of linear learning-rate warm-up"""
    decay_iterations: int = 0
    """iterations in which the learning rate falls, as a cosine, to --final-learning-rate and stays (0 = constant)"""
    final_learning_rate: float = 1e-4
    """AdamW learning rate after --decay-iterations"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    lora_rank: int = 0
    """rank of the LoRA adapter (0 = full fine-tuning)"""
    lora_alpha: float = 0.0
    """LoRA scale times rank (0 = 2 * rank)"""
    ema_decay: float = 0.998
    """decay per optimizer step of the averaged weights that are evaluated and exported (0 = no averaging)"""

    num_steps: int = 6
    """denoising steps of evaluation (ODE)"""
    guidance: float = 1.0
    """text guidance of evaluation (1 = off)"""
    eval_every: int = 250
    """iterations between evaluations on held-out captions"""
    eval_size: int = 1024
    """pictures per evaluation, over all ranks; their noise is the same in every evaluation of every run"""
    save_every: int = 250
    """iterations between checkpoints; one is also made at the start, at the end and when the run is interrupted"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep (0 = all)"""

    keep_unsharded: bool = True
    """keep parameters gathered in evaluation and between tiles: no communication per step, memory of a whole copy"""
    checkpoint_activations: bool = False
    """recompute every block in the backward pass: less memory, a third more compute"""
    cpu_offload: bool = False
    """keep sharded parameters, gradients and optimizer state in CPU memory"""
    offload_encoders: bool = False
    """keep text encoders in CPU memory while they do not encode"""
    cache_prompts: int = 4096
    """caption embeddings to keep in CPU memory (4 MB each for FLUX)"""
    shard_size: int = 0
    """ranks a copy of the model is sharded over, e.g. the GPUs of a node (0 = all)"""
    compile: bool = False
    """torch.compile every block"""
    track: bool = False
    """also log to Weights & Biases"""


# ----------------------------------------------------------------------------------------------------------------------
# Data and loss


def captioned_images(source, prompt_set, seed, start, count, resolution, held_out=False):
    """Captions and images (float [0, 1], B 3 H W) `start` .. `start + count` of an endless stream; a function of its
    arguments alone. Of the shapes world those with training captions, or held-out ones. Images of a file are those of
    `prompt_set`, scaled to cover the square and cropped to its centre."""
    if source == "shapes":
        world = shapes.held_out_prompts() if held_out else shapes.train_prompts()
        pictures, metadata = shapes.pictures(seed, start, count, world, resolution)
        return [m["prompt"] for m in metadata], torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    rows = [prompt_set[i] for i in prompt_data.order(len(prompt_set), seed, start, count)]
    images = []
    for row in rows:
        if row["image"] is None:
            raise ValueError(f"--data {source}: '{row['prompt'][:60]}' has no image")
        scale = resolution / min(row["image"].size)
        width, height = (max(resolution, round(side * scale)) for side in row["image"].size)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        image = row["image"].resize((width, height), Image.BICUBIC)
        images.append(np.asarray(image.crop((left, top, left + resolution, top + resolution))))
    return [row["prompt"] for row in rows], torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def null_text(model, cond):
    """What stands for no text in each row of a condition: the null rows that guidance takes, which are part of it, or
    where the model has guidance of another kind the empty caption's."""
    null = {name.removesuffix("_null"): rows for name, rows in cond.items() if name.endswith("_null")}
    return cond | (null or model.encode([""]))


def drop_text(cond, null, drop_B):
    """Condition rows with those of `null` (one row, or as many) where drop_B is true."""
    return {k: torch.where(drop_B.view(-1, *[1] * (rows.dim() - 1)), null[k], rows) for k, rows in cond.items()}


def squared_error(model, cond, x0, sigma_B, seed_B):
    """Mean squared error of the velocity of each image at its noise level sigma_B [B]."""
    eps = philox_normal(seed_B, x0.shape[1:])
    sigma = sigma_B.view(-1, 1, 1, 1)
    v = model.velocity((1 - sigma) * x0 + sigma * eps, sigma_B, cond)
    return F.mse_loss(v.float(), eps - x0, reduction="none").mean(dim=(1, 2, 3))


def flow_matching_loss(model, cond, x0, sigma_B, seed_B):
    """What is trained: the mean of it over the tile."""
    return squared_error(model, cond, x0, sigma_B, seed_B).mean()


@torch.no_grad()
def sample(model, cond, x, sigmas, guidance):
    """Euler ODE from noise x (B C H W) down the schedule."""
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        x = x + model.velocity(x, x.new_full((len(x),), sigma), cond, guidance).float() * (sigma_next - sigma)
    return x


# ----------------------------------------------------------------------------------------------------------------------


@parallel.clear_memory_errors()
def main(args: Args):
    # Setup: processes, model, data, run folder. What can be wrong with the command line is found before the weights are
    # loaded.
    with parallel.clear_errors():
        world = parallel.init(args.shard_size)
    master = world.rank == 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with parallel.clear_errors():
        counts = (args.batch_size, args.micro_batch_size, args.num_steps, args.eval_size, args.eval_every)
        if min(*counts, args.save_every) < 1:
            raise ValueError(
                "--batch-size --micro-batch-size --num-steps --eval-size --eval-every --save-every must be at least 1"
            )
        if args.batch_size % args.micro_batch_size:
            raise ValueError(f"--micro-batch-size {args.micro_batch_size} must divide --batch-size {args.batch_size}")
        train_set = prompt_data.load(args.data, "train")
        eval_set = prompt_data.load(args.data, "eval", eval_source=args.eval_prompts or None)
        captioned_images(args.data, train_set, args.seed, 0, 1, args.resolution)  # there are images
        score = rewards.load(args.reward, world.device) if args.reward else None
        if score:
            rewards.check_needs(score, ("image",))
        model = models.load(
            args.model,
            world.device,
            dtype,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha or 2 * args.lora_rank,
            offload_encoders=args.offload_encoders,
            cache_prompts=args.cache_prompts,
        )
        size = (args.resolution, args.resolution)
        sigmas = model.sigmas(args.num_steps, *size)
    for part in model.parts.values():
        parallel.shard(
            part, model.blocks(part), world, dtype, args.cpu_offload, args.checkpoint_activations, args.compile
        )
    trained = parallel.trained(model.parts)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay)
    ema = parallel.EMA(trained) if args.ema_decay > 0 else None

    def checkpointed():
        """Everything that training changes, by name."""
        tensors = {f"model/{name}": p.detach() for name, p in trained.items()}
        tensors |= checkpoint.optimizer_tensors(optimizer, {p: name for name, p in trained.items()})
        return tensors | ({f"ema/{name}": s for name, s in ema.shadow.items()} if ema else {})

    # What a resumed run continues from; `cursor` counts the images seen by all ranks.
    state = dict(iteration=0, cursor=0, skipped_updates=0, skipped_in_a_row=0)
    run = parallel.same_text(args.out)
    newest = checkpoint.latest(args.resume) if args.resume else None
    if newest:
        with parallel.clear_errors():
            state = checkpoint.load(newest, checkpointed())
    if master:
        run_folder.create(run, args, __file__)
        run_folder.cut(run, state["iteration"])
        count = sum(p.numel() for p in trained.values())
        print(f"{run}: {args.model}, {count:,} trained parameters, {world.size} x {world.device.type}, {args.dtype}")
        print(f"attention: {model.attention}; {torch.get_num_threads()} CPU threads per rank")
    tracker = run_folder.track(run, "pretrain", args) if args.track and master else None
    stop = parallel.StopSignal()

    def save(iteration):
        folder = os.path.join(run, "checkpoints", f"{iteration:06d}")
        checkpoint.save(folder, checkpointed(), state | dict(iteration=iteration), args.keep_checkpoints)

    def check_stop():
        """Between tiles all ranks agree on whether one of them was told to stop."""
        if parallel.agree(stop.number):
            raise parallel.Stopped

    def evaluate():
        """ODE samples for fixed held-out captions and noise, with the averaged weights if there are any, and where
        there are held-out images their loss, noise and noise levels fixed too. Returns metrics, and pictures and
        captions for the grid."""
        mine = torch.arange(math.ceil(args.eval_size / world.size)) * world.size + world.rank  # as many on every rank
        rows = [eval_set[i] for i in prompt_data.order(len(eval_set), 0, 0, int(mine.max()) + 1)[mine]]
        seed_B = fold_seed(0, EVAL, mine)
        judged, pictures, captions = [], [], []
        with ema.applied() if ema else nullcontext(), parallel.unsharded(model.parts, args.keep_unsharded):
            tiles = range(0, len(rows), args.micro_batch_size)
            for start in tqdm(tiles, desc="evaluate", leave=False, disable=not master):
                check_stop()
                tile = rows[start : start + args.micro_batch_size]
                prompts, metadata = [row["prompt"] for row in tile], [row["metadata"] for row in tile]
                noise = model.init_noise(seed_B[start : start + args.micro_batch_size], *size)
                cond = model.condition(model.encode(prompts))
                images = model.decode(sample(model, cond, noise, sigmas, (args.guidance, 1.0)))
                images = run_folder.to_uint8(images)
                columns = [score({"image": images}, prompts, metadata)] if score else [torch.zeros(len(images))]
                if score and score.strict:
                    columns.append(score.strict({"image": images}, prompts, metadata))
                judged.append(torch.stack(columns, dim=1))
                pictures, captions = (pictures + images)[:16], (captions + prompts)[:16]
        judged = torch.cat(judged).masked_fill((mine >= args.eval_size)[:, None], math.nan)
        mean = parallel.all_gather(judged).nanmean(dim=0).tolist()
        scored = dict(zip(("eval_reward", "eval_strict"), mean)) if score else {}
        if args.data == "shapes" or rows[0]["image"] is not None:
            scored["eval_loss"] = evaluate_loss()
        return scored, pictures, captions

    @torch.no_grad()
    def evaluate_loss():
        """Mean flow-matching loss of --eval-size held-out images."""
        count, losses = math.ceil(args.eval_size / world.size), []
        first = world.rank * count
        with ema.applied() if ema else nullcontext(), parallel.unsharded(model.parts, args.keep_unsharded):
            for index_B in tqdm(
                torch.arange(first, first + count).split(args.micro_batch_size),
                desc="validation loss",
                leave=False,
                disable=not master,
            ):
                check_stop()
                captions, images = captioned_images(
                    args.data, eval_set, 0, int(index_B[0]), len(index_B), args.resolution, held_out=True
                )
                sigma_B = torch.tensor(EVAL_SIGMAS)[index_B % len(EVAL_SIGMAS)].to(world.device)
                seed_B = fold_seed(0, EVAL_LOSS, index_B).to(world.device)
                cond = model.condition(model.encode(captions))
                loss_B = squared_error(model, cond, model.encode_images(images), sigma_B, seed_B).cpu()
                losses.append(loss_B.masked_fill(index_B >= args.eval_size, math.nan))
        return parallel.all_gather(torch.cat(losses)).nanmean().item()

    # Training loop
    iteration = state["iteration"]
    bar = tqdm(initial=iteration, total=args.num_iterations, desc="pretrain", disable=not master)
    try:
        for iteration in range(state["iteration"], args.num_iterations + 1):
            if iteration % args.save_every == 0 or iteration == args.num_iterations:
                save(iteration)
            row = {"iteration": iteration}
            if iteration % args.eval_every == 0 or iteration == args.num_iterations:
                scored, pictures, captions = evaluate()
                row |= scored
                if master:
                    run_folder.grid(os.path.join(run, "samples", f"{iteration:06d}.png"), pictures, captions)
            if iteration < args.num_iterations:
                started = time.perf_counter()
                fallen = 0.5 - 0.5 * math.cos(math.pi * min(1.0, iteration / (args.decay_iterations or math.inf)))
                learning_rate = args.learning_rate + fallen * (args.final_learning_rate - args.learning_rate)
                learning_rate *= min(1.0, (iteration + 1) / args.warmup_updates)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                losses = []
                num_tiles = args.batch_size // args.micro_batch_size
                for tile in range(num_tiles):
                    check_stop()
                    parallel.accumulate(model.parts, tile == num_tiles - 1, args.keep_unsharded)
                    index = state["cursor"] + world.rank * args.batch_size + tile * args.micro_batch_size
                    prompts, images = captioned_images(
                        args.data, train_set, args.seed, index, args.micro_batch_size, args.resolution
                    )
                    index_B = torch.arange(index, index + args.micro_batch_size)
                    drop_B = (fold_seed(args.seed, DROP, index_B) % 2**24 < args.text_dropout * 2**24).to(world.device)
                    cond = model.condition(model.encode(prompts))
                    cond = drop_text(cond, null_text(model, cond), drop_B)
                    logit_B = philox_normal(fold_seed(args.seed, SIGMA, index_B), (1,))[:, 0]
                    sigma_B = (args.sigma_mean + args.sigma_std * logit_B).sigmoid().to(world.device)
                    seed_B = fold_seed(args.seed, NOISE, index_B).to(world.device)
                    loss = flow_matching_loss(model, cond, model.encode_images(images), sigma_B, seed_B)
                    (loss / num_tiles).backward()
                    losses.append(loss.detach())
                grad_norm = parallel.clip_grad_norm(trained.values(), args.max_grad_norm)
                if math.isfinite(grad_norm):
                    optimizer.step()
                    if ema:
                        ema.update(min(args.ema_decay, (1 + iteration) / (10 + iteration)))
                    state["skipped_in_a_row"] = 0
                else:
                    state["skipped_updates"] += 1
                    state["skipped_in_a_row"] += 1
                    if state["skipped_in_a_row"] == 3:
                        raise SystemExit(
                            f"error: three gradients in a row were not finite; the last good checkpoint is in {run}"
                        )
                optimizer.zero_grad(set_to_none=True)
                state["cursor"] += world.size * args.batch_size
                seconds = time.perf_counter() - started
                row |= dict(
                    loss=parallel.all_gather(torch.stack(losses).cpu()).mean().item(),
                    grad_norm=grad_norm,
                    learning_rate=learning_rate,
                    skipped_updates=state["skipped_updates"],
                    samples_per_s=world.size * args.batch_size / seconds,
                    seconds_update=seconds,
                )
            if master:
                run_folder.append(run, row)
                if tracker:
                    tracker.log(row, step=iteration)
                if iteration % args.eval_every == 0 or iteration == args.num_iterations:
                    run_folder.curves(run, [["loss", "eval_loss"], "grad_norm", "eval_reward", "eval_strict"])
                    tqdm.write(" | ".join(f"{k} {v:.4g}" for k, v in row.items()))
                bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}")
                bar.update(iteration < args.num_iterations)
    except parallel.Stopped:
        save(iteration)
        parallel.exit_stopped(stop, run, master)
    finally:
        bar.close()

    # Export, with the averaged weights
    with ema.applied() if ema else nullcontext():
        tensors = checkpoint.full_tensors({name: p.detach() for name, p in trained.items()})
    if master:
        model.save(os.path.join(run, "model"), tensors)
        print(f"wrote {run}: curves.png, samples/, metrics.jsonl, model/")
    stop.restore()
    return row.get("eval_strict", row.get("eval_reward"))


if __name__ == "__main__":
    main(run_folder.command_line(Args(), sys.argv[1:], __file__))
