import math
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps
from safetensors.torch import load_file

import models
from flow_grpo import coefficients, rollout
from kernels.sde_step import sde_logp
from models import checkpoint, parallel, tiny

PROMPTS = ["a red circle", "two Blue squares, left of a dog!"]
# Two SD3-shaped models that share no dimension: 3.5's (dual attention, query-key norm) and 3.0's (neither).
NEW = dict(
    num_layers=3,
    num_heads=2,
    head_dim=24,
    dual_attention_layers=(0, 1),
    clip_dims=(8, 20),
    text_dim=36,
    latent_channels=4,
    vae_channels=(8, 16),
    max_size=12,
)
OLD = dict(
    num_layers=2,
    num_heads=3,
    head_dim=16,
    dual_attention_layers=(),
    qk_norm=None,
    clip_dims=(12, 16),
    text_dim=40,
    latent_channels=6,
    vae_channels=(8, 8, 24),
    max_size=8,
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@torch.no_grad()
def random_folder(folder, seed, scaling, shift, dimensions):
    """A saved pipeline in which every parameter of the transformer matters."""
    pipeline = tiny.sd3_pipeline(seed=seed, **dimensions)
    draw = torch.Generator().manual_seed(seed)
    for name, p in pipeline.transformer.named_parameters():
        p.copy_(torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1))
        if "norm" in name and name.endswith("weight") and p.ndim == 1:
            p.add_(1)
    pipeline.vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def new(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("new"), 1, 0.7, 0.2, NEW)


@pytest.fixture(scope="session")
def old(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("old"), 2, 1.3, -0.1, OLD)


@pytest.fixture(scope="session")
def without_t5(new, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("without-t5"))
    StableDiffusion3Pipeline.from_pretrained(new, text_encoder_3=None, tokenizer_3=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """tiny-sd3, in the layout that an alias is built in; its scheduler has SD3's shift of 3."""
    folder = str(tmp_path_factory.mktemp("tiny") / "tiny-sd3")
    tiny.build("tiny-sd3", folder)
    return folder


def load(folder, **options):
    return models.load(folder, device="cpu", dtype=options.pop("dtype", torch.float32), **options)


def stock(folder, **options):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def theirs(pipeline, model, prompts=PROMPTS, guidance=1.0, size=(16, 24), num_steps=3, output="latent", **options):
    """The same from the stock pipeline, called as a user would; from `model` it takes the init noise and the text
    length alone."""
    images = pipeline(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=model.init_noise(torch.arange(len(prompts)), *size),
        max_sequence_length=model.text_tokens,
        output_type=output,
        **options,
    ).images
    return images if output == "latent" else torch.from_numpy(images).permute(0, 3, 1, 2)


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


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("size, num_steps", [((16, 16), 2), ((24, 8), 5)])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_ode_equals_stock_pipeline(request, name, size, num_steps, guidance):
    folder = request.getfixturevalue(name)
    model, run = load(folder), dict(size=size, num_steps=num_steps)
    x = ours(model, guidance=(guidance, 1.0), **run)
    assert_close(x, theirs(stock(folder), model, guidance=guidance, **run))
    assert guidance == 1 or (x - ours(model, **run)).abs().max() > 0.1


def test_negative_prompt_equals_stock_pipeline(new):
    model = load(new)
    x = ours(model, guidance=(3.0, 1.0), negative=["A bad picture"])
    assert_close(x, theirs(stock(new), model, guidance=3.0, negative_prompt=["A bad picture"] * len(PROMPTS)))
    assert (x - ours(model, guidance=(3.0, 1.0))).abs().max() > 0.05


def test_tiny_sd3_equals_stock_pipeline_and_its_output_is_small_and_depends_on_everything(published):
    model = load(published)
    for size, guidance in (((32, 32), 4.5), ((16, 40), 1.0)):
        assert_close(
            ours(model, guidance=(guidance, 1.0), size=size),
            theirs(stock(published), model, guidance=guidance, size=size),
        )
    x = model.init_noise(torch.zeros(3, dtype=torch.int64), 32, 32)
    cond = model.encode(["a red circle", "a red circle", "two blue squares"])
    v = model.velocity(x, torch.tensor([0.9, 0.3, 0.9]), cond)
    assert 0.1 < v.std() < 1.5
    assert (v[1] - v[0]).std() > 0.01 and (v[2] - v[0]).std() > 0.05
    gradients = torch.autograd.grad(
        v.square().mean(), [b.attn.to_q.weight for b in model.parts["transformer"].transformer_blocks]
    )
    assert all(g.abs().max() > 1e-6 for g in gradients)


def test_decoded_image_equals_stock_pipeline(old):
    model = load(old)
    images = model.decode(ours(model, guidance=(2.0, 1.0)))
    assert images.dtype == torch.float32 and images.shape == (2, 3, 16, 24)
    assert_close(images, theirs(stock(old), model, guidance=2.0, output="np"))


def test_encode_images_inverts_the_normalisation_of_decode(old):
    model = load(old)
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    x = model.encode_images(images)
    assert x.dtype == torch.float32 and x.shape == (2, 6, 4, 6)
    posterior = model.vae.encode(images * 2 - 1).latent_dist.mean
    assert_close(x / model.vae.config.scaling_factor + model.vae.config.shift_factor, posterior, 1e-5)


def test_encode_images_in_pieces_is_the_same(old, monkeypatch):
    model, images, pieces = load(old), torch.rand(3, 3, 1024, 1376), []
    encode = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda x: pieces.append(len(x)) or encode(x))
    x = model.encode_images(images)
    assert pieces == [2, 1]  # 4 megapixels at most
    assert_close(x[2:], model.encode_images(images[2:]), 1e-5)


