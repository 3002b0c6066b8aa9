"""
Flow-matching pretraining of diffusion models and of unified ones, https://arxiv.org/abs/2210.02747

    x_sigma = (1 - sigma) x0 + sigma eps,      loss = mean (v(x_sigma, sigma, condition) - (eps - x0))^2

A unified model (models/blip3o.py) learns to draw from captions and to edit pictures at once, through its frozen
language model; --train-lm trains that too, on answers about pictures, or with --task t2icot on refining a prompt before
it is drawn, the cold start of that task's RL. sigma is logit-normal (Stable Diffusion 3,
https://arxiv.org/abs/2403.03206, eq. 19) or uniform on the model's own schedule (MetaQuery); shares of the captions and
of the pictures to edit are dropped, so that the model can be guided. Pictures are drawn on the fly (the shapes world,
of which there is no end) or streamed from tars, folders, .jsonl, .parquet or the hub (data/stream.py).

CPU or 1 GPU:  python pretrain.py                                       tiny-blip3o, 20 minutes on 4 cores
8 GPUs:        torchrun --nproc_per_node 8 pretrain.py --model blip3o  which fetches models and data by itself
One model:     torchrun --nproc_per_node 8 pretrain.py --model flux --data "pictures/*.tar"
From nothing:  runs/tiny_blip3o.sh and runs/tiny_flux.sh, which made what is shipped
"""

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
import rewards
from data import prompts as prompt_data
from data import stream, worlds
from kernels.sde_step import fold_seed, philox_normal
from models import blip3o, card, checkpoint, memory, parallel, run_folder

# Shape suffixes: B images of a tile, C H W latent, L tokens of an answer.

# What a random number is for: the second key of every seed.
NOISE, SIGMA, DROP, REFERENCE, EVAL, EVAL_LOSS, EVAL_REFERENCE, EVAL_TEXT = range(8)
EVAL_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the validation loss, taken in turn by the images
CURVES = [["loss", "eval_loss", "eval_loss_edit"], "grad_norm", ["eval_strict", "eval_strict_edit", "eval_text"]]


