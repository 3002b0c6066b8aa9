import io
import json
import math
import os
import re
import signal
import tarfile
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
from data import prompts, shapes, stream, worlds
from kernels.sde_step import fold_seed, philox_normal
from models import blip3o, checkpoint, run_folder, tiny

TINY = dict(batch_size=8, micro_batch_size=4, num_iterations=3, warmup_updates=2, eval_size=6, num_steps=2)
TINY |= dict(eval_every=2, save_every=1, keep_checkpoints=0)
QUIET = dict(reward="", eval_every=100, save_every=100)


def arguments(run, model="tiny-flux", **changes):
    """What a tiny model is trained with; model: an alias, or the folder of a unified one."""
    known = model if model.startswith("tiny-") else "tiny-blip3o"
    return replace(pretrain.recipe(known), model=model, out=str(run), **TINY | changes)


def main(args):
    """pretrain.main without curves, and with fewer held-out edits and questions: to draw them takes seconds."""
    prompts.NUM_EDITS = prompts.NUM_QUESTIONS = 8, 64
    run_folder.curves = lambda *_: None
    pretrain.main(args)


def train(args):
    main(args)


def train_all(runs):
    for args in runs:
        main(args)


def resumed(run, *argv):
    """The arguments that `python pretrain.py --resume run` runs with."""
    argv = ["--resume", str(run), *argv]
    defaults = pretrain.recipe(run_folder.peek(argv, "--model", "tiny-blip3o"))
    return run_folder.command_line(defaults, argv, pretrain.__file__)


