"""Losses that depend on what they do not declare: each is caught by its check."""

import pytest
import torch
import torch.nn.functional as F

from prefloss import Labels, Pairs
from prefloss.hyperparameters import Positive
from prefloss.testing import check_loss, dependence
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(dependence)


@broken("separability", "the examples alone: got", "declare separable=False", monotone=True)
def falsely_separable(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.margin() - pairs.margin().mean().detach()))


def falsely_coupled(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("needs", "without scores", "declare 'scores' in needs or in reads", **LIKE_DPO)
def reads_scores_undeclared(pairs: Pairs, *, beta: Positive = 0.1):
    margin = 0.0 if pairs.score_chosen is None else (pairs.score_chosen - pairs.score_rejected).detach()
    return -F.logsigmoid(beta * pairs.margin() - margin)


@broken("needs", "without tokens: got ValueError", "declare 'tokens' in needs or in reads", **LIKE_DPO)
def reads_tokens_undeclared(pairs: Pairs, *, beta: Positive = 5.0):
    return -F.logsigmoid(beta * pairs.margin(per_token=True))


@broken(
    "needs", "with other tokens: got the same", "leave 'tokens' out of needs", needs=["tokens"], **LIKE_DPO
)
def needs_what_it_does_not_read(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("needs_reference", "declare needs_reference=False", monotone=True)
def needs_no_reference(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.chosen.policy - pairs.rejected.policy))


@broken("needs_reference", "declare needs_reference=True", needs_reference=False, monotone=True)
def reads_a_reference_undeclared(pairs: Pairs, *, beta: Positive = 0.1):
    margin = pairs.chosen.policy - pairs.rejected.policy
    if pairs.chosen.reference is not None and pairs.rejected.reference is not None:
        margin = margin - (pairs.chosen.reference - pairs.rejected.reference)
    return -F.logsigmoid(beta * margin)


@broken("beta", "beta=0.2 instead of 0.1: got the same", **LIKE_DPO)
def ignores_its_beta(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(0.1 * pairs.margin())


@broken("preference", "chosen and rejected exchanged: got the same", monotone=False)
def treats_both_sides_alike(pairs: Pairs, *, beta: Positive = 0.1):
    return (beta * pairs.margin()) ** 2


@broken("preference", "opposite labels and scores: got the same", monotone=True)
def forgets_the_votes(labels: Labels, *, beta: Positive = 0.1):
    return torch.sigmoid(-beta * labels.completions.h)


@broken(
    "difference_only", "added to the log-ratios of both sides", "declare difference_only=False", **LIKE_DPO
)
def falsely_of_the_difference(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.sigmoid(-beta * pairs.chosen.h) + torch.sigmoid(beta * pairs.rejected.h)


@broken("difference_only", "added to policy and reference", "declare difference_only=False", **LIKE_DPO)
def reads_the_policy_alone(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()) - 0.01 * (pairs.chosen.policy - pairs.rejected.policy)


def hides_its_difference(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("monotone", "got a rise from", "declare monotone=False", **LIKE_DPO)
def falsely_monotone(pairs: Pairs, *, tau: Positive = 0.1):
    return (pairs.margin() - 1 / (2 * tau)) ** 2


@broken("monotone", "got a rise from", **LIKE_DPO)
def wrong_sign(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(-beta * pairs.margin())


def hides_that_it_is_monotone(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@pytest.mark.parametrize(
    ("check", "function", "traits"),
    [
        ("separability", falsely_coupled, {"separable": False, **LIKE_DPO}),
        ("difference_only", hides_its_difference, {"monotone": True}),
        ("monotone", hides_that_it_is_monotone, {"difference_only": True}),
    ],
)
def test_trait_that_a_loss_has_and_does_not_declare_is_a_hint(check, function, traits):
    """AUDIT K7."""
    trait = "separable" if check == "separability" else check
    report = check_loss(function, max_examples=2, skip={"torch_compile": "slow"}, **traits)
    assert list(report.hints) == [check]
    assert report.hints[check].startswith(f"{trait}=False: got")
    assert f"declare {trait}=True" in report.hints[check]
    assert f"{check} " in str(report)


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
