import copy
import dataclasses
import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

import flow_grpo
import models
from kernels.sde_step import fold_seed, philox_normal
from models import blip3o, checkpoint, parallel, qwen, run_folder, tiny
from tests import processes

VARIANTS = ["blip3o", "metaquery"]
PROMPTS = ["a red circle", "two {blue} squares, left of a dog which is behind a house!", "", "a dog"]
SIZE = (32, 48)
QUERIES = 5


@torch.no_grad()
def make_folders(folder):
    """A Qwen2.5-VL and a SANA in which every parameter matters, of no two widths alike, and a unified model of either
    variant on them."""
    lm = tiny.qwen_vl(
        seed=1,
        width=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ff_dim=96,
        vision_width=32,
        vision_layers=2,
        vision_heads=2,
        vision_ff_dim=48,
    )
    for p in lm.parameters():
        if p.ndim > 1:
            p.mul_(6)
    lm.save_pretrained(folder / "lm")
    tiny.qwen_vl_tokenizer().save_pretrained(folder / "lm")
    tiny.qwen_vl_processor().save_pretrained(folder / "lm")
    pipeline = tiny.sana_pipeline(
        seed=2,
        num_layers=2,
        num_heads=3,
        head_dim=8,
        num_cross_heads=4,
        text_dim=40,
        latent_channels=4,
        vae_channels=(8, 16, 16),
    )
    draw = torch.Generator().manual_seed(3)
    for name, p in pipeline.transformer.named_parameters():
        scale = 0.5 if "table" in name else p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.copy_(torch.randn(p.shape, generator=draw) * scale)
        if "norm" in name and name.endswith("weight") and p.ndim == 1:
            p.add_(1)
    pipeline.transformer.register_to_config(timestep_scale=0.5)
    pipeline.vae.register_to_config(scaling_factor=0.7)
    pipeline.save_pretrained(folder / "sana")
    for variant in VARIANTS:
        blip3o.create(
            folder / variant, str(folder / "lm"), str(folder / "sana"), variant, QUERIES, 16, num_layers=2, head_dim=16
        )
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("unified"))


@pytest.fixture(params=VARIANTS)
def folder(request, folders):
    return str(folders / request.param)


def load(folder, dtype=torch.float32, **options):
    return models.load(str(folder), "cpu", dtype, **options)


def pictures(B=len(PROMPTS), size=SIZE, seed=0):
    return torch.rand(B, 3, *size, generator=torch.Generator().manual_seed(seed))


