import io
import json
import math

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
)

from rewards import aesthetic, clip, dino, hps, siglip

SIZE, PATCH = 28, 14  # of the tiny models' pictures
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a red circle", "two blue squares left of a green triangle", "", "A Red  Circle!", "seven cats"]
SIZES = [(40, 40), (28, 28), (33, 71), (90, 31), (7, 9)]  # H, W: larger, equal, wide, tall, smaller than the model's


def picture(seed, height=24, width=24):
    """Coarse colour blocks, so that pictures differ after the resize too."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


PICTURES = [picture(i, *size) for i, size in enumerate(SIZES)]
SOURCES = [picture(50 + i, *size) for i, size in enumerate(SIZES)]
CAPTIONS = [{"caption": "a circle", "target_caption": prompt} for prompt in PROMPTS]


def by_hand(image, size, crop, mean=MEAN, std=STD):
    """Shortest side to `size`, bicubic; the centre `crop`; mean and std: the pixels [3, crop, crop], written out."""
    height, width = image.shape[:2]
    new = (size, int(size * height / width)) if width < height else (int(size * width / height), size)  # W, H
    resized = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))
    top, left = (new[1] - crop) // 2, (new[0] - crop) // 2
    x = resized[top : top + crop, left : left + crop] / 255.0
    return torch.tensor((x - mean) / std).float().permute(2, 0, 1)


def spread(model, factor=4):
    """Freshly initialised towers hardly see their input; larger weights spread the scores."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    return model.eval()


