"""Every tiny model runs the code that its large sibling runs: each alias is loaded, trained by every script on 1 and 2
ranks, and exported in the format that stock diffusers opens."""

import dataclasses
import math
import os
import sys
import time
import types

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file

import dance_grpo
import flow_grpo
import models
import rewards
from data import prompts as prompt_data
from models import run_folder

TINY = ["tiny-flux", "tiny-kontext", "tiny-klein", "tiny-sd3", "tiny-sana"]
EDITS, MAY_EDIT = ["tiny-kontext"], ["tiny-klein"]

COMMON = dict(num_iterations=3, group_size=2, micro_batch_size=2, num_steps=3, eval_num_steps=2, eval_size=4)
COMMON |= dict(eval_every=3, save_every=3, reward=("jpeg:500",), learning_rate=1e-3, warmup_updates=1)
SCRIPTS = {
    "flow_grpo": (flow_grpo, dict(sampler="flow_sde", noise_level=0.7, window_size=0, window_range=(0, 0))),
    "dance_grpo": (dance_grpo, dict(noise_level=1.0, timestep_fraction=0.5, guidance=2.0, lora_rank=2)),
}


def train(script, alias, out, **changes):
    """One run in this process, but for its curves; the rows of its metrics.jsonl."""
    module, own = SCRIPTS[script]
    run_folder.curves = lambda *_: None
    module.main(dataclasses.replace(module.recipe(alias), out=str(out), **COMMON | own | changes))
    return run_folder.rows(str(out))


def call(script, argv):
    """What the script's last lines do."""
    module = SCRIPTS[script][0]
    defaults = module.recipe(run_folder.peek(argv, "--model", "tiny-flux"))
    module.main(run_folder.command_line(defaults, argv, module.__file__))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_all(folder, alias, num_prompts):
    return {name: train(name, alias, folder / name, num_prompts=num_prompts) for name in SCRIPTS}


