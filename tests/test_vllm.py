import copy
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import models
from models import checkpoint, parallel, qwen, tiny, vllm
from tests import processes

# The engine itself: seconds to start, on the GPU if there is one. vLLM is optional.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """tiny-qwen's width, but a head of its own and fewer keys than queries; random weights of a size that makes peaked
    distributions."""
    folder = tmp_path_factory.mktemp("untied")
    lm = tiny.qwen_lm(num_layers=2, num_kv_heads=2)
    lm.config.tie_word_embeddings, lm.config.max_position_embeddings = False, 512
    torch.manual_seed(0)
    lm = type(lm)(lm.config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif parameter.max() == 0:
                parameter.normal_(std=0.1)
    lm.save_pretrained(folder)
    tiny.arithmetic_tokenizer().save_pretrained(folder)
    return str(folder)


def changed(folder, lora_rank, dtype, device="cpu"):
    """A policy that has moved from its start, sharded; and its weights by name, the adapter merged by PEFT."""
    world = parallel.init()
    model = qwen.load(folder, device, dtype, lora_rank=lora_rank, lora_alpha=3 * lora_rank)
    change(model, 0.03, 0)
    merged = copy.deepcopy(model.parts["lm"])
    for module in merged.modules():
        if hasattr(module, "merge"):
            module.merge()
    reference = {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in merged.named_parameters()
        if ".lora_" not in name
    }
    parallel.shard(model.parts["lm"], model.blocks(model.parts["lm"]), world, dtype)
    return model, reference


@torch.no_grad()
def change(model, size, seed):
    """Adds noise to what is trained, the B of adapters included, to each rank's own rows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parallel.trained(model.parts).values():
        rows = parallel.local(parameter)
        rows.add_(size * torch.randn(rows.shape, generator=generator).to(rows.device))


# ----------------------------------------------------------------------------------------------------------------------
# Without an engine


