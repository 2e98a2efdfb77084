"""Triton kernels: [N, V] logits and [N] targets -> [N] log-probs, and the same from hidden states and a head.

From logits: forward reads each logit once and keeps one logsumexp per row; backward reads each once and writes
its gradient once, over the logits if the caller allows. From hidden states: matmuls fill one tile of float32
logits at a time, and a kernel folds the tile into running sums (forward) or turns it into gradients (backward).

All kernels write a transformed logit as z = outer * u, with u = x (outer = scale / temperature) or, under a softcap,
u = tanh(inner * x) (inner = scale / softcap, outer = softcap / temperature): differences of two large u are exact,
and one multiplication by outer * log2(e) feeds exp2, the exponential that the hardware has.

Only float32 arithmetic, no CUDA-only instruction, no assumption about the width of a warp. Values that change from
call to call are runtime arguments: nothing is compiled again for another shape or temperature.
"""

from contextlib import AbstractContextManager, nullcontext
from math import e, log, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefloss.kernels.naive import LogitTransform, no_autocast

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Launch(NamedTuple):
    """How many logits a program works on at a time, and on how many warps."""

    block: int
    warps: int


# 32 logits per thread of 32-wide warps: 64 bytes of bfloat16 in flight each, and registers for six programs an SM
FORWARD = Launch(4096, 4)
BACKWARD = Launch(4096, 4)

# Scratch of the linear path, one tile of logits and its gradient; with n x H in float32 it stays under 1 GiB at
# n = 16384, H = 4096.
SCRATCH_BYTES = 2**29
# Rows of a tile in the forward pass: enough for the matmuls, few enough for long rows.
_FORWARD_ROWS = 2048
# Columns below which the backward pass takes fewer rows instead.
_BACKWARD_COLUMNS = 2048

_LOG2E = tl.constexpr(log2(e))
_LN2 = tl.constexpr(log(2))
# exp2 of less is 0 in float32. Stands in for -inf where an exponential of 0 is multiplied by its own exponent.
_FLOOR = tl.constexpr(-200.0)
# Softmax numerators in (0, 1] are stored times this, so that in float16 those down to 2e-9 keep 11 bits.
_KEEP = tl.constexpr(2.0**15)


