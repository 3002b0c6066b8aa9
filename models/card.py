"""
The model card of an export: README.md as the Hugging Face hub reads it, written from what is in the run folder, and the
upload of both.

Whatever a user chose (names, prompts, rewards, flags) is text and not markup: YAML goes through a dumper, prose through
`text`, code through fences longer than any in it.
"""

import ast
import glob
import inspect
import json
import math
import os
import re
import shlex
import shutil

import yaml

import models
from models import run_folder

FLUX_DEV, STABILITY, QWEN = "flux-1-dev-non-commercial-license", "stabilityai-ai-community", "qwen-research"
# Hub id -> licence in the hub's terms, of what has an alias; of anything else it is not known here.
LICENCES = {
    **{source: "apache-2.0" for source in models.LM_ALIASES.values() if source.startswith("Qwen/")},
    "Qwen/Qwen2.5-3B-Instruct": QWEN,
    "Qwen/Qwen2.5-VL-3B-Instruct": QWEN,
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-Kontext-dev": FLUX_DEV,
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "stabilityai/stable-diffusion-3-medium-diffusers": STABILITY,
    "stabilityai/stable-diffusion-3.5-medium": STABILITY,
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "nscl-v2-custom",
}
LICENCE_NAMES = {
    "apache-2.0": "the Apache License 2.0",
    FLUX_DEV: "the FLUX.1 [dev] Non-Commercial License: no commercial use",
    STABILITY: "the Stability AI Community License, which limits commercial use",
    QWEN: "the Qwen Research License: no commercial use",
    "nscl-v2-custom": "NVIDIA's licence NSCL v2-custom, and its text encoder under the Gemma Terms of Use",
}

# Pipeline class -> (tokenizer of its longest text, tokens of it that the stock pipeline takes, further options that
# keep picture and prompt as they were in training)
STOCK = {
    "FluxPipeline": ("tokenizer_2", 512, []),
    "FluxKontextPipeline": ("tokenizer_2", 512, ["max_area={0} * {0}", "_auto_resize=False"]),
    "Flux2KleinPipeline": ("tokenizer", 512, []),
    "StableDiffusion3Pipeline": ("tokenizer_3", 256, []),
    "SanaPipeline": ("tokenizer", 300, ["use_resolution_binning=False"]),
}

# What of the arguments says how it was made; what a script does not have is left out.
MADE = {
    "task": "task",
    "train": "trained side",
    "reward": "reward",
    "text_reward": "reward of answers (evaluation only)",
    "prompts": "training prompts",
    "data": "training pictures",
    "edit_data": "training edits",
    "text_data": "training questions",
    "instruction": "text behind every prompt",
    "eval_prompts": "held-out prompts",
    "seed": "seed",
}
NOT_COMMAND = ("out", "resume", "track", "dry_run")  # flags that have no part in what comes out

METRICS = {
    "eval_reward": "mean reward on held-out prompts, the weighted sum where there are several rewards",
    "eval_reward/": "the same of one reward, without its weight",
    "eval_strict": "share of held-out prompts that the reward's strict form calls right",
    "eval_reward_edit": "mean reward of held-out edits",
    "eval_strict_edit": "share of held-out edits that are right by the strict form",
    "eval_unchanged_edit": "what held-out pictures would score if they were returned unedited",
    "eval_text": "mean reward of the answers to held-out questions",
    "eval_text_logp": "log-likelihood of what it answers to them, in nats",
    "eval_loss": "flow-matching loss on held-out pictures at fixed noise levels; lower is better",
    "eval_loss_edit": "the same of held-out edits",
    "eval_pass@": "share of held-out prompts with a right answer among so many sampled ones",
    "eval_length": "tokens of a held-out answer",
    "eval_truncated_frac": "share of held-out answers that were cut off at --max-new-tokens",
}

SHIPPED = (".safetensors", ".json", ".md", ".png")
# What tokenizers are saved as beside JSON; of these, sentencepiece's are protocol buffers.
TOKENIZER_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


