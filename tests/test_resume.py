"""A run that was killed, told to stop, or finished goes on as if nothing had happened: the weights, the optimizer, the
average, the metrics (but for times) and the pictures are those of a run that was never interrupted."""

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from safetensors.torch import load_file

import flow_grpo
from models import checkpoint, run_folder

TINY = dict(num_prompts=2, group_size=4, micro_batch_size=4, num_updates=2, num_steps=3, num_iterations=3, save_every=1)
TINY |= dict(eval_num_steps=2, eval_size=6, eval_every=2, keep_checkpoints=3)
TINY |= dict(sampler="flow_sde", noise_level=0.7, window_size=0, window_range=(0, 0))
# Calls that one process makes of rollout: 2 tiles for an evaluation, 2 an iteration; of clipped_pg_loss: 4 tiles an
# iteration, 2 for each of its updates.


def arguments(run, **changes):
    return replace(flow_grpo.recipe("tiny-flux"), out=str(run), **TINY | changes)


def resumed(run, *argv):
    """The arguments that `python flow_grpo.py --resume run` runs with."""
    argv = ["--resume", str(run), *argv]
    defaults = flow_grpo.recipe(run_folder.peek(argv, "--model", "tiny-flux"))
    return run_folder.command_line(defaults, argv, flow_grpo.__file__)


def train(args, events=()):
    """main, in which signals strike. events: (rank, signal, what, n): that rank gets the signal at its n-th call of the
    function flow_grpo.<what>, or just before the n-th file operation ("open", "os.mkdir", "os.rename") whose name and
    path contain all words of `what`."""
    for rank, number, what, n in events:
        if rank == int(os.environ.get("RANK", 0)):
            count = iter(range(1, n + 1))
            strike = functools.partial(strike_at, count, n, number)
            if hasattr(flow_grpo, what):
                setattr(flow_grpo, what, functools.partial(strike_and_call, strike, getattr(flow_grpo, what)))
            else:
                sys.addaudithook(functools.partial(audit, strike, what))
    flow_grpo.main(args)


def strike_at(count, n, number):
    if next(count, None) == n:
        os.kill(os.getpid(), number)


def strike_and_call(strike, function, *args, **options):
    strike()
    return function(*args, **options)


def audit(strike, what, event, args):
    if event in ("open", "os.mkdir", "os.rename"):
        text = f"{event} {args[event == 'os.rename']}"  # a rename is known by where it goes
        if all(word in text for word in what.split()):
            strike()


def exit_codes(args, ranks=1, events=(), seconds=None):
    """How the ranks ended. After `seconds` (None: when they are done) all are killed; so is the rest, a while after one
    of them died."""
    started = processes.start(train, args, events, ranks=ranks)
    processes.connection.wait([p.sentinel for p in started], 120 if seconds is None else seconds)
    for p in started:
        if seconds is None:
            p.join(10)
        p.kill()
        p.join()
    return [p.exitcode for p in started]


SHARED = tempfile.TemporaryDirectory()


@functools.cache
def straight(ranks, **changes):
    """The folder of a run that was never interrupted."""
    run = Path(SHARED.name) / "-".join(str(v) for v in (ranks, *changes.values()))
    processes.run(train, arguments(run, **changes), ranks=ranks)
    return run


def metrics(run):
    times = ("seconds_", "samples_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in run_folder.rows(run)]


def content(path):
    """The bytes of a file; of a card without its command line, in which --save-every and the like may differ."""
    data = path.read_bytes()
    if path.name == "README.md":
        data, count = re.subn(rb"(?ms)(?<=^## The command line\n\n)(`{3,})bash\n.*?\n\1$", b"", data)
        assert count == 1, path
    return data


def assert_same_end(run, expected):
    found, wanted = checkpoint.latest(run), checkpoint.latest(expected)
    assert found.name == wanted.name
    files = sorted(p.name for p in wanted.iterdir())
    assert sorted(p.name for p in found.iterdir()) == files
    for file in files:
        if file.endswith(".json"):
            assert json.loads((found / file).read_text()) == json.loads((wanted / file).read_text())
            continue
        a, b = load_file(found / file), load_file(wanted / file)
        assert a.keys() == b.keys() and {name.split("/")[0] for name in a} == {"model", "optimizer", "ema"}
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].numpy().tobytes() == b[name].numpy().tobytes(), name
    assert metrics(run) == metrics(expected)
    for part in ("model", "samples"):
        files = sorted(p.relative_to(expected) for p in (expected / part).rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(run) for p in (run / part).rglob("*") if p.is_file())
        for file in files:
            assert content(run / file) == content(expected / file), file
    assert not list((run / "checkpoints").glob(".*"))


def iterations(run):
    return [row["iteration"] for row in run_folder.rows(run)]


def checkpoints(run):
    return sorted(p.name for p in (run / "checkpoints").glob("[0-9]*"))


# ----------------------------------------------------------------------------------------------------------------------
# killed


def test_what_is_compared_does_change():
    first, last = (load_file(straight(1) / f"checkpoints/00000{n}/rank-00000.safetensors") for n in (1, 3))
    for part in ("model", "optimizer", "ema"):
        assert any((first[name] != last[name]).any() for name in first if name.startswith(part))
    rows = metrics(straight(1))
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3] and "eval_reward" in rows[3]
    assert len({row["grad_norm"] for row in rows[:3]}) == 3 and len({row["reward"] for row in rows[:3]}) == 3


