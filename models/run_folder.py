"""
The folder of a run: args.json, a copy of the script, metrics.jsonl (one object per iteration), curves.png,
samples/000100.png. Checkpoints beside them are models/checkpoint.py's. Everything here is called on rank 0 only, but
for `saved_args`.
"""

import ast
import atexit
import dataclasses
import html
import inspect
import json
import math
import os
import secrets
import shutil
import sys
import textwrap
import time
import typing
from glob import escape, glob

# When a run is resumed; max_bad, of pretrain.py, after a run has ended for bad data.
MAY_CHANGE = ("num_iterations", "eval_every", "save_every", "track", "max_bad")


def saved_args(run, args, may_change, given):
    """The arguments of the run in folder `run`, with those of `may_change` that the command line gave replaced.

    args: the dataclass instance that the command line made; given: the field names that were on the command line.
    Raises ValueError naming the flag if another one was given a value that differs from the run's, or if `run` is not a
    run folder.
    """
    path = os.path.join(run, "args.json")
    if not os.path.exists(path):
        raise ValueError(f"--resume {run}: no args.json there; expected the folder of an earlier run")
    saved = _read(path)
    if saved is None:
        raise ValueError(f"--resume {run}: its args.json is damaged; put back the flags that the run had")
    changed = {}
    for field in dataclasses.fields(args):
        name = field.name
        value = getattr(args, name)
        if name in ("resume", "out") or name not in given or name not in saved or _plain(value) == saved[name]:
            continue
        if name not in may_change:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--resume {run}: {flag} is {saved[name]} in that run and cannot become {_plain(value)}; "
                f"only {', '.join('--' + m.replace('_', '-') for m in may_change if hasattr(args, m))} may change"
            )
        changed[name] = value
    for name, value in saved.items():
        if isinstance(getattr(args, name, None), tuple):
            saved[name] = tuple(value)
    known = {f.name for f in dataclasses.fields(args)}
    return dataclasses.replace(
        args, **{**{k: v for k, v in saved.items() if k in known}, **changed, "resume": run, "out": run}
    )


def command_line(defaults, argv, script):
    """Parse a command line over the dataclass instance `defaults`: unset --out becomes outputs/<new_name>, and
    --resume takes its arguments from the run it names. With --track, rank 0 stops here if wandb cannot be used."""
    args = parse(defaults, argv, os.path.basename(script))
    if args.resume:
        from models.parallel import clear_errors

        with clear_errors():
            args = saved_args(args.resume.rstrip("/"), args, MAY_CHANGE, given_flags(args, argv))
    if args.track and os.environ.get("RANK", "0") == "0":
        log_in()
    if args.resume:
        return args
    if args.out and os.path.exists(os.path.join(args.out, "args.json")):
        # Its checkpoints and metrics would be taken for those of the new run.
        raise SystemExit(
            f"error: --out {args.out} holds a run already: continue it with --resume {args.out}, or remove it"
        )
    name = new_name(os.path.basename(script).removesuffix(".py"))
    return dataclasses.replace(args, out=args.out or os.path.join("outputs", name))


def new_name(what):
    """<what>-<time>-<number of the process>: runs that start in the same second have folders of their own."""
    return f"{what}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def parse(defaults, argv, prog):
    """The dataclass instance `defaults` with what the command line `argv` gives put in its place.

    A one-line comment that opens a block of fields in the class (`# Sizes`) is the title of their group in --help; the
    text below a field is its help. A wrong flag ends the program with code 2 and the nearest flag that there is.
    """
    import tyro

    kinds = typing.get_type_hints(type(defaults), include_extras=True)
    texts, groups = documented(type(defaults)), {}
    for field in dataclasses.fields(defaults):
        title, text = texts.get(field.name, ("", None))
        kind = typing.Annotated[kinds[field.name], tyro.conf.arg(help=text)]
        groups.setdefault(title, {})[field.name] = kind
    # tyro makes a group of every dataclass inside another one: those are made here, so that Args can stay flat.
    titles, inner = list(groups), []
    for kinds in groups.values():
        group = dataclasses.make_dataclass("Group", kinds.items())
        inner.append(group(**{name: getattr(defaults, name) for name in kinds}))
    outer = dataclasses.make_dataclass(
        "Groups",
        [
            (f"group_{i}", typing.Annotated[type(group), tyro.conf.arg(name=title)])
            for i, (title, group) in enumerate(zip(titles, inner))
        ],
    )
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[outer], default=outer(*inner), args=argv, prog=prog, description="")
    given = {}
    for group in vars(parsed).values():
        given |= vars(group)
    return dataclasses.replace(defaults, **given)


