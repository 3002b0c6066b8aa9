import json
import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file, save_file

import flow_grpo
import models
from kernels.sde_step import fold_seed, sde_logp
from models import checkpoint, parallel, tiny

PROMPTS = ["a red circle", "  two Blue squares, left of a dog! "]
# Two SANA-shaped models, neither with the widths of tiny-sana: like 1.5 (query-key norm, DPM-Solver), and like 1.0 at
# its largest sizes (no query-key norm, positions), with patches and a rescaled timestep.
NEW = dict(
    num_layers=2,
    num_heads=3,
    head_dim=8,
    num_cross_heads=4,
    text_dim=32,
    latent_channels=4,
    vae_channels=(8, 16, 16),
)
OLD = dict(
    num_layers=1,
    num_heads=2,
    head_dim=16,
    num_cross_heads=1,
    text_dim=48,
    latent_channels=16,
    vae_channels=(8, 16),
    patch_size=2,
    qk_norm=None,
    interpolation_scale=0.5,
)


@torch.no_grad()
def random_folder(folder, seed, scaling, dimensions, timestep_scale=1.0, scheduler=None):
    """A saved pipeline in which every parameter of the transformer matters."""
    pipeline = tiny.sana_pipeline(seed=seed, **dimensions)
    draw = torch.Generator().manual_seed(seed)
    for name, p in pipeline.transformer.named_parameters():
        scale = 0.5 if "table" in name else p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.copy_(torch.randn(p.shape, generator=draw) * scale)
        if "norm" in name and name.endswith("weight") and p.ndim == 1:
            p.add_(1)
    pipeline.transformer.register_to_config(timestep_scale=timestep_scale)
    pipeline.vae.register_to_config(scaling_factor=scaling)
    pipeline.scheduler = scheduler or pipeline.scheduler
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def new(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("new"), 1, 0.7, NEW)


@pytest.fixture(scope="session")
def old(tmp_path_factory):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    folder = tmp_path_factory.mktemp("old")
    return random_folder(folder, 2, 1.3, OLD, timestep_scale=0.3, scheduler=scheduler)


@pytest.fixture(scope="session")
def instructed(new, tmp_path_factory):
    """A folder whose tokenizer holds the instruction (about 900 of its short tokens)."""
    folder = shutil.copytree(new, tmp_path_factory.mktemp("instructed") / "model")
    set_max_length(folder, 2000)
    return str(folder)


def set_max_length(folder, length):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(model_max_length=length)))


def load(folder, **options):
    return models.load(folder, device="cpu", dtype=options.pop("dtype", torch.float32), **options)


def stock(folder, shift=None):
    """The stock pipeline; with `shift`, on the flow-matching Euler scheduler instead of its own."""
    pipeline = SanaPipeline.from_pretrained(folder)
    if shift:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*values):
    return torch.tensor(values, dtype=torch.int64)


@torch.no_grad()
def ours(model, prompts=PROMPTS, guidance=1.0, size=(32, 64), num_steps=3, **options):
    """Latents at the end of the Euler ODE, from the init noise of seeds 0, 1, ..."""
    cond = model.encode(prompts, **options)
    sigmas = model.sigmas(num_steps, *size)
    x = model.init_noise(torch.arange(len(prompts)), *size)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        v = model.velocity(x, sigma.float().expand(len(x)), cond, (guidance, 1.0))
        x = x + v * (sigma_next - sigma).float()
    return x


