import json

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file

import flow_grpo
import models
from data import shapes
from kernels.sde_step import fold_seed, sde_logp
from models import checkpoint, flux, parallel, tiny

PROMPTS = ["make the red circle blue", "Add a dog!"]
# Two Kontext-shaped models that share no dimension with each other or with tiny-kontext.
PLAIN = dict(
    num_layers=1,
    num_single_layers=1,
    num_heads=2,
    head_dim=32,
    text_dim=24,
    pooled_dim=16,
    latent_channels=4,
    vae_channels=(8, 16),
)
GUIDED = dict(
    num_layers=2,
    num_single_layers=2,
    num_heads=3,
    head_dim=48,
    text_dim=40,
    pooled_dim=8,
    latent_channels=6,
    vae_channels=(8, 8, 24),
    guidance_embeds=True,
)


@torch.no_grad()
def random_folder(folder, seed, scaling, shift, dimensions):
    """A saved pipeline in which every parameter of the transformer matters."""
    pipeline = FluxKontextPipeline(**tiny.flux_pipeline(seed=seed, texts=PROMPTS, **dimensions).components)
    draw = torch.Generator().manual_seed(seed)
    for name, p in pipeline.transformer.named_parameters():
        p.copy_(torch.randn(p.shape, generator=draw) * (p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1))
        if "norm" in name and name.endswith("weight") and p.ndim == 1:
            p.add_(1)
    pipeline.vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("plain_kontext"), 1, 3.0, 0.2, PLAIN)


@pytest.fixture(scope="session")
def guided(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("guided_kontext"), 2, 2.0, -0.1, GUIDED)


def load(folder, **options):
    return models.load(folder, device="cpu", dtype=options.pop("dtype", torch.float32), **options)


def stock(folder):
    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(count, size):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def euler(model, x, cond, guidance, size, num_steps=3):
    sigmas = model.sigmas(num_steps, *size)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        v = model.velocity(x, sigma.float().expand(len(x)), cond, guidance)
        x = x + v * (sigma_next - sigma).float()
    return x


def ours(model, images, guidance=(2.5, 1.0), size=(16, 24)):
    """Latents at the end of the Euler ODE, from the init noise of seeds 0, 1, ..."""
    cond = model.encode(PROMPTS, images)
    return euler(model, model.init_noise(torch.arange(len(PROMPTS)), *size), cond, guidance, size)


def theirs(pipeline, model, images, size=(16, 24), output="latent", **options):
    """The same from the stock pipeline, told to leave both sizes as they are; from `model` it takes the init noise and
    the text length alone."""
    x = model.init_noise(torch.arange(len(PROMPTS)), *size)
    result = pipeline(
        image=images,
        prompt=PROMPTS,
        height=size[0],
        width=size[1],
        max_area=size[0] * size[1],
        _auto_resize=False,
        num_inference_steps=3,
        latents=FluxKontextPipeline._pack_latents(x, *x.shape),
        max_sequence_length=model.text_tokens,
        output_type=output,
        **options,
    ).images
    if output == "latent":
        return FluxKontextPipeline._unpack_latents(result, *size, pipeline.vae_scale_factor)
    return torch.from_numpy(result).permute(0, 3, 1, 2)