def full(folder):
    """All tensors of a checkpoint, put together from what each rank wrote."""
    index = json.loads((folder / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {name: torch.cat([files[file][name] for file, _, _ in t["shards"]]) for name, t in index.items()}


@pytest.fixture(scope="session")
def unified(tmp_path_factory):
    """{variant: folder of an untrained unified model}, "lm" and "sana": those of its parts. In the language model every
    parameter matters."""
    folder = tmp_path_factory.mktemp("unified")
    tokenizer = tiny.qwen_vl_tokenizer()
    tokenizer.model_max_length = 512
    vision = dict(vision_width=32, vision_layers=2, vision_heads=2, vision_ff_dim=48)
    lm = tiny.qwen_vl(1, width=64, num_layers=2, num_heads=2, num_kv_heads=1, ff_dim=96, tokenizer=tokenizer, **vision)
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim > 1:
                p.mul_(3)
    for part in (lm, tokenizer, tiny.qwen_vl_processor()):
        part.save_pretrained(folder / "lm")
    tiny.sana_pipeline(2, 1, 2, 16, 2, 32, vae_channels=(8, 8, 16)).save_pretrained(folder / "sana")
    found = {name: str(folder / name) for name in (*blip3o.VARIANTS, "lm", "sana")}
    for variant in blip3o.VARIANTS:
        blip3o.create(found[variant], found["lm"], found["sana"], variant, 4, 16, num_layers=1, head_dim=32)
    return found


def load(name):
    return models.load(name, "cpu", torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# What is dropped


def test_shares_of_what_is_dropped_are_those_of_the_flags():
    args, index = pretrain.Args(seed=3, text_dropout=0.1, reference_dropout=0.2, both_dropout=0.3), torch.arange(20_000)

    def share_is(found, share):
        assert abs(found.double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / len(index))

    text, picture = pretrain.dropped(args, index, edits=True)
    share_is(text & ~picture, 0.1)
    share_is(picture & ~text, 0.2)
    share_is(text & picture, 0.3)  # each image is in one of these or in none: the three are disjoint
    caption, none = pretrain.dropped(args, index, edits=False)
    assert caption.dtype == none.dtype == torch.bool and not none.any()
    share_is(caption, 0.4)  # both kinds lose the caption

    some = torch.tensor([7, 19_999, 3])
    assert torch.equal(pretrain.dropped(args, some, True)[0], text[some])
    assert torch.equal(pretrain.dropped(args, some, True)[1], picture[some])
    other = pretrain.dropped(replace(args, seed=4), index, True)[0]
    share_is(text & other, 0.4 * 0.4)  # another seed is another, independent draw
    none = replace(args, text_dropout=0.0, reference_dropout=0.0, both_dropout=0.0)
    assert not any(drop.any() for edits in (True, False) for drop in pretrain.dropped(none, index, edits))
    both = replace(none, both_dropout=1.0)
    assert all(drop.all() for drop in pretrain.dropped(both, index, True))
    assert [drop.all().item() for drop in pretrain.dropped(both, index, False)] == [True, False]
    text, picture = pretrain.dropped(replace(none, reference_dropout=1.0), index, True)
    assert picture.all() and not text.any()


def test_drop_text_replaces_rows_by_the_empty_caption():
    cond = {"t5": torch.randn(4, 3, 2), "clip": torch.randn(4, 5)}
    null = {"t5": torch.randn(1, 3, 2), "clip": torch.randn(1, 5)}
    found = pretrain.drop_text(cond, null, torch.tensor([True, False, False, True]))
    for name in cond:
        assert torch.equal(found[name], torch.stack([null[name][0], *cond[name][1:3], null[name][0]]))


PROMPTS = ["a red circle", "two blue squares", "a green triangle above a black circle", "three circles"]
DROP_TEXT, DROP_PICTURE = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])


@pytest.mark.parametrize("guided", [True, False])
def test_dropped_captions_of_one_diffusion_model_are_empty_ones(guided):
    model = load("tiny-flux")
    model.embedded_guidance = not guided  # then there are no null rows
    kept, empty = pretrain.conditioned(model, PROMPTS), model.encode([""])
    assert ("t5_null" in kept) == guided
    found = pretrain.conditioned(model, PROMPTS, drop_text_B=DROP_TEXT, drop_picture_B=torch.zeros(4, dtype=bool))
    for name in ("t5", "clip"):
        assert not torch.equal(kept[name][1:2], empty[name])
        for row, dropped in enumerate(DROP_TEXT):
            assert torch.equal(found[name][row], empty[name][0] if dropped else kept[name][row])


@torch.no_grad()
@pytest.mark.parametrize("edits", [False, True])
def test_dropped_conditions_of_blip3o_are_zeros(unified, edits):
    model, seed_B = load(unified["blip3o"]), torch.arange(4)
    sources = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) if edits else None
    kept = pretrain.conditioned(model, PROMPTS, sources, seed_B)
    picture = DROP_PICTURE & edits
    found = pretrain.conditioned(model, PROMPTS, sources, seed_B, DROP_TEXT, picture)
    assert found.keys() == kept.keys() and ("reference" in found) == edits
    for name, drop in [("text", DROP_TEXT), ("reference", picture)][: 1 + edits]:
        assert torch.equal(found[name][~drop], kept[name][~drop]) and not found[name][drop].any()
        assert kept[name].flatten(1).any(dim=1).all()
    none = pretrain.conditioned(model, PROMPTS, sources, seed_B, picture & False, picture & False)
    assert all(torch.equal(none[name], kept[name]) for name in kept)
    if edits:  # the noise of the reference is the image's own, wherever it stands
        late = pretrain.conditioned(model, PROMPTS[2:], sources[2:], seed_B[2:])
        assert torch.allclose(late["reference"], kept["reference"][2:], atol=1e-6)
        other = pretrain.conditioned(model, PROMPTS, sources, seed_B + 9)
        assert not torch.allclose(other["reference"], kept["reference"], atol=1e-2)
    # It is what guidance takes for nothing.
    x, sigma = model.init_noise(torch.arange(4), 32, 32), torch.full((4,), 0.6)
    v = model.velocity(x, sigma, found)
    for row, guidance in enumerate([(1.0, 1.0), (0.0, 1.0), None, (0.0, 0.0)]):
        if guidance:
            torch.testing.assert_close(v[row], model.velocity(x, sigma, kept, guidance)[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("edits", [False, True])
def test_dropped_conditions_of_metaquery_are_empty_captions_and_black_pictures(unified, edits):
    model = load(unified["metaquery"])
    sources = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) if edits else None
    picture = DROP_PICTURE & edits
    given = None if sources is None else sources.clone()
    found = pretrain.conditioned(model, PROMPTS, sources, torch.arange(4), DROP_TEXT, picture)
    assert set(found) == {"text"}  # no more goes into its DiT, and null rows, which training does not need, cost time
    assert sources is None or torch.equal(given, sources)
    for row in range(4):
        prompt = "" if DROP_TEXT[row] else PROMPTS[row]
        alone = None if sources is None else sources[row : row + 1] * (not picture[row])
        expected = pretrain.conditioned(model, [prompt], alone)["text"]
        torch.testing.assert_close(found["text"][row], expected[0], atol=1e-4, rtol=1e-4)
    kept = pretrain.conditioned(model, PROMPTS, sources)
    dropped = DROP_TEXT | picture
    assert ((found["text"] - kept["text"]).flatten(1).norm(dim=1) > 1e-2).tolist() == dropped.tolist()
    names = {(True, False): "text_image" if edits else "text_null", (True, True): "text_null"}
    for row in range(4):
        name = names.get((DROP_TEXT[row].item(), picture[row].item()))
        if name:  # what guidance takes
            torch.testing.assert_close(found["text"][row], kept[name][row], atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Loss and sampler, in closed form


def test_loss_is_the_squared_error_of_the_velocity():
    x0, seed_B, sigma_B = torch.randn(3, 4, 2, 6), torch.tensor([5, 6, 7]), torch.tensor([0.01, 0.4, 0.99])
    eps = philox_normal(seed_B, (4, 2, 6))
    model = SimpleNamespace(velocity=lambda x, sigma, cond: cond * (x - x0) / sigma.view(-1, 1, 1, 1))
    # (x_sigma - x0) / sigma = eps - x0, so that model is exact for cond = 1, and off by itself for cond = 0.
    assert pretrain.flow_matching_loss(model, 1.0, x0, sigma_B, seed_B).item() < 1e-8
    expected = (eps - x0).square().mean().item()
    assert pretrain.flow_matching_loss(model, 0.0, x0, sigma_B, seed_B).item() == pytest.approx(expected, rel=1e-6)
    assert pretrain.flow_matching_loss(model, 3.0, x0, sigma_B, seed_B).item() == pytest.approx(4 * expected, rel=1e-4)
    each = pretrain.squared_error(model, 0.0, x0, sigma_B, seed_B)
    torch.testing.assert_close(each, (eps - x0).square().flatten(1).mean(dim=1))


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


def test_answer_loss_is_that_of_stock_transformers():
    from transformers import AutoModelForImageTextToText

    lm, folder = models.load_lm("tiny-qwen-vl", "cpu", torch.float32), models.LM_ALIASES["tiny-qwen-vl"]
    stock, tokenizer = AutoModelForImageTextToText.from_pretrained(folder).eval(), tiny.qwen_vl_tokenizer()

    def expected(prompt, answer, picture=None):
        """Summed cross-entropy of a row on its own."""
        metadata = {"answer": answer}
        inputs, labels = tiny.vlm_inputs(
            lm.tokenizer, tiny.qwen_vl_processor(), [picture], [{"prompt": prompt, "metadata": metadata}]
        )
        end = (labels[0] >= 0).sum()  # the answer's tokens and the end
        assert end == len(tokenizer(answer).input_ids) + 1
        with torch.no_grad():
            logp = stock(**inputs).logits[0, :-1].double().log_softmax(-1)
        return -logp.gather(1, inputs["input_ids"][0, 1:, None])[-end:].sum().item()

    rows = worlds.read("shapes-qa", 1, 0, 3, 32)
    rows[1] |= {"answer": "a red circle and a blue square"}  # of another length
    wanted = [expected(row["prompt"], row["answer"], np.asarray(row["image"])) for row in rows]
    found = pretrain.answer_loss(lm, rows, refine=False)
    assert found.item() == pytest.approx(sum(wanted) / 3, rel=1e-5) and found.requires_grad
    for row, value in zip(rows, wanted):
        assert pretrain.answer_loss(lm, [row], refine=False).item() == pytest.approx(value, rel=1e-5)

    rows = worlds.read("shapes-cot", 1, 0, 4, 32)
    words = [
        (blip3o.REFINE.format(row["prompt"]), "<answer>" + row["answer"] + "</answer>") for row in rows
    ]  # the picture is not seen
    wanted = [expected(*pair) for pair in words]
    assert len({len(answer.split()) for _, answer in words}) > 1
    assert pretrain.answer_loss(lm, rows, refine=True).item() == pytest.approx(sum(wanted) / 4, rel=1e-5)
    # What the model is taught is what is drawn after it has answered.
    assert [blip3o.refined(answer) for _, answer in words] == [row["answer"] for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and data


def test_recipes_name_what_a_model_can_train_on():
    assert pretrain.recipe("tiny-blip3o-start") == pretrain.Args() and pretrain.Args().edit_share == 0.6
    flux, kontext, klein = (pretrain.recipe(f"tiny-{name}") for name in ("flux", "kontext", "klein"))
    assert (flux.data, flux.edit_data) == (klein.data, klein.edit_data) == ("shapes", "")
    assert (kontext.data, kontext.edit_data, kontext.edit_share) == ("", "shapes-edit", 1.0)
    assert flux.reference_dropout == flux.both_dropout == 0 and flux.text_dropout == 0.1
    full, meta, one = (pretrain.recipe(name) for name in ("blip3o", "metaquery", "flux"))
    shares = [(args.text_dropout, args.reference_dropout, args.both_dropout) for args in (full, meta)]
    assert shares == [(0.05, 0.05, 0.05)] * 2 and full.model == "blip3o" and one.model == "flux"
    assert (full.learning_rate, full.final_learning_rate, 8 * full.batch_size) == (1e-4, 1e-5, 128)
    assert (full.resolution, meta.resolution, full.sigma_distribution) == (1024, 512, "logit-normal")
    assert meta.sigma_distribution == "uniform" and one.data == one.edit_data == "" and one.lora_rank == 64
    assert all(args.batch_size % args.micro_batch_size == 0 for args in (flux, kontext, full, meta, one))


def test_sides_are_multiples_of_what_the_model_takes(unified):
    for name in ("tiny-flux", "tiny-sana", unified["blip3o"]):
        model = load(name)
        multiple = pretrain.side_multiple(model)
        model.latent_size(multiple, 3 * multiple)
        with pytest.raises(ValueError):
            model.latent_size(multiple, 3 * multiple // 2)
    with pytest.raises(ValueError, match="64 x 64 pixels or less"):
        pretrain.side_multiple(SimpleNamespace(latent_size=lambda *_: int("none")))


def test_batches_of_files_are_of_one_size_and_as_tensors_what_they_were(tmp_path):
    write_data(tmp_path)
    args = arguments("", data=str(tmp_path / "tars" / "*.tar"), edit_data=str(tmp_path / "edits.jsonl"), edit_share=0.4)
    train_source, held_out = pretrain.open_images(args, SimpleNamespace(rank=0, size=1))
    assert isinstance(train_source, stream.Mixture) and held_out == {}
    assert np.allclose(train_source.ends, [0.6, 1.0])
    assert all(s.state()["seen"] == 0 for s in train_source.streams)  # the first sample was looked at, not taken
    batches = pretrain.batched(train_source, args, 8)
    sizes = set()
    for _ in range(12):
        rows = batches.next()
        pictures = pretrain.to_tensor([row["image"] for row in rows])
        assert pictures.dtype == torch.float32 and 0 <= pictures.min() and pictures.max() <= 1 and len(pictures) == 4
        height, width = pictures.shape[2:]
        assert height % 8 == width % 8 == 0 and 0.7 < height * width / 32**2 < 1.3
        assert np.array_equal((pictures[2] * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(rows[2]["image"]))
        sources = {row["source"] and row["source"].size for row in rows}
        assert sources in ({None}, {(width, height)})
        sizes.add((height, width))
    assert len(sizes) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, all of one number of ranks in one process


def runs_of(folder, unified, ranks):
    """name -> arguments of runs on the shapes world: on two ranks two iterations of what one rank does in more."""
    one = ranks == 1
    size = dict(batch_size=16 // ranks, eval_every=100, save_every=100, learning_rate=2e-3, ema_decay=0.0)
    rates = dict(decay_iterations=5, final_learning_rate=1e-3, warmup_updates=3)
    talk = dict(train_lm=True, text_data="shapes-qa", reward="", eval_size=2, learning_rate=1e-3)
    cot = dict(task="t2icot", data="shapes-cot", edit_data="", train_lm=True, reward="", eval_size=2)
    own = dict(
        draw=(8, dict(eval_text="shapes-qa", eval_every=4, both_dropout=0.1, save_every=1, **rates)),
        talk=(7, talk),
        cot=(7, cot),
        meta=(
            2,
            dict(model=unified["metaquery"], noise_levels=2, sigma_distribution="uniform", num_steps=1, eval_size=2),
        ),
    )
    if one:
        frozen = talk | dict(train_dm=False, batch_size=4, ema_decay=0.9, num_steps=1)
        own |= dict(weight1=(1, frozen), weight3=(1, frozen | dict(text_weight=3.0)))
    else:
        del own["cot"]
    known = dict(model=unified["blip3o"])
    runs = {
        name: arguments(folder / name, **known | size | changes, num_iterations=count if one else 2)
        for name, (count, changes) in ((name, (count, known | changes)) for name, (count, changes) in own.items())
    }
    if one:
        runs["tiny-kontext"] = arguments(folder / "tiny-kontext", "tiny-kontext", num_iterations=2, eval_size=2)
    return runs


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, unified):
    folder = tmp_path_factory.mktemp("one")
    processes.run(train_all, list(runs_of(folder, unified, 1).values()))
    return folder


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, unified):
    folder = tmp_path_factory.mktemp("two")
    processes.run(train_all, list(runs_of(folder, unified, 2).values()), ranks=2)
    return folder


def test_unified_model_learns_to_draw_and_to_edit(one_rank, unified):
    rows, run = run_folder.rows(one_rank / "draw"), one_rank / "draw"
    assert [row["iteration"] for row in rows] == list(range(9)) and all(row["bad_samples"] == 0 for row in rows[:-1])
    for metric in ("eval_loss", "eval_loss_edit"):
        assert rows[8][metric] < rows[4][metric] < 0.95 * rows[0][metric], metric
    losses = [row["loss"] for row in rows[:-1]]
    assert 1 < losses[0] and np.mean(losses[-4:]) < 0.85 * losses[0]
    scores = {f"eval_{name}{edit}" for name in ("reward", "strict") for edit in ("", "_edit")}
    assert scores | {"eval_unchanged_edit", "eval_loss"} <= rows[4].keys() and "loss_text" not in rows[0]
    assert all(0 <= rows[8][name] <= 1 for name in scores)
    assert {path.name for path in (run / "samples").iterdir()} == {
        f"{n:06d}{edit}.png" for n in (0, 4, 8) for edit in ("", "_edit")
    }
    for i, row in enumerate(rows[:-1]):
        cosine = 1e-3 + (2e-3 - 1e-3) * (1 + math.cos(math.pi * min(i, 5) / 5)) / 2
        assert row["learning_rate"] == pytest.approx(cosine * min(1, (i + 1) / 3), rel=1e-9), i
    # Its language model is as it was, to the bit, and so is what it says.
    for name in ("eval_text", "eval_text_logp"):
        assert len({rows[n][name] for n in (0, 4, 8)}) == 1
    assert rows[0]["eval_text_logp"] < 0
    before, after = (json.loads(open(f"{folder}/config.json").read()) for folder in (unified["blip3o"], run / "model"))
    assert before == after and after["lm"] == unified["lm"] and not (run / "model" / "lm").exists()
    names = full(run / "checkpoints" / "000008")
    assert {name.split("/")[1].split(".")[0] for name in names} == {"transformer", "queries", "connector"}
    exported = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(t, names[f"model/{name}"]) for name, t in exported.items())
    assert load(str(run / "model")).lm.source == load(unified["blip3o"]).lm.source


def test_language_model_learns_answers_beside_it(one_rank, unified):
    rows, lm = run_folder.rows(one_rank / "talk"), load(unified["blip3o"]).lm
    asked = worlds.read("shapes-qa", 1, 0, 16, 32)  # the first 16 of the stream of --seed 1
    with torch.no_grad():
        assert rows[0]["loss_text"] == pytest.approx(pretrain.answer_loss(lm, asked, False).item(), rel=1e-4)
    losses = [row["loss_text"] for row in rows[:-1]]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:2]), losses
    assert np.mean([row["loss"] for row in rows[-5:-1]]) < 0.9 * rows[0]["loss"]
    config = json.loads((one_rank / "talk" / "model" / "config.json").read_text())
    assert config["lm"] == "./lm"
    trained = models.load_lm(str(one_rank / "talk" / "model" / "lm"), "cpu", torch.float32)
    with torch.no_grad():
        before, after = (pretrain.answer_loss(m, asked, False).item() for m in (lm, trained))
    assert after < 0.8 * before  # on what it has seen


def test_language_model_alone_and_its_weight(one_rank):
    first, third = (run_folder.rows(one_rank / name) for name in ("weight1", "weight3"))
    assert "loss" not in first[0] and first[0]["loss_text"] == third[0]["loss_text"] > 0 and "eval_loss" in first[0]
    assert third[0]["grad_norm"] == pytest.approx(3 * first[0]["grad_norm"], rel=1e-4)
    names = full(one_rank / "weight1" / "checkpoints" / "000001")
    assert {name.split("/")[1].split(".")[0] for name in names} == {"lm"}


def test_cold_start_of_refining_a_prompt(one_rank, unified):
    rows, lm = run_folder.rows(one_rank / "cot"), load(unified["blip3o"]).lm
    asked = worlds.read("shapes-cot", 1, 0, 16, 32)
    with torch.no_grad():
        assert rows[0]["loss_text"] == pytest.approx(pretrain.answer_loss(lm, asked, True).item(), rel=1e-4)
    assert rows[-2]["loss_text"] < 0.6 * rows[0]["loss_text"] and rows[-2]["loss"] < 0.9 * rows[0]["loss"]
    assert "eval_loss" in rows[0] and "eval_loss_edit" not in rows[0]
    # Pictures are drawn from the answers: the validation loss is that of held-out captions.
    captions = {m["prompt"] for m in shapes.held_out_prompts()}
    held_out = worlds.read("shapes-cot", 0, 0, 2, 32, held_out=True)
    assert all(row["answer"] in captions for row in held_out)
    assert rows[0]["eval_loss"] == pytest.approx(validation_loss(unified["blip3o"], held_out, "answer"), rel=1e-5)


def assert_trained(run, suffixes):
    rows = run_folder.rows(run)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for suffix in ("", "_edit"):
        assert all((f"eval_{name}{suffix}" in rows[2]) == (suffix in suffixes) for name in ("loss", "reward"))
    assert all(0 < row["loss"] < 5 and 0 < row["grad_norm"] for row in rows[:2])
    assert (run / "model" / "model_index.json").exists()


def test_a_model_that_only_edits_trains_through_it(one_rank):
    assert_trained(one_rank / "tiny-kontext", ["_edit"])


@pytest.mark.slow
def test_other_families_train_through_it(tmp_path):
    size, both = dict(num_iterations=2, eval_size=2, save_every=100), dict(edit_data="shapes-edit")  # klein does both
    models = {"tiny-klein": both, "tiny-sd3": {}, "tiny-sana": {}}
    processes.run(train_all, [arguments(tmp_path / name, name, **size, **own) for name, own in models.items()])
    for name, own in models.items():
        assert_trained(tmp_path / name, ["", "_edit"] if own else [""])


@pytest.mark.parametrize("name", ["draw", "talk", "meta"])
def test_two_ranks_are_one_rank_with_twice_the_tiles(one_rank, two_ranks, name):
    found, wanted = metrics(two_ranks / name), metrics(one_rank / name)
    assert found[0].keys() == wanted[0].keys() and len(found) == 3
    for one, two in zip(wanted[:2], found[:2]):
        for metric, value in one.items():
            # In a picture one of 32 x 32 x 3 levels may flip.
            drawn = metric.startswith(("eval_reward", "eval_strict", "eval_unchanged"))
            tolerance = dict(abs=1e-3) if drawn else dict(rel=2e-4 if two["iteration"] else 2e-5)
            assert two[metric] == pytest.approx(value, **tolerance), metric
    if name != "draw":
        return
    folders = [run / name / "checkpoints" / "000001" for run in (one_rank, two_ranks)]
    assert (folders[1] / "rank-00001.safetensors").exists()
    one, two = (full(folder) for folder in folders)
    assert one.keys() == two.keys()
    gradients = [name for name in one if name.endswith("/exp_avg")]  # after one update: a tenth of the gradient
    a, b = (torch.cat([tensors[name].flatten() for name in gradients]) for tensors in (one, two))
    assert a.norm() > 0 and (a - b).norm() < 2e-5 * a.norm()
    assert json.loads((folders[1] / "state.json").read_text())["cursor"] == 16


# ----------------------------------------------------------------------------------------------------------------------
# Noise levels


def train_and_record(runs):
    """Noise levels, noise seeds and whether the caption was dropped, of every image that each run trains on."""
    found, loss = [], pretrain.flow_matching_loss

    def record(model, cond, x0, sigma_B, seed_B):
        null = model.encode([""])
        name = "clip" if "clip" in cond else "text"
        dropped = (cond[name] == null[name]).flatten(1).all(dim=1)
        found[-1].append(torch.stack([sigma_B.double(), seed_B.double(), dropped.double()]))
        cond = {name: rows[:2] for name, rows in cond.items()}
        return loss(model, cond, x0[:2], sigma_B[:2], seed_B[:2])

    pretrain.flow_matching_loss = record
    for args in runs:
        found.append([])
        main(args)
    return [torch.cat(run, dim=1) for run in found]


def test_noise_levels_and_dropped_captions(tmp_path):
    sizes = dict(batch_size=150, micro_batch_size=75, num_iterations=3, eval_size=2, **QUIET)
    normal = dict(sigma_mean=0.4, sigma_std=1.3, text_dropout=0.25)
    runs = [arguments(tmp_path / "normal", "tiny-flux", **sizes | normal)]
    runs += [arguments(tmp_path / "uniform", "tiny-sana", sigma_distribution="uniform", **sizes)]
    (recorded,) = processes.run(train_and_record, runs)
    limit = 1.63 / math.sqrt(450)  # Kolmogorov-Smirnov, 1 %

    def distance(values):
        return (values.sort().values - (torch.arange(450) + 0.5) / 450).abs().max().item()

    sigma, seed, dropped = recorded[0]
    assert len(sigma) == 450 == len(seed.unique()) == len(sigma.unique())
    assert distance(torch.special.ndtr((torch.logit(sigma) - 0.4) / 1.3)) < limit
    assert abs(dropped.mean().item() - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 450)
    assert abs(torch.corrcoef(torch.stack([sigma, dropped]))[0, 1].item()) < 3 / math.sqrt(450)  # independent draws

    sigma, seed, dropped = recorded[1]
    model = load("tiny-sana")
    schedule, shift = model.sigmas(1000, 32, 32)[:-1].float().double(), model.scheduler.config.shift

    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)

    # The 1,000 levels before 0, of a range that diffusers has shifted once already (models/sana.py).
    least = shifted(torch.tensor(0.001, dtype=torch.float64))
    closed = shifted(1 + (least - 1) * torch.arange(1000, dtype=torch.float64) / 999)
    torch.testing.assert_close(schedule, closed, atol=1e-5, rtol=0)
    place = torch.searchsorted(-schedule, -sigma)
    assert torch.equal(schedule[place], sigma) and len(seed.unique()) == 450 and place.max() > 980 > 20 > place.min()
    assert distance((place + 0.5) / 1000) < limit
    # The number of the image says which level it gets.
    uniform = ((fold_seed(1, pretrain.SIGMA, torch.arange(450)) % 2**24).double() + 0.5) / 2**24
    assert torch.equal((uniform * 1000).long(), place)


