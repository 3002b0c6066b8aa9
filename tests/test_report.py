import base64
import dataclasses
import fcntl
import hashlib
import html
import io
import json
import math
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flow_grpo
from models import checkpoint, report, run_folder

ROOT = Path(flow_grpo.__file__).parent
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Parsed(HTMLParser):
    """A page as a list of (tag, attributes, text inside); an error for a tag that is not closed where it should be."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {[e[0] for e in self.open]}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), (tag, attributes)
        element = [tag, dict(attributes), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        assert self.open and any(e[0] == "svg" for e in self.open), tag  # only in SVG does "/>" close
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, cls=None):
        return [e for e in self.elements if e[0] == tag and (cls is None or cls in e[1].get("class", "").split())]

    def facts(self):
        return dict(zip((e[2] for e in self.all("dt")), (e[2] for e in self.all("dd"))))

    def data(self):
        (element,) = [e for e in self.all("script") if e[1].get("type") == "application/json"]
        return json.loads(element[2], parse_constant=pytest.fail)

    def series(self):
        return {s["name"]: dict(zip(s["x"], s["y"])) for panel in self.data()["panels"] for s in panel["series"]}

    def groups(self):
        """Group -> names of each panel's curves, and what stands behind "Constant:"."""
        groups = {}
        for element in self.elements:
            if element[0] == "h3" and element[2] in report.GROUPS:
                group = groups[element[2]] = []
            elif element[0] == "ul":
                group.append([])
            elif element[0] == "li":
                group[-1].append(element[2].split(" ")[0])
            elif element[0] == "p" and element[1].get("class") == "constant":
                group.append(element[2])
        return groups


def made(run, rows, script="flow_grpo.py", source=None, args=None):
    """A run folder as the scripts make it; `source` replaces the text of the script."""
    path = ROOT / script
    if source is not None:
        path = run.parent / script
        path.write_text(source, encoding="utf-8")
    run_folder.create(str(run), args or flow_grpo.Args(out=str(run), num_iterations=10), str(path))
    with open(run / "metrics.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return run


def picture(run, name, seed=0, size=32, count=3):
    images = list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8))
    run_folder.grid(str(run / "samples" / name), images, [f"0.5{i} a red circle" for i in range(count)])


def rows_of(iterations, **metrics):
    return [{"iteration": i} | {name: f(i) for name, f in metrics.items()} for i in range(iterations)]


def parsed(run):
    path = report.write(str(run))
    assert path == str(run / "report.html") and not (run / ".report.html").exists()
    return Parsed((run / "report.html").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# The page


def test_a_run_is_one_page_that_refers_to_nothing_else(tmp_path):
    rows = rows_of(10, reward=lambda i: i / 10, reward_std=lambda i: 0.25, loss=lambda i: math.sin(i))
    for row in rows[::5] + [{"iteration": 10}]:
        row |= {"eval_reward": row["iteration"] / 20, "eval_reward/shapes": 0.5}
    run = made(tmp_path / "run", rows + [{"iteration": 10, "eval_reward": 0.5, "eval_reward/shapes": 0.5}])
    for iteration in (0, 5, 10):
        picture(run, f"{iteration:06d}.png", iteration)
    checkpoint.save(run / "checkpoints" / "000005", {"w": torch.zeros(2)}, {})
    page = parsed(run)

    assert page.elements[0][:2] == ["html", {"lang": "en"}] and page.all("title")[0][2] == "run: training report"
    ids = [e[1]["id"] for e in page.elements if "id" in e[1]]
    assert len(set(ids)) == len(ids)
    for tag, attributes, text in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "formaction", "xlink:href", "style")
            if name in ("href", "src"):
                assert value.startswith("data:") or value[0] == "#" and value[1:] in ids
        assert tag not in ("iframe", "object", "embed", "base", "form", "audio", "video")
    styles = "".join(e[2] for e in page.all("style"))
    assert "url(" not in styles and "@import" not in styles and "prefers-color-scheme: dark" in styles
    # The policy allows the page's own style and script and no other: their digests, computed here once more.
    (policy,) = [e[1]["content"] for e in page.all("meta") if e[1].get("http-equiv") == "Content-Security-Policy"]
    (script,) = [e[2] for e in page.all("script") if not e[1]]
    style_digest, script_digest = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (styles, script)
    )
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_digest}'; script-src 'sha256-{script_digest}'"
    )

    pictures = page.all("img")
    assert [e[1]["alt"].split(":")[0] for e in pictures] == [f"Pictures at iteration {i}" for i in (0, 5, 10)]
    for element, iteration in zip(pictures, (0, 5, 10)):
        kind, content = element[1]["src"].split(",")
        file = (run / "samples" / f"{iteration:06d}.png").read_bytes()
        assert kind == "data:image/png;base64" and base64.b64decode(content) == file
        assert (int(element[1]["width"]), int(element[1]["height"])) == Image.open(io.BytesIO(file)).size

    facts = page.facts()
    assert facts["Script"] == "flow_grpo.py" and facts["Model"] == "tiny-flux" and facts["Reward"] == "shapes"
    assert facts["Iterations"] == "10 of 10" and facts["State"] == "finished"
    assert facts["Last checkpoint"] == "000005" and facts["Export"] == "none yet"
    assert [e[2] for e in page.all("div", "card")] == [
        "eval_reward0 → 0.5+0.5; held-out, first and last",
        "reward0 → 0.9+0.9; training, first and last",
    ]


