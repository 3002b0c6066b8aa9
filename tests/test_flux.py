import json
import math
import shutil

import httpx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

import models
from models import checkpoint, parallel, tiny

PROMPTS = ["a red circle", "two Blue squares, left of a dog!"]
# Two FLUX-shaped models that share no dimension with each other or with tiny-flux.
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
    num_single_layers=3,
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
    pipeline = tiny.flux_pipeline(seed=seed, **dimensions)
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
    return random_folder(tmp_path_factory.mktemp("plain"), 1, 0.7, 0.2, PLAIN)


@pytest.fixture(scope="session")
def guided(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("guided"), 2, 1.3, -0.1, GUIDED)


def load(folder, **options):
    return models.load(folder, device="cpu", dtype=options.pop("dtype", torch.float32), **options)


def stock(folder):
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*values):
    return torch.tensor(values, dtype=torch.int64)


@torch.no_grad()
def ours(model, prompts=PROMPTS, guidance=(1.0, 1.0), size=(16, 24), num_steps=3, **options):
    """Latents at the end of the Euler ODE, from the init noise of seeds 0, 1, ..."""
    cond = model.encode(prompts, **options)
    sigmas = model.sigmas(num_steps, *size)
    x = model.init_noise(torch.arange(len(prompts)), *size)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        v = model.velocity(x, sigma.float().expand(len(x)), cond, guidance)
        x = x + v * (sigma_next - sigma).float()
    return x


