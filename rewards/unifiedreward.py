"""UnifiedReward (https://arxiv.org/abs/2503.05236): a Qwen-VL tuned to write scores, at an endpoint as in vlm_judge.

    vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --served-model-name UnifiedReward --port 8080

    unifiedreward        2.0, pointwise: alignment, coherence and style, each 1 .. 5; score = their mean / 5
    unifiedreward_v1     qwen-7b: "Final Score: 4", 1 .. 5; score = it / 5. Whole numbers: many ties within a group
    unifiedreward_edit   Edit, pointwise: [success, no over-editing] of source and image, [naturalness, no artefacts] of
                         the image, each 0 .. 25; score = sqrt(min of the first * min of the second) / 25, as VIEScore

The checkpoints answer to the prompt of their training only: see rewards/fetch.py. The answer is written greedily; one
that cannot be read is NaN. Models on Qwen3.5 think first unless the server is started with thinking off.
"""

import json
import re

from rewards.fetch import template as read_template
from rewards.vlm_judge import answer_text, connect, message, parsed_number

MAX_TOKENS = 1024  # of an answer; v1 lists the elements of the caption before the score
ASPECTS = "alignment", "coherence", "style"


def aspects(choice):
    """Mean of the three lines "Alignment Score (1-5): 2.69" ... / 5. ValueError if one is missing or out of 1 .. 5."""
    scores = [parsed_number(rf"{aspect} score\s*\(1-5\)\s*:\s*(-?\d+(?:\.\d+)?)")(choice) for aspect in ASPECTS]
    if not all(0.5 <= score <= 5.5 for score in scores):  # a regressed 5 may come out as 5.02
        raise ValueError(f"scores out of 1 .. 5: {scores}")
    return sum(scores) / len(scores) / 5


def final_score(choice):
    """The number after the last "Final Score:" / 5. ValueError if there is none or it is out of 1 .. 5."""
    score = parsed_number(r"final score\s*:\s*\**\s*(-?\d+(?:\.\d+)?)")(choice)
    if not 1 <= score <= 5:
        raise ValueError(f"score out of 1 .. 5: {score}")
    return score / 5


def lower_of_two(choice):
    """min(a, b) / 25 of the JSON {"reasoning": ..., "score": [a, b]} in an answer. ValueError if it is not there."""
    text = answer_text(choice)
    try:
        pair = json.loads(text[text.index("{") : text.rindex("}") + 1], strict=False)["score"]
    except (ValueError, KeyError, TypeError):  # the reasoning has a stray quote, say
        found = re.findall(r'"score"\s*:\s*(\[[^\[\]]*\])', text)
        pair = json.loads(found[-1]) if found else None
    numbers = isinstance(pair, list) and all(isinstance(n, (int, float)) and 0 <= n <= 25 for n in pair)
    if not numbers or len(pair) != 2:
        raise ValueError(f"no two scores 0 .. 25 in the answer {text[-80:]!r}")
    return min(pair) / 25


def _load(name, key, read, judge_url, judge_model, template, extra, options):
    text = read_template("unifiedreward", {key: "{prompt}"}, template)[key]
    ask = connect(name, judge_url, judge_model, **options)

    def score(samples, prompts, metadata):
        if len(samples["image"]) != len(prompts):
            raise ValueError(f"{name}: {len(samples['image'])} pictures for {len(prompts)} prompts")
        contents = [message([image], text, prompt) for image, prompt in zip(samples["image"], prompts)]
        return ask(contents, read, max_completion_tokens=MAX_TOKENS, **(extra or {}))

    score.needs, score.strict = ("image",), None
    return score


def load(device="cpu", judge_url=None, judge_model=None, template=None, extra=None, **options):
    """UnifiedReward 2.0 of samples["image"] under `prompts`, 0.2 .. 1. It runs at `judge_url`, whatever `device` is.

    template: None = what `python -m rewards fetch unifiedreward` cached; else JSON, {"point": text with {prompt}}.
    extra: more fields of the request. options: concurrency, timeout (s), retries of vlm_judge.connect.

    Raises RuntimeError if the template is not here or no judge answers.
    """
    return _load("unifiedreward", "point", aspects, judge_url, judge_model, template, extra, options)


def load_v1(device="cpu", judge_url=None, judge_model=None, template=None, extra=None, **options):
    """UnifiedReward of the first generation (UnifiedReward-qwen-7b). As `load`; the key of a template is "point_v1"."""
    return _load("unifiedreward_v1", "point_v1", final_score, judge_url, judge_model, template, extra, options)


def load_edit(device="cpu", judge_url=None, judge_model=None, template=None, extra=None, **options):
    """UnifiedReward-Edit of samples["image"], edited from samples["source"] by the instructions in `prompts`, 0 .. 1.

    Two requests a sample. As `load`; the keys of a template are "edit_following", with {instruction}, "edit_quality".
    """
    name = "unifiedreward_edit"
    texts = read_template("unifiedreward", {"edit_following": "{instruction}", "edit_quality": ""}, template)
    ask = connect(name, judge_url, judge_model, **options)

    def score(samples, prompts, metadata):
        images, sources = samples["image"], samples["source"]
        if not len(images) == len(sources) == len(prompts):
            counts = f"{len(images)} pictures, {len(sources)} sources"
            raise ValueError(f"{name}: {counts} for {len(prompts)} instructions")
        contents = [
            message([source, image], texts["edit_following"], prompt, "{instruction}")
            for source, image, prompt in zip(sources, images, prompts)
        ] + [message([image], texts["edit_quality"], "") for image in images]
        following, quality = ask(contents, lower_of_two, max_completion_tokens=MAX_TOKENS, **(extra or {})).chunk(2)
        return (following * quality).sqrt()

    score.needs, score.strict = ("image", "source"), None
    return score
