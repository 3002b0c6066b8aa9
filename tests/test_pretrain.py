import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_resume import assert_same_end, metrics

import models
import pretrain
import rewards
from data import prompts as prompt_data
from kernels.sde_step import philox_normal
from models import checkpoint, run_folder

TINY = dict(batch_size=8, micro_batch_size=4, num_iterations=3, warmup_updates=2, eval_size=6, num_steps=2)
TINY |= dict(eval_every=2, save_every=1, keep_checkpoints=0)


def arguments(run, **changes):
    return replace(pretrain.Args(), out=str(run), **TINY | changes)


def train(args):
    pretrain.main(args)


def full(folder):
    """All tensors of a checkpoint, put together from what each rank wrote."""
    index = json.loads((folder / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {name: torch.cat([files[file][name] for file, _, _ in t["shards"]]) for name, t in index.items()}


# ----------------------------------------------------------------------------------------------------------------------
# data


def test_drawn_images_are_a_function_of_their_index():
    prompts, images = pretrain.captioned_images("shapes", None, seed=3, start=5, count=7, resolution=32)
    assert images.shape == (7, 3, 32, 32) and images.dtype == torch.float32 and 0 <= images.min() < images.max() <= 1
    for start, count in ((5, 3), (8, 4)):
        part_prompts, part = pretrain.captioned_images("shapes", None, 3, start, count, 32)
        assert part_prompts == prompts[start - 5 :][:count] and torch.equal(part, images[start - 5 :][:count])
    assert not torch.equal(pretrain.captioned_images("shapes", None, 4, 5, 7, 32)[1], images)
    # What is drawn is what the caption says: the reward's strict form finds nothing missing.
    score, metadata = rewards.load("shapes"), pretrain.shapes.pictures(3, 5, 7)[1]
    pictures = run_folder.to_uint8(images)
    assert score.strict({"image": pictures}, prompts, metadata).tolist() == [1.0] * 7


def test_images_of_a_file_are_scaled_to_cover_and_cropped_to_the_centre(tmp_path):
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, :10], wide[:, 10:50], wide[:, 50:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    Image.new("L", (1, 7), 128).save(tmp_path / "narrow.png")
    Image.new("RGB", (331, 333), (10, 20, 30)).save(tmp_path / "large.png")
    rows = [{"prompt": name, "image": f"{name}.png"} for name in ("wide", "tall", "narrow", "large")]
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_set = prompt_data.load(str(file), "all")
    prompts, images = pretrain.captioned_images(str(file), train_set, 1, 0, 9, 32)
    assert images.shape == (9, 3, 32, 32) and set(prompts[:4]) == set(prompts[4:8]) == {row["prompt"] for row in rows}
    green, edge = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1), slice(2, -2)  # bicubic blends two pixels at the border
    for prompt, image in zip(prompts, images):
        if prompt in ("wide", "tall"):
            assert (image[:, edge, edge] == green).all() and (image[1] > 0.5).all()
        else:
            colour = torch.tensor((128,) * 3 if prompt == "narrow" else (10, 20, 30)).view(3, 1, 1) / 255
            assert (image == colour).all()
    again = pretrain.captioned_images(str(file), train_set, 1, 6, 3, 32)
    assert again[0] == prompts[6:] and torch.equal(again[1], images[6:])

    file.write_text('{"prompt": "no picture"}\n')
    with pytest.raises(ValueError, match="captions.jsonl: 'no picture' has no image"):
        pretrain.captioned_images(str(file), prompt_data.load(str(file), "all"), 1, 0, 1, 32)


def test_drop_text_replaces_rows_by_the_empty_caption():
    cond = {"t5": torch.randn(4, 3, 2), "clip": torch.randn(4, 5)}
    null = {"t5": torch.randn(1, 3, 2), "clip": torch.randn(1, 5)}
    found = pretrain.drop_text(cond, null, torch.tensor([True, False, False, True]))
    for name in cond:
        assert torch.equal(found[name], torch.stack([null[name][0], *cond[name][1:3], null[name][0]]))


def test_null_text_is_the_one_that_guidance_takes():
    model = models.load("tiny-flux", "cpu", torch.float32)
    cond, empty = model.encode(["a red circle", "two blue squares"]), model.encode([""])
    null = pretrain.null_text(model, cond)
    for name in ("t5", "clip"):
        assert torch.equal(null[name].expand_as(cond[name])[:1], empty[name]) and not torch.equal(
            cond[name][:1], empty[name]
        )
    model.embedded_guidance = True  # then there are no null rows
    cond = model.encode(["a red circle", "two blue squares"])
    assert cond.keys() == {"t5", "clip"} and torch.equal(pretrain.null_text(model, cond)["t5"], empty["t5"])
    model = models.load("tiny-blip3o", "cpu", torch.float32)
    cond = model.condition(model.encode(["a red circle", "two blue squares"]))
    dropped = pretrain.drop_text(cond, pretrain.null_text(model, cond), torch.tensor([False, True]))
    assert torch.equal(dropped["text"][0], cond["text"][0]) and not dropped["text"][1].any() and cond["text"][1].any()


# ----------------------------------------------------------------------------------------------------------------------
# loss and sampler, in closed form


def test_loss_is_the_squared_error_of_the_velocity():
    x0, seed_B, sigma_B = torch.randn(3, 4, 2, 6), torch.tensor([5, 6, 7]), torch.tensor([0.01, 0.4, 0.99])
    eps = philox_normal(seed_B, (4, 2, 6))
    model = SimpleNamespace(velocity=lambda x, sigma, cond: cond * (x - x0) / sigma.view(-1, 1, 1, 1))
    # (x_sigma - x0) / sigma = eps - x0, so that model is exact for cond = 1, and off by itself for cond = 0.
    assert pretrain.flow_matching_loss(model, 1.0, x0, sigma_B, seed_B).item() < 1e-8
    expected = (eps - x0).square().mean().item()
    assert pretrain.flow_matching_loss(model, 0.0, x0, sigma_B, seed_B).item() == pytest.approx(expected, rel=1e-6)
    assert pretrain.flow_matching_loss(model, 3.0, x0, sigma_B, seed_B).item() == pytest.approx(4 * expected, rel=1e-4)


def test_sample_follows_the_flow_to_its_end():
    x0, noise, seen = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), []

    def velocity(x, sigma, cond, guidance):
        seen.append((sigma.tolist(), cond, guidance))
        return (x - x0) / sigma.view(-1, 1, 1, 1)  # straight lines to x0: Euler is exact

    sigmas = torch.tensor([1.0, 0.7, 0.25, 0.0], dtype=torch.float64)
    x = pretrain.sample(SimpleNamespace(velocity=velocity), "cond", noise, sigmas, (2.0, 1.0))
    assert (x - x0).abs().max() < 1e-6
    assert [s for s, _, _ in seen] == [[pytest.approx(s)] * 2 for s in (1.0, 0.7, 0.25)]
    assert {(cond, guidance) for _, cond, guidance in seen} == {("cond", (2.0, 1.0))}