def test_pack_pads_and_marks_rows():
    ids = [[7, 8, 0], [9], [5, 3]]
    logps = [[-0.5, -1.25, -2.0], [-0.125], [-3.0, -0.75]]
    out = vllm.pack(ids, logps, stop_ids=[0, 3], pad_id=1)
    assert out["ids"].tolist() == [[7, 8, 0], [9, 1, 1], [5, 3, 1]] and out["ids"].dtype == torch.int64
    assert out["mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]] and out["mask"].dtype == torch.int64
    assert out["truncated"].tolist() == [False, True, False] and out["truncated"].dtype == torch.bool
    assert out["logps"].tolist() == [[-0.5, -1.25, -2.0], [-0.125, 0, 0], [-3.0, -0.75, 0]]
    assert out["logps"].dtype == torch.float32


def streamed(folder, lora_rank, dtype, out=None):
    """Whether the stream equals the reference; its names; with `out`, also that it equals what `save` writes there."""
    model, reference = changed(folder, lora_rank, dtype)
    stream = dict(vllm.weights(model.parts["lm"], dtype))
    for name, tensor in stream.items():
        assert tensor.dtype == dtype and not tensor.requires_grad and type(tensor) is torch.Tensor
        # An adapter is added in fp32 here, and by PEFT in the dtype of the weight.
        tolerance = (
            dict(rtol=2**-7, atol=2**-9) if lora_rank and dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
        )
        torch.testing.assert_close(tensor, reference[name].to(dtype), **tolerance)
    assert stream.keys() == reference.keys()
    if out:
        full = checkpoint.full_tensors(parallel.trained(model.parts))
        if torch.distributed.get_rank() == 0:
            model.save(out, full)
            saved = load_file(os.path.join(out, "model.safetensors"))
            assert saved.keys() == stream.keys()
            assert all(torch.equal(saved[name], stream[name]) for name in saved)
    return sorted(stream)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_weights_equal_saved_ones(untied, tmp_path, ranks, dtype):
    names = processes.run(streamed, untied, 0, dtype, str(tmp_path), ranks=ranks)
    assert all(of_rank == names[0] for of_rank in names) and "lm_head.weight" in names[0]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_adapter_equals_the_one_merged_by_peft(untied, ranks, dtype):
    names = processes.run(streamed, untied, 4, dtype, ranks=ranks)
    start = load_file(os.path.join(untied, "model.safetensors"))
    assert all(of_rank == sorted(start) for of_rank in names)


def test_tied_head_is_streamed_once():
    lm = qwen.load(models.ASSETS + "/tiny-qwen", "cpu", torch.float32).parts["lm"]
    names = [name for name, _ in vllm.weights(lm, torch.float32)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names and len(names) == len(set(names))


def test_load_without_vllm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # both are set by load: back to what they were
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = qwen.load(models.ASSETS + "/tiny-qwen", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match='pip install "vllm>=') as raised:
        vllm.load(model)
    assert "\n" not in str(raised.value)


def test_load_refuses_pictures_and_too_much_context(untied):
    model = qwen.load(untied, "cpu", torch.float32)
    with pytest.raises(ValueError, match="max_tokens 513 is beyond the context of .*, 512 tokens"):
        vllm.load(model, max_tokens=513)
    model.parts["lm"].config.vision_config = {}
    with pytest.raises(ValueError, match="--rollout vllm is for text"):
        vllm.load(model)


def test_generate_refuses_what_it_cannot_sample():
    model = qwen.load(models.ASSETS + "/tiny-qwen", "cpu", torch.float32)
    sampler = vllm.Sampler(None, model, max_tokens=16)
    seeds, prompts = torch.arange(2), [[3, 4], [5]]
    with pytest.raises(RuntimeError, match="until the first update"):
        sampler.generate(prompts, 4, 1.0, seeds)
    sampler.updated = True
    for temperature in (0.005, 2.5, -1.0, float("nan"), torch.ones(3)):
        with pytest.raises(ValueError, match="temperature must be 0 or 0.01 to 2.0"):
            sampler.generate(prompts, 4, temperature, seeds)
    with pytest.raises(ValueError, match="not empty"):
        sampler.generate([[3], []], 4, 1.0, seeds)
    with pytest.raises(ValueError, match="prompt of 2 tokens and --max-new-tokens 15 do not fit into the 16 tokens"):
        sampler.generate(prompts, 15, 1.0, seeds)
    with pytest.raises(TypeError, match="seeds must be int64"):
        sampler.generate(prompts, 4, 1.0, seeds.int())


# ----------------------------------------------------------------------------------------------------------------------
# With an engine


# The first is longer than a block of the prefix cache (128 tokens on the CPU), for samples of what it keeps.
PROMPTS = ["1+" * 80 + "1=", "7*8=", "90-1=", "12+34=", "1+1=", "55+44=", "12+34=", "(1+2)*3="]
TEMPERATURES = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.5, 0.0, 2.0, 1.0])
SEEDS = torch.tensor([0, -1, 2, 3, 2**62, 5, -(2**63), 7])


