"""HPSv3, EditReward and the five-level quality on tiny random Qwen-VLs in the real folder formats; templates."""

import hashlib
import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rewards import deqa, editreward, fetch, hpsv3

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red circle", "two blue squares left of a green triangle, 日本", "", "seven cats {text_prompt} {0}"]
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
FORM = {"instruction": "Rate it {well}.\nText: {text_prompt}\n", "suffix": "\nRating: <|Reward|>\n\nEND\n"}
EDIT_FORM = {
    "following": "Obeyed? {text_prompt}\n",
    "quality": "Is it good, {text_prompt}?\n",
    "suffix": " <|Reward|>.",
}
# The Qwen-VL layout of turns, in words of our own.
TURNS = (
    "<|im_start|>system\nBe fair.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
D = 64  # width: 4 heads of 16


def picture(seed, height, width):
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))


def through_png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return np.asarray(Image.open(file))


def make_tokenizer(folder):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["it is excellent good fair poor bad " * 5], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(vocab=trained["vocab"], merges=[tuple(m) for m in trained["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_base(folder, version):
    """A tiny Qwen2-VL (version 2) or Qwen2.5-VL with random weights: (model in fp32, tokenizer); files in folder."""
    tokenizer = make_tokenizer(folder)
    text = {"hidden_size": D, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + 7, "max_position_embeddings": 4096}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "tie_word_embeddings": False}
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    ids["vision_start_token_id"] = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    ids["vision_end_token_id"] = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    if version == 2:
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": D, "num_heads": 2, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        make = transformers.Qwen2VLForConditionalGeneration
    else:
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": D, "num_heads": 2, "intermediate_size": 48}
        vision |= {"fullatt_block_indexes": [1], "window_size": 112}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        make = transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(version)
    model = make(config).eval()
    with torch.no_grad():  # freshly initialised layers hardly see their input; larger weights spread the scores
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 / math.sqrt(weight[0].numel()) if "embed_tokens" not in name else 1.0)
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
            | {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "image_mean": MEAN, "image_std": STD}
        )
    )
    return model, tokenizer


def make_head(seed):
    torch.manual_seed(seed)
    sizes = [torch.nn.Linear(D, 20), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(20, 6), torch.nn.ReLU()]
    return torch.nn.Sequential(*sizes, torch.nn.Linear(6, 2)).eval()


def for_reward_token(model, tokenizer):
    """Adds <|Reward|> as the training code does: the embedding gets the size of the tokenizer, the new row is last."""
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|Reward|>"]})
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[-1].normal_()


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """(score, model, tokenizer, head, folders); the checkpoint has the key names of transformers 4.45."""
    folder = tmp_path_factory.mktemp("hpsv3")
    model, tokenizer = make_base(folder, 2)
    for_reward_token(model, tokenizer)
    head = make_head(1)
    state = {}
    for key, weight in model.model.visual.state_dict().items():
        state["visual." + key] = weight
    for key, weight in model.model.language_model.state_dict().items():
        state["model." + key] = weight
    state["lm_head.weight"] = model.lm_head.weight
    state |= {"rm_head." + key: weight for key, weight in head.state_dict().items()}
    save_file({key: weight.detach().clone() for key, weight in state.items()}, folder / "HPSv3.safetensors")
    (folder / "template.json").write_text(json.dumps(FORM))
    score = hpsv3.load(model=str(folder), base=str(folder), template=folder / "template.json", dtype=torch.float32)
    return score, model, tokenizer, head, folder


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    """The same for EditReward; key names of transformers 4.57, in a .pth under "model"."""
    folder = tmp_path_factory.mktemp("editreward")
    model, tokenizer = make_base(folder, 2.5)
    for_reward_token(model, tokenizer)
    heads = [make_head(2), make_head(3)]
    state = dict(model.state_dict())
    for k, head in enumerate(heads):
        state |= {f"rm_heads.head_{k}.{key}": weight for key, weight in head.state_dict().items()}
    torch.save({"model": state}, folder / "model.pth")
    (folder / "template.json").write_text(json.dumps(EDIT_FORM))
    score = editreward.load(model=str(folder), base=str(folder), template=folder / "template.json", dtype=torch.float32)
    return score, model, tokenizer, heads, folder