def test_resolution_must_fit_the_patches_and_positions(new, old):
    assert load(new).latent_size(16, 20) == (8, 10)
    model = load(old)
    assert model.latent_size(16, 64) == (4, 16)
    for call in (lambda: model.latent_size(20, 16), lambda: model.sigmas(4, 16, 20)):
        with pytest.raises(ValueError, match=r"--resolution: \d+ x \d+ is not a multiple of 8 pixels"):
            call()
    with pytest.raises(ValueError, match="--resolution: 72 x 16 is above the 64 pixels that the model has positions"):
        model.latent_size(72, 16)


def test_init_noise_is_a_function_of_each_row_s_seed(new):
    model = load(new)
    whole = model.init_noise(torch.tensor([5, -3, 2**62, 5]), 16, 24)
    assert whole.dtype == torch.float32 and whole.shape == (4, 4, 8, 12)
    assert torch.equal(whole[0], whole[3]) and not torch.equal(whole[0], whole[1])
    parts = [model.init_noise(torch.tensor([seed]), 16, 24) for seed in (2**62, 5, -3)]
    assert torch.equal(torch.cat(parts), whole[[2, 0, 1]])


# ----------------------------------------------------------------------------------------------------------------------
# Schedule. The lists and tables are SD3's: shift 3, 10 steps.

STOCK = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
SINGLE = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.7500, 0.6667, 0.5625, 0.4286, 0.2500, 0]


@pytest.mark.parametrize("schedule, expected", [("", STOCK), ("stock", STOCK), ("single", SINGLE)])
def test_ten_step_schedules(published, schedule, expected):
    sigmas = load(published, sigma_schedule=schedule).sigmas(10, 32, 32)
    assert sigmas.dtype == torch.float64 and sigmas[0] == 1 and sigmas[-1] == 0
    torch.testing.assert_close(sigmas, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5.001e-5)


def test_schedules_in_closed_form(published):
    def shifted(t):
        return 3 * t / (1 + 2 * t)

    model, single = load(published), load(published, sigma_schedule="single")
    for num_steps in (1, 2, 7, 28):
        # diffusers shifts the ends of the training schedule, interpolates, and shifts again.
        doubled = shifted(torch.linspace(1, shifted(0.001), num_steps, dtype=torch.float64))
        doubled = torch.cat([doubled, doubled.new_zeros(1)])
        torch.testing.assert_close(model.sigmas(num_steps, 32, 32), doubled, rtol=0, atol=1e-6)
        once = shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))
        torch.testing.assert_close(single.sigmas(num_steps, 32, 32), once, rtol=0, atol=1e-6)
        scheduler = stock(published).scheduler
        retrieve_timesteps(scheduler, num_steps)
        assert torch.equal(model.sigmas(num_steps, 32, 32), scheduler.sigmas.double())


