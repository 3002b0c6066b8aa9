"""DINOv2 similarity of two pictures (https://arxiv.org/abs/2304.07193): is it the same thing, seen the same way?

    score = cos(image, source)            of the class tokens; -1 to 1, 1 = the same

Trained without texts, it minds the identity and the layout of what is shown, where clip_sim minds what it would be
called. Shortest side to 256, the centre 224 x 224 are seen.
"""

import torch
from torch.nn.functional import normalize

from rewards.clip import cannot_load, score_rows

MODEL = "facebook/dinov2-base"  # 87 M parameters, 0.35 GB


def load(device="cpu", model=MODEL, role="image"):
    """Cosine of samples[role] and samples["source"]; role="recon" judges a cycle, edit and edit back.

    `model`: hub id or folder of a DINOv2. Raises RuntimeError if it is neither local nor to be had from the hub.
    """
    from transformers import BitImageProcessorPil, Dinov2Model  # seconds to import

    try:
        preprocess = BitImageProcessorPil.from_pretrained(model)
        dino = Dinov2Model.from_pretrained(model, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        raise cannot_load("dino", model, error, [(model, "--include '*.json' --include model.safetensors")]) from None
    dino = dino.to(device).eval().requires_grad_(False)

    def embed(pictures):
        pixels = preprocess(images=pictures, return_tensors="pt").pixel_values
        return normalize(dino(pixel_values=pixels.to(device)).pooler_output, dim=-1)  # the class token, normed

    def forward(pictures, sources):
        return (embed(pictures) * embed(sources)).sum(-1)

    def score(samples, prompts, metadata):
        return score_rows("dino", forward, {"pictures": samples[role], "sources": samples["source"]})

    score.needs, score.strict = (role, "source"), None
    return score
