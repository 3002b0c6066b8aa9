"""
A training run on one HTML page: <run>/report.html, which needs no network and no other file, so it can be sent by mail.

    path = report.write("outputs/flow_grpo-20260101-120000")

The curves are drawn here, as SVG, and show without JavaScript; the script in the page adds values under the pointer and
the slider over the samples. Whatever comes from the run (prompts, answers, names, settings) is text and never markup,
and the page's Content-Security-Policy runs its own script only and forbids every request.
"""

import ast
import base64
import difflib
import hashlib
import html
import io
import json
import math
import os
import re
import time
from pathlib import Path

MAX_POINTS = 800  # of a curve; 40 metrics of that many are 1 MB of page
MAX_SAMPLES = 40  # of a kind: pictures, edits, texts
PICTURE_BYTES = 8 << 20  # of all grids; beyond it they are stored as JPEG, a tenth of the size where they are photos
MAX_TEXT = 20_000  # characters of one text sample
MAX_DIFF = 3_000  # lines

LEGEND = (
    '<p class="note">Orange, named eval_: on held-out prompts. Thin: every iteration; bold: the mean of the '
    f"twenty-fifth of them around it. Of a long run {MAX_POINTS} points of a curve are drawn, the least and greatest "
    "of every stretch. Numbers: the last values, or those under the pointer.</p>"
)

# Panels by group, in this order; a name is that of its panel, without eval_, _edit and the number behind @.
GROUPS = {
    "Reward": r"reward strict pass@ reward/.+ reward_.+ zero_std_frac nan_reward_frac unchanged text.*",
    "Policy": r"kl ratio clipfrac mismatch_kl on_policy_err entropy length truncated_frac",
    "Optimisation": r"loss loss_.+ grad_norm learning_rate skipped_updates bad_samples",
    "Time": r"samples_per_s .+_per_s seconds_.+",
    "Other": r".+",
}


def write(run):
    """Write <run>/report.html and return its path.

    run: a run folder, finished or not. A copy of the script, metrics, checkpoints and samples may be absent; the page
    then says so. Raises ValueError, one line that names the file, where `run` is no run folder or args.json,
    metrics.jsonl, the script or a picture cannot be read.
    """
    from models import checkpoint

    run = Path(run)
    saved = _saved(run)
    metrics, written = _metrics(run / "metrics.jsonl")
    script, source = _script(run)
    newest = checkpoint.latest(run)
    samples = _samples(run / "samples")
    panels, span = _panels(metrics), _span(metrics)

    title, curves = run.resolve().name, "".join(_group(name, panels, span) for name in GROUPS)
    sections = [
        ("Curves", "curves", LEGEND + curves if curves else "<p>No metrics yet.</p>"),
        ("Samples", "samples", "".join(map(_film, samples)) or "<p>No samples yet.</p>"),
        ("All metrics", "metrics", _table_of_metrics(metrics) if metrics else "<p>No metrics yet.</p>"),
        ("Settings", "settings", _settings(saved, _defaults(source or ""))),
        ("Script", "script", _changes(script, source) if script else "<p>No copy of the script in this folder.</p>"),
    ]
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{content}</section>' for name, anchor, content in sections)
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in sections)
    drawn = [
        {"series": [{"name": s["name"], "x": s["x"], "y": s["y"]} for s in panel["series"]]}
        for panel in panels.values()
    ]
    data = {"first": span[0], "last": span[1], "panels": drawn}
    data = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # nothing in it may end the <script>
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(CSS)}'; script-src '{_digest(JS)}'"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}: training report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{_text(title)}</h1>{_headline(run, saved, metrics, script, newest, written)}</header>"
        f'<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>\n'
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')}.</footer>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{JS}</script>\n</body>\n</html>\n'
    )
    path, temporary = run / "report.html", run / ".report.html"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return str(path)


def _text(value):
    return html.escape(str(value), quote=True)


def _digest(content):
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _number(value):
    return "not finite" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# ----------------------------------------------------------------------------------------------------------------------
# What the folder holds


def _saved(run):
    path = run / "args.json"
    if not path.exists():
        raise ValueError(f"{path}: there is none; expected the folder of a run, as outputs/<run>")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds a {type(saved).__name__}, expected an object of settings")
    if "num_iterations" not in saved and (run / "results.jsonl").exists():
        raise ValueError(f"{path}: of what infer.py made; expected the folder of a training run")
    return saved


