"""What goes wrong in a training, said in plain words while it runs; torch only, for every trainer.

Each training batch gives a few sums and counts (`Diagnosis.figures`), which trainers add up over batches and ranks with
their other figures. From these, whenever figures are logged, a `Diagnosis` finds what the trainer's user should know,
and says so once: a `DiagnosisWarning` on the first process, again only when it gets materially worse, or comes back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefloss.diagnosis.finite import log_probs
from prefloss.diagnosis.gradients import check_gradients, gradients, sizes_at_start, standing_still
from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.metrics import Stat
from prefloss.registry import Evaluation, Loss, get

_MOMENTS = "length/"
_LENGTH = tuple(_MOMENTS + name for name in ("x", "y", "xx", "yy", "xy"))
NAMES = frozenset(
    ("falling_pairs", "saturated", "zero_gradient", "batch_without_gradient", "kl_per_token", *_LENGTH)
)
"""What `Diagnosis.figures` gives, if it gives it."""

# A finding is over when its figure has fallen to this part of the threshold.
_OVER = 0.8
# Variances, tokens squared and nats squared.
_LENGTHS_ALIKE, _MARGINS_ALIKE = 1e-2, 1e-4
# Of losses that may help against falling chosen completions, those that `resists_falling` confirms are named.
_CANDIDATES = ("dpop", "apo_zero", "nca_pair")


class DiagnosisWarning(UserWarning):
    """Something about the training that its user should know; `warnings.simplefilter` treats it by this class."""


@dataclass(frozen=True)
class Thresholds:
    """When a diagnosis speaks. A threshold of None, or False, switches its finding off.

    Attributes:
        falling: Share of pairs whose chosen completion fell while the margin grew, in (0, 1].
        fall: By how much it must have fallen against the reference to count, nats, >= 0.
        saturated: Share of examples whose gradient is gone, in (0, 1].
        gone: A gradient smaller than this part of the one at the start is gone, in (0, 1).
        length: Size of the correlation of margin and difference in length, in (0, 1].
        kl: Estimated KL(reference || policy) on the data's completions, nats per token, > 0.
        zero: Share of batches since the last log in which no example has a gradient, in (0, 1].
        non_finite: Whether to stop at a gradient that is NaN or infinite.
        examples: Fewer recent examples than this say nothing, >= 1.
        memory: Over how many examples shares and correlations look back, >= 1; older ones fade out.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If one is no number.
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
            if name == "non_finite" or (value is None and name not in ("fall", "gone", "examples", "memory")):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: got {value!r}, expected a number")
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
    """Something found.

    Attributes:
        name: Which of the thresholds was passed.
        value: The figure that passed it.
        since: Optimizer step of the first log at which it had.
        message: It in words.
    """

    name: str
    value: float
    since: int
    message: str


