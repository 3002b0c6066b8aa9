"""What --dry-run promises, against the real things: FSDP2's shards, and the resident memory of a run."""

import ctypes
import gc
import multiprocessing
import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import models
from models import flux, memory, parallel, tiny

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "peft", "pytest"),
        *("diffusers.pipelines.flux.pipeline_flux", "matplotlib.pyplot"),
    ]
)

RUN = dict(tile_rows=4, resolution=32, num_samples=8, num_prompts=2, num_states=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A FLUX-shaped folder whose row counts (3 heads, 48 wide) 2 and 3 do not always divide."""
    path = tmp_path_factory.mktemp("small")
    tiny.flux_pipeline(num_heads=3, text_dim=40, pooled_dim=20, guidance_embeds=True).save_pretrained(path)
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Exact: parameters and shards


def test_flux_dev_has_the_published_numbers_of_parameters():
    pipeline = memory._pipeline("flux", torch.bfloat16)
    encoders = [*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters()]
    assert memory.numel(pipeline.transformer.parameters()) == 11_901_408_320
    assert memory.numel(encoders) == flux.FLUX_DEV["encoder_parameters"]
    assert memory.numel(pipeline.vae.parameters()) == flux.FLUX_DEV["vae_parameters"]
    assert 2 ** (len(pipeline.vae.config.block_out_channels) - 1) == flux.FLUX_DEV["vae_scale"]
    assert pipeline.tokenizer_2.model_max_length == flux.FLUX_DEV["text_tokens"]


def test_flux_dev_needs_no_weights_and_no_network():
    sizes = memory.estimate(
        "flux", torch.bfloat16, **RUN | dict(resolution=512), lora_rank=64, world_size=8, checkpoint_activations=True
    )
    # T5's rows 512 x 4096 and CLIP's 768, bf16; 2 prompts on the GPU, 512 in the cache.
    assert sizes["prompt embeddings"] == 2 * 2 * (512 * 4096 + 768) and sizes["host: prompt cache"] == 512 * 2 * 2097920
    assert sizes["trajectories"] == 2 * 8 * 3 * 16 * 64 * 64 * 4
    # Width 3072. Double blocks: 8 attention projections and 2 feed-forwards; single blocks: q, k, v.
    d, r = 3072, 64
    adapters = 19 * (8 * 2 * d * r + 4 * 5 * d * r) + 38 * 3 * 2 * d * r
    assert sizes["model, unsharded"] == 2 * 11_901_408_320 + 4 * adapters
    assert sizes["trained parameters"] == 4 * adapters // 8 and sizes["optimizer state"] == adapters
    assert 2 * 11_901_408_320 // 8 <= sizes["frozen parameters"] < 2.001 * 11_901_408_320 // 8


@pytest.mark.parametrize("lora_rank", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameter_bytes_of_a_folder_are_those_of_the_loaded_model(small, dtype, lora_rank):
    model = models.load(small, "cpu", dtype, lora_rank=lora_rank, lora_alpha=5)
    sizes = memory.estimate(small, dtype, **RUN, lora_rank=lora_rank)
    tensors = list(model.parts["transformer"].parameters())
    assert sizes["model, unsharded"] == sum(p.nbytes for p in tensors)
    assert sizes["trained parameters"] == sum(p.nbytes for p in tensors if p.requires_grad)
    assert sizes["frozen parameters"] == sum(p.nbytes for p in tensors if not p.requires_grad)
    assert sizes["autoencoder"] == sum(p.nbytes for p in model.vae.parameters())
    encoders = [*model.text_encoder.parameters(), *model.text_encoder_2.parameters()]
    assert sizes["text encoders"] == sum(p.nbytes for p in encoders)
    assert sizes["prompt embeddings"] == sum(rows.nbytes for rows in model.encode(["a", "b"]).values())


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


class Nothing:
    parts, text_encoder, text_encoder_2, vae = {}, torch.nn.Module(), torch.nn.Module(), torch.nn.Module()


def test_bytes_alive_of_a_chain_of_operators():
    x = torch.empty(1000, device="meta", requires_grad=True)
    with memory._Alive(Nothing) as alive:
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
    with memory._Alive(Nothing) as alive:
        q, k, v = (torch.empty(2, 3, 500, 16, device="meta", requires_grad=True) for _ in range(3))
        before = alive.live
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert alive.live - before == alive.peak - before == out.nbytes + 4 * 2 * 3 * 500
    assert before == 3 * out.nbytes == 3 * 4 * 2 * 3 * 500 * 16


def test_gradients_of_a_group_wait_for_their_reduction():
    layers = [torch.nn.Linear(100, 100, bias=False, device="meta") for _ in range(3)]
    model = type("Model", (Nothing,), {"parts": dict(enumerate(layers))})
    peaks = []
    for groups in ([[layer.weight] for layer in layers], [[layer.weight for layer in layers]]):
        with memory._Alive(model) as alive:
            memory._reduce_per_block(groups, 2)
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

    plain = sizes(world_size=3, with_reference=True)
    parameters = plain["model, unsharded"] // 4
    assert plain["reference copy"] >= 2 * parameters / 3 and sizes()["reference copy"] == 0

    offloaded = sizes(world_size=3, with_reference=True, cpu_offload=True)
    moved = ("trained parameters", "optimizer state", "reference copy", "gradients")
    assert offloaded["host: sharded"] == sum(plain[name] for name in moved)
    assert all(offloaded[name] == 0 for name in moved)

    encoders = sizes(offload_encoders=True)
    assert encoders["host: text encoders"] == sizes()["text encoders"] > 0 == encoders["text encoders"]
    # They visit the GPU to encode, and nowhere else.
    assert encoders["peak: prompt encoding"] == sizes()["peak: prompt encoding"]
    assert encoders["peak: update"] == sizes()["peak: update"] - encoders["host: text encoders"]

    kept = sizes(world_size=3, keep_unsharded=True)
    assert kept["gathered parameters"] > 2 * parameters and kept["gradients"] == 4 * parameters
    assert sizes(checkpoint_activations=True)["activations"] < 0.8 * sizes()["activations"]
    assert sizes(lora_rank=4)["activations"] < sizes()["activations"]


def test_true_guidance_doubles_the_rows_of_a_forward(tmp_path):
    tiny.flux_pipeline(num_heads=3).save_pretrained(tmp_path)
    one, two = (memory.estimate(str(tmp_path), torch.float32, **RUN, guidance=g) for g in (1.0, 4.0))
    assert 1.9 < two["activations"] / one["activations"] < 2.1


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


def test_another_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ValueError, match="SanaPipeline is not supported"):
        memory.estimate(str(tmp_path), torch.float32, **RUN)


# ----------------------------------------------------------------------------------------------------------------------
# The whole: resident memory of a run

MIDDLE = dict(num_heads=6, head_dim=64, text_dim=128)  # 10 M parameters
MEASURED = dict(num_prompts=2, group_size=8, micro_batch_size=16, resolution=64, num_steps=3, lora_rank=0)
CHECKPOINTED = MEASURED | dict(lora_rank=8, checkpoint_activations=True)


def resident(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def one_iteration(results, source, folder, flags):
    """Peak of the resident memory of a run, in bytes above what the process held before."""
    import flow_grpo

    # glibc then returns what is freed at once, so that what is resident is what is alive.
    libc = ctypes.CDLL(None)
    assert libc.mallopt(-3, 65536) and libc.mallopt(-1, 65536)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    common = dict(reward=("jpeg",), num_iterations=1, eval_num_steps=1, eval_size=1, cache_prompts=4)
    common |= dict(window_size=0, window_range=(0, 0), keep_unsharded=False, shared_noise=False)
    # A run of a tiny model first, for every import, thread and buffer that does not belong to the model.
    warm = os.path.join(folder, "tiny")
    tiny.flux_pipeline().save_pretrained(warm)
    few = dict(num_prompts=1, group_size=2, micro_batch_size=2, num_steps=2, resolution=32)
    flow_grpo.main(flow_grpo.Args(model=warm, out=os.path.join(folder, "0"), **common | flags | few))
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # VmHWM starts again
    before = resident("VmRSS")
    flow_grpo.main(flow_grpo.Args(model=source, out=os.path.join(folder, "1"), **common | flags))
    results.put((flags["lora_rank"], resident("VmHWM") - before))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory can be reset on Linux only")
def test_predicted_peak_is_within_a_quarter_of_a_measured_run(tmp_path):
    source = str(tmp_path / "model")
    tiny.flux_pipeline(**MIDDLE).save_pretrained(source)
    runs = {flags["lora_rank"]: flags for flags in (MEASURED, CHECKPOINTED)}
    results = processes.Queue()
    for rank, flags in runs.items():
        folder = tmp_path / str(rank)
        folder.mkdir()
        processes.Process(target=one_iteration, args=(results, source, str(folder), flags), daemon=True).start()
    for rank, measured in [results.get(timeout=120) for _ in runs]:
        flags = runs[rank]
        predicted = memory.estimate(
            source,
            torch.float32,
            tile_rows=flags["micro_batch_size"],
            resolution=flags["resolution"],
            num_samples=flags["num_prompts"] * flags["group_size"],
            num_prompts=flags["num_prompts"],
            num_states=flags["num_steps"],
            lora_rank=rank,
            ema=True,
            checkpoint_activations=flags.get("checkpoint_activations", False),
            device_type="cpu",
        )["peak"]
        print(f"lora_rank {rank}: measured {measured / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f} MiB")
        assert 0.75 < measured / predicted < 1.25
        assert measured > 100 * 2**20  # tensors, not noise
