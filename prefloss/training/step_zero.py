"""The check at the first training batch: before any optimizer step, policy and reference are the same model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.data.table import Header
from prefloss.feedback import Feedback
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.training import distributed
from prefloss.training.fingerprint import dtype_of, weights_fingerprint
from prefloss.training.reference import Reference

logger = logging.getLogger(__name__)

TOLERANCE = {True: 2e-2, False: 1e-4}
"""Mean distance of the log-probs that rounding explains, nats per token; the key is True for half precision."""


def distance(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Sum of the distances between log-probs, nats, and the number of tokens, [2].

    Args:
        policy: Log-prob of each token, [rows, T].
        reference: The same, or sums, [rows]; then signs may cancel within a row.
        mask: True at completion tokens, [rows, T].
    """
    policy = torch.where(mask, policy.detach(), 0.0)
    if reference.ndim == 1:
        # The cached sum of a row without tokens has no meaning.
        difference = (policy.sum(-1) - reference) * mask.any(-1)
    else:
        difference = policy - torch.where(mask, reference, 0.0)
    return torch.stack([difference.abs().sum().double(), mask.sum().double()])


def at_zero(ratios: LogRatios) -> LogRatios:
    """The same completions under a policy that equals the reference: every log-ratio 0."""
    assert ratios.reference is not None
    rows = ratios.per_token
    if rows is not None and rows.reference is not None:
        rows = replace(rows, policy=rows.reference)
    return LogRatios(ratios.reference, ratios.reference, ratios.tokens, rows)


class Start(NamedTuple):
    """A training before its first step.

    Attributes:
        policy: The policy, unwrapped.
        half: True if it computes in half precision, whatever the dtype of its weights.
        loss: The loss to train with.
        reference: The reference.
    """

    policy: nn.Module
    half: bool
    loss: Loss
    reference: Reference


def check(start: Start, local_distance: Tensor, feedback: Callable[[bool], Feedback]) -> bool:
    """Stop a training whose policy does not start at its reference. Every process must call this.

    Args:
        start: What trains.
        local_distance: `distance` of this process's batch.
        feedback: Makes the feedback of the batch as the loss takes it: as it is, or (True) with every log-ratio 0.

    Returns:
        True if the batch allowed a verdict; one without completion tokens, or with NaN, does not.

    Raises:
        RuntimeError: If they differ; the message names the likely causes.
    """
    policy, half, loss, reference = start
    apart, tokens = distributed.all_sum(local_distance).tolist()
    if not tokens or not math.isfinite(apart):
        # The check of the loss names the example with a value that is not finite.
        return False
    half = half or dtype_of(policy) in (torch.float16, torch.bfloat16)
    if apart / tokens > TOLERANCE[half]:
        raise RuntimeError(
            f"step-0 check: before the first step policy and {reference!r} should be the same model, but their "
            f"log-probs differ by {apart / tokens:.3g} nats per token (rounding explains {TOLERANCE[half]:g}). "
            f"Likely causes: {'; '.join(_causes(policy, reference))}. If they need not agree (the policy was trained "
            "further than its reference, or the reference is another model), pass check_step_zero=False"
        )
    with torch.no_grad():
        value, known = (float(loss.eval().mean(feedback(zero))) for zero in (False, True))
    if not abs(value - known) <= 0.05 * max(1.0, abs(known)):
        raise RuntimeError(
            f"step-0 check: policy and reference agree, but {loss!r} is {value:.6g} where equal log-probs make it "
            f"{known:.6g}; pass check_step_zero=False if that is right"
        )
    logger.info(
        f"step 0: policy and reference agree ({apart / tokens:.2g} nats per token apart); loss {value:.6g}"
    )
    return True


def _causes(policy: nn.Module, reference: Reference) -> list[str]:
    """What is known to be wrong, or else what could be."""
    causes = list(_dropout(policy))
    if reference.kind == "model":
        causes += _unlike(policy, reference.value)
    if reference.kind in ("adapter_off", "adapter"):
        causes += _adapters(policy, reference)
    if reference.kind == "cached":
        causes.append(
            "the cached sums come from other weights, another chat template or truncation, another dtype, or other rows"
        )
    if reference.kind == "table":
        causes += _unlike_table(policy, reference.value.header)
    return causes or ["other weights, another adapter, dropout, another dtype"]


def _dropout(policy: Any) -> Iterator[str]:
    names = [
        name for name, module in policy.named_modules() if isinstance(module, nn.Dropout) and module.p > 0
    ]
    config = policy.config.to_dict() if hasattr(getattr(policy, "config", None), "to_dict") else {}
    settings = [
        f"{name}={value}"
        for name, value in config.items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0
    ]
    if settings or names:
        shown = settings or [f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]]
        yield f"dropout is on in the policy ({', '.join(shown)}); load it with these set to 0"


def _unlike(policy: nn.Module, reference: nn.Module) -> Iterator[str]:
    if dtype_of(policy) != dtype_of(reference):
        yield f"the reference has another dtype ({dtype_of(reference)}, the policy {dtype_of(policy)})"
        return
    theirs = dict(reference.named_parameters())
    for name, value in policy.named_parameters():
        other = theirs.get(name)
        if other is not None and (
            other.shape != value.shape or not torch.equal(other.detach().to(value.device), value.detach())
        ):
            yield f"the reference has other weights ({name} differs)"
            return
    if not theirs.keys() & dict(policy.named_parameters()).keys():
        yield f"the reference is another kind of model ({type(reference).__name__}, the policy {type(policy).__name__})"


def _unlike_table(policy: Any, header: Header) -> Iterator[str]:
    dtype = str(dtype_of(policy)).removeprefix("torch.")
    if dtype != header.dtype:
        yield f"the table was scored in {header.dtype} weights, the policy has {dtype}"
        # Rounding changed the weights too, so comparing them says nothing.
        return
    # A policy that trains a new adapter starts at its base model.
    weights = {weights_fingerprint(policy, adapters=on) for on in (True, False)}
    if None not in weights and header.weights not in weights:
        yield f"the table was scored with other weights ({header.model})"


def _adapters(policy: Any, reference: Reference) -> Iterator[str]:
    active = policy.active_adapters
    shown = ", ".join(map(repr, active))
    own = {
        name: value for name, value in policy.named_parameters() if any(f".{key}." in name for key in active)
    }
    if reference.kind == "adapter":
        others = dict(policy.named_parameters())
        pairs = {name: name.replace(f".{key}.", f".{reference.value}.") for name in own for key in active}
        if any(
            other in others and not torch.equal(own[name], others[other]) for name, other in pairs.items()
        ):
            yield f"the adapter {reference.value!r} holds other weights than {shown}"
    elif any("lora_B" in name and bool(value.any()) for name, value in own.items()):
        yield (
            f"the adapter {shown} does not start at zero (it was trained before, or initialised otherwise); its "
            "reference is then a frozen copy of it: Reference.adapter(name)"
        )
