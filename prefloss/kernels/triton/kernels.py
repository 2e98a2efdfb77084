"""Arithmetic of all Triton kernels, and the kernels from hidden states; `gather` has those from logits.

Matmuls fill one tile of float32 logits at a time, and a kernel adds the tile to running sums (forward) or turns it into
its gradient (backward).

A transformed logit is z = outer * u, with u = x (outer = scale / temperature) or, under a softcap,
u = tanh(inner * x) (inner = scale / softcap, outer = softcap / temperature). The difference of two large u is exact,
and one multiplication by outer * log2(e) prepares it for exp2, the exponential that the hardware has.

Arithmetic is in float32 whatever is loaded. No instruction is specific to CUDA, and warps may have any width.
Only flags and block sizes are constants of compilation: another shape or temperature does not compile again.
Triton takes flat arguments only, so the parameter lists are long.
"""

from math import e, log2

import triton
import triton.language as tl

_LOG2E = tl.constexpr(log2(e))
_LN2 = tl.constexpr(1 / log2(e))
# exp2 of less is 0 in float32. Replaces -inf where an exponential of 0 is multiplied by its own exponent.
_FLOOR = tl.constexpr(-200.0)
# Softmax numerators in [0, 1] are stored times this, so that in float16 those down to 2e-9 keep 11 bits.
KEPT_SCALE = tl.constexpr(2.0**15)


