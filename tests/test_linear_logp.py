"""Both paths run the same tests: this process the PyTorch reference, and test_again_in_the_triton_interpreter this file
a second time with TRITON_INTERPRET=1, which Triton reads when it is imported."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels.linear_logp as module
from kernels import INTERPRET
from kernels.linear_logp import linear_logp

IGNORE = -100
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# N V D around the interpreter's tiles (16, 32, 32), its splits (96) and the chunks lowered below (128 and 256). 608 =
# 2 * 256 + 96 ends in part of a chunk and of a split, like 151,936 = 18 * 8192 + 4480 = 74 * 2048 + 384.
SHAPES = [(1, 1, 1), (1, 40, 3), (3, 97, 33), (17, 128, 32), (33, 517, 80), (16, 608, 64), (5, 1408, 24), (2, 1920, 16)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "REFERENCE_CHUNK", 128)
    monkeypatch.setattr(module, "DX_CHUNK", 256)


def make_inputs(N, V, D, dtype=torch.float32, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(N, D, generator=g)
    weight = 2 * D**-0.5 * torch.randn(V, D, generator=g)
    target = torch.randint(0, V, (N,), generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def formula(hidden, weight, target, temperature=1.0, softcap=None):
    """logp and entropy in fp64 from the logits of the same (rounded) inputs, differentiable by autograd."""
    x = hidden.double() @ weight.double().T
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[..., None]
    logps = F.log_softmax(x / temperature, -1)
    kept = target != IGNORE
    logp = logps.gather(-1, target.clamp_min(0)[..., None]).squeeze(-1)
    return logp * kept, -(logps.exp() * logps).sum(-1) * kept


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def compare(hidden, weight, target, atol=1e-5, rtol=None, **options):
    """Values, and gradients under random upstream gradients, of linear_logp against the formula."""
    rtol = rtol or GRADIENT_RTOL[hidden.dtype]
    logp, entropy = linear_logp(hidden, weight, target, return_entropy=True, **options)
    hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
    want_logp, want_entropy = formula(hidden64, weight64, target, **options)
    assert logp.dtype == entropy.dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert (logp - want_logp).abs().max() <= atol and (entropy - want_entropy).abs().max() <= atol
    assert (logp <= 0).all()
    g_logp, g_entropy = torch.randn(2, *target.shape, generator=torch.Generator().manual_seed(1)).to(logp.dtype)
    for outputs in ((logp,), (logp, entropy), (entropy,)):
        upstream = {1: (g_logp if outputs[0] is logp else g_entropy,), 2: (g_logp, g_entropy)}[len(outputs)]
        wanted = {1: (want_logp if outputs[0] is logp else want_entropy,), 2: (want_logp, want_entropy)}[len(outputs)]
        got = torch.autograd.grad(outputs, (hidden, weight), upstream, retain_graph=True)
        want = torch.autograd.grad(wanted, (hidden64, weight64), [g.double() for g in upstream], retain_graph=True)
        for name, d, d64, like in zip(("dH", "dW"), got, want, (hidden, weight)):
            assert d.dtype == like.dtype and d.shape == like.shape
            if d64.norm() > 1e-9:  # V = 1: both are 0
                assert relative(d, d64) <= rtol, name
            else:
                assert d.norm() < 1e-6, name


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_formula(shape, dtype):
    compare(*make_inputs(*shape, dtype))


@pytest.mark.parametrize("softcap", [None, 5.0, 30])
@pytest.mark.parametrize("temperature", [0.3, 1, 2.0, "per row"])
def test_temperature_and_softcap_equal_the_formula(temperature, softcap):
    hidden, weight, target = make_inputs(17, 300, 40)
    if temperature == "per row":
        temperature = torch.linspace(0.3, 2.0, 17)
    compare(hidden, weight, target, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_temperature_and_softcap_in_other_dtypes(dtype):
    hidden, weight, target = make_inputs(9, 300, 40, dtype)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    compare(hidden, weight, target, atol, temperature=torch.linspace(0.3, 2.0, 9), softcap=5.0)


def test_softcap_of_small_logits():
    """1 - 2 / (exp(2 x) + 1) in fp32 is off by 1e-7, so 5e-5 nats under a cap of 500."""
    hidden, weight, target = make_inputs(16, 200, 32)
    compare(hidden, weight, target, atol=3e-6, softcap=500.0)


def test_gradcheck():
    hidden, weight, target = make_inputs(5, 37, 12, torch.float64)
    target[2] = IGNORE
    temperature = torch.linspace(0.5, 1.5, 5)
    for softcap in (None, 3.0):

        def function(hidden, weight):
            return linear_logp(hidden, weight, target, temperature, softcap, return_entropy=True)

        # fast_mode checks a random projection of the Jacobian; the whole one takes the interpreter a minute.
        assert torch.autograd.gradcheck(function, (hidden, weight), fast_mode=INTERPRET)


def test_probabilities_of_all_targets_sum_to_one():
    hidden, weight, _ = make_inputs(3, 150, 20)
    logp, entropy = linear_logp(
        hidden[:, None].expand(3, 150, 20), weight, torch.arange(150).expand(3, 150), 0.7, return_entropy=True
    )
    assert logp.shape == (3, 150)
    assert (logp.double().exp().sum(1) - 1).abs().max() < 1e-5
    assert (entropy + (logp.exp() * logp).sum(1, keepdim=True)).abs().max() < 1e-5


def test_uniform_logits_have_closed_forms():
    hidden, weight = torch.zeros(4, 8), torch.randn(1001, 8)
    logp, entropy = linear_logp(hidden, weight, torch.tensor([0, 1, 500, 1000]), return_entropy=True)
    assert (logp + torch.tensor(1001.0).log()).abs().max() < 1e-6
    assert (entropy - torch.tensor(1001.0).log()).abs().max() < 1e-6


@pytest.mark.parametrize("V", [33, 97, 129, 193, 257, 1408, 1920])
def test_no_column_beyond_the_vocabulary_counts(V):
    """All logits are near -60 or -2e4: a spurious 0 of a padded column would be the whole sum."""
    for scale, atol in ((60.0, 1e-5), (2e4, 4e-3)):  # 2 ulp of 2e4
        weight = torch.full((V, 16), -scale / 16) - 0.1 * torch.randn(V, 16, generator=torch.Generator().manual_seed(V))
        hidden = torch.ones(2, 16).requires_grad_()
        target = torch.tensor([0, V - 1])
        logp, entropy = linear_logp(hidden, weight.requires_grad_(), target, return_entropy=True)
        want_logp, want_entropy = formula(hidden.detach(), weight.detach(), target)
        assert (logp - want_logp).abs().max() < atol and (entropy - want_entropy).abs().max() < atol
        (logp + entropy).sum().backward()
        assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_huge_logits_stay_finite():
    hidden, weight, target = make_inputs(8, 300, 40, scale=3000.0)  # |z| to 2e4: an ulp is 2e-3
    target[:4] = (hidden @ weight.T).argmax(1)[:4]
    logp, entropy = linear_logp(hidden, weight, target, return_entropy=True)
    want_logp, want_entropy = formula(hidden.detach(), weight.detach(), target)
    assert want_logp.min() < -1e4 and want_logp.max() > -1e-6
    assert (logp - want_logp).abs().max() < 0.02 and (entropy - want_entropy).abs().max() < 1e-3
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    (want,) = torch.autograd.grad(formula(h := hidden.detach().double().requires_grad_(), weight, target)[0].sum(), h)
    hidden.grad = None
    linear_logp(hidden, weight, target).sum().backward()
    assert relative(hidden.grad, want) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_zero_and_change_nothing_else(dtype):
    hidden, weight, target = make_inputs(19, 200, 24, dtype)
    target[[0, 3, 4, 18]] = IGNORE
    target[1], target[2] = 0, 199
    temperature = torch.linspace(0.5, 1.5, 19)
    compare(hidden, weight, target, temperature=temperature)
    kept = target != IGNORE
    logp, entropy = linear_logp(hidden, weight, target, temperature, return_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    assert (logp[~kept] == 0).all() and (entropy[~kept] == 0).all() and (hidden.grad[~kept] == 0).all()
    hidden_kept, weight_kept = hidden.detach()[kept].requires_grad_(), weight.detach().requires_grad_()
    alone = linear_logp(hidden_kept, weight_kept, target[kept], temperature[kept], return_entropy=True)
    sum(x.sum() for x in alone).backward()
    assert torch.equal(logp[kept], alone[0]) and torch.equal(entropy[kept], alone[1])
    assert torch.equal(hidden.grad[kept], hidden_kept.grad) and torch.equal(weight.grad, weight_kept.grad)


@pytest.mark.parametrize("N", [0, 4])
def test_nothing_to_score(N):
    hidden, weight, _ = make_inputs(N, 300, 16)
    target = torch.full((N,), IGNORE)
    logp, entropy = linear_logp(hidden, weight, target, return_entropy=True)
    assert torch.equal(logp, torch.zeros(N)) and torch.equal(entropy, torch.zeros(N))
    (logp.sum() + entropy.sum()).backward()
    assert torch.equal(hidden.grad, torch.zeros(N, 16)) and torch.equal(weight.grad, torch.zeros(300, 16))


def test_non_contiguous_inputs_equal_contiguous_ones():
    hidden, weight, target = make_inputs(24, 200, 32)
    strided = torch.empty(32, 24).T.copy_(hidden.detach()).requires_grad_()
    weight_strided = torch.empty(32, 200).T.copy_(weight.detach()).requires_grad_()
    target_strided = torch.stack([target, target], 1)[:, 0]
    assert not (strided.is_contiguous() or weight_strided.is_contiguous() or target_strided.is_contiguous())
    want = linear_logp(hidden, weight, target, return_entropy=True)
    got = linear_logp(strided, weight_strided, target_strided, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    want[0].sum().backward()
    got[0].sum().backward()
    assert torch.equal(strided.grad, hidden.grad) and torch.equal(weight_strided.grad, weight.grad)
    batched = linear_logp(hidden.view(2, 3, 4, 32), weight, target.view(2, 3, 4), return_entropy=True)
    assert all(torch.equal(a, b.view(2, 3, 4)) for a, b in zip(batched, want))


@pytest.mark.parametrize("ignored", [False, True])
def test_any_layout_of_the_upstream_gradient(ignored):
    hidden, weight, target = make_inputs(12, 150, 16)
    if ignored:
        target[5] = IGNORE
    plain = torch.randn(12, generator=torch.Generator().manual_seed(2))
    layouts = {
        "strided": (torch.stack([plain, -plain], 1)[:, 0], plain),
        "expanded": (torch.tensor(1.5).expand(12), torch.full((12,), 1.5)),
        "bf16": (plain.bfloat16().float(), plain.bfloat16().float()),
        "zero": (torch.zeros(()).expand(12), torch.zeros(12)),
    }
    for name, (upstream, dense) in layouts.items():
        logp, entropy = linear_logp(hidden, weight, target, return_entropy=True)
        got = torch.autograd.grad((logp, entropy), (hidden, weight), (upstream, upstream), retain_graph=True)
        want = torch.autograd.grad((logp, entropy), (hidden, weight), (dense, dense))
        assert all(torch.equal(a, b) for a, b in zip(got, want)), name
        assert (got[0].norm() > 0) == (name != "zero"), name
    logp = linear_logp(hidden, weight, target)
    from_bf16 = torch.autograd.grad(logp.bfloat16(), (hidden, weight), plain.bfloat16())
    want = torch.autograd.grad(linear_logp(hidden, weight, target), (hidden, weight), plain.bfloat16().float())
    assert all(torch.equal(a, b) for a, b in zip(from_bf16, want))


# ---------------------------------------------------------------------------------------------------------------------


def test_the_ratio_of_the_first_update_is_one():
    hidden, weight, target = make_inputs(21, 300, 40, torch.bfloat16)
    with torch.no_grad():
        old = linear_logp(hidden, weight, target, 0.9, return_entropy=True)
    new = linear_logp(hidden, weight, target, 0.9, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(old, new))
    assert torch.equal(linear_logp(hidden, weight, target, 0.9), old[0])  # with or without entropy
    assert torch.equal(linear_logp(hidden, weight, target, torch.full((21,), 0.9)), old[0])
    first = torch.autograd.grad(new[0].sum() + new[1].sum(), (hidden, weight))
    again = linear_logp(hidden, weight, target, 0.9, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(again, new))
    second = torch.autograd.grad(again[0].sum() + again[1].sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_row_does_not_depend_on_the_other_rows():
    hidden, weight, target = make_inputs(50, 300, 40)
    temperature = 1.0
    if INTERPRET:  # its tl.dot is numpy's, whose sums depend on the row's place in the tile: small integers are exact
        hidden, weight, temperature = (2 * hidden).round(), (8 * weight).round(), 16.0
    full = linear_logp(hidden, weight, target, temperature, return_entropy=True)
    others = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for rows in (others, others[:17], slice(7, 8), slice(20, 50), [3, 3, 3]):
        part = linear_logp(hidden[rows], weight, target[rows], temperature, return_entropy=True)
        for a, b in zip(part, full):
            assert torch.equal(a, b[rows]) if INTERPRET else (a - b[rows]).abs().max() <= 1e-6


def test_tiles_and_splits_do_not_matter(monkeypatch):
    hidden, weight, target = make_inputs(33, 517, 80, scale=0.25)  # |logp| < 8: an ulp is 5e-7
    hidden, weight, ones = hidden.detach(), weight.detach(), torch.ones(33)
    results = []
    if INTERPRET:
        for tiles, split in (((16, 32, 32), 96), ((32, 16, 64), 64), ((16, 64, 16), 1024)):
            monkeypatch.setattr(module, "INTERPRET_TILES", module._tiles(*tiles, 4, 1))
            monkeypatch.setattr(module, "SPLIT", split)
            results.append(module._forward_triton(hidden, weight, target, ones, None, True))
    else:
        for chunk in (64, 100, 1024):
            monkeypatch.setattr(module, "REFERENCE_CHUNK", chunk)
            results.append(module._forward_reference(hidden, weight, target, ones, None, True))
    want = formula(hidden, weight, target)
    for logp, lse, entropy in results:
        assert (logp - results[0][0]).abs().max() <= 1e-6 and (entropy - results[0][2]).abs().max() <= 2e-6
        assert (logp - want[0]).abs().max() <= 1e-5 and (entropy - want[1]).abs().max() <= 1e-5
        assert (lse - torch.logsumexp(hidden.double() @ weight.double().T, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_gradient_of_the_logits_sums_to_zero(dtype, atol):
    """With W = 1 for a column d of the width, dH[:, d] is the sum of a row's dz; a dropped tile would show there."""
    hidden, weight, target = make_inputs(20, 300, 16, dtype)
    with torch.no_grad():
        weight[:, 0] = 1
    linear_logp(hidden, weight, target).sum().backward()
    assert hidden.grad[:, 0].abs().max() <= atol


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, target = make_inputs(9, 200, 24)
    logp = linear_logp(hidden, weight, target)
    want = dict(zip(("hidden", "weight"), torch.autograd.grad(logp.sum(), (hidden, weight))))
    tensors = {"hidden": hidden, "weight": weight}
    tensors[frozen] = tensors[frozen].detach()
    logp = linear_logp(tensors["hidden"], tensors["weight"], target)
    logp.sum().backward()
    trained = "weight" if frozen == "hidden" else "hidden"
    assert tensors[frozen].grad is None and torch.equal(tensors[trained].grad, want[trained])
    assert not linear_logp(hidden.detach(), weight.detach(), target).requires_grad