def engine_case(folder, lora_rank):
    """Samples of an engine beside those of the policy itself, before and after the policy changes."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model, _ = changed(folder, lora_rank, dtype, DEVICE)
    rank = torch.distributed.get_rank()
    count = len(PROMPTS) - 3 * rank  # ranks need not generate as much
    prompts = model.encode(PROMPTS[:count], 8)
    temperature, seeds = TEMPERATURES[:count], SEEDS[:count]
    sampler = vllm.load(model, max_tokens=200, memory_fraction=0.1, eager=True)
    sampler.update(model)
    out = {"stop": model.stop_ids}

    def generate():
        return {key: value.cpu() for key, value in sampler.generate(prompts, 8, temperature, seeds).items()}

    def sample(name):
        out[name] = generate()
        ids, mask = padded(out[name]["ids"]), padded(out[name]["mask"])
        with torch.no_grad():
            logps = model.logps(model_prompts, ids, mask, TEMPERATURES)[:count, : out[name]["ids"].shape[1]]
        out[name]["error"] = (logps.cpu() - out[name]["logps"]).abs().max().item()
        out[name]["own"] = model.generate(model_prompts, 8, TEMPERATURES, SEEDS)["ids"][:count].cpu()

    # The policy is sharded: its ranks compute together, the same number of rows of the same length.
    model_prompts = model.encode(PROMPTS, 8)

    def padded(rows):
        return torch.nn.functional.pad(rows, (0, 8 - rows.shape[1], 0, len(PROMPTS) - count))

    sample("first")
    sample("again")
    change(model, 0.05, 1 + rank)
    out["stale"] = generate()
    sampler.update(model)
    sample("updated")
    first = sampler.generate(prompts[1:2] * 4000, 1, 0.7, torch.arange(4000))["ids"][:, 0]
    out["counts"] = first.cpu().bincount(minlength=29)
    one = torch.arange(29)[:, None]
    logps = model.logps(prompts[1:2] * 29, one, torch.ones_like(one), 0.7)
    out["expected"] = 4000 * logps[:, 0].detach().double().exp().cpu()
    return out


def check(out):
    tolerance = 0.1 if DEVICE == "cuda" else 1e-4
    for name in ("first", "again", "updated"):
        assert out[name]["error"] < tolerance
        ids, mask, truncated = (out[name][key] for key in ("ids", "mask", "truncated"))
        stopped = torch.isin(ids, torch.tensor(out["stop"])) & mask.bool()
        assert torch.equal(stopped.any(1), ~truncated) and (stopped.sum(1) <= 1).all()
        # A row ends with its stop token, or after 8.
        assert torch.equal(mask.sum(1), torch.where(truncated, 8, stopped.int().argmax(1) + 1))
        assert (out[name]["logps"][mask == 0] == 0).all() and (out[name]["logps"][mask == 1] < 0).all()
        if DEVICE == "cpu":
            greedy = (TEMPERATURES[: len(ids)] == 0)[:, None] & mask.bool()
            own = torch.nn.functional.pad(out[name]["own"], (0, 8))[:, : ids.shape[1]]
            assert torch.equal(ids[greedy], own[greedy])
    if DEVICE == "cpu":  # in bf16, rounding may turn a token
        assert torch.equal(out["first"]["ids"], out["again"]["ids"])
        assert torch.equal(out["first"]["ids"], out["stale"]["ids"])
        assert (out["first"]["logps"] - out["stale"]["logps"]).abs().max() < 1e-5
    assert not torch.equal(out["first"]["ids"], out["updated"]["ids"])
    # Pearson's chi-squared of what is not rare; 5 standard deviations.
    common = out["expected"] > 5
    counts, expected = out["counts"].double(), out["expected"]
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum()) - 1
    assert degrees > 3 and chi2 < degrees + 5 * (2 * degrees) ** 0.5


@pytest.fixture(scope="session", params=["tied", "untied"])
def folder(request, untied, tmp_path_factory):
    """A model whose generation_config.json asks for another distribution than softmax(z / T)."""
    copied = tmp_path_factory.mktemp("engine") / request.param
    shutil.copytree(untied if request.param == "untied" else models.ASSETS + "/tiny-qwen", copied)
    options = dict(do_sample=True, temperature=0.2, top_k=2, top_p=0.5, repetition_penalty=2.0, eos_token_id=0)
    (copied / "generation_config.json").write_text(json.dumps(options))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return str(copied)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_engine_samples_the_present_policy(folder, lora_rank):
    pytest.importorskip("vllm")
    check(processes.run(engine_case, folder, lora_rank, timeout=300)[0])


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="both ranks on one device: for the CPU")
def test_engines_of_two_ranks_sample_the_sharded_policy(untied):
    pytest.importorskip("vllm")
    for out in processes.run(engine_case, untied, 4, ranks=2, timeout=300):
        check(out)