def perturb(model, scale=0.1):
    """Move what is trained, as training would; all of the reference path with it."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parallel.trained(model.parts).values():
            p.add_(torch.randn(p.shape, generator=draw) * scale)


def inputs(model, B=len(PROMPTS)):
    """(x, sigma) in the middle of a trajectory, another sigma for every row."""
    return model.init_noise(torch.arange(B) + 10, *SIZE), torch.linspace(0.3, 0.9, B)


def encoded(model, edits, **options):
    return model.encode(PROMPTS, pictures() if edits else None, **options)


@torch.no_grad()
def velocity(model, edits=True, guidance=(3.0, 1.5)):
    return model.velocity(*inputs(model), model.condition(encoded(model, edits)), guidance)


def export(model, folder):
    model.save(str(folder), checkpoint.full_tensors(parallel.trained(model.parts)))
    return str(folder)


def loss(model, cond, guidance=(2.0, 1.5), rows=slice(None)):
    x, sigma = (t[rows] for t in inputs(model))
    cond = model.condition({name: t[rows] for name, t in cond.items()})
    return model.velocity(x, sigma, cond, guidance).float().square().mean()


def double(model):
    """The model in fp64: two ways to one result then differ by what is wrong, not by rounding."""
    for module in (*model.parts.values(), model.lm.tower, model.vae):
        for p in module.parameters():
            p.data = p.data.double()
    model.dtype = model.lm.dtype = model.eyes.dtype = torch.float64
    return model


def same_weights(a, b):
    """Whether two models have the same weights, to the bit. Their outputs need not be: where in memory a file's weights
    come to lie decides on some processors how a product is summed."""
    tensors = [
        {f"{name}.{key}": t for name, part in model.parts.items() for key, t in part.state_dict().items()}
        for model in (a, b)
    ]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][k]) for k, t in tensors[0].items())


def assert_close(a, b, tolerance=2e-5):
    assert a.shape == b.shape and a.std() > 0.05
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# What the language model reads


def text_of(model, cond, b, kind=""):
    ids = cond[f"ids{kind}"][b, : cond[f"length{kind}"][b]]
    return model.lm.tokenizer.decode(ids).replace("<|image_pad|>" * 6, "<|6 pads|>")


def test_templates(folders):
    model = load(folders / "blip3o")
    t2i, edit = model.encode(PROMPTS), encoded(model, True)
    user, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    caption = (
        "Please generate an image based on the following caption: two {blue} squares, left of a dog which is behind"
    )
    assert text_of(model, t2i, 1) == f"{user}{caption} a house!{end}"
    # 32 x 48 px are 24 tokens, of which image_tokens leaves 16, and 3 x 4 of the same shape
    assert edit["picture"].shape[1] == 12
    instruction = "Please edit the given image based on the following instruction: a red circle"
    seen = f"{user}<|vision_start|><|6 pads|><|6 pads|><|vision_end|>{instruction}{end}"
    assert text_of(model, edit, 0) == seen
    assert not any("null" in name for name in [*t2i, *edit])

    model = load(folders / "metaquery")
    t2i, edit = model.encode(PROMPTS), encoded(model, True)
    system = f"<|im_start|>system\n{blip3o.DESCRIBE}<|im_end|>\n"
    assert text_of(model, t2i, 0) == f"{system}{user}a red circle<|im_end|>\n<|im_start|>assistant\n\n"
    assert text_of(model, t2i, 0, "_null") == text_of(model, t2i, 2)
    seen = f"{system}{user}<|vision_start|><|6 pads|><|6 pads|><|vision_end|><|im_end|>\n<|im_start|>assistant\n\n"
    assert text_of(model, edit, 1, "_null") == text_of(model, edit, 1, "_image") == seen
    assert "reference" not in edit
    black = model.encode(PROMPTS, torch.zeros(4, 3, *SIZE))
    assert torch.equal(edit["picture_null"], black["picture"]) and torch.equal(edit["picture_image"], edit["picture"])
    assert (edit["picture_null"] - edit["picture"]).abs().max() > 0.1


def test_conversations_are_drawn_as_they_stand(folders):
    model = load(folders / "blip3o")
    question = {"role": "user", "content": blip3o.REFINE.format("a dog")}
    cond = model.encode([[question, {"role": "assistant", "content": "<answer>a big dog</answer>"}]])
    text = text_of(model, cond, 0)
    assert text.startswith(f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n<answer>a big")
    assert text.endswith("dog</answer><|im_end|>\n<|im_start|>assistant\n<|im_end|>\n")


def test_refined():
    assert blip3o.refined("<answer>x</answer> or\n<answer> a\nb </answer>.") == "a\nb"
    assert blip3o.refined(" no tags ") == "no tags"
    assert blip3o.refined("<answer>cut off") == "cut off" and blip3o.refined("") == ""


def test_a_megapixel_is_576_tokens(folders):
    """With Qwen2.5-VL's patches, of 28 px, and 576 tokens."""
    lm = copy.copy(load(folders / "blip3o").lm)
    lm.image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384})
    model = load(folders / "blip3o")
    config = model.config | dict(image_tokens=576)
    model = blip3o.BLIP3o(config, "", "", lm, model.parts, model.vae, model.scheduler, "cpu", torch.float32)
    for side, tokens in ((1024, 24), (672, 24), (512, 18), (2048, 24)):
        grid = model.eyes.image_processor(images=[Image.new("RGB", (side, side))], return_tensors="pt").image_grid_thw
        assert grid.tolist() == [[1, 2 * tokens, 2 * tokens]]
    assert lm.image_processor.size["longest_edge"] == 28 * 28 * 16384  # understanding sees as much as before


@torch.no_grad()
def stock_hidden(folder, model, prompt_cond, b, images, queries):
    """Last hidden states of stock transformers in whose vocabulary the queries are new tokens, at the queries."""
    with open(os.path.join(folder, "config.json")) as f:
        lm = AutoModelForImageTextToText.from_pretrained(json.load(f)["lm"])
    vocabulary = lm.get_input_embeddings().num_embeddings
    lm.resize_token_embeddings(vocabulary + len(queries), mean_resizing=False)
    lm.get_input_embeddings().weight[vocabulary:] = queries
    ids = prompt_cond["ids"][b, : prompt_cond["length"][b]]
    ids = torch.cat([ids, vocabulary + torch.arange(len(queries))])[None]
    extra = {}
    if images is not None:
        pixels = model.eyes.image_processor(images=blip3o._to_pil(images[b : b + 1]), return_tensors="pt")
        extra = dict(**pixels, mm_token_type_ids=(ids == lm.config.image_token_id).int())
    return lm.model(ids, **extra).last_hidden_state[:, -len(queries) :]


@pytest.mark.parametrize("edits", [False, True])
@torch.no_grad()
def test_text_is_what_stock_transformers_says_at_new_tokens(folder, edits):
    model = load(folder)
    cond, learned = encoded(model, edits), model.parts["queries"].weight
    metaquery = folder.endswith("metaquery")
    assert len(learned) == (QUERIES + 1 if metaquery else 2 * QUERIES)
    queries = learned if metaquery else learned[QUERIES:] if edits else learned[:QUERIES]
    text = model.condition(cond)["text"]
    for b in range(len(PROMPTS)):
        hidden = stock_hidden(folder, model, cond, b, pictures() if edits else None, queries)
        assert_close(text[b : b + 1], model.parts["connector"](hidden[:, -QUERIES:]), 1e-4)


