"""Generative models behind the contract that the scripts rely on: one file per architecture.

`load(name, ...)` takes an alias, a local folder in diffusers layout, or a Hugging Face hub id.
"""

import difflib
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

# pipeline class -> (family, by which the scripts choose a recipe; the file here that loads it)
PIPELINES = {
    "FluxPipeline": ("flux", "flux"),
    "FluxKontextPipeline": ("kontext", "flux"),
    "Flux2KleinPipeline": ("klein", "flux2"),
    "StableDiffusion3Pipeline": ("sd3", "sd3"),
    "SanaPipeline": ("sana", "sana"),
}


def folder_or_id(name):
    """The folder or hub id behind an alias; anything else is returned as it is. A tiny model that is not shipped is
    built into assets/ when it is first asked for, from a fixed seed."""
    source = ALIASES.get(name, name)
    if os.path.dirname(source) == ASSETS and not os.path.isdir(source):
        from models import tiny

        tiny.build(name, source)
    return source


def pipeline_class(name):
    """The class in the `model_index.json` of an alias, folder or hub id, e.g. "FluxPipeline".

    Raises ValueError for a name that is none of the three, RuntimeError where the hub or the licence stands in the way.
    """
    source = folder_or_id(name)
    if os.path.isdir(source):
        index = os.path.join(source, "model_index.json")
        if not os.path.exists(index):
            raise ValueError(f"{source}: no model_index.json; expected a folder in diffusers layout")
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        index = hub(source, lambda: _hub_file(source, "model_index.json"))
    else:
        hint = difflib.get_close_matches(name, ALIASES, n=1)
        raise ValueError(
            f"unknown model '{name}'{f', did you mean {hint[0]}?' if hint else ''}: "
            f"expected one of {', '.join(ALIASES)}, a folder in diffusers layout, or a hub id owner/name"
        )
    with open(index) as f:
        return json.load(f)["_class_name"]


def family(name):
    """flux, kontext, klein, sd3 or sana: known of an alias, for anything else by its pipeline class.

    Raises what `pipeline_class` raises, and ValueError for a pipeline that is not supported.
    """
    if name in ALIASES:
        return name.removeprefix("tiny-").removesuffix(".5")
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


def _supported(name):
    kind = pipeline_class(name)
    if kind not in PIPELINES:
        raise ValueError(f"{name}: pipeline class {kind} is not supported; supported: {', '.join(PIPELINES)}")
    return PIPELINES[kind]


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
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        if isinstance(e, PermissionError) or "No space left" in str(e):
            raise
        message = (
            f"'{repo}' is no folder here and not in the local cache, and the hub cannot be reached. With a network: "
            f"accept its licence at https://huggingface.co/{repo} if it has one, `hf auth login`, `hf download {repo}`"
        )
    raise RuntimeError(message) from None
