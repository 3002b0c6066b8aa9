import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from PIL import Image
from safetensors.torch import load_file, save_file

import flow_grpo
import models
from data import shapes
from kernels.sde_step import sde_logp
from models import checkpoint, flux2, parallel, tiny

PROMPTS = ["a red circle", "two Blue squares, left of a dog!"]
# Two klein-shaped models that share no dimension with each other or with tiny-klein.
PLAIN = dict(
    num_layers=1,
    num_single_layers=1,
    num_heads=2,
    head_dim=16,
    text_dim=24,
    latent_channels=4,
    vae_channels=(8, 16),
)
DEEP = dict(
    num_layers=2,
    num_single_layers=3,
    num_heads=3,
    head_dim=24,
    text_dim=16,
    latent_channels=6,
    vae_channels=(8, 8, 24),
)


@torch.no_grad()
def random_folder(folder, seed, dimensions):
    """A saved pipeline in which every parameter of the transformer matters."""
    pipeline = tiny.klein_pipeline(seed=seed, **dimensions)
    draw = torch.Generator().manual_seed(seed)
    for name, p in pipeline.transformer.named_parameters():
        p.copy_(torch.randn(p.shape, generator=draw) * (p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1))
        if "norm" in name and p.ndim == 1:
            p.add_(1)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("plain"), 1, PLAIN)


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("deep"), 2, DEEP)


@pytest.fixture(scope="session")
def distilled(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("distilled"), 3, dict(PLAIN, is_distilled=True))


def load(folder, **options):
    return models.load(folder, device="cpu", dtype=options.pop("dtype", torch.float32), **options)


def stock(folder):
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*values):
    return torch.tensor(values, dtype=torch.int64)


def pictures(number, height, width):
    """float [0, 1] `number` 3 height width, in steps of 1 / 255; the stock pipeline refuses sides below 64 px."""
    draw = torch.Generator().manual_seed(number + height)
    smooth = torch.randint(0, 256, (number, 3, 4, 4), generator=draw).float()
    return F.interpolate(smooth, (height, width), mode="nearest") / 255


def pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def ours(model, prompts=PROMPTS, guidance=4.0, size=(16, 24), num_steps=3, **options):
    """Latents at the end of the Euler ODE, from the init noise of seeds 0, 1, ..."""
    cond = model.encode(prompts, **options)
    sigmas = model.sigmas(num_steps, *size)
    x = model.init_noise(torch.arange(len(prompts)), *size)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        v = model.velocity(x, sigma.float().expand(len(x)), cond, (guidance, 1.0))
        x = x + v * (sigma_next - sigma).float()
    return x


def theirs(pipeline, model, prompts=PROMPTS, guidance=4.0, size=(16, 24), num_steps=3, output="latent", images=None):
    """The same from the stock pipeline, called as a user would, once a prompt; from `model` it takes the init noise and
    the text length alone. Its latents are neither whitened nor patched on the way out."""
    x = model.init_noise(torch.arange(len(prompts)), *size)
    outputs = [
        pipeline(
            image=None if images is None else [pil(images[i])],
            prompt=[prompt],
            height=size[0],
            width=size[1],
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            latents=x[i : i + 1],
            max_sequence_length=model.text_tokens,
            output_type=output,
        ).images
        for i, prompt in enumerate(prompts)
    ]
    if output == "latent":
        bn = pipeline.vae.bn
        z = pipeline._patchify_latents(torch.cat(outputs))
        return (z - bn.running_mean.view(-1, 1, 1)) / (bn.running_var.view(-1, 1, 1) + 1e-4).sqrt()
    return torch.from_numpy(np.concatenate(outputs)).permute(0, 3, 1, 2)