def test_noise_levels_of_one_image_are_spread():
    args, index, ramp = (
        pretrain.Args(noise_levels=4, sigma_mean=0.3, sigma_std=2.0),
        torch.arange(500),
        torch.arange(8.0),
    )
    sigma = pretrain.noise_levels(args, index, ramp)
    assert sigma.shape == (2000,) and sigma.dtype == torch.float32
    share = torch.special.ndtr((torch.logit(sigma.double()) - 0.3) / 2).view(500, 4)
    assert torch.equal((share * 4).long(), torch.arange(4).expand(500, 4))  # one in each quarter
    spread = share.flatten().sort().values - (torch.arange(2000) + 0.5) / 2000
    assert spread.abs().max() < 1.63 / math.sqrt(500)
    assert torch.equal(pretrain.noise_levels(args, index[7:9], ramp), sigma[28:36])
    found = pretrain.noise_levels(replace(args, sigma_distribution="uniform"), index, ramp).view(500, 4)
    assert torch.equal(found.long() // 2, torch.arange(4).expand(500, 4)) and len(found.unique()) == 8
    one = pretrain.noise_levels(replace(args, noise_levels=1), index, ramp)
    assert torch.logit(one.double()).mean().item() == pytest.approx(0.3, abs=4 * 2 / math.sqrt(500))


@pytest.mark.slow
def test_loss_falls_from_nothing(tmp_path):
    sizes = dict(batch_size=16, micro_batch_size=16, num_iterations=30, eval_every=100, save_every=100)
    sizes |= dict(learning_rate=3e-3, warmup_updates=4)
    args = replace(arguments(tmp_path / "run", ema_decay=0.9, **sizes), model=str(tmp_path / "start"))
    processes.run(train_from_nothing, args)
    rows = run_folder.rows(tmp_path / "run")
    losses = [row["loss"] for row in rows[:-1]]
    assert 1.5 < losses[0] < 2.5  # it predicts 0 at first: the variance of eps - x0, with x0 normalised
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert "learning_rate" not in rows[-1] and "eval_strict" in rows[-1] and rows[-1]["iteration"] == 30


def train_from_nothing(args):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(models.ALIASES["tiny-flux"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.init_transformer(pipeline.transformer)
    pipeline.save_pretrained(args.model)
    main(args)


# ----------------------------------------------------------------------------------------------------------------------
# Validation loss


@torch.no_grad()
def validation_loss(folder, rows, text="prompt"):
    """Mean squared error of the velocity of rows 0, 1, ... at their fixed noise levels, one at a time."""
    model, errors = load(folder), []
    for i, row in enumerate(rows):
        sigma, index = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9][i % 5]]), torch.tensor([i])
        pixels = torch.from_numpy(np.asarray(row["image"]).copy()).permute(2, 0, 1)[None] / 255
        source = row["source"] and torch.from_numpy(np.asarray(row["source"]).copy()).permute(2, 0, 1)[None] / 255
        seeds = fold_seed(0, pretrain.EVAL_REFERENCE, index)
        x0, eps = model.encode_images(pixels), philox_normal(fold_seed(0, pretrain.EVAL_LOSS, index), (8, 8, 8))
        assert x0.shape == eps.shape
        cond = model.condition(model.encode([row[text]], source, seeds=seeds))
        v = model.velocity((1 - sigma) * x0 + sigma * eps, sigma, cond)
        errors.append((v - (eps - x0)).square().mean().item())
    return sum(errors) / len(errors)


