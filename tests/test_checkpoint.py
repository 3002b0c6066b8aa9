import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from models import checkpoint

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "safetensors.torch", "pytest"]
)


def one_rank(rank, world_size, store, function, arguments):
    torch.set_num_threads(1)
    store = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=20))
    function(*arguments)
    dist.destroy_process_group()


def run_ranks(world_size, function, *arguments, exit_codes=None):
    """function(*arguments) in world_size gloo processes; an assert that fails in one of them fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            processes.Process(target=one_rank, args=(rank, world_size, store, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
    assert codes == (exit_codes or [0] * world_size)


def values():
    """Full tensors by name. Those whose name starts with "plain" are never sharded."""
    draw = torch.Generator().manual_seed(0)
    return {
        "uneven": torch.randn(7, 3, generator=draw),
        "few_rows": torch.randn(1, 2, generator=draw).bfloat16(),
        "ids": torch.arange(5) + 2**40,
        "three_dims": torch.randn(8, 2, 3, generator=draw).double(),
        "no_rows": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "special": torch.tensor([float("inf"), -0.0, 1e-45, 3e38]),
        "plain/scalar": torch.tensor(3.0),
        "plain/step": torch.tensor(7),
        "plain/weight": torch.randn(3, 5, generator=draw).half(),
        "plain/transposed": torch.randn(5, 3, generator=draw).t(),
    }


def distributed(full, hsdp):
    """The same tensors as FSDP2 lays them out, on this process group or without one."""
    if not dist.is_initialized():
        return {name: tensor.clone() for name, tensor in full.items()}
    shape, placements = ((2, 2), [Replicate(), Shard(0)]) if hsdp else ((dist.get_world_size(),), [Shard(0)])
    mesh = init_device_mesh("cpu", shape)
    return {
        name: tensor.clone() if name.startswith("plain") else distribute_tensor(tensor, mesh, placements)
        for name, tensor in full.items()
    }


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def save_values(folder, hsdp=False):
    checkpoint.save(folder, distributed(values(), hsdp), {"iteration": 100, "lr": 0.1, "prompt": "naïve ☃"})


def check_values(folders, hsdp=False):
    for folder in folders:
        wanted = distributed(values(), hsdp)
        found = distributed({name: torch.zeros_like(tensor) for name, tensor in values().items()}, hsdp)
        memory = {name: local(tensor).data_ptr() for name, tensor in found.items()}
        assert checkpoint.load(folder, found) == {"iteration": 100, "lr": 0.1, "prompt": "naïve ☃"}
        for name in wanted:
            assert same_bits(local(found[name]), local(wanted[name])), name
            assert local(found[name]).data_ptr() == memory[name], name
        full = checkpoint.full_tensors(found)
        if dist.is_initialized() and dist.get_rank() > 0:
            assert full == {}
        else:
            assert full.keys() == values().keys()
            assert all(same_bits(full[name], tensor) for name, tensor in values().items())


def test_checkpoint_loads_at_any_world_size(tmp_path):
    folders = [tmp_path / saver / "checkpoints" / "000100" for saver in ("alone", "two", "hsdp")]
    save_values(folders[0])
    run_ranks(2, save_values, folders[1])
    run_ranks(4, save_values, folders[2], True)

    check_values(folders)
    run_ranks(2, check_values, folders)
    run_ranks(3, check_values, folders)
    run_ranks(4, check_values, folders, True)


def test_folder_holds_safetensors_and_json_only(tmp_path):
    folder = tmp_path / "checkpoints" / "000100"
    run_ranks(4, save_values, folder, True)
    # The second replica writes nothing, and of the 0-row tensor there is nothing to write.
    assert sorted(os.listdir(folder)) == [
        "index.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "state.json",
    ]
    first, second = (load_file(folder / f"rank-0000{rank}.safetensors") for rank in (0, 1))
    assert same_bits(torch.cat([first["uneven"], second["uneven"]]), values()["uneven"])
    assert first["uneven"].shape == (4, 3) and "few_rows" not in second and "plain/scalar" not in second
    index = json.loads((folder / "index.json").read_text())
    assert index["world_size"] == 4 and index["tensors"].keys() == values().keys()
    assert index["tensors"]["uneven"] == {
        "shape": [7, 3],
        "dtype": "float32",
        "shards": [["rank-00000.safetensors", 0, 4], ["rank-00001.safetensors", 4, 3]],
    }
    assert json.loads((folder / "state.json").read_text())["iteration"] == 100


def check_reads(folder, expected):
    """Records every read: (file, first row, last row + 1)."""
    reads, slice_of = [], checkpoint._slice

    class Recorded:
        def __init__(self, path, view):
            self.path, self.view = path, view

        def __getitem__(self, rows):
            reads.append((self.path.name[5:10], rows.start, rows.stop))
            return self.view[rows]

    checkpoint._slice = lambda opened, path, *rest: Recorded(path, slice_of(opened, path, *rest))
    checkpoint.load(folder, distributed({"w": torch.zeros(7, 3)}, False))
    assert reads == expected[dist.get_rank()]


def test_rank_reads_its_own_rows_only(tmp_path):
    folder = tmp_path / "000001"
    run_ranks(2, save_one, folder)  # rows 0-3 and 4-6; at three ranks 0-2, 3-5 and 6
    expected = [[("00000", 0, 3)], [("00000", 3, 4), ("00001", 0, 2)], [("00001", 2, 3)]]
    run_ranks(3, check_reads, folder, expected)


def save_one(folder):
    checkpoint.save(folder, distributed({"w": torch.randn(7, 3)}, False), {})


def test_empty_dict_tied_weights_and_views(tmp_path):
    checkpoint.save(tmp_path / "000000", {}, {"iteration": 0})
    assert checkpoint.load(tmp_path / "000000", {}) == {"iteration": 0}

    weight = torch.randn(4, 6)
    tensors = {"embed": weight, "head": weight, "half": weight[1:3], "column": weight[:, 2]}
    checkpoint.save(tmp_path / "000001", tensors, {})
    found = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    checkpoint.load(tmp_path / "000001", found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    parameter = torch.nn.Parameter(torch.zeros(4, 6))  # a leaf that requires grad is filled as well
    checkpoint.load(tmp_path / "000001", {**found, "embed": parameter})
    assert torch.equal(parameter, weight) and parameter.requires_grad


def test_full_tensors_are_copies_in_the_dtype_asked_for():
    tensors = {"weight": torch.randn(3, requires_grad=True), "ids": torch.arange(3)}
    full = checkpoint.full_tensors(tensors, dtype=torch.bfloat16)
    assert torch.equal(full["weight"], tensors["weight"].bfloat16()) and not full["weight"].requires_grad
    assert full["ids"].dtype == torch.int64 and full["ids"].data_ptr() != tensors["ids"].data_ptr()


# ----------------------------------------------------------------------------------------------------------------------
# training goes on bit for bit


def build(fused, amsgrad=False, hsdp=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    if dist.is_initialized():
        shape, names = ((2, 2), ("replicate", "shard")) if hsdp else ((dist.get_world_size(),), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused, amsgrad=amsgrad)
    return model, optimizer


def train(model, optimizer, iterations):
    rank = dist.get_rank() if dist.is_initialized() else 0
    for i in iterations:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * i + rank))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {name: p for p, name in names.items()} | checkpoint.optimizer_tensors(optimizer, names)


def check_resume(run, fused, amsgrad=False, hsdp=False):
    model, optimizer = build(fused, amsgrad, hsdp)
    train(model, optimizer, range(6))
    uninterrupted = everything(model, optimizer)

    for stop in (0, 3):
        folder = run / "checkpoints" / f"{stop:06d}"
        model, optimizer = build(fused, amsgrad, hsdp)
        train(model, optimizer, range(stop))
        checkpoint.save(folder, everything(model, optimizer), {"iteration": stop})

        model, optimizer = build(fused, amsgrad, hsdp)
        for parameter in model.parameters():
            torch.nn.init.zeros_(local(parameter.detach()))
        stop = checkpoint.load(folder, everything(model, optimizer))["iteration"]
        train(model, optimizer, range(stop, 6))
        resumed = everything(model, optimizer)
        assert resumed.keys() == uninterrupted.keys() and len(resumed) == 4 * (5 if amsgrad else 4)
        for name, tensor in resumed.items():
            assert type(tensor) is type(uninterrupted[name]), name
            assert same_bits(local(tensor.detach()), local(uninterrupted[name].detach())), name
        assert resumed["optimizer/0.weight/step"] == 6 and resumed["optimizer/0.weight/exp_avg"].abs().sum() > 0


def check_resume_all(run, hsdp):
    for fused in (True, False):
        check_resume(run / f"fused_{fused}", fused, hsdp=hsdp)


def test_resume_equals_not_having_stopped(tmp_path):
    check_resume(tmp_path / "alone", fused=False)
    check_resume(tmp_path / "alone_fused", fused=True, amsgrad=True)
    run_ranks(3, check_resume_all, tmp_path / "three", False)  # 7 rows on 3 ranks, and 2: the third holds none
    run_ranks(4, check_resume_all, tmp_path / "hsdp", True)

    # What three ranks trained is one tensor to a single process, moments and all.
    model, optimizer = build(False)
    assert checkpoint.load(tmp_path / "three" / "fused_False" / "checkpoints" / "000003", everything(model, optimizer))
    assert optimizer.state[model[2].bias]["step"] == 3
    assert (optimizer.state[model[2].bias]["exp_avg_sq"] > 0).all()


def test_optimizer_tensors_match_what_adamw_makes_itself():
    for fused in (False, True):
        model, optimizer = build(fused, amsgrad=fused)
        before = {name: (t.dtype, t.shape, t.device) for name, t in everything(model, optimizer).items()}
        assert all((t == 0).all() for name, t in everything(model, optimizer).items() if name.startswith("optimizer"))
        model, optimizer = build(fused, amsgrad=fused)
        train(model, optimizer, [0])
        assert before == {name: (t.dtype, t.shape, t.device) for name, t in everything(model, optimizer).items()}
    with pytest.raises(ValueError, match=r"shape \[7, 5\] has no name"):
        checkpoint.optimizer_tensors(optimizer, {})


# ----------------------------------------------------------------------------------------------------------------------
# a process that dies, a rank that fails, a disk that is full


def content(value):
    return {"a": torch.full((3, 2), float(value)), "b": torch.full((), value)}


def save_content(run, number, value, keep_last=0):
    checkpoint.save(run / "checkpoints" / f"{number:06d}", content(value), {"value": value}, keep_last)


def load_content(folder):
    """The value of a checkpoint that is whole and of one piece."""
    found = content(0)
    value = checkpoint.load(folder, found)["value"]
    assert all(torch.equal(found[name], tensor) for name, tensor in content(value).items())
    return value


def names(run):
    return sorted(os.listdir(run / "checkpoints"))


def save_and_die(run, event_number, number):
    """In a forked process: SIGKILL just before the n-th time that the save opens, makes, renames or removes a file."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def audit(event, _):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    save_content(run, number, 2, keep_last=1)
    os._exit(0)


