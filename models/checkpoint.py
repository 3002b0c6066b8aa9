"""
Checkpoints that resume at any number of GPUs: safetensors and JSON, no pickle, complete or absent.

    <run>/checkpoints/000100/rank-00000.safetensors    the rows that rank 0 holds, and everything replicated
                             rank-00001.safetensors    the rows that rank 1 holds
                             index.json                format, world size; per tensor shape, dtype, files and rows
                             state.json                what the script wants back: iteration, arguments, ...

Tensors are plain (equal on all ranks) or DTensors as FSDP2 makes them: Shard(0) on a 1-D mesh, (Replicate, Shard(0)) on
an HSDP mesh. Any of the two can be loaded into any other. Ranks talk through tiny CPU tensors, so the process group, if
there is one, needs a CPU backend: init_process_group("cpu:gloo,cuda:nccl"). All nodes must see the same folder.

Everything is written to .tmp-000100, which then takes its name in one rename: a process killed at any moment leaves the
checkpoint whole or not there. A checkpoint that gives way to a new one of the same number is called .old-000100
meanwhile. Only .tmp-* can be half; the next save removes it.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard

FORMAT = 1


@torch.no_grad()
def save(folder, tensors, state, keep_last=0):
    """Write a checkpoint; every rank calls it with the same names, and it returns when the checkpoint is on disk.

    folder: <run>/checkpoints/<iteration>; one that exists is replaced. tensors: name -> Tensor or DTensor, of any shape
    and dtype. state: JSON-able, rank 0's is written. keep_last: how many checkpoints to keep, this one and the ones
    before it (0 = all). Host memory: this rank's shards, once.

    Raises OSError where the disk is too small or a write fails, TypeError where state is not JSON-able, ValueError
    where the ranks do not hold the same names, and RuntimeError on the ranks that were well while another failed.
    Earlier checkpoints stay as they were.
    """
    folder = Path(folder)
    rank, parent = _rank(), folder.parent
    temporary, old = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".old-{folder.name}")
    index = {"format": FORMAT, "world_size": dist.get_world_size() if dist.is_initialized() else 1, "tensors": {}}
    try:
        with _together(folder):
            iteration(folder)
            for name, tensor in tensors.items():
                shards = [[_file(writer), first, rows] for writer, first, rows in _shards(tensor)[0] if rows]
                index["tensors"][name] = {"shape": list(tensor.shape), "dtype": _dtype(tensor), "shards": shards}
            if rank == 0:
                parent.mkdir(parents=True, exist_ok=True)
                _tidy(parent)
                needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                free = shutil.disk_usage(parent).free
                if free < needed:
                    raise OSError(f"{folder}: the checkpoint needs {needed} bytes, the disk has {free} free")
                temporary.mkdir()

        with _together(folder):
            mine, storages = {}, set()
            for name, tensor in tensors.items():
                shards, position = _shards(tensor)
                writer, _, rows = shards[position]
                if writer == rank and rows:
                    mine[name] = _local(tensor).contiguous().cpu()
                    storage = mine[name].untyped_storage().data_ptr()
                    if storage in storages:  # tied weights: safetensors refuses one memory under two names
                        mine[name] = mine[name].clone()
                    storages.add(storage)
            if mine:
                try:
                    save_file(mine, temporary / _file(rank))
                except SafetensorError as error:
                    raise OSError(f"{folder}: cannot write {_file(rank)} ({error}); earlier ones are kept") from error
                _fsync(temporary / _file(rank))
            if rank == 0:
                for file, content in (("index.json", index), ("state.json", state)):
                    (temporary / file).write_text(json.dumps(content))
                    _fsync(temporary / file)
            _fsync(temporary)

        with _together(folder):
            if rank == 0:
                # Reads headers only. Finds ranks that disagree on the names, and nodes that do not share the disk.
                opened = {}
                for name, entry in index["tensors"].items():
                    for file, _, rows in entry["shards"]:
                        _slice(opened, temporary / file, name, [rows, *entry["shape"][1:]], entry["dtype"])
                if folder.exists():
                    os.replace(folder, old)
                os.replace(temporary, folder)
                _fsync(parent)
    except Exception:
        if rank == 0 and temporary.exists():  # nobody writes there any more: all ranks have left the failed block
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    with _together(folder):
        if rank == 0:
            _tidy(parent)
            if keep_last:
                earlier = sorted(n for n in _complete(parent) if n < iteration(folder))
                for n in earlier[: max(0, len(earlier) - keep_last + 1)]:
                    _remove(_complete(parent)[n])


@torch.no_grad()
def load(folder, tensors):
    """Fill tensors in place from a checkpoint of any world size and return its state; every rank calls it.

    tensors: name -> Tensor or DTensor, exactly the names, shapes and dtypes that were saved. Each rank reads no more
    than its own rows. FSDP2 modules must be in their sharded state: before the first forward, or after reshard().

    Raises ValueError (missing or unexpected name, other shape or dtype, damaged file, unknown format) before any tensor
    is touched, and RuntimeError on the ranks that were well while another failed.
    """
    folder, copies, opened = Path(folder), [], {}
    with _together(folder):
        try:
            index, state = (json.loads((folder / file).read_text()) for file in ("index.json", "state.json"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: not a complete checkpoint ({error})") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ValueError(f"{folder}: index.json is not of checkpoint format {FORMAT}, the one this code reads")
        saved = index["tensors"]
        if saved.keys() != tensors.keys():
            missing, unexpected = sorted(tensors.keys() - saved.keys()), sorted(saved.keys() - tensors.keys())
            raise ValueError(
                f"{folder}: {len(missing)} tensors are not in the checkpoint {missing[:3]}, "
                f"{len(unexpected)} of the checkpoint are not in the model {unexpected[:3]}"
            )
        for name, tensor in tensors.items():
            entry, local = saved[name], _local(tensor)
            shards, position = _shards(tensor)
            _, first, rows = shards[position]
            if (entry["shape"], entry["dtype"]) != (list(tensor.shape), _dtype(tensor)):
                there, here = f"{entry['dtype']} {entry['shape']}", f"{_dtype(tensor)} {list(tensor.shape)}"
                raise ValueError(f"{folder}: tensor {name!r} is {there} in the checkpoint, {here} in the model")
            filled = 0
            for file, file_first, file_rows in entry["shards"]:
                start, stop = max(first, file_first), min(first + rows, file_first + file_rows)
                if start < stop:
                    source = _slice(opened, folder / file, name, [file_rows, *entry["shape"][1:]], entry["dtype"])
                    copies.append((local[start - first : stop - first], source, start - file_first, stop - file_first))
                    filled += stop - start
            if filled != rows:
                raise ValueError(f"{folder}: tensor {name!r} has {filled} of the {rows} rows from {first}")
    with _together(folder):
        for target, source, start, stop in copies:
            target.copy_(source[start:stop])
    return state


def latest(run):
    """The newest complete checkpoint folder under <run>/checkpoints, or None."""
    complete = _complete(Path(run) / "checkpoints")
    return complete[max(complete)] if complete else None


def iteration(folder):
    """The iteration that a checkpoint folder is named after: 100 for .../000100. ValueError for any other name."""
    number = Path(folder).name.removeprefix(".old-")
    if not number.isdecimal():
        raise ValueError(f"{folder}: a checkpoint folder is named after its iteration, like 000100")
    return int(number)


@torch.no_grad()
def full_tensors(tensors, dtype=None):
    """Copies on the CPU of rank 0, {} on the others; every rank calls it, with the same names in the same order.

    Gathers one tensor at a time, so no device ever holds more than one whole. dtype: for floating point tensors.
    """
    full = {}
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)  # before the gather: fewer bytes to send
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if _rank() == 0:
            full[name] = tensor.detach().to("cpu", copy=True)
    return full


def optimizer_tensors(optimizer, names):
    """The state of an Adam or AdamW as name -> tensor, for save and, in place, for load.

    names: parameter -> name. Keys: optimizer/<name>/step, /exp_avg, /exp_avg_sq (and /max_exp_avg_sq with amsgrad). A
    parameter that was never updated gets the zeros that its first update would start from, so a fresh optimizer has the
    same keys as a used one.
    """
    tensors = {}
    for group in optimizer.param_groups:
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        for param in group["params"]:
            if param not in names:
                raise ValueError(
                    f"an optimizer parameter of shape {list(param.shape)} has no name; is its module sharded?"
                )
            state = optimizer.state[param]
            if not state:
                # On the CPU unless fused or capturable, as torch.optim.Adam does: reading it must not wait for the GPU.
                device = param.device if group["fused"] or group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for moment in moments:
                    state[moment] = torch.zeros_like(param, memory_format=torch.preserve_format)
            for key in ("step", *moments):
                tensors[f"optimizer/{names[param]}/{key}"] = state[key]
    return tensors


# ----------------------------------------------------------------------------------------------------------------------


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _file(rank):
    return f"rank-{rank:05d}.safetensors"


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _together(folder):
    """A block that ends for all ranks at once, and fails on all of them if it fails on one: nobody is left waiting."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = torch.tensor(0 if error is None else _rank() + 1)
    if dist.is_initialized():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{folder}: rank {int(failed) - 1} failed; its own message says why")


