"""CLIP rewards (https://arxiv.org/abs/2103.00020), and what every reward with a picture encoder shares.

    clipscore       cos(prompt, image)                             0.15 to 0.35
    clip_sim        cos(image, source)                             0.5 to 1; 1 = nothing was edited
    recon_clip_sim  cos(recon, source)                             the same of an edit that was edited back
    clip_direction  cos(image - source, target_caption - caption)  -1 to 1; a good edit has 0.1 to 0.2

of unit-length embeddings. clip_sim and clip_direction pull against each other and belong together: unchanged pictures
have the best similarity. Other scales of clipscore are weights: 100 / 30 in some trainers, 2.5 max(cos, 0) of the text
behind "A photo depicts" in the paper of that name (https://arxiv.org/abs/2104.08718). clip_direction is the metric of
InstructPix2Pix (https://arxiv.org/abs/2211.09800).

The picture is CLIP's centre crop: of a 1024 x 576 one the sides are not seen. Texts are cut at 77 tokens.
fp32 throughout: bf16 would quantise the cosine in steps of 0.001, as large as the differences inside one group.
"""

import os
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize

BATCH_SIZE = 32  # rows per forward; a call may have any number
MODEL = "openai/clip-vit-large-patch14"  # 428 M parameters, 1.7 GB


@torch.no_grad()
def score_rows(name, forward, images, texts=None):
    """Float32 scores [B] on the CPU of reward `name`, BATCH_SIZE rows at a time.

    images, texts: {what it is called in an error: column of B}; the columns are uint8 arrays [H, W, 3] and strings.
    forward gets the same columns of b rows, in order, pictures as PIL images, and returns [b]. A row with anything else
    in it scores NaN, as does a score that is not finite. Raises ValueError where the columns are not equally long.
    """
    columns = images | (texts or {})
    (first, length), *others = [(what, len(column)) for what, column in columns.items()]
    for what, other in others:
        if other != length:
            raise ValueError(f"{name}: {length} {first} for {other} {what}")

    def is_picture(x):
        return isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and x.size > 0

    fits = [is_picture] * len(images) + [lambda x: isinstance(x, str)] * len(texts or {})
    rows = [i for i in range(length) if all(fit(column[i]) for fit, column in zip(fits, columns.values(), strict=True))]
    reward_B = torch.full((length,), torch.nan)
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        pictures = [[Image.fromarray(column[i]) for i in batch] for column in images.values()]
        strings = [[column[i] for i in batch] for column in (texts or {}).values()]
        reward_B[batch] = forward(*pictures, *strings).float().cpu()
    return torch.where(reward_B.isfinite(), reward_B, torch.nan)


def cannot_load(name, what, error, files):
    """The RuntimeError for `error`, with how to fetch `files`, [(hub id or path, arguments of hf download)]."""
    fixes = [f"hf download {source} {wanted}" for source, wanted in files if not os.path.exists(source)]
    hint = f"\nDownload once, with a network: {' && '.join(fixes)}" if fixes else ""
    lines = [f"no tensor {error}"] if isinstance(error, KeyError) else [*str(error).splitlines(), ""]
    reason = lines[0].partition(". ")[0].rstrip(".")
    if reason.endswith(":"):  # of load_state_dict: the names follow
        reason = f"{reason} {lines[1].strip()[:200]}"
    return RuntimeError(f"{name}: cannot load {what}: {reason}.{hint}")


def read_weights(source, file):
    """The tensors of `file` in `source`, a hub id or folder, or of `source` itself where that is a file.

    Of a .pt or .pth only tensors and plain containers are unpickled. Raises OSError if it cannot be read.
    """
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    if not os.path.exists(source):
        path = hf_hub_download(source, file)
    else:
        path = os.path.join(source, file) if os.path.isdir(source) else source
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and safetensors each have their own
        raise OSError(f"{path} is not a file of tensors ({type(error).__name__})") from None
    if not isinstance(tensors, dict):
        raise OSError(f"{path} holds a {type(tensors).__name__}, expected a dict of tensors")
    return tensors


def from_tensors(cls, config, tensors, **options):
    """A transformers model of class `cls` with these tensors by name, fp32; `options` go to its constructor.

    Raises RuntimeError unless names and shapes are exactly the model's. Skips the random initialisation, on which
    cls(config) spends 14 s for 1 G parameters.
    """
    model, info = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True, **options
    )
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise RuntimeError(
                f"{what.replace('_', ' ')} {', '.join(sorted(info[what])[:3])}, {len(info[what])} in all"
            )
    return model