def test_what_is_drawn_is_what_was_logged(tmp_path):
    generator = random.Random(1)
    rows = rows_of(57, reward=lambda i: generator.gauss(0.3, 0.1), kl=lambda i: generator.random() * 1e-7)
    for row in rows[::8]:
        row["eval_reward"] = generator.random()
    rows[20]["kl"] = rows[21]["kl"] = rows[40]["reward"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    run = made(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(
        text.replace("null", "NaN", 1) + '{"iteration": 57, "reward": 0.'
    )  # being written
    page = parsed(run)
    series = page.series()
    assert set(series) == {"reward", "kl", "eval_reward"}
    for name, values in series.items():
        assert values == {row["iteration"]: row[name] for row in rows if name in row}

    # The strokes, read back: their places between the first and last tick are the values.
    for figure, name in zip(page.all("figure", "panel"), ("reward", "kl")):
        data = page.data()["panels"][int(figure[1]["data-panel"])]["series"][0]
        assert data["name"] == name
    strokes = [e[1]["d"] for e in page.all("path", "line")]
    axes = [[float(label[2]) for label in labels] for labels in axis_labels(page)]
    for stroke, axis, name in zip(strokes, (axes[0], axes[0], axes[1]), ("reward", "eval_reward", "kl")):
        known = {i: v for i, v in series[name].items() if v is not None}
        points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) (-?[\d.]+)", stroke)]
        assert len(points) == len(known)
        for (x, y), (iteration, value) in zip(points, known.items()):
            assert abs(x - 1000 * iteration / 56) <= 0.051
            assert abs(axis[0] + y / 1000 * (axis[-1] - axis[0]) - value) <= 0.051e-3 * (axis[0] - axis[-1])
        assert stroke.count("M") == 1 + (None in series[name].values())  # a gap where a value is missing
    table = {"reward": "1", "kl": "2", "eval_reward": "0"}  # how many values were not finite
    numbers = [e for e in page.elements if e[0] in ("tr", "td")]
    for name, missing in table.items():
        row = next(i for i, e in enumerate(numbers) if e[0] == "tr" and e[2].startswith(name))
        values = [v for v in series[name].values() if v is not None]
        expected = [f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values))]
        assert [e[2] for e in numbers[row + 1 : row + 7]] == [*expected, str(len(series[name])), missing]


def axis_labels(page):
    """For each panel, the <span>s of its y axis."""
    labels, inside = [], None
    for element in page.elements:
        if element[0] == "div":
            inside = [] if element[1].get("class") == "y" else None
            if inside is not None:
                labels.append(inside)
        elif element[0] == "span" and inside is not None:
            inside.append(element)
    return labels


def test_lines_through_known_places(tmp_path):
    rows = rows_of(11, reward=lambda i: i / 10)
    for i, value in ((3, None), (5, None)):  # 4 stands alone
        rows[i]["reward"] = value
    (line,) = parsed(made(tmp_path / "run", rows)).all("path", "line")
    assert line[1]["d"] == (
        "M0.0 1000.0L100.0 900.0L200.0 800.0M400.0 600.0h0M600.0 400.0L700.0 300.0L800.0 200.0L900.0 100.0L1000.0 0.0"
    )