@dataclass
class Args:
    # Run
    model: str = "tiny-blip3o-start"
    """alias (see models/__init__.py), hub id or folder in diffusers layout, or folder of a unified model; blip3o and
    metaquery are new ones, made of a language model and a SANA from the hub"""
    task: Literal["t2i", "t2icot"] = "t2i"
    """t2i: draw what captions say, and with --edit-data make edits; t2icot: --data has prompts and, as answers, what
    they are to be refined to: the language model learns to answer so, and the pictures are drawn from the answers"""
    data: str = "shapes"
    """captioned pictures: shapes or shapes-cot (drawn on the fly), *.tar, *.parquet, *.jsonl, a folder, or
    hub:owner/name/config:split, with #column,image=column,answer=column where names differ (data/stream.py)"""
    edit_data: str = "shapes-edit"
    """pictures and what they become, in the same forms with source=column (empty = no edits)"""
    edit_share: float = 0.6
    """share of the pictures that are edits"""
    text_data: str = ""
    """questions about pictures and answers, in the same forms: what --train-lm learns from with --task t2i"""
    eval_data: str = ""
    """held-out captioned pictures for the validation loss (empty = those of the shapes world, else none)"""
    eval_edit_data: str = ""
    """held-out edits for the validation loss (empty = those of the shapes world, else none)"""
    eval_prompts: str = ""
    """held-out prompts to draw, in the forms of flow_grpo.py (empty = those of the shapes world, else none)"""
    eval_edits: str = ""
    """held-out pictures and instructions to edit (empty = those of the shapes world, else none)"""
    eval_text: str = "shapes-qa"
    """held-out questions, with pictures or without, that the language model answers (empty = none)"""
    reward: str = "shapes"
    """reward that judges what was drawn in an evaluation (empty = pictures only)"""
    text_reward: str = "shapes_qa"
    """reward that judges the answers to --eval-text"""
    out: str = ""
    """run folder (empty = outputs/pretrain-<time>)"""
    resume: str = ""
    """run folder to continue, bit for bit; only --num-iterations --eval-every --save-every --max-bad --track may
    change"""
    seed: int = 1
    """seed of images and noise; runs with one seed are the same run"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """what the model computes in; trained weights are fp32 either way"""

    # Size
    num_iterations: int = 2400
    """optimizer steps"""
    batch_size: int = 32
    """images per optimizer step and rank"""
    micro_batch_size: int = 16
    """images per forward and backward, all captioned or all edits; lower it if memory runs out"""
    noise_levels: int = 4
    """noise levels that every image is trained at: its condition and latents, which may cost more than the DiT, are
    computed once for all of them"""
    resolution: int = 32
    """height and width in pixels; of pictures that are not drawn on the fly the root of their area, in one of 11 aspect
    ratios"""

    # Algorithm
    text_dropout: float = 0.05
    """share of images whose caption alone is dropped"""
    reference_dropout: float = 0.05
    """share of edits whose picture alone is dropped (of what reaches the DiT; MetaQuery: what its LM sees)"""
    both_dropout: float = 0.05
    """share of images where both are; of those without a picture to edit the caption is"""
    sigma_distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    """noise levels of training: logit-normal, or uniform on 1,000 steps of the model's own schedule"""
    sigma_mean: float = 0.0
    """mean of logit(sigma), for logit-normal"""
    sigma_std: float = 1.0
    """standard deviation of logit(sigma), for logit-normal"""
    train_dm: bool = True
    """train the diffusion model, of a unified one its queries, connector and DiT"""
    train_lm: bool = False
    """train the language model of a unified model on answers"""
    text_weight: float = 1.0
    """weight of the negative log-likelihood of an answer, in nats"""

    # Optimizer
    learning_rate: float = 2e-3
    """AdamW learning rate"""
    warmup_updates: int = 50
    """optimizer steps of linear learning-rate warm-up (0 = none)"""
    decay_iterations: int = 2400
    """iterations in which the learning rate falls, as a cosine, to --final-learning-rate and stays (0 = constant)"""
    final_learning_rate: float = 5e-5
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

    # Evaluation and saving
    num_steps: int = 12
    """denoising steps of evaluation (ODE)"""
    guidance: float = 2.0
    """text guidance of evaluation (1 = off)"""
    image_guidance: float = 1.5
    """guidance of evaluation on the picture to edit, of unified models (1 = off)"""
    eval_every: int = 400
    """iterations between evaluations on held-out data"""
    eval_size: int = 512
    """pictures of each kind per evaluation, over all ranks; their noise is the same in every evaluation of every run"""
    save_every: int = 400
    """iterations between checkpoints; one is also made at the start, at the end and when the run is interrupted"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep (0 = all)"""

    # Data reading
    max_bad: float = 0.01
    """share of samples that may be unreadable; they are skipped, counted and named, and more of them end the run"""
    shuffle_buffer: int = 1000
    """samples that are shuffled together; those of parquet files are held encoded, 0.4 MB each or so"""

    # Machine
    keep_unsharded: bool = True
    """keep parameters gathered in evaluation and between tiles: no communication per step, memory of a whole copy"""
    checkpoint_activations: bool = False
    """recompute every block in the backward pass: less memory, a third more compute"""
    cpu_offload: bool = False
    """keep sharded parameters, gradients and optimizer state in CPU memory"""
    offload_encoders: bool = False
    """keep text encoders in CPU memory while they do not encode"""
    cache_prompts: int = 4096
    """caption embeddings to keep in CPU memory (4 MB each for FLUX; unified models have none)"""
    shard_size: int = 0
    """ranks a copy of the model is sharded over, e.g. the GPUs of a node (0 = all)"""
    compile: bool = False
    """torch.compile every block"""
    track: bool = False
    """also log to Weights & Biases"""
    dry_run: bool = False
    """print what the run needs per GPU on 1, 8 and 64 GPUs, without loading weights, and stop"""


