"""Figure of the unified models that pretrain.py makes of nothing: from runs/results/tiny_blip3o.jsonl and
tiny_metaquery.jsonl assets/pretrain_curves.png, and from a run folder the pictures of its last evaluation.

    python -m runs.plot_pretrain outputs/tiny-blip3o

Minutes are those of training, without evaluations and start-up.
"""

import argparse
import json
import os

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

RUNS = {"blip3o": "-", "metaquery": ":"}  # and the line that each is drawn with
PANELS = {
    "validation loss": {"eval_loss": "from captions", "eval_loss_edit": "edits"},
    "strict accuracy, held out": {"eval_strict": "from captions", "eval_strict_edit": "edits"},
}
COLORS = ("#c2410c", "#1d4ed8")


def evaluations(name):
    """[(minutes so far, metrics)] of every evaluation of a run."""
    seconds, points = 0.0, []
    with open(f"runs/results/tiny_{name}.jsonl") as f:
        for row in map(json.loads, f):
            if "eval_loss" in row:
                points.append((seconds / 60, row))
            seconds += row.get("seconds_update", 0.0)
    return points


def curves(path):
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS))
    for axes, (title, metrics) in zip(panels, PANELS.items()):
        for name, line in RUNS.items():
            if not os.path.exists(f"runs/results/tiny_{name}.jsonl"):
                continue
            points = evaluations(name)
            for color, (metric, label) in zip(COLORS, metrics.items()):
                values = [row[metric] for _, row in points]
                minutes = [minute for minute, _ in points]
                label = f"{name}, {label}"
                axes.plot(minutes, values, line, color=color, linewidth=1.3, marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("minutes of training")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def pictures(run, path):
    """The grids of the last evaluation of a run, pictures from captions above edits (before and after)."""
    last = sorted(name for name in os.listdir(f"{run}/samples") if "_" not in name)[-1].removesuffix(".png")
    sheets = [Image.open(f"{run}/samples/{last}{suffix}.png") for suffix in ("", "_edit")]
    sheet = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    sheet.paste(sheets[0], (0, 0))
    sheet.paste(sheets[1], (0, sheets[0].height))
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of tiny-blip3o")
    run = parser.parse_args().run
    curves("assets/pretrain_curves.png")
    pictures(run, "assets/pretrain_samples.png")


if __name__ == "__main__":
    main()