@torch.no_grad()
def test_queries_see_the_prompt_and_the_prompt_does_not_see_them(folder):
    model = load(folder)
    cond = encoded(model, True)
    seen = []
    model.parts["lm"].model.language_model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    model.condition(cond)
    model.parts["queries"].weight.mul_(-3)
    model.condition(cond)
    half = len(seen) // 2
    for b, length in enumerate(cond["length"]):
        before, after = seen[0][b], seen[half][b]
        assert torch.equal(before[:length], after[:length])
        assert (before[length] - after[length]).abs().max() > 0.1
    last = [seen[0][b, length + model.num_learned - 1] for b, length in enumerate(cond["length"])]
    assert all((last[0] - other).abs().max() > 0.1 for other in last[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Connector


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_connector_equals_qwen3_layers(variant):
    """Qwen3's decoder layer is pre-norm with per-head RMSNorm of queries and keys and SwiGLU. Without a causal mask; at
    position 0 throughout where there is no RoPE."""
    width, head_dim, ff_mult = 48, 12, blip3o.VARIANTS[variant]["connector"]["ff_mult"]
    sizes = dict(width=width, out_width=20, num_layers=2, head_dim=head_dim)
    connector = blip3o.Connector(**blip3o.VARIANTS[variant]["connector"] | sizes).eval()
    draw = torch.Generator().manual_seed(0)
    for p in connector.parameters():
        p.copy_(torch.randn(p.shape, generator=draw) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=ff_mult * width,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=head_dim,
        attention_bias=True,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
        attn_implementation="eager",
    )
    x = torch.randn(3, 7, width, generator=draw)
    positions = torch.arange(7)[None] if variant == "metaquery" else torch.zeros(1, 7, dtype=torch.int64)
    rotary = Qwen3RotaryEmbedding(config)(x, positions)
    h = x
    for block in connector.blocks:
        layer = Qwen3DecoderLayer(config, 0).eval()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            setattr(layer.self_attn, name, getattr(block, name))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, getattr(block, name))
        layer.input_layernorm, layer.post_attention_layernorm = block.norm1, block.norm2
        h = layer(h, attention_mask=torch.zeros(1, 1, 7, 7), position_embeddings=rotary)
    biased = [(block.o_proj.bias is not None, block.up_proj.bias is not None) for block in connector.blocks]
    assert biased == [(variant == "blip3o",) * 2] * 2 and all(
        block.q_proj.bias is not None for block in connector.blocks
    )
    h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * connector.norm.weight
    if variant == "blip3o":
        expected = h @ connector.out.weight.T + connector.out.bias
    else:
        first, _, last, norm = connector.out
        h = h @ first.weight.T + first.bias
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) @ last.weight.T + last.bias
        expected = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert_close(connector(x), expected, 2e-5)


def test_metaquery_speaks_to_sana_at_the_size_of_its_texts(folders):
    text = load(folders / "metaquery").condition(load(folders / "metaquery").encode(PROMPTS))["text"]
    assert text.square().mean(-1).sqrt().sub(5.5**0.5).abs().max() < 1e-3


def test_full_size():
    with torch.device("meta"):
        sizes = dict(width=2048, out_width=2304, num_layers=12, head_dim=256)
        connector = blip3o.Connector(**blip3o.VARIANTS["blip3o"]["connector"] | sizes)
        queries = blip3o.Queries(2, 256, 2048, 1.0)
        transformer = SanaTransformer2DModel()
        plain = sum(p.numel() for p in transformer.parameters())
        transformer.patch_embed = blip3o.ReferencePatchEmbed(transformer.patch_embed)
        metaquery = blip3o.Connector(
            **blip3o.VARIANTS["metaquery"]["connector"] | dict(sizes, num_layers=24, head_dim=64)
        )
    assert [block.head_dim for block in connector.blocks] == [256] * 12 and len(metaquery.blocks) == 24
    assert sum(p.numel() for p in connector.parameters()) == 508_315_904
    assert sum(p.numel() for p in queries.parameters()) == 2 * 256 * 2048
    assert 1.58e9 < plain < 1.62e9
    added = sum(p.numel() for p in transformer.parameters()) - plain
    assert added == 2240 * 32 + 2240 + 2240 * 2240 + 2240
    layer = 4 * 2048**2 + 3 * 2048 + 3 * 2048 * 8192 + 2 * 2048 + 2 * 64
    projection = 2048 * 2304 + 2304 + 2304**2 + 2304 + 2304
    assert sum(p.numel() for p in metaquery.parameters()) == 24 * layer + 2048 + projection


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: reference path, null conditions, guidance


