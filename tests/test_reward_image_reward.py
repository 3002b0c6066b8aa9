import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_reward_clip import PICTURES, PROMPTS, by_hand, chain, check_contract, check_offline, check_prompts
from transformers import BertTokenizer

from rewards import image_reward

SIZE, PATCH, WIDTH, TEXT_WIDTH = 32, 16, 192, 128  # 3 heads of the picture, 2 of the text, 64 wide each


def random_state(vocabulary):
    """Random tensors under the names of ImageReward.pt, small; the two projections at the end are not used."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def linear(name, outputs, inputs, gain=1.0):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * gain * inputs**-0.5
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.2

    def norm(name, width):
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.2
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.2

    v = "blip.visual_encoder"
    state[f"{v}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    state[f"{v}.pos_embed"] = torch.randn(1, 1 + (SIZE // PATCH) ** 2, WIDTH, generator=generator)
    linear(f"{v}.patch_embed.proj", WIDTH, 3 * PATCH**2)
    state[f"{v}.patch_embed.proj.weight"] = state[f"{v}.patch_embed.proj.weight"].view(WIDTH, 3, PATCH, PATCH)
    for i in range(3):
        norm(f"{v}.blocks.{i}.norm1", WIDTH)
        norm(f"{v}.blocks.{i}.norm2", WIDTH)
        linear(f"{v}.blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH, gain=1.5)
        linear(f"{v}.blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(f"{v}.blocks.{i}.mlp.fc1", 2 * WIDTH, WIDTH)
        linear(f"{v}.blocks.{i}.mlp.fc2", WIDTH, 2 * WIDTH)
    norm(f"{v}.norm", WIDTH)
    t = "blip.text_encoder"
    state[f"{t}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{t}.embeddings.word_embeddings.weight"] = torch.randn(vocabulary, TEXT_WIDTH, generator=generator)
    state[f"{t}.embeddings.position_embeddings.weight"] = torch.randn(40, TEXT_WIDTH, generator=generator)
    norm(f"{t}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(2):
        for attention, keys in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            p = f"{t}.encoder.layer.{i}.{attention}"
            linear(f"{p}.self.query", TEXT_WIDTH, TEXT_WIDTH, gain=2)
            linear(f"{p}.self.key", TEXT_WIDTH, keys, gain=2)
            linear(f"{p}.self.value", TEXT_WIDTH, keys)
            linear(f"{p}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{p}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{t}.encoder.layer.{i}.intermediate.dense", 2 * TEXT_WIDTH, TEXT_WIDTH)
        linear(f"{t}.encoder.layer.{i}.output.dense", TEXT_WIDTH, 2 * TEXT_WIDTH)
        norm(f"{t}.encoder.layer.{i}.output.LayerNorm", TEXT_WIDTH)
    for i, outputs, inputs in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), (TEXT_WIDTH, 1024, 128, 64, 16)):
        linear(f"mlp.layers.{i}", outputs, inputs)
    linear("blip.vision_proj", 16, WIDTH)
    linear("blip.text_proj", 16, TEXT_WIDTH)
    return state


def attend(q, k, v, mask=None):
    """Softmax attention of [B, L, D] in heads of 64; mask [B, keys]: 1 = seen."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / 8
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def image_reward_by_definition(state, pixels, ids, mask):
    """BLIP's ViT (pre-norm) and BERT (post-norm, cross-attention in each layer), head and standardisation; float64."""
    state = {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    proj = f"{v}.patch_embed.proj"
    x = F.conv2d(pixels.double(), state[f"{proj}.weight"], state[f"{proj}.bias"], stride=PATCH)
    x = torch.cat([state[f"{v}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{v}.pos_embed"]
    for i in range(3):
        p = f"{v}.blocks.{i}"
        q, k, value = linear(f"{p}.attn.qkv", norm(f"{p}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{p}.attn.proj", attend(q, k, value))
        x = x + linear(f"{p}.mlp.fc2", F.gelu(linear(f"{p}.mlp.fc1", norm(f"{p}.norm2", x, 1e-6))))
    x = norm(f"{v}.norm", x, 1e-6)
    t = "blip.text_encoder"
    y = state[f"{t}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{t}.embeddings.LayerNorm", y, 1e-12)
    for i in range(2):
        for attention in ("attention", "crossattention"):
            p = f"{t}.encoder.layer.{i}.{attention}"
            keys = y if attention == "attention" else x
            q, k, value = linear(f"{p}.self.query", y), linear(f"{p}.self.key", keys), linear(f"{p}.self.value", keys)
            seen = attend(q, k, value, mask if attention == "attention" else None)
            y = norm(f"{p}.output.LayerNorm", y + linear(f"{p}.output.dense", seen), 1e-12)
        p = f"{t}.encoder.layer.{i}"
        h = linear(f"{p}.output.dense", F.gelu(linear(f"{p}.intermediate.dense", y)))
        y = norm(f"{p}.output.LayerNorm", y + h, 1e-12)
    return (chain(state, y[:, 0], "mlp.layers.") - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-image-reward")
    words = sorted({word for prompt in PROMPTS for word in prompt.lower().replace("!", " !").split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    state = random_state(len(words) + 2)
    torch.save(state, folder / "ImageReward.pt")
    return folder, state, tokenizer


@pytest.fixture(scope="module")
def score(tiny):
    return image_reward.load(model=tiny[0], tokenizer=tiny[0])


def test_image_reward_equals_blip_written_out(tiny, score):
    _, state, tokenizer = tiny
    got = score({"image": PICTURES}, PROMPTS, [{}] * 5)
    pixels = torch.stack([by_hand(image, SIZE, SIZE) for image in PICTURES])
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert len({len(row) for row in ids}) > 2 and tokenizer.unk_token_id not in ids[0]
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in ids])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (35 - len(row)) for row in ids])
    expected = image_reward_by_definition(state, pixels, ids, mask)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    other_prompt = image_reward_by_definition(state, pixels, ids.roll(1, 0), mask.roll(1, 0))
    other_picture = image_reward_by_definition(state, pixels.roll(1, 0), ids, mask)
    assert (other_prompt - expected).abs().min() > 1e-3 and (other_picture - expected).abs().min() > 1e-3


def test_image_reward_contract(score):
    assert score.needs == ("image",)
    call, images, prompts, _ = check_contract(score)
    check_prompts(score, call, images, prompts)


def test_image_reward_cuts_prompts_at_35_tokens(score):
    image = {"image": [PICTURES[0]] * 3}
    got = score(image, ["red " * 33, "red " * 33 + "circle", "red " * 32 + "circle"], [{}] * 3)  # and [CLS], [SEP]
    assert got[0] == pytest.approx(got[1].item(), abs=1e-6) and (got[0] - got[2]).abs() > 1e-4


def test_image_reward_names_what_is_wrong_with_its_files(tiny, tmp_path):
    folder, state, tokenizer = tiny
    layer = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    broken = [
        ({key: tensor for key, tensor in state.items() if key != layer}, "missing keys .*crossattention.self.key.bias"),
        (state | {"blip.visual_encoder.surplus": torch.zeros(1)}, "unexpected keys surplus"),
        (
            {key: tensor for key, tensor in state.items() if not key.startswith("mlp.")},
            "no tensor 'mlp.layers.0.weight'",
        ),
        ({key: tensor for key, tensor in state.items() if "visual" not in key}, "no tensor 'patch_embed.proj.weight'"),
    ]
    for weights, why in broken:
        torch.save(weights, tmp_path / "weights.pt")
        with pytest.raises(RuntimeError, match=f"image_reward: cannot load .*{why}") as error:
            image_reward.load(model=tmp_path / "weights.pt", tokenizer=folder)
        assert len(str(error.value).splitlines()) == 1
    BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="tokenizer of 5 tokens, text model of"):
        image_reward.load(model=folder, tokenizer=tmp_path)


def test_image_reward_offline_says_what_to_download(monkeypatch, tmp_path):
    check_offline(image_reward.load, ["google-bert/bert-base-uncased"], monkeypatch, tmp_path)
    check_offline(image_reward.load, ["THUDM/ImageReward ImageReward.pt"], monkeypatch, tmp_path)


def test_published_scores_of_image_reward():
    """The README of ImageReward: its assets/images/1.webp to 4.webp under one prompt."""
    folder = os.environ.get("IMAGE_REWARD_PICTURES")
    if folder is None:
        pytest.skip(
            "needs IMAGE_REWARD_PICTURES = assets/images of github.com/THUDM/ImageReward, and THUDM/ImageReward"
        )
    try:
        score = image_reward.load()
    except RuntimeError as error:
        pytest.skip(str(error))
    images = [np.array(Image.open(os.path.join(folder, f"{i}.webp")).convert("RGB")) for i in (1, 2, 3, 4)]
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    expected = torch.tensor([0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492])
    torch.testing.assert_close(score({"image": images}, [prompt] * 4, [{}] * 4), expected, atol=5e-3, rtol=0)
