"""
GRPO for a language model, a diffusion model, or both at once: UniRL-Zero (https://arxiv.org/abs/2510.17937) and
PromptRL (https://arxiv.org/abs/2602.01382).

The language model writes (the prompt once more, so that it is drawn better, or an answer), the diffusion model draws or
edits, rewards judge, and every sample has one advantage for all of its tokens and all of its denoising steps.

    prompt -> LM: tokens y -> the prompt in their answer tags -> DM: steps x_T .. x_0 -> r
    A = (r - mean of its group) / std
    LM: mean_t max(-A ratio_t, -A clip(ratio_t, 1 - low, 1 + high)) + beta KL      GRPO, https://arxiv.org/abs/2402.03300
    DM: mean_k max(-A ratio_k, -A clip(ratio_k, 1 +- eps)) + beta KL          Flow-GRPO, https://arxiv.org/abs/2505.05470

--train lm | dm | joint says whose loss it is; both may be one unified model (--model tiny-blip3o) or two ordinary
checkpoints (--lm qwen2.5-vl-3b --model flux), between which there is text and no gradient.

--task text       the LM answers                                          text rewards
       t2i        the DM draws the prompt as it is                        pictures
       t2icot     the LM refines the prompt, the DM draws the answer      pictures, and the format of the answer
       i2i        the DM edits; with --refine the LM, which sees the picture, first rewrites the instruction
       i2i_cycle  i2i, and the edited picture is edited back: rewards of both, one advantage for both trajectories

CPU or 1 GPU:  python grpo_unified.py                                      tiny-qwen-refine and tiny-flux
8 GPUs:        torchrun --nproc_per_node 8 grpo_unified.py --lm qwen2.5-vl-3b --model flux --reward geneval format
Resume:        python grpo_unified.py --resume outputs/grpo_unified-...

The whole algorithm is in this file, top to bottom: two rollouts, rewards, advantage, two losses, update.
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
from PIL import Image
from tqdm import tqdm

import models
import rewards
from data import prompts as prompt_data
from kernels.sde_step import fold_seed, sde_logp, sde_step
from models import blip3o, card, checkpoint, memory, memory_lm, parallel, qwen, run_folder

# Shape suffixes: P prompts per iteration and rank, G samples per prompt, B = P * G samples (or a tile of them), W of
# them with tokens of the LM, L tokens of a sample, T denoising steps, K trained steps, S = (sample, step) pairs of a
# tile, R rewards, C H W latent.

# What a random number is for: the second key of every seed.
NOISE, STEP, WINDOW, ORDER, EVAL, REFERENCE, SAMPLE, BACK = range(8)
CURVES = [
    ["reward", "eval_reward"],
    "eval_strict",
    "reward_std",
    ["lm/kl", "dm/kl"],
    "lm/entropy",
    "lm/length",
    ["lm/clipfrac", "dm/clipfrac"],
    ["lm/grad_norm", "dm/grad_norm"],
]


@dataclass
class Args:
    # Run
    model: str = "tiny-flux"
    """diffusion model: alias (see models/__init__.py), hub id or folder in diffusers layout; or a unified model, which
    is its own --lm; not used with --task text"""
    lm: str = "tiny-qwen-refine"
    """language model: alias, hub id or folder in transformers layout (empty = that of the unified --model)"""
    task: Literal["text", "t2i", "t2icot", "i2i", "i2i_cycle"] = "t2icot"
    """who does what: see the top of grpo_unified.py"""
    train: Literal["lm", "dm", "joint"] = "joint"
    """whose parameters are trained; queries and connector of a unified model are the dm's"""
    refine: bool = False
    """i2i and i2i_cycle: the LM rewrites the instruction first, as it does the prompt with t2icot"""
    keep_original: int = 0
    """samples of each group that are drawn from the user's own words: they have no tokens, and text rewards give them
    the mean of the others of their group"""
    reward: tuple[str, ...] = ("shapes", "format:0.1")
    """rewards, name or name:weight or http://host:port/name:weight, summed; `python -m rewards` lists them. A prompt
    with "rewards": [names] in its metadata is judged by those of them only"""
    prompts: str = "shapes-user"
    """training prompts: shapes-user, shapes, shapes-edit, shapes-qa, arithmetic, a .txt, .jsonl or .parquet file, or
    hub:owner/name/config:split#column; i2i_cycle needs a "reverse_prompt" in their metadata"""
    eval_prompts: str = ""
    """held-out prompts, same forms (empty = a tenth of --prompts, chosen by hash and never trained on)"""
    instruction: str = ""
    """text behind every prompt, e.g. how to mark the answer"""
    out: str = ""
    """run folder (empty = outputs/grpo_unified-<time>)"""
    resume: str = ""
    """run folder to continue, bit for bit; only --num-iterations --eval-every --save-every --track may change"""
    seed: int = 1
    """seed of prompts, samples, noise and windows; runs with one seed are the same run"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """what the model computes in; trained weights are fp32 either way"""

    # Size
    num_iterations: int = 160
    """iterations of rollout + updates"""
    num_prompts: int = 12
    """prompts per iteration and rank (P)"""
    group_size: int = 12
    """samples per prompt (G); advantages are relative to this group"""
    micro_batch_size: int = 144
    """tile: (sample, step) pairs per forward and backward of the DM, also samples per rollout forward; lower it if
    memory runs out"""
    lm_micro_batch_size: int = 144
    """samples per forward and backward of the LM"""
    num_updates: int = 1
    """optimizer steps per iteration; the first is exactly on-policy"""

    # Text sampling
    rollout_batch_size: int = 0
    """texts that are sampled side by side (0 = all of an iteration, and of an evaluation as many)"""
    max_new_tokens: int = 24
    """tokens of the LM's text, at most; one that has not ended by then is truncated"""
    temperature: float = 1.0
    """texts are drawn from softmax(logits / temperature), and their log-probs are those of that distribution"""

    # Image sampling
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
    lm_resolution: int = 0
    """the same, of the picture that the LM sees when it refines an edit (0 = --resolution)"""
    guidance: float = 1.0
    """text guidance, embedded or classifier-free as the model has it, in rollout, replay and evaluation alike (1 =
    off)"""
    image_guidance: float = 1.0
    """guidance on the picture to edit, of unified models (1 = off)"""

    # Algorithm
    advantage_std: Literal["group", "global", "none"] = "global"
    """advantages are divided by the std of their group, of all samples of the iteration that the same rewards judge,
    or by nothing (Dr. GRPO)"""
    advantage_clip: float = 5.0
    """advantages are clipped to +- this"""
    lm_loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """tokens count by 1 / (samples * tokens of their sample), 1 / tokens of all samples, or 1 / (samples *
    --max-new-tokens), samples and tokens counted over all ranks"""
    lm_clip_low: float = 0.2
    """PPO clip range of a token's ratio, downwards; it acts from the second update of an iteration on"""
    lm_clip_high: float = 0.2
    """and upwards (DAPO: 0.28)"""
    lm_kl: Literal["k3", "k2"] = "k3"
    """estimator of KL(policy || reference) in the loss, per token: k3 (GRPO's) or k2, whose gradient is the KL's own"""
    lm_kl_coef: float = 0.0
    """its weight (0 = no reference forward)"""
    clip_eps: float = 1e-4
    """PPO clip range of the per-step ratio, which is an exponential of a mean over latent dims and so very close to
    1"""
    kl_coef: float = 0.0
    """weight of KL(policy || reference) of a denoising step, in nats per latent dim (0 = no reference forward)"""

    # Optimizer
    lm_learning_rate: float = 1e-4
    """AdamW learning rate of the LM"""
    learning_rate: float = 2e-4
    """AdamW learning rate of the DM"""
    warmup_updates: int = 5
    """optimizer steps of linear learning-rate warm-up (0 = none)"""
    decay_iterations: int = 160
    """iterations over which the learning rate falls, linearly, to a tenth, where it stays (0 = constant)"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    lm_max_grad_norm: float = 1.0
    """gradient norm clip of the LM"""
    max_grad_norm: float = 1.0
    """gradient norm clip of the DM"""
    lora_rank: int = 0
    """rank of the LoRA adapters, of both (0 = full fine-tuning)"""
    lora_alpha: float = 0.0
    """LoRA scale times rank (0 = 2 * rank)"""
    ema_decay: float = 0.95
    """decay per optimizer step of the averaged weights that are evaluated and exported (0 = no averaging)"""

    # Evaluation and saving
    eval_every: int = 40
    """iterations between evaluations on held-out prompts"""
    eval_size: int = 864
    """held-out prompts per evaluation, over all ranks; their noise is the same in every evaluation of every run"""
    save_every: int = 40
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
    shard_size: int = 0
    """ranks a copy of the model is sharded over, e.g. the GPUs of a node (0 = all)"""
    compile: bool = False
    """torch.compile every block, for rollout and replay alike"""
    track: bool = False
    """also log to Weights & Biases"""
    dry_run: bool = False
    """print what the run needs per GPU, without loading weights, and stop"""


def recipe(model, lm, task=""):
    """The defaults for a pair of models or a unified one, and a task ("" = the usual one): what runs if nothing else is
    on the command line. Where published recipes speak of prompts per iteration, ours is for 8 GPUs."""
    unified = models.family(model) in ("blip3o", "metaquery")
    if task == "text":
        return recipe_text(model, "" if unified else lm or "tiny-qwen")
    if model.startswith("tiny-"):
        often = dict(eval_every=20, save_every=20, eval_size=512)
        short = dict(num_iterations=80, decay_iterations=80, **often)
        edits = dict(train="dm", prompts="shapes-edit", noise_level=0.7, learning_rate=1e-4, **often)
        tiny = replace(Args(), model=model, lm="" if unified else lm or Args.lm, task=task or Args.task)
        if task == "i2i_cycle":  # PSNR of the picture that was edited back, in dB, beside rewards up to 1
            return replace(tiny, **edits, reward=("shapes", "recon:0.01"))
        if task == "i2i" or models.family(model) == "kontext":
            return replace(tiny, task="i2i", **edits, reward=("shapes",))
        if task == "t2i":
            return replace(tiny, train="dm", reward=("shapes",))
        return replace(tiny, **short) if unified else tiny
    # PromptRL's GenEval with FLUX: 8 samples of a prompt per GPU, 20 steps of which the first 10 are noisy, learning
    # rates of its launch scripts.
    pair = Args(
        model=model,
        lm=lm or "qwen2.5-vl-3b",
        task="t2icot",
        train="joint",
        reward=("geneval", "format"),
        prompts="data/geneval_train.jsonl",
        dtype="bf16",
        num_iterations=1200,
        num_prompts=1,
        group_size=8,
        micro_batch_size=4,
        lm_micro_batch_size=4,
        num_updates=1,
        max_new_tokens=512,
        temperature=1.0,
        num_steps=20,
        eval_num_steps=20,
        sampler="flow_sde",
        noise_level=0.8,
        shared_noise=False,
        window_size=10,
        window_range=(0, 10),
        resolution=512,
        guidance=3.5,
        advantage_std="group",
        lm_loss="grpo",
        lm_kl="k3",
        lm_kl_coef=0.01,
        clip_eps=1e-4,
        kl_coef=1e-2,
        lm_learning_rate=1e-6,
        learning_rate=2e-7,
        warmup_updates=5,
        decay_iterations=0,
        ema_decay=0.0,
        eval_every=50,
        eval_size=256,
        save_every=50,
        cache_prompts=Args.cache_prompts if task == "t2i" else 0,  # refined ones hardly ever come again
        keep_unsharded=False,
        checkpoint_activations=True,
    )
    if unified:  # UniRL-Zero's t2icot, whose DM learns with 3e-6 and whose LM with 5e-7; noise on all of 10 steps
        return replace(
            pair,
            lm="",
            num_steps=10,
            eval_num_steps=30,
            noise_level=0.7,
            window_size=0,
            window_range=(0, 0),
            resolution=1024,
            lm_resolution=896,
            kl_coef=4e-3,
            lm_learning_rate=5e-7,
            learning_rate=3e-6,
        )
    return {
        "flux": pair,
        "sd3": replace(pair, guidance=4.5),
        "sana": replace(pair, guidance=4.5, resolution=1024),
        # PromptRL's edits: 6 refined instructions and 2 of the user's own, the first 4 of 8 steps noisy.
        "kontext": replace(
            pair,
            task="i2i",
            refine=True,
            keep_original=2,
            reward=("editreward", "format"),
            prompts="data/edits.jsonl",
            num_steps=8,
            eval_num_steps=28,
            window_size=4,
            window_range=(0, 4),
            resolution=1024,
            lm_resolution=448,
            guidance=2.5,
            lm_learning_rate=3e-7,
        ),
        "klein": replace(pair, window_size=8, window_range=(0, 8), guidance=4.0, resolution=1024, lm_resolution=448),
    }[models.family(model)]


def recipe_text(model, lm):
    """The same for --task text: the numbers of rloo.py, but AdamW's own betas, and the group as GRPO has it. lm: "" =
    that of the model."""
    tiny = Args(
        model=model,
        lm=lm,
        task="text",
        train="lm",
        reward=("math",),
        prompts="arithmetic",
        num_iterations=275,
        num_prompts=32,
        group_size=8,
        lm_micro_batch_size=256,
        max_new_tokens=4,
        advantage_std="group",
        lm_learning_rate=3e-5,
        lm_kl_coef=0.0,
        decay_iterations=0,
        ema_decay=0.0,
        eval_every=55,
        save_every=55,
    )
    if lm == "tiny-qwen":
        return tiny
    if lm == "tiny-qwen-vl" or (not lm and model.startswith("tiny-")):
        seen = dict(reward=("shapes_qa",), prompts="shapes-qa", num_iterations=150, lm_learning_rate=1e-4)
        return replace(tiny, **seen, eval_every=30, save_every=30)
    # GSM8K: verl's example for GRPO, 1,024 prompts of 5 samples an iteration and 4 updates; it averages over tokens.
    # The instruction is ours.
    return replace(
        tiny,
        prompts="hub:openai/gsm8k/main:train",
        eval_prompts="hub:openai/gsm8k/main:test",
        instruction="Think step by step, then give the final answer in \\boxed{}.",
        dtype="bf16",
        num_iterations=105,
        num_prompts=128,
        group_size=5,
        lm_micro_batch_size=8,
        num_updates=4,
        rollout_batch_size=320,
        max_new_tokens=512,
        lm_loss="dapo",
        lm_kl="k3",
        lm_kl_coef=1e-3,
        lm_learning_rate=1e-6,
        warmup_updates=1,
        eval_size=1319,
        eval_every=15,
        save_every=15,
        keep_unsharded=False,
        checkpoint_activations=True,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm: rollouts, advantage, losses


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


def ask(row, instruction):
    """The text of a prompt, with the instruction behind it."""
    return f"{row['prompt']}\n{instruction}" if instruction else row["prompt"]


def question(row, task, instruction):
    """What the LM reads of a prompt: the question that it answers, or how to say it better."""
    if task == "text":
        return ask(row, instruction)
    return (blip3o.REFINE_EDIT if task in ("i2i", "i2i_cycle") else blip3o.REFINE).format(row["prompt"])


def write(lm, prompts, max_new_tokens, temperature_B, seed_B):
    """The LM's rollout: a text for each of B prompts. Token ids and mask, int64 [B, max_new_tokens], log-probs fp32 of
    that shape, truncated bool [B], all on the CPU."""
    out = lm.generate(prompts, max_new_tokens, temperature_B, seed_B)
    missing = max_new_tokens - out["ids"].shape[1]
    ids, mask, logps = (torch.nn.functional.pad(out[name].cpu(), (0, missing)) for name in ("ids", "mask", "logps"))
    return ids, mask, logps, out["truncated"].cpu()


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


def replay(model, prompts, ids_BL, mask_BL, tile, temperature):
    """Log-probs and entropies of the completions of a tile of samples, fp32, cut to the longest of them [tile, L]."""
    L = int(mask_BL[tile].sum(dim=1).max())
    of_tile = [prompts[i] for i in tile]
    return model.logps(of_tile, ids_BL[tile, :L], mask_BL[tile, :L], temperature, return_entropy=True)


def neutral(reward_B, kept_B, group_size):
    """A text reward for samples without text: the mean of the others of their group."""
    others_PG = reward_B.masked_fill(kept_B, math.nan).view(-1, group_size)
    mean_PG = others_PG.nanmean(dim=1, keepdim=True).expand_as(others_PG)
    return torch.where(kept_B, mean_PG.flatten(), reward_B)


def judged_by(row, scores):
    """The names of the rewards that judge a prompt: its metadata's "rewards", or all. ValueError for an unknown one."""
    names = row["metadata"].get("rewards", list(scores))
    if not isinstance(names, list) or not names or not set(names) <= set(scores):
        raise ValueError(
            f"prompt {row['prompt'][:60]!r}: its rewards are {names!r}; expected a list of some of {', '.join(scores)}"
        )
    return names