# ----------------------------------------------------------------------------------------------------------------------
# main


def train_and_record(args):
    """Noise levels, noise seeds and whether the caption was dropped, of every image that a run trains on."""
    seen, loss = [], pretrain.flow_matching_loss

    def record(model, cond, x0, sigma_B, seed_B):
        null = model.encode([""])["clip"]
        seen.append(torch.stack([sigma_B.double(), seed_B.double(), (cond["clip"] == null).all(dim=1).double()]))
        cond = {name: rows[:2] for name, rows in cond.items()}
        return loss(model, cond, x0[:2], sigma_B[:2], seed_B[:2])

    pretrain.flow_matching_loss = record
    pretrain.main(args)
    return torch.cat(seen, dim=1)


def test_noise_levels_are_logit_normal_and_captions_dropped(tmp_path):
    sizes = dict(batch_size=300, micro_batch_size=150, num_iterations=3, sigma_mean=0.4, sigma_std=1.3)
    args = arguments(tmp_path / "run", text_dropout=0.25, reward="", save_every=100, eval_every=100, **sizes)
    (seen,) = processes.run(train_and_record, args)
    sigma, seed, dropped = seen
    assert len(sigma) == 900 == len(seed.unique()) == len(sigma.unique())
    values = (
        (torch.special.ndtr((torch.logit(sigma) - 0.4) / 1.3)).sort().values
    )  # uniform if the distribution is right
    distance = (values - (torch.arange(900) + 0.5) / 900).abs().max().item()
    assert distance < 1.63 / math.sqrt(900)  # Kolmogorov-Smirnov, 1 %
    assert abs(dropped.mean().item() - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 900)
    assert abs(torch.corrcoef(torch.stack([sigma, dropped]))[0, 1].item()) < 3 / math.sqrt(900)  # independent draws