class Diagnosis:
    """Watches one training.

    Args:
        loss: The loss that trains.
        thresholds: When to speak.

    Attributes:
        findings: All that was said, in order.

    Example:
        >>> diagnosis = Diagnosis(prefloss.get("dpo", beta=0.1), Thresholds(examples=2))
        >>> pairs = Pairs.of(chosen=[-4.0, -6.0], rejected=[-9.0, -9.0])
        >>> diagnosis.add({name: (float(s), float(n)) for name, (s, n) in diagnosis.figures(pairs).items()})
        >>> diagnosis.shown()["falling_pairs"]
        1.0
    """

    def __init__(self, loss: Loss, thresholds: Thresholds | None = None) -> None:
        self.loss = loss
        self.thresholds = thresholds or Thresholds()
        self.findings: list[Finding] = []
        self._recent: dict[str, tuple[float, float]] = {}
        self._window: dict[str, tuple[float, float]] = {}
        self._since: dict[str, int] = {}
        self._said: dict[str, float] = {}
        self._example = ""

    @classmethod
    def of(cls, loss: Loss, diagnose: Thresholds | Mapping[str, Any] | bool | None) -> Diagnosis | None:
        """From what a trainer's user gives: True for the default thresholds, False or None for none at all.

        Raises:
            TypeError: If it is something else.
            ValueError: If a threshold is out of its range.
        """
        if diagnose is None or diagnose is False:
            return None
        if diagnose is True:
            return cls(loss)
        if isinstance(diagnose, Mapping):
            # As a checkpoint keeps it.
            return cls(loss, Thresholds(**diagnose))
        if not isinstance(diagnose, Thresholds):
            raise TypeError(
                f"diagnose: got {diagnose!r}, expected prefloss.diagnosis.Thresholds(...), True or False"
            )
        return cls(loss, diagnose)

    def figures(
        self,
        feedback: Feedback,
        seen: Feedback | None = None,
        evaluated: Evaluation | None = None,
        *,
        copies: int = 1,
    ) -> dict[str, Stat]:
        """Sums and counts of a training batch, to be added up over batches and ranks.

        Args:
            feedback: What the batch says.
            seen: The same as the loss took it, if it took another kind.
            evaluated: What `loss.evaluate(seen)` gave, before its backward pass.
            copies: How many processes give the same `seen`: all of them, where it was gathered from all.

        Raises:
            FloatingPointError: If a gradient is not finite; example and term are named.
        """
        found = _of_ratios(feedback, self.thresholds)
        if evaluated is not None:
            stats = self._of_gradients(feedback if seen is None else seen, evaluated)
            found |= {name: Stat(stat.sum / copies, stat.count / copies) for name, stat in stats.items()}
        return found

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Take sums and counts of all ranks, under the names that `figures` gave."""
        self._window = _merged(self._window, sums, 1.0)
        # A loss that looks across the ranks has gradients of all examples on each of them.
        known = [sums[name][1] for name in (_LENGTH[0], "falling_pairs", "zero_gradient") if name in sums]
        examples = known[0] if known else 0.0
        self._recent = _merged(self._recent, sums, math.exp(-examples / self.thresholds.memory))

    def shown(self) -> dict[str, float]:
        """The figures worth logging, over the recent examples; those that counted nothing are left out."""
        found = {
            name: total / count
            for name, (total, count) in self._recent.items()
            if count and not name.startswith(_MOMENTS)
        }
        correlation = self._correlation()
        return found if math.isnan(correlation) else {**found, "length_correlation": correlation}

    def judge(self, step: int) -> list[Finding]:
        """Say what is found. To be called on every rank when figures are logged.

        Args:
            step: Optimizer steps made so far.

        Returns:
            What was said now.
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

    def _of_gradients(self, seen: Feedback, evaluated: Evaluation) -> dict[str, Stat]:
        found = gradients(self.loss, evaluated, seen)
        if found is None:
            return {}
        counted = self.loss.counted(seen) if len(evaluated.terms) == 1 else seen.valid
        any_counts, pulls = counted.any(), ((found.sizes != 0) & counted).any()
        # One wait for the device.
        finite, none = torch.stack([found.finite, any_counts & ~pulls]).tolist()
        if not finite and self.thresholds.non_finite:
            check_gradients(self.loss, evaluated, seen)
        if none and not self._example:
            first = int(counted.nonzero()[0, 0])
            self._example = f"{', '.join(evaluated.terms)} of example {first} ({log_probs(seen, first)})"
        stats = {
            "zero_gradient": _stat(found.sizes == 0, counted),
            "batch_without_gradient": _stat(~pulls, any_counts),
        }
        start = None if self.thresholds.saturated is None else sizes_at_start(self.loss, seen)
        if start is not None:
            stats["saturated"] = _stat(found.sizes < self.thresholds.gone * start, counted & (start > 0))
        return stats

    def _correlation(self) -> float:
        if any(self._recent.get(name, (0.0, 0.0))[1] < 2 for name in _LENGTH):
            return math.nan
        x, y, xx, yy, xy = (total / count for total, count in (self._recent[name] for name in _LENGTH))
        of_lengths, of_margins = xx - x * x, yy - y * y
        # Lengths that are all the same, and margins of no more than rounding, correlate with nothing.
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
                self._said.pop(name, None)
            return
        since = self._since.setdefault(name, step)
        said = self._said.get(name)
        if said is not None and value < (2 * said if twice else said + 0.2):
            return
        self._said[name] = value
        again = "" if said is None else " (worse than when this was last said)"
        message = f"{words(value)} Seen at every log since step {since}{again}."
        self.findings.append(Finding(name, value, since, message))
        if _is_first_process():
            warnings.warn(f"step {step}: {message}", DiagnosisWarning, stacklevel=2)

    def _has_enough(self, name: str) -> bool:
        source = {"falling": "falling_pairs", "length": _LENGTH[0], "kl": "falling_pairs"}.get(name, name)
        return self._recent.get(source, (0.0, 0.0))[1] >= self.thresholds.examples

    def _falling(self, share: float) -> str:
        if resists_falling(self.loss):
            why = f"{self.loss.name} pulls such completions up, so look at its weights and the learning rate."
        else:
            others = ", ".join(resisting()) or "none of the usual ones"
            why = (
                f"{self.loss.name} does not pull a fallen chosen completion up more than it pushes the rejected one "
                f"down. Losses that do: {others}; a sum with an NLL term ('1.0*dpo + 1.0*nll') does, too. A larger "
                "beta or a smaller learning rate keeps the policy closer to the reference."
            )
        return (
            f"Chosen completions are becoming less likely: {share:.0%} of recent pairs have a chosen completion that "
            f"lost over {self.thresholds.fall:g} nats against the reference while the margin over the rejected one "
            f"grew. {why}"
        )

    def _saturated(self, share: float) -> str:
        return (
            f"The loss is saturated: {share:.0%} of recent examples have less than {self.thresholds.gone:.0%} of the "
            f"gradient that {self.loss.name} has where policy and reference agree. What is left trains on the others "
            "alone: stop earlier, take more data or fewer epochs, or a smaller beta."
        )

    def _length(self, size: float) -> str:
        correlation, (x, count) = self._correlation(), self._recent[_LENGTH[0]]
        longer = "longer" if correlation > 0 else "shorter"
        return (
            f"The implicit reward follows length: margin and difference in length correlate by {correlation:+.2f} "
            f"(recent pairs; chosen completions are {x / count:+.1f} tokens longer on average), so {longer} "
            "completions win. Balance the lengths in the data, or take a loss that accounts for length, such as ipo, "
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
    """A diagnosis as a checkpoint keeps it: its thresholds, or False for none; `Diagnosis.of` reads it."""
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
    votes = loss.spec.feedback is Labels
    with standing_still(loss), torch.enable_grad():
        values = loss(replace(pairs.to_labels(), kl=torch.tensor(0.0)) if votes else pairs)
        up, down = torch.autograd.grad(values.sum(), policy, allow_unused=True)
    return (0.0 if up is None else -float(up)), (0.0 if down is None else float(down))


def resisting(names: Iterable[str] = _CANDIDATES) -> list[str]:
    """Which of these losses resist falling chosen completions, at their default hyperparameters."""
    return [name for name in names if resists_falling(get(name))]


def _of_ratios(feedback: Feedback, thresholds: Thresholds) -> dict[str, Stat]:
    if isinstance(feedback, Rankings):
        feedback = feedback.to_pairs("best_worst")
    parts = feedback.parts[:2] if isinstance(feedback, Pairs) else (feedback.completions,)
    if any(part.reference is None for part in parts):
        return {}
    found = _fallen(feedback, thresholds.fall)
    if any(part.tokens is None for part in parts):
        return found
    tokens = [part.tokens for part in parts if part.tokens is not None]
    drop = torch.stack([torch.where(feedback.valid, -part.h.detach(), 0.0).sum() for part in parts]).sum()
    found["kl_per_token"] = Stat(
        drop, torch.stack([torch.where(feedback.valid, n, 0).sum() for n in tokens]).sum()
    )
    if isinstance(feedback, Pairs):
        x, y = (tokens[0] - tokens[1]).to(drop.dtype), feedback.margin().detach()
    else:
        x, y = tokens[0].to(drop.dtype), feedback.completions.h.detach()
    for name, values in zip(_LENGTH, (x, y, x * x, y * y, x * y), strict=True):
        found[name] = _stat(values, feedback.valid)
    return found


def _fallen(feedback: Pairs | Labels, fall: float) -> dict[str, Stat]:
    if isinstance(feedback, Pairs):
        fell = (feedback.chosen.h.detach() < -fall) & (feedback.margin().detach() > 0)
        return {"falling_pairs": _stat(fell, feedback.valid)}
    # A vote has no other side: its margin is over the mean of the downvotes beside it.
    h, down = feedback.completions.h.detach(), feedback.valid & ~feedback.desirable
    others = torch.where(down, h, 0.0).sum() / down.sum().clamp(min=1)
    fell = (h < -fall) & (h > others) & down.any()
    return {"falling_pairs": _stat(fell, feedback.valid & feedback.desirable)}


def _stat(values: Tensor, keep: Tensor) -> Stat:
    values = values if values.is_floating_point() else values.float()
    return Stat(torch.where(keep, values, 0.0).sum(), keep.sum())


def _merged(
    old: Mapping[str, tuple[float, float]], new: Mapping[str, tuple[float, float]], keep: float
) -> dict[str, tuple[float, float]]:
    faded = {name: (keep * total, keep * count) for name, (total, count) in old.items()}
    return faded | {
        name: tuple(a + b for a, b in zip(faded.get(name, (0.0, 0.0)), sums, strict=True))
        for name, sums in new.items()
    }  # type: ignore[return-value]


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _range(name: str, low: float, high: float) -> str:
    opening = "[" if name == "fall" or low else "("
    return f"{opening}{low:g}, {high:g}]"