def check_every_kill(base, number):
    torch.set_num_threads(1)
    for following in (300, number):  # the next save is of a later iteration, or of the interrupted one again
        seen, left = set(), set()
        for event_number in range(1, 200):
            run = base / f"{following}-{event_number}"
            save_content(run, 100, 1)
            exit_code = save_and_die(run, event_number, number)
            left.update(name for name in names(run) if not name.isdecimal())
            newest = checkpoint.latest(run)
            value = load_content(newest)
            assert checkpoint.iteration(newest) == (number if value == 2 else 100)
            for folder in (run / "checkpoints").glob("[0-9]*"):
                load_content(folder)
            seen.add((exit_code, value))
            if following == 300:
                save_content(run, 300, 3, keep_last=2)
                assert names(run) == [f"{checkpoint.iteration(newest):06d}", "000300"]
                assert load_content(run / "checkpoints" / names(run)[0]) == value
            else:
                save_content(run, number, 3, keep_last=1)
                assert names(run) == [f"{number:06d}"] and load_content(checkpoint.latest(run)) == 3
            if exit_code == 0:
                break
        assert seen == {(-signal.SIGKILL, 1), (-signal.SIGKILL, 2), (0, 2)} and event_number > 10
        assert ".old-000100" in left or number != 100


@pytest.mark.parametrize("number", [200, 100])  # a new checkpoint that prunes the one before; one that replaces it
def test_sigkill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, number):
    process = processes.Process(target=check_every_kill, args=(tmp_path, number))
    process.start()
    process.join()
    assert process.exitcode == 0


