"""BCO's reward shift as a hyperparameter: a running mean that each loss keeps for itself, or a fixed number."""

from __future__ import annotations

import math
from typing import Annotated, Any

from torch import Tensor

from prefloss.losses._core.parameters import Coerce
from prefloss.losses._core.state import RewardShift

WANTED = "'running' or a finite number in nats"


def as_shift(value: Any) -> RewardShift | float:
    """What `get` binds: a fresh running mean for its name, a number as it is.

    Raises:
        ValueError: If a name is unknown or a number not finite.
        TypeError: If it is neither.
    """
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(name, str):
        if name not in ("running", RewardShift.name):
            raise ValueError(f"got {value!r}, expected {WANTED}")
        return RewardShift()
    if isinstance(value, RewardShift):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"got {value!r}, expected {WANTED}")
    if not math.isfinite(value):
        raise ValueError(f"got {value!r}, expected {WANTED}")
    return float(value)


Shift = Annotated[str | float | RewardShift, Coerce(as_shift, WANTED)]


def resolve(shift: str | float | RewardShift, rewards: Tensor, keep: Tensor) -> Tensor | float:
    """The shift to subtract now, without gradient; a running mean takes in the rewards that count first.

    Args:
        shift: A bound hyperparameter.
        rewards: beta * h, any shape.
        keep: True where a reward counts, same shape.

    Raises:
        ValueError: For a name, which would forget its state after each call.
    """
    if isinstance(shift, str):
        raise ValueError(
            f"shift: got {shift!r}, expected RewardShift() or a number: the mean lives in the object"
        )
    return shift(rewards, keep) if isinstance(shift, RewardShift) else shift
