"""README.md and docs/: commands and Python run, diffs apply, numbers are those of the results.

A command is found in a block (fenced, or indented by four spaces) or in `code` that begins like one. What becomes of it
is in COMMANDS: it runs on the tiny models with the sizes of SMALL; or, where it needs GPUs, weights or a network, its
flags are parsed with the recipe that it names, and the text has to say what it needs. With `-m slow` the latter run
too, with SUBSTITUTES for what they need, and so does every --dry-run. A command that no row knows fails, as does a
number with a decimal point in the README, recipes.md or how_to.md that no row of NUMBERS compares with its source."""

import difflib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import rewards
from models import parallel, run_folder

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
DIFFUSION, LANGUAGE = ("flow_grpo", "dance_grpo"), ("rloo", "remax")
SCRIPTS = (*DIFFUSION, *LANGUAGE, "grpo_unified", "pretrain", "infer", "my_idea")
OURS = ("models", "rewards", "kernels", "data", *SCRIPTS)  # modules; a process takes its folder's own

SMALL = {
    "flow_grpo": "--num-iterations 1 --num-prompts 2 --group-size 4 --micro-batch-size 4 --num-steps 3 "
    "--eval-num-steps 2 --eval-size 4 --eval-every 1 --save-every 1 --window-size 0 --window-range 0 0",
    "dance_grpo": "--num-iterations 1 --num-prompts 2 --group-size 4 --micro-batch-size 4 --num-steps 4 "
    "--eval-num-steps 2 --eval-size 4 --eval-every 1 --save-every 1",
    "grpo_unified": "--num-iterations 1 --num-prompts 2 --group-size 4 --micro-batch-size 8 --lm-micro-batch-size 8 "
    "--num-steps 3 --eval-num-steps 2 --eval-size 4 --eval-every 1 --save-every 1 --window-size 0 --window-range 0 0",
    "rloo": "--num-iterations 1 --num-prompts 4 --micro-batch-size 4 --eval-size 4 --eval-every 1 --save-every 1",
    "remax": "--num-iterations 1 --num-prompts 4 --micro-batch-size 4 --eval-size 4 --eval-every 1 --save-every 1",
    "pretrain": "--num-iterations 1 --batch-size 4 --micro-batch-size 4 --noise-levels 1 --eval-size 4 --num-steps 2 "
    "--eval-every 1 --save-every 1",
    "infer": "--num-steps 2 --batch-size 4",
}
SMALL["my_idea"] = SMALL["flow_grpo"]
PLACEHOLDER = re.compile(r"outputs/(\w+)-(?:<time>|\.\.\.|20260101-120000)|outputs/<run>")  # of a run that is there

# What a command needs, and the words by which its line, or the text before its block, must say so.
GPUS = r"GPU|80 GB|nproc_per_node|sbatch"
HUB = r"hub|weights|licence|network|fetches|the real thing|GSM8K|what to do first|upstream"
NEEDS = {
    "gpus": GPUS,
    "hub": HUB,
    "long": r"minute|seconds|quarter|hour|3 seeds|takes|on 4 CPU cores|fresh clone|itself|not been run",
    "": "",
}

# (regular expression of the whole command, what becomes of it, what it needs or why). The first row that fits counts.
#   run    in a folder of its own with the sizes of SMALL
#   parse  flags and recipe; run with SUBSTITUTES if slow
#   dry    --dry-run, which needs nothing: if slow, and its number in recipes.md or how_to.md is compared
#   not    not run, for the reason given, which the text must let its reader expect
FILE = r"(?:flow_grpo|dance_grpo|grpo_unified|rloo|remax|pretrain|infer|my_idea)\.py"
LARGE = r"(?:flux|kontext|klein|sd3|sd3\.5|sana|blip3o|metaquery|qwen[\d.]+-\S+)"
BIG = rf"(?= )(?=.* (?:--model|--lm|--compare) (?:\S+ )?{LARGE}(?: |$)|.* hub:|.* --rollout vllm).*"
COMMANDS = [
    (rf"python {FILE} .*--model (?:sd3\.5|klein|sana) --dry-run", "parse", "hub"),  # reads configs of the hub
    (rf"(?:python|torchrun --nproc_per_node 8) {FILE} .*--dry-run", "dry", ""),
    (rf"torchrun --nn?odes.* {FILE} .*", "parse", "gpus"),
    (rf"torchrun --nproc_per_node \S+ {FILE}.*", "parse", "gpus"),
    (r"python pretrain\.py --model tiny-metaquery-start", "parse", "long"),  # 10 s even when small
    (r"python flow_grpo\.py --reward http://\S+.*", "parse", "hub"),  # with rewards: tests/test_remote_run.py
    (r"python flow_grpo\.py --reward jpeg shapes:1e-6 .*", "run", ""),  # and slow: test_hacked_reward
    (rf"python {FILE} .*--push .*", "parse", "hub"),
    (rf"python {FILE}.* --help", "run", ""),
    (rf"python {FILE}{BIG}", "parse", "hub|gpus"),
    (rf"python {FILE}.*", "run", ""),
    (r"python -m rewards", "run", ""),
    (r"python -m rewards score --reward (?:ocr|brightness) .*", "run", ""),
    (r"python -m rewards fetch \S+", "not", "hub"),
    (r"(?:REWARD_TOKEN=\S+ )?python -m rewards\.serve --reward .*", "not", "hub"),  # tests/test_reward_server.py
    (r"vllm serve \S+.*", "not", "gpus"),  # another program
    (r"cp flow_grpo\.py my_idea\.py", "run", ""),
    (r"\$EDITOR my_idea\.py", "run", ""),  # docs/how_to.md's diff is applied
    (r"pip install -r requirements\.txt", "not", "anything"),  # what is installed: test_requirements_are_met
    (r"pip install (?:--no-build-isolation -r requirements-gpu\.txt|\"?vllm\S+)", "not", "anything"),
    (r"python -m pytest(?: -m slow)?", "not", "anything"),  # this
    (r"bash benchmarks/gpu\.sh", "not", "gpus"),
    (r"(?:bash )?runs/(?:\w+)\.sh.*", "not", "long|gpus"),
    (r"hf auth login|wandb login|wandb sync", "not", "hub|account"),
    (r"python benchmarks/\S+\.py.*", "not", "long"),
]
NEEDS |= {
    "hub|gpus": f"{HUB}|{GPUS}",
    "long|gpus": f"{NEEDS['long']}|{GPUS}",
    "anything": "",
    "hub|account": f"{HUB}|Gated|model's page|disk|project",
}