def _metrics(path):
    """name -> {iteration: value}, in the order of first appearance, and when the file was last written (seconds).

    A value is a float, an int, or None where it was not finite; text and lists, which a fork may log, are left out. Of
    an iteration that stands there twice the later row counts; a last line without an end is one being written.
    """
    if not path.exists():
        return {}, None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[int(row["iteration"])] = row
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{path}: line {number} is no row of metrics ({type(error).__name__}: {error})") from error
    metrics = {}
    for iteration in sorted(rows):
        for name, value in rows[iteration].items():
            if name != "iteration" and (value is None or isinstance(value, (int, float))):
                finite = value is not None and abs(value) < 1e300  # the span of an axis must be finite too
                metrics.setdefault(name, {})[iteration] = (value + 0) if finite else None
    return metrics, path.stat().st_mtime


def _script(run):
    """Name and text of the run's copy of its script; the newest, if it was continued with another one."""
    copies = sorted(run.glob("*.py"), key=lambda path: path.stat().st_mtime)
    if not copies:
        return None, None
    try:
        return copies[-1].name, copies[-1].read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{copies[-1]}: cannot be read ({error})") from error


def _samples(folder):
    """The kinds of samples, pictures before texts: each a title, how many there are, and for those that are shown the
    iteration, a name and an <img> or <pre>."""
    from PIL import Image

    found = {}
    for path in sorted(folder.glob("*")):
        match = re.fullmatch(r"(\d+)(_\w+)?\.(png|txt)", path.name)
        if match:
            found.setdefault((match[3], match[2] or ""), []).append((int(match[1]), path))
    shown = {kind: _evenly(paths, MAX_SAMPLES) for kind, paths in sorted(found.items())}
    pictures = [path for kind, paths in shown.items() if kind[0] == "png" for _, path in paths]
    as_jpeg = sum(path.stat().st_size for path in pictures) > PICTURE_BYTES
    films = []
    for (kind, suffix), paths in shown.items():
        title = {"png": "Pictures", "txt": "Texts"}[kind] + (f" ({suffix[1:]})" if suffix else "")
        items = []
        for iteration, path in paths:
            if kind == "txt":
                text = path.read_text(encoding="utf-8", errors="replace")  # one being written may end within a letter
                more = f"\n... {len(text) - MAX_TEXT:,} more characters in {path.name}" if len(text) > MAX_TEXT else ""
                items.append((iteration, f'<pre tabindex="0">{_text(text[:MAX_TEXT] + more)}</pre>'))
                continue
            try:
                content = path.read_bytes()
                with Image.open(io.BytesIO(content)) as picture:
                    picture.load()
                    width, height = picture.size
                    if as_jpeg:
                        file = io.BytesIO()
                        picture.convert("RGB").save(file, "JPEG", quality=85)
                        content = file.getvalue()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{path}: not a whole picture ({error}); remove it to have a report") from error
            address = f"data:image/{'jpeg' if as_jpeg else 'png'};base64,{base64.b64encode(content).decode()}"
            alt = f"{title} at iteration {iteration}: a grid of held-out samples, reward and prompt below each"
            items.append((iteration, f'<img src="{address}" width="{width}" height="{height}" alt="{_text(alt)}">'))
        films.append((title, len(found[kind, suffix]), items))
    return films


