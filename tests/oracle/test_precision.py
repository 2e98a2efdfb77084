"""The oracle's own arithmetic: it holds at large log-ratios, and its gradients are the derivatives."""

import pytest
from mpmath import exp, mp, mpf

from tests.oracle.gradients import gradient
from tests.oracle.numbers import Group, Pair, Side, Vote, log_sigma, sigma
from tests.oracle.registry import ORACLES

FAR = [(10_000, -10_000), (-10_000, 10_000), (10_000, 9_999), (-10_000, 30), (0, 10_000), (60, -45)]
SEPARABLE = {
    "dpo": {"beta": 1, "label_smoothing": 0.1},
    "robust_dpo": {"beta": 1, "epsilon": 0.1},
    "exo_pair": {"beta": 1, "epsilon": 1e-3},
    "discopop": {"beta": 1, "tau": 0.05},
    "gpo_exponential": {"beta": 1},
    "gpo_savage": {"beta": 1},
    "apo_zero": {"beta": 1},
    "apo_down": {"beta": 1},
    "nca_pair": {"beta": 1},
    "bco_pair": {"beta": 1, "delta": 0.5},
    "bdpo": {"beta": 1, "mixture": 0.5},
    "cal_dpo": {"beta": 0.1, "calibration_weight": 0.5},
    "f_dpo_js": {"beta": 1},
    "f_dpo_alpha": {"beta": 1, "alpha": 0.5},
    "cauchy": {"beta": 1},
    "rpo_bwd_kl": {"beta": 1, "eta": 1},
    "rpo_fwd_kl": {"beta": 1, "eta": 1},
}


@pytest.mark.parametrize(("chosen", "rejected"), FAR)
@pytest.mark.parametrize("name", SEPARABLE)
def test_value_holds_at_large_log_ratios(name, chosen, rejected):
    pair = Pair(Side(chosen, 0, 1), Side(rejected, 0, 1), score_chosen=700, score_rejected=1)
    value = ORACLES[name](pair, **SEPARABLE[name])
    with mp.workdps(5000):
        truth = ORACLES[name](pair, **SEPARABLE[name])
        assert abs(value - truth) <= abs(truth) * mpf(10) ** -20 + mpf(10) ** -45


def test_gradient_of_dpo_is_its_formula():
    pair = Pair(Side(-20, -21.5, 10), Side(-24, -23, 8))
    slopes = gradient(ORACLES["dpo"], pair, beta=0.5, label_smoothing=0)
    with mp.workdps(60):
        expected = -mpf(0.5) * sigma(-mpf(0.5) * pair.delta)
        assert abs(slopes["chosen", "policy"] - expected) < mpf(10) ** -40
        assert abs(slopes["rejected", "policy"] + expected) < mpf(10) ** -40


def test_gradient_keeps_its_digits_where_it_is_tiny():
    pair = Pair(Side(80, 0, 1), Side(0, 0, 1))
    slopes = gradient(ORACLES["apo_zero"], pair, beta=1)
    with mp.workdps(60):
        expected = -exp(log_sigma(mpf(80)) + log_sigma(mpf(-80)))
        assert abs(slopes["chosen", "policy"] / expected - 1) < mpf(10) ** -20


TOKENS = Pair(
    Side(
        per_token_policy=[-1, -2.5, -0.5],
        per_token_reference=[-1.5, -2, -1],
        per_token_log_sum_sq=[-0.5, -1, -0.25],
        per_token_kl=[0.1, 0.3, 0.2],
    ),
    Side(
        per_token_policy=[-3, -1],
        per_token_reference=[-2, -1.25],
        per_token_log_sum_sq=[-1, -0.5],
        per_token_kl=[0.4, 0.05],
    ),
)


def test_tdpo2_holds_the_chosen_divergence_still_and_tdpo1_does_not():
    free = gradient(ORACLES["tdpo1"], TOKENS, beta=0.1)
    held = gradient(ORACLES["tdpo2"], TOKENS, beta=0.1, alpha=0.5)
    assert abs(free["chosen", "per_token_kl", 0]) > 0.01
    assert held["chosen", "per_token_kl", 0] == 0
    assert held["rejected", "per_token_kl", 0] > 0.01


def test_weight_of_wpo_has_no_gradient():
    slopes = gradient(ORACLES["wpo"], TOKENS, beta=0.1)
    weight = ORACLES["wpo"].freezes(TOKENS, beta=0.1)
    plain = gradient(ORACLES["sampo"], TOKENS, beta=0.1, chosen_tokens=[0, 1, 2], rejected_tokens=[0, 1])
    assert 0 < weight < 1
    for path in [("chosen", "per_token_policy", 1), ("rejected", "per_token_policy", 0)]:
        assert abs(slopes[path] - weight * plain[path]) < mpf(10) ** -12


def test_baseline_of_kto_pair_has_no_gradient():
    batch = [Pair(Side(3, 1, 1), Side(2, 0, 1)), Pair(Side(1, 0, 1), Side(4, 1, 1))]
    slopes = gradient(ORACLES["kto_pair"], batch, beta=0.5)
    with mp.workdps(60):
        x = mpf(0.5) * (2 - mpf(2.5))
        assert abs(slopes[0, "chosen", "policy"] + mpf(0.5) * sigma(x) * sigma(-x)) < mpf(10) ** -40


def test_gradient_reaches_votes_and_groups():
    up = gradient(
        ORACLES["kto"], Vote(Side(1, 0, 1)), beta=1, desirable_weight=1, undesirable_weight=1, kl_baseline=0
    )
    assert abs(up["side", "policy"] + sigma(mpf(1)) * sigma(mpf(-1))) < mpf(10) ** -12
    group = Group([Side(1, 0, 1), Side(0, 0, 1), Side(-1, 0, 1)], [2, 1, 0])
    slopes = gradient(ORACLES["infonca"], group, beta=1, alpha=1)
    assert list(slopes) == [(0, "policy"), (1, "policy"), (2, "policy")]
    assert abs(sum(slopes.values())) < mpf(10) ** -15
