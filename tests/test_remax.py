import dataclasses
import itertools
import math

import processes
import pytest
import torch
from test_rloo import (
    BY_HAND,
    ON_POLICY,
    RANKS,
    AllCompletions,
    ByHand,
    check_averaged_weights,
    check_by_hand,
    check_draws,
    check_errors,
    check_evaluation,
    check_importance_weights,
    check_nan_gradients,
    check_nan_rewards,
    check_on_policy,
    check_ranks,
    check_resume,
    check_tiles,
    check_trained_tokens,
    draw_three_times,
    gradients_of_tiles,
    learn,
    ppo,
    random_tile,
    record_rollouts,
    reward_by_hand,
    train,
    train_and_record,
    train_and_watch_logps,
    train_on_policy,
    train_with_nan_gradients,
    train_with_nan_rewards,
)

import remax
from kernels.sde_step import fold_seed
from remax import greedy_baseline_advantage, overlong_penalty, token_pg_loss

# ----------------------------------------------------------------------------------------------------------------------
# advantage, loss


@pytest.mark.parametrize("group_size", [1, 3])
def test_greedy_baseline_advantage_equals_loops(group_size):
    draw = torch.Generator().manual_seed(0)
    P, L = 6, 5
    reward = torch.randn(P, group_size + 1, generator=draw, dtype=torch.float64) * 3 + 100
    reward[1, 0] = math.nan  # a sample
    reward[2, -1] = math.nan  # the greedy one: none of its prompt counts
    reward[3] = math.nan
    penalty = torch.randn(P * group_size, L, generator=draw, dtype=torch.float64)
    penalty[:, 3:] = 0  # behind the end
    got = greedy_baseline_advantage(reward.flatten(), group_size, penalty).view(P, group_size, L)
    for p, g, t in itertools.product(range(P), range(group_size), range(L)):
        want = reward[p, g].item() - reward[p, group_size].item()
        for s in range(t, L):
            want -= penalty[p * group_size + g, s].item()
        want = 0.0 if p in (2, 3) or (p, g) == (1, 0) else want
        assert got[p, g, t].item() == pytest.approx(want, abs=1e-12), (p, g, t)
    assert got.dtype == torch.float64 and (got != 0).all(2).sum() == (P - 2) * group_size - 1
    plain = greedy_baseline_advantage(torch.tensor([3.0, 1.0, 2.0, 2.0]), 1, torch.zeros(2, 3))
    assert plain.tolist() == [[2.0] * 3, [0.0] * 3]


def test_loss_equals_plain_python():
    logp, old_logp, adv, mask = random_tile()
    adv = adv[:, None] + torch.linspace(-1, 1, 6)
    loss, ratio = token_pg_loss(logp, old_logp, adv, mask, 0.1)
    loss.sum().backward()
    for b, t in itertools.product(range(40), range(6)):
        log_ratio = (logp[b, t] - old_logp[b, t]).item()
        want, slope = ppo(log_ratio, adv[b, t].item(), 0.1) if mask[b, t] else (0.0, 0.0)
        assert loss[b, t].item() == pytest.approx(want, abs=1e-12)
        assert logp.grad[b, t].item() == pytest.approx(slope, abs=1e-12)
        assert ratio[b, t].item() == pytest.approx(math.exp(log_ratio) if mask[b, t] else 1.0)


def test_gradient_at_ratio_one_is_that_of_reinforce():
    logp, _, adv, mask = random_tile()
    adv = adv[:, None] + torch.linspace(-1, 1, 6)
    (want,) = torch.autograd.grad(-(adv * logp * mask).sum(), logp)
    loss, _ = token_pg_loss(logp, logp.detach(), adv, mask, 0.2)
    assert torch.equal(torch.autograd.grad(loss.sum(), logp)[0], want)


@pytest.mark.parametrize("log_ratio", [-1e4, -60.0, 60.0, 1e4])
def test_extreme_log_ratios_are_finite(log_ratio):
    logp = torch.full((2, 3), log_ratio).requires_grad_()
    adv = torch.tensor([[1.5] * 3, [-1.5] * 3])
    loss, ratio = token_pg_loss(logp, torch.zeros(2, 3), adv, torch.ones(2, 3), 0.2)
    loss.sum().backward()
    assert loss.isfinite().all() and ratio.isfinite().all() and logp.grad.isfinite().all()
    assert loss.detach()[0].tolist() == pytest.approx([-1.8 if log_ratio > 0 else 0.0] * 3)
    assert (loss[1] >= 1.2 - 1e-6).all() and logp.grad.abs().max() < 1e-20


