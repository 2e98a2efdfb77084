"""Warnings about a training that goes wrong.

Each training batch gives a few sums and counts (`Diagnosis.figures`), which trainers add up over batches and processes
with their other metrics. Whenever metrics are logged, `Diagnosis.judge` compares them with thresholds and issues a
`DiagnosisWarning` on the first process: once, and again when the figure gets much worse or comes back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from prefloss.arguments import flag, instance, shown
from prefloss.diagnosis.figures import DOWNVOTES, LENGTH, PARTS, UPVOTES, ratio_figures
from prefloss.diagnosis.finite import log_probs
from prefloss.diagnosis.gradients import check_gradients, gradients, sizes_at_start
from prefloss.feedback import Feedback, Labels, Pairs
from prefloss.logratios import LogRatios
from prefloss.metrics import Stat
from prefloss.registry import Evaluation, Loss, get, specs

# A finding ends when its figure falls to this fraction of the threshold.
_OVER = 0.8
# Variances, tokens squared and nats squared.
_LENGTHS_ALIKE, _MARGINS_ALIKE = 1e-2, 1e-4


class DiagnosisWarning(UserWarning):
    """A problem in the training; filter it by this class with `warnings.simplefilter`."""


@dataclass(frozen=True)
class Thresholds:
    """When a diagnosis warns. A threshold of None, or False, switches its finding off.

    Attributes:
        falling: Share of pairs whose chosen completion fell while the margin grew, in (0, 1].
        fall: How far it must have fallen below the reference to count, nats, >= 0.
        saturated: Share of examples whose gradient has vanished, in (0, 1].
        gone: A gradient below this fraction of the one at the start has vanished, in (0, 1).
        length: Absolute correlation of margin and difference in length, in (0, 1].
        kl: Estimated KL(reference || policy) on the data's completions, nats per token, > 0.
        zero: Share of batches since the last log in which no example has a gradient, in (0, 1].
        non_finite: Stop at a gradient that is NaN or infinite.
        examples: Smallest number of recent examples that gives a verdict, >= 1.
        memory: Number of examples that shares and correlations look back over, >= 1; older ones fade out.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If one is not a number.
    """

    falling: float | None = 0.5
    fall: float = 1.0
    saturated: float | None = 0.9
    gone: float = 0.01
    length: float | None = 0.7
    kl: float | None = 1.0
    zero: float | None = 0.5
    non_finite: bool = True
    examples: int = 64
    memory: int = 512

    def __post_init__(self) -> None:
        """Check the ranges."""
        for field in fields(self):
            value, name = getattr(self, field.name), field.name
            if name == "non_finite":
                flag(name, value)
            elif (value is None or value is False) and name not in ("fall", "gone", "examples", "memory"):
                object.__setattr__(self, name, None)
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: got {shown(value)}, expected a number")
            else:
                low, high = _RANGES.get(name, (0.0, 1.0))
                if not low <= value <= high or (value == 0 and name != "fall"):
                    raise ValueError(f"{name}: got {value!r}, expected a number in {_range(name, low, high)}")


_RANGES = {
    "fall": (0.0, math.inf),
    "kl": (0.0, math.inf),
    "examples": (1, math.inf),
    "memory": (1, math.inf),
}


@dataclass(frozen=True)
class Finding:
    """A threshold that was passed.

    Attributes:
        name: Name of the threshold.
        value: The figure that passed it.
        since: Optimizer step of the first log at which it did.
        message: The finding in words.
    """

    name: str
    value: float
    since: int
    message: str


class Diagnosis:
    """Watches one training.

    Args:
        loss: The loss that trains.
        thresholds: When to warn.

    Attributes:
        findings: Everything reported so far, in order.

    Example:
        >>> diagnosis = Diagnosis(prefloss.get("dpo", beta=0.1), Thresholds(examples=2))
        >>> pairs = Pairs.of(chosen=[-4.0, -6.0], rejected=[-9.0, -9.0])
        >>> diagnosis.add({name: (float(s), float(n)) for name, (s, n) in diagnosis.figures(pairs).items()})
        >>> diagnosis.shown()["falling_pairs"]
        1.0
    """

    def __init__(self, loss: Loss, thresholds: Thresholds | None = None) -> None:
        instance("loss", loss, Loss, "a Loss as prefloss.get(...) gives")
        if thresholds is not None:
            instance("thresholds", thresholds, Thresholds, "prefloss.diagnosis.Thresholds(...) or None")
        self.loss = loss
        self.thresholds = thresholds or Thresholds()
        self.findings: list[Finding] = []
        self._recent: dict[str, tuple[float, float]] = {}
        self._window: dict[str, tuple[float, float]] = {}
        self._since: dict[str, int] = {}
        self._reported: dict[str, float] = {}
        self._example = ""

    @classmethod
    def of(cls, loss: Loss, diagnose: Thresholds | Mapping[str, Any] | bool | None) -> Diagnosis | None:
        """From the argument `diagnose` of trainers: True for the default thresholds, False or None for no diagnosis.

        Raises:
            TypeError: If it is something else.
            ValueError: If a threshold is out of its range.
        """
        if diagnose is None or diagnose is False:
            return None
        if isinstance(diagnose, Mapping):
            # From a checkpoint.
            known = [field.name for field in fields(Thresholds)]
            unknown = [name for name in diagnose if name not in known]
            if unknown:
                raise TypeError(f"diagnose: got {shown(unknown[0])}, expected some of {', '.join(known)}")
            return cls(loss, Thresholds(**diagnose))
        if diagnose is not True and not isinstance(diagnose, Thresholds):
            expected = "prefloss.diagnosis.Thresholds(...), True or False"
            raise TypeError(f"diagnose: got {shown(diagnose)}, expected {expected}")
        return cls(loss, None if diagnose is True else diagnose)

    def figures(
        self,
        feedback: Feedback,
        seen: Feedback | None = None,
        evaluation: Evaluation | None = None,
        *,
        copies: int = 1,
    ) -> dict[str, Stat]:
        """Sums and counts of a training batch, to be added up over batches and processes.

        Args:
            feedback: The batch.
            seen: The batch as the loss took it, if that is another kind.
            evaluation: What `loss.evaluate(seen)` gave, before its backward pass.
            copies: Number of processes that give the same `seen`: all of them, where it was gathered.

        Raises:
            FloatingPointError: If a gradient is not finite; example and term are named.
        """
        stats = ratio_figures(feedback, self.thresholds.fall)
        if evaluation is not None:
            of_gradients = self._gradient_figures(feedback if seen is None else seen, evaluation)
            stats |= {name: Stat(total / copies, n / copies) for name, (total, n) in of_gradients.items()}
        return stats

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Add sums and counts over all processes, under the names that `figures` gave."""
        self._window = _merged(self._window, sums, 1.0)
        # A loss that couples the batch has gradients of all examples on each process, so other counts come first.
        counts = [sums[name][1] for name in (LENGTH[0], "falling_pairs", "zero_gradient") if name in sums]
        examples = counts[0] if counts else 0.0
        self._recent = _merged(self._recent, sums, math.exp(-examples / self.thresholds.memory))

    def shown(self) -> dict[str, float]:
        """The figures worth logging, over the recent examples; those that counted nothing are left out."""
        recent = {name: total / count for name, (total, count) in self._recent.items() if count}
        means = {name: mean for name, mean in recent.items() if name not in PARTS}
        # Upvotes that fall are another matter if downvotes fall less, or if there is none to compare with.
        if UPVOTES in recent and not recent[UPVOTES] > recent.get(DOWNVOTES, math.inf):
            means["falling_pairs"] = 0.0
        correlation = self._correlation()
        return means if math.isnan(correlation) else {**means, "length_correlation": correlation}

    def judge(self, step: int) -> list[Finding]:
        """Compare the figures with the thresholds and warn. Call it on every process when metrics are logged.

        Args:
            step: Optimizer steps made so far.

        Returns:
            The new findings.
        """
        shown, limits, before = self.shown(), self.thresholds, len(self.findings)
        self._look("falling", shown.get("falling_pairs"), limits.falling, step, self._falling)
        self._look("saturated", shown.get("saturated"), limits.saturated, step, self._saturated)
        self._look("length", abs(shown.get("length_correlation", 0.0)), limits.length, step, self._length)
        self._look("kl", shown.get("kl_per_token"), limits.kl, step, self._kl, twice=True)
        total, count = self._window.get("batch_without_gradient", (0.0, 0.0))
        self._look("zero", total / count if count else None, limits.zero, step, self._zero, enough=True)
        self._window, self._example = {}, ""
        return self.findings[before:]

    def _gradient_figures(self, seen: Feedback, evaluation: Evaluation) -> dict[str, Stat]:
        slopes = gradients(self.loss, evaluation, seen)
        if slopes is None:
            return {}
        counted = self.loss.counted(seen) if len(evaluation.terms) == 1 else seen.valid
        any_counts, any_gradient = counted.any(), ((slopes.sizes != 0) & counted).any()
        # One synchronisation with the device.
        finite, none = torch.stack([slopes.finite, any_counts & ~any_gradient]).tolist()
        if not finite and self.thresholds.non_finite:
            check_gradients(self.loss, evaluation, seen)
        if none and not self._example:
            first = int(counted.nonzero()[0, 0])
            self._example = f"{', '.join(evaluation.terms)} of example {first} ({log_probs(seen, first)})"
        stats = {
            "zero_gradient": Stat.over(slopes.sizes == 0, counted),
            "batch_without_gradient": Stat.over(~any_gradient, any_counts),
        }
        start = None if self.thresholds.saturated is None else sizes_at_start(self.loss, seen)
        if start is not None:
            vanished = slopes.sizes < self.thresholds.gone * start
            stats["saturated"] = Stat.over(vanished, counted & (start > 0))
        return stats

    def _correlation(self) -> float:
        if any(self._recent.get(name, (0.0, 0.0))[1] < 2 for name in LENGTH):
            return math.nan
        x, y, xx, yy, xy = (total / count for total, count in (self._recent[name] for name in LENGTH))
        of_lengths, of_margins = xx - x * x, yy - y * y
        # Equal lengths, or margins of rounding size, have no meaningful correlation.
        if of_lengths < _LENGTHS_ALIKE or of_margins < _MARGINS_ALIKE:
            return math.nan
        return max(-1.0, min(1.0, (xy - x * y) / math.sqrt(of_lengths * of_margins)))

    def _look(
        self,
        name: str,
        value: float | None,
        threshold: float | None,
        step: int,
        words: Callable[[float], str],
        twice: bool = False,
        enough: bool = False,
    ) -> None:
        if threshold is None or value is None or not (enough or self._has_enough(name)):
            return
        if value < threshold:
            if value <= _OVER * threshold:
                self._since.pop(name, None)
                self._reported.pop(name, None)
            return
        since = self._since.setdefault(name, step)
        reported = self._reported.get(name)
        if reported is not None and value < (2 * reported if twice else reported + 0.2):
            return
        self._reported[name] = value
        again = "" if reported is None else " (worse than at the last warning)"
        message = f"{words(value)} Seen at every log since step {since}{again}."
        self.findings.append(Finding(name, value, since, message))
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            warnings.warn(f"step {step}: {message}", DiagnosisWarning, stacklevel=2)

    def _has_enough(self, name: str) -> bool:
        source = {"falling": "falling_pairs", "length": LENGTH[0], "kl": "falling_pairs"}.get(name, name)
        return self._recent.get(source, (0.0, 0.0))[1] >= self.thresholds.examples

    def _falling(self, share: float) -> str:
        if resists_falling(self.loss):
            why = f"{self.loss.name} pulls such completions up, so check its weights and the learning rate."
        else:
            why = (
                f"{self.loss.name} does not pull a fallen chosen completion up more than it pushes the rejected one "
                f"down. Losses that do: {', '.join(resisting())}; a sum with an NLL term ('1.0*dpo + 1.0*nll') does, "
                "too. A larger beta or a smaller learning rate keeps the policy closer to the reference."
            )
        return (
            f"Chosen completions are becoming less likely: {share:.0%} of recent pairs have a chosen completion that "
            f"lost over {self.thresholds.fall:g} nats against the reference while the margin over the rejected one "
            f"grew. {why}"
        )

    def _saturated(self, share: float) -> str:
        return (
            f"The loss is saturated: {share:.0%} of recent examples have less than {self.thresholds.gone:.0%} of the "
            f"gradient that {self.loss.name} has where policy and reference agree. Only the other examples still train "
            "the model: stop earlier, use more data, fewer epochs or a smaller beta."
        )

    def _length(self, size: float) -> str:
        correlation, (x, count) = self._correlation(), self._recent[LENGTH[0]]
        longer = "longer" if correlation > 0 else "shorter"
        return (
            f"The implicit reward follows length: margin and difference in length correlate by {correlation:+.2f} "
            f"(recent pairs; chosen completions are {x / count:+.1f} tokens longer on average), so {longer} "
            "completions win. Balance the lengths in the data, or use a loss that accounts for length, such as ipo, "
            "simpo, r_dpo or ld_dpo."
        )

    def _kl(self, value: float) -> str:
        return (
            f"The policy is far from the reference: {value:.2f} nats per token. Estimated as the mean of log(reference "
            "/ policy) over the tokens of the data's completions, which is KL(reference || policy) if the reference "
            "wrote them, and an indication otherwise; KL(policy || reference) cannot be estimated without samples of "
            "the policy. A larger beta or a smaller learning rate keeps it closer."
        )

    def _zero(self, share: float) -> str:
        example = self._example or "on another process"
        return (
            f"Nothing to learn from: in {share:.0%} of the batches since the last log no example has a gradient; the "
            f"first: {example}. Either both sides are the same, weights are 0, or the loss is flat there."
        )