@triton.jit
def _squash(b_x, inner, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        # tanh(t) = 1 - 2 / (1 + exp(2t)), right where the exponential overflows too, to 5e-7. libdevice.tanh is CUDA's,
        # and a division takes eight instructions, the square of a reciprocal root two.
        b_root = tl.rsqrt(tl.exp2(b_x * (2 * _LOG2E * inner) - 1) + 0.5)
        b_u = 1 - b_root * b_root
        # else a token that cannot occur would be lifted to -softcap
        b_u = tl.where(b_x == float("-inf"), b_x, b_u)
    else:
        b_u = b_x
    return b_u


@triton.jit
def _finite(b_m):
    # -inf - -inf is NaN: rows, or lanes, of -inf only measure from 0
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def _expm1(x):
    # the series where exp(x) - 1 cancels; its next term is below 2e-8 of it
    b_series = 1 + x / 7
    b_series = 1 + x / 6 * b_series
    b_series = 1 + x / 5 * b_series
    b_series = 1 + x / 4 * b_series
    b_series = 1 + x / 3 * b_series
    b_series = 1 + x / 2 * b_series
    return tl.where(tl.abs(x) < 0.35, x * b_series, tl.exp(x) - 1)


@triton.jit
def _fold(
    b_x, b_m, b_s, b_a, b_q, inner, outer2,
    SOFTCAP: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """Add a block to running sums: max m of u, and with e = exp(z - max z), s of e, a of e log2(e), q of e * e.

    Each group of LANE neighbours, which one thread loads at once, has its own sums. So threads exchange nothing until
    the row is done, and a new maximum costs one more exponential per LANE logits.
    """
    b_u = tl.reshape(_squash(b_x, inner, SOFTCAP), (BLOCK // LANE, LANE))
    b_new = tl.maximum(b_m, tl.max(b_u, 1))
    b_ref = _finite(b_new)
    # the difference first: multiplied first, two large logits would each be rounded
    b_d = (b_u - b_ref[:, None]) * outer2
    b_e = tl.exp2(b_d)
    b_shift = (b_m - b_ref) * outer2
    b_alpha = tl.exp2(b_shift)
    if STATS:
        b_a = b_alpha * (b_a + tl.maximum(b_shift, _FLOOR) * b_s) + tl.sum(b_e * tl.maximum(b_d, _FLOOR), 1)
        b_q = b_alpha * b_alpha * b_q + tl.sum(b_e * b_e, 1)
    b_s = b_alpha * b_s + tl.sum(b_e, 1)
    return b_new, b_s, b_a, b_q


@triton.jit
def _join(b_m, b_s, b_a, b_q, outer2):
    """The lanes' sums -> those of the row."""
    m = tl.max(b_m, 0)
    b_shift = (b_m - _finite(m)) * outer2
    b_alpha = tl.exp2(b_shift)
    a = tl.sum(b_alpha * (b_a + tl.maximum(b_shift, _FLOOR) * b_s), 0)
    return m, tl.sum(b_alpha * b_s, 0), a, tl.sum(b_alpha * b_alpha * b_q, 0)


@triton.jit
def _gradient(b_p, b_logp, b_u, m_y, logp_y, rates, slope, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr):
    """Rates (g, a, b, c) of a row -> gradient of its logits, g 1[y] + p (a + b log p + c p), see `coefficients`."""
    g = tl.load(rates)
    a = tl.load(rates + 1)
    # 1 - p of the target from its log-prob: where p is near 1, p itself lacks the digits
    d_y = -g * _expm1(logp_y)
    if PLAIN:
        b_d = tl.where(m_y, d_y, b_p * a)
    else:
        b_rest = tl.load(rates + 2) * tl.maximum(b_logp, _FLOOR) + tl.load(rates + 3) * b_p
        b_d = tl.where(m_y, d_y + b_p * (a + g + b_rest), b_p * (a + b_rest))
    if SOFTCAP:
        # the bound gives a masked logit, u = -inf, the slope 0
        b_u = tl.maximum(b_u, -1.0)
        b_d *= 1 - b_u * b_u
    return b_d * slope


@triton.jit
def _differentiate(
    b_x, m_y, stats, stride_s, rates, inner, outer, slope, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr
):
    """Logits of a row -> their gradient."""
    b_u = _squash(b_x, inner, SOFTCAP)
    # fused: the difference of two large numbers
    b_logp = tl.fma(b_u, outer, -tl.load(stats + stride_s))
    b_p = tl.exp2(b_logp * _LOG2E)
    return _gradient(b_p, b_logp, b_u, m_y, tl.load(stats), rates, slope, SOFTCAP, PLAIN)


@triton.jit
def _load_tile(p_x, bias, o_v, m_v, BIAS: tl.constexpr):
    b_x = tl.load(p_x, mask=m_v, other=float("-inf")).to(tl.float32)
    if BIAS:
        b_x += tl.load(bias + o_v, mask=m_v, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["v_start"])
def tile_stats_kernel(
    tile, bias, targets, sums, numerators, stride_n, stride_k, stride_s, v_start, width, inner, outer2,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, STATS: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program per row: columns v_start..v_start + width of it into `sums`, rows (m, s, u of the target, a, q).

    KEEP also writes softmax numerators: with WHOLE rows the softmax itself, else exp(z - maximum so far) times the
    slope of the softcap. The target's is 0: rounded to half precision, its p - 1 would cancel.
    """
    row = tl.program_id(0)
    p_row = tile + row.to(tl.int64) * stride_n
    p_sums = sums + row
    o_v = tl.arange(0, BLOCK)  # [BLOCK]
    # the sums of the tiles before come in as those of lane 0
    m_first = tl.arange(0, BLOCK // LANE) == 0
    b_m = tl.where(m_first, tl.load(p_sums), float("-inf"))
    b_s = tl.where(m_first, tl.load(p_sums + stride_s), 0.0)
    b_a = tl.zeros((BLOCK // LANE,), tl.float32)
    b_q = tl.zeros((BLOCK // LANE,), tl.float32)
    if STATS:
        b_a = tl.where(m_first, tl.load(p_sums + 3 * stride_s), 0.0)
        b_q = tl.where(m_first, tl.load(p_sums + 4 * stride_s), 0.0)
    for start in range(0, width, BLOCK):
        b_x = _load_tile(p_row + start + o_v, bias, v_start + start + o_v, start + o_v < width, BIAS)
        b_m, b_s, b_a, b_q = _fold(b_x, b_m, b_s, b_a, b_q, inner, outer2, SOFTCAP, STATS, BLOCK, LANE)
    m, s, a, q = _join(b_m, b_s, b_a, b_q, outer2)
    tl.store(p_sums, m)
    tl.store(p_sums + stride_s, s)
    if STATS:
        tl.store(p_sums + 3 * stride_s, a)
        tl.store(p_sums + 4 * stride_s, q)
    y = tl.load(targets + row) - v_start
    if (y >= 0) & (y < width):
        x_y = tl.load(p_row + y).to(tl.float32)
        if BIAS:
            x_y += tl.load(bias + v_start + y).to(tl.float32)
        tl.store(p_sums + 2 * stride_s, _squash(x_y, inner, SOFTCAP))
    if KEEP:
        p_keep = numerators + row.to(tl.int64) * stride_k
        scale = KEPT_SCALE / s if WHOLE else KEPT_SCALE
        for start in range(0, width, BLOCK):
            m_v = start + o_v < width
            b_x = _load_tile(p_row + start + o_v, bias, v_start + start + o_v, m_v, BIAS)
            b_u = _squash(b_x, inner, SOFTCAP)
            b_e = tl.exp2((b_u - _finite(m)) * outer2) * scale
            if SOFTCAP and not WHOLE:
                b_u = tl.maximum(b_u, -1.0)
                b_e *= 1 - b_u * b_u
            b_e = tl.where(start + o_v == y, 0.0, b_e)
            tl.store(p_keep + start + o_v, b_e.to(numerators.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["v_start", "stride_s"])
def tile_grad_kernel(
    tile, bias, targets, stats, rates, d_tile, stride_n, stride_d, stride_s, v_start, width, inner, outer,
    slope,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of logits, or of the KEPT softmax, -> the gradient of the logits.

    d_tile may be the memory of the tile, in another dtype of the same size.
    """
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    m_y = o_v == tl.load(targets + row) - v_start
    p_x = tile + row.to(tl.int64) * stride_n + o_v
    if KEPT:
        logp_y = tl.load(stats + row)
        b_p = tl.load(p_x, mask=m_v, other=0.0).to(tl.float32) * (1 / KEPT_SCALE)
        b_p = tl.where(m_y, tl.exp(logp_y), b_p)
        # the stand-in for log 0 is multiplied by 0
        b_logp = tl.where(m_y, logp_y, tl.log(tl.maximum(b_p, 1e-37)))
        b_u = tl.minimum((b_logp + tl.load(stats + stride_s + row)) / outer, 1.0)
        b_d = _gradient(b_p, b_logp, b_u, m_y, logp_y, rates + 4 * row, slope, SOFTCAP, PLAIN)
    else:
        b_x = _load_tile(p_x, bias, v_start + o_v, m_v, BIAS)
        b_d = _differentiate(
            b_x, m_y, stats + row, stride_s, rates + 4 * row, inner, outer, slope, SOFTCAP, PLAIN
        )
    tl.store(d_tile + row.to(tl.int64) * stride_d + o_v, b_d.to(d_tile.dtype.element_ty), mask=m_v)
