"""What rewards are worth: against scipy, against numbers worked by hand, and however the parts are cut."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from prefloss.cli.scoring.rows import Kind
from prefloss.cli.scoring.summary import Moments, Summary, wilson
from prefloss.feedback import Labels, Pairs, Rankings
from tests.cli.scoring.tables import part


def summarised(feedback, *parts, judged=True):
    summary = Summary(Kind(feedback, judged, conversational=False))
    for each in parts:
        summary.add(each)
    return summary.result()


@pytest.fixture
def draws():
    return np.random.default_rng(7)


def test_moments_of_parts_are_those_of_the_whole(draws):
    values = draws.normal(1e6, 1.0, (2, 1000))
    values[1] += 0.5 * values[0]
    moments = Moments()
    for cut in np.split(values, [1, 7, 500, 500], axis=1):
        moments.add(*cut)
    assert moments.mean == pytest.approx(values.mean(1), rel=1e-12)
    assert moments.correlation == pytest.approx(stats.pearsonr(*values).statistic, abs=1e-9)
    wanted = stats.ttest_1samp(values[0], 0).confidence_interval()
    assert moments.interval() == pytest.approx(tuple(wanted), rel=1e-12)


def test_equal_values_have_no_correlation():
    moments = Moments()
    moments.add([0.1] * 30, range(30))
    assert moments.correlation is None


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (3, 7), (7, 7), (500, 1000)])
def test_wilson_is_scipys(wins, count):
    wanted = stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson(wins / count, count) == pytest.approx(tuple(wanted), abs=1e-12)


def test_pairs(draws):
    rewards = draws.normal(size=(300, 2)) * 3
    rewards[4] = 0.5
    tokens = draws.integers(1, 40, (300, 2))
    cuts = [slice(0, 1), slice(1, 120), slice(120, 300)]
    found = summarised(Pairs, *(part(rewards[c].tolist(), tokens[c].tolist(), first=c.start) for c in cuts))
    margins, longer = rewards[:, 0] - rewards[:, 1], tokens[:, 0] - tokens[:, 1]
    assert (found["rows"], found["completions"], found["tokens"]) == (300, 600, tokens.sum())
    # A tie is no win.
    assert found["accuracy"]["share"] == pytest.approx((margins > 0).mean())
    wanted = stats.binomtest(int((margins > 0).sum()), 300).proportion_ci(method="wilson")
    assert found["accuracy"]["interval"] == pytest.approx(tuple(wanted))
    assert found["ties"] == 1
    assert found["margin"]["mean"] == pytest.approx(margins.mean())
    assert found["length"]["correlation"] == pytest.approx(np.corrcoef(margins, longer)[0, 1])
    differ = longer != 0
    assert found["length"]["differ"] == differ.sum()
    assert found["length"]["longer_has_higher_reward"] == (margins * longer > 0).sum()
    assert found["length"]["longer_is_better"] == (longer > 0).sum()


def test_calibration_of_a_calibrated_judge_is_small_and_of_a_sure_one_large(draws):
    margins = draws.normal(size=20_000) * 2
    margins *= np.where(
        draws.uniform(size=margins.size) < expit(np.abs(margins)), np.sign(margins), -np.sign(margins)
    )
    honest = summarised(Pairs, part([[m, 0.0] for m in margins]))["calibration"]
    sure = summarised(Pairs, part([[5 * m, 0.0] for m in margins]))["calibration"]
    assert honest["ece"] < 0.02
    assert sure["ece"] > 0.1
    assert sum(each["count"] for each in honest["bins"]) == 20_000


def test_calibration_by_hand():
    # sigmoid(3) = .9526, sigmoid(.1) = .5250; one of two sure ones is wrong.
    found = summarised(Pairs, part([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0]]))
    assert found["calibration"]["ece"] == pytest.approx((2 * (0.952574 - 0.5) + (1 - 0.524979)) / 3, abs=1e-5)


def test_votes_are_compared_each_with_each(draws):
    up, down = draws.normal(0.5, 1, 40).round(1), draws.normal(0, 1, 60).round(1)
    rows = [[value] for value in (*up, *down)]
    found = summarised(Labels, part(rows, given=[[1.0]] * 40 + [[0.0]] * 60))
    wanted = stats.mannwhitneyu(up, down).statistic / 2400
    assert found["accuracy"]["share"] == pytest.approx(wanted)
    low, high = found["accuracy"]["interval"]
    assert low < wanted < high
    assert 0.1 < high - low < 0.35
    assert "calibration" not in found


def test_separated_votes_are_not_certain():
    found = summarised(Labels, part([[1.0], [2.0], [-1.0]], given=[[1.0], [1.0], [0.0]]))
    assert found["accuracy"]["share"] == 1
    assert found["accuracy"]["interval"][0] < 0.5


def test_votes_of_one_kind_have_no_accuracy():
    found = summarised(Labels, part([[1.0], [2.0]], given=[[1.0], [1.0]]))
    assert "accuracy" not in found
    assert found["votes"] == {"up": 2, "down": 0}


def test_rankings():
    rewards = [[3.0, 2.0, 1.0], [1.0, 2.0], [2.0, 2.0, 0.0]]
    given = [[2.0, 1.0, 1.0], [1.0, 0.0], [1.0, 0.0, 0.0]]
    tokens = [[3, 2, 1], [5, 6], [4, 4, 4]]
    found = summarised(Rankings, part(rewards, tokens, given))
    # Right in all 2, wrong in 1, right in 1 of 2: the other is a tie.
    assert found["accuracy"]["share"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (found["comparisons"], found["ties"]) == (5, 1)
    # Picks the best, the worst, and half of the best.
    assert found["best_of"]["picks_the_best"] == pytest.approx(1.5 / 3)
    assert found["best_of"]["by_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
    gains = (2 - 4 / 3, 0 - 0.5, 0.5 - 1 / 3)
    assert found["best_of"]["score_above_mean"] == pytest.approx(sum(gains) / 3)
    assert found["best_of"]["mean_size"] == pytest.approx(8 / 3)
    assert found["margin"]["mean"] == pytest.approx((1 + 2 - 1 + 0 + 2) / 5)


def test_rankings_without_scores_and_of_equal_scores():
    found = summarised(Rankings, part([[1.0, 3.0], [2.0]]), judged=False)
    assert "accuracy" not in found
    assert found["best_of"]["reward_above_mean"] == pytest.approx(0.5)
    assert "accuracy" not in summarised(Rankings, part([[1.0, 3.0]], given=[[1.0, 1.0]]))


def test_subsets():
    rewards = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    found = summarised(Pairs, part(rewards, subset=["b", "b", "a"]))["subsets"]
    assert found["of"] == {"a": {"rows": 1, "share": 1.0}, "b": {"rows": 2, "share": 0.5}}
    assert found["mean"] == pytest.approx(0.75)
    many = summarised(Pairs, part([[1.0, 0.0]] * 300, subset=[f"s{i}" for i in range(300)]))
    assert "subsets" not in many


def test_ties_of_rewardbench_2_have_their_own_score():
    rewards = [[2.192541, -0.0], [2.0, 2.0, 0.0, -0.045534, -0.169136]]
    given = [[1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]]
    table = part(rewards, given=given, subset=["Ties"] * 2, id=["ref:0", "tied:0"])
    # Both right, and no difference between the right ones: .3 + .3 + .2 + .2.
    assert summarised(Rankings, table)["subsets"]["of"]["Ties"]["share"] == pytest.approx(1.0)


def test_an_empty_part_changes_nothing():
    one = part([[1.0, 0.0]])
    assert summarised(Pairs, one, one.slice(0, 0)) == summarised(Pairs, one)
