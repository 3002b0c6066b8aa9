"""What a user meets first: the commands of the README, their help, and one clear message for whatever is wrong."""

import ast
import json
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import processes
import pytest
import torch

import dance_grpo
import flow_grpo
import grpo_unified
import infer
import pretrain
import remax
import rloo
from models import parallel, run_folder

ROOT = Path(flow_grpo.__file__).parent
SCRIPTS = [flow_grpo, dance_grpo, grpo_unified, rloo, remax, pretrain]
TINY = (
    "--num-prompts 2 --group-size 4 --micro-batch-size 4 --num-steps 3 --eval-num-steps 2 --eval-size 4 --eval-every 2"
)
TINY = [*TINY.split(), "--save-every", "1", "--window-size", "0", "--window-range", "0", "0"]


def launch(folder, *argv):
    """`python flow_grpo.py ...` in another folder, as a user would, with no network and nothing in the cache."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "flow_grpo.py"), *argv]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(module, argv):
    """What the script's last lines do."""
    before, sys.argv = sys.argv, [f"{module}.py", *argv]
    try:
        runpy.run_path(str(ROOT / f"{module}.py"), run_name="__main__")
    finally:
        sys.argv = before


def refusals(module, commands):
    """The message with which each command line ends."""
    messages = []
    for argv in commands:
        try:
            call(module, argv)
            messages.append("no error")
        except SystemExit as error:
            messages.append(str(error.code))
    return messages


