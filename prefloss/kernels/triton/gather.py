"""Triton kernels from logits: the statistics of each row, and the gradient of its logits. `launch` calls them.

The forward kernel reads each logit once and stores two or five numbers per row; the backward kernel reads each once and
writes its gradient once. `kernels` has the arithmetic, which the kernels of tiles share.
"""

import triton
import triton.language as tl

from prefloss.kernels.triton.kernels import _LN2, _differentiate, _finite, _fold, _join, _squash


@triton.jit
def _store_stats(stats, stride_s, m, s, a, q, u_y, outer, STATS: tl.constexpr):
    m_ref = _finite(m)
    log_s = tl.log(s)
    # in this order: of two large logits the difference is exact, and small against the logsumexp
    tl.store(stats, (u_y - m_ref) * outer - log_s)
    tl.store(stats + stride_s, m_ref * outer + log_s)
    if STATS:
        tl.store(stats + 2 * stride_s, log_s - a / s * _LN2)
        tl.store(stats + 3 * stride_s, tl.log(q) - 2 * log_s)
        tl.store(stats + 4 * stride_s, tl.where(u_y >= m, 1.0, 0.0))


@triton.jit(do_not_specialize=["stride_s", "T"])
def gather_fwd_kernel(
    logits, targets, stats, stride_b, stride_t, stride_s, T, V, inner, outer, outer2,
    SOFTCAP: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program per row. Rows are stride_t apart, every T rows stride_b, so a shifted [B, T, V] needs no copy."""
    row = tl.program_id(0)
    y = tl.load(targets + row)
    if y < 0:
        tl.store(stats + row, 0.0)
        tl.store(stats + stride_s + row, 0.0)
        if STATS:
            tl.store(stats + 2 * stride_s + row, 0.0)
            tl.store(stats + 3 * stride_s + row, 0.0)
            tl.store(stats + 4 * stride_s + row, 0.0)
        return
    # int64 before any stride: N * V passes 2**31
    p_row = logits + ((row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t)
    o_v = tl.arange(0, BLOCK)  # [BLOCK]
    b_m = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
    b_s = tl.zeros((BLOCK // LANE,), tl.float32)
    b_a = tl.zeros((BLOCK // LANE,), tl.float32)
    b_q = tl.zeros((BLOCK // LANE,), tl.float32)
    # whole blocks without a mask, which costs time per logit and, where V is odd, prevents wide loads
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b_x = tl.load(p_row + start + o_v).to(tl.float32)
        b_m, b_s, b_a, b_q = _fold(b_x, b_m, b_s, b_a, b_q, inner, outer2, SOFTCAP, STATS, BLOCK, LANE)
    if whole < V:
        b_x = tl.load(p_row + whole + o_v, mask=whole + o_v < V, other=float("-inf")).to(tl.float32)
        b_m, b_s, b_a, b_q = _fold(b_x, b_m, b_s, b_a, b_q, inner, outer2, SOFTCAP, STATS, BLOCK, LANE)
    m, s, a, q = _join(b_m, b_s, b_a, b_q, outer2)
    u_y = _squash(tl.load(p_row + y, mask=y < V, other=float("-inf")).to(tl.float32), inner, SOFTCAP)
    _store_stats(stats + row, stride_s, m, s, a, q, u_y, outer, STATS)


@triton.jit(do_not_specialize=["stride_s", "T"])
def gather_bwd_kernel(
    logits, targets, stats, rates, d_logits, stride_b, stride_t, stride_db, stride_dt, stride_s, T, V,
    inner, outer, slope,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a row; d_logits may be logits: no other program reads what a program writes."""
    blocks = tl.cdiv(V, BLOCK)
    row = tl.program_id(0) // blocks
    o_v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < V
    batch, position = (row // T).to(tl.int64), (row % T).to(tl.int64)
    p_out = d_logits + (batch * stride_db + position * stride_dt) + o_v
    y = tl.load(targets + row)
    if y < 0:
        # written, not multiplied by 0, because such a row may hold inf or NaN
        tl.store(p_out, tl.zeros((BLOCK,), d_logits.dtype.element_ty), mask=m_v)
        return
    p_in = logits + (batch * stride_b + position * stride_t) + o_v
    b_x = tl.load(p_in, mask=m_v, other=float("-inf")).to(tl.float32)
    b_d = _differentiate(
        b_x, o_v == y, stats + row, stride_s, rates + 4 * row, inner, outer, slope, SOFTCAP, PLAIN
    )
    tl.store(p_out, b_d.to(d_logits.dtype.element_ty), mask=m_v)
