"""Other people's ways to get log-probs, and plain torch; each is left out, by name, where it cannot be imported."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Way = Callable[..., Tensor]
# what was left out, and why
LeftOut = dict[str, str]


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


def logits_ways(left_out: LeftOut | None = None) -> dict[str, Way]:
    """(logits [n, V], targets [n]) -> log-probs [n], and of some the entropies too, [2, n]."""
    ways: dict[str, Way] = {
        "plain PyTorch": naive_logits,
        "F.cross_entropy": cross_entropy,
        "torch.compile": compiled(naive_logits),
        "torch.compile, gather - logsumexp": compiled(gather_logsumexp),
    }
    return ways | _importable(
        {
            "TRL selective_log_softmax": _trl_log_softmax,
            "TRL selective_log_softmax_and_entropy": _trl_entropy,
            "QuACK cross_entropy": _quack_logits,
        },
        left_out,
    )


def linear_ways(left_out: LeftOut | None = None) -> dict[str, Way]:
    """(hidden [n, H], weight [V, H], targets [n]) -> log-probs [n], of completion tokens alone."""
    ways = {
        "plain PyTorch": naive_linear,
        "F.cross_entropy": lambda x, w, y: cross_entropy(x @ w.T, y),
        "torch.compile": compiled(naive_linear),
    }
    return ways | _importable({"TRL ChunkedLogProbFunction": _trl_linear, "CCE": _cce}, left_out)


def liger_steps(loss: str, beta: float, left_out: LeftOut | None = None) -> dict[str, Way]:
    """(hidden [2 pairs, T, H], weight, targets [2 pairs, T]) -> "dpo" or "kto" without a reference."""
    name = f"Liger {loss.upper()}"
    builders = {
        name: lambda: _liger(loss, beta, False),
        f"{name}, compiled": lambda: _liger(loss, beta, True),
    }
    return _importable(builders, left_out)


def cross_entropy_steps(left_out: LeftOut | None = None) -> dict[str, Way]:
    """(hidden [2 pairs, T, H], weight, targets [2 pairs, T]) -> mean cross-entropy, whose gradient they compute ahead.

    They give no log-prob of a token, so no preference loss can follow; this is the only task that they share with us.
    """
    return _importable(
        {"Liger fused linear CE": _liger_ce, "QuACK chunked linear CE": _quack_linear}, left_out
    )


def _importable(builders: dict[str, Callable[[], Way]], left_out: LeftOut | None) -> dict[str, Way]:
    """The ways that can be had; the names of the others, and the reasons, go to `left_out`."""
    ways = {}
    for name, build in builders.items():
        try:
            ways[name] = build()
        except ModuleNotFoundError as error:
            reason = f"left out: no module {error.name}"
        except Exception as error:  # a peer that cannot be imported here must stop nobody
            reason = f"left out: {type(error).__name__}: {error}"
        if name not in ways and left_out is not None:
            left_out[name] = reason
    return ways


def _trl_log_softmax() -> Way:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _trl_entropy() -> Way:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda logits, targets: torch.stack(selective_log_softmax_and_entropy(logits, targets))


def _quack_logits() -> Way:
    from quack.cross_entropy import cross_entropy

    return lambda logits, targets: -cross_entropy(logits, targets, reduction="none")


def _trl_linear() -> Way:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def trl(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(x, w, None, y, 1.0, 32_768, None, 1.0, ())[0]

    return trl


def _cce() -> Way:
    from cut_cross_entropy import linear_cross_entropy

    def cce(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        impl = "cce" if x.is_cuda else "torch_compile"
        return -linear_cross_entropy(x, w, y, reduction="none", impl=impl)

    return cce


def _liger(loss: str, beta: float, compiled: bool) -> Way:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss

    make: Any = {"dpo": LigerFusedLinearDPOLoss, "kto": LigerFusedLinearKTOLoss}[loss]
    fused = make(beta=beta, compiled=compiled, use_ref_model=False)

    def dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return fused(weight, hidden, targets)[0]

    def kto(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        up = torch.arange(len(hidden), device=hidden.device) < len(hidden) // 2
        return fused(hidden, weight, targets, preference_labels=up)[0]

    return {"dpo": dpo, "kto": kto}[loss]


def _flat(fused: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
    """Of [n, H] and [n], from [2 pairs, T, H] and [2 pairs, T]."""
    return lambda hidden, weight, targets: fused(hidden.flatten(0, 1), weight, targets.flatten())


def _liger_ce() -> Way:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _flat(liger_fused_linear_cross_entropy)


def _quack_linear() -> Way:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _flat(chunked_linear_cross_entropy)