def test_command_line_trains_and_says_what_is_missing(tmp_path):
    (tmp_path / "offline").mkdir()
    run = launch(tmp_path, "--num-iterations", "2", *TINY)
    flux = launch(tmp_path / "offline", "--model", "flux", "--reward", "jpeg")

    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err[-3000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert re.fullmatch(r"flow_grpo-\d{8}-\d{6}-\d+", folder.name) and f"wrote outputs/{folder.name}: curves.png" in out
    assert (folder / "flow_grpo.py").read_bytes() == (ROOT / "flow_grpo.py").read_bytes()
    assert json.loads((folder / "args.json").read_text())["num_prompts"] == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[1]["on_policy_err"] == 0.0
    known = {".json", ".jsonl", ".md", ".py", ".png", ".safetensors"}  # no pickle, nothing half-written
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == known and not any(p.name.startswith(".") for p in files)
    names = {str(p.relative_to(folder)) for p in files}
    assert {"curves.png", "samples/000000.png", "samples/000002.png", "model/model_index.json"} <= names
    assert [name for name in names if name.endswith(".md")] == ["model/README.md"]
    assert "checkpoints/000002/rank-00000.safetensors" in names and "checkpoints/000000/index.json" not in names

    out, err = flux.communicate(timeout=60)
    assert flux.returncode == 1 and "Traceback" not in err and not (tmp_path / "offline" / "outputs").exists()
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (
        "'black-forest-labs/FLUX.1-dev'" in message and "https://huggingface.co/black-forest-labs/FLUX.1-dev" in message
    )
    assert "`hf auth login`" in message and err.rstrip().endswith(message)


def test_wrong_flow_grpo_flags_are_one_message(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": 3}\n')
    (tmp_path / "one.txt").write_text("a red circle\n")
    (tmp_path / "folder").mkdir()
    cases = [
        (
            ["--model", "tiny-fluks"],
            "unknown model 'tiny-fluks', did you mean tiny-flux?: expected one of flux, kontext",
        ),
        (
            ["--model", "unknwon", "--reward", "jpeg"],
            "unknown model 'unknwon': expected one of flux, kontext, klein, sd3, sd3.5, sana, tiny-flux, ",
        ),
        (["--model", str(tmp_path / "folder")], "no model_index.json; expected a folder in diffusers layout"),
        (["--reward", "shape"], "unknown reward 'shape', did you mean 'shapes'? (known: shapes, jpeg, "),
        (["--reward", "jpeg", "jpeg:2"], "there is already a reward 'jpeg'"),
        (["--prompts", str(tmp_path / "two.txt"), "--eval-prompts", "shapes"], "shapes reward, prompt None: metadata"),
        (["--eval-prompts", str(tmp_path / "two.txt")], "shapes reward, prompt None: metadata 'include': expected a"),
        (["--reward", "jpeg:much"], "the weight 'much' is not a finite number"),
        (["--micro-batch-size", "3"], "--micro-batch-size 3 must divide the 8 samples of --num-prompts x --group-size"),
        (["--num-updates", "3"], "whose number --num-updates 3 divides"),
        (["--group-size", "1", "--micro-batch-size", "1"], "--group-size must be at least 2"),
        (["--noise-level", "0"], "--noise-level positive"),
        (["--image-guidance", "1.5"], "--image-guidance 1.5: --model tiny-flux has none, only unified models"),
        (["--sigma-schedule", "single"], "--sigma-schedule single: only sd3 models have one"),
        (["--prompts", "shapes-edit"], "--prompts have images and --model makes pictures from text"),
        (["--model", "tiny-kontext", "--prompts", "shapes"], "--model edits pictures and --prompts have none"),
        (["--window-size", "3"], "--window-size 3 --window-range 0 2 --num-steps 3: the window must fit"),
        (["--window-range", "1", "3"], "--window-range 1 3 --num-steps 3: the window must fit"),
        (["--num-steps", "1"], "--num-steps 1: the window must fit"),
        (["--eval-every", "0"], "--eval-every --save-every must be at least 1"),
        (["--micro-batch-size", "0"], "must be at least 1"),
        (["--resolution", "36"], "--resolution: 36 x 36 is not a multiple of"),
        (["--prompts", str(tmp_path / "none.txt")], "none.txt: no such file; --prompts takes"),
        (["--prompts", str(tmp_path / "empty.txt")], "empty.txt: expected at least one prompt, got an empty file"),
        (["--prompts", str(tmp_path / "bad.jsonl")], "bad.jsonl:2: expected the prompt to be text, got 3"),
        (["--prompts", str(tmp_path / "one.txt"), "--eval-prompts", ""], "one.txt: the eval split is empty"),
        (["--eval-prompts", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        (
            ["--prompts", str(tmp_path / "one.txt"), "--eval-prompts", str(tmp_path / "two.txt")],
            "one.txt: the train split is empty, all of its prompts are also in",
        ),
        (["--resume", str(tmp_path / "folder")], "folder: no args.json there; expected the folder of an earlier run"),
    ]
    run = str(tmp_path / "run")
    commands = [[*TINY, "--out", run, *argv] for argv, _ in cases]
    (messages,) = processes.run(refusals, "flow_grpo", commands)
    for (argv, expected), message in zip(cases, messages):
        assert message.startswith("error: ") and expected in message, (argv, message)
        assert message.count("\n") <= 1 and len(message) < 400, message
    assert not os.path.exists(run)  # all found before there is a run


def test_wrong_pretrain_flags_are_one_message(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"prompt": "picture {n}"}}\n' for n in range(40)))
    tiny = ["--batch-size", "4", "--micro-batch-size", "4", "--eval-size", "4", "--out", str(tmp_path / "run")]
    cases = [
        (["--micro-batch-size", "3"], "--micro-batch-size 3 must divide --batch-size 4"),
        (["--save-every", "0"], "--save-every must be at least 1"),
        (["--reward", "shap"], "unknown reward 'shap', did you mean 'shapes'?"),
        (["--model", "tiny"], "unknown model 'tiny'"),
        (["--resolution", "31"], "--resolution: 31 x 31 is not a multiple of"),
        (["--data", str(tmp_path / "none.parquet"), "--edit-data", ""], "none.parquet: no such file"),
        (["--data", str(tmp_path / "texts.jsonl"), "--edit-data", ""], "expected a picture, got none"),
    ]
    (messages,) = processes.run(refusals, "pretrain", [[*tiny, *argv] for argv, _ in cases])
    for (argv, expected), message in zip(cases, messages):
        assert message.startswith("error: ") and expected in message and "\n" not in message, (argv, message)


def run_out_of_memory(module, argv):
    """main, with no more memory than what is in use after the imports and some 700 MB, as in a small container."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    without = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20, without[1]))
    try:
        call(module, argv)
    finally:  # what brings the error to the test takes memory, too
        resource.setrlimit(resource.RLIMIT_AS, without)


@pytest.mark.parametrize(
    "module, flags", [("flow_grpo", TINY), ("pretrain", ["--batch-size", "4", "--eval-size", "4"])]
)
def test_out_of_memory_names_the_flags_that_help(tmp_path, module, flags):
    argv = [*flags, "--micro-batch-size", "4", "--resolution", "1024", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as error:
        processes.run(run_out_of_memory, module, argv)
    message = error.value.code
    assert re.match(r"error: rank 0 is out of memory: .*(allocate|alloc)", message) and message.count("\n") == 1
    flags = "--micro-batch-size --resolution --checkpoint-activations --lora-rank --offload-encoders --cpu-offload"
    for flag in flags.split():
        assert flag in message and flag.removeprefix("--").replace("-", "_") in {f.name for f in fields(flow_grpo.Args)}


def test_only_memory_errors_are_taken_for_memory_errors():
    for guard in (parallel.clear_memory_errors, parallel.clear_errors):
        for error in (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            MemoryError("Unable to allocate 1. TiB"),
        ):
            # clear_errors lets them through: clear_memory_errors is around all of main, and says more.
            expected = SystemExit if guard is parallel.clear_memory_errors else type(error)
            with pytest.raises(expected, match=re.escape(str(error).splitlines()[0])), guard():
                raise error
    with pytest.raises(RuntimeError, match="^mat1 and mat2"), parallel.clear_memory_errors():
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(SystemExit, match="^error: mat1 and mat2"), parallel.clear_errors():
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(SystemExit, match="can't allocate memory|not enough memory"), parallel.clear_memory_errors():
        torch.empty(2**60, dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# the scripts' text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_is_read_and_explained(script, capsys):
    tree = ast.parse(Path(script.__file__).read_text())
    read = {
        node.attr
        for function in tree.body
        if isinstance(function, ast.FunctionDef) and function.name != "recipe"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    names = [field.name for field in fields(script.Args)]
    assert read - {"dry_run"} == set(names) - {"dry_run"}
    (arguments,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    for field, text in zip(arguments.body[::2], arguments.body[1::2], strict=True):  # one docstring below each field
        assert isinstance(field, ast.AnnAssign) and isinstance(text.value.value, str), ast.unparse(field)

    with pytest.raises(SystemExit) as stopped:
        run_folder.command_line(script.Args(), ["--help"], script.__file__)
    assert stopped.value.code == 0
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)  # tyro wraps lines and draws a frame
    for name, text in zip(names, arguments.body[1::2]):
        assert f"--{name.replace('_', '-')}" in shown
        assert " ".join(text.value.value.split())[:40] in shown, name
    assert shown.count("(default: ") >= len(names) - 1 and f"(default: {script.Args().num_iterations})" in shown
    assert "out/" not in shown and "REQUIRED" not in shown.upper()


@pytest.mark.parametrize("script", [*SCRIPTS, infer], ids=lambda script: script.__name__)
def test_help_has_every_flag_in_one_group_with_text_and_default(script, capsys, monkeypatch):
    lines = Path(script.__file__).read_text().splitlines()
    (arguments,) = [node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "Args"]
    expected, texts = {}, {}  # group -> its flags, in the order of the class
    for field, below in zip(arguments.body[::2], arguments.body[1::2], strict=True):
        title = re.fullmatch(r"    # ([A-Z][a-z]*( [a-z]+)*)", lines[field.lineno - 2])
        if title:
            assert lines[field.lineno - 3] == "" or lines[field.lineno - 3] == "class Args:"
            group = expected.setdefault(f"{title[1].lower()} options", [])
        name = field.target.id
        group.append(name.replace("_", "-"))
        value = getattr(script.Args(), name)
        value = " ".join(shlex.quote(str(v)) for v in (value if isinstance(value, tuple) else (value,)))
        texts[group[-1]] = f"{below.value.value} (default: {value})"
    usual = {"run options", "optimizer options", "evaluation and saving options", "machine options"}
    assert usual <= set(expected) or script is infer and list(expected)[0] == "run options"

    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run_folder.command_line(script.Args(), ["--help"], script.__file__)
    shown, helped = {}, {}
    for line in capsys.readouterr().out.splitlines():
        line = re.sub("[╭╮╰╯│]", " ", line.replace("─", " "))
        if title := re.fullmatch(r" {1,3}(([a-z ]+ )?options) *", line):
            group = shown.setdefault(title[1], [])
            text = []
        elif flag := re.match(r"  --([a-z0-9-]+)", line):
            group.append(flag[1])
            text = helped[flag[1]] = [line]
        elif line.startswith("   ") and line.strip(" -"):
            text.append(line)
    assert shown.pop("options") == []  # -h alone
    assert list(shown.items()) == list(expected.items())
    for flag, text in texts.items():  # the whole of it; lines are broken anywhere between words
        assert "".join(helped[flag]).replace(" ", "").endswith(re.sub(r"\s", "", text)), flag


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_flags_in_every_spelling_and_misspelt(script, capsys):
    def parsed(*argv):
        return run_folder.parse(script.Args(), argv, script.__file__)

    assert parsed("--lora_rank", "4", "--learning-rate=1e-3", "--no-compile", "--checkpoint_activations") == replace(
        script.Args(), lora_rank=4, learning_rate=1e-3, compile=False, checkpoint_activations=True
    )
    assert parsed("--no-keep-unsharded", "--cpu-offload", "--no_cpu_offload", "--seed", "-1") == replace(
        script.Args(), keep_unsharded=False, seed=-1
    )
    if script is not pretrain:
        assert parsed("--reward", "a", "b:2").reward == ("a", "b:2")
    if hasattr(script.Args(), "window_range"):
        assert parsed("--window-range", "1", "2").window_range == (1, 2)
    for wrong, right in (
        ("--learning-rat", "--learning-rate"),
        ("--eval_evry=3", "--eval-every"),
        ("--dont-compile", "--compile"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parsed(*([wrong] if "=" in wrong else [wrong, "3"]))
        message = capsys.readouterr()
        assert stopped.value.code == 2 and not message.out
        assert re.search(rf"(?s)Perhaps you meant:.* {right}\b", message.err), message.err


@pytest.mark.parametrize("script", [*SCRIPTS, infer], ids=lambda script: script.__name__)
def test_shell_completes_flags_and_choices(script, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        call(script.__name__, ["--tyro-print-completion", "bash"])
    assert not stopped.value.code
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    for typed, offered in (
        (["--temp"], {"--temperature"}) if script is infer else (["--learning-r"], {"--learning-rate"}),
        (["--dtype", ""], {"fp32", "bf16"} | ({"auto"} if script is infer else set())),
        (["--seed", "3", "--no-em"], {"--no-ema"}) if script is infer else (["--no-comp"], {"--no-compile"}),
        (["--"], {f"--{field.name.replace('_', '-')}" for field in fields(script.Args)}),
    ):
        words = shlex.join([f"{script.__name__}.py", *typed])
        ask = f"source completion; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _tyro_{script.__name__}_py"
        command = ["bash", "-c", f'{ask}; printf "%s\n" "${{COMPREPLY[@]}}"']
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        found = set(done.stdout.split())
        assert offered <= found if typed == ["--"] else offered == found, (typed, done)


@pytest.mark.parametrize("script", [*SCRIPTS, infer], ids=lambda script: script.__name__)
def test_scripts_stand_alone(script):
    names = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(Path(script.__file__).read_text())):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not names & {name.split(".")[0] for name in imported}, ast.unparse(node)


def test_repository_has_no_pickle():
    folders = ("models", "rewards", "kernels", "data")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Import, ast.ImportFrom)) else ""
            # Published reward models come as .pt and .pth: read as tensors and nothing else.
            if text == "torch.load" and path.parent.name == "rewards":
                calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
                loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
                assert loads and all("weights_only=True" in map(ast.unparse, call.keywords) for call in loads), path
                continue
            assert not re.search(r"\btorch\.(save|load)$|\bpickle\b|\bjoblib\b|\bdill\b|allow_pickle", text), (
                path,
                text,
            )