def way_back(row):
    """The instruction that undoes an edit. ValueError for a prompt that has none."""
    prompt = row["metadata"].get("reverse_prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'prompt {row["prompt"][:60]!r}: i2i_cycle needs its "reverse_prompt", got {prompt!r}')
    return prompt


def tag_std(reward_B, applies_BR, applies_PR):
    """Standard deviation of the rewards of all samples that the same rewards judge as the P prompts' [P, 1], each
    around the mean of those."""
    std_P = []
    for applies_R in applies_PR:
        reward = reward_B[(applies_BR == applies_R).all(dim=1)]
        std_P.append((reward - reward.nanmean()).square().nanmean().sqrt())
    return torch.stack(std_P)[:, None]


def group_advantage(reward_B, group_size, std=None, clip=5.0):
    """(r - mean of its group) / std, clipped; std = None takes each group's own. NaN rewards are left out and get
    advantage 0."""
    reward_PG = reward_B.view(-1, group_size)
    centred_PG = reward_PG - reward_PG.nanmean(dim=1, keepdim=True)
    if std is None:
        std = centred_PG.square().nanmean(dim=1, keepdim=True).sqrt()
    return (centred_PG / (std + 1e-4)).nan_to_num(0.0).clamp(-clip, clip).flatten()


def clipped_token_loss(logp_BL, old_logp_BL, adv_B, mask_BL, clip_low, clip_high):
    """PPO's clipped objective with every token as an action, 0 where the mask is [B L]; also the ratios [B L]."""
    # A ratio beyond e^20 says that the policy has run away, and would make the loss infinite where A < 0.
    ratio_BL = ((logp_BL - old_logp_BL) * mask_BL).clamp(max=20.0).exp()
    clipped_BL = ratio_BL.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-adv_B[:, None] * ratio_BL, -adv_B[:, None] * clipped_BL) * mask_BL, ratio_BL


