"""Log-prob and entropy of one token per row straight from hidden states; the N x V logits are never in memory.

    x = h @ W^T,  x = softcap * tanh(x / softcap) if there is a soft cap,  z = x / temperature
    lse = log sum_v exp(z_v),  logp = z_target - lse,  p = exp(z - lse),  entropy H = lse - sum_v p_v z_v   (nats)
    dz = g_logp * (onehot(target) - p) - g_entropy * p * (z - lse + H)
    dx = dz / temperature * (1 - tanh^2),  dH = dx @ W,  dW = dx^T @ H

Forward: (max, sum, shifted entropy) of the columns seen so far are rescaled whenever the maximum grows (online softmax,
Milakov and Gimelshein, arXiv 1805.02867). Backward recomputes x for one chunk of the vocabulary at a time. 8 N V D FLOP
instead of the 6 of stored logits, for memory of N x chunk instead of N x V. No gradient is dropped (Cut Cross-Entropy,
arXiv 2411.09009, drops what is below 2^-12), there are no atomics, and every sum has one order.

N rows, D width, V vocabulary, C columns of a chunk, S splits of the vocabulary.
"""

import math
from contextlib import nullcontext

import torch
from torch.distributed.tensor import DTensor

from kernels import INTERPRET, jit, on_triton, tl, triton

IGNORE = -100
REFERENCE_CHUNK = 4096  # columns; 8192 costs 0.1 GB more and is slower on a CPU (4096 rows x 896 x 151,936)
DX_CHUNK = 8192  # columns of the dx workspace of the Triton path: 16,384 rows of bf16 are 268 MB

# ---------------------------------------------------------------------------------------------------------------------
# Reference: the same formulas in PyTorch, a chunk of columns at a time, in place. Any device.


def _reference_logits(hidden, weight, inv_temperature, softcap, buffer):
    """z N C of a chunk of the weight, in `buffer`, and the tanh of the soft cap (None without one)."""
    z = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    torch.mm(hidden, weight.to(hidden.dtype).T, out=z)
    tanh = None
    if softcap is not None:
        tanh = z.div_(softcap).tanh_()
        z = tanh * softcap
    return z.mul_(inv_temperature[:, None]), tanh


def _find_target(target, start, width):
    """Column of each row's target within a chunk (any valid column if it is elsewhere) and whether it is there."""
    column = target - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def _forward_reference(hidden, weight, target, inv_temperature, softcap, with_entropy):
    """logp, lse, entropy (None unless wanted), each [N] in the dtype of the sums."""
    N, V = len(hidden), len(weight)
    hidden = hidden.to(inv_temperature.dtype)
    buffer = hidden.new_empty(N * min(V, REFERENCE_CHUNK))
    # Not -inf: the first rescaling would take -inf * 0.
    m, s, e = hidden.new_full((N,), -1e38), hidden.new_zeros(N), hidden.new_zeros(N)
    z_target = hidden.new_full((N,), float("nan"))
    for start in range(0, V, REFERENCE_CHUNK):
        z, _ = _reference_logits(hidden, weight[start : start + REFERENCE_CHUNK], inv_temperature, softcap, buffer)
        column, inside = _find_target(target, start, z.shape[1])
        z_target = torch.where(inside, z.gather(1, column).squeeze(1), z_target)
        m_old, m = m, torch.maximum(m, z.amax(1))
        z.sub_(m[:, None])
        scale = (m_old - m).exp()
        if with_entropy:
            p = z.exp()
            e = scale * (e + (m_old - m) * s) + z.mul_(p).sum(1)
        else:
            p = z.exp_()
        s = scale * s + p.sum(1)
    log_s = s.log()
    return z_target - m - log_s, m + log_s, log_s - e / s if with_entropy else None