def recipe(model):
    """The defaults for a model: what runs if nothing else is on the command line."""
    family, tiny = models.family(model), os.path.basename(os.path.normpath(model)).startswith("tiny-")
    unified = family in ("blip3o", "metaquery")
    if tiny and unified:
        return Args(model=model, sigma_distribution="uniform" if family == "metaquery" else "logit-normal")
    one = dict(edit_data="", eval_text="", text_dropout=0.1, reference_dropout=0.0, both_dropout=0.0, noise_levels=1)
    if tiny:
        edits = dict(data="", edit_data="shapes-edit", edit_share=1.0) if family == "kontext" else {}
        return Args(
            model=model,
            num_iterations=500,
            batch_size=128,
            micro_batch_size=128,
            learning_rate=1e-4,
            warmup_updates=20,
            decay_iterations=0,
            num_steps=6,
            guidance=1.0,
            image_guidance=1.0,
            eval_every=250,
            eval_size=1024,
            save_every=250,
            **one | edits,
        )
    # The pretraining of UniRL-Zero, on 8 GPUs: its data, whole, learning rate 1e-4 to 1e-5 with 0.3 % of warm-up, 128
    # images, three times 5 % dropped. Its length is not published; ours is one epoch.
    full = Args(
        model=model,
        data="hub:jackyhate/text-to-image-2M/data_512_2M",
        edit_data="hub:TIGER-Lab/OmniEdit-Filtered-1.2M:train#edited_prompt_list,image=edited_img,source=src_img",
        edit_share=0.375,
        eval_text="",
        reward="",
        dtype="bf16",
        num_iterations=25_000,
        batch_size=16,
        micro_batch_size=4,
        noise_levels=1,
        resolution=1024,
        learning_rate=1e-4,
        warmup_updates=75,
        decay_iterations=25_000,
        final_learning_rate=1e-5,
        ema_decay=0.999,
        num_steps=20,
        guidance=3.5,
        image_guidance=1.0,
        eval_every=1000,
        eval_size=64,
        save_every=1000,
        keep_unsharded=False,
        checkpoint_activations=True,
    )
    if family == "blip3o":
        return full
    if family == "metaquery":  # at 512 px, with its noise levels and guidance
        guidance = dict(guidance=3.0, image_guidance=1.5)
        return replace(full, resolution=512, sigma_distribution="uniform", warmup_updates=1000, **guidance)
    # One diffusion model is not pretrained but tuned, on pictures of the user's own.
    lora = dict(lora_rank=64, num_iterations=2000, batch_size=8, micro_batch_size=2, decay_iterations=0)
    return replace(full, data="", resolution=512, **one, **lora)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_stream(args, flag, spec, seed, rank=0, world_size=1, edits=False, answers=False):
    """A data/stream.py Stream of one flag, after a look at its first sample: what is wrong with data should be known
    before the weights are loaded."""
    source = stream.Stream(spec, seed, rank, world_size, args.shuffle_buffer, args.max_bad)
    start, row = source.state(), source.next(1)[0]
    if edits and row["source"] is None:
        raise ValueError(f"{flag}: {row['where']} has no picture to edit; name its column or member, source=NAME")
    if answers and row["answer"] is None:
        raise ValueError(f"{flag}: {row['where']} has no answer; name its column, answer=NAME")
    source.load_state(start)
    return source


def open_images(args, world):
    """The endless training pictures, captioned ones and edits, and the held-out ones, a dict of their metric: worlds
    already in batches, or streams."""
    names, cot = [name for name in (args.data, args.edit_data) if name], args.task == "t2icot"
    share = args.edit_share if args.data else 1.0
    if not names:
        raise ValueError(
            "--data is empty: expected captioned pictures, e.g. shapes, 'shards/*.tar' or captions.parquet"
        )
    on_the_fly = [name in worlds.WORLDS for name in names]
    if any(on_the_fly) != all(on_the_fly):
        raise ValueError(f"--data {args.data} --edit-data {args.edit_data}: expected two shapes worlds, or none")
    size, ranks = (args.micro_batch_size, args.resolution), (world.rank, world.size)
    if on_the_fly[0]:
        train = worlds.World(names, share, args.seed, *size, *ranks)
    else:
        flags = [("--data", args.data, False), ("--edit-data", args.edit_data, True)]
        train = [
            (open_stream(args, flag, spec, args.seed + edits, *ranks, edits, cot), share if edits else 1 - share)
            for flag, spec, edits in flags
            if spec
        ]
        train = stream.Mixture(train, args.seed) if len(train) == 2 else train[0][0]
    held_out = {}
    for edits, (name, spec) in enumerate([(args.data, args.eval_data), (args.edit_data, args.eval_edit_data)]):
        metric, flag = ("eval_loss_edit", "--eval-edit-data") if edits else ("eval_loss", "--eval-data")
        if (spec or name) in worlds.WORLDS:
            held_out[metric] = worlds.World([spec or name], 0, 0, *size, *ranks, held_out=True)
        elif spec:
            held_out[metric] = open_stream(args, flag, spec, 0, *ranks, edits, cot)
    return train, held_out


def open_text(args, world):
    """The endless questions and answers that the language model is trained on, in batches."""
    if args.text_data in worlds.WORLDS:
        return worlds.World(
            [args.text_data], 0, args.seed, args.micro_batch_size, args.resolution, world.rank, world.size
        )
    return open_stream(args, "--text-data", args.text_data, args.seed, world.rank, world.size, answers=True)


def batched(source, args, multiple):
    """Batches of --micro-batch-size; multiple: of which the sides of pictures have to be, in pixels."""
    if isinstance(source, worlds.World):
        return source
    return stream.Batches(source, args.micro_batch_size, args.resolution**2, multiple)


def side_multiple(model):
    """The number of pixels of which the sides of a picture have to be a multiple."""
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        try:
            model.latent_size(multiple, multiple)
            return multiple
        except ValueError:
            pass
    raise ValueError("the model takes no square pictures of 64 x 64 pixels or less")


