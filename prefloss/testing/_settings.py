"""Other values of a loss's hyperparameters, to see what they do."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from prefloss.hyperparameters import Coerce, Interval, Parameter
from prefloss.hyperparameters import plain_type as _plain_type
from prefloss.testing._subject import Subject


def other_settings(subject: Subject, name: str, parameter: Parameter) -> list[Any]:
    """Values other than the present one, within its range; none where only code or an object can say them."""
    plain, now = _plain_type(parameter.type), subject.loss.params[name]
    if isinstance(parameter.constraint, Coerce):
        return []
    if get_origin(plain) is Literal:
        return [value for value in get_args(plain) if value != now]
    if plain is bool:
        return [not now]
    if plain not in (int, float) or isinstance(now, bool) or not isinstance(now, int | float):
        return []
    candidates = [plain(value) for value in (2 * now, now / 2, now + 1, now - 1, 0.3, 0.7)]
    allowed = parameter.constraint if isinstance(parameter.constraint, Interval) else Interval()
    return [value for value in candidates if value in allowed and value != now][:3]
