"""The gradient of each example's loss with respect to the log-probs of its completions.

Computed before the backward pass through the model, from log-probs to loss alone: a few operations on [n]. A hook in
the backward pass itself would see gradients scaled by accumulation, mixed precision and the number of processes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.diagnosis.finite import log_probs
from prefloss.feedback import SIDES, Feedback, Labels, Pairs
from prefloss.logratios import LogRatios
from prefloss.registry import Evaluation, Loss


class Gradients(NamedTuple):
    """Gradients of one batch.

    Attributes:
        sizes: Largest absolute gradient of an example's loss in a log-prob of its completions, [n].
        finite: True if all are finite; a bool tensor, scalar.
    """

    sizes: Tensor
    finite: Tensor


def gradients(loss: Loss, evaluation: Evaluation, feedback: Feedback) -> Gradients | None:
    """Gradients of an evaluation in the log-probs that it read; None if none of them has one.

    Args:
        loss: The loss.
        evaluation: What `loss.evaluate(feedback)` gave; its graph stays as it is.
        feedback: What was evaluated.
    """
    total = sum(
        term.weight * values.sum() for term, values in zip(loss.terms, evaluation.terms.values(), strict=True)
    )
    sides = _per_side(total, feedback) if isinstance(total, Tensor) and total.requires_grad else []
    if not sides:
        return None
    sizes = torch.stack([_largest(side.abs(), len(feedback.shape)) for side in sides]).amax(0)
    return Gradients(sizes, torch.isfinite(sizes).all())


def check_gradients(loss: Loss, evaluation: Evaluation, feedback: Feedback) -> None:
    """Name the example and the term of a gradient that is not finite.

    Raises:
        FloatingPointError: If there is one.
    """
    names = SIDES[type(feedback)]
    terms = list(evaluation.terms.items())
    # Finite terms may have a sum that is not.
    whole = sum(values.sum() for _, values in terms)
    for term, total in [*((name, values.sum()) for name, values in terms), ("the sum of its terms", whole)]:
        if not isinstance(total, Tensor) or not total.requires_grad:
            continue
        for side, gradient in zip(names, _per_side(total, feedback), strict=False):
            rows = gradient.flatten(1) if gradient.ndim > 1 else gradient.unsqueeze(1)
            bad = (~torch.isfinite(rows).all(-1)).nonzero().flatten().tolist()
            if bad:
                row = rows[bad[0]]
                value = row[~torch.isfinite(row)][0].item()
                raise FloatingPointError(
                    f"{loss!r}: the gradient of {term} in the log-prob of the {side} of example {bad[0]} of this batch "
                    f"is {value} ({len(bad)} of {len(rows)} are not finite); its log-probs in nats are "
                    f"{log_probs(feedback, bad[0])}"
                )


def sizes_at_start(loss: Loss, feedback: Feedback) -> Tensor | None:
    """Gradient sizes of the loss where policy and reference agree, [n]; leaves the state of the loss alone.

    Without a reference: where all tokens are equally likely. None without token counts. Processes do not
    communicate.
    """
    at_start = _at_start(feedback)
    if at_start is None:
        return None
    with loss.held_still(), torch.enable_grad():
        result = gradients(loss, loss.evaluate(at_start), at_start)
    return None if result is None else result.sizes


def _per_side(total: Tensor, feedback: Feedback) -> list[Tensor]:
    """Gradient of each side's log-probs, [n] or [n, ...], where it has one."""
    parts = [part for part in feedback.parts if part.policy.requires_grad or _rows_of(part) is not None]
    leaves = [(part.policy, _rows_of(part)) for part in parts]
    inputs = [value for pair in leaves for value in pair if value is not None and value.requires_grad]
    slopes = iter(torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True))
    sides = []
    for sums, rows in leaves:
        of_sums = next(slopes) if sums.requires_grad else None
        of_rows = next(slopes) if rows is not None else None
        of_sums = torch.zeros_like(sums) if of_sums is None else of_sums
        # The gradient of a sum is that of each of its tokens.
        sides.append(of_sums if of_rows is None else of_rows + of_sums.unsqueeze(-1))
    return sides


def _largest(values: Tensor, leading: int) -> Tensor:
    """Maximum over all dimensions after the leading ones; the batch may be empty."""
    return values.flatten(leading).amax(-1) if values.ndim > leading else values


def _rows_of(part: LogRatios) -> Tensor | None:
    rows = part.per_token
    return rows.policy if rows is not None and rows.policy.requires_grad else None


def _at_start(feedback: Feedback) -> Feedback | None:
    level = None
    own = feedback.completions if not isinstance(feedback, Pairs) else feedback.chosen
    if own.reference is None:
        if own.tokens is None:
            return None
        known = [part for part in feedback.parts if part.tokens is not None]
        tokens = sum(part.tokens.sum() for part in known if part.tokens is not None)
        level = sum(part.policy.detach().sum() for part in known) / torch.as_tensor(tokens).clamp(min=1)
    if isinstance(feedback, Pairs):
        gold = None if feedback.gold is None else _moved(feedback.gold, level)
        chosen, rejected = _moved(feedback.chosen, level), _moved(feedback.rejected, level)
        return replace(feedback, chosen=chosen, rejected=rejected, gold=gold)
    moved: dict[str, Any] = {"completions": _moved(feedback.completions, level)}
    if isinstance(feedback, Labels) and feedback.mismatched is not None:
        moved["mismatched"] = _moved(feedback.mismatched, level).detach()
    return replace(feedback, **moved)


def _moved(ratios: LogRatios, level: Any) -> LogRatios:
    """The same completions under a policy equal to the reference, or with `level` nats at every token."""
    if ratios.reference is not None:
        policy = ratios.reference.clone()
    else:
        assert ratios.tokens is not None
        policy = ratios.tokens * level
    rows = ratios.per_token
    if rows is not None:
        tokens = torch.full_like(rows.policy, 0.0) + level if rows.reference is None else rows.reference
        rows = replace(rows, policy=tokens.detach().clone().requires_grad_())
    return replace(ratios, policy=policy.detach().requires_grad_(), per_token=rows)


def frozen_state(loss: Loss) -> AbstractContextManager[None]:
    """Former form of `Loss.held_still`."""
    return loss.held_still()
