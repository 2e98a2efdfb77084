"""Losses that teach the wrong thing, or only half of it: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

import prefloss
from prefloss import Labels, Pairs, Rankings
from prefloss.hyperparameters import Positive
from prefloss.testing import CheckFailed, checks, learning
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(learning)


@broken("direction", "1 example(s)", "of rejected by +", "look at the signs", difference_only=True)
def flips_the_sign(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K3."""
    return -F.logsigmoid(-beta * pairs.margin())


@broken("direction", "of downvoted by +")
def raises_downvotes(labels: Labels, *, beta: Positive = 0.1):
    """AUDIT K3."""
    return -F.logsigmoid(beta * labels.completions.h) * torch.where(labels.desirable, 1.0, 0.5)


@broken("direction", "of the worst by +")
def raises_the_worst(rankings: Rankings, *, beta: Positive = 0.1):
    """AUDIT K3."""
    worst = rankings.scores.masked_fill(~rankings.present, 9.0).argmin(-1, keepdim=True)
    h = (beta * rankings.completions.h).masked_fill(~rankings.present, -1e9)
    return torch.logsumexp(h, -1) - h.gather(-1, worst).squeeze(-1)


@broken("direction", "25 example(s)", separable=False)
def flips_in_large_batches(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K3."""
    return -F.logsigmoid(beta * pairs.margin() * (-1.0 if len(pairs.margin()) > 9 else 1.0))


@broken("sides", "log-probs of chosen", ".detach()", **LIKE_DPO)
def detaches_the_chosen(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K4."""
    return -F.logsigmoid(beta * (pairs.chosen.h.detach() - pairs.rejected.h))


@broken("sides", "log-probs of gold", needs=["gold"])
def detaches_the_gold(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K4."""
    return -F.logsigmoid(beta * (pairs.margin() + pairs.gold.h.detach()))


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()


@pytest.mark.parametrize("name", ["discopop", "discopop_aql"])
def test_loss_that_goes_the_other_way_at_the_start_alone_passes(name):
    """Their papers: a local minimum at a negative margin; far from it they go the right way."""
    checks.check_direction(name)
    falling = prefloss.get(name).mean(Pairs.of(chosen=[0.1], rejected=[0.0]))
    assert falling > prefloss.get(name).mean(Pairs.of(chosen=[0.0], rejected=[0.0]))


def test_message_does_not_ask_a_loss_of_flipped_sign_to_declare_a_trait():
    """AUDIT K3: the kit told such a loss to declare monotone=True."""
    with pytest.raises(CheckFailed) as caught:
        checks.check_direction(raises_downvotes)
    assert "declare" not in str(caught.value)
