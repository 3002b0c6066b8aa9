"""What --dry-run promises of runs that write, against loaded models, counts by hand and the resident memory of runs."""

import ctypes
import gc
import importlib
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
import test_memory
import torch

import models
from models import memory, memory_lm, parallel, run_folder, tiny

RUN = dict(tile_rows=4, rollout_rows=8, max_new_tokens=16, prompt_tokens=12)
DRAW = dict(tile_rows=4, resolution=32, num_samples=8, num_prompts=2, num_states=3)
TINY = ["tiny-qwen", "tiny-qwen-vl", "tiny-qwen-refine"]
HELD = ["trained parameters", "frozen parameters", "optimizer state", "averaged weights", "reference copy", "buffers"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub out of reach and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# ----------------------------------------------------------------------------------------------------------------------
# Exact: parameters, shards, the cache of keys and values

# As the hub counts the weights of the checkpoints
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-vl-3b": 3_754_622_976,
}


@pytest.mark.parametrize("alias", PUBLISHED)
def test_qwen_has_the_published_numbers_of_parameters_and_needs_no_hub(alias, offline):
    model = memory_lm._Language(alias, torch.bfloat16, 0, False, True)
    assert memory.numel(model.parameters) + memory.numel(model.tower) == PUBLISHED[alias]


def test_without_its_config_an_alias_is_refused_with_what_to_do(offline):
    with pytest.raises(RuntimeError, match="'Qwen/Qwen3-4B' .*hf download"):
        memory_lm.language("qwen3-4b", torch.bfloat16, **RUN)


@pytest.mark.parametrize("dtype, lora_rank", [(torch.float32, 0), (torch.bfloat16, 5)])
@pytest.mark.parametrize("source", TINY)
def test_bytes_are_those_of_the_loaded_model(source, dtype, lora_rank):
    lora = dict(lora_rank=lora_rank, with_reference=True)
    model = models.load_lm(source, "cpu", dtype, lora_alpha=5, **lora)
    sizes = memory_lm.language(source, dtype, **RUN, **lora, ema=True)
    tensors = list(model.parts["lm"].parameters())
    assert sizes["model, unsharded"] == sum(p.nbytes for p in tensors)
    assert sizes["trained parameters"] == sum(p.nbytes for p in tensors if p.requires_grad) > 0
    assert sizes["averaged weights"] == sizes["trained parameters"] == sizes["gradients"]
    assert sizes["optimizer state"] == 2 * sizes["trained parameters"]
    assert sizes["frozen parameters"] == sum(p.nbytes for p in tensors if not p.requires_grad)
    copies = list((model.reference_parts or {}).values())
    assert sizes["reference copy"] == sum(p.nbytes for m in copies for p in m.parameters())
    assert bool(copies) == (lora_rank == 0)
    assert sizes["buffers"] == sum(b.nbytes for m in [model.parts["lm"], *copies] for b in m.buffers())
    tower = model.tower.parameters() if model.takes_images else []
    assert sizes["vision tower"] == sum(p.nbytes for p in tower)
    assert (sizes["vision tower"] > 0) == (source == "tiny-qwen-vl")


def test_a_frozen_model_is_held_and_sampled_and_no_more():
    trained, frozen = (memory_lm.language("tiny-qwen", torch.float32, **RUN, train=train) for train in (True, False))
    assert frozen["frozen parameters"] == trained["trained parameters"] > 0 == frozen["trained parameters"]
    assert frozen["sampling"] == trained["sampling"] and frozen["host: checkpoint"] == frozen["host: export"] == 0
    for name in ("optimizer state", "gradients", "token activations", "optimizer temporaries", "averaged weights"):
        assert frozen[name] == 0, name
    assert frozen["peak"] == frozen["peak: sampling"] < trained["peak"]


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_divide_what_is_sharded(ranks):
    one, many = (memory_lm.language("qwen2.5-0.5b", torch.bfloat16, **RUN, world_size=n) for n in (1, ranks))
    assert one["trained parameters"] == 4 * PUBLISHED["qwen2.5-0.5b"]
    for name in ("trained parameters", "optimizer state", "gradients"):
        assert one[name] <= ranks * many[name] < 1.001 * one[name]
    # Sampling gathers all of it, and the next block's buffer and copy.
    assert one["gathered for sampling"] == 2 * PUBLISHED["qwen2.5-0.5b"] < many["gathered for sampling"]
    assert one["sampling"] == many["sampling"] and one["peak: loading"] == many["peak: loading"]
    again = memory_lm.language("qwen2.5-0.5b", torch.bfloat16, **RUN, world_size=8 * ranks, shard_size=ranks)
    assert again == many


