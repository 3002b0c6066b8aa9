"""
Flow-GRPO: online RL for flow-matching models, https://arxiv.org/abs/2505.05470

An ODE sampler is deterministic and has no log-probs. Sampled as an SDE with the same marginals, every denoising step
becomes a Gaussian policy, and GRPO applies step by step to the velocity v that the network predicts:

    x' = a x + b v + c eps,    logp = mean over latent dims of log N(x'; a x + b v, c^2),   ratio = exp(logp - old_logp)
    A = (r - mean of its group) / std,   loss = max(-A ratio, -A clip(ratio, 1 +- clip_eps)) + kl_coef KL(policy || ref)

With --window-size w only w consecutive steps are noisy and trained and the rest is an ODE: Flow-GRPO-Fast. --sampler
cps takes the noise of https://arxiv.org/abs/2509.05952 instead, which adds as much as it removes. Left out: statistics
of a prompt over several iterations, and guidance with a detached unconditional half (the gradient flows through both).

CPU or 1 GPU:  python flow_grpo.py                       the shapes world; minutes; what it learns is in README.md
8 GPUs:        torchrun --nproc_per_node 8 flow_grpo.py --model flux --reward pickscore
Resume:        python flow_grpo.py --resume outputs/flow_grpo-...

The whole algorithm is in this file, top to bottom: rollout, reward, advantage, loss, update.
"""

import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import models
import rewards
from data import prompts as prompt_data
from kernels.sde_step import fold_seed, sde_logp, sde_step
from models import card, checkpoint, memory, parallel, run_folder

# Shape suffixes: P prompts per iteration and rank, G samples per prompt, B = P * G samples (or a tile of them), T
# denoising steps, K trained steps of them (the window), C H W latent. What has K + 1 entries in dim K is the states
# around the trained steps.

NOISE, STEP, WINDOW, ORDER, EVAL, REFERENCE = range(6)  # what a random number is for: the second key of every seed
CURVES = [["reward", "eval_reward"], "eval_strict", "reward_std", "kl", "ratio", "clipfrac", "grad_norm"]  # panels


