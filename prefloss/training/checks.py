"""Refusals: settings that would go unused, data that the loss does not read."""

from __future__ import annotations

from typing import Any

from prefloss.feedback import Labels, Pairs, Rankings
from prefloss.registry import Loss
from prefloss.training.batch import REFERENCE, Structure, terms_of

_FED = {
    Pairs: {"tokens", "scores", "per_token"},
    Labels: {"tokens", "scores", "per_token", "kl", "baseline"},
    Rankings: {"tokens", "scores", "per_token"},
}
_READS = {
    "score_chosen": "scores",
    "score_rejected": "scores",
    "scores": "scores",
    "kl": "kl",
    "baseline": "baseline",
}


def check_fed(loss: Loss) -> None:
    """Refuse a loss that needs what a forward pass and a data set do not give.

    Raises:
        ValueError: If there is such a need.
    """
    for _, term in terms_of(loss):
        for need in sorted(term.needs - _FED[term.spec.feedback]):
            raise ValueError(
                f"{term.name}: needs {need}, which PreferenceLossCallback does not compute; use a loop of your own"
            )


def check_args(args: Any) -> None:
    """Refuse training arguments that belong to another trainer, or that the loss would go around.

    Raises:
        TypeError: If they are those of a TRL trainer.
        ValueError: If they smooth labels, or spread one process over several devices.
    """
    if any(kind.__module__.split(".")[0] == "trl" for kind in type(args).__mro__):
        raise TypeError(
            f"args: got {type(args).__name__}, the configuration of a TRL trainer, which makes its own batches; use "
            "PreferenceLossCallback of prefloss.integrations.trl there"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor}, expected 0: it smooths the next token; "
            "preferences are smoothed by the loss's own label_smoothing"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: got {args.n_gpu} devices in one process (DataParallel), expected one; start with torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )


def check_trainer(trainer: Any) -> None:
    """Refuse a second loss.

    Raises:
        ValueError: If the trainer has a `compute_loss_func`.
    """
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: got one beside PreferenceLossCallback, expected None: it would go unused"
        )


def check_items(loss: Loss, structure: Structure, cached: bool) -> None:
    """Refuse columns that the loss does not read, and a batch without the scores that it needs.

    Args:
        loss: The loss to train with.
        structure: Of the batch.
        cached: Whether the reference's log-probs come with the batch.

    Raises:
        ValueError: If a column is not read, or scores are missing.
    """
    items, read = structure.items, loss.needs | loss.spec.reads
    if loss.spec.feedback is Rankings:
        read |= {"scores"}
    for item, need in _READS.items():
        is_graded = structure.kind is Rankings and item == "scores"
        if item in items and need not in read and not is_graded:
            column = "score" if item == "scores" else item
            raise ValueError(
                f"column {column!r}: {loss.name} does not read it; take it out of the data, or choose a loss that does"
            )
    if structure.mismatched is not None and not any(
        "mismatched" in term.spec.reads and term.params.get("kl_baseline") in ("auto", "mismatched")
        for _, term in terms_of(loss)
    ):
        raise ValueError(
            f"mismatched: {loss!r} does not read mismatched completions; expected PreferenceCollator(mismatched=False)"
        )
    if REFERENCE in items and not cached:
        raise ValueError(
            "columns ref_*logps: got reference log-probs with the data, but the reference is computed; choose "
            "reference=Reference.cached(), or take the columns out"
        )
    for need in ("scores", "kl", "baseline"):
        given = "score_chosen" if structure.kind is Pairs and need == "scores" else need
        if need in loss.needs and given not in items:
            wanted = {"score_chosen": "score_chosen and score_rejected", "scores": "score"}.get(given, given)
            raise ValueError(f"{loss.name}: got data without {need}, expected the column {wanted}")
