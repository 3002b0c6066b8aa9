"""infer.py: the same picture whatever the batch and the number of processes, the stock pipeline's picture, weights of
runs, tables, and one clear message for whatever is wrong."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open

import infer
import models
from data import geneval, shapes
from kernels.sde_step import fold_seed
from models import checkpoint, parallel, run_folder

ROOT = Path(infer.__file__).parent
PROMPTS = ("a red circle", "two blue squares", "a green triangle left of a black circle", "four circles", "ein Würfel")


def go(**changes):
    """infer.py in this process: (its results, what it printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = infer.main(infer.Args(**changes))
    return found, printed.getvalue()


def several(calls):
    return [go(**call) for call in calls]


def refusals(calls):
    """The message with which each call ends; no weights may be loaded on the way."""

    def load(*args, **options):
        raise AssertionError("weights are loaded")

    models.load, models.load_lm, messages = load, load, []
    for call in calls:
        try:
            go(**call)
            messages.append("no error")
        except SystemExit as error:
            messages.append(str(error.code))
    return messages


def pixels(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


# ----------------------------------------------------------------------------------------------------------------------
# Batches and processes


MODES = {
    "t2i": dict(prompt=PROMPTS),
    "i2i": dict(prompt=("make it blue", "remove the circle", "turn it into ein Würfel"), seed=3),
    "t2icot": dict(prompt=PROMPTS[:3]),
}


def record_noise(folder, batch_size):
    """Every mode of MODES; the noise that every picture started from, by its seed."""
    noise, seeds, original = {}, [], infer.sample
    draw = infer.draw

    def draw_and_record(model, prompts, sources, seed_B, settings):
        seeds[:] = seed_B.tolist()
        return draw(model, prompts, sources, seed_B, settings)

    def sample_and_record(model, cond, x, sigmas, guidance):
        noise.setdefault(mode, {}).update(zip(seeds, x.clone()))
        return original(model, cond, x, sigmas, guidance)

    infer.draw, infer.sample = draw_and_record, sample_and_record
    rows = {}
    for mode, changes in MODES.items():
        found, _ = go(mode=mode, num_images=2, batch_size=batch_size, out=str(folder / mode), **changes)
        rows[mode] = list(found.items())
    return rows, {mode: {seed: x.numpy() for seed, x in of.items()} for mode, of in noise.items()}


@pytest.fixture(scope="module")
def three_ways(tmp_path_factory):
    """name -> (folder, results, noise) of one process with batches of 8 and of 1, and two processes."""
    ways = {}
    for name, batch_size, ranks in (("8", 8, 1), ("1", 1, 1), ("two", 3, 2)):
        folder = tmp_path_factory.mktemp(name)
        of_ranks = processes.run(record_noise, folder, batch_size, ranks=ranks)
        assert all(rows == of_ranks[0][0] for rows, _ in of_ranks)
        ways[name] = folder, of_ranks[0][0], [noise for _, noise in of_ranks]
    return ways


def test_noise_depends_on_seed_prompt_and_number_alone(three_ways):
    (whole,), (single,), (first, second) = (noise for _, _, noise in three_ways.values())
    for mode, changes in MODES.items():
        seed = changes.get("seed", 1)
        expected = {fold_seed(seed, p, k).item() for p in range(len(changes["prompt"])) for k in range(2)}
        assert whole[mode].keys() == single[mode].keys() == first[mode].keys() | second[mode].keys() == expected
        assert not first[mode].keys() & second[mode].keys()
        for seed, noise in (single[mode] | first[mode] | second[mode]).items():
            assert noise.tobytes() == whole[mode][seed].tobytes(), mode
        assert all(np.array_equal(x, single[mode][seed]) for seed, x in whole[mode].items())
        assert len({noise.tobytes() for noise in whole[mode].values()}) == len(expected)
    assert not whole["t2i"].keys() & whole["i2i"].keys()


def test_pictures_are_those_of_any_batch_and_number_of_processes(three_ways):
    folder, rows, _ = three_ways["8"]
    for other, other_rows, _ in (three_ways["1"], three_ways["two"]):
        for mode in MODES:
            assert other_rows[mode] == rows[mode] and len(rows[mode]) == 2 * len(MODES[mode]["prompt"])
            for _, row in rows[mode]:
                a, b = pixels(folder / mode / row["file"]), pixels(other / mode / row["file"])
                assert abs(a - b).max() <= 1 and a.std() > 5, (mode, row)


def test_files_and_results(three_ways):
    for folder, rows, _ in three_ways.values():
        for mode in MODES:
            names = {str(path.relative_to(folder / mode)) for path in (folder / mode).rglob("*") if path.is_file()}
            n = len(MODES[mode]["prompt"])
            pictures = {f"images/{p:05d}_{k:02d}.png" for p in range(n) for k in range(2)}
            assert names == pictures | {"args.json", "results.jsonl", "grid.png"}
            lines = [json.loads(line) for line in (folder / mode / "results.jsonl").read_text().splitlines()]
            assert lines == [row for _, row in rows[mode]]
            assert [(row["prompt_index"], row["image_index"]) for row in lines] == [
                (p, k) for p in range(n) for k in range(2)
            ]


def test_png_says_what_it_is(three_ways):
    for folder, rows, _ in three_ways.values():
        for mode in MODES:
            for (p, k), row in rows[mode]:
                with Image.open(folder / mode / row["file"]) as opened:
                    text = opened.text
                assert text["prompt"] == MODES[mode]["prompt"][p] and text["image_index"] == str(k)
                assert json.loads(text["seed"]) == MODES[mode].get("seed", 1)
                assert text["model"] == ("tiny-blip3o" if mode == "i2i" else "tiny-flux")
                settings = json.loads(text["settings"])
                assert settings["num_steps"] == (12 if mode == "i2i" else 6) and settings["resolution"] == 32
                assert settings["guidance"] == (2.0 if mode == "i2i" else 1.0)
                assert text.get("refined") == row.get("refined")
    assert {row["refined"] for _, row in rows["t2icot"]} != set(PROMPTS)


def stock_pictures(folder, lora=None, prompts=PROMPTS[:4], seed=1, guidance=1.0):
    """What FluxPipeline draws, called as a user would, from infer's noise: uint8 [n, H, W, 3]."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    model = models.load("tiny-flux", "cpu", torch.float32)
    seed_B = torch.stack([fold_seed(fold_seed(seed, p, 0), infer.NOISE) for p in range(len(prompts))])
    x = model.init_noise(seed_B, 32, 32)
    images = pipeline(
        list(prompts),
        negative_prompt=[""] * len(prompts) if guidance != 1 else None,
        true_cfg_scale=guidance,
        height=32,
        width=32,
        num_inference_steps=6,
        latents=FluxPipeline._pack_latents(x, *x.shape),
        max_sequence_length=model.text_tokens,
        output_type="np",
    ).images
    return (images * 255).round().astype(int)


def test_pictures_are_the_stock_pipelines(tmp_path):
    calls = [dict(prompt=PROMPTS[:4], guidance=guidance, out=str(tmp_path / f"{guidance}")) for guidance in (1.0, 3.0)]
    processes.run(several, calls)
    for guidance in (1.0, 3.0):
        expected = stock_pictures(models.ALIASES["tiny-flux"], guidance=guidance)
        for p, picture in enumerate(expected):
            found = pixels(tmp_path / f"{guidance}" / "images" / f"{p:05d}_00.png")
            assert abs(found - picture).max() <= 1 and found.std() > 5


# ----------------------------------------------------------------------------------------------------------------------
# Layout, going on, failures


def test_geneval_layout(tmp_path):
    items = geneval.generate(3, weights={"counting": 1, "colors": 1})
    (tmp_path / "geneval.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    call = dict(prompts=str(tmp_path / "geneval.jsonl"), layout="geneval", num_steps=2, out=str(tmp_path / "out"))
    ((found, _),), _ = processes.run(several, [call], ranks=2)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {f"{p:05d}/samples/{k:04d}.png" for p in range(3) for k in range(4)}
    expected |= {f"{p:05d}/{name}" for p in range(3) for name in ("metadata.jsonl", "grid.png")}
    assert names == expected | {"args.json", "grid.png", "results.jsonl"} and len(found) == 12
    for p, item in enumerate(items):
        line = (tmp_path / "out" / f"{p:05d}" / "metadata.jsonl").read_text()
        assert json.loads(line) == item and line.count("\n") == 1
        assert geneval.read(tmp_path / "out" / f"{p:05d}" / "metadata.jsonl") == [item]


def interrupt_and_go_on(folder):
    """A run that is stopped in its third batch, the same again, and again with another seed."""
    call = dict(prompt=PROMPTS, batch_size=2, num_images=2, out=str(folder / "run"), num_steps=2, reward=("jpeg",))
    draw, drawn = infer.draw, []

    def draw_and_count(model, prompts, sources, seed_B, settings):
        drawn.append(len(prompts))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(model, prompts, sources, seed_B, settings)

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    infer.draw = draw_and_count
    with pytest.raises(SystemExit) as stopped:
        go(**call)
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "run" / "images").iterdir()}
    (folder / "run" / ".results-00000.jsonl").open("a").write('{"prompt_index": 4, "image')  # killed while it wrote
    first, _ = go(**call)
    load, models.load = models.load, None
    again, printed = go(**call | dict(batch_size=5))
    with pytest.raises(SystemExit) as other:
        go(**call | dict(seed=2))
    whole = {path.name: path.stat().st_mtime_ns for path in (folder / "run" / "images").iterdir()}
    infer.draw, models.load = fail, load
    with pytest.raises(SystemExit) as memory:
        go(prompt=PROMPTS, out=str(folder / "memory"))
    assert str(memory.value.code).startswith("error: rank 0 is out of memory: CUDA out of memory\nLower --batch-size")
    return stopped.value.code, kept, drawn, first, again, printed, str(other.value.code), whole


def test_stopped_run_goes_on(tmp_path):
    code, kept, drawn, first, again, printed, other, whole = processes.run(interrupt_and_go_on, tmp_path)[0]
    assert code == 130 and len(kept) == 4 and drawn == [2, 2, 2, 2, 2, 2]
    assert len(first) == 10 and first == again and "jpeg: " in printed
    assert all(whole[name] == made for name, made in kept.items()) and len(whole) == 10
    assert "has the results of another command (--seed: 1 there)" in other
    plain = processes.run(several, [dict(prompt=PROMPTS, num_images=2, out=str(tmp_path / "plain"), num_steps=2)])[0]
    for row in plain[0][0].values():
        assert abs(pixels(tmp_path / "run" / row["file"]) - pixels(tmp_path / "plain" / row["file"])).max() <= 1


def with_failing_reward(folder):
    import rewards

    load = rewards.load

    def load_broken(name, device="cpu", *judge):
        score = load("jpeg")

        def broken(samples, prompts, metadata):
            values = [math.nan if "circle" in prompt or name == "dino" else float(len(prompt)) for prompt in prompts]
            return torch.tensor(values)

        broken.needs, broken.strict, broken.name = score.needs, None, name
        return broken

    rewards.load = load_broken
    found, printed = go(prompt=PROMPTS, num_steps=1, reward=("jpeg",), out=str(folder / "some"))
    with pytest.raises(SystemExit) as error:
        go(prompt=PROMPTS, num_steps=1, reward=("dino",), out=str(folder / "all"))
    return found, printed, str(error.value.code)


def test_failed_rewards_are_named_and_never_zero(tmp_path):
    found, printed, error = processes.run(with_failing_reward, tmp_path)[0]
    assert [row["rewards"]["jpeg"] for row in found.values()] == [None, 16, None, None, 10]
    assert "jpeg: 13.0000, mean of 2; 3 failed and are left out: images/00000_00.png, images/00002_00.png" in printed
    assert json.loads((tmp_path / "some" / "scores.json").read_text()) == {"jpeg": dict(mean=13, count=5, failed=3)}
    assert error == "error: reward dino failed (NaN) for all 5 samples"


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_score_table_is_genevals():
    draw = np.random.default_rng(0)
    tags = [tag for tag in geneval.TASKS for _ in range(draw.integers(3, 9))]
    values = [None if draw.random() < 0.2 else float(draw.integers(2)) for _ in tags]
    rows = [{"tag": tag, "rewards": {"geneval/strict": value}} for tag, value in zip(tags, values)]
    found = infer.score_table(rows)["geneval/strict"]
    numbers = [math.nan if value is None else value for value in values]
    expected = geneval.scores(numbers, [{"tag": tag} for tag in tags])
    assert found["overall"] == pytest.approx(expected["overall"]) and found["mean"] == pytest.approx(
        np.nanmean(numbers)
    )
    assert found["tags"] == pytest.approx({tag: expected[tag] for tag in geneval.TASKS})
    assert (found["count"], found["failed"]) == (len(tags), values.count(None))
    rows = [{"tag": "a", "rewards": {"x": 1.0}}, {"tag": "b", "rewards": {"x": None}}, {"tag": "c", "rewards": {}}]
    table = infer.score_table(rows)["x"]
    assert table["tags"]["a"] == 1 and math.isnan(table["tags"]["b"]) and math.isnan(table["overall"])
    assert list(table["tags"]) == ["a", "b"]  # a reward does not apply to c
    assert (
        "tags" not in infer.score_table([{"rewards": {"x": 1.0}}])["x"] and infer.score_table([{"rewards": {}}]) == {}
    )


def test_grids_show_what_is_all_over_the_prompts():
    assert infer.spread([], 3) == [] and infer.spread([5, 6], 3) == [5, 6]
    assert infer.spread(list(range(512)), 4) == [0, 128, 256, 384] and infer.spread(list(range(7)), 3) == [0, 2, 4]


def test_paired_table_equals_hand_computation():
    def rows(values):
        return {(p, k): {"rewards": {"x": value}} for (p, k), value in values.items()}

    a = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 2.0, (1, 1): None, (2, 0): 5.0, (2, 1): 7.0, (3, 0): None, (3, 1): 1.0}
    b = {(0, 0): 2.0, (0, 1): 6.0, (1, 0): 2.5, (1, 1): 9.0, (2, 0): 5.0, (2, 1): 6.0, (3, 0): 4.0, (3, 1): None}
    found = infer.paired_table(rows(a), rows(b))["x"]
    # prompts 0, 1, 2: a = 2, 2, 6; b = 4, 2.5, 5.5; b - a = 2, .5, -.5: mean 2/3, variance (16 + .25 + 12.25)/9 / 2
    assert found["prompts"] == 3 and found["a"] == pytest.approx(10 / 3) and found["b"] == pytest.approx(4)
    assert found["difference"] == pytest.approx(2 / 3)
    assert found["error"] == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 6) ** 2 + (7 / 6) ** 2) / 2 / 3))
    one = infer.paired_table(rows({(0, 0): 1.0}), rows({(0, 0): 2.0}))["x"]
    assert one["difference"] == 1 and math.isnan(one["error"])
    none = infer.paired_table(rows({(0, 0): None}), rows({(0, 0): 2.0}))["x"]
    assert none["prompts"] == 0 and math.isnan(none["difference"])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


SMALL = dict(num_iterations=2, num_prompts=2, group_size=4, num_steps=3, eval_num_steps=4, eval_size=2, resolution=32)
SMALL |= dict(micro_batch_size=4, eval_every=1000, save_every=1000, num_updates=1, warmup_updates=0)
SMALL |= dict(window_size=0, window_range=(0, 0), sampler="flow_sde", noise_level=0.7, ema_decay=0.5)


ANSWERS = dict(task="text", train="lm", model="tiny-blip3o", lm="", prompts="shapes-qa", reward=("shapes_qa",))


def train_some(folder):
    """Two iterations of flow_grpo.py, full and LoRA, on tiny-flux; of rloo.py with LoRA; of grpo_unified.py on a pair
    of models of which the LM alone learns, and on a unified model with LoRA."""
    import flow_grpo
    import grpo_unified
    import rloo

    run_folder.curves = lambda *_: None
    flow = dict(shared_noise=False, eval_prompts="", learning_rate=2e-3, reward=("jpeg:100",), guidance=1.5)
    for name, lora_rank in (("full", 0), ("lora", 3)):
        args = dataclasses.replace(flow_grpo.Args(), out=str(folder / name), lora_rank=lora_rank, **flow, **SMALL)
        flow_grpo.main(args)
    text = dict(num_iterations=2, num_prompts=4, group_size=4, eval_size=4, eval_every=1000, save_every=1000)
    args = dataclasses.replace(rloo.Args(), out=str(folder / "rloo"), lora_rank=2, learning_rate=1e-2, **text)
    rloo.main(args)
    both = SMALL | dict(lm_micro_batch_size=4, max_new_tokens=6, reward=("jpeg:100", "format:0.1"), learning_rate=2e-3)
    both |= dict(lm_learning_rate=2e-3, eval_prompts="")
    for name, changes in (
        ("pair", dict(train="lm")),
        ("whole", dict(model="tiny-blip3o", lm="", lora_rank=2, guidance=2.5)),
        ("answers", ANSWERS),
    ):
        grpo_unified.main(dataclasses.replace(grpo_unified.Args(), out=str(folder / name), **both | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    processes.run(train_some, folder)
    return folder


def saved(run, prefix):
    """The tensors of a run's last checkpoint whose names begin with prefix, without it."""
    tensors = load_file(os.path.join(checkpoint.latest(run), "rank-00000.safetensors"))
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def loaded(name, side="model", ema=True):
    source = infer.find(str(name), side, ema)
    model = infer.load(source, side, torch.device("cpu"), torch.float32)
    for part in model.parts.values():
        assert not any(parameter.requires_grad for parameter in part.parameters())
    tensors = {f"{key}.{n}": p for key, part in model.parts.items() for n, p in part.named_parameters()}
    return source.said, tensors


def without_export(run):
    """Inside, the run is one that has not finished."""

    @contextlib.contextmanager
    def hidden():
        for part in ("model", "lm"):
            if (run / part).exists():
                (run / part).rename(run / f".{part}")
        try:
            yield
        finally:
            for part in ("model", "lm"):
                if (run / f".{part}").exists():
                    (run / f".{part}").rename(run / part)

    return hidden()


def assert_equal(found, expected):
    assert expected and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["full", "lora"])
def test_averaged_and_raw_weights_of_a_run(trained, name):
    run = trained / name
    averaged, raw = saved(run, "ema/"), saved(run, "model/")
    assert any((averaged[n] - raw[n]).abs().max() > 1e-5 for n in raw)
    said, tensors = loaded(run)
    assert_equal(tensors, averaged)
    assert f"averaged weights of {run}/model" in said and ("a LoRA of rank 3 on tiny-flux" in said) == (name == "lora")
    assert loaded(run / "model")[0] == said  # the export stands for its run
    said, tensors = loaded(run, ema=False)
    assert_equal(tensors, raw)
    assert said == f"trained weights of {run}/checkpoints/000002, on tiny-flux"
    with without_export(run):
        said, tensors = loaded(run)
    assert_equal(tensors, averaged)
    assert said == f"averaged weights of {run}/checkpoints/000002, on tiny-flux"


def test_pictures_of_a_run_are_the_stock_pipelines(trained, tmp_path):
    calls = [
        dict(model=str(trained / name), prompt=PROMPTS[:4], num_steps=6, guidance=1.0, num_images=1)
        for name in ("full", "lora")
    ]
    calls = [call | dict(out=str(tmp_path / str(i))) for i, call in enumerate(calls)]
    (_, printed), _ = processes.run(several, calls)[0]
    assert f"model averaged weights of {trained}/full/model; num_steps 6, resolution 32, guidance 1," in printed
    expected = [stock_pictures(trained / "full" / "model")]
    expected.append(stock_pictures(models.ALIASES["tiny-flux"], lora=trained / "lora" / "model"))
    start = stock_pictures(models.ALIASES["tiny-flux"])
    for i, pictures in enumerate(expected):
        assert abs(pictures - start).max() > 20
        for p, picture in enumerate(pictures):
            assert abs(pixels(tmp_path / str(i) / "images" / f"{p:05d}_00.png") - picture).max() <= 1


def test_language_models_of_runs(trained):
    run = trained / "rloo"  # which averages nothing
    for ema in (True, False):
        said, tensors = loaded(run, "lm", ema)
        assert_equal(tensors, saved(run, "model/"))
    said, _ = loaded(run, "lm")
    assert said == f"trained weights of {run}/model, a LoRA of rank 2 on tiny-qwen"

    run = trained / "pair"
    said, tensors = loaded(run, "lm")
    assert said == f"averaged weights of {run}/lm"
    assert_equal(tensors, {n: t for n, t in saved(run, "ema/").items() if n in tensors})
    said, tensors = loaded(run, "lm", ema=False)
    assert_equal(tensors, saved(run, "model/"))
    said, tensors = loaded(run, "model")
    assert said == "tiny-flux as it is, which that run did not train"
    with without_export(run):
        assert loaded(run, "model")[0] == said


def test_language_model_of_a_unified_one_that_was_trained_alone(trained):
    run = trained / "answers"
    for name in (run, run / "lm"):
        said, tensors = loaded(name, "lm")
        assert said == f"averaged weights of {run}/lm"
        assert_equal(tensors, {n: t for n, t in saved(run, "ema/").items() if n in tensors})
    assert_equal(loaded(run, "lm", ema=False)[1], saved(run, "model/"))
    for given in (dict(lm=str(run)), dict(lm=str(run / "lm")), dict(model=str(run))):
        sources = infer.plan(infer.Args(mode="text", **given), given.get("model", ""), given.get("lm", ""))["sources"]
        assert sources["lm"].base == f"{run}/lm" and "model" not in sources


def test_peft_adapter_folder_names_its_base(trained, tmp_path):
    (tmp_path / "adapter").symlink_to(trained / "rloo" / "model")
    said, tensors = loaded(tmp_path / "adapter", "lm")
    assert said == f"{tmp_path}/adapter, a LoRA on {models.LM_ALIASES['tiny-qwen']}"
    assert_equal(tensors, saved(trained / "rloo", "model/"))
    (tmp_path / "lora").symlink_to(trained / "lora" / "model")
    with pytest.raises(ValueError, match="is a LoRA and does not say of which model: give the run folder"):
        infer.find(str(tmp_path / "lora"), "model", True)
    with pytest.raises(ValueError, match="--lm .*/lora is a LoRA of a diffusion model"):
        infer.find(str(tmp_path / "lora"), "lm", True)
    with pytest.raises(ValueError, match="--model .*/adapter is a LoRA of a language model"):
        infer.find(str(tmp_path / "adapter"), "model", True)


def test_exports_by_their_hub_id(trained, tmp_path):
    """From the local cache of the hub, in its own layout; the LoRA of the tiny model says of what as one of FLUX would,
    in the card. Each makes what its run makes, with the run's settings."""
    repositories = {"base": models.ALIASES["tiny-flux"], "lora": trained / "lora" / "model"}
    repositories |= {"adapter": trained / "rloo" / "model", "whole": trained / "whole" / "model"}
    for name, folder in repositories.items():
        there = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, there / "snapshots" / ("0" * 40))
        (there / "refs").mkdir()
        (there / "refs" / "main").write_text("0" * 40)
    card = tmp_path / "hub" / "models--owner--lora" / "snapshots" / ("0" * 40) / "README.md"
    assert card.read_text().startswith("---\n") and "base_model" not in card.read_text()
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: owner/base\n", 1))
    drawn = dict(prompt=tuple(PROMPTS[:2]), num_steps=4, resolution=32, dtype="fp32")
    asked = dict(mode="text", prompt=("What is 3 + 4?",), max_new_tokens=8)
    commands = {
        "lora": dict(model="owner/lora", guidance=1.5, **drawn),
        "whole": dict(model="owner/whole", guidance=2.5, **drawn),
        "rloo": dict(lm="owner/adapter", **asked),
    }
    program = (
        "import json, sys, infer\n"
        "for name, command in json.loads(sys.argv[1]).items():\n"
        "    lists = {key: tuple(value) for key, value in command.items() if isinstance(value, list)}\n"
        "    infer.main(infer.Args(**command | lists, out=f'{sys.argv[2]}/hub-{name}'))\n"
    )
    environment = os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    line = [sys.executable, "-c", program, json.dumps(commands), str(tmp_path)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, command in commands.items():
        run = {"lm" if "lm" in command else "model": str(trained / name)}
        infer.main(infer.Args(**command | run, out=str(tmp_path / f"run-{name}")))
        a, b = (infer.results(tmp_path / f"{kind}-{name}") for kind in ("hub", "run"))
        assert a.keys() == b.keys() and all(a[key].get("text") == b[key].get("text") for key in a)
        for row in a.values() if name != "rloo" else ():
            a, b = (np.asarray(Image.open(tmp_path / f"{kind}-{name}" / row["file"])) for kind in ("hub", "run"))
            assert np.array_equal(a, b)


def test_unified_model_of_a_run(trained):
    run = trained / "whole"
    averaged, raw = saved(run, "ema/"), saved(run, "model/")
    assert any(n.startswith("lm.") for n in raw) and any(n.startswith("connector.") for n in raw)
    said, tensors = loaded(run, ema=False)
    assert_equal(tensors, raw)
    with without_export(run):
        _, tensors = loaded(run)
    assert_equal(tensors, averaged)
    said, merged = loaded(run)  # models/blip3o.py merges adapters
    assert said == f"averaged weights of {run}/model"
    name = next(n for n in averaged if ".lora_A." in n)
    base = name.replace(".lora_A.default.weight", ".base_layer.weight")
    change = averaged[name.replace("lora_A", "lora_B")] @ averaged[name] * 2  # alpha is twice the rank
    expected = tensors[base] + change
    assert (merged[base.replace(".base_layer", "")] - expected).abs().max() < 1e-6 and change.abs().max() > 1e-5


def test_settings_are_those_of_the_run(trained):
    def settings(model, lm="", **changes):
        return infer.plan(infer.Args(**changes), model, lm)["settings"]

    assert settings(str(trained / "full")) == dict(
        num_steps=4, resolution=32, guidance=1.5, image_guidance=1.0, dtype="fp32"
    )
    found = settings(str(trained / "full"), num_steps=9, guidance=1.0, resolution=48, dtype="bf16")
    assert found == dict(num_steps=9, resolution=48, guidance=1.0, image_guidance=1.0, dtype="bf16")
    found = settings(str(trained / "whole"), mode="t2icot", temperature=0.5)
    assert (found["guidance"], found["max_new_tokens"], found["temperature"]) == (2.5, 6, 0.5)
    plan = infer.plan(infer.Args(mode="t2icot"), str(trained / "pair"), "")
    assert plan["sources"]["lm"].said == f"averaged weights of {trained}/pair/lm"
    assert infer.plan(infer.Args(mode="text"), str(trained / "rloo"), "")["settings"]["max_new_tokens"] == 4
    flux = infer.plan(infer.Args(), models.ALIASES["tiny-flux"] + "/", "")
    assert flux["settings"]["num_steps"] == 6  # by the name of its folder


def test_compare_pairs_the_same_noise(trained, tmp_path):
    call = dict(compare=("tiny-flux", str(trained / "full")), prompts="shapes#colors,counting", max_prompts=6)
    call |= dict(
        num_images=2, reward=("shapes:2", "jpeg:-0.5"), out=str(tmp_path / "out"), seed=4, guidance=1.0, num_steps=3
    )
    ((a, b), printed) = processes.run(several, [call])[0][0]
    assert a.keys() == b.keys() and len(a) == 12 and {row["tag"] for row in a.values()} == {"colors", "counting"}
    table = json.loads((tmp_path / "out" / "compare.json").read_text())["rewards"]
    assert set(table) == {"reward", "shapes", "shapes/strict", "jpeg"}
    for row in (*a.values(), *b.values()):
        judged = row["rewards"]
        assert judged["reward"] == pytest.approx(2 * judged["shapes"] - 0.5 * judged["jpeg"])
    for name, row in table.items():
        values = np.array([[found[key]["rewards"][name] for key in a] for found in (a, b)]).reshape(2, 6, 2).mean(2)
        assert row["a"] == pytest.approx(values[0].mean()) and row["b"] == pytest.approx(values[1].mean())
        d = values[1] - values[0]
        assert row["difference"] == pytest.approx(d.mean()) and row["error"] == pytest.approx(d.std(ddof=1) / 6**0.5)
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name] and "." in line.split()[1])
        assert [float(x) for x in line.split()[1:4]] == pytest.approx([row["a"], row["b"], row["difference"]], abs=6e-5)
    assert table["jpeg"]["difference"] != 0
    # Alone, a model draws what it drew in the comparison.
    alone = call | dict(compare=(), model="tiny-flux", out=str(tmp_path / "alone"))
    ((found, _),) = processes.run(several, [alone])[0]
    for key, row in found.items():
        assert abs(pixels(tmp_path / "alone" / row["file"]) - pixels(tmp_path / "out" / "a" / row["file"])).max() <= 1
    assert pixels(tmp_path / "out" / "compare.png").shape[1] > 500