def test_the_cache_has_keys_and_values_of_all_tokens_of_all_samples():
    config = models.load_lm("tiny-qwen", "cpu", torch.float32).parts["lm"].config
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 4 * head_dim
    size = {L: memory_lm.language("tiny-qwen", torch.float32, **RUN | dict(max_new_tokens=L)) for L in (1000, 3000)}
    more = size[3000]["sampling"] - size[1000]["sampling"]
    # Beside it positions, masks, ids and random numbers of every token; those are 8 bytes or less each.
    assert 8 * 2000 * per_token < more < 8 * 2000 * (per_token + 100)
    rows = memory_lm.language("tiny-qwen", torch.float32, **RUN | dict(max_new_tokens=1000, rollout_rows=16))
    assert 1.9 < rows["sampling"] / size[1000]["sampling"] < 2.1
    none = memory_lm.language("tiny-qwen", torch.float32, **RUN | dict(rollout_rows=0))
    assert none["sampling"] == none["gathered for sampling"] == 0


def test_flags_move_memory_to_where_they_say():
    def sizes(**flags):
        long = dict(max_new_tokens=500)  # beside which the chunks of the head do not count
        return memory_lm.language("qwen2.5-0.5b", torch.bfloat16, **RUN | long | flags)

    one, plain = sizes(), sizes(world_size=2, with_reference=True)
    assert sizes(checkpoint_activations=True)["token activations"] < 0.8 * one["token activations"]
    assert sizes(tile_rows=8)["token activations"] > 1.5 * one["token activations"]
    offloaded = sizes(world_size=2, with_reference=True, cpu_offload=True)
    moved = ("trained parameters", "optimizer state", "reference copy", "gradients")
    assert offloaded["host: sharded"] == sum(plain[name] for name in moved)
    assert all(offloaded[name] == 0 for name in moved)
    kept = sizes(world_size=2, keep_unsharded=True)
    assert kept["gradients"] == one["trained parameters"]
    assert kept["gathered parameters"] == kept["gathered for sampling"] == plain["gathered for sampling"]
    # The copy of the reference is made of fp32 weights.
    assert plain["peak: loading"] == 2 * one["peak: loading"] == 8 * PUBLISHED["qwen2.5-0.5b"]
    with_text = memory.table(one)
    line = next(line for line in with_text.splitlines() if line.startswith("optimizer state"))
    assert float(line.split()[2]) == round(one["optimizer state"] / 2**30, 3) and "--lora-rank" in line
    assert f"needed per GPU: {one['peak'] / 2**30:.2f} GiB" in with_text


# ----------------------------------------------------------------------------------------------------------------------
# Both at once


def test_a_pair_holds_both_while_one_works():
    dm = memory.estimate("tiny-flux", torch.float32, **DRAW)
    lm = memory_lm.language("tiny-qwen-refine", torch.float32, **RUN)
    both = memory_lm.together(dm, lm)
    held_lm = sum(lm[name] for name in HELD)
    held_dm = dm["peak: rollout"] - dm["gathered parameters"] - dm["rollout forward"]
    assert both["peak: sampling"] == held_dm + lm["peak: sampling"]
    assert both["peak: tokens"] == held_dm + lm["peak: tokens"]
    assert both["peak: rollout"] == dm["peak: rollout"] + held_lm
    # The gradients of the tokens wait for those of the steps.
    assert both["peak: update"] == dm["peak: update"] + held_lm + lm["trained parameters"]
    temporaries = max(dm["optimizer temporaries"], lm["optimizer temporaries"])
    gradients = dm["trained parameters"] + lm["trained parameters"]
    assert both["peak: optimizer step"] == held_dm + held_lm + gradients + temporaries
    assert both["peak"] == max(size for name, size in both.items() if name.startswith("peak: "))
    assert both["trained parameters"] == dm["trained parameters"]
    assert both["lm: trained parameters"] == lm["trained parameters"]
    for name in ("host: checkpoint", "host: export"):
        assert both[name] == dm[name] + lm[name]
    text = memory.table({name: 1024 * size for name, size in both.items()})
    assert "--lm-micro-batch-size" in next(x for x in text.splitlines() if x.startswith("lm: token activations"))