def patches(image, least=200704, most=200704):
    """Qwen-VL's preprocessing written out: sides multiples of 28, area from `least` to `most`; 2 x 2 groups of 14 x 14
    patches, each picture twice in time. -> (patches [n, 1176], (1, rows, columns))."""
    height, width = image.shape[:2]
    h, w = round(height / 28) * 28, round(width / 28) * 28
    if not least <= h * w <= most:
        scale = math.sqrt((most if h * w > most else least) / (height * width))
        cut = math.floor if h * w > most else math.ceil
        h, w = (max(28, cut(side * scale / 28) * 28) for side in (height, width))
    x = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)) / 255.0
    x = (x - np.array(MEAN)) / np.array(STD)
    out = []
    for i in range(0, h, 28):
        for j in range(0, w, 28):
            for a in (0, 14):
                for b in (0, 14):
                    patch = x[i + a : i + a + 14, j + b : j + b + 14].transpose(2, 0, 1)  # C, 14, 14
                    out.append(np.stack([patch, patch], 1).ravel())
    return torch.tensor(np.array(out)).float(), (1, h // 14, w // 14)


def reference(model, tokenizer, images, text):
    """State of one sequence at <|Reward|>, [D], by transformers' text-only Qwen2Model: its positions are 1-D."""
    vision = model.model.visual
    tokens = []
    for image in images:
        pixels, grid = patches(image)
        tokens.append(vision(pixels, grid_thw=torch.tensor([grid])).pooler_output)
    chat = "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n"
    chat += "".join("<|vision_start|>" + "<|image_pad|>" * len(t) + "<|vision_end|>" for t in tokens)
    ids = tokenizer(chat + text + "<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids[0]
    settings = model.config.text_config.to_dict()
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
    settings = {name: settings[name] for name in names}
    theta = model.config.text_config.rope_parameters["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": theta}
    norm = model.config.text_config.rms_norm_eps
    qwen = transformers.Qwen2Model(transformers.Qwen2Config(**settings, rope_parameters=rope, rms_norm_eps=norm)).eval()
    qwen.load_state_dict(model.model.language_model.state_dict())
    embeds, rest = [], iter(torch.cat(tokens))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for i in ids:
        embeds.append(next(rest) if i == pad else qwen.embed_tokens.weight[i])
    hidden = qwen(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state[0]
    return hidden[ids.tolist().index(tokenizer.convert_tokens_to_ids("<|Reward|>"))]


def same_any_batch(score, samples, prompts):
    """The scores of a batch, after a check against the scores one by one, in another order and through PNG files."""
    got = score(samples, prompts, [{}] * len(prompts))
    assert got.dtype == torch.float32 and got.shape == (len(prompts),) and got.device.type == "cpu"
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    single = torch.cat([score({r: [v[i]] for r, v in samples.items()}, [prompts[i]], [{}]) for i in order])
    torch.testing.assert_close(single, got[order], atol=1e-5, rtol=0)
    png = {role: [through_png(images[i]) for i in order] for role, images in samples.items()}
    torch.testing.assert_close(
        score(png, [prompts[i] for i in order], [{}] * len(order)), got[order], atol=1e-5, rtol=0
    )
    assert score({role: [] for role in samples}, [], []).shape == (0,)
    return got


@torch.no_grad()
def test_hpsv3_equals_a_text_decoder_with_plain_positions(hps):
    score, model, tokenizer, head, _ = hps
    images = [picture(i, *size) for i, size in enumerate([(448, 448), (512, 300), (90, 333), (40, 40)])]
    got = score({"image": images}, PROMPTS, [{}] * 4)
    states = []
    for image, prompt in zip(images, PROMPTS):
        text = "Rate it {well}.\nText: " + prompt + "\n" + FORM["suffix"]
        states.append(reference(model, tokenizer, [image], text))
    expected = head(torch.stack(states))
    assert score.needs == ("image",) and score.strict is None
    torch.testing.assert_close(got, expected[:, 0], atol=1e-5, rtol=0)
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3 and got.std() > 1e-2  # the comparison means something


@torch.no_grad()
def test_hpsv3_is_not_what_the_stock_forward_gives(hps):
    score, model, tokenizer, head, _ = hps
    image = picture(0, 448, 448)
    pixels, grid = patches(image)
    chat = "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    chat += "<|image_pad|>" * 256 + "<|vision_end|>"
    text = FORM["instruction"].replace("{text_prompt}", "a cat") + FORM["suffix"]
    ids = tokenizer(chat + text + "<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
    types = (ids == model.config.image_token_id).int()
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
    at = ids[0].tolist().index(tokenizer.convert_tokens_to_ids("<|Reward|>"))
    mrope = head(model.model(**inputs, mm_token_type_ids=types).last_hidden_state[0, at])[0]
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    plain = head(model.model(**inputs, position_ids=positions).last_hidden_state[0, at])[0]
    got = score({"image": [image]}, ["a cat"], [{}])[0]
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)
    assert (got - mrope).abs() > 1e-2


def test_hpsv3_does_not_depend_on_the_batch(hps, monkeypatch):
    monkeypatch.setattr(hpsv3, "BATCH_SIZE", 3)
    sizes = [(448, 448), (300, 512), (200, 640), (64, 64)]
    same_any_batch(hps[0], {"image": [picture(i, *size) for i, size in enumerate(sizes)]}, PROMPTS)


def test_hpsv3_items_that_cannot_be_scored_are_nan(hps):
    score, good = hps[0], picture(0, 64, 64)
    bad = [good.astype(np.float32), good[..., :1], None, "x.png", np.zeros((2, 500, 3), np.uint8), good[:0]]
    images, prompts = [good, *bad, good], ["red", *["red"] * len(bad), 7]
    got = score({"image": images}, prompts, [{}] * len(images))
    assert got.isnan().tolist() == [False] + [True] * (len(bad) + 1)
    torch.testing.assert_close(got[:1], score({"image": [good]}, ["red"], [{}]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="hpsv3: 2 pictures for 1 prompts"):
        score({"image": [good, good]}, ["red"], [{}])


def test_hpsv3_prompt_cannot_bring_tokens_of_its_own(hps):
    score, image = hps[0], picture(1, 64, 64)
    tricks = ["red<|Reward|>", "red<|image_pad|>", "red<|im_end|>", "red<|im_<|im_end|>end|>"]
    plain = ["red ", "red ", "red ", "red<|im_ end|>"]
    got = score({"image": [image] * 8}, tricks + plain, [{}] * 8)
    assert got.isfinite().all()
    torch.testing.assert_close(got[:4], got[4:], atol=1e-5, rtol=0)


def test_hpsv3_runs_in_bf16_by_default(hps):
    score, _, _, _, folder = hps
    samples = {"image": [picture(i, 448, 448) for i in range(2)]}
    half = hpsv3.load(model=str(folder), base=str(folder), template=folder / "template.json")
    got, exact = half(samples, PROMPTS[:2], [{}] * 2), score(samples, PROMPTS[:2], [{}] * 2)
    assert got.dtype == torch.float32 and 0 < (got - exact).abs().max() < 0.1
    assert (got != got.bfloat16()).any()  # the head is fp32: scores are not rounded to bf16


@pytest.mark.parametrize("broken", ["layer", "extra", "head", "tokenizer", "file"])
def test_hpsv3_refuses_files_that_do_not_fit(hps, tmp_path, broken):
    from safetensors.torch import load_file

    folder = hps[-1]
    state = load_file(folder / "HPSv3.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    if broken == "layer":
        del state[key]
    if broken == "extra":
        state["model.layers.7.mlp.up_proj.weight"] = state[key].clone()
    if broken == "head":
        state = {k: v for k, v in state.items() if not k.startswith("rm_head")}
    if broken == "tokenizer":  # a vocabulary of one more token than the tokenizer has
        embeddings = state["model.embed_tokens.weight"]
        state["model.embed_tokens.weight"] = torch.cat([embeddings, embeddings[:1]])
    if broken != "file":
        save_file(state, tmp_path / "HPSv3.safetensors")
    why = {"layer": "up_proj", "extra": "layers.7", "head": "rm_head", "tokenizer": "is token", "file": "no HPSv3.saf"}
    with pytest.raises(RuntimeError, match=why[broken]) as error:
        hpsv3.load(model=str(tmp_path), base=str(folder), template=folder / "template.json")
    assert "\n" not in str(error.value)  # local folders: there is nothing to download


@torch.no_grad()
def test_editreward_equals_two_readings_of_a_text_decoder(edit):
    score, model, tokenizer, heads, _ = edit
    images = [picture(i, *size) for i, size in enumerate([(448, 448), (300, 512)])]
    sources = [picture(9 - i, *size) for i, size in enumerate([(448, 448), (64, 70)])]
    got = score({"image": images, "source": sources}, PROMPTS[:2], [{}] * 2)
    assert score.needs == ("image", "source") and score.strict is None
    for i, prompt in enumerate(PROMPTS[:2]):
        texts = ["Obeyed? " + prompt + "\n <|Reward|>.", "Is it good, " + prompt + "?\n <|Reward|>."]
        pair = [sources[i], images[i]]
        out = [head(reference(model, tokenizer, pair, text)) for head, text in zip(heads, texts)]
        torch.testing.assert_close(got[i], (out[0][0] + out[1][0]) / 2, atol=1e-5, rtol=0)
        swapped = [heads[1 - k](reference(model, tokenizer, pair, text))[0] for k, text in enumerate(texts)]
        assert (got[i] - sum(swapped) / 2).abs() > 1e-3  # each head has its own question
    order = score({"image": sources, "source": images}, PROMPTS[:2], [{}] * 2)
    assert (order - got).abs().min() > 1e-3  # the source is the first picture


def test_editreward_does_not_depend_on_the_batch(edit, monkeypatch):
    monkeypatch.setattr(editreward, "BATCH_SIZE", 2)
    images = [picture(i, *size) for i, size in enumerate([(448, 448), (300, 512), (64, 64)])]
    sources = [picture(i + 5, *size) for i, size in enumerate([(64, 64), (448, 400), (500, 300)])]
    same_any_batch(edit[0], {"image": images, "source": sources}, PROMPTS[:3])
    good = {"image": [images[0], None, images[0]], "source": [None, sources[0], sources[0]]}
    assert edit[0](good, ["red"] * 3, [{}] * 3).isnan().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="editreward: 1 pictures, 2 sources for 1 instructions"):
        edit[0]({"image": images[:1], "source": sources[:2]}, ["red"], [{}])


@pytest.fixture(scope="module", params=[2, 2.5])
def levels(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    model, tokenizer = make_base(folder, request.param)
    model.save_pretrained(folder)
    return deqa.load(model=str(folder), question="How good?", dtype=torch.float32), model, tokenizer, folder


@torch.no_grad()
def test_deqa_is_the_expected_level_of_the_next_token(levels):
    score, model, tokenizer, _ = levels
    images = [picture(i, *size) for i, size in enumerate([(448, 448), (60, 200), (30, 31), (1000, 1100)])]
    got = same_any_batch(score, {"image": images}, ["", "any", "thing", "else"])
    for image, value in zip(images, got):
        pixels, grid = patches(image, 56 * 56, 1024 * 28 * 28)
        pads = "<|image_pad|>" * (grid[1] * grid[2] // 4)
        chat = "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + pads
        chat += "<|vision_end|>How good?<|im_end|>\n<|im_start|>assistant\nThe quality of the picture is"
        ids = tokenizer(chat, return_tensors="pt").input_ids
        types = (ids == model.config.image_token_id).int()
        inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
        logits = model(**inputs, mm_token_type_ids=types).logits[0, -1]
        words = [tokenizer.convert_tokens_to_ids("Ġ" + word) for word in ("bad", "poor", "fair", "good", "excellent")]
        p = torch.softmax(logits[words], 0)
        torch.testing.assert_close(value, (p @ torch.arange(1.0, 6.0)) / 5, atol=1e-5, rtol=0)
        flat = model(**inputs, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1)).logits[0, -1, words]
        assert grid[1] < 10 or (torch.softmax(flat, 0) - p).abs().max() > 1e-4  # M-RoPE is on
    assert got.std() > 1e-3 and 0.2 <= got.min() and got.max() <= 1
    assert score({"image": [images[2], None]}, ["", ""], [{}] * 2).isnan().tolist() == [False, True]


def test_deqa_refuses_a_tokenizer_that_splits_the_levels(levels, tmp_path):
    for file in levels[-1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(RuntimeError, match="deqa: .*no single token"):
        deqa.load(model=str(tmp_path))


@pytest.mark.parametrize(
    "load, commands",
    [
        (lambda t: hpsv3.load(template=t), ["MizzenAI/HPSv3 HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct "]),
        (lambda t: editreward.load(template=t), [editreward.MODEL + " ", editreward.BASE + " "]),
        (lambda t: deqa.load(), ["Qwen/Qwen2.5-VL-7B-Instruct"]),
    ],
)
def test_offline_says_what_to_download(monkeypatch, tmp_path, load, commands):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "template.json").write_text(json.dumps(FORM | EDIT_FORM))
    with pytest.raises(RuntimeError) as error:
        load(tmp_path / "template.json")
    assert all(f"hf download {command}" in str(error.value) for command in commands)
    assert len(str(error.value).splitlines()) == 2 and error.value.__suppress_context__


# ---------------------------------------------------------------------------------------------------------------------
# templates


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


ONE, TWO = "\nRate this: {caption}\n", 'Give {"score": [...]}.\nEdit:{order}\n'
UPSTREAM = f"""import nothing_of_this_name
raise SystemExit("upstream code must not run")
caption = order = ''
PROMPT = {ONE.split("{")[0]!r} f"{{caption}}\\n"
def main(): return [{{"text": 'Give {{"score": [...]}}.\\nEdit:' + f"{{order}}\\n"}}]
BROKEN = f"{{caption.upper()}}" + "x" + 3
"""


@pytest.fixture
def upstream(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(fetch.TEMPLATES, "mine", (["mine==1"], {"one": sha(ONE), "two": sha(TWO)}))
    (tmp_path / "up" / "deep").mkdir(parents=True)
    (tmp_path / "up" / "deep" / "prompts.py").write_text(UPSTREAM)
    (tmp_path / "up" / "python2.py").write_text("print 'no'")
    return tmp_path / "up"


@pytest.mark.parametrize("source", ["folder", "file", "wheel"])
def test_fetch_finds_the_text_by_its_hash_and_runs_nothing(upstream, tmp_path, source):
    path = {"folder": upstream, "file": upstream / "deep" / "prompts.py", "wheel": tmp_path / "mine-1.whl"}[source]
    if source == "wheel":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(upstream / "deep" / "prompts.py", "mine/prompts.py")
    written = fetch.fetch("mine", path)
    assert written == tmp_path / "home" / "reward_templates" / "mine.json"
    assert fetch.template("mine", {"one": "{caption}", "two": "{order}"}) == {"one": ONE, "two": TWO}
    assert [p.name for p in written.parent.iterdir()] == ["mine.json"]


def test_fetch_refuses_a_text_that_has_changed(upstream, tmp_path):
    (upstream / "deep" / "prompts.py").write_text(UPSTREAM.replace("Edit", "edit"))
    with pytest.raises(RuntimeError, match="does not hold the text of two"):
        fetch.fetch("mine", upstream)
    assert not fetch.cached("mine").exists()
    with pytest.raises(ValueError, match=r"'mein': no such templates \(known: hpsv3, editreward, unifiedreward"):
        fetch.fetch("mein")
    with pytest.raises(RuntimeError, match="cannot read .*nowhere"):
        fetch.fetch("mine", tmp_path / "nowhere.whl")


def test_template_is_checked_when_it_is_read(upstream, tmp_path):
    with pytest.raises(RuntimeError, match="mine: not ready.*\n.*python -m rewards fetch mine"):
        fetch.template("mine", {"one": "{caption}"})
    fetch.fetch("mine", upstream)
    fetch.cached("mine").write_text(json.dumps({"one": ONE + " ", "two": TWO}))
    with pytest.raises(RuntimeError, match="'one' is not the text the model was trained with"):
        fetch.template("mine", {"one": "{caption}"})
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"one": "Mine: {caption}"}))
    assert fetch.template("mine", {"one": "{caption}"}, own) == {"one": "Mine: {caption}"}  # no hash for your own text
    for wanted in ({"one": "{text}"}, {"two": ""}):
        with pytest.raises(RuntimeError, match="no text '(one|two)' containing"):
            fetch.template("mine", wanted, own)
    with pytest.raises(RuntimeError, match="no template file"):
        fetch.template("mine", {"one": ""}, tmp_path / "none.json")


@pytest.mark.parametrize("load, name", [(hpsv3.load, "hpsv3"), (editreward.load, "editreward")])
def test_rewards_without_their_template_say_how_to_fetch_it(upstream, load, name):
    with pytest.raises(RuntimeError, match=f"{name}: not ready.*\n.*python -m rewards fetch {name}$"):
        load()


def test_template_must_hold_the_reward_token_once(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(FORM | {"instruction": "{text_prompt}<|Reward|>"}))
    with pytest.raises(RuntimeError, match="must be there once"):
        hpsv3.load(template=tmp_path / "t.json")


def test_hpsv3_published_scores():
    pytest.skip("needs MizzenAI/HPSv3 (16 GB) and pictures with published scores; not run without them")