def documented(kind):
    """Field name -> (title of its group in lower case, help text or None) of a dataclass, from its source."""
    found = {}
    for parent in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        source = textwrap.dedent(inspect.getsource(parent))
        lines, title = source.splitlines(), ""
        body = ast.parse(source).body[0].body
        for node, below in zip(body, [*body[1:], None]):
            if not isinstance(node, ast.AnnAssign):
                continue
            before, above = (line.strip() for line in lines[node.lineno - 3 : node.lineno - 1])
            if above.startswith("#") and (not before or before.startswith("class ")):
                title = above.lstrip("# ").lower()
            value = getattr(below, "value", None)
            text = value.value if isinstance(below, ast.Expr) and isinstance(value, ast.Constant) else None
            found[node.target.id] = title, text and " ".join(text.split())
    return found


def peek(argv, flag, default):
    """The value of one flag before the command line is parsed, for the recipe that it chooses; --resume takes it from
    the run."""
    for word, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name.replace("_", "-") == flag:
            return value
        if name == "--resume":  # a folder that is none is left to command_line, which says so
            return (_read(os.path.join(value, "args.json")) or {}).get(
                flag.removeprefix("--").replace("-", "_"), default
            )
    return default


def _read(path):
    """The object in a JSON file; None where there is none."""
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def given_flags(args, argv):
    """Names of the fields of `args` that a command line sets, in either spelling (--kl-coef, --kl_coef,
    --flag=value)."""
    words = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}
    return {f.name for f in dataclasses.fields(args) if f.name in words or "no_" + f.name in words}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def create(run, args, script):
    """Make the run folder: samples/, checkpoints/, a copy of the script, and last args.json, which is what makes it
    resumable."""
    for folder in ("samples", "checkpoints"):
        os.makedirs(os.path.join(run, folder), exist_ok=True)
    shutil.copy(script, os.path.join(run, os.path.basename(script)))
    temporary = os.path.join(run, ".args.json")
    with open(temporary, "w") as f:
        json.dump(dataclasses.asdict(args), f, indent=1)
    os.replace(temporary, os.path.join(run, "args.json"))


def log_in():
    """Check that Weights & Biases can be used: offline, or logged in. SystemExit with one message if it cannot."""
    try:
        import wandb
    except ImportError:
        raise SystemExit("error: --track: Weights & Biases is not installed: pip install wandb") from None
    if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) not in ("online", "shared", "run"):
        return
    try:
        if wandb.login(verify=True):
            return
        problem = "not logged in"
    except Exception as e:  # of wandb, of the network, of the proxy
        problem = str(e).strip().partition("\n")[0].partition(". ")[0]
    raise SystemExit(
        f"error: --track: Weights & Biases: {problem}; run `wandb login`, or set WANDB_MODE=offline and send the run "
        "later with `wandb sync`"
    )