# ----------------------------------------------------------------------------------------------------------------------
# Modes as they come, pictures, text


def test_every_mode_works_without_anything(tmp_path):
    modes = ("t2i", "i2i", "t2icot", "text")
    calls = [dict(mode=mode, out=str(tmp_path / mode)) for mode in modes]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "infer.py"), "--reward", "shapes"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "assumed: --model tiny-flux, --prompt '" in run.stdout and "shapes/strict: " in run.stdout
    (out,) = (tmp_path / "outputs").iterdir()
    assert out.name.startswith("infer-") and (out / "images" / "00000_00.png").exists()
    for (found, printed), mode in zip(processes.run(several, calls)[0], modes):
        (row,) = found.values()
        assert printed.startswith("assumed: --") and repr(row["prompt"]) in printed
        if mode == "t2icot":
            assert f"{row['prompt']} > {row['refined']}" in printed and row["refined"]
        if mode == "text":
            assert f"{row['prompt']} > {row['text']}" in printed and row["text"] == str(eval(row["prompt"][:-1]))
        else:
            assert (tmp_path / mode / row["file"]).exists() and (tmp_path / mode / "grid.png").exists()


def test_picture_to_edit_is_cropped_and_scaled(tmp_path):
    (source,), _ = shapes.pictures(0, 0, 1, size=64)
    wide = np.full((64, 96, 3), 7, np.uint8)
    wide[:, 16:80] = source  # what is left and right of the centre is cut off
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(source).resize((32, 32), Image.Resampling.LANCZOS).save(tmp_path / "small.png")
    call = dict(mode="i2i", prompt=("make it blue",), reward=("psnr",))
    calls = [call | dict(image=(str(tmp_path / f"{n}.png"),), out=str(tmp_path / n)) for n in ("wide", "small")]
    calls.append(call | dict(model="tiny-kontext", refine=True, image=calls[0]["image"], out=str(tmp_path / "refined")))
    calls.append(
        calls[1]
        | dict(mode="text", lm="tiny-qwen-vl", prompt=("how many circles?",), reward=(), out=str(tmp_path / "asked"))
    )
    (wide, _), (small, _), (refined, _), (asked, _) = processes.run(several, calls)[0]
    a, b = (pixels(tmp_path / name / "images" / "00000_00.png") for name in ("wide", "small"))
    assert abs(a - b).mean() < 4 and a.std() > 5  # their borders are resampled with what lies beside
    assert pixels(tmp_path / "wide" / "grid.png").shape[1] > 256  # before and after
    assert refined[0, 0]["refined"] == infer.blip3o.refined(refined[0, 0]["text"])
    with Image.open(tmp_path / "refined" / "images" / "00000_00.png") as opened:
        assert opened.size == (32, 32) and opened.text["refined"] == refined[0, 0]["refined"]
    assert asked[0, 0]["text"] in ("1", "2", "3", "4") and "file" not in asked[0, 0]


