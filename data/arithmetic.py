"""Addition of two-digit numbers, a language task that needs no files and whose answers can be checked exactly:

    {"prompt": "34+57=", "metadata": {"answer": 91}}

All 8,100 problems "ab+cd=" of 10 ... 99, split once and for all: 7,300 to train on, 300 for validation (where a
training run may decide to stop) and 500 held out.
"""

import functools
import hashlib
import itertools

import numpy as np

NUMBERS = range(10, 100)
NUM_HELD_OUT, NUM_VALIDATION = 500, 300


def _problem(a, b):
    return {"prompt": f"{a}+{b}=", "metadata": {"answer": a + b}}


@functools.cache
def _split():
    """(train, validation, held out) pairs (a, b), each in the order of `all_problems`."""
    sums = list(itertools.combinations_with_replacement(NUMBERS, 2))
    held_out, validation = set(), set()
    for a, b in sorted(sums, key=lambda pair: hashlib.sha256(f"{pair[0]}+{pair[1]}=".encode()).hexdigest()):
        both = {(a, b), (b, a)}  # one pair where a = b; so a side one short of its size waits for the next of those
        if len(held_out | both) <= NUM_HELD_OUT:
            held_out |= both
        elif len(validation | both) <= NUM_VALIDATION:
            validation |= both
    pairs = list(itertools.product(NUMBERS, NUMBERS))
    train = [pair for pair in pairs if pair not in held_out and pair not in validation]
    return train, [pair for pair in pairs if pair in validation], [pair for pair in pairs if pair in held_out]


def all_problems():
    """All 8,100 problems, by the first number, then the second: a list of dicts."""
    return [_problem(a, b) for a, b in itertools.product(NUMBERS, NUMBERS)]


def train_problems():
    """7,300 problems. 34+57 and 57+34 are always on the same side of the split, which depends on nothing but them."""
    return [_problem(a, b) for a, b in _split()[0]]


def validation_problems():
    """300 problems, for decisions within a training run."""
    return [_problem(a, b) for a, b in _split()[1]]


def held_out_problems():
    """500 problems that nothing is trained or selected on."""
    return [_problem(a, b) for a, b in _split()[2]]


def stream(seed, start, count, problems=None):
    """Problems `start` ... `start + count - 1` of the endless stream `seed`, drawn uniformly with replacement from
    `problems` (default: `train_problems()`): a list of dicts. Problem k is a function of (seed, start + k) alone, so a
    stream can be cut anywhere and gone on with."""
    problems = train_problems() if problems is None else problems
    return [problems[np.random.default_rng([seed, start + k]).integers(len(problems))] for k in range(count)]