def test_a_unified_model_is_held_once(tmp_path):
    source = str(tmp_path / "blip3o")
    tiny.blip3o_folder(source)
    dm = memory.estimate(source, torch.float32, **DRAW, train_lm=True)
    lm = memory_lm.language(source, torch.float32, **RUN)
    alone = memory_lm.language("tiny-qwen-vl", torch.float32, **RUN)
    assert lm == alone  # the language model that it is made of
    both = memory_lm.together(dm, lm, unified=True)
    held = dm["peak: rollout"] - dm["gathered parameters"] - dm["rollout forward"]
    assert both["peak: sampling"] == held + lm["gathered for sampling"] + lm["sampling"]
    for name in ("peak: update", "peak: optimizer step", "host: peak", "host: checkpoint", "model, unsharded"):
        assert both[name] == dm[name], name
    assert "lm: trained parameters" not in both and both["lm: sampling"] == lm["sampling"]


def test_a_frozen_diffusion_model_draws_and_no_more(tmp_path):
    tiny.blip3o_folder(str(tmp_path / "blip3o"))
    for source in ("tiny-flux", str(tmp_path / "blip3o")):
        trained = memory.estimate(source, torch.float32, **DRAW)
        frozen = memory.estimate(source, torch.float32, **DRAW, train_dm=False)
        assert frozen["trained parameters"] == frozen["activations"] == frozen["host: export"] == 0
        assert frozen["frozen parameters"] == trained["model, unsharded"]
        assert frozen["rollout forward"] == trained["rollout forward"]
        assert frozen["peak: update"] < trained["peak: update"] == trained["peak"]


# ----------------------------------------------------------------------------------------------------------------------
# The flag


@pytest.mark.parametrize(
    "script, flags",
    [
        ("rloo", []),
        ("rloo", ["--lm", "qwen2.5-3b"]),
        ("remax", ["--lm", "qwen2.5-7b", "--rollout", "vllm"]),
        ("grpo_unified", []),
        ("grpo_unified", ["--train", "lm", "--lora-rank", "4"]),
        ("grpo_unified", ["--train", "dm"]),
        ("grpo_unified", ["--task", "t2i"]),
        ("grpo_unified", ["--task", "text"]),
        ("grpo_unified", ["--model", "tiny-kontext", "--lm", "tiny-qwen-vl", "--refine", "--train", "joint"]),
        ("grpo_unified", ["--model", "tiny-blip3o", "--task", "i2i_cycle", "--refine", "--train", "joint"]),
        ("grpo_unified", ["--model", "tiny-blip3o", "--train", "lm"]),
    ],
)
def test_a_dry_run_prints_a_table_and_writes_nothing(script, flags, offline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "init", lambda *_: parallel.World(0, 1, torch.device("cpu"), None))
    module = importlib.import_module(script)
    argv = [*flags, "--dry-run", "--out", str(tmp_path / "run")]
    usual = {"--lm": "tiny-qwen"} if script != "grpo_unified" else {"--model": "tiny-flux", "--lm": "", "--task": ""}
    defaults = module.recipe(*(run_folder.peek(argv, flag, value) for flag, value in usual.items()))
    assert module.main(run_folder.command_line(defaults, argv, module.__file__)) is None
    out = capsys.readouterr().out
    assert out.startswith("memory per GPU") and "needed per GPU: " in out and not list(tmp_path.iterdir())
    assert ("prompts count as 256 tokens" in out) == ("t2i" not in flags)
    draws, writes = script == "grpo_unified" and "text" not in flags, "t2i" not in flags
    assert ("decoding" in out) == draws and ("lm: " in out) == (draws and writes)
    assert ("sampling" in out) == (writes and "vllm" not in flags)
    assert ("token activations" in out) == (writes and "dm" not in flags)


