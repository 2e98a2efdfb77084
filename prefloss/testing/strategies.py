"""Hypothesis strategies that draw log-ratios and feedback, for the checks and for your own tests.

Example::

    from hypothesis import given
    from prefloss.testing import strategies


    @given(strategies.pairs(fields=("tokens",)))
    def test_my_loss(pairs): ...
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.testing.draws import Drawing, Recipe, draw
from prefloss.testing.fields import available
from prefloss.testing.subject import Checkable, Subject, as_loss, under_test

try:
    import hypothesis as hypothesis
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky as Flaky
except ModuleNotFoundError as err:
    if err.name != "hypothesis":  # a fault inside hypothesis is not a missing hypothesis
        raise
    raise ModuleNotFoundError("prefloss.testing needs hypothesis: pip install 'prefloss[test]'") from err

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

STEPS = 1000
"""Numbers are drawn on a grid of this many steps to each side of the middle: short to read, quick to draw."""

EXTREME = 1e4
"""Log-ratios of the extreme draws, nats."""

_STEPS = st.integers(-STEPS, STEPS)


class _Hypothesis(Random):
    """Numbers from hypothesis; the simplest is the middle of the range."""

    def __init__(self, draw: DrawFn) -> None:
        super().__init__(0)
        self._draw = draw

    def randint(self, a: int, b: int) -> int:
        return self._draw(st.integers(a, b))

    def uniform(self, a: float, b: float) -> float:
        step = self._draw(_STEPS)
        return round((a + b) / 2 + step * (b - a) / (2 * STEPS), 6)


@st.composite
def drawn(draw_from: DrawFn, kind: type, recipe: Recipe) -> Any:
    """Feedback of a kind with what the recipe says."""
    return draw(_Hypothesis(draw_from), kind, recipe)


@st.composite
def log_ratios(
    draw: DrawFn, shape: int | tuple[int, ...] = 3, *, per_token: bool = False, **options: Any
) -> LogRatios:
    """Completions: policy and reference log-probs of at most 0.

    Args:
        draw: Supplied by hypothesis.
        shape: Leading shape.
        per_token: With the log-probs of each token, which add up to the sums.
        **options: `reference`, `tokens` (bool), `dtype`, and `magnitude`: the largest log-ratio, nats; with rows, per
            completion of two tokens.
    """
    fields = frozenset({"per_token"} if per_token else ())
    recipe = Recipe(**{"fields": fields, "dtype": torch.float32, **options})
    return Drawing(_Hypothesis(draw), recipe).log_ratios((shape,) if isinstance(shape, int) else shape)


def pairs(size: int | None = None, fields: Iterable[str] = (), **options: Any) -> SearchStrategy[Pairs]:
    """Pairs; scores, if asked for, are win probabilities with the chosen one's higher.

    Args:
        size: Number of pairs; None draws 1 to 6.
        fields: What to fill beside log-probs and token counts, as in a loss's `needs`: `scores`, `gold`,
            `embedding`, `per_token`, `per_token.kl` ...
        **options: `reference`, `tokens`, `weight`, `ties` (all bool), `magnitude` (nats), `dtype`.

    Raises:
        ValueError: If pairs have no such field.
    """
    return _of(Pairs, size, fields, options)


def labels(size: int | None = None, fields: Iterable[str] = (), **options: Any) -> SearchStrategy[Labels]:
    """Labels with upvotes and downvotes in any proportion; arguments and errors as of `pairs`.

    `fields` may be `scores`, `baseline`, `mismatched` (one completion each), `kl` (a scalar, or one each) ...
    """
    return _of(Labels, size, fields, options)


def rankings(size: int | None = None, fields: Iterable[str] = (), **options: Any) -> SearchStrategy[Rankings]:
    """Groups of two to four completions with distinct scores; arguments and errors as of `pairs`.

    `masked=False` gives groups in which no completion is absent, `ties=True` scores that may be equal.
    """
    return _of(Rankings, size, fields, options)


def _of(kind: type, size: int | None, fields: Iterable[str], options: dict[str, Any]) -> SearchStrategy[Any]:
    names, known = frozenset(fields), available(kind)
    for name in sorted(names.difference(known)):
        listed = ", ".join(known)
        raise ValueError(f"fields: got {name!r}, expected some of {listed}: {kind.__name__} have no other")
    return drawn(kind, Recipe(**{"size": size, "fields": names, "dtype": torch.float32, **options}))


def feedback_for(loss: Checkable, *, extreme: bool = False, **options: Any) -> SearchStrategy[Feedback]:
    """Feedback of the kind that a loss takes, with everything in its `needs` and `reads`.

    Args:
        loss: A loss, its spec, its name or its function.
        extreme: Log-ratios up to 1e4 nats instead of 10.
        **options: `size`, and the options of `pairs`; `dtype` is float32 by default.
    """
    bound = as_loss(loss)
    magnitude = {"magnitude": EXTREME} if extreme else {}
    with under_test(bound.spec):
        recipe = Subject(bound).recipe(**{"dtype": torch.float32, **magnitude, **options})
    return drawn(bound.spec.feedback, recipe)
