"""
What a run needs per GPU, found without weights: the model is built on the meta device, which knows shapes and no
values, and one prompt encoding, rollout forward, decoding and training step run there while the bytes alive are
counted. `estimate` is of an RL run, `pretraining` of pretrain.py, `parameters` counts the parts.

Parameters, shards, gradients and optimizer state are exact. Activations are those of PyTorch's operators with an
attention that stores no attention matrix (flash, memory-efficient); the scratch space inside a kernel is not seen. What
FSDP2 holds beside the shards is a count of blocks (see `estimate`). Not counted: reward models, the CUDA context
(about 0.5 GiB), NCCL's buffers, fragmentation.
"""

import copy
import functools
import json
import os
import weakref
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import models
from models import blip3o, flux, flux2, qwen, sana, sd3

MODELS = {"flux": flux.Flux, "kontext": flux.Flux, "klein": flux2.Flux2, "sd3": sd3.Sd3, "sana": sana.Sana}

# The configs of FLUX.1-dev, which are also Kontext's, beside those of its transformer, because the licence stands
# before its files. tests/test_memory.py holds their parameter counts to flux.FLUX_DEV's.
FLUX_DEV_T5 = dict(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    is_gated_act=True,
    dense_act_fn="gelu_new",
)
FLUX_DEV_CLIP = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
)
FLUX_DEV_VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=16,
    norm_num_groups=32,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)

# Those of the full-size unified models, of which no folder exists before one is made, and whose files are 17 GB:
# Qwen2.5-VL-3B-Instruct, Sana_1600M_1024px and its DC-AE f32c32.
QWEN_VL_3B = dict(
    text_config=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    ),
    vision_config=dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    ),
    tie_word_embeddings=True,
)
QWEN_VL_EYES = dict(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384},
)
SANA_1600M = dict(
    in_channels=32,
    out_channels=32,
    num_attention_heads=70,
    attention_head_dim=32,
    num_layers=20,
    num_cross_attention_heads=20,
    cross_attention_head_dim=112,
    cross_attention_dim=2240,
    caption_channels=2304,
    mlp_ratio=2.5,
    patch_size=1,
    sample_size=32,
)
DC_AE_F32C32 = dict(
    latent_channels=32,
    attention_head_dim=32,
    encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    encoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
    decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
    decoder_layers_per_block=[3] * 6,
    encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    upsample_block_type="interpolate",
    downsample_block_type="conv",
    scaling_factor=0.41407,
)

# Qwen2.5-Instruct's, so that a run of them can be sized up without a network. tests/test_memory_lm.py holds their
# parameter counts to the published ones.
QWEN_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
QWEN_SIZES += ("num_key_value_heads", "tie_word_embeddings")
QWEN = {
    "qwen2.5-0.5b": (151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": (151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": (151936, 2048, 11008, 36, 16, 2, True),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, False),
}

PROMPT_TOKENS = 256  # of a prompt that a language model answers, chat template and instruction included: assumed

# What is on the table, and the flags that make it smaller.
FLAGS = {
    "trained parameters": "--lora-rank, more GPUs, --shard-size 0, --cpu-offload",
    "frozen parameters": "--dtype bf16, more GPUs, --shard-size 0, --cpu-offload",
    "optimizer state": "--lora-rank, more GPUs, --shard-size 0, --cpu-offload",
    "averaged weights": "--ema-decay 0, --lora-rank, more GPUs, --cpu-offload",
    "reference copy": "--kl-coef 0, --lora-rank, more GPUs",
    "buffers": "--dtype bf16, --lora-rank",
    "text encoders": "--offload-encoders, --dtype bf16",
    "vision tower": "--dtype bf16",
    "autoencoder": "--dtype bf16",
    "prompt embeddings": "--num-prompts",
    "trajectories": "--num-prompts, --group-size, --window-size",
    "gradients": "--lora-rank, more GPUs, --cpu-offload, without --keep-unsharded",
    "gathered parameters": "--dtype bf16, without --keep-unsharded",
    "prompt encoding": "--offload-encoders, --dtype bf16, --resolution",
    "rollout forward": "--micro-batch-size, --resolution",
    "evaluation forward": "--micro-batch-size, --resolution",
    "decoding": "--micro-batch-size, --resolution",
    "activations": "--checkpoint-activations, --micro-batch-size, --resolution",
    "gathered for sampling": "--dtype bf16",
    "sampling": "--rollout-batch-size, --max-new-tokens, --dtype bf16",
    "token activations": "--checkpoint-activations, --micro-batch-size, --max-new-tokens",
    "optimizer temporaries": "--lora-rank, more GPUs, --cpu-offload",
    "host: prompt cache": "--cache-prompts",
    "host: loading": "--lora-rank, --dtype bf16, fewer ranks per node",
    "host: checkpoint": "--lora-rank, more GPUs",
    "host: export": "--lora-rank",
}