def test_dynamic_shift_follows_the_resolution(new, tmp_path):
    pipeline = stock(new)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=True)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path)
    model, single = load(str(tmp_path)), load(str(tmp_path), sigma_schedule="single")
    assert_close(ours(model, guidance=(2.0, 1.0)), theirs(stock(str(tmp_path)), model, guidance=2.0))
    for size in ((16, 16), (24, 40)):
        mu = calculate_shift(size[0] * size[1] // 16, 256, 4096, 0.5, 1.15)
        retrieve_timesteps(scheduler, 6, mu=mu)
        assert torch.equal(model.sigmas(6, *size), scheduler.sigmas.double())
        t = torch.linspace(1, 0, 7, dtype=torch.float64)
        once = math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t)
        torch.testing.assert_close(single.sigmas(6, *size), once, rtol=0, atol=1e-6)


# Per step: std of the noise that is added, std of all noise after it, |d mean / d v| per std.
FLOW_SDE = (
    ".700 .743 .536 .446 .392 .353 .319 .282 .225 .006",
    "1.001 .971 .882 .809 .725 .624 .496 .341 .240 .007",
    ".057 .078 .129 .188 .264 .371 .536 .825 1.487 1.771",
)
CPS = (
    ".913 .869 .816 .752 .673 .573 .442 .264 .0085 .000",
    ".960 .913 .858 .790 .707 .602 .465 .278 .0089 .000",
    ".044 .083 .131 .193 .276 .396 .600 1.10 32. inf",
)


@pytest.mark.parametrize("sampler, noise_level, table", [("flow_sde", 0.7, FLOW_SDE), ("cps", 0.8, CPS)])
def test_noise_of_the_sde_samplers(published, sampler, noise_level, table):
    """With x = (1 - sigma) x0 + sigma eps and the exact v = eps - x0, a step gives
    x' = (a (1 - sigma) - b) x0 + (a sigma + b) eps + c eps': the first factor is 1 - sigma', and the noise after it has
    variance (a sigma + b)^2 + c^2."""
    sigmas = load(published).sigmas(10, 32, 32)
    a, b, c = coefficients(sampler, sigmas, noise_level, (0, 10))
    torch.testing.assert_close(a * (1 - sigmas[:-1]) - b, 1 - sigmas[1:], rtol=0, atol=1e-9)
    total = ((a * sigmas[:-1] + b).square() + c.square()).sqrt()
    if sampler == "cps":
        torch.testing.assert_close(total, sigmas[1:], rtol=0, atol=1e-9)
    else:
        dt, s = sigmas.diff(), c / (-sigmas.diff()).sqrt()
        excess = -dt * s**2 * (1 - sigmas[1:] / sigmas[:-1]) + (dt * s**2 / (2 * sigmas[:-1])).square()
        torch.testing.assert_close(total.square() - sigmas[1:].square(), excess, rtol=0, atol=1e-9)
    for values, column in zip((c, total, b.abs() / c), table):
        assert len(values) == len(column.split())
        for value, printed in zip(values.tolist(), column.split()):
            half_a_unit = 0.5001 * 10.0 ** -len(printed.partition(".")[2])
            assert value == float(printed) or abs(value - float(printed)) < half_a_unit


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def test_encode_equals_stock_pipeline(new):
    model = load(new)
    prompts = [*PROMPTS, "", "a red circle " * 30]  # the last is truncated
    cond = model.encode(prompts)
    text, null_text, pooled, null_pooled = stock(new).encode_prompt(
        prompts, None, None, max_sequence_length=model.text_tokens
    )
    assert set(cond) == {"text", "pooled", "text_null", "pooled_null"}
    assert cond["text"].shape == (4, 2 * tiny.TEXT_TOKENS, 36) and cond["pooled"].shape == (4, 28)
    for name, expected in zip(cond, (text, pooled, null_text, null_pooled)):
        assert_close(cond[name], expected, 1e-5)
    assert not cond["text"][:, : tiny.TEXT_TOKENS, 28:].any()  # CLIP's 8 + 20 features
    one_by_one = [model.encode([prompt]) for prompt in prompts]
    assert all(torch.equal(cond[name], torch.cat([rows[name] for rows in one_by_one])) for name in cond)
    assert torch.equal(model.encode(PROMPTS, negative=PROMPTS[::-1])["text_null"], cond["text"][[1, 0]])


def test_t5_reads_at_most_256_tokens_as_in_the_stock_pipeline(new):
    pipeline = stock(new)
    pipeline.tokenizer_3.model_max_length = 512  # what the published tokenizers say
    model = models.sd3.Sd3(pipeline, "cpu", torch.float32)
    text, _, _, _ = stock(new).encode_prompt(PROMPTS, None, None)
    assert_close(model.encode(PROMPTS)["text"], text, 1e-5)


