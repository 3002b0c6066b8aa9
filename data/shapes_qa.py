"""Questions about pictures of the shapes world, a task for models that see: it needs no files, and its answers, one
word each, can be checked exactly.

    {"prompt": "how many circles?", "metadata": {"answer": "3", "tag": "counting"}}

tag       question                               answers                best constant answer
counting  how many circles? how many red shapes?  1 2 3 4                1/4
color     what color is the square?               the six colours        1/6
shape     what shape is red?                      circle square triangle 1/3
position  what color is the leftmost shape?       the six colours        1/6

Tags come equally often and so do the answers of a tag: who reads the question but does not look at the picture is right
23 % of the time, who always gives the same answer 8 % (any colour or shape; a number 6 %).

A picture shows one to four objects. Its scene is which objects these are, wherever they lie, and scenes are split once
and for all by their hash: nobody who trains has seen a held-out picture, nor another one of the same objects.
"""

import functools
import hashlib

import numpy as np

from data import shapes

TAGS = ("counting", "color", "shape", "position")
MAX_OBJECTS = 4
NUMBERS = ("1", "2", "3", "4")
EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "highest": (0, -1), "lowest": (0, 1)}  # direction (x, y), y down
EXTREME_MARGIN = 4.0  # pixels that its centre is beyond that of any other object
SIDES = {"held_out": (0, 2), "validation": (2, 3), "train": (3, 16)}  # first hexadecimal digit of the hash


@functools.cache
def _side(scene):
    digit = int(hashlib.sha256(repr(scene).encode()).hexdigest()[0], 16)
    return next(side for side, (first, last) in SIDES.items() if first <= digit < last)


def side_of(things):
    """The side of the split, "train", "validation" or "held_out", of a picture of `things`: (class, colour) pairs, in
    any order."""
    return _side(tuple(sorted(things)))


def answers(tag):
    """What the answer of a question of kind `tag` can be: a tuple of words."""
    return {"counting": NUMBERS, "shape": shapes.CLASSES}.get(tag, tuple(shapes.COLORS))


def all_answers():
    """The 13 words that answer some question."""
    return [*NUMBERS, *shapes.CLASSES, *shapes.COLORS]


def all_questions():
    """The 22 questions that there are."""
    out = [f"how many {name}s?" for name in shapes.CLASSES] + [f"how many {color} shapes?" for color in shapes.COLORS]
    out += [f"what color is the {name}?" for name in shapes.CLASSES]
    out += [f"what shape is {color}?" for color in shapes.COLORS]
    return out + [f"what color is the {extreme} shape?" for extreme in EXTREMES]


def _others(rng, count, kind=None, without=None):
    """`count` random things, none of the class (kind 0) or colour (kind 1) `without`."""
    classes = [c for c in shapes.CLASSES if kind != 0 or c != without]
    colors = [c for c in shapes.COLORS if kind != 1 or c != without]
    return [(classes[rng.integers(len(classes))], colors[rng.integers(len(colors))]) for _ in range(count)]


def _ask(tag, answer, rng):
    """A question of kind `tag` whose answer is `answer`: (question, things, extreme). The things are (class, colour)
    pairs; where extreme is not None, the first of them has to lie there."""
    names, colors = shapes.CLASSES, list(shapes.COLORS)
    if tag == "counting":
        number, kind = int(answer), int(rng.integers(2))
        total = rng.integers(number, MAX_OBJECTS + 1)
        value = (names, colors)[kind][rng.integers(len((names, colors)[kind]))]
        counted = [(value, color) if kind == 0 else (name, value) for name, color in _others(rng, number)]
        question = f"how many {value}s?" if kind == 0 else f"how many {value} shapes?"
        return question, counted + _others(rng, total - number, kind, value), None
    if tag == "color":
        name = names[rng.integers(len(names))]
        others = _others(rng, rng.integers(MAX_OBJECTS), 0, name)
        return f"what color is the {name}?", [(name, answer), *others], None
    if tag == "shape":
        color = colors[rng.integers(len(colors))]
        others = _others(rng, rng.integers(MAX_OBJECTS), 1, color)
        return f"what shape is {color}?", [(answer, color), *others], None
    extreme = list(EXTREMES)[rng.integers(len(EXTREMES))]
    others = _others(rng, rng.integers(1, MAX_OBJECTS), 1, answer)
    return f"what color is the {extreme} shape?", [(names[rng.integers(len(names))], answer), *others], extreme


def _lies_there(boxes, extreme):
    offset = (boxes[:1, :2] + boxes[:1, 2:] - boxes[1:, :2] - boxes[1:, 2:]) / 2  # of the first's centre
    return (offset @ np.array(EXTREMES[extreme]) >= EXTREME_MARGIN).all()


def _question(seed, index, side, tags):
    """Question `index` of the stream `seed`: (row, things, boxes [len(things), 4])."""
    rng = np.random.default_rng([seed, index])
    tag = tags[rng.integers(len(tags))]
    answer = answers(tag)[rng.integers(len(answers(tag)))]  # before the scene, so that it is as likely as any other
    while True:
        question, things, extreme = _ask(tag, answer, rng)
        if side_of(things) != side:
            continue
        boxes = shapes._layout(np.arange(len(things)), [], rng)
        if extreme is None or _lies_there(boxes, extreme):
            return {"prompt": question, "metadata": {"answer": answer, "tag": tag}}, things, boxes


def questions(seed, start, count, side="train", tags=TAGS, size=shapes.SIZE):
    """Questions `start` ... `start + count - 1` of the endless stream `seed`, and the pictures they are about: (uint8
    [count, size, size, 3], list of rows as above). Question k is a function of (seed, start + k), side and tags alone.

    side: "train", "validation" (for decisions within a training run) or "held_out" (that nothing is trained or selected
    on), 13, 1 and 2 of 16 scenes. tags: the kinds to draw from, one as often as another.
    """
    drawn = [_question(seed, start + k, side, tags) for k in range(count)]
    pictures = [shapes._paint(things, boxes, size) for _, things, boxes in drawn]
    return np.array(pictures, np.uint8).reshape(count, size, size, 3), [row for row, _, _ in drawn]


def scenes(seed, start, count, side="train", tags=TAGS, size=shapes.SIZE):
    """The pictures of `questions`, and what they show: (uint8 [count, size, size, 3], list of (things, boxes)), things
    a list of (class, colour), boxes [len(things), 4] as (x0, y0, x1, y1) in pixels at size 32."""
    drawn = [_question(seed, start + k, side, tags)[1:] for k in range(count)]
    pictures = [shapes._paint(things, boxes, size) for things, boxes in drawn]
    return np.array(pictures, np.uint8).reshape(count, size, size, 3), drawn
