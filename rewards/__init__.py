"""Rewards: pure functions of finished samples.

load(name, device) -> score
score(samples, prompts, metadata) -> reward_B, float32 on the CPU; NaN = this sample failed, which is not a reward of 0

samples    dict of equal-length lists, roles image (uint8 numpy H W 3), text (str), source, recon (like image)
prompts    list of B strings
metadata   list of B dicts, what a verifier needs to know of the prompt ({} where nothing is needed)

score.needs    the roles it reads, e.g. ("image",)
score.strict   None, or a function of the same arguments -> 0. / 1. [B]: the all-or-nothing form, for eval_strict
score.name     the name it was loaded by
"""

import difflib
import importlib.util
import os
from importlib import import_module
from math import isfinite, nan  # by name: `math` and `format` are modules of this package
from typing import NamedTuple

import numpy as np


class Reward(NamedTuple):
    loader: str  # module:function, imported when asked for: a run that scores with jpeg does not load transformers
    needs: tuple = ("image",)
    weights: tuple = ()  # one file of every checkpoint, owner/name/file on the hub
    gigabytes: float = 0  # download
    licence: str = ""  # of the weights
    package: str = ""  # that must be importable
    template: str = ""  # that `python -m rewards fetch` gets
    judge: bool = False  # runs at --judge-url


_CLIP_L = "openai/clip-vit-large-patch14/model.safetensors"
_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/vocab.json"  # the tokenizer only
_DETECTOR = "facebook/mask2former-swin-small-coco-instance/pytorch_model.bin"
_HPSV3 = ("MizzenAI/HPSv3/HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct/config.json")
_EDITREWARD = ("TIGER-Lab/EditReward-MiMo-VL-7B-SFT-2508/README.md", "XiaomiMiMo/MiMo-VL-7B-SFT-2508/config.json")
_QWEN = "Qwen/Qwen2.5-VL-7B-Instruct/model-00001-of-00005.safetensors"
_EDIT = ("image", "source")

REWARDS = {
    "shapes": Reward("shapes:load"),
    "jpeg": Reward("jpeg:load"),
    "jpeg_incompressibility": Reward("jpeg:load_incompressibility"),
    "psnr": Reward("recon:load", _EDIT),
    "recon": Reward("recon:load_recon", ("recon", "source")),
    "format": Reward("format:load", ("text",)),
    "think_format": Reward("format:load_think", ("text",)),
    "math": Reward("math:load", ("text",), package="math_verify"),
    "shapes_qa": Reward("shapes_qa:load", ("text",)),
    "ocr": Reward("ocr:load", package="rapidocr", licence="Apache-2.0"),
    "pickscore": Reward(
        "pickscore:load", ("image",), ("yuvalkirstain/PickScore_v1/model.safetensors", _CLIP_H), 3.9, "not stated"
    ),
    "clipscore": Reward("clip:load", ("image",), (_CLIP_L,), 1.7, "MIT"),
    "clip_sim": Reward("clip:load_sim", _EDIT, (_CLIP_L,), 1.7, "MIT"),
    "recon_clip_sim": Reward("clip:load_recon_sim", ("recon", "source"), (_CLIP_L,), 1.7, "MIT"),
    "clip_direction": Reward("clip:load_direction", _EDIT, (_CLIP_L,), 1.7, "MIT"),
    "hpsv2": Reward("hps:load", ("image",), ("xswu/HPSv2/HPS_v2_compressed.pt", _CLIP_H), 2.0, "Apache-2.0"),
    "hpsv2.1": Reward("hps:load_v21", ("image",), ("xswu/HPSv2/HPS_v2.1_compressed.pt", _CLIP_H), 2.0, "Apache-2.0"),
    "aesthetic": Reward(
        "aesthetic:load",
        ("image",),
        (_CLIP_L, "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"),
        1.7,
        "MIT, Apache-2.0",
    ),
    "siglip": Reward(
        "siglip:load", ("image",), ("google/siglip-so400m-patch14-384/model.safetensors",), 3.5, "Apache-2.0"
    ),
    "dino": Reward("dino:load", _EDIT, ("facebook/dinov2-base/model.safetensors",), 0.35, "Apache-2.0"),
    "image_reward": Reward(
        "image_reward:load",
        ("image",),
        ("THUDM/ImageReward/ImageReward.pt", "google-bert/bert-base-uncased/vocab.txt"),
        1.8,
        "Apache-2.0",
    ),
    "geneval": Reward("geneval:load", ("image",), (_DETECTOR, _CLIP_L), 2.0, "see its card, MIT"),
    "hpsv3": Reward("hpsv3:load", ("image",), _HPSV3, 16, "MIT", template="hpsv3"),
    "editreward": Reward("editreward:load", _EDIT, _EDITREWARD, 17, "MIT", template="editreward"),
    "deqa": Reward("deqa:load", ("image",), (_QWEN,), 17),
    "vlm_judge": Reward("vlm_judge:load", judge=True),
    "vlm_score": Reward("vlm_judge:load_score", judge=True),
    "unifiedreward": Reward("unifiedreward:load", judge=True, template="unifiedreward"),
    "unifiedreward_v1": Reward("unifiedreward:load_v1", judge=True, template="unifiedreward"),
    "unifiedreward_edit": Reward("unifiedreward:load_edit", _EDIT, judge=True, template="unifiedreward"),
}