def theirs(pipeline, model, prompts=PROMPTS, guidance=1.0, size=(32, 64), num_steps=3, output="latent", **options):
    """The same from the stock pipeline, called as a user would; from `model` it takes the init noise, the text length
    and whether there is an instruction."""
    if not model.instruction:
        options["complex_human_instruction"] = None
    images = pipeline(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=model.init_noise(torch.arange(len(prompts)), *size),
        max_sequence_length=model.text_tokens,
        use_resolution_binning=False,
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


def inputs(model, size=(32, 64), prompts=PROMPTS):
    """(x, sigma, cond) in the middle of a trajectory, another sigma for every row."""
    x = model.init_noise(torch.arange(len(prompts)) + 10, *size)
    return x, torch.linspace(0.3, 0.9, len(prompts)), model.encode(prompts)


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert a.std() > 0.05  # a black picture equals any other
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling, against the stock pipeline


@pytest.mark.parametrize("name, shift", [("new", 3.0), ("old", 2.0)])
@pytest.mark.parametrize("size, num_steps", [((32, 32), 2), ((64, 32), 5)])
def test_ode_equals_stock_pipeline(request, name, shift, size, num_steps):
    folder = request.getfixturevalue(name)
    model, pipeline, run = load(folder), stock(folder, shift), dict(size=size, num_steps=num_steps)
    x = ours(model, **run)
    assert_close(x, theirs(pipeline, model, **run))
    guided = ours(model, guidance=4.5, **run)
    assert_close(guided, theirs(pipeline, model, guidance=4.5, **run))
    assert (guided - x).abs().max() > 0.1


def test_negative_prompt_equals_stock_pipeline(new):
    model = load(new)
    x = ours(model, guidance=3.0, negative=["A bad picture"])
    assert_close(x, theirs(stock(new, 3.0), model, guidance=3.0, negative_prompt=["A bad picture"] * 2))
    assert (x - ours(model, guidance=3.0)).abs().max() > 0.02


def test_ode_of_the_folder_s_own_solver_has_the_same_end(new):
    model, size = load(new), (32, 32)
    end = theirs(stock(new), model, num_steps=200, size=size)

    def distance(num_steps):
        return (ours(model, num_steps=num_steps, size=size) - end).norm() / end.norm()

    assert distance(5) > 0.1 and distance(200) < 0.02


@pytest.mark.parametrize("name, shift", [("new", 3.0), ("old", 2.0)])
def test_decoded_image_equals_stock_pipeline(request, name, shift):
    folder = request.getfixturevalue(name)
    model = load(folder)
    images = model.decode(ours(model))
    assert images.dtype == torch.float32 and images.shape == (2, 3, 32, 64)
    assert_close(images, theirs(stock(folder, shift), model, output="np"))


@torch.no_grad()
def test_autoencoder_equals_its_own_encode_and_decode(new, old):
    for folder, scaling, shape in ((new, 0.7, (2, 4, 8, 16)), (old, 1.3, (2, 16, 16, 32))):
        model, vae = load(folder), stock(folder).vae
        images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
        x = model.encode_images(images)
        assert x.dtype == torch.float32 and x.shape == shape
        assert_close(x, scaling * vae.encode(images * 2 - 1).latent, 1e-5)
        decoded = vae.decode(x / scaling).sample / 2 + 0.5
        assert_close(model.decode(x), decoded.clamp(0, 1), 1e-5)
        model.vae.decoder.conv_out.weight.mul_(10)
        images = model.decode(x)
        assert images.min() == 0 and images.max() == 1


@torch.no_grad()
def test_encode_images_in_pieces_is_the_same(new, monkeypatch):
    model, images, pieces = load(new), torch.rand(3, 3, 1024, 1376), []
    encode = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda x: pieces.append(len(x)) or encode(x))
    x = model.encode_images(images)
    assert pieces == [2, 1]  # 4 megapixels at most
    assert_close(x[2:], model.encode_images(images[2:]), 1e-5)


@pytest.mark.parametrize("name, shift", [("new", 3.0), ("old", 2.0)])
def test_sigmas_equal_stock_scheduler(request, name, shift):
    model, scheduler = load(request.getfixturevalue(name)), FlowMatchEulerDiscreteScheduler(shift=shift)
    assert isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler)
    lowest = shift * 0.001 / (1 + (shift - 1) * 0.001)  # of 1000 steps, shifted once; below it is shifted again
    for num_steps in (1, 2, 7, 28):
        sigmas = model.sigmas(num_steps, 32, 64)
        scheduler.set_timesteps(num_steps)
        assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,)
        assert torch.equal(sigmas, scheduler.sigmas.double())
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        linear = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
        torch.testing.assert_close(sigmas[:-1], shift * linear / (1 + (shift - 1) * linear), rtol=0, atol=1e-6)