def test_validation_loss_is_that_of_held_out_images_at_fixed_noise_levels(one_rank, two_ranks, unified):
    for run in (one_rank, two_ranks):  # before the first update; 6 images in tiles of 4
        row = run_folder.rows(run / "draw")[0]
        for name, metric in (("shapes", "eval_loss"), ("shapes-edit", "eval_loss_edit")):
            expected = validation_loss(unified["blip3o"], worlds.read(name, 0, 0, 6, 32, held_out=True))
            assert row[metric] == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted runs


def train_and_stop(args, call):
    """main, which is told to stop in the n-th call of its loss."""
    loss, count = pretrain.flow_matching_loss, iter(range(1, call + 1))

    def stopping(*arguments):
        if next(count, None) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    pretrain.flow_matching_loss = stopping
    main(args)


def stop_and_resume(args, stops, ranks=1):
    """A run that is stopped in those calls of its loss, after which it has made so many iterations, and resumed."""
    for call, iteration in stops:
        with pytest.raises(SystemExit) as stopped:
            processes.run(train_and_stop, args, call, ranks=ranks)
        assert stopped.value.code == 143 and [row["iteration"] for row in metrics(args.out)] == list(range(iteration))
        assert checkpoint.iteration(checkpoint.latest(args.out)) == iteration
        args = resumed(args.out)
    processes.run(train, args, ranks=ranks)


