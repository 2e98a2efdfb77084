"""A loss in trainers built on TRL's former ones, which score completions themselves: LLaMA-Factory and ms-swift.

Such a trainer runs policy and reference, and calls a method with the sums of their log-probs. A subclass with
`LossSlot` records the log-probs of the tokens where the trainer computes them, and answers that method. All else stays
the trainer's: forward passes, reference, adapters, terms that it adds to the loss, metrics, saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs
from prefloss.integrations.binding import LossCallback, attached, evaluation_prefix
from prefloss.integrations.inherited import Host
from prefloss.logratios import LogRatios
from prefloss.registry import Loss
from prefloss.training import FeedbackObjective


class Pass(NamedTuple):
    """One forward pass: log-probs of completion tokens, [rows, T], nats, and where they stand, [rows, T]."""

    log_probs: Tensor
    mask: Tensor


class SlotCallback(LossCallback):
    """The loss of a trainer with a `LossSlot`: its state in checkpoints, its schedules, its metrics.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        diagnose: As for `FeedbackObjective`.
    """

    compute_loss_of = "its parent's"

    def __init__(self, loss: str | Loss, *, diagnose: Any = True) -> None:
        super().__init__(FeedbackObjective(loss, diagnose=diagnose))

    def resolve(self, host: Host, options: Any) -> Loss:
        """The loss, from now on with the trainer's options; raises as `Host.resolve` does."""
        self.objective.replace_loss(host.resolve(self.loss, options))
        return self.loss

    def mean_loss(self, feedback: Feedback, *, training: bool) -> Tensor:
        """The mean loss of a batch on all processes, a scalar."""
        self._used = True
        return self.objective.share(feedback, training=training)

    def rewards(self, ratios: LogRatios) -> Tensor:
        """Implied rewards beta * h, without gradient; beta * log-prob without a reference."""
        value = ratios.policy if ratios.reference is None else ratios.h
        return (1.0 if self.loss.beta is None else self.loss.beta) * value.detach()

    def add_metrics(self, logs: dict[str, float], *, training: bool) -> None:
        """Add our metrics to what the trainer logs; its own values, `loss` among them, stay."""
        if training and "loss" not in logs:
            return
        prefix = "" if training else f"{evaluation_prefix(logs) or 'eval'}_"
        for name, value in self.objective.metrics(training=training).items():
            logs.setdefault(f"{prefix}{name}", value)

    def _settings(self) -> dict[str, Any]:
        return {"loss": repr(self.loss), **super()._settings()}

    def _check_args(self, args: Any) -> None:
        """Nothing: the loss options of these trainers stand elsewhere; `resolve` reads them."""

    def __repr__(self) -> str:
        """The callback with its loss."""
        return f"SlotCallback({self.loss!r})"


class LossSlot:
    """Mixin before a trainer whose `get_batch_loss_metrics` scores a batch and calls a loss method.

    A subclass answers that method with `pair_losses` or `label_losses`, adds each forward pass of the batch to
    `passes`, and names them in `pass_names`. `batch` is the batch that is scored.
    """

    model: Any
    passes: list[Pass]
    batch: Any

    def recording(self) -> AbstractContextManager[None]:
        """A context for a batch, in which forward passes are recorded."""
        return nullcontext()

    def pass_names(self) -> Sequence[str]:
        """The trainer's forward passes of a batch, in order: of "policy", "reference", "kl_policy", "kl_reference"."""
        raise NotImplementedError

    @property
    def prefloss(self) -> SlotCallback:
        """The callback with the loss in training."""
        return attached(self, SlotCallback)

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own."""
        self.passes, self.batch = [], batch
        try:
            with self.recording():
                return super().get_batch_loss_metrics(model, batch, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.passes, self.batch = [], None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with our metrics."""
        self.prefloss.add_metrics(logs, training=self.model.training)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def pair_losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen rewards and rejected rewards of the batch, [pairs] each; chosen rows stand first."""
        ratios = self._log_ratios("")
        half = len(ratios) // 2
        losses = self._losses(Pairs(chosen=ratios[:half], rejected=ratios[half:]), half)
        rewards = self.prefloss.rewards(ratios)
        return losses, rewards[:half], rewards[half:]

    def label_losses(self, desirable: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses [examples], rewards of the desirable and of the undesirable, and TRL's KL estimate, nats.

        Args:
            desirable: Which completions are upvoted, [examples], bool.
        """
        ratios, mismatched = self._log_ratios(""), None
        if self.prefloss.loss.reads_mismatched:
            mismatched = self._log_ratios("kl_").detach()
        losses = self._losses(
            Labels(ratios, desirable.to(ratios.policy.device), mismatched=mismatched), len(ratios)
        )
        rewards = self.prefloss.rewards(ratios)
        kl = rewards.new_zeros(()) if mismatched is None else mismatched.h.mean().clamp(min=0)
        return losses, rewards[desirable], rewards[~desirable], kl

    def _losses(self, feedback: Feedback, count: int) -> Tensor:
        """The mean loss, once for each example: the trainer takes the mean and may add terms of its own."""
        return self.prefloss.mean_loss(feedback, training=self.model.training).repeat(count)

    def _log_ratios(self, prefix: str) -> LogRatios:
        """Log-ratios of the policy's pass with that prefix against the reference's, if the trainer makes one."""
        names = self.pass_names()
        if len(names) != len(self.passes):
            raise RuntimeError(f"got {len(self.passes)} forward passes, expected {len(names)}: {list(names)}")
        passes = dict(zip(names, self.passes, strict=True))
        policy, reference = passes[f"{prefix}policy"], passes.get(f"{prefix}reference")
        if reference is not None and not torch.equal(policy.mask, reference.mask):
            raise RuntimeError(
                "got other completion tokens in the reference's forward pass than in the policy's"
            )
        against = None if reference is None else reference.log_probs
        return LogRatios.from_token_logps(policy.log_probs, policy.mask, against, keep_per_token=True)