def save_bpe(folder):
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([p.lower() for p in PROMPTS] * 2, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocabulary = sorted(trained["vocab"], key=trained["vocab"].get) + specials  # CLIP's are the last two
    merges = [tuple(m) for m in trained["merges"]]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(specials) == [len(tokenizer) - 2, len(tokenizer) - 1]
    return tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny CLIP of random weights in the real format, the model, its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    tokenizer = save_bpe(folder)
    bos, eos = len(tokenizer) - 2, len(tokenizer) - 1
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, **sizes}
    vision = {"image_size": SIZE, "patch_size": PATCH, **sizes}
    torch.manual_seed(0)
    model = spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))
    model.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE, "resample": 3}
    processor |= {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    processor |= {"image_mean": MEAN.tolist(), "image_std": STD.tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model, tokenizer


def embeddings(tiny, images, texts):
    """(image [B, D], text [B, D]) of unit length, by the whole model's own forward."""
    _, model, tokenizer = tiny
    tokens = tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=torch.stack([by_hand(image, SIZE, SIZE) for image in images]))
    return out.image_embeds, out.text_embeds


# ---------------------------------------------------------------------------------------------------------------------
# clipscore, clip_sim, clip_direction


def test_clipscore_is_the_cosine_of_the_models_embeddings(tiny):
    got = clip.load(model=tiny[0])({"image": PICTURES}, PROMPTS, [{}] * 5)
    images, texts = embeddings(tiny, PICTURES, PROMPTS)
    torch.testing.assert_close(got, (images * texts).sum(-1), atol=1e-6, rtol=0)
    cosines = images @ texts.T  # neither picture nor prompt is interchangeable
    assert cosines.std(0).min() > 1e-3 and cosines.std(1).min() > 1e-3


def test_clip_sim_compares_the_picture_of_its_role_with_the_source(tiny):
    score, cycle = clip.load_sim(model=tiny[0]), clip.load_recon_sim(model=tiny[0])
    assert score.needs == ("image", "source") and cycle.needs == ("recon", "source")
    images, sources = (embeddings(tiny, pictures, PROMPTS)[0] for pictures in (PICTURES, SOURCES))
    samples = {"image": PICTURES, "source": SOURCES, "recon": SOURCES[::-1]}
    got = score(samples, PROMPTS, [{}] * 5)
    torch.testing.assert_close(got, (images * sources).sum(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(cycle(samples, [""] * 5, None), (sources.flip(0) * sources).sum(-1), atol=1e-6, rtol=0)
    same = score({"image": SOURCES, "source": SOURCES}, PROMPTS, [{}] * 5)
    torch.testing.assert_close(same, torch.ones(5), atol=1e-6, rtol=0)
    assert got.max() < 0.99


def test_clip_direction_is_the_cosine_of_two_differences(tiny):
    got = clip.load_direction(model=tiny[0])({"image": PICTURES, "source": SOURCES}, PROMPTS, CAPTIONS)
    images, wanted = embeddings(tiny, PICTURES, PROMPTS)
    sources, captions = embeddings(tiny, SOURCES, ["a circle"] * 5)
    a, b = (images - sources).double(), (wanted - captions).double()
    torch.testing.assert_close(got.double(), (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)), atol=1e-5, rtol=0)
    assert got.std() > 1e-2


def test_clip_direction_without_a_direction(tiny):
    score = clip.load_direction(model=tiny[0])
    unedited = score({"image": SOURCES, "source": SOURCES}, PROMPTS, CAPTIONS)
    torch.testing.assert_close(unedited, torch.zeros(5), atol=2e-3, rtol=0)
    # Nor does the smallest change, one level of one pixel, point anywhere at full length.
    touched = [source ^ (np.arange(source.size).reshape(source.shape) == 0) for source in SOURCES]
    images, wanted = embeddings(tiny, touched, PROMPTS)
    sources, captions = embeddings(tiny, SOURCES, ["a circle"] * 5)
    moved, wanted = (images - sources).double(), (wanted - captions).double()
    assert 1e-4 < moved.norm(dim=-1).max() < 1e-3
    got = score({"image": touched, "source": SOURCES}, PROMPTS, CAPTIONS)
    expected = (moved * wanted).sum(-1) / (1e-3 * wanted.norm(dim=-1))
    torch.testing.assert_close(got.double(), expected, atol=5e-3, rtol=0)
    metadata = [*CAPTIONS[:4], {"caption": "a circle", "target_caption": "a circle"}]
    got = score({"image": PICTURES, "source": SOURCES}, PROMPTS, metadata)
    assert got.isnan().tolist() == [False] * 4 + [True]
    with pytest.raises(ValueError, match="metadata 1 needs 'caption' and 'target_caption', has .'caption'."):
        score({"image": PICTURES[:2], "source": SOURCES[:2]}, PROMPTS[:2], [CAPTIONS[0], {"caption": "x"}])
    with pytest.raises(ValueError, match="clip_direction: 2 pictures for 0 captions"):
        score({"image": PICTURES[:2], "source": SOURCES[:2]}, PROMPTS[:2], None)


def test_rewards_on_one_clip_load_it_once(tiny):
    assert clip.shared_clip(tiny[0], "cpu") is clip.shared_clip(tiny[0], "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# hpsv2: letterbox and the names of open_clip


def test_letterbox_of_a_picture_of_its_size_is_only_normalised():
    image = picture(0, SIZE, SIZE)
    expected = torch.tensor((image / 255.0 - MEAN) / STD).float().permute(2, 0, 1)
    torch.testing.assert_close(hps.letterbox(Image.fromarray(image), SIZE), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "size, inside",  # H, W -> rows, columns and where they start; the odd bar is behind
    [
        ((576, 1024), (126, 224, 49, 0)),
        ((1024, 577), (224, 126, 0, 49)),
        ((100, 224), (100, 224, 62, 0)),  # nothing to resize, but to pad
        ((301, 300), (224, 223, 0, 0)),
        ((1, 1000), (1, 224, 111, 0)),
        ((64, 64), (224, 224, 0, 0)),
    ],
)
def test_letterbox_resizes_the_longest_side_and_pads_with_black(size, inside):
    rows, columns, top, left = inside
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    got = hps.letterbox(Image.fromarray(image), 224).permute(1, 2, 0).double() * torch.tensor(STD) + torch.tensor(MEAN)
    # PIL resizes single channels of floats without rounding or clamping: the same filter in another program.
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    channels = [np.asarray(c.resize((columns, rows), Image.Resampling.BICUBIC)) / 255 for c in channels]
    expected = torch.zeros(224, 224, 3, dtype=torch.float64)
    expected[top : top + rows, left : left + columns] = torch.tensor(np.stack(channels, -1))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def open_clip_state(vocabulary):
    """Random tensors under the names of open_clip's ViT-H-14, small: heads 80 and 64 wide, 2 of each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0, mean=0.0):
        return torch.randn(shape, generator=generator) * std + mean

    state = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": normal(77, 128),
        "token_embedding.weight": normal(vocabulary, 128),
        "ln_final.weight": normal(128, mean=1, std=0.2),
        "ln_final.bias": normal(128, std=0.2),
        "text_projection": normal(128, 16, std=128**-0.5),
        "visual.class_embedding": normal(160),
        "visual.positional_embedding": normal(5, 160),
        "visual.conv1.weight": normal(160, 3, PATCH, PATCH, std=0.1),
        "visual.proj": normal(160, 16, std=160**-0.5),
    }
    for norm in ("visual.ln_pre", "visual.ln_post"):
        state |= {f"{norm}.weight": normal(160, mean=1, std=0.2), f"{norm}.bias": normal(160, std=0.2)}
    for prefix, width, layers in (("visual.transformer", 160, 2), ("transformer", 128, 3)):
        for i in range(layers):
            for name, *shape in (
                ("attn.in_proj_weight", 3 * width, width),
                ("attn.in_proj_bias", 3 * width),
                ("attn.out_proj.weight", width, width),
                ("attn.out_proj.bias", width),
                ("mlp.c_fc.weight", 2 * width, width),
                ("mlp.c_fc.bias", 2 * width),
                ("mlp.c_proj.weight", width, 2 * width),
                ("mlp.c_proj.bias", width),
                ("ln_1.weight", width),
                ("ln_1.bias", width),
                ("ln_2.weight", width),
                ("ln_2.bias", width),
            ):
                std = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
                mean = 1 if name in ("ln_1.weight", "ln_2.weight") else 0
                state[f"{prefix}.resblocks.{i}.{name}"] = normal(*shape, std=std, mean=mean)
    return state


def open_clip_embedding(state, x, prefix, head, causal):
    """The transformer of open_clip from its definition: pre-norm blocks, fused q k v, gelu."""
    tower = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    batch, length, width = x.shape
    for i in range(len([key for key in tower if key.endswith("ln_1.weight")])):
        p = {key.removeprefix(f"{i}."): tensor for key, tensor in tower.items() if key.startswith(f"{i}.")}
        h = F.layer_norm(x, (width,), p["ln_1.weight"], p["ln_1.bias"])
        h = h @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]
        q, k, v = h.view(batch, length, 3, width // head, head).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / math.sqrt(head)
        if causal:
            logits = logits + torch.full((length, length), -math.inf).triu(1)
        h = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + h @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        h = F.layer_norm(x, (width,), p["ln_2.weight"], p["ln_2.bias"])
        h = F.gelu(h @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"])
        x = x + h @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return x


def open_clip_score(state, images, ids):
    """Cosines [B] of pixels [B, 3, H, W] and token ids [B, 77], end token the largest id."""
    x = F.conv2d(images, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (160,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = open_clip_embedding(state, x, "visual.transformer.resblocks.", 80, causal=False)[:, 0]
    x = F.layer_norm(x, (160,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"]
    y = open_clip_embedding(state, y, "transformer.resblocks.", 64, causal=True)
    y = F.layer_norm(y, (128,), state["ln_final.weight"], state["ln_final.bias"])
    y = y[torch.arange(len(y)), ids.argmax(-1)] @ state["text_projection"]
    return F.cosine_similarity(x, y)


@pytest.fixture(scope="module")
def hps_folder(tiny, tmp_path_factory):
    """A folder of checkpoints as xswu/HPSv2 has them: fp16, v2 and v2.1 of different weights."""
    folder = tmp_path_factory.mktemp("tiny-hps")
    state = {key: tensor.half() for key, tensor in open_clip_state(len(tiny[2])).items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "HPS_v2_compressed.pt")
    shuffled = state | {"visual.proj": state["visual.proj"].flip(0).clone()}
    torch.save({"state_dict": shuffled}, folder / "HPS_v2.1_compressed.pt")
    save_file({f"model.{key}": tensor for key, tensor in state.items()}, folder / "mirror.safetensors")
    return folder, state, shuffled


def test_hpsv2_equals_open_clip_written_out(tiny, hps_folder):
    folder, state, shuffled = hps_folder
    ids = tiny[2](PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    ids = torch.where((ids == ids.max()).cumsum(1) > 1, 0, ids)  # open_clip pads with 0, transformers with the end
    pixels = torch.stack([hps.letterbox(Image.fromarray(image), SIZE) for image in PICTURES])
    args = {"image": PICTURES}, PROMPTS, [{}] * 5
    for loader, weights in ((hps.load, state), (hps.load_v21, shuffled)):
        got = loader(model=folder, processor=tiny[0])(*args)
        expected = open_clip_score({key: tensor.float() for key, tensor in weights.items()}, pixels, ids)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert expected.std() > 0.05

    v2 = hps.load(model=folder, processor=tiny[0])(*args)
    mirror = hps.load(model=folder / "mirror.safetensors", processor=tiny[0])(*args)  # names under "model."
    torch.testing.assert_close(mirror, v2, atol=0, rtol=0)


def test_hpsv2_sees_the_sides_that_the_centre_crop_cuts(tiny, hps_folder):
    wide = [np.full((30, 90, 3), 128, np.uint8) for _ in range(2)]
    wide[1][:, :20] = 0
    prompts = ["a red circle"] * 2
    seen = hps.load(model=hps_folder[0], processor=tiny[0])({"image": wide}, prompts, [{}] * 2)
    cut = clip.load(model=tiny[0])({"image": wide}, prompts, [{}] * 2)
    assert (seen[0] - seen[1]).abs() > 1e-3 and (cut[0] - cut[1]).abs() < 1e-6


def test_hpsv2_names_what_is_wrong_with_a_checkpoint(tiny, hps_folder, tmp_path):
    folder, state, _ = hps_folder
    file = tmp_path / "weights.pt"
    broken = [
        ({key: tensor for key, tensor in state.items() if "1.ln_2.bias" not in key}, "missing keys .*layer_norm2.bias"),
        (state | {"surplus": torch.zeros(1)}, "unexpected keys surplus"),
        ({key: tensor for key, tensor in state.items() if key != "visual.conv1.weight"}, "no tensor 'visual.conv1"),
        (state | {"ln_final.bias": torch.zeros(5)}, "ln_final|final_layer_norm|mismatch|size"),
    ]
    for weights, why in broken:
        torch.save(weights, file)
        with pytest.raises(RuntimeError, match=f"hpsv2: cannot load .*{why}") as error:
            hps.load(model=file, processor=tiny[0])
        assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# aesthetic


def head_state(width=16):
    generator = torch.Generator().manual_seed(0)
    sizes = [width, 1024, 128, 64, 16, 1]
    state = {}
    for i, outputs, inputs in zip((0, 2, 4, 6, 7), sizes[1:], sizes):
        state[f"layers.{i}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        state[f"layers.{i}.bias"] = torch.randn(outputs, generator=generator)
    return state


def chain(state, x, prefix="layers."):
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"{prefix}{i}.weight"].to(x).T + state[f"{prefix}{i}.bias"].to(x)
    return x[..., 0]


def test_collapsed_head_equals_the_chain_of_layers():
    state = head_state(768)
    w, b = aesthetic.collapse(state, "layers.")
    x = torch.randn(7, 768, dtype=torch.float64)
    torch.testing.assert_close(x @ w + b, chain(state, x), atol=1e-12, rtol=1e-12)
    with pytest.raises(KeyError, match="head.0.weight"):
        aesthetic.collapse(state, "head.")


def test_aesthetic_is_the_head_on_the_unit_embedding(tiny, tmp_path):
    torch.save(head_state(), tmp_path / "aesthetic-model.pth")
    got = aesthetic.load(model=tiny[0], head=tmp_path)({"image": PICTURES}, PROMPTS, [{}] * 5)
    expected = chain(head_state(), embeddings(tiny, PICTURES, PROMPTS)[0].double())
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert got.std() > 1e-2

    torch.save(head_state(768), tmp_path / "large.pth")
    with pytest.raises(RuntimeError, match="aesthetic: .*768 numbers and .* gives 16"):
        aesthetic.load(model=tiny[0], head=tmp_path / "large.pth")


class Malicious:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_with_code_in_them_are_refused(tiny, tmp_path, capsys):
    torch.save({"layers.0.weight": Malicious()}, tmp_path / "head.pth")
    with pytest.raises(RuntimeError, match="head.pth is not a file of tensors .UnpicklingError"):
        aesthetic.load(model=tiny[0], head=tmp_path / "head.pth")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="empty.safetensors is not a file of tensors"):
        aesthetic.load(model=tiny[0], head=tmp_path / "empty.safetensors")
    assert "must not run" not in capsys.readouterr().out


def test_published_aesthetic_head():
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(aesthetic.HEAD, "aesthetic-model.pth", local_files_only=True)
    except OSError:
        pytest.skip(f"needs aesthetic-model.pth of {aesthetic.HEAD}")
    w, b = aesthetic.collapse(clip.read_weights(path, ""), "layers.")
    assert b.item() == pytest.approx(5.236645844819847, abs=1e-6)
    assert w.norm().item() == pytest.approx(17.99562477643365, abs=1e-6)
    assert (w.sum() / 768**0.5 + b).item() == pytest.approx(4.88328485, abs=1e-6)
    assert (w[0] + b).item() == pytest.approx(4.54505253, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# siglip


@pytest.fixture(scope="module")
def tiny_siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-siglip")
    pieces = {"vocab_size": 60, "model_type": "unigram", "hard_vocab_limit": False, "minloglevel": 2}
    pieces |= {"pad_id": -1, "bos_id": -1, "eos_id": 1, "unk_id": 2, "unk_piece": "<unk>"}
    text = iter([prompt.lower() for prompt in PROMPTS if prompt] * 20)
    prefix = str(folder / "spiece")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=prefix, **pieces)
    tokenizer = SiglipTokenizer(vocab_file=f"{prefix}.model", do_lower_case=False)  # the reward does it
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **sizes}
    vision = {"image_size": SIZE, "patch_size": PATCH, **sizes}
    torch.manual_seed(0)
    model = spread(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), 2)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIZE, "width": SIZE}}
    processor |= {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model, tokenizer


def test_siglip_is_the_cosine_behind_the_models_logits(tiny_siglip):
    folder, model, tokenizer = tiny_siglip
    got = siglip.load(model=folder)({"image": PICTURES}, PROMPTS, [{}] * 5)
    pixels = []
    for image in PICTURES:  # squeezed into a square, nothing cut
        squeezed = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        pixels.append(torch.tensor(squeezed / 127.5 - 1).float().permute(2, 0, 1))
    ids = [tokenizer(prompt.lower()).input_ids for prompt in PROMPTS]
    ids = [row if len(row) <= 16 else row[:15] + row[-1:] for row in ids]  # the end token outlives the cut
    assert max(map(len, ids)) == 16
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (16 - len(row)) for row in ids])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.stack(pixels)).logits_per_image
        cosines = (logits - model.logit_bias) / model.logit_scale.exp()
    torch.testing.assert_close(got, cosines.diagonal(), atol=2e-6, rtol=0)
    assert cosines.std(0).min() > 1e-3 and cosines.std(1).min() > 1e-3
    assert got[0] != got[3]  # another picture
    upper = siglip.load(model=folder)({"image": PICTURES}, [prompt.upper() for prompt in PROMPTS], [{}] * 5)
    torch.testing.assert_close(upper, got, atol=0, rtol=0)


def test_siglip_refuses_naflex(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(RuntimeError, match="siglip: .*model_type is 'siglip2'"):
        siglip.load(model=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# dino


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = spread(Dinov2Model(Dinov2Config(image_size=SIZE, patch_size=PATCH, **sizes)), 10)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "resample": 3}
    processor |= {"crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True}
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, model


def test_dino_is_the_cosine_of_the_normed_class_tokens(tiny_dino):
    folder, model = tiny_dino
    score, cycle = dino.load(model=folder), dino.load(model=folder, role="recon")
    assert score.needs == ("image", "source") and cycle.needs == ("recon", "source")
    got = score({"image": PICTURES, "source": SOURCES}, PROMPTS, [{}] * 5)
    constants = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        image, source = (
            model(torch.stack([by_hand(x, 32, SIZE, *constants) for x in pictures])).last_hidden_state[:, 0]
            for pictures in (PICTURES, SOURCES)
        )
    torch.testing.assert_close(got, F.cosine_similarity(image, source), atol=2e-6, rtol=0)
    assert got.std() > 1e-3
    same = cycle({"recon": SOURCES, "source": SOURCES}, PROMPTS, None)
    torch.testing.assert_close(same, torch.ones(5), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# the contract, for each of them


@pytest.fixture(
    scope="module", params=["clipscore", "clip_sim", "clip_direction", "hpsv2", "aesthetic", "siglip", "dino"]
)
def score(request, tiny, tmp_path_factory):
    folder = tiny[0]
    if request.param == "aesthetic":
        head = tmp_path_factory.mktemp("head") / "head.pth"
        torch.save(head_state(), head)
        return aesthetic.load(model=folder, head=head)
    if request.param == "hpsv2":
        return hps.load(model=request.getfixturevalue("hps_folder")[0], processor=folder)
    if request.param == "siglip":
        return siglip.load(model=request.getfixturevalue("tiny_siglip")[0])
    if request.param == "dino":
        return dino.load(model=request.getfixturevalue("tiny_dino")[0])
    loaders = {"clipscore": clip.load, "clip_sim": clip.load_sim, "clip_direction": clip.load_direction}
    return loaders[request.param](model=folder)


def check_contract(score):
    """Values per row do not depend on the batch, its order or PNG; rows that are not samples are NaN, alone."""
    n = 37  # one batch of 32 and a rest of 5
    images, sources = ([picture(seed + i, 30 + i, 50 - i) for i in range(n)] for seed in (0, 100))
    prompts = [PROMPTS[i % 5] for i in range(n)]
    metadata = [{"caption": "a circle", "target_caption": PROMPTS[i % 5]} for i in range(n)]

    def call(images, rows=range(n), sources=sources, prompts=prompts):
        samples = {"image": [images[i] for i in rows], "source": [sources[i] for i in rows]}
        return score(samples, [prompts[i] for i in rows], [metadata[i] for i in rows])

    got = call(images)
    assert got.dtype == torch.float32 and got.shape == (n,) and got.device.type == "cpu" and got.isfinite().all()
    assert score.strict is None and got.std() > 1e-3
    single = torch.cat([call(images, [i]) for i in range(0, n, 4)])
    torch.testing.assert_close(single, got[::4], atol=1e-5, rtol=0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(call(images, order), got[order], atol=1e-5, rtol=0)
    assert call([], []).shape == (0,)

    def through_png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        return np.asarray(Image.open(file))

    torch.testing.assert_close(call([through_png(image) for image in images]), got, atol=0, rtol=0)

    bad = {1: None, 4: images[4] / 255, 6: images[6][..., 0], 8: np.dstack([images[8]] * 2)[..., :4], 9: images[9][:0]}
    expected = got.clone()
    expected[list(bad)] = torch.nan
    mixed = call([bad.get(i, image) for i, image in enumerate(images)])
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0, equal_nan=True)
    assert call([None] * n).isnan().all()
    if "source" in score.needs:
        no_source = [None if i == 3 else source for i, source in enumerate(sources)]
        assert call(images, sources=no_source).isnan().nonzero().tolist() == [[3]]
        with pytest.raises(ValueError, match="2 pictures for 1 sources"):
            score({"image": images[:2], "source": sources[:1]}, prompts[:2], metadata[:2])
    return call, images, prompts, metadata


def test_contract(score, request):
    call, images, prompts, metadata = check_contract(score)
    if "clipscore" in request.node.name or "hpsv2" in request.node.name or "siglip" in request.node.name:
        check_prompts(score, call, images, prompts)


def check_prompts(score, call, images, prompts):
    wrong = [5 if i == 2 else prompt for i, prompt in enumerate(prompts)]
    assert call(images, prompts=wrong).isnan().nonzero().tolist() == [[2]]
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        score({"image": images[:2]}, prompts[:1], [{}])
    long = "red circle " * 200
    got = score({"image": images[:1] * 3}, [long, long + "blue squares", "blue " + long], [{}] * 3)
    assert got.isfinite().all() and got[0] == pytest.approx(got[1].item(), abs=1e-6)  # behind the cut
    assert (got[0] - got[2]).abs() > 1e-4  # before it


@pytest.mark.parametrize(
    "load, wanted",
    [
        (clip.load, ["openai/clip-vit-large-patch14"]),
        (clip.load_sim, ["openai/clip-vit-large-patch14"]),
        (clip.load_direction, ["openai/clip-vit-large-patch14"]),
        (hps.load, ["xswu/HPSv2 HPS_v2_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        (hps.load_v21, ["xswu/HPSv2 HPS_v2.1_compressed.pt", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        (aesthetic.load, ["openai/clip-vit-large-patch14"]),
        (siglip.load, ["google/siglip-so400m-patch14-384"]),
        (dino.load, ["facebook/dinov2-base"]),
    ],
)
def test_offline_says_what_to_download(load, wanted, monkeypatch, tmp_path):
    check_offline(load, wanted, monkeypatch, tmp_path)


def test_aesthetic_offline_says_where_the_head_is(tiny, monkeypatch, tmp_path):
    wanted = ["trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth"]
    check_offline(lambda: aesthetic.load(model=tiny[0]), wanted, monkeypatch, tmp_path)


def check_offline(load, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # nothing cached
    with pytest.raises(RuntimeError) as error:
        load()
    message = str(error.value)
    assert all(f"hf download {what}" in message for what in wanted)
    assert len(message.splitlines()) == 2 and error.value.__suppress_context__