def test_answers_are_sampled_and_judged(tmp_path):
    call = dict(mode="text", prompts="arithmetic", max_prompts=20, reward=("math",), out=str(tmp_path / "greedy"))
    sampled = dict(mode="text", prompt=("34+57=",), temperature=3.0, num_images=8, max_new_tokens=3)
    calls = [call, sampled | dict(out=str(tmp_path / "a"), batch_size=3), sampled | dict(out=str(tmp_path / "b"))]
    (greedy, printed), (a, _), (b, _) = processes.run(several, calls)[0]
    assert len(greedy) == 20 and 0 < np.mean([row["rewards"]["math"] for row in greedy.values()]) <= 1
    assert all(row["rewards"]["math"] == (row["text"] == str(eval(row["prompt"][:-1]))) for row in greedy.values())
    assert a == b and len({row["text"] for row in a.values()}) > 3


# ----------------------------------------------------------------------------------------------------------------------
# Reports, uploads, errors


def publish(folder):
    from models import card

    pushed = []
    card.push = lambda folder, hub_id: pushed.append((folder, hub_id)) or f"https://huggingface.co/{hub_id}"
    _, printed = go(report=f"{folder}/full/")
    _, said = go(model=f"{folder}/full", push="me/mine")
    go(lm=f"{folder}/pair", push="me/lm")
    return printed, said, pushed