def estimate(
    source,
    dtype,
    *,
    tile_rows,
    resolution,
    num_samples,
    num_prompts,
    num_states,
    guidance=1.0,
    image_guidance=1.0,
    lora_rank=0,
    with_reference=False,
    ema=False,
    train_dm=True,
    train_lm=False,
    world_size=1,
    shard_size=0,
    checkpoint_activations=False,
    keep_unsharded=False,
    cpu_offload=False,
    offload_encoders=False,
    cache_prompts=512,
    reference_image=False,
    prompt_tokens=96,
    device_type="cuda",
):
    """Bytes on the fullest rank of an RL run as an ordered dict: what it holds, then "peak: <phase>" and their maximum
    "peak", then what is in CPU memory ("host: ..."). "model, unsharded" is all of `parts`. About 6 s for FLUX.1-dev.

    source: alias, folder or hub id (of which only configs and tokenizers are fetched; FLUX.1-dev and Kontext need
    none), or blip3o or metaquery, unified models at full size that need no folder. dtype: what the model computes in.
    tile_rows: rows of a forward and backward. resolution: pixels. num_samples, num_prompts: per rank and iteration.
    num_states: latents kept of each sample, one more than trained steps. train_dm: False freezes what draws, which then
    has no update. train_lm: the language model of a unified model is trained too (by the picture's loss; what its
    tokens need, models/memory_lm.py knows). reference_image: every prompt comes with a picture of this resolution to
    edit; for a model that only edits (Kontext) always. prompt_tokens: length of a prompt of a unified model, with its
    chat template and without its picture (the null caption counts as long); the others pad to a length of their own.
    device_type: "cpu" for a run without GPU, where "host" is the same memory; the optimizer's temporaries differ.

    FSDP2 cuts dim 0 of every parameter into ceil(rows / ranks), padded: all ranks hold as much. Beside the shards
    it holds the root's parameters and those of one block; of three blocks where there is something to gather (the one
    that computes, the next one's buffer, and the copy between them), or of the whole model with keep_unsharded. Of
    several parts one computes at a time. Unreduced gradients of a block or two are part of "activations". Buffers, such
    as SD3's table of positions, are whole on every rank.

    Raises ValueError for an unknown or unsupported model, a resolution that it cannot make, guidance that it cannot
    have, a reference_image that it does not take, or offload_encoders for a unified model; RuntimeError where configs
    are missing, or the hub or a licence stands in the way.
    """
    if not train_dm and not train_lm:
        lora_rank, with_reference = 0, False
    model = _Model(source, dtype, lora_rank, with_reference, train_lm, offload_encoders, prompt_tokens, train_dm)
    rows = max(num_prompts, min(tile_rows, num_samples))  # an evaluation encodes a tile of prompts
    edits = reference_image or model.flow.reference_images == "required"
    scales = (guidance, image_guidance)
    model.try_out(rows, min(tile_rows, num_samples), resolution, edits, scales, checkpoint_activations)
    return _sizes(
        model,
        model.update(tile_rows, shard_size or world_size, scales) if train_dm else 0,
        ranks=shard_size or world_size,
        num_prompts=num_prompts,
        # The tiles' states and their concatenation are both alive until the next rollout.
        trajectories=2 * num_samples * num_states * model.latent_bytes,
        ema=ema,
        keep_unsharded=keep_unsharded,
        cpu_offload=cpu_offload,
        cache_prompts=cache_prompts,
        device_type=device_type,
    )