class Tracker:
    """A Weights & Biases run that mirrors the run folder `run`: its arguments, metrics and samples, and nothing else.

    Its id and next step are kept in <run>/wandb/run.json: a resumed run goes on in it, and one that was not tracked
    before first sends what metrics.jsonl has. Everything is drawn over `iteration`; wandb's own step must grow, which
    the iteration does not where a run that was killed is resumed from a checkpoint before its last row.
    """

    def __init__(self, run, project, args):
        import wandb

        os.makedirs(os.path.join(run, "wandb"), exist_ok=True)
        self.run, self.path = run, os.path.join(run, "wandb", "run.json")
        known = _read(self.path)
        self.state = known or {"id": secrets.token_hex(4), "step": 0}
        try:
            self.wandb = wandb.init(
                project=project,
                name=os.path.basename(run),
                config=dataclasses.asdict(args),
                dir=run,
                id=self.state["id"],
                resume="allow",
                allow_val_change=True,
                settings=wandb.Settings(
                    reinit="finish_previous",
                    host="",
                    console="off",
                    disable_git=True,
                    save_code=False,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as e:  # of wandb, of the network; also where another process is tracking this run
            raise SystemExit(f"error: --track: Weights & Biases: {str(e).strip()}") from None
        self.state["step"] = max(self.state["step"], self.wandb.starting_step)
        self.wandb.define_metric("*", step_metric="iteration")
        atexit.register(self.finish)
        for row in [] if known else rows(run):
            self.log(row)

    def finish(self):
        """Send what is left, when the process ends. wandb does so itself, but not below a process that uses it too."""
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(hasattr(sys, "last_value")))  # set by an error that nobody caught
            self.wandb = None

    def log(self, row):
        """Send one iteration: its finite metrics, and samples/<iteration>*, which are to be written before."""
        if self.wandb is None:
            return
        sent = {k: v for k, v in row.items() if v is not None and math.isfinite(v)}
        step = max(self.state["step"], row["iteration"])
        self.state["step"] = step + 1
        try:
            with open(self.path, "w") as f:
                json.dump(self.state, f)
            self.wandb.log(sent | self.samples(row["iteration"]), step=step, commit=True)
        except Exception as e:  # training is worth more than its mirror
            print(
                f"\nwarning: Weights & Biases: {e}: tracking ends at iteration {row['iteration']}, {self.run} has all; "
                f"to send it as a new run remove {self.run}/wandb and --resume with --track",
                file=sys.stderr,
            )
            self.wandb = None

    def samples(self, iteration):
        """Name -> picture or text of one iteration: samples/000100_edit.png is samples_edit, 000100.txt is texts."""
        import wandb

        found = {}
        for path in glob(os.path.join(escape(self.run), "samples", f"{iteration:06d}[!0-9]*")):
            stem, suffix = os.path.splitext(os.path.basename(path))
            kind = stem.lstrip("0123456789")
            if suffix == ".png":
                found["samples" + kind] = wandb.Image(path)
            else:
                with open(path, encoding="utf-8") as f:
                    found["texts" + kind] = wandb.Html(f"<pre>{html.escape(f.read())}</pre>")
        return found


def to_uint8(images):
    """Float [0, 1] B 3 H W -> list of uint8 numpy [H, W, 3]; rounded here, once, for every reward and every file."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def append(run, row):
    """Add one iteration to metrics.jsonl; NaN becomes null, because JSON has none. Whole lines only: one write, flushed
    to disk."""
    row = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
    with open(os.path.join(run, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def rows(run):
    """The iterations logged so far; a last line that a killed run left unfinished is not one."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as f:
        lines = [line for line in f if line.endswith("\n")]
    return [json.loads(line) for line in lines]


def cut(run, iteration):
    """Drop the rows of `iteration` and later: a resumed run writes them again."""
    kept = [row for row in rows(run) if row["iteration"] < iteration]
    temporary = os.path.join(run, ".metrics.jsonl")
    with open(temporary, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(temporary, os.path.join(run, "metrics.jsonl"))


def curves(run, names):
    """Draw curves.png: one panel for each of `names` that was logged. A list inside `names` shares a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = rows(run)
    panels = [
        [n for n in ([p] if isinstance(p, str) else p) if any(r.get(n) is not None for r in history)] for p in names
    ]
    panels = [p for p in panels if p]
    if not panels:
        return
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines))
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        column, line = i % columns, i // columns  # placed by hand: matplotlib's own layout takes as long as the drawing
        place = ((column + 0.15) / columns, 1 - (line + 0.83) / lines, 0.81 / columns, 0.72 / lines)
        axes = figure.add_axes(place)
        for name in panel:
            points = [(r["iteration"], r[name]) for r in history if r.get(name) is not None]
            axes.plot(*zip(*points), label=name, linewidth=1.2, marker="o" if len(points) < 20 else None, markersize=3)
        axes.set_title(", ".join(panel), fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        if i >= len(panels) - columns:
            axes.set_xlabel("iteration", fontsize=8)
    figure.savefig(os.path.join(run, ".curves.png"), dpi=110)
    os.replace(os.path.join(run, ".curves.png"), os.path.join(run, "curves.png"))


def grid(path, images, captions, columns=8, cell=128):
    """Write a grid of pictures, each with its caption below it.

    images: list of uint8 arrays [H, W, 3]; small ones are enlarged without smoothing, large ones shrunk to `cell`
    pixels of height (of width, where all are upright). Wide ones, like a picture before and after an edit, stand in
    fewer columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=10)
    aspect = max(1.0, *(image.shape[1] / image.shape[0] for image in images))
    columns, width = min(max(1, round(columns / aspect)), len(images)), round(cell * aspect)
    wrapped = [wrap(caption, font, width)[:4] for caption in captions]
    height = cell + 12 * max(map(len, wrapped)) + 10
    sheet = Image.new("RGB", (columns * (width + 6) + 6, math.ceil(len(images) / columns) * height + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = 6 + i % columns * (width + 6), 6 + i // columns * height
        picture = Image.fromarray(image)
        scale = min(width / picture.width, cell / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(picture.resize(size, Image.NEAREST if scale > 1 else Image.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline="#cccccc")
        for n, line in enumerate(wrapped[i]):
            draw.text((x, y + cell + 2 + 12 * n), line, fill="black", font=font)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
    sheet.save(temporary)
    os.replace(temporary, path)


def texts(path, rows, samples, rewards):
    """Write <path>.txt: reward, prompt and sample of each row ({"prompt", "image"}); and <path>.png, a grid, where the
    prompts come with pictures."""
    import numpy as np

    blocks = [f"reward {r:.2f}\n> {row['prompt']}\n{sample}\n" for row, sample, r in zip(rows, samples, rewards)]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".txt", "w", encoding="utf-8") as f:
        f.write("\n".join(blocks))
    if all(row["image"] is not None for row in rows):
        captions = [f"{r:.2f} {row['prompt']} {sample}" for row, sample, r in zip(rows, samples, rewards)]
        grid(path + ".png", [np.asarray(row["image"].convert("RGB")) for row in rows], captions)


def wrap(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