def write(folder, run, recipe=None):
    """Write <folder>/README.md, and curves.png beside it, for an export (<run>/model or <run>/lm) of the run folder
    `run`.

    recipe: the script's own, which gives the defaults for the model: the command line shows what differs from them.
    Without it the command line of an earlier card stays, or, where there is none, every flag is shown. Raises
    ValueError where `run` has no arguments or `folder` holds no export.
    """
    saved = _json(os.path.join(run, "args.json"))
    if saved is None:
        raise ValueError(f"{run}: no args.json, or a damaged one; expected the folder of a run")
    script, idea = _script(run)
    is_lm = "model" not in saved or os.path.basename(os.path.normpath(folder)) == "lm"
    # The language model of a unified one is trained alone by --task text, without a name of its own.
    base = saved["lm"] or saved["model"] if is_lm else saved["model"]
    kind, adapter, pipeline = _kind(folder, base)
    sources = _sources(base, is_lm)
    curves = os.path.join(run, "curves.png")
    if os.path.exists(curves):
        shutil.copyfile(curves, os.path.join(folder, "curves.png"))
    task = _task(kind, pipeline, base, saved)
    licence, licence_note = _licence(sources)
    front = {}
    if all(map(_is_hub_id, sources)):
        front["base_model"] = sources[0] if len(sources) == 1 else sources
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    if kind != "unified":  # which is in no library's format
        front["library_name"] = "peft" if adapter and kind == "transformers" else kind
    rl = ["reinforcement-learning"] if isinstance(saved.get("reward"), list) else []
    front |= dict(pipeline_tag=task, tags=[*rl, *(["lora"] if adapter else [])], **licence)
    header = yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False, allow_unicode=True)
    path = os.path.join(folder, "README.md")
    line = None if recipe else _earlier_line(path)
    line = line or fenced(command(saved, script, recipe, _world_size(run)), "bash")
    name = _shown(base, sources)
    made = f" by {code(script)}" if script else ""
    what = f"A LoRA adapter of {code(name)}" if adapter else f"{code(name)}, fine-tuned"
    parts = [
        f"---\n{header}---",
        f"# {text(os.path.basename(name))}, trained{f' by {text(script)}' if script else ''}",
        f"{what}{made}. {text(idea)}".strip(),
        f"## How it was made\n\n{_made(saved, run, adapter, is_lm)}",
        f"## Reward on held-out prompts\n\n{_evaluations(run, saved)}",
        f"## The command line\n\n{line}",
        f"## How to load it\n\n{_usage(kind, adapter, pipeline, folder, base, sources, task, saved)}",
        f"## Licence\n\n{licence_note}",
    ]
    temporary = os.path.join(folder, ".README.md")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write("\n\n".join(parts) + "\n")
    os.replace(temporary, path)


def _earlier_line(path):
    """The command line in a card, with its fence; None where there is no card."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        found = re.search(r"^## The command line\n\n((`{3,})bash\n.*?\n\2)$", f.read(), re.DOTALL | re.MULTILINE)
    return found and found[1]


def text(value):
    """A string as Markdown that shows it and nothing else: no markup, no HTML, one line."""
    keep = r"[\w ./:,=+()'\"%;?!#-]"
    escaped = "".join(c if re.match(keep, c) else f"&#{ord(c)};" for c in " ".join(str(value).split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", "&#95;", escaped)


def code(value):
    """The same in the letters of code. No backticks: inside those nothing can be escaped."""
    return f"<code>{text(value)}</code>"


def fenced(content, language):
    """A code block that no content can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content}\n{fence}"


