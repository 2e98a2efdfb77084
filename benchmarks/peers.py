"""Other people's ways to get log-probs, and plain torch; each is left out where its package is absent."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Way = Callable[..., Tensor]


def naive_logits(logits: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits.to(dtype).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def gather_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


def naive_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the dtype of the head, as most trainers have them."""
    return naive_logits(hidden @ weight.T, targets)


def compiled(way: Way) -> Way:
    """Compiled for the very sizes, and from nothing: after eight sizes and dtypes torch gives up and runs eagerly."""
    torch.compiler.reset()
    return torch.compile(way, dynamic=False)


def logits_ways() -> dict[str, Way]:
    """(logits [n, V], targets [n]) -> log-probs [n], and of some the entropies too, [2, n]."""
    ways: dict[str, Way] = {
        "plain PyTorch": naive_logits,
        "F.cross_entropy": cross_entropy,
        "torch.compile": compiled(naive_logits),
        "torch.compile, gather - logsumexp": compiled(gather_logsumexp),
    }
    try:
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy
    except ModuleNotFoundError:
        return ways

    def both(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack(selective_log_softmax_and_entropy(logits, targets))

    return ways | {
        "TRL selective_log_softmax": selective_log_softmax,
        "TRL selective_log_softmax_and_entropy": both,
    }


def linear_ways() -> dict[str, Way]:
    """(hidden [n, H], weight [V, H], targets [n]) -> log-probs [n], of completion tokens alone."""
    ways = {
        "plain PyTorch": naive_linear,
        "F.cross_entropy": lambda x, w, y: cross_entropy(x @ w.T, y),
        "torch.compile": compiled(naive_linear),
    }
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return ChunkedLogProbFunction.apply(x, w, None, y, 1.0, 32_768, None, 1.0, ())[0]

        ways["TRL ChunkedLogProbFunction"] = trl
    except ModuleNotFoundError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cce(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            impl = "cce" if x.is_cuda else "torch_compile"
            return -linear_cross_entropy(x, w, y, reduction="none", impl=impl)

        ways["CCE"] = cce
    except ModuleNotFoundError:
        pass
    return ways


def liger_steps(loss: str, beta: float) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """(hidden [2 pairs, T, H], weight, targets [2 pairs, T]) -> "dpo" or "kto" without a reference."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss
    except ModuleNotFoundError:
        return {}

    def dpo(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        fused = LigerFusedLinearDPOLoss(beta=beta, compiled=compiled, use_ref_model=False)
        return lambda hidden, weight, targets: fused(weight, hidden, targets)[0]

    def kto(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        fused = LigerFusedLinearKTOLoss(beta=beta, compiled=compiled, use_ref_model=False)

        def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            up = torch.arange(len(hidden), device=hidden.device) < len(hidden) // 2
            return fused(hidden, weight, targets, preference_labels=up)[0]

        return call

    make = {"dpo": dpo, "kto": kto}[loss]
    return {f"Liger {loss.upper()}": make(False), f"Liger {loss.upper()}, compiled": make(True)}
