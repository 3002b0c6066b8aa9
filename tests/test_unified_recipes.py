"""runs/unified_recipes.sh: every command is one that grpo_unified.py takes, with the numbers of the paper or code that
it names, and does what it says on models small enough to run here."""

import dataclasses
import json
import math
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from PIL import Image

import grpo_unified
import models
import rewards
from data import geneval
from data import prompts as prompt_data
from models import run_folder

ROOT = Path(grpo_unified.__file__).parent
SCRIPT = ROOT / "runs" / "unified_recipes.sh"

# What all recipes have in common, UniRL-Zero (arXiv 2510.17937, repository UniRL, branch master) and PromptRL (arXiv
# 2602.01382, branch prompt_rl) alike. The learning rates of their schedules begin at those below.
COMMON = dict(group_size=8, num_prompts=1, num_updates=1, max_new_tokens=512, temperature=1.0, num_iterations=1200)
COMMON |= dict(advantage_std="group", advantage_clip=5.0, lm_loss="grpo", lm_kl="k3", lm_kl_coef=0.01, clip_eps=1e-4)
COMMON |= dict(sampler="flow_sde", shared_noise=False, weight_decay=0.0, lora_rank=0, ema_decay=0.0, dtype="bf16")
COMMON |= dict(image_guidance=1.0, keep_original=0, refine=False, sigma_schedule="stock", decay_iterations=0)

# Noisy steps: (of how many, first, end); UniRL-Zero's last one has no noise here.
ALL_OF_10, ALL_OF_20, ODE_10 = (10, 0, 9), (20, 0, 19), (10, None, None)
GENEVAL, EDITS = "data/geneval_train.jsonl", "data/edits.jsonl"
SEES = dict(task="i2i", refine=True, prompts=EDITS)

# UniRL, train_blip3o_*.sh and unirl/trainer/grpo_blip3o_trainer.py: 1024 pixels, noise level 0.7, guidance 3.5.
BLIP3O = dict(model="blip3o", lm="", steps=ALL_OF_10, noise_level=0.7, resolution=1024, guidance=3.5, prompts=GENEVAL)
# UniRL, train_qmatters.sh and unirl/trainer/grpo_pmatters_trainer.py
PAIR = dict(lm="qwen2.5-vl-3b", task="t2icot", resolution=512, guidance=3.5, prompts=GENEVAL)
PAIR |= dict(reward=("geneval", "format"))
LM_ONLY = PAIR | dict(train="lm", steps=ODE_10, lm_learning_rate=1e-6)
KONTEXT = LM_ONLY | SEES | dict(model="kontext", resolution=1024, guidance=2.5)
# PromptRL, scripts/train/*.sh and README: noise level 0.8.
PROMPTRL = PAIR | dict(train="joint", noise_level=0.8, kl_coef=1e-2, learning_rate=2e-7)
EDIT = PROMPTRL | SEES | dict(keep_original=2, lm_learning_rate=3e-7, resolution=1024, reward=("editreward", "format"))