class Clip:
    """A transformers CLIPModel with its tokenizer and preprocess([PIL image]) -> pixels [b, 3, H, W].

    Raises OSError if the tokenizer is not the model's.
    """

    def __init__(self, model, tokenizer, preprocess, device):
        # Where the tokenizer's files are missing, transformers 5 returns an empty vocabulary and no error, and all
        # prompts would look alike.
        if len(tokenizer) != model.config.text_config.vocab_size:
            raise OSError(f"tokenizer of {len(tokenizer)} tokens, text model of {model.config.text_config.vocab_size}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.preprocess, self.device = tokenizer, preprocess, device

    def images(self, pictures):
        """Unit-length embeddings [b, D] of PIL images."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(pictures).to(self.device)).pooler_output
        return normalize(self.model.visual_projection(pooled), dim=-1)

    def texts(self, prompts):
        """Unit-length embeddings [b, D] of strings."""
        # Padding stands behind the end token that CLIP pools, and attention is causal: it changes no score.
        length = self.model.config.text_config.max_position_embeddings  # 77
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return normalize(
            self.model.text_projection(self.model.text_model(**tokens.to(self.device)).pooler_output), dim=-1
        )


def load_clip(name, model, processor, device):
    """The Clip of a CLIPModel checkpoint, fp32; `model`, `processor` (tokenizer, resize): hub ids or local folders.

    Raises RuntimeError, under the reward's `name`, if they are neither local nor to be had from the hub.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer  # seconds to import

    try:
        resize = CLIPImageProcessorPil.from_pretrained(processor)
        tokenizer = CLIPTokenizer.from_pretrained(processor)
        clip = CLIPModel.from_pretrained(model, dtype=torch.float32)
        return Clip(clip, tokenizer, lambda images: resize(images=images, return_tensors="pt").pixel_values, device)
    except (OSError, RuntimeError) as error:
        files = [(model, "config.json model.safetensors"), (processor, "--include '*.json' --include '*.txt'")]
        if model == processor:
            files = [(model, "--include '*.json' --include '*.txt' --include model.safetensors")]
        raise cannot_load(name, f"{model}, tokenizer from {processor}", error, files) from None


@lru_cache(maxsize=1)  # clipscore, clip_sim, clip_direction and aesthetic in one run have one CLIP between them
def shared_clip(model, device):
    """`load_clip` of a repository that has its own tokenizer, loaded once."""
    return load_clip("clip", model, model, device)


def load(device="cpu", model=MODEL):
    """clipscore: the cosine of samples["image"] and its prompt. Raises RuntimeError as `load_clip` does."""
    clip = shared_clip(model, device)

    def forward(pictures, prompts):
        return (clip.images(pictures) * clip.texts(prompts)).sum(-1)

    def score(samples, prompts, metadata):
        return score_rows("clipscore", forward, {"pictures": samples["image"]}, {"prompts": prompts})

    score.needs, score.strict = ("image",), None
    return score


def load_sim(device="cpu", model=MODEL, role="image"):
    """clip_sim: the cosine of samples[role] and samples["source"].

    role="recon" judges a cycle, edit and edit back, by what comes back. Raises RuntimeError as `load_clip` does.
    """
    clip = shared_clip(model, device)

    def forward(pictures, sources):
        return (clip.images(pictures) * clip.images(sources)).sum(-1)

    def score(samples, prompts, metadata):
        return score_rows("clip_sim", forward, {"pictures": samples[role], "sources": samples["source"]})

    score.needs, score.strict = (role, "source"), None
    return score


def load_recon_sim(device="cpu", model=MODEL):
    """recon_clip_sim: `load_sim` of the way back of a cycle."""
    return load_sim(device, model, "recon")


def load_direction(device="cpu", model=MODEL):
    """clip_direction: does samples["image"] differ from samples["source"] the way its captions differ?

    metadata: "caption" of the source, "target_caption" of the wanted picture; ValueError where one has no such key, NaN
    where the two are the same text, which has no direction. A picture that is its source scores 0. Raises RuntimeError
    as `load_clip` does.
    """
    clip = shared_clip(model, device)

    def forward(pictures, sources, captions, targets):
        moved_BD = clip.images(pictures) - clip.images(sources)
        wanted_BD = clip.texts(targets) - clip.texts(captions)
        # Differences are 0.3 and longer. Those of equal pictures are rounding, 1e-6, and must not point anywhere.
        return cosine_similarity(moved_BD, wanted_BD, eps=1e-3)

    def score(samples, prompts, metadata):
        captions, targets = [], []
        for i, known in enumerate(metadata or []):
            if not {"caption", "target_caption"} <= set(known or {}):
                have = f"'caption' and 'target_caption', has {list(known or {})}"
                raise ValueError(f"clip_direction: metadata {i} needs {have}")
            captions.append(known["caption"])
            targets.append(known["target_caption"] if known["target_caption"] != known["caption"] else None)
        pictures = {"pictures": samples["image"], "sources": samples["source"]}
        return score_rows("clip_direction", forward, pictures, {"captions": captions, "target captions": targets})

    score.needs, score.strict = ("image", "source"), None
    return score