def test_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    processes.run(train, arguments(straight, decay_iterations=3))
    args = arguments(run, decay_iterations=3, save_every=100)
    stop_and_resume(args, [(3, 1), (2, 2)])  # 2 tiles an iteration: before its last tile, and in it
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


def test_stopped_unified_run_goes_on_as_if_it_had_not(tmp_path, unified):
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = dict(train_lm=True, text_data="shapes-qa", eval_text="shapes-qa", num_steps=1, eval_size=2, eval_every=3)
    processes.run(train, arguments(straight, unified["blip3o"], **options))
    stop_and_resume(arguments(run, unified["blip3o"], save_every=100, **options), [(3, 1)])
    assert_same_end(run, straight)
    state = json.loads((checkpoint.latest(run) / "state.json").read_text())
    assert state["data"] == [{"images": {"number": 6}, "text": {"number": 6}}]


def png(image):
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def write_data(folder, count=10):
    """tars/{0,1,2}.tar of `count` captioned pictures each, in three aspect ratios, and edits.jsonl of 12 edits."""
    for name in ("tars", "edits"):
        (folder / name).mkdir(parents=True)
    sizes = [(32, 32), (48, 32), (32, 56)]
    for number in range(3):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
            for n, row in enumerate(worlds.read("shapes", 5, number * count, count, 32)):
                members = {"png": png(row["image"].resize(sizes[n % 3])), "txt": row["prompt"].encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    lines = []
    for n, row in enumerate(worlds.read("shapes-edit", 5, 0, 12, 32)):
        for role in ("image", "source"):
            row[role].resize(sizes[n % 2]).save(folder / "edits" / f"{n}-{role}.png")
        names = {role: f"edits/{n}-{role}.png" for role in ("image", "source")}
        lines.append(json.dumps(names | {"prompt": row["prompt"]}) + "\n")
    (folder / "edits.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stopped_run_on_files_goes_on_as_if_it_had_not(tmp_path, unified, ranks):
    write_data(tmp_path)
    tars, edits = str(tmp_path / "tars" / "*.tar"), str(tmp_path / "edits.jsonl")
    options = dict(data=tars, edit_data=edits, edit_share=0.4, eval_data=tars, eval_edit_data=edits, shuffle_buffer=7)
    options |= dict(num_iterations=2, batch_size=4, micro_batch_size=2, eval_size=4, reward="")
    straight, run = tmp_path / "straight", tmp_path / "run"
    processes.run(train, arguments(straight, unified["blip3o"], **options), ranks=ranks)
    stop_and_resume(arguments(run, unified["blip3o"], save_every=100, **options), [(3, 1)], ranks)
    assert_same_end(run, straight)
    rows = metrics(run)
    assert {"eval_loss", "eval_loss_edit"} <= rows[2].keys() and "eval_reward" not in rows[2]
    places = json.loads((checkpoint.latest(run) / "state.json").read_text())["data"]
    assert [[s["rank"] for s in place["images"]["stream"]["streams"]] for place in places] == [
        [rank, rank] for rank in range(ranks)
    ]
    assert all(s["seen"] > 0 for place in places for s in place["images"]["stream"]["streams"])


# ----------------------------------------------------------------------------------------------------------------------
# Bad data


def write_bad_data(folder):
    """A truncated tar, and a .jsonl with three bad lines among good ones; returns how to repair both."""
    write_data(folder)
    whole = (folder / "tars" / "0.tar").read_bytes()
    (folder / "mixed").mkdir()
    (folder / "mixed" / "cut.tar").write_bytes(whole[: len(whole) // 2 - len(whole) // 2 % 512 - 100])
    zero = png(Image.new("RGB", (1, 1)))
    header = bytearray(zero)
    header[16:20] = bytes(4)  # the width
    good = worlds.read("shapes", 6, 0, 9, 32)
    lines = []
    for n, row in enumerate(good):
        data = png(row["image"])
        data = {1: data[: len(data) // 2], 3: bytes(header)}.get(n, data)
        (folder / f"{n}.png").write_bytes(data)
        line = {"image": f"../{n}.png"} | ({} if n == 5 else {"prompt": row["prompt"]})
        lines.append(json.dumps(line) + "\n")
    (folder / "mixed" / "lines.jsonl").write_text("".join(lines))

    def repair():
        (folder / "mixed" / "cut.tar").write_bytes(whole)
        for n in (1, 3):
            good[n]["image"].save(folder / f"{n}.png")
        lines[5] = json.dumps({"image": "../5.png", "prompt": "a red circle"}) + "\n"
        (folder / "mixed" / "lines.jsonl").write_text("".join(lines))

    return repair


def train_with(enough, args, curves=False):
    """main, which judges the share of bad samples after `enough` of them; what it wrote to stderr. SystemExit as it
    ends."""
    stream.ENOUGH = enough
    with open(f"{args.out}.stderr", "a") as file:
        os.dup2(file.fileno(), 2)
    if curves:
        pretrain.main(args)
    else:
        main(args)


def test_bad_samples_are_skipped_named_and_counted_until_they_are_too_many(tmp_path):
    repair = write_bad_data(tmp_path)
    source = str(tmp_path / "mixed" / "*")
    # 4 of 13 or so are bad; the run sees 3 epochs of them.
    options = dict(data=source, num_iterations=5, batch_size=4, micro_batch_size=4, **QUIET | dict(save_every=2))
    run = tmp_path / "run"
    processes.run(train_with, 1000, arguments(run, **options))
    rows, said = run_folder.rows(run), (tmp_path / "run.stderr").read_text()
    skipped = [line[line.index("skipped") :] for line in said.splitlines() if "skipped" in line]
    for words in ("lines.jsonl:2: expected a picture that PIL can read", "lines.jsonl:4: expected a picture that PIL"):
        assert any(words in line for line in skipped), words
    assert any("lines.jsonl:6: expected a prompt, got none" in line for line in skipped)
    assert any("cut.tar: expected a whole tar" in line for line in skipped)
    counts = [row["bad_samples"] for row in rows[:-1]]
    assert counts == sorted(counts) and 4 <= counts[-1] <= len(skipped) and len(rows) == 6

    run = tmp_path / "too-many"
    args = arguments(run, **options | dict(num_iterations=8))
    with pytest.raises(SystemExit) as ended:
        processes.run(train_with, 24, args)
    message = ended.value.code
    assert message.startswith(f"error: {source}: ") and "more than the share max_bad=0.01" in message
    assert "\n" not in message and re.search(r"\d+ of 2\d samples are bad", message)
    made = len(run_folder.rows(run))
    assert 0 < made < 8 and not (run / "model").exists()
    start = checkpoint.iteration(checkpoint.latest(run))
    assert 0 < start <= made
    repair()
    processes.run(train_with, 1000, resumed(run), True)
    rows = run_folder.rows(run)
    assert [row["iteration"] for row in rows] == list(range(9)) and (run / "model" / "model_index.json").exists()
    assert Image.open(run / "curves.png").size[0] > 300
    assert rows[-2]["bad_samples"] <= rows[start]["bad_samples"] + 4  # none of what came after the repair


def test_process_that_ends_for_bad_data_has_exit_code_1(tmp_path):
    write_bad_data(tmp_path)
    args = arguments(tmp_path / "run", data=str(tmp_path / "mixed" / "*"), **QUIET | dict(save_every=1))
    (started,) = processes.start(train_with, 12, args)
    started.join(60)
    assert started.exitcode == 1 and checkpoint.latest(tmp_path / "run") is not None


# ----------------------------------------------------------------------------------------------------------------------
# Errors, before anything is loaded or written


def refusals(commands):
    """The message with which each command line ends."""
    messages, wrong = [], (RuntimeError, AssertionError)
    models.load = None  # nothing gets so far
    for argv in commands:
        try:
            defaults = pretrain.recipe(run_folder.peek(argv, "--model", "tiny-blip3o"))
            main(run_folder.command_line(defaults, argv, pretrain.__file__))
            messages.append("no error")
        except SystemExit as error:
            messages.append(str(error.code))
        except wrong as error:
            messages.append(repr(error))
    return messages


def test_what_cannot_be_is_one_message(tmp_path):
    write_data(tmp_path)
    tars, edits, none = str(tmp_path / "tars" / "*.tar"), str(tmp_path / "edits.jsonl"), str(tmp_path / "none.jsonl")
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a red circle"}\n' * 30)
    flux = ["--model", "tiny-flux"]
    belong = "--text-data and --train-lm belong together"
    cases = [
        (["--data", tars, "--edit-data", tars], f"--edit-data: {tmp_path}/tars/", "has no picture to edit; name its"),
        (["--data", tars, "--edit-data", edits, "--eval-edit-data", tars], "--eval-edit-data: ", "no picture to edit"),
        (["--text-data", "shapes-qa"], belong),
        (["--train-lm"], belong),
        (["--train-lm", "--text-data", tars], "--text-data: ", "has no answer; name its column, answer=NAME"),
        (["--task", "t2icot", "--data", "shapes-cot", "--train-lm"], "--task t2icot has no edits: add --edit-data ''"),
        (["--task", "t2icot", "--data", "shapes-cot", "--edit-data", ""], "--task t2icot", "add --train-lm"),
        (
            ["--task", "t2icot", "--data", tars, "--edit-data", "", "--train-lm"],
            "--data: ",
            "has no answer; name its column, answer=NAME",
        ),
        (
            ["--task", "t2icot", "--data", "shapes-cot", "--edit-data", "", "--train-lm", "--text-data", "shapes-qa"],
            belong,
        ),
        (["--no-train-dm"], "nothing would learn", "add --train-lm"),
        ([*flux, "--train-lm", "--text-data", "shapes-qa"], "--model tiny-flux is a diffusion model: --train-lm"),
        ([*flux, "--task", "t2icot"], "--task t2icot", "are for unified models"),
        ([*flux, "--no-train-dm"], "--no-train-dm", "are for unified models"),
        ([*flux, "--eval-text", "shapes-qa"], "--eval-text", "are for unified models"),
        (
            ["--model", "tiny-klein", "--edit-data", "shapes-edit", "--both-dropout", "0.1"],
            "--reference-dropout and --both-dropout must be 0 with --model tiny-klein",
        ),
        (["--text-dropout", "0.95"], "--text-dropout, --reference-dropout and --both-dropout must add up to 1 at most"),
        (["--data", tars], f"--data {tars} --edit-data shapes-edit: expected two shapes worlds, or none"),
        (["--edit-data", edits], f"--data shapes --edit-data {edits}: expected two shapes worlds, or none"),
        (["--data", "", "--edit-data", ""], "--data is empty: expected captioned pictures"),
        (["--data", none, "--edit-data", ""], "none.jsonl: no such file"),
        (["--data", tars, "--edit-data", none], "none.jsonl: no such file"),
        (["--eval-data", none], "none.jsonl: no such file"),
        (["--train-lm", "--text-data", none], "none.jsonl: no such file"),
        (["--eval-text", none], "none.jsonl: no such file"),
        (["--eval-prompts", none], "none.jsonl: no such file"),
        (["--data", str(tmp_path / "texts.jsonl"), "--edit-data", ""], "texts.jsonl: the first 20 samples are all bad"),
        (["--eval-prompts", "shapes-edit"], "--eval-prompts must be without pictures and --eval-edits with them"),
        (["--reward", "shape"], "unknown reward 'shape'"),
    ]
    run = tmp_path / "run"
    (messages,) = processes.run(refusals, [[*argv, "--out", str(run)] for argv, *_ in cases])
    for (argv, *expected), message in zip(cases, messages):
        assert message.startswith("error: ") and "\n" not in message, (argv, message)
        assert all(words in message for words in expected), (argv, message)
    assert not run.exists()


def refusals_of_models(commands):
    messages = []
    for args in commands:
        try:
            main(args)
            messages.append("no error")
        except SystemExit as error:
            messages.append(str(error.code))
    return messages


def test_data_that_do_not_suit_the_model_are_one_message(tmp_path):
    edits = dict(edit_data="shapes-edit", text_dropout=0.1)
    commands = [arguments(tmp_path / "run", "tiny-flux", **edits), arguments(tmp_path / "run", "tiny-kontext")]
    commands[1] = replace(commands[1], data="shapes")
    assert processes.run(refusals_of_models, commands)[0] == [
        "error: --edit-data: --model tiny-flux makes pictures from text; add --edit-data ''",
        "error: --data: --model tiny-kontext edits pictures; add --data '' and give --edit-data",
    ]
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Models that are made when they are first trained


def train_full_size(parts, commands):
    """main with tiny parts for large ones."""
    for variant in blip3o.VARIANTS:
        blip3o.VARIANTS[variant]["connector"] |= dict(num_layers=1, head_dim=32)
        models.FULL_SIZE[variant] = parts
    for args in commands:
        main(args)


def test_full_size_models_are_made_of_their_parts_in_the_run_folder(tmp_path, unified):
    parts = unified["lm"], unified["sana"]
    variants = list(blip3o.VARIANTS)
    options = dict(batch_size=2, micro_batch_size=2, num_iterations=1, seed=5, **QUIET, eval_size=2, num_steps=1)
    commands = [
        replace(arguments(tmp_path / variant, **options | dict(edit_data="shapes-edit")), model=variant)
        for variant in variants
    ]
    processes.run(train_full_size, parts, commands)
    made = {}
    for variant in variants:
        start = tmp_path / variant / "start"
        config = json.loads((start / "config.json").read_text())
        assert (config["model_type"], config["lm"], config["sana"]) == (variant, *parts)
        assert config["num_queries"] == 256
        made[variant] = (start / "model.safetensors").read_bytes()
        first = full(tmp_path / variant / "checkpoints" / "000000")
        for name, tensor in load_file(start / "model.safetensors").items():
            assert torch.equal(first[f"model/{name}"], tensor), name
        exported = json.loads((tmp_path / variant / "model" / "config.json").read_text())
        assert exported == config and json.loads((tmp_path / variant / "args.json").read_text())["model"] == variant
    # --seed makes it, and a resumed run takes what is there.
    blip3o.create(str(tmp_path / "other"), *parts, "metaquery", num_layers=1, head_dim=32, seed=5)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == made["metaquery"]
    again = [resumed(tmp_path / "metaquery", "--num-iterations", "2")]
    processes.run(train_full_size, parts, again)
    assert (tmp_path / "metaquery" / "start" / "model.safetensors").read_bytes() == made["metaquery"]
    assert [row["iteration"] for row in run_folder.rows(tmp_path / "metaquery")] == [0, 1, 2]