def command(saved, script, recipe=None, world_size=1):
    """The command line that gives the arguments `saved` (a dict, as in args.json).

    recipe: see `write`; what chooses it, its parameters, is always named, unless empty or without effect.
    """
    wanted, defaults = {k: v for k, v in saved.items() if k not in NOT_COMMAND}, None
    always = []
    try:
        parameters = inspect.signature(recipe).parameters if recipe else {}
        chosen = {name: str(saved[name]) for name in parameters}
        if recipe:
            defaults = recipe(**chosen)
            for name, parameter in parameters.items():
                rest = {k: v for k, v in chosen.items() if k != name}
                if chosen[name] and (parameter.default is inspect.Parameter.empty or recipe(**rest) != defaults):
                    always.append(name)
    except (KeyError, ValueError, TypeError, OSError, RuntimeError):  # a fork's own recipe, or a model that has moved
        defaults = None
    if defaults is not None:
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(defaults).items()}
        wanted = {k: v for k, v in wanted.items() if k in always or (k in plain and plain[k] != v)}
    order = [*always, *(k for k in wanted if k not in always)]
    flags = [_flag(name, wanted[name]) for name in order]
    launcher = "python" if world_size == 1 else f"torchrun --nproc_per_node {world_size}"
    if world_size > 8:
        launcher = f"torchrun --nnodes {-(-world_size // 8)} --nproc_per_node 8"
    lines, line = [], f"{launcher} {script or 'script.py'}"
    for flag in flags:
        if len(line) + len(flag) > 100:
            lines.append(line)
            line = "   "
        line += " " + flag
    return " \\\n".join([*lines, line])


def _flag(name, value):
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = [shlex.quote(_without_password(str(v))) for v in (value if isinstance(value, list) else [value])]
    dashed = isinstance(value, str) and value.startswith("-")  # would read as a flag
    return f"--{flag}={values[0]}" if dashed else " ".join([f"--{flag}", *values])


def _without_password(value):
    return re.sub(r"://[^/@\s]*@", "://", value)


# ----------------------------------------------------------------------------------------------------------------------
# What is in the folders


def _json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def _script(run):
    """Name of the script whose copy is in the run folder, and the first paragraph of its docstring: what it does."""
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "*.py"))):
        try:
            with open(path, encoding="utf-8") as f:
                doc = ast.get_docstring(ast.parse(f.read())) or ""
        except (OSError, ValueError, SyntaxError):
            doc = ""
        return os.path.basename(path), " ".join(doc.split("\n\n")[0].split())
    return "", ""


def _kind(folder, base):
    """(unified, diffusers or transformers; whether it is an adapter; the pipeline class of diffusers)."""
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    config = models.unified(folder)
    if config:
        return "unified", "base" in config, None
    if "model_index.json" in there:
        return "diffusers", False, models.pipeline_class(folder)
    if "pytorch_lora_weights.safetensors" in there:
        return "diffusers", True, models.pipeline_class(base)
    if "adapter_config.json" in there:
        return "transformers", True, None
    if "config.json" in there:
        return "transformers", False, None
    raise ValueError(f"{folder}: no export there; expected a folder in diffusers, transformers or PEFT layout")


def _sources(base, is_lm):
    """Hub ids or folders of what was trained: one, or language model and SANA of a unified model."""
    if is_lm:
        return [models.lm_source(base)]
    folder = models.folder_or_id(base)
    config = models.unified(folder)
    while config and "base" in config:
        folder = models.folder_or_id(config["base"])
        config = models.unified(folder)
    if not config:
        return [folder]
    parts = [(config["lm"], models.LM_ALIASES), (config["sana"], models.ALIASES)]
    return [os.path.join(folder, n) if n.startswith(".") else models.folder_or_id(n, aliases) for n, aliases in parts]


def _is_hub_id(source):
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not source.startswith(".") and not os.path.isdir(source)


def _is_tiny(source):
    """A model of assets/: this repository's own, trained from nothing."""
    inside = os.path.join(os.path.abspath(models.ASSETS), "")
    return os.path.abspath(source).startswith(inside)


def _shown(base, sources):
    """A name for the base model: its hub id, its alias where it is one of the tiny ones, or the name of its folder."""
    if len(sources) == 1 and _is_hub_id(sources[0]):
        return sources[0]
    return os.path.basename(os.path.normpath(base))