def token_kl(logp_BL, ref_logp_BL, mask_BL, estimator):
    """An estimate of KL(policy || reference) at every token [B L]. k3: exp(-x) - 1 + x with x = logp - ref_logp, at
    least 0; k2: x^2 / 2, whose gradient is the KL's own (http://joschu.net/blog/kl-approx.html)."""
    x = ((logp_BL - ref_logp_BL) * mask_BL).clamp(-20.0, 20.0)
    return (-x).expm1() + x if estimator == "k3" else x.square() / 2


def token_weights(mask_BL, kind, num_samples, num_tokens, max_new_tokens):
    """What a token's loss counts in the sum that is the loss [B L]: see --lm-loss. num_samples, num_tokens: of the
    update, over all ranks."""
    if kind == "grpo":
        return mask_BL / mask_BL.sum(dim=1, keepdim=True).clamp(min=1) / num_samples
    return mask_BL / (num_tokens if kind == "dapo" else num_samples * max_new_tokens)


def clipped_pg_loss(logp_B, old_logp_B, adv_B, clip_eps):
    """PPO's clipped objective, mean over the tile; also returns the ratios."""
    ratio_B = (logp_B - old_logp_B).exp()
    clipped_B = ratio_B.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-adv_B * ratio_B, -adv_B * clipped_B).mean(), ratio_B


def load_models(args, device, dtype, draws, writes, unified, trains_lm, trains_dm):
    """(diffusion model, language model), None for the one that the task does not need; what is not trained is frozen.
    Of a unified model they are two sides of one."""
    lora = dict(lora_rank=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank)
    encoders = dict(offload_encoders=args.offload_encoders, cache_prompts=args.cache_prompts)
    encoders |= dict(sigma_schedule=args.sigma_schedule)
    if unified:
        with_reference = (trains_dm and args.kl_coef > 0) or (trains_lm and args.lm_kl_coef > 0)
        sides = dict(train_dm=trains_dm, train_lm=trains_lm, with_reference=with_reference)
        model = models.load(args.model, device, dtype, **lora, **encoders, **sides)
        return model, model.lm if writes else None
    model = lm = None
    if draws:
        options = dict(with_reference=args.kl_coef > 0, **lora) if trains_dm else dict(train=False)
        model = models.load(args.model, device, dtype, **encoders, **options)
    if writes:
        options = dict(with_reference=args.lm_kl_coef > 0, **lora) if trains_lm else dict(train=False)
        lm = models.load_lm(args.lm or args.model, device, dtype, **options)
    return model, lm