RECIPES = {
    "blip3o-t2i": BLIP3O
    | dict(task="t2i", train="dm", learning_rate=1e-5, kl_coef=4e-3, reward=("geneval",)),  # train_blip3o_t2i.sh
    "blip3o-jpeg": BLIP3O  # train_blip3o_t2i_jepg.sh
    | dict(task="t2i", train="dm", learning_rate=1e-5, kl_coef=4e-3, reward=("jpeg",), prompts="data/scenes.txt"),
    "blip3o-t2icot": BLIP3O  # train_blip3o_t2icot.sh; the rates are the trainer's
    | dict(task="t2icot", train="joint", learning_rate=3e-6, lm_learning_rate=5e-7, kl_coef=4e-3)
    | dict(reward=("geneval", "format")),
    # train_blip3o_i2i.sh; 4 and guidance 3 are the trainer's
    "blip3o-i2i": BLIP3O
    | dict(task="i2i_cycle", train="dm", learning_rate=1e-5, kl_coef=3e-4, guidance=3.0, prompts=EDITS)
    | dict(reward=("clip_direction:4", "recon_clip_sim")),
    "flux-lm": LM_ONLY | dict(model="flux"),  # PMattersGRPOTrainer
    "flux-dm": PAIR  # PMattersGRPODiffusionTrainer
    | dict(model="flux", task="t2i", train="dm", steps=ALL_OF_20, noise_level=1.0, learning_rate=1e-5, kl_coef=3e-4)
    | dict(reward=("geneval",)),
    "flux-joint": PAIR  # PMattersGRPOJointTrainer
    | dict(model="flux", train="joint", steps=ALL_OF_20, noise_level=1.0, learning_rate=1e-7, lm_learning_rate=3e-7)
    | dict(kl_coef=3e-4),
    "sd3-lm": LM_ONLY | dict(model="sd3.5"),  # PMattersGRPOTrainer and sd3_service
    "sana-lm": LM_ONLY | dict(model="sana"),
    "kontext-lm": KONTEXT | dict(reward=("editreward",)),  # QwenKontextGRPOTrainer
    "kontext-cycle": KONTEXT  # QwenKontextCycleGRPOTrainer
    | dict(task="i2i_cycle", reward=("clip_direction", "recon_clip_sim")),
    # README and geneval_grpo_flux.sh; 512 pixels are the paper's
    "flux-geneval": PROMPTRL | dict(model="flux", steps=(20, 0, 10), lm_learning_rate=1e-6),
    "kontext-joint": EDIT | dict(model="kontext", steps=(8, 0, 4), guidance=2.5),  # edit_grpo.sh
    "klein-geneval": PROMPTRL  # geneval_grpo_klein.sh
    | dict(model="klein", steps=(20, 0, 8), lm_learning_rate=1e-6, guidance=4.0, resolution=1024),
    "klein-joint": EDIT | dict(model="klein", steps=(8, 0, 2), guidance=3.5),  # edit_grpo_klein.sh
}


def bash(*words, **environment):
    """The script with a torchrun that prints its arguments, one a line."""
    stub = 'torchrun() { printf \'%s\\n\' "$@"; }; export -f torchrun; bash "$0" "$@"'
    environment = {name: value for name, value in os.environ.items() if name not in ("BLIP3O", "GPUS")} | environment
    return subprocess.run(
        ["bash", "-c", stub, str(SCRIPT), *words], capture_output=True, text=True, env=environment, timeout=20
    )


