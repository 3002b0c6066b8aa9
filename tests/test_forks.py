"""Every RL script is a fork of another one: what has one name in two of them is the same thing, to the letter. The
lists below are of the project's own scripts; a user's my_idea.py never fails this."""

import ast
import itertools
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RL = ["flow_grpo.py", "dance_grpo.py", "grpo_unified.py", "rloo.py", "remax.py"]
SCRIPTS = [*RL, "pretrain.py", "infer.py"]
SHARED = ["models", "rewards", "kernels", "data"]
PAIRS = list(itertools.combinations(RL, 2))

DIFFERENT_FUNCTIONS = {"recipe", "main", "rollout"}  # the algorithm itself; Args is a class, compared field by field

# Fields of Args that may have another help text in two RL scripts, and why.
DIFFERENT_FIELDS = {
    "model": "the only model, or the one that draws",
    "lm": "the only model, or the one that writes",
    "reward": "grpo_unified.py lets prompts choose theirs",
    "out": "names the script's own folder",
    "seed": "says what is random in this script",
    "noise_level": "the strength of another noise",
    "prompts": "names the sources that the script's models can use",
    "group_size": "remax.py has a greedy sample besides",
    "micro_batch_size": "says what a tile is made of",
    "rollout_batch_size": "a sample is a text, or a text and a picture",
    "max_new_tokens": "a sample is a text, or a text and a picture",
    "temperature": "a sample is a text, or a text and a picture",
    "advantage_std": "of the samples that the same rewards judge, where prompts choose theirs; also nothing",
    "mask_truncated": "says what a truncated sample still counts in",
    "clip_eps": "the ratio of a denoising step, or of tokens",
    "importance_clip": "at the level of the ratio, of which remax.py has one",
    "kl_coef": "per latent dim in the loss, or per sample in the reward",
    "learning_rate": "of the only model, or of the one that draws",
    "max_grad_norm": "of the only model, or of the one that draws",
    "lora_rank": "one adapter, or one of each model",
    "eval_size": "pictures, or answers to all held-out prompts",
    "keep_unsharded": "language models always sample with gathered parameters",
}
DIFFERENT_TYPES = {"advantage_std": "grpo_unified.py can divide by nothing"}


def kind(script):
    """What a script trains: a model of tokens, of pictures, or of both."""
    return fields(source(script)).keys() & {"lm", "model"}


def source(script):
    return (ROOT / script).read_text()


def functions(text):
    """name -> source of every function, nested ones and methods too, with its decorators, from its own margin on. Of
    two with one name, the second has that of what it is in before its own."""
    found = {}

    def visit(node, where):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                    lines = text.splitlines()[first - 1 : child.end_lineno]
                    name = child.name if child.name not in found else f"{where}{child.name}"
                    found[name] = textwrap.dedent("\n".join(lines))
                visit(child, f"{where}{child.name}.")
            else:
                visit(child, where)

    visit(ast.parse(text), "")
    return found


