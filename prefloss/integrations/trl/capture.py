"""Run a trainer's own loss on a batch, and build the feedback from the log-probs that it computes.

Its loss is discarded; its metrics stay. The log-probs come from the trainer's seam (`seams.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from prefloss.feedback import FIELDS, Feedback, Labels, Pairs, optional_fields
from prefloss.integrations.binding import replaced
from prefloss.integrations.trl.passes import Passes
from prefloss.integrations.trl.seams import recorder_of
from prefloss.integrations.trl.versions import KTOTrainer
from prefloss.registry import Loss
from prefloss.training import checks
from prefloss.training.step import Router

_VALUES = frozenset(field.name for field in FIELDS if field.column)
_HOW = (
    ": set remove_unused_columns=False and trainer.data_collator = FeedbackCollator(trainer.data_collator), or remove "
    "the column"
)


class Captured(NamedTuple):
    """What a run of the trainer's own loss gave.

    Attributes:
        returned: What it returned.
        feedback: `Pairs` or `Labels` with the log-ratios that it computed.
        router: Router loss of a mixture of experts, if the trainer adds it.
    """

    returned: Any
    feedback: Feedback
    router: Router | None


def capture(
    trainer: Any, loss: Loss, compute_loss: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]
) -> Captured:
    """Run the trainer on a batch and read its log-probs.

    Args:
        trainer: A DPOTrainer or KTOTrainer.
        loss: The loss to train with.
        compute_loss: The trainer's own `compute_loss` as a function of the batch.
        inputs: The batch.

    Raises:
        ValueError: If the batch holds a value that the loss does not read, or lacks one that it needs.
        RuntimeError: If the trainer makes other forward passes than expected, or has no known seam.
    """
    kind = kind_of(trainer)
    # TRL passes every unknown key to the model, so these must be removed.
    batch = {name: value for name, value in inputs.items() if name not in _VALUES}
    values = {name: value for name, value in inputs.items() if name in _VALUES}
    checks.check_fields(loss, kind, values, _HOW)
    _check_columns(loss, kind, getattr(trainer.train_dataset, "column_names", None) or (), values)
    recorded = recorder_of(type(trainer))
    with replaced(trainer, loss_settings(trainer, loss)), recorded(trainer, batch) as passes:
        returned = compute_loss(batch)
        build = _labels if kind is Labels else _pairs
        return Captured(returned, build(batch, values, passes), _router(trainer, passes))


def kind_of(trainer: Any) -> type:
    """The feedback that a trainer gives: `Labels` from KTOTrainer, else `Pairs`."""
    return Labels if isinstance(trainer, KTOTrainer) else Pairs


def loss_settings(trainer: Any, loss: Loss) -> dict[str, Any]:
    """Attributes under which a trainer computes what it computes besides the loss.

    Its reward metrics use our KL strength; it does not know our loss types; DPOTrainer up to TRL 0.28 divides the
    log-probs by the length for "ipo"; and it scores mismatched completions only for a loss that reads them.
    """
    settings: dict[str, Any] = {} if loss.beta is None else {"beta": loss.beta}
    if kind_of(trainer) is Labels:
        reads = trainer.calculate_KL and loss.reads_mismatched
        return {**settings, "loss_type": "kto", "calculate_KL": reads}
    if hasattr(trainer, "loss_types"):
        return {**settings, "loss_types": ["sigmoid"], "loss_weights": [1.0]}
    one = isinstance(trainer.loss_type, str)
    weights = {"loss_weights": None} if hasattr(trainer, "loss_weights") else {}
    return {**settings, **weights, "loss_type": "sigmoid" if one else ["sigmoid"]}


def _router(trainer: Any, passes: Passes) -> Router | None:
    aux_loss = passes.aux_loss()
    if aux_loss is None or not getattr(trainer, "aux_loss_enabled", False):
        return None
    # Up to TRL 1.8 without "router_".
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return Router(aux_loss, next(getattr(trainer, name) for name in names if hasattr(trainer, name)))


def _check_columns(loss: Loss, kind: type, columns: Collection[str], arrived: Collection[str]) -> None:
    """Refuse a data set with a column that the loss reads and that TRL dropped on the way."""
    for field in optional_fields(kind):
        column = field.old_column if field.old_column in columns else field.column
        if column in columns and field.name not in arrived and checks.reads(loss, field):
            raise ValueError(
                f"column {column!r}: the data has it and {loss.name} reads it, but TRL drops it{_HOW}"
            )


def _pairs(batch: Mapping[str, Any], values: Mapping[str, Any], passes: Passes) -> Pairs:
    both = passes.log_ratios()["completions"]
    half = len(both) // 2
    return Pairs(chosen=both[:half], rejected=both[half:], **values)


def _labels(batch: Mapping[str, Any], values: Mapping[str, Any], passes: Passes) -> Labels:
    ratios = passes.log_ratios()
    completions, mismatched = ratios["completions"], ratios.get("mismatched")
    return Labels(
        completions=completions,
        # A list in older versions.
        desirable=torch.as_tensor(batch["label"], device=completions.policy.device).bool(),
        mismatched=None if mismatched is None else mismatched.detach(),
        **values,
    )
