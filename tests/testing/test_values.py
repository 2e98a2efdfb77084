"""Losses whose values are wrong: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

from prefloss import Pairs, Rankings
from prefloss.hyperparameters import Positive
from prefloss.testing import values
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(values)


@broken("shape_and_dtype", "values of shape []", "not reduced", **LIKE_DPO)
def mean_over_the_batch(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()).mean()


@broken(
    "shape_and_dtype", "from torch.float32 log-probs: got torch.float64, expected torch.float32", **LIKE_DPO
)
def in_double(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin().double())


@broken("shape_and_dtype", "call: got AttributeError", **LIKE_DPO)
def misspelt(pairs: Pairs, *, beta: Positive = 0.1):
    return pairs.margins()  # pyright: ignore


@broken("shape_and_dtype", "call: got TypeError", "returned 0.5, expected one loss for each example")
def no_tensor(pairs: Pairs, *, beta: Positive = 0.1):
    return 0.5


@broken("no_mutation", "chosen.policy after the call: got", "in-place")
def mutates_its_input(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.chosen.policy.sub_(pairs.rejected.policy))


@broken("no_mutation", "score_chosen after the call: got", needs=["scores"])
def clamps_scores_in_place(pairs: Pairs, *, beta: Positive = 0.1):
    assert pairs.score_chosen is not None
    return -F.logsigmoid(beta * pairs.margin() - pairs.score_chosen.clamp_(max=0.1).detach())


@broken("determinism", "values of the same call again: got", "draw numbers from a state")
def adds_noise(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin() + torch.randn(pairs.shape).to(pairs.margin()))


@broken("batch_permutation", "in the order", "a value belongs to its example", separable=False, monotone=True)
def counts_the_first_pair_twice(pairs: Pairs, *, beta: Positive = 0.1):
    first = torch.arange(len(pairs.margin())) == 0
    return -F.logsigmoid(beta * pairs.margin()) * torch.where(first, 2.0, 1.0)


@broken("batch_permutation", "in the order", "put sorted", separable=False, monotone=True)
def sorts_and_forgets_the_places(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin().sort().values)


@broken("batch_permutation", "completions of each group in the order", "rank by the scores", monotone=True)
def takes_the_first_for_the_best(rankings: Rankings, *, beta: Positive = 0.1):
    h = rankings.completions.h.masked_fill(~rankings.present, -1e30)
    return torch.logsumexp(beta * h, -1) - beta * rankings.completions.h[:, 0]


@broken("weights", "leave the weights to prefloss", **LIKE_DPO)
def weighs_twice(pairs: Pairs, *, beta: Positive = 0.1):
    values = -F.logsigmoid(beta * pairs.margin())
    return values if pairs.weight is None else values * pairs.weight.detach()


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


@broken("device", "a call on an accelerator", "h.new_zeros(n)", **LIKE_DPO)
def makes_zeros_on_the_cpu(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K6."""
    return -F.logsigmoid(beta * pairs.margin() + torch.zeros(pairs.shape, dtype=pairs.margin().dtype))


@broken("scores", "with scores from about", "no log or root", needs=["scores"], difference_only=True)
def takes_the_log_of_a_grade(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K6."""
    return -F.logsigmoid(beta * pairs.margin() - pairs.score_chosen.log())


@broken("padding", "padding_side='left'", needs=["per_token"])
def counts_tokens_from_the_first_column(pairs: Pairs, *, beta: Positive = 0.1):
    """AUDIT K5."""

    def first_two(rows):
        return torch.where(torch.arange(rows.mask.shape[-1]) < 2, rows.policy - rows.reference, 0.0)

    return -F.logsigmoid(
        beta * (first_two(pairs.chosen.per_token) - first_two(pairs.rejected.per_token)).sum(-1)
    )


@broken("single_example", "one example", separable=False, monotone=True)
def standardises(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin() / pairs.margin().std().detach())


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
