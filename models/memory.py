"""
What a run needs per GPU, found without weights: the model is built on the meta device, which knows shapes and no
values, and one prompt encoding, rollout forward, decoding and training step run there while the bytes alive are
counted.

Parameters, shards, gradients and optimizer state are exact. Activations are those of PyTorch's operators with an
attention that stores no attention matrix (flash, memory-efficient); the scratch space inside a kernel is not seen. What
FSDP2 holds beside the shards is a count of blocks (see `estimate`). Not counted: reward models, the CUDA context
(about 0.5 GiB), NCCL's buffers, fragmentation.
"""

import functools
import json
import os
import weakref
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from models import flux

# The configs of FLUX.1-dev beside its transformer, because the licence stands before its files. tests/test_memory.py
# holds their parameter counts to flux.FLUX_DEV's.
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

# What is on the table, and the flags that make it smaller.
FLAGS = {
    "trained parameters": "--lora-rank, more GPUs, --shard-size 0, --cpu-offload",
    "frozen parameters": "--dtype bf16, more GPUs, --shard-size 0, --cpu-offload",
    "optimizer state": "--lora-rank, more GPUs, --shard-size 0, --cpu-offload",
    "averaged weights": "--ema-decay 0, --lora-rank, more GPUs, --cpu-offload",
    "reference copy": "--kl-coef 0, --lora-rank, more GPUs",
    "text encoders": "--offload-encoders, --dtype bf16",
    "autoencoder": "--dtype bf16",
    "prompt embeddings": "--num-prompts",
    "trajectories": "--num-prompts, --group-size, --window-size",
    "gradients": "--lora-rank, more GPUs, --cpu-offload, without --keep-unsharded",
    "gathered parameters": "--dtype bf16, without --keep-unsharded",
    "prompt encoding": "--offload-encoders, --dtype bf16",
    "rollout forward": "--micro-batch-size, --resolution",
    "decoding": "--micro-batch-size, --resolution",
    "activations": "--checkpoint-activations, --micro-batch-size, --resolution",
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
    lora_rank=0,
    with_reference=False,
    ema=False,
    world_size=1,
    shard_size=0,
    checkpoint_activations=False,
    keep_unsharded=False,
    cpu_offload=False,
    offload_encoders=False,
    cache_prompts=512,
    device_type="cuda",
):
    """Bytes on the fullest rank as an ordered dict: what it holds, then "peak: <phase>" and their maximum "peak", then
    what is in CPU memory ("host: ..."). "model, unsharded" is the whole transformer. About 6 s for FLUX.1-dev.

    source: alias, folder or hub id (of which only the configs are fetched; FLUX.1-dev needs none). dtype: what the
    model computes in. tile_rows: rows of a forward and backward. resolution: pixels. num_samples, num_prompts: per rank
    and iteration. num_states: latents kept of each sample, one more than trained steps. device_type: "cpu" for a run
    without GPU, where "host" is the same memory; the optimizer's temporaries differ.

    FSDP2 cuts dim 0 of every parameter into ceil(rows / ranks), padded: all ranks hold as much. Beside the shards
    it holds the root's parameters and those of one block; of three blocks where there is something to gather (the one
    that computes, the next one's buffer, and the copy between them), or of the whole model with keep_unsharded.
    Unreduced gradients of a block or two are part of "activations".

    Raises ValueError for an unknown or unsupported model, or a resolution that it cannot make.
    """
    pipeline = _pipeline(source, dtype)
    model = flux.Flux(pipeline, "meta", dtype, lora_rank, 2 * lora_rank, with_reference)
    part = model.parts["transformer"]
    h, w = model.latent_size(resolution, resolution)
    latent = 4 * model.latent_channels * h * w
    ranks = shard_size or world_size
    parameters = list(part.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    trained_shard, frozen_shard = shard_bytes(trained, 4, ranks), shard_bytes(frozen, dtype.itemsize, ranks)
    master = 4 * numel(trained)  # whole, fp32
    whole = dtype.itemsize * numel(parameters)

    held = {
        "trained parameters": trained_shard,
        "frozen parameters": frozen_shard,
        "optimizer state": 2 * trained_shard,
        "averaged weights": trained_shard if ema else 0,
        "reference copy": shard_bytes(parameters, dtype.itemsize, ranks) if model.reference_parts else 0,
    }
    host = {"sharded": 0, "text encoders": 0}
    if cpu_offload:
        host["sharded"] = sum(held.values()) + trained_shard
        held = dict.fromkeys(held, 0)
    encoders = [*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters()]
    encoder_bytes = dtype.itemsize * numel(encoders)
    held["text encoders"] = 0 if offload_encoders else encoder_bytes
    host["text encoders"] = encoder_bytes if offload_encoders else 0
    held["autoencoder"] = dtype.itemsize * numel(pipeline.vae.parameters())

    with torch.no_grad():
        row = model._encode_rows([""])
        with _Alive(model) as encode:
            model._encode_rows([""] * min(16, num_prompts))  # EmbeddingCache encodes 16 prompts at once
    row_bytes = sum(t.nbytes for t in row.values())
    held["prompt embeddings"] = num_prompts * row_bytes * (1 if model.embedded_guidance else 2)
    # The tiles' states and their concatenation are both alive until the next rollout.
    held["trajectories"] = 2 * num_samples * num_states * latent

    blocks = [list(block.parameters()) for block in model.blocks(part)]
    largest = max(numel(block) for block in blocks)
    root = numel(parameters) - sum(numel(block) for block in blocks)
    gathered = dtype.itemsize * (root + largest * (1 if ranks == 1 else 3))
    if keep_unsharded:
        gathered = whole + dtype.itemsize * largest * (0 if ranks == 1 else 2)
    # Without a reduction after every tile gradients add up whole, in fp32, on the GPU.
    gradients = master if keep_unsharded else 0 if cpu_offload else trained_shard

    tile = min(tile_rows, num_samples)
    for p in parameters:
        p.data = p.data.to(dtype)  # FSDP2 gathers all of them, masters too, in the dtype of the computation
    part.train()
    with torch.no_grad(), _Alive(model) as rollout:
        _velocity(model, row, tile, (h, w), guidance)
    with torch.no_grad(), _Alive(model) as decode:
        model.decode(torch.empty(tile, model.latent_channels, h, w, device="meta"))
    if checkpoint_activations:
        for block in model.blocks(part):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    inside = {p for block in blocks for p in block}
    with _Alive(model) as update:
        _reduce_per_block([*blocks, [p for p in parameters if p not in inside]], ranks)
        _velocity(model, row, tile_rows, (h, w), guidance).float().square().mean().backward()

    # AdamW: the square roots of all second moments at once on a GPU, of one after the other on a CPU.
    temporaries = trained_shard if device_type == "cuda" else 2 * max(shard_bytes([p], 4, ranks) for p in trained)
    temporaries = 0 if cpu_offload else temporaries
    work = {
        "gradients": gradients,
        "gathered parameters": gathered,
        "prompt encoding": encode.peak + (encoder_bytes if offload_encoders else 0),
        "rollout forward": rollout.peak,
        "decoding": decode.peak,
        "activations": update.peak,
        "optimizer temporaries": temporaries,
    }
    resident = sum(held.values())
    reduced = 0 if cpu_offload else trained_shard
    peaks = {
        "peak: prompt encoding": resident + work["prompt encoding"],
        "peak: rollout": resident + gathered + work["rollout forward"],
        "peak: decoding": resident + (gathered if keep_unsharded else 0) + work["decoding"],
        "peak: update": resident + gradients + gathered + work["activations"],
        "peak: optimizer step": resident + reduced + work["optimizer temporaries"],
    }
    if device_type == "cpu":
        # Export: full copies in fp32, and in dtype where the whole model is written.
        peaks["peak: export"] = resident + master + (0 if lora_rank or dtype.itemsize == 4 else whole)

    # Full fine-tuning reads the transformer twice, in dtype with its pipeline and in fp32; a reference is a copy of it.
    lower = 0 if lora_rank or dtype.itemsize == 4 else whole
    reading = (dtype.itemsize * numel(frozen) if lora_rank else master * (2 if with_reference else 1)) + lower
    offloaded = sum(host.values())
    host["prompt cache"] = cache_prompts * row_bytes
    host["loading"] = reading + encoder_bytes + held["autoencoder"]
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


def table(sizes):
    """The text of an estimate: GiB, and beside what is above 5 % of the peak what lowers it."""
    width = max(len(name) for name in sizes)
    lines = [f"{'memory per GPU':{width}}  {'GiB':>9}  lower it with"]
    for name, size in sizes.items():
        if size == 0:
            continue
        large = size > 0.05 * sizes["host: peak" if name.startswith("host: ") else "peak"]
        flags = FLAGS.get(name, "") if large else ""
        lines.append(f"{name:{width}}  {size / 2**30:9.3f}  {flags}".rstrip())
    phase = max((name for name in sizes if name.startswith("peak: ")), key=sizes.get)
    lines.append(f"needed per GPU: {sizes['peak'] / 2**30:.2f} GiB, in its {phase.removeprefix('peak: ')} phase; ")
    lines[-1] += "reward models, the CUDA context and fragmentation come on top"
    return "\n".join(lines)


def numel(parameters):
    return sum(p.numel() for p in parameters)


def shard_bytes(parameters, itemsize, ranks):
    """Bytes of rank 0's shards, and so of any rank's with FSDP2's padding: ceil(rows / ranks) rows of each."""
    return sum(itemsize * -(-p.shape[0] // ranks) * p.shape[1:].numel() for p in parameters)


# ----------------------------------------------------------------------------------------------------------------------


def _pipeline(source, dtype):
    """A FluxPipeline's parts on the meta device, in dtype, with tokenizers that know lengths only."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    source = models.ALIASES.get(source, source)
    if source == models.ALIASES["flux"]:
        transformer, vae = flux.FLUX_DEV["transformer"], FLUX_DEV_VAE
        clip, t5 = CLIPTextConfig(**FLUX_DEV_CLIP), T5Config(**FLUX_DEV_T5)
        clip_tokens, t5_tokens = 77, flux.FLUX_DEV["text_tokens"]
    else:
        kind = models.pipeline_class(source)
        if kind != "FluxPipeline":
            raise ValueError(f"{source}: pipeline class {kind} is not supported; supported: FluxPipeline")
        if not os.path.isdir(source):
            from huggingface_hub import snapshot_download

            hub_id = source
            source = models.hub(hub_id, lambda: snapshot_download(hub_id, allow_patterns=["*.json"]))
        transformer = FluxTransformer2DModel.load_config(source, subfolder="transformer")
        vae = AutoencoderKL.load_config(source, subfolder="vae")
        clip = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
        t5 = T5Config.from_pretrained(source, subfolder="text_encoder_2")
        clip_tokens, t5_tokens = (_max_length(source, name) for name in ("tokenizer", "tokenizer_2"))
    with torch.device("meta"):
        parts = dict(
            transformer=FluxTransformer2DModel.from_config(transformer),
            vae=AutoencoderKL.from_config(vae),
            text_encoder=CLIPTextModel(clip),
            text_encoder_2=T5EncoderModel(t5),
        )
    for part in parts.values():
        for p in part.parameters():
            p.data = p.data.to(dtype)
    return SimpleNamespace(
        **parts, tokenizer=_tokenizer(clip_tokens), tokenizer_2=_tokenizer(t5_tokens), scheduler=None
    )


def _max_length(folder, name):
    with open(os.path.join(folder, name, "tokenizer_config.json")) as f:
        return json.load(f)["model_max_length"]


def _tokenizer(length):
    def tokenize(prompts, max_length, **_):
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), max_length, dtype=torch.long, device="meta"))

    tokenize.model_max_length = length
    return tokenize


def _velocity(model, row, rows, size, guidance):
    cond = {name: t.new_empty(rows, *t.shape[1:]) for name, t in row.items()}
    cond |= {f"{name}_null": t for name, t in cond.items()}
    x = torch.empty(rows, model.latent_channels, *size, device="meta")
    return model.velocity(x, torch.empty(rows, device="meta"), cond, (guidance, 1.0))


def _reduce_per_block(groups, ranks):
    """What FSDP2 does to gradients, in bytes: those of a group wait for one another, are copied to one fp32 buffer and
    freed; the buffer stays until the next group's, the shard that comes out is added to the sum over tiles."""
    buffers = []

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
            p.register_post_accumulate_grad_hook(functools.partial(after_backward, group=group))


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Stores query, key, value, result and a log-sum-exp per row, as every fused kernel does. On the meta device
    PyTorch's own choice is the one that stores the attention matrix."""
    options = dict(is_causal=is_causal, attn_mask=attn_mask, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, **options)[0]


class _Alive(TorchDispatchMode):
    """Inside, `live` is the bytes of all storages that exist beside the model's own, and `peak` their maximum."""

    def __init__(self, model):
        super().__init__()
        modules = (*model.parts.values(), model.text_encoder, model.text_encoder_2, model.vae)
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
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
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
