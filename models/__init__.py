"""Generative models behind the contract that the scripts rely on: one file per architecture.

`load(name, ...)` (flow models) and `load_lm(name, ...)` (language models) take an alias, a local folder in diffusers or
transformers layout, or a Hugging Face hub id.
"""

import difflib
import functools
import importlib
import json
import os

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")

# alias -> hub id or folder
ALIASES = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5": "stabilityai/stable-diffusion-3.5-medium",
    "sana": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "tiny-flux": os.path.join(ASSETS, "tiny-flux"),
    "tiny-kontext": os.path.join(ASSETS, "tiny-kontext"),
    "tiny-klein": os.path.join(ASSETS, "tiny-klein"),
    "tiny-sd3": os.path.join(ASSETS, "tiny-sd3"),
    "tiny-sana": os.path.join(ASSETS, "tiny-sana"),
}

LM_ALIASES = {
    **{f"qwen2.5-{size.lower()}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")},
    **{f"qwen2.5-vl-{size.lower()}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")},
    **{f"qwen3-vl-{size.lower()}": f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B")},
    "tiny-qwen": os.path.join(ASSETS, "tiny-qwen"),
    "tiny-qwen-vl": os.path.join(ASSETS, "tiny-qwen-vl"),
    "tiny-qwen-refine": os.path.join(ASSETS, "tiny-qwen-refine"),
}

# model_type in config.json -> family, by which the scripts choose a recipe
LM_FAMILIES = {"qwen2": "qwen2.5", "qwen3": "qwen3", "qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl"}