def _dx_reference(hidden, weight, start, target, inv_temperature, softcap, lse, entropy, g_logp, g_entropy, buffer):
    """dx N C of the columns that begin at `start` and have the weights `weight`; g_entropy None leaves its term out."""
    z, tanh = _reference_logits(hidden, weight, inv_temperature, softcap, buffer)
    column, inside = _find_target(target, start, z.shape[1])
    z.sub_(lse[:, None])
    if g_entropy is None:
        dx = z.exp_().mul_(-g_logp[:, None])
    else:
        p = z.exp()
        dx = z.add_(entropy[:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]).mul_(p)
    dx.scatter_add_(1, column, (g_logp * inside)[:, None]).mul_(inv_temperature[:, None])
    return dx if tanh is None else dx.mul_(tanh.square_().neg_().add_(1))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Where a tile starts in hidden, weight and workspace is int64: N * V and V * D exceed 2^31. Rows past N and
# columns past V read a valid row or column, so that the loads of the inner loop need no mask but that of D.


@jit
def _program_tile(rows, columns, GROUP: tl.constexpr):
    """Row tile and column tile of this program. GROUP row tiles share the columns that are in the L2 cache."""
    pid = tl.program_id(0)
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    pid = pid % (GROUP * columns)
    return first + pid % size, pid // size


@jit
def _tanh(x, ACC: tl.constexpr):
    """By exp, since the interpreter has no libdevice; by the Taylor series where 1 - 1 would cancel in fp32."""
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if ACC == tl.float32:
        y = x * x
        series = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        tanh = tl.where(y < 0.0625, series, tanh)
    return tanh


