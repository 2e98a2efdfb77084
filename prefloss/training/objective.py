"""A loss on the batches of a `PreferenceCollator`: forward passes, reference, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.arguments import flag, function, instance, integer
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.training import checks, step_zero
from prefloss.training.batch import COUNTS, PreferenceBatch, Rows
from prefloss.training.forward import unwrapped
from prefloss.training.head import text_config
from prefloss.training.reference import Reference
from prefloss.training.score import batch_logps
from prefloss.training.step import FeedbackObjective, Router, sum_counts


class Result(NamedTuple):
    """The loss of a batch.

    Attributes:
        loss: The scalar to differentiate.
        outputs: The loss, and each completion's log-prob under policy (`logps`) and reference (`ref_logps`), by
            example.
    """

    loss: Tensor
    outputs: dict[str, Tensor]


class PreferenceObjective(FeedbackObjective):
    """A loss on the batches of a `PreferenceCollator`, for training loops of your own.

    Called with a model and a batch, it gives the loss to differentiate. If `count` was called with all micro-batches
    of an optimizer step, their losses add up to the mean over all examples of the step that the loss counts, on all
    processes; gradients are taken to be averaged over the processes, as DDP and FSDP do. Without `count`, every batch
    is an optimizer step.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        reference: A `Reference`, or a separate model (`Reference.model`). None only for a loss that needs none.
        check_step_zero: Stop if policy and reference differ at the first training batch. Pass False if they need not
            agree: the policy was trained further than its reference, or the reference is another model.
        autocast: Makes the context that a reference model computes in, such as `accelerator.autocast`, where the
            policy's own forward sets it up itself.
        **options: `rankings_as`, `diagnose` and hyperparameters of the loss, as for `FeedbackObjective`.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.

    Example:
        >>> PreferenceObjective("dpo", beta=0.2, reference=Reference.adapter_off())
        PreferenceObjective(dpo(beta=0.2), reference=Reference.adapter_off())
    """

    def __init__(
        self,
        loss: str | Loss,
        *,
        reference: Any = None,
        check_step_zero: bool = True,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> None:
        super().__init__(loss, **checks.current_options(options))
        self.reference = Reference.of(reference)
        checks.check_computable(self.loss)
        checks.check_reference(self.loss, self.reference)
        self.check_step_zero = flag("check_step_zero", check_step_zero)
        self.autocast = function("autocast", autocast, "a function that makes a context")
        # Whether the policy is still at its start, where it must agree with the reference.
        self.fresh = check_step_zero
        self._policy: nn.Module | None = None

    def count(self, batches: Sequence[dict[str, Any]], *, over_processes: bool = True) -> None:
        """Write the counts of an optimizer step into its micro-batches, before the first of them is used.

        Every process must call this at every step.

        Args:
            batches: The micro-batches of this process; each gets the item `prefloss_counts`.
            over_processes: False where processes cannot communicate yet, as in a data loader; sum `prefloss_counts`
                over the processes before a batch is used.

        Raises:
            ValueError: If there are none, or one was not made by a `PreferenceCollator`.
        """
        if not isinstance(batches, list | tuple):
            raise TypeError(f"batches: got {type(batches).__name__}, expected the micro-batches in a list")
        if not batches:
            raise ValueError("batches: got none, expected the micro-batches of an optimizer step")
        counts = [self.counts(PreferenceBatch.of(batch).blank()) for batch in batches]
        total = sum_counts(counts, over_processes=over_processes)
        for batch in batches:
            batch[COUNTS] = total

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, examples: int | None = None) -> Result:
        """The loss of a batch.

        Args:
            model: The policy, wrapped as it is trained. The state of the loss changes only in training mode.
            batch: From a `PreferenceCollator`, on the model's device.
            examples: Number of the batch's examples that count, where a distributed sampler filled up the last batch;
                None for all.

        Raises:
            ValueError: If the batch lacks something that the loss needs, or has something that it does not read.
            TypeError: If the feedback does not give what the loss takes.
            RuntimeError: If policy and reference should agree and do not.
            FloatingPointError: If the loss of an example, or its gradient, is not finite.
        """
        self.bind(model)
        batch = PreferenceBatch.of(batch)
        if examples is not None and integer("examples", examples, 0) > batch.examples:
            raise ValueError(f"examples: got {examples}, expected at most the batch's {batch.examples}")
        checks.check_batch(self.loss, batch, self.reference)
        mismatched = self._mismatched(model, batch)
        # The reference first: switching adapters must not come between the policy's forward and backward.
        reference_logps = self.reference.logps(model, batch, self.autocast)
        logps, aux_loss = batch_logps(model, batch.rows)
        ratios = self._log_ratios(batch.rows, logps, reference_logps)
        if self.fresh and model.training and reference_logps is not None:
            self.fresh = not self._check_start(batch, ratios, mismatched, logps, reference_logps)
        total = self.share(
            batch.feedback(ratios, mismatched, examples=examples),
            training=model.training,
            step_counts=batch.get(COUNTS),
            whole_step=model.training,
            router=_router(model, aux_loss),
        )
        outputs = {"loss": total, "logps": batch.per_example(ratios.policy.detach())}
        if ratios.reference is not None:
            outputs["ref_logps"] = batch.per_example(ratios.reference)
        return Result(total, outputs)

    def step(self) -> None:
        """Call after each optimizer step: moves the loss's schedules on."""
        super().step()
        self.fresh = False

    def bind(self, model: nn.Module) -> None:
        """Check the reference against the policy and freeze it; the first call does it.

        Raises:
            ValueError: If it shares trainable weights with the policy, or is an adapter that is absent or in use.
            TypeError: If it names adapters and the policy has none.
        """
        instance("model", model, nn.Module, "the policy: a causal language model of transformers")
        policy = unwrapped(model)
        if policy is not self._policy:
            self.reference.bind(policy)
            self._policy = policy

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the policy has left its reference, so step 0 is not checked."""
        super().load_state_dict(state)
        self.fresh = False

    def _log_ratios(self, rows: Rows, logps: Tensor, reference: Tensor | None) -> LogRatios:
        mask = rows.targets >= 0
        if reference is None or reference.ndim == 2:
            keep = any(name.startswith("per_token") for name in self.loss.needs | self.loss.spec.reads)
            return LogRatios.from_token_logps(logps, mask, reference, keep_per_token=keep)
        summed = LogRatios.from_token_logps(logps, mask)
        return LogRatios(summed.policy, reference, summed.tokens)

    def _mismatched(self, model: nn.Module, batch: PreferenceBatch) -> LogRatios | None:
        """Log-ratios of the mismatched rows, without gradient; None if the batch has none."""
        rows = batch.mismatched
        if rows is None:
            return None
        with torch.no_grad():
            reference = self.reference.computed_logps(model, rows, self.autocast)
            return LogRatios.from_token_logps(batch_logps(model, rows).logps, rows.targets >= 0, reference)

    def _check_start(
        self,
        batch: PreferenceBatch,
        ratios: LogRatios,
        mismatched: LogRatios | None,
        logps: Tensor,
        reference_logps: Tensor,
    ) -> bool:
        """Run the step-0 check; whether the batch allowed a verdict."""
        with self.autocast():
            half = torch.is_autocast_enabled(logps.device.type)
        policy = self._policy
        assert policy is not None
        return step_zero.check(
            step_zero.Start(policy, half, self.loss, self.reference),
            step_zero.distance(logps, reference_logps, batch.rows.targets >= 0),
            lambda at_zero: self._converted(
                batch.feedback(
                    step_zero.at_zero(ratios) if at_zero else ratios.detach(),
                    step_zero.at_zero(mismatched) if at_zero and mismatched is not None else mismatched,
                )
            ),
        )

    def __repr__(self) -> str:
        """Loss and reference."""
        return f"{type(self).__name__}({self.loss!r}, reference={self.reference!r})"


def router_weight(policy: nn.Module) -> float:
    """Weight of the router loss of a mixture of experts; 0 for other models."""
    return float(getattr(text_config(policy), "router_aux_loss_coef", None) or 0.0)


def _router(model: nn.Module, aux_loss: Tensor | None) -> Router | None:
    weight = router_weight(unwrapped(model))
    return Router(aux_loss, weight) if aux_loss is not None and weight else None
