"""
What a run needs per GPU whose language model writes: `language` is the `estimate` of models/memory.py for rloo.py,
remax.py and the texts of grpo_unified.py, `together` that of a language and a diffusion model in one run.

As there, only shapes are known: all prompts are as long as one another, and completions as long as they may get, which
is the most that they can need. A picture in a prompt counts as the tokens that it becomes; what the vision tower does
to it is not counted. Log-probs are counted by the PyTorch path of kernels/linear_logp.py; the Triton kernels need about
half as much beside the hidden states.
"""

import functools
import os
from types import SimpleNamespace

import torch

import models
from models import memory, qwen

PICTURE_SIDE = 28  # pixels of a token of Qwen2.5-VL


def language(
    source,
    dtype,
    *,
    tile_rows,
    rollout_rows,
    max_new_tokens,
    prompt_tokens=memory.PROMPT_TOKENS,
    train=True,
    lora_rank=0,
    with_reference=False,
    ema=False,
    world_size=1,
    shard_size=0,
    checkpoint_activations=False,
    keep_unsharded=False,
    cpu_offload=False,
    device_type="cuda",
):
    """Bytes on the fullest rank as an ordered dict, as `memory.estimate` has them: what is held, what a phase needs
    beside it, "peak: <phase>" and their maximum "peak", then CPU memory ("host: ...").

    source: alias, folder or hub id of a language model (of which only the config is read; Qwen2.5 and Qwen2.5-VL-3B
    need none), or of the unified model that it is part of. tile_rows: samples of a forward and backward. rollout_rows:
    completions that are sampled side by side; 0 if something else samples. train: False is a frozen model. Other
    arguments as in `memory.estimate`.

    Raises ValueError for an unknown model, RuntimeError where its config is missing or the hub stands in the way.
    """
    if not train:
        lora_rank, with_reference = 0, False
    model = _Language(source, dtype, lora_rank, with_reference, train)
    ranks = shard_size or world_size
    held, trained_shard, sharded = memory.sharded_bytes(model, ranks, ema and train, cpu_offload)
    master, whole = 4 * memory.numel(model.trained), dtype.itemsize * memory.numel(model.parameters)
    tower = memory.numel(model.tower)
    held["buffers"] = sum(b.nbytes for part in (*model.lm.parts.values(), *model.copies) for b in part.buffers())
    held["vision tower"] = dtype.itemsize * tower
    loading = (4 if train and not lora_rank else dtype.itemsize) * (memory.numel(model.parameters) + tower)
    fresh = loading + (4 * memory.numel(model.parameters) if model.copies else 0)  # copied before it is rounded

    model.in_dtype()
    gathered = memory.gathered_bytes(model, ranks, keep_unsharded)
    work = {
        "gathered for sampling": memory.gathered_bytes(model, ranks, True) if rollout_rows else 0,
        "sampling": model.sampling(rollout_rows, prompt_tokens, max_new_tokens) if rollout_rows else 0,
        "gradients": master if keep_unsharded else 0 if cpu_offload else trained_shard,
        "gathered parameters": gathered if train else 0,
        "token activations": 0,
        "optimizer temporaries": 0 if cpu_offload else memory.adamw_bytes(model.trained, ranks, device_type),
    }
    if train:
        shape = (tile_rows, prompt_tokens, max_new_tokens)
        work["token activations"] = model.update(*shape, ranks, checkpoint_activations)
    resident = sum(held.values())
    peaks = {
        "peak: loading": fresh,
        "peak: sampling": resident + work["gathered for sampling"] + work["sampling"] if rollout_rows else 0,
        "peak: tokens": resident + work["gradients"] + work["gathered parameters"] + work["token activations"],
        "peak: optimizer step": resident + held["trained parameters"] + work["optimizer temporaries"],
    }
    lower = whole if train and not lora_rank and dtype.itemsize < 4 else 0  # the whole model is written in dtype
    if device_type == "cpu":
        peaks["peak: export"] = resident + master + lower
    host = {
        "sharded": sharded,
        "loading": loading,
        "checkpoint": 0 if cpu_offload else trained_shard * (4 if ema else 3),
        "export": master + lower,  # rank 0
    }
    return (
        {"model, unsharded": master + dtype.itemsize * memory.numel(model.untrained)}
        | held
        | work
        | peaks
        | {"peak": max(peaks.values())}
        | {f"host: {name}": size for name, size in (host | {"peak": _host_peak(host)}).items()}
    )


