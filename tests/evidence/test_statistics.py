"""Intervals cover what they should, Holm's steps by hand, reward at a KL on straight lines."""

import numpy as np
import pytest

from prefloss.evidence.statistics import at_kl, holm, mean_interval, paired_difference


def drawn(random, seeds, prompts, of_seeds, of_prompts, of_cells, mean=0.2):
    """Differences with a part for each seed, each prompt and each cell."""
    parts = (
        random.normal(size=(seeds, 1)),
        random.normal(size=(1, prompts)),
        random.normal(size=(seeds, prompts)),
    )
    return mean + sum(size * part for size, part in zip((of_seeds, of_prompts, of_cells), parts, strict=True))


@pytest.mark.parametrize(
    ("seeds", "spread"),
    [(10, (0.1, 0.0, 0.3)), (10, (0.1, 0.1, 0.3)), (5, (0.1, 0.0, 0.3))],
)
def test_the_interval_covers_the_true_difference(seeds, spread):
    random, repetitions = np.random.default_rng(0), 150
    found = [
        paired_difference(gaps, np.zeros_like(gaps), seed=one)
        for one, gaps in enumerate(drawn(random, seeds, 12, *spread) for _ in range(repetitions))
    ]
    covered = np.mean([one.low <= 0.2 <= one.high for one in found])
    assert 0.9 <= covered <= 0.995
    # 4 of 5 comparisons show a difference of the size that could have been shown.
    smallest = float(np.mean([one.smallest for one in found]))
    again = [drawn(random, seeds, 12, *spread, mean=smallest) for _ in range(repetitions)]
    shown = np.mean([paired_difference(gaps, np.zeros_like(gaps)).p_value < 0.05 for gaps in again])
    assert 0.68 <= shown <= 0.92


def test_prompts_that_favour_a_loss_do_not_average_out_over_seeds():
    """A difference that prompts alone make is as uncertain with 40 seeds as with 10."""
    random = np.random.default_rng(1)
    gaps = drawn(random, 40, 8, 0.0, 0.5, 0.01)
    width = [
        (one.high - one.low) for one in (paired_difference(part, 0 * part) for part in (gaps, gaps[:10]))
    ]
    assert width[0] > 0.7 * width[1] > 0.2


def test_a_difference_is_paired():
    random = np.random.default_rng(2)
    base = 10 * random.normal(size=(6, 5))
    found = paired_difference(base + 0.1 + 0.001 * random.normal(size=(6, 5)), base)
    assert found.low > 0.09
    assert found.high < 0.11
    assert found.improved == 1.0


def test_equal_runs_show_nothing():
    found = paired_difference(np.ones((4, 3)), np.ones((4, 3)))
    assert (found.mean, found.low, found.high, found.p_value, found.improved) == (0, 0, 0, 1, 0.5)


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [[1.0], [np.nan]], [1.0, 2.0]])
def test_what_has_no_interval_is_refused(values):
    with pytest.raises(ValueError, match="loss: got"):
        paired_difference(values, np.zeros_like(values))


def test_holm_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1, which may not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_reward_at_a_kl_stays_inside_what_was_reached():
    kl, reward = [2.0, 0.5, 1.0], [4.0, 1.0, 2.0]
    assert at_kl(kl, reward, 1.5) == pytest.approx(3.0)
    assert at_kl(kl, reward, 0.5) == 1.0
    assert at_kl(kl, reward, 0.4) is None
    assert at_kl(kl, reward, 2.1) is None
    assert at_kl([], [], 1.0) is None


def test_a_mean_of_equal_values_has_no_width():
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)
