"""LAION's aesthetic predictor v2, sac+logos+ava1-l14-linearMSE: how do people rate this picture, from 1 to 10?

    score = w . e + b            e = unit-length CLIP ViT-L/14 embedding of the picture; 4.5 to 7 in practice

From https://github.com/christophschuhmann/improved-aesthetic-predictor. It is published as five linear layers with
nothing but dropout between them, so that they are one affine function, w of length 17.9956 and b = 5.236646; computed
once in float64, it is applied in fp32 (layer by layer in bf16 the error reaches 0.03).

It does not read the prompt, and as a single reward it turns everything into paintings.
"""

import re

import torch

from rewards.clip import MODEL, cannot_load, read_weights, score_rows, shared_clip

HEAD = "trl-lib/ddpo-aesthetic-predictor"  # the published .pth, 3.7 MB, sha256 21dd590f..., under another name


def collapse(state, prefix):
    """(w [D], b []), float64, with w . x + b = the linear layers `prefix`0, `prefix`2, ... one after the other.

    Raises KeyError if `state` has no such layers.
    """
    layers = sorted(int(i) for key in state for i in re.findall(rf"^{re.escape(prefix)}(\d+)\.weight$", key))
    if not layers:
        raise KeyError(f"{prefix}0.weight")
    w, b = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for i in reversed(layers):
        b = b + w @ state[f"{prefix}{i}.bias"].double()
        w = w @ state[f"{prefix}{i}.weight"].double()
    return w[0], b[0]


def load(device="cpu", model=MODEL, head=HEAD):
    """Aesthetic score of samples["image"]; `model`: the CLIP, `head`: hub id, folder or file of the linear layers.

    Raises RuntimeError if they are neither local nor to be had from the hub.
    """
    clip = shared_clip(model, device)
    try:
        w, b = collapse(read_weights(head, "aesthetic-model.pth"), "layers.")
        if len(w) != clip.model.config.projection_dim:
            raise OSError(f"it is for {len(w)} numbers and {model} gives {clip.model.config.projection_dim}")
    except (OSError, KeyError) as error:
        raise cannot_load("aesthetic", f"the head {head}", error, [(head, "aesthetic-model.pth")]) from None
    w, b = w.float().to(device), b.float().to(device)

    def forward(pictures):
        return clip.images(pictures) @ w + b

    def score(samples, prompts, metadata):
        return score_rows("aesthetic", forward, {"pictures": samples["image"]})

    score.needs, score.strict = ("image",), None
    return score
