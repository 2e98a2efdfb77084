"""One loss computation: forward passes, feedback, loss, figures; and its share of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss import metrics
from prefloss.diagnosis import Diagnosis
from prefloss.diagnosis.finite import check_finite
from prefloss.feedback import Feedback
from prefloss.logratios import LogRatios
from prefloss.metrics import Stat
from prefloss.registry import Loss
from prefloss.training import across, checks, distributed, step_zero, totals
from prefloss.training.across import Seen, share
from prefloss.training.batch import (
    COUNTS,
    Structure,
    as_wanted,
    counts,
)
from prefloss.training.forward import unwrapped
from prefloss.training.layouts import score
from prefloss.training.reference import Reference


class Setting(NamedTuple):
    """What an objective was told.

    Attributes:
        loss: The loss.
        reference: Where reference log-probs come from.
        pairs: How rankings become pairs, or None.
        autocast: Makes the context that a reference model computes in.
        diagnosis: What watches training batches, or None.
    """

    loss: Loss
    reference: Reference
    pairs: str | None
    autocast: Callable[[], AbstractContextManager[Any]]
    diagnosis: Diagnosis | None = None


class Result(NamedTuple):
    """What came of a batch.

    Attributes:
        loss: What to take the gradient of, a scalar.
        outputs: As a model's outputs: the loss, and each completion's log-prob under policy and reference, by example.
        figures: Sums and counts to log.
        judged: Whether the step-0 check was made.
    """

    loss: Tensor
    outputs: dict[str, Tensor]
    figures: Mapping[str, Stat]
    judged: bool


def compute(
    setting: Setting,
    model: nn.Module,
    inputs: Mapping[str, Any],
    examples: int | None,
    check_step_zero: bool,
) -> Result:
    """The loss of a batch, scaled so that the micro-batches of an optimizer step add up to its mean.

    Args:
        setting: Loss and reference.
        model: The policy, wrapped as it is trained.
        inputs: The batch.
        examples: How many of its examples count; None for all.
        check_step_zero: Whether policy and reference must coincide here.

    Raises:
        ValueError: If the batch lacks something that the loss needs, or has something that it does not read.
        TypeError: If the feedback is of a kind that does not give what the loss takes.
        RuntimeError: If policy and reference should coincide and do not.
        FloatingPointError: If the loss of an example is not finite, or its gradient.
    """
    loss, reference, pairs, autocast, diagnosis = setting
    structure, inputs = Structure.split(inputs)
    checks.check_items(loss, structure, reference.kind == "cached")
    apart = _mismatched(setting, model, structure)
    # The reference first: switching adapters must not come between the policy's forward and backward.
    known = reference.logps(autocast, model, inputs, structure)
    policy, aux_loss = score(model, structure, inputs)
    ratios = _ratios(loss, structure, policy, known)
    own = structure if examples is None else structure.first(examples)
    feedback = own.feedback(ratios, apart)
    wanted = as_wanted(feedback, loss, pairs)
    judged = False
    if check_step_zero and known is not None:
        found = distributed.all_sum(step_zero.distance(policy, known, structure.targets >= 0))
        with autocast():
            half = torch.is_autocast_enabled(policy.device.type)
        given = _given(loss, structure, ratios, apart, pairs)
        judged = step_zero.check(unwrapped(model), half, loss, reference, found, given)
    seen = across.evaluate(loss, wanted, model.training)
    check_finite(loss, seen.evaluated.terms, seen.feedback)
    whole = structure.items.get(COUNTS)
    if whole is None and model.training:
        whole = distributed.all_sum(_with_one(seen.own))
    router = router_weight(unwrapped(model))
    total = _total(loss, seen, whole, aux_loss if router else None, router)
    figures = {
        **metrics.metrics(feedback, beta=loss.beta or 1.0),
        **totals.losses(seen.evaluated.means, seen.counted, aux_loss if router else None),
    }
    if diagnosis is not None and model.training:
        figures |= diagnosis.figures(feedback, seen.feedback, seen.evaluated, copies=seen.copies)
    outputs = {"loss": total, "logps": structure.per_example(ratios.policy.detach())}
    if ratios.reference is not None:
        outputs["ref_logps"] = structure.per_example(ratios.reference)
    return Result(total, outputs, figures, judged)


def count(setting: Setting, batches: Sequence[dict[str, Any]], *, over_processes: bool = True) -> None:
    """Tell every micro-batch of an optimizer step how many examples the whole step counts.

    Args:
        setting: Loss and reference.
        batches: The micro-batches, which get one more item.
        over_processes: Whether on all ranks, or on this one.
    """
    found = []
    for batch in batches:
        feedback = as_wanted(Structure.split(batch)[0].blank(), setting.loss, setting.pairs)
        found.append(_with_one(counts(setting.loss, feedback)))
    total = torch.stack(found).sum(0)
    if over_processes:
        total = distributed.all_sum(total)
    for batch in batches:
        batch[COUNTS] = total


def router_weight(policy: nn.Module) -> float:
    """Weight of the router loss of a mixture of experts; 0 for other models."""
    config: Any = policy.config
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def _with_one(counted: Tensor) -> Tensor:
    """The counts of a batch, and that it is one batch."""
    return torch.cat([counted, counted.new_ones(1)])


def _ratios(loss: Loss, structure: Structure, policy: Tensor, reference: Tensor | None) -> LogRatios:
    keep = any(name.startswith("per_token") for name in loss.needs | loss.spec.reads)
    mask = structure.targets >= 0
    if reference is None or reference.ndim == 2:
        return LogRatios.from_token_logps(policy, mask, reference, keep_per_token=keep)
    summed = LogRatios.from_token_logps(policy, mask)
    return LogRatios(summed.policy, reference, summed.tokens)


def _mismatched(setting: Setting, model: nn.Module, structure: Structure) -> LogRatios | None:
    """Log-ratios of prompts with the completions of other examples, without gradient; None if the batch has none.

    Raises:
        ValueError: If the reference is a cache, which knows the batch's own rows only.
    """
    if structure.mismatched is None:
        return None
    if setting.reference.kind in ("cached", "table", "none"):
        raise ValueError(
            f"mismatched: got {setting.reference!r}, which gives no log-probs of mismatched completions; expected a "
            "reference that is computed, or PreferenceCollator(..., mismatched=False) and "
            "kl_baseline='running_mean'"
        )
    other, inputs = structure.mismatched
    with torch.no_grad():
        known = setting.reference.logps(setting.autocast, model, inputs, other)
        return LogRatios.from_token_logps(score(model, other, inputs).logps, other.targets >= 0, known)


def _given(
    loss: Loss, structure: Structure, ratios: LogRatios, apart: LogRatios | None, pairs: str | None
) -> Callable[[bool], Feedback]:
    def feedback(at_zero: bool) -> Feedback:
        found, other = ratios.detach(), apart
        if at_zero:
            found, other = _at_zero(found), None if apart is None else _at_zero(apart)
        return as_wanted(structure.feedback(found, other), loss, pairs)

    return feedback


def _at_zero(ratios: LogRatios) -> LogRatios:
    """The same completions under a policy that is the reference."""
    assert ratios.reference is not None
    rows = ratios.per_token
    if rows is not None and rows.reference is not None:
        rows = type(rows)(rows.reference, rows.reference, rows.mask)
    return LogRatios(ratios.reference, ratios.reference, ratios.tokens, rows)


def _total(loss: Loss, seen: Seen, whole: Tensor | None, aux_loss: Tensor | None, router: float) -> Tensor:
    """The batch's share of the mean over the optimizer step, `whole`, or its own mean in evaluation."""
    if whole is None:
        return seen.evaluated.mean if aux_loss is None else seen.evaluated.mean + router * aux_loss
    total = share(loss, seen, whole[:-1])
    return total if aux_loss is None else total + router * aux_loss * distributed.size() / whole[-1]
