"""Human Preference Score v2 and v2.1 (https://arxiv.org/abs/2306.09341): CLIP ViT-H/14s tuned on ranked pictures.

    score = cos(text, image)            no logit scale; 0.15 to 0.36, tables show it times 100

v2 and v2.1 are two checkpoints of one architecture, and their scores are not comparable with one another.

Unlike the other CLIPs it sees the whole picture: the longest side becomes 224 and black bars fill the square. As a
single reward it is hacked towards saturated, bright, oily pictures; DanceGRPO mixes it with a CLIP score.

The resize is bicubic on float pixels, antialiased and not clamped, as in the official code under torchvision >= 0.17;
under older ones that code does not antialias, and numbers published with it differ. fp32 throughout, where the
official code runs under fp16 autocast.
"""

import re
from math import isqrt

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

from rewards.clip import Clip, cannot_load, from_tensors, read_weights, score_rows

MODEL = "xswu/HPSv2"  # fp16 state dicts with the names of open_clip, 986 M parameters, 2.0 GB each; 3.9 GB in fp32
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the checkpoint it was tuned from; only its tokenizer
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def letterbox(picture, size):
    """Pixels [3, size, size] of a PIL image: longest side to `size`, centred on black, then CLIP's mean and std."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    scale = size / max(x.shape[-2:])
    if scale != 1:
        sides = [max(1, round(side * scale)) for side in x.shape[-2:]]
        x = interpolate(x, sides, mode="bicubic", antialias=True, align_corners=False)
    rows, columns = size - x.shape[-2], size - x.shape[-1]
    x = pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))[0]
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


OUTSIDE_LAYERS = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",  # transposed
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # spelt so in transformers
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",  # transposed
}
IN_LAYERS = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def from_open_clip(state):
    """transformers' CLIPModel, fp32, of a CLIP state dict with open_clip's names.

    Sizes are read off the tensors. What they do not show is that of ViT-H-14: heads 80 wide for the picture and 64 for
    the text, and gelu. Raises KeyError or RuntimeError where `state` is of another architecture.
    """
    from transformers import CLIPConfig, CLIPModel

    def sizes(tower, head):
        mlp, width = state[f"{tower}.resblocks.0.mlp.c_fc.weight"].shape
        layers = len([key for key in state if re.fullmatch(rf"{tower}\.resblocks\.\d+\.ln_1\.weight", key)])
        shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
        return shape | {"num_attention_heads": width // head, "hidden_act": "gelu"}

    vocabulary, length = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
    text = {"vocab_size": vocabulary, "max_position_embeddings": length, "eos_token_id": vocabulary - 1}  # CLIP's last
    patch = state["visual.conv1.weight"].shape[-1]
    vision = {"patch_size": patch, "image_size": patch * isqrt(state["visual.positional_embedding"].shape[0] - 1)}
    config = CLIPConfig(
        text_config=text | sizes("transformer", 64),
        vision_config=vision | sizes("visual.transformer", 80),
        projection_dim=state["text_projection"].shape[1],
    )
    renamed = {}
    for key, tensor in state.items():
        layer = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
        name = key if layer is None else layer[3]
        for old, new in (OUTSIDE_LAYERS if layer is None else IN_LAYERS).items():
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        if layer is None:
            renamed[name] = tensor.T if key in ("text_projection", "visual.proj") else tensor
            continue
        prefix = f"{'vision' if layer[1] else 'text'}_model.encoder.layers.{layer[2]}."
        if name.startswith("attn.in_proj_"):  # q, k and v on top of one another
            for part, rows in zip("qkv", tensor.chunk(3)):
                renamed[f"{prefix}self_attn.{part}_proj.{name.removeprefix('attn.in_proj_')}"] = rows
        else:
            renamed[prefix + name] = tensor
    return from_tensors(CLIPModel, config, renamed)


def _load(name, file, device, model, processor):
    from transformers import CLIPTokenizer  # seconds to import

    try:
        tokenizer = CLIPTokenizer.from_pretrained(processor)
        state = read_weights(model, file)
        state = {key.removeprefix("model."): tensor for key, tensor in state.get("state_dict", state).items()}
        clip = from_open_clip(state)
        size = clip.config.vision_config.image_size
        clip = Clip(clip, tokenizer, lambda images: torch.stack([letterbox(image, size) for image in images]), device)
    except (OSError, KeyError, RuntimeError) as error:
        files = [(model, file), (processor, "--include '*.json' --include '*.txt'")]
        raise cannot_load(name, f"{file} of {model}, tokenizer from {processor}", error, files) from None

    def forward(pictures, prompts):
        return (clip.images(pictures) * clip.texts(prompts)).sum(-1)

    def score(samples, prompts, metadata):
        return score_rows(name, forward, {"pictures": samples["image"]}, {"prompts": prompts})

    score.needs, score.strict = ("image",), None
    return score


def load(device="cpu", model=MODEL, processor=PROCESSOR):
    """HPSv2 of samples["image"] under `prompts`; `model`: hub id, folder or file (.pt, .safetensors) of the weights.

    Raises RuntimeError if they are neither local nor to be had from the hub.
    """
    return _load("hpsv2", "HPS_v2_compressed.pt", device, model, processor)


def load_v21(device="cpu", model=MODEL, processor=PROCESSOR):
    """HPSv2.1, otherwise as `load`."""
    return _load("hpsv2.1", "HPS_v2.1_compressed.pt", device, model, processor)