def die_in_the_middle(run):
    if dist.get_rank() == 1:
        checkpoint.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        checkpoint.save(run / "checkpoints" / "000200", distributed(values(), False), {})


def test_sigkill_of_one_rank_ends_the_others(tmp_path):
    save_content(tmp_path, 100, 1)
    run_ranks(2, die_in_the_middle, tmp_path, exit_codes=[0, -signal.SIGKILL])
    assert load_content(checkpoint.latest(tmp_path)) == 1 and "000200" not in names(tmp_path)


def fail_on_one_rank(run):
    folder, rank = run / "checkpoints" / "000200", dist.get_rank()
    large = distributed({"w": torch.randn(4096, 4)}, False)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # the kernel refuses this rank files of more than 10 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    kind, message = (OSError, "000200: cannot write") if rank == 1 else (RuntimeError, "000200: rank 1 failed")
    with pytest.raises(kind, match=message):
        checkpoint.save(folder, large, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(TypeError if rank == 0 else RuntimeError):  # only rank 0 writes the state
        checkpoint.save(folder, large, {"optimizer": object()})

    with pytest.raises(ValueError if rank == 0 else RuntimeError):  # a name that only rank 0 has
        checkpoint.save(folder, large | ({"x": large["w"]} if rank == 0 else {}), {})

    dist.barrier()  # rank 0 clears up after its raise
    assert names(run) == ["000100"] and load_content(run / "checkpoints" / "000100") == 1
    dist.barrier()
    checkpoint.save(folder, large, {"fine": True})
    assert checkpoint.load(folder, large) == {"fine": True}

    dist.barrier()
    if rank == 0:
        os.truncate(folder / "rank-00001.safetensors", 5000)
    dist.barrier()
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="000200"):
        checkpoint.load(folder, large)