def together(dm, lm, unified=False):
    """`memory.estimate` of the diffusion model and `language` of the language model, of one run: the rows of the latter
    begin with "lm: ". unified: the language model is a part of `dm`, which has its parameters already.

    While one of them works the other is held; the gradients of the tokens wait for those of the steps.
    """
    held = ["trained parameters", "frozen parameters", "optimizer state", "averaged weights", "reference copy"]
    held += ["buffers", "vision tower"]
    held_lm = sum(lm[name] for name in held)
    held_dm = sum(dm[name] for name in [*held, "text encoders", "autoencoder", "prompt embeddings", "trajectories"])
    mine = {name: size for name, size in lm.items() if not name.startswith(("peak", "host: "))}
    peaks = {name: size for name, size in dm.items() if name.startswith("peak: ")}
    of_lm = {name: lm[name] - held_lm + held_dm for name in ("peak: sampling", "peak: tokens")}
    if unified:
        mine = {name: size for name, size in mine.items() if name not in held and name != "model, unsharded"}
        peaks |= of_lm
    else:
        peaks = {name: size + held_lm for name, size in peaks.items()}
        peaks["peak: update"] += lm["trained parameters"]
        temporaries = [sizes["optimizer temporaries"] for sizes in (dm, lm)]  # one side after the other
        peaks["peak: optimizer step"] += lm["trained parameters"] + max(temporaries) - temporaries[0]
        peaks |= {name: size + held_lm for name, size in of_lm.items()}
        # The language model comes whole, after the encoders and the autoencoder of the other.
        peaks["peak: loading"] = lm["peak: loading"] + dm["text encoders"] + dm["autoencoder"]
        if "peak: export" in peaks:
            peaks["peak: export"] += lm["peak: export"] - held_lm
    host = {name: size for name, size in dm.items() if name.startswith("host: ")}
    if not unified:
        for name in ("host: sharded", "host: loading", "host: checkpoint", "host: export"):
            host[name] += lm[name]
        host["host: peak"] = _host_peak({name.removeprefix("host: "): size for name, size in host.items()})
    return (
        {name: size for name, size in dm.items() if not name.startswith(("peak", "host: "))}
        | {f"lm: {name}": size for name, size in mine.items()}
        | peaks
        | {"peak": max(peaks.values())}
        | host
    )


def _host_peak(host):
    held = sum(host.get(name, 0) for name in ("sharded", "text encoders", "prompt cache"))
    return max(host["loading"], held + max(host["checkpoint"], host["export"]))


class _Language:
    """A language model on the meta device, with what `memory` wants to know of its parameters."""

    def __init__(self, source, dtype, lora_rank, with_reference, train):
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils import logging

        logging.set_verbosity_error()  # see models/pipeline.py
        self.dtype = dtype
        if source in models.FULL_SIZE and not os.path.isdir(source):
            source = models.FULL_SIZE[source][0]
        config = memory.lm_config_of(models.lm_source(source))
        eyes = SimpleNamespace() if config.model_type in qwen.VISION else None
        auto_class = AutoModelForImageTextToText if eyes else AutoModelForCausalLM
        with torch.device("meta"):
            lm = auto_class.from_config(config, dtype=torch.float32 if train and not lora_rank else dtype)
        tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
        training = dict(lora_rank=lora_rank, lora_alpha=2 * lora_rank, with_reference=with_reference, train=train)
        self.lm = qwen.Qwen(lm, tokenizer, "meta", dtype, source, image_processor=eyes, **training)
        part = self.lm.parts["lm"]
        self.tower = list(self.lm.tower.parameters()) if eyes else []
        self.copies = list((self.lm.reference_parts or {}).values())
        self.parameters = list(part.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.untrained = [p for p in self.parameters if not p.requires_grad]
        blocks = [list(block.parameters()) for block in self.lm.blocks(part)]
        inside = {p for block in blocks for p in block}
        self.groups = [(blocks, [p for p in self.parameters if p not in inside])]

    def in_dtype(self):
        """What FSDP2 gathers, masters too, is in the dtype of the computation."""
        for p in self.parameters:
            p.data = p.data.to(self.dtype)

    def sampling(self, rows, prompt_tokens, max_new_tokens):
        """Bytes alive while `rows` completions are sampled; a few tokens of them, with the cache of all."""
        with self._alive() as alive:
            self.lm.generate([[0] * prompt_tokens] * rows, max_new_tokens, 1.0, torch.empty(rows, dtype=torch.int64))
        return alive.peak

    def update(self, rows, prompt_tokens, max_new_tokens, ranks, checkpoint_activations):
        """The most bytes alive in a forward and backward of `rows` samples."""
        part = self.lm.parts["lm"].train()
        for block in self.lm.blocks(part) if checkpoint_activations else ():
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
        ids = torch.empty(rows, max_new_tokens, dtype=torch.int64, device="meta")
        with self._alive(rows * max_new_tokens) as alive:
            hooks = memory.reduce_per_block([*self.groups[0][0], self.groups[0][1]], ranks)
            logp, entropy = self.lm.logps([[0] * prompt_tokens] * rows, ids, ids, 1.0, return_entropy=True)
            logp.sum().backward()
        for hook in hooks:
            hook.remove()
        return alive.peak

    def _alive(self, num_targets=0):
        return _Texts([*self.lm.parts.values(), *self.copies], num_targets)


class _Texts(memory.Alive):
    """Inside, every question about the values of a tensor is answered with yes: masks are all ones, all texts have
    ended (their cache is there whole from the first token on), and `num_targets` tokens count."""

    def __init__(self, modules, num_targets):
        super().__init__(modules, answer=True)
        self.num_targets = num_targets

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.nonzero.default and args[0].is_meta:
            function, args = torch.ops.aten.new_empty.default, (args[0], (self.num_targets, 1))
            kwargs = dict(dtype=torch.int64)
        return super().__torch_dispatch__(function, types, args, kwargs)