def _task(kind, pipeline, base, saved):
    """`pipeline_tag`."""
    edits = str(saved.get("task", "")).startswith("i2i") or str(saved.get("prompts", "")).startswith("shapes-edit")
    if kind in ("diffusers", "unified"):
        return "image-to-image" if edits or pipeline == "FluxKontextPipeline" else "text-to-image"
    try:
        return "image-text-to-text" if str(models.model_type(base)).endswith("_vl") else "text-generation"
    except (ValueError, RuntimeError):
        return "text-generation"


def _licence(sources):
    """The front matter's entries, and the sentences of the card."""
    found = [None if not _is_hub_id(s) else LICENCES.get(s) for s in sources]
    if all(map(_is_tiny, sources)):
        return dict(license="apache-2.0"), "The base model comes with this code, under the Apache License 2.0."
    if len(found) > 1 or found[0] is None:
        names = " and ".join(code(s) for s in sources if _is_hub_id(s))
        of = f"the base model{'s' if len(found) > 1 else ''}{f', {names},' if names else ''}"
        return dict(license="other"), f"The licence of {of} applies; read it before you use or share these weights."
    (licence,), (source,) = found, sources
    note = f"These weights derive from {code(source)}, which is under {text(LICENCE_NAMES[licence])}."
    if licence == "apache-2.0":
        return dict(license=licence), note
    link = f"https://huggingface.co/{source}"
    note += f" That licence applies to them too; its text, which prevails over this note, is at {link}."
    return dict(license="other", license_name=licence, license_link=link), note


def _world_size(run):
    """Number of processes that wrote the newest checkpoint; 1 where there is none."""
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "checkpoints", "[0-9]*", "index.json")), reverse=True):
        return (_json(path) or {}).get("world_size", 1)
    return 1


# ----------------------------------------------------------------------------------------------------------------------
# Sections