def pretraining(
    source,
    dtype,
    *,
    micro_batch_size,
    resolution,
    noise_levels=1,
    gpus=(1, 8, 64),
    guidance=1.0,
    lora_rank=0,
    ema=False,
    train_lm=False,
    shard_size=0,
    checkpoint_activations=False,
    keep_unsharded=False,
    cpu_offload=False,
    offload_encoders=False,
    cache_prompts=512,
    reference_image=False,
    prompt_tokens=96,
    device_type="cuda",
):
    """What `estimate` says, of pretraining: a dict, number of GPUs -> bytes on the fullest of them. No reference copy,
    no trajectories; "activations" are those of one micro batch through trained conditioning, the autoencoder's encoder,
    transformer and backward, without guidance; the rest is an evaluation's, of as many rows, with `guidance`.

    noise_levels: at which every picture is trained. gpus: the numbers of GPUs; with shard_size, those of it or less
    shard over all. reference_image: every caption comes with a picture to edit. Other arguments, errors and what is not
    counted: see `estimate`.
    """
    model = _Model(source, dtype, lora_rank, False, train_lm, offload_encoders, prompt_tokens)
    edits = reference_image or model.flow.reference_images == "required"
    rows = micro_batch_size * noise_levels  # of a backward pass, and of an evaluation's tile
    model.try_out(rows, rows, resolution, edits, (guidance, 1.0), checkpoint_activations)
    found, activations = {}, {}
    for count in gpus:
        ranks = min(shard_size or count, count)
        if ranks not in activations:
            activations[ranks] = model.update(micro_batch_size, ranks, (1.0, 1.0), resolution, noise_levels)
        found[count] = _sizes(
            model,
            activations[ranks],
            ranks=ranks,
            num_prompts=micro_batch_size,
            trajectories=0,
            ema=ema,
            keep_unsharded=keep_unsharded,
            cpu_offload=cpu_offload,
            cache_prompts=cache_prompts,
            device_type=device_type,
            phase="evaluation",
        )
    return found


def parameters(source):
    """Number of parameters of every part of a model, by its name, what is shared counted once; nothing is read but
    configs. Raises what `estimate` raises."""
    model = _Model(source, torch.float32)
    parts = {name: list(part.parameters()) for name, part in model.flow.parts.items()} | model.frozen
    return {name: numel(tensors) for name, tensors in parts.items() if tensors}


class _Model:
    """A model on the meta device, and what it was found to need: `flow` is the flow model, `frozen` the parameters that
    are in no part, by name."""

    def __init__(
        self,
        source,
        dtype,
        lora_rank=0,
        with_reference=False,
        train_lm=False,
        offload_encoders=False,
        prompt_tokens=96,
        train_dm=True,
    ):
        self.dtype, self.lora_rank, self.with_reference = dtype, lora_rank, with_reference
        self.offload_encoders = offload_encoders
        config, folder = _unified_config(source)
        self.unified = config is not None
        if self.unified:
            if offload_encoders:
                raise ValueError("--offload-encoders: a unified model trains through its language model, which stays")
            sides = (train_lm, prompt_tokens, train_dm)
            self.flow = _unified(config, folder, dtype, lora_rank, with_reference, *sides)
            eyes = self.flow.lm.tower
            modules = [*self.flow.parts.values(), eyes, self.flow.vae]
            self.frozen = {"text encoders": [], "vision tower": list(eyes.parameters())}
        else:
            if train_lm:
                raise ValueError(f"--model {source} has no language model to train, only unified models have")
            family, pipeline = _pipeline(source, dtype)
            lora = (lora_rank, 2 * lora_rank, with_reference)
            self.flow = MODELS[family](pipeline, "meta", dtype, *lora, train=train_dm)
            self.flow.cache = functools.partial(_cached, self.flow._encode_rows)
            modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
            self.frozen = {"text encoders": encoder_parameters(pipeline), "vision tower": []}
        self.frozen["autoencoder"] = list(self.flow.vae.parameters())
        self.modules = modules
        parts = self.flow.parts.values()
        # Of each part, what FSDP2 gathers together: its blocks, and the rest.
        self.groups = []
        for part in parts:
            blocks = [list(block.parameters()) for block in self.flow.blocks(part)]
            inside = {p for block in blocks for p in block}
            self.groups.append((blocks, [p for p in part.parameters() if p not in inside]))
        self.parameters = [p for part in parts for p in part.parameters()]
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.untrained = [p for p in self.parameters if not p.requires_grad]
        self.copies = list((self.flow.reference_parts or {}).values())

    def try_out(self, rows, tile, resolution, edits, guidance, checkpoint_activations):
        """Count the bytes alive in encoding `rows` prompts, a forward of `tile` rows without gradients, and decoding
        them; then make ready for `update`."""
        flow = self.flow
        self.size = flow.latent_size(resolution, resolution)
        self.latent_bytes = 4 * flow.latent_channels * self.size[0] * self.size[1]
        with self._alive() as alive:
            images = torch.empty(rows, 3, resolution, resolution) if edits else None
            self.cond = flow.encode([""] * rows, images)
        self.encoding = alive.peak
        for p in self.parameters:
            p.data = p.data.to(self.dtype)  # FSDP2 gathers all of them, masters too, in the dtype of the computation
        for part in flow.parts.values():
            part.train()
        with torch.no_grad(), self._alive() as alive:
            self._velocity(tile, guidance)
        self.forward = alive.peak
        with torch.no_grad(), self._alive() as alive:
            flow.decode(torch.empty(tile, flow.latent_channels, *self.size, device="meta"))
        self.decoding = alive.peak
        if checkpoint_activations:
            for block in (block for part in flow.parts.values() for block in flow.blocks(part)):
                block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)

    def update(self, rows, ranks, guidance=(1.0, 1.0), pictures=0, noise_levels=1):
        """The most bytes alive in a forward and backward of `rows` rows; of pretraining on pictures of so many pixels
        a side, each at so many noise levels, whose latents are then found on the way."""
        with self._alive() as alive:
            hooks = reduce_per_block([group for blocks, rest in self.groups for group in (*blocks, rest)], ranks)
            if pictures:
                self._flow_matching_loss(rows, pictures, noise_levels).backward()
            else:
                self._velocity(rows, guidance).float().square().mean().backward()
        for hook in hooks:
            hook.remove()
        for p in self.trained:
            p.grad = None
        return alive.peak

    def _velocity(self, rows, guidance):
        cond = self.flow.condition({name: t.new_empty(rows, *t.shape[1:]) for name, t in self.cond.items()})
        x = torch.empty(rows, self.flow.latent_channels, *self.size, device="meta")
        return self.flow.velocity(x, torch.empty(rows, device="meta"), cond, guidance)

    def _flow_matching_loss(self, rows, pixels, noise_levels):
        cond = self.flow.condition({name: t.new_empty(rows, *t.shape[1:]) for name, t in self.cond.items()})
        drop = torch.empty(rows, dtype=torch.bool, device="meta")
        for name in [name for name in cond if f"{name}_null" in cond]:
            mask = drop.view(-1, *[1] * (cond[name].dim() - 1))
            cond[name] = torch.where(mask, cond[f"{name}_null"], cond[name])
        x0 = self.flow.encode_images(torch.empty(rows, 3, pixels, pixels, device="meta"))
        cond = {name: values.repeat_interleave(noise_levels, dim=0) for name, values in cond.items()}
        x0 = x0.repeat_interleave(noise_levels, dim=0)
        eps, sigma = torch.empty_like(x0), torch.empty(len(x0), device="meta")
        x = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * eps
        return F.mse_loss(self.flow.velocity(x, sigma, cond).float(), eps - x0)

    def _alive(self):
        # A unified model asks whether all null texts are alike, and they are.
        return Alive(self.modules, self.unified)


