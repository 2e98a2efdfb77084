"""Triton kernels from logits: the statistics of each row, and the gradient of its logits. `launch` calls them.

The forward kernel reads each logit once and stores two or five numbers per row; the backward kernel reads each once and
writes its gradient once. `kernels` has the arithmetic, which the kernels of tiles share.
"""

# Triton's types of arguments are variables to a type checker.
# pyright: reportInvalidTypeForm=false
import triton
import triton.language as tl

from prefloss.kernels.triton.kernels import _FLOOR, _LN2, _differentiate, _finite, _squash


@triton.jit
def _fold(b_u, b_t, b_s, b_a, b_q, outer2, STATS: tl.constexpr, LANE: tl.constexpr):
    """Add a block to running sums: top t of z log2(e); with e = 2^d, d = z log2(e) - t, s of e, a of e d, q of e * e.

    Each sum is of logits of one thread, LANE neighbours at a time. So threads exchange nothing until the row is done.
    """
    GROUPS: tl.constexpr = b_t.shape[0]
    b_u = tl.reshape(b_u, (b_u.shape[0] // (GROUPS * LANE), GROUPS, LANE))
    b_new = tl.maximum(b_t, tl.max(tl.max(b_u, 2), 0) * outer2)
    b_top = _finite(b_new)
    # a fused product is not rounded, or it would be by more than the difference of two large logits
    b_d = tl.fma(b_u, outer2, -b_top[None, :, None])
    b_e = tl.exp2(b_d)
    b_shift = b_t - b_top
    b_alpha = tl.exp2(b_shift)
    if STATS:
        b_more = tl.sum(tl.sum(b_e * tl.maximum(b_d, _FLOOR), 2), 0)
        b_a = b_alpha * (b_a + tl.maximum(b_shift, _FLOOR) * b_s) + b_more
        b_q = b_alpha * b_alpha * b_q + tl.sum(tl.sum(b_e * b_e, 2), 0)
    b_s = b_alpha * b_s + tl.sum(tl.sum(b_e, 2), 0)
    return b_new, b_s, b_a, b_q


@triton.jit
def _join(b_t, b_s, b_a, b_q):
    """The sums of all groups -> those of the row."""
    t = tl.max(b_t, 0)
    b_shift = b_t - _finite(t)
    b_alpha = tl.exp2(b_shift)
    a = tl.sum(b_alpha * (b_a + tl.maximum(b_shift, _FLOOR) * b_s), 0)
    return t, tl.sum(b_alpha * b_s, 0), a, tl.sum(b_alpha * b_alpha * b_q, 0)


@triton.jit
def _store_stats(stats, stride_s, t, s, a, q, u_y, outer2, nats, nats_low, STATS: tl.constexpr):
    top = _finite(t)
    log_s = tl.log(s)
    # as each logit was compared with the top: what remains is small against the logsumexp
    tl.store(stats, tl.fma(u_y, outer2, -top) * _LN2 - log_s)
    tl.store(stats + stride_s, tl.fma(top, nats, tl.fma(top, nats_low, log_s)))
    if STATS:
        tl.store(stats + 2 * stride_s, log_s - a / s * _LN2)
        tl.store(stats + 3 * stride_s, tl.log(q) - 2 * log_s)
        tl.store(stats + 4 * stride_s, tl.where(u_y * outer2 >= t, 1.0, 0.0))


@triton.jit
def _whole_vectors(p_row, V, LANE: tl.constexpr):
    """First and number of the logits of a row that 16-byte vectors of LANE hold, and the columns of the few others.

    A row of an odd vocabulary may begin anywhere. Loads of single logits take three times the instructions.
    """
    o_e = tl.arange(0, 2 * LANE)
    head = tl.minimum((16 - (p_row.to(tl.int64) & 15)) % 16 * LANE // 16, V).to(tl.int32)
    body = (V - head) // LANE * LANE
    # fewer than LANE in front and fewer than LANE behind
    o_e = tl.where(o_e < LANE, o_e, head + body - LANE + o_e)
    m_e = (o_e < head) | ((o_e >= head + body) & (o_e < V) & (tl.arange(0, 2 * LANE) >= LANE))
    return head, body, o_e, m_e


# Nothing but types and flags is part of what is compiled, so no other shape or place in memory compiles again.
@triton.jit(do_not_specialize=["logits", "stride_b", "stride_t", "stride_s", "T", "V"])
def gather_fwd_kernel(
    logits, targets, stats, stride_b: tl.int64, stride_t: tl.int64, stride_s: tl.int64, T, V, inner, outer2,
    nats, nats_low,
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
    head, body, o_e, m_e = _whole_vectors(p_row, V, LANE)
    # asked for now, needed last
    b_edges = tl.load(p_row + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
    p_x = tl.multiple_of(p_row + head, 16) + tl.arange(0, BLOCK)  # [BLOCK]
    # sums of LANE logits each need fewest registers, of four times as many fewest instructions
    GROUPS: tl.constexpr = BLOCK // (4 * LANE) if STATS else BLOCK // LANE
    b_t = tl.full((GROUPS,), float("-inf"), tl.float32)
    b_s = tl.zeros((GROUPS,), tl.float32)
    b_a = tl.zeros((GROUPS,), tl.float32)
    b_q = tl.zeros((GROUPS,), tl.float32)
    # whole blocks without a mask, which costs time per logit
    for _ in range(body // BLOCK):
        b_x = tl.load(p_x).to(tl.float32)
        p_x += BLOCK
        b_t, b_s, b_a, b_q = _fold(_squash(b_x, inner, SOFTCAP), b_t, b_s, b_a, b_q, outer2, STATS, LANE)
    if body % BLOCK > 0:
        b_x = tl.load(p_x, mask=tl.arange(0, BLOCK) < body % BLOCK, other=float("-inf")).to(tl.float32)
        b_t, b_s, b_a, b_q = _fold(_squash(b_x, inner, SOFTCAP), b_t, b_s, b_a, b_q, outer2, STATS, LANE)
    t, s, a, q = _join(b_t, b_s, b_a, b_q)
    one = tl.zeros((1,), tl.float32)
    b_u = _squash(b_edges, inner, SOFTCAP)
    b_t, b_s, b_a, b_q = _fold(b_u, one + t, one + s, one + a, one + q, outer2, STATS, 2 * LANE)
    t, s, a, q = _join(b_t, b_s, b_a, b_q)
    # beyond V is no token: its log-prob is NaN; at V is one of another shard
    x_y = tl.load(p_row + y, mask=y < V, other=float("-inf")).to(tl.float32)
    u_y = tl.where(y > V, float("nan"), _squash(x_y, inner, SOFTCAP))
    _store_stats(stats + row, stride_s, t, s, a, q, u_y, outer2, nats, nats_low, STATS)


@triton.jit(
    do_not_specialize=[
        "logits", "d_logits", "stride_b", "stride_t", "stride_db", "stride_dt", "stride_s", "T", "V"
    ]
)  # fmt: skip
def gather_bwd_kernel(
    logits, targets, stats, rates, d_logits, stride_b: tl.int64, stride_t: tl.int64, stride_db: tl.int64,
    stride_dt: tl.int64, stride_s: tl.int64, T, V, inner, outer, slope,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, ALIKE: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program per block of a row; d_logits may be logits: no other program reads what a program writes.

    ALIKE: rows of both begin in the same place among 16 bytes.
    """
    blocks = tl.cdiv(V, BLOCK)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, position = (row // T).to(tl.int64), (row % T).to(tl.int64)
    p_out = d_logits + (batch * stride_db + position * stride_dt)
    p_in = logits + (batch * stride_b + position * stride_t)
    head, body, o_e, m_e = _whole_vectors(p_out, V, LANE)
    o_v = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < body
    p_body = tl.multiple_of(p_out + head, 16)
    # compared with every column, in 32 bits; the mistakes above V become V, which no column is
    y = tl.minimum(tl.load(targets + row), V).to(tl.int32)
    if y < 0:
        # written, not multiplied by 0, because such a row may hold inf or NaN
        tl.store(p_body + o_v, tl.zeros((BLOCK,), d_logits.dtype.element_ty), mask=m_v)
        if block == 0:
            tl.store(p_out + o_e, tl.zeros((2 * LANE,), d_logits.dtype.element_ty), mask=m_e)
        return
    p_from = tl.multiple_of(p_in + head, 16) if ALIKE else p_in + head
    b_x = tl.load(p_from + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_d = _differentiate(
        b_x, o_v == y - head, stats + row, stride_s, rates + 4 * row, inner, outer, slope, SOFTCAP, PLAIN
    )
    tl.store(p_body + o_v, b_d.to(d_logits.dtype.element_ty), mask=m_v)
    if (block == 0) & (body < V):
        b_edges = tl.load(p_in + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
        b_de = _differentiate(
            b_edges, o_e == y, stats + row, stride_s, rates + 4 * row, inner, outer, slope, SOFTCAP, PLAIN
        )
        tl.store(p_out + o_e, b_de.to(d_logits.dtype.element_ty), mask=m_e)
