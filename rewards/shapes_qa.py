"""Is the reply the word asked for? 1 or 0; metadata["answer"] holds the word (data/shapes_qa.py).

The answer is what stands in the last <answer>...</answer> of the reply, or else all of the reply. It has to be that
word and nothing else, but for white space around it, capitals and a final dot: "Red." is right where "red" is, "red
blue" and "it is red" are not, so that nobody is paid for naming every colour. Numbers are asked for, and given, in
digits.
"""

import torch

from rewards import format


def word(text):
    """The answer that a reply gives, lower case, without a final dot."""
    inside = format.answer(text)
    return (format.reply(text) if inside is None else inside).strip().removesuffix(".").rstrip().lower()


def load(device="cpu"):
    """The reward `shapes_qa` of samples["text"]; what is not a string is NaN. score raises ValueError, naming the item,
    for metadata without an answer."""

    def score(samples, prompts, metadata):
        right = []
        for k, (text, item) in enumerate(zip(samples["text"], metadata)):
            gold = item.get("answer") if isinstance(item, dict) else None
            if not isinstance(gold, str) or not word(gold):
                raise ValueError(f"shapes_qa, item {k}: metadata 'answer': expected a word, got {gold!r}")
            right.append(float(word(text) == word(gold)) if isinstance(text, str) else torch.nan)
        return torch.tensor(right, dtype=torch.float32)

    score.needs, score.strict = ("text",), score
    return score
