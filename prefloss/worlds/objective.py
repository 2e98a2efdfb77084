"""The losses of all runs in few calls: `torch.func.vmap` over seeds, and over the numbers of a sweep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from prefloss.registry import Loss
from prefloss.worlds.feeding import Values, feedback_of

Kept = Mapping[tuple[str, str], Tensor]


class Objective:
    """The mean losses of all runs at once, [losses, seeds].

    Losses that differ in numbers alone (a sweep of beta) are one call, with those numbers as tensors, and so are all
    seeds. What a loss keeps from batch to batch is kept as tensors too, one number a run. If the first batch shows that
    such a call gives other values than a call a loss (or, for a loss with a state, a call a run), it is split.

    Args:
        losses: What to train with; copied.
        kind: Feedback of the data.
        seeds: How many there are.

    Attributes:
        wanted: Fields that some loss needs or reads, as in `NEEDS`.
    """

    def __init__(self, losses: Sequence[Loss], kind: type, seeds: int) -> None:
        self._losses, self._kind, self._seeds = losses, kind, seeds
        self.wanted = frozenset().union(*(_wanted(loss) for loss in losses))
        self._parts: list[_Part] = []

    def __call__(self, moving: Values, fixed: Values) -> Tensor:
        """Mean loss of each run, from values [losses, seeds, n, ...] and [seeds, n, ...]."""
        if not self._parts:
            with torch.no_grad():
                stirred = _stirred(moving)
                self._parts = [part for rows in self._alike() for part in self._planned(rows, stirred, fixed)]
        return torch.cat([part(_cut(moving, part.rows), fixed) for part in self._parts])

    def step(self) -> None:
        """Move the schedules on."""
        for part in self._parts:
            for loss in part.losses:
                loss.step()

    def _alike(self) -> list[slice]:
        """Neighbours that differ in numbers alone."""
        keys: list[Any] = []
        for row, loss in enumerate(self._losses):
            plain = {name: value for name, value in loss.params.items() if not isinstance(value, float)}
            keys.append((loss.name, repr(plain), tuple(loss.params)) if loss.params else row)
        starts = [row for row, key in enumerate(keys) if row == 0 or key != keys[row - 1]]
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)]

    def _planned(self, rows: slice, moving: Values, fixed: Values) -> list[_Part]:
        """The fewest calls that give what the surest ones give."""
        each = [slice(row, row + 1) for row in range(rows.start, rows.stop)]
        keeps = any(loss.state for loss in self._losses[rows])
        if not keeps and len(each) == 1:
            return [self._part(_Mapped, rows)]
        surest = _Looped if keeps else _Mapped
        expected = _twice([self._part(surest, cut) for cut in each], moving, fixed)
        for cuts in ([rows], each) if keeps else ([rows],):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    got = _twice([self._part(_Mapped, cut) for cut in cuts], moving, fixed)
            except (RuntimeError, TypeError, ValueError, Warning):
                # The loss uses a hyperparameter or its state as a Python number, or looks at its value.
                continue
            if torch.allclose(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True):
                return [self._part(_Mapped, cut) for cut in cuts]
        return [self._part(surest, cut) for cut in each]

    def _part(self, made: type[_Part], rows: slice) -> _Part:
        return made(rows, self._losses[rows], self._kind, self._seeds)


class _Part:
    """Mean losses of some rows, [rows, seeds], from values [rows, seeds, n, ...] and [seeds, n, ...].

    Attributes:
        rows: Which.
        losses: The copies that it calls.
    """

    def __init__(self, rows: slice, losses: Sequence[Loss], kind: type, seeds: int) -> None:
        self.rows, self.losses = rows, [copy.deepcopy(loss) for loss in losses]
        self._kind, self._seeds = kind, seeds

    def __call__(self, moving: Values, fixed: Values) -> Tensor:
        raise NotImplementedError

    def _mean(self, loss: Loss, moving: Values, fixed: Values) -> Tensor:
        wanted = _wanted(loss)
        values = {
            name: value for name, value in {**moving, **fixed}.items() if name != "kl" or "kl" in wanted
        }
        return loss.mean(feedback_of(self._kind, values))


class _Looped(_Part):
    """A loss with a copy for each seed, called one by one."""

    def __init__(self, rows: slice, losses: Sequence[Loss], kind: type, seeds: int) -> None:
        super().__init__(rows, [loss for loss in losses for _ in range(seeds)], kind, seeds)

    def __call__(self, moving: Values, fixed: Values) -> Tensor:
        now = _at(moving, 0)
        each = [self._mean(own, _at(now, seed), _at(fixed, seed)) for seed, own in enumerate(self.losses)]
        return torch.stack(each)[None]


class _Mapped(_Part):
    """Losses that differ in numbers alone as one call, mapped over those numbers, over seeds, and over their states."""

    def __init__(self, rows: slice, losses: Sequence[Loss], kind: type, seeds: int) -> None:
        super().__init__(rows, losses, kind, seeds)
        first = self.losses[0]
        # What they share stays a Python number.
        swept = {name: [loss.params[name] for loss in losses] for name in first.params}
        self._numbers = {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in swept.items()
            if isinstance(values[0], float) and len(set(values)) > 1
        }
        # Numbers that move with the batches; counters of calls and steps are the same for all runs.
        self._kept = {
            (name, saved): torch.full((len(losses), seeds), value, dtype=torch.float64)
            for name, state in first.state.items()
            for saved, value in state.state_dict().items()
            if isinstance(value, float)
        }

    def __call__(self, moving: Values, fixed: Values) -> Tensor:
        over_seeds = vmap(self._one, in_dims=(None, 0, 0, 0), randomness="same")
        over_rows = vmap(over_seeds, in_dims=(0, 0, 0, None), randomness="same")
        if len(self.losses) > 1:
            means, self._kept = over_rows(self._numbers, self._kept, moving, fixed)
            return means
        kept = {key: value[0] for key, value in self._kept.items()}
        means, kept = over_seeds({}, kept, _at(moving, 0), fixed)
        self._kept = {key: value[None] for key, value in kept.items()}
        return means[None]

    def _one(self, numbers: Values, kept: Kept, moving: Values, fixed: Values) -> tuple[Tensor, Kept]:
        """One run: its loss, and the state after it."""
        loss = self.losses[0]
        if numbers:
            loss = Loss(loss.spec, {**loss.params, **numbers})
        state = loss.state
        for (name, saved), value in kept.items():
            setattr(state[name], saved, value)
        mean = self._mean(loss, moving, fixed)
        return mean, {(name, saved): getattr(state[name], saved) for name, saved in kept}


def _twice(parts: Sequence[_Part], moving: Values, fixed: Values) -> Tensor:
    """The means of two equal batches, one after the other: a state shows in the second."""
    return torch.stack(
        [torch.cat([part(_cut(moving, part.rows), fixed) for part in parts]) for _ in range(2)]
    )


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