def weights(run, iteration):
    """What a run trains, at the start of an iteration; from all ranks."""
    found = {}
    for path in sorted((run / "checkpoints" / f"{iteration:06d}").glob("rank-*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.startswith("model/"):
                found[f"{path.stem} {name}"] = tensor
    return found


def open_exports(folder, alias):
    """The classes of the exported parts, and the weights that stock diffusers reads: all of flow_grpo.py's export, the
    adapter of dance_grpo.py's."""
    import diffusers

    stock = diffusers.DiffusionPipeline.from_pretrained(folder / "flow_grpo" / "model")
    kinds = {name: type(part).__name__ for name, part in stock.components.items()}
    full = {name: tensor.clone() for name, tensor in stock.transformer.state_dict().items()}
    base = diffusers.DiffusionPipeline.from_pretrained(models.folder_or_id(alias))
    changed = sum(not torch.equal(tensor, full[name]) for name, tensor in base.transformer.state_dict().items())
    base.load_lora_weights(folder / "dance_grpo" / "model")
    lora = {name: p.detach().clone() for name, p in base.transformer.named_parameters() if "lora_" in name}
    return type(stock).__name__, kinds, changed / len(full), full, lora


@pytest.mark.parametrize("alias", TINY)
def test_tiny_model_trains_on_one_and_two_ranks(tmp_path, alias):
    runs = {}
    for ranks in (1, 2):  # the same two prompts
        (tmp_path / str(ranks)).mkdir()
        runs[ranks] = processes.run(train_all, tmp_path / str(ranks), alias, 2 // ranks, ranks=ranks)[0]
    for script in SCRIPTS:
        for ranks in (1, 2):
            rows, folder = runs[ranks][script], tmp_path / str(ranks) / script
            assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
            for row in rows[:3]:
                assert row["on_policy_err"] <= 1e-5 and row["skipped_updates"] == 0, row
                assert row["reward_std"] > 0 and row["grad_norm"] > 0 and row["nan_reward_frac"] == 0, row
            assert all(math.isfinite(rows[i]["eval_reward"]) for i in (0, 3))
            before, after = weights(folder, 0), weights(folder, 3)
            assert before.keys() == after.keys() and len(before) > 10
            assert all(tensor.isfinite().all() for tensor in after.values())
            moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
            assert len(moved) > 0.8 * len([name for name, tensor in after.items() if tensor.numel()])
        # With tiles of one size, the samples of both are the same, and so is their gradient.
        one, two = runs[1][script][0], runs[2][script][0]
        assert one["reward"] == pytest.approx(two["reward"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)

    kind, kinds, changed, full, lora = processes.run(open_exports, tmp_path / "2", alias)[0]
    assert models.PIPELINES[kind][0] == models.family(alias)
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert kinds[part] != "NoneType", part
    assert changed > 0.8 and all(tensor.isfinite().all() for tensor in full.values())
    assert len(lora) > 4 and all(tensor.isfinite().all() for tensor in lora.values())
    assert all(tensor.any() for name, tensor in lora.items() if "lora_A" in name)
    assert sum(bool(tensor.any()) for name, tensor in lora.items() if "lora_B" in name) > 0.4 * len(lora)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_all():
    found = {}
    for alias in TINY:
        model = models.load(alias, torch.device("cpu"), torch.float32)
        size = sum(p.numel() for part in model.parts.values() for p in part.parameters())
        found[alias] = models.pipeline_class(alias), model.reference_images, list(model.parts), size
    return found


def test_every_alias_is_known():
    assert TINY == [alias for alias in models.ALIASES if alias.startswith("tiny-")]
    for alias, (kind, reference_images, parts, size) in processes.run(load_all)[0].items():
        assert models.family(alias) == alias.removeprefix("tiny-") == models.PIPELINES[kind][0]
        assert reference_images == (
            "required" if alias in EDITS else "optional" if alias in MAY_EDIT else "none"
        ) and parts == ["transformer"]
        assert 50_000 < size < 1_500_000
        for script, _ in SCRIPTS.values():
            assert script.recipe(alias).prompts == ("shapes-edit" if alias in EDITS + MAY_EDIT else "shapes")


def build_together(folder, alias):
    """Each rank wants the model at the same moment, in an empty assets folder."""
    models.ASSETS = str(folder)
    models.ALIASES[alias] = os.path.join(folder, alias)
    (folder / f"here-{os.environ['RANK']}").touch()
    while len(list(folder.glob("here-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.001)
    missing = not os.path.exists(models.ALIASES[alias])
    kind = models.pipeline_class(alias)
    model = models.load(alias, torch.device("cpu"), torch.float32)
    return missing, kind, {name: p.detach() for name, p in model.parts["transformer"].named_parameters()}


@pytest.mark.parametrize("alias", ["tiny-sd3", "tiny-kontext"])
def test_processes_may_build_a_model_at_the_same_time(tmp_path, alias):
    results = processes.run(build_together, tmp_path, alias, ranks=2)
    assert all(missing for missing, _, _ in results)
    (_, kind, first), (_, _, second) = results
    assert models.PIPELINES[kind][0] == models.family(alias)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here-0", "here-1", alias]  # nothing half-built
    assert oct((tmp_path / alias).stat().st_mode)[-3:] == "755"


# ----------------------------------------------------------------------------------------------------------------------
# Pictures to edit


def refusals(commands):
    messages = []
    for script, *argv in commands:
        try:
            call(script, argv)
            messages.append("no error")
        except SystemExit as error:
            messages.append(str(error.code))
    return messages


def test_prompts_that_do_not_suit_the_model_are_one_message(tmp_path):
    none = "error: --model edits pictures and --prompts have none: expected e.g. shapes-edit, data/edits.jsonl"
    some = "error: --prompts have images and --model makes pictures from text: expected a model that edits"
    schedule = "error: --sigma-schedule single: only sd3 models have one, --model tiny-flux has not"
    cases = []
    for script in SCRIPTS:
        cases += [
            ([script, "--model", "tiny-kontext", "--prompts", "shapes", "--eval-prompts", "shapes"], none),
            ([script, "--model", "tiny-kontext", "--eval-prompts", "shapes"], none),
            ([script, "--model", "tiny-flux", "--prompts", "shapes-edit", "--eval-prompts", "shapes-edit"], some),
            ([script, "--model", "tiny-sana", "--prompts", "shapes-edit"], some),
            ([script, "--model", "tiny-sd3", "--eval-prompts", "shapes-edit"], some),
            ([script, "--model", "tiny-flux", "--sigma-schedule", "single"], schedule),
        ]
    run = tmp_path / "run"
    (messages,) = processes.run(refusals, [[*argv, "--out", str(run)] for argv, _ in cases])
    for (argv, expected), message in zip(cases, messages):
        assert message == expected, argv
    assert not run.exists()  # before there is a run


def train_and_look_at_sources(folder, alias):
    """A run with a reward of its own, which gives back what it is shown; the condition of every sample beside it."""
    shown, conditions = [], []

    def score(samples, prompts, metadata):
        shown.extend(zip(prompts, metadata, samples["source"], samples["image"], strict=True))
        return torch.tensor([float(image.mean()) for image in samples["image"]])

    score.needs, score.strict = ("image", "source"), None
    sys.modules["rewards.mean"] = types.SimpleNamespace(load=lambda device: score)
    rewards.REWARDS["mean"] = rewards.Reward("mean:load", score.needs)
    rewards.try_out = lambda *_: None
    for module, _ in SCRIPTS.values():

        def rollout_and_record(model, cond, *args, original=module.rollout):
            conditions.extend(cond["image"].clone())
            return original(model, cond, *args)

        module.rollout = rollout_and_record
    small = dict(num_iterations=2, num_prompts=3, eval_every=1, micro_batch_size=3, eval_size=5, reward=("mean",))
    for script in SCRIPTS:
        train(script, alias, folder / script, **small)

    model = models.load(alias, torch.device("cpu"), torch.float32)
    sources = torch.from_numpy(np.stack([source for _, _, source, _ in shown])).permute(0, 3, 1, 2).float() / 255
    distance = (model.encode_images(sources) - torch.stack(conditions)).abs().amax((1, 2, 3)).max().item()
    sets = [prompt_data.load("shapes-edit", split) for split in ("train", "eval")]
    rows = [row for part in sets for row in (part[i] for i in range(len(part)))]
    known = {}
    for row in rows:
        known.setdefault(np.asarray(row["image"]).tobytes(), []).append((row["prompt"], row["metadata"]))
    own = [(prompt, metadata) in known[source.tobytes()] for prompt, metadata, source, _ in shown]
    return own, distance, len({source.tobytes() for _, _, source, _ in shown}), len(rows), len(known)


@pytest.mark.parametrize("alias", EDITS + MAY_EDIT)
def test_every_sample_is_made_and_judged_with_its_own_picture(tmp_path, alias):
    own, distance, distinct, size, known = processes.run(train_and_look_at_sources, tmp_path, alias)[0]
    # Of each script: three evaluations of 5, two rollouts of three prompts with two samples each.
    assert len(own) == 2 * (3 * 5 + 2 * 6) and all(own)
    assert 5 + 6 <= distinct <= 5 + 2 * 6 and known > 0.9 * size
    assert distance < 1e-5  # what the model saw is what the reward saw


def train_from_text_and_with_single_shift(folder):
    sigmas = []
    for module, _ in SCRIPTS.values():

        def rollout_and_record(model, cond, x, schedule, *args, original=module.rollout):
            sigmas.append((schedule[0].tolist(), "image" in cond))
            return original(model, cond, x, schedule, *args)

        module.rollout = rollout_and_record
    small = dict(num_iterations=1, num_prompts=1, group_size=6, eval_num_steps=3)
    rows = {}
    for script in SCRIPTS:
        for schedule in ("stock", "single"):
            rows[script, schedule] = train(
                script, "tiny-sd3", folder / f"{script}-{schedule}", sigma_schedule=schedule, **small
            )
        text = dict(prompts="shapes", eval_prompts="shapes")
        rows[script, "klein"] = train(script, "tiny-klein", folder / f"{script}-klein", **small | text)
    return rows, sigmas


def test_single_shift_of_sd3_and_klein_from_text(tmp_path):
    rows, sigmas = processes.run(train_from_text_and_with_single_shift, tmp_path)[0]
    for (script, kind), run in rows.items():
        assert len(run) == 2 and run[0]["on_policy_err"] <= 1e-5 and run[0]["grad_norm"] > 0, (script, kind)
    calls = len(sigmas) // 6  # of each run: evaluations and one rollout, all with three steps
    t = np.linspace(1, 0, 4)
    single = 3 * t / (1 + 2 * t)
    for n, (found, has_image) in enumerate(sigmas):
        kind = ("stock", "single", "klein")[n // calls % 3]
        assert not has_image and found[0] == 1 and found[-1] == 0
        assert (np.abs(np.array(found) - single).max() < 1e-6) == (kind == "single"), (kind, found)