def test_failure_of_one_rank_is_raised_on_all(tmp_path):
    save_content(tmp_path, 100, 1)
    run_ranks(2, fail_on_one_rank, tmp_path)


def test_full_disk_is_reported_before_writing(tmp_path):
    save_content(tmp_path, 100, 1)
    huge = {"w": torch.zeros(1).expand(2**60)}  # one number in memory
    with pytest.raises(OSError, match=rf"000200: the checkpoint needs {2**62} bytes, the disk has \d+ free"):
        checkpoint.save(tmp_path / "checkpoints" / "000200", huge, {})
    assert names(tmp_path) == ["000100"] and load_content(checkpoint.latest(tmp_path)) == 1


def test_keep_last_prunes_older_checkpoints(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for number in (5, 100, 20, 1_000_000):
        save_content(tmp_path, number, number)
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / ".tmp-000777").mkdir()
    (tmp_path / "checkpoints" / ".tmp-000777" / "index.json").write_text("{")
    assert checkpoint.latest(str(tmp_path)) == tmp_path / "checkpoints" / "1000000"
    assert checkpoint.iteration("outputs/x/checkpoints/000100") == 100

    save_content(
        tmp_path, 200, 200, keep_last=2
    )  # keeps itself and 100; what is newer is another run's: not its to remove
    assert names(tmp_path) == ["000100", "000200", "1000000", "notes"]
    save_content(tmp_path, 200, 7, keep_last=1)
    assert names(tmp_path) == ["000200", "1000000", "notes"]
    assert load_content(tmp_path / "checkpoints" / "000200") == 7
    with pytest.raises(ValueError, match="named after its iteration"):
        checkpoint.save(tmp_path / "checkpoints" / "best", {}, {})


# ----------------------------------------------------------------------------------------------------------------------
# what does not fit is refused, and nothing is touched


def test_damaged_file_is_refused(tmp_path):
    save_content(tmp_path, 100, 1)
    folder = tmp_path / "checkpoints" / "000100"
    for file in ("rank-00000.safetensors", "index.json", "state.json"):
        whole = (folder / file).read_bytes()
        for size in (0, 1, 9, len(whole) // 2, len(whole) - 1):
            (folder / file).write_bytes(whole[:size])
            found = content(5)
            with pytest.raises(ValueError, match="000100"):
                checkpoint.load(folder, found)
            assert all(torch.equal(found[name], tensor) for name, tensor in content(5).items())
        (folder / file).unlink()
        with pytest.raises(ValueError, match="000100"):
            checkpoint.load(folder, content(5))
        (folder / file).write_bytes(whole)
    assert load_content(folder) == 1

    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(ValueError, match="format"):
        checkpoint.load(folder, content(5))
    index["tensors"]["a"]["shards"] = [["rank-00000.safetensors", 0, 2]]  # the file has 3 rows
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'a' is float32 \[3, 2\], but float32 \[2, 2\] in index.json"):
        checkpoint.load(folder, content(5))
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "checkpoints" / "000999", {})


def test_other_names_shapes_and_dtypes_are_refused(tmp_path):
    save_content(tmp_path, 100, 1)
    folder = tmp_path / "checkpoints" / "000100"
    a, b = torch.full((3, 2), 5.0), torch.full((), 5)
    for tensors, message in (
        (
            {"b": b, "a": torch.zeros(2, 3)},
            r"000100: tensor 'a' is float32 \[3, 2\] in the checkpoint, float32 \[2, 3\]",
        ),
        ({"b": b, "a": a.double()}, r"'a' is float32 \[3, 2\] in the checkpoint, float64 \[3, 2\]"),
        ({"b": b.view(1), "a": a}, r"'b' is int64 \[\] in the checkpoint, int64 \[1\]"),
        ({"b": b}, r"0 tensors are not in the checkpoint \[\], 1 of the checkpoint are not in the model \['a'\]"),
        ({"b": b, "A": a}, r"1 tensors are not in the checkpoint \['A'\], 1 of .* \['a'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load(folder, tensors)
        assert (a == 5).all() and b == 5


def check_other_placement(folder):
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match=r"only one Shard\(0\)"):
        checkpoint.save(folder, {"w": distribute_tensor(torch.zeros(2, 4), mesh, [Shard(1)])}, {})
    assert not Path(folder).exists()


def test_other_placement_is_refused(tmp_path):
    run_ranks(2, check_other_placement, tmp_path / "000001")