# First lines of blocks that are no commands.
LISTINGS = [
    r"outputs/flow_grpo-<time>/",
    r"flow_grpo\.py dance_grpo\.py  .*",
    r"outputs/infer-<time>/",
    r"infer\.py .*",
]
# Beside them, scripts of bash whose text is checked as a whole, by first line.
SCRIPT_BLOCKS = {
    "#!/bin/bash": "sbatch",
    "python flow_grpo.py --tyro-write-completion bash ~/.flow_grpo.bash": "completion",
}

SUBSTITUTES = {  # of a slow run of a command that needs more than a CPU
    **{name: f"tiny-{name}" for name in ("flux", "kontext", "klein", "sana", "blip3o")},
    **{"sd3": "tiny-sd3", "sd3.5": "tiny-sd3", "metaquery": "tiny-metaquery-start"},
    **{
        "qwen2.5-0.5b": "tiny-qwen",
        "qwen2.5-3b": "tiny-qwen",
        "qwen2.5-7b": "tiny-qwen",
        "qwen2.5-vl-3b": "tiny-qwen-vl",
    },
    **{
        "pickscore": "jpeg_incompressibility",
        "hpsv2.1": "jpeg",
        "geneval": "shapes",
        "editreward": "psnr",
        "vlm_judge": "shapes",
    },
}


# ----------------------------------------------------------------------------------------------------------------------
# Reading a page


class Block:
    """Lines of one block of a page: `kind` is its language, "" for one that is indented; `before` what the page says
    ahead of it, from the last heading on."""

    def __init__(self, page, kind, lines, before):
        self.page, self.kind, self.lines, self.before = page, kind, lines, before


def blocks(page):
    found, lines, before = [], (ROOT / page).read_text().splitlines(), []
    i = 0
    while i < len(lines):
        if fence := re.match(r"```(\w*)$", lines[i]):
            end = i + 1 + lines[i + 1 :].index("```")
            found.append(Block(page, fence[1] or "text", lines[i + 1 : end], "\n".join(before)))
            i = end + 1
        elif lines[i].startswith("    ") and lines[i].strip() and (i == 0 or not lines[i - 1].strip()):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block(page, "", [line[4:] for line in lines[i:end] if line.strip()], "\n".join(before)))
            i = end
        else:
            before = [lines[i]] if lines[i].startswith("#") else [*before, lines[i]]
            i += 1
    return found