def theirs(pipeline, model, prompts=PROMPTS, size=(16, 24), num_steps=3, output="latent", **options):
    """The same from the stock pipeline, called as a user would; from `model` it takes the init noise and the text
    length alone."""
    x = model.init_noise(torch.arange(len(prompts)), *size)
    images = pipeline(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=num_steps,
        latents=FluxPipeline._pack_latents(x, *x.shape),
        max_sequence_length=model.text_tokens,
        output_type=output,
        **options,
    ).images
    if output == "latent":
        return FluxPipeline._unpack_latents(images, *size, 2 ** (len(pipeline.vae.config.block_out_channels) - 1))
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def perturb(model, scale):
    """Move what is trained, as training would."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parallel.trained(model.parts).values():
            p.add_(torch.randn(p.shape, generator=draw) * scale)


def export(model, folder):
    model.save(folder, checkpoint.full_tensors(parallel.trained(model.parts)))
    return str(folder)


def inputs(model, size=(16, 24), prompts=PROMPTS):
    """(x, sigma, cond) in the middle of a trajectory, another sigma for every row."""
    x = model.init_noise(torch.arange(len(prompts)) + 10, *size)
    return x, torch.linspace(0.3, 0.9, len(prompts)), model.encode(prompts)


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert a.std() > 0.05  # a black picture equals any other
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling, against the stock pipeline


@pytest.mark.parametrize("size, num_steps", [((16, 16), 2), ((24, 8), 5)])
def test_ode_equals_stock_pipeline(plain, size, num_steps):
    model, run = load(plain), dict(size=size, num_steps=num_steps)
    assert_close(ours(model, **run), theirs(stock(plain), model, **run))


@pytest.mark.parametrize("negative", [None, ["A bad picture"]])
def test_true_guidance_equals_stock_pipeline(plain, negative):
    model, pipeline = load(plain), stock(plain)
    x = ours(model, guidance=(3.0, 1.0), negative=negative)
    null = (negative or [""]) * len(PROMPTS)
    assert_close(x, theirs(pipeline, model, true_cfg_scale=3.0, negative_prompt=null))
    assert (x - ours(model)).abs().max() > 0.1


@pytest.mark.parametrize("size", [(16, 16), (32, 24)])
def test_embedded_guidance_equals_stock_pipeline(guided, size):
    model = load(guided)
    x = ours(model, guidance=(3.5, 1.0), size=size)
    assert_close(x, theirs(stock(guided), model, guidance_scale=3.5, size=size))
    assert (x - ours(model, size=size)).abs().max() > 0.02


@pytest.mark.parametrize("name, guidance", [("plain", dict()), ("guided", dict(guidance_scale=2.0))])
def test_decoded_image_equals_stock_pipeline(request, name, guidance):
    folder = request.getfixturevalue(name)
    model = load(folder)
    images = model.decode(ours(model, guidance=(guidance.get("guidance_scale", 1.0), 1.0)))
    assert images.dtype == torch.float32 and images.shape == (2, 3, 16, 24)
    assert_close(images, theirs(stock(folder), model, output="np", **guidance))


def test_decode_clamps(plain):
    model = load(plain)
    images = model.decode(1e3 * model.init_noise(seeds(0), 16, 16))
    assert images.min() == 0 and images.max() == 1


def test_encode_images_inverts_the_normalisation_of_decode(guided):
    model = load(guided)
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    x = model.encode_images(images)
    assert x.dtype == torch.float32 and x.shape == (2, 6, 4, 6)
    posterior = model.vae.encode(images * 2 - 1).latent_dist.mean
    assert_close(x / model.vae.config.scaling_factor + model.vae.config.shift_factor, posterior, 1e-5)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (256, 256)])
def test_sigmas_equal_stock_scheduler(plain, size):
    model, scheduler = load(plain), stock(plain).scheduler
    num_tokens = size[0] * size[1] // 16
    shift = math.exp(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256))
    for num_steps in (1, 2, 7, 28):
        sigmas = model.sigmas(num_steps, *size)
        retrieve_timesteps(
            scheduler,
            sigmas=np.linspace(1.0, 1 / num_steps, num_steps),
            mu=calculate_shift(num_tokens, 256, 4096, 0.5, 1.15),
        )
        assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,)
        assert torch.equal(sigmas, scheduler.sigmas.double())
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        linear = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        torch.testing.assert_close(sigmas, shift * linear / (1 + (shift - 1) * linear), rtol=0, atol=1e-6)


def test_resolution_must_fit_the_patches(plain, guided):
    assert load(plain).latent_size(16, 20) == (8, 10)
    model = load(guided)
    assert model.latent_size(16, 24) == (4, 6)
    for call in (lambda: model.latent_size(20, 16), lambda: model.sigmas(4, 16, 20)):
        with pytest.raises(ValueError, match=r"--resolution: \d+ x \d+ is not a multiple of 8 pixels"):
            call()


def test_init_noise_is_a_function_of_each_row_s_seed(plain):
    model = load(plain)
    whole = model.init_noise(seeds(5, -3, 2**62, 5), 16, 24)
    assert whole.dtype == torch.float32 and whole.shape == (4, 4, 8, 12)
    assert torch.equal(whole[0], whole[3]) and not torch.equal(whole[0], whole[1])
    parts = [model.init_noise(seeds(seed), 16, 24) for seed in (2**62, 5, -3)]
    assert torch.equal(torch.cat(parts), whole[[2, 0, 1]])


def test_init_noise_is_standard_normal(plain):
    x = load(plain).init_noise(torch.arange(64), 32, 32).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5 and abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    rows = x.flatten(1)
    correlation = rows @ rows.T / rows.shape[1]
    assert (correlation - torch.eye(64)).abs().max() < 6 * (2 / rows.shape[1]) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def test_encode_equals_stock_pipeline(plain):
    model = load(plain)
    long = "a red circle " * 30  # truncated
    prompts = [*PROMPTS, "", long]
    cond = model.encode(prompts)
    t5, clip, _ = stock(plain).encode_prompt(prompts, None, max_sequence_length=model.text_tokens)
    null_t5, null_clip, _ = stock(plain).encode_prompt([""], None, max_sequence_length=model.text_tokens)
    assert set(cond) == {"t5", "clip", "t5_null", "clip_null"}
    assert_close(cond["t5"], t5, 1e-5)
    assert_close(cond["clip"], clip, 1e-5)
    assert_close(cond["t5_null"], null_t5.expand(4, -1, -1), 1e-5)
    assert_close(cond["clip_null"], null_clip.expand(4, -1), 1e-5)
    assert torch.equal(cond["t5"], torch.cat([model.encode([prompt])["t5"] for prompt in prompts]))


def test_null_rows_only_where_true_guidance_is_possible(guided):
    assert set(load(guided).encode(PROMPTS)) == {"t5", "clip"}


def test_cached_prompts_do_not_run_the_encoders(plain, tmp_path):
    def counted(**options):
        model, rows = load(plain, **options), []
        for encoder in (model.text_encoder, model.text_encoder_2):
            encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
        return model, rows

    model, rows = counted(cache_prompts=2, cache_folder=str(tmp_path / "rows"))
    first = model.encode(PROMPTS[:1])
    assert rows == [1, 1, 1, 1]  # both encoders for the prompt and for the empty prompt
    again = model.encode(PROMPTS[:1])
    assert rows == [1, 1, 1, 1] and all(torch.equal(first[name], again[name]) for name in first)
    model.encode(PROMPTS)
    assert rows == [1] * 6

    other, rows = counted(cache_folder=str(tmp_path / "rows"))
    again = other.encode(PROMPTS[:1])
    assert rows == [] and all(torch.equal(first[name], again[name]) for name in first)

    model, rows = counted(cache_prompts=2)
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0]):  # with the empty prompt three, so one is always gone
        model.encode([prompt])
    assert len(rows) == 2 * 4


def test_offloaded_encoders_wait_on_the_cpu(plain):
    for offload, where in ((True, "cpu"), (False, "meta")):
        model = models.load(plain, device="meta", dtype=torch.float32, offload_encoders=offload)
        for encoder in (model.text_encoder, model.text_encoder_2):
            assert {p.device.type for p in encoder.parameters()} == {where}
        assert {p.device.type for p in model.vae.parameters()} == {"meta"}


@pytest.mark.gpu
def test_offloaded_encoders_visit_the_gpu_and_return(plain):
    model = models.load(plain, device="cuda", dtype=torch.float32, offload_encoders=True)
    devices = []
    for encoder in (model.text_encoder, model.text_encoder_2):
        encoder.register_forward_hook(lambda module, args, output: devices.append(args[0].device.type))
    cond = model.encode(PROMPTS)
    assert set(devices) == {"cuda"} and cond["t5"].device.type == "cuda"
    assert {p.device.type for p in [*model.text_encoder.parameters(), *model.text_encoder_2.parameters()]} == {"cpu"}
    assert_close(cond["t5"].cpu(), load(plain).encode(PROMPTS)["t5"], 1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Velocity


def test_guidance_equals_two_forwards_and_their_gradient(plain):
    model = load(plain, lora_rank=2, lora_alpha=2)
    perturb(model, 0.1)
    x, sigma, cond = inputs(model)
    parameters = list(parallel.trained(model.parts).values())
    null = {"t5": cond["t5_null"], "clip": cond["clip_null"]}

    def gradient(v):
        return torch.cat([g.flatten() for g in torch.autograd.grad(v.square().mean(), parameters, retain_graph=True)])

    together = model.velocity(x, sigma, cond, (2.5, 1.0))
    v, v_null = model.velocity(x, sigma, cond), model.velocity(x, sigma, null)
    apart = v_null + 2.5 * (v - v_null)
    assert_close(together, apart, 1e-5)
    expected, scale = gradient(apart), gradient(v).abs().max()
    torch.testing.assert_close(gradient(together), expected, rtol=0, atol=1e-5 * scale.item())
    one_half = v_null.detach() + 2.5 * (v - v_null.detach())
    assert (gradient(one_half) - expected).abs().max() > 0.01 * scale


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_velocity_of_a_row_does_not_depend_on_the_batch(request, name):
    model = load(request.getfixturevalue(name))
    x, sigma, cond = inputs(model)
    with torch.no_grad():
        whole = model.velocity(x, sigma, cond, (2.0, 1.0))
        rows = [
            model.velocity(x[i : i + 1], sigma[i : i + 1], {k: t[i : i + 1] for k, t in cond.items()}, (2.0, 1.0))
            for i in (0, 1)
        ]
    assert_close(whole, torch.cat(rows), 1e-5)


def test_bfloat16_lora_is_close_to_float32(plain):
    model, exact = (load(plain, dtype=dtype, lora_rank=4, lora_alpha=8) for dtype in (torch.bfloat16, torch.float32))
    for name, p in model.parts["transformer"].named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    for m in (model, exact):
        perturb(m, 0.1)
    x, sigma, cond = inputs(exact)
    assert model.encode(PROMPTS)["t5"].dtype == torch.bfloat16
    for guidance in (1.0, 3.0):
        v = model.velocity(x, sigma, model.encode(PROMPTS), (guidance, 1.0)).float()
        reference = exact.velocity(x, sigma, cond, (guidance, 1.0))
        error = (v - reference).norm() / reference.norm()
        assert 0 < error < 0.05


def test_full_fine_tuning_keeps_float32_masters(plain, tmp_path):
    stored = load_file(f"{plain}/transformer/diffusion_pytorch_model.safetensors")
    model = load(plain, dtype=torch.bfloat16, with_reference=True)
    masters = dict(model.parts["transformer"].named_parameters())
    assert masters.keys() == stored.keys() == {k.removeprefix("transformer.") for k in parallel.trained(model.parts)}
    for name, p in masters.items():
        assert p.dtype == torch.float32 and torch.equal(p, stored[name])
    for module in (model.reference_parts["transformer"], model.text_encoder, model.text_encoder_2, model.vae):
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}

    folder = tmp_path / "rounded"  # FLUX.1-dev's files are bfloat16
    FluxPipeline.from_pretrained(plain, dtype=torch.bfloat16).save_pretrained(folder)
    model = load(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parts["transformer"].parameters()} == {torch.float32}


@pytest.fixture
def world():
    world = parallel.init()
    yield world
    dist.destroy_process_group()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_training_step_under_fsdp(plain, world, lora_rank):
    model = load(plain, dtype=torch.bfloat16, lora_rank=lora_rank, lora_alpha=8)
    exact = load(plain, lora_rank=lora_rank, lora_alpha=8)
    for m in (model, exact):
        perturb(m, 0.02)
    part = model.parts["transformer"]
    parallel.shard(part, model.blocks(part), world, torch.bfloat16)
    x, sigma, cond = inputs(exact)
    gradients = []
    for m in (model, exact):
        v = m.velocity(x, sigma, m.encode(PROMPTS), (2.0, 1.0))
        v.float().square().mean().backward()
        trained = parallel.trained(m.parts)
        assert {parallel.local(p).dtype for p in trained.values()} == {torch.float32}
        gradients.append(torch.cat([parallel.local(p.grad).flatten() for p in trained.values()]))
    assert gradients[0].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


def test_attention_is_named(plain):
    assert load(plain).attention == "torch scaled_dot_product_attention"  # flash-attn is for CUDA and 16 bits


# ----------------------------------------------------------------------------------------------------------------------
# Reference policy


def test_fresh_adapter_and_reference_are_the_base_model(plain):
    model, base = load(plain, lora_rank=4, lora_alpha=8), load(plain)
    x, sigma, cond = inputs(base)
    with torch.no_grad():
        expected = base.velocity(x, sigma, cond, (2.0, 1.0))
        assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        perturb(model, 0.1)
        moved = model.velocity(x, sigma, cond, (2.0, 1.0))
        assert (moved - expected).abs().max() > 0.05
        with parallel.reference(model):
            assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), moved)


def test_adapter_does_not_depend_on_the_generator(plain):
    adapters = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        model = load(plain, lora_rank=4, lora_alpha=8)
        adapters.append(torch.cat([p.flatten() for p in parallel.trained(model.parts).values()]))
    assert torch.equal(*adapters) and adapters[0].std() > 0.05


def test_reference_of_full_fine_tuning_is_the_frozen_copy(plain):
    model = load(plain, with_reference=True)
    x, sigma, cond = inputs(model)
    with torch.no_grad():
        expected = model.velocity(x, sigma, cond)
        perturb(model, 0.05)
        moved = model.velocity(x, sigma, cond)
        assert (moved - expected).abs().max() > 0.05
        with pytest.raises(KeyboardInterrupt):
            with parallel.reference(model):
                assert torch.equal(model.velocity(x, sigma, cond), expected)
                raise KeyboardInterrupt
        assert torch.equal(model.velocity(x, sigma, cond), moved)
    assert all(name.startswith("transformer.") for name in parallel.trained(model.parts))


# ----------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("name, guidance", [("plain", dict()), ("guided", dict(guidance_scale=2.0))])
def test_exported_lora_in_the_stock_pipeline_is_our_model(request, name, guidance, tmp_path):
    base = request.getfixturevalue(name)
    model = load(base, lora_rank=4, lora_alpha=8)
    before = ours(model, guidance=(guidance.get("guidance_scale", 1.0), 1.0))
    perturb(model, 0.1)
    x = ours(model, guidance=(guidance.get("guidance_scale", 1.0), 1.0))
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "lora")
    tensors = load_file(f"{folder}/pytorch_lora_weights.safetensors")
    assert len(tensors) == len(parallel.trained(model.parts)) and not any("default" in key for key in tensors)

    pipeline = stock(base)
    pipeline.load_lora_weights(folder)
    assert_close(x, theirs(pipeline, model, **guidance))
    assert_close(model.decode(x), theirs(pipeline, model, output="np", **guidance))

    # Without the metadata the loader takes alpha = rank: half of our scale.
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    pipeline = stock(base)
    pipeline.load_lora_weights(str(tmp_path / "bare"))
    assert (theirs(pipeline, model, **guidance) - x).abs().max() > 0.01


@pytest.mark.parametrize("name", ["plain", "guided"])
def test_exported_full_model_is_ours_everywhere(request, name, tmp_path):
    model = load(request.getfixturevalue(name))
    before = ours(model)
    perturb(model, 0.05)
    x = ours(model)
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "full")
    assert_close(x, theirs(stock(folder), model, guidance_scale=1.0))
    assert_close(model.decode(x), theirs(stock(folder), model, guidance_scale=1.0, output="np"))
    assert torch.equal(ours(load(folder)), x)


def test_exported_full_model_has_the_compute_dtype(plain, tmp_path):
    folder = export(load(plain, dtype=torch.bfloat16), tmp_path / "full")
    stored = load_file(f"{folder}/transformer/diffusion_pytorch_model.safetensors")
    source = load_file(f"{plain}/transformer/diffusion_pytorch_model.safetensors")
    assert stored.keys() == source.keys()
    for name in stored:
        assert torch.equal(stored[name], source[name].bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def test_unknown_alias_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'tiny-flx', did you mean tiny-flux.*expected one of flux, "):
        load("tiny-flx")
    known = ", ".join(models.ALIASES | models.UNIFIED)
    for name in ("/no/such/folder", "./none", "~/none", "a/b/c"):
        with pytest.raises(ValueError, match=f"unknown model '{name}': expected one of {known}, a folder"):
            load(name)


def test_folder_must_be_a_supported_pipeline(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no model_index.json; expected a folder in diffusers layout"):
        load(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="pipeline class StableDiffusionPipeline is not supported; .*FluxPipeline"):
        load(str(tmp_path))


@pytest.mark.parametrize("name, vocabulary", [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")])
def test_tokenizer_without_its_files_is_an_error(plain, tmp_path, name, vocabulary):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / name / "tokenizer.json").unlink()
    size = json.loads((folder / vocabulary / "config.json").read_text())["vocab_size"]
    with pytest.raises(ValueError, match=f"'{folder}': {name} has [234] tokens for an encoder of {size}; its files"):
        load(str(folder))


@pytest.mark.parametrize("file", ["vae/config.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_incomplete_folder_is_one_error(plain, tmp_path, file):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / file).unlink()
    with pytest.raises(RuntimeError, match=f"'{folder}' is incomplete, download or save it again") as caught:
        load(str(folder))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


FLUX_DEV = "black-forest-labs/FLUX.1-dev"


def test_model_that_cannot_be_downloaded_is_one_error(offline):
    with pytest.raises(RuntimeError) as caught:
        load("flux")
    message = str(caught.value)
    for part in (f"'{FLUX_DEV}'", f"https://huggingface.co/{FLUX_DEV}", "`hf auth login`", f"`hf download {FLUX_DEV}`"):
        assert part in message
    assert "\n" not in message and caught.value.__cause__ is None and caught.value.__suppress_context__


def test_half_downloaded_model_is_one_error(offline, plain):
    repo = offline / f"models--{FLUX_DEV.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(plain, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(RuntimeError, match=f"'{FLUX_DEV}' is incomplete, download or save it again") as caught:
        load("flux")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    shutil.copytree(plain, snapshot, dirs_exist_ok=True)
    assert load("flux").latent_channels == 4


def test_every_refusal_of_the_hub_says_what_to_do():
    def refuse(error):
        raise error

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    for error, message in (
        (errors.GatedRepoError("403", response=response), "is gated: accept its licence at .*/a/b, .*`hf auth login`"),
        (errors.RepositoryNotFoundError("401", response=response), "does not exist .*, or is private: check the id"),
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached.*`hf download a/b`"),
        (ConnectionResetError("reset"), "the hub cannot be reached"),
    ):
        with pytest.raises(RuntimeError, match=f"^'a/b' .*{message}") as caught:
            models.hub("a/b", lambda: refuse(error))
        assert caught.value.__cause__ is None and caught.value.__suppress_context__ | (not caught.value.__context__)
    for error in (OSError(28, "No space left on device"), PermissionError(13, "Permission denied"), KeyError("a bug")):
        with pytest.raises(type(error)) as caught:
            models.hub("a/b", lambda: refuse(error))
        assert caught.value is error
    assert models.hub("a/b", lambda: "folder") == "folder"