@torch.no_grad()
def test_a_fresh_reference_changes_nothing(folders):
    model = load(folders / "blip3o")
    x, sigma = inputs(model)
    cond = model.condition(encoded(model, True))
    without = {name: t for name, t in cond.items() if name != "reference"}
    v = model.velocity(x, sigma, cond)
    assert cond["reference"].std() > 0.1 and torch.equal(v, model.velocity(x, sigma, without))
    stock = SanaTransformer2DModel.from_pretrained(folders / "sana", subfolder="transformer")
    assert torch.equal(v, stock(x, cond["text"], sigma * 500, return_dict=False)[0])
    embed = model.parts["transformer"].patch_embed
    for a, b in zip(embed.patch_embed.parameters(), embed.ref_patch_embed.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


@torch.no_grad()
def test_velocity_equals_diffusers(folder, folders):
    """The plain path, and the reference path as a term added behind diffusers' own patch embedding."""
    model, stock = load(folder), SanaTransformer2DModel.from_pretrained(folders / "sana", subfolder="transformer")
    x, sigma = inputs(model)
    cond = model.condition(encoded(model, True))
    if folder.endswith("metaquery"):
        assert torch.equal(model.velocity(x, sigma, cond), stock(x, cond["text"], sigma * 500, return_dict=False)[0])
        return
    embed, draw = model.parts["transformer"].patch_embed, torch.Generator().manual_seed(0)
    for p in (*embed.ref_patch_embed.parameters(), *embed.ref_linear.parameters()):
        p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    weight, bias = embed.ref_patch_embed.proj.weight[:, :, 0, 0], embed.ref_patch_embed.proj.bias

    def term(reference):
        tokens = reference.flatten(2).transpose(1, 2) @ weight.T + bias
        return tokens @ embed.ref_linear.weight.T + embed.ref_linear.bias

    for reference in (cond["reference"], torch.zeros_like(cond["reference"])):
        hook = stock.patch_embed.register_forward_hook(lambda m, args, out, term=term(reference): out + term)
        expected = stock(x, cond["text"], sigma * 500, return_dict=False)[0]
        hook.remove()
        given = {"text": cond["text"]} | ({"reference": reference} if reference.any() else {})
        assert_close(model.velocity(x, sigma, given), expected)


@torch.no_grad()
def test_null_conditions(folder):
    model = load(folder)
    t2i, edit = model.condition(model.encode(PROMPTS)), model.condition(encoded(model, True))
    if folder.endswith("blip3o"):
        for cond in (t2i, edit):
            assert cond["text_null"].shape == cond["text"].shape and not cond["text_null"].any()
        assert set(t2i) == {"text", "text_null"} and set(edit) == {"text", "text_null", "reference"}
    else:
        assert set(t2i) == {"text", "text_null"} and set(edit) == {"text", "text_null", "text_image"}
        empty = model.condition(model.encode(["", "x"]))["text"][:1]
        assert_close(t2i["text_null"], empty.expand_as(t2i["text"]))
        empty = [""] * len(PROMPTS)
        assert_close(edit["text_image"], model.condition(model.encode(empty, pictures()))["text"])
        black = torch.zeros(len(PROMPTS), 3, *SIZE)
        assert_close(edit["text_null"], model.condition(model.encode(empty, black))["text"])
        assert (edit["text_null"] - edit["text_image"]).abs().max() > 0.01
    for negative in (["a cat"], ["a cat", "a dog", "a cow", "a house"]):
        cond = model.condition(model.encode(PROMPTS, negative=negative))
        expected = model.condition(model.encode(negative))["text"]
        assert_close(cond["text_null"], expected.expand_as(cond["text"]))
        assert_close(cond["text"], t2i["text"])


@torch.no_grad()
def test_guidance_by_hand(folder):
    model = load(folder)
    perturb(model)
    (x, sigma), edit = inputs(model), model.condition(encoded(model, True))
    t2i = model.condition(model.encode(PROMPTS))

    def v(text, reference=None):
        return model.velocity(x, sigma, {"text": text} | ({} if reference is None else {"reference": reference}))

    v_text, v_0 = v(t2i["text"]), v(t2i["text_null"])
    assert (v_text - v_0).abs().max() > 0.01
    for image_guidance in (1.0, 5.0):  # there is no image
        assert_close(model.velocity(x, sigma, t2i, (3.5, image_guidance)), v_0 + 3.5 * (v_text - v_0))
        assert torch.equal(model.velocity(x, sigma, t2i, (1.0, image_guidance)), v_text)
    reference = edit.get("reference")
    both = v(edit["text"], reference)
    image = v(edit.get("text_image", edit["text_null"]), reference)
    none = v(edit["text_null"], None if reference is None else torch.zeros_like(reference))
    assert min((both - image).abs().max(), (image - none).abs().max()) > 0.003
    for g, g_image in ((1.0, 1.0), (3.0, 1.0), (3.0, 1.5), (1.0, 1.5), (0.0, 0.0)):
        expected = none + g_image * (image - none) + g * (both - image)
        assert_close(model.velocity(x, sigma, edit, (g, g_image)), expected)


def test_guidance_takes_its_gradient_through_all_terms(folder):
    model = load(folder)
    perturb(model)
    x, sigma = inputs(model)
    cond = model.condition(encoded(model, True))
    reference = {"reference": cond["reference"]} if "reference" in cond else {}
    image = model.velocity(x, sigma, {"text": cond.get("text_image", cond["text_null"])} | reference)
    zero = {"reference": torch.zeros_like(cond["reference"])} if reference else {}
    none = model.velocity(x, sigma, {"text": cond["text_null"]} | zero)
    apart = none + 1.5 * (image - none) + 3.0 * (model.velocity(x, sigma, {"text": cond["text"]} | reference) - image)
    trained = parallel.trained(model.parts)
    together = model.velocity(x, sigma, cond, (3.0, 1.5))
    first, second = (
        torch.autograd.grad(v.square().mean(), trained.values(), retain_graph=True) for v in (together, apart)
    )
    for name, a, b in zip(trained, first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, b.abs().max().item()), msg=name)
    assert first[list(trained).index("queries.weight")].abs().max() > 0


