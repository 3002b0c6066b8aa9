"""GRPO of two models: the closed forms of its losses, and the script itself, in processes of its own."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import grpo_unified
import models
import rewards
from data import prompts as prompt_data
from data import shapes
from grpo_unified import (
    clipped_token_loss,
    group_advantage,
    judged_by,
    neutral,
    question,
    tag_std,
    token_kl,
    token_weights,
    way_back,
)
from models import blip3o, checkpoint, parallel, qwen, run_folder

# ----------------------------------------------------------------------------------------------------------------------
# The weight of a token


def lengths_mask(*lengths, width=7):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def test_token_weights_are_those_of_the_three_papers():
    mask = lengths_mask(1, 4, 7, 2)
    weights = {kind: token_weights(mask, kind, 4, 14, 10) for kind in ("grpo", "dapo", "dr_grpo")}
    for weight in weights.values():
        assert weight.shape == mask.shape and (weight[mask == 0] == 0).all() and (weight[mask == 1] > 0).all()
    assert torch.allclose(weights["grpo"].sum(dim=1), torch.full((4,), 1 / 4))  # every sample counts alike
    assert torch.equal(weights["dapo"][mask == 1], torch.full((14,), 1 / 14))  # every token does
    assert torch.equal(weights["dr_grpo"][mask == 1], torch.full((14,), 1 / 40))  # and is not shortened by its sample
    assert token_weights(lengths_mask(0, 3), "grpo", 2, 3, 10).isfinite().all()


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_weights_of_two_ranks_and_of_tiles_add_up(kind):
    draw = torch.Generator().manual_seed(0)
    mask = lengths_mask(1, 4, 7, 2, 3, 5)
    loss = torch.randn(mask.shape, generator=draw)
    whole = (loss * token_weights(mask, kind, 6, 22, 10)).sum()
    parts = [(loss[part] * token_weights(mask[part], kind, 6, 22, 10)).sum() for part in ([0, 3], [1], [5, 2, 4])]
    assert torch.allclose(sum(parts), whole, atol=1e-7)
    if kind == "grpo":
        assert torch.allclose(whole, torch.stack([row[m == 1].mean() for row, m in zip(loss, mask)]).mean())


# ----------------------------------------------------------------------------------------------------------------------
# The KL of a token, and its clipped loss


def test_token_kl_equals_its_formulas_and_ignores_the_padding():
    logp, ref = torch.tensor([[-1.0, -2.0, -0.5, 7.0]]), torch.tensor([[-1.5, -0.25, -0.5, -9.0]])
    mask = lengths_mask(3, width=4)
    x = [0.5, -1.75, 0.0, 0.0]
    assert torch.allclose(token_kl(logp, ref, mask, "k3"), torch.tensor([[math.exp(-v) - 1 + v for v in x]]))
    assert torch.allclose(token_kl(logp, ref, mask, "k2"), torch.tensor([[v * v / 2 for v in x]]))
    far = torch.arange(-200.0, 201.0)[None]
    k3 = token_kl(far, torch.zeros_like(far), torch.ones_like(far), "k3")
    assert (k3 >= 0).all() and k3.isfinite().all() and k3[0, 200] == 0


def test_gradient_of_k2_is_that_of_the_kl_and_k3s_is_that_of_the_reverse():
    """By enumeration: the expectation over tokens that the policy draws, its probabilities held as sampling holds
    them."""
    draw = torch.Generator().manual_seed(0)
    z, z_ref = torch.randn(2, 9, generator=draw, dtype=torch.float64)
    z.requires_grad_()
    logp, ref = z.log_softmax(0), z_ref.log_softmax(0)
    p, q = logp.exp(), ref.exp()
    forward, reverse = (
        torch.autograd.grad(kl, z, retain_graph=True)[0] for kl in ((p * (logp - ref)).sum(), -(q * logp).sum())
    )
    for estimator, want in (("k2", forward), ("k3", reverse)):
        kl = token_kl(logp[None], ref[None], torch.ones(1, 9), estimator)
        got = torch.autograd.grad((p.detach() * kl).sum(), z, retain_graph=True)[0]
        assert torch.allclose(got, want, atol=1e-12), estimator
    assert (forward - reverse).norm() > 0.1 * forward.norm()
    k3 = token_kl(logp[None], ref[None], torch.ones(1, 9), "k3")
    assert torch.allclose((p * k3).sum(), (p * (logp - ref)).sum())  # and its value is the KL's, without bias


def test_clipped_token_loss_has_two_bounds():
    log_ratio = torch.tensor([[0.1, 0.3, 0.5, -0.1, -0.3, -0.5, 0.9]] * 2)
    old = torch.full_like(log_ratio, -2.0)
    logp = (old + log_ratio).requires_grad_()
    mask, adv = lengths_mask(6, 6), torch.tensor([2.0, -3.0])
    loss, ratio = clipped_token_loss(logp, old, adv, mask, 0.2, 0.4)
    loss.sum().backward()
    r = log_ratio.exp() * mask
    flat = torch.zeros(2, 7, dtype=torch.bool)
    flat[0, 2] = True  # 1.65 > 1.4 where A > 0; 1.35 is not
    flat[1, 4:6] = True  # 0.74 and 0.61 < 0.8 where A < 0
    bound = torch.tensor([1.4, 0.8])[:, None].expand(2, 7)
    want = -adv[:, None] * torch.where(flat, bound, r) * mask
    assert torch.allclose(loss, want) and torch.allclose(ratio[:, :6], r[:, :6])
    assert torch.allclose(logp.grad, torch.where(flat, 0.0, -adv[:, None] * r * mask))
    run_away, _ = clipped_token_loss(
        torch.full((1, 1), 500.0), torch.zeros(1, 1), -torch.ones(1), torch.ones(1, 1), 0.2, 0.2
    )
    assert run_away.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Rewards and advantages


def test_kept_originals_get_the_mean_of_the_others_of_their_group():
    nan = math.nan
    kept = torch.tensor([False, False, False, True] * 3)
    reward = torch.tensor([1.0, 0, 1, 0, 0.5, nan, 1.5, 9, nan, nan, nan, 1])
    got = neutral(reward, kept, 4)
    assert torch.equal(got[~kept].nan_to_num(-1), reward[~kept].nan_to_num(-1))  # the others keep theirs
    assert got[kept][:2].tolist() == [pytest.approx(2 / 3), 1.0] and got[kept][2].isnan()
    assert torch.equal(neutral(reward[:4], torch.zeros(4, dtype=torch.bool), 4), reward[:4])
    assert group_advantage(got, 4)[kept].abs().max() < 1e-6


def test_tag_std_is_that_of_the_samples_which_the_same_rewards_judge():
    draw = torch.Generator().manual_seed(0)
    reward = torch.randn(12, generator=draw) * torch.tensor([1.0, 10.0, 1.0]).repeat_interleave(4)
    reward[5] = math.nan
    applies = torch.tensor([[True, False], [False, True], [True, False]]).repeat_interleave(4, dim=0)
    got = tag_std(reward, applies, applies[::4])
    first = np.nanstd(np.r_[reward[:4], reward[8:]])
    assert got.shape == (3, 1) and got[:, 0].tolist() == pytest.approx([first, np.nanstd(reward[4:8]), first])
    everyone = tag_std(reward, torch.ones_like(applies), torch.ones(1, 2, dtype=torch.bool))
    assert everyone.item() == pytest.approx(np.nanstd(reward.numpy()))
    adv = group_advantage(reward, 4, got, 99.0)
    assert adv[4:8].abs().max() < 3 and torch.allclose(adv[:4], (reward[:4] - reward[:4].mean()) / (got[0] + 1e-4))


def test_prompts_may_choose_among_the_rewards_and_no_others():
    scores = {"jpeg": None, "format": None}
    assert judged_by({"prompt": "p", "metadata": {}}, scores) == ["jpeg", "format"]
    assert judged_by({"prompt": "p", "metadata": {"rewards": ["format"]}}, scores) == ["format"]
    for bad in (["format", "ocr"], [], "format", None, [3]):
        with pytest.raises(ValueError, match="prompt 'a red circle': its rewards are .*some of jpeg, format"):
            judged_by({"prompt": "a red circle", "metadata": {"rewards": bad}}, scores)


def test_way_back_is_that_of_the_metadata():
    assert way_back({"prompt": "p", "metadata": {"reverse_prompt": "q"}}) == "q"
    for metadata in ({}, {"reverse_prompt": " "}, {"reverse_prompt": 3}, {"reverse_prompt": None}):
        with pytest.raises(ValueError, match="prompt 'make it red': i2i_cycle needs"):
            way_back({"prompt": "make it red", "metadata": metadata})


# ----------------------------------------------------------------------------------------------------------------------
# The script

TINY = dict(num_iterations=1, num_prompts=2, group_size=4, micro_batch_size=4, lm_micro_batch_size=4, num_updates=1)
TINY |= dict(num_steps=3, max_new_tokens=8, eval_num_steps=1, eval_size=2, eval_every=1000, save_every=1000)
TINY |= dict(reward=("jpeg:100", "format:0.1"), sampler="flow_sde", ema_decay=0.0, warmup_updates=1, resolution=32)
TINY |= dict(noise_level=0.7, shared_noise=False, window_size=0, window_range=(0, 0), advantage_std="group")
TINY |= dict(lm_learning_rate=5e-5, learning_rate=1e-4, decay_iterations=0)
UNIFIED = dict(model="tiny-blip3o-start", lm="")
EDITS = dict(task="i2i", prompts="edits.jsonl", eval_prompts="held_out.jsonl")
GUIDED = dict(guidance=2.0, image_guidance=1.5)
CYCLE = dict(task="i2i_cycle", reward=("recon", "format:0.1"))
KONTEXT = EDITS | dict(model="tiny-kontext", lm="tiny-qwen-vl", temperature=2.0)  # with 1 it says one word
CLOCK = ("seconds_rollout", "seconds_reward", "seconds_update", "samples_per_s")


def write_edits(folder):
    """edits.jsonl and held_out.jsonl there, of noise: the shapes world takes seconds to draw, in every process. Where
    they are there already, nothing is written: another rank may be reading."""
    if (folder / "held_out.jsonl").exists():
        return
    draw = np.random.default_rng(0)
    for name, verb, back in (("edits", "remove the", "add a"), ("held_out", "add a", "remove the")):
        lines = []
        for what in (f"{color} {shape}" for shape in shapes.CLASSES for color in shapes.COLORS):
            picture = draw.integers(256, size=(4, 4, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            Image.fromarray(picture).save(folder / f"{name}-{what}.png")
            line = dict(prompt=f"{verb} {what}", reverse_prompt=f"{back} {what}", image=f"{name}-{what}.png")
            lines.append(json.dumps(line))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def arguments(out, **changes):
    changes = TINY | changes
    if changes.get("prompts") == "edits.jsonl":
        write_edits(out.parent)
        changes |= {name: str(out.parent / changes[name]) for name in ("prompts", "eval_prompts")}
    return dataclasses.replace(grpo_unified.Args(), out=str(out), **changes)


def train(out, **changes):
    """Run the script once in this process, but for the curves (most of such a run); the rows of its metrics.jsonl."""
    run_folder.curves = lambda *_: None
    grpo_unified.main(arguments(out, **changes))
    return run_folder.rows(str(out))


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def record_gradients():
    """A dict that gets the gradients of every update of this process before they are clipped, by name."""
    names, gradients, trained, clip = {}, {}, parallel.trained, parallel.clip_grad_norm

    def trained_and_name(parts):
        found = trained(parts)
        names.update({id(p): name for name, p in found.items()})
        return found

    def clip_and_record(parameters, max_norm):
        parameters = list(parameters)
        gradients.update({names[id(p)]: None if p.grad is None else full(p.grad).clone() for p in parameters})
        return clip(parameters, max_norm)

    parallel.trained, parallel.clip_grad_norm = trained_and_name, clip_and_record
    return gradients


def record(name, module=grpo_unified):
    """A list that gets (result, arguments) of every call of module.<name> from here on."""
    calls, original = [], getattr(module, name)

    def call(*args, **options):
        result = original(*args, **options)
        calls.append((result, args))
        return result

    setattr(module, name, call)
    return calls


def record_encodings():
    """A list that gets (words, pictures) of every call of `encode` of a diffusion model."""
    encoded, load = [], models.load

    def load_and_listen(*args, **options):
        model = load(*args, **options)
        encode = model.encode

        def encode_and_record(words, pictures=None, **options):
            encoded.append((list(words), pictures))
            return encode(words, pictures, **options)

        model.encode = encode_and_record
        return model

    models.load = load_and_listen
    return encoded


def use_reward(needs, function):
    """From here on in this process, every reward is function(samples, prompts) -> list of floats, and is not tried."""

    def load(name, device, *judge):
        def score(samples, prompts, metadata):
            return torch.tensor(function(samples, prompts), dtype=torch.float32)

        score.needs, score.strict, score.name = needs, None, name
        return score

    rewards.load, rewards.try_out = load, lambda *_: None


# --- on-policy

ON_POLICY = {
    "text": dict(
        task="text", train="lm", lm="tiny-qwen", prompts="arithmetic", reward=("math",), lm_loss="dapo", num_updates=2
    )
    | dict(lm_micro_batch_size=3, rollout_batch_size=3, lm_learning_rate=1e-6),
    "text, pictures": dict(
        task="text", train="lm", lm="tiny-qwen-vl", prompts="shapes-qa", reward=("shapes_qa",), temperature=3.0
    ),
    "text, unified": UNIFIED | dict(task="text", train="lm", prompts="shapes-qa", reward=("shapes_qa",)),
    "t2i": dict(task="t2i", train="dm", reward=("jpeg",), kl_coef=0.1, num_updates=2),
    "t2i, unified": UNIFIED | dict(task="t2i", train="dm", reward=("jpeg",), guidance=2.0),
    "t2icot": dict(temperature=0.7, lm_kl_coef=0.1, num_updates=2),
    "t2icot, lm": dict(train="lm", keep_original=1, lm_loss="dr_grpo", lm_micro_batch_size=5, num_steps=1),
    "t2icot, dm": dict(train="dm", keep_original=1, window_size=1),
    "t2icot, guided": dict(model="tiny-klein", guidance=4.0),  # classifier-free: two forwards a step
    "t2icot, unified": UNIFIED | dict(guidance=2.0, kl_coef=0.1, lm_kl_coef=0.1, lora_rank=2),
    "t2icot, unified, lm": UNIFIED | dict(train="lm", lm_kl_coef=0.1),
    "t2icot, unified, dm": UNIFIED | dict(train="dm", kl_coef=0.1),
    "i2i, unified": UNIFIED | EDITS | GUIDED | dict(train="dm", reward=("jpeg",)),
    "i2i, unified, refined": UNIFIED | EDITS | GUIDED | dict(refine=True, keep_original=1, num_prompts=1),
    "i2i": KONTEXT | dict(train="dm", reward=("jpeg",)),
    "i2i, refined": KONTEXT | dict(refine=True, keep_original=1),
    "i2i, refined, lm": KONTEXT | dict(refine=True, train="lm"),
    "i2i, refined, dm": KONTEXT | dict(refine=True, train="dm"),
    "i2i, unified, refined, lm": UNIFIED | EDITS | dict(refine=True, train="lm"),
    "i2i, unified, refined, dm": UNIFIED | EDITS | dict(refine=True, train="dm"),
    "cycle": KONTEXT | CYCLE | dict(train="dm", reward=("recon",)),
    "cycle, refined": KONTEXT | CYCLE | dict(refine=True),
    "cycle, refined, lm": KONTEXT | CYCLE | dict(refine=True, train="lm"),
    "cycle, unified, refined": UNIFIED | EDITS | CYCLE | dict(refine=True, num_prompts=1),
    "cycle, unified, refined, lm": UNIFIED | EDITS | CYCLE | dict(refine=True, train="lm"),
    "cycle, unified": UNIFIED | EDITS | GUIDED | dict(task="i2i_cycle", train="dm", reward=("recon",), num_prompts=1),
}


FAST = ("text", "t2icot", "t2icot, unified", "i2i, unified, refined", "i2i, refined", "cycle, unified")


def train_on_policy(folder, names):
    return {name: train(folder / name, **ON_POLICY[name]) for name in names}


@pytest.mark.parametrize(
    "names, ranks",
    [
        (FAST, 1),
        pytest.param(ON_POLICY.keys() - set(FAST), 1, marks=pytest.mark.slow),
        pytest.param(ON_POLICY.keys(), 2, marks=pytest.mark.slow),
    ],
)
def test_first_update_is_on_policy(tmp_path, names, ranks):
    write_edits(tmp_path)
    found = processes.run(train_on_policy, tmp_path, sorted(names), ranks=ranks, timeout=900)[0]
    for name, (row, last) in found.items():
        changes = TINY | ON_POLICY[name]
        sides = [side for side in ("lm", "dm") if changes.get("train", "joint") in (side, "joint")]
        assert row["on_policy_err"] == max(row[f"{side}/on_policy_err"] for side in sides), name
        assert row["skipped_updates"] == 0 and math.isfinite(last["eval_reward"]), name
        for side in ("lm", "dm"):
            keys = {f"{side}/{key}" for key in ("on_policy_err", "ratio", "grad_norm", "loss", "clipfrac")}
            assert keys <= row.keys() if side in sides else not keys & row.keys(), name
        for side in sides:
            # A token's log-prob is of a forward over the prompt and of one over one token: other sums. A replayed
            # denoising step has the bits of the rollout's.
            assert row[f"{side}/on_policy_err"] <= (1e-5 if side == "lm" else 0), (name, row)
            assert abs(row[f"{side}/ratio"] - 1) <= (1e-5 if changes["num_updates"] == 1 else 1e-2), (name, row)
            # The KL to where the run began, if it is asked for.
            if changes.get({"lm": "lm_kl_coef", "dm": "kl_coef"}[side], 0):
                assert row[f"{side}/kl"] <= (1e-9 if changes["num_updates"] == 1 else 1e-3), (name, row)
            else:
                assert f"{side}/kl" not in row, name
            assert row[f"{side}/grad_norm"] > 0 or row["reward_std"] == 0, name
        assert row["reward_std"] > 0 or "text" in name, name


# --- gradients


def draw_alike():
    """Pictures are drawn with noise on all steps but the last whoever is trained. Without the DM's loss they are not:
    then its samples, and so rewards and advantages, would not be those of a run with it."""
    original = grpo_unified.coefficients

    def noisy(sampler, sigmas, noise_level, window):
        return original(sampler, sigmas, noise_level, (0, len(sigmas) - 2) if noise_level > 0 else window)

    grpo_unified.coefficients = noisy


def without(loss):
    """From here on, loss `clipped_token_loss` or `clipped_pg_loss` is zero, with the gradient zero."""
    original = getattr(grpo_unified, loss)
    setattr(grpo_unified, loss, lambda *args: tuple(x * (n > 0) for n, x in enumerate(original(*args))))
    return original


KINDS = {"pair": dict(num_steps=4), "unified": UNIFIED | dict(num_steps=4, guidance=2.0)}
KINDS["edits"] = UNIFIED | EDITS | GUIDED | dict(refine=True, keep_original=1)


def joint_and_separate(folder, kind):
    draw_alike()
    gradients, found = record_gradients(), {}
    for run in ("joint", "lm", "dm", "pictures"):
        gradients.clear()
        if run == "pictures":
            without("clipped_token_loss")
        train_what = run if run in ("lm", "dm") else "joint"
        row = train(folder / f"{kind}-{run}", train=train_what, **KINDS[kind])[0]
        found[run] = dict(gradients), row["reward"]
    return found


@pytest.mark.parametrize("kind", ["pair", "unified", pytest.param("edits", marks=pytest.mark.slow)])
def test_joint_gradient_is_the_sum_of_the_two(tmp_path, kind):
    found = processes.run(joint_and_separate, tmp_path, kind)[0]
    (joint, reward), (lm, reward_lm), (dm, reward_dm), (pictures, _) = (
        found[run] for run in ("joint", "lm", "dm", "pictures")
    )
    assert reward == reward_lm == reward_dm
    assert joint.keys() == pictures.keys() == lm.keys() | dm.keys() and not lm.keys() & dm.keys()
    assert all(name.startswith("lm.") for name in lm) and not any(name.startswith("lm.") for name in dm)
    for name, gradient in joint.items():
        if name in dm:
            assert (gradient - dm[name]).norm() <= 1e-5 * dm[name].norm(), (kind, name)
            continue
        # Of a pair, text is all that passes from the LM to the DM. Of a unified model, the picture's loss reaches
        # the LM through the queries.
        through = torch.zeros_like(gradient) if kind == "pair" else pictures[name]
        assert (gradient - (lm[name] + through)).norm() <= 1e-5 * (lm[name].norm() + through.norm()), (kind, name)
        assert kind != "pair" or not pictures[name].any()
    norms = {
        run: sum(g.square().sum() for n, g in found[run][0].items() if n[:3] == "lm.") for run in ("lm", "pictures")
    }
    assert norms["lm"] > 0 and (norms["pictures"] > 0) == (kind != "pair")
    assert sum(g.square().sum() for g in dm.values()) > 0


def change_the_advantage_of_kept_samples(folder):
    changes = dict(keep_original=2)
    gradients, original, found = record_gradients(), grpo_unified.group_advantage, []
    for shift in (0.0, 7.0):
        kept = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(2)
        grpo_unified.group_advantage = lambda *args: original(*args) + shift * kept
        gradients.clear()
        train(folder / str(shift), **changes)
        found.append(dict(gradients))
    # One tile an update: the first one has only samples that are kept, and no tokens.
    tile = dict(keep_original=2, micro_batch_size=2, num_updates=4, lm_kl_coef=0.1)
    order = [fold for fold in range(20) if train_order(fold)[0] % 2]
    return found, train(folder / "tiles", seed=order[0], **tile)[0]


def train_order(seed):
    return grpo_unified.fold_seed(seed, grpo_unified.ORDER, 0, torch.arange(4)).argsort().tolist()


def test_kept_originals_have_no_gradient_of_the_lm(tmp_path):
    (one, other), row = processes.run(change_the_advantage_of_kept_samples, tmp_path)[0]
    of_lm = [name for name in one if name.startswith("lm.")]
    assert of_lm and all(torch.equal(one[name], other[name]) for name in of_lm)
    assert all(not torch.equal(one[name], other[name]) for name in one if "proj_out.weight" in name)
    assert any(one[name].any() for name in of_lm)
    assert row["lm/on_policy_err"] == 0 and row["lm/grad_norm"] > 0 and row["skipped_updates"] == 0


def keep_originals(folder):
    """The reward of a text is its place in the group."""
    seen = []

    def count(samples, prompts):
        seen.append((samples["text"], prompts))
        return [10.0 + n for n in range(len(prompts))]

    use_reward(("text", "image"), count)
    encoded, advantages = record_encodings(), record("group_advantage")
    train(folder, keep_original=1, reward=("format",), eval_size=1, advantage_std="none")
    return seen, encoded, advantages


def test_kept_originals_are_the_users_words_and_text_rewards_neutral(tmp_path):
    seen, encoded, ((adv, (reward, *_)),) = processes.run(keep_originals, tmp_path)[0]
    (_, *tiles, _), (_, (words, _), _) = seen, encoded  # between the two evaluations
    texts, prompts = sum((tile[0] for tile in tiles), []), sum((tile[1] for tile in tiles), [])
    assert len(texts) == 8 and len(set(prompts)) == 2
    for b, (text, prompt, word) in enumerate(zip(texts, prompts, words)):
        assert (text == prompt == word) if b % 4 == 3 else word == blip3o.refined(text), b
    assert any(text != prompt for text, prompt in zip(texts, prompts))
    assert reward.tolist() == [10, 11, 12, 11] * 2  # and not 13
    assert adv.tolist() == pytest.approx([-1, 0, 1, 0] * 2)


def read_templates(folder):
    """What the language model reads in an iteration, for two tasks."""
    run_folder.curves, qwen.Qwen.check_lengths = lambda *_: None, lambda *_: None  # it encodes, too
    asked = record("encode", qwen.Qwen)
    for name, changes in (("pictures", {}), ("edits", KONTEXT | dict(refine=True))):
        (folder / name).mkdir()
        train(folder / name / "run", train="lm", reward=("format",), num_iterations=1, **changes)
    return [args[1] for _, args in asked]


def sample_sizes(folder):
    """Texts sampled side by side, by default and three at once: in an evaluation, an iteration, and an evaluation."""
    run_folder.curves, sizes = lambda *_: None, {}
    for size in (0, 3):
        calls = record("write")
        train(folder / str(size), train="lm", reward=("format",), eval_size=10, rollout_batch_size=size, eval_every=1)
        sizes[size] = [len(args[1]) for _, args in calls]
    return sizes


def test_an_evaluation_samples_no_more_texts_side_by_side_than_an_iteration(tmp_path):
    evaluation, rollout = {0: [8, 2], 3: [3, 3, 3, 1]}, {0: [8], 3: [3, 3, 2]}
    found = processes.run(sample_sizes, tmp_path)[0]
    assert found == {size: evaluation[size] + rollout[size] + evaluation[size] for size in (0, 3)}


def test_instructions_and_prompts_are_refined_with_words_of_their_own(tmp_path):
    asked = processes.run(read_templates, tmp_path)[0]
    for template, texts in zip((blip3o.REFINE, blip3o.REFINE_EDIT), (asked[:3], asked[3:])):
        head, tail = template.split("{}")
        assert len(texts) == 3 and all(t.startswith(head) and t.endswith(tail) for text in texts for t in text)
    assert "edit of this image" in asked[3][0] and "image generator" in asked[0][0]


def test_instruction_stands_behind_the_prompt():
    row = {"prompt": "What is {x}?"}
    assert question(row, "text", "") == "What is {x}?"
    assert question(row, "text", "Say \\boxed{}.") == "What is {x}?\nSay \\boxed{}."
    assert question(row, "t2icot", "") == blip3o.REFINE.replace("{}", "What is {x}?")
    assert (
        question(row, "i2i", "") == question(row, "i2i_cycle", "") == blip3o.REFINE_EDIT.replace("{}", "What is {x}?")
    )


def look_at_pictures(folder):
    """What the language model and the reward see of pictures that are not square."""
    draw, sources = np.random.default_rng(0), []
    for name in ("edits", "held_out"):
        lines = []
        for n in range(2):
            picture = f"{name}-{n}.png"
            Image.fromarray(draw.integers(256, size=(32, 96, 3), dtype=np.uint8)).save(folder / picture)
            lines.append(json.dumps({"prompt": f"{name}, make it {n}", "image": picture}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))

    def keep(samples, prompts):
        sources.extend(samples["source"])
        return [float(n) for n in range(len(prompts))]

    use_reward(("image", "source"), keep)
    asked = record("encode", qwen.Qwen)
    for size in (0, 64):
        run = dict(refine=True, train="lm", reward=("any",), lm_resolution=size)
        train(folder / str(size), **KONTEXT | run)
    return [[np.asarray(picture) for picture in args[3]] for _, args in asked], sources


def test_the_lm_sees_of_a_picture_what_is_edited(tmp_path):
    seen, sources = processes.run(look_at_pictures, tmp_path)[0]
    same, larger = seen[:3], seen[3:]  # evaluation, iteration, evaluation
    assert {picture.shape for pictures in same for picture in pictures} == {(32, 32, 3)}
    assert {picture.shape for pictures in larger for picture in pictures} == {(64, 64, 3)}
    judged = {source.tobytes() for source in sources}
    assert {picture.tobytes() for pictures in same for picture in pictures} <= judged and len(judged) == 4


# --- failing rewards


def fail_sometimes(folder):
    """Two rewards, each of half the prompts; the second one fails in some iterations."""
    for name in ("train", "held_out"):
        lines = [json.dumps({"prompt": f"{name} {tag}", "rewards": [tag]}) for tag in "ab"]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    calls = dict(a=0, b=0)

    def load(name, device, *judge):
        def score(samples, prompts, metadata):
            if prompts[0].startswith("train"):
                calls[name] += 1
            failed = name == "b" and prompts[0].startswith("train") and calls[name] != 3
            return torch.arange(float(len(prompts))) + (math.nan if failed else 0)

        score.needs, score.strict, score.name = ("image",), None, name
        return score

    rewards.load, rewards.try_out = load, lambda *_: None
    prompts = dict(prompts=str(folder / "train.jsonl"), eval_prompts=str(folder / "held_out.jsonl"))
    run = dict(task="t2i", train="dm", num_iterations=9, **prompts)
    messages = []
    for name, reward in (("tagged", ("a", "b")), ("alone", ("b",))):
        calls["b"] = 0
        if name == "alone":
            (folder / "train.jsonl").write_text('{"prompt": "train 1"}\n{"prompt": "train 2"}')
            (folder / "held_out.jsonl").write_text('{"prompt": "held out"}')
        with pytest.raises(SystemExit) as error:
            train(folder / name, **run, reward=reward)
        messages.append(str(error.value))
    return run_folder.rows(str(folder / "tagged")), messages


def test_a_reward_that_fails_ends_the_run_at_once_or_with_tags_in_the_third_iteration_in_a_row(tmp_path):
    rows, (tagged, alone) = processes.run(fail_sometimes, tmp_path)[0]
    assert tagged == "error: reward b failed (NaN) for all 4 samples of iteration 5"
    assert alone == "error: reward b failed (NaN) for all 8 samples of iteration 0"
    assert [row["nan_reward_frac"] for row in rows] == [0.5, 0.5, 0.0, 0.5, 0.5]
    assert all(row["dm/grad_norm"] > 0 and row["reward/a"] == 1.5 for row in rows)


# --- both ways


def cycle(folder):
    seen = []

    def look(samples, prompts):
        seen.append((samples, prompts))
        return [float(np.square(a / 255.0 - b).mean()) for a, b in zip(samples["source"], samples["recon"])]

    use_reward(("recon", "source", "image"), look)
    encoded, losses, advantages = record_encodings(), record("clipped_pg_loss"), record("group_advantage")
    replayed, drawn = record("sde_logp"), record("rollout")
    row, _ = train(folder, **UNIFIED | EDITS | GUIDED | dict(task="i2i_cycle", train="dm", reward=("recon",)))
    pictures = [args[1]["picture"] for _, args in drawn if args[5] is not None]
    return row, seen, encoded, losses, advantages, [args[1] for _, args in replayed], pictures


def test_cycle_edits_back_what_was_judged_and_both_ways_share_an_advantage(tmp_path):
    row, seen, encoded, losses, ((adv, _),), states, pictures = processes.run(cycle, tmp_path)[0]
    (there, sources), (back, edited) = encoded[2:4]  # behind those of the evaluation
    there_and_back = [prompt.replace("remove the", "add a") for prompt in there for _ in range(4)]
    assert len(there) == 2 and len(back) == 8 and edited.shape == (8, 3, 32, 32)
    assert back == there_and_back and not set(back) & set(there)
    tiles = [tile for tile in seen if len(tile[1]) == 4][:2]
    images, recons = (np.stack(sum((tile[0][role] for tile in tiles), [])) for role in ("image", "recon"))
    before = np.stack(sum((tile[0]["source"] for tile in tiles), []))
    assert (np.moveaxis((edited * 255).round().numpy(), 1, 3) == images).all()
    assert (np.moveaxis((sources * 255).round().numpy(), 1, 3)[[0] * 4 + [1] * 4] == before).all()
    assert sum((tile[1] for tile in tiles), []) == [prompt for prompt in there for _ in range(4)]
    assert (images != recons).any() and len({recon.tobytes() for recon in recons}) == 8
    there_seen, back_seen = (torch.cat(pictures[tile : tile + 2]).flatten(1) for tile in (0, 2))
    assert [len(rows.unique(dim=0)) for rows in (there_seen, there_seen[:4], back_seen)] == [2, 1, 8]
    # Two steps of two tiles, there and then back: the same advantages on trajectories that are not the same.
    of_calls = [args[2] for _, args in losses]
    assert len(of_calls) == 8 and all(map(torch.equal, of_calls[:4], of_calls[4:]))
    assert sorted(torch.cat(of_calls).tolist()) == sorted(adv.repeat(4).tolist()) and adv.any()
    assert not any(torch.equal(x, y) for x, y in zip(states[:4], states[4:]))
    of_both_ways = sum(loss.item() for (loss, _), _ in losses) / 4
    assert row["dm/loss"] == row["loss"] == pytest.approx(of_both_ways, rel=1e-5) != 0


# --- several ranks

RANKS = {
    "pair": KONTEXT | dict(refine=True, keep_original=1, lm_loss="dapo", advantage_std="global"),
    "unified": UNIFIED | dict(guidance=2.0, lm_kl_coef=0.1, kl_coef=0.1),
    "cycle": UNIFIED | EDITS | dict(task="i2i_cycle", train="dm", reward=("recon",), group_size=2, micro_batch_size=2),
}


def metrics_and_gradients(folder, names, num_prompts, kept_unsharded):
    gradients, found = record_gradients(), {}
    for name, changes in ((name, RANKS[name]) for name in names):
        gradients.clear()
        more = dict(num_prompts=num_prompts, keep_unsharded=kept_unsharded)
        row = train(folder / f"{name}-{num_prompts}", **changes | more)[0]
        found[name] = row, dict(gradients)
    return found


@pytest.mark.parametrize("names", [["pair"], pytest.param(["unified", "cycle"], marks=pytest.mark.slow)])
def test_two_ranks_equal_one_with_twice_the_prompts(tmp_path, names):
    """Each of two ranks has one prompt and its picture, so that nothing of another can be in its samples."""
    one = processes.run(metrics_and_gradients, tmp_path, names, 2, True)[0]
    two, second = processes.run(metrics_and_gradients, tmp_path, names, 1, False, ranks=2)
    for name, (row, gradients) in one.items():
        for key in row.keys() - set(CLOCK):
            tolerance = dict(rel=1e-4, abs=1e-5)
            assert row[key] == pytest.approx(two[name][0][key], **tolerance), (name, key)
        assert row["on_policy_err"] <= 1e-5 and row["reward_std"] > 0
        for key, gradient in gradients.items():
            got = two[name][1][key]
            assert torch.equal(got, second[name][1][key])
            assert (gradient - got).norm() <= 1e-4 * gradient.norm() + 1e-7, (name, key)


# --- what reaches the language model, and what the optimizer


def test_pictures_and_temperature_are_in_the_replay():
    lm = models.load_lm("tiny-qwen-vl", "cpu", torch.float32)
    rows = [prompt_data.load("shapes-qa")[i] for i in (0, 1, 2)]
    question, images = rows[0]["prompt"], [row["image"] for row in rows]
    assert len({image.tobytes() for image in images}) == 3
    prompts = lm.encode([question] * 3, 4, images)
    ids, mask, sampled, _ = grpo_unified.write(lm, prompts, 4, torch.full((3,), 1.7), torch.arange(3))
    tile = torch.arange(3)
    with torch.no_grad():
        logp, _ = grpo_unified.replay(lm, prompts, ids, mask, tile, 1.7)
        swapped, _ = grpo_unified.replay(lm, prompts[1:] + prompts[:1], ids, mask, tile, 1.7)
        cold, _ = grpo_unified.replay(lm, prompts, ids, mask, tile, 1.0)
        sampled, mask = sampled[:, : logp.shape[1]], mask[:, : logp.shape[1]]
        assert (logp - sampled).abs().max() <= 1e-5 and (logp * (1 - mask)).abs().max() == 0
        assert (swapped - logp).abs().max() > 1e-2 and (cold - logp).abs().max() > 1e-2
        # Of the whole distribution: over all tokens that may come first, probabilities add up to 1.
        count = lm.parts["lm"].get_input_embeddings().num_embeddings
        every = torch.arange(count)[:, None]
        first, entropy = grpo_unified.replay(lm, prompts[:1] * count, every, torch.ones_like(every), every[:, 0], 1.7)
        assert first.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert entropy[0].item() == pytest.approx(-(first.exp() * first).sum().item(), abs=1e-5)
        assert first[ids[0, 0], 0].item() == pytest.approx(sampled[0, 0].item(), abs=1e-5)


def watch_optimizer(folder):
    """Learning rates and gradients at every optimizer step, weights before and after, and the random state of torch."""
    found, step, loaded = {}, torch.optim.AdamW.step, []
    for function in ("load", "load_lm"):
        original = getattr(models, function)
        setattr(models, function, lambda *a, load=original, **o: loaded.append(load(*a, **o)) or loaded[-1])

    def step_and_record(optimizer, *args):
        groups = [(group["lr"], sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = [p for m in loaded for part in everything(m) for p in part.parameters() if id(p) not in trained]
        frozen = [p.requires_grad or p.grad is not None for p in others]
        result = step(optimizer, *args)
        found[name].append((groups, len(frozen), sum(frozen), len(optimizer.state), torch.get_rng_state()))
        return result

    torch.optim.AdamW.step = step_and_record
    rates = dict(lm_learning_rate=3e-4, learning_rate=7e-4, num_iterations=2)
    runs = {
        "pair": {},
        "lm": dict(train="lm"),
        "dm": dict(train="dm"),
        "unified dm": UNIFIED | dict(train="dm"),
    }
    rows = {}
    for name, changes in runs.items():
        loaded.clear()
        found[name] = []
        torch.manual_seed(1234)
        rows[name] = train(folder / name, **rates | changes)
    torch.manual_seed(99)
    name = "again"
    found[name] = []
    again = train(folder / "again", **rates)
    del found[name]
    return found, [[{k: v for k, v in row.items() if k not in CLOCK} for row in r] for r in (rows["pair"], again)]


def everything(model):
    """All modules of a loaded model, the frozen ones too."""
    seen = [*model.parts.values(), *(v for v in vars(model).values() if isinstance(v, torch.nn.Module))]
    return seen + [
        m for v in vars(model).values() if isinstance(v, dict) for m in v.values() if isinstance(m, torch.nn.Module)
    ]


def test_learning_rates_frozen_parts_and_the_global_random_state(tmp_path):
    found, (rows, again) = processes.run(watch_optimizer, tmp_path)[0]
    sizes = {}
    for name, steps in found.items():
        assert len(steps) == 2
        # Seeds are arguments: nobody touches torch's own generator.
        assert torch.equal(steps[0][-1], steps[1][-1])
        for groups, num_frozen, num_wrong, num_states, _ in steps:
            want = {"lm": [3e-4], "dm": [7e-4], "unified dm": [7e-4]}.get(name, [3e-4, 7e-4])
            assert [rate for rate, _ in groups] == pytest.approx(want), name
            sizes[name] = [size for _, size in groups]
            assert num_frozen > 0 and num_wrong == 0, name
            assert num_states == len(
                [
                    key
                    for key in load_file(checkpoint.latest(tmp_path / name) / "rank-00000.safetensors")
                    if key.startswith("model/")
                ]
            ), name
        tensors = load_file(checkpoint.latest(tmp_path / name) / "rank-00000.safetensors")
        sides = {"lm" if key.split("/")[-1].startswith("lm.") or "/lm." in key else "dm" for key in tensors}
        assert sides == {"lm": {"lm"}, "dm": {"dm"}, "unified dm": {"dm"}}.get(name, {"lm", "dm"})
    assert sizes["pair"] == sizes["lm"] + sizes["dm"] and sizes["unified dm"][0] > sizes["dm"][0]
    assert rows == again


# --- resumed

RESUMED = dict(num_iterations=2, num_updates=2, save_every=1, ema_decay=0.9, eval_every=1, keep_checkpoints=0)


def stop_at(args, count):
    """main, told to stop at the count-th call of clipped_pg_loss."""
    run_folder.curves = lambda *_: None
    calls, original = [], grpo_unified.clipped_pg_loss

    def strike(*args):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    grpo_unified.clipped_pg_loss = strike
    try:
        grpo_unified.main(args)
    except SystemExit as stopped:
        return stopped.code


def test_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert processes.run(stop_at, arguments(straight, **RESUMED), 0) == [None]
    # In the first update of iteration 1, behind its tokens.
    assert processes.run(stop_at, arguments(run, **RESUMED), 5) == [143]
    assert [row["iteration"] for row in run_folder.rows(run)] == [0] and not (run / "lm").exists()
    resumed = run_folder.command_line(grpo_unified.Args(), ["--resume", str(run)], grpo_unified.__file__)
    assert processes.run(stop_at, resumed, 0) == [None]
    rows = [[{k: v for k, v in row.items() if k not in CLOCK} for row in run_folder.rows(f)] for f in (straight, run)]
    assert rows[0] == rows[1] and len(rows[0]) == 3 and rows[0][0]["lm/loss"] != rows[0][1]["lm/loss"]
    for part in ("checkpoints/000002", "lm", "model", "samples"):
        files = sorted(p.relative_to(straight) for p in (straight / part).rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(run) for p in (run / part).rglob("*") if p.is_file()) and files
        for file in files:
            if file.name == "index.json" or file.name == "state.json":
                assert json.loads((run / file).read_text()) == json.loads((straight / file).read_text())
            else:
                same = (run / file).read_bytes() == (straight / file).read_bytes()
                assert same, file
    first, last = (load_file(run / f"checkpoints/00000{n}/rank-00000.safetensors") for n in (0, 2))
    assert {name.split("/")[1].split(".")[0] for name in first if name.startswith("model/")} == {"lm", "transformer"}
    assert sum((first[name] != last[name]).any() for name in first if name.startswith("model/")) > 20
    # Each is exported in the format in which it came.
    lm = models.load_lm(str(run / "lm"), "cpu", torch.float32)
    assert torch.equal(lm.parts["lm"].model.norm.weight, last["ema/lm.model.norm.weight"])
    assert models.pipeline_class(str(run / "model")) == "FluxPipeline"


# --- refused

NO_REVERSE = '{"prompt": "make it %s", "image": "a.png"}\n'


def refused_before_loading(commands):
    def load(*_, **__):
        raise AssertionError("weights are loaded")

    from test_command_line import refusals  # here: it imports every script

    models.load = models.load_lm = load
    return refusals("grpo_unified", commands)


def test_wrong_flags_are_one_message_before_weights_are_loaded(tmp_path):
    write_edits(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "one_way.jsonl").write_text("".join(NO_REVERSE % n for n in range(60)))
    (tmp_path / "chosen.jsonl").write_text("".join('{"prompt": "p%d", "rewards": ["ocr"]}\n' % n for n in range(60)))
    scenes = os.path.join(os.path.dirname(grpo_unified.__file__), "data", "scenes.txt")
    late = ['{"prompt": "p%d"%s}' % (n, ', "rewards": ["ocr"]' if n == 40 else "") for n in range(60)]
    (tmp_path / "late.jsonl").write_text("\n".join(late))
    late = json.dumps({"prompt": "make it so", "image": "a.png"})
    (tmp_path / "late_way.jsonl").write_text("\n".join([(tmp_path / "held_out.jsonl").read_text(), late]))
    source = ["--prompts", str(tmp_path / "edits.jsonl"), "--eval-prompts", str(tmp_path / "held_out.jsonl")]
    edits = [*source, "--reward", "jpeg", "--train", "dm"]
    cases = [
        (
            ["--task", "t2i", "--train", "lm"],
            "--task t2i makes no text, and --train lm would learn from it: --train dm",
        ),
        (["--task", "t2i", "--train", "joint"], "--task t2i makes no text, and --train joint"),
        (["--task", "i2i", "--train", "joint", *source], "--train dm, or --refine with edits"),
        (
            ["--task", "text", "--train", "dm"],
            "--task text makes no picture, and --train dm would learn from it: --train lm",
        ),
        (["--task", "t2i", "--train", "dm", "--refine"], "--refine is for i2i and i2i_cycle; --task t2i refines"),
        (["--task", "t2icot", "--refine"], "--task t2icot refines always or never"),
        (["--task", "t2i", "--train", "dm", "--keep-original", "1"], "--keep-original 1 must leave refined samples"),
        (["--keep-original", "4"], "--keep-original 4 must leave refined samples in a group of 4"),
        (["--model", "tiny-blip3o-start", "--lm", "tiny-qwen-vl"], "has a language model of its own: leave out --lm"),
        (["--task", "i2i", *edits, "--prompts", "shapes"], "--task i2i: --prompts shapes have no pictures; expected"),
        (source, "edits.jsonl have pictures; i2i takes e.g. shapes-edit"),
        (
            ["--task", "i2i_cycle", *edits, "--prompts", str(tmp_path / "one_way.jsonl"), "--eval-prompts", ""],
            'i2i_cycle needs its "reverse_prompt"',
        ),
        (["--task", "i2i", *edits, "--train", "lm", "--refine", "--lm", "tiny-qwen"], "--lm tiny-qwen reads text only"),
        (["--task", "text", "--train", "lm", *source], "reads text only"),
        (
            ["--prompts", str(tmp_path / "chosen.jsonl"), "--reward", "jpeg"],
            "its rewards are ['ocr']; expected a list of",
        ),
        (["--reward", "shap"], "unknown reward 'shap', did you mean 'shapes'?"),
        (["--task", "t2i", "--reward", "format"], "reward 'format' scores 'text', but this run only has 'image'"),
        (["--reward", "recon"], "reward 'recon' scores 'recon', but this run only has 'text', 'image'"),
        (["--lm", "tiny-qwem"], "unknown model 'tiny-qwem', did you mean tiny-qwen?"),
        (["--image-guidance", "1.5"], "--image-guidance 1.5: --model tiny-flux has none, only unified models"),
        (["--micro-batch-size", "3"], "--micro-batch-size 3 must divide the 8 samples"),
        (["--task", "text", "--train", "lm", "--num-updates", "3"], "--num-updates 3 must divide the 8 samples"),
        (["--instruction", "Think."], "--instruction is for --task text; --task t2icot asks in words of its own"),
        (
            ["--prompts", scenes, "--reward", "shapes"],
            "metadata 'include': expected a list of wanted objects, got None",
        ),
        (["--eval-prompts", scenes, "--reward", "shapes"], "metadata 'include': expected a list of wanted objects"),
        (
            ["--prompts", str(tmp_path / "late.jsonl"), "--reward", "jpeg"],
            "its rewards are ['ocr']; expected a list of",
        ),
        (["--eval-prompts", str(tmp_path / "late.jsonl"), "--reward", "jpeg"], "its rewards are ['ocr']; expected"),
        (
            ["--task", "i2i_cycle", *edits, "--eval-prompts", str(tmp_path / "late_way.jsonl")],
            'i2i_cycle needs its "reverse_prompt", got None',
        ),
        (["--train", "lm", "--num-steps", "0"], "--num-steps --eval-num-steps --eval-size"),
        (["--num-steps", "1"], "the window must fit into its range"),
        (["--temperature", "0"], "--temperature positive"),
        (["--noise-level", "0"], "--noise-level must be positive"),
    ]
    tiny = "--num-prompts 2 --group-size 4 --micro-batch-size 4 --num-steps 4 --max-new-tokens 4".split()
    commands = [[*tiny, "--out", str(tmp_path / "run"), *argv] for argv, _ in cases]
    (messages,) = processes.run(refused_before_loading, commands)
    for (argv, expected), message in zip(cases, messages):
        assert message.startswith("error: ") and expected in message, (argv, message)
        assert message.count("\n") == 0 and len(message) < 400, message
    assert not (tmp_path / "run").exists()


def refuse_long_prompt(folder):
    lines = [f"prompt {n}" for n in range(40)]
    (folder / "long.txt").write_text("\n".join(lines[:30] + ["word " * 3000] + lines[30:]))
    (folder / "held_out.txt").write_text("a prompt")
    train(folder / "run", prompts=str(folder / "long.txt"), eval_prompts=str(folder / "held_out.txt"), reward=("jpeg",))


def test_a_prompt_that_is_too_long_is_found_before_the_run_begins(tmp_path):
    with pytest.raises(SystemExit, match="and --max-new-tokens 8 do not fit into the context of"):
        processes.run(refuse_long_prompt, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("train", ["lm", "dm"])
def test_frozen_side_of_a_pair_is_as_the_stock_library_loads_it(train):
    args = dataclasses.replace(grpo_unified.Args(), train=train)
    sides = (True, True, False, train == "lm", train == "dm")
    model, lm = grpo_unified.load_models(args, torch.device("cpu"), torch.bfloat16, *sides)
    trained, frozen = (lm, model) if train == "lm" else (model, lm)
    for side, dtype in ((trained, torch.float32), (frozen, torch.bfloat16)):
        parameters = [p for part in side.parts.values() for p in part.parameters()]
        assert {p.dtype for p in parameters} == {dtype}
        assert {p.requires_grad for p in parameters} == {side is trained}
    # In bf16 they would turn by another angle.
    frequencies = lm.parts["lm"].model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and not torch.equal(frequencies, frequencies.bfloat16().float())


@pytest.mark.parametrize("train", ["lm", "dm"])
def test_reference_of_a_unified_model_is_for_what_has_a_kl(train):
    of_sides = []
    for lm_kl_coef, kl_coef in ((0.1, 0.0), (0.0, 0.1)):
        args = dataclasses.replace(grpo_unified.Args(), **UNIFIED, lm_kl_coef=lm_kl_coef, kl_coef=kl_coef)
        sides = (True, True, True, train == "lm", train == "dm")
        model, _ = grpo_unified.load_models(args, torch.device("cpu"), torch.float32, *sides)
        of_sides.append(sorted(model.reference_parts or {}))
    parts = {"lm": ["lm"], "dm": ["connector", "queries", "transformer"]}[train]
    assert of_sides == ([parts, []] if train == "lm" else [[], parts])


def test_recipes_of_tiny_models_are_the_defaults():
    assert grpo_unified.recipe("tiny-flux", "") == grpo_unified.recipe("tiny-flux", "", "t2icot") == grpo_unified.Args()
    unified = grpo_unified.recipe("tiny-blip3o-start", "")
    shorter = dict(num_iterations=80, decay_iterations=80, eval_every=20, save_every=20, eval_size=512)
    assert unified == dataclasses.replace(grpo_unified.Args(), model="tiny-blip3o-start", lm="", **shorter)
    for task, model, what in [
        ("t2i", "tiny-flux", ("t2i", "dm", "shapes-user", ("shapes",))),
        ("i2i", "tiny-blip3o", ("i2i", "dm", "shapes-edit", ("shapes",))),
        ("", "tiny-kontext", ("i2i", "dm", "shapes-edit", ("shapes",))),
        ("i2i_cycle", "tiny-blip3o", ("i2i_cycle", "dm", "shapes-edit", ("shapes", "recon:0.01"))),
        ("text", "tiny-flux", ("text", "lm", "arithmetic", ("math",))),
        ("text", "tiny-blip3o", ("text", "lm", "shapes-qa", ("shapes_qa",))),
    ]:
        found = grpo_unified.recipe(model, "", task)
        assert (found.task, found.train, found.prompts, found.reward) == what
    assert grpo_unified.recipe("tiny-flux", "", "text").lm == "tiny-qwen"
    assert grpo_unified.recipe("tiny-blip3o", "", "text").lm == ""
    problems = grpo_unified.recipe("tiny-flux", "qwen2.5-3b", "text")
    assert (problems.lm, problems.dtype, problems.prompts) == ("qwen2.5-3b", "bf16", "hub:openai/gsm8k/main:train")
    kontext = grpo_unified.recipe("kontext", "qwen3-vl-4b")
    assert (kontext.lm, kontext.task, kontext.refine, kontext.keep_original) == ("qwen3-vl-4b", "i2i", True, 2)
    assert grpo_unified.recipe("blip3o", "").lm == "" and grpo_unified.recipe("flux", "").lm == "qwen2.5-vl-3b"