def test_without_t5_equals_stock_pipeline(without_t5, tmp_path):
    model = load(without_t5)
    pipeline = stock(without_t5, text_encoder_3=None, tokenizer_3=None)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None)
    cond = model.encode(PROMPTS)
    assert cond["text"].shape == (2, tiny.TEXT_TOKENS + 256, 36) and not cond["text"][:, tiny.TEXT_TOKENS :].any()
    assert_close(cond["text"], text, 1e-5)
    assert_close(cond["pooled"], pooled, 1e-5)
    assert_close(ours(model, guidance=(4.5, 1.0)), theirs(pipeline, model, guidance=4.5))
    perturb(model, 0.05)
    folder = export(model, tmp_path / "full")
    assert torch.equal(ours(load(folder)), ours(model))
    assert not os.path.exists(f"{folder}/text_encoder_3")


def test_cached_prompts_do_not_run_the_encoders(new, tmp_path):
    def counted():
        model, rows = load(new, cache_folder=str(tmp_path / "rows")), []
        for encoder in (model.text_encoder, model.text_encoder_2, model.text_encoder_3):
            encoder.register_forward_hook(lambda module, args, output: rows.append(1))
        return model, rows

    model, rows = counted()
    first = model.encode(PROMPTS[:1])
    assert len(rows) == 6  # three encoders for the prompt and for the empty prompt
    model.encode(PROMPTS[:1])
    assert len(rows) == 6
    other, rows = counted()
    again = other.encode(PROMPTS[:1])
    assert rows == [] and all(torch.equal(first[name], again[name]) for name in first)


def test_offloaded_encoders_wait_on_the_cpu(new):
    for offload, where in ((True, "cpu"), (False, "meta")):
        model = models.load(new, device="meta", dtype=torch.float32, offload_encoders=offload)
        for encoder in (model.text_encoder, model.text_encoder_2, model.text_encoder_3):
            assert {p.device.type for p in encoder.parameters()} == {where}
        assert {p.device.type for p in model.vae.parameters()} == {"meta"}


# ----------------------------------------------------------------------------------------------------------------------
# Velocity


def test_guidance_equals_two_forwards_and_their_gradient(new):
    model = load(new, lora_rank=2, lora_alpha=2)
    perturb(model, 0.1)
    x, sigma, cond = inputs(model)
    parameters = list(parallel.trained(model.parts).values())
    null = {"text": cond["text_null"], "pooled": cond["pooled_null"]}

    def gradient(v):
        return torch.cat([g.flatten() for g in torch.autograd.grad(v.square().mean(), parameters, retain_graph=True)])

    together = model.velocity(x, sigma, cond, (2.5, 1.0))
    v, v_null = model.velocity(x, sigma, cond), model.velocity(x, sigma, null)
    apart = v_null + 2.5 * (v - v_null)
    assert_close(together, apart, 1e-5)
    expected = gradient(apart)
    scale = expected.abs().max()
    torch.testing.assert_close(gradient(together), expected, rtol=0, atol=1e-5 * scale.item())
    one_half = v_null.detach() + 2.5 * (v - v_null.detach())
    assert (gradient(one_half) - expected).abs().max() > 0.01 * scale


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_velocity_of_a_row_does_not_depend_on_the_batch(request, name, guidance):
    model = load(request.getfixturevalue(name))
    x, sigma, cond = inputs(model, prompts=[*PROMPTS, "", "a dog"])
    with torch.no_grad():
        whole = model.velocity(x, sigma, cond, (guidance, 1.0))
        rows = [
            model.velocity(x[i : i + 1], sigma[i : i + 1], {k: t[i : i + 1] for k, t in cond.items()}, (guidance, 1.0))
            for i in range(4)
        ]
    assert_close(whole, torch.cat(rows), 1e-5)