@torch.no_grad()
def test_noisy_reference_is_a_function_of_image_and_seed(folders):
    model = load(folders / "blip3o")
    images, seeds = pictures(), torch.tensor([5, -3, 2**62, 5])
    cond = model.encode(PROMPTS, images, seeds=seeds)
    latents = AutoencoderDC.from_pretrained(folders / "sana", subfolder="vae").encode(images * 2 - 1).latent * 0.7
    noise = philox_normal(fold_seed(seeds, blip3o.REFERENCE), latents.shape[1:])
    assert_close(cond["reference"], 0.8 * latents + 0.2 * noise, 1e-5)
    assert_close(model.encode_images(images), latents, 1e-5)
    assert torch.equal(cond["reference"], model.encode(PROMPTS, images, seeds=seeds)["reference"])
    one = model.encode(PROMPTS[2:3], images[2:3], seeds=seeds[2:3])["reference"]
    assert_close(one, cond["reference"][2:3], 1e-5)
    # Not the noise that sampling starts from.
    start = model.init_noise(seeds, *SIZE)
    assert abs((start * noise).mean()) < 5 / start.numel() ** 0.5
    default = model.encode(PROMPTS, images)["reference"]
    assert_close(default, model.encode(PROMPTS, images, seeds=torch.zeros(4, dtype=torch.int64))["reference"])
    assert torch.equal(model.condition(cond)["reference"], cond["reference"])  # replay has the rollout's


@pytest.mark.parametrize("edits", [False, True])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_batch(folder, edits):
    model = double(load(folder))
    perturb(model)
    whole, images, (x, sigma) = encoded(model, edits), pictures(), inputs(model)
    assert len(set(whole["length"].tolist())) == 4
    cond = model.condition(whole)
    for guidance in ((3.0, 1.5), (1.0, 1.0)):
        v = model.velocity(x, sigma, cond, guidance)
        for b in range(4):
            one = model.condition(model.encode(PROMPTS[b : b + 1], images[b : b + 1] if edits else None))
            assert_close(v[b : b + 1], model.velocity(x[b : b + 1], sigma[b : b + 1], one, guidance).to(v.dtype), 1e-6)


def test_schedule_noise_and_decoder_are_sana_s(folders):
    model, plain = load(folders / "blip3o"), models.load(str(folders / "sana"), "cpu", torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    assert torch.equal(model.sigmas(7, *SIZE), scheduler.sigmas.double())
    x = model.init_noise(torch.arange(2), *SIZE)
    assert torch.equal(x, plain.init_noise(torch.arange(2), *SIZE)) and torch.equal(model.decode(x), plain.decode(x))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def chat(lm):
    """What the language model says of pictures, and how likely it finds an answer."""
    images = blip3o._to_pil(pictures())
    prompts = lm.encode(PROMPTS, images=[images[0], None, images[2:4], images[3]])
    out = lm.generate(prompts, 6, torch.tensor([1.0, 0.0, 0.7, 1.0]), torch.arange(4))
    return out["ids"], out["logps"], lm.logps(prompts, out["ids"], out["mask"], 1.0).detach()


def train(model, num_updates=2, edits=(True, False)):
    trained = parallel.trained(model.parts)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for i in range(num_updates):
        for kind in edits:
            loss(model, encoded(model, kind)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_the_rest_leaves_the_language_model_to_the_bit(folder, folders):
    model = load(folder)
    before, text = chat(model.lm), model.condition(model.encode(PROMPTS))["text"]
    for a, b in zip(before, chat(qwen.load(str(folders / "lm"), "cpu", torch.float32))):
        assert torch.equal(a, b)
    train(model)
    assert (model.condition(model.encode(PROMPTS))["text"] - text).abs().max() > 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, chat(model.lm)))