def parse(argv):
    """What the last lines of grpo_unified.py make of a command line."""
    defaults = grpo_unified.recipe(run_folder.peek(argv, "--model", "tiny-flux"), run_folder.peek(argv, "--lm", ""))
    return run_folder.command_line(defaults, argv, grpo_unified.__file__)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """name -> (what torchrun gets before the script, Args), where nothing has run yet"""
    found = {}
    for name in RECIPES:
        result = bash(name)
        assert result.returncode == 0 and not result.stderr, (name, result.stderr)
        words = result.stdout.splitlines()
        at = words.index("grpo_unified.py")
        found[name] = words[:at], words[at + 1 :]
    with pytest.MonkeyPatch.context() as here:
        here.chdir(tmp_path_factory.mktemp("empty"))
        return {name: (launcher, parse(argv)) for name, (launcher, argv) in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The script


def test_every_recipe_is_in_the_table_and_in_the_usage():
    labels = re.findall(r"^    ([a-z0-9-]+)\)$", SCRIPT.read_text(), re.MULTILINE)
    assert labels == list(RECIPES)
    usage = bash()
    assert usage.returncode != 0 and not usage.stdout
    named = []
    for group in usage.stderr.strip().rpartition(": ")[2].split("; "):
        first, *others = group.split(", ")
        named += [first, *(first.partition("-")[0] + other for other in others)]
    assert sorted(named) == sorted(labels)
    unknown = bash("flux-jiont")
    assert unknown.returncode == 1 and "flux-jiont is no recipe" in unknown.stderr and not unknown.stdout


def test_more_flags_win_and_variables_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = bash("kontext-joint", "--num-steps", "6", "--reward", "psnr", GPUS="7").stdout.splitlines()
    assert words[:3] == ["--nproc_per_node", "7", "grpo_unified.py"]
    args = parse(words[3:])
    assert (args.num_steps, args.reward, args.window_size) == (6, ("psnr",), 4)
    assert parse(bash("blip3o-i2i", BLIP3O="tiny-blip3o").stdout.splitlines()[3:]).model == "tiny-blip3o"


def test_numbers_are_the_published_ones(commands):
    for name, (launcher, args) in commands.items():
        assert launcher == ["--nproc_per_node", "8"] and args.out == f"outputs/unified-{name}"
        want = COMMON | RECIPES[name]
        num_steps, first, end = want.pop("steps")
        for field, value in want.items():
            assert getattr(args, field) == value, (name, field)
        assert args.num_steps == num_steps, name
        if args.train == "lm":
            continue
        first_step, end_step = args.window_range if any(args.window_range) else (0, args.num_steps - 1)
        assert (first_step, end_step) == (first, end) and args.window_size in (0, end - first), name
        assert {"noise_level", "learning_rate", "kl_coef"} <= want.keys(), name
        assert args.train == "dm" or "lm_learning_rate" in want, name


def test_noise_level_kl_and_clip_are_in_units_of_the_originals():
    """A step of UniRL-Zero and PromptRL in their notation, and ours, for which the recipes take the numbers as they
    are."""
    sigmas, level = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0], dtype=torch.float64), 0.8
    _, b, c = grpo_unified.coefficients("flow_sde", sigmas, level, (0, 4))
    draw = torch.Generator().manual_seed(0)
    x, v, v_ref, eps = torch.randn(4, 50, generator=draw, dtype=torch.float64)
    for i in range(4):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        s = level * (sigma / (1 - (sigma if i else sigmas[1]))).sqrt()
        std = s * (-dt).sqrt()
        mean, mean_ref = (
            x * (1 + s**2 / (2 * sigma) * dt) + u * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt for u in (v, v_ref)
        )
        kl = ((mean - mean_ref) ** 2 / (2 * std**2)).mean()
        x_next = mean + std * eps
        logp = (-((x_next - mean_ref) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))).mean()
        ours = b[i] ** 2 * (v - v_ref).square().mean() / (2 * c[i] ** 2)  # as in the script
        assert c[i].item() == pytest.approx(std.item()) and ours.item() == pytest.approx(kl.item())
        columns = (t.float()[None] for t in (v_ref, x, x_next))
        abc = (t[i : i + 1].float() for t in grpo_unified.coefficients("flow_sde", sigmas, level, (0, 4)))
        got, _ = grpo_unified.sde_logp(*(column.view(1, 2, 5, 5) for column in columns), *abc, None)
        assert got.item() == pytest.approx(logp.item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What a command names is there


def test_prompts_have_what_the_rewards_read(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    for source in sorted({args.prompts for _, args in commands.values()}):
        users = [args for _, args in commands.values() if args.prompts == source]
        read = {spec.partition(":")[0] for args in users for spec in args.reward}
        prompts = prompt_data.load(source, "all")
        assert len(prompts) >= 400
        for row in (prompts[i] for i in range(len(prompts))):
            for args in users:
                assert (row["image"] is not None) == args.task.startswith("i2i")
                if args.task == "i2i_cycle":
                    grpo_unified.way_back(row)
            if "geneval" in read:
                geneval.check(row["metadata"])
            if "clip_direction" in read:
                assert row["metadata"]["caption"] != row["metadata"]["target_caption"] != ""


class Reached(Exception):
    """All checks of the command line have passed, and weights are next."""


def stop_at_weights(commands):
    """Run main up to where weights are loaded; rewards are known by name and need their own roles."""

    def load(name, device, *judge):
        return SimpleNamespace(needs=rewards.REWARDS[name].needs, strict=None, name=name)

    def load_models(*args):
        raise Reached

    rewards.load, rewards.try_out, grpo_unified.load_models = load, lambda *_: None, load_models
    models.model_type = lambda name: {"qwen2.5-vl-3b": "qwen2_5_vl"}[name]  # of its config.json on the hub
    os.chdir(ROOT)
    passed = []
    for name, args in commands.items():
        try:
            grpo_unified.main(args)
        except Reached:
            passed.append(name)
    return passed


def test_full_size_commands_pass_all_checks(commands):
    assert processes.run(stop_at_weights, {name: args for name, (_, args) in commands.items()})[0] == list(RECIPES)


# ----------------------------------------------------------------------------------------------------------------------
# The same commands on small models

SMALL = {"blip3o": "tiny-blip3o", "sd3.5": "tiny-sd3"}
SMALL |= {name: f"tiny-{name}" for name in ("flux", "sana", "kontext", "klein")}
# Rewards without weights in their place.
HERE = {"geneval": "jpeg", "editreward": "psnr", "clip_direction": "psnr", "recon_clip_sim": "recon"}


def small_edits(folder):
    """data/edits.jsonl with short instructions and pictures of 32 x 32, which leave room in the small LM's context."""
    (folder / "edit_images").mkdir()
    rows = [json.loads(line) for line in (ROOT / EDITS).read_text().splitlines()]
    rows = [row for row in rows if len(row["prompt"]) <= 24]
    for name in {row["image"] for row in rows}:
        Image.open(ROOT / "data" / name).convert("RGB").resize((32, 32)).save(folder / name)
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "edits.jsonl"


def small(args, out):
    """The recipe on tiny models and pictures, one iteration of one group of four, fp32."""
    changes = dict(model=SMALL[args.model], dtype="fp32", num_iterations=1, group_size=4, micro_batch_size=2)
    changes |= dict(lm_micro_batch_size=2, max_new_tokens=6, num_steps=4, eval_num_steps=1, resolution=32, eval_size=1)
    changes |= dict(warmup_updates=1, keep_original=min(1, args.keep_original), out=str(out), save_every=1)
    if args.window_size:  # the first half of the steps
        changes |= dict(window_size=2, window_range=(0, 2))
    if args.lm:  # one that sees, or one that refines
        changes["lm"] = "tiny-qwen-vl" if args.task.startswith("i2i") else "tiny-qwen-refine"
    if args.lm or args.task == "t2icot":  # texts that differ, of models which know what they want to say
        changes["temperature"] = 3.0
    if args.prompts == EDITS:
        changes |= dict(prompts=str(out.parent / "edits.jsonl"))
    changes["reward"] = tuple(":".join([HERE.get(n, n), *w]) for n, *w in (spec.split(":") for spec in args.reward))
    return dataclasses.replace(args, **changes)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def modules(model):
    """All modules of a loaded model, by where they are: parts, references, autoencoder, encoders, vision tower."""
    found = {f"parts.{name}": part for name, part in model.parts.items()}
    for name, value in vars(model).items():
        several = value if isinstance(value, dict) else {"": value}
        inner = {f"{name}.{key}": m for key, m in several.items() if isinstance(m, torch.nn.Module)}
        found |= {key: m for key, m in inner.items() if all(m is not other for other in found.values())}
    return found


def tensors(loaded):
    """(model, module, is it a parameter, name) -> a copy, of everything that was loaded."""
    return {
        (n, where, kind == "parameters", name): full(t.detach()).clone()
        for n, model in enumerate(loaded)
        for where, module in modules(model).items()
        for kind in ("parameters", "buffers")
        for name, t in getattr(module, f"named_{kind}")()
    }


def smoke(commands):
    """For every recipe, metrics of its one iteration, and which of its `tensors` that has changed."""
    run_folder.curves = lambda *_: None
    os.chdir(ROOT)
    load_models, found = grpo_unified.load_models, {}
    for name, args in commands.items():
        loaded, before = [], {}

        def load_and_look(*options):
            pair = load_models(*options)
            loaded.extend(model for model in pair if model)
            before.update(tensors(loaded))
            return pair

        grpo_unified.load_models = load_and_look
        grpo_unified.main(args)
        after = tensors(loaded)
        assert before.keys() == after.keys()
        found[name] = run_folder.rows(args.out)[0], {key: not before[key].equal(after[key]) for key in before}
    return found


def test_recipes_train_their_side_and_nothing_else_and_are_on_policy(tmp_path, commands):
    small_edits(tmp_path)
    runs = {name: small(args, tmp_path / name) for name, (_, args) in commands.items()}
    for name, (row, changed) in processes.run(smoke, runs, timeout=300)[0].items():
        args = runs[name]
        sides = [side for side in ("lm", "dm") if args.train in (side, "joint")]
        assert row["on_policy_err"] <= 1e-5 and row["skipped_updates"] == 0, (name, row)
        assert row["reward_std"] > 0 and all(row[f"{side}/grad_norm"] > 0 for side in sides), (name, row)
        assert all(row[f"{side}/kl"] == 0 for side in sides), (name, row)  # at the reference, which is there
        assert {m for m in row if m.startswith("reward/")} == {f"reward/{s.split(':')[0]}" for s in args.reward}, name
        counts = {"lm": 0, "dm": 0, "frozen": 0}
        for (_, where, is_parameter, tensor), moved in changed.items():
            side = "frozen" if not where.startswith("parts.") else "lm" if where == "parts.lm" else "dm"
            counts[side] += 1
            trained = side in sides and is_parameter
            if args.task in ("t2i", "t2icot") and tensor.endswith("ref_patch_embed.proj.weight"):
                trained = False  # there is no picture to edit: it sees zeros
            assert moved == trained, (name, where, tensor)
        assert all(counts[side] for side in [*sides, "frozen"]), (name, counts)