def test_overlong_penalty_equals_dapo():
    for max_new_tokens, buffer in ((20, 5), (7, 6), (4, 1)):
        for length in range(1, max_new_tokens + 1):
            expected = max_new_tokens - buffer  # eq. 13: L_max, L_cache
            want = 0.0 if length <= expected else (expected - length) / buffer
            assert overlong_penalty(torch.tensor([length]), max_new_tokens, buffer).item() == pytest.approx(want)


# ----------------------------------------------------------------------------------------------------------------------
# The expectation of the gradient over all samples there are


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
@pytest.mark.parametrize("group_size", [1, 2])
def test_gradient_is_unbiased(group_size, kl_coef):
    world = AllCompletions()
    best = world.logits.argmax(-1)[world.place] == world.ids
    (greedy,) = [row for row in range(15) if best[row, : world.mask[row].sum()].all()]

    def loss_of(logp, tuples, to_go=True, own_sample=0.0):
        rows = tuples.flatten()
        baseline = (1 - own_sample) * world.reward[greedy] + own_sample * world.reward[tuples].mean(1, keepdim=True)
        reward = torch.cat([world.reward[tuples], baseline.expand(len(tuples), 1)], dim=1).flatten()
        penalty = kl_coef * (logp.detach() - world.ref_logp[rows])
        if not to_go:
            # So that what is summed from a token on is its own alone.
            penalty = penalty - torch.nn.functional.pad(penalty[:, 1:], (0, 1))
        adv = greedy_baseline_advantage(reward, group_size, penalty)
        return token_pg_loss(logp, logp.detach(), adv, world.mask[rows], 0.2)[0].sum(1)

    exact = world.exact_gradient(kl_coef)
    assert exact.abs().max() > 0.1
    assert (world.expected_gradient(group_size, loss_of) - exact).abs().max() < 1e-10
    biased = world.expected_gradient(group_size, lambda *args: loss_of(*args, own_sample=0.5))
    assert (biased - exact).abs().max() > 0.02
    if kl_coef:  # each token's own penalty only, as in the paper's code
        biased = world.expected_gradient(group_size, lambda *args: loss_of(*args, to_go=False))
        assert (biased - exact).abs().max() > 0.02


# ----------------------------------------------------------------------------------------------------------------------
# The script, in processes of its own


def of_remax(configurations):
    return {
        key: {flag: value for flag, value in changes.items() if flag != "ratio"}
        for key, changes in configurations.items()
        if key != "token"
    }


def test_first_update_is_on_policy(tmp_path):
    configurations = ON_POLICY | {"one sample": dict(group_size=1)}
    check_on_policy(processes.run(train_on_policy, "remax", tmp_path, configurations)[0])


