"""
Pictures, edits and answers from a model: an alias, a hub id, a folder, or what one of the training scripts made.

    python infer.py                                                   tiny-flux draws a prompt of the shapes world
    python infer.py --mode i2i --model kontext --image cat.png --prompt "make it snow"
    python infer.py --mode t2icot --lm qwen2.5-vl-3b --model flux --prompt "two dogs and a hat"
    python infer.py --mode text --lm outputs/rloo-... --prompts hub:openai/gsm8k/main:test --reward math
    python infer.py --compare flux outputs/flow_grpo-... --prompts data/scenes.txt --reward pickscore
    torchrun --nproc_per_node 8 infer.py --model outputs/flow_grpo-... --prompts geneval.jsonl --layout geneval
    python infer.py --report outputs/flow_grpo-...                    a page about a training run

--mode t2i     a picture of each prompt
       i2i     an edit of each picture; with --refine a language model that sees it rewrites the instruction first
       t2icot  a language model rewrites each prompt, then it is drawn
       text    a language model answers, with --image about pictures

Which noise a picture starts from, and which random numbers a text is drawn with, is a function of --seed, the number of
the prompt and the number of the picture alone: batch size and number of processes change no more than the rounding of
matrix products (tests: 1 of 255 levels in fp32). With torchrun every process has a whole copy of the models on its own
GPU, and makes every so-many-th sample; nothing is sharded, and nothing communicated in between.

What is made is in --out at once: images/ (or GenEval's folders), in every PNG its prompt, seed and settings as text;
results.jsonl, grid.png. The same command with the same --out goes on where a run was killed.
"""

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import models
import rewards
from data import prompts as prompt_data
from data import shapes, shapes_qa
from kernels.sde_step import fold_seed
from models import blip3o, checkpoint, parallel, qwen, run_folder

# Shape suffixes: B samples of a batch, C H W latent.

NOISE, REFERENCE, TEXT = range(3)  # what a random number is for: the second key of every seed
ROOT = os.path.dirname(os.path.abspath(__file__))
UNIFIED = ("blip3o", "metaquery")
EDITS = {"kontext": "required", "klein": "optional", "blip3o": "optional", "metaquery": "optional"}  # takes a picture
SHOWN = 64  # pictures of a grid, at most, from all over the prompts


@dataclass
class Args:
    # Run
    mode: Literal["t2i", "i2i", "t2icot", "text"] = "t2i"
    """what to do: see the top of infer.py"""
    out: str = ""
    """folder of the results (empty = outputs/infer-<time>); one that has results of the same command is completed"""
    layout: Literal["flat", "geneval"] = "flat"
    """flat: images/00000_00.png; geneval: 00000/samples/0000.png with metadata.jsonl, as GenEval's evaluation reads
    it"""
    seed: int = 1
    """seed of noise and texts"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """what the models compute in (auto = bf16 on a GPU, fp32 on a CPU and for tiny models)"""
    report: str = ""
    """write report.html for this run folder, and nothing else"""
    push: str = ""
    """upload the export of the run --model (or --lm) to this hub id owner/name, with a model card, and nothing else"""

    # Models
    model: str = ""
    """diffusion or unified model: alias (see models/__init__.py), hub id (of a LoRA, too, whose card says of what it is
    one), folder in diffusers layout, or run folder (empty = tiny-flux, for i2i tiny-blip3o)"""
    lm: str = ""
    """language model of t2icot, text and --refine: alias, hub id, folder in transformers layout, or run folder (empty =
    that of --model, if it has one, else tiny-qwen-refine, tiny-qwen, tiny-qwen-vl, or with a --model of full size
    qwen2.5-vl-3b)"""
    compare: tuple[str, ...] = ()
    """two models, in the place of --model (with --mode text: of --lm), on the same prompts and noise; a run and a
    base of its kind both with the settings of the run; what differs between two others is printed"""
    ema: bool = True
    """of a run folder, the averaged weights: its export or, while there is none, its newest checkpoint; --no-ema: the
    weights that were being trained, of its newest checkpoint"""
    offload_encoders: bool = False
    """keep text encoders in CPU memory while they do not encode"""

    # Prompts
    prompt: tuple[str, ...] = ()
    """prompts, instructions or questions (empty = --prompts, or an example)"""
    prompts: str = ""
    """prompts from shapes, shapes-user, shapes-edit, shapes-qa, arithmetic (what these hold out), a .txt, .jsonl or
    .parquet file, or hub:owner/name/config:split#column (all of it), with the pictures to edit or to ask about"""
    image: tuple[str, ...] = ()
    """picture files to edit or to ask about: one for all prompts, or one for each"""
    refine: bool = False
    """i2i: the LM rewrites the instruction first, as it does the prompt with t2icot"""

    # Size
    max_prompts: int = 0
    """use so many of --prompts, evenly spread (0 = all)"""
    num_images: int = 0
    """samples of each prompt (0 = 1, with --layout geneval 4)"""
    batch_size: int = 8
    """samples that are made side by side, per process; lower it if memory runs out"""
    resolution: int = 0
    """height and width, in pixels; pictures to edit are cropped and resized to it (0 = the model's usual, or the run's;
    pictures to ask about are shown as they are, but to tiny models)"""
    lm_resolution: int = 0
    """the same, of the picture that the LM sees with --refine (0 = the run's, else 448, of unified models 896, of tiny
    ones --resolution)"""

    # Sampling
    num_steps: int = 0
    """denoising steps, of the ODE (0 = the model's usual, or those of the run's evaluation)"""
    guidance: float = -1.0
    """text guidance, embedded or classifier-free as the model has it; 1 = off (-1 = the model's usual, or the run's)"""
    image_guidance: float = -1.0
    """guidance on the picture to edit, of unified models; 1 = off (-1 = the model's usual, or the run's)"""
    max_new_tokens: int = 0
    """tokens of a text, at most (0 = those of the run, else 24 for tiny models and 512 for others)"""
    temperature: float = 0.0
    """texts are drawn from softmax(logits / temperature) (0 = greedy)"""

    # Scoring
    reward: tuple[str, ...] = ()
    """rewards that judge the results, name or name:weight or http://host:port/name:weight, and their sum; `python -m
    rewards` lists them (empty = none)"""
    judge_url: str = ""
    """OpenAI-compatible endpoint of the rewards that ask a judge, e.g. http://host:8000/v1"""
    judge_model: str = ""
    """model of that endpoint (empty = the one it serves)"""


