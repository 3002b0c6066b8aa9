"""--track: what Weights & Biases gets is what the run folder has, read back from the file that wandb itself uploads."""

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest

import flow_grpo
from models import run_folder

ROOT = Path(run_folder.__file__).parent.parent
TINY = "--num-prompts 2 --group-size 4 --micro-batch-size 4 --num-steps 3 --eval-num-steps 2 --eval-size 4 "
TINY += "--eval-every 2 --save-every 1 --window-size 0 --window-range 0 0"


@dataclass
class Args:
    kl_coef: float = 0.5
    """weight"""
    reward: tuple[str, ...] = ("shapes", "jpeg:0.1")
    """rewards"""


def records(path):
    """The protobuf records of a .wandb file: LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    found, place, record = [], 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of the block: padding
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or last part
            found.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    assert record == b"" and found[-1].WhichOneof("record_type") == "exit"
    return found


def of_kind(found, kind):
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def history(found):
    """The logged rows, what has parts ("samples") as a dict."""
    logged = []
    for record in of_kind(found, "history"):
        row = {}
        for item in record.item:
            *outer, name = [item.key] if item.key else item.nested_key
            (row.setdefault(outer[0], {}) if outer else row)[name] = json.loads(item.value_json)
        logged.append(row)
    return logged


def metrics(row):
    """Without what wandb adds and without pictures."""
    return {k: v for k, v in row.items() if not k.startswith("_") and not isinstance(v, dict)}


def sessions(run):
    """The offline folders of a run, oldest first."""
    return sorted((Path(run) / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime)


def train(folder, *argv):
    environment = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_SERVICE", None)  # of another test
    command = [sys.executable, str(ROOT / "flow_grpo.py"), *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_wandb_gets_what_the_run_folder_has(tmp_path):
    run = tmp_path / "out" / "my run"
    train(tmp_path, *TINY.split(), "--num-iterations", "2", "--out", str(run), "--track")
    first = {"args": json.loads((run / "args.json").read_text()), "rows": run_folder.rows(run)}
    train(tmp_path, "--resume", str(run), "--num-iterations", "3")
    then = {"args": json.loads((run / "args.json").read_text()), "rows": run_folder.rows(run)}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # all of wandb's files lie below the run folder

    number = json.loads((run / "wandb" / "run.json").read_text())["id"]
    steps = []
    for folder, wrote, iterations in zip(sessions(run), (first, then), ([0, 1, 2], [2, 3]), strict=True):
        found = records(folder / f"run-{number}.wandb")
        (header,) = of_kind(found, "run")
        assert (header.run_id, header.project, header.display_name) == (number, "flow_grpo", "my run")
        config = {item.key: json.loads(item.value_json) for item in header.config.update}
        assert {k: v for k, v in config.items() if k != "_wandb"} == wrote["args"]
        (metric,) = of_kind(found, "metric")
        assert (metric.glob_name, metric.step_metric) == ("*", "iteration")

        logged = history(found)
        expected = [row for row in wrote["rows"] if row["iteration"] in iterations]
        assert [metrics(row) for row in logged] == expected and len(expected) == len(iterations)
        steps += [row["_step"] for row in logged]
        for row in logged:
            grid = run / "samples" / f"{row['iteration']:06d}.png"
            assert ("samples" in row) == grid.exists() == (row["iteration"] in (0, 2, 3))
            if grid.exists():
                assert row["samples"]["sha256"] == hashlib.sha256(grid.read_bytes()).hexdigest()
                assert (folder / "files" / row["samples"]["path"]).read_bytes() == grid.read_bytes()

        # Nothing else: no output, machine, git or packages; telemetry is wandb's own, about wandb.
        kinds = {record.WhichOneof("record_type") for record in found}
        assert kinds <= {"header", "run", "telemetry", "metric", "files", "summary", "history", "exit"}
        sent = [item.path for record in of_kind(found, "files") for item in record.files]
        assert sorted(sent) == sorted(row["samples"]["path"] for row in logged if "samples" in row)
        assert not header.host and not header.HasField("git")
        assert {path.suffix for path in (folder / "files").rglob("*") if path.is_file()} == {".png"}
    assert steps == sorted(set(steps)) and steps[:3] == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------------------
# the tracker alone


def track_twice(run):
    """A run that is tracked from iteration 2 on, is killed after iteration 4 and resumed from iteration 3."""
    import wandb

    os.environ["WANDB_MODE"] = "offline"
    for iteration in range(2):
        run_folder.append(run, {"iteration": iteration, "reward": iteration / 7})
    samples = Path(run) / "samples"
    samples.mkdir()
    run_folder.texts(str(samples / "000001"), [{"prompt": "2 < 3?", "image": None}], ["yes & no"], [0.25])
    (samples / "1000001.txt").write_text("of iteration 1000001")
    tracker = run_folder.Tracker(run, "rloo", Args())
    for iteration in range(2, 5):
        tracker.log({"iteration": iteration, "reward": math.nan, "kl": None, "loss": -1e-300, "length": iteration})
    wandb.finish()
    time.sleep(1.1)  # wandb's folders are named by the second
    tracker = run_folder.Tracker(run, "rloo", Args(kl_coef=0.25))
    for iteration in range(3, 5):
        tracker.log({"iteration": iteration, "reward": 0.5, "length": iteration})
    wandb.finish()


def test_steps_grow_and_earlier_rows_come_first(tmp_path):
    processes.run(track_twice, str(tmp_path))
    one, two = [records(*folder.glob("*.wandb")) for folder in sessions(tmp_path)]
    assert [record.run_id for record in of_kind(one, "run")] == [record.run_id for record in of_kind(two, "run")]
    logged, again = history(one), history(two)
    assert [metrics(row) for row in logged] == [
        {"iteration": 0, "reward": 0.0},
        {"iteration": 1, "reward": 1 / 7},
        *({"iteration": i, "loss": -1e-300, "length": i} for i in (2, 3, 4)),  # what is no number is left out
    ]
    assert [metrics(row) for row in again] == [{"iteration": i, "reward": 0.5, "length": i} for i in (3, 4)]
    assert [row["_step"] for row in logged + again] == list(range(7))
    assert [row["iteration"] for row in logged + again if "texts" in row] == [1]
    text = (sessions(tmp_path)[0] / "files" / logged[1]["texts"]["path"]).read_text()
    assert "<pre>reward 0.25\n&gt; 2 &lt; 3?\nyes &amp; no\n</pre>" in text
    (header,) = of_kind(two, "run")
    assert {item.key: item.value_json for item in header.config.update}["kl_coef"] == "0.25"


def start_and_resume_below(run, code):
    """Two processes, one after the other, of a parent that uses wandb itself, as a sweep does."""
    import wandb

    os.environ["WANDB_MODE"] = "offline"
    wandb.setup()
    assert "WANDB_SERVICE" in os.environ
    done = [subprocess.run([sys.executable, "-c", code, run], cwd=ROOT, capture_output=True, text=True) for _ in "ab"]
    return [process.stderr[-2000:] for process in done if process.returncode]


def test_runs_end_below_a_process_that_uses_wandb(tmp_path):
    code = """