class TokenStats(NamedTuple):
    """Per token, [...], float32; 0 at ignored targets. What was not asked for is None.

    Every field but argmax is differentiable. A target outside [0, V), as another shard's in a sharded
    vocabulary, has log-prob -inf and no gradient of its own; the rest of its row is unaffected.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    log_sum_sq: Tensor | None = None
    argmax: Tensor | None = None


class Kept(NamedTuple):
    """What `linear_forward` leaves for `linear_backward` beside the `TokenStats`."""

    # u of the target, [n]
    picked: Tensor
    # -d logp / d hidden, [n, H], float32
    product: Tensor | None = None
    # exp(z - reference) of the first k rows, [k, V], float16 (float32 for float32 inputs); backward consumes it
    numerators: Tensor | None = None
    # the reference in units of u, for each of the [tiles, k], and the columns of a tile
    references: Tensor | None = None
    width: int = 0


# --- kernels: shared pieces


@triton.jit
def _squash(b_x, inner, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        # libdevice.tanh is CUDA's; this form of 2 sigmoid(2t) - 1 overflows nowhere
        b_e = tl.exp2(tl.abs(b_x * inner) * (-2 * _LOG2E))
        b_tanh = (1 - b_e) / (1 + b_e)
        b_u = tl.where(b_x < 0, -b_tanh, b_tanh)
        # a token that cannot occur would be lifted to -softcap
        b_u = tl.where(b_x == float("-inf"), b_x, b_u)
    else:
        b_u = b_x
    return b_u


@triton.jit
def _finite(b_m):
    # -inf - -inf is NaN: rows, or lanes, that have met nothing but -inf measure from 0
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def _expm1(x):
    # the series where exp(x) - 1 cancels, to x**8 / 8! = 6e-9 of x
    b_series = 1 + x / 7
    b_series = 1 + x / 6 * b_series
    b_series = 1 + x / 5 * b_series
    b_series = 1 + x / 4 * b_series
    b_series = 1 + x / 3 * b_series
    b_series = 1 + x / 2 * b_series
    return tl.where(tl.abs(x) < 0.35, x * b_series, tl.exp(x) - 1)


@triton.jit
def _fold(
    b_x,
    start,
    b_m,
    b_s,
    b_a,
    b_q,
    b_i,
    inner,
    outer2,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """One block into running sums: max m, sum s of e = exp(z - m), a of e log2 e, q of e**2, i the argmax.

    Each group of LANE neighbours, which one thread loads in one go, has sums of its own: no exchange between
    threads until the row is done, and one rescaling exponential per LANE logits.
    """
    b_u = tl.reshape(_squash(b_x, inner, SOFTCAP), (BLOCK // LANE, LANE))
    if ARGMAX:
        b_top, b_at = tl.max(b_u, 1, return_indices=True)
        o_lane = start + tl.arange(0, BLOCK // LANE) * LANE
        b_i = tl.where(b_top > b_m, o_lane + b_at, b_i)
    else:
        b_top = tl.max(b_u, 1)
    b_new = tl.maximum(b_m, b_top)
    b_ref = _finite(b_new)
    # the difference first: multiplied first, two large logits would each be rounded
    b_d = (b_u - b_ref[:, None]) * outer2
    b_e = tl.exp2(b_d)
    b_shift = (b_m - b_ref) * outer2
    b_alpha = tl.exp2(b_shift)
    if ENTROPY:
        b_a = b_alpha * (b_a + tl.maximum(b_shift, _FLOOR) * b_s) + tl.sum(b_e * tl.maximum(b_d, _FLOOR), 1)
    if SUM_SQ:
        b_q = b_alpha * b_alpha * b_q + tl.sum(b_e * b_e, 1)
    b_s = b_alpha * b_s + tl.sum(b_e, 1)
    return b_new, b_s, b_a, b_q, b_i


@triton.jit
def _join(
    b_m, b_s, b_a, b_q, b_i, V, outer2, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, ARGMAX: tl.constexpr
):
    """The lanes' sums -> those of the row."""
    m = tl.max(b_m, 0)
    b_shift = (b_m - _finite(m)) * outer2
    b_alpha = tl.exp2(b_shift)
    a = 0.0
    q = 0.0
    i = 0
    if ENTROPY:
        a = tl.sum(b_alpha * (b_a + tl.maximum(b_shift, _FLOOR) * b_s), 0)
    if SUM_SQ:
        q = tl.sum(b_alpha * b_alpha * b_q, 0)
    if ARGMAX:
        # of equal logits the first, as torch.argmax
        i = tl.min(tl.where(b_m == m, b_i, V - 1), 0)
    return m, tl.sum(b_alpha * b_s, 0), a, q, i


@triton.jit
def _differentiate(
    b_x,
    o_v,
    y,
    row,
    logp,
    lse,
    entropy,
    log_sum_sq,
    d_logp,
    d_lse,
    d_entropy,
    d_log_sum_sq,
    inner,
    outer2,
    slope,
    SOFTCAP: tl.constexpr,
    D_LSE: tl.constexpr,
    D_ENTROPY: tl.constexpr,
    D_SUM_SQ: tl.constexpr,
):
    """Logits of a row at columns o_v -> their gradient."""
    b_u = _squash(b_x, inner, SOFTCAP)
    g = tl.load(d_logp + row)
    b_log2p = b_u * outer2 - tl.load(lse + row) * _LOG2E
    b_p = tl.exp2(b_log2p)
    # 1 - p of the target from its log-prob: where p is near 1, p itself lacks the digits
    b_d = tl.where(o_v == y, -g * _expm1(tl.load(logp + row)), -g * b_p)
    if D_LSE:
        b_d += tl.load(d_lse + row) * b_p
    if D_ENTROPY:
        b_logp = tl.maximum(b_log2p, _FLOOR) * _LN2
        b_d -= tl.load(d_entropy + row) * b_p * (b_logp + tl.load(entropy + row))
    if D_SUM_SQ:
        # p / sum p**2 may overflow where p**2 / sum p**2 is at most 1
        b_share = tl.exp2(2 * b_log2p - tl.load(log_sum_sq + row) * _LOG2E)
        b_d += tl.load(d_log_sum_sq + row) * 2 * (b_share - b_p)
    if SOFTCAP:
        # the bound gives a masked logit, u = -inf, the slope 0
        b_u = tl.maximum(b_u, -1.0)
        b_d *= 1 - b_u * b_u
    return b_d * slope


