"""Prompts in GenEval's metadata format (arXiv 2310.11513), and the scores of its evaluation.

    python -m data.geneval --out train.jsonl --count 50000 --seed 0 --leave-out evaluation_metadata.jsonl

One JSON object per line:

    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "bench", "count": 1, "position": ["left of", 0]}], "prompt": "..."}

`include` is what the picture has to show. `color` and `position` are optional; a position is a relation and the index
of the clause it refers to, here "the bench is left of the dog". `exclude`, of the counting task, has the count at which
there are too many.

The official file (553 prompts, github.com/djghosh13/geneval) is not part of this repository. What it asks for is left
out of the training file by meaning, not by wording: "a cup and a fork" is left out for "a fork and a cup".
geneval_train.jsonl in this folder is a smaller file from the same words, with nothing left out (data/make_prompts.py).
"""

import argparse
import json
import math
import random
from itertools import permutations, product

from data.make_prompts import BARE, CLASSES, NUMBERS, PAIRS, RELATIONS, one_of, plural
from data.make_prompts import GENEVAL_COLOURS as COLORS

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # the benchmark's order
# Of the training set of Flow-GRPO (arXiv 2505.05470). The official file has the single objects of all classes, so that
# without it none are left to train on.
WEIGHTS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


# ----------------------------------------------------------------------------------------------------------------------
# Metadata


def check(metadata):
    """Raises ValueError, saying what was expected, unless `metadata` is a dict in the format above (the prompt may be
    missing)."""

    def expect(right, what, got):
        if not right:
            raise ValueError(f"expected {what}, got {got!r}")

    expect(isinstance(metadata, dict), "a dict with 'tag' and 'include'", metadata)
    expect(isinstance(metadata.get("tag"), str), "a 'tag', like 'counting'", metadata.get("tag"))
    expect(isinstance(metadata.get("exclude", []), list), "'exclude' to be a list", metadata.get("exclude"))
    include = metadata.get("include")
    expect(isinstance(include, list) and include, "'include' to be a list of objects to show", include)
    for i, clause in enumerate([*include, *metadata.get("exclude", [])]):
        expect(isinstance(clause, dict), "a clause with 'class' and 'count'", clause)
        expect(clause.get("class") in CLASSES, "a class of GenEval (CLASSES in data/make_prompts.py)", clause)
        expect(type(clause.get("count")) is int and clause["count"] > 0, "a positive 'count'", clause)
        expect("color" not in clause or clause["color"] in COLORS, f"a color out of {', '.join(COLORS)}", clause)
        if "position" in clause:
            position = clause["position"]
            right = isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS
            right = right and type(position[1]) is int and 0 <= position[1] < min(i, len(include))
            expect(right, "a position [relation, index of an earlier include clause]", clause)


def read(path):
    """The metadata dicts, with their prompts, of a GenEval file. Raises ValueError naming the line that is not one."""
    items = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                items.append(json.loads(line))
                check(items[-1])
                if not isinstance(items[-1].get("prompt"), str):
                    raise ValueError(f"expected a 'prompt', got {items[-1].get('prompt')!r}")
            except ValueError as error:  # what json raises, too
                raise ValueError(f"{path}:{number}: {error}") from None
    if not items:
        raise ValueError(f"{path}: expected at least one line, got an empty file")
    return items


