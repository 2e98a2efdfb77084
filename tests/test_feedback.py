"""Feedback and its conversions."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from prefloss import Labels, LogRatios, Pairs, Rankings


def some(n=2, device=None):
    values = torch.arange(n, dtype=torch.float32, device=device)
    return LogRatios(-10 - values, -11 + values, torch.full((n,), 4, device=device))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Pairs(chosen=some(), rejected=some(3)),
            ValueError,
            r"rejected: got shape \[3\], expected \[2\]",
        ),
        (
            lambda: Pairs(chosen=torch.zeros(2), rejected=some()),
            TypeError,
            r"chosen: got Tensor, expected LogRatios",
        ),
        (lambda: Pairs(some(), some(), weight=torch.ones(3)), ValueError, r"weight: got shape \[3\]"),
        (lambda: Pairs(some(), some(), score_chosen=[1.0, 2.0]), ValueError, r"score_rejected: got None"),
        (lambda: Pairs(some(), some(device="meta")), ValueError, r"rejected: got device meta"),
        (lambda: Pairs(some(), some(), weight=[True, False]), ValueError, None),
        (
            lambda: Labels(some(), desirable=torch.tensor([1, 0])),
            TypeError,
            r"desirable: got dtype torch.int64",
        ),
        (lambda: Labels(some(), desirable=[True]), ValueError, r"desirable: got shape \[1\], expected \[2\]"),
        (
            lambda: Labels(some(), [True, False], kl=[0.1] * 3),
            ValueError,
            r"kl: got shape \[3\], expected a scalar or",
        ),
        (lambda: Labels(some(), [True, False], mismatched=1.0), TypeError, r"mismatched: got float"),
        (
            lambda: Rankings(some(), [1.0, 2.0]),
            ValueError,
            r"completions: got shape \[2\], expected \[groups, K\]",
        ),
        (lambda: groups([[1.0, 2.0]], mask=[[1, 0]]), TypeError, r"mask: got dtype torch.int64"),
        (
            lambda: groups([[1.0, 2.0]], weight=[1.0, 2.0]),
            ValueError,
            r"weight: got shape \[2\], expected \[1\]",
        ),
        (
            lambda: groups([[1.0, 2.0]]).to_pairs("worst"),
            ValueError,
            r"how: got 'worst', expected 'best_worst'",
        ),
    ],
)
def test_bad_inputs_are_named(make, error, message):
    if message is None:
        # A list of bools becomes numbers, as it does in torch.
        assert make().weight.tolist() == [1.0, 0.0]
        return
    with pytest.raises(error, match=message):
        make()


def groups(scores, mask=None, weight=None):
    scores = torch.tensor(scores)
    # The log-ratio names the completion, so that a conversion's result can be read off.
    names = torch.arange(scores.numel(), dtype=torch.float32).reshape(scores.shape)
    return Rankings(completions=LogRatios.of(names), scores=scores, mask=mask, weight=weight)


def named(pairs):
    return list(zip(pairs.chosen.h.int().tolist(), pairs.rejected.h.int().tolist(), strict=True))


def test_rankings_to_pairs_by_hand():
    one = groups([[1.0, 3.0, 2.0]])
    assert named(one.to_pairs()) == [(1, 0)]
    assert named(one.to_pairs("adjacent")) == [(1, 2), (2, 0)]
    assert named(one.to_pairs("all")) == [(1, 2), (1, 0), (2, 0)]
    both = one.to_pairs("all")
    assert both.score_chosen.tolist() == [3.0, 3.0, 2.0]
    assert both.score_rejected.tolist() == [2.0, 1.0, 1.0]


def test_ties_and_absent_completions_give_no_pair():
    tied = groups([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]], weight=[1.0, 5.0])
    assert named(tied.to_pairs("all")) == [(0, 2), (1, 2)]
    assert named(tied.to_pairs()) == [(0, 2)]
    assert tied.to_pairs("all").weight.tolist() == [1.0, 1.0]
    masked = groups([[9.0, 2.0, 1.0]], mask=[[False, True, True]])
    assert named(masked.to_pairs("all")) == [(1, 2)]
    assert masked.valid.tolist() == [True]
    assert groups([[9.0, 2.0]], mask=[[False, True]]).valid.tolist() == [False]
    assert len(groups([[9.0, 2.0]], mask=[[False, True]]).to_pairs().chosen) == 0


def test_completions_without_tokens_are_absent():
    completions = LogRatios(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[4, 0, 2]]))
    found = Rankings(completions, torch.tensor([[1.0, 9.0, 2.0]]))
    assert found.present.tolist() == [[True, False, True]]
    assert found.to_pairs().score_chosen.tolist() == [2.0]


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=16, max_size=16),
)
def test_all_pairs_are_exactly_the_ordered_ones(scores, flags):
    mask = torch.tensor(flags[: 4 * len(scores)]).reshape(-1, 4)
    found = groups([[float(score) for score in row] for row in scores], mask=mask)
    wanted = {
        (4 * g + i, 4 * g + j)
        for g, row in enumerate(scores)
        for i in range(4)
        for j in range(4)
        if mask[g, i] and mask[g, j] and row[i] > row[j]
    }
    listed = named(found.to_pairs("all"))
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted
    assert set(named(found.to_pairs("adjacent"))) <= wanted
    best = found.to_pairs("best_worst")
    assert set(named(best)) <= wanted
    for chosen, rejected in named(best):
        row = [score for score, keep in zip(scores[chosen // 4], mask[chosen // 4], strict=True) if keep]
        assert scores[chosen // 4][chosen % 4] == max(row)
        assert scores[rejected // 4][rejected % 4] == min(row)


def test_pairs_to_labels():
    pairs = Pairs(some(), some(), weight=[1.0, 2.0], score_chosen=[3.0, 4.0], score_rejected=[1.0, 2.0])
    labels = pairs.to_labels()
    assert labels.desirable.tolist() == [True, True, False, False]
    assert labels.weight.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert labels.scores.tolist() == [3.0, 4.0, 1.0, 2.0]
    assert torch.equal(labels.completions.policy, torch.cat([pairs.chosen.policy, pairs.rejected.policy]))


def test_a_pair_with_an_empty_side_does_not_count():
    chosen = LogRatios([-1.0, -2.0], [-1.0, -1.0], [3, 0])
    pairs = Pairs(chosen, some())
    assert pairs.valid.tolist() == [True, False]
    assert pairs.margin()[1].isfinite()
