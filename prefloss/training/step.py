"""One step of a loss in training: from feedback to the scalar to differentiate, with metrics and diagnosis.

Trainers differ in how they get log-probs. From log-ratios on, all of them run `FeedbackObjective`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss import metrics
from prefloss.arguments import flag, instance, shown
from prefloss.diagnosis import NAMES, Diagnosis, Thresholds
from prefloss.diagnosis.finite import check_finite
from prefloss.feedback import KINDS, RANKINGS_AS, Feedback, convert
from prefloss.metrics import Stat, Totals
from prefloss.registry import Evaluation, Loss, as_loss
from prefloss.training import distributed

_TERM = "loss/"
_ROUTER = "aux_loss"


class Router(NamedTuple):
    """Load-balancing loss of a mixture of experts for one batch, a scalar, and its weight."""

    loss: Tensor
    weight: float


class FeedbackObjective:
    """A loss in training, on feedback: its share of each optimizer step, its metrics, its diagnosis, its state.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        rankings_as: How rankings become pairs for a pair loss: "all", "adjacent" or "best_worst".
        diagnose: Watch the training and warn when it goes wrong, see `prefloss.diagnosis`: `Thresholds`, True for the
            default ones, or False.
        **hyperparameters: Of the loss, if given by name.

    Attributes:
        loss: The loss.
        diagnosis: Watches training batches; None if switched off.
        steps: Optimizer steps made so far.

    Raises:
        ValueError: If the loss is unknown or a hyperparameter out of range.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.
    """

    def __init__(
        self,
        loss: str | Loss,
        *,
        rankings_as: str | None = None,
        diagnose: Thresholds | Mapping[str, Any] | bool | None = True,
        **hyperparameters: Any,
    ) -> None:
        if rankings_as is not None and rankings_as not in RANKINGS_AS:
            choices = ", ".join(map(repr, reversed(RANKINGS_AS)))
            raise ValueError(f"rankings_as: got {shown(rankings_as)}, expected one of {choices} or None")
        self.loss = as_loss(loss, hyperparameters)
        self.rankings_as = rankings_as
        self.diagnosis = Diagnosis.of(self.loss, diagnose)
        self.steps = 0
        self._totals = {True: Totals(), False: Totals()}
        self._router_weight = 0.0

    def replace_loss(self, loss: Loss) -> None:
        """Train with another loss, such as the same with hyperparameters from a trainer's configuration."""
        self.loss = instance("loss", loss, Loss, "a Loss as prefloss.get(...) gives")
        if self.diagnosis is not None:
            self.diagnosis.loss = loss

    def share(
        self,
        feedback: Feedback,
        *,
        training: bool,
        step_counts: Tensor | None = None,
        whole_step: bool = True,
        router: Router | None = None,
    ) -> Tensor:
        """This batch's share of the mean loss of an optimizer step, a scalar; adds the batch to the metrics.

        The mean is over all examples that the loss counts, on all processes. Shares are scaled for gradients that are
        averaged over processes, as DDP and FSDP do.

        Args:
            feedback: This process's batch, of any kind that gives what the loss takes.
            training: True to update the state of the loss and the diagnosis.
            step_counts: `counts` of the whole optimizer step on all processes. None: see `whole_step`.
            whole_step: Without `step_counts`, True makes this batch on all processes the optimizer step; every process
                must then call this. False gives the mean of this process's examples.
            router: Router loss of the batch.

        Raises:
            TypeError: If the feedback does not give what the loss takes.
            ValueError: If the feedback lacks something that the loss needs.
            FloatingPointError: If the loss of an example, or its gradient, is not finite.
        """
        instance("feedback", feedback, KINDS, "Pairs, Labels or Rankings")
        flag("training", training)
        terms = len(self.loss.terms)
        if step_counts is not None and getattr(step_counts, "shape", None) != (terms + 1,):
            raise ValueError(
                f"step_counts: got {shown(step_counts)}, expected a tensor of shape [{terms + 1}] as counts() gives"
            )
        batch = self._evaluate(feedback, training)
        if step_counts is None and whole_step:
            step_counts = distributed.all_sum(_with_batch(batch.counts))
        total = batch.evaluation.mean if step_counts is None else self._share(batch, step_counts[:-1])
        if router is not None:
            # The mean over the micro-batches of the step; the factor undoes the mean over processes.
            scale = 1.0 if step_counts is None else distributed.size() / step_counts[-1]
            total = total + router.weight * router.loss * scale
            self._router_weight = router.weight
        self._record(feedback, batch, training, router)
        return total

    def counts(self, feedback: Feedback) -> Tensor:
        """Examples that each term counts in a batch, then 1 for the batch, [terms + 1]; add them up over a step."""
        return _with_batch(self.loss.counts(self._converted(feedback)))

    def step(self) -> None:
        """Call after each optimizer step: moves the loss's schedules on."""
        self.steps += 1
        self.loss.train().step()

    def metrics(self, *, training: bool = True) -> dict[str, float]:
        """Means over all batches and processes since the last call, and `loss`; judges the diagnosis.

        Every process must call this at the same time.

        Args:
            training: Of the batches in training mode, or of the others.

        Returns:
            TRL's names where TRL has the metric (`rewards/accuracies`), others under `prefloss/`.
        """
        sums = self._totals[flag("training", training)].take(distributed.all_sum)
        watched = {name: sums.pop(name) for name in [*sums] if name in NAMES}
        means = {name: total / count for name, (total, count) in sums.items() if count}
        loss = self._mean_loss(means)
        if len(self.loss.terms) == 1:
            means = {name: mean for name, mean in means.items() if not name.startswith(_TERM)}
        if training and self.diagnosis is not None:
            self.diagnosis.add(watched)
            self.diagnosis.judge(self.steps)
            means |= self.diagnosis.shown()
        named = metrics.logged_names(means)
        return named if loss is None else {**named, "loss": loss}

    def forget_metrics(self) -> None:
        """Start the training metrics anew."""
        self._totals[True] = Totals()

    def state_dict(self) -> dict[str, Any]:
        """State of the loss, such as a running mean; plain numbers and lists."""
        return self.loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.loss.load_state_dict(state)

    def _converted(self, feedback: Feedback) -> Feedback:
        return convert(feedback, self.loss.spec.feedback, self.rankings_as)

    def _evaluate(self, feedback: Feedback, training: bool) -> _Batch:
        """The loss of this process's examples, or of all processes' where it couples the examples of a batch."""
        own = self._converted(feedback)
        counts = self.loss.counts(own)
        couples = self.loss.couples_batch
        # With all examples on every process, states must not be summed over processes.
        self.loss.sync_with(torch.clone if couples else distributed.all_sum)
        seen = distributed.gather_feedback(own) if couples else own
        evaluation = self.loss.train(training).evaluate(seen)
        check_finite(self.loss, evaluation.terms, seen)
        copies = distributed.size() if couples else 1
        seen_counts = counts if seen is own else self.loss.counts(seen)
        return _Batch(seen, evaluation, counts, seen_counts, copies)

    def _share(self, batch: _Batch, step_counts: Tensor) -> Tensor:
        # Gradients are averaged over processes, so each share is multiplied by their number.
        parts = batch.seen_counts.clamp(min=1) / step_counts.clamp(min=1) * distributed.size()
        means = batch.evaluation.means.values()
        total = torch.stack(
            [
                term.weight * mean * part
                for term, mean, part in zip(self.loss.terms, means, parts, strict=True)
            ]
        ).sum()
        # Where all processes hold all examples, the value is scaled down so that the mean over processes is right.
        return total if batch.copies == 1 else total - total.detach() * (1 - 1 / batch.copies)

    def _record(self, feedback: Feedback, batch: _Batch, training: bool, router: Router | None) -> None:
        stats = dict(metrics.metrics(feedback, beta=self.loss.beta or 1.0))
        for (name, mean), count in zip(batch.evaluation.means.items(), batch.seen_counts, strict=True):
            stats[_TERM + name] = Stat(mean.detach() * count, count)
        if router is not None:
            stats[_ROUTER] = Stat(router.loss.detach(), torch.ones_like(router.loss))
        if training and self.diagnosis is not None:
            stats |= self.diagnosis.figures(feedback, batch.seen, batch.evaluation, copies=batch.copies)
        self._totals[training].add(stats)

    def _mean_loss(self, means: Mapping[str, float]) -> float | None:
        """The loss from the means of its terms; None if no example counted."""
        names = zip(self.loss.terms, self.loss.term_names, strict=True)
        terms = [term.weight * means[_TERM + name] for term, name in names if _TERM + name in means]
        return sum(terms) + self._router_weight * means.get(_ROUTER, 0.0) if terms else None

    def __repr__(self) -> str:
        """The loss."""
        return f"{type(self).__name__}({self.loss!r})"


class _Batch(NamedTuple):
    """A loss on one batch.

    Attributes:
        seen: What the loss saw: this process's examples, or those of all.
        evaluation: Its values.
        counts: Examples that each term counts of this process's, [terms].
        seen_counts: Examples that each term counted in `seen`, [terms].
        copies: Number of processes that saw the same.
    """

    seen: Feedback
    evaluation: Evaluation
    counts: Tensor
    seen_counts: Tensor
    copies: int


def _with_batch(counts: Tensor) -> Tensor:
    return torch.cat([counts, counts.new_ones(1)])


def sum_counts(batches: Sequence[Tensor], *, over_processes: bool = True) -> Tensor:
    """Counts of an optimizer step from those of its micro-batches, [terms + 1]."""
    total = torch.stack([*batches]).sum(0)
    return distributed.all_sum(total) if over_processes else total
