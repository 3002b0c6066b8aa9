import contextlib
import dataclasses
import io
import json
import math
import os
import re
import runpy
import signal
import sys

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file

import dance_grpo
import flow_grpo
import models
import rewards
from dance_grpo import dance_coefficients, rollout
from data import prompts as prompt_data
from kernels.sde_step import fold_seed, sde_logp
from models import checkpoint, parallel, run_folder

# The schedule of Stable Diffusion 3 in 10 steps as diffusers computes it (its shift applied twice).
SD3 = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# dance_coefficients


def test_coefficients_equal_oracle_table():
    # Worked out by hand for eta = 0.3: c; the std of all noise after the step, from x = (1 - sigma) x0 + sigma eps;
    # |b| / c. DanceGRPO's own code has noise in its last step too (.028) and then decodes its x0; here it is an ODE
    # step, which is that x0, and has no such row.
    table = [
        [0.060, 0.065, 0.071, 0.078, 0.086, 0.097, 0.111, 0.130, 0.156],
        [0.960, 0.913, 0.858, 0.791, 0.708, 0.603, 0.468, 0.291, 0.159],
        [0.666, 0.722, 0.790, 0.871, 0.972, 1.10, 1.27, 1.52, 1.93],
    ]
    a, b, c = (coefficient[:9] for coefficient in dance_coefficients(SD3, 0.3))
    noise = ((a * SD3[:9] + b) ** 2 + c**2).sqrt()  # v = eps - x0
    for got, want in zip((c, noise, b.abs() / c), table):
        want = torch.tensor(want, dtype=torch.float64)
        assert ((got - want).abs() < torch.where(want >= 1, 6e-3, 7e-4)).all(), (got, want)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_coefficients_equal_their_score_form(eta):
    """dx = (v - eta^2/2 score) dt + eta dw, Euler-Maruyama, at all steps but the last."""
    a, b, c = dance_coefficients(SD3, eta)
    draw = torch.Generator().manual_seed(0)
    for i in range(9):
        sigma, dt = SD3[i], SD3[i + 1] - SD3[i]
        x, v = torch.randn(2, 1000, generator=draw, dtype=torch.float64)
        score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
        assert (a[i] * x + b[i] * v - (x + (v - eta**2 / 2 * score) * dt)).abs().max() < 1e-12
        assert abs(c[i] - eta * math.sqrt(-dt)) < 1e-12


def test_coefficients_equal_flow_sde_where_its_noise_is_eta():
    dance = dance_coefficients(SD3, 0.3)
    for i in range(9):
        level = 0.3 * math.sqrt((1 - min(SD3[i], SD3[1])) / SD3[i])  # flow_sde: s = level sqrt(sigma / (1 - sigma*))
        flow = flow_grpo.coefficients("flow_sde", SD3, level, (0, 9))
        for got, want in zip(dance, flow):
            assert abs(got[i] - want[i]) < 1e-12


def test_last_step_and_zero_eta_are_ode():
    ode = [torch.ones(10, dtype=torch.float64), SD3[1:] - SD3[:-1], torch.zeros(10, dtype=torch.float64)]
    for got, want in zip(dance_coefficients(SD3, 0.0), ode):
        assert got.dtype == torch.float64 and torch.equal(got, want)
    for got, want in zip(dance_coefficients(SD3, 0.3), ode):
        assert got.dtype == torch.float64 and got[9] == want[9] and (got[1:9] != want[1:9]).all()


