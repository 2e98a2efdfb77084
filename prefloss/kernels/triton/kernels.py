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
# Softmax numerators are stored times this. In float16 a probability of 3e-8 then keeps 11 bits, and a reference (see
# `tile_stats_kernel`) may lag 16 times behind before a number overflows.
KEPT_SCALE = tl.constexpr(2.0**11)


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


@triton.jit(do_not_specialize=["stride_s", "v_start"])
def tile_stats_kernel(
    tile, bias, targets, sums, numerators, before, after, stride_n, stride_k, stride_s, v_start, width, inner,
    outer2, headroom,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, STATS: tl.constexpr, KEEP: tl.constexpr, SLOPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: columns v_start..v_start + width of it into `sums`, rows (m, s, u of the target, a, q).

    The row is in registers and read once. KEEP also writes softmax numerators exp(z - reference), times the slope of
    the softcap if SLOPED, and 0 at the target. The reference of a row is its logsumexp as of the first tile. It is
    read from `before` and written to `after`: a new one only where the logsumexp is now higher by `headroom` bits.
    """
    row = tl.program_id(0)
    p_row = tile + row.to(tl.int64) * stride_n
    p_sums = sums + row
    o_v = tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < width
    b_u = _squash(_load_tile(p_row + o_v, bias, v_start + o_v, m_v, BIAS), inner, SOFTCAP)
    m_old = tl.load(p_sums)
    m = tl.maximum(m_old, tl.max(b_u, 0))
    m_ref = _finite(m)
    # the difference first: multiplied first, two large logits would each be rounded
    b_d = (b_u - m_ref) * outer2
    b_e = tl.exp2(b_d)
    shift = (m_old - m_ref) * outer2
    alpha = tl.exp2(shift)
    s_old = tl.load(p_sums + stride_s)
    s = alpha * s_old + tl.sum(b_e, 0)
    tl.store(p_sums, m)
    tl.store(p_sums + stride_s, s)
    if STATS:
        a = alpha * (tl.load(p_sums + 3 * stride_s) + tl.maximum(shift, _FLOOR) * s_old)
        tl.store(p_sums + 3 * stride_s, a + tl.sum(b_e * tl.maximum(b_d, _FLOOR), 0))
        q = alpha * alpha * tl.load(p_sums + 4 * stride_s)
        tl.store(p_sums + 4 * stride_s, q + tl.sum(b_e * b_e, 0))
    y = tl.load(targets + row) - v_start
    if (y >= 0) & (y < width):
        x_y = tl.load(p_row + y).to(tl.float32)
        if BIAS:
            x_y += tl.load(bias + v_start + y).to(tl.float32)
        tl.store(p_sums + 2 * stride_s, _squash(x_y, inner, SOFTCAP))
    if KEEP:
        log_s = tl.where(s > 0, m_ref + tl.log2(tl.where(s > 0, s, 1.0)) / outer2, float("-inf"))
        reference = tl.load(before + row)
        # false too of NaN, and where there is no reference yet
        follows = (reference != float("-inf")) & ((log_s - _finite(reference)) * outer2 <= headroom)
        reference = tl.where(follows, reference, log_s)
        tl.store(after + row, reference)
        b_e *= tl.exp2((m_ref - _finite(reference)) * outer2) * KEPT_SCALE
        if SOFTCAP and SLOPED:
            # the bound gives a masked logit, u = -inf, the slope 0
            b_u = tl.maximum(b_u, -1.0)
            b_e *= 1 - b_u * b_u
        b_e = tl.where(o_v == y, 0.0, b_e)
        p_keep = numerators + row.to(tl.int64) * stride_k + o_v
        tl.store(p_keep, b_e.to(numerators.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=["stride_s", "stride_o", "stride_r", "stride_c", "spans"])
def tile_finish_kernel(
    sums, targets, stats, references, scales, kept, stride_s, stride_o, stride_r, stride_c, stride_n, stride_k, spans,
    width, V, outer, outer2,
    SOFTCAP: tl.constexpr, STATS: tl.constexpr, SCALE: tl.constexpr, KEEP: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row whose tiles have all been added: `sums` -> `stats`.

    SCALE also writes what numerators against the last reference are to be multiplied by to be the softmax. KEEP brings
    the kept ones of earlier references, few rows if any, to the last. TARGET writes p - 1 of the target, in the same
    unit: from its log-prob, because p - 1 would cancel.
    """
    row = tl.program_id(0)
    p_sums = sums + row
    m = tl.load(p_sums)
    s = tl.load(p_sums + stride_s)
    u_y = tl.load(p_sums + 2 * stride_s)
    p_stats = stats + row
    m_ref = _finite(m)
    log_s = tl.log(s)
    # in this order: of two large logits the difference is exact, and small against the logsumexp
    logp_y = (u_y - m_ref) * outer - log_s
    tl.store(p_stats, logp_y)
    tl.store(p_stats + stride_o, m_ref * outer + log_s)
    if STATS:
        tl.store(p_stats + 2 * stride_o, log_s - tl.load(p_sums + 3 * stride_s) / s * _LN2)
        tl.store(p_stats + 3 * stride_o, tl.log(tl.load(p_sums + 4 * stride_s)) - 2 * log_s)
        tl.store(p_stats + 4 * stride_o, tl.where(u_y >= m, 1.0, 0.0))
    if SCALE:
        last = _finite(tl.load(references + spans * stride_r + row))
        scale = tl.exp2((last - m_ref) * outer2) / (s * KEPT_SCALE)
        tl.store(scales + row.to(tl.int64) * stride_c, scale)
        if KEEP:
            y = tl.load(targets + row)
            p_row = kept + row.to(tl.int64) * stride_n
            p_span = p_row
            o_w = tl.arange(0, BLOCK)  # [BLOCK]
            for span in range(spans):
                shift = tl.load(references + (span + 1) * stride_r + row) - last
                if shift != 0:
                    factor = tl.exp2(shift * outer2)
                    for start in range(0, width, BLOCK):
                        o_v = span * width + start + o_w
                        # not the target, which TARGET writes below
                        m_v = (start + o_w < width) & (o_v < V) & (o_v != y)
                        p_keep = p_span + start + o_w
                        b_e = tl.load(p_keep, mask=m_v, other=0.0).to(tl.float32) * factor
                        tl.store(p_keep, b_e.to(kept.dtype.element_ty), mask=m_v)
                p_span += stride_k
            if TARGET and (y >= 0) & (y < V):
                d_y = _expm1(logp_y)
                if SOFTCAP:
                    u_y = tl.maximum(u_y, -1.0)
                    d_y *= 1 - u_y * u_y
                tl.store(p_row + y // width * stride_k + y % width, (d_y / scale).to(kept.dtype.element_ty))


@triton.jit(do_not_specialize=["V"])
def scale_rows_kernel(
    rows, factors, weight, targets, d_targets, stride_n, stride_w, V, width,
    TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply rows, [m, width], by their factors; TARGET also adds d of the target times its row of the weight."""
    row = tl.program_id(0)
    p_row = rows + row.to(tl.int64) * stride_n
    factor = tl.load(factors + row)
    o_h = tl.arange(0, BLOCK)  # [BLOCK]
    if TARGET:
        y = tl.load(targets + row)
        owned = (y >= 0) & (y < V)
        p_weight = weight + tl.where(owned, y, 0) * stride_w
        d_y = tl.load(d_targets + row)
        for start in range(0, width, BLOCK):
            m_h = start + o_h < width
            b_w = tl.load(p_weight + start + o_h, mask=m_h).to(tl.float32)
            b_x = tl.load(p_row + start + o_h, mask=m_h) * factor
            tl.store(p_row + start + o_h, tl.where(owned, b_x + d_y * b_w, b_x), mask=m_h)
    elif factor != 1:
        for start in range(0, width, BLOCK):
            m_h = start + o_h < width
            tl.store(p_row + start + o_h, tl.load(p_row + start + o_h, mask=m_h) * factor, mask=m_h)


@triton.jit(do_not_specialize=["v_start", "stride_s", "stride_c"])
def tile_grad_kernel(
    tile, bias, targets, stats, rates, scales, d_tile, stride_n, stride_d, stride_s, stride_c, v_start, width, inner,
    outer, slope,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of logits, or of KEPT softmax numerators and the scale of their rows, -> the gradient of the logits.

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
        b_p = tl.load(p_x, mask=m_v, other=0.0).to(tl.float32) * tl.load(scales + row.to(tl.int64) * stride_c)
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