# Unified models: flow model and language model in one, each in a folder of models/blip3o.py. Those named -start have
# the autoencoder of tiny-blip3o and its language model before the cold start, and the rest untrained.
UNIFIED = {name: os.path.join(ASSETS, name) for name in ("tiny-blip3o", "tiny-blip3o-start", "tiny-metaquery-start")}
# At full size they have no hub id: variant -> language model and SANA that blip3o.create makes a folder of
FULL_SIZE = {
    "blip3o": ("qwen2.5-vl-3b", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
    "metaquery": ("qwen2.5-vl-3b", "Efficient-Large-Model/Sana_1600M_512px_diffusers"),
}

# pipeline class -> (family, by which the scripts choose a recipe; the file here that loads it)
PIPELINES = {
    "FluxPipeline": ("flux", "flux"),
    "FluxKontextPipeline": ("kontext", "flux"),
    "Flux2KleinPipeline": ("klein", "flux2"),
    "StableDiffusion3Pipeline": ("sd3", "sd3"),
    "SanaPipeline": ("sana", "sana"),
    "blip3o": ("blip3o", "blip3o"),  # unified models: the model_type
    "metaquery": ("metaquery", "blip3o"),
}

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of PEFT


def folder_or_id(name, aliases=ALIASES):
    """The folder or hub id behind an alias (of `aliases`: LM_ALIASES for language models); anything else is returned as
    it is. A tiny model that is not shipped is built into assets/ when it is first asked for, from a fixed seed."""
    source = aliases.get(name) or UNIFIED.get(name, name)
    if os.path.dirname(source) == ASSETS and not os.path.isdir(source):
        from models import tiny

        tiny.build(name, source)
    return source


def pipeline_class(name):
    """The class in the `model_index.json` of an alias, folder or hub id, e.g. "FluxPipeline"; of a unified model its
    model_type, blip3o or metaquery.

    Raises ValueError for a name that is none of the three, RuntimeError where the hub or the licence stands in the way.
    """
    source = folder_or_id(name)
    if unified(source):
        return unified(source)["model_type"]
    if os.path.isdir(source):
        index = os.path.join(source, "model_index.json")
        if not os.path.exists(index):
            raise ValueError(f"{source}: no model_index.json; expected a folder in diffusers layout")
    elif _is_hub_id(source):
        index = hub(source, lambda: _hub_file(source, "model_index.json"))
    elif name in FULL_SIZE:
        create = f"blip3o.create('{name}', '{FULL_SIZE[name][0]}', '{FULL_SIZE[name][1]}', '{name}')"
        raise ValueError(
            f"--model {name} is no folder yet, and only --dry-run needs none; to make it: "
            f'python -c "from models import blip3o; {create}"'
        )
    else:
        raise _unknown(name, ALIASES | UNIFIED, "diffusers")
    with open(index) as f:
        return json.load(f)["_class_name"]


def unified(name):
    """config.json of a unified model (models/blip3o.py), as a dict; None for what is not the folder of one."""
    config = os.path.join(folder_or_id(name), "config.json")
    if not os.path.isfile(config):
        return None
    with open(config) as f:
        config = json.load(f)
    return config if config.get("model_type") in PIPELINES else None


def family(name):
    """flux, kontext, klein, sd3 or sana: known of an alias, for anything else by its pipeline class; blip3o or
    metaquery for the folder of a unified model, or of these names where there is no such folder (FULL_SIZE).

    Raises what `pipeline_class` raises, and ValueError for a pipeline that is not supported.
    """
    if name in ALIASES:
        return name.removeprefix("tiny-").removesuffix(".5")
    if name in FULL_SIZE and not os.path.isdir(name):
        return name
    return _supported(name)[0]


def load(name, device, dtype, sigma_schedule="stock", **options):
    """Load a flow model by alias, folder or hub id; the options are those of the architecture's own `load`
    (models/flux.py). sigma_schedule: "stock", or "single" for SD3's with its shift applied once (models/sd3.py)."""
    family, module = _supported(name)
    if sigma_schedule != "stock":
        if family != "sd3":
            raise ValueError(f"--sigma-schedule {sigma_schedule}: only sd3 models have one, --model {name} has not")
        options["sigma_schedule"] = sigma_schedule
    return importlib.import_module(f"models.{module}").load(folder_or_id(name), device, dtype, **options)


def load_lm(name, device, dtype, **options):
    """Load a language model, of text or of text and pictures, by alias, folder or hub id; the options are those of
    models/qwen.py's `load`. Raises what that raises, and ValueError for a name that is none of the three."""
    from models import qwen

    source = lm_source(name)
    if not os.path.isdir(source) and not _is_hub_id(source):
        raise _unknown(name, LM_ALIASES, "transformers")
    return qwen.load(source, device, dtype, **options)


def lm_family(name):
    """qwen2.5, qwen3, qwen2.5-vl, qwen3-vl or the alias of a tiny model: known of an alias; for anything else one of
    the first four by the model_type of its config.json, or "other".

    Raises ValueError for a name that is neither alias, folder nor hub id, RuntimeError where the hub or the licence
    stands in the way.
    """
    if name in LM_ALIASES:
        return name if name.startswith("tiny-") else name.rpartition("-")[0]
    return LM_FAMILIES.get(model_type(name), "other")


def model_type(name):
    """`model_type` in the config.json of a language model, e.g. "qwen2_5_vl". Raises what `lm_family` raises."""
    source = lm_source(name)
    if os.path.isdir(source):
        config = os.path.join(source, "config.json")
        if not os.path.exists(config):
            adapter = os.path.exists(os.path.join(source, "adapter_config.json"))
            what = "an adapter, merge it into its base model first" if adapter else "expected a transformers folder"
            raise ValueError(f"{source}: no config.json; {what}")
    elif _is_hub_id(source):
        config = hub(source, lambda: _hub_file(source, "config.json"))
    else:
        raise _unknown(name, LM_ALIASES, "transformers")
    with open(config) as f:
        return json.load(f).get("model_type")


def _is_hub_id(source):
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _unknown(name, aliases, layout):
    hint = difflib.get_close_matches(name, aliases, n=1)
    return ValueError(
        f"unknown model '{name}'{f', did you mean {hint[0]}?' if hint else ''}: "
        f"expected one of {', '.join(aliases)}, a folder in {layout} layout, or a hub id owner/name"
    )


def lm_source(name):
    """The folder or hub id of a language model by its name, or by that of the unified model that it is part of."""
    source = folder_or_id(name, LM_ALIASES)
    config = unified(source)
    while config and "base" in config:
        if "lm" in config["adapts"]:
            raise ValueError(f"'{source}': its adapter changes the language model too; load it as --model")
        source = folder_or_id(config["base"])
        config = unified(source)
    if config is None:
        return source
    lm = config["lm"]
    return os.path.join(source, lm) if lm.startswith(".") else folder_or_id(lm, LM_ALIASES)


def _supported(name):
    kind = pipeline_class(name)
    if kind not in PIPELINES:
        raise ValueError(f"{name}: pipeline class {kind} is not supported; supported: {', '.join(PIPELINES)}")
    return PIPELINES[kind]


@functools.cache
def local(name):
    """A folder for the hub id of an export whose format no library loads by its id: of a LoRA what it says about itself
    and its weights, of a unified model everything. Any other name is returned as it is. Raises what `hub` raises."""
    if os.path.isdir(name) or not _is_hub_id(name):
        return name
    from huggingface_hub import snapshot_download

    files = ["README.md", "model_index.json", "config.json", "adapter_config.json", *LORA_FILES]
    folder = hub(name, lambda: snapshot_download(name, allow_patterns=files))
    if unified(folder):
        return hub(name, lambda: snapshot_download(name))
    return folder if any(os.path.exists(os.path.join(folder, file)) for file in LORA_FILES) else name


def _hub_file(repo, filename):
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo, filename)


def hub(repo, download):
    """Run `download()`; turn every way in which the hub refuses into one message that says what to do."""
    from huggingface_hub import errors

    try:
        return download()
    except errors.GatedRepoError:
        message = f"'{repo}' is gated: accept its licence at https://huggingface.co/{repo}, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        message = (
            f"'{repo}' does not exist on the Hugging Face hub, or is private: check the id, or run `hf auth login`"
        )
    except errors.RemoteEntryNotFoundError:
        message = (
            f"'{repo}' is not laid out as a whole model, perhaps a LoRA or a unified one: its card says how to use it"
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        if isinstance(e, PermissionError) or "No space left" in str(e):
            raise
        message = (
            f"'{repo}' is no folder here and not in the local cache, and the hub cannot be reached. With a network: "
            f"accept its licence at https://huggingface.co/{repo} if it has one, `hf auth login`, `hf download {repo}`"
        )
    raise RuntimeError(message) from None