def test_ticks_are_round_and_enclose_any_range():
    generator = random.Random(2)
    ranges = [(0.0, 0.0), (1.0, 1.0), (-3.0, -3.0), (0.0, 1.0), (1e-300, 2e-300), (-1e299, 1e299), (1.0, 1.0 + 1e-9)]
    for _ in range(3000):
        low = generator.choice((0.0, generator.gauss(0, 1))) * 10 ** generator.uniform(-12, 12)
        ranges.append((low, low + 10 ** generator.uniform(-12, 12)))
    for low, high in ranges:
        ticks, step = report._ticks(low, high)
        assert 2 <= len(ticks) <= 7, (low, high)
        slack = 1e-6 * max(abs(low), abs(high)) + 1e-8 * step
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack
        mantissa = float(f"{step:.3e}".split("e")[0])
        assert mantissa in (1, 2, 2.5, 5)
        assert all(math.isclose(b - a, step, rel_tol=1e-6) for a, b in zip(ticks, ticks[1:]))
        labels = [report._label(tick, step) for tick in ticks]
        assert all(math.isclose(float(a), b, rel_tol=5.1e-3, abs_tol=step / 1000) for a, b in zip(labels, ticks))
    assert [report._label(v, s) for v, s in ((0.25, 0.05), (10.0, 5.0), (1e6, 1e5), (7.5e-6, 2.5e-6), (-0.0, 1.0))] == [
        *("0.25", "10", "1e6", "7.5e-6", "0"),
    ]


