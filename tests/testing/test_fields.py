"""Feedback as named tensors: what is read, changed or printed stays feedback that a trainer could make."""

import torch
from hypothesis import HealthCheck, given, settings

from prefloss import Labels, Pairs, Rankings
from prefloss.logratios import LogRatios, PerToken
from prefloss.registry import NEEDS
from prefloss.testing import fields, strategies

few = settings(max_examples=15, suppress_health_check=list(HealthCheck))


def test_every_need_can_be_drawn_for_some_kind_of_feedback():
    assert {need for kind in (Pairs, Labels, Rankings) for need in fields.available(kind)} == set(NEEDS)


@few
@given(
    strategies.pairs(fields=("scores", "gold", "per_token.kl"), weight=True)
    | strategies.labels(fields=("kl", "mismatched"))
    | strategies.rankings()
)
def test_what_a_failure_prints_makes_the_feedback_again(feedback):
    names = {"torch": torch, "LogRatios": LogRatios, "PerToken": PerToken}
    again = eval(fields.show(feedback), {**names, "Pairs": Pairs, "Labels": Labels, "Rankings": Rankings})
    copied, drawn = fields.tensors(again), fields.tensors(feedback)
    assert copied.keys() == drawn.keys()
    assert all(torch.equal(copied[path], drawn[path]) for path in drawn)


@few
@given(strategies.pairs(size=4, fields=("scores", "gold", "per_token.kl"), weight=True))
def test_selected_examples_keep_what_belongs_to_them(pairs):
    order = torch.tensor([2, 0])
    picked = fields.select(pairs, order)
    for path, value in fields.tensors(pairs).items():
        assert torch.equal(fields.tensors(picked)[path], value[order])


def test_moved_completions_keep_sums_and_rows_together():
    ratios = strategies.log_ratios(3, per_token=True, dtype=torch.float64)

    @few
    @given(ratios)
    def holds(ratios):
        moved = fields.shifted(ratios, policy=-2.0, reference=-1.0)
        torch.testing.assert_close(moved.policy, ratios.policy - 2.0)
        torch.testing.assert_close(moved.reference, ratios.reference - 1.0)
        torch.testing.assert_close(moved.per_token.policy.sum(-1), moved.policy)

    holds()
