"""ImageReward (https://arxiv.org/abs/2304.05977): a BLIP tuned on ranked pictures; the text looks at the picture.

    score = (w . h + b - 0.16717) / 1.03334            h = BERT's first state under the prompt and the picture

About N(0, 1) over the pictures of its training set, -2.5 to 2.5 in practice. The picture is the centre crop, the text
is cut at 35 tokens, which is early. The head is published as five linear layers with nothing but dropout between them:
one affine function (`collapse`).

The weights are the published ones under the names of transformers' BLIP, whose text model is asked for its
bidirectional form.
"""

from math import isqrt

from rewards.aesthetic import collapse
from rewards.clip import cannot_load, from_tensors, read_weights, score_rows

MODEL = "THUDM/ImageReward"  # ImageReward.pt, 446 M parameters, 1.8 GB
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores of its training set, from its code
MAX_LENGTH = 35  # tokens

VISION = {
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "blocks.": "encoder.layers.",
    "norm.": "post_layernorm.",
}
VISION_LAYER = {".attn.qkv.": ".self_attn.qkv.", ".attn.proj.": ".self_attn.projection."}
VISION_LAYER |= {".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2."}


def from_blip(state):
    """transformers' (BlipVisionModel, BlipTextModel) of a state dict with the names of ImageReward, under "blip.".

    Sizes are read off the tensors; heads are 64 wide. Raises KeyError or RuntimeError where it is of another make.
    """
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    def part(prefix):
        return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}

    def layers(tensors, prefix):
        return 1 + max(
            [int(key.split(".")[prefix.count(".")]) for key in tensors if key.startswith(prefix)], default=-1
        )

    seen, read = part("blip.visual_encoder."), part("blip.text_encoder.")
    read.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    width, _, patch, _ = seen["patch_embed.proj.weight"].shape
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=seen["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers(seen, "blocks."),
        num_attention_heads=width // 64,
        image_size=patch * isqrt(seen["pos_embed"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    vocabulary, text_width = read["embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=layers(read, "encoder.layer."),
        num_attention_heads=text_width // 64,
        max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # builds the cross-attention; the forward is told otherwise
    )
    renamed = {}
    for key, tensor in seen.items():
        for old, new in VISION.items():
            if key.startswith(old):
                key = new + key[len(old) :]
                break
        for old, new in VISION_LAYER.items():
            key = key.replace(old, new)
        renamed[key] = tensor
    vision = from_tensors(BlipVisionModel, vision_config, renamed)
    return vision, from_tensors(BlipTextModel, text_config, read, add_pooling_layer=False)


def load(device="cpu", model=MODEL, tokenizer=TOKENIZER):
    """ImageReward of samples["image"] under `prompts`; `model`: hub id, folder or file (.pt, .safetensors).

    Raises RuntimeError if the weights or the `tokenizer` are neither local nor to be had from the hub.
    """
    from transformers import BertTokenizer, CLIPImageProcessorPil  # seconds to import

    try:
        tokens = BertTokenizer.from_pretrained(tokenizer)
        state = read_weights(model, "ImageReward.pt")
        vision, text = from_blip(state)
        w, b = collapse(state, "mlp.layers.")
        # Two tokens of the text model, [DEC] and [ENC], are not used here. An empty vocabulary is no error to
        # transformers 5.
        if len(tokens) + 2 != text.config.vocab_size:
            raise OSError(f"tokenizer of {len(tokens)} tokens, text model of {text.config.vocab_size} - 2")
    except (OSError, KeyError, RuntimeError) as error:
        files = [(model, "ImageReward.pt"), (tokenizer, "--include '*.json' --include '*.txt'")]
        raise cannot_load("image_reward", f"{model}, tokenizer {tokenizer}", error, files) from None
    vision, text = (part.to(device).eval().requires_grad_(False) for part in (vision, text))
    w, b = (w / STD).float().to(device), ((b - MEAN) / STD).float().to(device)
    size = vision.config.image_size  # 224
    preprocess = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def forward(pictures, prompts):
        pixels = preprocess(images=pictures, return_tensors="pt").pixel_values
        words = tokens(prompts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        words = words.to(device)
        states = text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=vision(pixel_values=pixels.to(device)).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return states[:, 0] @ w + b

    def score(samples, prompts, metadata):
        return score_rows("image_reward", forward, {"pictures": samples["image"]}, {"prompts": prompts})

    score.needs, score.strict = ("image",), None
    return score
