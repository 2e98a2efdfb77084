"""Run TRL's own `compute_loss` on a batch, and build the feedback from the log-probs that it computes.

TRL's loss is discarded; its metrics stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import trl
from torch import Tensor, nn
from trl import KTOTrainer

from prefloss.feedback import FIELDS, Feedback, Labels, Pairs, optional_fields
from prefloss.integrations.binding import replaced
from prefloss.logratios import IGNORE_INDEX, LogRatios
from prefloss.registry import Loss
from prefloss.training import checks
from prefloss.training.step import Router

_VALUES = frozenset(field.name for field in FIELDS if field.column)
_HOW = (
    ": set remove_unused_columns=False and trainer.data_collator = FeedbackCollator(trainer.data_collator), or remove "
    "the column"
)


class Captured(NamedTuple):
    """What a run of TRL's `compute_loss` gave.

    Attributes:
        returned: What it returned.
        feedback: `Pairs` or `Labels` with the log-ratios that it computed.
        router: Router loss of a mixture of experts, if the trainer adds it.
    """

    returned: Any
    feedback: Feedback
    router: Router | None


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


def capture(
    trainer: Any, loss: Loss, compute_loss: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]
) -> Captured:
    """Run TRL on a batch and read its log-probs.

    Args:
        trainer: A DPOTrainer or KTOTrainer.
        loss: The loss to train with.
        compute_loss: TRL's own `compute_loss` as a function of the batch.
        inputs: The batch.

    Raises:
        ValueError: If the batch holds a value that the loss does not read, or lacks one that it needs.
        RuntimeError: If TRL makes other forward passes than expected.
    """
    kind = kind_of(trainer)
    # TRL passes every unknown key to the model, so these must be removed.
    batch = {name: value for name, value in inputs.items() if name not in _VALUES}
    values = {name: value for name, value in inputs.items() if name in _VALUES}
    checks.check_fields(loss, kind, values, _HOW)
    _check_columns(loss, kind, getattr(trainer.train_dataset, "column_names", None) or (), values)
    with replaced(trainer, _settings(trainer, loss)), _recorded(trainer) as passes:
        returned = compute_loss(batch)
        named = assign(passes, _expected_passes(trainer, kind, batch))
    build = _labels if kind is Labels else _pairs
    aux_loss = named["policy"].aux_loss
    router = None
    if trainer.aux_loss_enabled and aux_loss is not None:
        router = Router(aux_loss, trainer.router_aux_loss_coef)
    return Captured(returned, build(trainer, batch, values, named), router)


def kind_of(trainer: Any) -> type:
    """The feedback that a trainer gives: `Labels` from KTOTrainer, else `Pairs`."""
    return Labels if isinstance(trainer, KTOTrainer) else Pairs


def assign(passes: list[Pass], expected: list[tuple[str, Tensor]]) -> dict[str, Pass]:
    """Name the passes after checking their labels.

    Args:
        passes: As recorded.
        expected: Name and labels of each pass in TRL's order.

    Raises:
        RuntimeError: If TRL made other passes than expected: a version that works differently.
    """
    if len(passes) != len(expected):
        names = [name for name, _ in expected]
        raise _unknown_order(f"{len(passes)} forward passes", f"{len(expected)}: {names}")
    for place, (actual, (name, labels)) in enumerate(zip(passes, expected, strict=True)):
        if actual.labels.shape != labels.shape or not torch.equal(actual.labels, labels):
            raise _unknown_order(f"other tokens in pass {place}", f"those of {name!r}")
    return {name: actual for actual, (name, _) in zip(passes, expected, strict=True)}


def masked_labels(inputs: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """The labels that TRL gives the model for a batch: completion tokens, the rest ignored, [rows, T]."""
    return inputs[f"{prefix}input_ids"].masked_fill(inputs[f"{prefix}completion_mask"] == 0, IGNORE_INDEX)


def log_ratios(policy: Pass, reference: Pass | Tensor) -> LogRatios:
    """Log-ratios of the rows of a pass, [rows], with per-token values where the reference has them.

    Args:
        policy: The pass.
        reference: The reference's pass, or its sums computed beforehand, [rows].
    """
    mask = policy.labels[:, 1:] != IGNORE_INDEX
    if isinstance(reference, Pass):
        ratios = LogRatios.from_token_logps(policy.log_probs, mask, reference.log_probs, keep_per_token=True)
        assert ratios.per_token is not None
        return replace(ratios, per_token=replace(ratios.per_token, log_sum_sq=policy.log_sum_sq))
    summed = LogRatios.from_token_logps(policy.log_probs, mask)
    return LogRatios(summed.policy, reference, summed.tokens)


def _check_columns(loss: Loss, kind: type, columns: Collection[str], arrived: Collection[str]) -> None:
    """Refuse a data set with a column that the loss reads and that TRL dropped on the way."""
    for field in optional_fields(kind):
        column = field.old_column if field.old_column in columns else field.column
        if column in columns and field.name not in arrived and checks.reads(loss, field):
            raise ValueError(
                f"column {column!r}: the data has it and {loss.name} reads it, but TRL drops it{_HOW}"
            )


def _settings(trainer: Any, loss: Loss) -> dict[str, Any]:
    """Attributes under which TRL computes what it computes besides the loss.

    Its reward metrics use our KL strength; it does not know our loss types; and it scores mismatched completions only
    for a loss that reads them.
    """
    settings: dict[str, Any] = {} if loss.beta is None else {"beta": loss.beta}
    if kind_of(trainer) is Labels:
        return {
            **settings,
            "loss_type": "kto",
            "calculate_KL": trainer.calculate_KL and loss.reads_mismatched,
        }
    return {**settings, "loss_types": ["sigmoid"], "loss_weights": [1.0]}


@contextmanager
def _recorded(trainer: Any) -> Iterator[list[Pass]]:
    """Collect the forward passes that `trainer` makes inside, in order."""
    passes: list[Pass] = []

    def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not kwargs.get("fused_lm_head"):
            return
        # Prompt-learning adapters prepend virtual tokens; the last columns are the real ones.
        width = kwargs["labels"].shape[1] - 1
        squares = output.log_sum_sq_probs
        squares = None if squares is None else squares[:, -width:]
        passes.append(Pass(kwargs["labels"], output.log_probs[:, -width:], output.aux_loss, squares))

    # On the unwrapped models, so that one hook sees every pass, through DDP, an engine or directly.
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    modules = {trainer.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models}
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _expected_passes(trainer: Any, kind: type, batch: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """TRL's order: policy, then reference unless it was computed beforehand; KTO's mismatched pass before each."""
    models = ["policy"] if trainer.precompute_ref_logps else ["policy", "reference"]
    labels = masked_labels(batch)
    if kind is Pairs or not trainer.calculate_KL:
        return [(name, labels) for name in models]
    mismatched = masked_labels(batch, "KL_")
    return [entry for name in models for entry in ((f"mismatched {name}", mismatched), (name, labels))]


def _pairs(
    trainer: Any, batch: Mapping[str, Any], values: Mapping[str, Any], passes: Mapping[str, Pass]
) -> Pairs:
    reference: Pass | Tensor
    if trainer.precompute_ref_logps:
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        reference = passes["reference"]
    both = log_ratios(passes["policy"], reference)
    half = len(both) // 2
    return Pairs(chosen=both[:half], rejected=both[half:], **values)


def _labels(
    trainer: Any, batch: Mapping[str, Any], values: Mapping[str, Any], passes: Mapping[str, Pass]
) -> Labels:
    def against_reference(policy: str, reference: str, precomputed: str) -> LogRatios:
        return log_ratios(
            passes[policy], batch[precomputed] if trainer.precompute_ref_logps else passes[reference]
        )

    mismatched = None
    if "mismatched policy" in passes:
        mismatched = against_reference("mismatched policy", "mismatched reference", "ref_KL_logps").detach()
    return Labels(
        completions=against_reference("policy", "reference", "ref_logps"),
        desirable=batch["label"].bool(),
        mismatched=mismatched,
        **values,
    )


def _unknown_order(got: str, expected: str) -> RuntimeError:
    return RuntimeError(
        f"TRL {trl.__version__}: got {got}, expected {expected}; this version computes its loss in a way that prefloss "
        "does not know. Please report it, with the versions of both."
    )
