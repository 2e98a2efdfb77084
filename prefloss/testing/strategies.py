"""Hypothesis strategies that draw log-ratios and feedback, for the checks and for your own tests.

Example::

    from hypothesis import given
    from prefloss.testing import strategies


    @given(strategies.pairs(fields=("tokens",)))
    def test_my_loss(pairs): ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.testing import _draws, _fields
from prefloss.testing._draws import Wanted
from prefloss.testing._subject import Checkable, Subject, as_loss, registered

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


class _Hypothesis:
    """Numbers from hypothesis; the simplest is the middle of the range."""

    def __init__(self, draw: DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def number(self, low: float, high: float) -> float:
        step = self._draw(_STEPS)
        return round((low + high) / 2 + step * (high - low) / (2 * STEPS), 6)


_STEPS = st.integers(-STEPS, STEPS)


@st.composite
def _feedback(draw: DrawFn, kind: type, wanted: Wanted) -> Any:
    return _draws.draw(_Hypothesis(draw), kind, wanted)


@st.composite
def log_ratios(
    draw: DrawFn,
    shape: int | tuple[int, ...] = 3,
    *,
    reference: bool = True,
    tokens: bool = True,
    per_token: bool = False,
    magnitude: float = 10.0,
    dtype: torch.dtype = torch.float32,
) -> LogRatios:
    """Completions: policy and reference log-probs of at most 0, which differ by at most `magnitude` nats.

    Args:
        draw: Supplied by hypothesis.
        shape: Leading shape.
        reference: With reference log-probs.
        tokens: With token counts.
        per_token: With the log-probs of each token, which add up to the sums.
        magnitude: Largest log-ratio, nats; with rows, per completion of two tokens.
        dtype: Of the log-probs.
    """
    fields = frozenset({"per_token"}) if per_token else frozenset[str]()
    wanted = Wanted(fields=fields, reference=reference, tokens=tokens, magnitude=magnitude, dtype=dtype)
    leading = (shape,) if isinstance(shape, int) else tuple(shape)
    return _draws.draw_log_ratios(_Hypothesis(draw), leading, wanted)


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
    return _feedback(Pairs, _wanted(Pairs, size, fields, options))


def labels(size: int | None = None, fields: Iterable[str] = (), **options: Any) -> SearchStrategy[Labels]:
    """Labels with upvotes and downvotes in any proportion.

    Args:
        size: Number of completions; None draws 1 to 6.
        fields: What to fill, as in a loss's `needs`: `scores`, `baseline`, `mismatched` (one completion for each
            example), `kl` (a scalar or one for each), `per_token` ...
        **options: As of `pairs`.

    Raises:
        ValueError: If labels have no such field.
    """
    return _feedback(Labels, _wanted(Labels, size, fields, options))


def rankings(size: int | None = None, fields: Iterable[str] = (), **options: Any) -> SearchStrategy[Rankings]:
    """Groups of two to four completions with distinct scores.

    Args:
        size: Number of groups; None draws 1 to 6.
        fields: `per_token` and its rows.
        **options: As of `pairs`; `masked=False` for groups in which no completion is absent, `ties=True` for scores
            that may be equal.

    Raises:
        ValueError: If rankings have no such field.
    """
    return _feedback(Rankings, _wanted(Rankings, size, fields, options))


def feedback_for(loss: Checkable, *, extreme: bool = False, **options: Any) -> SearchStrategy[Feedback]:
    """Feedback of the kind that a loss takes, with everything in its `needs` and `reads`.

    Args:
        loss: A loss, its spec, its name or its function.
        extreme: Log-ratios up to 1e4 nats instead of 10.
        **options: `size`, and the options of `pairs`; `dtype` is float32 unless given.
    """
    bound = as_loss(loss)
    with registered(bound.spec):
        subject = Subject(bound)
    magnitude = {"magnitude": EXTREME} if extreme else {}
    return _feedback(
        subject.spec.feedback, subject.wanted(**{"dtype": torch.float32, **magnitude, **options})
    )


def wanted_feedback(subject: Subject, **options: Any) -> SearchStrategy[Feedback]:
    """Feedback for a check: also without what the loss can do without."""
    kind = subject.spec.feedback
    return st.one_of([_feedback(kind, subject.wanted(absent, **options)) for absent in subject.absences])


def _wanted(kind: type, size: int | None, fields: Iterable[str], options: dict[str, Any]) -> Wanted:
    names = frozenset(fields)
    unknown = sorted(names - {*_fields.available(kind)})
    if unknown:
        listed = ", ".join(_fields.available(kind))
        raise ValueError(
            f"fields: got {unknown[0]!r}, expected some of {listed}: {kind.__name__} have no other"
        )
    return replace(Wanted(size=size, fields=names, dtype=torch.float32), **options)