def _evenly(items, limit):
    """At most `limit` of them, evenly, with the first and the last."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


# ----------------------------------------------------------------------------------------------------------------------
# Headline


def _progress(saved, metrics):
    """Iterations done, and that of args.json (None where there is none). The row after the last iteration holds an
    evaluation alone."""
    trained = [max(values) for name, values in metrics.items() if not name.startswith("eval_")]
    done = max(trained) + 1 if trained else 0
    return max([done, *map(max, metrics.values())]), saved.get("num_iterations")


def _headline(run, saved, metrics, script, newest, written):
    done, planned = _progress(saved, metrics)
    files = [path.stat().st_mtime for path in (run / "args.json", *run.glob("samples/*"), *run.glob("*.py"))]
    seconds = sum(v or 0.0 for name, values in metrics.items() if name.startswith("seconds_") for v in values.values())
    length = f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
    clock = "%Y-%m-%d %H:%M"
    facts = {
        "Script": script or "not in this folder",
        **{
            label: ", ".join(map(str, value)) if isinstance(value, list) else value
            for label, name in (
                ("Model", "model"),
                ("Language model", "lm"),
                ("Reward", "reward"),
                ("Prompts", "prompts"),
                ("Held-out prompts", "eval_prompts"),
            )
            if (value := saved.get(name))
        },
        "Iterations": f"{done:,}" + (f" of {planned:,}" if isinstance(planned, int) else ""),
        "State": "finished" if isinstance(planned, int) and done >= planned else "in progress, or stopped",
        "Start": time.strftime(clock, time.localtime(min([*files, *([written] if written else [])]))) + " (first file)",
        "Last row": time.strftime(clock, time.localtime(written)) if written else "none yet",
        "Time in iterations": f"{length} (sum of seconds_*)" if seconds else "not known",
        "Last checkpoint": os.path.basename(newest) if newest else "none",
        "Export": ", ".join(f"{part}/" for part in ("model", "lm") if (run / part).is_dir()) or "none yet",
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    names = [n for n in ("eval_reward", "eval_strict", "reward") if n in metrics]
    cards = "".join(
        _card(name, metrics[name]) for name in names or ("eval_loss", "loss", "loss_text") if name in metrics
    )
    return f'<div class="cards">{cards}</div><dl>{rows}</dl>'


def _card(name, values):
    """First and last value; of what is measured in every iteration the mean of the first and last tenth."""
    finite = [value for value in values.values() if value is not None]
    if not finite:
        return f'<div class="card"><h3>{_text(name)}</h3><p>not finite</p></div>'
    tenth = 1 if name.startswith("eval_") else max(1, len(finite) // 10)
    first, last = (sum(part) / tenth for part in (finite[:tenth], finite[-tenth:]))
    how = "held-out" if name.startswith("eval_") else f"mean of {tenth} iterations" if tenth > 1 else "training"
    return (
        f'<div class="card"><h3>{_text(name)}</h3><p><span>{first:.4g}</span> → <strong>{last:.4g}</strong></p>'
        f"<p><small>{last - first:+.3g}; {how}, first and last</small></p></div>"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def _span(metrics):
    """The first and last iteration of the x axis, which all panels share."""
    iterations = [iteration for values in metrics.values() for iteration in (min(values), max(values))]
    first, last = (min(iterations), max(iterations)) if iterations else (0, 1)
    return first, max(last, first + 1)


def _panels(metrics):
    """Panel name -> {group, series}, in the order of the page. Held-out metrics stand beside what they hold out from,
    the two sides of grpo_unified.py apart, since they have different scales."""
    panels = {}
    for name in metrics:
        side, key = re.fullmatch(r"((?:lm|dm)/)?(.*)", name, re.DOTALL).groups()
        key = re.sub(r"@\d+$", "@", key.removeprefix("eval_").removesuffix("_edit"))
        key = {"reward_greedy": "reward"}.get(key, key)
        place = next(
            (g, order)
            for g, patterns in enumerate(GROUPS.values())
            for order, pattern in enumerate(patterns.split())
            if re.fullmatch(pattern, key, re.DOTALL)
        )
        panels.setdefault((*place, key, side or ""), []).append(name)
    ordered = sorted(panels, key=lambda panel: (panel[:2], list(panels).index(panel)))
    return {
        panel[3] + panel[2]: {
            "group": list(GROUPS)[panel[0]],
            "series": [
                _series(name, metrics[name]) for name in sorted(panels[panel], key=lambda n: n.startswith("eval_"))
            ],
        }
        for panel in ordered
    }


def _series(name, values):
    """What is drawn of a metric: its points, thinned, and a running mean where there are many from training."""
    x, y = list(values), list(values.values())
    kept = _thin(y, MAX_POINTS)
    count = sum(v is not None for v in y)
    noisy = count > 60 and not name.startswith("eval_")
    mean = [(x[i], value) for i, value in _running_mean(y, count // 25 | 1)] if noisy else []
    return dict(name=name, x=[x[i] for i in kept], y=[y[i] for i in kept], mean=mean)


def _thin(values, limit):
    """Indices of at most `limit` values: the first, the last, and the least and greatest of each stretch between, so
    that every spike stays."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept, stretches = {0, len(values) - 1}, limit // 2 - 1
    for stretch in range(stretches):
        start, end = (1 + (len(values) - 2) * (stretch + i) // stretches for i in (0, 1))
        finite = [i for i in range(start, end) if values[i] is not None] or [start]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def _running_mean(values, window):
    """(index, mean of the finite values among the `window` around it; fewer at the ends), at 400 indices at most."""
    total, count = [0.0], [0]
    for value in values:
        total.append(total[-1] + (value or 0.0))
        count.append(count[-1] + (value is not None))
    means = []
    for i in _evenly(range(len(values)), 400):
        start, end = max(0, i - window // 2), min(len(values), i + window // 2 + 1)
        if count[end] > count[start]:
            means.append((i, (total[end] - total[start]) / (count[end] - count[start])))
    return means


def _ticks(low, high):
    """Round numbers at equal distances that enclose low .. high, and the decimals they need."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # constant but for rounding
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * 4.001 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)], step


def _label(value, step):
    if abs(value) < step / 2:
        return "0"
    decimals = max(0, 1 - math.floor(math.log10(step)))
    if abs(value) >= 1e5 or decimals > 6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _group(group, panels, span):
    """The panels of a group; of those that are constant a line of text."""
    figures, constant = [], []
    for number, (name, panel) in enumerate(panels.items()):
        if panel["group"] == group:
            values = {value for series in panel["series"] for value in series["y"]}
            if len(values) == 1 and name != "reward" and min(len(series["y"]) for series in panel["series"]) > 2:
                constant += [f"{_text(s['name'])} <b>{_number(s['y'][0])}</b>" for s in panel["series"]]
            else:
                figures.append(_figure(number, name, panel, *span))
    constant = f'<p class="constant">Constant: {", ".join(constant)}</p>' if constant else ""
    figures = f'<div class="panels">{"".join(figures)}</div>' if figures else ""
    return f"<h3>{group}</h3>{figures}{constant}" if figures or constant else ""


def _figure(number, name, panel, first, last):
    finite = [v for s in panel["series"] for v in s["y"] if v is not None]
    ticks, step = _ticks(min(finite, default=0.0), max(finite, default=0.0))
    low, high = ticks[0], ticks[-1]

    def place(x, y):
        return f"{(x - first) / (last - first) * 1000:.1f} {(high - y) / (high - low) * 1000:.1f}"

    def line(points):
        """One stroke for each stretch without gaps; a value alone is a stroke of no length, which is drawn as a dot."""
        strokes, pen = [], "M"
        for i, (x, y) in enumerate(points):
            if y is not None:
                alone = pen == "M" and (i + 1 == len(points) or points[i + 1][1] is None)
                strokes.append(pen + place(x, y) + ("h0" if alone else ""))
            pen = "M" if y is None else "L"
        return "".join(strokes)

    paths = [
        '<path class="grid" d="'
        + "".join(f"M0 {1000 * i / (len(ticks) - 1):.1f}H1000" for i in range(len(ticks)))
        + '"/>'
    ]
    legend, taken = [], {True: 1, False: 0}
    for series in panel["series"]:
        held_out = series["name"].startswith("eval_")
        colour = f"s{taken[held_out] % 6}"  # even: training, odd: held-out
        taken[held_out] += 2
        points = list(zip(series["x"], series["y"]))
        paths.append(f'<path class="{colour} {"raw" if series["mean"] else "line"}" d="{line(points)}"/>')
        if series["mean"]:
            paths.append(f'<path class="{colour} line" d="{line(series["mean"])}"/>')
        if len(points) <= 60:
            dots = "".join(f"M{place(x, y)}h0" for x, y in points if y is not None)
            paths.append(f'<path class="{colour} dots" d="{dots}"/>')
        legend.append(
            f'<li><i class="{colour}"></i>{_text(series["name"])} <b>{_number(series["y"][-1])}</b><small></small></li>'
        )
    summary = [
        f"{s['name']} from {_number(s['y'][0])} to {_number(s['y'][-1])}, "
        f"between {_number(min((v for v in s['y'] if v is not None), default=None))} "
        f"and {_number(max((v for v in s['y'] if v is not None), default=None))}"
        for s in panel["series"]
    ]
    alt = f"Curve over iterations {first} to {last}: {'; '.join(summary)}"
    labels = "".join(f"<span>{_label(tick, step)}</span>" for tick in reversed(ticks))
    return (
        f'<figure class="panel{" wide" if name == "reward" else ""}" data-panel="{number}">'
        f'<figcaption><ul class="legend">{"".join(legend)}</ul></figcaption>'
        f'<div class="plot"><div class="y" aria-hidden="true">{labels}</div><div class="area">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{_text(alt)}">'
        f"{''.join(paths)}</svg>"
        f'<div class="cursor" hidden></div></div><div class="x" aria-hidden="true"><span>{first:,}</span>'
        f"<span>iteration</span><span>{last:,}</span></div></div></figure>"
    )


def _table_of_metrics(metrics):
    rows = []
    for name, values in metrics.items():
        finite = [value for value in values.values() if value is not None]
        missing = len(values) - len(finite)
        cells = [finite[0], finite[-1], min(finite), max(finite)] if finite else [None] * 4
        rows.append(
            f'<tr><th scope="row">{_text(name)}</th>'
            + "".join(f"<td>{_number(cell)}</td>" for cell in cells)
            + f"<td>{len(values):,}</td><td>{f'<mark>{missing:,}</mark>' if missing else '0'}</td></tr>"
        )
    head = "".join(f'<th scope="col">{c}</th>' for c in "metric first last least greatest rows".split())
    return (
        f"<details><summary>{len(metrics)} metrics: first, last, least, greatest value</summary>"
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}<th scope="col">not finite</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Samples, settings, script


def _film(film):
    title, total, items = film
    figures = "".join(
        f"<figure><figcaption>iteration {iteration:,}</figcaption>{content}</figure>" for iteration, content in items
    )
    note = f"<p>{len(items)} of {total:,} shown, evenly.</p>" if total > len(items) else ""
    return f'<h3>{_text(title)}</h3>{note}<div class="film" tabindex="0" aria-label="{_text(title)}">{figures}</div>'


def _defaults(source):
    """The defaults that class Args of a script writes down, by field; read, not run, because the folder may come from
    anywhere. {} where there is no such class."""
    try:
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    except (SyntaxError, ValueError):
        return {}
    defaults = {}
    for field in classes[0].body if classes else ():
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
            try:
                value = ast.literal_eval(field.value)
            except ValueError:  # an expression
                continue
            defaults[field.target.id] = list(value) if isinstance(value, tuple) else value
    return defaults


def _settings(saved, defaults):
    changed = {n for n, v in saved.items() if n in defaults and v != defaults[n] and n not in ("out", "resume")}

    def table(names):
        rows = []
        for name in names:
            value, default = (json.dumps(v, ensure_ascii=False) for v in (saved[name], defaults.get(name)))
            value = f"<td><mark>{_text(value)}</mark></td>" if name in changed else f"<td>{_text(value)}</td>"
            known = "<td>" + (_text(default) if name in defaults else "") + "</td>"
            rows.append(f'<tr><th scope="row">{_text(name)}</th>{value}{known if changed else ""}</tr>')
        head = '<th scope="col">setting</th><th scope="col">value</th>' + '<th scope="col">default</th>' * bool(changed)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'

    if not defaults:
        return "<p>The defaults of the script are not known.</p>" + table(saved)
    if not changed:
        everything = f"<details><summary>All {len(saved)}</summary>{table(saved)}</details>"
        return "<p>All are the defaults that the script writes down in Args.</p>" + everything
    recipes = [n for n in ("model", "lm") if n in changed]
    note = "; some may be the recipe of that " + " and ".join(recipes) if recipes else ""
    return (
        f"<p>{len(changed)} of {len(saved)} differ from what the script writes down in Args{note}.</p>"
        + table([name for name in saved if name in changed])
        + f"<details><summary>The other {len(saved) - len(changed)}</summary>"
        + table([name for name in saved if name not in changed])
        + "</details>"
    )


def _changes(script, source):
    """The run's copy against the repository's script of that name, and against the other script most like it: for a
    fork that is what it was copied from, and the difference is its idea."""
    others = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("*.py"))}
    same = others.pop(script, None)
    lines = _filled_lines(source)
    alike = {
        name: difflib.SequenceMatcher(None, lines, _filled_lines(text), autojunk=False).ratio()
        for name, text in others.items()
    }
    nearest = max(alike, key=alike.get, default=None)
    parts = []
    if same is not None:
        difference = _difference(script, same, source) or "<p>unchanged</p>"
        parts.append(f"<h3>Against {_text(script)} of the repository</h3>{difference}")
    if nearest and same is None:
        difference = _difference(nearest, others[nearest], source) or "<p>the same text</p>"
        parts.append(f"<h3>Against {_text(nearest)}, the script of the repository most like it</h3>{difference}")
    elif nearest and alike[nearest] > 0.5:
        difference = _difference(nearest, others[nearest], source) or "<p>the same text</p>"
        heading = f"Against {_text(nearest)}, the other script most like it"
        parts.append(f"<details><summary>{heading}</summary>{difference}</details>")
    return "".join(parts) or "<p>No script of the repository to compare with.</p>"


def _filled_lines(text):
    return [line for line in text.splitlines() if line.strip()]


def _difference(name, before, after):
    lines = list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), f"repository/{name}", "this run", n=3, lineterm=""
        )
    )
    if not lines:
        return ""
    added, removed = (sum(line.startswith(sign) for line in lines[2:]) for sign in "+-")
    marked = []
    for number, line in enumerate(lines[:MAX_DIFF]):
        kind = "hunk" if number < 2 or line.startswith("@@") else {"+": "add", "-": "del"}.get(line[:1], "")
        marked.append(f'<span class="{kind}">{_text(line)}</span>' if kind else f"<span>{_text(line)}</span>")
    more = f"<p>The first {MAX_DIFF:,} of {len(lines):,} lines.</p>" if len(lines) > MAX_DIFF else ""
    return (
        f'<p>{added:,} lines added, {removed:,} removed</p>{more}<pre class="diff" tabindex="0">{"".join(marked)}</pre>'
    )


# ----------------------------------------------------------------------------------------------------------------------
# The page's style and script

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --ink: #1c2128; --dim: #5b6470; --rule: #d5dae1;
  --mark: #fff1b8; --link: #0b57d0; --add: #dafbe1; --del: #ffe4e1; --hunk: #ddebff;
  --s0: #1f6fd6; --s1: #d9580d; --s2: #16803c; --s3: #a3228e; --s4: #6b4fc8; --s5: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2229; --ink: #e4e8ee; --dim: #9aa5b3;
  --rule: #363e49; --mark: #5a4a10; --link: #8ab4f8; --add: #12351f; --del: #47201d; --hunk: #1c2f4d;
  --s0: #66a8ff; --s1: #ff9350; --s2: #5ecb80; --s3: #ee86da; --s4: #b3a0ff; --s5: #d9b24c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 8px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 20px 0 8px; overflow-wrap: anywhere; }
p { margin: 4px 0; } .note, small, footer { color: var(--dim); font-size: 12px; } a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 16px; } footer { margin-top: 40px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.card { background: var(--card); border-radius: 8px; padding: 10px 16px; flex: 1 1 190px; }
.card h3 { margin: 0; font-size: 13px; color: var(--dim); font-weight: 600; }
.card p { font-variant-numeric: tabular-nums; } .card strong { font-size: 1.5rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 8px 24px; margin: 0; }
dt { color: var(--dim); font-size: 12px; } dd { margin: 0; overflow-wrap: anywhere; }
.note { font-size: 13px; max-width: 80ch; } .constant { font-size: 13px; margin: 10px 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.panel { margin: 0; background: var(--card); border-radius: 8px; padding: 10px 12px; min-width: 0; }
.panel.wide { grid-column: 1 / -1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 16px; margin: 0 0 8px; padding: 0; font-size: 13px;
  min-height: 38px; align-content: start; }
.wide .legend { font-size: 15px; min-height: 24px; }
.legend li { overflow-wrap: anywhere; } .legend b { font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin: 0 6px 3px 0;
  background: currentColor; }
.legend i.s0 { color: var(--s0); } .legend i.s1 { color: var(--s1); } .legend i.s2 { color: var(--s2); }
.legend i.s3 { color: var(--s3); } .legend i.s4 { color: var(--s4); } .legend i.s5 { color: var(--s5); }
.plot { display: grid; grid-template-columns: auto minmax(0, 1fr); column-gap: 8px; font-size: 11px; line-height: 14px;
  color: var(--dim); font-variant-numeric: tabular-nums; padding-top: 7px; }
.y { display: flex; flex-direction: column; justify-content: space-between; text-align: right; margin: -7px 0; }
.area { position: relative; height: 150px; cursor: crosshair; touch-action: pan-y; } .wide .area { height: 260px; }
.x { grid-column: 2; display: flex; justify-content: space-between; margin-top: 8px; }
svg { display: block; width: 100%; height: 100%; overflow: visible; }
svg path { fill: none; stroke: currentColor; stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .raw { opacity: .35; stroke-width: 1; }
svg .dots { stroke-width: 6; }
svg .s0 { color: var(--s0); } svg .s1 { color: var(--s1); } svg .s2 { color: var(--s2); }
svg .s3 { color: var(--s3); } svg .s4 { color: var(--s4); } svg .s5 { color: var(--s5); }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--ink); opacity: .6;
  pointer-events: none; }
.film { display: flex; gap: 16px; overflow-x: auto; scroll-snap-type: x mandatory; }
.film figure { flex: 0 0 100%; margin: 0; min-width: 0; scroll-snap-align: start; overflow-x: auto; }
.film figcaption { font-variant-numeric: tabular-nums; margin-bottom: 6px; font-weight: 600; }
.film img { display: block; max-width: max(100%, 700px); height: auto; border-radius: 6px; background: #fff; }
.film.one { display: block; } .film.one figure { display: none; } .film.one figure.on { display: block; }
.slide { display: flex; align-items: center; gap: 10px; margin: 6px 0 10px; } .slide input { flex: 1; min-width: 0; }
.slide button { font: inherit; min-width: 72px; padding: 4px 10px; }
pre { margin: 0; background: var(--card); border-radius: 6px; padding: 10px 12px; font-size: 12.5px; line-height: 1.45;
  max-height: 560px; overflow: auto; }
.film pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.diff span { display: block; width: max-content; min-width: 100%; min-height: 1.45em; }
.add { background: var(--add); } .del { background: var(--del); } .hunk { background: var(--hunk); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; min-width: 70px; }
th { font-weight: 600; } thead th { color: var(--dim); } .numbers td { font-variant-numeric: tabular-nums; }
mark { background: var(--mark); color: inherit; padding: 0 3px; border-radius: 3px; }
summary { cursor: pointer; margin: 10px 0; color: var(--link); }
"""

JS = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const figures = [...document.querySelectorAll(".panel")];
const format = (value) => value === null ? "not finite" : String(Number(value.toPrecision(4)));

function nearest(x, iteration) {
  let low = 0, high = x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < iteration) low = middle + 1; else high = middle;
  }
  return low > 0 && iteration - x[low - 1] <= x[low] - iteration ? low - 1 : low;
}

