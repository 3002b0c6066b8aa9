"""What users say for captions of the shapes world (data/shapes.py): every class, colour and relation has three other
names, and there are three ways to ask. The task of refine-then-draw: a language model turns what the user says into
what the image generator was trained on.

    a red circle left of a blue square          the caption
    draw a ruby disc west of a blue tile        one of the ways to ask for it
    i would like to see a red ring on the left side of a navy square

All of it can be undone exactly, see `canonical`.
"""

import functools
import re

from data import shapes

# No name stands for two words, all plurals end in "s", and none begins with a vowel, which would need an "an".
SYNONYMS = {
    "circle": ("disc", "ball", "ring"),
    "square": ("block", "tile", "panel"),
    "triangle": ("wedge", "pyramid", "cone"),
    "red": ("crimson", "scarlet", "ruby"),
    "yellow": ("golden", "lemon", "mustard"),
    "green": ("jade", "mint", "lime"),
    "blue": ("navy", "cobalt", "sapphire"),
    "purple": ("violet", "lilac", "mauve"),
    "black": ("charcoal", "jet", "raven"),
    "left of": ("on the left side of", "to the left of", "west of"),
    "right of": ("on the right side of", "to the right of", "east of"),
    "above": ("over", "on top of", "north of"),
    "below": ("under", "beneath", "south of"),
}
TEMPLATES = ("{}", "draw {}", "i would like to see {}")

_CANONICAL = {name: word for word, names in SYNONYMS.items() for name in (word, *names)}
# The longest first: "to the left of" is not "to the" and "left of".
_NAMES = re.compile(rf"\b({'|'.join(sorted(_CANONICAL, key=len, reverse=True))})(s?)\b")
_WORDS = re.compile(rf"\b({'|'.join(SYNONYMS)})(s?)\b")


def user_prompt(metadata, rng):
    """How a user may ask for the picture of a prompt of data/shapes.py: each of the words that have SYNONYMS becomes,
    with equal probability, itself or one of these, and the caption stands in one of TEMPLATES. `rng`: a numpy
    Generator."""

    def name(match):
        names = (match[1], *SYNONYMS[match[1]])
        return names[rng.integers(len(names))] + match[2]

    caption = _WORDS.sub(name, metadata["prompt"])
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(caption)


def canonical(text):
    """The caption that `user_prompt` made `text` of. ValueError if it did not make it."""
    caption = text
    for template in TEMPLATES[1:]:
        caption = caption.removeprefix(template.format("")) if caption == text else caption
    caption = _NAMES.sub(lambda match: _CANONICAL[match[1]] + match[2], caption)
    if caption not in _captions():
        raise ValueError(f"no way to ask for a picture of the shapes world: {text!r}")
    return caption


def all_words():
    """Every single word that can stand in a user's prompt, plurals included, in alphabetical order."""
    text = [*TEMPLATES, *(name for names in SYNONYMS.values() for name in names), *_captions()]
    text += [name + "s" for word in shapes.CLASSES for name in SYNONYMS[word]]
    return sorted({word for t in text for word in t.replace("{}", "").split()})


@functools.cache
def _captions():
    return frozenset(metadata["prompt"] for metadata in shapes.all_prompts())