def test_a_frozen_head_costs_no_weight_gradient():
    if INTERPRET:
        pytest.skip("counts the matrix products of PyTorch")
    hidden, weight, target = make_inputs(9, 200, 24)
    counts = {}
    for frozen in (False, True):
        logp = linear_logp(hidden, weight.detach() if frozen else weight, target)
        with torch.profiler.profile() as profile:
            logp.sum().backward()
        counts[frozen] = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))
    assert counts == {False: 6, True: 4}  # two chunks: logits, dH and dW of each


def saved_by(output):
    view = output.grad_fn  # the shape of target
    return [t for t in view.next_functions[0][0].saved_tensors if t is not None]


def test_only_inputs_and_one_number_a_row_are_saved():
    hidden, weight, target = make_inputs(9, 200, 24)
    target[4] = IGNORE
    temperature = torch.ones(9)
    logp, _ = linear_logp(hidden, weight, target, temperature, return_entropy=True)
    saved = saved_by(logp)
    inputs = {t.data_ptr() for t in (hidden, weight, target, temperature)}
    assert inputs <= {t.data_ptr() for t in saved}
    rest = [t for t in saved if t.data_ptr() not in inputs]
    assert [(t.dtype, t.numel()) for t in rest] == [(torch.int64, 8), (torch.float32, 8), (torch.float32, 8)]
    logp = linear_logp(hidden, weight, target.clamp_min(0))
    assert len(saved_by(logp)) == 4  # without index, temperature and entropy


