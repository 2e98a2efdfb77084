"""KL baselines of KTO: estimates of how far the policy has moved, subtracted from every log-ratio."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from prefloss.feedback import Labels
from prefloss.logratios import LogRatios
from prefloss.losses._core.state import State, check_decay


class KLBaseline(Protocol):
    """Labels -> KL baseline z0, a scalar or [n], nats, without gradient."""

    def __call__(self, labels: Labels, /) -> Tensor:
        """Estimate the baseline for this batch."""
        ...


def mismatched(labels: Labels) -> Tensor:
    """The paper's estimate: mean log-ratio of completions under prompts they do not belong to, at least 0.

    Estimates KL(policy || reference) over the data's prompts, from `labels.mismatched`. Completions without
    tokens do not count.

    Raises:
        ValueError: If `labels.mismatched` is None.
    """
    if labels.mismatched is None:
        raise ValueError("kl_baseline: 'mismatched' reads labels.mismatched: got None, expected LogRatios")
    # Clamped after the mean, as the paper does; clamping each sequence first would bias the estimate upwards.
    return mean_log_ratio(labels.mismatched).clamp(min=0)


def column(labels: Labels) -> Tensor:
    """A baseline computed elsewhere, `labels.kl`, as given.

    Raises:
        ValueError: If `labels.kl` is None.
    """
    if labels.kl is None:
        raise ValueError("kl_baseline: 'column' reads labels.kl: got None, expected a scalar or [n] in nats")
    return labels.kl


def zero(labels: Labels) -> Tensor:
    """No baseline: KTO with z0 = 0, which APO calls its unpaired form."""
    return torch.zeros((), device=labels.completions.device, dtype=labels.completions.policy.dtype)


def auto(labels: Labels) -> Tensor:
    """What the labels carry: `kl` if given, else `mismatched`, else 0 with a warning."""
    if labels.kl is not None:
        return column(labels)
    if labels.mismatched is not None:
        return mismatched(labels)
    _warn_no_baseline()
    return zero(labels)


class RunningMean(State):
    """Mean log-ratio of the examples seen so far, at least 0; works at batch size 1 and in any order.

    A batch is judged against the batches before it, so an example never is its own baseline; the first sees 0.
    It estimates how far the policy has moved on the data's own completions, a stand-in for the paper's
    mismatched estimate where no second forward pass is wanted.

    Args:
        decay: How much of the past is kept at each batch, in [0, 1).

    Example:
        >>> baseline = RunningMean(decay=0.5)
        >>> labels = Labels(completions=LogRatios.of([2.0]), desirable=[True])
        >>> baseline(labels), baseline(labels)
        (tensor(0.), tensor(2.))
    """

    name = "running_mean"
    saved = ("total", "weight")
    settings = ("decay",)

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    def __call__(self, labels: Labels) -> Tensor:
        """The baseline from earlier batches, a scalar; then, in training, take this batch in."""
        value = zero(labels) + max(0.0, self.value)
        if self.training:
            self._take_in(labels.completions)
        return value

    @property
    def value(self) -> float:
        """Running mean log-ratio, nats; 0 before the first batch."""
        return self.total / self.weight if self.weight else 0.0

    def _take_in(self, completions: LogRatios) -> None:
        count, total, _ = self._totals(completions.h, ~completions.empty)
        if count:
            # Dividing by the accumulated weight removes the bias towards 0 of the first batches.
            self.total = self.decay * self.total + total / count
            self.weight = self.decay * self.weight + 1.0


def mean_log_ratio(ratios: LogRatios) -> Tensor:
    """Mean of h over the completions that have tokens, a scalar, nats, without gradient; 0 if none has."""
    present = ~ratios.empty
    # Empty completions have h = 0 by construction, so they add nothing to the sum.
    return ratios.h.detach().sum() / present.sum().clamp(min=1)


STATELESS: dict[str, KLBaseline] = {"auto": auto, "mismatched": mismatched, "column": column, "zero": zero}
WANTED = f"one of {', '.join(map(repr, [*STATELESS, 'running_mean']))} or a callable Labels -> nats"


def as_parameter(value: Any) -> Any:
    """What `get` binds: a stateless baseline keeps its name, a running mean becomes an object with its state.

    Raises:
        ValueError: If a name is unknown.
        TypeError: If it is neither a name nor callable.
    """
    if value == "running_mean":
        return RunningMean()
    if isinstance(value, dict) and value.get("name") == "running_mean":
        return RunningMean(**{name: setting for name, setting in value.items() if name != "name"})
    if isinstance(value, str) and value not in STATELESS:
        raise ValueError(f"got {value!r}, expected {WANTED}")
    if not isinstance(value, str) and not callable(value):
        raise TypeError(f"got {value!r}, expected {WANTED}")
    return value


def resolve(value: str | KLBaseline) -> KLBaseline:
    """The function behind a bound baseline.

    Raises:
        ValueError: For `"running_mean"`, which would forget its state after each call, and for unknown names.
    """
    if value == "running_mean":
        raise ValueError(
            "kl_baseline: got 'running_mean', expected RunningMean(): the mean lives in the object"
        )
    bound: Any = as_parameter(value)
    return STATELESS[bound] if isinstance(bound, str) else bound


def _warn_no_baseline() -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        "kto: the labels carry neither `kl` nor `mismatched`, so the KL baseline is 0; pass one of them, or "
        "kl_baseline='zero' or 'running_mean' to choose.",
        UserWarning,
        stacklevel=2,
    )