def prose(page):
    """The text of a page on one line: without blocks, code, addresses."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\n)\n(?:    .*\n)+", "\n", text)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "`", text))
    return re.sub(r"\s+", " ", text)


class Command:
    def __init__(self, page, text, said):
        self.page, self.text, self.said = page, text, said  # said: its comment and what stands before it
        rows = [row for row in COMMANDS if re.fullmatch(row[0], text)]
        _, self.how, self.needs = rows[0] if rows else (None, "unknown", "")

    def __repr__(self):
        return f"{self.page}: {self.text}"


def split(line):
    """(commands, comment) of a line of shell."""
    quote, command, comment = "", line, ""
    for n, letter in enumerate(line):
        if letter in "\"'" and quote in ("", letter):
            quote = "" if quote else letter
        elif letter == "#" and not quote and (n == 0 or line[n - 1].isspace()):
            command, comment = line[:n], line[n + 1 :]
            break
    return [part.strip() for part in command.split("&&") if part.strip()], comment


def commands():
    found = []
    for page in PAGES:
        for block in blocks(page):
            first = block.lines[0].strip()
            if block.kind in ("python", "diff") or first in SCRIPT_BLOCKS:
                continue
            if any(re.fullmatch(pattern, first) for pattern in LISTINGS):
                continue
            joined = re.sub(r"\\\n\s*", "", "\n".join(block.lines)).split("\n")
            for n, line in enumerate(joined):
                said = "\n".join([block.before, *joined[: n + 1]])
                found += [Command(page, re.sub(r"\s+", " ", part), said) for part in split(line)[0]]
        text = (ROOT / page).read_text()
        text = re.sub(r"^```.*?^```$|(?<=\n\n)(?:    [^\n]*\n)+", "", text, flags=re.MULTILINE | re.DOTALL)
        for paragraph in re.split(r"\n\s*\n|\n(?=\d\. |- )", text):
            for code in re.findall(r"`([^`]+)`", paragraph):
                code = re.sub(r"\s+", " ", code)
                for part in split(code)[0]:
                    if re.match(r"(?:python|pip|bash|hf|wandb|cp|vllm serve) \S|torchrun .*\.py|runs/\w+\.sh", part):
                        found.append(Command(page, part, paragraph))
    return found


ALL = commands()


def of(how):
    """The commands of one kind, every text once."""
    return list({command.text: command for command in ALL if command.how == how}.values())


def words(command):
    """Script and flags of `python x.py ...` or `torchrun ... x.py ...`."""
    argv = shlex.split(PLACEHOLDER.sub(lambda m: f"outputs/{m[1] or 'flow_grpo'}-first", command))
    (at,) = [n for n, word in enumerate(argv) if re.fullmatch(FILE, word)]
    return argv[at].removesuffix(".py"), argv[at + 1 :]


def parsed(script, argv):
    """Args of a command line over the recipe that it chooses."""
    module = importlib.import_module({"my_idea": "flow_grpo"}.get(script, script))
    usual = module.Args()

    def peek(flag, default=None):
        name = flag.removeprefix("--").replace("-", "_")
        return str(run_folder.peek(argv, flag, getattr(usual, name) if default is None else default))

    if script == "infer":
        import tyro

        return tyro.cli(module.Args, args=argv)
    names = [peek("--lm" if script in LANGUAGE else "--model")]
    names += [
        peek(flag, "") for flag in {"dance_grpo": ["--lora-rank"], "grpo_unified": ["--lm", "--task"]}.get(script, [])
    ]
    return run_folder.parse(module.recipe(*names), argv, f"{script}.py")


def with_flags(argv, flags):
    """The flags of a command line, with others in the place of those that have the same name."""
    changed, skipping = [], False
    names = {word for word in flags if word.startswith("--")}
    for word in argv:
        if word.startswith("--"):
            skipping = word in names
        if not skipping:
            changed.append(word)
    return [*changed, *flags]


# ----------------------------------------------------------------------------------------------------------------------
# Running


def call(folder, argv, environment):
    """`python <argv>` in a folder that has copies of our code, in a process that has imported torch: what it prints."""
    os.chdir(folder)
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", HF_HOME=str(Path(folder, "cache")), **environment)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            if argv[0] == "-m":
                sys.argv = argv[1:]
                runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = argv
                runpy.run_path(str(Path(folder, argv[0])), run_name="__main__")
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise
    return out.getvalue()


def python(folder, *argv, **environment):
    (printed,) = processes.run(call, str(folder), [str(word) for word in argv], environment)
    return printed


def small(folder, command, extra=()):
    """Runs a command of a page with the sizes of SMALL and, unless it names its --out, a folder of its own."""
    script, argv = words(command)
    if {"--help", "--dry-run", "--report"} & set(argv) or "--tyro-" in command:
        return python(folder, f"{script}.py", *argv)
    flags = SMALL[script].split()
    if script in LANGUAGE and "--group-size" in argv:
        flags = with_flags(flags, ["--num-prompts", "2"])
    if script == "infer":
        flags = [] if "--mode text" in command else flags[:2]
        flags += ["--max-prompts", "2"] if "--prompts" in argv else []
    out = [] if "--out" in [*argv, *extra] else ["--out", f"outputs/{script}-{len(list(folder.glob('outputs/*')))}"]
    return python(folder, f"{script}.py", *with_flags(argv, [*flags, *out, *extra]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a fresh clone has, without outputs/. Files that the pages change are copies."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("models", "kernels", "data", "assets", "runs", "docs")),
    ]:
        (folder / path.name).symlink_to(path)
    (folder / "my_idea.py").unlink(missing_ok=True)
    shutil.copytree(ROOT / "rewards", folder / "rewards", ignore=shutil.ignore_patterns("__pycache__"))
    picture = np.full((32, 64, 3), 51, dtype=np.uint8)
    for name in ("a.png", "b.png", "cat.png"):
        Image.fromarray(picture).save(folder / name)
    return folder


DEFAULTS = [f"python {name}.py" for name in ("flow_grpo", "dance_grpo", "grpo_unified", "rloo", "remax", "pretrain")]


@pytest.fixture(scope="module")
def trained(folder):
    """The first command of every script has run, in outputs/<script>-first."""
    for command in DEFAULTS:
        small(folder, command, ["--out", f"outputs/{words(command)[0]}-first"])
    return folder


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_command_is_known():
    unknown = [command for command in ALL if command.how == "unknown"]
    assert not unknown, f"no row of COMMANDS fits {unknown}: add one (or the first line of the block to LISTINGS)"
    assert len(ALL) > 60 and len(of("run")) > 20 and len(of("parse")) > 12 and len(of("dry")) > 14
    assert {command.text for command in ALL} >= set(DEFAULTS)
    for command in ALL:
        wanted = NEEDS[command.needs]
        assert re.search(wanted, command.said), f"{command}: the text does not say that it needs {command.needs}"


LINES = [c for how in ("run", "parse", "dry") for c in of(how) if re.search(rf"\w+ .*{FILE}", c.text)]
LINES = [c for c in LINES if not re.match(r"cp |\$EDITOR|.*--help|.*--tyro-", c.text)]


@pytest.mark.parametrize("command", LINES, ids=repr)
def test_command_parses(command):
    assert (ROOT / f"{words(command.text)[0]}.py").exists() or "my_idea.py" in command.text
    args = parsed(*words(command.text))
    if hasattr(args, "reward"):
        specs = [args.reward] if isinstance(args.reward, str) else args.reward
        for name, _, _ in rewards.parse(specs) if any(specs) else []:
            assert "://" in name or name in rewards.REWARDS or name == "brightness", command
    sizes = {name: getattr(args, name, None) for name in ("num_prompts", "group_size", "micro_batch_size")}
    if "dry-run" not in command.text and all(sizes.values()) and "lm_micro_batch_size" not in asdict(args):
        samples = args.num_prompts * args.group_size
        assert samples % min(args.micro_batch_size, samples) == 0, command


def test_first_command_of_every_script_trains(trained):
    for name in DEFAULTS:
        script = name.split()[1].removesuffix(".py")
        run = trained / f"outputs/{script}-first"
        found = rows(run)
        assert [row["iteration"] for row in found] == [0, 1] and (run / "curves.png").stat().st_size > 5000
        assert (run / f"{script}.py").read_bytes() == (ROOT / f"{script}.py").read_bytes()
        assert any((run / export).is_dir() for export in ("model", "lm"))
        if script != "pretrain":
            assert found[0]["on_policy_err"] <= 1e-5
        assert {"args.json", "metrics.jsonl", "samples", "checkpoints"} <= {path.name for path in run.iterdir()}


# Commands with tests of their own, by what is in them; the first that fits.
OWN = {
    "fork": r"^cp |\$EDITOR|my_idea|outputs/parent",
    "new reward": "brightness",
    "hacked": r"--reward jpeg shapes:1e-6",
    "help": "--help",
    "earlier run": "--resume|--report",
    "rewards": r"^python -m rewards",
}


def own(name):
    """The commands of one of these tests."""
    return [c for c in of("run") if next((key for key, what in OWN.items() if re.search(what, c.text)), "") == name]


PLAIN = [command for command in own("") if command.text not in DEFAULTS]


@pytest.mark.parametrize("command", PLAIN, ids=repr)
def test_command_runs(trained, command):
    before = set((trained / "outputs").iterdir())
    printed = small(trained, command.text)
    (run,) = set((trained / "outputs").iterdir()) - before
    assert f"wrote outputs/{run.name}" in printed
    if "infer.py" not in command.text:
        assert [row["iteration"] for row in rows(run)] == [0, 1]


def test_run_is_resumed_and_reported(trained):
    resumes = [c for c in own("earlier run") if "--resume" in c.text]
    assert len(resumes) >= 2
    for number, command in enumerate(sorted(resumes, key=lambda c: "--num-iterations" in c.text), 1):
        script, argv = words(command.text)
        longer = ["--num-iterations", str(number)] if "--num-iterations" in argv else []
        python(trained, f"{script}.py", *with_flags(argv, longer))
        assert [row["iteration"] for row in rows(trained / "outputs/flow_grpo-first")][-1] == (number if longer else 1)
    reports = [c for c in own("earlier run") if "--report" in c.text]
    assert reports
    for command in reports:
        small(trained, command.text)
    page = (trained / "outputs/flow_grpo-first/report.html").read_text()
    for said in ("Curves", "Samples", "Settings", "Script", "eval_strict"):
        assert said in page


def test_rewards_commands_run(folder):
    table = python(folder, "-m", "rewards")
    assert all(re.search(rf"^{re.escape(name)} ", table, re.MULTILINE) for name in rewards.REWARDS)
    scores = [c for c in own("rewards") if c.text != "python -m rewards"]
    assert len(own("rewards")) == len(scores) + 1 and scores
    for command in scores:
        found = json.loads(python(folder, *shlex.split(command.text)[1:]).splitlines()[-1])
        assert found == {"ocr": 0.0, "ocr/strict": 0.0}  # nothing is written in an empty picture


def test_flags_complete_in_the_shell(folder):
    """As how_to.md says it: bash offers --num-iterations for --num-it<Tab>."""
    (block,) = [
        b for page in PAGES for b in blocks(page) if b.lines[0].strip() in SCRIPT_BLOCKS and "tyro" in b.lines[0]
    ]
    assert [line.split()[0] for line in block.lines] == ["python", "source", "flow_grpo.py()"]
    name = re.search(r"~/(\S+)", block.lines[0])[1]
    (folder / "home").mkdir()
    assert block.lines[1] == f"source ~/{name}" and block.lines[2] == 'flow_grpo.py() { python flow_grpo.py "$@"; }'
    python(folder, "flow_grpo.py", "--tyro-write-completion", "bash", folder / "home" / name)
    asks = "COMP_WORDS=(flow_grpo.py --num-it); COMP_CWORD=1; COMP_LINE='flow_grpo.py --num-it'; COMP_POINT=22"
    script = f"source ~/{name}\nset -- $(complete -p flow_grpo.py)\n{asks}\n"
    script += "while [ $1 != -F ]; do shift; done\n$2 flow_grpo.py --num-it flow_grpo.py\necho ${COMPREPLY[@]}\n"
    home = {"HOME": str(folder / "home"), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", script], env=home, capture_output=True, text=True)
    assert "--num-iterations" in done.stdout, done


def test_help_is_that_of_the_model(folder):
    (command,) = own("help")
    shown = python(folder, "flow_grpo.py", *shlex.split(command.text)[2:])
    assert "default: data/scenes.txt" in re.sub(r"[\s│]+", " ", shown)  # of the recipe, not of tiny-flux


# ----------------------------------------------------------------------------------------------------------------------
# Python and diffs of the pages


def code(kind, first=""):
    return [b for page in PAGES for b in blocks(page) if b.kind == kind and re.match(first, b.lines[0])]


def apply(folder, block):
    """A diff of a page, applied as git does it."""
    diff = folder / ".diff"
    diff.write_text("\n".join(block.lines) + "\n")
    done = subprocess.run(["git", "apply", "--verbose", ".diff"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_fork_of_the_pages(trained):
    """README's three lines; how_to.md's diff stands for $EDITOR; parent and fork are compared by infer.py."""
    fork = [c.text for c in ALL if "my_idea.py" in c.text and c.page == "README.md"]
    assert fork == ["cp flow_grpo.py my_idea.py", "$EDITOR my_idea.py", "python my_idea.py"]
    shutil.copy(trained / "flow_grpo.py", trained / "my_idea.py")
    (diff,) = [b for b in code("diff") if b.lines[0] == "--- a/my_idea.py"]
    apply(trained, diff)
    before, after = ((trained / name).read_text().splitlines() for name in ("flow_grpo.py", "my_idea.py"))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert len(changed) == 4 and all("median" in line for line in changed if line[0] == "+")

    idea = runpy.run_path(str(trained / "my_idea.py"))["group_advantage"]
    reward = torch.tensor([0.0, 0.0, 0.1, 0.2, 4.0, 1.0, float("nan"), 3.0, 2.0, 2.0])
    centred = [r - m for r, m in zip(reward.tolist(), [0.1] * 5 + [2.0] * 5)]
    std = [
        (sum(c * c for c in group) / len(group)) ** 0.5 for group in (centred[:5], [centred[i] for i in (5, 7, 8, 9)])
    ]
    want = [c / (std[i // 5] + 1e-4) if c == c else 0.0 for i, c in enumerate(centred)]
    assert torch.allclose(idea(reward, 5), torch.tensor(want), atol=1e-6)

    said = [c.text for c in own("fork") if "--out" in c.text or "--compare" in c.text]
    assert len(said) == 3 and len(own("fork")) == 6
    for command in said:
        small(trained, command, ["--out", "outputs/compared"] if "--compare" in command else [])
    assert rows(trained / "outputs/fork")[0]["eval_strict"] == rows(trained / "outputs/parent")[0]["eval_strict"]
    table = json.loads((trained / "outputs/compared/compare.json").read_text())
    assert table["rewards"]["shapes/strict"]["prompts"] == 2 and (trained / "outputs/compared/compare.png").exists()


def test_reward_of_how_to_works(folder):
    (block,) = code("python", r"# rewards/brightness\.py")
    (folder / "rewards/brightness.py").write_text("\n".join(block.lines) + "\n")
    (diff,) = [b for b in code("diff") if b.lines[0] == "--- a/rewards/__init__.py"]
    apply(folder, diff)
    score, run = [c.text for c in own("new reward")]
    assert json.loads(python(folder, *shlex.split(score)[1:]).splitlines()[-1]) == {"brightness": pytest.approx(0.2)}
    small(folder, run, ["--out", "outputs/bright"])
    first = rows(folder / "outputs/bright")[0]
    assert first["reward"] == pytest.approx(first["reward/shapes"] + 0.1 * first["reward/brightness"])
    assert 0 < first["reward/brightness"] < 1


def run_block(folder, text):
    os.chdir(folder)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(text, "block", "exec"), {"__name__": "block"})
    return out.getvalue()


@pytest.mark.parametrize(
    "block", [b for b in code("python") if not b.lines[0].startswith("# rewards/")], ids=lambda b: b.page
)
def test_python_of_the_pages_runs(block):
    (printed,) = processes.run(run_block, str(ROOT), "\n".join(block.lines))
    if block.page == "docs/coming_from.md":  # 1e-5 / (2 c^2) of FlowCPS: c = sigma' sin(0.8 pi / 2)
        values = [float(v) for v in re.findall(r"\d\.\d+e-\d+", printed)]
        import models

        sigma = models.load("tiny-flux", "cpu", torch.float32).sigmas(6, 32, 32)[1:4]
        want = 1e-5 / (2 * (sigma * np.sin(0.4 * np.pi)) ** 2)
        assert values == pytest.approx(want.tolist(), rel=1e-3)
    else:
        assert printed.startswith("none ") and re.search(r"\[\d+\]", printed)


def test_job_script_is_bash_and_its_flags_parse():
    (block,) = [b for page in PAGES for b in blocks(page) if b.lines[0] == "#!/bin/bash"]
    text = "\n".join(block.lines) + "\n"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    flags = shlex.split(re.search(r"^flags=\((.*)\)$", text, re.MULTILINE)[1])
    args = parsed("flow_grpo", flags)
    assert args.shard_size == 8 and args.num_prompts * 2 == parsed("flow_grpo", ["--model", "flux"]).num_prompts
    # What it does with them, with commands of ours in the place of SLURM's and torchrun's.
    stubs = "scontrol() { printf 'n7\\nn8\\n'; }; srun() { printf '%s|' \"$@\"; echo; }\n"
    job = {"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[7-8]", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-ec", stubs + text], env=job, capture_output=True, text=True, check=True).stdout
    argv = done.strip().strip("|").split("|")
    assert argv[0] == "torchrun" and argv[argv.index("--rdzv_endpoint") + 1] == "n7:29500"
    assert argv[argv.index("--out") + 1] == "/shared/runs/flux" and argv.index("flow_grpo.py") < argv.index("--model")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def read(name):
    return json.loads((ROOT / "runs/results" / f"{name}.json").read_text())


def lines_of(name):
    return [json.loads(line) for line in (ROOT / "runs/results" / f"{name}.jsonl").read_text().splitlines()]


def mean(values):
    return sum(values) / len(values)


def run_of(name, *keys):
    """Means over the seeds, or, of "gain", the seeds."""
    of_run = read(name)[name]
    return sum([of_run[key] if key == "gain" else [mean(of_run[key])] for key in keys], [])


def tags(name, when):
    order = "single_object colors counting two_object position color_attr".split()
    return [read(name)["strict_by_tag"][when][tag] for tag in order]


def arm(name, when="end"):
    """grpo_unified.py's reward, mean and seeds, strict accuracy and share of well-formed answers; before training,
    where the seeds are all alike, without them."""
    reward, strict, form = (
        read("unified")[name][metric][when] for metric in ("eval_reward/shapes", "eval_strict", "eval_reward/format")
    )
    assert when == "end" or len(set(reward)) == 1
    return [mean(reward), *(reward if when == "end" else ()), mean(strict), mean(form)]


def task(name, metric):
    """Of a task of grpo_unified.py: means at the start and at the end, gain of the seeds."""
    of_task = read("unified_tasks")[name][metric]
    return [mean(of_task["start"]), mean(of_task["end"]), *of_task["gain"]]


def tag_gain(name):
    """Of the four kinds of prompts that the curves are over."""
    return mean([b - a for a, b in zip(tags(name, "before"), tags(name, "after"))][:4])


def last(name, *keys):
    return [lines_of(name)[-1][key] for key in keys]


def minutes(name):
    return sum(row.get("seconds_update", 0.0) for row in lines_of(name)) / 60


def gib(command):
    """Peak of resident memory."""
    return read("memory")["gib"][command]


def parameters(*folders):
    """Millions of parameters in the safetensors of a folder; what two names share is stored once."""
    count = 0
    for path in [path for folder in folders for path in (ROOT / "assets" / folder).glob("*.safetensors")]:
        with safe_open(path, "np") as file:
            count += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())
    return [count / 1e6]


def in_results(pattern):
    """Numbers in benchmarks/RESULTS.md."""
    text = re.sub(r"\s+", " ", (ROOT / "benchmarks/RESULTS.md").read_text())
    return [float(value) for value in re.search(pattern, text).groups()]


# (page, what it says, with # for a number, the values). The digits that are printed are the rounding that is compared.
NUMBERS = [
    ("README.md", "a real FLUX of # M parameters", lambda: parameters("tiny-flux/transformer")),
    ("README.md", r"goes from # to #, mean of 3 seeds \(# # #;", lambda: run_of("flow_grpo", "start", "end", "gain")),
    ("README.md", r"` to # \(# # #;", lambda: run_of("dance_grpo", "end", "gain")),
    ("README.md", "of further pretraining, one seed: #", lambda: read("flow_grpo")["control"]["gain"]),
    ("README.md", "a Qwen2 of # M parameters", lambda: parameters("tiny-qwen")),
    ("README.md", "two-digit numbers right # of the time: # after", lambda: run_of("rloo", "start", "end")),
    ("README.md", "held-out problems, greedy; # # #;", lambda: run_of("rloo", "gain")),
    ("README.md", r"`: #, \d+ seconds \(# # #;", lambda: run_of("remax", "end", "gain")),
    ("README.md", r"from # to # in \d+ seconds \(512", lambda: run_of("rloo_shapes_qa", "start", "end")),
    ("README.md", "512 held-out questions; # # #;", lambda: run_of("rloo_shapes_qa", "gain")),
    ("README.md", r"\| nothing \| # \| # \| # \|", lambda: arm("lm", "start")),
    ("README.md", r"\| language model, ` \| # \(# # #\) \| # \| # \|", lambda: arm("lm")),
    ("README.md", r"\| diffusion model, ` \| # \(# # #\) \| # \| # \|", lambda: arm("dm")),
    ("README.md", r"\| both, ` \| # \(# # #\) \| # \| # \|", lambda: arm("joint")),
    *(
        (
            "docs/recipes.md",
            rf"\| {start} \| ` ` \| # \| # \| # → # \| ` \| \[unified\.json\]",
            lambda n=name, c=command: [mean(read("unified")[n]["minutes"]), gib(c), arm(n, "start")[0], arm(n)[0]],
        )
        for name, start, command in (
            ("joint", "`, `", "python grpo_unified.py"),
            ("lm", "the same", "python grpo_unified.py --train lm"),
        )
    ),
    ("README.md", r"512 held-out prompts, reward from # to # \(# # #\)", lambda: task("t2icot", "eval_reward/shapes")),
    ("README.md", r"in dB, together from # to # \(# # #\)", lambda: task("i2i_cycle", "eval_reward")),
    ("README.md", r"answers two-digit sums, from # to # \(# # #\)", lambda: task("text", "eval_reward")),
    ("README.md", "512 held-out captions # are drawn", lambda: last("tiny_blip3o", "eval_strict")),
    ("README.md", r"reshape, add, remove, move\) #,", lambda: last("tiny_blip3o", "eval_strict_edit")),
    ("README.md", "answers # of 512 questions", lambda: last("tiny_blip3o", "eval_text")),
    (
        "README.md",
        "constant answer is right # of the time",
        lambda: [read("tiny_blip3o_parts")["lm"]["most_frequent_answer"]],
    ),
    (
        "README.md",
        "captions it draws # right, of 256 edits #, and it answers # of 256",
        lambda: last("tiny_blip3o_again", "eval_strict", "eval_strict_edit", "eval_text"),
    ),
    ("README.md", "comes to # and # in 1,500", lambda: last("tiny_metaquery", "eval_strict", "eval_strict_edit")),
    ("README.md", "gain with ` is # there", lambda: [read("flow_grpo")["flow_grpo"]["mean_gain"]]),
    ("README.md", "there and # here, with", lambda: [tag_gain("flow_grpo")]),
    (
        "README.md",
        "here, with ` # and #",
        lambda: [read("dance_grpo")["dance_grpo"]["mean_gain"], tag_gain("dance_grpo")],
    ),
    ("README.md", r"\| before \|" + " # \\|" * 6, lambda: tags("flow_grpo", "before")),
    (
        "README.md",
        r"\| after `, mean of 3 seeds \|" + " # \\|" * 6,
        lambda: tags("flow_grpo", "after") + tags("dance_grpo", "after"),
    ),
    (
        "README.md",
        "accuracy moved from # to #",
        lambda: [lines_of("tiny_flux")[4000]["eval_strict"], *last("tiny_flux", "eval_strict")],
    ),
    ("README.md", "and # of its time", lambda: in_results(r"4096 tokens \| ours \| ([\d.]+)")),
    ("README.md", "on a CPU is # times", lambda: in_results(r"3 runs instead of 5 ([\d.]+)")),
    ("README.md", "and # times as fast with half", lambda: in_results(r"later, one run, ([\d.]+)")),
    *(
        (
            "docs/recipes.md",
            rf"\| ` \| ` \| ` \| # \| # \| # → # \| ` \| \[{name}\.json\]",
            lambda n=name, c=command: [*run_of(n, "minutes"), gib(c), *run_of(n, "start", "end")],
        )
        for name, command in (
            ("flow_grpo", "python flow_grpo.py"),
            ("dance_grpo", "python dance_grpo.py"),
            ("rloo", "python rloo.py"),
            ("rloo_shapes_qa", "python rloo.py --lm tiny-qwen-vl"),
            ("remax", "python remax.py"),
        )
    ),
    (
        "docs/recipes.md",
        r"\| # \| # \| # → # captions, # → # edits \| `, one seed \| \[tiny_blip3o\.jsonl\]",
        lambda: [minutes("tiny_blip3o"), gib("python pretrain.py"), *history("tiny_blip3o")],
    ),
    (
        "docs/recipes.md",
        r"\| # \| # \| # → # captions, # → # edits \| `, one seed, 1,500 iterations \| \[tiny_metaquery\.jsonl\]",
        lambda: [
            minutes("tiny_metaquery"),
            gib("python pretrain.py --model tiny-metaquery-start"),
            *history("tiny_metaquery"),
        ],
    ),
    (
        "docs/recipes.md",
        r"\| # \| # \| # → #, all six kinds",
        lambda: [
            minutes("tiny_flux"),
            gib("runs/tiny_flux.sh"),
            lines_of("tiny_flux")[0]["eval_strict"],
            *last("tiny_flux", "eval_strict"),
        ],
    ),
    ("docs/how_to.md", "that diff, in # minutes on 4", lambda: [read("fork")["minutes"]]),
    (
        "docs/how_to.md",
        "lower than the mean's by #, with a standard error of # over",
        lambda: [
            -read("fork")["compare"]["shapes/strict"]["difference"],
            read("fork")["compare"]["shapes/strict"]["error"],
        ],
    ),
    ("docs/how_to.md", "come from the hub, # GB", lambda: [rewards.REWARDS["pickscore"].gigabytes]),
]
# Numbers that no results file has, and why.
ALLOWED = [
    (
        "README.md",
        r"torch 2\.13, # minutes a run|`, # minutes a run",
        "wall clock of whole runs, with start-up and evaluation",
    ),
    (".*", r"(?:Python|torch|triton|transformers|TRL) \d+(?:\.\d+)+", "versions"),
    (
        "docs/recipes.md",
        r"\| ` \|[^|]*\| `?[^|]*\| # \| # \| # \|",
        "of --dry-run: test_dry_run_prints_what_the_pages_say",
    ),
    ("docs/how_to.md", r"\| ` \| # \|", "of --dry-run: test_dry_run_prints_what_the_pages_say"),
    (
        "docs/how_to.md",
        r"in CPU memory \(# GiB of it at most\)",
        "of --dry-run: test_dry_run_prints_what_the_pages_say",
    ),
    ("docs/how_to.md", r"` rises from # to #, a third smaller files, while ` falls from # to #", "test_hacked_reward"),
]
NUMBER = r"(?<![\w.\-/,])[+-]?\d+\.\d+(?![\w\-]|\.\d)"


def history(name):
    """Strict accuracy of captions and of edits, before and after."""
    found = lines_of(name)
    return [row[key] for key in ("eval_strict", "eval_strict_edit") for row in (found[0], found[-1])]


def pattern(text):
    return text.replace("#", r"([+-]?\d+\.\d+)")


@pytest.mark.parametrize("page, text, values", NUMBERS, ids=lambda v: v if isinstance(v, str) else "")
def test_number_is_that_of_its_source(page, text, values):
    found = list(re.finditer(pattern(text), prose(page)))
    printed = sum([list(match.groups()) for match in found], [])
    assert found, f"{page} does not say this any more: change or remove the row of NUMBERS"
    wanted = values()
    assert len(printed) == len(wanted)
    for text, value in zip(printed, wanted):
        sign, digits = "+" if text.startswith("+") else "", len(text.split(".")[1])
        assert text == f"{value:{sign}.{digits}f}", (page, printed, wanted)


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/how_to.md"])
def test_every_number_has_a_source(page):
    text = prose(page)
    rows = [row[1] for row in NUMBERS if row[0] == page] + [row[1] for row in ALLOWED if re.fullmatch(row[0], page)]
    spans = [match.span() for row in rows for match in re.finditer(pattern(row), text)]
    left = [m for m in re.finditer(NUMBER, text) if not any(a <= m.start() and m.end() <= b for a, b in spans)]
    assert not left, [text[max(0, m.start() - 40) : m.end() + 20] for m in left]


def dry_run(command, size):
    """What a --dry-run prints on one of `size` GPUs, which the estimate only counts."""
    script, argv = words(command)
    module = importlib.import_module(script)
    world, init = types.SimpleNamespace(rank=0, size=size, device=torch.device("cpu")), parallel.init
    parallel.init = lambda *_: world
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            module.main(parsed(script, argv))
    finally:
        parallel.init = init
    return out.getvalue()


def peaks(printed):
    """GiB on a GPU, and of the host: one number each (an RL run) or three (pretraining on 1, 8 and 64 GPUs)."""
    found = [re.search(rf"^{name} +(.*)$", printed, re.MULTILINE)[1].split() for name in ("peak", "host: peak")]
    if needed := re.search(r"needed per GPU: (\S+) GiB", printed):
        found[0] = [needed[1]]  # rounded once
    return [[float(value) for value in row] for row in found]


def table_rows(page):
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ") and "--dry-run`" in line]
    return [
        (re.search(r"`([^`]*--dry-run)`", line)[1], [float(v) for v in re.findall(r"\| (\d+\.\d+)(?= \|)", line)])
        for line in lines
    ]


def check_dry_run(command, numbers, page):
    """Both columns of GPUs and the host of recipes.md; the one number of how_to.md."""
    if page.endswith("how_to.md"):
        gpu, host = peaks(dry_run(command, 8 if "torchrun" in command else 1))
        found = [gpu[0]]
        if "--cpu-offload" in command:
            (said,) = re.findall(r"in CPU memory \((\d+\.\d+) GiB of it at most\)", prose(page))
            assert float(said) == round(host[0], 1)
    elif "pretrain.py" in command:
        gpu, host = peaks(dry_run(command, 1))
        found = [gpu[0], gpu[1], host[0]]
    else:
        (one, host), (eight, _) = peaks(dry_run(command, 1)), peaks(dry_run(command, 8))
        found = [one[0], eight[0], host[0]]
    digits = [2, 2, 1][: len(found)]
    assert [f"{n:.{d}f}" for n, d in zip(numbers, digits)] == [f"{n:.{d}f}" for n, d in zip(found, digits)], command


def test_dry_run_prints_what_the_pages_say():
    """By default of one row of each table: the others take 10 s each."""
    rows_of = dict(table_rows("docs/recipes.md"))
    assert len(rows_of) >= 19 and len(table_rows("docs/how_to.md")) >= 6
    for command in (next(iter(rows_of)), "python rloo.py --lm qwen2.5-3b --dry-run"):
        numbers, (one, host) = rows_of[command], peaks(dry_run(command, 1))
        assert numbers[0] == round(one[0], 2) and numbers[2] == round(host[0], 1)
        for page in PAGES:
            for again, same in table_rows(page):
                assert again != command or same[0] == numbers[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/recipes.md", "docs/how_to.md"])
def test_every_dry_run_prints_what_the_pages_say(page):
    for command, numbers in table_rows(page):
        check_dry_run(command, numbers, page)
    tables = {command for page in PAGES for command, _ in table_rows(page)}
    for command in of("dry"):
        assert command.text in tables or peaks(dry_run(command.text, 8 if "torchrun" in command.text else 1))


@pytest.mark.slow
def test_hacked_reward(folder):
    """how_to.md's run that cannot go well, whole, and what the page says about it."""
    (command,) = own("hacked")
    script, argv = words(command.text)
    (printed,) = processes.run(
        call, str(folder), [f"{script}.py", *argv, "--out", "outputs/hacked"], {}, threads=2, timeout=900
    )
    first, end = [row for row in rows(folder / "outputs/hacked") if "eval_strict" in row]
    says = re.search(
        pattern(r"` rises from # to #, a third smaller files, while ` falls from # to #"), prose("docs/how_to.md")
    )
    found = [row[key] for key in ("eval_reward/jpeg", "eval_strict") for row in (first, end)]
    for said, value in zip(says.groups(), found):
        assert said == f"{value:.{len(said.split('.')[1])}f}", (says.groups(), found)
    assert 0.3 < 1 - found[1] / found[0] < 0.36


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in of("parse") if re.search(FILE, c.text)], ids=repr)
def test_large_command_runs_on_tiny_models(trained, command):
    """The same flags, with the models and rewards of SUBSTITUTES and the sizes of SMALL."""
    script, argv = words(command.text)
    if "--push" in argv or "hub:" in command.text:
        pytest.skip("uploads or downloads")
    if "--rollout" in argv and not importlib.util.find_spec("vllm"):
        pytest.skip("needs vLLM: tests/test_vllm.py")
    for n, word in enumerate(argv):
        name, colon, weight = word.rpartition("/")[2].partition(":")
        if name in SUBSTITUTES and argv[n - 1] not in ("--task", "--layout"):
            argv[n] = SUBSTITUTES[name] + colon + weight
    if script == "grpo_unified" and "--refine" not in argv:
        argv = ["tiny-qwen-refine" if word == "tiny-qwen-vl" else word for word in argv]  # no picture to look at
    for flag in ("--out", "--judge-url", "--prompts", "--shard-size"):
        if flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    assert "wrote outputs/" in small(trained, shlex.join(["python", f"{script}.py", *argv])) or "--dry-run" in argv


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_files_that_are_named_exist():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}, (
                    f"{page}: {target}"
                )
        for name in re.findall(r"`((?:tests|runs|models|rewards|kernels|data|benchmarks|docs|assets)/[\w./-]*)`", text):
            assert (ROOT / name).exists() or name.endswith("brightness.py"), f"{page}: {name}"