@pytest.mark.parametrize("sampler, guidance", [("flow_sde", 1.0), ("cps", 4.5)])
def test_replayed_log_probs_are_the_rollout_s(new, sampler, guidance):
    model, size, num_steps = load(new, lora_rank=4, lora_alpha=8), (16, 24), 5
    perturb(model, 0.05)
    sigmas = model.sigmas(num_steps, *size)
    schedule = (sigmas, *coefficients(sampler, sigmas, 0.7, (1, 4)))
    cond, seed_BT = model.encode(PROMPTS), torch.arange(2 * num_steps).view(2, num_steps)
    x = model.init_noise(torch.arange(2), *size)
    _, states, logps = rollout(model, cond, x, schedule, (guidance, 1.0), seed_BT)
    assert states.shape == (2, 4, *x.shape[1:]) and logps.shape == (2, 3) and logps.isfinite().all()
    # Tiles that mix samples and steps.
    sample, step = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0, 2, 1, 2, 0, 1])
    for pairs in (torch.arange(6), torch.tensor([4]), torch.tensor([3, 0])):
        i, k = sample[pairs], step[pairs]
        a, b, c = (coef[k + 1].float() for coef in schedule[1:])
        rows = {name: t[i] for name, t in cond.items()}
        v = model.velocity(states[i, k], sigmas[k + 1].float(), rows, (guidance, 1.0))
        logp, _ = sde_logp(v, states[i, k], states[i, k + 1], a, b, c)
        assert (logp - logps[i, k]).abs().max() <= 1e-5


def test_bfloat16_lora_is_close_to_float32(new):
    model, exact = (load(new, dtype=dtype, lora_rank=4, lora_alpha=8) for dtype in (torch.bfloat16, torch.float32))
    for name, p in model.parts["transformer"].named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    for m in (model, exact):
        perturb(m, 0.1)
    x, sigma, cond = inputs(exact)
    assert {t.dtype for t in model.encode(PROMPTS).values()} == {torch.bfloat16}
    for guidance in (1.0, 3.0):
        v = model.velocity(x, sigma, model.encode(PROMPTS), (guidance, 1.0)).float()
        reference = exact.velocity(x, sigma, cond, (guidance, 1.0))
        error = (v - reference).norm() / reference.norm()
        assert 0 < error < 0.05


def test_timestep_stays_float32(new):
    model, steps = load(new, dtype=torch.bfloat16, lora_rank=2), []
    x, _, cond = inputs(model)
    embedder = model.parts["transformer"].time_text_embed.time_proj
    embedder.register_forward_hook(lambda module, args, output: steps.append(args[0]))
    sigmas = model.sigmas(10, 16, 24)[[3, 8]]
    model.velocity(x, sigmas.float(), cond)
    pipeline = stock(new)
    retrieve_timesteps(pipeline.scheduler, 10)
    assert torch.equal(steps[0], pipeline.scheduler.timesteps[[3, 8]])


@pytest.fixture
def world():
    world = parallel.init()
    yield world
    dist.destroy_process_group()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_training_step_under_fsdp(new, world, lora_rank):
    model = load(new, dtype=torch.bfloat16, lora_rank=lora_rank, lora_alpha=8)
    exact = load(new, lora_rank=lora_rank, lora_alpha=8)
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


# ----------------------------------------------------------------------------------------------------------------------
# What trains, and the reference policy


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_step_changes_only_what_trains(new, lora_rank):
    model = load(new, lora_rank=lora_rank, lora_alpha=8)
    trained = parallel.trained(model.parts)
    modules = dict(
        transformer=model.parts["transformer"],
        vae=model.vae,
        clip=model.text_encoder,
        clip_2=model.text_encoder_2,
        t5=model.text_encoder_3,
    )
    before = {f"{key}.{name}": t.clone() for key, m in modules.items() for name, t in m.state_dict().items()}
    x, sigma, cond = inputs(model)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model.velocity(x, sigma, cond, (4.5, 1.0)).square().mean().backward()
    optimizer.step()
    after = {f"{key}.{name}": t for key, m in modules.items() for name, t in m.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= set(trained) and changed
    # The last block gives no text back: what its text queries read is never seen.
    dead = "transformer_blocks.2.attn.add_q_proj"
    if lora_rank:  # with B = 0 there is no gradient for A in the first step
        assert changed == {name for name in trained if "lora_B" in name and dead not in name}
        for block in range(3):
            ends = {
                name.split(f"transformer_blocks.{block}.")[1].split(".lora_")[0]
                for name in trained
                if f"transformer_blocks.{block}." in name
            }
            assert ends == {f"attn.{end}" for end in ATTENTION if block < 2 or end != "to_add_out"}
    else:
        dead = {f"transformer.{dead}.weight", f"transformer.{dead}.bias"}
        assert set(trained) - changed == dead | {"transformer.transformer_blocks.2.attn.norm_added_q.weight"}


def test_full_fine_tuning_keeps_float32_masters(new):
    stored = load_file(f"{new}/transformer/diffusion_pytorch_model.safetensors")
    model = load(new, dtype=torch.bfloat16, with_reference=True)
    masters = dict(model.parts["transformer"].named_parameters())
    assert masters.keys() == stored.keys() - {"pos_embed.pos_embed"}
    for name, p in masters.items():
        assert p.dtype == torch.float32 and torch.equal(p, stored[name])
    frozen = (model.text_encoder, model.text_encoder_2, model.text_encoder_3, model.vae)
    for module in (model.reference_parts["transformer"], *frozen):
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}
    # The table of positions is a buffer: masters and reference must not differ in it.
    positions = [part["transformer"].pos_embed.pos_embed for part in (model.parts, model.reference_parts)]
    assert positions[0].dtype == torch.bfloat16 and torch.equal(*positions)