def config_of(diagnosis: Diagnosis | None) -> dict[str, Any] | bool:
    """What a checkpoint keeps of a diagnosis: its thresholds, or False for none; `Diagnosis.of` reads it."""
    return False if diagnosis is None else asdict(diagnosis.thresholds)


def resists_falling(loss: Loss) -> bool:
    """Whether a loss pulls a fallen chosen completion up more than it pushes the rejected one down.

    Decided by its gradient, not by its name: on a pair whose chosen completion lost 20 nats against the reference and
    whose rejected one lost 40, the pull must be 1.5 times the push. A loss that looks at the margin alone pulls and
    pushes alike. False for losses of rankings, and for those that need more than log-probs of pairs.

    Example:
        >>> [resists_falling(prefloss.get(name)) for name in ("dpo", "dpop", "1.0*dpo + 1.0*nll")]
        [False, True, True]
    """
    try:
        pull, push = _pull_and_push(loss, -20.0, -40.0)
    except (TypeError, ValueError, RuntimeError):
        return False
    return pull > 0 and pull >= 1.5 * push


def _pull_and_push(loss: Loss, chosen: float, rejected: float) -> tuple[float, float]:
    """How strongly a loss raises the chosen and lowers the rejected completion, at these log-ratios."""
    policy = [torch.tensor([h - 40.0], requires_grad=True) for h in (chosen, rejected)]
    sides = [LogRatios(side, torch.full((1,), -40.0), torch.tensor([20])) for side in policy]
    pairs = Pairs(sides[0], sides[1])
    with loss.held_still(), torch.enable_grad():
        takes_labels = loss.spec.feedback is Labels
        values = loss(replace(pairs.to_labels(), kl=torch.tensor(0.0)) if takes_labels else pairs)
        up, down = torch.autograd.grad(values.sum(), policy, allow_unused=True)
    return (0.0 if up is None else -float(up)), (0.0 if down is None else float(down))


def resisting(names: Iterable[str] | None = None) -> list[str]:
    """Which of these losses resist falling chosen completions, at their default hyperparameters.

    Args:
        names: Of losses; None for those of pairs that declare it and need log-ratios alone.
    """
    if names is None:
        declared = [spec for spec in specs.values() if spec.holds_chosen and spec.feedback is Pairs]
        names = [spec.name for spec in declared if spec.needs_reference and not spec.needs]
    return [name for name in names if resists_falling(get(name))]


def _merged(
    old: Mapping[str, tuple[float, float]], new: Mapping[str, tuple[float, float]], keep: float
) -> dict[str, tuple[float, float]]:
    faded = {name: (keep * total, keep * count) for name, (total, count) in old.items()}
    return faded | {
        name: tuple(a + b for a, b in zip(faded.get(name, (0.0, 0.0)), sums, strict=True))
        for name, sums in new.items()
    }  # type: ignore[return-value]


def _range(name: str, low: float, high: float) -> str:
    opening = "[" if name == "fall" or low else "("
    return f"{opening}{low:g}, {high:g}]"
