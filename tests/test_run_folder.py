import json
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from models import run_folder


@dataclass
class Args:
    model: str = "tiny-flux"
    """the model"""
    reward: tuple[str, ...] = ("shapes",)
    """rewards"""
    out: str = ""
    """run folder"""
    resume: str = ""
    """run to continue"""
    num_iterations: int = 200
    """iterations"""
    eval_every: int = 50
    """interval"""
    save_every: int = 50
    """interval"""
    kl_coef: float = 0.0
    """weight"""
    compile: bool = False
    """compile"""
    track: bool = False
    """log"""


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_metrics_come_back_with_null_for_what_json_has_not(tmp_path):
    assert run_folder.rows(tmp_path) == []
    run_folder.append(tmp_path, {"iteration": 0, "reward": 0.1, "kl": math.nan, "grad_norm": math.inf})
    run_folder.append(tmp_path, {"iteration": 1, "reward": -1e-300, "loss": -math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"iteration": 0, "reward": 0.1, "kl": null, "grad_norm": null}'
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == run_folder.rows(tmp_path)
    assert run_folder.rows(tmp_path)[1] == {"iteration": 1, "reward": -1e-300, "loss": None}


def test_cut_drops_later_rows_and_the_line_that_a_kill_left_unfinished(tmp_path):
    for iteration in range(5):
        run_folder.append(tmp_path, {"iteration": iteration, "reward": iteration / 3})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):  # killed at any byte
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        assert [row["iteration"] for row in run_folder.rows(tmp_path)] == list(range(complete))
        run_folder.cut(tmp_path, 3)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[: min(complete, 3)])
    run_folder.append(tmp_path, {"iteration": 3, "reward": 1.0})
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3]) + b'{"iteration": 3, "reward": 1.0}\n'
    run_folder.cut(tmp_path, 0)
    assert path.read_bytes() == b"" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# pictures


def test_to_uint8_rounds_to_the_nearest_level():
    levels = torch.arange(256.0)
    for shift, expected in ((0.0, levels), (0.4, levels), (-0.4, levels), (0.6, levels + 1)):
        values = ((levels + shift) / 255).clamp(0, 1).expand(2, 3, 5, 256)
        pictures = run_folder.to_uint8(values)
        assert len(pictures) == 2 and pictures[0].shape == (5, 256, 3) and pictures[0].dtype == np.uint8
        assert (pictures[1] == expected.clamp(max=255).numpy()[:, None]).all()
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0, 1, 0] = 1.0
    assert run_folder.to_uint8(image)[0].tolist() == [[[0, 0, 0]] * 2, [[255, 0, 0], [0, 0, 0]]]