def to_tensor(pictures):
    """PIL pictures of one size as float [0, 1], B 3 H W."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


# ----------------------------------------------------------------------------------------------------------------------
# Conditions and losses


def dropped(args, index_B, edits):
    """Which images of a tile lose their caption, and which the picture to edit: two bool [B], functions of (seed,
    index)."""
    uniform = (fold_seed(args.seed, DROP, index_B) % 2**24).double() / 2**24
    text, picture = args.text_dropout, args.reference_dropout if edits else 0.0
    both = (text + picture <= uniform) & (uniform < text + picture + args.both_dropout)
    return (uniform < text) | both, (text <= uniform) & (uniform < text + picture) | both & edits


def noise_levels(args, index_B, schedule):
    """--noise-levels sigmas for each image, fp32 [N] with those of an image as neighbours, functions of (seed, index):
    an image's are drawn one from each of as many equally likely ranges. schedule: the model's own 1,000."""
    first_B = ((fold_seed(args.seed, SIGMA, index_B) % 2**24).double() + 0.5) / 2**24
    uniform_N = ((torch.arange(args.noise_levels) + first_B[:, None]) / args.noise_levels).flatten()
    if args.sigma_distribution == "uniform":
        return schedule[(uniform_N * len(schedule)).long()]
    return (args.sigma_mean + args.sigma_std * torch.special.ndtri(uniform_N)).sigmoid().float()


def null_text(model, cond, sources=None):
    """What stands for no text in each row of a condition: the null rows that guidance takes, which are part of it, or
    where the model has guidance of another kind the empty caption's."""
    null = {name.removesuffix("_null"): rows for name, rows in cond.items() if name.endswith("_null")}
    if not null:  # some models encode no prompt without a picture
        null = model.encode([""], None if sources is None else sources[:1])
        null.pop("image", None)
    return cond | null


def drop_text(cond, null, drop_B):
    """Condition rows with those of `null` (one row, or as many) where drop_B is true."""
    return {k: torch.where(drop_B.view(-1, *[1] * (rows.dim() - 1)), null[k], rows) for k, rows in cond.items()}


def conditioned(model, prompts, sources=None, seed_B=None, drop_text_B=None, drop_picture_B=None):
    """The condition of a tile, with what is dropped replaced as the model does it in guidance: rows of null text and
    zero latents or, for MetaQuery, empty captions and black pictures, which only what goes into its LM can be.

    prompts: B str. sources: float [0, 1], B 3 H W, or None. seed_B: int64 [B], of the noise in the reference.
    """
    seeds = {} if seed_B is None else dict(seeds=seed_B)
    if drop_text_B is None:
        return model.condition(model.encode(prompts, sources, **seeds))
    if getattr(model, "variant", None) is blip3o.VARIANTS["metaquery"]:
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, drop_text_B.tolist())]
        if sources is not None:
            sources = sources.masked_fill(drop_picture_B.view(-1, 1, 1, 1), 0)
        cond = model.encode(prompts, sources, **seeds)
        return model.condition({k: rows for k, rows in cond.items() if not k.endswith(("_null", "_image"))})
    cond = model.condition(model.encode(prompts, sources, **seeds))
    reference = cond.get("reference")
    cond = drop_text(cond, null_text(model, cond, sources), drop_text_B.to(model.device))
    if sources is not None and drop_picture_B.any():
        cond["reference"] = reference.masked_fill(drop_picture_B.view(-1, 1, 1, 1).to(reference.device), 0)
    return cond


def squared_error(model, cond, x0, sigma_B, seed_B):
    """Mean squared error of the velocity of each image at its noise level sigma_B [B]."""
    eps = philox_normal(seed_B, x0.shape[1:])
    sigma = sigma_B.view(-1, 1, 1, 1)
    v = model.velocity((1 - sigma) * x0 + sigma * eps, sigma_B, cond)
    return F.mse_loss(v.float(), eps - x0, reduction="none").mean(dim=(1, 2, 3))


def flow_matching_loss(model, cond, x0, sigma_B, seed_B):
    """What is trained: the mean of it over the tile."""
    return squared_error(model, cond, x0, sigma_B, seed_B).mean()