def test_report_and_push(trained):
    printed, said, pushed = processes.run(publish, trained)[0]
    assert printed.strip() == f"{trained}/full/report.html" and os.path.getsize(printed.strip()) > 1000
    assert pushed == [(f"{trained}/full/model", "me/mine"), (f"{trained}/pair/lm", "me/lm")]
    assert said.strip() == "https://huggingface.co/me/mine"
    assert "flow_grpo" in (trained / "full" / "model" / "README.md").read_text()


def test_wrong_flags_are_one_message(tmp_path, trained):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text((trained / "full" / "args.json").read_text())
    (tmp_path / "done").mkdir()
    done = dataclasses.asdict(infer.Args()) | {"weights": ["tiny-flux"]}
    (tmp_path / "done" / "args.json").write_text(json.dumps(done))
    (tmp_path / "done" / "results.jsonl").write_text('{"prompt_index": 0, "image_index": 0, "prompt": "x"}\n')
    (tmp_path / "misspelt.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "rewards": ["jpgg"]}')
    (tmp_path / "number.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "rewards": 3}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "args.json").write_text("{")
    picture, text, edits = (str(tmp_path / "a.png"),), dict(mode="text"), str(ROOT / "data" / "edits.jsonl")
    cases = [
        (dict(image=("no.png",), mode="i2i", prompt=("x",)), "--image no.png: no such file"),
        (dict(image=(str(tmp_path / "broken.png"),), mode="i2i", prompt=("x",)), "expected an image that PIL can read"),
        (dict(image=picture, mode="i2i"), "--image needs --prompt"),
        (dict(image=picture, prompt=("x",)), "--mode t2i makes pictures from text; take --mode i2i"),
        (dict(image=picture * 2, mode="i2i", prompt=("a", "b", "c")), "2 pictures for 3 prompts"),
        (dict(mode="i2i", model="tiny-flux"), "tiny-flux makes pictures from text and cannot edit"),
        (dict(mode="i2i", model=str(trained / "full")), "makes pictures from text and cannot edit"),
        (dict(model="tiny-kontext"), "edits pictures only; take --mode i2i"),
        (dict(mode="i2i", prompts="shapes"), "--prompts shapes have no pictures"),
        (dict(prompts=edits), "edits.jsonl have pictures to edit; take --mode i2i"),
        (text | dict(prompts=edits), "the prompts have pictures and --lm reads text only"),
        (text | dict(model="tiny-flux"), "tiny-flux makes pictures; take a language model"),
        (text | dict(model="tiny-blip3o", lm="tiny-qwen"), "--mode text takes one model"),
        (text | dict(num_images=2), "greedy answers to one prompt are all alike"),
        (text | dict(lm=str(trained / "full")), "that run has no language model; did you mean --model"),
        (dict(model=str(trained / "rloo")), "that run has no diffusion model; did you mean --mode text --lm"),
        (dict(lm="tiny-qwen"), "--mode t2i uses no language model: leave out --lm tiny-qwen"),
        (dict(mode="t2icot", model="tiny-blip3o", lm="tiny-qwen"), "has a language model of its own: leave out --lm"),
        (dict(mode="i2i", refine=True, model="tiny-kontext", lm="tiny-qwen"), "is to see the picture"),
        (dict(refine=True), "--refine is for i2i"),
        (dict(image_guidance=2.0), "--image-guidance 2.0: --model tiny-flux has none"),
        (dict(model="tiny-fluks"), "unknown model 'tiny-fluks', did you mean tiny-flux?"),
        (text | dict(lm="tiny-qwn"), "unknown model 'tiny-qwn', did you mean tiny-qwen?"),
        (dict(model=str(tmp_path / "run")), "that run has not written an export in model/ or a checkpoint yet"),
        (dict(model=str(tmp_path / "run"), ema=False), "has not written a checkpoint, which --no-ema needs, yet"),
        (dict(model=str(tmp_path / "done")), "its args.json is not that of a training run"),
        (dict(reward=("pikscore",)), "unknown reward 'pikscore', did you mean 'pickscore'?"),
        (dict(reward=("jpeg:x",)), "the weight 'x' is not a finite number"),
        (dict(reward=("math",)), "reward 'math' scores 'text', but this run only has 'image'"),
        (dict(prompts=str(tmp_path / "empty.txt")), "expected at least one prompt, got an empty file"),
        (dict(prompts=str(tmp_path / "no.txt")), "no.txt: no such file"),
        (dict(prompt=(" ",)), "--prompt: expected a prompt, got blank text"),
        (dict(prompt=("a",), prompts="shapes"), "--prompt and --prompts: expected one of them"),
        (dict(compare=("tiny-flux", "tiny-flux")), "expected the names of two different models"),
        (dict(compare=("tiny-flux",)), "expected the names of two different models"),
        (dict(compare=("tiny-flux", "tiny-sd3"), model="tiny-flux"), "--compare names the models: leave out --model"),
        (dict(compare=("tiny-flux", "tiny-kontext")), "edits pictures only"),
        (dict(batch_size=0), "--batch-size must be at least 1"),
        (dict(out=str(tmp_path / "done"), seed=2), "has the results of another command (--"),
        (dict(out=str(trained / "full")), "holds a training run"),
        (dict(out=str(tmp_path / "a.png")), "a.png"),
        (dict(out=str(tmp_path / "damaged")), "args.json: expected JSON, got: "),
        (dict(model=str(tmp_path / "damaged")), "args.json: expected JSON, got: "),
        (dict(prompts=str(tmp_path / "misspelt.jsonl"), reward=("jpeg",)), "its rewards are ['jpgg']; expected a list"),
        (dict(prompts=str(tmp_path / "number.jsonl"), reward=("jpeg",)), "its rewards are 3; expected a list"),
        (text | dict(compare=("tiny-qwen-vl", "tiny-qwen"), prompts="shapes-qa"), "--lm reads text only"),
        (text | dict(num_steps=3), "--num-steps has no effect with --mode text: leave it out"),
        (text | dict(guidance=3.0), "--guidance has no effect with --mode text"),
        (dict(temperature=0.5), "--temperature has no effect with --mode t2i"),
        (dict(mode="i2i", max_new_tokens=5), "--max-new-tokens has no effect with --mode i2i and without --refine"),
        (dict(max_prompts=3), "--max-prompts has no effect without --prompts"),
        (dict(judge_url="http://x/v1"), "--judge-url has no effect without --reward"),
        (dict(guidance=math.nan), "--guidance --image-guidance --seed must be 0 or more"),
        (dict(image_guidance=-3.0), "--guidance --image-guidance --seed must be 0 or more"),
        (dict(seed=-1), "--guidance --image-guidance --seed must be 0 or more"),
        (dict(report=str(tmp_path)), str(tmp_path)),
        (dict(report=str(tmp_path / "done")), "of what infer.py made; expected the folder of a training run"),
        (dict(push="me/x"), "--push needs --model"),
        (dict(push="me/x", model="a", lm="b"), "--push takes --model or --lm, one at a time"),
        (dict(push="me/x", model="tiny-flux"), "tiny-flux is no run folder with an export in model/"),
    ]
    for (call, expected), message in zip(cases, processes.run(refusals, [call for call, _ in cases])[0]):
        assert message.startswith("error: ") and expected in message and message.count("\n") <= 1, (call, message)


def plans_of(*names, mode="t2i"):
    args = dataclasses.replace(infer.Args(), mode=mode)
    return [infer.plan(args, "", name) if mode == "text" else infer.plan(args, name, "") for name in names]


def copy_of_run(run, folder, **changes):
    """The run folder again, with other arguments."""
    shutil.copytree(run, folder)
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(saved | changes))
    return str(folder)


def test_a_run_and_its_base_are_compared_with_the_settings_of_the_run(trained, tmp_path):
    few = copy_of_run(trained / "full", tmp_path / "few", eval_num_steps=3, guidance=2.0)
    base, run = plans_of("tiny-flux", few)
    assert base["settings"]["num_steps"] == 6 and run["settings"]["num_steps"] == 3
    assert infer.level([base, run]) == {}
    assert base["settings"] == run["settings"] and run["settings"]["guidance"] == 2
    base, run = plans_of("tiny-flux", few)
    assert infer.level([run, base]) == {} and base["settings"]["num_steps"] == 3
    # Two runs keep their own, and it is said.
    more = copy_of_run(trained / "full", tmp_path / "more", eval_num_steps=4, guidance=2.0)
    assert infer.level(plans_of(few, more)) == {"num_steps": (3, 4)}
    # Models of two kinds have their own usual settings.
    assert infer.level(plans_of("tiny-flux", "tiny-blip3o"))["num_steps"] == (6, 12)
    asked = copy_of_run(trained / "rloo", tmp_path / "asked", instruction="Think.", max_new_tokens=7)
    base, run = plans_of("tiny-qwen", asked, mode="text")
    assert run["instruction"] == "Think." and base["instruction"] == ""
    assert infer.level([base, run]) == {}
    assert base["instruction"] == "Think." and base["settings"]["max_new_tokens"] == 7


def test_language_model_of_a_run_that_draws_nothing_is_not_tiny_for_the_model_it_did_not_load():
    run = dict(model="tiny-flux", resolution=32, lm="qwen2.5-vl-3b", task="text")
    assert not infer.Source("run", "run/lm", run).tiny("lm")
    assert infer.Source("run", "run/lm", run | dict(lm="tiny-qwen-vl")).tiny("lm")
    assert infer.Source("run", "run/lm", dict(model="tiny-blip3o", lm="", task="text", resolution=32)).tiny("lm")
    assert infer.Source("run", "run/model", dict(model="mine", resolution=32)).tiny()
    assert not infer.Source("run", "run/model", dict(model="flux", resolution=512)).tiny()


def test_run_that_was_continued_and_has_not_ended_is_its_newest_checkpoint(trained, tmp_path):
    ended = infer.find(str(trained / "full"), "model", True)
    assert ended.base.endswith("full/model") and not ended.weights
    longer = json.loads((trained / "full" / "args.json").read_text())["num_iterations"] + 5
    run = copy_of_run(trained / "full", tmp_path / "run", num_iterations=longer)
    newest = infer.find(run, "model", True)
    assert "checkpoints" in newest.weights and newest.base == "tiny-flux" and "weights of" in newest.said
    before = (tmp_path / "run" / "model" / "README.md").read_text()
    with pytest.raises(SystemExit, match="was continued and has not ended, its export is older"):
        infer.main(dataclasses.replace(infer.Args(), push="me/x", model=run))
    assert (tmp_path / "run" / "model" / "README.md").read_text() == before


def other_prompts_and_no_results(folder):
    """Messages of the same command after its prompts changed; and a command after one that made nothing."""
    prompts, messages = folder / "prompts.txt", []
    call = dict(prompts=str(prompts), num_steps=1, out=str(folder / "run"))
    prompts.write_text("a red circle\na green square")
    go(**call)
    for lines in ("a red circle\na blue square", "a red circle"):
        prompts.write_text(lines)
        with pytest.raises(SystemExit) as error:
            go(**call)
        messages.append(str(error.value.code))
    with pytest.raises(SystemExit) as error:
        go(prompt=("x",), resolution=33, out=str(folder / "again"))
    messages.append(str(error.value.code))
    found, _ = go(prompt=("x",), num_steps=1, out=str(folder / "again"))
    tagged = {"prompt": "x", "tag": 3, "rewards": ["jpeg"]}, {"prompt": "y", "tag": 3, "rewards": ["psnr"]}
    prompts.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, tagged)))
    reward = ("jpeg", "jpeg_incompressibility")
    call = dict(prompts=str(prompts.with_suffix(".jsonl")), num_steps=1, reward=reward, out=str(folder / "tagged"))
    return messages, len(found), [row["rewards"] for row in go(**call)[0].values()]