def _table(head, rows):
    """Cells are Markdown without a bar, as `text` and `code` write it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _made(saved, run, adapter, is_lm):
    rows = []
    for name, what in MADE.items():
        value = saved.get(name)
        if value in (None, "", []):
            continue
        if name == "reward" and isinstance(value, str):
            what = "reward (evaluation only)"
        values = [_without_password(str(v)) for v in (value if isinstance(value, list) else [value])]
        rows.append([what, ", ".join(map(code, values))])
    if saved.get("prompts") and not saved.get("eval_prompts"):
        own = re.fullmatch(r"(shapes(-user|-edit|-qa)?|arithmetic)(#.*)?", str(saved["prompts"]))
        which = "what it holds out itself" if own else "a tenth of the training prompts, chosen by hash"
        rows.append(["held-out prompts", f"{which}, and never trained on"])
    done, planned = max((row["iteration"] for row in run_folder.rows(run)), default=0), saved.get("num_iterations")
    rows.append(["iterations", f"{done}" if done == planned else f"{done} of {planned}"])
    ranks = _world_size(run)
    if "group_size" in saved:
        batch = f"{saved.get('num_prompts')} prompts of {saved['group_size']} samples"
    else:
        batch = f"{saved.get('batch_size')} pictures"
    rows.append(["an iteration", text(f"{batch}, on each of {ranks} processes" if ranks > 1 else batch)])
    rank, alpha = saved.get("lora_rank") or 0, saved.get("lora_alpha") or 0
    rate = saved["lm_learning_rate"] if is_lm and "lm_learning_rate" in saved else saved.get("learning_rate")
    trained = f"an adapter of rank {rank}, alpha {alpha or 2 * rank:g}" if adapter else "full fine-tuning"
    rows.append(["trained", text(f"{trained}, AdamW, learning rate {rate}")])
    decay = saved.get("ema_decay") or 0
    averaged = f"exponential average of them over the updates (decay {decay:g}), " if decay else ""
    rows.append(["weights", f"{averaged}at the last iteration; no checkpoint was selected by its reward"])
    return _table(["", ""], rows)


def _evaluations(run, saved):
    """Start and end of everything that was measured on held-out prompts, and the curves."""
    rows = run_folder.rows(run)
    found = [row for row in rows if any(k.startswith("eval_") and v is not None for k, v in row.items())]
    names = list(dict.fromkeys(k for row in found for k in row if k.startswith("eval_")))
    ends = [found[0], found[-1]] if len(found) > 1 else found
    drawn = os.path.exists(os.path.join(run, "curves.png"))
    picture = "\n\n![Metrics over the iterations](curves.png)" if drawn else ""
    if not found:
        return f"Nothing was evaluated on held-out prompts.{picture}"

    def cell(value):
        return f"{value:.4g}" if isinstance(value, (int, float)) and math.isfinite(value) else "not measured"

    head = ["", *(f"iteration {row['iteration']}" for row in ends)]
    table = _table(head, [[code(name), *(cell(row.get(name)) for row in ends)] for name in names])
    size = saved.get("eval_size") or 0
    over = f"{size} held-out samples" if size else "all held-out prompts"
    note = f"One run with one seed, evaluated on {over}; the spread over seeds was not measured."
    if len(ends) == 1:
        note += " There is one evaluation only, so that nothing can be said about what training changed."
    meaning = [f"- {code(name)}: {METRICS[key]}" for name in names if (key := _metric(name)) in METRICS]
    return "\n\n".join([table, note, "\n".join(meaning)]).strip() + picture


def _metric(name):
    """Its key in METRICS."""
    return next((key for key in ("eval_reward/", "eval_pass@") if name.startswith(key)), name)


def _usage(kind, adapter, pipeline, folder, base, sources, task, saved):
    edits = task == "image-to-image"
    mode = (
        f"i2i{' --refine' * _refines(saved)} --image picture.png" if edits else "t2icot" if _refines(saved) else "t2i"
    )
    line = f"python infer.py --mode {mode} --model FOLDER --prompt {shlex.quote(_example(saved, task))}"
    # A copy of the export has no args.json above it.
    settings = {name: saved.get(name) for name in ("resolution", "num_steps", "guidance", "image_guidance")}
    settings["num_steps"] = saved.get("eval_num_steps", settings["num_steps"])
    settings = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in settings.items() if value is not None)
    if kind == "unified":
        note = "A unified model is in a format of its own: it needs the code that made it. FOLDER is this folder, or "
        note += "its id on the hub."
        if adapter:
            note += f" The adapter belongs to {code(_shown(base, sources))}, where config.json says that it is."
        return f"{note}\n\n{fenced(f'{line} {settings}'.strip(), 'bash')}"
    source = sources[0] if _is_hub_id(sources[0]) else os.path.relpath(sources[0], folder)
    note = ""
    if adapter and not _is_hub_id(sources[0]):
        name = code(_shown(base, sources))
        note += (
            f"The base model {name} is a folder, not on the hub, and the adapter is of no use without it. Seen from "
        )
        note += f"here it is {code(source)}.\n\n"
    if saved.get("sigma_schedule") == "single":
        note += "In training SD3's schedule was shifted once; the stock pipeline shifts it twice.\n\n"
    if kind == "diffusers":
        snippet = _diffusers(folder, adapter, pipeline, source, task, saved)
    else:
        snippet = _transformers(adapter, source, task, saved)
    block = fenced(snippet, "python")
    if _refines(saved):
        block += "\n\nIn training a language model rewrote what the diffusion model was asked for. To have both do so, "
        block += f"with the code that made them and FOLDER the run's:\n\n{fenced(line, 'bash')}"
    return f"{note}{block}"


def _example(saved, task):
    shapes = "shapes" in f"{saved.get('prompts', '')} {saved.get('data', '')} {saved.get('edit_data', '')}"
    if task == "image-to-image":
        return "make the circle blue" if shapes else "make it snow"
    return "a red circle left of a blue square" if shapes else "a red fox in fresh snow"


def _dtype(saved):
    return "torch.bfloat16" if saved.get("dtype") == "bf16" else "torch.float32"


def _diffusers(folder, adapter, pipeline, source, task, saved):
    tokenizer, tokens, extra = STOCK[pipeline]
    files, weights = (os.path.join(folder, source), _quoted(source)) if adapter else (folder, "model")
    index = _json(os.path.join(files, "model_index.json")) or {}
    # SD3 without T5: diffusers writes such a folder, and reads it only if told what is not there.
    absent = [name for name, value in index.items() if name.startswith(("text_", "token")) and value == [None, None]]
    options = "".join(f", {name}=None" for name in absent)
    size, steps = saved.get("resolution"), saved.get("eval_num_steps", saved.get("num_steps"))
    call = [f"prompt={_quoted(_example(saved, task))}"]
    edits = task == "image-to-image"
    call += [f'image=Image.open("picture.png").convert("RGB").resize(({size}, {size}))'] if edits else []
    call += [f"height={size}", f"width={size}", *(option.format(size) for option in extra)]
    call += [f"num_inference_steps={steps}", f"guidance_scale={saved.get('guidance')}"]
    limit = (_json(os.path.join(files, tokenizer, "tokenizer_config.json")) or {}).get("model_max_length", tokens)
    if limit < tokens:  # of a tiny model
        call += [f"max_sequence_length={limit}"]
        call += ["complex_human_instruction=None"] if pipeline == "SanaPipeline" else []
    lines = [
        "import torch",
        f"from diffusers import {pipeline}",
        *(["from PIL import Image"] if edits else []),
        "",
        'model = "."  # this folder, or its id on the hub',
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"pipeline = {pipeline}.from_pretrained({weights}, dtype={_dtype(saved)}{options})",
        *(["pipeline.load_lora_weights(model)"] if adapter else []),
        "pipeline.to(device)",
        "picture = pipeline(",
        *(f"    {option}," for option in call),
        ").images[0]",
        'picture.save("out.png")',
    ]
    return "\n".join(lines)


def _quoted(value):
    return json.dumps(value, ensure_ascii=False)


def _transformers(adapter, source, task, saved):
    prompt = _question(saved, task)
    auto = "AutoModelForImageTextToText" if task == "image-text-to-text" else "AutoModelForCausalLM"
    images = task == "image-text-to-text" and saved.get("task") != "t2icot"  # where it rewrites what it reads
    weights = _quoted(source) if adapter else "model"
    lines = ["import torch", *(["from peft import PeftModel"] if adapter else [])]
    lines += ["from PIL import Image"] if images else []
    lines += [f"from transformers import {'AutoImageProcessor, ' if images else ''}{auto}, AutoTokenizer", ""]
    lines += ['model = "."  # this folder, or its id on the hub']
    lines += ['device = "cuda" if torch.cuda.is_available() else "cpu"']
    lines += ["tokenizer = AutoTokenizer.from_pretrained(model)"]
    lines += [f"lm = {auto}.from_pretrained({weights}, dtype={_dtype(saved)})"]
    lines += ["lm = PeftModel.from_pretrained(lm, model)"] if adapter else []
    lines += ["lm = lm.to(device)"]
    content = _quoted(prompt)
    if images:
        lines += [f'content = [{{"type": "image"}}, {{"type": "text", "text": {content}}}]']
        content = "content"
    lines += [f'messages = [{{"role": "user", "content": {content}}}]']
    tokenized = 'return_tensors="pt", return_dict=True' if not images else "tokenize=False"
    lines += [
        f"inputs = tokenizer.apply_chat_template(\n    messages, add_generation_prompt=True, enable_thinking=False, "
        f"{tokenized}\n)"
    ]
    if images:  # AutoProcessor does this in two lines, but wants torchvision
        lines += [
            f'eyes = AutoImageProcessor.from_pretrained({weights}, backend="pil")',
            'pixels = eyes(images=[Image.open("picture.png").convert("RGB")], return_tensors="pt")',
            "place = tokenizer.decode(lm.config.image_token_id)  # once for every token of the picture",
            "size = int(pixels.image_grid_thw.prod()) // eyes.merge_size**2",
            'inputs = tokenizer(inputs.replace(place, place * size), return_tensors="pt") | pixels',
            'inputs["mm_token_type_ids"] = (inputs["input_ids"] == lm.config.image_token_id).int()',
        ]
    lines += ["inputs = {name: tensor.to(device) for name, tensor in inputs.items()}"]
    lines += [f"ids = lm.generate(**inputs, max_new_tokens={saved.get('max_new_tokens', 256)}, do_sample=False)"]
    lines += ['print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))']
    return "\n".join(lines)


def _refines(saved):
    """Whether a language model wrote what a diffusion model drew, or edited."""
    return saved.get("task") == "t2icot" or bool(saved.get("refine"))


def _question(saved, task):
    """A prompt as the language model saw them in training."""
    if _refines(saved):
        from models import blip3o

        edits = saved["task"].startswith("i2i")
        template = blip3o.REFINE_EDIT if edits else blip3o.REFINE
        return template.format(_example(saved, "image-to-image" if edits else "text-to-image"))
    prompts = str(saved.get("prompts", ""))
    question = "What is 27 + 45?"
    if task == "image-text-to-text":
        question = "what colour is the circle?" if prompts.startswith("shapes") else "What is in the picture?"
    elif prompts == "arithmetic":
        question = "27+45="
    return f"{question}\n{saved['instruction']}" if saved.get("instruction") else question


# ----------------------------------------------------------------------------------------------------------------------
# Upload


def files(folder):
    """What `push` uploads: the names of all files below `folder`, sorted, with "/" between folders.

    Raises ValueError naming the first file that is of another type than SHIPPED and TOKENIZER_FILES, a link, or called
    .safetensors without being one; and for a folder without README.md.
    """
    from safetensors import SafetensorError, safe_open

    names = []
    for parent, _, found in os.walk(folder):
        for name in found:
            names.append(os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/"))
    for name in sorted(names):
        path = os.path.join(folder, name)
        if os.path.islink(path):
            raise ValueError(f"{path}: a link is not uploaded; put the file itself there, or remove it")
        if not name.endswith(SHIPPED) and os.path.basename(name) not in TOKENIZER_FILES:
            raise ValueError(
                f"{path}: only {', '.join(SHIPPED)} and the files of tokenizers are uploaded; remove it from the folder"
            )
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: damaged, or not in safetensors format ({error}); export it again") from None
    if "README.md" not in names:
        raise ValueError(f"{folder}: no README.md; models.card.write makes one")
    return sorted(names)


def push(folder, hub_id, private=True):
    """Upload an export with its card to the repository `hub_id` (owner/name) of the Hugging Face hub, which is made,
    private or public, where it does not exist, and keeps its visibility where it does. Returns its address.

    The card's snippet then loads from that id. Raises ValueError for what `files` refuses and a malformed id, and
    RuntimeError with one message where one is not logged in, may not write there, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    names = files(folder)
    try:
        validate_repo_id(hub_id)
    except errors.HFValidationError as error:
        raise ValueError(f"--push {hub_id}: {error}") from None
    if "/" not in hub_id:
        raise ValueError(f"--push {hub_id}: expected owner/name, the owner being you or your organisation")
    if not get_token():
        raise RuntimeError(f"--push {hub_id}: not logged in; run `hf auth login` with a token that may write")
    api = HfApi()
    try:
        url = api.create_repo(hub_id, private=private, exist_ok=True)
        card = os.path.join(folder, "README.md")
        with open(card, encoding="utf-8") as f:
            content = f.read()
        with open(card, "w", encoding="utf-8") as f:
            f.write(re.sub(r'^model = "[^"\n]*"', f'model = "{hub_id}"', content, count=1, flags=re.MULTILINE))
        api.upload_folder(folder_path=folder, repo_id=hub_id, allow_patterns=names, commit_message="Upload the model")
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            message = "the hub does not accept the token; run `hf auth login` with one that may write"
        elif status == 403:
            message = "the token may not write there; check the owner, or run `hf auth login` with another one"
        else:
            message = f"the hub refused: {str(error).strip().splitlines()[0]}"
        raise RuntimeError(f"--push {hub_id}: {message}") from None
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise RuntimeError(
            f"--push {hub_id}: the hub cannot be reached ({type(error).__name__}); check the network and HF_HUB_OFFLINE"
        ) from None
    return str(url)
