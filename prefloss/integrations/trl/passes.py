"""The forward passes that a TRL trainer makes for one batch, named after their tokens were checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import trl
from torch import Tensor

from prefloss.integrations.trl.versions import KTOTrainer
from prefloss.logratios import IGNORE_INDEX, LogRatios


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        labels: Token ids of completion tokens, `IGNORE_INDEX` elsewhere, [rows, T].
        log_probs: Log-probs of `labels[:, 1:]`, [rows, T - 1], nats; not read where ignored.
        aux_loss: Router loss of a mixture of experts, a scalar, or None.
        log_sum_sq: Log of the sum of squared probabilities at each of those positions, if known.
    """

    labels: Tensor
    log_probs: Tensor
    aux_loss: Tensor | None
    log_sum_sq: Tensor | None


class Passes:
    """The passes of one batch, in the order in which the trainer made them.

    Args:
        trainer: A DPOTrainer or KTOTrainer.
        batch: The batch, as TRL's collator made it.

    Attributes:
        found: What a seam recorded.
    """

    def __init__(self, trainer: Any, batch: Mapping[str, Any]) -> None:
        self.found: list[Pass] = []
        self._trainer = trainer
        self._batch = batch

    def expected(self) -> list[tuple[str, Tensor]]:
        """Name and labels of each pass in TRL's order: policy, then reference unless it was computed beforehand.

        KTO's pass over the mismatched completions comes before each of them.
        """
        models = ["policy", "reference"]
        if precomputed(self._trainer, self._batch) is not None:
            models = ["policy"]
        labels = masked_labels(self._trainer, self._batch)
        if not scores_mismatched(self._trainer):
            return [(name, labels) for name in models]
        mismatched = masked_labels(self._trainer, self._batch, "KL_")
        return [entry for name in models for entry in ((f"mismatched {name}", mismatched), (name, labels))]

    def log_ratios(self) -> dict[str, LogRatios]:
        """Log-ratios of the batch's rows as `completions`, and KTO's as `mismatched`, [rows] each.

        Raises:
            RuntimeError: If TRL made other passes than expected: a version that works differently.
        """
        passes = assign(self.found, self.expected())
        pairs = {"completions": ("policy", "reference")}
        if "mismatched policy" in passes:
            pairs["mismatched"] = ("mismatched policy", "mismatched reference")
        return {
            name: log_ratios(
                passes[policy], passes.get(reference, precomputed(self._trainer, self._batch, name))
            )
            for name, (policy, reference) in pairs.items()
        }

    def aux_loss(self) -> Tensor | None:
        """Router loss of the policy's pass over the batch, a scalar, if the model has one."""
        return self.found[1 if scores_mismatched(self._trainer) else 0].aux_loss


def scores_mismatched(trainer: Any) -> bool:
    """Whether the trainer makes passes over KTO's mismatched completions."""
    return isinstance(trainer, KTOTrainer) and trainer.calculate_KL


def precomputed(trainer: Any, batch: Mapping[str, Any], of: str = "completions") -> Any:
    """Reference sums that the trainer computed beforehand, of the batch's rows or of its mismatched ones, [rows].

    None if it computes them in the step. Up to TRL 1.5, KTO calls them `reference_logps`.
    """
    if not getattr(trainer, "precompute_ref_logps", True):
        return None
    if "ref_chosen_logps" in batch:
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    infix = "KL_" if of == "mismatched" else ""
    return batch.get(f"ref_{infix}logps", batch.get(f"reference_{infix}logps"))


def masked_labels(trainer: Any, batch: Mapping[str, Any], prefix: str = "") -> Tensor:
    """Token ids of the completions that a trainer scores, the rest ignored, [rows, T].

    TRL's names changed: KTO has `completion_labels` up to 1.5 and `completion_input_ids` up to 1.7.

    Args:
        trainer: The trainer; DPOTrainer 0.29 truncates the batch itself.
        batch: The batch.
        prefix: `KL_` for KTO's mismatched completions.
    """
    if f"{prefix}completion_labels" in batch:
        return batch[f"{prefix}completion_labels"]
    inside = "" if f"{prefix}input_ids" in batch else "completion_"
    ids, mask = batch[f"{prefix}{inside}input_ids"], batch[f"{prefix}completion_mask"]
    if hasattr(trainer, "_truncate_inputs"):
        ids, _, mask = trainer._truncate_inputs(ids, batch["attention_mask"], mask)
    return ids.masked_fill(mask == 0, IGNORE_INDEX)


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
        raise unknown_order(f"{len(passes)} forward passes", f"{len(expected)}: {names}")
    for place, (actual, (name, labels)) in enumerate(zip(passes, expected, strict=True)):
        if actual.labels.shape != labels.shape or not torch.equal(actual.labels[:, 1:], labels[:, 1:]):
            raise unknown_order(f"other tokens in pass {place}", f"those of {name!r}")
    return {name: actual for actual, (name, _) in zip(passes, expected, strict=True)}


def log_ratios(policy: Pass, reference: Pass | Tensor | None) -> LogRatios:
    """Log-ratios of the rows of a pass, [rows], with per-token values where the reference has them.

    Args:
        policy: The pass.
        reference: The reference's pass, or its sums computed beforehand, [rows]; None where the loss needs none.
    """
    mask = policy.labels[:, 1:] != IGNORE_INDEX
    if isinstance(reference, Pass):
        ratios = LogRatios.from_token_logps(policy.log_probs, mask, reference.log_probs, keep_per_token=True)
        assert ratios.per_token is not None
        return replace(ratios, per_token=replace(ratios.per_token, log_sum_sq=policy.log_sum_sq))
    summed = LogRatios.from_token_logps(policy.log_probs, mask)
    return LogRatios(summed.policy, reference, summed.tokens)


def models_of(trainer: Any) -> set[Any]:
    """Policy and reference, unwrapped: a hook on them sees every pass, through DDP, an engine or directly."""
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    return {trainer.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models}


@contextmanager
def hooked(trainer: Any, hook: Any) -> Iterator[None]:
    """Call `hook(module, args, kwargs, output)` after each pass that the trainer makes inside."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in models_of(trainer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unknown_order(got: str, expected: str) -> RuntimeError:
    """The error about a TRL that computes its loss in another way than its seam knows."""
    return RuntimeError(
        f"TRL {trl.__version__}: got {got}, expected {expected}; this version computes its loss in a way that prefloss "
        "does not know. Please report it, with the versions of both."
    )
