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

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import e, log, log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

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


Gradients = tuple[Tensor | None, ...]


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
    outer,
    slope,
    SOFTCAP: tl.constexpr,
    D_LSE: tl.constexpr,
    D_ENTROPY: tl.constexpr,
    D_SUM_SQ: tl.constexpr,
):
    """Logits of a row at columns o_v -> their gradient."""
    b_u = _squash(b_x, inner, SOFTCAP)
    g = tl.load(d_logp + row)
    b_logp = b_u * outer - tl.load(lse + row)
    b_p = tl.exp2(b_logp * _LOG2E)
    # 1 - p of the target from its log-prob: where p is near 1, p itself lacks the digits
    b_d = tl.where(o_v == y, -g * _expm1(tl.load(logp + row)), -g * b_p)
    if D_LSE:
        b_d += tl.load(d_lse + row) * b_p
    if D_ENTROPY:
        b_d -= tl.load(d_entropy + row) * b_p * (tl.maximum(b_logp, _FLOOR) + tl.load(entropy + row))
    if D_SUM_SQ:
        # p / sum p**2 may overflow where p**2 / sum p**2 is at most 1
        b_share = tl.exp2((2 * b_logp - tl.load(log_sum_sq + row)) * _LOG2E)
        b_d += tl.load(d_log_sum_sq + row) * 2 * (b_share - b_p)
    if SOFTCAP:
        # the bound gives a masked logit, u = -inf, the slope 0
        b_u = tl.maximum(b_u, -1.0)
        b_d *= 1 - b_u * b_u
    return b_d * slope


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
        tl.store(entropy + row, log_s - a / s * _LN2)  # pyright: ignore[reportOperatorIssue]
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
    outer,
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
        outer,
        slope,
        SOFTCAP,
        D_LSE,
        D_ENTROPY,
        D_SUM_SQ,
    )
    tl.store(p_out, b_d.to(d_logits.dtype.element_ty), mask=m_v)


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
    REFERENCE: tl.constexpr,
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
        b_x = _load_tile(
            p_row + start + o_v, p_bias + start + o_v if BIAS else p_bias, start + o_v < width, BIAS
        )
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
        if REFERENCE:
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
    outer,
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
        outer,
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
    outer,
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
    d_p *= tl.exp2((tl.load(references + row) * outer - tl.load(lse + row)) * _LOG2E) * (1 / _KEEP)
    b_k = tl.load(numerators + row.to(tl.int64) * stride_k + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_d = tl.where(o_v == tl.load(targets + row) - v_start, d_y, d_p * b_k) * slope
    tl.store(d_tile + row.to(tl.int64) * stride_d + o_v, b_d.to(d_tile.dtype.element_ty), mask=m_v)


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
    """Logits [..., V] and targets [...] -> what was asked for, in one pass over the logits; records no graph."""
    x, y = _rows(logits), targets.reshape(-1)
    inner, outer, _ = _factors(transform)
    outputs = (
        _new(y),
        _new(y),
        _new(y) if entropy else None,
        _new(y) if log_sum_sq else None,
        _new(y, torch.int64) if argmax else None,
    )
    vocabulary = logits.shape[-1]
    block, warps = _launch(FORWARD, vocabulary)
    _run(
        gather_fwd_kernel,
        len(y),
        warps,
        x.data,
        y,
        *outputs,
        *x.strides,
        x.per_batch,
        vocabulary,
        inner,
        outer,
        outer * log2(e),
        ignore_index,
        SOFTCAP=transform.softcap is not None,
        ENTROPY=entropy,
        SUM_SQ=log_sum_sq,
        ARGMAX=argmax,
        BLOCK=block,
        LANE=_lane(x.data),
    )
    logps, lse, *others = (None if each is None else each.view(targets.shape) for each in outputs)
    assert logps is not None and lse is not None
    return TokenStats(logps, lse, *others)


def gather_backward(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    stats: TokenStats,
    d_logps: Tensor | None,
    d_lse: Tensor | None = None,
    d_entropy: Tensor | None = None,
    d_log_sum_sq: Tensor | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """Gradients of the stats, [...] or None -> that of the logits, in one read and one write.

    With `inplace` it is written over the logits, unless several of them share memory or `logits` had to be copied.
    """
    x, y = _rows(logits), targets.reshape(-1)
    inner, outer, slope = _factors(transform)
    grads = _gradients(y, d_logps, d_lse, d_entropy, d_log_sum_sq)
    shared = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    inplace = inplace and not shared and x.data.data_ptr() == logits.data_ptr()
    d_logits = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_x = _rows(d_logits)
    vocabulary = logits.shape[-1]
    block, warps = _launch(BACKWARD, vocabulary)
    _run(
        gather_bwd_kernel,
        len(y) * triton.cdiv(vocabulary, block),
        warps,
        x.data,
        y,
        *_flat(stats),
        *grads,
        d_x.data,
        *x.strides,
        *d_x.strides,
        x.per_batch,
        vocabulary,
        inner,
        outer,
        slope,
        ignore_index,
        SOFTCAP=transform.softcap is not None,
        **_gradient_flags(grads),
        BLOCK=block,
    )
    return d_logits


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    *,
    entropy: bool = False,
    log_sum_sq: bool = False,
    argmax: bool = False,
    product: bool = False,
    keep_bytes: int = 0,
    scratch_bytes: int | None = None,
) -> tuple[TokenStats, Kept]:
    """Hidden [n, H], weight [V, H], bias [V] and targets [n], none ignored -> stats; records no graph.

    One matmul (2 n V H operations), and one tile of logits in memory at a time. What it may leave for backward:

    - ``product``, for a frozen head: a second matmul here, n x H float32, and none in backward.
    - ``keep_bytes``, for a trained head: softmax numerators, 2 bytes per logit, of as many rows as that holds.
      Backward computes the logits of the other rows again, one more matmul.
    """
    n, vocabulary = len(hidden), len(weight)
    scratch_bytes = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    numerator_dtype = torch.float32 if weight.dtype == torch.float32 else torch.float16
    kept_rows = 0 if product else min(n, keep_bytes // (_padded(vocabulary) * numerator_dtype.itemsize))
    # a product needs the numerators of one tile, beside it
    logit_bytes = 4 + weight.element_size() if product else 4
    height = max(1, min(n, _FORWARD_ROWS))
    width = _even(vocabulary, scratch_bytes // (logit_bytes * height))
    device, flags = hidden.device, {"ENTROPY": entropy, "SUM_SQ": log_sum_sq, "ARGMAX": argmax}
    with torch.no_grad(), no_autocast(device):
        sums = _Sums.of(n, device)
        scratch = _matrix(height, width, torch.float32, device)
        numerators = references = d_hidden = None
        if product:
            numerators = _matrix(height, width, weight.dtype, device)
            d_hidden = _new(targets, shape=hidden.shape)
        elif kept_rows:
            numerators = _matrix(kept_rows, vocabulary, numerator_dtype, device)
            references = _new(targets, shape=(triton.cdiv(vocabulary, width), kept_rows))
        for rows in (*_slices(0, kept_rows, height), *_slices(kept_rows, n, height)):
            x, part = hidden[rows], sums.rows(rows)
            for tile, columns in enumerate(_slices(0, vocabulary, width)):
                head = weight[columns]
                logits = scratch[: len(x), : len(head)]
                _matmul(x, head.T, out=logits)
                kept = reference = None
                if numerators is not None and product:
                    kept, before = numerators[: len(x), : len(head)], part.m.clone()
                    _fold_tile(logits, bias, targets[rows], part, kept, None, columns.start, transform, flags)
                    assert d_hidden is not None
                    _add_product(d_hidden[rows], kept, head, before, part.m, transform, first=tile == 0)
                    continue
                if numerators is not None and references is not None and rows.stop <= kept_rows:
                    kept, reference = numerators[rows, columns], references[tile, rows]
                _fold_tile(
                    logits, bias, targets[rows], part, kept, reference, columns.start, transform, flags
                )
        stats = _finish(sums, transform, entropy, log_sum_sq, argmax)
        if d_hidden is None:
            return stats, Kept(sums.picked, None, numerators, references, width)
        for rows in _slices(0, n, height):
            d_hidden[rows] *= (_factors(transform)[2] / _KEEP.value / sums.s[rows])[:, None]
            owned, heads = _target_rows(weight, targets[rows])
            d_y = torch.expm1(stats.logps[rows]) * _target_slope(sums.picked[rows], transform)
            d_hidden[rows].addcmul_(heads, torch.where(owned, d_y, 0)[:, None])
        return stats, Kept(sums.picked, d_hidden)


def linear_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    stats: TokenStats,
    kept: Kept,
    d_logps: Tensor | None,
    d_lse: Tensor | None = None,
    d_entropy: Tensor | None = None,
    d_log_sum_sq: Tensor | None = None,
    *,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    d_weight: Tensor | None = None,
    d_bias: Tensor | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the stats, [n] or None -> those of hidden, weight and bias.

    It writes over ``kept.numerators``. A ``d_weight`` or ``d_bias`` given, float32, is added to, for a caller that
    goes through its tokens a few examples at a time; otherwise they come in the dtype of weight and bias.
    """
    n, vocabulary = len(hidden), len(weight)
    scratch_bytes = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    slope = _factors(transform)[2]
    device = hidden.device
    need_bias = need_bias and bias is not None
    grads = _gradients(targets, d_logps, d_lse, d_entropy, d_log_sum_sq)
    of_logits = d_entropy is not None or d_log_sum_sq is not None
    with torch.no_grad(), no_autocast(device):
        if kept.product is not None and not (need_weight or need_bias or of_logits):
            return _scaled_product(kept, weight, targets, transform, grads, hidden.dtype), None, None
        unit = _unit(grads, slope) if weight.dtype == torch.float16 else None
        if unit is not None:
            grads = tuple(None if each is None else each / unit for each in grads)
        d_kept = None
        if kept.numerators is not None and not of_logits:
            d_kept = _kept_gradient_(kept, targets, transform, stats, grads, weight.dtype)
        kept_rows = 0 if d_kept is None else len(d_kept)

        # a tile in float32, and beside it the gradient as a factor of matmuls, unless that is float32 too
        logit_bytes = 4 if weight.dtype == torch.float32 else 4 + weight.element_size()
        height = min(n, scratch_bytes // (logit_bytes * min(vocabulary, _BACKWARD_COLUMNS)))
        height = max(1, min(height, n - kept_rows))
        # the columns outermost: the gradient of the head is done tile by tile, and never all of it in float32
        width = vocabulary if kept_rows == n else _even(vocabulary, scratch_bytes // (logit_bytes * height))
        pieces = [*_slices(0, kept_rows, max(1, kept_rows)), *_slices(kept_rows, n, height)]
        if need_weight and (unit is not None or len(pieces) > 1):
            width = min(width, _even(vocabulary, scratch_bytes // (4 * hidden.shape[1])))

        adds = d_weight is not None
        d_bias_sum = _new(targets, shape=(vocabulary,)).zero_() if need_bias else None
        d_hidden_sum = d_hidden = None
        if need_hidden:
            d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            if width < vocabulary or unit is not None:
                d_hidden_sum = _new(targets, shape=hidden.shape)
        if need_weight and d_weight is None:
            d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            if n == 0:
                d_weight.zero_()
        recomputes = kept_rows < n
        scratch = _matrix(height, width, torch.float32, device) if recomputes else None
        factors = scratch
        if recomputes and weight.dtype != torch.float32:
            factors = _matrix(height, width, weight.dtype, device)
        for columns in _slices(0, vocabulary, width) if n else ():
            head = weight[columns]
            d_head = None
            if d_weight is not None and (unit is not None or (len(pieces) > 1 and not adds)):
                d_head = _new(targets, shape=head.shape).zero_()
            for rows in pieces:
                x = hidden[rows]
                if d_kept is not None and rows.stop <= kept_rows:
                    d_logits = d_kept[rows, columns]
                else:
                    assert scratch is not None and factors is not None
                    logits = scratch[: len(x), : len(head)]
                    d_logits = factors[: len(x), : len(head)]
                    _matmul(x, head.T, out=logits)
                    _tile_gradient(
                        logits, d_logits, bias, targets, rows, columns.start, transform, stats, grads
                    )
                if d_bias_sum is not None:
                    d_bias_sum[columns] += d_logits.sum(0, dtype=torch.float32)
                if d_hidden_sum is not None:
                    if columns.start == 0:
                        _matmul(d_logits, head, out=d_hidden_sum[rows])
                    else:
                        _add_matmul(d_logits, head, out=d_hidden_sum[rows])
                elif d_hidden is not None:
                    _matmul(d_logits, head, out=d_hidden[rows])
                if d_head is not None:
                    _add_matmul(d_logits.T, x, out=d_head)
                elif d_weight is not None:
                    add = _add_matmul if adds else _matmul
                    add(d_logits.T, x, out=d_weight[columns])
            if d_head is not None and d_weight is not None:
                if unit is not None:
                    d_head *= unit
                d_weight[columns] = d_weight[columns] + d_head if adds else d_head
        if d_hidden is not None and d_hidden_sum is not None:
            torch.mul(d_hidden_sum, 1 if unit is None else unit, out=d_hidden)
        if d_bias_sum is not None and bias is not None:
            if unit is not None:
                d_bias_sum *= unit
            d_bias = d_bias_sum.to(bias.dtype) if d_bias is None else d_bias.add_(d_bias_sum)
    return d_hidden, d_weight, d_bias


class _Rows(NamedTuple):
    """[..., V] as rows: `per_batch` of them strides[1] apart, and each so many strides[0]; neighbours adjoin."""

    data: Tensor
    strides: tuple[int, int]
    per_batch: int


def _rows(x: Tensor) -> _Rows:
    vocabulary = x.shape[-1]
    if x.stride(-1) != 1:
        x = x.contiguous()
    try:
        matrix = x.view(-1, vocabulary)
    except RuntimeError:
        if x.dim() == 3:
            return _Rows(x, (x.stride(0), x.stride(1)), x.shape[1])
        matrix = x.reshape(-1, vocabulary)
    return _Rows(matrix, (0, matrix.stride(0)), max(1, len(matrix)))


def _factors(transform: LogitTransform) -> tuple[float, float, float]:
    """Inner, outer, and the slope of z at x = 0."""
    slope = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return 1.0, slope, slope
    return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature, slope


def _launch(launch: Launch, columns: int) -> Launch:
    """For few columns a smaller block, in powers of two: a handful of compilations at most."""
    block = min(launch.block, max(128, triton.next_power_of_2(columns)))
    return Launch(block, max(1, min(launch.warps, block // 256)))


def _lane(x: Tensor) -> int:
    """How many logits one thread loads at a time: 16 bytes, the widest load."""
    return 16 // x.element_size()


def _run(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    first = arguments[0]
    # Triton launches on the current device, whatever the tensors' own
    here: AbstractContextManager[object] = nullcontext()
    if first.device.type != "cpu":
        here = (
            torch.xpu.device(first.device) if first.device.type == "xpu" else torch.cuda.device(first.device)
        )
    if programs:
        with here:
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def _gradient_flags(grads: Gradients) -> dict[str, bool]:
    return {
        name: each is not None
        for name, each in zip(("D_LSE", "D_ENTROPY", "D_SUM_SQ"), grads[1:], strict=True)
    }


def _new(like: Tensor, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None) -> Tensor:
    return torch.empty(like.shape if shape is None else shape, dtype=dtype, device=like.device)


def _flat(stats: TokenStats) -> list[Tensor | None]:
    """What the backward kernels read of the stats."""
    return [None if each is None else each.reshape(-1).contiguous() for each in stats[:4]]


def _gradients(targets: Tensor, d_logps: Tensor | None, *others: Tensor | None) -> Gradients:
    """As the kernels take them: [n], float32, a gradient of the log-probs always there."""
    if d_logps is None:
        d_logps = _new(targets).zero_()
    # .sum().backward() hands out one number expanded to all
    return tuple(
        None if each is None else each.reshape(-1).to(torch.float32).contiguous()
        for each in (d_logps, *others)
    )


class _Sums(NamedTuple):
    """The running sums of `_fold` for each row, and u of its target; [n] each."""

    m: Tensor
    s: Tensor
    picked: Tensor
    a: Tensor
    q: Tensor
    i: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> "_Sums":
        m, picked = (torch.full((n,), -torch.inf, device=device, dtype=torch.float32) for _ in range(2))
        s, a, q = (torch.zeros(n, device=device, dtype=torch.float32) for _ in range(3))
        return cls(m, s, picked, a, q, torch.zeros(n, device=device, dtype=torch.int64))

    def rows(self, rows: slice) -> "_Sums":
        return _Sums(*(each[rows] for each in self))


def _fold_tile(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sums: _Sums,
    numerators: Tensor | None,
    references: Tensor | None,
    first: int,
    transform: LogitTransform,
    flags: dict[str, bool],
) -> None:
    """Raw logits [m, w] from column `first` on into the sums, and their softmax numerators where these are wanted."""
    inner, outer, _ = _factors(transform)
    block, warps = _launch(FORWARD, logits.shape[1])
    _run(
        tile_stats_kernel,
        len(logits),
        warps,
        logits,
        bias,
        targets,
        *sums,
        numerators,
        references,
        logits.stride(0),
        0 if numerators is None else numerators.stride(0),
        first,
        logits.shape[1],
        inner,
        outer * log2(e),
        SOFTCAP=transform.softcap is not None,
        BIAS=bias is not None,
        **flags,
        KEEP=numerators is not None,
        REFERENCE=references is not None,
        BLOCK=block,
        LANE=_lane(logits),
    )


def _finish(
    sums: _Sums, transform: LogitTransform, entropy: bool, log_sum_sq: bool, argmax: bool
) -> TokenStats:
    outer = _factors(transform)[1]
    top, log_s = torch.where(sums.m == -torch.inf, 0, sums.m), sums.s.log()
    return TokenStats(
        # in this order: of two large logits the difference is exact, and small against lse
        (sums.picked - top) * outer - log_s,
        top * outer + log_s,
        log_s - sums.a / sums.s * log(2) if entropy else None,
        sums.q.log() - 2 * log_s if log_sum_sq else None,
        sums.i if argmax else None,
    )


def _add_product(
    total: Tensor,
    numerators: Tensor,
    head: Tensor,
    before: Tensor,
    after: Tensor,
    transform: LogitTransform,
    *,
    first: bool,
) -> None:
    """Add numerators @ head [m, H] to a total whose numerators were against the maxima `before` this tile."""
    if first:
        _matmul(numerators, head, out=total)
        return
    # -inf - -inf: nothing so far, so nothing to rescale
    shift = (before - after).nan_to_num_(nan=0.0) * _factors(transform)[1]
    _add_matmul(numerators, head, out=total.mul_(torch.exp(shift)[:, None]))


def _tile_gradient(
    logits: Tensor,
    d_logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: slice,
    first: int,
    transform: LogitTransform,
    stats: TokenStats,
    grads: Gradients,
) -> None:
    """Raw logits of `rows` from column `first` on -> their gradient, written to d_logits."""
    inner, outer, slope = _factors(transform)
    height, width = logits.shape
    block, warps = _launch(BACKWARD, width)
    _run(
        tile_grad_kernel,
        height * triton.cdiv(width, block),
        warps,
        logits,
        bias,
        targets[rows],
        *(None if each is None else each[rows] for each in (*_flat(stats), *grads)),
        d_logits,
        logits.stride(0),
        d_logits.stride(0),
        first,
        width,
        inner,
        outer,
        slope,
        SOFTCAP=transform.softcap is not None,
        BIAS=bias is not None,
        **_gradient_flags(grads),
        BLOCK=block,
    )


def _kept_gradient_(
    kept: Kept,
    targets: Tensor,
    transform: LogitTransform,
    stats: TokenStats,
    grads: Gradients,
    dtype: torch.dtype,
) -> Tensor:
    """Kept numerators [k, V] -> the gradient of their logits as `dtype`, in the same memory."""
    assert kept.numerators is not None and kept.references is not None
    _, outer, slope = _factors(transform)
    d_kept = kept.numerators.view(dtype)
    block, warps = _launch(BACKWARD, kept.width)
    for tile, columns in enumerate(_slices(0, d_kept.shape[1], kept.width)):
        width = columns.stop - columns.start
        _run(
            kept_grad_kernel,
            len(d_kept) * triton.cdiv(width, block),
            warps,
            kept.numerators[:, columns],
            kept.references[tile],
            kept.picked,
            targets,
            stats.logps,
            stats.lse,
            *grads[:2],
            d_kept[:, columns],
            d_kept.stride(0),
            d_kept.stride(0),
            columns.start,
            width,
            outer,
            slope,
            SOFTCAP=transform.softcap is not None,
            D_LSE=grads[1] is not None,
            BLOCK=block,
        )
    return d_kept


def _scaled_product(
    kept: Kept,
    weight: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    grads: Gradients,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of hidden from the saved product P W - W_y, which depends on one token alone."""
    d_logps, d_lse = grads[:2]
    assert kept.product is not None and d_logps is not None
    d_hidden = _new(targets, dtype, kept.product.shape)
    if d_lse is None:
        return torch.mul(kept.product, -d_logps[:, None], out=d_hidden)
    owned, heads = _target_rows(weight, targets)
    # d lse / d hidden = P W
    d_y = torch.where(owned, d_lse * _target_slope(kept.picked, transform), 0)
    return torch.add(kept.product * (d_lse - d_logps)[:, None], heads * d_y[:, None], out=d_hidden)


def _target_rows(weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each target is in this head, and its row of the head (any row where it is not), float32."""
    owned = (targets >= 0) & (targets < len(weight))
    return owned, weight.index_select(0, torch.where(owned, targets, 0)).to(torch.float32)


def _target_slope(picked: Tensor, transform: LogitTransform) -> Tensor | float:
    """Derivative of the transformed logit of the target by the raw one."""
    slope = _factors(transform)[2]
    return slope if transform.softcap is None else (1 - picked.clamp_min(-1).square()) * slope


def _unit(grads: Gradients, slope: float) -> Tensor:
    """What to divide gradients of float16 logits by, so that the largest nears 2**15 and the small do not vanish."""
    # |p (log p + H)| < 16 for any vocabulary that fits a memory, |2 (p**2 / sum p**2 - p)| <= 2
    bound = sum(
        each.abs() * most for each, most in zip(grads, (1, 1, 16, 2), strict=True) if each is not None
    )
    assert isinstance(bound, Tensor)
    return (torch.cat([bound, bound.new_zeros(1)]).amax() * (slope / 2**15)).clamp_min(1e-30)


def _has_mixed_matmul(x: Tensor) -> bool:
    """Whether half precision multiplies into float32 here."""
    # the builds for AMD devices know the overload, and some refuse to run it
    return x.is_cuda and torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads()


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Product a @ b in the dtype of `out`, which may be float32 where a and b are half precision."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if _has_mixed_matmul(a):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Add a @ b to `out`, without rounding the product to half precision first."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    # before 2.10 the sum had to be half precision too
    if _has_mixed_matmul(a) and TorchVersion(torch.__version__) >= TorchVersion("2.10"):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(_matmul(a, b, out=torch.empty_like(out)))


def _matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, its rows aligned, as wide loads and fast matmuls ask."""
    return torch.empty(rows, _padded(columns), dtype=dtype, device=device)[:, :columns]


def _padded(columns: int) -> int:
    return triton.cdiv(columns, 64) * 64


def _even(columns: int, most: int) -> int:
    """Width of the fewest equal tiles of about `most` columns, a multiple of 128 unless there is but one."""
    tiles = triton.cdiv(columns, max(most, 128))
    return min(columns, triton.cdiv(triton.cdiv(columns, tiles), 128) * 128)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


class _NoSecondGradient(torch.autograd.Function):
    """Passes a gradient on; an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("impl: 'triton' can be differentiated once; 'naive' gives second derivatives")


def _once(gradients: Gradients, *inputs: Tensor | None) -> Gradients:
    """The gradients, with an error in place of a second derivative that would silently be 0."""
    if not torch.is_grad_enabled():
        return gradients
    depends_on = [x for x in inputs if x is not None and x.requires_grad]
    return tuple(None if g is None else _NoSecondGradient.apply(g, *depends_on) for g in gradients)


def _returned(ctx: Any, stats: TokenStats) -> tuple[Tensor | None, ...]:
    """Copies of the stats: the caller may write over them, backward reads the originals."""
    ctx.set_materialize_grads(False)
    copies = tuple(None if each is None else each.clone() for each in stats)
    if copies[-1] is not None:
        ctx.mark_non_differentiable(copies[-1])
    return copies


class _Gather(torch.autograd.Function):
    """Logits [..., V] and targets [...] -> the fields of `TokenStats`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        ignore_index: int,
        wanted: tuple[bool, bool, bool],
        inplace: bool,
    ) -> tuple[Tensor | None, ...]:
        entropy, log_sum_sq, argmax = wanted
        stats = gather_forward(
            logits,
            targets,
            transform,
            ignore_index,
            entropy=entropy,
            log_sum_sq=log_sum_sq,
            argmax=argmax,
        )
        ctx.save_for_backward(logits, targets, *stats)
        ctx.options = transform, ignore_index
        ctx.inplace = inplace
        return _returned(ctx, stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        logits, targets, *stats = ctx.saved_tensors
        transform, ignore_index = ctx.options
        d_logps, d_lse, d_entropy, d_log_sum_sq, _ = grads
        with torch.no_grad():
            d_logits = gather_backward(
                logits,
                targets,
                transform,
                ignore_index,
                TokenStats(*stats),
                d_logps,
                d_lse,
                d_entropy,
                d_log_sum_sq,
                inplace=ctx.inplace,
            )
            if d_logits is logits:
                # autograd then refuses whoever else still needs these logits, a second backward included
                torch.autograd.graph.increment_version(logits)
                d_logits = logits.detach()
        return (*_once((d_logits,), *grads, logits), *(None,) * 5)


class _Linear(torch.autograd.Function):
    """Hidden [N, H], weight, bias, and the n targets that count, at rows `kept` (None: all) -> [n] each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor | None,
        transform: LogitTransform,
        wanted: tuple[bool, bool, bool],
        product: bool,
        keep_bytes: int,
        scratch_bytes: int | None,
    ) -> tuple[Tensor | None, ...]:
        entropy, log_sum_sq, argmax = wanted
        stats, left = linear_forward(
            hidden if kept is None else hidden.index_select(0, kept),
            weight,
            bias,
            targets,
            transform,
            entropy=entropy,
            log_sum_sq=log_sum_sq,
            argmax=argmax,
            product=product,
            keep_bytes=keep_bytes,
            scratch_bytes=scratch_bytes,
        )
        ctx.save_for_backward(hidden, weight, bias, targets, kept, *stats, *left[:4])
        ctx.options = transform, left.width, scratch_bytes
        ctx.consumed = False
        return _returned(ctx, stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        hidden, weight, bias, targets, kept, *saved = ctx.saved_tensors
        transform, width, scratch_bytes = ctx.options
        stats, left = TokenStats(*saved[:5]), Kept(*saved[5:], width=width)
        if ctx.consumed:
            # a second backward: the first has written over them
            left = left._replace(numerators=None)
        ctx.consumed = True
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_logps, d_lse, d_entropy, d_log_sum_sq, _ = grads
        with torch.no_grad():
            d_hidden, d_weight, d_bias = linear_backward(
                hidden if kept is None else hidden.index_select(0, kept),
                weight,
                bias,
                targets,
                transform,
                stats,
                left,
                d_logps,
                d_lse,
                d_entropy,
                d_log_sum_sq,
                need_hidden=need_hidden,
                need_weight=need_weight,
                need_bias=need_bias,
                scratch_bytes=scratch_bytes,
            )
            if d_hidden is not None and kept is not None:
                d_hidden = torch.zeros_like(hidden).index_copy_(0, kept, d_hidden)
        return (*_once((d_hidden, d_weight, d_bias), *grads, hidden, weight, bias), *(None,) * 7)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    *,
    entropy: bool = False,
    log_sum_sq: bool = False,
    argmax: bool = False,
    inplace: bool = False,
) -> TokenStats:
    """Stats of each token: [..., V] logits and [...] targets -> [...]; backward may write over the logits."""
    wanted = entropy, log_sum_sq, argmax
    return TokenStats(*_Gather.apply(logits, targets, transform, ignore_index, wanted, inplace))


def token_logps(
    logits: Tensor, targets: Tensor, transform: LogitTransform, ignore_index: int, *, inplace: bool = False
) -> Tensor:
    """Log-prob of each target: [..., V] logits and [...] targets -> [...], 0 at ignored targets."""
    return token_stats(logits, targets, transform, ignore_index, inplace=inplace).logps


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    *,
    entropy: bool = False,
    log_sum_sq: bool = False,
    argmax: bool = False,
    keep_bytes: int = 0,
    scratch_bytes: int | None = None,
) -> TokenStats:
    """The same with logits = hidden @ weight.T + bias, for [..., H] hidden, [V, H] weight and [V] bias.

    Matmuls of 2 n V H operations, forward and backward together: two with a frozen head; three with a trained one
    whose n x V x 2 bytes fit `keep_bytes`, four for the rows that do not. A gradient of entropy or log_sum_sq
    computes all logits again.
    """
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    # the number of kept rows sizes the matmuls, so an accelerator waits for the targets here, once
    kept = torch.nonzero(flat_targets != ignore_index).squeeze(-1)
    every = len(kept) == len(flat_targets)
    records = torch.is_grad_enabled()
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    stats = _Linear.apply(
        flat_hidden,
        weight,
        bias,
        flat_targets if every else flat_targets[kept],
        None if every else kept,
        transform,
        (entropy, log_sum_sq, argmax),
        records and frozen and hidden.requires_grad,
        keep_bytes if records and not frozen else 0,
        scratch_bytes,
    )
    if not every:
        stats = [None if x is None else x.new_zeros(len(flat_targets)).index_copy(0, kept, x) for x in stats]
    fields: list[Any] = [x if x is None else x.reshape(targets.shape) for x in stats]
    return TokenStats(*fields)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    *,
    keep_bytes: int = 0,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Log-prob of each target from hidden states, 0 at ignored targets; see `linear_token_stats`."""
    stats = linear_token_stats(
        hidden,
        weight,
        bias,
        targets,
        transform,
        ignore_index,
        keep_bytes=keep_bytes,
        scratch_bytes=scratch_bytes,
    )
    return stats.logps
