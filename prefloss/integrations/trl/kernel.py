"""The function that turns hidden states into log-probs inside a TRL trainer: TRL's chunked one, or our fused one.

TRL gives each model a forward that ends in `trl.trainer.utils._ChunkedLogProbFunction`, looked up at every call.
`scoring("prefloss")` replaces it temporarily. Without a GPU, `_use_triton` makes the forward of TRL 1.16 score every
position, prompts and padding included; it is replaced too, so that only completion tokens are scored on every device.
TRL 1.15 scores with Triton alone, so it trains on a CPU with `kernel="prefloss"` only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import utils

from prefloss.integrations.binding import replaced
from prefloss.integrations.trl.versions import VERSION
from prefloss.logprobs import linear_token_logps, linear_token_stats

KERNELS = ("trl", "prefloss")

_FUNCTION, _CHOICE = "_ChunkedLogProbFunction", "_use_triton"
_ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
# Logits in a slice of tokens, for the mean under a softcap: 64 MiB in float32.
_SLICE = 2**24


def check_kernel(kernel: str) -> None:
    """Refuse an unknown kernel, or one that this TRL cannot use.

    Raises:
        ValueError: If it is neither "trl" nor "prefloss".
        RuntimeError: If this TRL scores completions in an unknown way.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: got {kernel!r}, expected 'trl' or 'prefloss'")
    if kernel == "trl":
        return
    if not _scores_as_known():
        raise RuntimeError(
            f"kernel: got 'prefloss', but TRL {trl.__version__} scores completions in a way that prefloss does not "
            "know (it was tested with TRL 1.15 and 1.16); use kernel='trl'"
        )


@contextmanager
def scoring(kernel: str) -> Iterator[None]:
    """Score TRL's forward passes with `kernel` inside.

    Args:
        kernel: "trl" or "prefloss", after `check_kernel`.
    """
    ours: dict[str, Any] = {}
    if kernel == "prefloss":
        ours = {_FUNCTION: _Scores, **({_CHOICE: _completions_alone} if hasattr(utils, _CHOICE) else {})}
    with replaced(utils, ours):
        yield


def references_by(own: Callable[..., Any], kernel_of: Callable[[Any], str]) -> Callable[..., Any]:
    """TRL's `_precompute_ref_logps`, scored by the kernel that `kernel_of(trainer)` names.

    TRL caches the results in a file named by a hash of model and data; ours go to another file.
    """

    def _precompute_ref_logps(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = kernel_of(self)
        if kernel == "trl":
            return own(self, *args, **kwargs)
        model_hash = self._precompute_model_hash
        self._precompute_model_hash = f"{model_hash}-{kernel}"
        try:
            with scoring(kernel):
                return own(self, *args, **kwargs)
        finally:
            self._precompute_model_hash = model_hash

    return _precompute_ref_logps


def mixes_kernels(trainer: Any) -> bool:
    """Whether references rounded by TRL's kernel would differ visibly from ours: in half precision."""
    half = trainer.args.bf16 or trainer.args.fp16 or trainer.model.dtype in (torch.bfloat16, torch.float16)
    return bool(trainer.precompute_ref_logps and half)


class _Scores:
    """Replaces TRL's autograd function; only `apply` is called, with all its arguments."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Log-probs of completion tokens, [n], and the statistics named in `outputs`."""
        if hasattr(weight, "ds_id"):
            raise TypeError(
                "kernel: got 'prefloss' with an output head that DeepSpeed ZeRO-3 shards, which it cannot gather again "
                "in the backward pass; use kernel='trl'"
            )
        # As TRL does: what autocast says, or else the dtype of the hidden states.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        transform: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": final_logit_softcapping,
        }
        if not {"entropy", "log_sum_sq_probs", "is_top1"}.intersection(outputs):
            logps = linear_token_logps(hidden, weight, targets, bias=bias, **transform)
            results: list[Tensor | None] = [logps, None, None, None, None]
        else:
            stats = linear_token_stats(hidden, weight, targets, bias=bias, **transform)
            results = [stats.logps, stats.entropy, stats.log_sum_sq, None, stats.top1]
        if "mean_logits" in outputs:
            results[3] = mean_logits(hidden, weight, bias, **transform)
        return tuple(results)


@torch.no_grad()
def mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Mean over the vocabulary of each token's transformed logits, [n], without gradient.

    Without a softcap, the mean of the logits is the logit of the mean row of the head. A softcap is not linear, so all
    logits are computed again, a slice of tokens at a time.

    Args:
        hidden: Hidden states, [n, H].
        weight: Weight of the head, [V, H].
        bias: Its bias, [V], or None.
        temperature: Divides the logits last.
        logit_scale: Multiplies them first.
        softcap: Bounds the scaled ones, or None.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        if softcap is None:
            mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
            mean = mean if bias is None else mean + bias.mean(dtype=wide)
            return mean * (logit_scale / temperature)
        means = hidden.new_empty(len(hidden), dtype=wide)
        step = max(1, _SLICE // len(weight))
        for start in range(0, len(hidden), step):
            logits = torch.nn.functional.linear(hidden[start : start + step], weight, bias).to(wide)
            capped = logits.mul_(logit_scale / softcap).tanh_()
            means[start : start + step] = capped.mean(-1) * (softcap / temperature)
        return means


def _completions_alone(device: torch.device) -> bool:
    """Replaces `_use_triton`: True makes TRL's forward select the completion tokens."""
    return True


def _scores_as_known() -> bool:
    """Whether TRL's forward calls its function as `_Scores.apply` is called, and which positions it gives it."""
    function, head = getattr(utils, _FUNCTION, None), getattr(utils, "add_fused_lm_head", None)
    names = set() if head is None else _names_in(head.__code__)
    # TRL 1.15 without Triton has the call and None for the function.
    without_triton = function is None and VERSION.release[:2] == (1, 15)
    forward = getattr(function, "forward", None)
    arguments = () if forward is None else tuple(inspect.signature(forward).parameters)[1:]
    takes = without_triton or arguments == _ARGUMENTS
    return takes and _FUNCTION in names and (_CHOICE in names) == hasattr(utils, _CHOICE)


def _names_in(code: Any) -> set[str]:
    inner = [part for part in code.co_consts if inspect.iscode(part)]
    return {*code.co_names, *(name for part in inner for name in _names_in(part))}