@jit
def _tile_logits(
    h_ptr,
    w_ptr,
    rows,
    columns,
    D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """x BN BV, soft-capped but not yet divided by the temperature. rows and columns count from the pointers, which are
    at the tile: int32 offsets take half the registers of int64 ones."""
    x = tl.zeros([BN, BV], ACC)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        h = tl.load(h_ptr + rows[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        w = tl.load(w_ptr + columns[None, :] * D + d[:, None], mask=d[:, None] < D, other=0.0)
        if INTERPRET:  # which multiplies the bit patterns of bf16
            h, w = h.to(ACC), w.to(ACC)
        x = tl.dot(h, w, x, input_precision="ieee", out_dtype=ACC)  # not tf32 for fp32 inputs
    if SOFTCAP is not None:
        x = SOFTCAP * _tanh(x / SOFTCAP, ACC)
    return x


@jit
def forward_kernel(
    h_ptr,
    w_ptr,
    target_ptr,
    inv_temperature_ptr,
    z_target_ptr,
    m_ptr,
    s_ptr,
    e_ptr,
    N,
    V: tl.constexpr,
    D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """max, sum of exp(z - max) and of exp(z - max) * (z - max) of BN rows over one split, at [split, row] of S N."""
    row_tile, split = _program_tile(tl.cdiv(N, BN), tl.cdiv(V, SPLIT), GROUP)
    first_row = row_tile.to(tl.int64) * BN
    n = first_row + tl.arange(0, BN)
    rows = tl.minimum(tl.arange(0, BN), N - row_tile * BN - 1)
    inv_temperature = tl.load(inv_temperature_ptr + first_row + rows)
    target = tl.load(target_ptr + first_row + rows)
    h_ptr += first_row * D
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, V)

    m = tl.full([BN], -1e38, ACC)  # not -inf: the first rescaling would take -inf * 0
    s = tl.zeros([BN], ACC)
    e = tl.zeros([BN], ACC)
    z_target = tl.zeros([BN], ACC)
    v = first
    while v < last:  # not range: the interpreter of Triton 3.6 refuses bounds that are tensors
        offset = tl.arange(0, BV)
        columns = tl.minimum(offset, V - 1 - v)
        x = _tile_logits(h_ptr, w_ptr + v.to(tl.int64) * D, rows, columns, D, SOFTCAP, BN, BV, BD, ACC, INTERPRET)
        valid = (v + offset < last)[None, :]
        z = tl.where(valid, x * inv_temperature[:, None], -float("inf"))
        is_target = offset[None, :] == (target - v).to(tl.int32)[:, None]
        z_target += tl.sum(tl.where(is_target, z, 0.0), 1)
        m_old = m
        m = tl.maximum(m, tl.max(z, 1))
        z -= m[:, None]
        p = tl.exp(z)
        scale = tl.exp(m_old - m)
        if ENTROPY:
            e = scale * (e + (m_old - m) * s) + tl.sum(p * tl.where(valid, z, 0.0), 1)  # 0 * -inf
        s = scale * s + tl.sum(p, 1)
        v += BV

    tl.store(z_target_ptr + n, z_target, mask=(n < N) & (target >= first) & (target < last))
    at = split.to(tl.int64) * N + n
    tl.store(m_ptr + at, m, mask=n < N)
    tl.store(s_ptr + at, s, mask=n < N)
    if ENTROPY:
        tl.store(e_ptr + at, e, mask=n < N)


@jit
def combine_kernel(
    z_target_ptr,
    m_ptr,
    s_ptr,
    e_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    N,
    S: tl.constexpr,
    ENTROPY: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Merge the S splits of BN rows in order; torch.sum would pick its order by N."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < N
    m = tl.full([BN], -1e38, ACC)
    s = tl.zeros([BN], ACC)
    e = tl.zeros([BN], ACC)
    for split in range(S):
        m_split = tl.load(m_ptr + n, mask=inside, other=0.0)
        s_split = tl.load(s_ptr + n, mask=inside, other=1.0)
        m_old = m
        m = tl.maximum(m, m_split)
        scale = tl.exp(m_old - m)
        scale_split = tl.exp(m_split - m)
        if ENTROPY:
            e_split = tl.load(e_ptr + n, mask=inside, other=0.0)
            e = scale * (e + (m_old - m) * s) + scale_split * (e_split + (m_split - m) * s_split)
            e_ptr += N
        s = scale * s + scale_split * s_split
        m_ptr += N
        s_ptr += N
    log_s = tl.log(s)
    z_target = tl.load(z_target_ptr + n, mask=inside, other=0.0)
    tl.store(logp_ptr + n, z_target - m - log_s, mask=inside)
    tl.store(lse_ptr + n, m + log_s, mask=inside)
    if ENTROPY:
        tl.store(entropy_ptr + n, log_s - e / s, mask=inside)


@jit
def backward_kernel(
    h_ptr,
    w_ptr,
    target_ptr,
    inv_temperature_ptr,
    lse_ptr,
    entropy_ptr,
    g_logp_ptr,
    g_entropy_ptr,
    dx_ptr,
    N,
    start,
    width,
    stride,
    D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dx N C, in the dtype of the workspace. w_ptr is the weight's row `start`, of `width` that make the chunk. The
    workspace consists of whole tiles, `stride` columns wide: what lies past N and width is written and never read,
    because masks would cost vector stores and spill registers."""
    row_tile, column_tile = _program_tile(tl.cdiv(N, BN), tl.cdiv(width, BV), GROUP)
    n = tl.arange(0, BN)
    c = tl.arange(0, BV)
    rows_left = N - row_tile * BN
    columns_left = width - column_tile * BV
    first_row = row_tile.to(tl.int64) * BN
    rows = tl.minimum(n, rows_left - 1)
    columns = tl.minimum(c, columns_left - 1)
    h_ptr += first_row * D
    w_ptr += column_tile.to(tl.int64) * BV * D
    x = _tile_logits(h_ptr, w_ptr, rows, columns, D, SOFTCAP, BN, BV, BD, ACC, INTERPRET)

    rows = first_row + rows
    inv_temperature = tl.load(inv_temperature_ptr + rows)[:, None]
    g_logp = tl.load(g_logp_ptr + rows)[:, None] * inv_temperature
    target = (tl.load(target_ptr + rows) - start - column_tile * BV).to(tl.int32)[:, None]
    logp = x * inv_temperature - tl.load(lse_ptr + rows)[:, None]
    dx = tl.exp(logp)
    if ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + rows)[:, None] * inv_temperature
        dx *= -g_logp - g_entropy * (logp + tl.load(entropy_ptr + rows)[:, None])
    else:
        dx *= -g_logp
    dx = tl.where(c[None, :] == target, dx + g_logp, dx)
    if SOFTCAP is not None:
        tanh = x / SOFTCAP
        dx *= 1.0 - tanh * tanh
    dx_ptr += row_tile.to(tl.int64) * BN * stride + column_tile * BV
    tl.store(dx_ptr + n[:, None] * stride + c[None, :], dx.to(dx_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------------------
# Launch. Tiles and SPLIT follow from GPU and dtype, never from N, so that a row has the same bits in every batch. They
# are chosen for no register spills and for the shared memory of each architecture, not yet by measurement.


def _tiles(BN, BV, BD, num_warps, num_stages):
    return dict(BN=BN, BV=BV, BD=BD, num_warps=num_warps, num_stages=num_stages)


# Compute capability, major -> bytes per element -> tiles, and tiles for kernels with a soft cap or an entropy gradient,
# whose long epilogue needs registers that wide tiles do not leave. Entropy in the forward pass takes the first: logp
# has the same bits with and without it. fp32 has no tensor cores in full precision.
_WIDE, _SQUARE = _tiles(128, 256, 64, 8, 3), _tiles(128, 128, 64, 8, 4)
_AMPERE, _FP32, _FP64 = _tiles(128, 128, 32, 8, 4), _tiles(128, 64, 16, 8, 3), _tiles(32, 32, 16, 8, 2)
CONFIGS = {
    8: {2: (_AMPERE, _AMPERE), 4: (_FP32, _FP32), 8: (_FP64, _FP64)},  # 48 KB of shared memory: fits 8.6 and 8.9 too
    9: {2: (_WIDE, _SQUARE), 4: (_FP32, _FP32), 8: (_FP64, _FP64)},
    10: {2: (_WIDE, _SQUARE), 4: (_FP32, _FP32), 8: (_FP64, _FP64)},
}
INTERPRET_TILES = _tiles(16, 32, 32, 4, 1)
SPLIT = 96 if INTERPRET else 2048  # columns
GROUP = 16  # row tiles that share columns: 16 * 128 rows of 4096 bf16 are 16 MB of the 50 MB L2 of an H100


def _launch_tiles(hidden, long_epilogue):
    if INTERPRET:
        return INTERPRET_TILES
    major = torch.cuda.get_device_capability(hidden.device)[0] if torch.version.hip is None else 8
    return CONFIGS.get(major, CONFIGS[8])[hidden.element_size()][long_epilogue]  # unlisted: the smallest


def _constants(hidden, inv_temperature, softcap):
    acc = tl.float64 if inv_temperature.dtype == torch.float64 else tl.float32
    return dict(D=hidden.shape[1], SOFTCAP=softcap, GROUP=GROUP, ACC=acc, INTERPRET=INTERPRET)


def _forward_triton(hidden, weight, target, inv_temperature, softcap, with_entropy):
    """Like _forward_reference; all tensors contiguous."""
    N, V = len(hidden), len(weight)
    S = triton.cdiv(V, SPLIT)
    z_target = inv_temperature.new_full((N,), float("nan"))  # stays so for a target outside the vocabulary
    m, s, e = (inv_temperature.new_empty(S, N) if wanted else None for wanted in (True, True, with_entropy))
    logp, lse, entropy = (inv_temperature.new_empty(N) if wanted else None for wanted in (True, True, with_entropy))
    if N > 0:
        constants = _constants(hidden, inv_temperature, softcap) | _launch_tiles(hidden, softcap is not None)
        forward_kernel[(triton.cdiv(N, constants["BN"]) * S,)](
            hidden, weight, target, inv_temperature, z_target, m, s, e, N,
            V=V, ENTROPY=with_entropy, SPLIT=SPLIT, **constants,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(N, 128),)](
            z_target, m, s, e, logp, lse, entropy, N, S=S, ENTROPY=with_entropy, BN=128, ACC=constants["ACC"]
        )
    return logp, lse, entropy


def _dx_triton(hidden, weight, start, target, inv_temperature, softcap, lse, entropy, g_logp, g_entropy, buffer):
    """Like _dx_reference, but in the dtype of hidden, which is that of the two matrix products to come."""
    N, width = len(hidden), len(weight)
    tiles = _launch_tiles(hidden, softcap is not None or g_entropy is not None)
    row_tiles, column_tiles = triton.cdiv(N, tiles["BN"]), triton.cdiv(width, tiles["BV"])
    stride = column_tiles * tiles["BV"]
    dx = buffer[: row_tiles * tiles["BN"] * stride].view(-1, stride)
    if N > 0:
        backward_kernel[(row_tiles * column_tiles,)](
            hidden, weight, target, inv_temperature, lse, entropy, g_logp, g_entropy, dx, N, start, width, stride,
            ENTROPY=g_entropy is not None, **_constants(hidden, inv_temperature, softcap), **tiles,
        )  # fmt: skip
    return dx[:N, :width]


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _no_autocast(device):
    # Not on the meta device, where memory is counted: it knows no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _kept_rows(hidden, target, temperature, index):
    """hidden, target and 1 / temperature of the rows that count, contiguous."""
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full(target.shape, temperature, dtype=sum_dtype, device=target.device)
    rows = (hidden, target, 1 / temperature.to(sum_dtype))
    return [t.contiguous() if index is None else t[index] for t in rows]


def _all_rows(x, index, N):
    """x with zeros for the ignored rows."""
    return x if index is None else x.new_zeros(N, *x.shape[1:]).index_copy_(0, index, x)


def _add_product(out, a, b):
    """out += a @ b, where out is fp32 (or fp64) and never rounded to less."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, softcap, return_entropy):
        # The size of index costs a host sync on a GPU. Prompt and padding are often half of the rows: worth it.
        index = (target != IGNORE).nonzero().squeeze(1)
        index = None if len(index) == len(target) else index
        forward = _forward_triton if on_triton(hidden) else _forward_reference
        with _no_autocast(hidden.device):
            rows = _kept_rows(hidden, target, temperature, index)
            logp, lse, entropy = forward(rows[0], weight.contiguous(), *rows[1:], softcap, return_entropy)
        per_row = isinstance(temperature, torch.Tensor)
        ctx.temperature, ctx.softcap = None if per_row else temperature, softcap
        ctx.save_for_backward(hidden, weight, target, temperature if per_row else None, index, lse, entropy)
        ctx.set_materialize_grads(False)
        logp = _all_rows(logp, index, len(target))
        # A copy: the caller may write into it, and the saved one must stay.
        return (logp, _all_rows(entropy.clone(), index, len(target))) if return_entropy else logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy=None):
        hidden, weight, target, temperature, index, lse, entropy = ctx.saved_tensors
        N = len(target)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with _no_autocast(hidden.device):
            temperature = ctx.temperature if temperature is None else temperature
            hidden, target, inv_temperature = _kept_rows(hidden, target, temperature, index)
            g_logp = torch.zeros(N, dtype=lse.dtype, device=lse.device) if g_logp is None else g_logp
            g_logp, g_entropy = (
                g if g is None else g.contiguous() if index is None else g[index] for g in (g_logp, g_entropy)
            )
            weight = weight.contiguous()
            dtype, sum_dtype = hidden.dtype, lse.dtype
            if on_triton(hidden):
                dx_of, chunk, tile = _dx_triton, DX_CHUNK, 256  # whole tiles, and no tile is larger
            else:
                dx_of, chunk, tile = _dx_reference, REFERENCE_CHUNK, 1
                hidden = hidden.to(sum_dtype)
            buffer = hidden.new_empty(
                math.prod(-(-size // tile) * tile for size in (len(hidden), min(len(weight), chunk)))
            )
            d_hidden = torch.zeros_like(hidden, dtype=sum_dtype) if need_hidden else None
            d_weight = torch.empty_like(weight) if need_weight else None
            for start in range(0, len(weight), chunk):
                w = weight[start : start + chunk]
                saved = (target, inv_temperature, ctx.softcap, lse, entropy, g_logp, g_entropy)
                dx = dx_of(hidden, w, start, *saved, buffer)
                if need_hidden:
                    _add_product(d_hidden, dx, w)
                if need_weight and dx.dtype == dtype:
                    torch.mm(dx.T, hidden, out=d_weight[start : start + chunk])
                elif need_weight:
                    d_weight[start : start + chunk] = dx.T @ hidden
            if need_hidden:
                d_hidden = _all_rows(d_hidden.to(dtype), index, N)
        return d_hidden, d_weight, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------


def _check(hidden, weight, target, temperature, softcap):
    for name, t in (("hidden", hidden), ("weight", weight)):
        if isinstance(t, DTensor):
            raise ValueError(f"{name} is a DTensor: call inside the forward of its FSDP module, or pass full_tensor()")
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if hidden.dtype not in floats or hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be a float dtype [..., D], got {hidden.dtype} {list(hidden.shape)}")
    D = hidden.shape[-1]
    if weight.dtype != hidden.dtype or weight.dim() != 2 or weight.shape[1] != D or len(weight) == 0:
        raise ValueError(f"weight must be {hidden.dtype} [V, {D}] like hidden, got {weight.dtype} {list(weight.shape)}")
    rows = hidden.shape[:-1]
    if target.dtype != torch.int64 or target.shape != rows:
        raise ValueError(f"target must be int64 {list(rows)} like hidden, got {target.dtype} {list(target.shape)}")
    per_row = isinstance(temperature, torch.Tensor)
    if per_row and (temperature.dtype != torch.float32 or temperature.shape != rows):
        got = f"{temperature.dtype} {list(temperature.shape)}"
        raise ValueError(f"temperature must be a float or fp32 {list(rows)} like target, got {got}")
    tensors = {"weight": weight, "target": target} | ({"temperature": temperature} if per_row else {})
    for name, t in tensors.items():
        if t.device != hidden.device:
            raise ValueError(f"{name} is on {t.device} but hidden on {hidden.device}")
    if not per_row and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be None or > 0, got {softcap}")
    if target.device.type == "cpu":  # elsewhere these checks would be host syncs
        bad = target[(target != IGNORE) & ((target < 0) | (target >= len(weight)))]
        if len(bad):
            raise ValueError(f"target must be {IGNORE} or in [0, {len(weight)}), got {bad[0].item()}")
        if per_row and not (temperature > 0).all():
            raise ValueError(f"temperature must be > 0, got {temperature.min().item()}")


def linear_logp(hidden, weight, target, temperature=1.0, softcap=None, return_entropy=False):
    """log softmax(z)[target] with z = hidden @ weight^T / temperature, without the logits; with its entropy on demand.

    hidden [..., D] and weight [V, D] share one of fp32, fp16, bf16, fp64. target int64 [...]; -100 is a row to ignore:
    it costs nothing, its logp, entropy and gradient are 0. temperature is a float or fp32 [...], one per row, without
    gradient; softcap (Gemma) is applied before it. Returns logp fp32 [...] (fp64 for fp64) in nats, or (logp, entropy)
    with return_entropy, the entropy of the whole tempered distribution. Sums are fp32; gradients of both go to hidden
    and weight in their dtype, accumulated in fp32, and what needs no gradient is not computed (a frozen weight saves a
    quarter of the work). Kept for backward: the inputs and at most three numbers a row. Non-contiguous inputs are
    copied.

    A call has the same bits with and without gradient and every time. With the Triton kernels a row's bits are the same
    in every batch; the PyTorch path (CPU, no Triton) takes them from the matrix product of the library, which may pick
    its order by the number of rows: 1e-6 then. It wants fp32 products in full precision, torch's default.

    Raises ValueError on other dtypes, shapes and devices, and on the CPU for a target outside [0, V) or a temperature
    <= 0; a GPU cannot check without a host sync: there logp is NaN for such a target. One host sync, for -100.
    """
    _check(hidden, weight, target, temperature, softcap)
    rows = target.shape
    temperature = temperature.reshape(-1) if isinstance(temperature, torch.Tensor) else float(temperature)
    softcap = None if softcap is None else float(softcap)
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1)
    out = _LinearLogp.apply(*flat, temperature, softcap, return_entropy)
    return (out[0].view(rows), out[1].view(rows)) if return_entropy else out.view(rows)
