"""One stochastic denoising step and its log-prob; the noise is a function of a seed, not of a generator's state.

    x' = a*x + b*v + c*eps,  eps = philox_normal(seed);  mean = a*x + b*v,  z = (x' - mean)/c
    logp = mean over latent dims of log N(x'; mean, c^2) = -mean(z^2)/2 - log c - log(2 pi)/2

a, b, c belong to the algorithm (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818; an ODE step has c = 0).
The mean over dims is what both papers' code takes; with the sum the log-ratio would be D times larger.
logp is formed from x' as stored, never from eps: the replay in training has the rollout's bits, the first ratio is 1.

Triton kernels on a GPU, eager PyTorch elsewhere and as their reference; neither syncs with the host. Noise is drawn
inside the kernel, so a step moves v, x and x' once (10 bytes an element with v in bf16) instead of 16 times. Every sum
has an order that depends on D alone, so a row's bits do not depend on the rest of the batch. B rows, D latent elements
a row, K = ceil(D / 4) Philox counters a row.
"""

import math

import torch
import torch.nn.functional as F

from kernels import jit, on_triton, tl, triton

BLOCK = 1024  # elements in a partial sum; changing it changes logp's bits
LOW32 = 0xFFFFFFFF

# ---------------------------------------------------------------------------------------------------------------------
# Seeds. torch has no uint64 arithmetic, but int64 sums and products wrap to the same bits; a mask makes >> logical.


def _int64(value):
    return (value + 2**63) % 2**64 - 2**63


GAMMA = _int64(0x9E3779B97F4A7C15)  # splitmix64's increment and multipliers (Vigna, prng.di.unimi.it/splitmix64.c)
MIX_1, MIX_2 = _int64(0xBF58476D1CE4E5B9), _int64(0x94D049BB133111EB)