def _sizes(
    model,
    activations,
    *,
    ranks,
    num_prompts,
    trajectories,
    ema,
    keep_unsharded,
    cpu_offload,
    cache_prompts,
    device_type,
    phase="rollout",
):
    """The table of `estimate` for a `_Model` that was tried out and whose update has so many bytes of activations."""
    dtype, trained, frozen = model.dtype, model.trained, model.untrained
    master = 4 * numel(trained)  # whole, fp32
    whole = dtype.itemsize * numel(model.parameters)
    held, trained_shard, sharded = sharded_bytes(model, ranks, ema, cpu_offload)
    host = {"sharded": sharded, "text encoders": 0}
    modules = [*model.flow.parts.values(), *model.copies]
    held["buffers"] = sum(buffer.nbytes for module in modules for buffer in module.buffers())
    frozen_bytes = {name: dtype.itemsize * numel(tensors) for name, tensors in model.frozen.items()}
    encoder_bytes = frozen_bytes["text encoders"]
    held |= frozen_bytes
    if model.offload_encoders:
        held["text encoders"], host["text encoders"] = 0, encoder_bytes

    row_bytes = {name: t[0].nbytes for name, t in model.cond.items()}
    held["prompt embeddings"] = num_prompts * sum(row_bytes.values())
    cached_bytes = sum(size for name, size in row_bytes.items() if name != "image" and not name.endswith("_null"))
    cached_bytes = 0 if model.unified else cached_bytes
    held["trajectories"] = trajectories

    gathered = gathered_bytes(model, ranks, keep_unsharded)
    # Without a reduction after every tile gradients add up whole, in fp32, on the GPU.
    gradients = master if keep_unsharded else 0 if cpu_offload else trained_shard
    temporaries = 0 if cpu_offload else adamw_bytes(trained, ranks, device_type)
    work = {
        "gradients": gradients,
        "gathered parameters": gathered,
        "prompt encoding": model.encoding + (encoder_bytes if model.offload_encoders else 0),
        f"{phase} forward": model.forward,
        "decoding": model.decoding,
        "activations": activations,
        "optimizer temporaries": temporaries,
    }
    resident = sum(held.values())
    reduced = 0 if cpu_offload else trained_shard
    peaks = {
        "peak: prompt encoding": resident + work["prompt encoding"],
        f"peak: {phase}": resident + gathered + model.forward,
        "peak: decoding": resident + (gathered if keep_unsharded else 0) + work["decoding"],
        "peak: update": resident + gradients + gathered + work["activations"],
        "peak: optimizer step": resident + reduced + work["optimizer temporaries"],
    }
    # Full fine-tuning reads the transformer twice, in dtype with its pipeline and in fp32; a reference is a copy of it.
    masters = trained and not model.lora_rank
    lower = whole if masters and dtype.itemsize < 4 else 0
    copies = 2 if model.with_reference else 1
    reading = (4 * numel(model.parameters) * copies if masters else dtype.itemsize * numel(frozen)) + lower
    loading = reading + held["buffers"] + encoder_bytes + held["autoencoder"]
    if model.unified:
        # models/qwen.py brings the language model whole, in fp32 where all of it is trained, to the GPU;
        # what is read beside it stays in CPU memory until it is sharded, queries and connector twice.
        language = model.flow.parts["lm"]
        itemsize = 4 if all(p.requires_grad for p in language.parameters()) else dtype.itemsize
        fresh = itemsize * (numel(language.parameters()) + numel(model.frozen["vision tower"]))
        if "lm" in (model.flow.reference_parts or {}):  # copied before it is rounded
            fresh = max(fresh, 8 * numel(language.parameters()) + frozen_bytes["vision tower"])
        rest = [p for name, part in model.flow.parts.items() if name != "lm" for p in part.parameters()]
        doubled = [p for name in ("queries", "connector") for p in model.flow.parts[name].parameters()]
        reading = (4 + dtype.itemsize * (copies - 1)) * numel(rest) + 4 * numel(doubled)
        loading = max(fresh, reading + held["autoencoder"])
        lower = 0 if model.lora_rank or dtype.itemsize == 4 else dtype.itemsize * numel(trained)  # what it exports
        if device_type == "cuda":
            peaks = {"peak: loading": fresh} | peaks
    lower = lower if trained else 0
    if device_type == "cpu":
        # Export: full copies in fp32, and in dtype where the whole model is written.
        peaks["peak: export"] = resident + master + lower

    offloaded = sum(host.values())
    host["prompt cache"] = cache_prompts * cached_bytes
    host["loading"] = loading
    host["checkpoint"] = 0 if cpu_offload else trained_shard * (4 if ema else 3)
    host["export"] = master + lower  # rank 0
    host["peak"] = max(host["loading"], offloaded + host["prompt cache"] + max(host["checkpoint"], host["export"]))
    return (
        {"model, unsharded": master + dtype.itemsize * numel(frozen)}
        | held
        | work
        | peaks
        | {"peak": max(peaks.values())}
        | {f"host: {name}": size for name, size in host.items()}
    )


