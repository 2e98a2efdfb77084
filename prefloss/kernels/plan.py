"""How a log-prob op is computed: chosen from sizes, dtype, device and memory budget.

Of n tokens that count, one product with a head of V rows takes 2 n V H operations. The schemes of the linear op:

- "unscaled", for a frozen head: the gradient of each log-prob in its hidden state is saved, [n, H]. It depends on that
  token alone, so backward only scales it. Two products, one tile of memory.
- "keep": the logits of the first `kept_tokens` tokens are kept, in float32, or in 16 bits for half precision. Triton
  keeps softmax numerators instead. Three products.
- "recompute": nothing is kept; backward computes the logits of each tile again. Four products.
- "score": there is no gradient. One product.

Any loss may follow.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefloss import kernels
from prefloss.kernels import constant_when_compiled
from prefloss.kernels.arguments import Options
from prefloss.kernels.cpu import native
from prefloss.kernels.kept import kept_columns, kept_dtype
from prefloss.kernels.matmul import HEAD_ELEMENTS, gradient_dtype, has_mixed_matmul
from prefloss.kernels.naive import compute_dtype
from prefloss.kernels.sizes import Choice, Sizes
from prefloss.kernels.softmax import too_low_for_codes
from prefloss.kernels.tiles import MATMUL_BLOCK, MATMUL_ELEMENTS, default_chunk, on_cpu, tile_shape

_log = logging.getLogger("prefloss")
logged: set[tuple[object, ...]] = set()

Scheme = Literal["autograd", "score", "unscaled", "keep", "recompute"]

# "auto" takes naive for up to this many logits: there it takes the same time (CPU), can be compiled as one graph and
# can be differentiated twice. Beyond, its 12 to 16 bytes per logit matter, and allocating that much takes longer than
# computing the logits twice. A large head in half precision is converted to float32 as a whole, which takes naive 1.3
# to 2 times as long for any number of tokens (V 32,000, H 1,024, 8 to 200 tokens, a CPU without bfloat16 products).
NAIVE_ELEMENTS = 2**20

# Memory for logits kept between forward and backward and for tiles of them, besides the gradients: on a CPU 1 GiB, that
# is 2048 tokens of a vocabulary of 128k in float32 and twice as many in bfloat16; on a GPU half of what is free.
BUDGET_BYTES = 2**30

_TOO_LARGE = "the logits of all tokens do not fit the budget"

# A tile of float32 logits of Triton has a 64th of the free memory within these limits.
LEAST_TILE_BYTES, MOST_TILE_BYTES = 2**26, 2**29


class Request(NamedTuple):
    """What a plan depends on besides the number of tokens.

    `like` has the dtype and device of the inputs. `width` is H of the hidden states; None for an op on logits.
    `gradient`: what needs one, nothing, hidden states only, or the head too. `stats_gradient`: whether entropy and the
    other statistics need one too.
    """

    like: Tensor
    vocabulary: int
    width: int | None
    gradient: Literal["none", "hidden", "head"]
    stats_gradient: bool
    options: Options

    def budget(self) -> int:
        """Bytes for what is kept and for tiles."""
        given = self.options.budget_bytes
        return free_bytes(self.like.device) // 2 if given is None else given

    def naive(self, positions: int) -> bool:
        """Whether plain torch does it, for so many positions, ignored ones included."""
        impl, few = self.options.impl, positions * self.vocabulary <= NAIVE_ELEMENTS
        return impl == "naive" or (
            impl == "auto" and self.options.chunk_tokens is None and few and not self.converts_a_large_head()
        )

    def converts_a_large_head(self) -> bool:
        """Whether "naive" would copy a head to float32 that is more than "chunked" copies at a time."""
        half = compute_dtype(self.like.dtype) != self.like.dtype
        return half and self.width is not None and self.vocabulary * self.width > HEAD_ELEMENTS

    def triton(self) -> bool:
        """Whether Triton kernels do what plain torch does not."""
        runs = self.like.dtype != torch.float64 and kernels.available()
        auto = self.options.impl == "auto" and self.like.device.type not in ("cpu", "meta")
        return self.options.impl == "triton" or (auto and runs)


@constant_when_compiled
def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a GPU; for a budget of 1 GiB elsewhere."""
    if device.type != "cuda":
        return 2 * BUDGET_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class Plan:
    """How an op is computed, and why. Kernels read what stands before `op`.

    Attributes:
        scheme: What stays in memory for the backward pass: "autograd", "score", "unscaled", "keep" or "recompute";
            see `prefloss.kernels.plan`.
        chunk_tokens: Size of a tile of logits, as the number of tokens whose logits fill it; at least 1.
        kept_tokens: Tokens, from the first on, whose logits are kept for the backward pass.
        impl: "naive", "chunked" or "triton".
        head_tokens: Of the kept tokens, those that Triton keeps in the memory of the gradient of the head, which takes
            a little longer and is done where not all tokens fit otherwise.
        scale_inputs: Whether Triton multiplies the gradients of the log-probs into hidden states and their gradient,
            not into the kept gradients of the logits, which are then not passed over again.
        op: "token" or "linear": from logits, or from hidden states and a head.
        row_passes: What computes softmax and its gradient: "native" (compiled C), "triton" or "torch".
        head_sums: How products with a half-precision head are summed in float32: "native", "mixed" (the device's own
            matmul), "upcast" (a copy of the head in float32, some rows at a time) or "same" (not half precision).
        matmuls: Products of 2 n V H operations in forward and backward together, n the tokens that count.
        tokens: n, or an upper bound of it where a graph is compiled.
        recomputed_tokens: Those whose logits the backward pass computes again.
        tile_rows: Rows of the tile of float32 logits between two products; of Triton alone, like the next three.
        tile_columns: Its columns.
        bytes_per_logit: Bytes read and written of each logit outside the products, in forward and backward together.
        bytes_per_hidden: The same of each element of the hidden states, with sums over the spans of the vocabulary.
        bytes_kept: Memory held between forward and backward, gradients and statistics left out. "chunked" writes the
            gradient of the head over the logits kept of the first tokens, about H of them, which count; those of
            `head_tokens` do not.
        bytes_scratch: Memory of tiles and float32 sums, held during forward and again during backward.
        why: Why this scheme.
        fallback: Why a faster way is not available, or None.
    """

    scheme: Scheme = "recompute"
    chunk_tokens: int = 1
    kept_tokens: int = 0
    impl: Literal["naive", "chunked", "triton"] = "chunked"
    head_tokens: int = 0
    scale_inputs: bool = False
    op: Literal["token", "linear"] = "linear"
    row_passes: Literal["native", "triton", "torch"] = "torch"
    head_sums: Literal["native", "mixed", "upcast", "same"] = "same"
    matmuls: float = 0
    tokens: int = 0
    recomputed_tokens: int = 0
    tile_rows: int = 0
    tile_columns: int = 0
    bytes_per_logit: float = 0
    bytes_per_hidden: float = 0
    bytes_kept: int = 0
    bytes_scratch: int = 0
    why: str = ""
    fallback: str | None = None

    def __str__(self) -> str:
        """One attribute per line."""
        return "\n".join(f"{field.name:>17}  {getattr(self, field.name)}" for field in fields(self))