# --- kernels: logits -> log-probs


@triton.jit(do_not_specialize=["ignore_index", "T"])
def gather_fwd_kernel(
    logits,
    targets,
    logp,
    lse,
    entropy,
    log_sum_sq,
    argmax,
    stride_b,
    stride_t,
    T,
    V,
    inner,
    outer,
    outer2,
    ignore_index,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per row. Rows are stride_t apart, every T rows stride_b: [B, T, V] shifted by one is no copy."""
    row = tl.program_id(0)
    y = tl.load(targets + row)
    if y == ignore_index:
        tl.store(logp + row, 0.0)
        tl.store(lse + row, 0.0)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
        if SUM_SQ:
            tl.store(log_sum_sq + row, 0.0)
        if ARGMAX:
            tl.store(argmax + row, 0)
        return
    # int64 before any stride: N * V passes 2**31
    p_row = logits + ((row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t)
    o_v = tl.arange(0, BLOCK)  # [BLOCK]
    b_m = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
    b_s = tl.zeros((BLOCK // LANE,), tl.float32)
    b_a = tl.zeros((BLOCK // LANE,), tl.float32)
    b_q = tl.zeros((BLOCK // LANE,), tl.float32)
    b_i = tl.zeros((BLOCK // LANE,), tl.int32)
    # whole blocks without a mask, whose cost per logit shows, and which forbids wide loads where V is odd
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b_x = tl.load(p_row + start + o_v).to(tl.float32)
        b_m, b_s, b_a, b_q, b_i = _fold(
            b_x, start, b_m, b_s, b_a, b_q, b_i, inner, outer2, SOFTCAP, ENTROPY, SUM_SQ, ARGMAX, BLOCK, LANE
        )
    if whole < V:
        b_x = tl.load(p_row + whole + o_v, mask=whole + o_v < V, other=float("-inf")).to(tl.float32)
        b_m, b_s, b_a, b_q, b_i = _fold(
            b_x, whole, b_m, b_s, b_a, b_q, b_i, inner, outer2, SOFTCAP, ENTROPY, SUM_SQ, ARGMAX, BLOCK, LANE
        )
    m, s, a, q, i = _join(b_m, b_s, b_a, b_q, b_i, V, outer2, ENTROPY, SUM_SQ, ARGMAX)
    m = _finite(m)
    log_s = tl.log(s)
    inside = (y >= 0) & (y < V)
    u_y = _squash(tl.load(p_row + y, mask=inside, other=float("-inf")).to(tl.float32), inner, SOFTCAP)
    # in this order: of two large logits the difference is exact, and small against lse
    tl.store(logp + row, (u_y - m) * outer - log_s)
    tl.store(lse + row, m * outer + log_s)
    if ENTROPY:
        tl.store(entropy + row, log_s - a / s * _LN2)
    if SUM_SQ:
        tl.store(log_sum_sq + row, tl.log(q) - 2 * log_s)
    if ARGMAX:
        tl.store(argmax + row, i)


@triton.jit(do_not_specialize=["ignore_index", "T"])
def gather_bwd_kernel(
    logits,
    targets,
    logp,
    lse,
    entropy,
    log_sum_sq,
    d_logp,
    d_lse,
    d_entropy,
    d_log_sum_sq,
    d_logits,
    stride_b,
    stride_t,
    stride_db,
    stride_dt,
    T,
    V,
    inner,
    outer2,
    slope,
    ignore_index,
    SOFTCAP: tl.constexpr,
    D_LSE: tl.constexpr,
    D_ENTROPY: tl.constexpr,
    D_SUM_SQ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of a row; d_logits may be logits: each program writes what it alone has read."""
    blocks = tl.cdiv(V, BLOCK)
    row = tl.program_id(0) // blocks
    o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < V
    batch, position = (row // T).to(tl.int64), (row % T).to(tl.int64)
    p_out = d_logits + (batch * stride_db + position * stride_dt) + o_v
    y = tl.load(targets + row)
    if y == ignore_index:
        # written, not multiplied by 0: such a row may hold inf or NaN
        tl.store(p_out, tl.zeros((BLOCK,), d_logits.dtype.element_ty), mask=m_v)
        return
    p_in = logits + (batch * stride_b + position * stride_t) + o_v
    b_x = tl.load(p_in, mask=m_v, other=float("-inf")).to(tl.float32)
    b_d = _differentiate(
        b_x,
        o_v,
        y,
        row,
        logp,
        lse,
        entropy,
        log_sum_sq,
        d_logp,
        d_lse,
        d_entropy,
        d_log_sum_sq,
        inner,
        outer2,
        slope,
        SOFTCAP,
        D_LSE,
        D_ENTROPY,
        D_SUM_SQ,
    )
    tl.store(p_out, b_d.to(d_logits.dtype.element_ty), mask=m_v)


# --- kernels: a tile of logits between two matmuls


@triton.jit
def _load_tile(p_x, p_bias, m_v, BIAS: tl.constexpr):
    b_x = tl.load(p_x, mask=m_v, other=float("-inf")).to(tl.float32)
    if BIAS:
        b_x += tl.load(p_bias, mask=m_v, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["v_start"])
def tile_stats_kernel(
    tile,
    bias,
    targets,
    m,
    s,
    picked,
    a,
    q,
    i,
    numerators,
    references,
    stride_n,
    stride_k,
    v_start,
    width,
    inner,
    outer2,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    ARGMAX: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per row: tile columns v_start..v_start + width into the running sums of `_fold`.

    KEEP also writes the softmax numerators against the maximum so far, times the slope of the softcap. They leave
    out the target: its part, p - 1, comes from the log-prob, for rounded to half precision it would cancel.
    """
    row = tl.program_id(0)
    p_row = tile + row.to(tl.int64) * stride_n
    p_bias = bias
    if BIAS:
        p_bias += v_start
    o_v = tl.arange(0, BLOCK)  # [BLOCK]
    # the sums of the tiles before come in as those of lane 0
    m_first = tl.arange(0, BLOCK // LANE) == 0
    b_m = tl.where(m_first, tl.load(m + row), float("-inf"))
    b_s = tl.where(m_first, tl.load(s + row), 0.0)
    b_a = tl.zeros((BLOCK // LANE,), tl.float32)
    b_q = tl.zeros((BLOCK // LANE,), tl.float32)
    b_i = tl.zeros((BLOCK // LANE,), tl.int32)
    if ENTROPY:
        b_a = tl.where(m_first, tl.load(a + row), 0.0)
    if SUM_SQ:
        b_q = tl.where(m_first, tl.load(q + row), 0.0)
    if ARGMAX:
        b_i = tl.where(m_first, tl.load(i + row), 0)
    for start in range(0, width, BLOCK):
        b_x = _load_tile(p_row + start + o_v, p_bias + start + o_v if BIAS else p_bias, start + o_v < width, BIAS)
        b_m, b_s, b_a, b_q, b_i = _fold(
            b_x,
            v_start + start,
            b_m,
            b_s,
            b_a,
            b_q,
            b_i,
            inner,
            outer2,
            SOFTCAP,
            ENTROPY,
            SUM_SQ,
            ARGMAX,
            BLOCK,
            LANE,
        )
    top, total, sum_a, sum_q, at = _join(
        b_m, b_s, b_a, b_q, b_i, v_start + width, outer2, ENTROPY, SUM_SQ, ARGMAX
    )
    tl.store(m + row, top)
    tl.store(s + row, total)
    if ENTROPY:
        tl.store(a + row, sum_a)
    if SUM_SQ:
        tl.store(q + row, sum_q)
    if ARGMAX:
        tl.store(i + row, at)
    y = tl.load(targets + row) - v_start
    if (y >= 0) & (y < width):
        x_y = tl.load(p_row + y).to(tl.float32)
        if BIAS:
            x_y += tl.load(p_bias + y).to(tl.float32)
        tl.store(picked + row, _squash(x_y, inner, SOFTCAP))
    if KEEP:
        tl.store(references + row, top)
        p_keep = numerators + row.to(tl.int64) * stride_k
        for start in range(0, width, BLOCK):
            m_v = start + o_v < width
            b_x = _load_tile(p_row + start + o_v, p_bias + start + o_v if BIAS else p_bias, m_v, BIAS)
            b_u = _squash(b_x, inner, SOFTCAP)
            b_e = tl.exp2((b_u - _finite(top)) * outer2) * _KEEP
            if SOFTCAP:
                b_u = tl.maximum(b_u, -1.0)
                b_e *= 1 - b_u * b_u
            b_e = tl.where(start + o_v == y, 0.0, b_e)
            tl.store(p_keep + start + o_v, b_e.to(numerators.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["v_start"])
def tile_grad_kernel(
    tile,
    bias,
    targets,
    logp,
    lse,
    entropy,
    log_sum_sq,
    d_logp,
    d_lse,
    d_entropy,
    d_log_sum_sq,
    d_tile,
    stride_n,
    stride_d,
    v_start,
    width,
    inner,
    outer2,
    slope,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    D_LSE: tl.constexpr,
    D_ENTROPY: tl.constexpr,
    D_SUM_SQ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of logits -> its gradient in the dtype of d_tile, which may be the tile itself."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    p_bias = bias
    if BIAS:
        p_bias += v_start + o_v
    b_x = _load_tile(tile + row.to(tl.int64) * stride_n + o_v, p_bias, m_v, BIAS)
    b_d = _differentiate(
        b_x,
        o_v,
        tl.load(targets + row) - v_start,
        row,
        logp,
        lse,
        entropy,
        log_sum_sq,
        d_logp,
        d_lse,
        d_entropy,
        d_log_sum_sq,
        inner,
        outer2,
        slope,
        SOFTCAP,
        D_LSE,
        D_ENTROPY,
        D_SUM_SQ,
    )
    tl.store(d_tile + row.to(tl.int64) * stride_d + o_v, b_d.to(d_tile.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["v_start"])
def kept_grad_kernel(
    numerators,
    references,
    picked,
    targets,
    logp,
    lse,
    d_logp,
    d_lse,
    d_tile,
    stride_k,
    stride_d,
    v_start,
    width,
    outer2,
    slope,
    SOFTCAP: tl.constexpr,
    D_LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The numerators that `tile_stats_kernel` kept -> the gradient; d_tile may be their memory, in another dtype."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    g = tl.load(d_logp + row)
    logp_y = tl.load(logp + row)
    d_y = -g * _expm1(logp_y)
    d_p = -g
    if D_LSE:
        g_lse = tl.load(d_lse + row)
        d_y += g_lse * tl.exp(logp_y)
        d_p += g_lse
    if SOFTCAP:
        u_y = tl.maximum(tl.load(picked + row), -1.0)
        d_y *= 1 - u_y * u_y
    # no overflow: a reference is at most the maximum of the row
    d_p *= tl.exp2(tl.load(references + row) * outer2 - tl.load(lse + row) * _LOG2E) * (1 / _KEEP)
    b_k = tl.load(numerators + row.to(tl.int64) * stride_k + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_d = tl.where(o_v == tl.load(targets + row) - v_start, d_y, d_p * b_k) * slope
    tl.store(d_tile + row.to(tl.int64) * stride_d + o_v, b_d.to(d_tile.dtype.element_ty), mask=m_v)


# --- launchers; they neither record nor need autograd


def gather_forward(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    *,
    entropy: bool = False,
    log_sum_sq: bool = False,
    argmax: bool = False,
) -> TokenStats:
    """Logits [..., V] and targets [...] -> what was asked for, [...], in one pass over the logits."""
    x, rows = _rows(logits)
    y = targets.reshape(-1)
    new = lambda wanted, dtype=torch.float32: (  # noqa: E731
        torch.empty(y.shape, dtype=dtype, device=x.device) if wanted else None
    )
    logps, lse = torch.empty(y.shape, dtype=torch.float32, device=x.device), torch.empty(0)
    return TokenStats(logps, lse)
