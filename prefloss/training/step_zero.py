"""The check at the first training batch: before any step, policy and reference are the same model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prefloss.data.table import Header
from prefloss.feedback import Feedback
from prefloss.registry import Loss
from prefloss.training.fingerprint import dtype_of, weights_fingerprint
from prefloss.training.reference import Reference

logger = logging.getLogger(__name__)

TOLERANCE = {True: 2e-2, False: 1e-4}
"""Mean distance of the log-probs that rounding explains, nats per token, in half precision or not."""


def distance(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Sum of the distances between log-probs, nats, and the number of tokens, [2].

    Args:
        policy: Log-prob of each token, [rows, T].
        reference: The same, or sums, [rows]; then signs may cancel within a row.
        mask: True at completion tokens, [rows, T].
    """
    policy = torch.where(mask, policy.detach(), 0.0)
    if reference.ndim == 1:
        # A row without tokens has a cached sum that nothing reads.
        apart = (policy.sum(-1) - reference) * mask.any(-1)
    else:
        apart = policy - torch.where(mask, reference, 0.0)
    return torch.stack([apart.abs().sum().double(), mask.sum().double()])


def check(
    policy: nn.Module,
    half: bool,
    loss: Loss,
    reference: Reference,
    found: Tensor,
    loss_of: Callable[[bool], Feedback],
) -> bool:
    """Stop training whose policy does not start at its reference.

    Args:
        policy: The policy, unwrapped.
        half: Whether it computes in half precision though its weights need not be.
        loss: The loss to train with.
        reference: The reference.
        found: `distance` of the batch, summed over the ranks.
        loss_of: The feedback of the batch as the loss takes it: as it is, or (True) with every log-ratio 0.

    Returns:
        Whether the batch could be judged; one without completion tokens, or with NaN, cannot.

    Raises:
        RuntimeError: If they differ; the message names the likely causes.
    """
    apart, tokens = found.tolist()
    if not tokens or not math.isfinite(apart):
        # What is not finite is named with its example when the loss is.
        return False
    half = half or dtype_of(policy) in (torch.float16, torch.bfloat16)
    if apart / tokens > TOLERANCE[half]:
        raise RuntimeError(
            f"step-0 check: before the first step policy and {reference!r} should be the same model, but their "
            f"log-probs differ by {apart / tokens:.3g} nats per token (rounding explains {TOLERANCE[half]:g}). "
            f"Likely causes: {'; '.join(_causes(policy, reference))}. If they need not coincide (say, the policy was "
            "trained further than its reference, or the reference is another model), pass "
            "check_step_zero=False"
        )
    with torch.no_grad():
        value, known = (float(loss.eval().mean(loss_of(at_zero))) for at_zero in (False, True))
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
    found = list(_dropout(policy))
    if reference.kind == "model":
        found += _unlike(policy, reference.value)
    if reference.kind in ("adapter_off", "adapter"):
        found += _adapters(policy, reference)
    if reference.kind == "cached":
        found.append(
            "the cached sums are of other weights, another chat template or truncation, another dtype, or other rows"
        )
    if reference.kind == "table":
        found += _unlike_table(policy, reference.value.header)
    return found or ["other weights, another adapter, dropout, another dtype"]


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
        # Rounded, they are other weights too.
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
            f"the adapter {shown} does not start at zero (trained before, or not initialised so); its reference is "
            "then a frozen copy of it: Reference.adapter(name)"
        )