def make_plan(request: Request, tokens: int, positions: int | None = None) -> Plan:
    """The plan for `tokens` that count among so many `positions`; None if all positions count."""
    positions = tokens if positions is None else positions
    if request.naive(positions):
        return _plan_naive(request, positions)
    if request.width is None:
        return _plan_token(request, tokens)
    return _plan_linear(request, tokens, request.width)


def _plan_naive(request: Request, tokens: int) -> Plan:
    logits = tokens * request.vocabulary
    why = "impl is 'naive'"
    if request.options.impl == "auto":
        why = f"{logits} logits are few, so plain torch stores all of them"
    matmuls = 0 if request.width is None else {"none": 1, "hidden": 2, "head": 3}[request.gradient]
    return Plan(
        "autograd", tokens, tokens, "naive", op="token" if request.width is None else "linear", matmuls=matmuls,
        tokens=tokens, bytes_kept=logits * 3 * compute_dtype(request.like.dtype).itemsize,
        why=why,
    )  # fmt: skip


def _plan_token(request: Request, tokens: int) -> Plan:
    like, vocabulary = request.like, request.vocabulary
    passes, fallback = _row_passes(request)
    chunk = request.options.chunk_tokens or max(1, min(tokens, MATMUL_ELEMENTS // vocabulary))
    scratch = 0 if passes != "torch" else min(chunk * vocabulary, 2**21) * compute_dtype(like.dtype).itemsize
    return Plan(
        "recompute", chunk, 0, "triton" if passes == "triton" else "chunked", op="token", row_passes=passes,
        tokens=tokens, bytes_scratch=scratch, fallback=fallback,
        why="forward and backward each read the logits once; a logsumexp and a log-prob per token are kept",
    )  # fmt: skip


def _plan_linear(request: Request, tokens: int, width: int) -> Plan:
    if request.triton():
        return _plan_triton(request, tokens, width)
    like, options, budget = request.like, request.options, request.budget()
    chunk = options.chunk_tokens or default_chunk(tokens, request.vocabulary, on_cpu(like))
    chunk = max(1, min(chunk, tokens))
    passes, slow_rows = _row_passes(request)
    sums, slow_head = _head_sums(like)
    per_token, tiles = _memory(request, width, chunk)
    scheme, kept, why = _scheme(request, tokens, per_token, tiles, budget)
    too_small = None
    if scheme == "keep" and kept < tokens:
        too_small = _too_small(kept, tokens, budget)
        scheme = "keep" if kept else "recompute"
    return Plan(
        scheme, chunk, kept, "chunked", op="linear", row_passes=passes, head_sums=sums,
        matmuls=_matmuls(request, scheme, kept, tokens), tokens=tokens,
        recomputed_tokens=tokens - kept if scheme in ("keep", "recompute") else 0,
        bytes_kept=(tokens if scheme == "unscaled" else kept) * per_token.get(scheme, 0),
        bytes_scratch=tiles["recompute" if scheme == "keep" and kept < tokens else scheme],
        why=why, fallback="; ".join(filter(None, (too_small, slow_rows, slow_head))) or None,
    )  # fmt: skip


def _too_small(kept: int, tokens: int, budget: int) -> str:
    return f"{kept} of {tokens} tokens fit the budget of {budget} bytes, the rest is projected again"


def _matmuls(request: Request, scheme: Scheme, kept: int, tokens: int) -> float:
    products = {"score": 1, "unscaled": 2, "keep": 4 - (kept / tokens if tokens else 1)}.get(scheme, 4)
    return products - (scheme in ("keep", "recompute") and request.gradient == "hidden")


def _plan_triton(request: Request, tokens: int, width: int) -> Plan:
    options, budget, vocabulary = request.options, request.budget(), request.vocabulary
    # tiles grow with the card, and leave most of a budget for what is kept
    tile = max(LEAST_TILE_BYTES, min(MOST_TILE_BYTES, free_bytes(request.like.device) // 64, budget // 4))
    chunk = max(1, min(tokens, options.chunk_tokens or 2 ** ((tile // 4).bit_length() - 1) // vocabulary))
    rows, columns = tile_shape(tokens, vocabulary, chunk * vocabulary)
    head_sums, slow_head = _head_sums(request.like)
    scale_inputs = not (request.stats_gradient or options.round_once)
    sizes = Sizes(
        request.like.dtype, tokens, vocabulary, width, rows, columns, request.gradient == "head", scale_inputs,
        head_sums == "upcast",
    )  # fmt: skip
    choice, why = _choose(request, sizes, budget)
    recomputed = tokens - choice.kept if choice.scheme in ("keep", "recompute") else 0
    too_small = _too_small(choice.kept, tokens, budget) if why == _TOO_LARGE else None
    return Plan(
        choice.scheme, chunk, choice.kept, "triton", choice.head, scale_inputs and choice.kept > 0, "linear", "triton",
        head_sums, _matmuls(request, choice.scheme, choice.kept, tokens), tokens, recomputed, rows, columns,
        sizes.bytes_per_logit(choice), sizes.bytes_per_hidden(choice), sizes.kept(choice), sizes.scratch(choice), why,
        "; ".join(filter(None, (too_small, slow_head))) or None,
    )  # fmt: skip


def _choose(request: Request, sizes: Sizes, budget: int) -> tuple[Choice, str]:
    """The fewest matmuls that the budget allows, and why."""
    if request.gradient == "none":
        return Choice("score"), "no gradient is needed"
    low = too_low_for_codes(request.options.transform) and kept_dtype(sizes.dtype) == torch.int16
    if low and not sizes.scale_inputs and request.gradient != "hidden":
        return Choice("recompute"), "the softcap is too low for logits in 16 bits"
    tokens = sizes.tokens
    # in a compiled graph what is kept is an output of an op, and the gradient of the head is another
    head = sizes.in_gradient() if sizes.trained and not torch.compiler.is_compiling() else 0
    fitting = [(Choice("keep", tokens), f"the logits of all tokens fit the budget of {budget} bytes")]
    if request.gradient == "hidden" and not request.stats_gradient:
        why = "the head is frozen, so the gradient of each log-prob in its hidden state is saved"
        fitting.insert(0, (Choice("unscaled"), why))
    if head:
        why = f"the logits of all tokens fit the budget of {budget} bytes and the gradient of the head"
        fitting.append((Choice("keep", tokens, head), why))
    for choice, why in fitting:
        if sizes.kept(choice) + sizes.scratch(choice) <= budget:
            return choice, why
    room = budget - sizes.scratch(Choice("keep", max(0, tokens - 1), head))
    kept = min(tokens, head + room // sizes.kept_row) if room >= 0 else 0
    kept -= kept % MATMUL_BLOCK if kept < tokens else 0
    return Choice("keep" if kept else "recompute", kept, min(head, kept)), _TOO_LARGE


def _memory(request: Request, width: int, chunk: int) -> tuple[dict[str, int], dict[str, int]]:
    """By scheme, bytes kept of each token and bytes of tiles; those of "keep" hold if all tokens are kept."""
    like, vocabulary = request.like, request.vocabulary
    size = compute_dtype(like.dtype).itemsize
    kept = kept_columns(like.dtype, vocabulary) * kept_dtype(like.dtype).itemsize
    codes = not too_low_for_codes(request.options.transform)
    fused = on_cpu(like) and native.multiplies(like.dtype) and width % 2 == 0 and codes
    gradient = chunk * vocabulary * gradient_dtype(like).itemsize
    logits = chunk * (kept if fused else vocabulary * size)
    # the gradient is written over logits of its own precision, or over codes
    both = max(logits, gradient) if fused or gradient == logits else logits + gradient
    tiles = {
        "score": 0 if fused else logits,
        "unscaled": both,
        "keep": gradient if fused or kept_dtype(like.dtype).itemsize == size else max(logits, gradient),
        "recompute": logits + gradient if fused else both,
    }
    return {"keep": kept, "unscaled": width * size}, tiles


def _scheme(
    request: Request, tokens: int, per_token: dict[str, int], tiles: dict[str, int], budget: int
) -> tuple[Scheme, int, str]:
    """The scheme with the fewest matmuls that the budget allows, how many tokens it keeps, and why."""
    if request.gradient == "none":
        return "score", 0, "no gradient is needed"
    unscaled = tokens * per_token["unscaled"] + tiles["unscaled"]
    if request.gradient == "hidden" and not request.stats_gradient and unscaled <= budget:
        why = "the head is frozen, so the gradient of each log-prob in its hidden state is saved"
        return "unscaled", 0, why
    if kept_dtype(request.like.dtype) == torch.int16 and too_low_for_codes(request.options.transform):
        return "recompute", 0, "the softcap is too low for logits in 16 bits"
    if tokens * per_token["keep"] + tiles["keep"] <= budget:
        return "keep", tokens, "the logits of all tokens fit the budget"
    kept = max(0, (budget - tiles["recompute"]) // per_token["keep"])
    return "keep", min(tokens, kept), _TOO_LARGE


def _row_passes(request: Request) -> tuple[Literal["native", "triton", "torch"], str | None]:
    like = request.like
    if request.triton():
        return "triton", None
    if on_cpu(like) and native.passes_over(like.dtype):
        return "native", None
    if like.dtype == torch.float64:
        return "torch", None
    why = "no Triton for this device, or impl is not 'triton'"
    if on_cpu(like):
        why = "native.c could not be compiled here or is switched off"
    return "torch", f"{why}, so plain torch passes over the rows"


def _head_sums(like: Tensor) -> tuple[Literal["native", "mixed", "upcast", "same"], str | None]:
    if like.dtype not in (torch.bfloat16, torch.float16):
        return "same", None
    if has_mixed_matmul(like):
        return ("native" if on_cpu(like) else "mixed"), None
    return "upcast", (
        f"{like.device.type} cannot multiply {like.dtype} matrices with float32 sums, so the head is copied to "
        "float32 some rows at a time"
    )


def report(plan: Plan, strict: bool) -> Plan:
    """Log the first plan of each kind; with `strict`, raise RuntimeError if it has a fallback."""
    if strict and plan.fallback is not None:
        raise RuntimeError(f"strict: got a fallback, expected none: {plan.fallback}")
    if torch.compiler.is_compiling():
        return plan
    kind = (plan.op, plan.impl, plan.scheme, plan.row_passes, plan.head_sums, plan.fallback is None)
    if kind not in logged:
        logged.add(kind)
        _log.info(
            "prefloss: %s log-probs of %d tokens by %s/%s, %.3g matmuls, %.0f MiB kept, tiles of %d tokens (%s)%s",
            plan.op, plan.tokens, plan.impl, plan.scheme, plan.matmuls, plan.bytes_kept / 2**20, plan.chunk_tokens,
            plan.why, "" if plan.fallback is None else f"; fallback: {plan.fallback}",
        )  # fmt: skip
    return plan