@dataclass
class Args:
    # Run
    model: str = "tiny-flux"
    """alias (see models/__init__.py), hub id or folder in diffusers layout; choosing one switches all defaults to its
    recipe"""
    reward: tuple[str, ...] = ("shapes",)
    """rewards, name or name:weight or http://host:port/name:weight, summed; `python -m rewards` lists them"""
    prompts: str = "shapes"
    """training prompts: shapes or shapes#tag,tag, shapes-edit, a .txt, .jsonl or .parquet file, or
    hub:owner/name/config:split#column; models that edit take the picture of each prompt from there too"""
    eval_prompts: str = "shapes#single_object,two_object,counting,colors"
    """held-out prompts, same forms (empty = a tenth of --prompts, chosen by hash and never trained on)"""
    out: str = ""
    """run folder (empty = outputs/flow_grpo-<time>)"""
    resume: str = ""
    """run folder to continue, bit for bit; only --num-iterations --eval-every --save-every --track may change"""
    seed: int = 1
    """seed of prompts, noise and windows; runs with one seed are the same run"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """what the model computes in; trained weights are fp32 either way"""

    # Size
    num_iterations: int = 240
    """iterations of rollout + updates"""
    num_prompts: int = 16
    """prompts per iteration and rank (P)"""
    group_size: int = 12
    """samples per prompt (G); advantages are relative to this group"""
    micro_batch_size: int = 96
    """tile: (sample, step) pairs per forward and backward, also samples per rollout forward; lower it if memory runs
    out"""
    num_updates: int = 1
    """optimizer steps per iteration; the first is exactly on-policy"""

    # Sampling
    num_steps: int = 6
    """denoising steps (T) of the rollout"""
    eval_num_steps: int = 6
    """denoising steps of evaluation (ODE)"""
    sampler: Literal["flow_sde", "cps"] = "cps"
    """noise of a trained step: flow_sde (Flow-GRPO) or cps (coefficient-preserving sampling)"""
    noise_level: float = 0.4
    """strength of that noise: a in a sqrt(sigma / (1 - sigma)) for flow_sde, a in sin(a pi / 2) for cps"""
    shared_noise: bool = True
    """the samples of a prompt start from one noise, so that only the noise of the trained steps tells them apart"""
    window_size: int = 3
    """noisy, trained steps at a random place inside --window-range, the others are ODE (0 = all steps but the last)"""
    window_range: tuple[int, int] = (0, 3)
    """first step and end (exclusive) of where a window may lie (0 0 = all steps but the last)"""
    sigma_schedule: Literal["stock", "single"] = "stock"
    """noise levels: the model's own, or for sd3 with its shift applied once and not twice as diffusers does (the
    published SD3.5 numbers are diffusers')"""
    resolution: int = 32
    """height and width, in pixels; pictures to edit are cropped and resized to it"""
    guidance: float = 1.0
    """text guidance, embedded or classifier-free as the model has it, in rollout, replay and evaluation alike (1 =
    off)"""
    image_guidance: float = 1.0
    """guidance on the picture to edit, of unified models (1 = off)"""

    # Algorithm
    advantage_std: Literal["group", "global"] = "global"
    """advantages are divided by the std of their group, or of all samples of the iteration"""
    advantage_clip: float = 5.0
    """advantages are clipped to +- this"""
    clip_eps: float = 1e-4
    """PPO clip range of the per-step ratio, which is an exponential of a mean over latent dims and so very close to
    1"""
    kl_coef: float = 0.0
    """weight of KL(policy || reference), in nats per latent dim (0 = no reference forward)"""

    # Optimizer
    learning_rate: float = 2e-4
    """AdamW learning rate"""
    warmup_updates: int = 5
    """optimizer steps of linear learning-rate warm-up (0 = none)"""
    decay_iterations: int = 240
    """iterations over which the learning rate falls, linearly, to a tenth, where it stays (0 = constant)"""
    weight_decay: float = 1e-4
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    lora_rank: int = 0
    """rank of the LoRA adapter (0 = full fine-tuning)"""
    lora_alpha: float = 0.0
    """LoRA scale times rank (0 = 2 * rank)"""
    ema_decay: float = 0.97
    """decay per optimizer step of the averaged weights that are evaluated and exported (0 = no averaging)"""

    # Evaluation and saving
    eval_every: int = 60
    """iterations between evaluations on held-out prompts"""
    eval_size: int = 1024
    """pictures per evaluation, over all ranks; their noise is the same in every evaluation of every run"""
    save_every: int = 60
    """iterations between checkpoints; one is also made at the start, at the end and when the run is interrupted"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep (0 = all)"""

    # Machine
    judge_url: str = ""
    """OpenAI-compatible endpoint of the rewards that ask a judge, e.g. http://host:8000/v1 (empty = none)"""
    judge_model: str = ""
    """model of that endpoint (empty = the one it serves)"""
    reward_device: str = ""
    """where reward models run, e.g. cuda:7 or cpu (empty = this rank's device)"""
    keep_unsharded: bool = True
    """keep parameters gathered during rollout and between tiles: no communication per step, memory of one whole copy"""
    checkpoint_activations: bool = False
    """recompute every block in the backward pass: less memory, a third more compute"""
    cpu_offload: bool = False
    """keep sharded parameters, gradients and optimizer state in CPU memory"""
    offload_encoders: bool = False
    """keep text encoders in CPU memory while they do not encode"""
    cache_prompts: int = 512
    """prompt embeddings to keep in CPU memory (4 MB each for FLUX)"""
    cache_folder: str = ""
    """also keep prompt embeddings in this folder, one per model (empty = memory only)"""
    shard_size: int = 0
    """ranks a copy of the model is sharded over, e.g. the GPUs of a node (0 = all)"""
    compile: bool = False
    """torch.compile every block, for rollout and replay alike"""
    track: bool = False
    """also log to Weights & Biases"""
    dry_run: bool = False
    """print what the run needs per GPU, without loading weights, and stop"""


