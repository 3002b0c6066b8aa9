"""
Plain torch.distributed for the scripts: one process per device, FSDP2 per block, and what must agree between ranks.

A single process is world size 1 of the same code. Every function that communicates says so; all ranks must call it, in
the same order.
"""

import functools
import os
import signal
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass
class World:
    rank: int
    size: int
    device: torch.device
    mesh: object
    """1-D (shard) or, with HSDP, 2-D (replicate, shard)"""


def init(shard_size=0):
    """Set up the process group, the device and CPU threads; communicates.

    shard_size: 0 shards over all ranks; n shards over groups of n ranks (a node) and replicates across groups (HSDP).
    Threads per rank are cores / local ranks unless the user set OMP_NUM_THREADS. Raises ValueError if shard_size does
    not divide the number of ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if shard_size and size % shard_size:
        raise ValueError(f"--shard-size {shard_size} does not divide the {size} ranks")
    if not _user_set_threads(local_size):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_size))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if shard_size in (0, size):
        mesh = init_device_mesh(device.type, (size,))
    else:
        mesh = init_device_mesh(device.type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
    return World(rank, size, device, mesh)


def _user_set_threads(local_size):
    """torchrun sets OMP_NUM_THREADS=1 in its children if the user did not: then the launcher's own environment lacks
    it."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if local_size == 1 or os.environ["OMP_NUM_THREADS"] != "1":
        return True
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as f:
            return b"\0OMP_NUM_THREADS=" in b"\0" + f.read()
    except OSError:
        return False


def shard(part, blocks, world, dtype, cpu_offload=False, checkpoint_activations=False, compile_blocks=False):
    """Shard one module in place: its `blocks` one by one, then the rest. Order: checkpoint, compile, fully_shard;
    communicates.

    dtype: what the forward and backward compute in; parameters keep their own dtype (fp32 masters for what is trained),
    gradients are reduced in fp32. cpu_offload: parameters, gradients and the optimizer live in CPU memory.
    """
    # It is about in-place operations on what a block returned; no model here has one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        if checkpoint_activations:
            # Around forward, inside FSDP's hooks: parameters are gathered once for the recomputation and its backward.
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
        if compile_blocks:
            block.compile()
    policy = dict(
        mesh=world.mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if cpu_offload else OffloadPolicy(),
    )
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, **policy)
    fully_shard(part, reshard_after_forward=True, **policy)
    return part


def fsdp_modules(parts):
    return [m for part in parts.values() for m in part.modules() if isinstance(m, FSDPModule)]


@contextmanager
def unsharded(parts, keep=True):
    """Inside, parameters are gathered on first use and stay gathered: no communication per denoising step, for the
    memory of one unsharded copy in the compute dtype. keep=False gathers block by block as in training. On exit
    everything is sharded again."""
    modules = fsdp_modules(parts)
    for m in modules:
        m.set_reshard_after_forward(not keep)
    try:
        yield
    finally:
        for m in modules:
            m.reshard()
            m.set_reshard_after_forward(True)


@contextmanager
def without_hooks(parts):
    """Inside, forward passes skip FSDP's hooks, which have nothing to do where parameters are gathered and cost some
    0.1 ms of Python a block. Only inside of `unsharded`, after a first forward pass, and without gradients."""
    held = []
    for m in fsdp_modules(parts):
        for hooks in (m._forward_pre_hooks, m._forward_hooks):
            held.append((hooks, list(hooks.items())))
            for key, hook in held[-1][1]:
                if hook.__module__.startswith("torch.distributed.fsdp"):
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, items in held:
            hooks.clear()
            hooks.update(items)


def accumulate(parts, last, defer):
    """Call before each tile's forward. With defer, gradients are reduced and parameters resharded only after the last
    tile (one collective per update, for the memory of unsharded parameters and gradients); without, after every
    tile."""
    for m in fsdp_modules(parts):
        m.set_requires_gradient_sync(last or not defer)
        m.set_reshard_after_backward(last or not defer)
        m.set_reshard_after_forward(not defer)