def sharded_bytes(model, ranks, ema, cpu_offload):
    """Of a model with `dtype`, `trained`, `untrained` and `copies` (of the reference): what is sharded, by name, in
    bytes on the GPU; those of a shard of what is trained; and what is in CPU memory instead."""
    trained_shard = shard_bytes(model.trained, 4, ranks)
    reference = [p for module in model.copies for p in module.parameters()]
    held = {
        "trained parameters": trained_shard,
        "frozen parameters": shard_bytes(model.untrained, model.dtype.itemsize, ranks),
        "optimizer state": 2 * trained_shard,
        "averaged weights": trained_shard if ema else 0,
        "reference copy": shard_bytes(reference, model.dtype.itemsize, ranks),
    }
    if cpu_offload:
        return dict.fromkeys(held, 0), trained_shard, sum(held.values()) + trained_shard
    return held, trained_shard, 0


def gathered_bytes(model, ranks, keep_unsharded):
    """What FSDP2 holds beside the shards of a model with `dtype`, `parameters` and `groups`: see `estimate`."""
    if keep_unsharded:
        largest = max(numel(block) for blocks, _ in model.groups for block in blocks)
        return model.dtype.itemsize * (numel(model.parameters) + largest * (0 if ranks == 1 else 2))
    return model.dtype.itemsize * max(
        numel(rest) + max(map(numel, blocks), default=0) * (1 if ranks == 1 else 3) for blocks, rest in model.groups
    )