def test_flags_that_are_named_exist():
    known = {"--resume", "--help"}
    for script in SCRIPTS[:-1]:
        module = importlib.import_module(script)
        for name, field in module.Args.__dataclass_fields__.items():
            known |= {f"--{name.replace('_', '-')}"} | (
                {f"--no-{name.replace('_', '-')}"} if field.type in (bool, "bool") else set()
            )
    for path in (ROOT / "rewards/serve.py", ROOT / "rewards/__main__.py", ROOT / "benchmarks/vs_trl.py"):
        known |= set(re.findall(r"\"(--[\w-]+)\"", path.read_text()))
    known |= {"--signal", "--tyro-write-completion", "--nproc_per_node"} | {"--lm-", "--num-"}  # two prefixes
    for page in PAGES:
        for line in (ROOT / page).read_text().splitlines():
            cells = line.split(" | ")
            ours = cells[1:] if page.endswith("coming_from.md") and line.startswith("| ") else [line]
            foreign = re.findall(r"--\w+", cells[0]) + ["--use_group", "--learning_rate"] if ours != [line] else []
            for span in re.findall(r"`([^`]+)`", " | ".join(ours)):
                if re.match(r"(torchrun|pip|vllm|hf|PROMPTRL)", span):
                    continue
                for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                    assert flag in known or flag in foreign, f"{page}: {flag}"


