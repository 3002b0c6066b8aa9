"""Generative models behind the contract that the scripts rely on: one file per architecture.

`load(name, ...)` takes an alias, a local folder in diffusers layout, or a Hugging Face hub id.
"""

import difflib
import json
import os

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")

# alias -> hub id or folder
ALIASES = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "tiny-flux": os.path.join(ASSETS, "tiny-flux"),
}


def pipeline_class(name):
    """The class in the `model_index.json` of an alias, folder or hub id, e.g. "FluxPipeline".

    Raises ValueError for a name that is none of the three, RuntimeError where the hub or the licence stands in the way.
    """
    source = ALIASES.get(name, name)
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


def load(name, device, dtype, **options):
    """Load a flow model by alias, folder or hub id; the options are those of the architecture's own `load`
    (models/flux.py)."""
    from models import flux

    loaders = {"FluxPipeline": flux.load}
    kind = pipeline_class(name)
    if kind not in loaders:
        raise ValueError(f"{name}: pipeline class {kind} is not supported; supported: {', '.join(loaders)}")
    return loaders[kind](ALIASES.get(name, name), device, dtype, **options)


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
