"""
Rewards on the command line.

    python -m rewards                                                 every reward, what it needs, whether it is ready
    python -m rewards score --reward ocr --image a.png --prompt 'a sign that says "HI"'
    python -m rewards fetch hpsv3                                     the prompt template of a published checkpoint
"""

import argparse
import json
import sys

import numpy as np
from PIL import Image

import rewards


def table():
    """One line a reward: roles it reads, size and licence of its weights, and ready, or what to do first."""
    rows = [("reward", "reads", "GB", "licence of the weights", "")]
    for name, reward in rewards.REWARDS.items():
        size = f"{reward.gigabytes:.1f}" if reward.gigabytes else ""
        rows.append((name, " ".join(reward.needs), size, reward.licence, "; ".join(rewards.missing(name)) or "ready"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows)


def score(args):
    """Prints one JSON object: the score of every reward for the one sample of the command line, and strict forms."""
    samples = {role: [_picture(path)] for role in ("image", "source", "recon") if (path := getattr(args, role))}
    if args.text is not None:
        samples["text"] = [args.text]
    metadata = json.loads(args.metadata)
    if not isinstance(metadata, dict):
        raise ValueError(f"--metadata {args.metadata}: expected a JSON object")
    found = {}
    for name, metric, _ in rewards.parse(args.reward):
        loaded = rewards.load(name, args.device, args.judge_url, args.judge_model)
        rewards.check_needs(loaded, samples)
        forms = {metric: loaded} | ({f"{metric}/strict": loaded.strict} if loaded.strict else {})
        for form_name, form in forms.items():
            value = form(samples, [args.prompt], [metadata]).item()
            found[form_name] = value if value == value else None  # NaN: it failed
    print(json.dumps(found))


def _picture(path):
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: expected a picture: {error}") from None


def main():
    parser = argparse.ArgumentParser(
        prog="python -m rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    scoring = commands.add_parser("score", help="score one sample")
    scoring.add_argument("--reward", nargs="+", required=True, help="names, or http://host:port/name")
    for role, what in (("image", "the picture"), ("source", "the picture before the edit"), ("recon", "the way back")):
        scoring.add_argument(f"--{role}", metavar="FILE", help=what)
    scoring.add_argument("--text", help="what a language model wrote")
    scoring.add_argument("--prompt", default="", help="the prompt (default: empty)")
    scoring.add_argument("--metadata", default="{}", metavar="JSON", help='e.g. {"answer": "42"} (default: {})')
    scoring.add_argument("--device", default="cpu", help="where reward models run (default: cpu)")
    scoring.add_argument("--judge-url", default="", help="OpenAI-compatible endpoint of rewards that ask a judge")
    scoring.add_argument("--judge-model", default="", help="its model (default: the one it serves)")
    fetching = commands.add_parser("fetch", help="get the prompt template of a published checkpoint")
    fetching.add_argument("name", help="hpsv3, editreward or unifiedreward")
    fetching.add_argument("source", nargs="?", help="folder, wheel or file of the upstream project (default: download)")
    args = parser.parse_args()
    try:
        if args.command == "score":
            score(args)
        elif args.command == "fetch":
            from rewards import fetch

            print(f"wrote {fetch.fetch(args.name, args.source)}")
        else:
            print(table())
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
