"""Collects the runs of runs/unified_table.sh (numbers to runs/results/unified.json, the README's table to the terminal,
curves and pictures of the first seed before and after to assets/unified.png) and of runs/unified_tasks.sh (numbers to
runs/results/unified_tasks.json).

    python -m runs.plot_unified table
    python -m runs.plot_unified tasks

Minutes are minutes of training (rollout, reward, update), without evaluation and start-up.
"""

import argparse
import json
import os
import platform
import textwrap

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import models
from data import prompts as prompt_data
from kernels.sde_step import fold_seed
from models import blip3o, run_folder

SEEDS = (1, 2, 3)
ARMS = {"lm": "language model", "dm": "diffusion model", "joint": "both"}
COLORS = {"lm": "#1d4ed8", "dm": "#64748b", "joint": "#c2410c"}
METRICS = ("eval_reward/shapes", "eval_strict", "eval_reward/format")
TASKS = ("t2icot", "i2i_cycle", "text")
TAGS = ("single_object", "colors", "counting", "two_object", "position", "color_attr")  # of the pictures


def settings(run):
    with open(f"{run}/args.json") as f:
        return json.load(f)


def history(run):
    """[(iteration, minutes so far, {metric: value})] at every evaluation of a run."""
    seconds, points = 0.0, []
    for row in run_folder.rows(run):
        if "eval_reward" in row:
            points.append((row["iteration"], seconds / 60, {k: v for k, v in row.items() if k.startswith("eval_")}))
        seconds += sum(row.get(f"seconds_{part}", 0.0) for part in ("rollout", "reward", "update"))
    return points


def collect(names):
    """Of each name and metric: values of the seeds at the start and at the end, the mean and standard error of what is
    between; minutes; curves."""
    result = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    for name in names:
        runs = [history(f"outputs/unified-{name}-seed{seed}") for seed in SEEDS]
        result[name] = {"minutes": [points[-1][1] for points in runs], "iterations": runs[0][-1][0]}
        result[name]["eval_size"] = settings(f"outputs/unified-{name}-seed1")["eval_size"]
        for metric in runs[0][0][2]:
            start, end = ([points[n][2][metric] for points in runs] for n in (0, -1))
            gain = np.subtract(end, start)
            result[name][metric] = dict(start=start, end=end, mean=sum(end) / len(end), gain=gain.tolist())
            result[name][metric] |= dict(mean_gain=gain.mean(), error=gain.std(ddof=1) / len(gain) ** 0.5)
        curve = "eval_reward/shapes" if "eval_reward/shapes" in result[name] else "eval_reward"
        result[name]["curves"] = [[(i, values[curve]) for i, _, values in points] for points in runs]
    return result


def table(result):
    rows = [("nothing", [[v] for v in (result["lm"][name]["start"][0] for name in METRICS)])]
    rows += [(f"`--train {arm}`", [result[arm][name]["end"] for name in METRICS]) for arm in ARMS]
    print("| trained | reward | strict | format |\n|---|---|---|---|")
    for label, values in rows:
        reward = f"{sum(values[0]) / len(values[0]):.3f}"
        if len(values[0]) > 1:
            reward += f" ({' '.join(f'{v:.3f}' for v in values[0])})"
        print(f"| {label} | {reward} | " + " | ".join(f"{sum(v) / len(v):.3f}" for v in values[1:]) + " |")


@torch.no_grad()
def drawn(lm_folder, dm_folder, rows, num_steps):
    """What is drawn of users' prompts: texts and pictures (uint8), from fixed noise."""
    lm = models.load_lm(lm_folder, "cpu", torch.float32)
    model = models.load(dm_folder, "cpu", torch.float32)
    seed_B = fold_seed(0, torch.arange(len(rows)))
    out = lm.generate(lm.encode([blip3o.REFINE.format(row["prompt"]) for row in rows]), 24, 0.0, seed_B)
    texts = [blip3o.refined(text) for text in lm.decode(out["ids"], out["mask"])]
    cond, x = model.condition(model.encode(texts)), model.init_noise(seed_B, 32, 32)
    sigmas = model.sigmas(num_steps, 32, 32)
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        x = x + model.velocity(x, x.new_full((len(x),), sigma), cond, (1.0, 1.0)) * (sigma_next - sigma)
    return texts, run_folder.to_uint8(model.decode(x))


def figure(result, path):
    run = "outputs/unified-joint-seed1"
    eval_set = prompt_data.load("shapes-user", "eval")
    candidates = [eval_set[i] for i in prompt_data.order(len(eval_set), 1, 0, 400)]
    pairs = [
        drawn(*folders, candidates, settings(run)["eval_num_steps"])
        for folders in (("tiny-qwen-refine", "tiny-flux"), (f"{run}/lm", f"{run}/model"))
    ]
    # The first prompt of each kind, in a fixed random order, whose words the language model has changed.
    changed = [k for k in range(len(candidates)) if pairs[0][0][k] != pairs[1][0][k]]
    shown = [next(k for k in changed if candidates[k]["metadata"]["tag"] == tag) for tag in TAGS]
    whole = Figure(figsize=(9.6, 3.5), layout="constrained")
    FigureCanvasAgg(whole)
    left, right = whole.subfigures(1, 2, width_ratios=(1, 1.75))
    axes = left.subplots()
    for arm, label in ARMS.items():
        for s, points in enumerate(result[arm]["curves"]):
            style = dict(color=COLORS[arm], linewidth=1.3, marker="o", markersize=3)
            axes.plot(*zip(*points), label=None if s else label, **style)
    axes.set_title("reward on held-out prompts", fontsize=10)
    axes.set_xlabel("iterations")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="trained", fontsize=9)
    panels = right.subplots(2, len(shown))
    for line, (texts, images) in enumerate(pairs):
        for column, k in enumerate(shown):
            panel = panels[line, column]
            panel.imshow(images[k], interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if line == 0:
                panel.set_title(textwrap.fill(candidates[k]["prompt"], 15), fontsize=6.5, weight="bold")
            panel.set_xlabel(textwrap.fill(texts[k], 17), fontsize=6.5)
        panels[line, 0].set_ylabel(("before", "after, both trained")[line], fontsize=8)
    whole.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", choices=("table", "tasks"))
    of_table = parser.parse_args().runs == "table"
    result = collect(ARMS if of_table else TASKS)
    with open(f"runs/results/unified{'' if of_table else '_tasks'}.json", "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    if of_table:
        figure(result, "assets/unified.png")
        table(result)
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
