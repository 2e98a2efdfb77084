"""Loss and reference as one object that training loops call with a model and a batch; no trainer is known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from prefloss.diagnosis import NAMES, Diagnosis, Thresholds
from prefloss.registry import Loss, get
from prefloss.training import batch as _batch
from prefloss.training import checks, distributed, step, totals
from prefloss.training.forward import unwrapped
from prefloss.training.reference import CHOICES, Reference


class PreferenceObjective:
    """A loss on the batches of a `PreferenceCollator`, for training loops of your own.

    Called with a model and a batch it gives the loss to differentiate. Losses of several micro-batches add up to the
    mean over all examples of the optimizer step that the loss counts, on all processes, if `count` is told of them
    first; gradients are taken to be averaged over the processes, as DDP and FSDP do. Without `count`, every batch is
    an optimizer step.

    Args:
        loss: Name of a registered loss, with hyperparameters if you like (`"ipo(tau=0.1)"`), or a `Loss`.
        reference: A `Reference`, or a model of its own (`Reference.model`). None only for a loss that needs none.
        check_step_zero: Stop if policy and reference differ at the first training batch. False where they need not
            coincide: a policy trained further than its reference, a reference that is another model.
        pairs: How rankings become pairs for a pair loss: "all", "adjacent" or "best_worst".
        autocast: Makes the context that a reference model computes in, such as `accelerator.autocast`, where the
            policy's own forward brings it along.
        diagnose: Whether to watch the training and say what goes wrong, see `prefloss.diagnosis`: `Thresholds`, True
            for the default ones, or False.
        **hyperparameters: Of the loss, if given by name.

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
        pairs: str | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        diagnose: Thresholds | Mapping[str, Any] | bool | None = True,
        **hyperparameters: Any,
    ) -> None:
        if isinstance(loss, Loss) and hyperparameters:
            raise TypeError(
                f"hyperparameters: got {sorted(hyperparameters)} with a Loss, expected them in the Loss"
            )
        self.loss = loss if isinstance(loss, Loss) else get(loss, **hyperparameters)
        self.reference = Reference.of(reference)
        _batch.check_pairs(pairs)
        checks.check_fed(self.loss)
        _check_reference(self.loss, self.reference)
        self.pairs = pairs
        self.check_step_zero = check_step_zero
        self.autocast = autocast
        self.diagnosis = Diagnosis.of(self.loss, diagnose)
        self.fresh = check_step_zero
        self.steps = 0
        self._policy: nn.Module | None = None
        self._totals = {True: totals.Totals(), False: totals.Totals()}

    def count(self, batches: Sequence[dict[str, Any]], *, over_processes: bool = True) -> None:
        """Tell the micro-batches of an optimizer step, before the first of them is used, what the whole step counts.

        Every process must call this at every step.

        Args:
            batches: The micro-batches of this process, which get one more item.
            over_processes: False where processes cannot talk yet, as in a data loader; the item `prefloss_counts` must
                then be summed over them before a batch is used.

        Raises:
            ValueError: If there are none, or one was not made by a `PreferenceCollator`.
        """
        if not batches:
            raise ValueError("batches: got none, expected the micro-batches of an optimizer step")
        step.count(self._setting, batches, over_processes=over_processes)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], *, examples: int | None = None
    ) -> step.Result:
        """The loss of a batch.

        Args:
            model: The policy, wrapped as it is trained. In training mode, and only then, states of the loss move.
            batch: From a `PreferenceCollator`, on the model's device.
            examples: How many of the batch's examples count, where a distributed sampler filled the last batch up;
                None for all.

        Returns:
            Loss, outputs and figures; the figures are in `metrics` too.

        Raises:
            ValueError: If the batch lacks something that the loss needs, or has something that it does not read.
            TypeError: If the feedback is of a kind that does not give what the loss takes.
            RuntimeError: If policy and reference should coincide and do not.
            FloatingPointError: If the loss of an example is not finite.
        """
        self.bind(model)
        check = self.fresh and model.training
        result = step.compute(self._setting, model, batch, examples, check)
        if model.training:
            self.fresh = self.fresh and not result.judged
        self._totals[model.training].add(result.figures)
        return result

    def step(self) -> None:
        """To be called after each optimizer step: moves the loss's schedules on."""
        self.fresh = False
        self.steps += 1
        self.loss.train().step()

    def bind(self, model: nn.Module) -> None:
        """Check the reference against the policy and freeze it; done by the first call.

        Raises:
            ValueError: If it shares trainable weights with the policy, or is an adapter that is absent or in use.
            TypeError: If it speaks of adapters and the policy has none.
        """
        policy = unwrapped(model)
        if policy is not self._policy:
            self.reference.bind(policy)
            self._policy = policy

    def metrics(self, *, training: bool = True) -> dict[str, float]:
        """Means over all batches and processes since the last call, under TRL's names; also `loss`.

        Every process must call this at the same time.

        Args:
            training: Of the batches in training mode, or of the others.
        """
        sums = self._totals[training].take(distributed.all_sum)
        watched = {name: sums.pop(name) for name in [*sums] if name in NAMES}
        means = totals.means(sums)
        terms = {
            name: weight
            for name, (weight, _) in zip(self._term_names(), _batch.terms_of(self.loss), strict=True)
        }
        router = 0.0 if self._policy is None else step.router_weight(self._policy)
        loss = totals.total_loss(means, terms, router)
        found = totals.named({**means, **self._diagnosed(watched)} if training else means)
        return found if loss is None else {**found, "loss": loss}

    def _diagnosed(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        if self.diagnosis is None:
            return {}
        self.diagnosis.add(sums)
        self.diagnosis.judge(self.steps)
        return self.diagnosis.shown()

    def forget_metrics(self) -> None:
        """Start the training figures anew."""
        self._totals[True] = totals.Totals()

    def state_dict(self) -> dict[str, Any]:
        """State of the loss, such as a running mean; plain numbers and lists."""
        return self.loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: the policy has left its reference, so step 0 is not checked."""
        self.loss.load_state_dict(state)
        self.fresh = False

    @property
    def _setting(self) -> step.Setting:
        return step.Setting(self.loss, self.reference, self.pairs, self.autocast, self.diagnosis)

    def _term_names(self) -> list[str]:
        return list(self.loss.term_names)

    def __repr__(self) -> str:
        """Loss and reference."""
        return f"{type(self).__name__}({self.loss!r}, reference={self.reference!r})"


def _check_reference(loss: Loss, reference: Reference) -> None:
    if loss.spec.needs_reference and reference.kind == "none":
        raise ValueError(
            f"reference: got {reference!r} with {loss.name}, which reads log-ratios; expected {CHOICES}"
        )
    if reference.kind in ("cached", "table") and any(name.startswith("per_token") for name in loss.needs):
        held = "a cache" if reference.kind == "cached" else "a table"
        raise ValueError(
            f"reference: got {reference!r} with {loss.name}, which reads the log-prob of each token; {held} holds "
            "their sums; expected a reference that is computed"
        )