@pytest.mark.parametrize(
    "options",
    [{}, dict(lora_rank=2, lora_alpha=4), dict(train_lm=True), dict(train_lm=True, lora_rank=2, lora_alpha=4)],
)
def test_a_training_step_changes_what_is_trained_and_nothing_else(folder, options):
    model = load(folder, **options, with_reference=not options.get("lora_rank"))
    modules = {"vae": model.vae, "tower": model.lm.tower, **model.parts}
    modules |= {f"reference {name}": part for name, part in (model.reference_parts or {}).items()}
    before = {(m, n): p.clone() for m, module in modules.items() for n, p in module.named_parameters()}
    trained = parallel.trained(model.parts)
    names = ["transformer", "queries", "connector", *(["lm"] if options.get("train_lm") else [])]
    assert list(model.parts) == ["transformer", "queries", "connector", "lm"]
    assert list(dict.fromkeys(name.partition(".")[0] for name in trained)) == names
    train(model, num_updates=3)
    after = {(m, n): p for m, module in modules.items() for n, p in module.named_parameters()}
    changed = {f"{m}.{n}" for m, n in before if not torch.equal(before[m, n], after[m, n])}
    assert changed == set(trained)
    if not options.get("lora_rank"):
        assert list(model.reference_parts) == names


@pytest.mark.parametrize("options", [dict(with_reference=True), dict(lora_rank=2, lora_alpha=4)])
@pytest.mark.parametrize("train_lm", [False, True])
def test_reference_policy_is_the_start(folder, options, train_lm):
    base, model = load(folder), load(folder, **options, train_lm=train_lm)
    expected, said = velocity(base), chat(base.lm)
    assert_close(velocity(model), expected)
    perturb(model)
    assert (velocity(model) - expected).abs().max() > 0.05
    with parallel.reference(model):
        assert_close(velocity(model), expected)
    if train_lm:
        assert (chat(model.lm)[2] - said[2]).abs().max() > 0.05
        with parallel.reference(model.lm):
            images = blip3o._to_pil(pictures())
            prompts = model.lm.encode(PROMPTS, images=[images[0], None, images[2:4], images[3]])
            logps = model.lm.logps(prompts, said[0], torch.ones_like(said[0]), 1.0)
            assert (logps - said[2]).masked_fill(said[1] == 0, 0).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(train_lm=True),
        dict(train_lm=True, train_dm=False),
        dict(lora_rank=2, lora_alpha=4),
        dict(train_lm=True, lora_rank=2, lora_alpha=4),
    ],
)
def test_saved_model_is_ours_when_loaded(folder, options, tmp_path):
    model = load(folder, **options)
    before = velocity(model)
    perturb(model)
    after = velocity(model), chat(model.lm)
    assert (after[0] - before).abs().max() > 0.02
    again = load(export(model, tmp_path / "one"))
    assert models.family(tmp_path / "one") == model.config["model_type"]
    if options.get("lora_rank"):
        # What is left is the rounding of the merged weights.
        assert_close(velocity(double(load(tmp_path / "one"))), velocity(double(model)), 5e-5)
        assert (chat(again.lm)[2] - after[1][2]).abs().max() < 1e-3
        files = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert files == ["adapter.safetensors", "config.json"]
        # Trained on in full, with what the adapter changed in frozen parts
        assert same_weights(load(export(again, tmp_path / "two")), again)
    else:
        assert same_weights(again, model)
        # A folder of its own: what lies in it is copied on, not referred to.
        other = load(export(again, tmp_path / "two"))
        (tmp_path / "one").rename(tmp_path / "gone")
        assert same_weights(other, model)
        assert same_weights(load(tmp_path / "two"), model)
        assert_close(velocity(double(other)), velocity(double(model)), 1e-9)


