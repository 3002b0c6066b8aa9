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
from models import flux, flux2, sana, sd3

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

# What is on the table, and the flags that make it smaller.
FLAGS = {
    "trained parameters": "--lora-rank, more GPUs, --shard-size 0, --cpu-offload",
    "frozen parameters": "--dtype bf16, more GPUs, --shard-size 0, --cpu-offload",
    "optimizer state": "--lora-rank, more GPUs, --shard-size 0, --cpu-offload",
    "averaged weights": "--ema-decay 0, --lora-rank, more GPUs, --cpu-offload",
    "reference copy": "--kl-coef 0, --lora-rank, more GPUs",
    "buffers": "--dtype bf16, --lora-rank",
    "text encoders": "--offload-encoders, --dtype bf16",
    "autoencoder": "--dtype bf16",
    "prompt embeddings": "--num-prompts",
    "trajectories": "--num-prompts, --group-size, --window-size",
    "gradients": "--lora-rank, more GPUs, --cpu-offload, without --keep-unsharded",
    "gathered parameters": "--dtype bf16, without --keep-unsharded",
    "prompt encoding": "--offload-encoders, --dtype bf16, --resolution",
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
    reference_image=False,
    device_type="cuda",
):
    """Bytes on the fullest rank as an ordered dict: what it holds, then "peak: <phase>" and their maximum "peak", then
    what is in CPU memory ("host: ..."). "model, unsharded" is the whole transformer. About 6 s for FLUX.1-dev.

    source: alias, folder or hub id (of which only configs and tokenizers are fetched; FLUX.1-dev and Kontext need
    none). dtype: what the model computes in. tile_rows: rows of a forward and backward. resolution: pixels.
    num_samples, num_prompts: per rank and iteration. num_states: latents kept of each sample, one more than trained
    steps. reference_image: every prompt comes with a picture of this resolution to edit; for a model that only edits
    (Kontext) always. device_type: "cpu" for a run without GPU, where "host" is the same memory; the optimizer's
    temporaries differ.

    FSDP2 cuts dim 0 of every parameter into ceil(rows / ranks), padded: all ranks hold as much. Beside the shards
    it holds the root's parameters and those of one block; of three blocks where there is something to gather (the one
    that computes, the next one's buffer, and the copy between them), or of the whole model with keep_unsharded.
    Unreduced gradients of a block or two are part of "activations". Buffers, such as SD3's table of positions, are
    whole on every rank.

    Raises ValueError for an unknown or unsupported model, a resolution that it cannot make, guidance that it cannot
    have, or a reference_image that it does not take; RuntimeError where configs are missing, or the hub or a licence
    stands in the way.
    """
    family, pipeline = _pipeline(source, dtype)
    model = MODELS[family](pipeline, "meta", dtype, lora_rank, 2 * lora_rank, with_reference)
    model.cache = functools.partial(_cached, model._encode_rows)
    part = model.parts["transformer"]
    known = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
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
    copies = [part, *(model.reference_parts or {}).values()]
    held["buffers"] = sum(buffer.nbytes for module in copies for buffer in module.buffers())
    encoder_bytes = dtype.itemsize * numel(encoder_parameters(pipeline))
    held["text encoders"] = 0 if offload_encoders else encoder_bytes
    host["text encoders"] = encoder_bytes if offload_encoders else 0
    held["autoencoder"] = dtype.itemsize * numel(pipeline.vae.parameters())

    tile = min(tile_rows, num_samples)
    rows = max(num_prompts, tile)  # an evaluation encodes a tile of prompts
    edits = reference_image or model.reference_images == "required"
    with _Alive(known) as encoding:
        cond = model.encode([""] * rows, torch.empty(rows, 3, resolution, resolution) if edits else None)
    row_bytes = {name: t[0].nbytes for name, t in cond.items()}
    held["prompt embeddings"] = num_prompts * sum(row_bytes.values())
    cached_bytes = sum(size for name, size in row_bytes.items() if name != "image" and not name.endswith("_null"))
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

    for p in parameters:
        p.data = p.data.to(dtype)  # FSDP2 gathers all of them, masters too, in the dtype of the computation
    part.train()
    with torch.no_grad(), _Alive(known) as rollout:
        _velocity(model, cond, tile, (h, w), guidance)
    with torch.no_grad(), _Alive(known) as decode:
        model.decode(torch.empty(tile, model.latent_channels, h, w, device="meta"))
    if checkpoint_activations:
        for block in model.blocks(part):
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    inside = {p for block in blocks for p in block}
    with _Alive(known) as update:
        _reduce_per_block([*blocks, [p for p in parameters if p not in inside]], ranks)
        _velocity(model, cond, tile_rows, (h, w), guidance).float().square().mean().backward()

    # AdamW: the square roots of all second moments at once on a GPU, of one after the other on a CPU.
    temporaries = trained_shard if device_type == "cuda" else 2 * max(shard_bytes([p], 4, ranks) for p in trained)
    temporaries = 0 if cpu_offload else temporaries
    work = {
        "gradients": gradients,
        "gathered parameters": gathered,
        "prompt encoding": encoding.peak + (encoder_bytes if offload_encoders else 0),
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
    host["prompt cache"] = cache_prompts * cached_bytes
    host["loading"] = reading + held["buffers"] + encoder_bytes + held["autoencoder"]
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
        if family not in MODELS:
            raise ValueError(f"--dry-run knows no unified models yet, and --model {source} is one")
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


def _velocity(model, cond, rows, size, guidance):
    cond = {name: t.new_empty(rows, *t.shape[1:]) for name, t in cond.items()}
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
    """Inside, `live` is the bytes of all storages on the meta device that exist beside those of `modules`, and `peak`
    their maximum."""

    def __init__(self, modules):
        super().__init__()
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
            return False
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