def test_init_noise_is_standard_normal_and_a_function_of_each_row_s_seed(new):
    model = load(new)
    whole = model.init_noise(seeds(5, -3, 2**62, 5), 32, 64)
    assert whole.dtype == torch.float32 and whole.shape == (4, 4, 8, 16)
    assert torch.equal(whole[0], whole[3]) and not torch.equal(whole[0], whole[1])
    parts = [model.init_noise(seeds(seed), 32, 64) for seed in (2**62, 5, -3)]
    assert torch.equal(torch.cat(parts), whole[[2, 0, 1]])
    x = model.init_noise(torch.arange(64), 32, 32).double()
    assert abs(x.mean()) < 5 / x.numel() ** 0.5 and abs(x.var() - 1) < 5 * (2 / x.numel()) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


@torch.no_grad()
def test_encode_equals_stock_pipeline(new):
    model, pipeline = load(new), stock(new)
    assert (model.text_tokens, model.instruction) == (12, "")
    prompts = [*PROMPTS, "", "a red circle " * 30]  # the last is cut
    cond = model.encode(prompts)
    assert set(cond) == {"text", "mask", "text_null", "mask_null"}
    text, mask, null, null_mask = pipeline.encode_prompt(prompts, max_sequence_length=12)
    assert_close(cond["text"], text, 1e-5)
    assert_close(cond["text_null"], null, 1e-5)
    assert torch.equal(cond["mask"], mask) and torch.equal(cond["mask_null"], null_mask)
    assert mask.sum(1).tolist() == [4, 12, 1, 12] and cond["mask_null"].sum(1).tolist() == [1] * 4
    rows = [model.encode([prompt]) for prompt in prompts]
    for name in cond:
        assert torch.equal(cond[name], torch.cat([row[name] for row in rows]))


@torch.no_grad()
def test_instruction_equals_stock_pipeline(instructed):
    model, pipeline = load(instructed), stock(instructed, 3.0)
    assert model.text_tokens == 300
    prompts = [*PROMPTS, "", "a red circle, " * 100]
    cond = model.encode(prompts)
    # Called without arguments, the stock pipeline's __call__ gives this to encode_prompt.
    lines = model.instruction.split("\n")
    text, mask, null, null_mask = pipeline.encode_prompt(prompts, complex_human_instruction=lines)
    assert_close(cond["text"], text, 1e-5)
    assert_close(cond["text_null"], null, 1e-5)
    assert torch.equal(cond["mask"], mask) and torch.equal(cond["mask_null"], null_mask)
    assert cond["text"].shape == (4, 300, 32) and null_mask.sum() == 4 and mask[3].all()
    # The empty prompt is not the null text, and one is not found in the cache for the other.
    assert not torch.equal(cond["text"][2], cond["text_null"][2])
    assert torch.equal(model.encode([""])["text"], cond["text"][2:3])

    x = ours(model, guidance=4.5, num_steps=2, size=(32, 32))
    assert_close(x, theirs(pipeline, model, guidance=4.5, num_steps=2, size=(32, 32)))
    bare = load(instructed, instruction=False)
    y = ours(bare, guidance=4.5, num_steps=2, size=(32, 32))
    assert_close(y, theirs(pipeline, bare, guidance=4.5, num_steps=2, size=(32, 32)))
    assert (x - y).abs().max() > 0.02


def test_instruction_is_used_where_the_tokenizer_holds_it(instructed, tmp_path):
    folder = shutil.copytree(instructed, tmp_path / "model")
    needed = load(instructed).instruction_tokens + 2
    for length, used in ((needed - 1, False), (needed, True)):
        set_max_length(folder, length)
        assert bool(load(str(folder)).instruction) == used