def test_thinning_keeps_ends_and_spikes():
    generator = random.Random(3)
    for size, limit in ((3, 800), (800, 800), (801, 800), (10_000, 800), (100_003, 800), (50, 8)):
        values = [generator.random() for _ in range(size)]
        spikes = {generator.randrange(size): 5.0, generator.randrange(size): -5.0}
        for i, value in spikes.items():
            values[i] = value
        kept = report._thin(values, limit)
        assert kept == sorted(set(kept)) and len(kept) <= limit and kept[0] == 0 and kept[-1] == size - 1
        assert set(spikes) <= set(kept)
        if size <= limit:
            assert kept == list(range(size))
        else:
            assert len(kept) > 0.9 * limit
            assert max(b - a for a, b in zip(kept, kept[1:])) <= 2 * math.ceil(size / (limit // 2 - 1))
    assert report._thin([None] * 5000, 100)[-1] == 4999
    assert 2500 in report._thin([None] * 2500 + [1.0] + [None] * 2500, 100)


def test_running_mean_is_that_of_the_finite_values_around():
    generator = np.random.default_rng(4)
    values = generator.normal(size=300)
    values[generator.integers(0, 300, 40)] = np.nan
    values[100:120] = np.nan  # wider than the window: no mean in its middle
    plain = [None if np.isnan(v) else v for v in values.tolist()]
    means = dict(report._running_mean(plain, 9))
    for i in range(300):
        around = values[max(0, i - 4) : i + 5]
        if np.isnan(around).all():
            assert i not in means
        else:
            assert math.isclose(means[i], np.nanmean(around), abs_tol=1e-12)
    assert len(report._running_mean([1.0] * 5000, 201)) == 400


# ----------------------------------------------------------------------------------------------------------------------
# Runs of every kind


def test_metrics_stand_in_their_groups_and_held_out_beside_training(tmp_path):
    step = iter(range(10**6))
    names = (
        "eval_reward eval_reward/shapes eval_reward/format eval_strict reward reward_std zero_std_frac samples_per_s"
    )
    names += " seconds_rollout reward/shapes reward/format lm/length lm/loss lm/kl dm/loss dm/kl lm/on_policy_err"
    names += " on_policy_err loss reward_greedy eval_pass@1 eval_pass@8 eval_length my_own_number lm/odd"
    rows = [{"iteration": i} | {name: next(step) for name in names.split()} for i in range(4)]
    rows = [row | {"skipped_updates": 0, "nan_reward_frac": 0.0, "a_text": "no number"} for row in rows]
    groups = parsed(made(tmp_path / "run", rows)).groups()
    assert groups == {
        "Reward": [
            ["reward", "reward_greedy", "eval_reward"],
            ["eval_strict"],
            ["eval_pass@1", "eval_pass@8"],
            ["reward/shapes", "eval_reward/shapes"],
            ["reward/format", "eval_reward/format"],
            ["reward_std"],
            ["zero_std_frac"],
            "Constant: nan_reward_frac 0",
        ],
        "Policy": [["lm/kl"], ["dm/kl"], ["lm/on_policy_err"], ["on_policy_err"], ["lm/length"], ["eval_length"]],
        "Optimisation": [["lm/loss"], ["dm/loss"], ["loss"], "Constant: skipped_updates 0"],
        "Time": [["samples_per_s"], ["seconds_rollout"]],
        "Other": [["my_own_number"], ["lm/odd"]],
    }


def test_pretraining_has_losses_edits_and_no_reward(tmp_path):
    rows = rows_of(3, loss=lambda i: 2.0 - i, learning_rate=lambda i: 1e-4 * i, seconds_update=lambda i: 30.0)
    rows[0] |= {"eval_loss": 2.5, "eval_loss_edit": 2.6, "eval_strict_edit": 0.25}
    run = made(tmp_path / "run", rows, script="pretrain.py")
    picture(run, "000000.png")
    picture(run, "000000_edit.png")
    page = parsed(run)
    assert page.groups()["Optimisation"] == [["loss", "eval_loss", "eval_loss_edit"], ["learning_rate"]]
    assert page.groups()["Reward"] == [["eval_strict_edit"]]
    assert [e[2] for e in page.all("h3") if e[2].startswith("Pictures")] == ["Pictures", "Pictures (edit)"]
    assert [e[2].split(" ")[0] for e in page.all("div", "card")] == ["eval_loss2.5", "loss2"]
    assert page.facts()["Time in iterations"].startswith("1.5 min") and page.facts()["Iterations"] == "3 of 10"
    assert page.facts()["State"] == "in progress, or stopped" and page.facts()["Last checkpoint"] == "none"


def test_texts_are_shown_whole_or_cut(tmp_path):
    run = made(tmp_path / "run", rows_of(2, reward=lambda i: i), script="rloo.py")
    rows = [{"prompt": "1 < 2 & 3?", "image": None}, {"prompt": "héllo ☃", "image": None}]
    run_folder.texts(str(run / "samples" / "000000"), rows, ["<think>\n  yes </think>", "x" * 30_000], [1.0, math.nan])
    (run / "samples" / "000001.txt").write_bytes("reward 1.00\n> ☃".encode()[:-1])  # being written
    first, second = (e[2] for e in parsed(run).all("pre")[:2])
    assert first.startswith("reward 1.00\n> 1 < 2 & 3?\n<think>\n  yes </think>\n\nreward nan\n> héllo ☃\nxxx")
    size = len((run / "samples" / "000000.txt").read_text())
    assert first.endswith(f"xxx\n... {size - 20_000:,} more characters in 000000.txt")
    assert second == "reward 1.00\n> �"
    assert not parsed(run).all("img")


def test_a_run_that_has_just_begun(tmp_path):
    run = made(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    page = parsed(run)
    text = page.elements[0][2]
    assert "No metrics yet." in text and "No samples yet." in text and page.data()["panels"] == []
    assert page.facts()["Iterations"] == "0 of 10" and page.facts()["Last row"] == "none yet"
    made_row = rows_of(1, reward=lambda i: 0.5, kl=lambda i: None)
    (run / "metrics.jsonl").write_text(json.dumps(made_row[0]) + "\n")
    page = parsed(run)
    assert page.series() == {"reward": {0: 0.5}, "kl": {0: None}} and page.facts()["Iterations"] == "1 of 10"
    assert [e[1]["d"] for e in page.all("path", "line")] == ["M0.0 500.0h0", ""]


def test_a_long_run_stays_a_page(tmp_path):
    generator = random.Random(5)
    names = [f"reward/{i}" for i in range(30)]
    rows = [{"iteration": i} | {name: generator.random() for name in names} for i in range(5000)]
    run = made(tmp_path / "run", rows)
    for iteration in range(0, 1000, 10):
        (run / "samples" / f"{iteration:06d}.png").write_bytes(small_picture())
    page = parsed(run)
    assert [int(re.search(r"\d+", e[1]["alt"])[0]) for e in page.all("img")][::39] == [0, 990]
    assert len(page.all("img")) == 40 and "40 of 100 shown, evenly." in page.elements[0][2]
    assert 500_000 < (run / "report.html").stat().st_size < 4_000_000
    series = page.series()
    for name in names[:3]:
        whole = {row["iteration"]: row[name] for row in rows}
        assert series[name].items() <= whole.items() and 700 < len(series[name]) <= 800
        assert {min(whole.values()), max(whole.values()), whole[0], whole[4999]} <= set(series[name].values())


def small_picture():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def test_large_pictures_become_jpegs_of_the_same_look(tmp_path):
    run = made(tmp_path / "run", [])
    smooth = np.linspace(0, 255, 900)[:, None] * np.ones((1, 900))
    noise = np.random.default_rng(6).integers(-4, 5, (900, 900, 3))
    image = np.clip(smooth[..., None] + noise, 0, 255).astype(np.uint8)
    for i in range(8):
        Image.fromarray(np.roll(image, i, axis=0)).save(run / "samples" / f"{i:06d}.png")
    assert sum(p.stat().st_size for p in run.glob("samples/*")) > 8 << 20
    shown = parsed(run).all("img")
    assert len(shown) == 8 and (run / "report.html").stat().st_size < 4 << 20
    kind, content = shown[0][1]["src"].split(",")
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert kind == "data:image/jpeg;base64" and back.shape == image.shape
    assert np.abs(back.astype(float) - image).mean() < 4


# ----------------------------------------------------------------------------------------------------------------------
# Settings and script


def test_settings_that_differ_from_the_script_are_marked(tmp_path):
    args = flow_grpo.Args(out="x", kl_coef=0.04, reward=("shapes:0.7", "jpeg"), compile=True)
    page = parsed(made(tmp_path / "run", [], args=args))
    assert [e[2] for e in page.all("mark")] == ['["shapes:0.7", "jpeg"]', "0.04", "true"]
    rows = [e[2] for e in page.all("tr")]
    assert "kl_coef0.040.0" in rows and 'reward["shapes:0.7", "jpeg"]["shapes"]' in rows
    fields = len(dataclasses.fields(args))
    assert f"3 of {fields} differ from what the script writes down in Args." in page.elements[0][2]
    assert sum(row.startswith(tuple(f.name for f in dataclasses.fields(args))) for row in rows) == fields
    args = dataclasses.replace(args, model="flux")
    assert "some may be the recipe of that model." in parsed(made(tmp_path / "flux", [], args=args)).elements[0][2]

    page = parsed(made(tmp_path / "default", [], args=flow_grpo.Args(out="y", resume="z")))
    assert "All are the defaults" in page.elements[0][2] and not page.all("mark")
    for name, source in (("none.py", "print(1)"), ("broken.py", "class Args:\n  a: int =")):
        page = parsed(made(tmp_path / name[:-3], [], name, source))
        assert "The defaults of the script are not known." in page.elements[0][2]


def test_the_copy_of_the_script_is_compared_with_the_repository(tmp_path):
    page = parsed(made(tmp_path / "same", []))
    assert "Against flow_grpo.py of the repositoryunchanged" in page.elements[0][2]

    source = (ROOT / "flow_grpo.py").read_text()
    line = "    return torch.maximum(-adv_B * ratio_B, -adv_B * clipped_B).mean(), ratio_B\n"
    assert source.count(line) == 1
    changed = source.replace(line, "    # <b>my idea</b>\n" + line.replace("clipped_B", "ratio_B"))
    page = parsed(made(tmp_path / "changed", [], source=changed))
    first = page.all("pre", "diff")[0]
    assert first[2].startswith("--- repository/flow_grpo.py+++ this run@@ -")
    inside = page.elements[page.elements.index(first) :]
    marked = [(e[1]["class"], e[2]) for e in inside if e[0] == "span" and e[1].get("class") in ("add", "del")][:3]
    new = line.replace("clipped_B", "ratio_B").rstrip("\n")
    assert marked == [("del", "-" + line.rstrip("\n")), ("add", "+    # <b>my idea</b>"), ("add", "+" + new)]
    assert "2 lines added, 1 removed" in page.elements[0][2] and "unchanged" not in page.elements[0][2]

    for fork, parent in (("my_idea.py", "flow_grpo.py"), ("another.py", "remax.py")):
        source = (ROOT / parent).read_text() + "\nprint('more')\n"
        page = parsed(made(tmp_path / fork[:-3], [], fork, source))
        assert f"Against {parent}, the script of the repository most like it2 lines added" in page.elements[0][2]
        assert page.facts()["Script"] == fork

    run = made(tmp_path / "without", [])
    (run / "flow_grpo.py").unlink()
    page = parsed(run)
    assert "No copy of the script in this folder." in page.elements[0][2] and not page.all("pre")


# ----------------------------------------------------------------------------------------------------------------------
# What must not happen

EVIL = "</pre></script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">&amp;<!--"


def evil_run(folder):
    """Markup in every place that a run can put text in."""
    run = folder / "<img src=x onerror=alert(1)>&quot;'run"
    args = flow_grpo.Args(out=EVIL, model=EVIL, reward=(EVIL,), prompts=EVIL)
    rows = [{"iteration": i, "reward": i / 2, f"reward/{EVIL}": i, EVIL: 7 - i, f"{EVIL}\n": 1} for i in range(3)]
    source = (ROOT / "flow_grpo.py").read_text() + f"# {EVIL}\n"
    made(run, rows, "it's<b>.py", source, args)
    run_folder.texts(str(run / "samples" / "000000"), [{"prompt": EVIL, "image": None}], [EVIL], [1.0])
    picture(run, "000000.png")
    return run


def test_nothing_from_the_run_becomes_markup(tmp_path):
    run = evil_run(tmp_path)
    page = parsed(run)
    assert len(page.all("script")) == 2 and len(page.all("style")) == 1 and not page.all("b", "")
    assert [e[1]["src"][:22] for e in page.all("img")] == ["data:image/png;base64,"]
    assert all(not name.startswith("on") for e in page.elements for name in e[1])
    assert page.all("h1")[0][2] == run.name and page.all("title")[0][2] == f"{run.name}: training report"
    assert page.facts()["Model"] == EVIL and page.facts()["Reward"] == EVIL and page.facts()["Script"] == "it's<b>.py"
    assert page.all("pre")[0][2] == f"reward 1.00\n> {EVIL}\n{EVIL}\n"
    assert page.series()[f"reward/{EVIL}"] == {0: 0, 1: 1, 2: 2} and page.series()[EVIL] == {0: 7, 1: 6, 2: 5}
    assert any(e[2] == f"+# {EVIL}" for e in page.all("span", "add"))
    assert html.escape(EVIL) in (run / "report.html").read_text()


def test_what_is_damaged_is_named_in_one_line(tmp_path):
    run = made(tmp_path / "run", rows_of(3, reward=lambda i: i))
    picture(run, "000000.png")
    good = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    args, metrics, grid, script = (
        run / name for name in ("args.json", "metrics.jsonl", "samples/000000.png", "flow_grpo.py")
    )
    for path, content, message in (
        (args, None, "there is none; expected the folder of a run"),
        (args, b'{"model": ', "cannot be read"),
        (args, b"[1, 2]", "holds a list"),
        (args, b"\xff\xfe", "cannot be read"),
        (metrics, b'{"iteration": 0, "reward": 1}\n{"iteration": 1, "rew\n{"iteration": 2}\n', "line 2 is no row"),
        (metrics, b'{"iteration": 0}\n{"reward": 1}\n', "line 2 is no row of metrics (KeyError: 'iteration')"),
        (metrics, b"[]\n", "line 1 is no row"),
        (metrics, b'{"iteration": NaN}\n', "line 1 is no row"),
        (metrics, b"\xff\n", "cannot be read"),
        (grid, good[grid][:300], "not a whole picture"),
        (grid, b"", "not a whole picture"),
        (grid, b"no picture", "not a whole picture"),
        (script, b"\xff", "cannot be read"),
    ):
        for file, whole in good.items():
            file.write_bytes(whole)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            report.write(str(run))
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value), error.value
        assert "\n" not in str(error.value) and not (run / "report.html").exists()
    with pytest.raises(ValueError, match="nowhere/args.json: there is none"):
        report.write(str(tmp_path / "nowhere"))


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


class Browser:
    """Chromium without a window, spoken to in the DevTools protocol over two pipes: no port and no package."""

    def __init__(self, binary):
        there, self.write_end = os.pipe()
        self.read_end, here = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there, here)]  # Chromium wants them as 3 and 4
        flags = "--headless=shell --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        become = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
        become += "os.execv(sys.argv[3], sys.argv[3:])"
        command = [sys.executable, "-c", become, *map(str, ends), binary, *flags.split(), "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (there, here, *ends):
            os.close(end)
        self.rest, self.number, self.events = b"", 0, []

    def send(self, method, session=None, timeout=30, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        return self.wait(lambda m: m.get("id") == self.number, timeout)["result"]

    def wait(self, wanted, timeout=30):
        end = time.monotonic() + timeout
        while True:
            while b"\0" in self.rest:
                line, self.rest = self.rest.split(b"\0", 1)
                message = json.loads(line)
                self.events.append(message)
                if wanted(message):
                    return message
            if not select.select([self.read_end], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self.read_end, 1 << 20)
            assert read, "the browser has gone"
            self.rest += read

    def open(self, address, width, scheme="light", height=900, scripts=True):
        self.events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable", session)
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setDeviceMetricsOverride", session, **size)
        self.send("Emulation.setEmulatedMedia", session, features=[{"name": "prefers-color-scheme", "value": scheme}])
        if not scripts:
            self.send("Emulation.setScriptExecutionDisabled", session, value=True)
        self.send("Page.navigate", session, url=address)
        self.wait(lambda m: m.get("method") == "Page.loadEventFired")
        return Page(self, session)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)


class Page:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def send(self, method, **params):
        return self.browser.send(method, self.session, **params)

    def evaluate(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self):
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])

    def mouse(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name):
        code = {"ArrowLeft": 37, "Home": 36}[name]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    @property
    def requests(self):
        sent = (e["params"] for e in self.browser.events if e.get("method") == "Network.requestWillBeSent")
        return [params["request"]["url"] for params in sent]

    @property
    def errors(self):
        names = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [e["params"] for e in self.browser.events if e.get("method") in names]