def recipe(model):
    """The defaults for a model: what runs if nothing else is on the command line. Where published recipes speak of
    groups per iteration, ours is for 8 GPUs."""
    family = models.family(model)
    edits = dict(prompts="shapes-edit", eval_prompts="shapes-edit") if family in ("kontext", "klein") else {}
    if model.startswith("tiny-"):
        return Args(model=model, **edits)
    # FLUX.1-dev: Flow-GRPO's pickscore_flux_fast, 48 groups of 24 an iteration and 2 updates. Its clip range of 1e-5 is
    # one on a CPS log-prob without 1 / (2 c^2). Ours is the density's own, in which it reads 0.7e-5, 0.9e-5 and 1.3e-5
    # on the three steps of the window (2 c^2 is 1.48, 1.13 and 0.77 there at 512 px): 1e-5 is kept.
    flux = Args(
        model=model,
        reward=("pickscore",),
        prompts="data/scenes.txt",
        eval_prompts="",
        dtype="bf16",
        num_iterations=1000,
        num_prompts=6,
        group_size=24,
        micro_batch_size=3,
        num_updates=2,
        num_steps=6,
        eval_num_steps=28,
        sampler="cps",
        noise_level=0.8,
        window_size=3,
        shared_noise=False,
        window_range=(0, 3),
        resolution=512,
        guidance=3.5,
        advantage_std="group",
        clip_eps=1e-5,
        learning_rate=3e-4,
        decay_iterations=0,
        lora_rank=64,
        ema_decay=0.9,
        eval_every=30,
        eval_size=256,
        save_every=30,
        keep_unsharded=False,
        checkpoint_activations=True,
    )
    # SD3 and SD3.5: Flow-GRPO's pickscore_sd3_fast_nocfg; its clip range of 1e-5 reads 0.6e-5 to 1.1e-5 in ours.
    sd3 = replace(
        flux,
        group_size=18,
        micro_batch_size=9,
        num_steps=10,
        eval_num_steps=40,
        window_range=(0, 5),
        guidance=1.0,
        advantage_std="global",
        lora_rank=32,
    )
    blip3o = replace(
        flux,
        num_prompts=1,
        group_size=8,
        micro_batch_size=2,
        num_updates=1,
        num_steps=10,
        eval_num_steps=30,
        sampler="flow_sde",
        noise_level=0.7,
        window_size=0,
        window_range=(0, 0),
        resolution=1024,
        clip_eps=1e-4,
        kl_coef=4e-3,
        learning_rate=1e-5,
        lora_rank=0,
    )
    return {
        "flux": flux,
        "sd3": sd3,
        # SANA: nobody published one for GRPO; SD3's, at SANA's own resolution (1,024 tokens, as many as SD3 at 512 px).
        "sana": replace(sd3, resolution=1024),
        # BLIP3o: UniRL-Zero's t2i, a prompt per GPU. MetaQuery: nobody published one.
        "blip3o": blip3o,
        "metaquery": blip3o,
        # FLUX.1-Kontext-dev: Flow-GRPO's counting_flux_kontext.
        "kontext": replace(
            flux,
            prompts="data/edits.jsonl",
            group_size=21,
            sampler="flow_sde",
            noise_level=0.9,
            window_size=0,
            window_range=(0, 0),
            guidance=2.5,
            advantage_std="global",
            clip_eps=1e-4,
        ),
        # FLUX.2-klein-base-4B: UniRL's, but for its clip range of 5e-3, with which others saw it collapse.
        "klein": replace(
            flux,
            num_prompts=8,
            group_size=16,
            micro_batch_size=4,
            num_steps=10,
            eval_num_steps=50,
            sampler="flow_sde",
            noise_level=0.7,
            shared_noise=True,
            window_size=0,
            window_range=(0, 0),
            guidance=1.0,
            lora_rank=16,
            learning_rate=5e-5,
        ),
    }[family]


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm: sampler, rollout, advantage, loss


