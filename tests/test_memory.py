"""What --dry-run promises, against the real things: FSDP2's shards, and the resident memory of a run."""

import ctypes
import gc
import multiprocessing
import os
import shutil
import sys
from datetime import timedelta

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import models
from models import blip3o, flux, memory, parallel, tiny

SD3 = "stable_diffusion_3.pipeline_stable_diffusion_3"
KLEIN = "flux2.pipeline_flux2_klein"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "peft", "pytest"),
        *("diffusers.pipelines.flux.pipeline_flux", "matplotlib.pyplot"),
        *(f"diffusers.pipelines.{name}" for name in (SD3, KLEIN)),
    ]
)

TINY = ["tiny-flux", "tiny-kontext", "tiny-klein", "tiny-sd3", "tiny-sana"]
RUN = dict(tile_rows=4, resolution=32, num_samples=8, num_prompts=2, num_states=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A FLUX-shaped folder whose row counts (3 heads, 48 wide) 2 and 3 do not always divide."""
    path = tmp_path_factory.mktemp("small")
    tiny.flux_pipeline(num_heads=3, text_dim=40, pooled_dim=20, guidance_embeds=True).save_pretrained(path)
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Exact: parameters and shards


@pytest.mark.parametrize("alias", ["flux", "kontext"])
def test_flux_dev_has_the_published_numbers_of_parameters(alias):
    family, pipeline = memory._pipeline(alias, torch.bfloat16)
    assert family == alias
    assert memory.numel(pipeline.transformer.parameters()) == 11_901_408_320
    assert memory.numel(memory.encoder_parameters(pipeline)) == flux.FLUX_DEV["encoder_parameters"]
    assert memory.numel(pipeline.vae.parameters()) == flux.FLUX_DEV["vae_parameters"]
    assert 2 ** (len(pipeline.vae.config.block_out_channels) - 1) == flux.FLUX_DEV["vae_scale"]
    assert pipeline.tokenizer_2.model_max_length == flux.FLUX_DEV["text_tokens"]


def test_kontext_dev_needs_no_weights_and_no_network():
    sizes = memory.estimate("kontext", torch.bfloat16, **RUN | dict(resolution=512), lora_rank=64, world_size=8)
    # T5's rows 512 x 4096 and CLIP's 768, bf16, of 2 prompts on the GPU and 512 in the cache; on the GPU also the
    # latents of the picture that each prompt edits, fp32.
    assert sizes["prompt embeddings"] == 2 * (2 * (512 * 4096 + 768) + 4 * 16 * 64 * 64)
    assert sizes["host: prompt cache"] == 512 * 2 * 2097920
    assert sizes["trajectories"] == 2 * 8 * 3 * 16 * 64 * 64 * 4
    # Width 3072. Double blocks: 8 attention projections and 2 feed-forwards; single blocks: q, k, v.
    d, r = 3072, 64
    adapters = 19 * (8 * 2 * d * r + 4 * 5 * d * r) + 38 * 3 * 2 * d * r
    assert sizes["model, unsharded"] == 2 * 11_901_408_320 + 4 * adapters
    assert sizes["trained parameters"] == 4 * adapters // 8 and sizes["optimizer state"] == adapters
    assert 2 * 11_901_408_320 // 8 <= sizes["frozen parameters"] < 2.001 * 11_901_408_320 // 8


def test_flux_dev_needs_no_picture():
    sizes = memory.estimate("flux", torch.bfloat16, **RUN)
    assert sizes["prompt embeddings"] == 2 * 2 * (512 * 4096 + 768)
    assert sizes["model, unsharded"] == 4 * 11_901_408_320


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub out of reach and an empty cache, whose folder it returns."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_needs_configs_and_tokenizers_only(offline):
    cached = offline / "models--somebody--klein"
    files = models.folder_or_id("tiny-klein")
    shutil.copytree(files, cached / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    sizes = memory.estimate("somebody/klein", torch.float32, **RUN)
    assert sizes == memory.estimate("tiny-klein", torch.float32, **RUN)


@pytest.mark.parametrize("alias", ["klein", "sd3", "sd3.5", "sana"])
def test_without_its_configs_an_alias_is_refused_with_what_to_do(offline, alias):
    with pytest.raises(RuntimeError, match=f"'{models.ALIASES[alias]}' .*hf download"):
        memory.estimate(alias, torch.float32, **RUN)


@pytest.mark.parametrize("dtype, lora_rank", [(torch.float32, 0), (torch.bfloat16, 5)])
@pytest.mark.parametrize("source", TINY)
def test_bytes_of_a_folder_are_those_of_the_loaded_model(source, dtype, lora_rank):
    model = models.load(source, "cpu", dtype, lora_rank=lora_rank, lora_alpha=5, with_reference=True)
    images = torch.rand(2, 3, 32, 32) if model.reference_images != "none" else None
    sizes = memory.estimate(
        source, dtype, **RUN, lora_rank=lora_rank, with_reference=True, reference_image=images is not None
    )
    tensors = list(model.parts["transformer"].parameters())
    assert sizes["model, unsharded"] == sum(p.nbytes for p in tensors)
    assert sizes["trained parameters"] == sum(p.nbytes for p in tensors if p.requires_grad) > 0
    assert sizes["frozen parameters"] == sum(p.nbytes for p in tensors if not p.requires_grad)
    copies = [m for m in (model.reference_parts or {}).values()]
    assert sizes["reference copy"] == sum(p.nbytes for m in copies for p in m.parameters())
    assert bool(copies) == (lora_rank == 0)
    copies.append(model.parts["transformer"])
    assert sizes["buffers"] == sum(b.nbytes for m in copies for b in m.buffers())
    assert (sizes["buffers"] > 0) == (source == "tiny-sd3")
    assert sizes["autoencoder"] == sum(p.nbytes for p in model.vae.parameters())
    encoders = [m for name, m in model.components.items() if name.startswith("text_encoder")]
    assert len(encoders) == {"tiny-sd3": 3, "tiny-klein": 1, "tiny-sana": 1}.get(source, 2)
    assert sizes["text encoders"] == sum(p.nbytes for m in encoders for p in m.parameters())
    assert sizes["prompt embeddings"] == sum(rows.nbytes for rows in model.encode(["a", "b"], images).values())
    cached = sum(t.nbytes for t in next(iter(model.cache.rows.values())).values())
    assert sizes["host: prompt cache"] == 512 * cached


# ----------------------------------------------------------------------------------------------------------------------
# Unified models


def connector_parameters(width, out, layers, head, ff, out_bias, ff_bias):
    attention = 3 * (width * width + width) + width * width + out_bias * width + 2 * head
    return layers * (attention + 2 * width + 3 * width * ff + ff_bias * (2 * ff + width)) + width, width * out + out


def test_full_size_parts_have_the_published_numbers_of_parameters(offline):
    lm = {"lm": 3_085_938_688, "vision tower": 3_754_622_976 - 3_085_938_688}  # Qwen2.5-3B's, and the whole's
    sana, autoencoder, width = 1_604_462_752, 312_250_275, 2240
    reference = 32 * width + width + width * width + width  # ref_patch_embed, ref_linear
    found = memory.parameters("blip3o")
    assert sum(connector_parameters(2048, 2304, 12, 256, 4096, True, True)) == 508_315_904
    assert found == lm | dict(
        transformer=sana + reference, queries=2 * 256 * 2048, connector=508_315_904, autoencoder=autoencoder
    )
    found = memory.parameters("metaquery")
    blocks, out = connector_parameters(2048, 2304, 24, 64, 8192, False, False)
    connector = blocks + out + 2304 * 2304 + 2304 + 2304  # a second matrix, and a norm
    assert found == lm | dict(transformer=sana, queries=257 * 2048, connector=connector, autoencoder=autoencoder)
    assert abs(found["transformer"] / 1.6e9 - 1) < 0.01  # as its name says


def test_a_full_size_name_is_a_recipe_and_no_model(offline):
    assert models.family("blip3o") == "blip3o" and models.family("metaquery") == "metaquery"
    for load in (models.pipeline_class, lambda name: models.load(name, "cpu", torch.float32)):
        with pytest.raises(ValueError, match="blip3o.create.'metaquery', 'qwen2.5-vl-3b', .*'metaquery'") as error:
            load("metaquery")
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def unified(tmp_path_factory):
    """Folders of an untrained BLIP3o and MetaQuery on tiny models."""
    path = tmp_path_factory.mktemp("unified")
    for variant in ("blip3o", "metaquery"):
        tiny.blip3o_folder(str(path / variant), variant)
    return path


@pytest.mark.parametrize(
    "variant, dtype, lora_rank, train_lm",
    [
        ("blip3o", torch.bfloat16, 0, False),
        ("blip3o", torch.bfloat16, 5, True),
        ("metaquery", torch.float32, 0, True),
        ("metaquery", torch.bfloat16, 5, False),
    ],
)
def test_bytes_of_a_unified_folder_are_those_of_the_loaded_model(unified, variant, dtype, lora_rank, train_lm):
    source = str(unified / variant)
    model = models.load(
        source, "cpu", dtype, lora_rank=lora_rank, lora_alpha=10, with_reference=True, train_lm=train_lm
    )
    options = dict(lora_rank=lora_rank, with_reference=True, train_lm=train_lm, reference_image=True)
    sizes = memory.estimate(source, dtype, **RUN, **options, prompt_tokens=60)
    tensors = [p for part in model.parts.values() for p in part.parameters()]
    assert sizes["model, unsharded"] == sum(p.nbytes for p in tensors)
    assert sizes["trained parameters"] == sum(p.nbytes for p in tensors if p.requires_grad) > 0
    assert sizes["frozen parameters"] == sum(p.nbytes for p in tensors if not p.requires_grad)
    assert (sizes["frozen parameters"] > 0) == (not train_lm or lora_rank > 0)
    copies = list((model.reference_parts or {}).values())
    assert sizes["reference copy"] == sum(p.nbytes for m in copies for p in m.parameters())
    assert len(copies) == (0 if lora_rank else 3 + train_lm)
    assert sizes["buffers"] == sum(b.nbytes for m in [*model.parts.values(), *copies] for b in m.buffers())
    assert sizes["autoencoder"] == sum(p.nbytes for p in model.vae.parameters())
    assert sizes["vision tower"] == sum(p.nbytes for p in model.lm.tower.parameters()) > 0 == sizes["text encoders"]
    counts = {
        name: sum(p.numel() for p in part.parameters() if ".lora_" not in name) for name, part in model.parts.items()
    }
    if lora_rank == 0:
        counts |= {"vision tower": memory.numel(model.lm.tower.parameters())}
        counts |= {"autoencoder": memory.numel(model.vae.parameters())}
        assert memory.parameters(source) == counts
    rows = model.encode(["a", "b"], torch.rand(2, 3, 32, 32))
    assert rows["ids"].shape == (2, 96)  # 60 tokens, 16 in place of one of them, 2 of the turn; padded
    assert sizes["prompt embeddings"] == sum(t.nbytes for t in rows.values())
    assert sizes["host: prompt cache"] == 0


def test_an_adapter_folder_is_estimated_as_the_model_it_belongs_to(unified, tmp_path):
    source = str(unified / "blip3o")
    model = models.load(source, "cpu", torch.float32, lora_rank=2, lora_alpha=2)
    model.save(str(tmp_path / "adapter"), {name: p.detach() for name, p in parallel.trained(model.parts).items()})
    run = dict(RUN, tile_rows=2)
    assert memory.estimate(str(tmp_path / "adapter"), torch.float32, **run) == memory.estimate(
        source, torch.float32, **run
    )


def test_ranks_divide_what_is_sharded(offline):
    run = dict(micro_batch_size=2, resolution=512, ema=True, checkpoint_activations=True)
    found = memory.pretraining("blip3o", torch.bfloat16, **run)
    counts = memory.parameters("blip3o")
    trained = 4 * sum(counts[name] for name in ("transformer", "queries", "connector"))
    assert list(found) == [1, 8, 64]
    for ranks, sizes in found.items():
        # Of each parameter a rank has ceil(rows / ranks): of a block's table of 6 shifts and scales a row.
        assert trained <= ranks * sizes["trained parameters"] < 1.002 * trained
        assert 2 * counts["lm"] <= ranks * sizes["frozen parameters"] < 1.001 * 2 * counts["lm"]
        assert sizes["optimizer state"] == 2 * sizes["trained parameters"] == 2 * sizes["averaged weights"]
        assert sizes["gradients"] == sizes["trained parameters"]
        assert sizes["vision tower"] == 2 * counts["vision tower"] and sizes["autoencoder"] == 2 * counts["autoencoder"]
        assert sizes["reference copy"] == sizes["trajectories"] == 0
        # The language model, which is frozen, comes whole, in bf16, before it is sharded.
        assert sizes["peak: loading"] == 2 * (counts["lm"] + counts["vision tower"])
        assert sizes["host: export"] == trained + trained // 2
    text = memory.pretraining_table(found)
    assert text.splitlines()[0].split()[3:9] == ["1", "GPU", "8", "GPUs", "64", "GPUs"]
    row = next(line for line in text.splitlines() if line.startswith("trained parameters")).split()
    assert row[2:5] == [f"{found[ranks]['trained parameters'] / 2**30:.3f}" for ranks in (1, 8, 64)]
    assert "--offload-encoders" not in text


@pytest.mark.parametrize("source", ["unified", "tiny-flux", "tiny-sd3", "tiny-sana", "tiny-klein"])
def test_pretraining_of_every_family(source, unified):
    source = str(unified / "blip3o") if source == "unified" else source
    run = dict(micro_batch_size=32, resolution=32)
    one, two = memory.pretraining(source, torch.float32, **run, gpus=(1, 2)).values()
    rl = memory.estimate(
        source, torch.float32, tile_rows=32, num_samples=32, num_prompts=32, num_states=2, resolution=32
    )
    same = {name for name in one if one[name] == rl.get(name)}
    assert same >= {"trained parameters", "optimizer state", "autoencoder", "prompt embeddings", "decoding"}
    assert one["evaluation forward"] == rl["rollout forward"] and one["trajectories"] == 0 < rl["trajectories"]
    # The pictures' latents are found while nothing of the transformer is alive: the backward is the peak of both.
    assert 0.9 * rl["activations"] < one["activations"] < 1.3 * rl["activations"]
    assert two["trained parameters"] < 0.6 * one["trained parameters"]
    run |= dict(checkpoint_activations=True, ema=True, shard_size=2)
    one_group, saved = memory.pretraining(source, torch.float32, **run, gpus=(1, 4)).values()
    assert saved["activations"] < 0.9 * two["activations"]
    # Groups of 2; alone there is no group.
    assert saved["averaged weights"] == saved["trained parameters"] == two["trained parameters"]
    assert one_group["trained parameters"] == one["trained parameters"]


def test_a_trained_language_model_is_no_longer_frozen(unified):
    run = dict(micro_batch_size=2, resolution=32, gpus=(1,))
    source = str(unified / "blip3o")
    frozen, trained = (memory.pretraining(source, torch.bfloat16, **run, train_lm=t)[1] for t in (False, True))
    lm = memory.parameters(source)["lm"]
    assert trained["trained parameters"] - frozen["trained parameters"] == 4 * lm
    assert (frozen["frozen parameters"], trained["frozen parameters"]) == (2 * lm, 0)
    assert trained["activations"] > frozen["activations"]  # the inputs of its matrices, for their gradients


def test_errors_of_unified_models(unified):
    source = str(unified / "blip3o")
    for options, message in (
        (dict(offload_encoders=True), "has to stay|which stays"),
        (dict(resolution=33), "33 x 33"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.estimate(source, torch.float32, **RUN | options)
    with pytest.raises(ValueError, match="no language model to train"):
        memory.estimate("tiny-flux", torch.float32, **RUN, train_lm=True)
    with pytest.raises(RuntimeError, match="hf download"):
        blip3o._write_config(str(unified), blip3o._read_config(source) | dict(lm="somebody/qwen"))
        memory.estimate(str(unified), torch.float32, **RUN)


# ----------------------------------------------------------------------------------------------------------------------
# Exact: what else is encoded, and shards of the real thing


def test_sd3_without_t5_has_two_encoders(tmp_path):
    source = str(tmp_path)
    pipeline = tiny.sd3_pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(source)
    model = models.load(source, "cpu", torch.float32)
    sizes = memory.estimate(source, torch.float32, **RUN)
    encoders = [*model.text_encoder.parameters(), *model.text_encoder_2.parameters()]
    assert sizes["text encoders"] == sum(p.nbytes for p in encoders)
    # The stock pipeline's 256 zeros in place of T5's 12 tokens.
    assert sizes["prompt embeddings"] == sum(rows.nbytes for rows in model.encode(["a", "b"]).values())


def test_sana_encodes_its_instruction(tmp_path):
    short, long = str(tmp_path / "short"), str(tmp_path / "long")
    pipeline = tiny.sana_pipeline()
    pipeline.save_pretrained(short)
    pipeline.tokenizer.model_max_length = 4096
    pipeline.save_pretrained(long)
    model = models.load(long, "cpu", torch.float32)
    assert model.instruction_tokens > 300
    short, long = (memory.estimate(source, torch.float32, **RUN) for source in (short, long))
    rows = model.encode(["a", "b"]).values()
    assert long["prompt embeddings"] == sum(row.nbytes for row in rows) > 20 * short["prompt embeddings"]
    # Gemma's attention is eager from some version of transformers on: its score of every two tokens, of 4 prompts and 4
    # heads, more than once.
    length = model.text_tokens + model.instruction_tokens - 2
    if model.text_encoder.config._attn_implementation == "eager":
        assert long["prompt encoding"] > 2 * 4 * 4 * 4 * length**2
    assert long["prompt encoding"] > 3 * short["prompt encoding"]


def shards(rank, ranks, store, folder, expected):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    world = parallel.World(rank, ranks, torch.device("cpu"), init_device_mesh("cpu", (ranks,)))
    for lora_rank, sizes in expected.items():
        model = models.load(folder, "cpu", torch.bfloat16, lora_rank=lora_rank, lora_alpha=5)
        part = model.parts["transformer"]
        parallel.shard(part, model.blocks(part), world, torch.bfloat16)
        trained = parallel.trained(model.parts)
        ema = parallel.EMA(trained)
        optimizer = torch.optim.AdamW(trained.values())
        for p in trained.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = [optimizer.state[p][key] for p in trained.values() for key in ("exp_avg", "exp_avg_sq")]
        held = {
            "trained parameters": trained.values(),
            "frozen parameters": [p for p in part.parameters() if not p.requires_grad],
            "optimizer state": moments,
            "averaged weights": ema.shadow.values(),
            "gradients": [p.grad for p in trained.values()],
        }
        if rank == 0:
            assert {name: sum(parallel.local(t).nbytes for t in held[name]) for name in held} == sizes
        # The last ranks' rows may be fewer, but FSDP2 pads their memory.
        padded = sum(parallel.local(p).untyped_storage().nbytes() for p in part.parameters())
        assert padded == sizes["trained parameters"] + sizes["frozen parameters"]
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_shard_bytes_are_those_of_fully_shard(small, tmp_path, ranks):
    names = ("trained parameters", "frozen parameters", "optimizer state", "averaged weights", "gradients")
    expected = {}
    for lora_rank in (0, 5):
        sizes = memory.estimate(small, torch.bfloat16, **RUN, lora_rank=lora_rank, world_size=ranks, ema=True)
        expected[lora_rank] = {name: sizes[name] for name in names}
    arguments = (ranks, str(tmp_path / "store"), small, expected)
    children = [processes.Process(target=shards, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * ranks


def test_shards_of_a_group_do_not_shrink_with_the_number_of_groups(small):
    one = memory.estimate(small, torch.float32, **RUN, world_size=3)
    assert memory.estimate(small, torch.float32, **RUN, world_size=6, shard_size=3) == one


# ----------------------------------------------------------------------------------------------------------------------
# What autograd keeps


def test_bytes_alive_of_a_chain_of_operators():
    x = torch.empty(1000, device="meta", requires_grad=True)
    with memory.Alive([]) as alive:
        y = x.exp()
        z = y.sin() + 1  # autograd keeps y for both; the sine is gone after the sum
        assert (alive.live, alive.peak) == (2 * 4000, 3 * 4000)
        z.view(10, 100)  # no storage of its own
        del y
        assert alive.live == 2 * 4000
        z.sum().backward()
        del z
    assert x.grad is not None and alive.live == 4000


def test_attention_keeps_rows_and_no_matrix():
    with memory.Alive([]) as alive:
        q, k, v = (torch.empty(2, 3, 500, 16, device="meta", requires_grad=True) for _ in range(3))
        before = alive.live
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert alive.live - before == alive.peak - before == out.nbytes + 4 * 2 * 3 * 500
    assert before == 3 * out.nbytes == 3 * 4 * 2 * 3 * 500 * 16


def test_gradients_of_a_group_wait_for_their_reduction():
    layers = [torch.nn.Linear(100, 100, bias=False, device="meta") for _ in range(3)]
    peaks = []
    for groups in ([[layer.weight] for layer in layers], [[layer.weight for layer in layers]]):
        with memory.Alive(layers) as alive:
            memory.reduce_per_block(groups, 2)
            x = torch.empty(1, 100, device="meta")
            for layer in layers:
                x = layer(x)
            x.sum().backward()
            peaks.append(alive.peak // 10_000)
        for layer in layers:
            assert layer.weight.grad is None
            layer.weight._post_accumulate_grad_hooks.clear()
    # 40,000 bytes each: the gradient beside its buffer or the one before's; three gradients and a buffer of three.
    assert peaks == [4 + 4, 3 * 4 + 3 * 4]


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def test_flags_move_memory_to_where_they_say(small):
    def sizes(**flags):
        return memory.estimate(small, torch.bfloat16, **RUN, **flags)

    one = sizes()
    plain = sizes(world_size=3, with_reference=True)
    parameters = plain["model, unsharded"] // 4
    assert plain["reference copy"] >= 2 * parameters / 3 and one["reference copy"] == 0

    offloaded = sizes(world_size=3, with_reference=True, cpu_offload=True)
    moved = ("trained parameters", "optimizer state", "reference copy", "gradients")
    assert offloaded["host: sharded"] == sum(plain[name] for name in moved)
    assert all(offloaded[name] == 0 for name in moved)

    encoders = sizes(offload_encoders=True)
    assert encoders["host: text encoders"] == one["text encoders"] > 0 == encoders["text encoders"]
    # They visit the GPU to encode, and nowhere else.
    assert encoders["peak: prompt encoding"] == one["peak: prompt encoding"]
    assert encoders["peak: update"] == one["peak: update"] - encoders["host: text encoders"]

    kept = sizes(world_size=3, keep_unsharded=True)
    assert kept["gathered parameters"] > 2 * parameters and kept["gradients"] == 4 * parameters
    assert sizes(checkpoint_activations=True)["activations"] < 0.8 * one["activations"]
    assert sizes(lora_rank=4)["activations"] < one["activations"]


@pytest.mark.parametrize("alias", TINY)
def test_guidance_and_checkpointing_cost_and_save_in_every_model(alias):
    # Many rows, beside which no gradient counts.
    run = RUN | dict(tile_rows=64, num_samples=64, lora_rank=4)
    one, two = (memory.estimate(alias, torch.float32, **run, guidance=g) for g in (1.0, 2.0))
    if alias == "tiny-kontext":  # embedded
        assert one == two
    else:  # both halves in one batch
        assert 1.9 < two["activations"] / one["activations"] < 2.1
        assert 1.9 < two["rollout forward"] / one["rollout forward"] < 2.1
        assert two["prompt embeddings"] == one["prompt embeddings"] and two["decoding"] == one["decoding"]
    saved = memory.estimate(alias, torch.float32, **run, guidance=2.0, checkpoint_activations=True)
    assert saved["activations"] < 0.8 * two["activations"]
    assert saved["rollout forward"] == two["rollout forward"]


def test_reference_pictures_are_tokens_in_every_forward():
    run = RUN | dict(tile_rows=32, num_samples=32, resolution=64)  # 64 tokens of klein's, 24 of text
    without, pictures = (memory.estimate("tiny-klein", torch.float32, **run, reference_image=r) for r in (False, True))
    longer = (2 * 64 + 24) / (64 + 24)
    for name in ("rollout forward", "activations"):
        # All that belongs to pictures doubles, what belongs to the text stays; the single blocks have one stream.
        assert 0.95 * longer < pictures[name] / without[name] < 2
    assert pictures["prompt embeddings"] == without["prompt embeddings"] + 2 * 4 * 32 * 8 * 8
    assert pictures["host: prompt cache"] == without["host: prompt cache"]
    # The autoencoder sees the pictures of 32 prompts, at its first layer 16 channels of every pixel.
    assert pictures["prompt encoding"] > 32 * 16 * 4 * 64 * 64 > without["prompt encoding"]


def test_table_adds_up_and_names_flags(small):
    sizes = memory.estimate(small, torch.float32, **RUN)
    update = ("trained parameters", "optimizer state", "text encoders", "autoencoder", "prompt embeddings")
    update += ("trajectories", "gradients", "gathered parameters", "activations")
    assert sizes["peak: update"] == sum(sizes[name] for name in update)
    text = memory.table({name: 1024 * size for name, size in sizes.items()})
    line = next(line for line in text.splitlines() if line.startswith("activations"))
    assert float(line.split()[1]) == round(sizes["activations"] / 2**20, 3) and "--checkpoint-activations" in line
    assert f"needed per GPU: {sizes['peak'] / 2**20:.2f} GiB" in text and "frozen" not in text


@pytest.mark.parametrize(
    "source, resolution, message",
    [("flux", 500, "500 x 500 is not a multiple of 16"), ("fluxx", 512, "did you mean flux"), ("", 512, "unknown")],
)
def test_errors_say_what_is_wrong(source, resolution, message):
    with pytest.raises(ValueError, match=message):
        memory.estimate(source, torch.bfloat16, **RUN | dict(resolution=resolution))


@pytest.mark.parametrize("alias", ["tiny-flux", "tiny-sd3", "tiny-sana"])
def test_a_picture_for_a_model_that_takes_none_is_refused(alias):
    with pytest.raises(ValueError, match="takes no image"):
        memory.estimate(alias, torch.float32, **RUN, reference_image=True)


def test_another_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "LuminaPipeline"}')
    with pytest.raises(ValueError, match="LuminaPipeline is not supported"):
        memory.estimate(str(tmp_path), torch.float32, **RUN)


def test_a_folder_without_its_configs_is_refused(tmp_path):
    shutil.copytree(models.folder_or_id("tiny-sana"), tmp_path / "sana")
    (tmp_path / "sana" / "vae" / "config.json").unlink()
    with pytest.raises(RuntimeError, match="is incomplete"):
        memory.estimate(str(tmp_path / "sana"), torch.float32, **RUN)


# ----------------------------------------------------------------------------------------------------------------------
# The whole: resident memory of a run

EDITS = dict(prompts="shapes-edit", eval_prompts="shapes-edit")
# name -> (what builds the pipeline, its dimensions, flags); 5 to 10 M parameters each
MEASURED = {
    "flux": (
        *(tiny.flux_pipeline, dict(num_heads=6, head_dim=64, text_dim=128)),
        dict(num_prompts=2, group_size=8, num_steps=2, lora_rank=8, checkpoint_activations=True),
    ),
    "sd3": (
        *(tiny.sd3_pipeline, dict(num_heads=4, head_dim=64, text_dim=128)),
        dict(num_prompts=1, group_size=4, num_steps=3, lora_rank=0, guidance=2.0),
    ),
    "klein": (
        *(tiny.klein_pipeline, dict(num_heads=4, head_dim=64, text_dim=64)),
        dict(num_prompts=1, group_size=8, num_steps=2, lora_rank=8) | EDITS,
    ),
    "blip3o": (
        *(None, {}),
        dict(num_prompts=1, group_size=2, num_steps=2, lora_rank=0, guidance=2.0),
    ),
}
PRETRAIN = dict(micro_batch_size=4, resolution=64, guidance=2.0, lora_rank=0)


def medium_unified(folder):
    """A BLIP3o of 13 M parameters."""
    lm = tiny.qwen_vl(width=256, num_layers=5, num_heads=8, ff_dim=1024)
    for part in (lm, tiny.qwen_vl_tokenizer(), tiny.qwen_vl_processor()):
        part.save_pretrained(os.path.join(folder, "parts", "lm"))
    tiny.sana_pipeline(num_layers=4, num_heads=8, head_dim=32).save_pretrained(os.path.join(folder, "parts", "sana"))
    parts = (os.path.join(folder, "parts", name) for name in ("lm", "sana"))
    blip3o.create(folder, *parts, num_queries=64, image_tokens=64, num_layers=4, head_dim=32)


def resident(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def one_iteration_each(results, folder):
    """Peak of the resident memory of a run of every model in `folder`, in bytes above what the process held before."""
    import flow_grpo
    import pretrain

    # glibc then returns what is freed at once, so that what is resident is what is alive.
    libc = ctypes.CDLL(None)
    assert libc.mallopt(-3, 65536) and libc.mallopt(-1, 65536)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    common = dict(reward=("jpeg",), num_iterations=1, eval_num_steps=1, eval_size=1, cache_prompts=4)
    common |= dict(window_size=0, window_range=(0, 0), keep_unsharded=False, shared_noise=False)
    # A run of a tiny model first, for every import, thread and buffer that does not belong to the model.
    few = dict(num_prompts=1, group_size=2, micro_batch_size=2, num_steps=2, resolution=32) | EDITS
    flow_grpo.main(flow_grpo.Args(model="tiny-klein", out=os.path.join(folder, "tiny"), **common | few))
    for name, (_, _, flags) in MEASURED.items():
        gc.collect()
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # VmHWM starts again
        before = resident("VmRSS")
        source = os.path.join(folder, name)
        flags = flags | dict(micro_batch_size=flags["num_prompts"] * flags["group_size"], resolution=64)
        flow_grpo.main(flow_grpo.Args(model=source, out=f"{source} run", **common | flags))
        results.put((name, resident("VmHWM") - before))
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident("VmRSS")
    pretrain.main(
        pretrain.Args(
            model=os.path.join(folder, "blip3o"),
            out=os.path.join(folder, "pretrained"),
            reward="",
            num_iterations=1,
            batch_size=PRETRAIN["micro_batch_size"],
            noise_levels=1,
            eval_text="",
            num_steps=1,
            eval_size=PRETRAIN["micro_batch_size"],
            keep_unsharded=False,
            **PRETRAIN,
        )
    )
    results.put(("pretrain", resident("VmHWM") - before))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory can be reset on Linux only")
def test_predicted_peak_is_within_a_quarter_of_a_measured_run(tmp_path):
    results = processes.Queue()
    for name, (build, dimensions, _) in MEASURED.items():
        if build:
            build(**dimensions).save_pretrained(tmp_path / name)
        else:
            medium_unified(str(tmp_path / name))
    processes.Process(target=one_iteration_each, args=(results, str(tmp_path)), daemon=True).start()
    for name, measured in [results.get(timeout=120) for _ in range(len(MEASURED) + 1)]:
        if name == "pretrain":
            options = PRETRAIN | dict(ema=True, gpus=(1,), device_type="cpu", prompt_tokens=60, reference_image=True)
            predicted = memory.pretraining(str(tmp_path / "blip3o"), torch.float32, **options)[1]
            check(name, measured, predicted["peak"])
            continue
        flags = MEASURED[name][2]
        num_samples = flags["num_prompts"] * flags["group_size"]
        predicted = memory.estimate(
            str(tmp_path / name),
            torch.float32,
            tile_rows=num_samples,
            resolution=64,
            num_samples=num_samples,
            num_prompts=flags["num_prompts"],
            num_states=flags["num_steps"],
            guidance=flags.get("guidance", 1.0),
            lora_rank=flags["lora_rank"],
            ema=True,
            checkpoint_activations=flags.get("checkpoint_activations", False),
            reference_image="prompts" in flags,
            prompt_tokens=60,
            device_type="cpu",
        )
        check(name, measured, predicted["peak"])


def check(name, measured, peak):
    print(f"{name}: measured {measured / 2**20:.0f} MiB, predicted {peak / 2**20:.0f} MiB")
    assert 0.75 < measured / peak < 1.25
    assert measured > 100 * 2**20  # tensors, not noise