def test_grid_shows_every_picture_in_its_place(tmp_path):
    small = np.zeros((32, 32, 3), np.uint8)
    small[:, :16] = (255, 0, 0)  # enlarged without smoothing: its edge stays sharp
    large = np.full((512, 256, 3), (0, 0, 255), np.uint8)  # shrunk, proportions kept
    path = tmp_path / "samples" / "000007.png"
    captions = ["a red half", "a very long caption " * 20, "☃ naïve\nsecond line"] * 3 + [""]
    run_folder.grid(str(path), [small, large, small] * 3 + [small], captions)
    sheet = np.asarray(Image.open(path))
    height = sheet.shape[0] - 6
    assert height % 2 == 0 and sheet.shape[1] == 8 * 134 + 6  # 10 pictures: two rows of 8 columns
    for row, column in ((0, 0), (0, 2), (1, 1)):
        x, y = 6 + 134 * column, 6 + height // 2 * row
        assert (sheet[y + 1 : y + 127, x + 1 : x + 64] == (255, 0, 0)).all()
        assert (sheet[y + 1 : y + 127, x + 64 : x + 127] == 0).all()
        assert (sheet[y + 130 : y + height // 2 - 6, x : x + 128] < 128).any() == (row == 0)  # its caption, if any
    assert (sheet[7:133, 141:203] == (0, 0, 255)).all() and (sheet[7:133, 206:260] == 255).all()
    assert (sheet[6 + height // 2 :, 6 + 2 * 134 :] == 255).all()  # nothing where there is no picture
    assert [p.name for p in path.parent.iterdir()] == ["000007.png"]
    run_folder.grid(str(path), [small], ["one"])
    assert Image.open(path).width == 140


def test_curves_draws_a_panel_for_what_was_logged(tmp_path):
    run_folder.curves(tmp_path, ["reward"])
    assert not (tmp_path / "curves.png").exists()  # nothing to draw yet
    for iteration in range(30):
        row = {"iteration": iteration, "reward": math.sin(iteration), "kl": math.nan, "loss": 1.0 / (1 + iteration)}
        run_folder.append(tmp_path, row | ({"eval_reward": 0.5} if iteration % 10 == 0 else {}))

    def width(names):
        run_folder.curves(tmp_path, names)
        picture = Image.open(tmp_path / "curves.png")
        return picture.width, len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))

    one, colours_of_one = width([["reward", "missing"], "kl"])  # kl is nowhere finite: no panel
    assert one == 396 and width(["loss", "reward"])[0] == 2 * one
    shared, colours_of_two = width([["reward", "eval_reward"]])
    assert shared == one and colours_of_two > colours_of_one  # two lines in one panel
    assert width(["loss", "reward", "eval_reward", "loss", "reward"])[0] == 4 * one
    assert not (tmp_path / ".curves.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# arguments


def resumed(run, *argv):
    args = run_folder.command_line(Args(), ["--resume", str(run), *argv], "flow_grpo.py")
    return args


def test_resumed_run_has_the_arguments_it_had(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # --track asks for a login otherwise
    script = tmp_path / "script.py"
    script.write_text("pass")
    run = str(tmp_path / "run")
    first = Args(reward=("shapes:0.7", "jpeg"), out=run, num_iterations=7, kl_coef=1e-3, compile=True)
    run_folder.create(run, first, str(script))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["args.json", "checkpoints", "samples", "script.py"]

    assert resumed(run) == replace(first, resume=run)
    assert resumed(run + "/") == replace(first, resume=run)
    # A default on the command line is a wish like any other; the same value again is none.
    assert resumed(run, "--num-iterations", "200").num_iterations == 200
    assert resumed(run, "--num_iterations=9", "--kl-coef", "0.001", "--track") == replace(
        first, num_iterations=9, track=True, resume=run
    )
    assert resumed(run, "--reward", "shapes:0.7", "jpeg") == replace(first, resume=run)
    for argv, message in (
        (["--kl-coef", "0.0"], "--kl-coef is 0.001 in that run and cannot become 0.0"),
        (["--kl_coef=0.5"], "--kl-coef is 0.001 in that run and cannot become 0.5"),
        (["--no-compile"], "--compile is True in that run and cannot become False"),
        (["--reward", "jpeg"], "--reward is ['shapes:0.7', 'jpeg'] in that run and cannot become ['jpeg']"),
        (["--model", "flux"], "--model is tiny-flux in that run and cannot become flux"),
    ):
        with pytest.raises(SystemExit) as error:
            resumed(run, *argv)
        assert message in str(error.value) and "only --num-iterations, --eval-every" in str(error.value)
        assert "\n" not in str(error.value)


def test_what_cannot_be_resumed_is_one_message(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "args.json").write_text('{"model": ')
    for run, message in (
        (tmp_path / "nowhere", "no args.json there; expected the folder of an earlier run"),
        (tmp_path / "empty", "no args.json there; expected the folder of an earlier run"),
        (tmp_path / "damaged", "args.json is damaged"),
    ):
        with pytest.raises(SystemExit) as error:
            resumed(run)
        assert str(error.value).startswith(f"error: --resume {run}: ") and message in str(error.value)


def test_a_new_run_takes_no_folder_of_another(tmp_path):
    script = tmp_path / "my_idea.py"
    script.write_text("pass")
    args = run_folder.command_line(Args(), [], str(script))
    assert args.out.startswith("outputs/my_idea-2") and args == replace(Args(), out=args.out)
    run = str(tmp_path / "run")
    args = run_folder.command_line(Args(), ["--out", run, "--num-iterations", "3"], str(script))
    assert args == Args(out=run, num_iterations=3)
    run_folder.create(run, args, str(script))
    # Its checkpoints would be mistaken for the new run's.
    with pytest.raises(SystemExit, match=f"--out {run} holds a run .*--resume {run}"):
        run_folder.command_line(Args(), ["--out", run], str(script))
    assert resumed(run).num_iterations == 3


@dataclass
class Grouped:
    # Run
    model: str = "tiny-flux"
    """the model
    that is trained"""
    # not a group: it opens no block
    reward: tuple[str, ...] = ("shapes", "jpeg:0.1")
    """rewards"""

    # Text sampling
    temperature: float = 1.0
    """of the texts"""
    window: tuple[int, int] = (0, 3)
    task: Literal["text", "t2i"] = "text"
    """who does what"""

    # Two lines are a remark,
    # and no group either.
    compile: bool = True
    """compile"""

    # Run
    learning_rate: float = 1e-4
    """step"""


def test_parse_fills_in_what_is_given():
    start = Grouped(model="flux", window=(1, 2))
    for argv, given in (
        ("", {}),
        ("--learning_rate 3e-5 --no-compile", dict(learning_rate=3e-5, compile=False)),
        ("--learning-rate=1 --task t2i --window 4 5", dict(learning_rate=1.0, task="t2i", window=(4, 5))),
        ("--no-compile --compile --reward a b:2 c", dict(reward=("a", "b:2", "c"))),
        ("--reward", dict(reward=())),
    ):
        args = run_folder.parse(start, argv.split(), "script.py")
        assert type(args) is Grouped and args == replace(start, **given), argv
    assert start == Grouped(model="flux", window=(1, 2))


def test_parse_refuses_with_code_2(capsys):
    for argv, message in (
        ("--temperatur 3", "--temperature"),
        ("--temperature hot", "--temperature"),
        ("--task i2i", "'text', 't2i'"),
        ("--window 1", "--window"),
        ("--run.model flux", "--run.model"),
        ("--group-0.model flux", "--group-0.model"),
        ("flux", "flux"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_folder.parse(Grouped(), argv.split(), "script.py")
        shown = capsys.readouterr()
        assert stopped.value.code == 2 and message in shown.err and not shown.out, argv


def test_help_has_the_groups_of_the_class(capsys, monkeypatch):
    assert run_folder.documented(Grouped) == {
        "model": ("run", "the model that is trained"),
        "reward": ("run", "rewards"),
        "temperature": ("text sampling", "of the texts"),
        "window": ("text sampling", None),
        "task": ("text sampling", "who does what"),
        "compile": ("text sampling", "compile"),
        "learning_rate": ("run", "step"),
    }
    assert {title for title, _ in run_folder.documented(Args).values()} == {""}  # no comment: no group
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        run_folder.parse(Grouped(window=(7, 8)), ["--help"], "script.py")
    assert stopped.value.code == 0
    # With a frame, or without one where the output is not UTF-8.
    shown = re.findall(r"(?m)^(?:╭─)? ((?:[a-z ]+ )?options)\b|^(?:│ |  )--([a-z-]+)", capsys.readouterr().out)
    boxes = ["options", "run options", "text sampling options"]
    flags = [[], ["model", "reward", "learning-rate"], ["temperature", "window", "task", "compile"]]
    assert shown == [pair for box, names in zip(boxes, flags) for pair in [(box, ""), *(("", n) for n in names)]]


def test_given_flags_in_every_spelling():
    argv = ["--kl-coef", "0.1", "--num_iterations=3", "--no-compile", "--reward", "jpeg", "model", "-h", "--mode", "x"]
    assert run_folder.given_flags(Args(), argv) == {"kl_coef", "num_iterations", "compile", "reward"}
    assert run_folder.given_flags(Args(), []) == set()


def test_peek_reads_one_flag_before_the_others(tmp_path):
    assert run_folder.peek([], "--model", "tiny-flux") == "tiny-flux"
    assert run_folder.peek(["--seed", "3", "--model", "flux"], "--model", "tiny-flux") == "flux"
    assert run_folder.peek(["--model=flux", "--seed", "3"], "--model", "tiny-flux") == "flux"
    assert run_folder.peek(["--models", "flux"], "--model", "tiny-flux") == "tiny-flux"
    assert run_folder.peek(["--model"], "--model", "tiny-flux") == ""
    (tmp_path / "args.json").write_text('{"model": "mine/flux"}')
    for argv in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"], ["--seed", "1", "--resume", f"{tmp_path}/"]):
        assert run_folder.peek(argv, "--model", "tiny-flux") == "mine/flux"
    assert run_folder.peek(["--resume", str(tmp_path / "nowhere")], "--model", "tiny-flux") == "tiny-flux"
    (tmp_path / "args.json").write_text("{")
    assert run_folder.peek(["--resume", str(tmp_path)], "--model", "tiny-flux") == "tiny-flux"
