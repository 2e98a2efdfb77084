"""The losses of all runs in few calls: `torch.func.vmap` over seeds, and over the numbers of a sweep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from prefloss.registry import Loss
from prefloss.worlds.feeding import Values, feedback_of

# Values of some losses, [losses, seeds, n, ...], and fixed ones, [seeds, n, ...] -> mean losses, [losses, seeds].
Call = Callable[[Values, Values], Tensor]


class Objective:
    """The mean losses of all runs at once, [losses, seeds].

    Losses that differ in numbers alone (a sweep of beta) are one call, with those numbers as tensors, if the first
    batch shows that they give the same values so; otherwise each loss is a call of its own. Seeds are one call, except
    where a loss keeps a state from batch to batch: then every run has a copy of the loss.

    Args:
        losses: What to train with; copied.
        kind: Feedback of the data.
        seeds: How many there are.

    Attributes:
        wanted: Fields that some loss needs or reads, as in `NEEDS`.
    """

    def __init__(self, losses: Sequence[Loss], kind: type, seeds: int) -> None:
        self._kind = kind
        self._copies = [[copy.deepcopy(loss) for _ in range(seeds if loss.state else 1)] for loss in losses]
        self.wanted = frozenset().union(*(_wanted(loss) for loss in losses))
        self._calls: list[tuple[slice, Call]] | None = None

    def __call__(self, moving: Values, fixed: Values) -> Tensor:
        """Mean loss of each run, from values [losses, seeds, n, ...] and [seeds, n, ...]."""
        if self._calls is None:
            with torch.no_grad():
                stirred = _stirred(moving)
                self._calls = [part for rows in self._alike() for part in self._planned(rows, stirred, fixed)]
        return torch.cat([call(_cut(moving, rows), fixed) for rows, call in self._calls])

    def step(self) -> None:
        """Move the schedules on."""
        for copies in self._copies:
            for loss in copies:
                loss.step()

    def _alike(self) -> list[slice]:
        """Neighbours that differ in numbers alone."""
        keys: list[Any] = []
        for row, (loss, *_) in enumerate(self._copies):
            plain = {name: value for name, value in loss.params.items() if not isinstance(value, float)}
            sweepable = loss.params and not loss.state
            keys.append((loss.name, repr(plain), tuple(loss.params)) if sweepable else row)
        starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]

    def _planned(self, rows: slice, moving: Values, fixed: Values) -> list[tuple[slice, Call]]:
        """One call for these losses if it gives what a call for each gives."""
        apart = [(slice(row, row + 1), self._alone(row)) for row in range(rows.start, rows.stop)]
        if len(apart) == 1:
            return apart
        expected = torch.cat([call(_cut(moving, row), fixed) for row, call in apart])
        together = self._swept(rows)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                got = together(_cut(moving, rows), fixed)
        except (RuntimeError, TypeError, ValueError, Warning):
            # The loss uses a hyperparameter as a Python number, or looks at its value.
            return apart
        same = torch.allclose(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
        return [(rows, together)] if same else apart

    def _alone(self, row: int) -> Call:
        copies = self._copies[row]
        loss = copies[0]
        if not loss.state:
            over_seeds = vmap(lambda moving, fixed: self._mean(loss, moving, fixed))
            return lambda moving, fixed: over_seeds(_at(moving, 0), fixed)[None]

        def one_by_one(moving: Values, fixed: Values) -> Tensor:
            now = _at(moving, 0)
            each = [self._mean(own, _at(now, seed), _at(fixed, seed)) for seed, own in enumerate(copies)]
            return torch.stack(each)[None]

        return one_by_one

    def _swept(self, rows: slice) -> Call:
        losses = [copies[0] for copies in self._copies[rows]]
        first = losses[0]
        # What they share stays a Python number.
        swept = {name: [loss.params[name] for loss in losses] for name in first.params}
        numbers = {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in swept.items()
            if isinstance(values[0], float) and len(set(values)) > 1
        }

        def one(now: Values, moving: Values, fixed: Values) -> Tensor:
            return self._mean(Loss(first.spec, {**first.params, **now}), moving, fixed)

        over_seeds = vmap(one, in_dims=(None, 0, 0))
        return lambda moving, fixed: vmap(over_seeds, in_dims=(0, 0, None))(numbers, moving, fixed)

    def _mean(self, loss: Loss, moving: Values, fixed: Values) -> Tensor:
        wanted = _wanted(loss)
        values = {
            name: value for name, value in {**moving, **fixed}.items() if name != "kl" or "kl" in wanted
        }
        return loss.mean(feedback_of(self._kind, values))


def _wanted(loss: Loss) -> frozenset[str]:
    """Fields to give to a loss: all that it needs or reads; of mismatched completions and the exact KL, one."""
    wanted = loss.needs | loss.spec.reads
    return wanted - {"kl"} if loss.reads_mismatched else wanted - {"mismatched"}


def _at(values: Values, row: int) -> Values:
    return {name: value[row] for name, value in values.items()}


def _cut(values: Values, rows: slice) -> Values:
    return {name: value[rows] for name, value in values.items()}


def _stirred(moving: Values) -> Values:
    """Other values of the same shapes: at the reference all log-ratios are 0, and many hyperparameters do nothing."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(moving["policy"].shape, generator=generator, dtype=torch.float64)
    return {**moving, "policy": moving["policy"].detach() + noise}