def test_padding_does_not_reach_the_velocity(new):
    model = load(new)
    x, sigma, cond = inputs(model)
    with torch.no_grad():
        expected = model.velocity(x, sigma, cond, (2.0, 1.0))
        for kind in ("", "_null"):
            padding = cond[f"mask{kind}"] == 0
            cond[f"text{kind}"] = cond[f"text{kind}"].masked_fill(padding[..., None], 5.0)
        assert torch.equal(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        unmasked = cond | {"mask": torch.ones_like(cond["mask"])}
        assert (model.velocity(x, sigma, unmasked, (2.0, 1.0)) - expected).abs().max() > 0.05


def test_cached_prompts_do_not_run_the_encoder(new, tmp_path):
    def counted(**options):
        model, rows = load(new, **options), []
        model.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
        return model, rows

    model, rows = counted(cache_folder=str(tmp_path / "rows"))
    first = model.encode(PROMPTS[:1])
    assert rows == [1, 1]  # the prompt and the empty prompt
    model.encode(PROMPTS)
    assert rows == [1, 1, 1]

    other, rows = counted(cache_folder=str(tmp_path / "rows"))
    again = other.encode(PROMPTS[:1])
    assert rows == [] and all(torch.equal(first[name], again[name]) for name in first)


def test_offloaded_encoder_waits_on_the_cpu(new):
    for offload, where in ((True, "cpu"), (False, "meta")):
        model = models.load(new, device="meta", dtype=torch.float32, offload_encoders=offload)
        assert {p.device.type for p in model.text_encoder.parameters()} == {where}
        assert {p.device.type for p in model.vae.parameters()} == {"meta"}


# ----------------------------------------------------------------------------------------------------------------------
# Velocity and training


def test_guidance_equals_two_forwards_and_their_gradient(new):
    model = load(new, lora_rank=2, lora_alpha=2)
    perturb(model, 0.1)
    x, sigma, cond = inputs(model)
    parameters = list(parallel.trained(model.parts).values())
    null = {"text": cond["text_null"], "mask": cond["mask_null"]}

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


@pytest.mark.parametrize("name", ["new", "old"])
def test_velocity_of_a_row_does_not_depend_on_the_batch(request, name):
    model = load(request.getfixturevalue(name))
    x, sigma, cond = inputs(model, prompts=[*PROMPTS, "", "a dog"])
    with torch.no_grad():
        for guidance in ((1.0, 1.0), (2.0, 1.0)):
            whole = model.velocity(x, sigma, cond, guidance)
            rows = [
                model.velocity(x[i : i + 1], sigma[i : i + 1], {k: t[i : i + 1] for k, t in cond.items()}, guidance)
                for i in range(4)
            ]
            assert_close(whole, torch.cat(rows), 1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replayed_logp_equals_rollout_logp(new, guidance):
    model = load(new, lora_rank=4, lora_alpha=8)
    perturb(model, 0.1)
    cond, guidance = model.encode(PROMPTS * 2), (guidance, 1.0)
    sigmas = model.sigmas(6, 32, 32)
    coefficients = flow_grpo.coefficients("flow_sde", sigmas, 0.7, (1, 4))
    seed_BT = torch.stack([fold_seed(0, torch.arange(4), i) for i in range(6)], dim=1)
    x = model.init_noise(torch.arange(4), 32, 32)
    _, states, logp_BK = flow_grpo.rollout(model, cond, x, (sigmas, *coefficients), guidance, seed_BT)
    assert states.shape[:2] == (4, 4) and logp_BK.shape == (4, 3)
    pairs = [(b, k) for b in range(4) for k in range(3)]
    for tile in (pairs[:5], pairs[5:]):  # rows of several steps in one forward, as in training
        b, k = (torch.tensor(index) for index in zip(*tile))
        rows = {name: tensor[b] for name, tensor in cond.items()}
        v = model.velocity(states[b, k], sigmas[k + 1].float(), rows, guidance)
        logp, _ = sde_logp(v, states[b, k], states[b, k + 1], *(coef[k + 1].float() for coef in coefficients))
        torch.testing.assert_close(logp, logp_BK[b, k], rtol=0, atol=1e-5)
        assert logp.requires_grad


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_training_step_changes_what_is_trained_and_nothing_else(new, lora_rank):
    model = load(new, lora_rank=lora_rank, lora_alpha=8, with_reference=lora_rank == 0)
    modules = {"text_encoder": model.text_encoder, "vae": model.vae, **model.parts}
    if model.reference_parts:
        modules["reference"] = model.reference_parts["transformer"]
    before = {(m, n): t.clone() for m, module in modules.items() for n, t in module.state_dict().items()}
    trained = parallel.trained(model.parts)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    x, sigma, cond = inputs(model)
    for _ in range(2):  # after the first step B is no longer zero and A has a gradient
        model.velocity(x, sigma, cond, (2.0, 1.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {(m, n): t for m, module in modules.items() for n, t in module.state_dict().items()}
    changed = {f"{m}.{n}" for m, n in before if not torch.equal(before[m, n], after[m, n])}
    assert changed == set(trained)
    layers = 2 * 2 * 4  # blocks, attentions, projections
    assert len(trained) == (2 * layers if lora_rank else len(list(model.parts["transformer"].parameters())))


def test_bfloat16_lora_is_close_to_float32(new):
    model, exact = (load(new, dtype=dtype, lora_rank=4, lora_alpha=8) for dtype in (torch.bfloat16, torch.float32))
    for name, p in model.parts["transformer"].named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    for m in (model, exact):
        perturb(m, 0.1)
    x, sigma, cond = inputs(exact)
    assert model.encode(PROMPTS)["text"].dtype == torch.bfloat16
    for guidance in (1.0, 3.0):
        v = model.velocity(x, sigma, model.encode(PROMPTS), (guidance, 1.0)).float()
        reference = exact.velocity(x, sigma, cond, (guidance, 1.0))
        error = (v - reference).norm() / reference.norm()
        assert 0 < error < 0.05
    assert (model.decode(x) - exact.decode(x)).abs().mean() < 0.02
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images(images)
    vae = SanaPipeline.from_pretrained(new, dtype=torch.bfloat16).vae
    with torch.no_grad():
        assert torch.equal(latents, 0.7 * vae.encode((images * 2 - 1).bfloat16()).latent.float())


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
    parallel.shard(part, model.blocks(part), world, torch.bfloat16, checkpoint_activations=True)
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


def assert_same(v, expected):
    # Not to the bit: on a CPU with several threads the last bit of a matrix product depends on how its weights are
    # aligned in memory, and these are two copies. FSDP2 lays out its own, always alike.
    assert (v - expected).abs().max() < 2e-6


def test_fresh_adapter_and_reference_are_the_base_model(new):
    model, base = load(new, lora_rank=4, lora_alpha=8), load(new)
    x, sigma, cond = inputs(base)
    with torch.no_grad():
        expected = base.velocity(x, sigma, cond, (2.0, 1.0))
        assert_same(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)
        perturb(model, 0.1)
        assert (model.velocity(x, sigma, cond, (2.0, 1.0)) - expected).abs().max() > 0.05
        with parallel.reference(model):
            assert_same(model.velocity(x, sigma, cond, (2.0, 1.0)), expected)


def test_reference_of_full_fine_tuning_is_the_frozen_copy(new):
    model = load(new, with_reference=True)
    x, sigma, cond = inputs(model)
    with torch.no_grad():
        expected = model.velocity(x, sigma, cond)
        perturb(model, 0.05)
        assert (model.velocity(x, sigma, cond) - expected).abs().max() > 0.05
        with parallel.reference(model):
            assert_same(model.velocity(x, sigma, cond), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("name, shift", [("new", 3.0), ("old", 2.0)])
def test_exported_lora_in_the_stock_pipeline_is_our_model(request, name, shift, tmp_path):
    base = request.getfixturevalue(name)
    model = load(base, lora_rank=4, lora_alpha=8)
    before = ours(model, guidance=2.0)
    perturb(model, 0.1)
    x = ours(model, guidance=2.0)
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "lora")
    tensors = load_file(f"{folder}/pytorch_lora_weights.safetensors")
    assert len(tensors) == len(parallel.trained(model.parts)) and not any("default" in key for key in tensors)

    pipeline = stock(base, shift)
    pipeline.load_lora_weights(folder)
    assert_close(x, theirs(pipeline, model, guidance=2.0))
    assert_close(model.decode(x), theirs(pipeline, model, guidance=2.0, output="np"))

    # Without the metadata the loader takes alpha = rank: half of our scale.
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    pipeline = stock(base, shift)
    pipeline.load_lora_weights(str(tmp_path / "bare"))
    assert (theirs(pipeline, model, guidance=2.0) - x).abs().max() > 0.01


@pytest.mark.parametrize("name, shift", [("new", 3.0), ("old", 2.0)])
def test_exported_full_model_is_ours_everywhere(request, name, shift, tmp_path):
    base = request.getfixturevalue(name)
    model = load(base)
    before = ours(model)
    perturb(model, 0.05)
    x = ours(model)
    assert (x - before).abs().max() > 0.05
    folder = export(model, tmp_path / "full")
    assert_close(x, theirs(stock(folder, shift), model))
    assert_close(model.decode(x), theirs(stock(folder, shift), model, output="np"))
    assert torch.equal(ours(load(folder)), x)
    # The scheduler is the base's own, and so is the picture that it draws.
    exported, original = stock(folder).scheduler, stock(base).scheduler
    assert type(exported) is type(original) and dict(exported.config) == dict(original.config)


# ----------------------------------------------------------------------------------------------------------------------
# tiny-sana


def test_tiny_sana_is_one_small_working_model(tmp_path):
    before = torch.get_rng_state()
    pipelines = [tiny.sana_pipeline() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("transformer", "vae", "text_encoder"):
        first, second = (getattr(pipeline, part).state_dict() for pipeline in pipelines)
        assert all(torch.equal(first[name], second[name]) for name in first)
    pipelines[0].save_pretrained(tmp_path / "tiny-sana")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2e6
    model = load(str(tmp_path / "tiny-sana"))
    assert model.latent_size(32, 32) == (8, 8) and not model.instruction
    prompts = ["a red circle left of a blue square", "a blue circle left of a red square"]
    assert model.encode(prompts)["mask"].sum(1).max() < model.text_tokens  # nothing of a shapes prompt is cut
    x, sigma, cond = inputs(model, size=(32, 32), prompts=prompts)
    sigma, x = sigma[:1].expand(2), x[:1].expand(2, -1, -1, -1)
    with torch.no_grad():
        v = model.velocity(x, sigma, cond)
        images = model.decode(ours(model, size=(32, 32)))
    assert v.std() > 0.1 and (v[0] - v[1]).abs().max() > 0.01  # word order matters
    assert images.std() > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def test_resolution_must_fit_the_patches(new, old):
    assert load(new).latent_size(32, 20) == (8, 5)
    model = load(old)
    assert model.latent_size(16, 24) == (8, 12)
    for call in (lambda: model.latent_size(18, 16), lambda: model.sigmas(4, 16, 18)):
        with pytest.raises(ValueError, match=r"--resolution: \d+ x \d+ is not a multiple of 4 pixels"):
            call()


def test_images_are_an_error(new):
    model = load(new)
    assert model.reference_images == "none" and not model.embedded_guidance
    with pytest.raises(ValueError, match="SANA is a text-to-image model and takes no images"):
        model.encode(PROMPTS, images=torch.rand(2, 3, 32, 32))


def test_distilled_model_is_an_error(new, tmp_path):
    folder = shutil.copytree(new, tmp_path / "model")
    config = dict(SanaTransformer2DModel.load_config(folder / "transformer"))
    SanaTransformer2DModel.from_config(config | dict(guidance_embeds=True)).save_pretrained(folder / "transformer")
    with pytest.raises(ValueError, match=f"'{folder}' has guidance_embeds: SANA-Sprint .* is not supported; use SANA"):
        load(str(folder))


@pytest.mark.parametrize("change", [dict(prediction_type="epsilon"), dict(use_flow_sigmas=False)])
def test_scheduler_of_another_process_is_an_error(new, tmp_path, change):
    folder = shutil.copytree(new, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="scheduler DPMSolverMultistepScheduler is not of flow matching; expected"):
        load(str(folder))


def test_attention_is_named(new):
    assert load(new).attention == "linear self-attention, torch scaled_dot_product_attention for text"