def test_the_result_may_be_written_to():
    hidden, weight, target = make_inputs(9, 200, 24)
    want = torch.autograd.grad(linear_logp(hidden, weight, target, return_entropy=True)[1].sum(), hidden)
    logp, entropy = linear_logp(hidden, weight, target, return_entropy=True)
    loss = entropy.sum()
    with torch.no_grad():
        entropy.zero_()
        logp.zero_()
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], want[0])


def test_autocast_changes_nothing():
    hidden, weight, target = make_inputs(9, 200, 24)
    want = linear_logp(hidden, weight, target)
    want_grad = torch.autograd.grad(want.sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logp(hidden, weight, target)
        got_grad = torch.autograd.grad(got.sum(), (hidden, weight))
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(got_grad, want_grad))


def test_tied_weights_get_both_gradients():
    _, weight, target = make_inputs(9, 200, 24)
    linear_logp(F.embedding(target.roll(1), weight), weight, target).sum().backward()
    weight64 = weight.detach().double().requires_grad_()
    formula(weight64[target.roll(1)], weight64, target)[0].sum().backward()
    assert relative(weight.grad, weight64.grad) <= 1e-5


def test_errors_name_the_argument():
    hidden, weight, target = (t.detach() for t in make_inputs(4, 50, 8))
    ones = torch.ones(4)
    bad = [
        ("hidden must be a float", (hidden.long(), weight, target)),
        ("weight must be torch.float32", (hidden, weight.bfloat16(), target)),
        ("weight must be", (hidden, weight.T, target)),
        ("weight must be", (hidden, weight[:0], target)),
        ("weight must be", (hidden, weight[0], target)),
        ("target must be int64", (hidden, weight, target.int())),
        ("target must be int64", (hidden, weight, target[:3])),
        ("target must be int64", (hidden, weight, target[:, None])),
        (r"target must be -100 or in \[0, 50\), got 50", (hidden, weight, target.clone().fill_(50))),
        (r"target must be -100 or in \[0, 50\), got -1", (hidden, weight, target.clone().fill_(-1))),
        ("temperature must be > 0, got 0.0", (hidden, weight, target, 0.0)),
        ("temperature must be > 0, got nan", (hidden, weight, target, float("nan"))),
        ("temperature must be > 0, got 0.0", (hidden, weight, target, ones * 0)),
        ("temperature must be a float or fp32", (hidden, weight, target, ones[:3])),
        ("temperature must be a float or fp32", (hidden, weight, target, ones.double())),
        ("softcap must be None or > 0", (hidden, weight, target, 1.0, 0.0)),
        ("weight is on meta but hidden on cpu", (hidden, weight.to("meta"), target)),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=message):
            linear_logp(*arguments)