class GaussianModel:
    """The exact velocity of data N(mean, std^2), each latent element on its own."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def condition(self, cond):
        return cond

    def velocity(self, x, sigma, cond, guidance):
        sigma = sigma.view(-1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * self.std**2 + sigma**2
        centred = (x - (1 - sigma) * self.mean) / variance
        return sigma * centred - (self.mean + (1 - sigma) * self.std**2 * centred)  # E[eps | x] - E[x0 | x]


def sample_gaussian(model, sigmas, eta, shape):
    seed_BT = fold_seed(torch.arange(shape[0])[:, None], torch.arange(len(sigmas) - 1))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    schedule = (sigmas, *dance_coefficients(sigmas, eta))
    return noise, *rollout(model, {}, noise, schedule, (1.0, 1.0), seed_BT), schedule


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_samples_have_the_marginals_of_the_data(eta):
    sigmas = torch.linspace(1, 0, 201, dtype=torch.float64)
    noise, x, states, logp, _ = sample_gaussian(GaussianModel(mean=1.5, std=0.5), sigmas, eta, (16, 4, 32, 32))
    assert logp.shape == ((16, 199) if eta else (16, 0))
    # Euler's error is about 1 / steps; that of 65,536 draws is 0.004 std for the mean and 0.003 for the std.
    assert abs(x.mean() - 1.5) < 0.01 and abs(x.std() - 0.5) < 0.01
    for i in range(49, 199, 50) if eta else ():
        sigma = sigmas[i].item()
        assert abs(states[:, i].mean() - (1 - sigma) * 1.5) < 0.01
        assert abs(states[:, i].std() - math.hypot(sigma, (1 - sigma) * 0.5)) < 0.01
    # In closed form for linear drift: what is left of the start is exp(-integral of eta^2 / (2 variance) d sigma).
    grid = torch.linspace(0, 1, 10001, dtype=torch.float64)
    left = math.exp(-(eta**2) / 2 * torch.trapezoid(1 / (0.25 * (1 - grid) ** 2 + grid**2), grid).item())
    correlation = torch.corrcoef(torch.stack([noise.flatten(), x.flatten()]))[0, 1]
    assert abs(correlation - left) < 0.015, (correlation, left)


def test_replayed_logp_equals_rollout_logp_and_last_step_is_x0():
    model = GaussianModel(mean=-0.5, std=0.3)
    _, x, states, logp, schedule = sample_gaussian(model, SD3, 0.3, (5, 3, 4, 7))
    assert states.shape == (5, 10, 3, 4, 7) and logp.shape == (5, 9)
    k, i = torch.cartesian_prod(torch.arange(9), torch.arange(5)).T
    sigma, a, b, c = (coefficient.float()[k] for coefficient in schedule)
    v = model.velocity(states[i, k], sigma, {}, None)
    assert torch.equal(sde_logp(v, states[i, k], states[i, k + 1], a, b, c)[0], logp[i, k])
    a, b, c = (coefficient.view(-1, 1, 1, 1) for coefficient in (a, b, c))
    want = torch.distributions.Normal(a * states[i, k] + b * v, c).log_prob(states[i, k + 1]).mean((1, 2, 3))
    assert torch.allclose(want, logp[i, k], atol=1e-5)
    last = states[:, -1]
    v = model.velocity(last, torch.full((5,), SD3[9].item()), {}, None)
    assert (x - (last - SD3[9].item() * v)).abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# The script, in processes of its own

TINY = dict(num_iterations=1, num_prompts=2, group_size=4, micro_batch_size=4, num_steps=4, timestep_fraction=0.7)
TINY |= dict(eval_num_steps=2, eval_size=2, eval_every=1000, save_every=1000, learning_rate=1e-4, warmup_updates=1)
TINY |= dict(
    advantage_std="group", decay_iterations=0, weight_decay=0.0, ema_decay=0.0, keep_unsharded=False, eval_prompts=""
)
TINY |= dict(noise_level=0.3, shared_noise=True, clip_eps=1e-4)
CLOCK = ("seconds_rollout", "seconds_reward", "seconds_update", "samples_per_s")


def train(out, **changes):
    """Run the script once in this process, but for the curves; the rows of its metrics.jsonl."""
    run_folder.curves = lambda *_: None
    dance_grpo.main(dataclasses.replace(dance_grpo.recipe("tiny-flux"), out=str(out), **TINY | changes))
    return run_folder.rows(str(out))


def use_rewards(**functions):
    """From here on in this process, the reward `name` is functions[name](picture) -> float."""

    def load(name, device, *judge):
        def score(samples, prompts, metadata):
            return torch.tensor([functions[name](picture) for picture in samples["image"]], dtype=torch.float32)

        score.needs, score.strict, score.name = ("image",), None, name
        return score

    rewards.load, rewards.try_out = load, lambda *_: None


def red(picture):
    return float(picture[..., 0].mean())


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def record_updates():
    """Returns a list that gets the gradients before the clipping of every update in this process."""
    recorded, clip = [], parallel.clip_grad_norm

    def clip_and_record(parameters, max_norm):
        parameters = list(parameters)
        recorded.append([full(p.grad).clone() for p in parameters])
        return clip(parameters, max_norm)

    parallel.clip_grad_norm = clip_and_record
    return recorded


class Watch:
    """What main does to its samples from here on in this process. An iteration's `tiles` of the rollout are (start
    noise, states, conditions, schedule); `pairs` is what the updates train, (sample, step) each, found by the state
    that the step led to; `losses` the log-probs and advantages that each clipped loss gets; `advantages` those of each
    reward."""

    def __init__(self):
        self.iterations = []
        names = ("rollout", "sde_logp", "clipped_pg_loss", "group_advantage")
        self.originals = {name: getattr(dance_grpo, name) for name in names}
        for name in names:
            setattr(dance_grpo, name, getattr(self, name))

    def rollout(self, model, cond, x, schedule, guidance, seed_BT=None):
        result = self.originals["rollout"](model, cond, x, schedule, guidance, seed_BT)
        if seed_BT is not None:  # not an evaluation
            if not self.iterations or self.iterations[-1]["pairs"]:
                self.iterations.append(dict(tiles=[], pairs=[], losses=[], advantages=[]))
            self.iterations[-1]["tiles"].append((x, result[1], cond, schedule))
        return result

    def sde_logp(self, v, x, x_next, a, b, c, v_ref=None):
        states = self.states()
        for row, row_next in zip(x, x_next):
            ((i, k),) = (states[:, 1:] == row_next).flatten(2).all(2).nonzero().tolist()
            assert torch.equal(states[i, k], row)
            self.iterations[-1]["pairs"].append((i, k))
        return self.originals["sde_logp"](v, x, x_next, a, b, c, v_ref)

    def clipped_pg_loss(self, logp, old_logp, adv, clip_eps):
        self.iterations[-1]["losses"].append((logp.tolist(), old_logp.tolist(), adv.tolist()))
        return self.originals["clipped_pg_loss"](logp, old_logp, adv, clip_eps)

    def group_advantage(self, *args):
        self.iterations[-1]["advantages"].append(self.originals["group_advantage"](*args))
        return self.iterations[-1]["advantages"][-1]

    def states(self):
        return torch.cat([states for _, states, _, _ in self.iterations[-1]["tiles"]])


ON_POLICY = {
    "default": dict(),
    "classifier-free guidance": dict(guidance=3.0),
    "lora": dict(lora_rank=4, kl_coef=0.1),
    "several updates": dict(num_updates=2, learning_rate=1e-3),
    "two rewards": dict(reward=("shapes", "jpeg:0.5"), multi_reward="loss"),
    "own noise, one tile": dict(shared_noise=False, micro_batch_size=8),
    "best of": dict(best_of=2),
    "best of, two rewards": dict(best_of=2, reward=("shapes", "jpeg:0.5"), advantage_std="global", lora_rank=4),
}


def train_on_policy(folder):
    return {name: train(folder / name, **changes)[0] for name, changes in ON_POLICY.items()}


def test_first_update_is_on_policy(tmp_path):
    rows = processes.run(train_on_policy, tmp_path)[0]
    for name, row in rows.items():
        # Where --best-of leaves samples out, a replayed tile has not the rows that it had in the rollout.
        assert row["on_policy_err"] <= (1e-5 if "best_of" in ON_POLICY[name] else 0), (name, row["on_policy_err"])
        assert row["reward_std"] > 0 and row["grad_norm"] > 0 and row["skipped_updates"] == 0, name
        assert abs(row["ratio"] - 1) < (1e-1 if "num_updates" in ON_POLICY[name] else 1e-5), name
    assert rows["lora"]["kl"] == 0 and rows["several updates"]["clipfrac"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


def watch(folder, num_prompts):
    use_rewards(shapes=red)
    seen, recorded = Watch(), record_updates()
    size = dict(num_iterations=2, num_prompts=num_prompts, group_size=4, micro_batch_size=4, num_steps=8)
    train(folder / f"{num_prompts}", timestep_fraction=0.6, eval_every=1, **size)
    noise = [torch.cat([x for x, *_ in iteration["tiles"]]).flatten(1).tolist() for iteration in seen.iterations]
    return noise, [iteration["pairs"] for iteration in seen.iterations], recorded


@pytest.fixture(scope="module")
def one_rank_and_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    return processes.run(watch, folder, 4)[0], processes.run(watch, folder, 2, ranks=2)


def steps_of_samples(pairs):
    """The steps that each of the samples 0 .. n - 1 trains, in their order."""
    return [[k for sample, k in pairs if sample == i] for i in range(max(i for i, _ in pairs) + 1)]


def test_each_sample_trains_its_share_of_the_steps(one_rank_and_two):
    (_, pairs, _), ranks = one_rank_and_two
    assert len(pairs) == 2
    steps = [steps_of_samples(iteration) for iteration in pairs]
    for iteration, of_ranks in zip(steps, zip(*(rank[1] for rank in ranks))):
        assert len(iteration) == 16
        for chosen in iteration:
            assert len(chosen) == len(set(chosen)) == int(7 * 0.6) == 4 and set(chosen) <= set(range(7))
        assert len(set(map(tuple, iteration))) > 12  # of 840 ordered choices: samples do not share theirs
        assert iteration == [chosen for rank in of_ranks for chosen in steps_of_samples(rank)]
        assert {k for chosen in iteration for k in chosen} == set(range(7))  # 16 x 4 draws
    assert sum(a != b for a, b in zip(*steps)) > 12


def test_samples_of_a_prompt_start_from_one_noise(one_rank_and_two):
    (noise, _, _), ranks = one_rank_and_two
    starts = []
    for iteration, of_ranks in zip(noise, zip(*(rank[0] for rank in ranks))):
        assert iteration == [row for rank in of_ranks for row in rank]
        groups = [iteration[i : i + 4] for i in range(0, 16, 4)]
        assert all(row == group[0] for group in groups for row in group)
        starts += [tuple(group[0]) for group in groups]
    assert len(set(starts)) == 8


def test_two_ranks_equal_one_with_twice_the_prompts(one_rank_and_two):
    (_, _, one), ((_, _, two), (_, _, second)) = one_rank_and_two
    for a, b, c in zip(one[0], two[0], second[0], strict=True):  # before the first update: with the same weights
        assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0 and torch.equal(b, c)
    norm = math.sqrt(sum(a.norm().item() ** 2 for a in one[1]))
    assert math.sqrt(sum((a - b).norm().item() ** 2 for a, b in zip(one[1], two[1]))) < 1e-2 * norm


BY_HAND = dict(
    eval_size=2, num_prompts=2, group_size=6, best_of=4, micro_batch_size=4, num_steps=4, timestep_fraction=0.7
)
WEIGHTS = {"red": 1.0, "blue": 0.5}


def train_by_hand(folder, multi_reward):
    """One update of the script; the same gradient from its samples and rewards alone; and what the update did to the
    log-probs of the samples."""
    judged = {"red": [], "blue": []}
    functions = {"red": red, "blue": lambda picture: float(picture[..., 2].std())}

    def judge(name, picture):
        judged[name].append(functions[name](picture))
        return judged[name][-1]

    use_rewards(red=lambda picture: judge("red", picture), blue=lambda picture: judge("blue", picture))
    seen, recorded = Watch(), record_updates()
    specs = tuple(f"{name}:{weight}" for name, weight in WEIGHTS.items())
    args = dict(BY_HAND, reward=specs, multi_reward=multi_reward, learning_rate=2e-6)
    train(folder / multi_reward, **args)
    skip = args["eval_size"]  # iteration 0 begins with an evaluation
    reward_RPG = np.array([values[skip : skip + 12] for values in judged.values()]).reshape(2, 2, 6)

    centred = reward_RPG - reward_RPG.mean(2, keepdims=True)
    adv_RPG = centred / (np.sqrt((centred**2).mean(2, keepdims=True)) + 1e-4)
    adv_PG = np.einsum("r,rpg->pg", list(WEIGHTS.values()), adv_RPG)
    rank_PG = adv_PG.argsort(1).argsort(1)
    chosen = set(np.flatnonzero((rank_PG < 2) | (rank_PG >= 4)).tolist())
    pairs = seen.iterations[0]["pairs"]
    adv = torch.tensor(adv_PG.flatten(), dtype=torch.float32)

    states, tiles = seen.states(), seen.iterations[0]["tiles"]
    cond = {name: torch.cat([cond[name] for _, _, cond, _ in tiles]) for name in tiles[0][2]}
    sigmas = tiles[0][3][0]

    def objective(name):
        """sum over trained pairs of advantage times log-prob, and the model it is of."""
        model = models.load(name, "cpu", torch.float32)
        i, k = torch.tensor(pairs).T
        sigma, sigma_next = sigmas[k].view(-1, 1, 1, 1), sigmas[k + 1].view(-1, 1, 1, 1)
        dt = sigma_next - sigma
        x = states[i, k]
        v = model.velocity(x, sigma.flatten().float(), {name: rows[i] for name, rows in cond.items()}, (1.0, 1.0))
        score = -(x + (1 - sigma) * v) / sigma
        policy = torch.distributions.Normal(x + (v - 0.3**2 / 2 * score) * dt, 0.3 * (-dt).sqrt())
        logp = policy.log_prob(states[i, k + 1].double()).mean((1, 2, 3))
        return (adv[i] * logp).mean(), model

    before, model = objective("tiny-flux")
    (-before).backward()
    by_hand = [p.grad for p in parallel.trained(model.parts).values()]
    after, _ = objective(str(folder / multi_reward / "model"))
    return pairs, chosen, by_hand, recorded[0], before.item(), after.item()


@pytest.mark.parametrize("multi_reward", ["advantage", "loss"])
def test_update_equals_one_by_hand(tmp_path, multi_reward):
    pairs, chosen, by_hand, gradient, before, after = processes.run(train_by_hand, tmp_path, multi_reward)[0]
    # Of each group of six, the two best and the two worst, each at two of its three steps.
    assert {i for i, _ in pairs} == chosen and len(chosen) == 8 and len(set(pairs)) == len(pairs) == 16
    for want, got in zip(by_hand, gradient, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9, ((got - want).norm(), want.norm())
    # Adam's first step is learning rate x sign(gradient): the better samples become likelier by that times |gradient|.
    expected = 2e-6 * sum(g.abs().sum().item() for g in gradient)
    assert after - before == pytest.approx(expected, rel=0.05), (before, after, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Several rewards

REWARDS = {
    "advantage": dict(reward=("red", "blue:0.5"), multi_reward="advantage"),
    "loss": dict(reward=("red", "blue:0.5"), multi_reward="loss"),
    "advantage, wide clip": dict(reward=("red", "blue:0.5"), multi_reward="advantage", clip_eps=10.0),
    "loss, wide clip": dict(reward=("red", "blue:0.5"), multi_reward="loss", clip_eps=10.0),
    "one advantage": dict(reward=("red",), multi_reward="advantage"),
    "one loss": dict(reward=("red",), multi_reward="loss"),
    "scaled": dict(reward=("scaled", "blue:0.5"), multi_reward="advantage"),
    "scaled, global": dict(reward=("scaled", "blue:0.5"), multi_reward="advantage", advantage_std="global"),
    "global": dict(reward=("red", "blue:0.5"), multi_reward="advantage", advantage_std="global"),
    "penalty": dict(reward=("red", "minus blue:-0.5"), multi_reward="loss"),
}


def train_with_rewards(folder):
    def kilo_red(picture):  # large next to the 1e-4 that is added to a std
        return 1024 * red(picture)

    def blue(picture):
        return 1024 * (float(picture[..., 2].mean()) / 2 - red(picture))

    use_rewards(
        **{"red": kilo_red, "blue": blue},
        **{"scaled": lambda picture: 1024 * kilo_red(picture), "minus blue": lambda picture: -blue(picture)},
    )
    seen, recorded, runs = Watch(), record_updates(), {}
    for name, changes in REWARDS.items():
        rows = train(folder / name, num_updates=2, learning_rate=1e-3, micro_batch_size=4, **changes)
        runs[name] = recorded[-2:], seen.iterations[-1], rows[0]
    return runs


@pytest.fixture(scope="module")
def reward_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return folder, processes.run(train_with_rewards, folder)[0]


def distance(a, b):
    """Relative Frobenius distance of two updates' gradients."""
    difference = sum((x - y).double().square().sum().item() for x, y in zip(a, b, strict=True))
    return math.sqrt(difference / sum(x.double().square().sum().item() for x in a))