def meaning(metadata):
    """What is asked for, whatever the words: equal for "a cup and a fork" and "a fork and a cup", and for "a dog left
    of a cat" and "a cat right of a dog"."""

    def thing(clause):
        return clause["class"], clause["count"], clause.get("color")

    parts = [thing(clause) for clause in metadata["include"]]
    for clause in metadata["include"]:
        if "position" in clause:
            relation, target = clause["position"]
            ends = thing(clause), thing(metadata["include"][target])
            if relation in ("right of", "below"):
                relation, ends = {"right of": "left of", "below": "above"}[relation], ends[::-1]
            parts.append((relation, *ends))
    return frozenset(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Training prompts


def _space(tag):
    """All choices of words of a task, a list of tuples for `_item`."""
    things = [name for name in CLASSES if name != "person"]  # a purple person is not what anyone means
    if tag == "single_object":
        return list(product(CLASSES))
    if tag == "two_object":
        return list(permutations(CLASSES, 2))
    if tag == "colors":
        return list(product(things, COLORS))
    if tag == "color_attr":
        return list(product(permutations(things, 2), permutations(COLORS, 2)))
    if tag == "counting":
        return list(product([name for name in CLASSES if name not in PAIRS], NUMBERS, BARE))
    return list(product(permutations(CLASSES, 2), RELATIONS))


def _item(tag, words):
    """The metadata dict of one element of `_space(tag)`."""
    more = {}
    if tag in ("single_object", "two_object"):
        include = [{"class": name, "count": 1} for name in words]
    elif tag == "colors":
        include = [{"class": words[0], "count": 1, "color": words[1]}]
    elif tag == "color_attr":
        include = [{"class": name, "count": 1, "color": color} for name, color in zip(*words)]
    elif tag == "counting":
        name, count, where = words
        include, more = [{"class": name, "count": count}], {"exclude": [{"class": name, "count": count + 1}]}
        text = f"{NUMBERS[count]} {plural(name)}{where}"
    else:
        (there, here), relation = words
        include = [{"class": there, "count": 1}, {"class": here, "count": 1, "position": [relation, 0]}]
        text = f"{one_of(here)} {relation} {one_of(there)}"
    if tag not in ("counting", "position"):
        text = " and ".join(one_of(clause["class"], clause.get("color")) for clause in include)
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {text}"}


def generate(count, seed=0, weights=WEIGHTS, leave_out=()):
    """`count` metadata dicts in random order: as many of each task as its weight says, none that means what an item of
    `leave_out` does. A task with fewer prompts than asked for (counting has 936) repeats them, all equally often, so
    that the weights hold. The same arguments give the same prompts.

    Raises ValueError for a task that is not in TASKS, or has nothing left.
    """
    unknown = [tag for tag in weights if tag not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r} (known: {', '.join(TASKS)})")
    if not weights or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(f"expected at least one task, and finite weights above 0, got {weights}")
    known = {meaning(item) for item in leave_out}
    items, before, total = [], 0, sum(weights.values())
    for tag, weight in weights.items():  # cumulative, so that the rounded parts add up to `count`
        part = round(count * (before + weight) / total) - round(count * before / total)
        before += weight
        space, new = _space(tag), []
        random.Random(f"{seed} {tag}").shuffle(space)
        for words in space:
            if len(new) == part:
                break
            item = _item(tag, words)
            if meaning(item) not in known:
                new.append(item)
        if part and not new:
            raise ValueError(f"no prompt of the task {tag!r} is left: all are in the file to leave out")
        items += [new[i % len(new)] for i in range(part)]
    random.Random(seed).shuffle(items)
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def scores(strict, metadata):
    """The benchmark's table: strict results (0 or 1) of any number of pictures and their metadata dicts -> {task: share
    of correct pictures, ..., "overall": mean over the tasks, not over the pictures, "pictures": share of correct ones,
    "prompts": share of prompts with at least one}.

    A picture with a NaN result was not judged and does not count. A task without judged pictures is NaN, and then
    "overall" too: the mean of fewer tasks is not comparable.
    """
    results = [float(value) for value in strict]
    if len(results) != len(metadata):
        raise ValueError(f"geneval: {len(results)} results for {len(metadata)} metadata dicts")
    tasks, prompts = {tag: [] for tag in TASKS}, {}
    for result, item in zip(results, metadata):
        if item["tag"] not in tasks:
            raise ValueError(f"geneval: unknown task {item['tag']!r} (known: {', '.join(TASKS)})")
        if not math.isnan(result):
            tasks[item["tag"]].append(result)
            prompts.setdefault(json.dumps(item, sort_keys=True), []).append(result)

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    table = {tag: mean(values) for tag, values in tasks.items()}
    table["overall"] = mean(list(table.values()))
    table["pictures"] = mean([result for values in tasks.values() for result in values])
    table["prompts"] = mean([max(values) for values in prompts.values()])
    return table


def main():
    parser = argparse.ArgumentParser(description="Writes training prompts in GenEval's metadata format.")
    parser.add_argument("--out", required=True, help="file to write, .jsonl")
    parser.add_argument("--count", type=int, default=50_000, help="number of lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--leave-out", help="GenEval file whose prompts are not to be trained on, like the official one"
    )
    weights = [f"{tag}:{weight}" for tag, weight in WEIGHTS.items()]
    parser.add_argument("--weights", nargs="+", default=weights, metavar="TASK:WEIGHT", help=" ".join(weights))
    args = parser.parse_args()
    try:
        if args.count < 1:
            raise ValueError(f"--count {args.count}: expected at least 1")
        weights = {}
        for spec in args.weights:
            tag, _, weight = spec.partition(":")
            try:
                weights[tag] = float(weight)
            except ValueError:
                raise ValueError(f"--weights {spec}: expected TASK:WEIGHT, like position:7") from None
        items = generate(args.count, args.seed, weights, read(args.leave_out) if args.leave_out else ())
        with open(args.out, "w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(item)}\n" for item in items)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: {len(items)} prompts, {len({item['prompt'] for item in items})} of them distinct")


if __name__ == "__main__":
    main()
