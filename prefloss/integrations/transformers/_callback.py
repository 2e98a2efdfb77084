"""The callback: the user's handle on the loss in `transformers.Trainer`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.utils import logging

from prefloss.integrations.transformers import _batch, _binding, _guard, _metrics, _step
from prefloss.integrations.transformers._reference import CHOICES, Reference
from prefloss.losses import Loss, get

logger = logging.get_logger(__name__)


class PreferenceLossCallback(TrainerCallback, ExportableState):
    """Train `transformers.Trainer` with a prefloss loss, on any feedback.

    Give the trainer `data_collator=PreferenceCollator(tokenizer)` and `remove_unused_columns=False`. Pairs become
    labels for a labelled loss, and groups of two for a listwise one; rankings become pairs as `pairs` says. One
    callback serves one trainer. In TRL's trainers use the callback of `prefloss.integrations.trl`.

    With gradient accumulation and several processes, an optimizer step minimises the mean over all examples of the step
    that the loss counts, however they fall into micro-batches. A loss that looks across its batch (`spec.separable` is
    False, such as `aot`) looks across one micro-batch.

    `Trainer.evaluate` gives the loss and TRL's metrics (`eval_rewards/accuracies` and others) as means over the whole
    evaluation; `Trainer.predict` gives each completion's log-prob under policy and reference, nats.

    Args:
        loss: Name of a registered loss, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a `Loss`.
        reference: A `Reference`, or a model of its own (`Reference.model`). None only for a loss that needs none.
        check_step_zero: Stop if policy and reference differ at the first batch of a fresh training. False where they
            need not coincide: a policy trained further than its reference, a reference that is another model.
        pairs: How rankings become pairs for a pair loss: "all", "adjacent" or "best_worst".
        **hyperparameters: Of the loss, if given by name.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.

    Example:
        >>> PreferenceLossCallback("dpo", beta=0.2, reference=Reference.adapter_off())
        PreferenceLossCallback(dpo(beta=0.2), reference=Reference.adapter_off())
    """

    def __init__(
        self,
        loss: str | Loss,
        *,
        reference: Any = None,
        check_step_zero: bool = True,
        pairs: str | None = None,
        **hyperparameters: Any,
    ) -> None:
        if isinstance(loss, Loss) and hyperparameters:
            raise TypeError(
                f"hyperparameters: got {sorted(hyperparameters)} with a Loss, wanted them in the Loss"
            )
        self._loss = loss if isinstance(loss, Loss) else get(loss, **hyperparameters)
        self._reference = Reference.of(reference)
        _batch.check_pairs(pairs)
        _guard.check_fed(self._loss)
        _check_reference(self._loss, self._reference)
        self._pairs = pairs
        self._check_step_zero = check_step_zero
        self._args: Any = None
        self._bound = self._used = False
        self._fresh = False
        self._training, self._evaluation = _metrics.Totals(), _metrics.Totals()
        self._all_sum: Any = None
        self._router = 0.0
        _binding.install(PreferenceLossCallback)

    @property
    def loss(self) -> Loss:
        """The loss."""
        return self._loss

    @property
    def reference(self) -> Reference:
        """The reference."""
        return self._reference

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the trainer's configuration while it is being built."""
        self._take(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the loss's state from the checkpoint that training resumes from."""
        self._take(args)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.stateful_callbacks else None
        if isinstance(saved, dict) and state.global_step:
            self.loss_state = saved["attributes"]["loss_state"]
        # A resumed policy has left its reference, and so has one that trains a second time.
        self._fresh = not state.global_step and not self._used
        self._training = _metrics.Totals()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the loss's schedules on; stop a training that goes around the loss.

        Raises:
            RuntimeError: If an optimizer step was made without it.
        """
        if not self._used:
            raise RuntimeError(
                f"{self!r} was not used in a training step: the trainer's class overrides compute_loss without calling "
                "transformers'; call super().compute_loss there"
            )
        self._fresh = False
        self._loss.train().step()

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the figures of `Trainer.predict` to its metrics."""
        self._add_evaluated(metrics)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (transformers' `ExportableState`)."""
        return {
            "args": {
                "loss": repr(self._loss),
                "reference": self._reference.config(),
                "check_step_zero": self._check_step_zero,
                "pairs": self._pairs,
            },
            "attributes": {"loss_state": self.loss_state},
        }

    @property
    def loss_state(self) -> dict[str, Any]:
        """State of the loss, such as a running mean; empty for a stateless one."""
        return self._loss.state_dict()

    @loss_state.setter
    def loss_state(self, state: dict[str, Any]) -> None:
        self._loss.load_state_dict(state)

    def _take(self, args: Any) -> None:
        if args is self._args:
            return
        if self._args is not None:
            raise RuntimeError(f"{self!r} is in another trainer already; make one callback for each")
        _guard.check_args(args)
        self._args = args
        logger.info(f"prefloss trains this model with {self!r}")
        if args.gradient_accumulation_steps > 1 and _batch.looks_across(self._loss):
            warnings.warn(
                f"{self._loss.name}: an example's loss depends on its batch, one micro-batch of "
                f"{args.per_device_train_batch_size} examples on each process; accumulation does not enlarge it",
                UserWarning,
                stacklevel=2,
            )

    @property
    def _setting(self) -> _step.Setting:
        return _step.Setting(self._loss, self._reference, self._pairs)

    def _count(self, trainer: Any, samples: Sequence[dict[str, Any]]) -> None:
        _step.count_step(trainer, self._setting, samples)

    def _compute(self, trainer: Any, model: Any, inputs: Any, num_items: Any) -> dict[str, Tensor]:
        self._take(trainer.args)
        if not self._bound:
            _guard.check_trainer(trainer)
            self._reference.bind(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
            self._all_sum = functools.partial(trainer.accelerator.reduce, reduction="sum")
            self._router = _step.router_weight(trainer)
            self._bound = True
        check = self._check_step_zero and self._fresh and model.training
        result = _step.compute(trainer, self._setting, model, inputs, num_items, check)
        if model.training:
            self._used = True
            self._fresh = self._fresh and not result.judged
        (self._training if model.training else self._evaluation).add(result.figures)
        return result.outputs

    def _add_figures(self, trainer: Any, logs: dict[str, float]) -> None:
        """Into what the trainer is about to log; `evaluate` returns the same dictionary."""
        if any(name.endswith("_runtime") and not name.startswith("train") for name in logs):
            self._add_evaluated(logs)
        elif "loss" in logs and self._all_sum is not None:
            logs.update(_metrics.named(self._training.take(self._all_sum)))

    def _add_evaluated(self, logs: dict[str, float]) -> None:
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), None)
        if prefix is None or self._all_sum is None:
            return
        means = self._evaluation.take(self._all_sum)
        weights = dict(
            zip(self._term_names(), (weight for weight, _ in _batch.terms_of(self._loss)), strict=True)
        )
        loss = _metrics.total_loss(means, weights, self._router)
        found = _metrics.named(means)
        if loss is not None:
            # The trainer's is a mean of batch means.
            found["loss"] = loss
        logs.update({f"{prefix}_{name}": value for name, value in found.items()})

    def _term_names(self) -> list[str]:
        return list(getattr(self._loss, "_keys", [self._loss.name]))

    def __repr__(self) -> str:
        """The callback with its loss and reference."""
        return f"{type(self).__name__}({self._loss!r}, reference={self._reference!r})"


def _check_reference(loss: Loss, reference: Reference) -> None:
    if loss.spec.needs_reference and reference.kind == "none":
        raise ValueError(
            f"reference: got {reference!r} with {loss.name}, which reads log-ratios; wanted {CHOICES}"
        )
    if reference.kind == "cached" and any(name.startswith("per_token") for name in loss.needs):
        raise ValueError(
            f"reference: got {reference!r} with {loss.name}, which reads the log-prob of each token; a cache holds "
            "their sums; wanted a reference that is computed"
        )
