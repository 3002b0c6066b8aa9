"""
RLOO: REINFORCE with a leave-one-out baseline for language models, https://arxiv.org/abs/2402.14740

The whole completion y is one action, and its reward r, the KL penalty included, comes once at its end. The mean reward
of the other G - 1 samples of a prompt is a baseline that does not depend on y, so the gradient is unbiased without a
critic; it is G / (G - 1) times that of "GRPO without the std".

    r_i = reward(x, y_i) - kl_coef sum_t (logp_it - ref_logp_it),      A_i = r_i - mean of the other r_j
    loss = mean_i max(-A_i ratio_i, -A_i clip(ratio_i, 1 +- clip_eps)),    ratio_i = exp(sum_t (logp_it - old_logp_it))

With one update per rollout the ratio is 1 and this is -A_i sum_t logp_it. --ratio token gives every token its own ratio
and clip, as most frameworks do. Prompts may come with a picture (--lm qwen2.5-vl-3b). Left out: a reward per token.

CPU or 1 GPU:  python rloo.py                            two-digit sums; minutes; what it learns is in README.md
8 GPUs:        torchrun --nproc_per_node 8 rloo.py --lm qwen2.5-3b
Resume:        python rloo.py --resume outputs/rloo-...

The whole algorithm is in this file, top to bottom: rollout, reward, advantage, loss, update.
"""

import itertools
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import models
import rewards
from data import prompts as prompt_data
from kernels.sde_step import fold_seed
from models import card, checkpoint, memory, memory_lm, parallel, run_folder

# Shape suffixes: P prompts per iteration and rank, G samples per prompt, B = P * G samples (or a tile of them), L
# tokens of a sample, padded on the right, R rewards. mask_BL is 1 on sampled tokens, the stop token included.

SAMPLE, ORDER, EVAL = range(3)  # what a random number is for: the second key of every seed
CURVES = [["reward", "eval_reward"], "eval_strict", "reward_std", "kl", "entropy", "length", "clipfrac", "grad_norm"]