// The values of one iteration in every panel; without one the last values.
function show(iteration) {
  for (const figure of figures) {
    const series = data.panels[figure.dataset.panel].series;
    figure.querySelectorAll(".legend li").forEach((item, n) => {
      const at = iteration === null ? series[n].x.length - 1 : nearest(series[n].x, iteration);
      item.querySelector("b").textContent = format(series[n].y[at]);
      item.querySelector("small").textContent = iteration === null ? "" : " at " + series[n].x[at];
    });
    const cursor = figure.querySelector(".cursor");
    cursor.hidden = iteration === null;
    if (iteration !== null) cursor.style.left = 100 * (iteration - data.first) / (data.last - data.first) + "%";
  }
}

for (const area of document.querySelectorAll(".area")) {
  const move = (event) => {
    const box = area.getBoundingClientRect();
    const place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    show(Math.round(data.first + place * (data.last - data.first)));
  };
  area.addEventListener("pointermove", move);
  area.addEventListener("pointerdown", move);
  area.addEventListener("pointerleave", () => show(null));
}

for (const film of document.querySelectorAll(".film")) {
  const frames = [...film.children];
  if (frames.length < 2) continue;
  const line = document.createElement("div"), slider = document.createElement("input");
  const play = document.createElement("button");
  let timer = 0;
  line.className = "slide";
  Object.assign(slider, { type: "range", min: 0, max: frames.length - 1, step: 1, value: frames.length - 1 });
  slider.setAttribute("aria-label", film.getAttribute("aria-label") + " over iterations");
  const turn = () => {
    frames.forEach((frame, n) => frame.classList.toggle("on", n === slider.valueAsNumber));
    slider.setAttribute("aria-valuetext", frames[slider.valueAsNumber].querySelector("figcaption").textContent);
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); turn(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.valueAsNumber === frames.length - 1) slider.value = 0;
    turn();
    play.textContent = "Stop";
    timer = setInterval(() => {
      slider.valueAsNumber += 1;
      turn();
      if (slider.valueAsNumber === frames.length - 1) stop();
    }, 700);
  });
  stop();
  turn();
  line.append(play, slider);
  film.before(line);
  film.classList.add("one");
  film.removeAttribute("tabindex");
}
"""