@contextmanager
def reference(model):
    """Inside, `model.velocity` is the reference policy: the adapter switched off, or the frozen copy under full
    fine-tuning."""
    if model.reference_parts is None:
        for part in model.parts.values():
            part.disable_adapters()
        try:
            yield
        finally:
            for part in model.parts.values():
                part.enable_adapters()
    else:
        trained, model.parts = model.parts, model.reference_parts
        try:
            yield
        finally:
            model.parts = trained


def trained(parts):
    """dict name -> parameter of everything that is trained, in a fixed order; names are "<part>.<parameter>"."""
    return {f"{key}.{name}": p for key, part in parts.items() for name, p in part.named_parameters() if p.requires_grad}


def local(tensor):
    """This rank's shard of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_grad_norm(parameters, max_norm):
    """Clip the global gradient norm over all ranks and parameters; returns the norm before clipping, as a float.
    Communicates."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


class EMA:
    """Exponential moving average of trained parameters, sharded as they are."""

    def __init__(self, parameters):
        self.parameters = list(parameters.values())
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, decay):
        """shadow = decay * shadow + (1 - decay) * parameter."""
        shadows, values = [local(s) for s in self.shadow.values()], [local(p.detach()) for p in self.parameters]
        torch._foreach_lerp_(shadows, values, 1 - decay)

    @contextmanager
    def applied(self):
        """Inside, the model holds the averaged parameters. Enter and leave while parameters are sharded."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for shadow, parameter in zip(self.shadow.values(), self.parameters):
            a, b = local(shadow), local(parameter.detach())
            held = a.clone()
            a.copy_(b)
            b.copy_(held)


def all_gather(tensor):
    """Concatenate a CPU tensor of the same shape from every rank along dim 0, in rank order. Communicates."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def same_text(text):
    """Rank 0's text on every rank, at most 4096 bytes: names made from a clock differ between ranks. Communicates."""
    data = torch.zeros(4096, dtype=torch.uint8)
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
    data[: len(encoded)] = encoded
    dist.broadcast(data, 0)
    return bytes(data.tolist()).rstrip(b"\0").decode()


def gather_text(text):
    """Every rank's text, in rank order, on every rank. Communicates."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = all_gather(torch.tensor([len(encoded)])).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(encoded)] = encoded
    rows = all_gather(padded).view(len(sizes), -1)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes)]


def agree(flag):
    """True on every rank if it is true on any. Communicates."""
    vote = torch.tensor([int(flag)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


class StopSignal:
    """Catches Ctrl-C and SIGTERM so that a run can stop at a safe place; `number` is the signal received, 0 for none. A
    second Ctrl-C stops at once."""

    def __init__(self):
        self.number = 0
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number, frame):
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """All ranks have agreed to stop because one of them was told to."""


def exit_stopped(stop, run, master):
    """Leave with the exit code of the signal: 130 for Ctrl-C, 143 for SIGTERM."""
    if master:
        print(f"stopped; continue with --resume {run}")
    raise SystemExit(128 + (stop.number or signal.SIGTERM))


@contextmanager
def clear_errors():
    """Turn an error in the user's input into one message and exit code 1 instead of a traceback: wrap what reads flags,
    files and hub ids, and nothing else."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as e:
        if _out_of_memory(e):
            raise
        raise SystemExit(f"error: {e}") from None


@contextmanager
def clear_memory_errors():
    """Turn memory that runs out, on the device or the CPU, into one message that names what needs less: around `main`.

    What the operating system kills (SIGKILL, "Killed") cannot be caught.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not _out_of_memory(e):
            raise
        raise SystemExit(
            f"error: rank {os.environ.get('RANK', 0)} is out of memory: {str(e).splitlines()[0]}\nLower "
            "--micro-batch-size or --resolution; or try --checkpoint-activations, --lora-rank 64 instead of 0, "
            "--offload-encoders, --cpu-offload."
        ) from None


def _out_of_memory(error):
    # torch's CPU allocator and the CUDA libraries raise a plain RuntimeError: only the text says what it was.
    texts = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "ALLOC_FAILED",
        "bad allocation",
        "bad_alloc",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)