def perturb(model, scale):
    """Move what is trained, as training would."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parallel.trained(model.parts).values():
            p.add_(torch.randn(p.shape, generator=draw) * scale)


def export(model, folder):
    model.save(folder, checkpoint.full_tensors(parallel.trained(model.parts)))
    return str(folder)


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert a.std() > 0.05  # a black picture equals any other
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling, against the stock pipeline


@pytest.mark.parametrize(
    "size, reference", [((16, 16), (16, 16)), ((16, 24), (16, 24)), ((16, 24), (40, 8)), ((32, 16), (16, 32))]
)
def test_embedded_guidance_equals_stock_pipeline(guided, size, reference):
    model, images = load(guided), pictures(2, reference)
    x = ours(model, images, size=size)
    assert_close(x, theirs(stock(guided), model, images, size=size, guidance_scale=2.5))
    assert (x - ours(model, images.flip(0), size=size)).abs().max() > 0.05
    assert (x - ours(model, images, (1.0, 1.0), size)).abs().max() > 0.02


@pytest.mark.parametrize("size, reference", [((16, 24), (16, 24)), ((16, 24), (20, 8))])
def test_true_guidance_equals_stock_pipeline(plain, size, reference):
    model, pipeline, images = load(plain), stock(plain), pictures(2, reference)
    x = ours(model, images, (3.0, 1.0), size)
    assert_close(x, theirs(pipeline, model, images, size, true_cfg_scale=3.0, negative_prompt=["", ""]))
    off = ours(model, images, (1.0, 1.0), size)
    assert_close(off, theirs(pipeline, model, images, size))
    assert (x - off).abs().max() > 0.1


def test_decoded_image_equals_stock_pipeline(guided):
    model, images = load(guided), pictures(2, (24, 16))
    decoded = model.decode(ours(model, images))
    assert_close(decoded, theirs(stock(guided), model, images, output="np", guidance_scale=2.5))


def test_schedule_and_noise_are_of_the_output_alone(guided):
    model, pipeline = load(guided), stock(guided)
    theirs(pipeline, model, pictures(2, (32, 32)))
    assert torch.equal(model.sigmas(3, 16, 24), pipeline.scheduler.sigmas.double())


# ----------------------------------------------------------------------------------------------------------------------
# References


def test_encode_gives_every_prompt_its_own_image(guided):
    model, images = load(guided), pictures(3, (16, 24))
    prompts = [PROMPTS[0]] * 3
    cond = model.encode(prompts, images)
    assert set(cond) == {"t5", "clip", "image"} and cond["image"].dtype == torch.float32
    posterior = model.vae.encode(images * 2 - 1).latent_dist.mean
    assert_close(cond["image"], (posterior + 0.1) * 2.0, 1e-5)
    again = model.encode(prompts, images.flip(0))  # the text comes out of the cache, the image never does
    assert torch.equal(again["t5"], cond["t5"])
    assert_close(again["image"], cond["image"].flip(0), 1e-5)


@pytest.mark.parametrize("name, guidance", [("plain", (3.0, 1.0)), ("guided", (2.5, 1.0))])
def test_rows_of_a_batch_do_not_interact(request, name, guidance):
    model, images, size = load(request.getfixturevalue(name)), pictures(4, (24, 16)), (16, 24)
    prompts, x = [*PROMPTS, PROMPTS[0], "remove it"], model.init_noise(torch.arange(4), *size)
    whole = euler(model, x, model.encode(prompts, images), guidance, size)
    rows = [
        euler(model, x[i : i + 1], model.encode(prompts[i : i + 1], images[i : i + 1]), guidance, size)
        for i in range(4)
    ]
    assert_close(whole, torch.cat(rows), 1e-5)

    same, noise = [PROMPTS[0]] * 4, x[:1].expand(4, -1, -1, -1)
    swapped = torch.tensor([0, 3, 2, 1])
    before = euler(model, noise, model.encode(same, images), guidance, size)
    after = euler(model, noise, model.encode(same, images[swapped]), guidance, size)
    assert_close(after, before[swapped], 1e-5)
    assert (before[1] - before[3]).abs().max() > 0.05


def test_encode_images_in_pieces_is_the_same(plain, monkeypatch):
    model, images, pieces = load(plain), pictures(3, (1024, 1376)), []
    encode = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda x: pieces.append(len(x)) or encode(x))
    x = model.encode_images(images)
    assert pieces == [2, 1]  # 4 megapixels at most
    assert_close(x[2:], model.encode_images(images[2:]), 1e-5)


def test_image_is_required_or_refused(guided):
    model = load(guided)
    assert model.reference_images == "required"
    with pytest.raises(ValueError, match="^FluxKontextPipeline edits pictures: every prompt needs an image$"):
        model.encode(PROMPTS)
    with pytest.raises(ValueError, match="expected an image for each of 2 prompts, got 3"):
        model.encode(PROMPTS, pictures(3, (16, 16)))
    with pytest.raises(ValueError, match="20 x 16 is not a multiple of 8 pixels"):
        model.encode(PROMPTS, pictures(2, (20, 16)))
    model = flux.Flux(tiny.flux_pipeline(texts=PROMPTS, **PLAIN), "cpu", torch.float32)
    assert model.reference_images == "none" and "image" not in model.encode(PROMPTS)
    with pytest.raises(ValueError, match="^FluxPipeline makes pictures from text and takes no image$"):
        model.encode(PROMPTS, pictures(2, (16, 16)))


def test_bfloat16_is_close_to_float32(plain):
    """With true guidance: diffusers rounds embedded guidance to bfloat16 before it multiplies by 1000, 2500 to 2496,
    which a random transformer does not forgive."""
    model, exact, images = load(plain, dtype=torch.bfloat16, lora_rank=2), load(plain), pictures(2, (24, 16))
    x, sigma = exact.init_noise(torch.arange(2), 16, 24), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        cond = model.encode(PROMPTS, images)
        v = model.velocity(x, sigma, cond, (2.5, 1.0)).float()
        reference = exact.velocity(x, sigma, exact.encode(PROMPTS, images), (2.5, 1.0))
    assert cond["image"].dtype == torch.float32
    assert 0 < (v - reference).norm() / reference.norm() < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# Training and export


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_step_changes_only_what_is_trained(guided, lora_rank):
    model = load(guided, lora_rank=lora_rank, lora_alpha=8, with_reference=True)
    modules = {**model.parts, "vae": model.vae, "clip": model.text_encoder, "t5": model.text_encoder_2}
    if not lora_rank:
        modules["reference"] = model.reference_parts["transformer"]

    def state():
        return {f"{key}.{name}": p.detach().clone() for key, m in modules.items() for name, p in m.named_parameters()}

    perturb(model, 0.02)  # from a zero B no gradient reaches A
    before = state()
    optimizer = torch.optim.AdamW(parallel.trained(model.parts).values(), lr=1e-3, weight_decay=0.0)
    cond = model.encode(PROMPTS, pictures(2, (24, 16)))
    x = model.init_noise(torch.arange(2), 16, 24)
    model.velocity(x, torch.tensor([0.3, 0.9]), model.condition(cond), (2.5, 1.0)).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in state().items() if not torch.equal(p, before[name])}
    expected = {name for name in before if name.startswith("transformer.") and ("lora_" in name or not lora_rank)}
    assert changed == expected == set(parallel.trained(model.parts))


@pytest.mark.parametrize("sampler, guidance", [("flow_sde", 2.5), ("cps", 1.0)])
def test_replayed_logp_equals_rollout_logp(guided, sampler, guidance):
    model, images, size, T, G = load(guided, lora_rank=2, lora_alpha=4), pictures(2, (16, 16)), (16, 24), 4, 3
    perturb(model, 0.05)
    cond_P, prompt_B = model.encode(PROMPTS, images), torch.arange(2).repeat_interleave(G)
    cond = {name: rows[prompt_B] for name, rows in cond_P.items()}
    sigmas = model.sigmas(T, *size)
    _, a_T, b_T, c_T = schedule = (sigmas, *flow_grpo.coefficients(sampler, sigmas, 0.7, (0, T - 1)))
    seed_BT = fold_seed(torch.arange(2 * G)[:, None].expand(-1, T), torch.arange(T))
    x = model.init_noise(torch.arange(2 * G), *size)
    _, states, old_logp = flow_grpo.rollout(model, cond, x, schedule, (guidance, 1.0), seed_BT)
    assert states.shape == (2 * G, T, 6, 4, 6) and old_logp.shape == (2 * G, T - 1)
    error = 0.0
    for tile in torch.randperm(2 * G * (T - 1), generator=torch.Generator().manual_seed(0)).split(5):
        i, k = tile // (T - 1), tile % (T - 1)  # samples and steps mixed, as in an update
        rows = {name: rows[prompt_B[i]] for name, rows in cond_P.items()}
        v = model.velocity(states[i, k], sigmas[k].float(), model.condition(rows), (guidance, 1.0))
        coef = (coef_T[k].float() for coef_T in (a_T, b_T, c_T))
        logp, _ = sde_logp(v, states[i, k], states[i, k + 1], *coef)
        error = max(error, (logp - old_logp[i, k]).abs().max().item())
        wrong = {**rows, "image": cond_P["image"][1 - prompt_B[i]]}
        v_wrong = model.velocity(states[i, k], sigmas[k].float(), wrong, (guidance, 1.0))
        assert (v_wrong - v).abs().amax((1, 2, 3)).min() > 0.01
    print(f"{error=:.2g}")
    assert error <= 1e-5


def test_exported_lora_in_the_stock_pipeline_is_our_model(guided, tmp_path):
    model, images = load(guided, lora_rank=4, lora_alpha=8), pictures(2, (24, 16))
    before = ours(model, images)
    perturb(model, 0.1)
    x = ours(model, images)
    assert (x - before).abs().max() > 0.05
    pipeline = stock(guided)
    pipeline.load_lora_weights(export(model, tmp_path / "lora"))
    assert_close(x, theirs(pipeline, model, images, guidance_scale=2.5))


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_exported_full_model_is_ours_everywhere(request, name, tmp_path):
    model, images = load(request.getfixturevalue(name)), pictures(2, (24, 16))
    before = ours(model, images, (1.0, 1.0))
    perturb(model, 0.05)
    x = ours(model, images, (1.0, 1.0))
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "full")
    assert json.loads((tmp_path / "full" / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
    assert_close(x, theirs(stock(folder), model, images, guidance_scale=1.0))
    assert torch.equal(ours(load(folder), images, (1.0, 1.0)), x)


# ----------------------------------------------------------------------------------------------------------------------
# tiny-kontext


def test_tiny_kontext_is_always_the_same_model_and_can_be_trained(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        tiny.build("tiny-kontext", str(folder))
    for part in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_2/model"):
        a, b = (load_file(folder / f"{part}.safetensors") for folder in folders)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    model = load(str(folders[0]))
    assert model.embedded_guidance and model.reference_images == "required"
    texts = sorted({edit["prompt"] for edit in shapes.all_edits()})
    for tokenizer in (model.tokenizer, model.tokenizer_2):
        ids = tokenizer(texts).input_ids
        assert max(map(len, ids)) <= tokenizer.model_max_length and tokenizer.unk_token_id not in np.concatenate(
            [row[1:-1] for row in ids]
        )
    sources, _, metadata = shapes.edits(0, 0, 4)
    images = torch.from_numpy(sources).permute(0, 3, 1, 2) / 255
    x, sigma = model.init_noise(torch.zeros(4, dtype=torch.int64), 32, 32), torch.full((4,), 0.6)
    v = model.velocity(x, sigma, model.encode([m["prompt"] for m in metadata], images), (2.5, 1.0))
    assert 0.1 < v.std() < 2 and (v - v[:1]).abs().amax((1, 2, 3))[1:].min() > 0.01
    v.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parts["transformer"].parameters())