def remax_by_hand(args, updates, rollout):
    """(gradients of every update, the same if the stop token were not trained, mean KL, mean reward)."""
    every, G = ByHand(rollout, args.temperature), args.group_size
    of_all = reward_by_hand(every, args)
    sampled = [i for i in range(len(of_all)) if i % (G + 1) < G]
    tensors = (x[sampled] for x in rollout[1:])
    hand = ByHand(([rollout[0][i] for i in sampled], *tensors), args.temperature)
    with torch.no_grad():
        old, reference = hand.logps(updates[0][0]), hand.logps(hand.pretrained)
        best = [z.argmax(-1).tolist() for z in every.logits(updates[0][0])]
    for i in range(G, len(of_all), G + 1):  # what is not trained on is the greedy one
        assert best[i] == every.ids[i, : every.length[i]].tolist()
    B = len(sampled)
    kl = [a - b for a, b in zip(old, reference)]
    adv = []
    for b, i in enumerate(sampled):
        r = of_all[i] - of_all[i // (G + 1) * (G + 1) + G]
        adv.append([r - args.kl_coef * sum(kl[b][t:].tolist()) for t in range(hand.length[b])])
    order = fold_seed(args.seed, remax.ORDER, 0, torch.arange(B)).argsort().tolist()
    size, gradients, without_stop = B // args.num_updates, [], []
    for n, (weights, _) in enumerate(updates):
        share = order[n * size : (n + 1) * size]
        trained = [b for b in share if not (args.mask_truncated and hand.truncated[b])]
        logps = hand.logps(weights)
        divisor = size if args.normalizer == "samples" else sum(hand.length[b] for b in trained)
        for last, results in ((0, gradients), (1, without_stop)):
            loss = 0.0
            for b in trained:
                for t in range(hand.length[b] - last * (not hand.truncated[b])):
                    ratio = (logps[b][t] - old[b][t]).exp()
                    low, high = 1 - args.clip_eps, 1 + args.clip_eps
                    bounded = ratio.clamp(max=high) if adv[b][t] > 0 else ratio.clamp(min=low)
                    loss = loss - adv[b][t] * bounded
            results.append(hand.gradient(loss / divisor))
    return gradients, without_stop, sum(k.sum().item() for k in kl) / B, sum(of_all[i] for i in sampled) / B


def test_gradients_equal_those_of_single_samples_in_fp64(tmp_path):
    configurations = of_remax(BY_HAND) | {
        "one sample": dict(group_size=1, kl_coef=0.5, overlong_buffer=3, temperature=2.0)
    }
    del configurations["token ratio"]
    found = processes.run(train_and_record, "remax", tmp_path, configurations, 0.01)[0]
    check_by_hand("remax", configurations, found, remax_by_hand, tmp_path)


def test_tile_size_does_not_change_the_update(tmp_path):
    configurations = {normalizer: dict(normalizer=normalizer) for normalizer in ("samples", "tokens")}
    check_tiles(processes.run(gradients_of_tiles, "remax", tmp_path, configurations)[0], configurations)


def test_two_ranks_equal_one_with_twice_the_prompts(tmp_path):
    check_ranks("remax", tmp_path, RANKS)


def test_stop_token_is_trained_and_truncated_samples_if_wanted(tmp_path):
    found = processes.run(train_and_watch_logps, "remax", tmp_path)[0]
    check_trained_tokens(found, [i for i in range(40) if i % 5 < 4])


def test_every_iteration_has_prompts_and_seeds_of_its_own(tmp_path):
    check_draws(processes.run(draw_three_times, "remax", tmp_path)[0])


def batch_sizes(folder):
    rollouts, sizes = record_rollouts("remax"), []
    for size in (0, 11):
        rollouts.clear()
        train("remax", folder / str(size), rollout_batch_size=size)
        sizes.append([len(prompts) for prompts, *_ in rollouts])
    return sizes


def test_greedy_ones_are_sampled_in_the_batch_of_the_others(tmp_path):
    assert processes.run(batch_sizes, tmp_path)[0] == [[4, 20, 4], [4, 11, 9, 4]]


def test_accuracy_rises(tmp_path):
    before, after = processes.run(learn, "remax", tmp_path, False)[0]
    assert after - before >= 0.2, (before, after)  # from .436 to .69


def test_accuracy_does_not_rise_with_shuffled_rewards(tmp_path):
    before, after = processes.run(learn, "remax", tmp_path, True)[0]
    assert after - before < 0.05, (before, after)  # two standard errors; three runs: from -.11 to -.01


def test_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    check_resume("remax", tmp_path, "token_pg_loss")


def test_evaluation_equals_a_recount(tmp_path):
    check_evaluation("remax", tmp_path)


def test_averaged_weights_are_evaluated_and_exported(tmp_path):
    check_averaged_weights("remax", tmp_path)


def test_nan_rewards_are_left_out_and_counted(tmp_path):
    check_nan_rewards(processes.run(train_with_nan_rewards, "remax", tmp_path)[0], 32)


def test_nan_gradients_are_skipped_and_counted(tmp_path):
    check_nan_gradients(processes.run(train_with_nan_gradients, "remax", tmp_path)[0])


def test_errors_name_what_is_wrong(tmp_path):
    check_errors("remax", tmp_path, 0)


def test_recipe_is_chosen_by_the_model():
    assert remax.recipe("tiny-qwen") == remax.Args()
    gsm8k = remax.recipe("qwen2.5-3b")
    assert gsm8k.lm == "qwen2.5-3b" and gsm8k.dtype == "bf16" and gsm8k.reward == ("math",)
    assert dataclasses.replace(remax.recipe("some/model"), lm="qwen2.5-3b") == gsm8k
    # 512 prompts of 4 samples on 8 GPUs, in 4 updates
    assert (8 * gsm8k.num_prompts, gsm8k.group_size, gsm8k.num_updates) == (512, 4, 4)
    pictures = remax.recipe("tiny-qwen-vl")
    assert (pictures.lm, pictures.reward, pictures.prompts) == ("tiny-qwen-vl", ("shapes_qa",), "shapes-qa")


def test_samples_of_another_engine_are_weighted(tmp_path):
    check_importance_weights("remax", tmp_path)