def _shards(tensor):
    """[(rank that writes, first row, rows)] in order of rows, the same on all ranks, and this rank's place in the list.

    FSDP2 cuts rows as torch.chunk does: ceil(rows / n) each until they run out, so the last ranks may get none. Of
    replicas the first one writes. A 0-d tensor counts as one row.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return [(0, 0, rows)], 0
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(tensor.placements[dim] != Shard(0) for dim in sharded):
        raise ValueError(
            f"cannot save or load a DTensor placed {tensor.placements}; only one Shard(0) beside Replicate"
        )
    mesh = tensor.device_mesh
    ranks = mesh.mesh[tuple(slice(None) if dim in sharded else 0 for dim in range(mesh.ndim))].reshape(-1).tolist()
    chunk = -(-rows // len(ranks))
    firsts = [min(i * chunk, rows) for i in range(len(ranks) + 1)]
    shards = [(rank, first, end - first) for rank, first, end in zip(ranks, firsts, firsts[1:])]
    return shards, mesh.get_local_rank(sharded[0]) if sharded else 0


def _local(tensor):
    """This rank's rows, sharing the tensor's memory; 0-d as one row."""
    local = tensor.detach()
    if isinstance(tensor, DTensor):
        local = local.to_local()
    return local if local.ndim else local.view(1)


def _slice(opened, path, name, shape, dtype):
    """A lazy view of one tensor in a file, checked to be what the index promises. opened: path -> file, filled here."""
    try:
        if path not in opened:
            opened[path] = safe_open(path, framework="pt")
        view = opened[path].get_slice(name)
        found = f"{_dtype(view[:0])} {view.get_shape()}"
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot read tensor {name!r}, the file is missing or damaged ({error})") from error
    if found != f"{dtype} {shape}":
        raise ValueError(f"{path}: tensor {name!r} is {found}, but {dtype} {shape} in index.json")
    return view


def _complete(parent):
    """iteration -> folder. A replaced checkpoint .old-000100 sorts first, so it counts only where 000100 is absent."""
    folders = sorted(index.parent for index in parent.glob("*/index.json"))
    return {iteration(f): f for f in folders if f.name.removeprefix(".old-").isdecimal()}


def _tidy(parent):
    """Remove what a killed save left; give a replaced checkpoint its name back where the new one never came."""
    for old in parent.glob(".old-*"):
        new = parent / old.name.removeprefix(".old-")
        _remove(old) if new.exists() else os.replace(old, new)
    for temporary in parent.glob(".tmp-*"):
        shutil.rmtree(temporary)


def _remove(folder):
    """Renames first: a removal that is killed half way leaves a .tmp-*, not half a checkpoint."""
    doomed = folder.with_name(f".tmp-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