# ----------------------------------------------------------------------------------------------------------------------
# The whole: resident memory of a run

# name -> flags; 9 M parameters of the language model, 8 M of FLUX
MEASURED = {
    "full": dict(micro_batch_size=8, ema_decay=0.9),
    "lora": dict(micro_batch_size=32, kl_coef=0.1, lora_rank=8, checkpoint_activations=True, keep_unsharded=False),
    "pair": dict(lm_kl_coef=0.1, ema_decay=0.0, keep_unsharded=False, num_steps=3, window_size=2, window_range=(0, 2)),
}
PROMPT = {False: 6, True: 56}  # tokens: a sum; the template of a user's prompt
TEXTS = dict(num_prompts=4, group_size=8, max_new_tokens=40, temperature=20.0)


def one_iteration_each(results, folder):
    """Peak of the resident memory of every run, in bytes above what the process held before."""
    import grpo_unified
    import rloo

    # glibc then returns what is freed at once, so that what is resident is what is alive.
    libc = ctypes.CDLL(None)
    assert libc.mallopt(-3, 65536) and libc.mallopt(-1, 65536)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    once = dict(num_iterations=1)
    # Runs of tiny models first, for every import, thread and buffer that does not belong to the model.
    rloo.main(rloo.Args(out=f"{folder}/tiny", num_prompts=2, eval_size=2, kl_coef=0.1, **once))
    few = dict(num_prompts=1, micro_batch_size=4, lm_micro_batch_size=4, group_size=4, eval_size=2)
    grpo_unified.main(grpo_unified.Args(out=f"{folder}/tiny pair", **once, **few))
    for name, flags in MEASURED.items():
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = test_memory.resident("VmRSS")
        flags = once | TEXTS | dict(eval_size=4, out=f"{folder}/{name} run") | flags
        if name == "pair":
            both = dict(lm=f"{folder}/refine", model=f"{folder}/flux", resolution=64, eval_num_steps=1)
            grpo_unified.main(grpo_unified.Args(**both, micro_batch_size=16, lm_micro_batch_size=8, **flags))
        else:
            rloo.main(rloo.Args(lm=f"{folder}/lm", **flags))
        results.put((name, test_memory.resident("VmHWM") - before))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory can be reset on Linux only")
def test_predicted_peak_is_within_a_quarter_of_a_measured_run(tmp_path):
    large = dict(width=320, num_layers=6, num_heads=4, ff_dim=1280)
    for name, lm, tokenizer in (
        ("lm", tiny.qwen_lm(**large, num_kv_heads=2), tiny.arithmetic_tokenizer()),
        ("refine", tiny.refine_lm(**large), tiny.refine_tokenizer()),
    ):
        lm.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    tiny.flux_pipeline(num_heads=6, head_dim=64, text_dim=128).save_pretrained(tmp_path / "flux")
    results = test_memory.processes.Queue()
    test_memory.processes.Process(target=one_iteration_each, args=(results, str(tmp_path)), daemon=True).start()
    for name, measured in [results.get(timeout=180) for _ in MEASURED]:
        flags = MEASURED[name]
        common = dict(ema=flags.get("ema_decay", 0) > 0, keep_unsharded=flags.get("keep_unsharded", True))
        common |= dict(lora_rank=flags.get("lora_rank", 0), device_type="cpu")
        predicted = memory_lm.language(
            str(tmp_path / ("refine" if name == "pair" else "lm")),
            torch.float32,
            tile_rows=flags.get("micro_batch_size", 8),
            rollout_rows=32,
            max_new_tokens=40,
            prompt_tokens=PROMPT[name == "pair"],
            with_reference=name != "full",
            checkpoint_activations="checkpoint_activations" in flags,
            **common,
        )
        if name == "pair":
            run = dict(tile_rows=16, resolution=64, num_samples=32, num_prompts=32, num_states=3)
            dm = memory.estimate(str(tmp_path / "flux"), torch.float32, **run, **common)
            predicted = memory_lm.together(dm, predicted)
        test_memory.check(name, measured, predicted["peak"])