def test_killed_before_during_and_after_training(tmp_path):
    run = tmp_path / "run"

    def kill(what):
        return [(0, signal.SIGKILL, what, 1)]

    assert exit_codes(arguments(run), events=kill("os.rename run/args.json")) == [-signal.SIGKILL]
    assert run.exists()
    with pytest.raises(SystemExit) as error:
        resumed(run)
    assert str(error.value) == f"error: --resume {run}: no args.json there; expected the folder of an earlier run"

    # The same command starts it again, and it dies before its first checkpoint. Then there is something to resume.
    assert exit_codes(arguments(run), events=kill("os.rename checkpoints/000000")) == [-signal.SIGKILL]
    assert checkpoints(run) == [] and (run / "args.json").exists()

    assert exit_codes(resumed(run), events=kill("open checkpoints/.tmp-000002/state.json")) == [-signal.SIGKILL]
    assert checkpoints(run) == ["000000", "000001"] and iterations(run) == [0, 1]
    assert (run / "checkpoints" / ".tmp-000002" / "rank-00000.safetensors").exists()

    # While 000001 is saved once more: its old form is aside, its new one has not got its name.
    assert exit_codes(resumed(run), events=kill("os.rename checkpoints/000001")) == [-signal.SIGKILL]
    assert checkpoints(run) == ["000000"] and (run / "checkpoints" / ".old-000001").exists()

    assert exit_codes(resumed(run), seconds=random.Random(1).uniform(0.5, 1.5)) == [-signal.SIGKILL]

    assert exit_codes(resumed(run), events=kill("open model/transformer/config.json")) == [-signal.SIGKILL]
    assert iterations(run) == [0, 1, 2, 3] and not (run / "model" / "model_index.json").exists()
    processes.run(train, resumed(run))
    assert_same_end(run, straight(1))


def test_two_ranks_killed_and_told_to_stop(tmp_path):
    run = tmp_path / "run"
    codes = exit_codes(
        arguments(run), 2, [(1, signal.SIGKILL, "open checkpoints/.tmp-000001", 1)]
    )  # as it writes its rows
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert checkpoints(run) == ["000000"] and iterations(run) == [0]
    assert exit_codes(resumed(run), 2, seconds=random.Random(2).uniform(0.5, 1.5)) == [-signal.SIGKILL] * 2
    # Only rank 1 is told to stop, in its first tile after what it resumed from.
    assert exit_codes(resumed(run), 2, [(1, signal.SIGTERM, "clipped_pg_loss", 1)]) == [143, 143]
    processes.run(train, resumed(run), ranks=2)
    assert_same_end(run, straight(2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills_at_random_moments(tmp_path, ranks):
    run, draw, kills = tmp_path / "run", random.Random(ranks), 0
    args = arguments(run, num_iterations=60)
    while kills < 10:
        started = processes.start(train, args, ranks=ranks)
        time.sleep(draw.uniform(0.2, 3.0) * ranks)
        alive = [p for p in started if p.is_alive()]
        assert len(alive) == ranks  # it has not ended: the run is long enough for ten kills
        first = draw.sample(alive, draw.randint(1, ranks))
        for p in first:
            p.kill()
        processes.connection.wait([p.sentinel for p in started if p not in first], 1)  # the other one notices, or waits
        for p in started:
            p.kill()
            p.join()
        kills += 1
        print(
            f"kill {kills}: {len(first)} of {ranks} ranks, after iterations {iterations(run)[-1:]}, {checkpoints(run)}"
        )
        if (run / "args.json").exists():
            args = resumed(run)
    processes.run(train, args, ranks=ranks, timeout=300)
    assert_same_end(run, straight(ranks, num_iterations=60))


# ----------------------------------------------------------------------------------------------------------------------
# told to stop


def test_told_to_stop_saves_what_a_resumed_run_needs(tmp_path):
    run = tmp_path / "run"
    args = arguments(run, save_every=100, num_iterations=2)
    # In the first update of iteration 1: it starts over. In iteration 1's second update: the iteration ends first.
    for number, what, n, iteration in (
        (signal.SIGTERM, "clipped_pg_loss", 5, 1),
        (signal.SIGINT, "rollout", 1, 1),
        (signal.SIGTERM, "clipped_pg_loss", 3, 2),
        (signal.SIGTERM, "rollout", 1, 2),  # the evaluation of iteration 2: the model holds the averaged weights
    ):
        assert exit_codes(args, events=[(0, number, what, n)]) == [128 + number]
        assert checkpoint.iteration(checkpoint.latest(run)) == iteration and iterations(run) == list(range(iteration))
        assert not (run / "model").exists()
        args = resumed(run)
    # The second Ctrl-C does not wait for a safe place.
    assert exit_codes(args, events=[(0, signal.SIGINT, "rollout", 1), (0, signal.SIGINT, "rollout", 1)]) == [1]

    processes.run(train, args)  # and a finished run goes on
    assert iterations(run) == [0, 1, 2] and (run / "model" / "model_index.json").exists()
    processes.run(train, resumed(run, "--num-iterations", "3"))
    assert_same_end(run, straight(1))


def test_run_of_two_ranks_goes_on_alone(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight(2), run)
    processes.run(train, resumed(run, "--num-iterations", "4"))
    assert iterations(run) == list(range(5)) and checkpoints(run) == ["000002", "000003", "000004"]
    assert metrics(run)[:3] == metrics(straight(2))[:3]
    state = json.loads((run / "checkpoints" / "000004" / "state.json").read_text())
    assert state["cursor"] == 3 * 4 + 2 and state["updates"] == 8