# What a model is sampled with where neither the command line nor a run says it: the values of evaluation in
# flow_grpo.py and, for unified models, guidance in pretrain.py. The text guidance of sd3, sana and klein is that of
# grpo_unified.py: flow_grpo.py trains these to do without.
USUAL = {
    name: dict(zip(("num_steps", "guidance", "image_guidance", "resolution"), values))
    for name, values in {
        "tiny": (6, 1.0, 1.0, 32),
        "tiny unified": (12, 2.0, 1.5, 32),
        "flux": (28, 3.5, 1.0, 512),
        "kontext": (28, 2.5, 1.0, 512),
        "klein": (50, 4.0, 1.0, 512),
        "sd3": (40, 4.5, 1.0, 512),
        "sana": (40, 4.5, 1.0, 1024),
        "blip3o": (30, 3.5, 1.0, 1024),
        "metaquery": (30, 3.0, 1.5, 512),
    }.items()
}


# ----------------------------------------------------------------------------------------------------------------------
# Models: where their weights are


@dataclass
class Source:
    """Where a model comes from: `base` is what models.load or load_lm gets, with `options`, and `weights` what is then
    put into it: a LoRA file, or of a checkpoint folder the tensors whose names begin with `prefix`."""

    name: str
    base: str
    run: dict = field(default_factory=dict)  # args.json of the training run
    options: dict = field(default_factory=dict)
    weights: str = ""
    prefix: str = ""
    said: str = ""

    def tiny(self, side="model"):
        run, of_run = self.run, self.run.get("model") or self.run.get("lm")
        if side == "lm":  # of --task text, args.json also names a diffusion model that was not there
            run, of_run = {}, self.run.get("lm") or self.run.get("model")
        return (
            os.path.basename(os.path.normpath(of_run or self.base)).startswith("tiny-")
            or run.get("resolution", 999) <= 64
        )


