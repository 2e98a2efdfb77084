"""Derivative of an oracle in each policy log-prob that it was given, what the paper detaches held still."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
from mpmath import mp, mpf

from tests.oracle.numbers import Group, Numbers, Pair, Side, number

# What the policy is asked for; the rest of a side is the reference's or is detached.
POLICY_FIELDS = ("policy", "per_token_policy", "per_token_kl", "per_token_kl_policy")


def gradient(function: Callable, data: Any, *, digits: int = 150, **hyper) -> dict[tuple, mpf]:
    """Derivative of a loss, by the path of each policy number; for a batch, of the sum of its values.

    Paths are ("chosen", "policy"), ("gold", "policy"), ("side", "policy") for a vote, (2, "policy") for the third
    of a group, and with the place in the batch in front: (0, "chosen", "per_token_policy", 5). Central differences
    of step 10^(-digits/3) have an error near 10^(-2 digits/3) relative to the derivative and as much relative to
    the loss. At a kink they give the mean of both slopes.
    """
    with mp.workdps(digits):
        if function.freezes and hyper.get("frozen") is None:
            hyper = {name: number(value) for name, value in hyper.items()}
            hyper["frozen"] = function.freezes(data, **hyper)
        step = mpf(10) ** (-(digits // 3))

        def total(moved):
            value = function(moved, **hyper)
            return mpmath.fsum(value) if isinstance(value, list) else value

        return {
            path: (total(shift(data, path, step)) - total(shift(data, path, -step))) / (2 * step)
            for path in leaves(data)
        }


def leaves(data: Any) -> Iterator[tuple]:
    """Path of each policy number below a record or a list of records."""
    if isinstance(data, list):
        for place, entry in enumerate(data):
            yield from ((place, *path) for path in leaves(entry))
    elif isinstance(data, Side):
        for name in POLICY_FIELDS:
            value = getattr(data, name)
            if isinstance(value, list):
                yield from ((name, place) for place in range(len(value)))
            elif value is not None:
                yield (name,)
    elif isinstance(data, Group):
        yield from leaves(data.sides)
    elif isinstance(data, Numbers):
        names = ("chosen", "rejected", "gold") if isinstance(data, Pair) else ("side",)
        for name in names:
            if getattr(data, name) is not None:
                yield from ((name, *path) for path in leaves(getattr(data, name)))


def shift(data: Any, path: tuple, step: mpf) -> Any:
    """The same data with the number at the end of the path moved by the step."""
    if not path:
        return data + step
    first, *rest = path
    if isinstance(data, Group):
        return dataclasses.replace(data, sides=shift(data.sides, path, step))
    if isinstance(data, list):
        return [shift(entry, tuple(rest), step) if i == first else entry for i, entry in enumerate(data)]
    return dataclasses.replace(data, **{first: shift(getattr(data, first), tuple(rest), step)})