def coefficients(sampler, sigmas, noise_level, window):
    """a_T, b_T, c_T of x' = a x + b v + c eps, float64, for a schedule of T + 1 sigmas; steps outside `window` (first,
    end) are ODE.

    flow_sde: Flow-GRPO eq. 9 with dt = sigma' - sigma < 0; where sigma = 1 its noise scale would divide by zero and
    takes sigmas[1]. cps: FlowCPS (arXiv 2509.05952). ode: Euler.
    """
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    dt = sigma_next - sigma
    if sampler == "flow_sde":
        s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()
        a = 1 + s**2 / (2 * sigma) * dt
        b = (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        c = s * (-dt).sqrt()
    else:
        c = sigma_next * math.sin(noise_level * math.pi / 2)
        r = (sigma_next**2 - c**2).sqrt()
        a, b = (1 - sigma_next) + r, r * (1 - sigma) - sigma * (1 - sigma_next)
    step = torch.arange(len(dt))
    noisy = (step >= window[0]) & (step < window[1])
    return torch.where(noisy, a, 1.0), torch.where(noisy, b, dt), torch.where(noisy, c, 0.0)


@torch.no_grad()
def rollout(model, cond, x, schedule, guidance, seed_BT=None):
    """Denoise x (B C H W) along schedule = (sigmas, a_T, b_T, c_T). Returns the final latent, the states around the
    noisy steps (B K+1 C H W) and their log-probs (B K). Steps with c = 0 are ODE and leave no record."""
    sigmas, a_T, b_T, c_T = schedule
    cond = model.condition(cond)
    states, logps = [x], []
    for i in range(len(c_T)):
        v = model.velocity(x, x.new_full((len(x),), sigmas[i]), cond, guidance)
        a, b, c = (x.new_full((len(x),), coef[i]) for coef in (a_T, b_T, c_T))
        if c_T[i] > 0:
            x, logp_B = sde_step(v, x, a, b, c, seed_BT[:, i])
            states.append(x)
            logps.append(logp_B)
        else:
            x = x + v.float() * (sigmas[i + 1] - sigmas[i]).item()
            if not logps:
                states = [x]
    return x, torch.stack(states, dim=1), torch.stack(logps, dim=1) if logps else x.new_zeros(len(x), 0)


def group_advantage(reward_B, group_size, std=None, clip=5.0):
    """(r - mean of its group) / std, clipped; std = None takes each group's own. NaN rewards are left out and get
    advantage 0."""
    reward_PG = reward_B.view(-1, group_size)
    centred_PG = reward_PG - reward_PG.nanmean(dim=1, keepdim=True)
    if std is None:
        std = centred_PG.square().nanmean(dim=1, keepdim=True).sqrt()
    return (centred_PG / (std + 1e-4)).nan_to_num(0.0).clamp(-clip, clip).flatten()


def clipped_pg_loss(logp_B, old_logp_B, adv_B, clip_eps):
    """PPO's clipped objective, mean over the tile; also returns the ratios."""
    ratio_B = (logp_B - old_logp_B).exp()
    clipped_B = ratio_B.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-adv_B * ratio_B, -adv_B * clipped_B).mean(), ratio_B


# ----------------------------------------------------------------------------------------------------------------------