def test_loss_falls_from_nothing_and_the_learning_rate_follows_its_schedule(tmp_path):
    rates = dict(learning_rate=4e-3, warmup_updates=4, decay_iterations=20, final_learning_rate=1e-3)
    sizes = dict(batch_size=16, micro_batch_size=16, num_iterations=30, eval_every=100, save_every=100)
    args = arguments(tmp_path / "run", model=str(tmp_path / "start"), ema_decay=0.9, **rates, **sizes)
    processes.run(train_from_nothing, args)
    rows = run_folder.rows(tmp_path / "run")
    losses = [row["loss"] for row in rows[:-1]]
    assert 1.5 < losses[0] < 2.5  # it predicts 0 at first: the variance of eps - x0, with x0 normalised
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    for i, row in enumerate(rows[:-1]):
        cosine = 1e-3 + (4e-3 - 1e-3) * (1 + math.cos(math.pi * min(i, 20) / 20)) / 2
        assert row["learning_rate"] == pytest.approx(cosine * min(1, (i + 1) / 4), rel=1e-9), i
    assert "learning_rate" not in rows[-1] and "eval_strict" in rows[-1] and rows[-1]["iteration"] == 30


def train_from_nothing(args):
    from diffusers import FluxPipeline

    import models
    from models import tiny

    pipeline = FluxPipeline.from_pretrained(models.ALIASES["tiny-flux"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.init_transformer(pipeline.transformer)
    pipeline.save_pretrained(args.model)
    pretrain.main(args)


def train_and_stop(args, call):
    """main, which is told to stop in the n-th call of its loss."""
    loss, count = pretrain.flow_matching_loss, iter(range(1, call + 1))

    def stopping(*arguments):
        if next(count, None) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    pretrain.flow_matching_loss = stopping
    pretrain.main(args)


def test_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    processes.run(train, arguments(straight, decay_iterations=3))
    args = arguments(run, decay_iterations=3, save_every=100)
    for call, iteration in ((3, 1), (2, 2)):  # 2 tiles an iteration: before its last tile, and in it
        with pytest.raises(SystemExit) as stopped:
            processes.run(train_and_stop, args, call)
        assert stopped.value.code == 143 and [row["iteration"] for row in metrics(run)] == list(range(iteration))
        assert checkpoint.iteration(checkpoint.latest(run)) == iteration
        args = run_folder.command_line(pretrain.Args(), ["--resume", str(run)], pretrain.__file__)
    processes.run(train, args)
    assert_same_end(run, straight)

    # What was exported is the average, and diffusers' own pipeline takes it.
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(run / "model")
    weights = {f"ema/transformer.{name}": tensor for name, tensor in pipeline.transformer.state_dict().items()}
    saved = full(checkpoint.latest(run))
    assert weights.keys() == {name for name in saved if name.startswith("ema/")}
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    assert any((saved[name] != saved[name.replace("ema/", "model/")]).any() for name in weights)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(height=32, width=32, num_inference_steps=2, max_sequence_length=12, output_type="np")
    images = pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all() and images.std() > 0.01


def validation_losses(folder, sizes):
    """eval_loss of untrained and trained weights for every (eval_size, micro_batch_size)."""
    found = []
    for n, (eval_size, micro_batch_size) in enumerate(sizes):
        size = dict(eval_size=eval_size, micro_batch_size=micro_batch_size, batch_size=12)
        pretrain.main(arguments(folder / f"run{n}", reward="", num_iterations=1, **size))
        found.append([row["eval_loss"] for row in run_folder.rows(str(folder / f"run{n}")) if "eval_loss" in row])
    return found


def test_validation_loss_is_that_of_held_out_images_at_fixed_noise_levels(tmp_path):
    (plain, tiles), of_ranks = (
        processes.run(validation_losses, tmp_path / str(ranks), [(7, 6), (7, 2)], ranks=ranks)[0] for ranks in (1, 2)
    )
    model = models.load("tiny-flux", "cpu", torch.float32)
    captions, images = pretrain.captioned_images("shapes", None, 0, 0, 7, 32, held_out=True)
    known = {item["prompt"] for item in pretrain.shapes.train_prompts()}
    assert not known & set(captions)
    index = torch.arange(7)
    sigma, seed = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.1, 0.3]), pretrain.fold_seed(0, pretrain.EVAL_LOSS, index)
    x0, eps = model.encode_images(images), philox_normal(seed, (8, 8, 8))
    mixed = torch.stack([(1 - s) * x + s * e for s, x, e in zip(sigma.tolist(), x0, eps)])
    with torch.no_grad():
        errors = [
            (model.velocity(mixed[i : i + 1], sigma[i : i + 1], model.encode([captions[i]])) - (eps - x0)[i]).square()
            for i in range(7)
        ]
    assert plain[0] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)
    for found in (tiles, *of_ranks):  # before the update; two ranks train on twice as many images
        assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert len(plain) == 2 and plain[1] != plain[0] and tiles[1] == pytest.approx(plain[1], rel=1e-5)


