"""Losses that fail on unusual examples: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

from prefloss import Pairs, Rankings
from prefloss.hyperparameters import Positive
from prefloss.testing import edges
from tests.testing.broken import Broken

broken = Broken(edges)


@broken("empty_examples", "tokens.clamp(min=1)", monotone=True, difference_only=True, needs=["tokens"])
def divides_by_no_tokens(pairs: Pairs, *, beta: Positive = 5.0):
    means = [side.h / side.tokens for side in (pairs.chosen, pairs.rejected)]
    return -F.logsigmoid(beta * (means[0] - means[1]))


@broken("empty_examples", "values of the others", "feedback.valid", separable=False, monotone=True)
def counts_empty_examples(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.margin() - pairs.margin().detach().mean()))


@broken("ties", "mean with equal scores: got inf", needs=["scores"], monotone=True, difference_only=True)
def divides_by_the_score_gap(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()) / (pairs.score_chosen - pairs.score_rejected)


@broken("empty_examples", "absent completions", "feedback.present", monotone=True)
def reads_absent_completions(rankings: Rankings, *, beta: Positive = 0.1):
    h = rankings.completions.h
    best = rankings.scores.masked_fill(~rankings.present, -1.0).argmax(-1, keepdim=True)
    return torch.logsumexp(beta * h, -1) - beta * h.gather(-1, best).squeeze(-1)


@broken("padding", "outside the mask", "PerToken.sum", needs=["per_token.kl"])
def sums_over_padding(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.margin() - pairs.rejected.per_token.kl.sum(-1)))


@broken("single_example", "one example", separable=False, monotone=True)
def standardises(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin() / pairs.margin().std().detach())


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