def test_flow_grpo_command_is_the_recipe():
    """coming_from.md says that all of it but the first flags is the recipe's."""
    (command,) = [c for c in ALL if c.page == "docs/coming_from.md" and "--window-range 0 3" in c.text]
    assert parsed(*words(command.text)) == parsed("flow_grpo", ["--model", "flux"])


def test_every_metric_is_explained(trained):
    text = (ROOT / "docs/metrics.md").read_text()
    named = set(re.findall(r"`([^`]+)`", text))
    found = {
        name for path in (trained / "outputs").glob("*/metrics.jsonl") for row in rows(path.parent) for name in row
    }
    assert len(found) > 40
    for name in sorted(found):
        general = re.sub(r"(reward)/.+", r"\1/<name>", name)
        general = re.sub(r"pass@(?!1$)\d+", "pass@k", general)
        assert general in named, name
    logged = {"loss_text", "eval_pass@1", "eval_pass@k", "kl", "lm/kl", "dm/kl"}  # with flags that are not used here
    for name in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE):
        for one in re.findall(r"`([^`]+)`", name):
            simple = re.sub(r"/<name>$", "", one)
            assert (
                simple in found
                or any(f.startswith(f"{simple}/") for f in found)
                or one in logged
                or one.endswith((".json", ".jsonl"))
            ), one
    readme = re.search(r"^\| metric \| meaning \|.*?\n\n", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for line in readme[0].splitlines() if readme else []:
        for name in re.findall(r"`([a-z_/@<>0-9]+)`", line.split(" | ")[0]):
            assert name in named, f"README.md: {name}"


def test_scripts_of_runs_are_bash():
    scripts = [*(ROOT / "runs").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh")]
    assert len(scripts) > 10
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert os.access(path, os.X_OK) or path.parent.name == "benchmarks", path


def test_requirements_are_met():
    """`pip install -r requirements.txt` is what these tests run on."""
    from importlib.metadata import version

    from packaging.requirements import Requirement

    for line in (ROOT / "requirements.txt").read_text().splitlines():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            assert wanted.specifier.contains(version(wanted.name), prereleases=True), line


# ----------------------------------------------------------------------------------------------------------------------
# The checks themselves


def test_checks_see_what_they_are_for(tmp_path):
    assert split('python a.py --x "1 # 2" && b   # two # c') == (['python a.py --x "1 # 2"', "b"], " two # c")
    assert split("python flow_grpo.py --prompts shapes#a,b") == (["python flow_grpo.py --prompts shapes#a,b"], "")
    page = tmp_path / "page.md"
    page.write_text("# A\ntext 0.5\n\n    python a.py \\\n        --b 3\n\nmore `x 0.7`\n\n```python\n1 + 1\n```\n")
    found = blocks(os.path.relpath(page, ROOT))
    assert [(b.kind, b.lines) for b in found] == [("", ["python a.py \\", "    --b 3"]), ("python", ["1 + 1"])]
    assert found[1].before.startswith("# A") and "0.7" not in prose(os.path.relpath(page, ROOT))
    assert re.findall(NUMBER, prose(os.path.relpath(page, ROOT))) == ["0.5"]
    assert Command("x", "python flow_grpo.py --model flux --reward jpeg", "").how == "parse"
    assert Command("x", "python flow_grpo.py --model tiny-flux", "").how == "run"
    assert Command("x", "python infer.py --mode i2i --model kontext --image cat.png", "").how == "parse"
    assert Command("x", "rm -rf outputs", "").how == "unknown"
    assert re.findall(NUMBER, "a 0.5 b +0.20, FLUX.1-dev SD3.5 2.13.0 qwen2.5-3b 1e-5") == ["0.5", "+0.20"]
    assert with_flags(["--a", "1", "2", "--b", "--c", "3"], ["--a", "9"]) == ["--b", "--c", "3", "--a", "9"]