def read_json(path):
    """The content of a JSON file, None where there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got: {error}") from None


def is_whole(run):
    """Whether a run (its arguments) had a unified model, and all of it."""
    return bool(run.get("model")) and models.family(run["model"]) in UNIFIED and run.get("task") != "text"


def is_behind(folder, run):
    """Whether the export of a run is older than its newest checkpoint: it was continued, and has not ended again."""
    newest = checkpoint.latest(folder)
    return newest is not None and checkpoint.iteration(newest) < run["num_iterations"]


def find_lora(name, folder, side):
    """The Source of a LoRA that lies alone in a folder; None where there is none. Its base is what adapter_config.json
    of PEFT or, with diffusers, the model card names. Raises ValueError where these name none, and for one of the other
    side."""
    mine, other = models.LORA_FILES[:: -1 if side == "lm" else 1]
    path = os.path.join(folder, mine)
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, other)):
            raise ValueError(f"--{side} {name} is a LoRA of a {'diffusion' if side == 'lm' else 'language'} model")
        return None
    if side == "lm":
        about = read_json(os.path.join(folder, "adapter_config.json")) or {}
        base, rank, alpha = (about.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha"))
    else:
        from huggingface_hub import ModelCard

        card = os.path.join(folder, "README.md")
        base = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model") if os.path.isfile(card) else ""
        try:
            with safe_open(path, framework="pt") as opened:
                about = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
                ranks = [opened.get_slice(key).get_shape()[0] for key in opened.keys() if ".lora_A." in key]
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read, save or copy it again ({error})") from None
        if not ranks:
            raise ValueError(f"{path}: no lora_A in it; expected a LoRA in diffusers' format")
        rank, alpha = ranks[0], about.get("transformer.lora_alpha", ranks[0])  # as the stock loader has it
    if not base or not isinstance(base, str):
        raise ValueError(f"--{side} {name} is a LoRA and does not say of which model: give the run folder it is from")
    return Source(name, base, {}, dict(lora_rank=rank, lora_alpha=alpha), path, said=f"{name}, a LoRA on {base}")


def find(name, side, ema):
    """The Source of --model (side "model") or --lm (side "lm") `name`. Loads nothing. Raises ValueError for a run that
    has no such model, or no weights yet, and for a LoRA without the name of its base."""
    folder = models.local(name).rstrip("/")
    above = os.path.dirname(folder)
    if os.path.basename(folder) in ("model", "lm") and os.path.isfile(os.path.join(above, "args.json")):
        folder = above  # the export of a run stands for the run
    run = read_json(os.path.join(folder, "args.json"))
    if run is None:
        return find_lora(name, folder, side) or Source(name, folder if models.unified(folder) else name)
    if "num_iterations" not in run:
        raise ValueError(f"--{side} {name}: its args.json is not that of a training run")

    whole, base = is_whole(run), run.get("model")
    if side == "lm" and not whole:  # --task text may have trained that of a unified model
        base = run.get("lm") or (base if run.get("task") == "text" else "")
    if not base:
        what, flag = ("diffusion", "--mode text --lm") if side == "model" else ("language", "--model")
        raise ValueError(f"--{side} {name}: that run has no {what} model; did you mean {flag} {name}?")
    if base in models.FULL_SIZE and not os.path.isdir(base):
        base = os.path.join(folder, "start")  # pretrain.py makes it there
    options = {"sigma_schedule": run["sigma_schedule"]} if side == "model" and "sigma_schedule" in run else {}
    lora = dict(lora_rank=run["lora_rank"], lora_alpha=run["lora_alpha"] or 2 * run["lora_rank"])
    exports = {part: os.path.join(folder, part) for part in ("model", "lm")}
    export = exports["lm" if side == "lm" and run.get("model") and not whole else "model"]
    newest = checkpoint.latest(folder)
    if ema and os.path.isdir(export) and not is_behind(folder, run):
        kind = "averaged" if run["ema_decay"] else "trained"
        files = [path for path in (os.path.join(export, file) for file in models.LORA_FILES) if os.path.exists(path)]
        if files:
            said = f"{kind} weights of {export}, a LoRA of rank {lora['lora_rank']} on {base}"
            return Source(name, base, run, options | lora, files[0], said=said)
        return Source(name, export, run, options, said=f"{kind} weights of {export}")
    if newest is None:
        if ema and any(map(os.path.isdir, exports.values())):
            return Source(name, base, run, options, said=f"{base} as it is, which that run did not train")
        what = "an export in model/ or a checkpoint" if ema else "a checkpoint, which --no-ema needs,"
        raise ValueError(f"--{side} {name}: that run has not written {what} yet")
    names = read_json(os.path.join(newest, "index.json"))["tensors"]
    of_lm = any(n.startswith("model/lm.") for n in names)
    of_dm = any(n.startswith("model/") and not n.startswith("model/lm.") for n in names)
    if not (of_lm if side == "lm" and not whole else of_dm or whole):
        return Source(name, base, run, options, said=f"{base} as it is, which that run did not train")
    averaged = ema and any(n.startswith("ema/") for n in names)
    sides = dict(train_dm=of_dm, train_lm=of_lm) if whole else {}
    said = f"{'averaged' if averaged else 'trained'} weights of {newest}, on {base}"
    return Source(name, base, run, options | lora | sides, str(newest), "ema/" if averaged else "model/", said)


def read_weights(source):
    """Tensors to put into a model, by the names of parallel.trained."""
    from safetensors.torch import load_file

    if not source.prefix:  # a LoRA: diffusers has transformer.x.lora_A.weight, PEFT base_model.model.x.lora_A.weight
        tensors = load_file(source.weights)
        names = {n: n.replace("base_model.model.", "lm.").replace(".weight", ".default.weight") for n in tensors}
        return {names[n]: tensor for n, tensor in tensors.items()}
    tensors = {}
    for name, entry in read_json(os.path.join(source.weights, "index.json"))["tensors"].items():
        if name.startswith(source.prefix):
            rows = []
            for file, _, _ in entry["shards"]:
                with safe_open(os.path.join(source.weights, file), framework="pt") as opened:
                    rows.append(opened.get_tensor(name))
            tensors[name.removeprefix(source.prefix)] = torch.cat(rows).view(entry["shape"])
    return tensors


def load(source, side, device, dtype, offload_encoders=False):
    """The model of a Source, frozen, whole and in dtype on the device."""
    options = dict(source.options)
    unified = side == "model" and models.family(source.base) in UNIFIED
    if side == "model" and not unified:
        options["offload_encoders"] = offload_encoders
    if not source.weights:
        options |= dict(train_dm=False, train_lm=False) if unified else dict(train=False)
    loader = models.load if side == "model" else models.load_lm
    model = loader(source.base, device, dtype, **options)
    if source.weights:
        try:
            trained, weights = parallel.trained(model.parts), read_weights(source)
        except SafetensorError as error:
            raise ValueError(f"{source.weights}: cannot be read, save or copy it again ({error})") from None
        if side == "lm" or not unified:  # a checkpoint of two models has both
            weights = {n: t for n, t in weights.items() if n.startswith("lm.") == (side == "lm")}
        if weights.keys() != trained.keys():
            first = sorted(weights.keys() ^ trained.keys())[0]
            raise ValueError(f"{source.weights} does not fit {source.base}: {first} is in one of them only")
        for name, parameter in trained.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(f"{source.weights} does not fit {source.base}: {name} has another shape")
            parameter.data.copy_(weights[name])
    for part in model.parts.values():
        for parameter in part.requires_grad_(False).parameters():
            parameter.data = parameter.data.to(device, dtype)
        part.to(device)  # buffers, which keep their precision
    return model


def plan(args, model, lm):
    """What a command line asks of one pair of names ("" = not given): the Sources of its models, and settings. Loads
    nothing. Raises ValueError for a model that cannot do it."""
    draws, refines = args.mode != "text", args.mode == "t2icot" or args.refine
    sources, family = {}, ""
    if draws:
        sources["model"] = source = find(model or {"i2i": "tiny-blip3o"}.get(args.mode, "tiny-flux"), "model", args.ema)
        family, run = models.family(source.base), source.run
        takes = EDITS.get(family, "none")
        if args.mode == "i2i" and takes == "none":
            raise ValueError(
                f"--mode i2i: --model {source.name} makes pictures from text and cannot edit; take e.g. kontext, klein "
                "or tiny-blip3o"
            )
        if args.mode != "i2i" and takes == "required":
            raise ValueError(f"--mode {args.mode}: --model {source.name} edits pictures only; take --mode i2i")
        if family in UNIFIED and lm:
            raise ValueError(f"--model {source.name} has a language model of its own: leave out --lm {lm}")
        if args.image_guidance not in (-1.0, 1.0) and family not in UNIFIED:
            raise ValueError(
                f"--image-guidance {args.image_guidance}: --model {source.name} has none, only unified models"
            )
        if refines and family not in UNIFIED:
            tiny_lm = "tiny-qwen-vl" if args.refine else "tiny-qwen-refine"
            own = source.name if run.get("lm") else ""
            lm = lm or own or (tiny_lm if source.tiny() else "qwen2.5-vl-3b")
    else:
        if lm and model:
            raise ValueError(f"--mode text takes one model: --lm {lm} or --model {model}")
        lm = lm or model or "tiny-qwen"
        if not os.path.isdir(lm) and lm in models.ALIASES:
            raise ValueError(f"--mode text: {lm} makes pictures; take a language model, --lm, or a unified --model")
        if models.unified(models.local(lm)) or is_whole(read_json(os.path.join(lm, "args.json")) or {}):
            sources["model"] = find(lm, "model", args.ema)
            family, lm = models.family(sources["model"].base), ""
    sees = family in UNIFIED
    if lm and (refines or not draws):
        sources["lm"] = find(lm, "lm", args.ema)
        models.lm_family(sources["lm"].base)
        sees = models.model_type(sources["lm"].base) in qwen.VISION
        if args.refine and not sees:
            raise ValueError(f"--refine: --lm {lm} reads text only, and is to see the picture; take e.g. qwen2.5-vl-3b")
    elif lm:
        raise ValueError(f"--mode {args.mode} uses no language model: leave out --lm {lm}")

    side, first = next(iter(sources.items()))
    settings, writes, tiny = {}, refines or not draws, first.tiny(side)
    if draws:
        usual = USUAL[f"tiny{' unified' * (family in UNIFIED)}" if tiny else family]
        of_run = dict(first.run)
        if "eval_num_steps" in of_run:
            of_run["num_steps"] = of_run["eval_num_steps"]
        given = dict(num_steps=args.num_steps, resolution=args.resolution)
        given |= dict(guidance=args.guidance, image_guidance=args.image_guidance)
        for key, value in given.items():
            unset = value == (-1.0 if "guidance" in key else 0)
            settings[key] = of_run.get(key, usual[key]) if unset else value
    elif sees and (args.resolution or tiny):
        settings["resolution"] = args.resolution or 32
    if writes:
        source = sources.get("lm", first)
        usual = source.run.get("max_new_tokens", 24 if source.tiny("lm") else 512)
        settings |= dict(max_new_tokens=args.max_new_tokens or usual, temperature=args.temperature)
    if args.refine:
        usual = source.run.get("lm_resolution", 0 if tiny else 896 if family in UNIFIED else 448)
        settings["lm_resolution"] = args.lm_resolution or usual or settings["resolution"]
    on_cpu = args.dtype == "auto" and (tiny or not torch.cuda.is_available())
    settings["dtype"] = "fp32" if on_cpu else args.dtype.replace("auto", "bf16")
    instruction = sources["lm"].run.get("instruction", "") if "lm" in sources and not draws else ""
    kind = dict(family=family, unified=family in UNIFIED, tiny=tiny, sees=sees)
    return dict(sources=sources, settings=settings, instruction=instruction, **kind)


def level(plans):
    """Make the plans of two models comparable: of a run and of a model of its kind that is none, both have the run's
    settings. Returns what they still do not share: name -> (a, b)."""
    of_run = [bool(next(iter(one["sources"].values())).run) for one in plans]
    if of_run[0] != of_run[1] and plans[0]["family"] == plans[1]["family"]:
        run, other = plans[of_run.index(True)], plans[of_run.index(False)]
        other["settings"], other["instruction"] = dict(run["settings"]), run["instruction"]
    a, b = (one["settings"] | {"instruction": one["instruction"]} for one in plans)
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def example(args, plan):
    """Prompts for who gives none: one, or 16 to compare models on; which ones depends on --seed. Returns where they are
    from, and a list of {"prompt", "metadata", "image"}."""
    count, tiny = 16 if args.compare else 1, plan["tiny"]
    if args.mode == "i2i" and tiny:  # not prompt_data's, which draws 4,608 pictures first
        sources, _, metadata = shapes.edits(args.seed, 0, count, shapes.held_out_edits())
        pairs = zip(metadata, map(Image.fromarray, sources))
        return "shapes-edit", [{"prompt": m["prompt"], "metadata": m, "image": picture} for m, picture in pairs]
    if args.mode == "text" and tiny and plan["sees"]:
        pictures, asked = shapes_qa.questions(args.seed, 0, count, "held_out")
        return "shapes-qa", [row | {"image": Image.fromarray(picture)} for row, picture in zip(asked, pictures)]
    source = {"t2i": "shapes", "t2icot": "shapes-user"}.get(args.mode, "arithmetic")
    if args.mode != "text" and not tiny:
        source = os.path.join(ROOT, "data", "edits.jsonl" if args.mode == "i2i" else "scenes.txt")
    rows = prompt_data.load(source, "eval", eval_source=source)
    return os.path.basename(source), [rows[i] for i in prompt_data.order(len(rows), args.seed, 0, count)]


def open_prompts(args, plan):
    """What to draw, edit or answer, something with len() and [i] -> {"prompt", "metadata", "image"}, and in words what
    of it was assumed. Raises ValueError and FileNotFoundError."""
    said, pictures = "", []
    for path in args.image:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--image {path}: no such file")
        try:
            with Image.open(path) as opened:
                pictures.append(prompt_data.rgb(opened))
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"--image {path}: expected an image that PIL can read, got: {error}") from None
    if args.prompt and args.prompts:
        raise ValueError("--prompt and --prompts: expected one of them")
    if pictures and not (args.prompt or args.prompts):
        raise ValueError("--image needs --prompt: what to change, or what to ask about it")
    if any(not prompt.strip() for prompt in args.prompt):
        raise ValueError("--prompt: expected a prompt, got blank text")
    if pictures and args.mode in ("t2i", "t2icot"):
        raise ValueError(
            f"--image: --mode {args.mode} makes pictures from text; take --mode i2i, or text to ask about it"
        )

    rows, source = [{"prompt": prompt, "metadata": {}, "image": None} for prompt in args.prompt], args.prompts
    if source:
        rows = prompt_data.load(source, "eval", eval_source=source)  # all of a file, what a world holds out
        if 0 < args.max_prompts < len(rows):
            picks = np.arange(args.max_prompts) * len(rows) // args.max_prompts
            rows = prompt_data.PromptSet(rows.rows[picks], rows.read)
    elif not rows or (args.mode == "i2i" and not pictures):
        source, some = example(args, plan)
        if rows:
            pictures, said = [some[0]["image"]], f"--image, one of {source}"
        else:
            rows, said = some, ", ".join(f"{row['prompt']!r}" for row in some[:3]) + ", ..." * (len(some) > 3)
            said = f"--prompt {said}, of {source}{', with its picture' * (some[0]['image'] is not None)}"
    if pictures:
        if len(pictures) not in (1, len(rows)):
            raise ValueError(
                f"--image: {len(pictures)} pictures for {len(rows)} prompts; expected one, or one for each"
            )
        rows = [dict(rows[i], image=pictures[i % len(pictures)]) for i in range(len(rows))]
    has_image = rows[0]["image"] is not None
    if args.mode == "i2i" and not has_image:
        raise ValueError(f"--mode i2i: --prompts {source} have no pictures; add --image, or take e.g. data/edits.jsonl")
    if args.mode in ("t2i", "t2icot") and has_image:
        raise ValueError(f"--mode {args.mode}: --prompts {source} have pictures to edit; take --mode i2i")
    return rows, said


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@torch.no_grad()
def sample(model, cond, x, sigmas, guidance):
    """Euler ODE from noise x (B C H W) down the schedule."""
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        x = x + model.velocity(x, x.new_full((len(x),), sigma), cond, guidance).float() * (sigma_next - sigma)
    return x


@torch.no_grad()
def draw(model, prompts, sources, seed_B, settings):
    """A picture of each prompt, or the edit of each of sources (float [0, 1], B 3 H W): list of uint8 [H, W, 3]. Seeds
    int64 [B] choose the noise."""
    size = (settings["resolution"], settings["resolution"])
    cond = model.condition(model.encode(prompts, sources, seeds=fold_seed(seed_B, REFERENCE)))
    x = model.init_noise(fold_seed(seed_B, NOISE), *size)
    sigmas = model.sigmas(settings["num_steps"], *size)
    x = sample(model, cond, x, sigmas, (settings["guidance"], settings["image_guidance"]))
    return run_folder.to_uint8(model.decode(x))


def write(lm, prompts, images, seed_B, settings):
    """A text for each prompt (about each of images, a list of PIL pictures or None), and whether it was cut off."""
    ids = lm.encode(prompts, settings["max_new_tokens"], images)
    out = lm.generate(ids, settings["max_new_tokens"], settings["temperature"], fold_seed(seed_B, TEXT))
    return lm.decode(out["ids"], out["mask"]), out["truncated"].tolist()


def parse_rewards(args):
    """(name for rewards.load, name for tables, weight) of each --reward."""
    return rewards.parse(args.reward) if args.reward else []


def judge(scores, weights, samples, rows):
    """The rewards of B samples, a dict each: name -> value, and name/strict where there is a strict form; of several
    rewards first their weighted sum, "reward". None = it failed. A prompt with "rewards": [names] in its metadata is
    judged by those only."""
    judged = [{} for _ in rows]
    for name, score in scores.items():
        mine = [b for b, row in enumerate(rows) if name in row["metadata"].get("rewards", scores)]
        of_mine = {role: [values[b] for b in mine] for role, values in samples.items()}
        prompts, metadata = [rows[b]["prompt"] for b in mine], [rows[b]["metadata"] for b in mine]
        for key, form in ((name, score), (f"{name}/strict", score.strict)):
            for b, value in zip(mine, form(of_mine, prompts, metadata).tolist() if mine and form else ()):
                judged[b][key] = value if math.isfinite(value) else None
    for b, row in enumerate(judged) if len(weights) > 1 else ():
        parts = [(row[name], weight) for name, weight in weights.items() if name in row]
        if parts:
            value = None if any(value is None for value, _ in parts) else sum(v * weight for v, weight in parts)
            judged[b] = {"reward": value} | row
    return judged


def check_names(row, metrics):
    """ValueError for a prompt whose metadata names rewards that do not exist."""
    names = row["metadata"].get("rewards", [])
    if not isinstance(names, list) or not set(map(str, names)) <= {*metrics, *rewards.REWARDS}:
        raise ValueError(f"prompt {row['prompt'][:60]!r}: its rewards are {names!r}; expected a list of known names")


def file_name(layout, p, k):
    """Where picture k of prompt p is, below the output folder."""
    return f"images/{p:05d}_{k:02d}.png" if layout == "flat" else f"{p:05d}/samples/{k:04d}.png"


def save_png(path, picture, about):
    """Write uint8 [H, W, 3] with the dict `about` as its tEXt (iTXt where that is not Latin-1): whole, or not there."""
    text = PngImagePlugin.PngInfo()
    for key, value in about.items():
        text.add_text(key, value if isinstance(value, str) else json.dumps(value))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
    Image.fromarray(picture).save(temporary, format="PNG", pnginfo=text)
    os.replace(temporary, path)


def results(out):
    """What is done so far in a folder: (number of prompt, number of sample) -> row of results.jsonl, in that order."""
    found = {}
    for path in [Path(out, "results.jsonl"), *sorted(Path(out).glob(".results-*.jsonl"))]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        found |= {(row["prompt_index"], row["image_index"]): row for row in rows}
    return dict(sorted(found.items()))


def collect(out):
    """Put what the processes have written into results.jsonl; on one of them, while none writes."""
    rows = results(out)
    with open(os.path.join(out, ".results"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows.values())
    os.replace(os.path.join(out, ".results"), os.path.join(out, "results.jsonl"))
    for path in Path(out).glob(".results-*.jsonl"):
        path.unlink()


def produce(args, plan, rows, get_scores, out, world):
    """Make and judge what is not yet in the folder `out`, every process its share; returns all of `results`. Loads
    models and, by get_scores(), rewards only if something is to be made."""
    master, settings, draws = world.rank == 0, plan["settings"], args.mode != "text"
    copies = args.num_images or (4 if args.layout == "geneval" else 1)
    if master:
        os.makedirs(out, exist_ok=True)
        collect(out)
    parallel.agree(False)  # the others wait for it
    done = {key for key, row in results(out).items() if not draws or os.path.exists(os.path.join(out, row["file"]))}
    todo = [(p, k) for p in range(len(rows)) for k in range(copies) if (p, k) not in done]
    parallel.agree(False)  # all have read
    if args.layout == "geneval":
        for p in range(world.rank, len(rows), world.size):
            os.makedirs(os.path.join(out, f"{p:05d}", "samples"), exist_ok=True)
            with open(os.path.join(out, f"{p:05d}", "metadata.jsonl"), "w", encoding="utf-8") as f:
                f.write(json.dumps(rows[p]["metadata"] | {"prompt": rows[p]["prompt"]}) + "\n")
    if todo and master:
        names = ", ".join(f"{side} {source.said or source.name}" for side, source in plan["sources"].items())
        shown = ", ".join(f"{key} {value:g}" for key, value in settings.items() if key != "dtype")
        print(f"{out}: {names}; {shown}, {settings['dtype']}; {len(todo)} to make, {world.size} x {world.device.type}")
    model, lm, weights = None, None, {metric: weight for _, metric, weight in parse_rewards(args)}
    if todo:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
        with parallel.clear_errors():
            scores = get_scores()
            loaded = {
                side: load(source, side, world.device, dtype, args.offload_encoders)
                for side, source in plan["sources"].items()
            }
            model, lm = loaded.get("model"), loaded.get("lm")
            lm = model.lm if plan["unified"] else lm
            if draws:
                model.sigmas(settings["num_steps"], settings["resolution"], settings["resolution"])  # checks the size
    mine = todo[world.rank :: world.size]
    about = {side: source.name for side, source in plan["sources"].items()} | dict(seed=args.seed, settings=settings)
    batches = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    for batch in tqdm(batches, desc=args.mode, disable=not master or not todo):
        of = [rows[p] for p, _ in batch]
        seed_B = torch.stack([fold_seed(args.seed, p, k) for p, k in batch])
        new = [{"prompt_index": p, "image_index": k, "prompt": row["prompt"]} for (p, k), row in zip(batch, of)]
        words, samples, pictures, sources = [row["prompt"] for row in of], {}, None, None
        with parallel.clear_errors():
            if of[0]["image"] is not None:
                pictures, size = [row["image"] for row in of], settings.get("resolution", 0)
                sources = prompt_data.images(of, size, size) if size else None
                lm_size = settings.get("lm_resolution", size if not draws else 0)
                if lm_size:
                    fitted = sources if lm_size == size else prompt_data.images(of, lm_size, lm_size)
                    pictures = list(map(Image.fromarray, run_folder.to_uint8(fitted)))
            if "max_new_tokens" in settings:
                template = blip3o.REFINE_EDIT if args.refine else blip3o.REFINE
                behind = f"\n{plan['instruction']}" if plan["instruction"] else ""
                asked = [template.format(word) if draws else word + behind for word in words]
                samples["text"], truncated = write(lm, asked, pictures, seed_B, settings)
                words = [blip3o.refined(text) for text in samples["text"]] if draws else words
                for row, text, word, cut in zip(new, samples["text"], words, truncated):
                    row |= ({"refined": word} if draws else {}) | {"text": text, "truncated": cut}
            if draws:
                samples["image"] = draw(model, words, sources, seed_B, settings)
                samples |= {"source": run_folder.to_uint8(sources)} if sources is not None else {}
                for (p, k), row, picture in zip(batch, new, samples["image"]):
                    row["file"] = file_name(args.layout, p, k)
                    save_png(os.path.join(out, row["file"]), picture, row | about)
            elif pictures:
                samples["source"] = [np.asarray(picture.convert("RGB")) for picture in pictures]
            judged = judge(scores, weights, samples, of)
        with open(os.path.join(out, f".results-{world.rank:05d}.jsonl"), "a", encoding="utf-8") as f:
            for row, its, rewards_of in zip(of, new, judged):
                tag = {"tag": str(row["metadata"]["tag"])} if "tag" in row["metadata"] else {}
                f.write(json.dumps(its | {"seed": args.seed} | tag | {"rewards": rewards_of}) + "\n")
    parallel.agree(False)  # all have written
    if master:
        collect(out)
        found = results(out)
        if draws or rows[0]["image"] is not None:
            shown = spread(list(found.values()), SHOWN)
            run_folder.grid(os.path.join(out, "grid.png"), [seen(out, rows, row) for row in shown], captions(shown))
    parallel.agree(False)
    found = results(out)
    if args.layout == "geneval" and todo:
        for p in range(world.rank, len(rows), world.size):
            pictures = [seen(out, rows, found[p, k]) for k in range(copies)]
            run_folder.grid(os.path.join(out, f"{p:05d}", "grid.png"), pictures, [""] * copies, columns=2)
    return found


def spread(items, count):
    """`count` of a list, from one end of it to the other; all where there are no more. Prompts often come sorted."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def seen(out, rows, row):
    """What a grid shows of a row of results: the picture that was made, on the right of the one that was edited; or the
    picture that was asked about. uint8 [H, W, 3]."""
    source = rows[row["prompt_index"]]["image"]
    if "file" not in row:
        return np.asarray(source.convert("RGB"))
    with Image.open(os.path.join(out, row["file"])) as opened:
        picture = np.asarray(opened.convert("RGB"))
    if source is None:
        return picture
    return np.concatenate(
        [run_folder.to_uint8(prompt_data.images([{"image": source}], *picture.shape[:2]))[0], picture], 1
    )


