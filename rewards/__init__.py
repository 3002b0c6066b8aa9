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
import math
from importlib import import_module

# Imported when asked for: a run that scores with jpeg does not load transformers.
REWARDS = {
    "jpeg": lambda device: import_module("rewards.jpeg").load(device),
    "jpeg_incompressibility": lambda device: import_module("rewards.jpeg").load_incompressibility(device),
    "pickscore": lambda device: import_module("rewards.pickscore").load(device),
    "shapes": lambda device: import_module("rewards.shapes").load(device),
}


def load(name, device="cpu"):
    """The reward `name`, ready to score (weights, if it has any, are on `device`).

    Raises ValueError for a name that is not in REWARDS, RuntimeError where its weights cannot be loaded.
    """
    if "://" in name:
        raise ValueError(f"reward {name!r}: remote rewards are not available in this version")
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown reward {name!r}{hint} (known: {', '.join(REWARDS)})")
    score = REWARDS[name](device)
    score.name = name
    return score


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
            value = math.nan
        if not math.isfinite(value) or value == 0:
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