def answer_loss(lm, rows, refine):
    """Negative log-likelihood of the answers, end token included, in nats, mean over the rows. refine: the prompts are
    to be refined, and the answers are what to."""
    messages, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    images = None if refine else [row["image"] for row in rows]
    if refine:
        messages = [blip3o.REFINE.format(message) for message in messages]
        answers = [f"<answer>{answer}</answer>" for answer in answers]
    ids = [lm.tokenizer.encode(answer, add_special_tokens=False) + [lm.tokenizer.eos_token_id] for answer in answers]
    ids_BL, mask_BL = torch.zeros(2, len(rows), max(map(len, ids)), dtype=torch.int64)
    for row, out, mask in zip(ids, ids_BL, mask_BL):
        out[: len(row)], mask[: len(row)] = torch.tensor(row), 1
    prompts = lm.encode(messages, ids_BL.shape[1], images)
    return -lm.logps(prompts, ids_BL, mask_BL, 1.0).sum(dim=1).mean()


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
        counts = (args.batch_size, args.micro_batch_size, args.noise_levels, args.num_steps, args.eval_size)
        if min(*counts, args.eval_every, args.save_every) < 1:
            raise ValueError(
                "--batch-size --micro-batch-size --noise-levels --num-steps --eval-size --eval-every --save-every must "
                "be at least 1"
            )
        if args.batch_size % args.micro_batch_size:
            raise ValueError(f"--micro-batch-size {args.micro_batch_size} must divide --batch-size {args.batch_size}")
        num_tiles, tile_size = args.batch_size // args.micro_batch_size, args.micro_batch_size * args.noise_levels
        family, cot = models.family(args.model), args.task == "t2icot"
        unified, edits = family in ("blip3o", "metaquery"), bool(args.edit_data)
        if not unified and (args.train_lm or cot or args.eval_text or not args.train_dm):
            raise ValueError(
                f"--model {args.model} is a diffusion model: --train-lm, --no-train-dm, --task t2icot and --eval-text "
                "are for unified models"
            )
        if not unified and args.image_guidance != 1:
            raise ValueError(
                f"--image-guidance {args.image_guidance}: --model {args.model} has none, only unified models"
            )
        if not unified and edits and args.reference_dropout + args.both_dropout > 0:
            raise ValueError(
                f"--reference-dropout and --both-dropout must be 0 with --model {args.model}, which is not guided by "
                "its picture"
            )
        if not 0 <= args.text_dropout + args.reference_dropout + args.both_dropout <= 1:
            raise ValueError("--text-dropout, --reference-dropout and --both-dropout must add up to 1 at most")
        if not (args.train_dm or args.train_lm) or (cot and not args.train_lm):
            raise ValueError(f"--task {args.task}: nothing would learn its answers, or anything; add --train-lm")
        if cot and edits:
            raise ValueError("--task t2icot has no edits: add --edit-data ''")
        if bool(args.text_data) != (args.train_lm and not cot):
            raise ValueError("--text-data and --train-lm belong together (--task t2icot has the answers in --data)")
        if args.dry_run:
            found = memory.pretraining(
                args.model,
                dtype,
                micro_batch_size=args.micro_batch_size,
                resolution=args.resolution,
                noise_levels=args.noise_levels,
                gpus=sorted({1, 8, 64, world.size}),
                guidance=args.guidance,
                lora_rank=args.lora_rank,
                ema=args.ema_decay > 0,
                shard_size=args.shard_size,
                checkpoint_activations=args.checkpoint_activations,
                keep_unsharded=args.keep_unsharded,
                cpu_offload=args.cpu_offload,
                offload_encoders=args.offload_encoders,
                cache_prompts=args.cache_prompts,
                reference_image=edits,
                **(dict(train_lm=args.train_lm) if unified else {}),
            )
            if master:
                print(
                    "\n".join(
                        f"{count:15,} parameters: {part}" for part, count in memory.parameters(args.model).items()
                    )
                )
                print(memory.pretraining_table(found))
            return None
        train, held_out = open_images(args, world)
        text = open_text(args, world) if args.text_data else None
        prompt_sets = {}  # what is drawn in evaluations, by the suffix of its metrics
        for suffix, name, source in zip(
            ("", "_edit"), (args.data, args.edit_data), (args.eval_prompts, args.eval_edits)
        ):
            if source or name in worlds.WORLDS:
                prompt_sets[suffix] = prompt_data.load(
                    source or name.replace("-cot", ""), "eval", eval_source=source or None
                )
                if (prompt_sets[suffix][0]["image"] is None) == bool(suffix):
                    raise ValueError(
                        f"{source}: --eval-prompts must be without pictures and --eval-edits with them, all of them"
                    )
        questions = prompt_data.load(args.eval_text, "eval") if args.eval_text else None
        score = rewards.load(args.reward, world.device) if args.reward and prompt_sets else None
        text_score = rewards.load(args.text_reward, world.device) if questions else None
        if score:
            rewards.check_needs(score, ("image",))
        if text_score:
            rewards.check_needs(text_score, ("text",))
    run = parallel.same_text(args.out)
    with parallel.clear_errors():
        source = args.model
        if source in models.FULL_SIZE:
            source = os.path.join(run, "start")
            if master and not args.resume:
                blip3o.create(source, *models.FULL_SIZE[args.model], args.model, seed=args.seed)
            parallel.agree(False)  # the others wait for it
        trained_parts = dict(train_dm=args.train_dm, train_lm=args.train_lm) if unified else {}
        model = models.load(
            source,
            world.device,
            dtype,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha or 2 * args.lora_rank,
            offload_encoders=args.offload_encoders,
            cache_prompts=args.cache_prompts,
            **trained_parts,
        )
        if edits and model.reference_images == "none":
            raise ValueError(f"--edit-data: --model {args.model} makes pictures from text; add --edit-data ''")
        if args.data and model.reference_images == "required":
            raise ValueError(f"--data: --model {args.model} edits pictures; add --data '' and give --edit-data")
        multiple = side_multiple(model)
        size = (args.resolution, args.resolution)
        sigmas = model.sigmas(args.num_steps, *size)
        schedule = model.sigmas(1000, *size)[:-1].float()
        train = batched(train, args, multiple)
        text = batched(text, args, multiple) if text else None
        held_out = {metric: batched(batches, args, multiple) for metric, batches in held_out.items()}
        held_out_starts = {metric: batches.state() for metric, batches in held_out.items()}
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

    # What a resumed run continues from; `cursor` counts the images seen by all ranks, `data` is every rank's place.
    state = dict(iteration=0, cursor=0, skipped_updates=0, skipped_in_a_row=0, data=[])
    newest = checkpoint.latest(args.resume) if args.resume else None
    if newest:
        with parallel.clear_errors():
            state = checkpoint.load(newest, checkpointed())
            place = state["data"][world.rank % len(state["data"])]
            train.load_state(place["images"])
            if text:
                text.load_state(place["text"])
    if master:
        run_folder.create(run, args, __file__)
        run_folder.cut(run, state["iteration"])
        count = sum(p.numel() for p in trained.values())
        print(f"{run}: {args.model}, {count:,} trained parameters, {world.size} x {world.device.type}, {args.dtype}")
        print(f"attention: {model.attention}; {torch.get_num_threads()} CPU threads per rank")
        for what, missing in (("loss", "eval_loss" not in held_out), ("samples", not prompt_sets)):
            if missing:
                flag = "--eval-data" if what == "loss" else "--eval-prompts"
                print(f"no {flag}: evaluations have no {what}")
    tracker = run_folder.Tracker(run, "pretrain", args) if args.track and master else None
    stop = parallel.StopSignal()

    def save(iteration):
        folder = os.path.join(run, "checkpoints", f"{iteration:06d}")
        places = [json.loads(text) for text in parallel.gather_text(json.dumps(place))]
        checkpoint.save(folder, checkpointed(), state | dict(iteration=iteration, data=places), args.keep_checkpoints)

    def check_stop():
        """Between tiles all ranks agree on whether one of them was told to stop."""
        if parallel.agree(stop.number):
            raise parallel.Stopped

    def progress(items, description):
        return tqdm(items, desc=description, leave=False, disable=not master)

    @torch.no_grad()
    def evaluate():
        """Everything held out, with the averaged weights if there are any. Returns metrics, and for each kind of
        prompts pictures and captions for the grid."""
        scored, shown = {}, {}
        with ema.applied() if ema else nullcontext():
            with parallel.unsharded(model.parts, args.keep_unsharded):
                for suffix, prompt_set in prompt_sets.items():
                    drawn, shown[suffix] = evaluate_pictures(prompt_set)
                    scored |= {f"eval_{name}{suffix}": value for name, value in drawn.items()}
                for metric, batches in held_out.items():
                    batches.load_state(held_out_starts[metric])
                    scored[metric] = evaluate_loss(batches)
            if questions:
                scored |= evaluate_answers()
        return scored, shown

    def evaluate_pictures(prompt_set):
        """ODE samples for fixed held-out prompts, of edits the score of the picture itself beside it."""
        mine = torch.arange(math.ceil(args.eval_size / world.size)) * world.size + world.rank  # as many on every rank
        rows = [prompt_set[i] for i in prompt_data.order(len(prompt_set), 0, 0, int(mine.max()) + 1)[mine.tolist()]]
        judged, pictures, captions = [], [], []

        def judge(images, prompts, metadata):
            columns = [score({"image": images}, prompts, metadata)] if score else []
            if score and score.strict:
                columns.append(score.strict({"image": images}, prompts, metadata))
            return columns

        for start in progress(range(0, len(rows), tile_size), "evaluate"):
            check_stop()
            index_B = mine[start : start + tile_size]
            tile = rows[start : start + tile_size]
            prompts, metadata = [row["prompt"] for row in tile], [row["metadata"] for row in tile]
            sources, seeds = None, {}
            if tile[0]["image"] is not None:
                originals = [stream.fit(row["image"], size) for row in tile]
                sources = to_tensor(originals)
                seeds = dict(seed_B=fold_seed(0, EVAL_REFERENCE, index_B)) if unified else {}
            cond = conditioned(model, prompts, sources, **seeds)
            noise = model.init_noise(fold_seed(0, EVAL, index_B), *size)
            guidance = (args.guidance, args.image_guidance)
            images = run_folder.to_uint8(model.decode(sample(model, cond, noise, sigmas, guidance)))
            columns = judge(images, prompts, metadata)
            if sources is not None:
                originals = [np.asarray(picture) for picture in originals]
                columns += judge(originals, prompts, metadata)[-1:]
                images = [np.concatenate(pair, axis=1) for pair in zip(originals, images)]
            judged.append(torch.stack(columns, dim=1) if columns else torch.zeros(len(tile), 0))
            pictures, captions = (pictures + images)[:16], (captions + prompts)[:16]
        judged = torch.cat(judged).masked_fill((mine >= args.eval_size)[:, None], math.nan)
        names = ["reward", "strict"] if score and score.strict else ["reward"]
        mean = parallel.all_gather(judged).nanmean(dim=0).tolist()
        return dict(zip([*names, "unchanged"], mean)), (pictures, captions)

    def evaluate_loss(batches):
        """Mean flow-matching loss of --eval-size held-out images."""
        losses = []
        for number in progress(
            range(math.ceil(args.eval_size / world.size / args.micro_batch_size)), "validation loss"
        ):
            check_stop()
            index_B, rows = image_numbers(number), batches.next()
            sigma_B = torch.tensor(EVAL_SIGMAS)[index_B % len(EVAL_SIGMAS)].to(world.device)
            cond, x0 = condition_of(rows, fold_seed(0, EVAL_REFERENCE, index_B))
            loss_B = squared_error(model, cond, x0, sigma_B, fold_seed(0, EVAL_LOSS, index_B).to(world.device)).cpu()
            losses.append(loss_B.masked_fill(index_B >= args.eval_size, math.nan))
        return parallel.all_gather(torch.cat(losses)).nanmean().item()

    def evaluate_answers():
        """Greedy answers to held-out questions, and how likely the language model finds what it says: while it is
        frozen these numbers stay as they are, to the bit."""
        mine = torch.arange(math.ceil(args.eval_size / world.size)) * world.size + world.rank
        rows = [questions[i] for i in prompt_data.order(len(questions), 0, 0, int(mine.max()) + 1)[mine.tolist()]]
        judged = []
        for start in progress(range(0, len(rows), tile_size), "answer"):
            check_stop()
            tile = rows[start : start + tile_size]
            prompts, metadata = [row["prompt"] for row in tile], [row["metadata"] for row in tile]
            encoded = model.lm.encode(prompts, 32, [row["image"] for row in tile])
            said = model.lm.generate(encoded, 32, 0.0, fold_seed(0, EVAL_TEXT, mine[start : start + len(tile)]))
            texts = model.lm.decode(said["ids"], said["mask"])
            right_B = text_score({"text": texts}, prompts, metadata)
            judged.append(torch.stack([right_B, said["logps"].sum(dim=1).cpu()], dim=1))
        judged = torch.cat(judged).masked_fill((mine >= args.eval_size)[:, None], math.nan)
        return dict(zip(("eval_text", "eval_text_logp"), parallel.all_gather(judged).nanmean(dim=0).tolist()))

    def image_numbers(tile):
        """Which images of a stream that all ranks share are in this rank's tile of that number."""
        return (tile * world.size + world.rank) * args.micro_batch_size + torch.arange(args.micro_batch_size)

    def condition_of(rows, seed_B, drop_text_B=None, drop_picture_B=None):
        """Condition and latents of a batch of data."""
        prompts = [row["answer" if cot else "prompt"] for row in rows]
        sources = None if rows[0]["source"] is None else to_tensor([row["source"] for row in rows])
        seeds = seed_B.to(world.device) if unified else None
        cond = conditioned(model, prompts, sources, seeds, drop_text_B, drop_picture_B)
        return cond, model.encode_images(to_tensor([row["image"] for row in rows]))

    def flow_matching(rows, index_B):
        """Loss of a tile of training images with those numbers: noise, noise levels and what is dropped are functions
        of them."""
        drops = dropped(args, index_B, rows[0]["source"] is not None)
        cond, x0 = condition_of(rows, fold_seed(args.seed, REFERENCE, index_B), *drops)
        cond = {name: values.repeat_interleave(args.noise_levels, dim=0) for name, values in cond.items()}
        sigma_N = noise_levels(args, index_B, schedule).to(world.device)
        seed_N = fold_seed(args.seed, NOISE, index_B[:, None], torch.arange(args.noise_levels)).flatten()
        x0 = x0.repeat_interleave(args.noise_levels, dim=0)
        return flow_matching_loss(model, cond, x0, sigma_N, seed_N.to(world.device))

    # Training loop
    iteration = state["iteration"]
    bar = tqdm(initial=iteration, total=args.num_iterations, desc="pretrain", disable=not master)
    try:
        for iteration in range(state["iteration"], args.num_iterations + 1):
            # Before the tiles: an iteration that is told to stop starts over.
            place = dict(images=train.state()) | (dict(text=text.state()) if text else {})
            if iteration % args.save_every == 0 or iteration == args.num_iterations:
                save(iteration)
            row = {"iteration": iteration}
            if iteration % args.eval_every == 0 or iteration == args.num_iterations:
                scored, shown = evaluate()
                row |= scored
                for suffix, (pictures, captions) in shown.items() if master else ():
                    path = os.path.join(run, "samples", f"{iteration:06d}{suffix}.png")
                    run_folder.grid(path, pictures, captions)
            if iteration < args.num_iterations:
                started = time.perf_counter()
                fallen = 0.5 - 0.5 * math.cos(math.pi * min(1.0, iteration / (args.decay_iterations or math.inf)))
                learning_rate = args.learning_rate + fallen * (args.final_learning_rate - args.learning_rate)
                learning_rate *= min(1.0, (iteration + 1) / max(1, args.warmup_updates))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                losses = {"loss": [], "loss_text": []}
                for tile in range(num_tiles):
                    rows, asked, broken = None, None, None
                    try:
                        rows = train.next()
                        asked = rows if cot else text.next() if text else None
                    except (ValueError, RuntimeError) as error:  # bad data beyond --max-bad, or the hub is away
                        broken = error
                    check_stop()
                    if parallel.agree(broken is not None):
                        save(iteration)
                        raise SystemExit(f"error: {broken or 'the data of another rank ended the run'}")
                    last = tile == num_tiles - 1
                    if args.train_lm:
                        # First, so that the last backward pass of an update is one of all parts that are trained.
                        parallel.accumulate(model.parts, last and not args.train_dm, args.keep_unsharded)
                        loss = answer_loss(model.lm, asked, cot)
                        (args.text_weight * loss / num_tiles).backward()
                        losses["loss_text"].append(loss.detach())
                    if args.train_dm:
                        parallel.accumulate(model.parts, last, args.keep_unsharded)
                        number = state["cursor"] // (world.size * args.micro_batch_size) + tile
                        loss = flow_matching(rows, image_numbers(number))
                        (loss / num_tiles).backward()
                        losses["loss"].append(loss.detach())
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
                for name, values in losses.items():
                    if values:
                        row[name] = parallel.all_gather(torch.stack(values).float().cpu()).mean().item()
                bad = [value for name, value in train.counts().items() if name != "seen"]
                bad += [value for name, value in text.counts().items() if name != "seen"] if text else []
                row |= dict(
                    grad_norm=grad_norm,
                    learning_rate=learning_rate,
                    skipped_updates=state["skipped_updates"],
                    bad_samples=int(parallel.all_gather(torch.tensor([sum(bad)])).sum()),
                    samples_per_s=world.size * args.batch_size / seconds,
                    seconds_update=seconds,
                )
            if master:
                run_folder.append(run, row)
                if tracker:
                    tracker.log(row)
                if iteration % args.eval_every == 0 or iteration == args.num_iterations:
                    run_folder.curves(run, CURVES)
                    tqdm.write(" | ".join(f"{k} {v:.4g}" for k, v in row.items()))
                bar.set_postfix(loss=f"{row.get('loss', row.get('loss_text', math.nan)):.4f}")
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
        card.write(os.path.join(run, "model"), run, recipe)
        print(f"wrote {run}: curves.png, samples/, metrics.jsonl, model/")
    stop.restore()
    return row.get("eval_strict", row.get("eval_reward"))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with parallel.clear_errors():
        defaults = recipe(run_folder.peek(arguments, "--model", "tiny-blip3o-start"))
    main(run_folder.command_line(defaults, arguments, __file__))
