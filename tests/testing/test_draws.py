"""One generator draws all feedback, from a seed or from hypothesis."""

import random

import pytest
import torch

from prefloss import Labels, Pairs, Rankings
from prefloss.feedback import fields_of
from prefloss.testing.draws import Recipe, draw
from prefloss.testing.fields import ROWS, available, parts, tensors


@pytest.mark.parametrize("kind", [Pairs, Labels, Rankings])
def test_everything_that_feedback_can_carry_is_drawn(kind):
    feedback = draw(random.Random(0), kind, Recipe(fields=frozenset(available(kind)), weight=True))
    assert all(getattr(feedback, field.name) is not None for field in fields_of(kind))
    for part in parts(feedback).values():
        assert all(getattr(part.per_token, row) is not None for row in ROWS)


@pytest.mark.parametrize("kind", [Pairs, Labels, Rankings])
def test_a_seed_draws_the_same_feedback_again(kind):
    one, same, other = (tensors(draw(random.Random(seed), kind, Recipe(size=3))) for seed in (1, 1, 2))
    assert all(torch.equal(same[path], value) for path, value in one.items())
    assert not all(
        value.shape == other[path].shape and torch.equal(value, other[path]) for path, value in one.items()
    )


def test_plain_feedback_carries_nothing_beside_the_log_probs():
    drawn = tensors(draw(random.Random(0), Pairs, Recipe(reference=False, tokens=False, dtype=torch.float32)))
    assert drawn.keys() == {"chosen.policy", "rejected.policy"}
    assert drawn["chosen.policy"].dtype == torch.float32
