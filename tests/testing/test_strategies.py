"""Drawn feedback is what a trainer could have made."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import prefloss
from prefloss.testing import strategies

few = settings(max_examples=15, suppress_health_check=list(HealthCheck))

EVERY_ROW = ("per_token.log_sum_sq", "per_token.kl", "per_token.reverse_kl", "per_token.reference_entropy")


@few
@given(strategies.log_ratios(shape=(2, 3), magnitude=5.0))
def test_log_ratios_are_log_probs_within_the_magnitude(ratios):
    assert ratios.shape == (2, 3)
    assert ratios.policy.dtype == ratios.reference.dtype == torch.float32
    assert bool((ratios.policy <= 0).all() and (ratios.reference <= 0).all())
    assert float(ratios.h.abs().max()) <= 5.0 + 1e-5
    assert bool((ratios.tokens >= 1).all())
    assert ratios.per_token is None


@few
@given(strategies.log_ratios(4, per_token=True, dtype=torch.float64))
def test_sums_are_those_of_the_rows(ratios):
    rows = ratios.per_token
    torch.testing.assert_close(rows.policy.sum(-1), ratios.policy)
    torch.testing.assert_close(rows.reference.sum(-1), ratios.reference)
    assert torch.equal(rows.mask.sum(-1), ratios.tokens)
    assert bool((rows.policy[~rows.mask] == 0).all() and (rows.policy <= 0).all())


@few
@given(strategies.log_ratios(reference=False, tokens=False))
def test_reference_and_tokens_can_be_left_out(ratios):
    assert ratios.reference is None
    assert ratios.tokens is None


@few
@given(strategies.pairs(fields=("scores", "gold", "embedding", *EVERY_ROW, "per_token.weight"), weight=True))
def test_pairs_have_what_was_asked_for(pairs):
    assert 1 <= pairs.shape[0] <= 6
    assert bool((pairs.score_chosen > pairs.score_rejected).all())
    assert bool(((pairs.score_chosen < 1) & (pairs.score_rejected > 0)).all())
    assert pairs.embedding.shape[0] == pairs.shape[0]
    assert bool((pairs.weight > 0).all())
    for side in pairs.parts:
        rows = side.per_token
        assert bool((rows.kl >= 0).all() and (rows.reverse_kl >= 0).all())
        inside = rows.reference_entropy[rows.mask]
        assert bool(((inside > 0) & (inside < 1)).all())
        # The sum over the vocabulary of squared probabilities holds that of the token, and is at most 1.
        assert bool((rows.log_sum_sq >= 2 * rows.policy - 1e-5).all() and (rows.log_sum_sq <= 0).all())


@few
@given(strategies.pairs(size=3, fields=("scores",), ties=True))
def test_size_is_fixed_and_scores_may_tie(pairs):
    assert pairs.shape == (3,)
    assert bool((pairs.score_chosen >= pairs.score_rejected).all())


@few
@given(strategies.labels(fields=("scores", "baseline", "mismatched", "kl")))
def test_labels_have_what_was_asked_for(labels):
    assert labels.mismatched.shape == labels.shape
    assert labels.kl.shape in (torch.Size([]), labels.shape)
    assert bool((labels.kl >= 0).all())
    assert labels.scores.shape == labels.baseline.shape == labels.shape


@few
@given(strategies.rankings())
def test_rankings_have_two_completions_and_distinct_scores(rankings):
    assert bool((rankings.present.sum(-1) >= 2).all())
    for scores in rankings.scores:
        assert len(set(scores.tolist())) == len(scores)


@few
@given(strategies.rankings(masked=False))
def test_rankings_can_be_whole(rankings):
    assert rankings.mask is None


@pytest.mark.parametrize("name", sorted(prefloss.specs))
def test_feedback_for_a_loss_is_what_it_takes(name):
    loss = prefloss.get(name)

    @settings(max_examples=2, database=None)
    @given(strategies.feedback_for(loss))
    def holds(feedback):
        assert isinstance(feedback, loss.spec.feedback)
        assert loss(feedback).shape == feedback.shape

    holds()


@few
@given(strategies.feedback_for("dpo", extreme=True, size=6))
def test_extreme_feedback_is_finite_and_wide(pairs):
    assert bool(torch.isfinite(pairs.margin()).all())
    assert float(pairs.chosen.h.abs().max()) <= 1e4


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"fields: got 'gold', expected some of .*: Labels have no other"):
        strategies.labels(fields=("gold",))