def fold_seed(seed, *keys):
    """One int64 seed per element out of a seed and any keys: (run seed, purpose, iteration, prompt, sample, step).

    h = 0; then h = mix(h + key + GAMMA) modulo 2^64 for seed and each key in turn, mix being splitmix64's finaliser.
    Keys are Python ints (modulo 2^64) or int64 tensors that broadcast; TypeError otherwise. Their order matters.
    Returns int64 of the broadcast shape on the tensors' device, a 0-d CPU tensor if there are only ints.
    """
    h = torch.zeros((), dtype=torch.int64)
    for key in (seed, *keys):
        if isinstance(key, int):
            key = _int64(key)
        elif not isinstance(key, torch.Tensor) or key.dtype != torch.int64:
            raise TypeError(f"seeds and keys must be ints or int64 tensors, got {getattr(key, 'dtype', type(key))}")
        h = h + key + GAMMA
        h = (h ^ ((h >> 30) & (2**34 - 1))) * MIX_1
        h = (h ^ ((h >> 27) & (2**37 - 1))) * MIX_2
        h = h ^ ((h >> 31) & (2**33 - 1))
    return h


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a counter of four words and a key of two.

    Words lie in [0, 2^32), as int64 tensors that broadcast or as Python ints.
    """
    for _ in range(10):
        # A wrapped int64 product has the bits of the unsigned one. Its sign-extended high half and its whole low half
        # carry stray upper bits, which the mask after the xor (or at the end) removes: half as many passes.
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p2 >> 32) ^ (c1 ^ k0)) & LOW32, p2
        c2, c3 = ((p0 >> 32) ^ (c3 ^ k1)) & LOW32, p0
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1 & LOW32, c2, c3 & LOW32


def philox_normal(seed, size):
    """Standard normals fp32 [B, *size], row i a function of seed[i] alone; seed is int64 [B], TypeError otherwise.

    The layout is fixed for good, since a change alters every run: element e of a row is normal e % 4 of the counter
    (e // 4, 0, 0, 0) under the key (low, high 32 bits of seed); words (0, 1) make normals 0 and 1, words (2, 3)
    normals 2 and 3, by cos and sin of Box-Muller. This is tl.randn4x(seed, e // 4) of Triton 3. D < 2^34, |eps| < 5.68.
    """
    if seed.dtype != torch.int64 or seed.dim() != 1:
        raise TypeError(f"seed must be int64 [B], got {seed.dtype} {list(seed.shape)}")
    D = math.prod(size)
    counter_K = torch.arange((D + 3) // 4, device=seed.device)
    words = philox_words(counter_K, 0, 0, 0, seed[:, None] & LOW32, (seed[:, None] >> 32) & LOW32)
    # Triton's uint_to_uniform_float: as int32, negative values flipped, scaled to [0, 1).
    u = [torch.minimum(w, LOW32 - w).float() * 4.6566127342e-10 for w in words]
    normals = []
    for u_radius, u_angle in (u[:2], u[2:]):
        radius, angle = (-2.0 * u_radius.clamp_min(1e-7).log()).sqrt(), 6.283185307179586 * u_angle
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, -1).flatten(1)[:, :D].reshape(len(seed), *size)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: eager PyTorch


def _tree_sum(x):
    """Sum over the last dim by halving: torch.sum picks its order by the whole tensor's shape and by the threads."""
    n = x.shape[-1]
    x = F.pad(x, (0, 2 ** (n - 1).bit_length() - n))
    while x.shape[-1] > 1:
        low, high = x.chunk(2, -1)
        x = low + high
    return x.squeeze(-1)


def _row_mean(x_BD):
    B, D = x_BD.shape
    blocks = F.pad(x_BD, (0, -D % BLOCK)).view(B, -1, BLOCK)
    return _tree_sum(_tree_sum(blocks)) / D


def _mean(v, x, a, b):
    return a[:, None] * x.reshape(len(x), -1) + b[:, None] * v.reshape(len(v), -1).to(x.dtype)  # B D


def _z(x_next, mean_BD, c):
    # masked_fill, not torch.where: where copies its scalar to the GPU, which syncs.
    return (x_next.reshape(mean_BD.shape) - mean_BD) / c.masked_fill(c == 0, 1.0)[:, None]  # B D


def _gaussian_logp(x_next, mean_BD, c):
    logp_B = -0.5 * _row_mean(_z(x_next, mean_BD, c).square()) - c.log() - 0.5 * math.log(2 * math.pi)
    return logp_B.masked_fill(c == 0, 0.0)


def _step_eager(v, x, a, b, c, seed):
    mean_BD = _mean(v, x, a, b)
    x_next = mean_BD + c[:, None] * philox_normal(seed, mean_BD.shape[1:])
    return x_next.view(x.shape), _gaussian_logp(x_next, mean_BD, c)


def _logp_eager(v, x, x_next, a, b, c, v_ref):
    logp_B = _gaussian_logp(x_next, _mean(v, x, a, b), c)
    if v_ref is None:
        return logp_B, torch.zeros_like(logp_B)
    return logp_B, _row_mean((v.to(x.dtype) - v_ref.to(x.dtype)).square().reshape(len(v), -1))


def _grad_eager(v, x, x_next, a, b, c, v_ref, grad_logp_B, grad_v_mse_B):
    D = v[0].numel()
    scale_B = (grad_logp_B * b / (c * D)).masked_fill(c == 0, 0.0)
    grad_BD = scale_B[:, None] * _z(x_next, _mean(v, x, a, b), c)
    if v_ref is not None:
        distance_BD = (v.to(x.dtype) - v_ref.to(x.dtype)).reshape(grad_BD.shape)
        grad_BD += (grad_v_mse_B * (2 / D))[:, None] * distance_BD
    return grad_BD.view(v.shape).to(v.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. One program a block of a row: program p has block p % blocks of row p // blocks. Rows are contiguous.
#
# Rollout and replay must agree to the bit although they are compiled apart. Hence one kernel for both, no contraction
# of a product and a sum to an fma (enable_fp_fusion=False: the compiler may do it in one of the two), IEEE division,
# and the same thread layout under both sums, which tests/test_compile.py reads out of the compiled code.


@jit
def _divide(n, d):
    if n.dtype == tl.float64:
        return n / d
    return tl.div_rn(n, d)


@jit
def _forward_kernel(
    v_ptr,
    ref_ptr,
    x_ptr,
    next_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    seed_ptr,
    z2_ptr,
    d2_ptr,
    D,
    blocks,
    DRAW: tl.constexpr,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    e = block * BLOCK + tl.arange(0, BLOCK)
    inside = e < D
    start = row.to(tl.int64) * D
    a, b, c = tl.load(a_ptr + row), tl.load(b_ptr + row), tl.load(c_ptr + row)
    x = tl.load(x_ptr + start + e, mask=inside, other=0.0)
    v = tl.load(v_ptr + start + e, mask=inside, other=0.0).to(x.dtype)
    mean = a * x + b * v
    if DRAW:
        counter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        n0, n1, n2, n3 = tl.randn4x(tl.load(seed_ptr + row), counter)
        eps = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))  # n0[0] n1[0] n2[0] n3[0] n0[1] ...
        x_next = mean + c * eps.to(x.dtype)
        tl.store(next_ptr + start + e, x_next, mask=inside)
    else:
        x_next = tl.load(next_ptr + start + e, mask=inside, other=0.0)
    z = _divide(x_next - mean, tl.where(c == 0, 1.0, c).to(x.dtype))
    tl.store(z2_ptr + program, tl.sum(tl.where(inside, z * z, 0.0), axis=0))
    if HAS_REF:
        d = v - tl.load(ref_ptr + start + e, mask=inside, other=0.0).to(x.dtype)
        tl.store(d2_ptr + program, tl.sum(d * d, axis=0))


@jit
def _combine_kernel(z2_ptr, d2_ptr, c_ptr, logp_ptr, mse_ptr, D, blocks, HAS_REF: tl.constexpr, BLOCKS: tl.constexpr):
    """Second stage: the partial sums of a row, one program a row, BLOCKS >= blocks."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCKS)
    at, inside = row.to(tl.int64) * blocks + i, i < blocks
    c = tl.load(c_ptr + row)
    z2 = tl.sum(tl.load(z2_ptr + at, mask=inside, other=0.0), axis=0) / D
    log_c = tl.log(tl.where(c == 0, 1.0, c).to(c.dtype))
    tl.store(logp_ptr + row, tl.where(c == 0, 0.0, -0.5 * z2 - log_c - 0.9189385332046727))  # log(2 pi) / 2
    if HAS_REF:
        tl.store(mse_ptr + row, tl.sum(tl.load(d2_ptr + at, mask=inside, other=0.0), axis=0) / D)


@jit
def _backward_kernel(
    v_ptr,
    ref_ptr,
    x_ptr,
    next_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    grad_logp_ptr,
    grad_mse_ptr,
    grad_ptr,
    D,
    blocks,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    e = block * BLOCK + tl.arange(0, BLOCK)
    inside = e < D
    start = row.to(tl.int64) * D
    a, b, c = tl.load(a_ptr + row), tl.load(b_ptr + row), tl.load(c_ptr + row)
    x = tl.load(x_ptr + start + e, mask=inside, other=0.0)
    v = tl.load(v_ptr + start + e, mask=inside, other=0.0).to(x.dtype)
    x_next = tl.load(next_ptr + start + e, mask=inside, other=0.0)
    std = tl.where(c == 0, 1.0, c).to(x.dtype)
    z = _divide(x_next - (a * x + b * v), std)
    grad = tl.where(c == 0, 0.0, tl.load(grad_logp_ptr + row) * b / (std * D)).to(x.dtype) * z
    if HAS_REF:
        d = v - tl.load(ref_ptr + start + e, mask=inside, other=0.0).to(x.dtype)
        grad += tl.load(grad_mse_ptr + row) * 2.0 / D * d
    tl.store(grad_ptr + start + e, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers. None of the shapes they take needs more than one config: the kernels wait for memory.

LAUNCH = dict(num_warps=4, enable_fp_fusion=False)


def _aligned(t):
    """Contiguous, and at an address that is a multiple of 16 bytes: alignment decides how the kernels are compiled, and
    rollout and replay must be compiled alike."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _forward_triton(v, x, x_next, a, b, c, seed=None, v_ref=None, block=BLOCK):
    """Writes x_next where there is a seed, else reads it. Returns logp_B and v_mse_B (zeros without v_ref)."""
    B, D = len(x), x[0].numel()
    blocks = triton.cdiv(D, block)
    v, x, x_next = _aligned(v), _aligned(x), _aligned(x_next)
    a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
    ref = v if v_ref is None else _aligned(v_ref)  # a pointer that is not read still has to point somewhere
    z2, d2 = x.new_empty(2, B, blocks)
    logp_B, v_mse_B = x.new_empty(B), x.new_zeros(B)
    with torch.cuda.device_of(x):
        _forward_kernel[(B * blocks,)](
            *(v, ref, x, x_next, a, b, c, c if seed is None else seed.contiguous(), z2, d2, D, blocks),
            DRAW=seed is not None,
            HAS_REF=v_ref is not None,
            BLOCK=block,
            **LAUNCH,
        )
        size = triton.next_power_of_2(blocks)
        _combine_kernel[(B,)](z2, d2, c, logp_B, v_mse_B, D, blocks, HAS_REF=v_ref is not None, BLOCKS=size, **LAUNCH)
    return logp_B, v_mse_B


def _grad_triton(v, x, x_next, a, b, c, v_ref, grad_logp_B, grad_v_mse_B, block=BLOCK):
    B, D = len(x), x[0].numel()
    blocks = triton.cdiv(D, block)
    ref = v if v_ref is None else v_ref
    rows = [*map(_aligned, (v, ref, x, x_next)), *(t.contiguous() for t in (a, b, c, grad_logp_B, grad_v_mse_B))]
    grad = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(B * blocks,)](*rows, grad, D, blocks, HAS_REF=v_ref is not None, BLOCK=block, **LAUNCH)
    return grad


# ---------------------------------------------------------------------------------------------------------------------
# Step and log-prob


def _check(x, like_x, per_row):
    if x.dtype not in (torch.float32, torch.float64) or x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x must be fp32 [B, ...] and not empty, got {x.dtype} {list(x.shape)}")
    if x[0].numel() >= 2**31:
        raise ValueError(f"a row of x must have fewer than 2^31 elements, got {list(x.shape)}")
    for name, t in like_x.items():
        if t.shape != x.shape or not t.is_floating_point() or (name == "x_next" and t.dtype != x.dtype):
            kind = str(x.dtype) if name == "x_next" else "a float dtype"
            raise ValueError(f"{name} must be {kind} {list(x.shape)} like x, got {t.dtype} {list(t.shape)}")
    for name, t in per_row.items():
        dtype = torch.int64 if name == "seed" else x.dtype
        if t.dtype != dtype or t.shape != x.shape[:1]:
            raise ValueError(f"{name} must be {dtype} [{len(x)}], one per row of x, got {t.dtype} {list(t.shape)}")


@torch.no_grad()
def sde_step(v, x, a, b, c, seed):
    """The rollout's step x' = a*x + b*v + c*eps. Returns (x_next like x, logp [B]), fp32, without gradient.

    v (any float dtype) and x (fp32) are [B, ...] with any latent shape; a, b, c fp32 [B], c the std of the noise; seed
    int64 [B], another one for every row and step (fold_seed). A row with c = 0 is an ODE step: x' = mean, logp = 0.
    With x, a, b, c in fp64 everything but the noise is fp64. Raises ValueError on other shapes and dtypes.
    """
    _check(x, {"v": v}, {"a": a, "b": b, "c": c, "seed": seed})
    if not on_triton(x):
        return _step_eager(v, x, a, b, c, seed)
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x_next, _forward_triton(v, x, x_next, a, b, c, seed)[0]


class _SdeLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, x, x_next, a, b, c, v_ref):
        ctx.save_for_backward(v, x, x_next, a, b, c, v_ref)
        if on_triton(x):
            return _forward_triton(v, x, x_next, a, b, c, v_ref=v_ref)
        return _logp_eager(v, x, x_next, a, b, c, v_ref)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grad = _grad_triton if on_triton(ctx.saved_tensors[1]) else _grad_eager
        return grad(*ctx.saved_tensors, *grads), None, None, None, None, None, None


def sde_logp(v, x, x_next, a, b, c, v_ref=None):
    """The training path: log-prob of a stored step under v, and the distance of v from a reference's.

    Returns (logp fp32 [B], v_mse fp32 [B]). logp is bitwise sde_step's on the same v, x, a, b, c and its x_next;
    v_mse = mean((v - v_ref)^2) over latent dims, zeros without v_ref (any float dtype, v's shape). The KL to the
    reference is b^2 v_mse / (2 c^2). Gradient goes to v alone, in v's dtype: dlogp/dv = (x' - mean) b / (c^2 D) and
    dv_mse/dv = 2 (v - v_ref) / D; only the inputs are kept for it. Do not train rows with c = 0: logp and its gradient
    are 0 there (an error would need a host sync). With x, x_next, a, b, c in fp64 everything is fp64. Raises
    ValueError on other shapes and dtypes.
    """
    _check(x, {"v": v, "x_next": x_next} | ({} if v_ref is None else {"v_ref": v_ref}), {"a": a, "b": b, "c": c})
    return _SdeLogp.apply(v, x, x_next, a, b, c, v_ref)
