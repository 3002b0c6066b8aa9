"""SigLIP and SigLIP 2 (https://arxiv.org/abs/2303.15343, https://arxiv.org/abs/2502.14786): CLIP with a pairwise loss.

    score = cos(text, image)            about -0.1 to 0.2

The model's own probability, sigmoid(exp(logit_scale) cos + logit_bias), saturates near 0 for long prompts and then
tells the pictures of a group no more apart; the cosine orders one prompt's pictures the same way.

The picture is squeezed into a square, whatever its sides: nothing is cut off. The text is cut at 64 tokens.
"""

import torch
from torch.nn.functional import normalize

from rewards.clip import cannot_load, score_rows

MODEL = "google/siglip-so400m-patch14-384"  # 878 M parameters, 3.5 GB


def load(device="cpu", model=MODEL):
    """Cosine of samples["image"] and its prompt; `model`: hub id or folder of a SigLIP, or SigLIP 2 of fixed size.

    Raises RuntimeError if it is neither local nor to be had from the hub, or a NaFlex model.
    """
    from transformers import AutoConfig, AutoTokenizer, SiglipImageProcessorPil, SiglipModel  # seconds to import

    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type != "siglip":
            raise OSError(f"its model_type is {config.model_type!r}; only 'siglip' works, which NaFlex is not")
        preprocess = SiglipImageProcessorPil.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        # Where its files are missing, transformers 5 may return a nearly empty one and no error.
        if 2 * len(tokenizer) < config.text_config.vocab_size:
            raise OSError(f"tokenizer of {len(tokenizer)} tokens, text model of {config.text_config.vocab_size}")
        siglip = SiglipModel.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        files = [(model, "--include '*.json' --include '*.model' --include '*.safetensors'")]
        raise cannot_load("siglip", model, error, files) from None
    siglip = siglip.to(device).eval().requires_grad_(False)

    def forward(pictures, prompts):
        pixels = preprocess(images=pictures, return_tensors="pt").pixel_values
        # Trained on padding to the full length, without a mask, and pooled at the last place: padding less changes the
        # score. Lower case, also where the tokenizer does not see to it (SigLIP 2 under its Gemma tokenizer).
        text = tokenizer(
            [prompt.lower() for prompt in prompts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=siglip.config.text_config.max_position_embeddings,  # 64
            return_tensors="pt",
        ).input_ids
        image_BD = normalize(siglip.vision_model(pixel_values=pixels.to(device)).pooler_output, dim=-1)
        text_BD = normalize(siglip.text_model(input_ids=text.to(device)).pooler_output, dim=-1)
        return (image_BD * text_BD).sum(-1)

    def score(samples, prompts, metadata):
        return score_rows("siglip", forward, {"pictures": samples["image"]}, {"prompts": prompts})

    score.needs, score.strict = ("image",), None
    return score