def test_of_one_reward_advantage_and_loss_are_the_same(reward_runs):
    folder, runs = reward_runs
    (a, _, row_a), (b, _, row_b) = runs["one advantage"], runs["one loss"]
    assert all(torch.equal(x, y) for update in (0, 1) for x, y in zip(a[update], b[update], strict=True))
    assert row_a["loss"] == row_b["loss"] and row_a["clipfrac"] > 0
    ends = [
        load_file(checkpoint.latest(folder / name) / "rank-00000.safetensors") for name in ("one advantage", "one loss")
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_advantages_and_losses_differ_once_ratios_are_clipped(reward_runs):
    _, runs = reward_runs
    first, second = (distance(a, b) for a, b in zip(runs["advantage"][0], runs["loss"][0]))
    assert first < 1e-5 and second > 0.05, (first, second)
    first, second = (distance(a, b) for a, b in zip(runs["advantage, wide clip"][0], runs["loss, wide clip"][0]))
    assert first < 1e-5 and second < 1e-4, (first, second)
    assert distance(runs["advantage"][0][0], runs["one advantage"][0][0]) > 0.1  # the second reward counts


def test_losses_equal_their_formula(reward_runs):
    """loss = sum over rewards of weight x mean(max(-A ratio, -A clip(ratio))), or one such term of the summed A."""
    _, runs = reward_runs
    for name in ("advantage", "loss"):
        _, seen, row = runs[name]
        adv_RB, terms, opposite = torch.stack(seen["advantages"]).double().numpy(), [], 0
        assert adv_RB.shape == (2, 8) and len(seen["pairs"]) == 16
        for n in range(4):
            logp, old_logp, _ = seen["losses"][n * len(seen["losses"]) // 4]
            adv_RS = adv_RB[:, [i for i, _ in seen["pairs"][4 * n : 4 * n + 4]]] * [[1.0], [0.5]]
            opposite += (adv_RS.prod(0) < 0).sum()
            adv_RS = adv_RS if name == "loss" else adv_RS.sum(0, keepdims=True)
            ratio = np.exp(np.array(logp) - old_logp)
            pessimistic = np.maximum(-adv_RS * ratio, -adv_RS * ratio.clip(1 - 1e-4, 1 + 1e-4))
            terms.append(pessimistic.mean(1).sum())
        assert row["loss"] == pytest.approx(np.mean(terms), abs=1e-6)
        assert opposite > 3  # the two rewards do pull against each other


def test_a_penalty_is_the_reward_of_the_opposite(reward_runs):
    # A weight of -0.5 for r is one of 0.5 for -r: the clip bounds the gain, whichever sign the weight has.
    _, runs = reward_runs
    for a, b in zip(runs["loss"][0], runs["penalty"][0]):
        assert distance(a, b) < 1e-5, distance(a, b)


def test_each_reward_is_normalised_by_itself(reward_runs):
    _, runs = reward_runs
    for name, other in (("advantage", "scaled"), ("global", "scaled, global")):
        assert distance(runs[name][0][0], runs[other][0][0]) < 1e-5, name
    assert distance(runs["advantage"][0][0], runs["global"][0][0]) > 1e-3
    assert runs["scaled"][2]["reward"] > 100 * runs["advantage"][2]["reward"]  # metrics keep the sum as it is


def train_on_uneven_tiles(folder):
    recorded, ends = record_updates(), []
    for size in (8, 12):
        try:
            train(folder / str(size), micro_batch_size=size)
            ends.append(recorded[-1])
        except SystemExit as error:
            ends.append(str(error))
    return ends


def test_all_pairs_of_an_update_weigh_the_same(tmp_path):
    # 16 pairs in tiles of 12 would be 12 and 4, and the 4 would count three times.
    eight, twelve = processes.run(train_on_uneven_tiles, tmp_path)[0]
    if isinstance(twelve, str):
        assert twelve.startswith("error: --micro-batch-size ")
    else:
        assert distance(eight, twelve) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# NaN


def train_with_nan_rewards(folder):
    """The first sample of every tile of four has no `half`; `none` fails for all."""
    count = iter(range(10**6))

    def half(picture):
        return math.nan if next(count) % 4 == 0 else red(picture) - float(picture[..., 2].mean())

    use_rewards(red=lambda picture: float(picture[..., 1].std()), half=half, none=lambda picture: math.nan)
    seen, ends = Watch(), {}
    two = dict(reward=("red", "half:2"), eval_size=4, multi_reward="loss")
    for name, changes in {"loss": two, "best": dict(reward=("half",), best_of=2, eval_size=4)}.items():
        rows = train(folder / name, **changes)
        ends[name] = (
            rows,
            seen.iterations[-1]["pairs"],
            seen.iterations[-1]["losses"],
            seen.iterations[-1]["advantages"],
        )
    with pytest.raises(SystemExit) as error:
        train(folder / "none", reward=("red", "none"))
    return ends, str(error.value)


def test_nan_rewards_are_left_out_and_counted(tmp_path):
    ends, error = processes.run(train_with_nan_rewards, tmp_path)[0]
    rows, pairs, losses, advantages = ends["loss"]
    assert rows[0]["nan_reward_frac"] == 0.25 and math.isfinite(rows[0]["reward"]) and rows[0]["grad_norm"] > 0
    assert math.isfinite(rows[1]["eval_reward"])
    adv = {name: [a for _, _, tile in losses[r::2] for a in tile] for r, name in enumerate(("red", "half"))}
    assert len(adv["red"]) == len(pairs) == 16
    for name, failed in (("red", ()), ("half", (0, 4))):  # the reward that did not fail still trains its sample
        assert {i for (i, _), a in zip(pairs, adv[name]) if a == 0} == set(failed), name
    assert advantages[1].view(2, 4).sum(1).abs().max() < 1e-5
    rows, pairs, _, _ = ends["best"]
    assert rows[0]["nan_reward_frac"] == 0.25 and rows[0]["grad_norm"] > 0
    assert len({i for i, _ in pairs}) == 4 and not {0, 4} & {i for i, _ in pairs}
    assert error.startswith("error: reward none failed") and "iteration 0" in error


# ----------------------------------------------------------------------------------------------------------------------
# Resume

RESUMED = TINY | dict(num_iterations=3, save_every=1, eval_every=2, num_updates=2, best_of=2, micro_batch_size=2)
RESUMED |= dict(ema_decay=0.9, keep_checkpoints=3, reward=("shapes", "jpeg:0.5"), multi_reward="loss", lora_rank=4)


def train_and_stop(run, calls):
    """SIGTERM after so many losses."""
    count, original = iter(range(10**6)), dance_grpo.clipped_pg_loss

    def loss_and_stop(*args):
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    dance_grpo.clipped_pg_loss = loss_and_stop
    train(run, **RESUMED)


def resume(run):
    argv = ["--resume", str(run)]
    defaults = dance_grpo.recipe(run_folder.peek(argv, "--model", "tiny-flux"))
    dance_grpo.main(run_folder.command_line(defaults, argv, dance_grpo.__file__))


def test_resumed_run_equals_one_that_never_stopped(tmp_path):
    # An iteration has two updates of two tiles with two losses each: it is told to stop in the first of iteration 1.
    straight = processes.start(train_straight, tmp_path / "straight")[0]
    stopped = processes.start(train_and_stop, tmp_path / "stopped", 9)[0]
    for process, code in ((straight, 0), (stopped, 143)):
        process.join(60)
        assert process.exitcode == code
    assert [row["iteration"] for row in run_folder.rows(str(tmp_path / "stopped"))] == [0]
    processes.run(resume, tmp_path / "stopped")
    ends = [checkpoint.latest(tmp_path / name) for name in ("straight", "stopped")]
    a, b = (load_file(end / "rank-00000.safetensors") for end in ends)
    assert ends[0].name == ends[1].name == "000003" and a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert {name.split("/")[0] for name in a} == {"model", "optimizer", "ema"}
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in run_folder.rows(str(tmp_path / name))]
        for name in ("straight", "stopped")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert json.loads((ends[0] / "state.json").read_text()) == json.loads((ends[1] / "state.json").read_text())


def train_straight(run):
    train(run, **RESUMED)


# ----------------------------------------------------------------------------------------------------------------------
# Recipes

LARGE = [name for name in models.ALIASES if not name.startswith("tiny-")]


def test_recipes_are_the_published_ones():
    assert dance_grpo.recipe("tiny-flux") == dance_grpo.Args()
    for name in LARGE:
        lora, full = dance_grpo.recipe(name), dance_grpo.recipe(name, "0")
        for args in (lora, full):
            assert args.model == name and args.group_size == 12 and args.noise_level == 0.3 and args.shared_noise
            assert args.timestep_fraction == 0.6 and args.clip_eps == 1e-4 and args.kl_coef == 0
            assert args.advantage_std == "group" and args.advantage_clip == 5 and args.dtype == "bf16"
        assert lora.lora_rank > 0 and lora.max_grad_norm == 1 and lora.learning_rate >= 5e-5
        assert (full.lora_rank, full.learning_rate, full.num_steps, full.max_grad_norm) == (0, 1e-5, 16, 0.01)
        assert dance_grpo.recipe(name, "64") == lora
    flux = dance_grpo.recipe("flux")
    assert (flux.lora_rank, flux.learning_rate, flux.num_steps, flux.resolution) == (128, 3e-4, 12, 720)
    assert (flux.num_iterations, flux.ema_decay, flux.guidance) == (300, 0.995, 3.5)


def check_sizes():
    """main's own checks: --dry-run stops after them, and then sizes up tiny-flux, which needs no other files."""
    small = dict(model="tiny-flux", prompts="data/scenes.txt", dry_run=True)
    for name in LARGE:
        for lora_rank in ("", "0"):
            args = dance_grpo.recipe(name, lora_rank)
            dance_grpo.main(dataclasses.replace(args, **small))
            with pytest.raises(SystemExit, match="--micro-batch-size 5 must divide"):
                dance_grpo.main(dataclasses.replace(args, **small, micro_batch_size=5))


def test_recipes_fit_their_own_sizes():
    # What a rank does is the same on 1 GPU as on 8: the checks are of what each rank holds.
    processes.run(check_sizes)
    for name in LARGE:
        args = dance_grpo.recipe(name)
        assert args.resolution % (32 if name == "sana" else 16) == 0
        assert rewards.parse(args.reward)
        train_set = prompt_data.load(args.prompts, "train", eval_source=args.eval_prompts or None)
        assert (train_set[0]["image"] is not None) == (name == "kontext") and len(train_set) > 100
        assert prompt_data.load(args.prompts, "eval", eval_source=args.eval_prompts or None)


def help_of(commands):
    """What the script prints for each command line."""
    shown = []
    for argv in commands:
        sys.argv = ["dance_grpo.py", *argv, "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
            runpy.run_path(dance_grpo.__file__, run_name="__main__")
        shown.append(re.sub(r"[\s│]+", " ", output.getvalue()))  # tyro wraps lines and draws a frame
    return shown


def test_full_fine_tuning_has_its_own_defaults_however_the_flag_is_written():
    model = ["--model", "flux"]
    full = [["--lora-rank", "0"], ["--lora-rank=0"], ["--lora_rank", "0"], ["--lora_rank=0"]]
    (shown,) = processes.run(help_of, [[*model, *argv] for argv in ([], ["--lora-rank", "64"], *full)])
    for n, text in enumerate(shown):
        learning_rate = re.search(r"--learning-rate FLOAT .*?\(default: (\S+)\)", text)[1]
        num_steps = re.search(r"--num-steps INT .*?\(default: (\d+)\)", text)[1]
        assert (float(learning_rate), int(num_steps)) == ((3e-4, 12) if n < 2 else (1e-5, 16)), full[n - 2]


def refusals(commands):
    messages = []
    for argv in commands:
        try:
            defaults = dance_grpo.recipe(run_folder.peek(argv, "--model", "tiny-flux"))
            dance_grpo.main(run_folder.command_line(defaults, argv, dance_grpo.__file__))
            messages.append("no error")
        except SystemExit as error:
            messages.append(str(error.code))
    return messages


def test_wrong_flags_are_one_message(tmp_path):
    cases = [
        (["--timestep-fraction", "0.1"], "--timestep-fraction 0.1 of the 5 noisy steps of --num-steps 6 leaves none"),
        (["--timestep-fraction", "1.5"], "--timestep-fraction 1.5 of the 5 noisy steps"),
        (["--num-steps", "1"], "of the 0 noisy steps of --num-steps 1"),
        (["--best-of", "3"], "--best-of 3 must be even and at most --group-size 12"),
        (["--best-of", "14"], "--best-of 14 must be even and at most --group-size 12"),
        (["--best-of", "8"], "--micro-batch-size 96 must divide the 192 samples"),
        (["--num-updates", "3"], "whose number --num-updates 3 divides"),
        (["--noise-level", "0"], "--noise-level positive"),
    ]
    run = str(tmp_path / "run")
    (messages,) = processes.run(refusals, [["--out", run, *argv] for argv, _ in cases])
    for (argv, expected), message in zip(cases, messages):
        assert message.startswith("error: ") and expected in message and "\n" not in message, (argv, message)
    assert not os.path.exists(run)