import dataclasses, sys
from models import run_folder
Args = dataclasses.make_dataclass("Args", ["a"])
run_folder.Tracker(sys.argv[1], "rloo", Args(1)).log({"iteration": 5, "reward": 1.0})
"""
    (errors,) = processes.run(start_and_resume_below, str(tmp_path), code)
    assert errors == []
    found = [records(*folder.glob("*.wandb")) for folder in sessions(tmp_path)]  # each has its end
    assert [[row["_step"] for row in history(session)] for session in found] == [[5], [6]]
    assert [of_kind(session, "exit")[0].exit_code for session in found] == [0, 0]


def track_and_lose_wandb(run):
    os.environ["WANDB_MODE"] = "offline"
    tracker = run_folder.Tracker(run, "rloo", Args())
    tracker.log({"iteration": 0, "reward": 1.0})
    (service,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rpartition(") ")[2].split()[1] == str(os.getpid()) and "(wandb-core)" in path.read_text()
    ]
    os.kill(service, signal.SIGKILL)
    time.sleep(1)
    started = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        for iteration in range(1, 5):
            run_folder.append(run, {"iteration": iteration})
            tracker.log({"iteration": iteration, "reward": 1.0})
    return time.monotonic() - started, said.getvalue()


def test_training_goes_on_where_wandb_dies(tmp_path):
    ((seconds, said),) = processes.run(track_and_lose_wandb, str(tmp_path))
    assert seconds < 5
    assert said.count("warning: Weights & Biases: ") == 1 and "tracking ends at iteration" in said
    assert [row["iteration"] for row in run_folder.rows(tmp_path)] == [1, 2, 3, 4]


def refusal(folder, installed, mode):
    """What the command line says to a user with nothing in the home folder."""
    os.environ.update(HOME=folder, WANDB_MODE=mode, WANDB_CONFIG_DIR=folder, NETRC=os.path.join(folder, "none"))
    os.environ.pop("WANDB_API_KEY", None)
    os.chdir(folder)
    sys.stdin = open(os.devnull)
    if not installed:
        sys.modules["wandb"] = None  # import wandb is an ImportError then
    try:
        run_folder.command_line(flow_grpo.Args(), ["--track"], "flow_grpo.py")
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    "installed, mode, expected",
    [
        (False, "online", "error: --track: Weights & Biases is not installed: pip install wandb"),
        (True, "online", "error: --track: Weights & Biases: No API key configured; run `wandb login`, or set WANDB_"),
        (True, "offline", None),
        (True, "disabled", None),
    ],
)
def test_who_cannot_track_is_told_before_the_run(tmp_path, installed, mode, expected):
    (message,) = processes.run(refusal, str(tmp_path), installed, mode)
    assert message == expected or message.startswith(expected) and "\n" not in message