def test_language_model_alone(folder, tmp_path):
    """Scripts of language models take a unified model for its language model, trained or not."""
    model = load(folder, train_lm=True)
    assert models.lm_family(folder) == "qwen2.5-vl"
    lm = models.load_lm(folder, "cpu", torch.float32)
    assert same_weights(lm, model.lm)
    perturb(model)
    lm = models.load_lm(export(model, tmp_path / "joint"), "cpu", torch.float32)
    assert same_weights(lm, model.lm)
    assert (chat(lm)[2] - chat(model.lm)[2]).abs().max() < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def sharded(folder, options, edits):
    """Gradients of the mean over four rows, split between the ranks, and what generate makes meanwhile."""
    world = parallel.init()
    model = load(folder, **options)
    with torch.no_grad():
        perturb(model, 0.05)
    for part in [*model.parts.values(), *(model.reference_parts or {}).values()]:
        parallel.shard(part, model.blocks(part), world, torch.float32, checkpoint_activations=True)
    rows = range(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    cond, images = encoded(model, edits), blip3o._to_pil(pictures())
    loss(model, cond, rows=slice(rows.start, rows.stop)).backward()
    trained = parallel.trained(model.parts)
    gradients = {name: p.grad.full_tensor() for name, p in trained.items()}
    with torch.no_grad(), parallel.unsharded(model.parts):
        x, sigma = (t[rows.start : rows.stop] for t in inputs(model))
        v = model.velocity(x, sigma, model.condition({k: t[rows.start : rows.stop] for k, t in cond.items()}))
    with torch.no_grad(), parallel.reference(model):
        part = model.condition({k: t[rows.start : rows.stop] for k, t in cond.items()})
        v_ref = model.velocity(x, sigma, part)
    prompts = model.lm.encode([PROMPTS[b] for b in rows], images=[images[b] for b in rows])
    ids = model.lm.generate(prompts, 5, 1.0, torch.tensor(list(rows)))["ids"]
    return dict(gradients=gradients, v=v, v_ref=v_ref, ids=ids)


@pytest.mark.parametrize(
    "variant, options, edits",
    [
        ("blip3o", dict(with_reference=True), True),
        ("blip3o", dict(lora_rank=2, lora_alpha=4), False),
        ("metaquery", dict(lora_rank=2, lora_alpha=4, train_lm=True), True),
        ("metaquery", dict(with_reference=True, train_lm=True), False),
    ],
)
def test_two_ranks_equal_one(folders, variant, options, edits):
    (one,) = processes.run(sharded, folders / variant, options, edits)
    two = processes.run(sharded, folders / variant, options, edits, ranks=2)
    for key in ("v", "v_ref"):
        assert_close(torch.cat([r[key] for r in two]), one[key])
    assert torch.equal(torch.cat([r["ids"] for r in two]), one["ids"])
    for name, gradient in one["gradients"].items():
        scale = max(gradient.abs().max().item(), 1e-3)
        for r in two:
            torch.testing.assert_close(r["gradients"][name], gradient, atol=5e-5 * scale, rtol=0, msg=name)


def mixed(folder):
    """One rank edits while the other draws from text; the gradients of both are summed."""
    world = parallel.init()
    model = load(folder)
    for part in model.parts.values():
        parallel.shard(part, model.blocks(part), world, torch.float32)
    kinds = [True, False] if world.size == 1 else [world.rank == 0]
    for edits in kinds:
        (loss(model, encoded(model, edits)) / len(kinds)).backward()
    return {name: p.grad.full_tensor() for name, p in parallel.trained(model.parts).items()}


def test_ranks_may_have_other_tasks(folders):
    (one,) = processes.run(mixed, folders / "blip3o")
    for gradients in processes.run(mixed, folders / "blip3o", ranks=2):
        for name, gradient in one.items():
            scale = max(gradient.abs().max().item(), 1e-3)
            torch.testing.assert_close(gradients[name], gradient, atol=5e-5 * scale, rtol=0, msg=name)


@pytest.fixture
def world():
    world = parallel.init()
    yield world
    dist.destroy_process_group()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_training_step_under_fsdp(folder, world, lora_rank):
    options = dict(lora_rank=lora_rank, lora_alpha=8)
    model, exact, gradients = load(folder, torch.bfloat16, **options), load(folder, **options), []
    for m in (model, exact):
        perturb(m, 0.02)
    assert {p.dtype for p in model.parts["lm"].parameters()} == {torch.bfloat16}
    for part in model.parts.values():
        parallel.shard(part, model.blocks(part), world, torch.bfloat16, checkpoint_activations=True)
    for m in (model, exact):
        loss(m, encoded(m, True)).backward()
        trained = parallel.trained(m.parts)
        assert {parallel.local(p).dtype for p in trained.values()} == {torch.float32}
        gradients.append(torch.cat([parallel.local(p.grad).flatten() for p in trained.values()]))
    assert gradients[0].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


# ----------------------------------------------------------------------------------------------------------------------
# tiny-blip3o and errors


def test_tiny_unified_models(tmp_path):
    for variant in VARIANTS:
        for make in (tiny.blip3o_folder, tiny.blip3o_start):
            make(tmp_path / variant, variant=variant)
            make(tmp_path / "again", variant=variant)
            first, second = (load_file(tmp_path / name / "model.safetensors") for name in (variant, "again"))
            assert all(torch.equal(t, second[name]) for name, t in first.items())
    for name in models.UNIFIED:
        family = name.split("-")[1]
        assert models.family(name) == family and models.lm_family(name) == "qwen2.5-vl"
        model = models.load(name, "cpu", torch.float32)
        assert model.reference_images == "optional" and model.latent_size(32, 32) == (4, 4)
        assert ("reference" in model.encode(["a"], pictures(1, (32, 32)))) == (family == "blip3o")


def test_exported_model_finds_parts_that_lay_beside_its_start(tmp_path):
    """config.json of tiny-blip3o-start names its parts relative to itself: an export must name their place."""
    shutil.copytree(models.folder_or_id("tiny-blip3o"), tmp_path / "a" / "tiny-blip3o")
    shutil.copytree(models.folder_or_id("tiny-blip3o-start"), tmp_path / "a" / "start")
    model = load(tmp_path / "a" / "start")
    again = load(export(model, tmp_path / "b" / "c" / "run"))
    assert same_weights(again, model)
    config = json.loads((tmp_path / "b" / "c" / "run" / "config.json").read_text())
    assert config["lm"] == str(tmp_path / "a" / "tiny-blip3o" / "lm-start")


def test_errors(folders, tmp_path):
    model = load(folders / "blip3o")
    with pytest.raises(ValueError, match="expected an image for each of 4 prompts, got 3"):
        model.encode(PROMPTS, pictures(3))
    with pytest.raises(ValueError, match="--resolution: 30 x 48 is not a multiple of 4 pixels"):
        model.encode(PROMPTS, pictures(4, (30, 48)))
    with pytest.raises(ValueError, match="a prompt of 25[0-9] tokens and 5 queries do not fit into the context of 256"):
        model.encode(["x" * 198])
    with pytest.raises(ValueError, match="--offload-encoders: a unified model trains through its language model"):
        load(folders / "blip3o", offload_encoders=True)
    with pytest.raises(ValueError, match="is no folder of a unified model"):
        blip3o.load(folders / "lm", "cpu", torch.float32)
    lm = tmp_path / "text"
    tiny.qwen_lm().save_pretrained(lm)
    blip3o.create(tmp_path / "blind", str(lm), str(folders / "sana"), head_dim=16)
    with pytest.raises(ValueError, match="its language model '.*text' is no Qwen2.5-VL"):
        load(tmp_path / "blind")
    wrong = tmp_path / "wrong"
    blip3o.create(wrong, str(folders / "lm"), str(folders / "sana"), "metaquery", head_dim=16, num_layers=1)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | dict(num_layers=2)))
    with pytest.raises(
        RuntimeError, match="wrong' does not fit its config.json: 1[0-9] weights of connector are missing"
    ):
        load(wrong)
    (wrong / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="model.safetensors is missing or damaged"):
        load(wrong)
    adapted = load(folders / "blip3o", train_lm=True, lora_rank=2, lora_alpha=2)
    with pytest.raises(ValueError, match="its adapter changes the language model too; load it as --model"):
        models.load_lm(export(adapted, tmp_path / "adapter"), "cpu", torch.float32)
    with pytest.raises(ValueError, match="unknown variant 'blip': expected one of blip3o, metaquery"):
        blip3o.create(tmp_path / "none", str(folders / "lm"), str(folders / "sana"), "blip")