def sizes_of_both(args, dtype, world, draws, writes, unified, trains_lm, trains_dm, K):
    """What --dry-run prints: bytes per GPU of what `load_models` would load."""
    edits, refines = args.task in ("i2i", "i2i_cycle"), args.task == "t2icot" or args.refine
    B = args.num_prompts * args.group_size
    common = dict(
        lora_rank=args.lora_rank,
        ema=args.ema_decay > 0,
        world_size=world.size,
        shard_size=args.shard_size,
        checkpoint_activations=args.checkpoint_activations,
        keep_unsharded=args.keep_unsharded,
        cpu_offload=args.cpu_offload,
    )
    if writes:
        picture = ((args.lm_resolution or args.resolution) // memory_lm.PICTURE_SIDE) ** 2 if edits else 0
        lm = memory_lm.language(
            args.lm or args.model,
            dtype,
            tile_rows=args.lm_micro_batch_size,
            rollout_rows=args.rollout_batch_size or B,
            max_new_tokens=args.max_new_tokens,
            prompt_tokens=memory.PROMPT_TOKENS + picture,
            train=trains_lm,
            with_reference=args.lm_kl_coef > 0,
            **common,
        )
    if draws:
        ways = 2 if args.task == "i2i_cycle" else 1  # each with states and embeddings of its own
        of_rollout = (B if refines else args.num_prompts) + (ways - 1) * B
        of_evaluation = ways * math.ceil(args.eval_size / world.size)  # all at once
        dm = memory.estimate(
            args.model,
            dtype,
            tile_rows=args.micro_batch_size,
            resolution=args.resolution,
            num_samples=ways * B,
            num_prompts=max(of_rollout, of_evaluation),
            num_states=K + 1 if trains_dm else 1,
            guidance=args.guidance,
            image_guidance=args.image_guidance,
            reference_image=edits,
            prompt_tokens=96 + (args.max_new_tokens if refines else 0),
            train_dm=trains_dm,
            train_lm=unified and trains_lm,
            with_reference=(trains_dm and args.kl_coef > 0) or (unified and trains_lm and args.lm_kl_coef > 0),
            offload_encoders=args.offload_encoders,
            cache_prompts=args.cache_prompts,
            **common,
        )
    return memory_lm.together(dm, lm, unified) if draws and writes else dm if draws else lm


# ----------------------------------------------------------------------------------------------------------------------


@parallel.clear_memory_errors()
def main(args: Args):
    # Setup: processes, data, rewards, models, run folder. What can be wrong with the command line is found before
    # weights are loaded.
    with parallel.clear_errors():
        world = parallel.init(args.shard_size)
    master = world.rank == 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with parallel.clear_errors():
        weights = {metric: weight for _, metric, weight in rewards.parse(args.reward)}
        draws, edits, cycle = args.task != "text", args.task in ("i2i", "i2i_cycle"), args.task == "i2i_cycle"
        refines = args.task == "t2icot" or args.refine
        writes = refines or not draws  # there are tokens
        trains_lm, trains_dm = args.train != "dm", args.train != "lm"
        if args.refine and not edits:
            raise ValueError(f"--refine is for i2i and i2i_cycle; --task {args.task} refines always or never")
        if (trains_lm and not writes) or (trains_dm and not draws):
            what, flag = ("text", "dm, or --refine with edits") if not writes else ("picture", "lm")
            raise ValueError(
                f"--task {args.task} makes no {what}, and --train {args.train} would learn from it: --train {flag}"
            )
        if args.instruction and draws:
            raise ValueError(f"--instruction is for --task text; --task {args.task} asks in words of its own")
        counts = (args.num_prompts, args.micro_batch_size, args.lm_micro_batch_size, args.num_updates, args.num_steps)
        counts += (args.eval_num_steps, args.eval_size, args.max_new_tokens, args.eval_every, args.save_every)
        if min(counts) < 1:
            raise ValueError(
                "--num-prompts --micro-batch-size --lm-micro-batch-size --num-updates --num-steps --eval-num-steps "
                "--eval-size --max-new-tokens --eval-every --save-every must be at least 1"
            )
        if args.group_size < 2 or not args.temperature > 0:
            raise ValueError("--group-size must be at least 2 and --temperature positive: samples have to differ")
        if not 0 <= args.keep_original < args.group_size or (args.keep_original and not refines):
            raise ValueError(
                f"--keep-original {args.keep_original} must leave refined samples in a group of {args.group_size}, and "
                "be 0 where nothing is refined"
            )
        first_step, end_step = args.window_range if any(args.window_range) else (0, args.num_steps - 1)
        K = args.window_size or end_step - first_step
        if trains_dm and not 0 <= first_step < first_step + K <= end_step < args.num_steps:
            raise ValueError(
                f"--window-size {K} --window-range {first_step} {end_step} --num-steps {args.num_steps}: "
                "the window must fit into its range and end before the last step, which has no noise"
            )
        if trains_dm and not args.noise_level > 0:
            raise ValueError("--noise-level must be positive: an ODE has no log-prob")
        B = args.num_prompts * args.group_size
        tile_size = min(args.micro_batch_size, B) if draws else 1  # texts have tiles of their own, by length
        pairs_per_update = B * K // args.num_updates
        uneven_pairs = trains_dm and pairs_per_update % args.micro_batch_size
        if B % tile_size or B // tile_size % args.num_updates or uneven_pairs:
            of_samples = f"the {B} samples of --num-prompts x --group-size"
            if not draws:
                raise ValueError(f"--num-updates {args.num_updates} must divide {of_samples}")
            and_pairs = f", and also the {pairs_per_update} (sample, step) pairs of an update" if trains_dm else ""
            raise ValueError(
                f"--micro-batch-size {tile_size} must divide {of_samples} into tiles whose number --num-updates "
                f"{args.num_updates} divides{and_pairs}"
            )
        unified = draws and models.family(args.model) in ("blip3o", "metaquery")
        if unified and args.lm:
            raise ValueError(f"--model {args.model} has a language model of its own: leave out --lm {args.lm}")
        if args.image_guidance != 1 and not unified:
            raise ValueError(
                f"--image-guidance {args.image_guidance}: --model {args.model} has none, only unified models"
            )
        if writes and not unified:
            models.lm_family(args.lm or args.model)
        if args.dry_run:
            sizes = sizes_of_both(args, dtype, world, draws, writes, unified, trains_lm, trains_dm, K)
            return print(memory.table(sizes)) if master else None
        eval_source = args.eval_prompts or None
        train_set = prompt_data.load(args.prompts, "train", eval_source=eval_source)
        eval_set = prompt_data.load(args.prompts, "eval", eval_source=eval_source)
        pictured = train_set[0]["image"] is not None
        if draws and (pictured != edits or (eval_set[0]["image"] is not None) != edits):
            raise ValueError(
                f"--task {args.task}: --prompts {args.prompts} have {'' if pictured else 'no '}pictures; "
                f"{'expected' if edits else 'i2i takes'} e.g. shapes-edit, data/edits.jsonl"
            )
        if pictured and writes and not unified and models.model_type(args.lm or args.model) not in qwen.VISION:
            raise ValueError(f"--prompts have pictures and --lm {args.lm} reads text only: take e.g. qwen2.5-vl-3b")
        reward_device = torch.device(args.reward_device or world.device)
        judge = (args.judge_url, args.judge_model)
        scores = {metric: rewards.load(name, reward_device, *judge) for name, metric, _ in rewards.parse(args.reward)}
        roles = dict(text=writes, image=draws, source=pictured, recon=cycle)
        for score in scores.values():
            rewards.check_needs(score, tuple(role for role, there in roles.items() if there))
        for part in (train_set, eval_set):
            row_of = {}  # the first of those that the same rewards judge
            for row in part.texts():
                row_of.setdefault(tuple(judged_by(row, scores)), row)
                if cycle:
                    way_back(row)
            for names, row in row_of.items():
                rewards.try_out([scores[name] for name in names], row, args.resolution)
        model, lm = load_models(args, world.device, dtype, draws, writes, unified, trains_lm, trains_dm)
        if draws:
            for part in (train_set, eval_set):
                prompt_data.check_images(part, model.reference_images)
            size = (args.resolution, args.resolution)
            sigmas, eval_sigmas = model.sigmas(args.num_steps, *size), model.sigmas(args.eval_num_steps, *size)
            eval_schedule = (eval_sigmas, *coefficients("flow_sde", eval_sigmas, 0.0, (0, 0)))
        for part in (train_set, eval_set) if writes and not pictured else ():  # else they are counted when encoded
            lm.check_lengths((question(row, args.task, args.instruction) for row in part.texts()), args.max_new_tokens)
    of_part = {name: m for m in (model, lm) if m for name in m.parts}  # of a unified model, both: the same
    parts = {name: m.parts[name] for name, m in of_part.items()}
    for m in (model, lm) if not unified else (model,):
        for part in [*m.parts.values(), *(m.reference_parts or {}).values()] if m else ():
            parallel.shard(
                part, m.blocks(part), world, dtype, args.cpu_offload, args.checkpoint_activations, args.compile
            )
    trained = parallel.trained(parts)
    of_side = {"lm": [p for n, p in trained.items() if n.startswith("lm.")]}
    of_side["dm"] = [p for n, p in trained.items() if not n.startswith("lm.")]
    of_side = {side: parameters for side, parameters in of_side.items() if parameters}
    learning_rates = {"lm": args.lm_learning_rate, "dm": args.learning_rate}
    max_grad_norms = {"lm": args.lm_max_grad_norm, "dm": args.max_grad_norm}
    optimizer = torch.optim.AdamW(
        [dict(params=parameters, lr=learning_rates[side]) for side, parameters in of_side.items()],
        weight_decay=args.weight_decay,
    )
    ema = parallel.EMA(trained) if args.ema_decay > 0 else None
    guidance = (args.guidance, args.image_guidance)

    def checkpointed():
        """Everything that training changes, by name."""
        tensors = {f"model/{name}": p.detach() for name, p in trained.items()}
        tensors |= checkpoint.optimizer_tensors(optimizer, {p: name for name, p in trained.items()})
        return tensors | ({f"ema/{name}": s for name, s in ema.shadow.items()} if ema else {})

    # What a resumed run continues from; `cursor` counts the prompts drawn by all ranks.
    state = dict(iteration=0, cursor=0, updates=0, skipped_updates=0, skipped_in_a_row=0, failed_in_a_row={})
    run = parallel.same_text(args.out)
    newest = checkpoint.latest(args.resume) if args.resume else None
    if newest:
        with parallel.clear_errors():
            state |= checkpoint.load(newest, checkpointed())
    if master:
        run_folder.create(run, args, __file__)
        run_folder.cut(run, state["iteration"])
        for side, parameters in of_side.items():
            name = args.model if side == "dm" or unified else args.lm or args.model
            print(f"{run}: {side}, of {name}: {sum(p.numel() for p in parameters):,} trained parameters")
        print(f"{world.size} x {world.device.type}, {args.dtype}, {torch.get_num_threads()} CPU threads per rank")
        eval_from = args.eval_prompts or args.prompts
        print(f"prompts: {len(train_set):,} of {args.prompts}; for evaluation {len(eval_set):,} of {eval_from}")
    tracker = run_folder.Tracker(run, "grpo_unified", args) if args.track and master else None
    stop = parallel.StopSignal()
    scorer = ThreadPoolExecutor(1)  # scores one tile while the next one is drawn

    def save(iteration):
        folder = os.path.join(run, "checkpoints", f"{iteration:06d}")
        checkpoint.save(folder, checkpointed(), state | dict(iteration=iteration), args.keep_checkpoints)

    def check_stop():
        """Between tiles all ranks agree on whether one of them was told to stop."""
        if parallel.agree(stop.number):
            raise parallel.Stopped

    def progress(items, desc):
        return tqdm(items, desc=desc, leave=False, disable=not master)

    def total(reward_BR):
        """Weighted sum of the rewards; NaN where one of them failed."""
        return reward_BR[:, : len(weights)] @ torch.tensor(list(weights.values()))

    def write_all(rows, copies, temperature, seed_W, strict, desc):
        """The LM's texts for `copies` of each row: its prompts, what `write` returns, the texts, and for --task text
        the future rewards of every batch."""
        asked = [question(row, args.task, args.instruction) for row in rows]
        images = [row["image"] for row in rows] if pictured else None
        if edits:  # what the DM and the rewards see of it
            seen = prompt_data.images(rows, *[args.lm_resolution or args.resolution] * 2)
            images = list(map(Image.fromarray, run_folder.to_uint8(seen)))
        with parallel.clear_errors():
            prompts = lm.encode(asked, args.max_new_tokens, images)
        prompts, parts, texts, futures = [prompt for prompt in prompts for _ in range(copies)], [], [], []
        for batch in progress(torch.arange(len(prompts)).split(args.rollout_batch_size or B), desc):
            check_stop()
            temperature_B = torch.full((len(batch),), temperature)
            part = write(lm, [prompts[i] for i in batch], args.max_new_tokens, temperature_B, seed_W[batch])
            parts.append(part)
            texts += lm.decode(*part[:2])
            if not draws:
                of = [rows[i // copies] for i in batch]
                futures.append(scorer.submit(judge_all, {"text": texts[-len(batch) :]}, of, strict))
        return prompts, *map(torch.cat, zip(*parts)), texts, futures

    def draw_all(rows, words, texts, cond, row_B, start_B, seed_BT, schedule, back_seed_B, strict, desc):
        """Pictures of B samples, and for i2i_cycle the way back from them: trajectories as (condition, its row of each
        sample, states, log-probs), uint8 pictures, and the future rewards of every tile."""
        legs, pictures, recons, futures = [], [], [], []
        tiles = torch.arange(len(rows)).split(tile_size)
        for leg in range(1 + cycle):
            if leg == 1:  # what is edited back is what was judged: whole levels of 8 bits
                edited = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
                with parallel.clear_errors():
                    cond = model.encode([way_back(row) for row in rows], edited, seeds=fold_seed(back_seed_B, BACK))
                row_B, start_B = torch.arange(len(rows)), fold_seed(start_B, BACK)
                seed_BT = None if seed_BT is None else fold_seed(seed_BT, BACK)
            states, logps = [], []
            for tile in progress(tiles, desc):
                check_stop()
                cond_tile = {name: values[row_B[tile].to(values.device)] for name, values in cond.items()}
                noise = model.init_noise(start_B[tile].to(world.device), *size)
                seeds = None if seed_BT is None else seed_BT[tile].to(world.device)
                x, states_tile, logp_tile = rollout(model, cond_tile, noise, schedule, guidance, seeds)
                states.append(states_tile)
                logps.append(logp_tile)
                made = run_folder.to_uint8(model.decode(x))
                (recons if leg else pictures).extend(made)
                if leg == cycle:
                    part = slice(int(tile[0]), int(tile[-1]) + 1)
                    samples = {"image": pictures[part]} | ({"recon": recons[part]} if cycle else {})
                    samples |= {"text": texts[part]} if texts else {}
                    futures.append(scorer.submit(judge_all, samples, rows[part], strict))
            legs.append((cond, row_B, torch.cat(states), torch.cat(logps)))
        return legs, (pictures, recons), futures

    def judge_all(samples, rows, strict):
        """Every reward of a tile, fp32 [tile, R], 0 where it does not judge a prompt; with `strict`, also the strict
        form of those that have one, as last columns, NaN there."""
        if edits:
            samples = samples | {"source": run_folder.to_uint8(prompt_data.images(rows, *size))}
        elif pictured:
            samples = samples | {"source": [np.asarray(row["image"].convert("RGB")) for row in rows]}
        forms = [(name, score, 0.0) for name, score in scores.items()]
        forms += [(name, score.strict, math.nan) for name, score in scores.items() if strict and score.strict]
        out = torch.stack([torch.full((len(rows),), absent) for _, _, absent in forms], dim=1)
        for r, (name, form, _) in enumerate(forms):
            mine = [b for b, row in enumerate(rows) if name in judged_by(row, scores)]
            if mine:
                of_mine = {role: [values[b] for b in mine] for role, values in samples.items()}
                prompts, metadata = [rows[b]["prompt"] for b in mine], [rows[b]["metadata"] for b in mine]
                out[mine, r] = form(of_mine, prompts, metadata)
        return out

    def evaluate_both():
        """Greedy texts and ODE samples for fixed held-out prompts and noise, with the averaged weights if there are
        any. Returns metrics, and pictures, captions or texts for the samples folder."""
        count = min(args.eval_size, len(eval_set)) if not draws else args.eval_size
        mine = torch.arange(math.ceil(count / world.size)) * world.size + world.rank  # as many on every rank
        rows = [eval_set[i] for i in prompt_data.order(len(eval_set), 0, 0, int(mine.max()) + 1)[mine.tolist()]]
        seed_B, texts, pictures = fold_seed(0, EVAL, mine), [], []
        words = [row["prompt"] for row in rows]
        with ema.applied() if ema else nullcontext():
            if writes:
                *_, texts, futures = write_all(rows, 1, 0.0, seed_B, True, "evaluate: write")
                words = [blip3o.refined(text) for text in texts] if refines else words
            if draws:
                with parallel.unsharded(model.parts, args.keep_unsharded):
                    cond = model.encode(words, prompt_data.images(rows, *size), seeds=seed_B)
                    everyone = torch.arange(len(rows))
                    _, (pictures, recons), futures = draw_all(
                        rows, words, texts, cond, everyone, seed_B, None, eval_schedule, seed_B, True, "evaluate: draw"
                    )
        with parallel.clear_errors():
            judged = torch.cat([future.result() for future in futures])
        shown = total(judged)[:16].tolist()
        captions = [f"{r:.2f} {row['prompt']}" for r, row in zip(shown, rows)]
        captions = [f"{c} > {w}" for c, w in zip(captions, words)] if refines else captions
        pictures = pictures[:16]
        if edits:  # before and after, and back again, side by side
            columns = [
                run_folder.to_uint8(prompt_data.images(rows[:16], *size)),
                pictures,
                *([recons] if cycle else []),
            ]
            pictures = [np.concatenate(several, axis=1) for several in zip(*columns)]
        applies_BR = torch.tensor([[name in judged_by(row, scores) for name in scores] for row in rows])
        gathered = parallel.all_gather(judged.masked_fill((mine >= count)[:, None], math.nan))
        applied = parallel.all_gather(applies_BR)
        scored = {"eval_reward": total(gathered).nanmean().item()}
        for r, name in enumerate(scores):
            if applied[:, r].any():
                scored[f"eval_reward/{name}"] = gathered[applied[:, r], r].nanmean().item()
        if gathered.shape[1] > len(scores):
            scored["eval_strict"] = gathered[:, len(scores) :].nanmean().item()
        return scored, (pictures, captions) if draws else (rows[:16], texts[:16], shown)

    def replay_texts(prompts, ids_BL, mask_BL, tiles, desc):
        """Log-probs of all samples under the policy at hand, without gradient, fp32 [B, L] on the CPU."""
        logp_BL = torch.zeros(ids_BL.shape)
        with torch.no_grad(), parallel.unsharded(lm.parts, args.keep_unsharded):
            for tile in progress(tiles, desc):
                check_stop()
                logp, _ = replay(lm, prompts, ids_BL, mask_BL, tile, args.temperature)
                logp_BL[tile, : logp.shape[1]] = logp.cpu()
        return logp_BL

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
    bar = tqdm(initial=iteration, total=args.num_iterations, desc="grpo_unified", disable=not master)
    try:
        for iteration in range(state["iteration"], args.num_iterations + 1):
            if iteration % args.save_every == 0 or iteration == args.num_iterations:
                save(iteration)
            row = {"iteration": iteration}
            if iteration % args.eval_every == 0 or iteration == args.num_iterations:
                scored, shown = evaluate_both()
                row |= scored
                if master:
                    path = os.path.join(run, "samples", f"{iteration:06d}")
                    run_folder.grid(f"{path}.png", *shown) if draws else run_folder.texts(path, *shown)
            if iteration == args.num_iterations:
                log(row)
                break

            # 1) Rollout: G samples for each of P prompts; the samples of one prompt are neighbours in B. A prompt's
            # slot among those of all ranks keys its samples and noise, so that the number of ranks changes nothing.
            started = time.perf_counter()
            slot_P = torch.arange(args.num_prompts) + world.rank * args.num_prompts
            picks = prompt_data.order(len(train_set), args.seed, state["cursor"], args.num_prompts * world.size)
            rows_P = [train_set[i] for i in picks[slot_P.tolist()]]
            rows = [row for row in rows_P for _ in range(args.group_size)]
            prompt_B, member_B = torch.arange(B) // args.group_size, torch.arange(B) % args.group_size
            num_written = args.group_size - args.keep_original if writes else 0
            kept_B = member_B >= num_written
            w_B = prompt_B * num_written + member_B  # which text a sample has, unless it is kept
            words, texts = [row["prompt"] for row in rows], []
            if writes:  # the LM's tokens
                seed_PG = fold_seed(args.seed, SAMPLE, iteration, slot_P[:, None], torch.arange(num_written))
                prompts, ids_WL, mask_WL, sampled_logp_WL, truncated_W, texts_W, futures = write_all(
                    rows_P, num_written, args.temperature, seed_PG.flatten(), False, "write"
                )
                texts = [words[b] if kept_B[b] else texts_W[w_B[b]] for b in range(B)]
                if refines:
                    words = [words[b] if kept_B[b] else blip3o.refined(texts[b]) for b in range(B)]
            if draws:  # the DM's steps
                sources = prompt_data.images(rows_P, *size)
                seed_P = fold_seed(args.seed, REFERENCE, iteration, slot_P)  # of the noise in pictures to edit
                row_B = torch.arange(B) if refines else prompt_B
                with parallel.clear_errors():
                    if refines:
                        sources = None if sources is None else sources[prompt_B]
                        cond = model.encode(words, sources, seeds=seed_P[prompt_B])
                    else:
                        cond = model.encode([row["prompt"] for row in rows_P], sources, seeds=seed_P)
                seed_PG = fold_seed(args.seed, NOISE, iteration, slot_P[:, None], torch.arange(args.group_size))
                seed_B = seed_PG.flatten()
                start_B = seed_PG[:, :1].expand_as(seed_PG).flatten() if args.shared_noise else seed_B
                seed_BT = fold_seed(seed_B[:, None], STEP, torch.arange(args.num_steps))
                window = (0, 0)  # what nobody learns from needs no noise
                if trains_dm:
                    starts = end_step - first_step - K + 1
                    first = first_step + fold_seed(args.seed, WINDOW, iteration).item() % starts
                    window = (first, first + K)
                schedule = (sigmas, *coefficients(args.sampler, sigmas, args.noise_level, window))
                with parallel.unsharded(model.parts, args.keep_unsharded):
                    legs, _, futures = draw_all(
                        rows, words, texts, cond, row_B, start_B, seed_BT, schedule, seed_P[prompt_B], False, "draw"
                    )
            seconds_rollout = time.perf_counter() - started

            # 2) Reward: what is still being scored is waited for
            started = time.perf_counter()
            with parallel.clear_errors():
                reward_BR = torch.cat([future.result() for future in futures])
            for r, score in enumerate(scores.values()):
                if refines and "text" in score.needs:
                    reward_BR[:, r] = neutral(reward_BR[:, r], kept_B, args.group_size)
            applies_BR = torch.tensor([[name in judged_by(row, scores) for name in scores] for row in rows])
            reward_B = total(reward_BR)
            all_BR, all_applies_BR = parallel.all_gather(reward_BR), parallel.all_gather(applies_BR)
            failed_in_a_row = dict(state["failed_in_a_row"])
            for name, applies_B, values_B in zip(scores, all_applies_BR.T, all_BR.T):
                count = int(applies_B.sum())
                failed = count and values_B[applies_B].isnan().all().item()
                if count:
                    failed_in_a_row[name] = failed_in_a_row.get(name, 0) + 1 if failed else 0
                # With tags it may be the samples of one prompt, which have no advantage then.
                if failed and (count == len(applies_B) or failed_in_a_row[name] == 3):
                    raise SystemExit(
                        f"error: reward {name} failed (NaN) for all {count} samples of iteration {iteration}"
                    )
            seconds_reward = time.perf_counter() - started

            # 3) Advantage: relative to the group; all tokens and all trained steps of a sample share it
            started = time.perf_counter()
            all_B = total(all_BR)
            std = torch.tensor(1 - 1e-4) if args.advantage_std == "none" else None
            if args.advantage_std == "global":
                std = tag_std(all_B, all_applies_BR, applies_BR[:: args.group_size])
            adv_B = group_advantage(reward_B, args.group_size, std, args.advantage_clip).to(world.device)

            # 4) Loss and 5) Update. Each update takes its share of the rollout's tiles, in random order; a replayed
            # tile has the rows and the shape that it had in the rollout, and so its bits.
            tile_order = fold_seed(args.seed, ORDER, iteration, torch.arange(B // tile_size)).argsort()
            shares, lm_tiles_of, old_logp_WL, ref_logp_WL = [], [], None, None
            for tiles in tile_order.chunk(args.num_updates):
                sample_B = (tiles[:, None] * tile_size + torch.arange(tile_size)).flatten()
                shares.append(tiles)
                w = w_B[sample_B[~kept_B[sample_B]]].sort().values if trains_lm else torch.zeros(0, dtype=torch.int64)
                if len(w):
                    size_W = mask_WL[w].sum(dim=1) + torch.tensor([len(prompts[i]) for i in w])
                    w = w[size_W.argsort(stable=True)]
                lm_tiles_of.append(w.split(args.lm_micro_batch_size) if len(w) else ())
            if trains_lm and args.num_updates > 1:
                old_logp_WL = replay_texts(prompts, ids_WL, mask_WL, sum(lm_tiles_of, ()), "old log-probs")
            if trains_lm and args.lm_kl_coef > 0:
                with parallel.reference(lm):
                    ref_logp_WL = replay_texts(prompts, ids_WL, mask_WL, sum(lm_tiles_of, ()), "reference log-probs")
            b_W = torch.arange(B)[~kept_B]  # the sample of a text
            stats = {"lm": [], "dm": []}
            grad_norms, on_policy_errs = {side: [] for side in of_side}, {side: [] for side in of_side}
            for update, (tiles, lm_tiles) in enumerate(zip(shares, lm_tiles_of)):
                # Tokens first, so that the last backward pass of an update is one of all parts that are trained.
                count = torch.tensor([[len(w), mask_WL[w].sum()] for w in lm_tiles]).view(-1, 2).sum(dim=0).float()
                num_samples, num_tokens = parallel.all_gather(count[None]).sum(dim=0).clamp(min=1).tolist()
                for n, w in enumerate(progress(lm_tiles, "update: tokens")):
                    if update == 0:
                        check_stop()
                    last = n == len(lm_tiles) - 1 and not (unified and trains_dm)
                    parallel.accumulate(lm.parts, last, args.keep_unsharded)
                    logp, entropy = replay(lm, prompts, ids_WL, mask_WL, w, args.temperature)
                    L = logp.shape[1]
                    sampled_logp, mask = (x[w, :L].to(world.device) for x in (sampled_logp_WL, mask_WL))
                    old_logp = logp.detach() if old_logp_WL is None else old_logp_WL[w, :L].to(world.device)
                    adv = adv_B[b_W[w].to(world.device)]
                    loss, ratio = clipped_token_loss(logp, old_logp, adv, mask, args.lm_clip_low, args.lm_clip_high)
                    kl = torch.zeros_like(loss)
                    if args.lm_kl_coef > 0:
                        kl = token_kl(logp, ref_logp_WL[w, :L].to(world.device), mask, args.lm_kl)
                        loss = loss + args.lm_kl_coef * kl
                    weight = token_weights(mask, args.lm_loss, num_samples, num_tokens, args.max_new_tokens)
                    # FSDP averages gradients over ranks; the weights are of all ranks.
                    ((loss * weight).sum() * world.size).backward()
                    with torch.no_grad():
                        clipped = (ratio < 1 - args.lm_clip_low) | (ratio > 1 + args.lm_clip_high)
                        of_tokens = [(x * mask).sum() for x in (kl, clipped, ratio, entropy)]
                        stats["lm"].append(torch.stack([(loss * weight).sum(), *of_tokens, mask.sum()]))
                        if update == 0:
                            on_policy_errs["lm"].append(((logp - sampled_logp) * mask).abs().max())
                if trains_dm:
                    sample_S = (tiles[:, None, None] * tile_size + torch.arange(tile_size)).expand(-1, K, -1).flatten()
                    step_S = torch.arange(K)[None, :, None].expand(len(tiles), -1, tile_size).flatten()
                    pairs = list(zip(sample_S.split(args.micro_batch_size), step_S.split(args.micro_batch_size)))
                    of_legs = [(*pair, leg) for leg in legs for pair in pairs]
                    for n, (i, k, leg) in enumerate(progress(of_legs, "update: steps")):
                        if update == 0:
                            check_stop()
                        parallel.accumulate(model.parts, n == len(of_legs) - 1, args.keep_unsharded)
                        cond, row_B, states_BKCHW, old_logp_BK = leg
                        i, k = i.to(world.device), k.to(world.device)
                        x, x_next = states_BKCHW[i, k], states_BKCHW[i, k + 1]
                        sigma, a, b, c = (coef.to(world.device, torch.float32)[first + k] for coef in schedule)
                        cond = {name: values[row_B[i.cpu()].to(values.device)] for name, values in cond.items()}
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
                        (loss / len(pairs)).backward()  # the two ways of a cycle add up
                        clipped_S = (ratio_S - 1).abs() > args.clip_eps
                        stats["dm"].append(torch.stack([loss, kl, clipped_S.float().mean(), ratio_S.mean()]).detach())
                        if update == 0:
                            on_policy_errs["dm"].append((logp_S - old_logp_S).detach().abs().max())
                for side, parameters in of_side.items():
                    grad_norms[side].append(parallel.clip_grad_norm(parameters, max_grad_norms[side]))
                if all(math.isfinite(norms[-1]) for norms in grad_norms.values()):
                    fallen = 0.9 * min(1.0, iteration / (args.decay_iterations or math.inf))
                    for side, group in zip(of_side, optimizer.param_groups):
                        group["lr"] = learning_rates[side] * min(
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
            state["failed_in_a_row"] = failed_in_a_row
            seconds_update = time.perf_counter() - started

            reward_PG = all_B.view(-1, args.group_size)
            std_P = (reward_PG - reward_PG.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1).sqrt()
            row |= dict(
                reward=reward_PG.nanmean().item(),
                reward_std=std_P.nanmean().item(),
                zero_std_frac=(std_P < 1e-6).float().mean().item(),
                nan_reward_frac=reward_PG.isnan().float().mean().item(),
                skipped_updates=state["skipped_updates"],
                samples_per_s=reward_PG.numel() / (seconds_rollout + seconds_reward + seconds_update),
                seconds_rollout=seconds_rollout,
                seconds_reward=seconds_reward,
                seconds_update=seconds_update,
            )
            for r, name in enumerate(scores):
                if all_applies_BR[:, r].any():
                    row[f"reward/{name}"] = all_BR[all_applies_BR[:, r], r].nanmean().item()
            if writes:
                of_samples = torch.stack([mask_WL.sum(dim=1).float(), truncated_W.float()], dim=1)
                names = ("lm/length", "lm/truncated_frac")
                row |= dict(zip(names, parallel.all_gather(of_samples).mean(dim=0).tolist()))
            if trains_lm:
                sums = parallel.all_gather(torch.stack(stats["lm"]).cpu()).sum(dim=0)
                row["lm/loss"] = sums[0].item() / args.num_updates
                names = ("lm/kl", "lm/clipfrac", "lm/ratio", "lm/entropy")
                row |= dict(zip(names, (sums[1:5] / sums[5].clamp(min=1)).tolist()))
                if not args.lm_kl_coef:
                    del row["lm/kl"]
            if trains_dm:
                means = parallel.all_gather(torch.stack(stats["dm"]).cpu()).mean(dim=0).tolist()
                row |= dict(zip(("dm/loss", "dm/kl", "dm/clipfrac", "dm/ratio"), means))
                row["dm/loss"] *= len(legs)
                if not args.kl_coef:
                    del row["dm/kl"]
            zero = torch.zeros((), device=world.device)  # an update may be of kept samples only
            for side, errors in on_policy_errs.items():
                row[f"{side}/on_policy_err"] = parallel.all_gather(torch.stack([zero, *errors]).cpu()).max().item()
                row[f"{side}/grad_norm"] = sum(grad_norms[side]) / len(grad_norms[side])
            row["on_policy_err"] = max(row[f"{side}/on_policy_err"] for side in of_side)
            row["loss"] = sum(row[f"{side}/loss"] for side in of_side)
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
        written = ["model"]
        if unified:
            model.save(os.path.join(run, "model"), tensors)
        else:  # each in its own format, as it came
            of_lm = {name: t for name, t in tensors.items() if name.startswith("lm.")}
            of_dm = {name: t for name, t in tensors.items() if name not in of_lm}
            written = [name for name, its in (("lm", of_lm), ("model", of_dm)) if its]
            if of_lm:
                lm.save(os.path.join(run, "lm"), of_lm)
            if of_dm:
                model.save(os.path.join(run, "model"), of_dm)
        for name in written:
            card.write(os.path.join(run, name), run, recipe)
        print(f"wrote {run}: curves.png, samples/, metrics.jsonl, {'/, '.join(written)}/")
    stop.restore()
    return row


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with parallel.clear_errors():
        usual = {"--model": "tiny-flux", "--lm": "", "--task": ""}
        defaults = recipe(*(run_folder.peek(arguments, flag, value) for flag, value in usual.items()))
    main(run_folder.command_line(defaults, arguments, __file__))