def test_fresh_adapter_and_reference_are_the_base_model(new):
    model, base = load(new, lora_rank=4, lora_alpha=8), load(new, with_reference=True)
    x, sigma, cond = inputs(base)
    with torch.no_grad():
        expected = base.velocity(x, sigma, cond, (2.0, 1.0))
        assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        for m, scale in ((model, 0.1), (base, 0.05)):
            perturb(m, scale)
            moved = m.velocity(x, sigma, cond, (2.0, 1.0))
            assert (moved - expected).abs().max() > 0.05
            with parallel.reference(m):
                assert torch.equal(m.velocity(x, sigma, cond, (2.0, 1.0)), expected)
            assert torch.equal(m.velocity(x, sigma, cond, (2.0, 1.0)), moved)


# ----------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("name", ["new", "old"])
def test_exported_lora_in_the_stock_pipeline_is_our_model(request, name, tmp_path):
    base = request.getfixturevalue(name)
    model = load(base, lora_rank=4, lora_alpha=8)
    before = ours(model, guidance=(2.0, 1.0))
    perturb(model, 0.1)
    x = ours(model, guidance=(2.0, 1.0))
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "lora")
    tensors = load_file(f"{folder}/pytorch_lora_weights.safetensors")
    assert len(tensors) == len(parallel.trained(model.parts)) and not any("default" in key for key in tensors)
    pipeline = stock(base)
    pipeline.load_lora_weights(folder)
    assert_close(x, theirs(pipeline, model, guidance=2.0))
    assert_close(model.decode(x), theirs(pipeline, model, guidance=2.0, output="np"))


def test_exported_full_model_is_ours_everywhere(new, tmp_path):
    model = load(new)
    before = ours(model)
    perturb(model, 0.05)
    x = ours(model)
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "full")
    assert_close(x, theirs(stock(folder), model))
    assert_close(model.decode(x), theirs(stock(folder), model, output="np"))
    assert torch.equal(ours(load(folder)), x)


def test_exported_full_model_has_the_compute_dtype(new, tmp_path):
    model = load(new, dtype=torch.bfloat16)
    folder = export(model, tmp_path / "full")
    stored = load_file(f"{folder}/transformer/diffusion_pytorch_model.safetensors")
    source = load_file(f"{new}/transformer/diffusion_pytorch_model.safetensors")
    assert stored.keys() == source.keys()
    for name in stored:
        assert torch.equal(stored[name], source[name].bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# Tiny folder, errors


def test_tiny_sd3_is_small_and_always_the_same(published, tmp_path):
    files = [os.path.join(root, name) for root, _, names in os.walk(published) for name in names]
    assert sum(map(os.path.getsize, files)) < 2_000_000
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    tiny.build("tiny-sd3", str(tmp_path / "again" / "tiny-sd3"))
    assert torch.equal(state, torch.random.get_rng_state())
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        name = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
        a, b = (load_file(f"{f}/{part}/{name}.safetensors") for f in (published, tmp_path / "again" / "tiny-sd3"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_images_are_refused(new):
    with pytest.raises(ValueError, match="Stable Diffusion 3 is a text-to-image model and takes no images"):
        load(new).encode(PROMPTS, images=torch.zeros(2, 3, 16, 16))


def test_unknown_schedule_is_an_error(new):
    with pytest.raises(ValueError, match="unknown sigma schedule 'double': expected one of stock, single"):
        load(new, sigma_schedule="double")


def test_incomplete_folder_is_one_error(new, tmp_path):
    folder = shutil.copytree(new, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(RuntimeError, match=f"'{folder}' is incomplete, download or save it again"):
        load(str(folder))
