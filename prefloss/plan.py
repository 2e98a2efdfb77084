"""Which way a log-prob op goes, from sizes, dtype, device and memory budget; `explain` says it in words."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefloss import kernels
from prefloss.kernels import native, rows
from prefloss.kernels.constant import constant_when_compiled
from prefloss.kernels.heads import gradient_dtype
from prefloss.kernels.naive import compute_dtype
from prefloss.kernels.paths import Path, Scheme, default_chunk, kept_columns, kept_dtype

_log = logging.getLogger("prefloss")
_logged: set[tuple[object, ...]] = set()

# "auto" takes naive up to so many logits: there the two take the same time (CPU), and naive can be compiled whole
# and differentiated twice. Beyond it naive's 12 to 16 bytes per logit count, and asking for that much fresh memory
# takes longer than computing the logits twice.
NAIVE_ELEMENTS = 2**20

# Memory for logits kept between forward and backward and for tiles of them, besides the gradients: 1 GiB, that is
# 2048 tokens of a vocabulary of 128k in float32 and twice as many in bfloat16.
BUDGET_BYTES = 2**30


@dataclass(frozen=True)
class Plan:
    """How an op will be computed, and why.

    Attributes:
        op: "token" (from logits) or "linear" (from hidden states and a head).
        impl: "naive", "chunked" or "triton".
        scheme: What stays in memory for the backward pass: "autograd", "score", "unscaled", "keep" or "recompute";
            see `prefloss.kernels.paths`.
        row_passes: What computes softmax and its gradient: "native" (compiled C), "triton" or "torch".
        head_sums: How products with a half-precision head reach float32: "native", "mixed" (the device's own
            matmul), "upcast" (a copy of the head in float32, some rows at a time) or "same" (not half precision).
        matmuls: Products of 2 n V H operations in forward and backward together, n the tokens that count.
        tokens: n, or an upper bound of it where a graph is compiled.
        chunk_tokens: Size of a tile of logits: as many as so many tokens have.
        kept_tokens: Tokens whose logits are kept for the backward pass.
        bytes_kept: Memory held between forward and backward, gradients and statistics left out. "chunked" writes the
            gradient of the head over what is kept of the first tokens, about H of them.
        bytes_scratch: Memory of tiles, held during forward and again during backward.
        why: Why this scheme.
        fallback: Why a better way is closed, or None.
    """

    op: Literal["token", "linear"]
    impl: Literal["naive", "chunked", "triton"]
    scheme: Literal["autograd", "score", "unscaled", "keep", "recompute"]
    row_passes: Literal["native", "triton", "torch"]
    head_sums: Literal["native", "mixed", "upcast", "same"]
    matmuls: float
    tokens: int
    chunk_tokens: int
    kept_tokens: int
    bytes_kept: int
    bytes_scratch: int
    why: str
    fallback: str | None = None

    def __str__(self) -> str:
        """One attribute a line."""
        return "\n".join(f"{field.name:>13}  {getattr(self, field.name)}" for field in fields(self))


def explain(
    *,
    tokens: int,
    vocabulary: int,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trainable_head: bool = True,
    gradient: bool = True,
    stats_gradient: bool = False,
    impl: str = "auto",
    chunk_tokens: int | None = None,
    budget_bytes: int | None = None,
) -> Plan:
    """How `token_logps` or, with a `width`, `linear_token_logps` would go about inputs of these sizes here.

    Args:
        tokens: Targets that count (not ignored).
        vocabulary: V.
        width: H of the hidden states; None for logits.
        dtype: Of logits, or of hidden states and head.
        device: Where they are.
        trainable_head: Whether weight or bias of the head gets a gradient.
        gradient: Whether anything does.
        stats_gradient: Whether entropy and its like get one, too.
        impl: As given to the op.
        chunk_tokens: As given to the op.
        budget_bytes: As given to the op.

    Returns:
        The plan; `print` it.

    Example:
        >>> plan = explain(tokens=4096, vocabulary=128_256, width=1024, trainable_head=False)
        >>> plan.scheme, plan.matmuls
        ('unscaled', 2)
    """
    like = torch.empty(0, dtype=dtype, device=device)
    if width is None:
        return plan_token(like, tokens, vocabulary, impl, chunk_tokens)
    hidden_only = gradient and not trainable_head
    return plan_linear(
        like, tokens, vocabulary, width, hidden_only, gradient and trainable_head, stats_gradient, impl, chunk_tokens,
        budget_bytes,
    )  # fmt: skip


def plan_token(like: Tensor, tokens: int, vocabulary: int, impl: str, chunk_tokens: int | None) -> Plan:
    """For logits like `like`, [tokens, vocabulary]."""
    if is_naive(impl, tokens * vocabulary, chunk_tokens):
        return _naive("token", like, tokens, vocabulary, 0)
    passes, fallback = _row_passes(like, impl)
    chunk = tokens if chunk_tokens is None else chunk_tokens
    scratch = 0 if passes != "torch" else min(chunk * vocabulary, 2**21) * compute_dtype(like.dtype).itemsize
    return Plan(
        "token", _impl(passes), "recompute", passes, "same", 0, tokens, chunk, 0, 0, scratch,
        "rows of logits are read once forward and once backward; one logsumexp and one log-prob per token are kept",
        fallback,
    )  # fmt: skip


def plan_linear(
    like: Tensor,
    tokens: int,
    vocabulary: int,
    width: int,
    hidden_only: bool,
    head: bool,
    stats_gradient: bool,
    impl: str,
    chunk_tokens: int | None,
    budget_bytes: int | None,
    positions: int | None = None,
    low_softcap: bool = False,
) -> Plan:
    """For hidden states like `like`, of which alone (`hidden_only`) or with the `head` a gradient is wanted."""
    positions = tokens if positions is None else positions
    if is_naive(impl, positions * vocabulary, chunk_tokens):
        return _naive("linear", like, positions, vocabulary, 3 if head else 2 if hidden_only else 1)
    budget = BUDGET_BYTES if budget_bytes is None else budget_bytes
    chunk = default_chunk(tokens, vocabulary, rows.on_cpu(like)) if chunk_tokens is None else chunk_tokens
    chunk = max(1, min(chunk, tokens))
    passes, slow_rows = _row_passes(like, impl)
    sums, slow_head = _head_sums(like)
    need = _needs(like, vocabulary, width, chunk, low_softcap)
    short = None
    scheme, kept, why = _scheme(tokens, need, budget, hidden_only, head, stats_gradient)
    if scheme == "keep" and low_softcap and kept_dtype(like.dtype) == torch.int16:
        scheme, kept, why = "recompute", 0, "16 bits of a logit are too few under a softcap so low"
    if scheme == "keep" and kept < tokens:
        short = f"{kept} of {tokens} tokens fit the budget of {budget} bytes, the rest is projected again"
        scheme = "keep" if kept else "recompute"
    rest = 0 if tokens == 0 else 1 - kept / tokens
    matmuls = {"score": 1, "unscaled": 2, "keep": 3 + rest, "recompute": 4}[scheme]
    if hidden_only and scheme in ("keep", "recompute"):
        matmuls -= 1
    bytes_kept = tokens * need.unscaled if scheme == "unscaled" else kept * need.kept
    tiles_of: Scheme = "recompute" if scheme == "keep" and kept < tokens else scheme
    return Plan(
        "linear", _impl(passes), scheme, passes, sums, matmuls, tokens, chunk, kept, bytes_kept,
        need.tiles[tiles_of], why,
        "; ".join(filter(None, (short, slow_rows, slow_head))) or None,
    )  # fmt: skip


class _Needs(NamedTuple):
    """Bytes of a token whose logits are kept, or whose gradient is saved unscaled, and of the tiles of each scheme.

    Of "keep" if all tokens are kept.
    """

    kept: int
    unscaled: int
    tiles: dict[Scheme, int]


def _needs(like: Tensor, vocabulary: int, width: int, chunk: int, low_softcap: bool) -> _Needs:
    size = compute_dtype(like.dtype).itemsize
    kept = kept_columns(like.dtype, vocabulary) * kept_dtype(like.dtype).itemsize
    fused = rows.on_cpu(like) and native.multiplies(like.dtype) and width % 2 == 0 and not low_softcap
    gradient = chunk * vocabulary * gradient_dtype(like).itemsize
    logits = chunk * (kept if fused else vocabulary * size)
    # the gradient is written over logits of its own precision, or over codes
    both = max(logits, gradient) if fused or gradient == logits else logits + gradient
    tiles: dict[Scheme, int] = {
        "score": 0 if fused else logits,
        "unscaled": both,
        "keep": gradient if fused or kept_dtype(like.dtype).itemsize == size else max(logits, gradient),
        "recompute": logits + gradient if fused else both,
    }
    return _Needs(kept, width * size, tiles)


def _scheme(
    tokens: int, need: _Needs, budget: int, hidden_only: bool, head: bool, stats_gradient: bool
) -> tuple[Scheme, int, str]:
    """The scheme with the fewest matmuls that the budget allows, how many tokens it keeps, and why."""
    if not hidden_only and not head:
        return "score", 0, "no gradient is wanted"
    if hidden_only and not stats_gradient and tokens * need.unscaled + need.tiles["unscaled"] <= budget:
        return (
            "unscaled",
            0,
            "the head is frozen: the gradient of each log-prob in its hidden state is saved unscaled",
        )
    if tokens * need.kept + need.tiles["keep"] <= budget:
        return "keep", tokens, "the logits of all tokens fit the budget"
    kept = max(0, (budget - need.tiles["recompute"]) // need.kept)
    return "keep", min(tokens, kept), "the logits of all tokens do not fit the budget"


def _impl(passes: str) -> Literal["chunked", "triton"]:
    return "triton" if passes == "triton" else "chunked"


def _row_passes(like: Tensor, impl: str) -> tuple[Literal["native", "triton", "torch"], str | None]:
    if uses_triton(impl, like):
        return "triton", None
    if like.device.type == "cpu" and native.passes_over(like.dtype):
        return "native", None
    if like.dtype == torch.float64:
        return "torch", None
    if like.device.type == "cpu":
        return (
            "torch",
            "native.c could not be compiled here or is switched off, so rows are passed over in plain torch",
        )
    return (
        "torch",
        "no Triton for this device, or another impl was asked for, so rows are passed over in plain torch",
    )


@constant_when_compiled
def _triton_runs() -> bool:
    return kernels.available()


def uses_triton(impl: str, like: Tensor) -> bool:
    """Whether the Triton kernels do what is not left to naive."""
    fits = like.dtype != torch.float64 and _triton_runs()
    return impl == "triton" or (impl == "auto" and like.device.type not in ("cpu", "meta") and fits)


def _head_sums(like: Tensor) -> tuple[Literal["native", "mixed", "upcast", "same"], str | None]:
    if like.dtype not in (torch.bfloat16, torch.float16):
        return "same", None
    if rows.has_mixed_matmul(like):
        return ("native" if like.device.type == "cpu" else "mixed"), None
    what = f"no product of {like.dtype} matrices summed in float32 on this {like.device.type}"
    return "upcast", f"{what}, so the head is copied to float32 some rows at a time"


def is_naive(impl: str, elements: int, chunk_tokens: int | None) -> bool:
    """Whether plain torch does it, for so many logits."""
    return impl == "naive" or (impl == "auto" and chunk_tokens is None and elements <= NAIVE_ELEMENTS)


def _naive(op: Literal["token", "linear"], like: Tensor, tokens: int, vocabulary: int, matmuls: int) -> Plan:
    size = 3 * compute_dtype(like.dtype).itemsize
    why = f"{tokens * vocabulary} logits are few, or naive was asked for: plain torch stores all of them"
    return Plan(
        op,
        "naive",
        "autograd",
        "torch",
        "same",
        matmuls,
        tokens,
        tokens,
        tokens,
        tokens * vocabulary * size,
        0,
        why,
    )


def note(plan: Plan, strict: bool) -> Plan:
    """Log the plan once for each kind, and refuse a fallback where that was asked for."""
    if strict and plan.fallback is not None:
        raise RuntimeError(f"strict: got a fallback, expected none: {plan.fallback}")
    if torch.compiler.is_compiling():
        return plan
    kind = (plan.op, plan.impl, plan.scheme, plan.row_passes, plan.head_sums, plan.fallback is None)
    if kind not in _logged:
        _logged.add(kind)
        _log.info(
            "prefloss: %s log-probs of %d tokens by %s/%s, %.3g matmuls, %.0f MiB kept, tiles of %d tokens (%s)%s",
            plan.op, plan.tokens, plan.impl, plan.scheme, plan.matmuls, plan.bytes_kept / 2**20, plan.chunk_tokens,
            plan.why, "" if plan.fallback is None else f"; fallback: {plan.fallback}",
        )  # fmt: skip
    return plan


def path_of(plan: Plan, skip_below: float = 0.0) -> Path:
    """What the chunked kernel is told."""
    assert plan.scheme != "autograd"
    return Path(plan.scheme, max(1, plan.chunk_tokens), plan.kept_tokens, skip_below)