# ----------------------------------------------------------------------------------------------------------------------
# In a script


def train_edits(out):
    seen, encode = [], blip3o.BLIP3o.encode

    def encode_and_record(model, prompts, images=None, negative=None, seeds=None):
        cond = encode(model, prompts, images, negative, seeds)
        seen.append((seeds, cond["reference"]))
        return cond

    blip3o.BLIP3o.encode = encode_and_record
    size = dict(num_iterations=2, num_prompts=2, group_size=3, micro_batch_size=6, eval_size=2, num_updates=1)
    guided = dict(guidance=2.0, image_guidance=1.5, kl_coef=0.1, reward=("jpeg",))
    args = flow_grpo.recipe("tiny-blip3o-start")
    edits = dict(prompts="shapes-edit", eval_prompts="shapes-edit")
    flow_grpo.main(dataclasses.replace(args, out=out, eval_every=2, save_every=2, **edits, **size, **guided))
    return seen, run_folder.rows(out)


def test_triple_guidance_and_noisy_references_are_replayed(tmp_path):
    seen, rows = processes.run(train_edits, str(tmp_path / "run"))[0]
    assert [row["on_policy_err"] for row in rows[:2]] == [0.0, 0.0] and rows[0]["kl"] == 0.0
    assert all(row["grad_norm"] > 0 for row in rows[:2])
    (first, at_first), (_, one), (_, two), (last, at_last) = seen  # evaluation, two iterations, evaluation
    assert torch.equal(first, last) and torch.equal(at_first, at_last) and not torch.equal(one, two)
    assert len({seed for seeds, _ in seen[:3] for seed in seeds.tolist()}) == 6