@parallel.clear_memory_errors()
def main(args: Args):
    # Setup: processes, data, rewards, model, run folder. What can be wrong with the command line is found before
    # weights are loaded.
    with parallel.clear_errors():
        world = parallel.init(args.shard_size)
    master = world.rank == 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with parallel.clear_errors():
        weights = {metric: weight for _, metric, weight in rewards.parse(args.reward)}
        if not args.dry_run:  # which knows FLUX.1-dev without its files
            models.pipeline_class(args.model)
        counts = (args.num_prompts, args.micro_batch_size, args.num_updates, args.eval_num_steps, args.eval_size)
        if min(*counts, args.eval_every, args.save_every) < 1:
            raise ValueError(
                "--num-prompts --micro-batch-size --num-updates --eval-num-steps --eval-size --eval-every --save-every "
                "must be at least 1"
            )
        first_step, end_step = args.window_range if any(args.window_range) else (0, args.num_steps - 1)
        K = args.window_size or end_step - first_step
        if args.num_steps < 2 or not 0 <= first_step < first_step + K <= end_step < args.num_steps:
            raise ValueError(
                f"--window-size {K} --window-range {first_step} {end_step} --num-steps {args.num_steps}: "
                "the window must fit into its range and end before the last step, which has no noise"
            )
        B = args.num_prompts * args.group_size
        tile_size = min(args.micro_batch_size, B)
        pairs_per_update = B * K // args.num_updates
        if B % tile_size or B // tile_size % args.num_updates or pairs_per_update % args.micro_batch_size:
            raise ValueError(
                f"--micro-batch-size {tile_size} must divide the {B} samples of --num-prompts x --group-size "
                f"into tiles whose number --num-updates {args.num_updates} divides, and also the {pairs_per_update} "
                "(sample, step) pairs of an update"
            )
        if args.group_size < 2 or not args.noise_level > 0:
            raise ValueError(
                "--group-size must be at least 2 and --noise-level positive: "
                "one sample has no advantage, and an ODE no log-prob"
            )
        if args.image_guidance != 1 and models.family(args.model) not in ("blip3o", "metaquery"):
            raise ValueError(
                f"--image-guidance {args.image_guidance}: --model {args.model} has none, only unified models"
            )
        eval_source = args.eval_prompts or None
        train_set = prompt_data.load(args.prompts, "train", eval_source=eval_source)
        eval_set = prompt_data.load(args.prompts, "eval", eval_source=eval_source)
        if args.dry_run:
            sizes = memory.estimate(
                args.model,
                dtype,
                tile_rows=args.micro_batch_size,
                resolution=args.resolution,
                num_samples=B,
                num_prompts=args.num_prompts,
                num_states=K + 1,
                guidance=args.guidance,
                image_guidance=args.image_guidance,
                reference_image=train_set[0]["image"] is not None,
                lora_rank=args.lora_rank,
                with_reference=args.kl_coef > 0,
                ema=args.ema_decay > 0,
                world_size=world.size,
                shard_size=args.shard_size,
                checkpoint_activations=args.checkpoint_activations,
                keep_unsharded=args.keep_unsharded,
                cpu_offload=args.cpu_offload,
                offload_encoders=args.offload_encoders,
                cache_prompts=args.cache_prompts,
            )
            return print(memory.table(sizes)) if master else None
        reward_device = torch.device(args.reward_device or world.device)
        judge = (args.judge_url, args.judge_model)
        scores = {metric: rewards.load(name, reward_device, *judge) for name, metric, _ in rewards.parse(args.reward)}
        for part in (train_set, eval_set):
            rewards.try_out(scores.values(), part[0], args.resolution)
        model = models.load(
            args.model,
            world.device,
            dtype,
            sigma_schedule=args.sigma_schedule,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha or 2 * args.lora_rank,
            with_reference=args.kl_coef > 0,
            offload_encoders=args.offload_encoders,
            cache_prompts=args.cache_prompts,
            cache_folder=args.cache_folder or None,
        )
        edits = [prompt_data.check_images(part, model.reference_images) for part in (train_set, eval_set)][0]
        for score in scores.values():
            rewards.check_needs(score, ("image", "source") if edits else ("image",))
        size = (args.resolution, args.resolution)
        sigmas, eval_sigmas = model.sigmas(args.num_steps, *size), model.sigmas(args.eval_num_steps, *size)
        eval_schedule = (eval_sigmas, *coefficients("flow_sde", eval_sigmas, 0.0, (0, 0)))
    for part in [*model.parts.values(), *(model.reference_parts or {}).values()]:
        parallel.shard(
            part, model.blocks(part), world, dtype, args.cpu_offload, args.checkpoint_activations, args.compile
        )
    trained = parallel.trained(model.parts)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay)
    ema = parallel.EMA(trained) if args.ema_decay > 0 else None
    guidance = (args.guidance, args.image_guidance)

    def checkpointed():
        """Everything that training changes, by name."""
        tensors = {f"model/{name}": p.detach() for name, p in trained.items()}
        tensors |= checkpoint.optimizer_tensors(optimizer, {p: name for name, p in trained.items()})
        return tensors | ({f"ema/{name}": s for name, s in ema.shadow.items()} if ema else {})

    # What a resumed run continues from; `cursor` counts the prompts drawn by all ranks.
    state = dict(iteration=0, cursor=0, updates=0, skipped_updates=0, skipped_in_a_row=0)
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
        eval_from = args.eval_prompts or args.prompts
        print(f"prompts: {len(train_set):,} of {args.prompts}; for evaluation {len(eval_set):,} of {eval_from}")
    tracker = run_folder.Tracker(run, "flow_grpo", args) if args.track and master else None
    stop = parallel.StopSignal()
    scorer = ThreadPoolExecutor(1)  # scores one tile while the next one is sampled

    def save(iteration):
        folder = os.path.join(run, "checkpoints", f"{iteration:06d}")
        checkpoint.save(folder, checkpointed(), state | dict(iteration=iteration), args.keep_checkpoints)

    def check_stop():
        """Between tiles all ranks agree on whether one of them was told to stop."""
        if parallel.agree(stop.number):
            raise parallel.Stopped

    def score_tile(pictures, rows, strict=False):
        """Every reward of a tile, fp32 [tile, R]; with `strict`, also the strict form of those that have one, as last
        columns."""
        samples = {"image": pictures}
        if edits:
            samples["source"] = run_folder.to_uint8(prompt_data.images(rows, *size))
        prompts, metadata = [row["prompt"] for row in rows], [row["metadata"] for row in rows]
        forms = [*scores.values(), *(score.strict for score in scores.values() if strict and score.strict)]
        return torch.stack([form(samples, prompts, metadata) for form in forms], dim=1)

    def total(reward_BR):
        """Weighted sum of the rewards; NaN where one of them failed."""
        return reward_BR[:, : len(weights)] @ torch.tensor(list(weights.values()))

    def evaluate():
        """ODE samples for fixed held-out prompts and noise, with the averaged weights if there are any. Returns
        metrics, and pictures and captions for the grid."""
        mine = torch.arange(math.ceil(args.eval_size / world.size)) * world.size + world.rank  # as many on every rank
        rows = [eval_set[i] for i in prompt_data.order(len(eval_set), 0, 0, int(mine.max()) + 1)[mine.tolist()]]
        seed_B = fold_seed(0, EVAL, mine)
        futures, pictures = [], []
        with ema.applied() if ema else nullcontext(), parallel.unsharded(model.parts, args.keep_unsharded):
            for start in tqdm(range(0, len(rows), tile_size), desc="evaluate", leave=False, disable=not master):
                check_stop()
                tile = slice(start, start + tile_size)
                prompts, sources = [row["prompt"] for row in rows[tile]], prompt_data.images(rows[tile], *size)
                cond = model.encode(prompts, sources, seeds=seed_B[tile])
                x, _, _ = rollout(model, cond, model.init_noise(seed_B[tile], *size), eval_schedule, guidance)
                images = run_folder.to_uint8(model.decode(x))
                futures.append(scorer.submit(score_tile, images, rows[tile], True))
                pictures += images[: 16 - len(pictures)]
        judged = torch.cat([future.result() for future in futures])
        captions = [f"{r:.2f} {row['prompt']}" for r, row in zip(total(judged).tolist(), rows[: len(pictures)])]
        if edits:  # before and after, side by side
            before = run_folder.to_uint8(prompt_data.images(rows[: len(pictures)], *size))
            pictures = [np.concatenate(pair, axis=1) for pair in zip(before, pictures)]
        judged = parallel.all_gather(judged.masked_fill((mine >= args.eval_size)[:, None], math.nan))
        scored = {"eval_reward": total(judged).nanmean().item()}
        scored |= {f"eval_reward/{name}": judged[:, r].nanmean().item() for r, name in enumerate(scores)}
        if judged.shape[1] > len(scores):
            scored["eval_strict"] = judged[:, len(scores) :].nanmean().item()
        return scored, pictures, captions

    def log(row):
        """One line of metrics.jsonl, and the curves and a printed summary where there was an evaluation."""
        if not master:
            return
        run_folder.append(run, row)
        if tracker:
            tracker.log(row)
        if "eval_reward" in row:
            run_folder.curves(run, CURVES)
            tqdm.write(" | ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if "reward" in row:
            bar.set_postfix(reward=f"{row['reward']:.3f}", on_policy_err=f"{row['on_policy_err']:.0e}")

    # Training loop
    iteration = state["iteration"]
    bar = tqdm(initial=iteration, total=args.num_iterations, desc="flow_grpo", disable=not master)
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
            if iteration == args.num_iterations:
                log(row)
                break

            # 1) Rollout: G samples for each of P prompts; the samples of one prompt are neighbours in B. A prompt's
            # slot among those of all ranks keys its noise, so that the number of ranks changes nothing.
            started = time.perf_counter()
            slot_P = torch.arange(args.num_prompts) + world.rank * args.num_prompts
            picks = prompt_data.order(len(train_set), args.seed, state["cursor"], args.num_prompts * world.size)
            rows = [train_set[i] for i in picks[slot_P.tolist()]]
            seed_P = fold_seed(args.seed, REFERENCE, iteration, slot_P)  # of the noise in pictures to edit
            sources = prompt_data.images(rows, *size)
            cond_P = model.encode([row["prompt"] for row in rows], sources, seeds=seed_P)
            seed_PG = fold_seed(args.seed, NOISE, iteration, slot_P[:, None], torch.arange(args.group_size))
            seed_B = seed_PG.flatten().to(world.device)
            start_B = seed_PG[:, :1].expand_as(seed_PG).flatten().to(world.device) if args.shared_noise else seed_B
            seed_BT = fold_seed(seed_B[:, None], STEP, torch.arange(args.num_steps, device=world.device))
            first = first_step + fold_seed(args.seed, WINDOW, iteration).item() % (end_step - first_step - K + 1)
            schedule = (sigmas, *coefficients(args.sampler, sigmas, args.noise_level, (first, first + K)))
            prompt_B = torch.arange(B, device=world.device) // args.group_size
            states, logps, futures = [], [], []
            with parallel.unsharded(model.parts, args.keep_unsharded):
                for tile in tqdm(torch.arange(B).split(tile_size), desc="rollout", leave=False, disable=not master):
                    check_stop()
                    cond = {name: rows_P[prompt_B[tile]] for name, rows_P in cond_P.items()}
                    noise = model.init_noise(start_B[tile], *size)
                    x, states_tile, logp_tile = rollout(model, cond, noise, schedule, guidance, seed_BT[tile])
                    states.append(states_tile)
                    logps.append(logp_tile)
                    pictures = run_folder.to_uint8(model.decode(x))
                    futures.append(scorer.submit(score_tile, pictures, [rows[p] for p in prompt_B[tile].tolist()]))
            states_BKCHW, old_logp_BK = torch.cat(states), torch.cat(logps)  # K + 1 states, K log-probs
            seconds_rollout = time.perf_counter() - started

            # 2) Reward: what is still being scored is waited for
            started = time.perf_counter()
            reward_BR = torch.cat([future.result() for future in futures])
            reward_B = total(reward_BR)
            all_BR = parallel.all_gather(reward_BR)
            for r, name in enumerate(scores):
                if all_BR[:, r].isnan().all():
                    raise SystemExit(
                        f"error: reward {name} failed (NaN) for all {len(all_BR)} samples of iteration {iteration}"
                    )
            seconds_reward = time.perf_counter() - started

            # 3) Advantage: relative to the group; all trained steps of a trajectory share it
            started = time.perf_counter()
            all_B = total(all_BR)
            std = (all_B - all_B.nanmean()).square().nanmean().sqrt() if args.advantage_std == "global" else None
            adv_B = group_advantage(reward_B, args.group_size, std, args.advantage_clip).to(world.device)

            # 4) Loss and 5) Update: the trained steps are replayed in tiles of (sample, step) pairs. Each update
            # takes its share of the rollout's tiles, in random order; a replayed tile has the rows and the shape
            # that it had in the rollout, and so its bits.
            tile_order = fold_seed(args.seed, ORDER, iteration, torch.arange(B // tile_size)).argsort()
            stats, grad_norms, on_policy_errs = [], [], []
            for update, tiles in enumerate(tile_order.chunk(args.num_updates)):
                sample_S = (tiles[:, None, None] * tile_size + torch.arange(tile_size)).expand(-1, K, -1).flatten()
                step_S = torch.arange(K)[None, :, None].expand(len(tiles), -1, tile_size).flatten()
                pairs = list(zip(sample_S.split(args.micro_batch_size), step_S.split(args.micro_batch_size)))
                for n, (i, k) in enumerate(tqdm(pairs, desc="update", leave=False, disable=not master)):
                    if update == 0:
                        check_stop()
                    parallel.accumulate(model.parts, n == len(pairs) - 1, args.keep_unsharded)
                    i, k = i.to(world.device), k.to(world.device)
                    x, x_next = states_BKCHW[i, k], states_BKCHW[i, k + 1]
                    sigma, a, b, c = (coef.to(world.device, torch.float32)[first + k] for coef in schedule)
                    cond = {name: rows_P[prompt_B[i]] for name, rows_P in cond_P.items()}
                    v_ref = None
                    if args.kl_coef > 0:
                        with torch.no_grad(), parallel.reference(model):
                            v_ref = model.velocity(x, sigma, model.condition(cond), guidance)
                    v = model.velocity(x, sigma, model.condition(cond), guidance)
                    logp_S, v_mse_S = sde_logp(v, x, x_next, a, b, c, v_ref)
                    old_logp_S, adv_S = old_logp_BK[i, k], adv_B[i]
                    pg_loss, ratio_S = clipped_pg_loss(logp_S, old_logp_S, adv_S, args.clip_eps)
                    kl = (b**2 * v_mse_S / (2 * c**2)).mean()  # exact: two Gaussians with one std
                    loss = pg_loss + args.kl_coef * kl
                    (loss / len(pairs)).backward()
                    clipped_S = (ratio_S - 1).abs() > args.clip_eps
                    stats.append(torch.stack([loss, kl, clipped_S.float().mean(), ratio_S.mean()]).detach())
                    if update == 0:
                        on_policy_errs.append((logp_S - old_logp_S).detach().abs().max())
                grad_norm = parallel.clip_grad_norm(trained.values(), args.max_grad_norm)
                grad_norms.append(grad_norm)
                if math.isfinite(grad_norm):
                    fallen = 0.9 * min(1.0, iteration / (args.decay_iterations or math.inf))
                    for group in optimizer.param_groups:
                        group["lr"] = args.learning_rate * min(
                            1 - fallen, (state["updates"] + 1) / max(1, args.warmup_updates)
                        )
                    optimizer.step()
                    state["updates"] += 1
                    state["skipped_in_a_row"] = 0
                    if ema:
                        ema.update(min(args.ema_decay, (1 + state["updates"]) / (10 + state["updates"])))
                else:
                    state["skipped_updates"] += 1
                    state["skipped_in_a_row"] += 1
                    if state["skipped_in_a_row"] == 3:
                        raise SystemExit(
                            f"error: three gradients in a row were not finite; {run} keeps the last good one"
                        )
                optimizer.zero_grad(set_to_none=True)
            state["cursor"] += args.num_prompts * world.size
            seconds_update = time.perf_counter() - started

            loss, kl, clipfrac, ratio = parallel.all_gather(torch.stack(stats).cpu()).mean(dim=0).tolist()
            on_policy_err = parallel.all_gather(torch.stack(on_policy_errs).cpu()).max().item()
            reward_PG = all_B.view(-1, args.group_size)
            std_P = (reward_PG - reward_PG.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1).sqrt()
            row |= dict(
                reward=reward_PG.nanmean().item(),
                reward_std=std_P.nanmean().item(),
                loss=loss,
                clipfrac=clipfrac,
                ratio=ratio,
                on_policy_err=on_policy_err,
                grad_norm=sum(grad_norms) / len(grad_norms),
                zero_std_frac=(std_P < 1e-6).float().mean().item(),
                nan_reward_frac=reward_PG.isnan().float().mean().item(),
                skipped_updates=state["skipped_updates"],
                samples_per_s=reward_PG.numel() / (seconds_rollout + seconds_reward + seconds_update),
                seconds_rollout=seconds_rollout,
                seconds_reward=seconds_reward,
                seconds_update=seconds_update,
            )
            row |= {f"reward/{name}": all_BR[:, r].nanmean().item() for r, name in enumerate(scores)}
            row |= {"kl": kl} if args.kl_coef > 0 else {}
            log(row)
            bar.update()
            if parallel.agree(stop.number):
                iteration += 1
                raise parallel.Stopped
    except parallel.Stopped:
        # Nothing of an unfinished iteration has changed the weights: it starts over when the run is resumed.
        save(iteration)
        parallel.exit_stopped(stop, run, master)
    finally:
        scorer.shutdown(cancel_futures=True)
        bar.close()

    # Export, with the averaged weights
    with ema.applied() if ema else nullcontext():
        tensors = checkpoint.full_tensors({name: p.detach() for name, p in trained.items()})
    if master:
        model.save(os.path.join(run, "model"), tensors)
        card.write(os.path.join(run, "model"), run, recipe)
        print(f"wrote {run}: curves.png, samples/, metrics.jsonl, model/")
    stop.restore()
    return row


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with parallel.clear_errors():
        defaults = recipe(run_folder.peek(arguments, "--model", "tiny-flux"))
    main(run_folder.command_line(defaults, arguments, __file__))
