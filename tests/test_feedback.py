"""Feedback and its conversions."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from prefloss import Labels, LogRatios, Pairs, PerToken, Rankings
from prefloss.feedback import FIELDS, KINDS, NEEDS, convert, has, meaning_of, required


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
        (lambda: Pairs(some(), some(), score_rejected=[1.0, 2.0]), ValueError, r"score_chosen: got None"),
        (lambda: Pairs(some(), some(), embedding=torch.zeros(2)), ValueError, r"embedding: got shape \[2\]"),
        (
            lambda: Pairs(some(), some(), embedding=torch.zeros(3, 4)),
            ValueError,
            r"embedding: got shape \[3, 4\]",
        ),
        (
            lambda: Pairs(some(), some(), weight=torch.ones(2).bool()),
            TypeError,
            r"weight: got dtype torch.bool",
        ),
        (
            lambda: Pairs(some(), some(), weight=torch.ones(2) * 1j),
            TypeError,
            r"weight: got dtype torch.complex64",
        ),
        (lambda: Pairs(some(), some(), gold=some(3)), ValueError, r"gold: got shape \[3\], expected \[2\]"),
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


def test_a_grid_of_pairs_becomes_labels_and_rankings():
    """AUDIT T1: weights and scores of any leading shape go along."""
    log_probs = -torch.arange(12.0).reshape(2, 2, 3)
    chosen, rejected = (LogRatios(side, torch.zeros(2, 3)) for side in log_probs)
    weight, scores = torch.arange(6.0).reshape(2, 3), torch.arange(10.0, 16.0).reshape(2, 3)
    pairs = Pairs(chosen, rejected, weight=weight, score_chosen=scores + 1, score_rejected=scores)
    labels = pairs.to_labels()
    assert labels.completions.h.tolist() == log_probs.flatten().tolist()
    assert labels.weight.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] * 2
    assert labels.scores.tolist() == [*range(11, 17), *range(10, 16)]
    rankings = pairs.to_rankings()
    assert rankings.completions.h.tolist() == [[-float(i), -float(i) - 6] for i in range(6)]
    assert rankings.weight.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert rankings.scores.tolist() == [[11.0 + i, 10.0 + i] for i in range(6)]
    assert Pairs(chosen, rejected).to_rankings().weight is None


@pytest.mark.parametrize("worse", [[1.0, 2.0], [1.0, 3.0]])
def test_pairs_whose_scores_contradict_them_are_no_rankings(worse):
    with pytest.raises(ValueError, match="score_chosen: got a score not above score_rejected"):
        Pairs(some(), some(), score_chosen=[2.0, 2.0], score_rejected=worse).to_rankings()


def test_conversions_stay_on_the_device():
    pairs = Pairs(some(device="meta"), some(device="meta"))
    assert pairs.to_labels().desirable.device.type == "meta"
    assert pairs.to_rankings().scores.device.type == "meta"


def test_swapped_pairs():
    gold = some()
    pairs = Pairs(some(), LogRatios.of([1.0, 2.0]), [1.0, 2.0], [3.0, 4.0], [1.0, 2.0], gold)
    swapped = pairs.swapped()
    assert (swapped.chosen, swapped.rejected, swapped.gold) == (pairs.rejected, pairs.chosen, gold)
    assert swapped.score_chosen.tolist() == [1.0, 2.0]
    assert swapped.score_rejected.tolist() == [3.0, 4.0]
    assert swapped.weight.tolist() == [1.0, 2.0]
    assert pairs.margin().tolist() == (-swapped.margin()).tolist()


def test_margins_per_token_divide_each_side_by_its_own_count():
    pairs = Pairs(LogRatios([-6.0], [0.0], [3]), LogRatios([-5.0], [0.0], [5]))
    assert pairs.margin(per_token=True).tolist() == [-1.0]


def test_which_values_carry_a_gradient():
    """Weights and scores are data; the baseline alone may come from a model."""
    value = torch.ones(2, requires_grad=True)
    pairs = Pairs(some(), some(), weight=value, score_chosen=value, score_rejected=value)
    assert not any(x.requires_grad for x in (pairs.weight, pairs.score_chosen, pairs.score_rejected))
    labels = Labels(some(), [True, False], weight=value, scores=value, kl=value, baseline=value)
    assert not any(x.requires_grad for x in (labels.weight, labels.scores, labels.kl))
    assert labels.baseline.requires_grad
    ranked = Rankings(LogRatios.of([[1.0, 2.0]]), value[None], weight=torch.ones(1, requires_grad=True))
    assert not ranked.scores.requires_grad
    assert not ranked.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float32, torch.float64])
def test_values_become_numbers_of_32_bits_or_stay_64(dtype):
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert Pairs(some(), some(), weight=torch.ones(2, dtype=dtype)).weight.dtype == wanted
    assert Labels(some(), [True, False], kl=torch.ones((), dtype=dtype)).kl.dtype == wanted


def test_a_pair_with_an_empty_side_does_not_count():
    chosen = LogRatios([-1.0, -2.0], [-1.0, -1.0], [3, 0])
    pairs = Pairs(chosen, some())
    assert pairs.valid.tolist() == [True, False]
    assert pairs.margin()[1].isfinite()


PAIRS = Pairs.of(chosen=[1.5, 2.0], rejected=[-1.0, 0.0])
GROUPS = Rankings(LogRatios.of([[1.0, 3.0, 2.0]]), scores=[[0.0, 2.0, 1.0]])


@pytest.mark.parametrize("feedback", [PAIRS, PAIRS.to_labels(), GROUPS])
def test_feedback_of_the_kind_stays_what_it_is(feedback):
    assert convert(feedback, type(feedback)) is feedback


def test_pairs_become_labels_and_rankings():
    assert convert(PAIRS, Labels).desirable.tolist() == [True, True, False, False]
    assert convert(PAIRS, Rankings).scores.tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(("how", "count"), [("best_worst", 1), ("adjacent", 2), ("all", 3)])
def test_rankings_become_pairs_as_they_are_told(how, count):
    assert len(convert(GROUPS, Pairs, how).margin()) == count
    assert len(convert(GROUPS, Labels, how).desirable) == 2 * count


@pytest.mark.parametrize(
    ("feedback", "kind", "how", "error", "message"),
    [
        (
            GROUPS,
            Pairs,
            None,
            TypeError,
            r"feedback: got Rankings, expected Pairs; say which pairs .*rankings_as=",
        ),
        (GROUPS, Labels, None, TypeError, "feedback: got Rankings, expected Labels; say which pairs"),
        (GROUPS, Pairs, "some", ValueError, "how: got 'some', expected 'best_worst', 'adjacent', 'all'"),
        (PAIRS.to_labels(), Pairs, "all", TypeError, "got Labels, expected Pairs; single labels do not say"),
        (torch.zeros(2), Pairs, None, TypeError, "feedback: got Tensor, expected Pairs"),
    ],
)
def test_conversions_that_do_not_follow(feedback, kind, how, error, message):
    with pytest.raises(error, match=message):
        convert(feedback, kind, how)


def test_every_field_stands_in_one_table():
    for kind in (*KINDS, LogRatios, PerToken):
        named = {field.name for field in FIELDS if field.kind is kind}
        log_probs = {"chosen", "rejected", "completions", "policy", "reference", "mask"}
        assert named | log_probs >= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("need", NEEDS)
def test_what_a_need_stands_for(need):
    kinds = [kind for kind in KINDS if meaning_of(need, kind)]
    assert kinds
    for kind in kinds:
        bare = {Pairs: PAIRS, Labels: PAIRS.to_labels(), Rankings: GROUPS}[kind]
        assert not has(bare, need)


def test_a_need_covers_all_completions():
    counted, bare = LogRatios([-1.0], tokens=[3]), LogRatios([-1.0])
    assert has(Pairs(counted, counted), "tokens")
    assert not has(Pairs(counted, bare), "tokens")
    assert not has(Pairs(counted, counted, gold=bare), "tokens")
    rows = PerToken(torch.zeros(1, 2), None, torch.ones(1, 2).bool(), kl=torch.zeros(1, 2)).log_ratios()
    assert has(Pairs(rows, rows), "per_token.kl")
    assert not has(Pairs(rows, rows), "per_token.weight")


def test_a_field_that_is_required():
    with pytest.raises(ValueError, match=r"LogRatios\.tokens: got None, expected token counts"):
        required(LogRatios([-1.0]), "tokens")
