"""One loss computation: TRL runs, its log-probs are read, and the prefloss loss takes the place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import KTOTrainer

from prefloss import metrics
from prefloss.diagnosis import Diagnosis
from prefloss.diagnosis.finite import check_finite
from prefloss.feedback import Labels, Pairs
from prefloss.integrations.trl import _guard, _metrics, _options
from prefloss.integrations.trl._collate import ITEMS
from prefloss.integrations.trl._record import Pass, assign, log_ratios, masked_labels, recorded
from prefloss.integrations.trl._replaced import replaced
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.training import across, distributed
from prefloss.training.across import share


def compute_loss(
    trainer: Any,
    loss: Loss,
    own: Callable[[Mapping[str, Any]], Any],
    inputs: Mapping[str, Any],
    diagnosis: Diagnosis | None = None,
) -> tuple[Tensor, Any]:
    """The loss of a batch, and whatever TRL's own `compute_loss` returned for it. Logs prefloss's metrics.

    Args:
        trainer: A DPOTrainer or KTOTrainer.
        loss: The loss to train with.
        own: TRL's own `compute_loss` as a function of the batch.
        inputs: The batch.
        diagnosis: What watches training batches, or None.

    Raises:
        ValueError: If the batch carries an item that the loss does not read.
        FloatingPointError: If the loss of an example is not finite, or its gradient.
        RuntimeError: If TRL computes its loss in an order that prefloss does not know.
    """
    kind = _kind(trainer)
    items = {name: inputs[name] for name in ITEMS if name in inputs}
    _guard.check_items(loss, kind, items)
    _guard.check_columns(loss, kind, getattr(trainer.train_dataset, "column_names", None) or (), items)
    # TRL hands the model everything it does not know, so these must not reach it.
    batch = {name: value for name, value in inputs.items() if name not in items}
    with _as_trl_expects(trainer, loss), recorded(trainer) as found:
        returned = own(batch)
        passes = assign(found, _expected_passes(trainer, kind, batch))
    feedback = (
        _labels(trainer, batch, items, passes) if kind is Labels else _pairs(trainer, batch, items, passes)
    )
    wanted = (
        feedback.to_labels() if isinstance(feedback, Pairs) and loss.spec.feedback is Labels else feedback
    )
    training = trainer.model.training
    seen = across.evaluate(loss, wanted, training)
    check_finite(loss, seen.evaluated.terms, seen.feedback)
    figures = dict(metrics.metrics(feedback, beta=loss.beta or 1.0))
    if diagnosis is not None and training:
        figures |= diagnosis.figures(feedback, seen.feedback, seen.evaluated, copies=seen.copies)
    _metrics.log_diagnostics(trainer, figures, diagnosis)
    _metrics.log_terms(trainer, seen.evaluated.means, seen.counted)
    # TRL logs and averages over processes what is returned, so each gives its share of the mean over all.
    total = share(loss, seen, distributed.all_sum(seen.own))
    router_loss = passes["policy"].aux_loss
    if trainer.aux_loss_enabled and router_loss is not None:
        total = total + trainer.router_aux_loss_coef * router_loss
    return total, returned


def _kind(trainer: Any) -> type:
    return Labels if isinstance(trainer, KTOTrainer) else Pairs


@contextmanager
def _as_trl_expects(trainer: Any, loss: Loss) -> Iterator[None]:
    """Settings under which TRL computes what it computes beside the loss; its own loss is then discarded.

    Its reward metrics use our KL strength; a loss type that it does not know would stop it; and mismatched
    completions are scored only for a loss that reads them.
    """
    settings: dict[str, Any] = {} if loss.beta is None else {"beta": loss.beta}
    if _kind(trainer) is Labels:
        settings["loss_type"] = "kto"
        settings["calculate_KL"] = trainer.calculate_KL and _options.wants_mismatched(loss)
    else:
        settings |= {"loss_types": ["sigmoid"], "loss_weights": [1.0]}
    with replaced(trainer, settings):
        yield


def _expected_passes(trainer: Any, kind: type, batch: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """TRL's order: policy, then reference unless it was computed beforehand; KTO's mismatched pass before each."""
    models = ["policy"] if trainer.precompute_ref_logps else ["policy", "reference"]
    labels = masked_labels(batch)
    if kind is Pairs or not trainer.calculate_KL:
        return [(name, labels) for name in models]
    mismatched = masked_labels(batch, "KL_")
    return [entry for name in models for entry in ((f"mismatched {name}", mismatched), (name, labels))]


def _pairs(
    trainer: Any, batch: Mapping[str, Any], items: Mapping[str, Any], passes: Mapping[str, Pass]
) -> Pairs:
    reference: Pass | Tensor
    if trainer.precompute_ref_logps:
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        reference = passes["reference"]
    both = log_ratios(passes["policy"], reference)
    half = len(both) // 2
    return Pairs(chosen=both[:half], rejected=both[half:], **items)


def _labels(
    trainer: Any, batch: Mapping[str, Any], items: Mapping[str, Any], passes: Mapping[str, Pass]
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
        **items,
    )
