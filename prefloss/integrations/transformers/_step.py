"""One loss computation: forward passes, feedback, loss, figures; and its share of an optimizer step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss import diagnostics
from prefloss.diagnostics import Stat
from prefloss.feedback import Feedback
from prefloss.integrations.transformers import _guard, _metrics, _step_zero
from prefloss.integrations.transformers._batch import COUNTS, Structure, as_wanted, counts, terms_of
from prefloss.integrations.transformers._forward import model_logps
from prefloss.integrations.transformers._reference import Reference
from prefloss.logratios import LogRatios
from prefloss.losses import Evaluation, Loss


class Setting(NamedTuple):
    """What a callback was told.

    Attributes:
        loss: The loss.
        reference: Where reference log-probs come from.
        pairs: How rankings become pairs, or None.
    """

    loss: Loss
    reference: Reference
    pairs: str | None


class Result(NamedTuple):
    """What came of a batch.

    Attributes:
        loss: What the trainer takes the gradient of, a scalar.
        outputs: As a model's outputs: the loss, and each completion's log-prob under policy and reference, by example.
        figures: Sums and counts to log.
        judged: Whether the step-0 check was made.
    """

    loss: Tensor
    outputs: dict[str, Tensor]
    figures: Mapping[str, Stat]
    judged: bool


def compute(
    trainer: Any,
    setting: Setting,
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items: Any,
    check_step_zero: bool,
) -> Result:
    """The loss of a batch, scaled so that the micro-batches of an optimizer step add up to its mean.

    Args:
        trainer: The trainer.
        setting: Loss and reference.
        model: The policy, wrapped as it is trained.
        inputs: The batch.
        num_items: What the trainer counted in the optimizer step, or None.
        check_step_zero: Whether policy and reference must coincide here.

    Raises:
        ValueError: If the batch lacks something that the loss needs, or has something that it does not read.
        TypeError: If the feedback is of a kind that does not give what the loss takes.
        RuntimeError: If policy and reference should coincide and do not.
        FloatingPointError: If the loss of an example is not finite.
    """
    loss, reference, pairs = setting
    structure, inputs = Structure.split(inputs)
    _guard.check_items(loss, structure, reference.kind == "cached")
    # The reference first: switching adapters must not come between the policy's forward and backward.
    known = reference.logps(trainer, model, inputs, structure.targets, structure.items)
    policy, aux_loss = model_logps(model, inputs, structure.targets)
    ratios = _ratios(loss, structure, policy, known)
    own = structure if model.training else structure.first(_unrepeated(trainer, structure))
    feedback = own.feedback(ratios)
    seen = as_wanted(feedback, loss, pairs)
    all_sum = functools.partial(trainer.accelerator.reduce, reduction="sum")
    loss.reduce_over(all_sum)
    judged = False
    if check_step_zero and known is not None:
        found = all_sum(_step_zero.distance(policy, known, structure.targets >= 0))
        judged = _step_zero.check(trainer, loss, reference, found, _given(loss, structure, ratios, pairs))
    evaluated = loss.train(model.training).evaluate(seen)
    _guard.check_finite(loss, evaluated.terms, seen)
    here = counts(loss, seen)
    total = _total(trainer, loss, evaluated, here, structure.items.get(COUNTS), model.training)
    router = router_weight(trainer)
    if aux_loss is not None and router:
        total = total + router * aux_loss / (_micro_batches(trainer) if model.training else 1)
    if model.training and _undivided(trainer, num_items):
        total = total * _micro_batches(trainer)
    figures = {
        **diagnostics.metrics(feedback, beta=loss.beta or 1.0),
        **_metrics.losses(evaluated.means, here, aux_loss if router else None),
    }
    outputs = {"loss": total, "logps": structure.per_example(ratios.policy.detach())}
    if ratios.reference is not None:
        outputs["ref_logps"] = structure.per_example(ratios.reference)
    return Result(total, outputs, figures, judged)


def count_step(trainer: Any, setting: Setting, batches: Sequence[dict[str, Any]]) -> None:
    """Tell every micro-batch of an optimizer step how many examples the whole step counts, on all ranks.

    transformers' own count is one number from the labels of a batch, and none at all for models whose forward takes no
    loss arguments; losses need one for each term, by their own rule.

    Args:
        trainer: The trainer.
        setting: Loss and reference.
        batches: The micro-batches, which get one more item.
    """
    if not batches:
        return
    found = []
    for batch in batches:
        feedback = as_wanted(Structure.split(batch)[0].blank(), setting.loss, setting.pairs)
        found.append(counts(setting.loss, feedback))
    device = trainer.args.device
    total = trainer.accelerator.reduce(torch.stack(found).sum(0).to(device), reduction="sum")
    for batch in batches:
        batch[COUNTS] = total


def router_weight(trainer: Any) -> float:
    """Weight of the router loss of a mixture of experts; 0 for other models."""
    config = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).config
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def _ratios(loss: Loss, structure: Structure, policy: Tensor, reference: Tensor | None) -> LogRatios:
    keep = any(name.startswith("per_token") for name in loss.needs | loss.spec.reads)
    mask = structure.targets >= 0
    if reference is None or reference.ndim == 2:
        return LogRatios.from_token_logps(policy, mask, reference, keep_per_token=keep)
    summed = LogRatios.from_token_logps(policy, mask)
    return LogRatios(summed.policy, reference, summed.tokens)


def _given(
    loss: Loss, structure: Structure, ratios: LogRatios, pairs: str | None
) -> Callable[[bool], Feedback]:
    def feedback(at_zero: bool) -> Feedback:
        found = ratios.detach()
        if at_zero:
            assert found.reference is not None
            rows = found.per_token
            if rows is not None and rows.reference is not None:
                rows = type(rows)(rows.reference, rows.reference, rows.mask)
            found = LogRatios(found.reference, found.reference, found.tokens, rows)
        return as_wanted(structure.feedback(found), loss, pairs)

    return feedback


def _total(
    trainer: Any, loss: Loss, evaluated: Evaluation, here: Tensor, whole: Tensor | None, training: bool
) -> Tensor:
    """The batch's share of the mean over the optimizer step, or its own mean in evaluation."""
    if not training:
        return evaluated.mean
    if whole is None:
        # A subclass fetches its batches without the trainer's own method: the mean of the micro-batches' means.
        return evaluated.mean / _micro_batches(trainer)
    # Gradients are averaged over the ranks, so each gives its share as many times as there are ranks.
    share = here.clamp(min=1) / whole.clamp(min=1) * trainer.accelerator.num_processes
    weighted = [
        weight * mean * part
        for (weight, _), mean, part in zip(terms_of(loss), evaluated.means.values(), share, strict=True)
    ]
    return torch.stack(weighted).sum()


def _unrepeated(trainer: Any, structure: Structure) -> int:
    """How many examples of an evaluation batch are this rank's own.

    accelerate fills the last batches up with examples from the start of the data, so that all ranks have as many.
    """
    state, count = trainer.accelerator.gradient_state, structure.examples
    if trainer.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return count
    return max(0, min(count, state.remainder - trainer.accelerator.process_index * count))


def _micro_batches(trainer: Any) -> int:
    """How many make this optimizer step; the last of an epoch may have fewer."""
    # Not there before training begins.
    return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)


def _undivided(trainer: Any, num_items: Any) -> bool:
    """Whether the trainer will divide by the number of micro-batches, which the loss is already."""
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)
    return not (trainer.model_accepts_loss_kwargs and num_items is not None if stated is None else stated)