def test_two_ranks_are_one_rank_with_twice_the_batch(tmp_path):
    processes.run(train, arguments(tmp_path / "two", num_iterations=2), ranks=2)
    processes.run(train, arguments(tmp_path / "one", num_iterations=2, batch_size=16))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            tolerance = (
                dict(abs=1e-3) if name.startswith("eval") else dict(rel=1e-5)
            )  # one of 32 x 32 x 3 levels may flip
            assert two[name] == pytest.approx(one[name], **tolerance), name
    assert (tmp_path / "two" / "checkpoints" / "000001" / "rank-00001.safetensors").exists()
    one, two = (full(tmp_path / run / "checkpoints" / "000001") for run in ("one", "two"))
    assert one.keys() == two.keys()
    gradients = [name for name in one if name.endswith("/exp_avg")]  # after one update: a tenth of the gradient
    a, b = (torch.cat([tensors[name].flatten() for name in gradients]) for tensors in (one, two))
    assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()


def train_unified(folder, ranks):
    size = dict(
        batch_size=16 // ranks, micro_batch_size=4, num_iterations=12, eval_size=16, eval_every=12, save_every=12
    )
    options = dict(
        model="tiny-blip3o", reward="", learning_rate=2e-3, warmup_updates=1, text_dropout=0.3, ema_decay=0.0
    )
    pretrain.main(arguments(folder / f"run{ranks}", **size | options))
    return run_folder.rows(str(folder / f"run{ranks}"))


def test_unified_model_learns_on_one_and_two_ranks(tmp_path):
    one, two = (processes.run(train_unified, tmp_path, ranks, ranks=ranks)[0] for ranks in (1, 2))
    assert one[-1]["eval_loss"] < 0.9 * one[0]["eval_loss"]
    for a, b in ((one[0], two[0]), (one[1], two[1])):  # the first update, and the loss behind it
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
