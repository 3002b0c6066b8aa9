"""Collects the runs of runs/<algorithm>.sh: numbers to runs/results/<algorithm>.json, and the figure of all algorithms
whose numbers are there to assets/learning_curves.png.

    python -m runs.plot dance_grpo

Minutes are minutes of training (rollout, reward, update; for the control its updates), without evaluation and start-up.
"""

import argparse
import json
import os
import platform

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import models
import rewards
from data import prompts as prompt_data
from data import shapes
from kernels.sde_step import fold_seed
from models import run_folder

SEEDS = (1, 2, 3)
COLORS = {
    "flow_grpo": "#c2410c",
    "dance_grpo": "#1d4ed8",
    "control": "#64748b",
    "rloo": "#c2410c",
    "remax": "#1d4ed8",
    "rloo_shapes_qa": "#047857",
}
LABELS = {
    "flow_grpo": "flow_grpo.py",
    "dance_grpo": "dance_grpo.py",
    "control": "further pretraining",
    "rloo": "rloo.py",
    "remax": "remax.py",
    "rloo_shapes_qa": "rloo.py, questions about pictures",
}
PANELS = {  # of the figure: title -> what is in it
    "pictures: strict accuracy, held-out prompts": ("flow_grpo", "dance_grpo"),
    "text: greedy accuracy, held-out prompts": ("rloo", "remax", "rloo_shapes_qa"),
}
TAGS = (
    "colors",
    "counting",
    "two_object",
    "counting",
    "single_object",
    "colors",
    "counting",
    "position",
)  # of the strip


def history(run):
    """(minutes of training so far, strict accuracy) at every evaluation of a run."""
    seconds, points = 0.0, []
    for row in run_folder.rows(run):
        if "eval_strict" in row:
            points.append((seconds / 60, row["eval_strict"]))
        seconds += sum(row.get(f"seconds_{phase}", 0.0) for phase in ("rollout", "reward", "update"))
    return points


@torch.no_grad()
def pictures(folder, prompts, seed):
    """uint8 pictures of a model for `prompts`, with noise from `seed` and the default run's six ODE steps."""
    model = models.load(folder, "cpu", torch.float32)
    sigmas = model.sigmas(6, 32, 32).tolist()
    noise = model.init_noise(fold_seed(seed, torch.arange(len(prompts))), 32, 32)
    out = []
    for start in range(0, len(prompts), 128):
        x, cond = noise[start : start + 128], model.encode(prompts[start : start + 128])
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            x = x + model.velocity(x, torch.full((len(x),), sigma), cond) * (sigma_next - sigma)
        out += run_folder.to_uint8(model.decode(x))
    return out


def by_tag(folder, count=1536):
    """Strict accuracy per tag on held-out prompts of all six tags, as many pictures of each."""
    eval_set = prompt_data.load("shapes", "eval")
    rows = [eval_set[i] for i in prompt_data.order(len(eval_set), 0, 0, count)]
    metadata = [row["metadata"] for row in rows]
    drawn = pictures(folder, [row["prompt"] for row in rows], 8)
    strict = rewards.load("shapes").strict({"image": drawn}, None, metadata)
    return {tag: strict[[m["tag"] == tag for m in metadata]].mean().item() for tag in shapes.TAGS}


def strip(path, before, after):
    """Pictures of both models for the same held-out prompts and noise: a row before, a row after."""
    eval_set = prompt_data.load("shapes", "eval")
    prompts = []
    for i in prompt_data.order(len(eval_set), 1, 0, len(eval_set)):
        prompt, tag = eval_set[i]["prompt"], eval_set[i]["metadata"]["tag"]
        if len(prompts) < len(TAGS) and tag == TAGS[len(prompts)] and prompt not in prompts:
            prompts.append(prompt)
    cell = 96
    sheet = Image.new("RGB", (70 + len(prompts) * (cell + 6), 2 * (cell + 6) + 44), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for line, (label, folder) in enumerate((("before", before), ("after", after))):
        draw.text((6, 6 + line * (cell + 6) + cell // 2), label, fill="black", font=font)
        for i, picture in enumerate(pictures(folder, prompts, 7)):
            corner = (66 + i * (cell + 6), 6 + line * (cell + 6))
            sheet.paste(Image.fromarray(picture).resize((cell, cell), Image.NEAREST), corner)
            draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + cell, corner[1] + cell), outline="#cccccc")
    for i, prompt in enumerate(prompts):
        for n, words in enumerate(run_folder.wrap(prompt, font, cell)[:3]):
            draw.text((66 + i * (cell + 6), 2 * (cell + 6) + 6 + 12 * n), words, fill="black", font=font)
    sheet.save(path)


def collect(algorithm):
    """Numbers of the default runs of one algorithm; flow_grpo's script also runs the control."""
    runs = {algorithm: [history(f"outputs/{algorithm}-seed{seed}") for seed in SEEDS]}
    if algorithm == "flow_grpo":
        runs["control"] = [history("outputs/control-seed1")]
        minutes = max(points[-1][0] for points in runs[algorithm])
        for points in runs["control"]:
            if points[-1][0] < minutes:
                raise SystemExit(f"the control ran {points[-1][0]:.1f} of {minutes:.1f} minutes: more iterations")
            # up to the first evaluation after those minutes: the control is never the shorter one
            del points[1 + next(n for n, (minute, _) in enumerate(points) if minute >= minutes) :]
    result = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    for kind, curves in runs.items():
        start, end = [points[0][1] for points in curves], [points[-1][1] for points in curves]
        gain = [b - a for a, b in zip(start, end)]
        result[kind] = dict(
            start=start, end=end, gain=gain, mean_gain=sum(gain) / len(gain), minutes=[p[-1][0] for p in curves]
        )
    if algorithm not in PANELS["pictures: strict accuracy, held-out prompts"]:
        return result | {"curves": runs}
    after = [by_tag(f"outputs/{algorithm}-seed{seed}/model") for seed in SEEDS]
    result["strict_by_tag"] = {
        "before": by_tag("assets/tiny-flux"),
        "after": {tag: sum(tags[tag] for tags in after) / len(after) for tag in shapes.TAGS},
    }
    return result | {"curves": runs}


def figure(path):
    """Curves of all seeds of every algorithm in runs/results/."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, algorithms) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        curves = {}
        for algorithm in algorithms:
            if os.path.exists(f"runs/results/{algorithm}.json"):
                with open(f"runs/results/{algorithm}.json") as f:
                    curves |= json.load(f)["curves"]
        for kind, runs in curves.items():
            for s, points in enumerate(runs):
                label = None if s else LABELS[kind]
                axes.plot(*zip(*points), color=COLORS[kind], linewidth=1.3, marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("minutes of training")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=sum(PANELS.values(), ()))
    algorithm = parser.parse_args().algorithm
    result = collect(algorithm)
    with open(f"runs/results/{algorithm}.json", "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    figure("assets/learning_curves.png")
    if algorithm == "flow_grpo":
        strip("assets/before_after.png", "assets/tiny-flux", "outputs/flow_grpo-seed1/model")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