def captions(found):
    """For each row of results the first reward, the prompt, and what it was rewritten to or answered with."""
    lines = []
    for row in found:
        value = next(iter(row["rewards"].values()), None)
        said = row.get("refined", row.get("text"))
        lines.append(f"{'' if value is None else f'{value:.2f} '}{row['prompt']}{'' if said is None else f' > {said}'}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def mean(values):
    """Mean of what is not None, NaN of nothing."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


def score_table(found):
    """{reward: {"mean", "count", "failed", and, where prompts have tags, "tags": {tag: mean}, "overall": mean over the
    tags}} of rows of results; name/strict is the strict form of name. A failed sample is in no mean. A tag without any
    judged sample is NaN, and then so is "overall", as GenEval has it: the mean of fewer tags is not comparable."""
    table = {}
    for name in dict.fromkeys(name for row in found for name in row["rewards"]):
        of = [(row.get("tag"), row["rewards"][name]) for row in found if name in row["rewards"]]
        values = [value for _, value in of]
        table[name] = dict(mean=mean(values), count=len(values), failed=values.count(None))
        tags = dict.fromkeys(tag for tag, _ in of)
        if None not in tags:
            table[name]["tags"] = {tag: mean([value for its, value in of if its == tag]) for tag in tags}
            table[name]["overall"] = sum(table[name]["tags"].values()) / len(tags)
    return table


def paired_table(found_a, found_b):
    """{reward: {"a", "b": means, "difference": b - a, "error": its standard error, "prompts": n}} of two `results`. The
    samples of a prompt are no independent draws, so their mean is one: n pairs, error = std(differences) / sqrt(n).
    Samples that failed on either side are left out on both."""
    table = {}
    for name in dict.fromkeys(name for row in [*found_a.values(), *found_b.values()] for name in row["rewards"]):
        of_prompt = {}
        for key in found_a.keys() & found_b.keys():
            a, b = (found[key]["rewards"].get(name) for found in (found_a, found_b))
            if a is not None and b is not None:
                of_prompt.setdefault(key[0], []).append((a, b))
        pairs = np.array([np.mean(values, axis=0) for _, values in sorted(of_prompt.items())]).reshape(-1, 2)
        n, differences = len(pairs), pairs[:, 1] - pairs[:, 0]
        a, b = pairs.mean(axis=0).tolist() if n else (math.nan, math.nan)
        error = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        table[name] = dict(a=a, b=b, difference=b - a, error=error, prompts=n)
    return table


def print_scores(out, found):
    """The tables of one model's results, and scores.json; SystemExit where a reward failed for all samples."""
    table = score_table(list(found.values()))
    strict = next((name for name in table if name.endswith("/strict")), next(iter(table), ""))  # whose tags are shown
    for name, scored in table.items():
        failed = [
            row.get("file", f"{row['prompt_index']}") for row in found.values() if row["rewards"].get(name, 0) is None
        ]
        lost = f"; {len(failed)} failed and are left out: {', '.join(failed[:5])}{', ...' * (len(failed) > 5)}"
        print(f"{name}: {scored['mean']:.4f}, mean of {scored['count'] - scored['failed']}{lost if failed else ''}")
        if "tags" in scored and name == strict:
            width = max(map(len, scored["tags"]))
            for tag, value in [*scored["tags"].items(), ("overall", scored["overall"])]:
                print(f"    {tag:{max(width, 7)}}  {value:.4f}")
    if table:
        write_json(os.path.join(out, "scores.json"), table)
    for name, scored in table.items():
        if scored["failed"] == scored["count"]:
            raise SystemExit(f"error: reward {name} failed (NaN) for all {scored['count']} samples")


def write_json(path, content):
    """NaN becomes null, because JSON has none."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with open(path, "w", encoding="utf-8") as f:
        json.dump(plain(content), f, indent=1)


# ----------------------------------------------------------------------------------------------------------------------


def publish(args):
    """--report and --push."""
    if args.report:
        from models import report

        return print(report.write(args.report.rstrip("/")))
    from models import card

    run, side = (args.model or args.lm).rstrip("/"), "model" if args.model else "lm"
    if args.model and args.lm:
        raise ValueError("--push takes --model or --lm, one at a time")
    if not run:
        raise ValueError("--push needs --model: the run folder whose export it uploads")
    folder = os.path.join(run, side)
    if side == "lm" and not os.path.isdir(folder):
        folder = os.path.join(run, "model")  # of rloo.py and remax.py
    if not os.path.isfile(os.path.join(run, "args.json")) or not os.path.isdir(folder):
        raise ValueError(f"--push: {run} is no run folder with an export in {os.path.basename(folder)}/")
    if is_behind(run, read_json(os.path.join(run, "args.json"))):
        raise ValueError(f"--push: {run} was continued and has not ended, its export is older; --resume {run} ends it")
    card.write(folder, run)
    return print(card.push(folder, args.push))


def main(args: Args):
    """Returns the `results` or, with --compare, those of both models."""
    if args.report or args.push:
        with parallel.clear_errors():
            return publish(args)
    # What can be wrong with the command line is found before weights are loaded.
    with parallel.clear_errors():
        world = parallel.init()
        master = world.rank == 0
        if min(args.batch_size, args.num_steps + 1, args.max_prompts + 1, args.num_images + 1) < 1:
            raise ValueError("--batch-size must be at least 1, --num-steps --max-prompts --num-images 0 or more")
        if min(args.temperature, args.max_new_tokens, args.resolution, args.lm_resolution) < 0:
            raise ValueError("--temperature --max-new-tokens --resolution --lm-resolution must be 0 or more")
        if args.refine and args.mode != "i2i":
            raise ValueError(f"--refine is for i2i; --mode {args.mode} rewrites always or never")
        if any(g != -1 and not 0 <= g < math.inf for g in (args.guidance, args.image_guidance)) or args.seed < 0:
            raise ValueError("--guidance --image-guidance --seed must be 0 or more")
        of_text, of_pictures = ("temperature", "max_new_tokens"), ("num_steps", "guidance", "image_guidance")
        writes = args.mode in ("text", "t2icot") or args.refine
        why = f"with --mode {args.mode}{' and without --refine' * (args.mode == 'i2i')}"
        unread = dict.fromkeys(of_pictures if args.mode == "text" else () if writes else of_text, why)
        unread |= {} if args.refine else {"lm_resolution": "without --refine"}
        unread |= {} if args.prompts else {"max_prompts": "without --prompts"}
        unread |= {} if args.reward else dict.fromkeys(("judge_url", "judge_model"), "without --reward")
        for name, why in unread.items():
            if getattr(args, name) != getattr(Args(), name):
                raise ValueError(f"--{name.replace('_', '-')} has no effect {why}: leave it out")
        if args.mode == "text" and (args.layout == "geneval" or (args.num_images > 1 and not args.temperature)):
            raise ValueError(
                "--mode text has no pictures for --layout geneval, and greedy answers to one prompt are all alike: "
                "--num-images needs --temperature"
            )
        names = [(args.model, args.lm)]
        if args.compare:
            taken, flag = (args.lm, "--lm") if args.mode == "text" else (args.model, "--model")
            if len(args.compare) != 2 or len({os.path.normpath(name) for name in args.compare}) != 2:
                raise ValueError(f"--compare {' '.join(args.compare)}: expected the names of two different models")
            if taken or (args.mode == "text" and args.model):
                raise ValueError(f"--compare names the models: leave out {flag} {taken or args.model}")
            names = [(name, args.lm) for name in args.compare]
        plans = [plan(args, *pair) for pair in names]
        differ = level(plans) if args.compare else {}
        rows, said = open_prompts(args, plans[0])
        if args.mode == "text" and rows[0]["image"] is not None and not all(one["sees"] for one in plans):
            raise ValueError(
                "the prompts have pictures and --lm reads text only: take e.g. qwen2.5-vl-3b or tiny-qwen-vl"
            )
        parsed = parse_rewards(args)
        for name, _, _ in parsed:
            if "://" not in name and name not in rewards.REWARDS:
                rewards.load(name)  # says what is known
        texts = list(rows.texts() if isinstance(rows, prompt_data.PromptSet) else rows)
        for row in texts if parsed else ():
            check_names(row, [metric for _, metric, _ in parsed])
        out = args.out.rstrip("/") or os.path.join("outputs", run_folder.new_name("infer"))
        out = parallel.same_text(out)
        folders = [os.path.join(out, side) for side in "ab"] if args.compare else [out]
        saved, now = read_json(os.path.join(out, "args.json")), json.loads(json.dumps(dataclasses.asdict(args)))
        now["weights"] = [source.said or source.name for one in plans for source in one["sources"].values()]
        there = [key_and_row for folder in folders for key_and_row in results(folder).items()]
        if saved is not None and saved.keys() != now.keys():
            raise ValueError(f"--out {out} holds a training run, or what another version made: choose another folder")
        if saved is not None and there:
            free = ("out", "batch_size", "offload_encoders")  # change no sample
            other = [key for key in now if key not in free and saved[key] != now[key]]
            what = f"{other[0].replace('_', '-')}: {saved[other[0]]!r} there" if other else ""
            if what:
                what = what if other == ["weights"] else f"--{what}"
                raise ValueError(f"--out {out} has the results of another command ({what}): choose another folder")
            for (p, _), row in there:
                if p >= len(texts) or row["prompt"] != texts[p]["prompt"]:
                    raise ValueError(
                        f"--out {out} has results of other prompts (number {p} is {row['prompt'][:60]!r} there): "
                        "choose another folder"
                    )
        parallel.agree(False)  # all have looked
        if master:
            os.makedirs(out, exist_ok=True)
            write_json(os.path.join(out, "args.json"), now)
    if master:
        for key, values in differ.items():
            print(f"{key.replace('_', ' ')}: a {values[0]!r}, b {values[1]!r}")
        assumed = [] if args.compare else [f"--{side} {source.name}" for side, source in plans[0]["sources"].items()]
        assumed = [name for name in assumed if name.split()[1] not in (args.model, args.lm)] + [said] * bool(said)
        if assumed:
            print(f"assumed: {', '.join(assumed)}")

    loaded = {}

    def get_scores():
        """The rewards, loaded once."""
        if not loaded:
            judge_at = (args.judge_url, args.judge_model)
            loaded.update({metric: rewards.load(name, world.device, *judge_at) for name, metric, _ in parsed})
            roles = dict(text="max_new_tokens" in plans[0]["settings"], image=args.mode != "text")
            roles["source"] = rows[0]["image"] is not None
            for score in loaded.values():
                rewards.check_needs(score, tuple(role for role, there in roles.items() if there))
        return loaded

    both = []
    try:
        for one, folder in zip(plans, folders):
            both.append(produce(args, one, rows, get_scores, folder, world))
    except KeyboardInterrupt:
        print(f"stopped; what is done is in {out}, and the same command with --out {out} goes on")
        raise SystemExit(130) from None
    except (RuntimeError, MemoryError) as error:
        if not parallel._out_of_memory(error):
            raise
        raise SystemExit(
            f"error: rank {world.rank} is out of memory: {str(error).splitlines()[0]}\nLower --batch-size or "
            f"--resolution, or try --offload-encoders; with --out {out} it goes on from here."
        ) from None
    if not master:
        return both if args.compare else both[0]
    for name, folder, found in zip(args.compare or [""], folders, both):
        if name and parsed:
            print(name)
        for row in [*found.values()][:SHOWN] if args.mode in ("text", "t2icot") and not name else ():
            print(captions([row])[0])
        print_scores(folder, found)
    if args.compare:
        table = paired_table(*both)
        width = max([6, *map(len, table)])
        if table:
            print(f"{'reward':{width}}  {'a':>9}  {'b':>9}  {'b - a':>9}  {'error':>8}  prompts")
        for name, r in table.items():
            numbers = f"{r['a']:9.4f}  {r['b']:9.4f}  {r['difference']:9.4f}  {r['error']:8.4f}"
            print(f"{name:{width}}  {numbers}  {r['prompts']:7d}")
        of_both = {side: one["settings"] | {"instruction": one["instruction"]} for side, one in zip("ab", plans)}
        compared = dict(a=args.compare[0], b=args.compare[1], settings=of_both, rewards=table)
        write_json(os.path.join(out, "compare.json"), compared)
        if args.mode != "text":
            pairs, lines = [], []
            for row_a, row_b in spread(list(zip(both[0].values(), both[1].values())), SHOWN // 2):
                a, b = seen(folders[0], rows, row_a), seen(folders[1], rows, row_b)
                b = Image.fromarray(b[:, -len(b) :]).resize((len(a), len(a)))  # made square; the source is seen in a
                gap = np.full((len(a), max(1, len(a) // 32), 3), 0xCC, np.uint8)
                pairs.append(np.concatenate([a, gap, np.asarray(b)], axis=1))
                values = [next(iter(row["rewards"].values()), None) for row in (row_a, row_b)]
                judged = "" if None in values else f"{values[0]:.2f} | {values[1]:.2f} "
                lines.append(f"{judged}{row_a['prompt']}")
            run_folder.grid(os.path.join(out, "compare.png"), pairs, lines)
    print(f"wrote {out}: {', '.join(sorted(name for name in os.listdir(out) if not name.startswith('.'))[:8])}")
    return both if args.compare else both[0]


if __name__ == "__main__":
    main(run_folder.parse(Args(), sys.argv[1:], "infer.py"))
