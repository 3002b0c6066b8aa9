import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import (
    AddedToken,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import models
from models import checkpoint, parallel, qwen, tiny
from tests import processes

TEXTS = ["what is this?", "how many red squares are in the picture on the left?", "why?", "and this one?"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


# Per prompt of TEXTS: 12 x 10 and 8 x 24 px after resizing, none, and two of them; 8 px make one image token
IMAGES = [picture(32, 24, 1), picture(14, 51, 2), None, [picture(16, 16, 3), picture(40, 16, 4)]]


def make_folder(folder, family, tied=False, **config):
    """A saved random model whose logits depend on its pictures, a tokenizer and preprocessor_config.json."""
    tokenizer = tiny.qwen_tokenizer(TEXTS)
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(special)
    text = dict(
        vocab_size=len(tokenizer) + 7,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.125,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=64,
        initializer_range=0.2,
    )
    tokens = dict(image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)
    torch.manual_seed(0)
    if family == "qwen2.5-vl":
        text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
        vision |= dict(fullatt_block_indexes=[1], window_size=16)
        config = Qwen2_5_VLConfig(text_config=text | config, vision_config=vision, tie_word_embeddings=tied, **tokens)
        lm = Qwen2_5_VLForConditionalGeneration(config)
    else:
        rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True)
        text |= dict(head_dim=16, rope_parameters=rope)
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
        config = Qwen3VLConfig(text_config=text | config, vision_config=vision, tie_word_embeddings=tied, **tokens)
        lm = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        lm.model.language_model.norm.weight.mul_(1.25)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The limits in pixels, by the keys that Qwen's own files of either family have
    limits = dict(min_pixels=64, max_pixels=1024)
    if family == "qwen3-vl":
        limits = dict(size=dict(shortest_edge=64, longest_edge=1024))
    processor = dict(
        **limits,
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
        image_processor_type="Qwen2VLImageProcessor",
        processor_class="Qwen2_5_VLProcessor",
    )
    with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:
        json.dump(processor, f)
    return str(folder)


@pytest.fixture(scope="session", params=["qwen2.5-vl", "qwen3-vl"])
def folder(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp(request.param), request.param, tied=request.param == "qwen3-vl")


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """One folder for what is the same for both architectures."""
    return make_folder(tmp_path_factory.mktemp("one"), "qwen3-vl")


def load(folder, dtype=torch.float32, **options):
    return qwen.load(folder, "cpu", dtype, **options)


def stock(folder, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def seeds(*values):
    return torch.tensor(values, dtype=torch.int64)


def stock_inputs(folder, ids, images):
    """What transformers' processor makes of a row of ids and its pictures."""
    ids = torch.tensor(ids)[None]
    images = [images] if isinstance(images, Image.Image) else images
    if not images:
        return dict(input_ids=ids)
    # mm_token_type_ids marks the pictures of the prompt; a sampled image token is text
    with open(os.path.join(folder, "config.json")) as f:
        image_token = json.load(f)["image_token_id"]
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    return dict(input_ids=ids, mm_token_type_ids=(ids == image_token).int(), **pixels)


def brute_force(lm, folder, prompts, images, out, temperature):
    """log-probs of one row at a time, without padding, from transformers' own logits in fp64."""
    rows = []
    for b, prompt in enumerate(prompts):
        completion = out["ids"][b][out["mask"][b].bool()]
        inputs = stock_inputs(folder, list(prompt) + completion.tolist(), images[b])
        z = lm(**inputs).logits[0, len(prompt) - 1 : -1].double() / temperature
        logp = F.log_softmax(z, -1).gather(1, completion[:, None])[:, 0]
        rows.append(F.pad(logp, (0, out["ids"].shape[1] - len(completion))))
    return torch.stack(rows)


def random_completions(model, B, L, seed=0):
    """Tokens that are no image token, which stock transformers would take for a picture, rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (B, L), generator=generator)
    mask = (torch.arange(L) < torch.arange(L, L - B, -1)[:, None]).long()
    return {"ids": ids, "mask": mask}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_stock_transformers(folder, temperature):
    model, lm = load(folder), stock(folder)
    prompts = model.encode(TEXTS, images=IMAGES)
    out = random_completions(model, 4, 9)
    expected = brute_force(lm, folder, prompts, IMAGES, out, temperature).detach()
    logps = model.logps(prompts, out["ids"], out["mask"], temperature)
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)
    for b, prompt in enumerate(prompts):
        n = int(out["mask"][b].sum())
        alone = model.logps([prompt], out["ids"][b : b + 1], out["mask"][b : b + 1], temperature)
        torch.testing.assert_close(alone[0, :n], logps[b, :n], atol=1e-5, rtol=0)
    # It looks: another picture of the same size, and the same picture at another place, say something else.
    others = model.encode(TEXTS, images=[picture(32, 24, 9), picture(14, 51, 9), None, IMAGES[3][::-1]])
    change = (model.logps(others, out["ids"], out["mask"], temperature) - logps).abs().amax(1)
    assert others[2] == prompts[2] and change[2] == 0 and change[[0, 1, 3]].min() > 0.02, change


def test_encode_makes_room_for_every_picture(folder):
    model = load(folder)
    prompts = model.encode(TEXTS, images=IMAGES)
    pad = model.image_token
    # min_pixels, max_pixels and the grid of 8 px: 32 x 24 -> 4 x 3, 14 x 51 -> 16 x 48, 16 x 16 and 40 x 16
    assert [prompt.count(pad) for prompt in prompts] == [12, 12, 0, 4 + 10]
    assert [type(prompt) for prompt in prompts] == [qwen.Prompt, qwen.Prompt, list, qwen.Prompt]
    text = model.tokenizer.decode(prompts[3])
    vision = "<|vision_start|>{}<|vision_end|>"
    both = vision.format("<|image_pad|>" * 4) + vision.format("<|image_pad|>" * 10)
    assert text == f"<|im_start|>user\n{both}and this one?<|im_end|>\n<|im_start|>assistant\n"
    first = prompts[0].index(pad)
    expected = [[first] * 12, [first + i // 3 for i in range(12)], [first + i % 3 for i in range(12)]]
    assert prompts[0].positions[:, first : first + 12].tolist() == expected
    assert prompts[0].positions[:, first + 12].tolist() == [first + 4] * 3
    assert not prompts[0].features.requires_grad and prompts[0].features.shape == (12, 64)
    # Chat messages say themselves where their pictures are.
    turns = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}, {"type": "image"}]}]
    (prompt,) = model.encode([turns], images=IMAGES[:1])
    assert sorted(prompt) == sorted(prompts[0]) and prompt.index(pad) > first
    # Grey and transparent pictures are taken for what they look like in RGB.
    grey = IMAGES[0].convert("L")
    a, b = model.encode(TEXTS[:1] * 2, images=[grey, grey.convert("RGB")])
    assert torch.equal(a.features, b.features)


def test_greedy_equals_stock_generate(folder):
    model, lm = load(folder), stock(folder)
    prompts = model.encode(TEXTS, images=IMAGES)
    out = model.generate(prompts, 16, 0.0, seeds(0, 0, 0, 0))
    for b, prompt in enumerate(prompts):
        inputs = stock_inputs(folder, prompt, IMAGES[b])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = lm.generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=model.stop_ids)
        got = out["ids"][b][out["mask"][b].bool()].tolist()
        assert len(got) > 3 and model.image_token not in got
        assert got == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replayed_logps_equal_generated(folder, temperature):
    model = load(folder)
    model.stop_ids = []
    prompts = model.encode(TEXTS, images=IMAGES)
    prompts = [prompt for prompt in prompts for _ in range(3)]  # a group shares what was seen
    out = model.generate(prompts, 24, temperature, torch.arange(12))
    logps, entropy = model.logps(prompts, out["ids"], out["mask"], temperature, return_entropy=True)
    torch.testing.assert_close(logps, out["logps"], atol=1e-5, rtol=0)
    assert out["logps"].std() > 0.1 and entropy.min() > 0 and (out["ids"][0] != out["ids"][1]).any()
    # Rows do not depend on their batch.
    alone = model.generate(prompts[4:5], 24, temperature, seeds(4))
    assert torch.equal(alone["ids"][0], out["ids"][4])
    torch.testing.assert_close(alone["logps"][0], out["logps"][4], atol=1e-5, rtol=0)


def test_a_sampled_image_token_is_text(one):
    """It can be drawn, and is embedded as any token: no picture belongs to it."""
    model = load(one)
    prompts = model.encode(TEXTS[:2], images=IMAGES[:2])
    out = random_completions(model, 2, 6)
    out["ids"][:, 2] = model.image_token
    logps = model.logps(prompts, out["ids"], out["mask"], 1.0)
    other = out["ids"].clone()
    other[:, 2] = 7
    again = model.logps(prompts, other, out["mask"], 1.0)
    assert torch.equal(logps[:, :2], again[:, :2]) and (logps[:, 3:5] != again[:, 3:5]).all()


def test_gradient_equals_stock_with_a_frozen_tower(folder):
    model, lm = load(folder), stock(folder)
    lm.model.visual.requires_grad_(False)
    prompts = model.encode(TEXTS, images=IMAGES)
    out = random_completions(model, 4, 7)
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    (model.logps(prompts, out["ids"], out["mask"], 0.7) * weight).sum().backward()
    (brute_force(lm, folder, prompts, IMAGES, out, 0.7) * weight).sum().backward()
    expected = {name: p.grad for name, p in lm.named_parameters() if p.requires_grad}
    trained = parallel.trained(model.parts)
    assert set(trained) == {f"lm.{name}" for name in expected} and not any("visual" in name for name in trained)
    for name, p in trained.items():
        gradient = expected[name.removeprefix("lm.")]
        torch.testing.assert_close(p.grad, gradient, atol=2e-5 * gradient.abs().max().item(), rtol=0)
    assert all(p.grad is None for p in model.tower.parameters())


def sgd(model, batch, learning_rate=0.05):
    optimizer = torch.optim.SGD(parallel.trained(model.parts).values(), learning_rate)
    for _ in range(2):
        optimizer.zero_grad()
        model.logps(*batch).mean().backward()
        optimizer.step()


def test_lora_is_in_the_language_model_and_peft_reads_it(folder, tmp_path):
    model, base = load(folder, lora_rank=4, lora_alpha=8), load(folder)
    prompts = model.encode(TEXTS, images=IMAGES)
    out = random_completions(model, 4, 7)
    batch = (prompts, out["ids"], out["mask"], 1.0)
    before = base.logps(*batch)
    names = parallel.trained(model.parts)
    assert len(names) == 3 * 2 * len(qwen.LORA_TARGETS)
    assert all("language_model.layers" in name and "lora_" in name for name in names)
    sgd(model, batch, 0.3)
    expected = model.logps(*batch).detach()
    assert (expected - before).abs().max() > 1e-3
    with parallel.reference(model):
        assert torch.equal(model.logps(*batch), before)
    model.save(tmp_path, checkpoint.full_tensors(names))
    lm = PeftModel.from_pretrained(stock(folder), tmp_path)
    adapted = [name for name, _ in lm.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 3 * len(qwen.LORA_TARGETS) and not any("visual" in name for name in adapted)
    got = brute_force(lm, folder, prompts, IMAGES, out, 1.0)
    torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=0)


def test_saved_folder_is_transformers_own(folder, tmp_path):
    model = load(folder)
    prompts = model.encode(TEXTS, images=IMAGES)
    out = random_completions(model, 4, 7)
    batch = (prompts, out["ids"], out["mask"], 1.0)
    sgd(model, batch)
    model.save(tmp_path, checkpoint.full_tensors(parallel.trained(model.parts)))
    expected = model.logps(*batch).detach()
    lm = stock(tmp_path)
    got = brute_force(lm, str(tmp_path), prompts, IMAGES, out, 1.0)
    torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=0)
    tower = stock(folder).model.visual.state_dict()
    assert all(torch.equal(t, tower[name]) for name, t in lm.model.visual.state_dict().items()) and len(tower) > 20
    names = [set(load_file(os.path.join(f, "model.safetensors"))) for f in (folder, tmp_path)]
    assert names[0] == names[1]
    with open(os.path.join(folder, "preprocessor_config.json")) as f:
        assert f.read() == (tmp_path / "preprocessor_config.json").read_text()
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json"} <= set(os.listdir(tmp_path))
    again = load(str(tmp_path))
    assert again.encode(TEXTS, images=IMAGES) == prompts
    assert torch.equal(again.logps(*batch), expected)


def test_reference_copy_stays(folder):
    model = load(folder, with_reference=True)
    prompts = model.encode(TEXTS, images=IMAGES)
    out = random_completions(model, 4, 7)
    batch = (prompts, out["ids"], out["mask"], 1.0)
    before = model.logps(*batch).detach()
    sgd(model, batch)
    assert (model.logps(*batch) - before).abs().max() > 1e-2
    with parallel.reference(model):
        assert torch.equal(model.logps(*batch), before)


def test_bf16_tower_equals_stock_in_bf16(folder, tmp_path):
    """The frozen tower is in the compute dtype, its rotary frequencies are not; masters of what is trained are fp32."""
    model, lm = load(folder, dtype=torch.bfloat16), stock(folder, torch.bfloat16)
    assert {p.dtype for p in parallel.trained(model.parts).values()} == {torch.float32}
    (prompt,) = model.encode(TEXTS[:1], images=IMAGES[:1])
    inputs = stock_inputs(folder, prompt, IMAGES[0])
    features = lm.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    assert prompt.features.dtype == torch.bfloat16 and torch.equal(prompt.features, torch.cat(features.pooler_output))
    model.save(tmp_path, checkpoint.full_tensors(parallel.trained(model.parts)))
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert stock(tmp_path, "auto").dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def sharded(folder, rows, options, out_folder):
    """Generation, replay, gradients and export of one rank; rows: the index into TEXTS of each."""
    world = parallel.init()
    model = load(folder, **options)
    for part in [model.parts, model.reference_parts or {}]:
        for module in part.values():
            parallel.shard(module, model.blocks(module), world, model.dtype, checkpoint_activations=world.size == 2)
    model.stop_ids = []
    mine = rows[world.rank * len(rows) // world.size : (world.rank + 1) * len(rows) // world.size]
    prompts = model.encode([TEXTS[i] for i in mine], images=[IMAGES[i] for i in mine])
    out = model.generate(prompts, 12, 1.0, torch.tensor(mine))
    assert all(isinstance(p, DTensor) for p in model.parts["lm"].parameters())
    assert not any(isinstance(p, DTensor) for p in model.tower.parameters())
    logps = model.logps(prompts, out["ids"], out["mask"], 1.0)
    results = {"error": (logps.detach() - out["logps"]).abs().max().item(), "ids": out["ids"], "logps": logps.detach()}
    (logps * (torch.tensor(mine)[:, None] - 1.7)).mean().backward()
    trained = parallel.trained(model.parts)
    results["gradients"] = {name: p.grad.full_tensor() for name, p in trained.items()}
    with parallel.reference(model) if options else parallel.unsharded(model.parts):
        results["reference"] = model.logps(prompts, out["ids"], out["mask"], 1.0).detach()
    tensors = checkpoint.full_tensors(trained)
    if world.rank == 0:
        model.save(out_folder, tensors)
    dist.destroy_process_group()
    return results


# A rank without any picture beside one with two of them; the order of modules must be the same on both.
@pytest.mark.parametrize("options", [{}, dict(with_reference=True), dict(lora_rank=4, lora_alpha=8)], ids=str)
def test_two_ranks_equal_one(folder, options, tmp_path):
    rows = [2, 2, 0, 3]
    (one,) = processes.run(sharded, folder, rows, options, tmp_path / "1")
    two = processes.run(sharded, folder, rows, options, tmp_path / "2", ranks=2, timeout=60)
    assert max(r["error"] for r in [one, *two]) < 1e-5
    assert torch.equal(torch.cat([r["ids"] for r in two]), one["ids"])
    for key in ("logps", "reference"):
        torch.testing.assert_close(torch.cat([r[key] for r in two]), one[key], atol=1e-5, rtol=0)
    torch.testing.assert_close(one["reference"], one["logps"], atol=1e-5, rtol=0)
    for name, gradient in one["gradients"].items():
        scale = max(gradient.abs().max().item(), 1e-3)
        for r in two:
            torch.testing.assert_close(r["gradients"][name], gradient, atol=2e-5 * scale, rtol=0)
    if not options:
        saved = [load_file(tmp_path / rank / "model.safetensors") for rank in "12"]
        assert saved[0].keys() == saved[1].keys() and all(
            torch.equal(t, saved[1][name]) for name, t in saved[0].items()
        )


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_encode_refuses_what_does_not_fit(one, tmp_path):
    model = load(one)
    length = len(model.encode(TEXTS[:1], images=IMAGES[:1])[0])
    model.encode(TEXTS[:1], max_new_tokens=256 - length, images=IMAGES[:1])
    with pytest.raises(ValueError, match=f"{length} tokens.*context of 256 tokens: 'what is this"):
        model.encode(TEXTS[:1], max_new_tokens=257 - length, images=IMAGES[:1])
    with pytest.raises(ValueError, match=r"1 places for 0 pictures.*'<\|image_pad\|>'"):
        model.encode(["<|image_pad|>"])
    with pytest.raises(ValueError, match="tiny-qwen' takes no pictures"):
        models.load_lm("tiny-qwen", "cpu", torch.float32).encode(["2+2="], images=IMAGES[:1])
    turns = [{"role": "user", "content": "why?"}]
    with pytest.raises(ValueError, match="0 places for 1 pictures"):
        model.encode([turns], images=IMAGES[:1])
    with pytest.raises(ValueError):
        model.encode(TEXTS[:2], images=IMAGES[:1])
    (prompt,) = model.encode(TEXTS[:1], images=IMAGES[:1])
    with pytest.raises(ValueError, match="no pictures: pass on the prompts that encode returned"):
        model.generate([list(prompt)], 4, 1.0, seeds(1))

    plain = load(one, chat=False)
    (prompt,) = plain.encode(["<|vision_start|><|image_pad|><|vision_end|>why?"], images=IMAGES[:1])
    assert prompt.count(plain.image_token) == 12


def test_load_refuses_what_is_missing(one, tmp_path):
    def broken(name):
        shutil.copytree(one, tmp_path / name)
        return tmp_path / name

    folder = broken("blind")
    os.remove(folder / "preprocessor_config.json")
    with pytest.raises(RuntimeError, match="incomplete.*preprocessor_config.json") as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    folder = broken("other")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | dict(patch_size=14)))
    with pytest.raises(ValueError, match="preprocessor_config.json belongs to another model.* 4, 2, 2"):
        load(str(folder))
    folder = broken("mute")
    os.remove(folder / "chat_template.jinja")
    with pytest.raises(ValueError, match="no chat template"):
        load(str(folder))
    folder = broken("no-weights")
    os.remove(folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="incomplete"):
        load(str(folder))
    small = make_folder(tmp_path / "small", "qwen2.5-vl", vocab_size=300)
    with pytest.raises(ValueError, match="but the model only 300"):
        load(small)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_load_lm_takes_names_folders_and_ids(one, tmp_path, monkeypatch):
    assert models.LM_ALIASES["qwen2.5-0.5b"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert models.LM_ALIASES["qwen3-1.7b"] == "Qwen/Qwen3-1.7B"
    assert models.LM_ALIASES["qwen2.5-vl-7b"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert models.LM_ALIASES["qwen3-vl-2b"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert not set(models.LM_ALIASES) & set(models.ALIASES)
    model = models.load_lm("tiny-qwen", "cpu", torch.float32, lora_rank=2, lora_alpha=2)
    assert not model.takes_images and len(parallel.trained(model.parts)) == 2 * 3 * len(qwen.LORA_TARGETS)
    assert model.attention == "torch scaled_dot_product_attention"
    model = models.load_lm(one, "cpu", torch.float32)
    assert model.takes_images and model.attention == "torch scaled_dot_product_attention"
    monkeypatch.setitem(models.LM_ALIASES, "qwen3-vl-2b", one)
    assert models.load_lm("qwen3-vl-2b", "cpu", torch.float32).source == one
    with pytest.raises(ValueError, match="unknown model 'qwen3-vl-2', did you mean qwen3-vl-2b.*: .*tiny-qwen-vl"):
        models.load_lm("qwen3-vl-2", "cpu", torch.float32)
    with pytest.raises(ValueError, match="unknown model 'tiny-flux'"):
        models.load_lm("tiny-flux", "cpu", torch.float32)
    with pytest.raises(ValueError, match="unknown model 'qwen3-8b'"):
        models.pipeline_class("qwen3-8b")
    with pytest.raises(RuntimeError, match="hub cannot be reached|does not exist"):
        models.load_lm("nobody-at-all/no-such-model", "cpu", torch.float32)


def test_lm_family_is_known_without_weights(one, folder, tmp_path):
    assert {models.lm_family(name) for name in models.LM_ALIASES} == {
        *("qwen2.5", "qwen3", "qwen2.5-vl", "qwen3-vl", "tiny-qwen", "tiny-qwen-vl", "tiny-qwen-refine")
    }
    assert [models.lm_family(name) for name in ("qwen2.5-7b", "qwen2.5-vl-3b")] == ["qwen2.5", "qwen2.5-vl"]
    assert models.lm_family(one) == "qwen3-vl" and models.lm_family(folder) in folder
    assert models.lm_family(models.LM_ALIASES["tiny-qwen"]) == "qwen2.5"
    for kind, family in [("qwen3", "qwen3"), ("llama", "other"), ("gemma2", "other")]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert models.lm_family(str(tmp_path)) == family
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match="no config.json; an adapter"):
        models.lm_family(str(tmp_path))
    with pytest.raises(ValueError, match="unknown model 'qwen2-7b', did you mean"):
        models.lm_family("qwen2-7b")
    with pytest.raises(RuntimeError, match="hub cannot be reached|does not exist"):
        models.lm_family("nobody-at-all/no-such-model")


def test_check_lengths_refuses_what_encode_refuses(one):
    model = load(one)
    long = "a red square " * 90
    prompts = [*TEXTS, "é" * 60, "\u0958" * 30, [{"role": "user", "content": "why?"}]]
    # U+0958 is 3 bytes in UTF-8, and 6 in the normal form that Qwen's tokenizer makes of it
    room = 256 - max(len(ids) for ids in model.encode(prompts))
    model.check_lengths(iter(prompts), room)
    for bad in (prompts, [TEXTS[0], long, TEXTS[1]], ["\u0958" * 42]):
        n = room + 1 if bad is prompts else 0
        with pytest.raises(ValueError, match="do not fit into the context of 256") as expected:
            model.encode(bad, n)
        with pytest.raises(ValueError) as error:
            model.check_lengths(iter(bad), n)
        assert str(error.value) == str(expected.value)

    # Cheap: what cannot be too long is not tokenized.
    def refuse(*_):
        raise AssertionError("tokenized")

    model._tokenize = refuse
    model.check_lengths(TEXTS, 100)