def adamw_bytes(trained, ranks, device_type):
    """AdamW: the square roots of all second moments at once on a GPU, of one after the other on a CPU."""
    shards = [shard_bytes([p], 4, ranks) for p in trained]
    return sum(shards) if device_type == "cuda" else 2 * max(shards, default=0)


def table(sizes):
    """The text of an estimate: GiB, and beside what is above 5 % of the peak what lowers it."""
    width = max(len(name) for name in sizes)
    lines = [f"{'memory per GPU':{width}}  {'GiB':>9}  lower it with"]
    for name, size in sizes.items():
        if size == 0:
            continue
        large = size > 0.05 * sizes["host: peak" if name.startswith("host: ") else "peak"]
        lines.append(f"{name:{width}}  {size / 2**30:9.3f}  {_flags(name, sizes) if large else ''}".rstrip())
    phase = max((name for name in sizes if name.startswith("peak: ")), key=sizes.get)
    lines.append(f"needed per GPU: {sizes['peak'] / 2**30:.2f} GiB, in its {phase.removeprefix('peak: ')} phase; ")
    lines[-1] += "reward models, the CUDA context and fragmentation come on top"
    if any(name.endswith("token activations") for name in sizes):
        lines[-1] += f", and vLLM's share; prompts count as {PROMPT_TOKENS} tokens, pictures in them as theirs"
    return "\n".join(lines)


def pretraining_table(found):
    """The text of `pretraining`: GiB by the number of GPUs, and what lowers what is above 5 % of a peak."""
    names = [name for name in next(iter(found.values())) if any(sizes[name] for sizes in found.values())]
    width = max(map(len, names))
    head = "".join(f"{f'{count} GPU' if count == 1 else f'{count} GPUs':>11}" for count in found)
    lines = [f"{'GiB per GPU':{width}}{head}  lower it with"]
    for name in names:
        peak = "host: peak" if name.startswith("host: ") else "peak"
        large = any(sizes[name] > 0.05 * sizes[peak] for sizes in found.values())
        row = "".join(f"{sizes[name] / 2**30:11.3f}" for sizes in found.values())
        lines.append(f"{name:{width}}{row}  {_flags(name, found[next(iter(found))]) if large else ''}".rstrip())
    lines.append("the CUDA context and fragmentation come on top; so does a reward model of evaluation")
    return "\n".join(lines)


def _flags(name, sizes):
    flags = FLAGS.get(name.removeprefix("lm: "), "")
    if name.startswith("lm: "):  # of grpo_unified.py
        flags = flags.replace("--kl-coef", "--lm-kl-coef").replace("--micro-batch-size", "--lm-micro-batch-size")
    # A unified model, which has a vision tower, refuses that one.
    return flags.replace("--offload-encoders, ", "") if sizes.get("vision tower") else flags


def numel(parameters):
    return sum(p.numel() for p in parameters)


def encoder_parameters(pipeline):
    """The parameters of all text encoders of a pipeline, a tensor that two layers share once."""
    names = [name for name in pipeline.components if name.startswith("text_encoder")]
    encoders = [getattr(pipeline, name) for name in names if getattr(pipeline, name) is not None]
    return [p for encoder in encoders for p in encoder.parameters()]