def test_everything_works_without_triton():
    if INTERPRET:
        pytest.skip("is about the reference")
    code = """
import sys, torch
sys.modules["triton"] = None  # import triton raises ImportError
from kernels.linear_logp import linear_logp
hidden, weight, target = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4), torch.tensor([0, 6, 3])
logp = linear_logp(hidden, weight, target, softcap=5.0)
logp.sum().backward()
x = 5 * torch.tanh(hidden @ weight.T / 5)
assert (logp - x.log_softmax(1).gather(1, target[:, None])[:, 0]).abs().max() < 1e-6 and hidden.grad.norm() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))


@pytest.mark.skipif(INTERPRET, reason="runs in it already")
def test_again_in_the_triton_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, env=env, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(__file__))
    )
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) >= 60, run.stdout[-500:]


# ---------------------------------------------------------------------------------------------------------------------


def memory_above_inputs(function):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS + [torch.float64])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gpu_equals_the_formula(dtype, softcap, monkeypatch):
    monkeypatch.setattr(module, "DX_CHUNK", 8192)
    for N, V, D in [(1, 1, 1), (3, 97, 33), (300, 20_001, 896), (257, 50_257, 768), (1000, 32_000, 1000)]:
        hidden, weight, target = (t.detach().cuda() for t in make_inputs(N, V, D, dtype))
        target[N // 2] = IGNORE if N > 1 else 0
        logp, entropy = linear_logp(
            hidden.requires_grad_(), weight.requires_grad_(), target, 0.7, softcap, return_entropy=True
        )
        hidden64, weight64 = (t.detach().double().requires_grad_() for t in (hidden, weight))
        want = formula(hidden64, weight64, target, 0.7, softcap)
        assert (logp - want[0]).abs().max() <= 1e-5 and (entropy - want[1]).abs().max() <= 1e-5
        g = torch.randn(2, N, device="cuda", dtype=logp.dtype)
        for names in ((0,), (0, 1)):
            got = torch.autograd.grad(
                [(logp, entropy)[i] for i in names], (hidden, weight), [g[i] for i in names], True
            )
            ref = torch.autograd.grad(
                [want[i] for i in names], (hidden64, weight64), [g[i].double() for i in names], True
            )
            if V > 1:
                assert all(relative(a, b) <= GRADIENT_RTOL[dtype] for a, b in zip(got, ref))


@pytest.mark.gpu
def test_gpu_rows_have_the_same_bits_in_every_batch():
    hidden, weight, target = (t.detach().cuda() for t in make_inputs(700, 50_257, 896, torch.bfloat16))
    full = linear_logp(hidden, weight, target, return_entropy=True)
    again = linear_logp(hidden.requires_grad_(), weight, target, return_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(full, again))
    rows = torch.randperm(700, device="cuda")
    for part in (rows, rows[:1], rows[:129], slice(3, 5)):
        got = linear_logp(hidden[part], weight, target[part], return_entropy=True)
        assert all(torch.equal(a, b[part]) for a, b in zip(got, full))


@pytest.mark.gpu
def test_gpu_memory_is_a_fraction_of_the_logits(monkeypatch):
    monkeypatch.setattr(module, "DX_CHUNK", 8192)
    N, V, D = 16_384, 151_936, 896  # N * V = 2.5e9 exceeds 2^31
    hidden, weight, target = (torch.randn(n, D, device="cuda", dtype=torch.bfloat16) * 0.2 for n in (N, V, 1))
    hidden.requires_grad_(), weight.requires_grad_()
    target = torch.randint(0, V, (N,), device="cuda")
    target[-1] = V - 1
    used = memory_above_inputs(lambda: linear_logp(hidden, weight, target, return_entropy=True)[0].sum().backward())
    assert used < N * V * 2 / 4
    logp = linear_logp(hidden, weight, target)
    rows = [0, N // 2, N - 1]
    with torch.no_grad():
        assert (logp[rows] - formula(hidden[rows], weight, target[rows])[0]).abs().max() <= 1e-5


@pytest.mark.gpu
def test_gpu_more_row_tiles_than_a_second_grid_axis_allows():
    N = 65_536 * 128 + 1
    hidden, weight, _ = make_inputs(1, 40, 16, torch.bfloat16)
    hidden, weight = hidden.detach().cuda().expand(N, 16), weight.detach().cuda()
    logp = linear_logp(hidden, weight, torch.full((N,), 7, device="cuda"))
    assert (logp == logp[0]).all() and (
        logp[0] - formula(hidden[:1], weight, torch.tensor([7]).cuda())[0]
    ).abs() <= 1e-5


@pytest.mark.gpu
def test_gpu_target_outside_the_vocabulary_is_nan():
    hidden, weight, target = (t.detach().cuda() for t in make_inputs(4, 5000, 64, torch.bfloat16))
    target[1], target[2] = 5000, -1
    logp = linear_logp(hidden, weight, target)
    assert logp.isnan().tolist() == [False, True, True, False]