def load(name, device="cpu", judge_url=None, judge_model=None):
    """The reward `name`, ready to score (weights, if it has any, are on `device`).

    name: one of REWARDS, or http://host:port/name of a server (rewards/serve.py). judge_url, judge_model: where the
    rewards that ask a model behind an OpenAI-compatible endpoint find it.

    Raises ValueError for a name that is not in REWARDS, RuntimeError where its weights cannot be loaded.
    """
    if "://" in name:
        from rewards import remote

        score = remote.load(name, device)
    elif name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown reward {name!r}{hint} (known: {', '.join(REWARDS)})")
    else:
        module, function = REWARDS[name].loader.split(":")
        judge = dict(judge_url=judge_url or None, judge_model=judge_model or None) if REWARDS[name].judge else {}
        score = getattr(import_module(f"rewards.{module}"), function)(device, **judge)
    score.name = name
    return score


def missing(name):
    """What the reward `name` still needs on this machine, each with what to do about it: [] = ready. Looks at files and
    packages only, loads nothing."""
    from huggingface_hub import try_to_load_from_cache

    reward, found = REWARDS[name], []
    if reward.package and importlib.util.find_spec(reward.package) is None:
        found.append(f"pip install -r requirements.txt ({reward.package})")
    for path in reward.weights:
        owner, model, file = path.split("/", 2)
        if not isinstance(try_to_load_from_cache(f"{owner}/{model}", file), str):
            wanted = f" {file}" if file.endswith((".pt", ".pth")) or file == "HPSv3.safetensors" else ""
            if file.endswith((".json", ".txt")):  # a tokenizer or configuration, without the weights beside it
                wanted = " --include '*.json' --include '*.txt'"
            found.append(f"hf download {owner}/{model}{wanted}")
    if reward.template:
        from rewards import fetch

        if not os.path.exists(fetch.cached(reward.template)):
            found.append(f"python -m rewards fetch {reward.template}")
    if reward.judge:
        found.append("a server at --judge-url")
    return found


def parse(specs):
    """["pickscore:0.7", "jpeg"] -> [("pickscore", "pickscore", 0.7), ("jpeg", "jpeg", 1.0)].

    Each entry is (name for `load`, name for the metrics, weight). The weight is what follows the last ":" behind the
    last "/", so that ports survive: "http://host:8000/ocr:0.3" -> ("http://host:8000/ocr", "ocr", 0.3).
    Negative weights are penalties. Raises ValueError naming the spec that is malformed or a duplicate.
    """
    if not specs:
        raise ValueError("no reward given, e.g. --reward pickscore:0.7 jpeg:0.3")
    parsed = []
    for spec in specs:
        folder, slash, last = spec.rpartition("/")
        last, colon, weight = last.rpartition(":") if ":" in last else (last, "", "1")
        name = folder + slash + last
        _, is_url, address = name.partition("://")
        host, _, path = address.partition("/")
        if is_url and not (host and path and last):
            raise ValueError(
                f"reward {spec!r}: a URL must name the reward in its path, like http://host:port/pickscore"
            )
        if not last.strip():
            raise ValueError(f"reward {spec!r}: no name, expected name or name:weight")
        try:
            value = float(weight)
        except ValueError:
            value = nan
        if not isfinite(value) or value == 0:
            raise ValueError(f"reward {spec!r}: the weight {weight!r} is not a finite number other than 0")
        metric = last if is_url else name
        if metric in [m for _, m, _ in parsed]:
            raise ValueError(f"reward {spec!r}: there is already a reward {metric!r}, and their metrics would collide")
        parsed.append((name, metric, value))
    return parsed


def check_needs(score, roles):
    """Call before the expensive work. Raises ValueError if a loaded reward reads a role that is not in `roles`."""
    for role in score.needs:
        if role not in roles:
            raise ValueError(
                f"reward {score.name!r} scores {role!r}, but this run only has {', '.join(map(repr, roles))}"
            )


def try_out(scores, row, resolution=32):
    """Score an empty text and black pictures of resolution^2 pixels for a prompt, a dict with "prompt" and "metadata":
    what loaded rewards miss in it is found before anything is drawn. Raises what they raise, ValueError mostly."""
    samples = {role: [np.zeros((resolution, resolution, 3), np.uint8)] for role in ("image", "source", "recon")}
    for score in scores:
        for form in filter(None, (score, score.strict)):
            form(samples | {"text": [""]}, [row["prompt"]], [row["metadata"]])
