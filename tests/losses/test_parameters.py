"""Hyperparameters of any annotation take values of their type alone."""

import pytest

from prefloss import Pairs
from prefloss.registry import Loss, registered, spec_from


def optional(pairs: Pairs, *, beta: float = 0.1, bound: float | None = None):
    return beta * pairs.margin()


def test_an_optional_number_is_a_number_or_none():
    """AUDIT T1."""
    with registered(spec_from(optional)):
        assert Loss.bind("optional", {}).params["bound"] is None
        assert Loss.bind("optional", {"bound": 0.5}).params["bound"] == 0.5
        assert Loss.bind("optional", {"bound": None}).params["bound"] is None
        with pytest.raises(TypeError, match="bound: got 'wide'"):
            Loss.bind("optional", {"bound": "wide"})
        with pytest.raises(ValueError, match="bound: got inf"):
            Loss.bind("optional", {"bound": float("inf")})
        with pytest.raises(TypeError, match="beta: got None"):
            Loss.bind("optional", {"beta": None})