def test_folder_of_other_prompts_is_refused_and_one_without_results_is_free(tmp_path):
    (changed, fewer, size), made, judged = processes.run(other_prompts_and_no_results, tmp_path)[0]
    assert "has results of other prompts (number 1 is 'a green square' there)" in changed and "(number 1 is" in fewer
    assert size.startswith("error: ") and made == 1
    # What no reward judges has none, and is not 0.
    assert judged[0].keys() == {"reward", "jpeg"} and judged[0]["reward"] == judged[0]["jpeg"] and judged[1] == {}


def test_reward_without_its_metadata_is_one_message(tmp_path):
    with pytest.raises(SystemExit) as error:
        processes.run(several, [dict(prompt=("a cat",), reward=("shapes",), out=str(tmp_path / "x"))])
    assert str(error.value.code).startswith("error: shapes reward, prompt")
    assert (tmp_path / "x" / "images" / "00000_00.png").exists()  # nothing is lost


def test_bf16_base_is_read_in_bf16(tmp_path):
    """LoRA's way of reading frozen weights, without an adapter left."""
    source = infer.find("tiny-flux", "model", True)
    model = infer.load(source, "model", torch.device("cpu"), torch.bfloat16)
    tensors = dict(model.parts["transformer"].named_parameters())
    with safe_open(
        os.path.join(models.ALIASES["tiny-flux"], "transformer", "diffusion_pytorch_model.safetensors"), "pt"
    ) as f:
        assert set(tensors) == set(f.keys())
        assert all(torch.equal(tensors[name], f.get_tensor(name).bfloat16()) for name in tensors)
    lm = infer.load(infer.find("tiny-qwen", "lm", True), "lm", torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in lm.parts["lm"].parameters()} == {torch.bfloat16}
    assert not any("lora" in name or "base_layer" in name for name in dict(lm.parts["lm"].named_parameters()))
    assert not parallel.trained(lm.parts)