@dataclass
class Args:
    # Run
    lm: str = "tiny-qwen"
    """alias (see models/__init__.py), hub id or folder in transformers layout; choosing one switches all defaults to
    its recipe"""
    reward: tuple[str, ...] = ("math",)
    """rewards, name or name:weight or http://host:port/name:weight, summed; `python -m rewards` lists them"""
    prompts: str = "arithmetic"
    """training prompts: arithmetic, shapes-qa, a .txt, .jsonl or .parquet file (GSM8K's and MATH's fields are known),
    or hub:owner/name/config:split#column; models that read pictures take that of each prompt from there too"""
    eval_prompts: str = ""
    """held-out prompts, same forms (empty = a tenth of --prompts, chosen by hash and never trained on)"""
    instruction: str = ""
    """text behind every prompt, e.g. how to mark the answer"""
    out: str = ""
    """run folder (empty = outputs/rloo-<time>)"""
    resume: str = ""
    """run folder to continue, bit for bit; only --num-iterations --eval-every --save-every --track may change"""
    seed: int = 1
    """seed of prompts and samples; runs with one seed are the same run"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """what the model computes in; trained weights are fp32 either way"""

    # Size
    num_iterations: int = 275
    """iterations of rollout + updates"""
    num_prompts: int = 32
    """prompts per iteration and rank (P)"""
    group_size: int = 8
    """samples per prompt (G); advantages are relative to this group"""
    micro_batch_size: int = 256
    """tile: samples per forward and backward; lower it if memory runs out"""
    num_updates: int = 1
    """optimizer steps per iteration; the first is exactly on-policy"""

    # Sampling
    rollout: Literal["transformers", "vllm"] = "transformers"
    """what samples: the trained weights themselves, or a vLLM engine on every GPU that gets them after every
    iteration"""
    vllm_memory: float = 0.4
    """share of the GPU's memory that vLLM takes for its copy of the weights and its cache"""
    rollout_batch_size: int = 0
    """completions that are sampled side by side (0 = all of an iteration, and of an evaluation as many)"""
    max_new_tokens: int = 4
    """tokens of a sample, at most; one that has not ended by then is truncated"""
    temperature: float = 1.0
    """samples are drawn from softmax(logits / temperature), and their log-probs are those of that distribution"""
    mask_truncated: bool = False
    """keep truncated samples out of the loss; they still count in the baseline"""
    overlong_buffer: int = 0
    """tokens before --max-new-tokens over which a penalty on the reward grows from 0 to 1 (DAPO's; 0 = none)"""

    # Algorithm
    ratio: Literal["sequence", "token"] = "sequence"
    """one importance ratio and clip per sample (the whole completion is the action), or per token"""
    normalizer: Literal["samples", "tokens"] = "samples"
    """the loss, summed over tokens, is divided by the number of samples of an update, or of their tokens, counted over
    all ranks"""
    clip_eps: float = 0.2
    """PPO clip range of the ratio; it acts from the second update of an iteration on"""
    importance_clip: float = 2.0
    """with --rollout vllm: losses are weighted by exp(logp - logp of the engine), at most this (truncated importance
    sampling, at the level of --ratio)"""
    kl_coef: float = 0.0
    """weight of KL(policy || reference) in the reward, in nats per sample (0 = no reference forward)"""

    # Optimizer
    learning_rate: float = 3e-5
    """AdamW learning rate"""
    warmup_updates: int = 5
    """optimizer steps of linear learning-rate warm-up (0 = none)"""
    decay_iterations: int = 0
    """iterations over which the learning rate falls, linearly, to a tenth, where it stays (0 = constant)"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    lora_rank: int = 0
    """rank of the LoRA adapter (0 = full fine-tuning)"""
    lora_alpha: float = 0.0
    """LoRA scale times rank (0 = 2 * rank)"""
    ema_decay: float = 0.0
    """decay per optimizer step of the averaged weights that are evaluated and exported (0 = no averaging)"""

    # Evaluation and saving
    eval_every: int = 55
    """iterations between evaluations on held-out prompts"""
    eval_size: int = 0
    """held-out prompts per evaluation, over all ranks, each answered greedily (0 = all)"""
    eval_num_samples: int = 0
    """sampled answers to each of them besides, for pass@1 and pass@k with this k (0 = none)"""
    save_every: int = 55
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
    """keep parameters gathered between tiles: one collective per update, memory of one whole copy (sampling always
    does)"""
    checkpoint_activations: bool = False
    """recompute every block in the backward pass: less memory, a third more compute"""
    cpu_offload: bool = False
    """keep sharded parameters, gradients and optimizer state in CPU memory"""
    shard_size: int = 0
    """ranks a copy of the model is sharded over, e.g. the GPUs of a node (0 = all)"""
    compile: bool = False
    """torch.compile every block, for rollout and replay alike"""
    track: bool = False
    """also log to Weights & Biases"""
    dry_run: bool = False
    """print what the run needs per GPU, without loading weights, and stop"""


def recipe(lm):
    """The defaults for a language model: what runs if nothing else is on the command line. Where published recipes
    speak of prompts per iteration, ours is for 8 GPUs."""
    if lm == "tiny-qwen":
        return Args()
    if lm == "tiny-qwen-vl":
        return Args(
            lm=lm, reward=("shapes_qa",), prompts="shapes-qa", num_iterations=150, learning_rate=1e-4, eval_every=30
        )
    # GSM8K: verl's example for RLOO, 1,024 prompts of 5 samples an iteration and 4 updates of token-level PPO; it
    # averages over tokens and over GPUs. The instruction is ours.
    return Args(
        lm=lm,
        reward=("math",),
        prompts="hub:openai/gsm8k/main:train",
        eval_prompts="hub:openai/gsm8k/main:test",
        instruction="Think step by step, then give the final answer in \\boxed{}.",
        dtype="bf16",
        num_iterations=105,
        num_prompts=128,
        group_size=5,
        micro_batch_size=8,
        num_updates=4,
        rollout_batch_size=320,
        max_new_tokens=512,
        ratio="token",
        normalizer="tokens",
        kl_coef=1e-3,
        learning_rate=1e-6,
        warmup_updates=1,
        eval_every=15,
        save_every=15,
        keep_unsharded=False,
        checkpoint_activations=True,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm: rollout, advantage, loss


def ask(row, instruction):
    """The text of a prompt, with the instruction behind it."""
    return f"{row['prompt']}\n{instruction}" if instruction else row["prompt"]


def rollout(sampler, prompts, max_new_tokens, temperature_B, seed_B):
    """Sample a completion of each of B prompts: token ids and mask, int64 [B, max_new_tokens], log-probs fp32 of that
    shape, truncated bool [B], all on the CPU."""
    out = sampler.generate(prompts, max_new_tokens, temperature_B, seed_B)
    missing = max_new_tokens - out["ids"].shape[1]
    ids, mask, logps = (torch.nn.functional.pad(out[name].cpu(), (0, missing)) for name in ("ids", "mask", "logps"))
    return ids, mask, logps, out["truncated"].cpu()


def score_texts(scores, texts, rows, strict=False):
    """Every reward of a batch, fp32 [batch, R]; with `strict`, also the strict form of those that have one, as last
    columns."""
    samples = {"text": texts}
    if rows[0]["image"] is not None:
        samples["source"] = [np.asarray(row["image"].convert("RGB")) for row in rows]
    prompts, metadata = [row["prompt"] for row in rows], [row["metadata"] for row in rows]
    forms = [*scores.values(), *(score.strict for score in scores.values() if strict and score.strict)]
    return torch.stack([form(samples, prompts, metadata) for form in forms], dim=1)


def replay(model, prompts, ids_BL, mask_BL, tile, temperature):
    """Log-probs and entropies of the completions of a tile of samples, fp32, cut to the longest of them [tile, L]."""
    L = int(mask_BL[tile].sum(dim=1).max())
    of_tile = [prompts[i] for i in tile]
    return model.logps(of_tile, ids_BL[tile, :L], mask_BL[tile, :L], temperature, return_entropy=True)


def overlong_penalty(length_B, max_new_tokens, buffer):
    """0 up to max_new_tokens - buffer tokens, then linearly to -1 at max_new_tokens: DAPO eq. 13, arXiv 2503.14476."""
    return -((length_B - (max_new_tokens - buffer)) / buffer).clamp(0, 1)


def leave_one_out_advantage(reward_B, group_size):
    """r_i minus the mean reward of the others of its group (RLOO, section 3.2). NaN rewards are left out and get
    advantage 0, and so does a sample that has no others."""
    reward_PG = reward_B.view(-1, group_size)
    others_P1 = (~reward_PG.isnan()).sum(dim=1, keepdim=True) - 1
    baseline_PG = (reward_PG.nansum(dim=1, keepdim=True) - reward_PG) / others_P1
    return (reward_PG - baseline_PG).where(others_P1 > 0, 0.0).nan_to_num(0.0).flatten()


def sequence_pg_loss(logp_BL, old_logp_BL, adv_B, mask_BL, clip_eps):
    """PPO's clipped objective with a completion as one action, 0 where the mask is empty [B]; also the ratios [B]."""
    # A ratio beyond e^20 says that the policy has run away, and would make the loss infinite where A < 0.
    ratio_B = ((logp_BL - old_logp_BL) * mask_BL).sum(dim=1).clamp(max=20.0).exp()
    clipped_B = ratio_B.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-adv_B * ratio_B, -adv_B * clipped_B) * mask_BL.any(dim=1), ratio_B


