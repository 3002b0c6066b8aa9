"""Did a reply keep to the tags it was asked for? 1 or 0, by the text alone.

format        exactly one <answer>...</answer> that is not blank; other text may stand before and behind it
think_format  <think>...</think> <answer>...</answer>, neither blank and nothing else but white space and end tokens

Tags may hold line breaks. Tags inside of the thoughts do not count, as the thoughts may well talk about them, and
nothing counts behind a <think> that is never closed: such a reply was cut off. The opening <think> may be missing, as
the chat templates of thinking models end the prompt with it.
"""

import torch

END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<end_of_turn>",
    "<eos>",
    "<pad>",
    "</s>",
)


def trimmed(text):
    """`text` without white space around it and end tokens behind it."""
    text = text.strip()
    while text.endswith(END_TOKENS):
        text = next(text.removesuffix(token) for token in END_TOKENS if text.endswith(token)).rstrip()
    return text


def reply(text):
    """What follows the thoughts, trimmed; "" while they are still open."""
    rest = trimmed(text).rpartition("</think>")[2]
    return "" if "<think>" in rest else rest


def answer(text):
    """The last <answer>...</answer> of the reply, stripped of white space; None if there is none."""
    before, closed, _ = reply(text).rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside.strip() if opened and closed else None


def has_answer(text):
    """The rule of `format`."""
    rest = reply(text)
    return bool(answer(text)) and rest.count("<answer>") == 1 and rest.count("</answer>") == 1


def has_thoughts_and_answer(text):
    """The rule of `think_format`."""
    thoughts, _, rest = trimmed(text).removeprefix("<think>").partition("</think>")
    rest = rest.strip()
    if not thoughts.strip() or "<think>" in thoughts or "think>" in rest:
        return False
    return rest.startswith("<answer>") and rest.endswith("</answer>") and has_answer(rest)


def load(device="cpu"):
    """The reward `format` of samples["text"]; what is not a string is NaN."""
    return _check(has_answer)


def load_think(device="cpu"):
    """The reward `think_format` of samples["text"]; what is not a string is NaN."""
    return _check(has_thoughts_and_answer)


def _check(rule):
    def score(samples, prompts, metadata):
        kept = [float(rule(text)) if isinstance(text, str) else torch.nan for text in samples["text"]]
        return torch.tensor(kept, dtype=torch.float32)

    score.needs, score.strict = ("text",), None
    return score