def perturb(model, scale):
    """Move what is trained, as training would."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in parallel.trained(model.parts).values():
            p.add_(torch.randn(p.shape, generator=draw) * scale)


def export(model, folder):
    model.save(folder, checkpoint.full_tensors(parallel.trained(model.parts)))
    return str(folder)


def inputs(model, size=(16, 24), prompts=PROMPTS, images=None):
    """(x, sigma, cond) in the middle of a trajectory, another sigma for every row."""
    x = model.init_noise(torch.arange(len(prompts)) + 10, *size)
    return x, torch.linspace(0.3, 0.9, len(prompts)), model.encode(prompts, images=images)


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert a.std() > 0.05  # a black picture equals any other
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling, against the stock pipeline


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size, num_steps", [((16, 16), 2), ((24, 8), 5)])
def test_ode_equals_stock_pipeline(plain, size, num_steps, guidance):
    model, run = load(plain), dict(size=size, num_steps=num_steps, guidance=guidance)
    assert_close(ours(model, **run), theirs(stock(plain), model, **run))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(32, 32), (24, 8)])
def test_editing_equals_stock_pipeline(deep, size, guidance):
    model, run = load(deep), dict(size=size, guidance=guidance, images=pictures(2, 64, 80))
    x = ours(model, **run)
    assert_close(x, theirs(stock(deep), model, **run))
    assert (x - ours(model, size=size, guidance=guidance)).abs().max() > 0.1


def test_guidance_moves_the_sample(plain):
    model = load(plain)
    x = ours(model)
    assert (x - ours(model, guidance=1.0)).abs().max() > 0.1
    assert torch.equal(x, ours(model, negative=[""]))
    assert (x - ours(model, negative=["a bad picture"])).abs().max() > 0.1


@pytest.mark.parametrize("images", [None, pictures(2, 64, 72)])
def test_decoded_image_equals_stock_pipeline(plain, images):
    model = load(plain)
    decoded = model.decode(ours(model, images=images))
    assert decoded.dtype == torch.float32 and decoded.shape == (2, 3, 16, 24)
    assert_close(decoded, theirs(stock(plain), model, output="np", images=images))


def test_decode_clamps(plain):
    model = load(plain)
    images = model.decode(1e3 * model.init_noise(seeds(0), 16, 16))
    assert images.min() == 0 and images.max() == 1


def test_encode_images_equals_stock_pipeline(deep):
    model, pipeline, images = load(deep), stock(deep), pictures(3, 32, 48)
    for vae in (model.vae, pipeline.vae):
        vae.double()  # a random autoencoder amplifies the rounding of fp32 by a factor of 30
    x, pixels = model.encode_images(images), (images * 2 - 1).double()
    assert x.dtype == torch.float32 and x.shape == (3, 24, 4, 6) and x.is_contiguous()
    with torch.no_grad():
        assert_close(x.double(), pipeline._encode_vae_image(pixels, None), 1e-6)
        again = model.vae.decode(model.vae.encode(pixels).latent_dist.mean).sample
    assert_close(model.decode(x).double(), (again / 2 + 0.5).clamp(0, 1), 1e-5)


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (256, 320)])
def test_sigmas_equal_stock_scheduler(plain, size):
    model, scheduler = load(plain), stock(plain).scheduler
    num_tokens = size[0] * size[1] // 16
    for num_steps in (1, 2, 7, 50):
        sigmas = model.sigmas(num_steps, *size)
        mu = compute_empirical_mu(num_tokens, num_steps)
        retrieve_timesteps(scheduler, num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,)
        assert torch.equal(sigmas, scheduler.sigmas.double())
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        linear = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        shift = np.exp(mu)
        torch.testing.assert_close(sigmas, shift * linear / (1 + (shift - 1) * linear), rtol=0, atol=1e-6)


def test_scheduler_that_makes_its_own_sigmas_is_left_to_it(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(config, use_flow_sigmas=True)))
    model = load(str(folder))
    assert_close(ours(model), theirs(stock(folder), model))
    assert not torch.equal(model.sigmas(3, 16, 24), load(plain).sigmas(3, 16, 24))


def test_resolution_must_fit_the_patches(plain, deep):
    assert load(plain).latent_size(16, 20) == (4, 5)
    model = load(deep)
    assert model.latent_size(16, 24) == (2, 3)
    for call in (
        lambda: model.latent_size(20, 16),
        lambda: model.sigmas(4, 16, 20),
        lambda: model.init_noise(seeds(0), 12, 16),
        lambda: model.encode(PROMPTS, images=pictures(2, 16, 20)),
    ):
        with pytest.raises(ValueError, match=r"--resolution: \d+ x \d+ is not a multiple of 8 pixels"):
            call()


def test_init_noise_is_a_function_of_each_row_s_seed(plain):
    model = load(plain)
    whole = model.init_noise(seeds(5, -3, 2**62, 5), 16, 24)
    assert whole.dtype == torch.float32 and whole.shape == (4, 16, 4, 6)
    assert torch.equal(whole[0], whole[3]) and not torch.equal(whole[0], whole[1])
    parts = [model.init_noise(seeds(seed), 16, 24) for seed in (2**62, 5, -3)]
    assert torch.equal(torch.cat(parts), whole[[2, 0, 1]])
    x = model.init_noise(torch.arange(64), 32, 32).double()
    assert abs(x.mean()) < 5 / x.numel() ** 0.5 and abs(x.var() - 1) < 5 * (2 / x.numel()) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Conditioning


def test_encode_equals_stock_pipeline(plain):
    model, pipeline = load(plain), stock(plain)
    long = "a red circle " * 30  # truncated, and the end of the chat template with it
    prompts = [*PROMPTS, "", long]
    cond = model.encode(prompts)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(prompts, max_sequence_length=model.text_tokens)
        null, _ = pipeline.encode_prompt([""], max_sequence_length=model.text_tokens)
    assert set(cond) == {"text", "text_null"} and cond["text"].shape == (4, model.text_tokens, 3 * 24)
    assert_close(cond["text"], text, 1e-5)
    assert_close(cond["text_null"], null.expand(4, -1, -1), 1e-5)
    assert_close(cond["text"], torch.cat([model.encode([prompt])["text"] for prompt in prompts]), 1e-5)


def test_cached_prompts_do_not_run_the_encoder(plain, tmp_path):
    def counted(**options):
        model, rows = load(plain, **options), []
        model.text_encoder.get_input_embeddings().register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
        return model, rows

    model, rows = counted(cache_folder=str(tmp_path / "rows"))
    first = model.encode(PROMPTS)
    assert rows == [2, 1]  # the prompts and the empty prompt
    model.encode(PROMPTS[::-1], images=pictures(2, 16, 16))
    assert rows == [2, 1]
    other, rows = counted(cache_folder=str(tmp_path / "rows"))
    again = other.encode(PROMPTS)
    assert rows == [] and all(torch.equal(first[name], again[name]) for name in first)


def test_offloaded_encoder_waits_on_the_cpu(plain):
    for offload, where in ((True, "cpu"), (False, "meta")):
        model = models.load(plain, device="meta", dtype=torch.float32, offload_encoders=offload)
        assert {p.device.type for p in model.text_encoder.parameters()} == {where}
        assert {p.device.type for p in model.vae.parameters()} == {"meta"}


@pytest.mark.gpu
def test_gpu_equals_cpu_with_an_offloaded_encoder(plain):
    images = pictures(2, 64, 72)
    model = models.load(plain, device="cuda", dtype=torch.float32, offload_encoders=True)
    assert_close(ours(model, images=images).cpu(), ours(load(plain), images=images), 1e-3)
    assert {p.device.type for p in model.text_encoder.parameters()} == {"cpu"}


def test_reference_pictures_are_optional():
    assert flux2.Flux2.reference_images == "optional"


def test_each_prompt_sees_its_own_reference_picture(deep):
    model, images = load(deep), pictures(4, 16, 24)
    cond = model.encode(["a red circle"] * 4, images=images)
    assert cond["image"].dtype == torch.float32 and cond["image"].shape == (4, 24, 2, 3)
    x = model.init_noise(seeds(3, 3, 3, 3), 16, 16)  # rows differ in nothing but the picture
    sigma = torch.full((4,), 0.6)
    swapped = model.encode(["a red circle"] * 4, images=images[[1, 0, 2, 3]])
    with torch.no_grad():
        v = model.velocity(x, sigma, cond, (4.0, 1.0))
        one_by_one = [
            model.velocity(x[:1], sigma[:1], model.encode(["a red circle"], images=images[i : i + 1]), (4.0, 1.0))
            for i in range(4)
        ]
        v_swapped = model.velocity(x, sigma, swapped, (4.0, 1.0))
    assert_close(v, torch.cat(one_by_one), 1e-5)
    assert_close(v_swapped, v[[1, 0, 2, 3]], 1e-5)
    for i in range(1, 4):
        assert (v[i] - v[0]).abs().max() > 0.05


def test_wrong_number_of_reference_pictures_is_an_error(plain):
    with pytest.raises(ValueError, match="expected an image for each of 2 prompts, got 3"):
        load(plain).encode(PROMPTS, images=pictures(3, 16, 16))


# ----------------------------------------------------------------------------------------------------------------------
# Velocity


@pytest.mark.parametrize("images", [None, pictures(2, 8, 12)])
def test_guidance_equals_two_forwards_and_their_gradient(plain, images):
    model = load(plain, lora_rank=2, lora_alpha=2)
    perturb(model, 0.1)
    x, sigma, cond = inputs(model, images=images)
    parameters = list(parallel.trained(model.parts).values())

    def gradient(v):
        return torch.cat([g.flatten() for g in torch.autograd.grad(v.square().mean(), parameters, retain_graph=True)])

    together = model.velocity(x, sigma, cond, (2.5, 1.0))
    v, v_null = model.velocity(x, sigma, cond), model.velocity(x, sigma, dict(cond, text=cond["text_null"]))
    apart = v_null + 2.5 * (v - v_null)
    assert_close(together, apart, 1e-5)
    expected, scale = gradient(apart), gradient(v).abs().max()
    torch.testing.assert_close(gradient(together), expected, rtol=0, atol=1e-5 * scale.item())
    one_half = v_null.detach() + 2.5 * (v - v_null.detach())
    assert (gradient(one_half) - expected).abs().max() > 0.01 * scale


@pytest.mark.parametrize("images", [None, pictures(4, 16, 8)])
def test_velocity_of_a_row_does_not_depend_on_the_batch(deep, images):
    model = load(deep)
    x, sigma, cond = inputs(model, prompts=[*PROMPTS, "", "a blue cross"], images=images)
    with torch.no_grad():
        whole = model.velocity(x, sigma, cond, (2.0, 1.0))
        rows = [
            model.velocity(x[i : i + 1], sigma[i : i + 1], {k: t[i : i + 1] for k, t in cond.items()}, (2.0, 1.0))
            for i in range(4)
        ]
    assert_close(whole, torch.cat(rows), 1e-5)


@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
@pytest.mark.parametrize("images", [None, pictures(3, 16, 24)])
def test_replayed_logp_equals_rollout_logp(deep, images, sampler):
    model, guidance = load(deep, lora_rank=4, lora_alpha=8), (3.0, 1.0)
    perturb(model, 0.1)
    cond = model.encode([*PROMPTS, "a dog"], images=images)
    sigmas = model.sigmas(5, 16, 24)
    a, b, c = flow_grpo.coefficients(sampler, sigmas, 0.7, (1, 4))
    x = model.init_noise(seeds(0, 1, 2), 16, 24)
    x0, states, logps = flow_grpo.rollout(model, cond, x, (sigmas, a, b, c), guidance, torch.arange(15).view(3, 5))
    assert states.shape[:2] == (3, 4) and logps.shape == (3, 3) and x0.isfinite().all()

    # One tile with all samples and steps mixed, as training takes them.
    row, step = torch.arange(9) % 3, torch.arange(9) // 3
    tile = model.condition({name: tensor[row] for name, tensor in cond.items()})
    v = model.velocity(states[row, step], sigmas[1 + step].float(), tile, guidance)
    a, b, c = (coefficient[1 + step].float() for coefficient in (a, b, c))
    logp, _ = sde_logp(v, states[row, step], states[row, step + 1], a, b, c)
    torch.testing.assert_close(logp, logps[row, step], rtol=0, atol=1e-5)
    logp.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in parallel.trained(model.parts).values())


# ----------------------------------------------------------------------------------------------------------------------
# Distilled models


def test_distilled_model_has_no_guidance(distilled, tmp_path):
    model = load(distilled)
    x, sigma, cond = inputs(model)
    assert set(cond) == {"text"}
    with pytest.raises(ValueError, match="--guidance 4.0: this model is distilled .*; use --guidance 1"):
        model.velocity(x, sigma, cond, (4.0, 1.0))
    x = ours(model, guidance=1.0)
    assert_close(x, theirs(stock(distilled), model, guidance=1.0))
    perturb(model, 0.01)
    exported = load(export(model, tmp_path / "full"))
    assert exported.distilled and torch.equal(ours(exported, guidance=1.0), ours(model, guidance=1.0))


# ----------------------------------------------------------------------------------------------------------------------
# Precision and training


def test_bfloat16_lora_is_close_to_float32(plain):
    model, exact = (load(plain, dtype=dtype, lora_rank=4, lora_alpha=8) for dtype in (torch.bfloat16, torch.float32))
    for name, p in model.parts["transformer"].named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    for m in (model, exact):
        perturb(m, 0.1)
    images = pictures(2, 16, 12)
    x, sigma, cond = inputs(exact, images=images)
    rounded = {name: tensor.bfloat16() if "text" in name else tensor for name, tensor in cond.items()}
    for guidance in (1.0, 3.0):
        v = model.velocity(x, sigma, rounded, (guidance, 1.0)).float()
        reference = exact.velocity(x, sigma, cond, (guidance, 1.0))
        assert 0 < (v - reference).norm() / reference.norm() < 0.05
    encoded = model.encode(PROMPTS, images=images)
    assert encoded["text"].dtype == torch.bfloat16 and encoded["image"].dtype == torch.float32
    for name in ("text", "image"):
        assert (encoded[name].float() - cond[name]).norm() < 0.1 * cond[name].norm()
    assert (model.decode(x) - exact.decode(x)).abs().max() < 0.05


def test_batch_norm_statistics_are_the_file_s_in_every_dtype(plain):
    stored = load_file(f"{plain}/vae/diffusion_pytorch_model.safetensors")
    assert stored["bn.running_mean"].abs().max() > 0.1 and not torch.equal(
        stored["bn.running_var"], stored["bn.running_var"].bfloat16().float()
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = load(plain, dtype=dtype)
        assert model.vae.dtype == dtype
        for name in ("running_mean", "running_var"):
            assert torch.equal(getattr(model.vae.bn, name), stored[f"bn.{name}"])


def test_full_fine_tuning_keeps_float32_masters(plain):
    stored = load_file(f"{plain}/transformer/diffusion_pytorch_model.safetensors")
    model = load(plain, dtype=torch.bfloat16, with_reference=True)
    masters = dict(model.parts["transformer"].named_parameters())
    assert masters.keys() == stored.keys() == {k.removeprefix("transformer.") for k in parallel.trained(model.parts)}
    for name, p in masters.items():
        assert p.dtype == torch.float32 and torch.equal(p, stored[name])
    for module in (model.reference_parts["transformer"], model.text_encoder, model.vae):
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_step_changes_only_what_is_trained(plain, lora_rank):
    model = load(plain, lora_rank=lora_rank, lora_alpha=8, with_reference=lora_rank == 0)
    perturb(model, 0.05)
    trained = parallel.trained(model.parts)
    modules = [model.parts["transformer"], model.vae, model.text_encoder]
    modules += [model.reference_parts["transformer"]] if model.reference_parts else []
    before = [{name: t.clone() for name, t in m.state_dict().items()} for m in modules]
    x, sigma, cond = inputs(model, images=pictures(2, 12, 16))
    model.velocity(x, sigma, cond, (2.0, 1.0)).square().mean().backward()
    model.decode(x)
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    for m, old in zip(modules, before):
        for name, tensor in m.state_dict().items():
            changed = m is modules[0] and f"transformer.{name}" in trained
            assert torch.equal(tensor, old[name]) != changed, name


def test_adapter_is_on_the_attention_of_every_block():
    # klein-4B's numbers of blocks; with so many names PEFT shortens the list.
    for blocks in (dict(num_layers=5, num_single_layers=20), dict(num_layers=1, num_single_layers=1)):
        with torch.device("meta"):
            transformer = Flux2Transformer2DModel(
                in_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                axes_dims_rope=(2, 2, 2, 2),
                joint_attention_dim=8,
                **blocks,
            )
        flux2.common.add_lora(transformer, 2, 2, flux2.lora_targets(transformer))
        double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        layers = [f"transformer_blocks.{i}.attn.{name}" for i in range(blocks["num_layers"]) for name in double]
        for i in range(blocks["num_single_layers"]):
            layers += [f"single_transformer_blocks.{i}.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")]
        expected = {f"{layer}.lora_{half}.default.weight" for layer in layers for half in "AB"}
        assert {name for name, p in transformer.named_parameters() if p.requires_grad} == expected


@pytest.fixture
def world():
    world = parallel.init()
    yield world
    dist.destroy_process_group()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_training_step_under_fsdp(deep, world, lora_rank):
    model = load(deep, dtype=torch.bfloat16, lora_rank=lora_rank, lora_alpha=8)
    exact = load(deep, lora_rank=lora_rank, lora_alpha=8)
    for m in (model, exact):
        perturb(m, 0.02)
    part = model.parts["transformer"]
    assert len(model.blocks(part)) == 5
    parallel.shard(part, model.blocks(part), world, torch.bfloat16, checkpoint_activations=True)
    x, sigma, cond = inputs(exact, images=pictures(2, 16, 24))
    gradients = []
    for m in (model, exact):
        m.velocity(x, sigma, cond, (2.0, 1.0)).float().square().mean().backward()
        trained = parallel.trained(m.parts)
        assert {parallel.local(p).dtype for p in trained.values()} == {torch.float32}
        gradients.append(torch.cat([parallel.local(p.grad).flatten() for p in trained.values()]))
    assert gradients[0].dtype == torch.float32
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


def test_attention_is_named(plain):
    assert load(plain).attention == "torch scaled_dot_product_attention"  # flash-attn is for CUDA and 16 bits


# ----------------------------------------------------------------------------------------------------------------------
# Reference policy


@pytest.mark.parametrize("options", [dict(lora_rank=4, lora_alpha=8), dict(with_reference=True)])
def test_reference_is_the_base_model(plain, options):
    model, base = load(plain, **options), load(plain)
    x, sigma, cond = inputs(base, images=pictures(2, 8, 8))
    with torch.no_grad():
        expected = base.velocity(x, sigma, cond, (2.0, 1.0))
        assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        perturb(model, 0.1)
        moved = model.velocity(x, sigma, cond, (2.0, 1.0))
        assert (moved - expected).abs().max() > 0.05
        with parallel.reference(model):
            assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), moved)


# ----------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("images", [None, pictures(2, 64, 72)])
def test_exported_lora_in_the_stock_pipeline_is_our_model(deep, images, tmp_path):
    model = load(deep, lora_rank=4, lora_alpha=8)
    before = ours(model, images=images)
    perturb(model, 0.1)
    x = ours(model, images=images)
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "lora")
    tensors = load_file(f"{folder}/pytorch_lora_weights.safetensors")
    assert len(tensors) == len(parallel.trained(model.parts)) and not any("default" in key for key in tensors)

    pipeline = stock(deep)
    pipeline.load_lora_weights(folder)
    assert_close(x, theirs(pipeline, model, images=images))
    assert_close(model.decode(x), theirs(pipeline, model, output="np", images=images))

    # Without the metadata the loader takes alpha = rank: half of our scale.
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    pipeline = stock(deep)
    pipeline.load_lora_weights(str(tmp_path / "bare"))
    assert (theirs(pipeline, model, images=images) - x).abs().max() > 0.01


@pytest.mark.parametrize("name", ["plain", "deep"])
def test_exported_full_model_is_ours_everywhere(request, name, tmp_path):
    model = load(request.getfixturevalue(name))
    before = ours(model)
    perturb(model, 0.05)
    x = ours(model)
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "full")
    assert_close(x, theirs(stock(folder), model))
    assert_close(model.decode(x), theirs(stock(folder), model, output="np"))
    assert torch.equal(ours(load(folder)), x)


def test_exported_full_model_has_the_compute_dtype(plain, tmp_path):
    folder = export(load(plain, dtype=torch.bfloat16), tmp_path / "full")
    stored = load_file(f"{folder}/transformer/diffusion_pytorch_model.safetensors")
    source = load_file(f"{plain}/transformer/diffusion_pytorch_model.safetensors")
    assert stored.keys() == source.keys()
    for name in stored:
        assert torch.equal(stored[name], source[name].bfloat16())
    vae, source = (load_file(f"{f}/vae/diffusion_pytorch_model.safetensors") for f in (folder, plain))
    assert torch.equal(vae["bn.running_var"], source["bn.running_var"])


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def test_tokenizer_without_its_files_is_an_error(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"'{folder}': tokenizer has . tokens for an encoder of [0-9]+; its files"):
        load(str(folder))


@pytest.mark.parametrize("file", ["vae/config.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_incomplete_folder_is_one_error(plain, tmp_path, file):
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / file).unlink()
    with pytest.raises(RuntimeError, match=f"'{folder}' is incomplete, download or save it again") as caught:
        load(str(folder))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


# ----------------------------------------------------------------------------------------------------------------------
# tiny-klein


def test_tiny_klein_is_small_fixed_and_alive(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name in ("first", "second"):
        tiny.build("tiny-klein", str(tmp_path / name))
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        first, second = (load_file(tmp_path / name / f"{part}.safetensors") for name in ("first", "second"))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert sum(f.stat().st_size for f in (tmp_path / "first").rglob("*") if f.is_file()) < 3e6

    model = load(str(tmp_path / "first"))
    x, sigma, cond = inputs(model, size=(32, 32))
    assert x.shape == (2, 32, 4, 4)
    with torch.no_grad():
        v = model.velocity(x, sigma, cond)
        swapped = model.velocity(x, sigma, {name: rows.flip(0) for name, rows in cond.items()})
    assert v.std() > 0.1 and (v - swapped).abs().max() > 1e-3
    assert model.decode(x).std() > 0.05


def test_qwen_tokenizer_holds_every_shapes_prompt_and_spells_any_other():
    prompts = [metadata["prompt"] for metadata in shapes.all_prompts()]
    tokenizer = tiny.qwen_tokenizer(prompts)
    others = ["Un été à 東京 😀", "two\nlines, 3.5 %"]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts + others]
    chat = dict(tokenize=False, add_generation_prompt=True)
    texts = tokenizer.apply_chat_template(messages, enable_thinking=False, **chat)
    assert texts[-2] == ("<|im_start|>user\nUn été à 東京 😀<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.apply_chat_template(messages[0], **chat) == texts[0].removesuffix("<think>\n\n</think>\n\n")
    ids = tokenizer(texts).input_ids
    assert max(len(row) for row in ids[: len(prompts)]) <= tokenizer.model_max_length
    assert len({tuple(row) for row in ids}) == len(set(texts))
    assert all(tokenizer.decode(row) == text for row, text in zip(ids[-2:], texts[-2:]))