def fields(text):
    """name -> (annotation, help text) of the fields of Args."""
    (args,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    found = {}
    for field, below in zip(args.body[::2], args.body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(below.value.value, str), ast.unparse(field)
        found[field.target.id] = ast.unparse(field.annotation), " ".join(below.value.value.split())
    return found


def reads(text):
    """Names n that the script reads as args.n."""
    return {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "args"
    }


def imports(text):
    """The first component of every module that is imported, also by name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and re.search(r"import_module$|__import__$|run_path$", ast.unparse(node.func)):
            found |= {str(c.value).split(".")[0] for c in ast.walk(node) if isinstance(c, ast.Constant)}
    return found


def test_lists_of_scripts_are_complete():
    planned = ["flow_grpo.py", "dance_grpo.py", "grpo_unified.py", "rloo.py", "remax.py"]
    assert RL == [script for script in planned if (ROOT / script).is_file()], "a new RL script: add it to RL"
    assert len(RL) > 1 and all((ROOT / script).is_file() for script in SCRIPTS)


@pytest.mark.parametrize("a, b", PAIRS)
def test_functions_of_one_name_are_one_code(a, b):
    of_a, of_b = functions(source(a)), functions(source(b))
    common = of_a.keys() & of_b.keys() - DIFFERENT_FUNCTIONS
    assert {"checkpointed", "save", "check_stop", "total", "log"} <= common  # those inside main, too
    assert any(name.startswith("evaluate") for name in common) == (kind(a) == kind(b))
    for name in sorted(common):
        assert of_a[name] == of_b[name], f"{name} in {a} and {b}"


def test_different_functions_are_in_every_script():
    for script in RL:  # else the exemption is of nothing
        assert DIFFERENT_FUNCTIONS <= functions(source(script)).keys(), script


@pytest.mark.parametrize("a, b", PAIRS)
def test_fields_of_one_name_are_one_flag(a, b):
    of_a, of_b = fields(source(a)), fields(source(b))
    common = of_a.keys() & of_b.keys()
    assert len(common) > 20
    for name in sorted(common):
        (kind_a, help_a), (kind_b, help_b) = of_a[name], of_b[name]
        assert kind_a == kind_b or name in DIFFERENT_TYPES, f"{name} in {a} and {b}"
        assert help_a == help_b or name in DIFFERENT_FIELDS, f"{name} in {a} and {b}"
    order = [[name for name in script if name in common] for script in (of_a, of_b)]
    assert order[0] == order[1]  # and --help lists them alike


def test_no_exception_is_left_over():
    for name in DIFFERENT_FIELDS:
        assert len({fields(source(script)).get(name) for script in RL} - {None}) > 1, f"{name} needs no exception"
    for name in DIFFERENT_TYPES:
        assert len({fields(source(script))[name][0] for script in RL if name in fields(source(script))}) > 1, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    text = source(script)
    assert reads(text) - fields(text).keys() == set()
    assert fields(text).keys() - reads(text) == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert len(scripts) >= len(SCRIPTS) and not imports(source(script)) & scripts


SEES_ARGS = ["models/run_folder.py"]  # parses and keeps the arguments of a run, whatever they are
SECTIONS = ["1) Rollout", "2) Reward", "3) Advantage", "4) Loss", "5) Update"]


@pytest.mark.parametrize("script", RL)
def test_sections_are_in_order(script):
    found = re.findall(r"\b([1-9]\) [A-Z][a-z]+)", "\n".join(re.findall(r"^ +# (.*)$", source(script), re.MULTILINE)))
    assert found == SECTIONS


def shared_files():
    files = [path for folder in SHARED for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 15
    return files


def words(text):
    """Identifiers and text constants of Python source, but for docstrings: what the code says to the machine, to its
    user and to other code. Comments are for readers and may name a paper."""
    found, docstrings = [], set()
    for node in ast.walk(ast.parse(text)):
        for _, value in ast.iter_fields(node):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                    docstrings.add(item.value)
                elif isinstance(item, str) and not isinstance(node, ast.Constant):
                    found.append(item)  # names, attributes, arguments, keywords, imported modules
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            found.append(node.value)
    return found


ALGORITHMS = re.compile(r"grpo|rloo|remax|\bppo\b|_ppo|ppo_", re.IGNORECASE)


@pytest.mark.parametrize("path", shared_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shared_code_knows_no_script_and_no_algorithm(path):
    text, scripts = path.read_text(), {script.removesuffix(".py") for script in SCRIPTS}
    assert not imports(text) & scripts
    assert [word for word in words(text) if ALGORITHMS.search(word)] == []
    own = imports(text) & {"argparse", "tyro"}  # a command line, and args, of its own
    assert own or bool(reads(text)) == (str(path.relative_to(ROOT)) in SEES_ARGS), "shared code never sees args"


# ----------------------------------------------------------------------------------------------------------------------
# The checks themselves


def test_checks_see_what_they_are_for():
    text = (
        "class Args:\n    a: int = 1\n    'first'\n\ndef f():\n    @cache\n    def g(x):\n        return args.a + x\n"
    )
    assert fields(text) == {"a": ("int", "first")} and reads(text) == {"a"}
    outside = "@cache\ndef g(x):\n    return args.a + x\n"
    assert functions(text)["g"] == functions(outside)["g"]  # wherever it stands
    assert functions(text.replace("+ x", "+ x  # why"))["g"] != functions(text)["g"]
    assert imports("import a.b, c\nfrom d import e\nimport_module('f.g')") == {"a", "c", "d", "e", "f"}
    bad = '"""GRPO is fine here"""\n# grpo is fine here\ndef grpo_loss(x):\n    """grpo, too"""\n    return f"grpo {x}"'
    assert [word for word in words(bad) if ALGORITHMS.search(word)] == ["grpo_loss", "grpo "]