@pytest.fixture(scope="module")
def browser():
    """The binary that the variable CHROMIUM names, or one that is installed."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    binary = next(filter(None, map(shutil.which, names)), None)
    if not binary or subprocess.run([binary, "--version"], capture_output=True).returncode:
        pytest.skip("no Chromium: install one or name its binary in the variable CHROMIUM")
    browser = Browser(binary)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The report of a run with curves, three grids and texts."""
    generator = random.Random(7)
    rows = rows_of(121, reward=lambda i: i / 200 + generator.gauss(0, 0.03), loss=lambda i: generator.gauss(0, 1))
    for row in rows[::40]:
        row |= {"eval_reward": 0.1 + row["iteration"] / 400}
    run = made(tmp_path_factory.mktemp("report") / "run", rows)
    for iteration in (0, 40, 80):
        picture(run, f"{iteration:06d}.png", iteration, count=16)
    run_folder.texts(str(run / "samples" / "000000"), [{"prompt": "1 + 1 =", "image": None}] * 9, ["2"] * 9, [1.0] * 9)
    return Path(report.write(str(run))), rows


def boxes(page, selector):
    expression = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.getBoundingClientRect().toJSON())"
    return page.evaluate(expression)


def check_quiet(page, path):
    """It asked for itself alone, and said nothing."""
    others = [address for address in page.requests if not address.startswith("data:")]
    assert others == [path.resolve().as_uri()] and page.errors == []


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)])
def test_curves_and_pictures_are_visible(browser, shown, scheme, width, tmp_path):
    path, _ = shown
    page = browser.open(path.as_uri(), width, scheme)
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide == seen <= width  # nothing to scroll sideways
    areas = boxes(page, "svg")
    assert len(areas) == 2 and all(box["width"] > 250 and box["height"] >= 150 for box in areas)
    assert page.evaluate("[...document.querySelectorAll('path.line')].every(p => p.getTotalLength() > 500)")
    assert page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 1000)") == [True] * 3
    pictures = boxes(page, ".film img")
    assert [box["width"] > 350 and box["height"] > 100 for box in pictures] == [False, False, True]  # the last one
    contrast = """(() => {
      const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
      const under = (e) => { while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
        return light(getComputedStyle(e).backgroundColor); };
      return [...document.querySelectorAll("h1, dt, dd, p, li, a, summary, th, td, .y span, .add, .del, .hunk, pre")]
        .map(e => [light(getComputedStyle(e).color), under(e)])
        .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    })()"""
    assert min(page.evaluate(contrast)) > 4.5
    file = tmp_path / "page.png"
    file.write_bytes(page.screenshot())
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert (pixels[0, 0].mean() > 128) == (scheme == "light")
    for box, colours in zip(areas, (("s0", "s1"), ("s0",))):
        inside = pixels[int(box["top"]) : int(box["bottom"]), int(box["left"]) : int(box["right"])]
        for name in colours:
            value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
            colour = [int(value[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(inside - colour).max(axis=2) < 8).sum() > 200  # the stroke itself
            assert contrast_of(colour, pixels[int(box["top"]) - 3, int(box["left"]) + 100]) > 3  # the panel around it
    check_quiet(page, path)


def contrast_of(*colours):
    """WCAG's contrast ratio of two sRGB colours."""
    linear = [
        [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour] for colour in colours
    ]
    dark, light = sorted(float(np.dot(c, (0.2126, 0.7152, 0.0722))) for c in linear)
    return (light + 0.05) / (dark + 0.05)


def test_pointer_shows_values_and_slider_turns_pictures(browser, shown):
    path, rows = shown
    page = browser.open(path.as_uri(), 1280)

    def legend():
        return page.evaluate("[...document.querySelectorAll('.legend li')].map(e => e.textContent.trim())")

    before = legend()
    assert before[1] == "eval_reward 0.4" and float(before[0].split()[1]) == float(f"{rows[120]['reward']:.4g}")
    box = boxes(page, ".area")[0]
    page.mouse(box["left"] + box["width"] * 37 / 120, box["top"] + 50)
    names = ("reward", 37), ("eval_reward", 40), ("loss", 37)
    for text, (name, iteration) in zip(legend(), names):
        assert text.split()[::3] == [name, str(iteration)], text
        assert float(text.split()[1]) == float(f"{rows[iteration][name]:.4g}")
    cursors = boxes(page, ".cursor")
    assert abs(cursors[0]["left"] - box["left"] - box["width"] * 37 / 120) < 1.5 and cursors[1]["height"] >= 150
    page.mouse(5, 5)
    assert legend() == before

    def visible():
        return page.evaluate(
            "[...document.querySelectorAll('.film')].map(f => [...f.children].filter(e => e.offsetHeight)"
            ".map(e => e.firstChild.textContent))"
        )

    assert visible() == [["iteration 80"], ["iteration 0"]]
    assert len(boxes(page, ".slide")) == 1  # one text alone needs none
    page.evaluate("document.querySelector('.slide input').focus()")
    page.key("ArrowLeft")
    assert visible()[0] == ["iteration 40"] and boxes(page, ".film img")[1]["height"] > 100
    page.key("Home")
    assert visible()[0] == ["iteration 0"]
    page.evaluate("document.querySelector('.slide button').click()")
    end = time.monotonic() + 10
    while visible()[0] != ["iteration 80"] and time.monotonic() < end:
        time.sleep(0.1)
    assert (
        visible()[0] == ["iteration 80"]
        and page.evaluate("document.querySelector('.slide button').textContent") == "Play"
    )
    check_quiet(page, path)


def test_without_scripts_everything_is_there(browser, shown):
    path, rows = shown
    page = browser.open(path.as_uri(), 1000, scripts=False)
    assert all(box["width"] > 250 and box["height"] >= 150 for box in boxes(page, "svg"))
    assert all(box["width"] > 500 and box["height"] > 100 for box in boxes(page, ".film img"))
    assert page.evaluate("document.querySelector('.film').scrollWidth") > 2500  # a row to scroll through
    assert page.evaluate("document.querySelector('.legend b').textContent") == f"{rows[120]['reward']:.4g}"


def test_markup_of_a_run_does_nothing_and_the_page_may_ask_for_nothing(browser, tmp_path):
    path = Path(report.write(str(evil_run(tmp_path))))
    page = browser.open(path.as_uri(), 1280)
    box = boxes(page, ".area")[0]
    page.mouse(box["left"] + 40, box["top"] + 40)
    assert page.evaluate("document.title") == f"{path.parent.name}: training report"
    assert page.evaluate("[...document.images].map(i => i.naturalWidth > 0)") == [True]
    assert not any(event.get("method") == "Page.javascriptDialogOpening" for event in browser.events)
    check_quiet(page, path)
    # Even if something got through, the policy would keep it from running and from calling home.
    page.evaluate(
        "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}),"
        "Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    )
    end = time.monotonic() + 10
    while len(page.errors) < 2 and time.monotonic() < end:
        page.evaluate("0")
    assert len(page.errors) == 2 and all("Content Security Policy" in e["entry"]["text"] for e in page.errors)
    assert page.evaluate("document.title") == f"{path.parent.name}: training report"