def shard_bytes(parameters, itemsize, ranks):
    """Bytes of rank 0's shards, and so of any rank's with FSDP2's padding: ceil(rows / ranks) rows of each."""
    return sum(itemsize * -(-p.shape[0] // ranks) * p.shape[1:].numel() for p in parameters)


# ----------------------------------------------------------------------------------------------------------------------


def _pipeline(source, dtype):
    """The family of a model, and its pipeline with the scheduler and tokenizers of its folder and everything else on
    the meta device, in dtype."""
    import diffusers
    from transformers.utils import logging

    logging.set_verbosity_error()  # see models/pipeline.py
    source = models.folder_or_id(source)
    if source == models.ALIASES["flux"]:
        family, kind, components = "flux", "FluxPipeline", _flux_dev()
    elif source == models.ALIASES["kontext"]:
        family, kind, components = "kontext", "FluxKontextPipeline", _flux_dev()
    else:
        family, folder = models.family(source), source
        if not os.path.isdir(source):
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "tokenizer*/*"]
            folder = models.hub(source, lambda: snapshot_download(source, allow_patterns=patterns))
        kind = models.pipeline_class(folder)
        try:
            components = _components(folder)
        except OSError as error:
            raise RuntimeError(f"'{source}' is incomplete, download or save it again: {error}") from None
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                p.data = p.data.to(dtype)
    return family, getattr(diffusers, kind)(**components)


def _components(folder):
    """What model_index.json names: text encoders, transformer and autoencoder from their configs, on the meta device;
    scheduler and tokenizers as they are; settings of the pipeline itself. Anything else is not used here."""
    import diffusers
    import transformers

    with open(os.path.join(folder, "model_index.json")) as f:
        index = {name: value for name, value in json.load(f).items() if not name.startswith("_")}
    components = {}
    for name, value in index.items():
        if not isinstance(value, list):
            components[name] = value
        elif value[1] is None:  # SD3 without T5
            components[name] = None
        elif name.startswith("tokenizer"):
            components[name] = getattr(transformers, value[1]).from_pretrained(folder, subfolder=name)
        elif name == "scheduler":
            components[name] = getattr(diffusers, value[1]).from_pretrained(folder, subfolder=name)
        elif name.startswith("text_encoder"):
            cls = getattr(transformers, value[1])
            config = cls.config_class.from_pretrained(folder, subfolder=name)
            with torch.device("meta"):
                components[name] = cls(config)
        elif name in ("transformer", "vae"):
            cls = getattr(diffusers, value[1])
            config = cls.load_config(folder, subfolder=name)
            with torch.device("meta"):
                components[name] = cls.from_config(config)
    return components


def _unified_config(source):
    """config.json of a unified model and the folder that it is in; (None, None) for any other model. Of an adapter,
    those of the model it belongs to, as models/blip3o.py reads it."""
    if source in models.FULL_SIZE and not os.path.isdir(source):
        lm, dit = models.FULL_SIZE[source]
        connector = blip3o.VARIANTS[source]["connector"]
        config = dict(model_type=source, lm=lm, sana=dit, num_queries=256, image_tokens=576)
        config |= dict(width=QWEN_VL_3B["text_config"]["hidden_size"], out_width=SANA_1600M["caption_channels"])
        return config | {name: connector[name] for name in ("num_layers", "head_dim")}, ""
    folder = models.folder_or_id(source)
    config = models.unified(folder)
    while config and "base" in config:
        folder = models.folder_or_id(config["base"])
        config = models.unified(folder)
        if config is None:
            raise ValueError(f"'{source}' is an adapter of '{folder}', and that is no folder of a unified model")
    return config, os.path.abspath(folder)


def _unified(config, folder, dtype, lora_rank, with_reference, train_lm, prompt_tokens, train_dm):
    """models/blip3o.py's `load` on the meta device. Prompts are numbers of tokens, so that no tokenizer is needed."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
    from transformers.utils import logging

    logging.set_verbosity_error()  # see models/pipeline.py
    source = blip3o._source(folder, config["lm"], models.LM_ALIASES)
    lm_config = lm_config_of(source)
    if lm_config.model_type != "qwen2_5_vl":
        raise ValueError(f"its language model '{source}' is no Qwen2.5-VL; nothing else is supported")
    if source == models.LM_ALIASES["qwen2.5-vl-3b"]:
        eyes = Qwen2VLImageProcessorPil(**QWEN_VL_EYES)
    else:
        eyes = _read(source, lambda: Qwen2VLImageProcessorPil.from_pretrained(source))
    source = blip3o._source(folder, config["sana"], models.ALIASES)
    if source in (dit for _, dit in models.FULL_SIZE.values()):
        dit_config, vae_config = SANA_1600M, DC_AE_F32C32
    else:
        dit_config = _read(source, lambda: SanaTransformer2DModel.load_config(source, subfolder="transformer"))
        vae_config = _read(source, lambda: AutoencoderDC.load_config(source, subfolder="vae"))
    with torch.device("meta"):
        lm = Qwen2_5_VLForConditionalGeneration(lm_config)
        transformer, vae = SanaTransformer2DModel.from_config(dit_config), AutoencoderDC.from_config(vae_config)
        if blip3o.VARIANTS[config["model_type"]]["reference"]:
            transformer.patch_embed = blip3o.ReferencePatchEmbed(transformer.patch_embed)
        queries, connector = blip3o.new_parts(config)
    qwen._in_dtype(vae, dtype)
    if train_lm and lora_rank:
        qwen._in_dtype(lm, dtype)
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0, encode=lambda text: [0, 0])
    lora = dict(lora_rank=lora_rank, lora_alpha=2 * lora_rank, with_reference=with_reference) if train_lm else {}
    language = qwen.Qwen(lm, tokenizer, "meta", dtype, image_processor=eyes, **lora)
    parts = {"transformer": transformer, "queries": queries, "connector": connector}
    scheduler = FlowMatchEulerDiscreteScheduler()
    rest = (lora_rank, 2 * lora_rank, with_reference, train_dm, train_lm)
    model = blip3o.BLIP3o(config, folder, folder, language, parts, vae, scheduler, "meta", dtype, *rest)

    def tokenize(message, num_pictures):
        return [0] * (prompt_tokens - num_pictures) + [language.image_token] * num_pictures

    def look(prompts, pixels):
        # The tower cuts its windows by the sizes of pictures, which must be numbers.
        def tower(values, grid_thw):
            with _Meeting():
                return language.tower(values, grid_thw=torch.cat([part.image_grid_thw for part in pixels]))

        seer = copy.copy(language)
        seer.tower = tower
        return qwen.Qwen._look(seer, prompts, pixels)

    model.eyes._tokenize, model.eyes._look = tokenize, look
    return model


def lm_config_of(source):
    """The config of a language model by its folder or hub id; those of Qwen2.5 and Qwen2.5-VL-3B are known."""
    from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2Config

    if source == models.LM_ALIASES["qwen2.5-vl-3b"]:
        return Qwen2_5_VLConfig(**QWEN_VL_3B)
    for alias, sizes in QWEN.items():
        if source == models.LM_ALIASES[alias]:
            return Qwen2Config(**dict(zip(QWEN_SIZES, sizes)), max_position_embeddings=32768)
    return _read(source, lambda: AutoConfig.from_pretrained(source))


def _read(source, read):
    """read(), which reads a config of a folder or hub id."""
    try:
        return read() if os.path.isdir(source) else models.hub(source, read)
    except OSError as error:
        raise RuntimeError(f"'{source}' is incomplete, download or save it again: {error}") from None


def _flux_dev():
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        return dict(
            transformer=FluxTransformer2DModel.from_config(flux.FLUX_DEV["transformer"]),
            vae=AutoencoderKL.from_config(FLUX_DEV_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**FLUX_DEV_CLIP)),
            text_encoder_2=T5EncoderModel(T5Config(**FLUX_DEV_T5)),
            tokenizer=_tokenizer(77),
            tokenizer_2=_tokenizer(flux.FLUX_DEV["text_tokens"]),
            scheduler=None,
        )


def _tokenizer(length):
    """What is left of a tokenizer that pads everything to one length, when it has no files."""

    def tokenize(prompts, max_length, **_):
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), max_length, dtype=torch.long))

    tokenize.model_max_length = length
    return tokenize


def _cached(encode_rows, prompts):
    """EmbeddingCache in bytes: encodes 16 prompts at once at most, and its rows are in CPU memory."""
    rows = encode_rows(prompts[:16])
    return {name: torch.empty(len(prompts), *t.shape[1:], dtype=t.dtype) for name, t in rows.items()}


def reduce_per_block(groups, ranks):
    """What FSDP2 does to gradients, in bytes: those of a group wait for one another, are copied to one fp32 buffer and
    freed; the buffer stays until the next group's, the shard that comes out is added to the sum over tiles. Returns the
    handles of the hooks that do it."""
    buffers, hooks = [], []

    def after_backward(p, group):
        if all(p.grad is not None for p in group):
            buffers.clear()
            buffers.append(torch.empty(numel(group), device="meta"))
            for p in group:
                p.grad = None
            torch.empty(-(-numel(group) // ranks), device="meta")

    for group in groups:
        group = [p for p in group if p.requires_grad]
        for p in group:
            hooks.append(p.register_post_accumulate_grad_hook(functools.partial(after_backward, group=group)))
    return hooks


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Stores query, key, value, result and a log-sum-exp per row, as every fused kernel does. On the meta device
    PyTorch's own choice is the one that stores the attention matrix."""
    options = dict(is_causal=is_causal, attn_mask=attn_mask, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, **options)[0]


class Alive(TorchDispatchMode):
    """Inside, `live` is the bytes of all storages on the meta device that exist beside those of `modules`, and `peak`
    their maximum. `answer` is what a question about the values of a tensor gets, of which there are none."""

    def __init__(self, modules, answer=False):
        super().__init__()
        self.answer = answer
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self.known = {t.untyped_storage()._cdata for t in tensors}
        self.live = self.peak = 0

    def __enter__(self):
        self.attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _fused_attention
        return super().__enter__()

    def __exit__(self, *error):
        F.scaled_dot_product_attention = self.attention
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # transformers asks whether a mask is all ones, to do without it. Prompts have padding.
            return self.answer
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, address, size):
        self.known.discard(address)
        self.live -= size


class _Meeting(TorchDispatchMode):
    """Inside, what has values loses them where it meets what has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        return function(*args, **(kwargs or {}))