def token_pg_loss(logp_BL, old_logp_BL, adv_BL, mask_BL, clip_eps):
    """PPO's clipped objective with every token as an action, 0 where the mask is [B L]; also the ratios [B L]."""
    ratio_BL = ((logp_BL - old_logp_BL) * mask_BL).clamp(max=20.0).exp()
    clipped_BL = ratio_BL.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-adv_BL * ratio_BL, -adv_BL * clipped_BL) * mask_BL, ratio_BL


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
        models.lm_family(args.lm)
        counts = (args.num_prompts, args.micro_batch_size, args.num_updates, args.max_new_tokens)
        if min(*counts, args.eval_every, args.save_every) < 1:
            raise ValueError(
                "--num-prompts --micro-batch-size --num-updates --max-new-tokens --eval-every --save-every must be at "
                "least 1"
            )
        if min(args.rollout_batch_size, args.eval_size, args.eval_num_samples, args.warmup_updates) < 0:
            raise ValueError(
                "--rollout-batch-size --eval-size --eval-num-samples --warmup-updates must not be negative"
            )
        B = args.num_prompts * args.group_size
        if args.group_size < 2 or not args.temperature > 0:
            raise ValueError(
                "--group-size must be at least 2 and --temperature positive: one sample has no others to compare with, "
                "and greedy ones do not differ"
            )
        if B % args.num_updates:
            raise ValueError(f"--num-updates {args.num_updates} must divide the {B} samples of an iteration")
        if not 0 <= args.overlong_buffer < args.max_new_tokens:
            raise ValueError(f"--overlong-buffer {args.overlong_buffer} must be less than --max-new-tokens")
        if args.rollout == "vllm" and args.ema_decay > 0:
            raise ValueError("--rollout vllm samples with the trained weights: --ema-decay must be 0")
        rollout_size = args.rollout_batch_size or B
        if args.dry_run:
            sizes = memory_lm.language(
                args.lm,
                dtype,
                tile_rows=args.micro_batch_size,
                rollout_rows=rollout_size if args.rollout == "transformers" else 0,
                max_new_tokens=args.max_new_tokens,
                lora_rank=args.lora_rank,
                with_reference=args.kl_coef > 0,
                ema=args.ema_decay > 0,
                world_size=world.size,
                shard_size=args.shard_size,
                checkpoint_activations=args.checkpoint_activations,
                keep_unsharded=args.keep_unsharded,
                cpu_offload=args.cpu_offload,
            )
            return print(memory.table(sizes)) if master else None
        eval_source = args.eval_prompts or None
        train_set = prompt_data.load(args.prompts, "train", eval_source=eval_source)
        eval_set = prompt_data.load(args.prompts, "eval", eval_source=eval_source)
        reward_device = torch.device(args.reward_device or world.device)
        judge = (args.judge_url, args.judge_model)
        scores = {metric: rewards.load(name, reward_device, *judge) for name, metric, _ in rewards.parse(args.reward)}
        pictured = [part[0]["image"] is not None for part in (train_set, eval_set)]
        for score in scores.values():
            rewards.check_needs(score, ("text", "source") if all(pictured) else ("text",))
        for part in (train_set, eval_set):  # what a verifier misses in the metadata is found here
            score_texts(scores, [""], [part[0]], strict=True)
        model = models.load_lm(
            args.lm,
            world.device,
            dtype,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha or 2 * args.lora_rank,
            with_reference=args.kl_coef > 0,
        )
        if any(pictured) and not model.takes_images:
            raise ValueError(f"--prompts have pictures and --lm {args.lm} reads text only: take e.g. qwen2.5-vl-3b")
        for part in (train_set, eval_set):
            if not any(pictured):  # tokens of a picture are counted when it is encoded
                model.check_lengths((ask(part[i], args.instruction) for i in range(len(part))), args.max_new_tokens)
    for part in [*model.parts.values(), *(model.reference_parts or {}).values()]:
        parallel.shard(
            part, model.blocks(part), world, dtype, args.cpu_offload, args.checkpoint_activations, args.compile
        )
    trained = parallel.trained(model.parts)
    # beta2 .99: a run has a few hundred updates, and gradients change with what is still wrong.
    optimizer = torch.optim.AdamW(
        trained.values(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
    )
    ema = parallel.EMA(trained) if args.ema_decay > 0 else None
    eval_size = min(args.eval_size or len(eval_set), len(eval_set))
    sampler = model
    if args.rollout == "vllm":
        from models import vllm

        with parallel.clear_errors():
            sampler = vllm.load(model, memory_fraction=args.vllm_memory)

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
        print(f"{run}: {args.lm}, {count:,} trained parameters, {world.size} x {world.device.type}, {args.dtype}")
        print(f"attention: {model.attention}; {torch.get_num_threads()} CPU threads per rank")
        eval_from = args.eval_prompts or args.prompts
        print(f"prompts: {len(train_set):,} of {args.prompts}; for evaluation {eval_size:,} of {eval_from}")
    tracker = run_folder.Tracker(run, "rloo", args) if args.track and master else None
    stop = parallel.StopSignal()
    scorer = ThreadPoolExecutor(1)  # scores one batch while the next one is sampled

    def save(iteration):
        folder = os.path.join(run, "checkpoints", f"{iteration:06d}")
        checkpoint.save(folder, checkpointed(), state | dict(iteration=iteration), args.keep_checkpoints)

    def check_stop():
        """Between tiles all ranks agree on whether one of them was told to stop."""
        if parallel.agree(stop.number):
            raise parallel.Stopped

    def encode(rows):
        """Token ids of each prompt, and what the model sees of its picture; neighbours that are one row share them."""
        groups = [list(group) for _, group in itertools.groupby(rows, key=id)]
        texts = [ask(group[0], args.instruction) for group in groups]
        images = [group[0]["image"] for group in groups] if any(pictured) else None
        with parallel.clear_errors():
            prompts = model.encode(texts, args.max_new_tokens, images)
        return [prompt for prompt, group in zip(prompts, groups) for _ in group]

    def total(reward_BR):
        """Weighted sum of the rewards; NaN where one of them failed."""
        return reward_BR[:, : len(weights)] @ torch.tensor(list(weights.values()))

    def replay_all(prompts, ids_BL, mask_BL, tiles, desc):
        """Log-probs of all samples under the policy at hand, without gradient, fp32 [B, L] on the CPU."""
        logp_BL = torch.zeros(ids_BL.shape)
        with torch.no_grad(), parallel.unsharded(model.parts, args.keep_unsharded):
            for tile in tqdm(tiles, desc=desc, leave=False, disable=not master):
                check_stop()
                logp, _ = replay(model, prompts, ids_BL, mask_BL, tile, args.temperature)
                logp_BL[tile, : logp.shape[1]] = logp.cpu()
        return logp_BL

    def sample(rows, temperature_B, seed_B, strict, desc):
        """A completion of the prompt of every row, in batches, each scored while the next one is sampled. Yields of
        each its prompts, what `rollout` returns, the texts, and the future of their rewards."""
        for batch in tqdm(torch.arange(len(rows)).split(rollout_size), desc=desc, leave=False, disable=not master):
            check_stop()
            of_batch = [rows[i] for i in batch]
            prompts = encode(of_batch)
            part = rollout(sampler, prompts, args.max_new_tokens, temperature_B[batch], seed_B[batch])
            texts = model.decode(*part[:2])
            yield prompts, part, texts, scorer.submit(score_texts, scores, texts, of_batch, strict)

    def evaluate_texts():
        """Greedy answers to fixed held-out prompts, and sampled ones if there are to be any, with the averaged weights
        if there are any. Returns metrics, and for the samples folder rows, texts and rewards."""
        mine = torch.arange(math.ceil(eval_size / world.size)) * world.size + world.rank  # as many on every rank
        rows = [eval_set[i] for i in prompt_data.order(len(eval_set), 0, 0, int(mine.max()) + 1)[mine.tolist()]]
        K = 1 + args.eval_num_samples  # answers to a prompt, the greedy one first
        seed_B = fold_seed(0, EVAL, mine[:, None], torch.arange(K)).flatten()
        temperature_B = torch.tensor([0.0] + [args.temperature] * args.eval_num_samples).repeat(len(rows))
        rows_B = [row for row in rows for _ in range(K)]
        with ema.applied() if ema else nullcontext():
            batches = [batch[1:] for batch in sample(rows_B, temperature_B, seed_B, True, "evaluate")]
        parts, texts, futures = zip(*batches)
        _, mask_BL, _, truncated_B = map(torch.cat, zip(*parts))
        with parallel.clear_errors():
            judged = torch.cat([future.result() for future in futures])
        shown = rows[:16], sum(texts, [])[: 16 * K : K], total(judged)[: 16 * K : K].tolist()
        judged = torch.cat([judged, mask_BL.sum(1, keepdim=True), truncated_B[:, None]], dim=1).unflatten(0, (-1, K))
        judged = parallel.all_gather(judged.masked_fill((mine >= eval_size)[:, None, None], math.nan))
        greedy = judged[:, 0]
        scored = {"eval_reward": total(greedy).nanmean().item()}
        scored |= {f"eval_reward/{name}": greedy[:, r].nanmean().item() for r, name in enumerate(scores)}
        right = judged[:, :, len(scores) : -2]
        if right.shape[2]:
            scored["eval_strict"] = right[:, 0].nanmean().item()
            if K > 1:
                right = right[:, 1:].amin(dim=2)  # in every strict form; NaN, failed, is no number
                scored["eval_pass@1"] = right.nanmean().item()
                scored[f"eval_pass@{K - 1}"] = right.amax(dim=1).nanmean().item()
        scored |= {"eval_length": greedy[:, -2].nanmean().item(), "eval_truncated_frac": greedy[:, -1].nanmean().item()}
        return scored, shown

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
    bar = tqdm(initial=iteration, total=args.num_iterations, desc="rloo", disable=not master)
    try:
        for iteration in range(state["iteration"], args.num_iterations + 1):
            if iteration % args.save_every == 0 or iteration == args.num_iterations:
                save(iteration)
            row = {"iteration": iteration}
            if sampler is not model:
                sampler.update(model)
            if iteration % args.eval_every == 0 or iteration == args.num_iterations:
                scored, shown = evaluate_texts()
                row |= scored
                if master:
                    run_folder.texts(os.path.join(run, "samples", f"{iteration:06d}"), *shown)
            if iteration == args.num_iterations:
                log(row)
                break

            # 1) Rollout: G samples for each of P prompts; the samples of one prompt are neighbours in B. A prompt's
            # slot among those of all ranks keys its samples, so that the number of ranks changes nothing.
            started = time.perf_counter()
            slot_P = torch.arange(args.num_prompts) + world.rank * args.num_prompts
            picks = prompt_data.order(len(train_set), args.seed, state["cursor"], args.num_prompts * world.size)
            rows = [row for i in picks[slot_P.tolist()] for row in [train_set[i]] * args.group_size]
            seed_B = fold_seed(args.seed, SAMPLE, iteration, slot_P[:, None], torch.arange(args.group_size)).flatten()
            temperature_B = torch.full((B,), args.temperature)
            prompts, parts, _, futures = zip(*sample(rows, temperature_B, seed_B, False, "rollout"))
            ids_BL, mask_BL, rollout_logp_BL, truncated_B = map(torch.cat, zip(*parts))
            prompts = sum(prompts, [])
            length_B = mask_BL.sum(dim=1)
            trained_BL = mask_BL * ~truncated_B[:, None] if args.mask_truncated else mask_BL
            seconds_rollout = time.perf_counter() - started

            # 2) Reward: what is still being scored is waited for
            started = time.perf_counter()
            with parallel.clear_errors():
                reward_BR = torch.cat([future.result() for future in futures])
            all_BR = parallel.all_gather(reward_BR)
            for r, name in enumerate(scores):
                if all_BR[:, r].isnan().all():
                    raise SystemExit(
                        f"error: reward {name} failed (NaN) for all {len(all_BR)} samples of iteration {iteration}"
                    )
            reward_B = total(reward_BR)
            if args.overlong_buffer:
                reward_B += overlong_penalty(length_B, args.max_new_tokens, args.overlong_buffer)
            seconds_reward = time.perf_counter() - started

            # 3) Advantage. Old log-probs are those of the replay, not of the sampler, whose rounding is another; with
            # one update and no KL they come with the loss and need no pass of their own.
            started = time.perf_counter()
            size_B = length_B + torch.tensor([len(prompt) for prompt in prompts])
            order_B = fold_seed(args.seed, ORDER, iteration, torch.arange(B)).argsort()
            # Each update takes its share of the samples, in tiles of about equally long ones.
            shares = [share[size_B[share].argsort(stable=True)] for share in order_B.chunk(args.num_updates)]
            tiles_of = [share.split(args.micro_batch_size) for share in shares]
            old_logp_BL, kl_B = None, torch.zeros(B)
            if args.kl_coef > 0 or args.num_updates > 1:
                old_logp_BL = replay_all(prompts, ids_BL, mask_BL, sum(tiles_of, ()), "old log-probs")
            if args.kl_coef > 0:
                with parallel.reference(model):
                    ref_logp_BL = replay_all(prompts, ids_BL, mask_BL, sum(tiles_of, ()), "reference log-probs")
                kl_B = (old_logp_BL - ref_logp_BL).sum(dim=1)  # k1, the one that has the right gradient in a reward
            adv_B = leave_one_out_advantage(reward_B - args.kl_coef * kl_B, args.group_size)

            # 4) Loss and 5) Update
            sums, grad_norms, on_policy_errs, mismatches = [], [], [], []
            for share, tiles in zip(shares, tiles_of):
                count = len(share) if args.normalizer == "samples" else trained_BL[share].sum().item()
                normalizer = max(1.0, parallel.all_gather(torch.tensor([float(count)])).sum().item())
                for n, tile in enumerate(tqdm(tiles, desc="update", leave=False, disable=not master)):
                    if not grad_norms:
                        check_stop()
                    parallel.accumulate(model.parts, n == len(tiles) - 1, args.keep_unsharded)
                    logp_BL, entropy_BL = replay(model, prompts, ids_BL, mask_BL, tile, args.temperature)
                    L = logp_BL.shape[1]
                    rollout_logp, mask = (x[tile, :L].to(world.device) for x in (rollout_logp_BL, trained_BL))
                    old_logp = logp_BL.detach() if old_logp_BL is None else old_logp_BL[tile, :L].to(world.device)
                    adv = adv_B[tile].to(world.device)
                    if args.ratio == "sequence":
                        loss, ratio = sequence_pg_loss(logp_BL, old_logp, adv, mask, args.clip_eps)
                        log_weight, counted = ((old_logp - rollout_logp) * mask).sum(dim=1), mask.any(dim=1)
                    else:
                        loss, ratio = token_pg_loss(logp_BL, old_logp, adv[:, None], mask, args.clip_eps)
                        log_weight, counted = (old_logp - rollout_logp) * mask, mask
                    if sampler is not model:
                        loss = loss * log_weight.exp().clamp(max=args.importance_clip)
                    # FSDP averages gradients over ranks; the normaliser is one of all ranks.
                    (loss.sum() * world.size / normalizer).backward()
                    with torch.no_grad():
                        clipped = (ratio - 1).abs() > args.clip_eps
                        of_ratio = [(clipped * counted).sum(), (ratio * counted).sum(), counted.sum()]
                        sums.append(
                            torch.stack([loss.sum() / normalizer, *of_ratio, (entropy_BL * mask).sum(), mask.sum()])
                        )
                        if not grad_norms:
                            gap = (logp_BL - rollout_logp) * mask
                            on_policy_errs.append(gap.abs().max())
                            mismatches.append(torch.stack([(gap.expm1() - gap).sum(), mask.sum()]))
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

            of_tiles = parallel.all_gather(torch.stack(sums).cpu()).sum(dim=0)
            loss, num_clipped, sum_ratio, num_ratios, sum_entropy, num_tokens = of_tiles.tolist()
            on_policy_err = parallel.all_gather(torch.stack(on_policy_errs).cpu()).max().item()
            mismatch, num_first = parallel.all_gather(torch.stack(mismatches).cpu()).sum(dim=0).tolist()
            of_samples = parallel.all_gather(torch.stack([reward_B, length_B, truncated_B, kl_B], dim=1))
            all_B, length, truncated_frac, kl = of_samples[:, 0], *of_samples[:, 1:].mean(dim=0).tolist()
            reward_PG = all_B.view(-1, args.group_size)
            std_P = (reward_PG - reward_PG.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1).sqrt()
            row |= dict(
                reward=reward_PG.nanmean().item(),
                reward_std=std_P.nanmean().item(),
                loss=loss / args.num_updates,
                entropy=sum_entropy / max(1.0, num_tokens),
                length=length,
                truncated_frac=truncated_frac,
                clipfrac=num_clipped / max(1.0, num_ratios),
                ratio=sum_ratio / max(1.0, num_ratios),
                on_policy_err=on_policy_err,
                mismatch_kl=mismatch / max(1.0, num_first),
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
        defaults = recipe(run_folder.peek(arguments, "--lm", "tiny-qwen"))
    main(run_folder.command_line(defaults, arguments, __file__))
