"""The shapes world as pretrain.py trains on it: endless batches, drawn on the fly, to be used as data/stream.py's
`Batches` are.

    shapes        captioned pictures                                       prompt, image
    shapes-edit   pictures, what to change, and what they should become    prompt, source, image
    shapes-qa     questions about pictures and their answers               prompt, image, answer
    shapes-cot    pictures asked for in a user's words, and their caption  prompt, image, answer
"""

import math

import numpy as np
from PIL import Image

from data import phrases, shapes, shapes_qa

WORLDS = ("shapes", "shapes-edit", "shapes-qa", "shapes-cot")


class World:
    """Batches of one world, or of two of which the second has `share` of the batches, as evenly as can be.

    names: one or two of WORLDS. size: of the pictures, in pixels. rank, world_size: every rank takes its own batches,
    and N ranks see in one batch each what one rank sees in N. held_out: prompts and scenes that nobody trains on. What
    a batch holds is a function of these and its number alone, so the number is all the state there is.
    Raises ValueError for a name that is not of WORLDS.
    """

    def __init__(self, names, share, seed, batch_size, size, rank=0, world_size=1, held_out=False):
        for name in names:
            if name not in WORLDS:
                raise ValueError(f"{name}: no shapes world; expected one of {', '.join(WORLDS)}")
        self.names, self.share, self.seed, self.batch_size, self.size = names, share, seed, batch_size, size
        self.rank, self.world_size, self.held_out, self.number = rank, world_size, held_out, 0

    def next(self):
        """The next batch: a list of dicts with prompt (str), image (PIL, RGB), source (the same, or None), answer (str
        or None)."""
        number = self.number * self.world_size + self.rank
        self.number += 1
        second = len(self.names) == 2 and math.floor((number + 1) * self.share) > math.floor(number * self.share)
        return read(self.names[second], self.seed, number * self.batch_size, self.batch_size, self.size, self.held_out)

    def counts(self):
        """Samples seen, and bad ones among them: there are none."""
        return dict(seen=self.number * self.batch_size, bad_image=0, bad_prompt=0, bad_file=0)

    def state(self):
        return dict(number=self.number)

    def load_state(self, state):
        self.number = state["number"]


def read(name, seed, start, count, size, held_out=False):
    """Samples `start` ... `start + count - 1` of the endless stream `seed` of a world, as a list of dicts."""
    sources, answers = [None] * count, [None] * count
    if name == "shapes-edit":
        edits = shapes.held_out_edits() if held_out else None
        before, images, metadata = shapes.edits(seed, start, count, edits, size)
        sources = [Image.fromarray(source) for source in before]
    elif name == "shapes-qa":
        images, metadata = shapes_qa.questions(seed, start, count, "held_out" if held_out else "train", size=size)
        answers = [row["metadata"]["answer"] for row in metadata]
    else:
        images, metadata = shapes.pictures(seed, start, count, shapes.held_out_prompts() if held_out else None, size)
    prompts = [row["prompt"] for row in metadata]
    if name == "shapes-cot":
        answers = prompts
        prompts = [phrases.user_prompt(m, np.random.default_rng([seed, start + k, 1])) for k, m in enumerate(metadata)]
    columns = zip(prompts, images, sources, answers)
    return [dict(prompt=p, image=Image.fromarray(i), source=s, answer=a) for p, i, s, a in columns]
