"""Formulas on feedback that several losses share."""

import math

import pytest
import torch

from prefloss import LogRatios, Pairs
from prefloss.feedback import required
from prefloss.losses._core import transforms

LOG_2 = math.log(2)


@pytest.mark.parametrize(
    ("policy", "odds"), [(-LOG_2, 0.0), (math.log(0.75), math.log(3)), (-1e-8, 18.420681)]
)
def test_log_odds_of_the_mean_probability(policy, odds):
    ratios = LogRatios(policy=torch.tensor([4 * policy], dtype=torch.float64), tokens=[4])
    assert transforms.log_odds(ratios).item() == pytest.approx(odds, rel=1e-6, abs=1e-12)


def test_nll_is_per_token_and_zero_without_tokens():
    assert transforms.nll(LogRatios(policy=[-20.0, -3.0], tokens=[10, 0])).tolist() == [2.0, 0.0]


def test_lengths_take_the_dtype_of_the_log_probs():
    assert transforms.lengths(LogRatios(torch.tensor([-1.0]).double(), tokens=[3])).dtype == torch.float64
    with pytest.raises(ValueError, match="tokens: got None, expected token counts of the completions"):
        transforms.lengths(LogRatios(policy=[-1.0]))


def test_what_a_loss_misses_is_named():
    pairs = Pairs.of([0.0], [0.0])
    with pytest.raises(
        ValueError, match="gold: got None, expected log-ratios of a third completion of each prompt"
    ):
        required(pairs, "gold")
    with pytest.raises(ValueError, match="score_chosen: got None, expected score of the chosen completion"):
        transforms.score_gap(pairs)


def test_scores_have_the_dtype_of_the_log_ratios_and_no_gradient():
    score = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    pairs = Pairs.of([0.0], [0.0], score_chosen=score, score_rejected=[0.5])
    gap = transforms.score_gap(pairs)
    assert gap.item() == 1.5
    assert gap.dtype == torch.float32
    assert not gap.requires_grad
