"""PickScore (https://arxiv.org/abs/2305.01569): a CLIP ViT-H/14 tuned on human choices between pictures of a prompt.

    score = exp(logit_scale) * cos(text, image) / 26

exp(logit_scale) is about 100 and raw scores are 18 to 24; the published Flow-GRPO recipes divide by 26, which brings
them near 1 (0.7 to 0.95) but does not bound them. Compare scores within one prompt, not across prompts.

The picture is CLIP's centre crop: of a 1024 x 576 one the sides are not seen. The text is cut at 77 tokens.
fp32 throughout: bf16 would quantise the cosine in steps of 0.001, as large as the differences inside one group.
"""

import os

import torch
from PIL import Image

BATCH_SIZE = 32  # pictures per forward; a call may have any number
MODEL = "yuvalkirstain/PickScore_v1"  # 986 M parameters, 3.9 GB
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the checkpoint it was tuned from; only its tokenizer and resize


def load(device="cpu", model=MODEL, processor=PROCESSOR):
    """PickScore / 26 of samples["image"] under `prompts`; `model`, `processor`: hub ids or local folders.

    Raises RuntimeError if they are neither local nor to be had from the hub.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer  # seconds to import

    try:
        preprocess = CLIPImageProcessorPil.from_pretrained(processor)
        tokenizer = CLIPTokenizer.from_pretrained(processor)
        clip = CLIPModel.from_pretrained(model, dtype=torch.float32)
        # Where the tokenizer's files are missing, transformers 5 returns an empty vocabulary and no error, and all
        # prompts would look alike.
        if len(tokenizer) != clip.config.text_config.vocab_size:
            raise OSError(f"tokenizer of {len(tokenizer)} tokens, text model of {clip.config.text_config.vocab_size}")
    except (OSError, RuntimeError) as error:
        files = [(model, "config.json model.safetensors"), (processor, "--include '*.json' --include '*.txt'")]
        fixes = [f"hf download {name} {wanted}" for name, wanted in files if not os.path.isdir(name)]
        hint = f"\nDownload once, with a network: {' && '.join(fixes)}" if fixes else ""
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise RuntimeError(f"pickscore: cannot load {model}, tokenizer from {processor}: {reason}.{hint}") from None
    clip = clip.to(device).eval().requires_grad_(False)
    max_length = clip.config.text_config.max_position_embeddings  # 77

    @torch.no_grad()
    def score(samples, prompts, metadata):
        images = samples["image"]
        if len(images) != len(prompts):
            raise ValueError(f"pickscore: {len(images)} pictures for {len(prompts)} prompts")
        scores = []
        for i in range(0, len(images), BATCH_SIZE):
            pictures = [Image.fromarray(image) for image in images[i : i + BATCH_SIZE]]
            pixels = preprocess(images=pictures, return_tensors="pt")
            # Padding stands behind the end token that CLIP pools, and attention is causal: it changes no score.
            text = tokenizer(
                list(prompts[i : i + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            out = clip(**text.to(device), **pixels.to(device))  # its embeddings are of unit length
            scores.append(clip.logit_scale.exp() * (out.text_embeds * out.image_embeds).sum(-1) / 26)
        reward_B = torch.cat(scores).float().cpu() if scores else torch.empty(0)
        return torch.where(reward_B.isfinite(), reward_B, torch.nan)

    score.needs, score.strict = ("image",), None
    return score
