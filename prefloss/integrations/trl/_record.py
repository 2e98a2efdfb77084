"""Read the log-probs that a TRL trainer computes while it computes its own loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import trl
from torch import Tensor, nn

from prefloss.logratios import IGNORE_INDEX, LogRatios


@dataclass(frozen=True)
class Pass:
    """One forward pass through TRL's fused head.

    Attributes:
        labels: Token ids of completion tokens, `IGNORE_INDEX` elsewhere, [rows, T].
        log_probs: Log-probs of `labels[:, 1:]`, [rows, T - 1], nats; 0 where ignored.
        aux_loss: Router loss of a mixture of experts, a scalar, or None.
        log_sum_sq: Log of the sum of squared probabilities at each of those positions, if TRL computed it.
    """

    labels: Tensor
    log_probs: Tensor
    aux_loss: Tensor | None
    log_sum_sq: Tensor | None


@contextmanager
def recorded(trainer: Any) -> Iterator[list[Pass]]:
    """Collect the forward passes that `trainer` makes inside, in order."""
    passes: list[Pass] = []

    def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if kwargs.get("fused_lm_head"):
            width = kwargs["labels"].shape[1] - 1
            # Prompt-learning adapters prepend virtual tokens; the last columns are the real ones.
            squares = output.log_sum_sq_probs
            passes.append(
                Pass(
                    kwargs["labels"],
                    output.log_probs[:, -width:],
                    output.aux_loss,
                    None if squares is None else squares[:, -width:],
                )
            )

    # On the unwrapped policy, so that one hook sees a pass however it was started: by DDP, an engine or directly.
    modules = {trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)}
    if trainer.ref_model is not None:
        modules.add(trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False))
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def assign(passes: list[Pass], expected: list[tuple[str, Tensor]]) -> dict[str, Pass]:
    """Name the passes, checking that each is what TRL is known to compute at that place.

    Args:
        passes: As recorded.
        expected: Name and labels of each pass in TRL's order.

    Raises:
        RuntimeError: If TRL made other passes than expected: a version that works differently.
    """
    if len(passes) != len(expected):
        raise _unknown_order(
            f"{len(passes)} forward passes", f"{len(expected)}: {[name for name, _ in expected]}"
        )
    for place, (found, (name, labels)) in enumerate(zip(passes, expected, strict=True)):
        if found.labels.shape != labels.shape or not torch.equal(found.labels, labels):
            raise _unknown_order(f"other tokens in pass {place}", f"those of {name!r}")
    return {name: found for found, (name, _) in zip(passes, expected, strict=True)}


def masked_labels(inputs: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """The labels that TRL hands the model for a batch: completion tokens, the rest ignored, [rows, T]."""
    return inputs[f"{prefix}input_ids"].masked_fill(inputs[f"{prefix}completion_mask"] == 0, IGNORE_INDEX)


def log_ratios(policy: Pass, reference: Pass | Tensor) -> LogRatios:
    """Log-ratios of the rows of a pass, [rows], with their tokens where the reference has them.

    Args:
        policy: The pass.
        reference: The reference's pass, or its sums computed beforehand, [rows].
    """
    mask = policy.labels[:, 1:] != IGNORE_INDEX
    if isinstance(reference, Pass):
        found = LogRatios.from_token_logps(policy.log_probs, mask, reference.log_probs, keep_per_token=True)
        assert found.per_token is not None
        return replace(found, per_token=replace(found.per_token, log_sum_sq=policy.log_sum_sq))
    summed = LogRatios.from_token_logps(policy.log_probs, mask)
    return LogRatios(summed.policy, reference, summed.tokens)


def _unknown_order(got: str, wanted: str) -> RuntimeError:
    return RuntimeError(
        f"TRL {trl.__version__}: got {got}, expected {wanted}; this version computes its loss in a way that prefloss "
        "does not know. Please report it, with the versions of both."
    )
