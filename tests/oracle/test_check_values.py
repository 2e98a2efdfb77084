"""The oracle against the catalogue: each check value that it prints, and the identities between losses."""

import pytest
from mpmath import fsum, log, mp, mpf

from tests.oracle import contrib
from tests.oracle.numbers import Group, Pair, Side, Vote, log_softmax, oracle, relu, sigma, softmax
from tests.oracle.registry import ORACLES

CHOSEN = Side(policy=-20, reference=mpf("-21.5"), tokens=10)
REJECTED = Side(policy=-24, reference=-23, tokens=8)
PAIR = Pair(CHOSEN, REJECTED)
GOLD = Pair(CHOSEN, REJECTED, gold=Side(policy=-18, tokens=10))
EXPLORED = Pair(CHOSEN, REJECTED, gold=Side(policy=-30, tokens=10))
UP, DOWN = Vote(CHOSEN, desirable=True), Vote(REJECTED, desirable=False)
GROUP = Group([Side(policy=h, reference=0, tokens=1) for h in (1.5, 0.4, -1)], [2, 1, 0])


def scored(gap):
    """The pair with a score gap."""
    return Pair(CHOSEN, REJECTED, score_chosen=gap, score_rejected=0)


@oracle("pair")
def spo_silu(pair, *, beta):
    """Negative SiLU; in the catalogue, in no package."""
    return -beta * pair.delta * sigma(beta * pair.delta)


PAIR_VALUES = [
    ("dpo", {"label_smoothing": 0}, "0.575939"),
    ("cdpo", {"epsilon": 0.1}, "0.600939"),
    ("robust_dpo", {"epsilon": 0.1}, "0.544689"),
    ("ipo", {"tau": 0.1, "per_token": True}, "22.325625"),
    ("hinge", {}, "0.750000"),
    ("slic_hf", {"delta": 1, "nll_weight": 0.1}, "2.000000"),
    ("exo_pair", {"epsilon": 1e-3}, "2.339545"),
    ("discopop", {"tau": 0.05}, "0.777443"),
    ("discopop_cell", {}, "0.677370"),
    ("gpo_exponential", {}, "0.778801"),
    ("gpo_truncated_quadratic", {}, "0.562500"),
    ("gpo_savage", {}, "0.191689"),
    ("dpo_sigmoid_prob", {}, "-0.562177"),
    ("cauchy", {}, "0.548218"),
    ("focalpo", {"gamma": 2}, "0.182021"),
    ("hdpo", {"alpha": 0.9}, "0.593650"),
    ("c2dpo", {"constraint_weight": 2e-4}, "0.575989"),
    ("minor_dpo", {}, "0.620957"),
    ("balanced_bpo", {"alpha": 1}, "0.644397"),
    ("dpo_shift", {"rejected_weight": 0.7}, "0.589185"),
    ("bdpo", {"mixture": 0.5}, "0.603564"),
    ("dpop", {"penalty": 50}, "0.575939"),
    ("cal_dpo", {"calibration_weight": 0.5}, "14.203890"),
    ("dpo_nll", {"nll_weight": 1}, "2.575939"),
    ("f_dpo_forward_kl", {}, "0.576152"),
    ("f_dpo_js", {}, "0.639099"),
    ("f_dpo_alpha", {"alpha": 0.5}, "0.582415"),
    ("chipo", {"r_max": 1}, "0.416166"),
    ("apo_zero", {}, "0.937591"),
    ("apo_down", {}, "0.975253"),
    ("nca_pair", {}, "1.328634"),
    ("bco_pair", {"delta": 0}, "1.265354"),
    ("sppo_hard", {}, "28.250000"),
    ("mpo", {"delta": 0, "preference_weight": 0.8, "quality_weight": 0.2, "nll_weight": 1}, "2.713822"),
    ("ln_dpo", {"beta": 5}, "0.225413"),
    ("r_dpo", {"alpha": 0.01}, "0.567232"),
    ("simpo", {"beta": 2, "gamma": 1}, "0.313262"),
    ("cpo", {"nll_weight": 1}, "2.513015"),
    ("cpo_simpo", {"beta": 2, "gamma": 1, "nll_weight": 1}, "2.313262"),
    ("orpo", {"odds_weight": 0.1}, "2.028875"),
    ("asft", {}, "2.205107"),
    ("alphapo", {"alpha": 0.25, "beta": 2.5, "gamma": 0.1}, "0.010174"),
    ("simper", {}, "-0.085548"),
]
NO_BETA = {"ipo", "slic_hf", "orpo", "simper"}


@pytest.mark.parametrize(("name", "hyper", "printed"), PAIR_VALUES)
def test_pair_loss_has_the_printed_value(name, hyper, printed):
    hyper = hyper if name in NO_BETA else {"beta": 0.1, **hyper}
    assert f"{float(ORACLES[name](PAIR, **hyper)):.6f}" == printed


@pytest.mark.parametrize(
    ("name", "pair", "hyper", "printed"),
    [
        ("soft_label_dpo", scored(log(4)), {"beta": 0.1, "eta": 1}, "0.625939"),
        ("sppo", Pair(CHOSEN, REJECTED, 0.8, 0.2), {"beta": 0.1}, "3.125000"),
        ("odpo", scored(2), {"beta": 0.1, "alpha": 1, "scale": "log"}, "0.939070"),
        ("margin_dpo", scored(0.5), {"beta": 0.1, "margin_weight": 1}, "0.825939"),
        ("rpo_bwd_kl", scored(1), {"beta": 0.1, "eta": 1}, "0.060972"),
        ("rpo_fwd_kl", scored(1), {"beta": 0.1, "eta": 1}, "0.065690"),
        ("rpo_sq", scored(1), {"beta": 0.1, "eta": 1}, "0.562500"),
        ("rebel", scored(1), {"eta": 1}, "2.250000"),
        ("tpo", GOLD, {"beta": 0.01, "nll_weight": 1}, "2.473347"),
        ("tpo_l", GOLD, {"beta": 2, "gamma": 0.5, "nll_weight": 1}, "2.001413"),
        ("xpo", EXPLORED, {"beta": 0.1, "alpha": 1e-5}, "0.575639"),
    ],
)
def test_pair_loss_with_scores_or_gold_has_the_printed_value(name, pair, hyper, printed):
    assert f"{float(ORACLES[name](pair, **hyper)):.6f}" == printed


@pytest.mark.parametrize(
    ("name", "votes", "hyper", "printed"),
    [
        ("kto", (UP, DOWN), {"kl_baseline": 0.2, "desirable_weight": 1, "undesirable_weight": 1}, "0.937582"),
        ("kto_zero", (UP, DOWN), {"desirable_weight": 1, "undesirable_weight": 1}, "0.937591"),
        (
            "kto_logsigmoid",
            (UP, DOWN),
            {"kl_baseline": 0.2, "desirable_weight": 1, "undesirable_weight": 1},
            "1.265204",
        ),
        ("bco", (UP, DOWN), {"delta": 0}, "1.265354"),
        ("npo", (DOWN,), {}, "12.887933"),
        ("simnpo", (DOWN,), {"beta": 2.5, "gamma": 0}, "0.000442"),
        ("dro", (Vote(CHOSEN, score=1, baseline=0.3),), {"tau": 1}, "0.320000"),
        ("a2po", (Vote(CHOSEN, score=1, baseline=0.3),), {"beta": 1e-3}, "0.487902"),
    ],
)
def test_vote_loss_has_the_printed_value(name, votes, hyper, printed):
    hyper = hyper if name == "dro" else {"beta": 0.1, **hyper}
    assert f"{float(sum(ORACLES[name](vote, **hyper) for vote in votes)):.6f}" == printed


@pytest.mark.parametrize(
    ("name", "hyper", "printed"),
    [
        ("dpo_pl", {}, "1.609408"),
        ("s_dpo", {}, "0.983813"),
        ("infonca", {"alpha": 1}, "1.033241"),
        ("nca", {"alpha": 1}, "1.354459"),
        ("exo", {"beta_r": 1}, "0.231452"),
    ],
)
def test_group_loss_has_the_printed_value(name, hyper, printed):
    assert f"{float(ORACLES[name](GROUP, beta=0.1, **hyper)):.6f}" == printed


def test_silu_has_the_printed_value():
    assert f"{float(spo_silu(PAIR, beta=0.1)):.6f}" == "-0.140544"


POINTS = [
    PAIR,
    Pair(Side(policy=-7, reference=-5, tokens=4), Side(policy=-9, reference=-12, tokens=7)),
    Pair(Side(policy=-140, reference=-90, tokens=60), Side(policy=-30, reference=-75, tokens=21)),
]


def of(name, data, **hyper):
    """Value of an oracle with the hyperparameters as exact decimals."""
    return ORACLES[name](data, **{key: mpf(value) for key, value in hyper.items()})


def same(left, right, digits=40):
    """Equal to many digits."""
    return abs(left - right) <= mpf(10) ** -digits * max(1, abs(left))


def with_scores(pair, chosen, rejected):
    """The pair with scores."""
    return Pair(pair.chosen, pair.rejected, chosen, rejected)


def as_group(pair, *scores):
    """The pair as a group of two."""
    return Group([pair.chosen, pair.rejected], list(scores))


def exactly(test):
    """Run a test at the oracle's precision, so that its own arithmetic does not round."""

    @pytest.mark.parametrize("pair", POINTS)
    def run(pair):
        with mp.workdps(60):
            test(pair)

    return run


@exactly
def test_dpo_is_the_limit_or_special_case_of_many(pair):
    beta = mpf("0.1")
    dpo = of("dpo", pair, beta=beta, label_smoothing=0)
    assert same(of("bdpo", pair, beta=beta, mixture=1), dpo)
    assert same(of("dpo_shift", pair, beta=beta, rejected_weight=1), dpo)
    assert same(of("hdpo", pair, beta=beta, alpha=1), dpo)
    assert same(of("margin_dpo", with_scores(pair, 3, 3), beta=beta, margin_weight=1), dpo)
    assert same(of("cdpo", pair, beta=beta, epsilon=0), dpo)
    assert same(of("robust_dpo", pair, beta=beta, epsilon=0), dpo)
    assert same(of("f_dpo_alpha", pair, beta=beta, alpha=mpf("1e-30")), dpo, digits=20)
    assert same(of("aot", [pair], beta=beta)[0], dpo)
    assert same(of("aot_unpaired", [pair], beta=beta)[0], dpo)
    assert same(of("dr_dpo", [pair], beta=beta, beta_prime=1)[0], dpo)
    assert same(of("dpo_pl", as_group(pair, 1, 0), beta=beta), dpo)
    assert same(of("s_dpo", as_group(pair, 1, 0), beta=beta), dpo)
    assert same(ORACLES["bregman_dpo"](pair, beta=beta, member="lr", lam=1, scale=4), dpo)
    assert same(ORACLES["focalpo"](pair, beta=beta, gamma=0), dpo)
    assert same(of("soft_label_dpo", with_scores(pair, 200, 0), beta=beta, eta=1), dpo)


@exactly
def test_log_ratio_losses_equal_one_another(pair):
    beta, tau = mpf("0.1"), mpf("0.05")
    z = beta * pair.delta
    assert same((z - 1) ** 2, beta**2 * ORACLES["ipo"](pair, tau=tau, per_token=False))
    assert same(of("f_dpo_alpha", pair, beta=beta, alpha=1), of("f_dpo_forward_kl", pair, beta=beta))
    hard = of("sppo_hard", pair, beta=beta)
    assert same(of("sppo", with_scores(pair, 1, 0), beta=beta), hard / 2)
    logistic = of("cal_dpo", pair, beta=beta, calibration_weight=0)
    assert same(of("cal_dpo", pair, beta=beta, calibration_weight=mpf("0.5")) - logistic, hard / 2)
    votes = Vote(pair.chosen), Vote(pair.rejected, desirable=False)
    both = sum(of("kto_zero", vote, beta=beta, desirable_weight=1, undesirable_weight=1) for vote in votes)
    assert same(both, of("apo_zero", pair, beta=beta))
    assert same(
        sum(of("bco", vote, beta=beta, delta=2) for vote in votes), of("bco_pair", pair, beta=beta, delta=2)
    )


@exactly
def test_graded_losses_equal_one_another(pair):
    beta, eta = mpf("0.1"), mpf("0.7")
    graded = with_scores(pair, mpf("1.3"), mpf("-0.4"))
    q = sigma(eta * graded.gap)
    entropy = -q * log(q) - (1 - q) * log(1 - q)
    backward = of("rpo_bwd_kl", graded, beta=beta, eta=eta)
    assert same(backward, of("soft_label_dpo", graded, beta=beta, eta=eta) - entropy)
    epsilon = mpf("0.001")
    certain = with_scores(pair, log((1 - epsilon) / epsilon), 0)
    assert same(of("exo_pair", pair, beta=beta, epsilon=epsilon), of("rpo_fwd_kl", certain, beta=beta, eta=1))


@exactly
def test_reference_free_losses_equal_one_another(pair):
    beta, near = mpf("0.3"), mpf("1e-30")
    chosen, rejected = pair.chosen.policy_mean, pair.rejected.policy_mean
    unlikelihood = -log(1 - mp.exp(rejected))
    assert same(of("asft", pair, beta=beta), -(1 + beta) * chosen + beta * unlikelihood)
    simpo = of("simpo", pair, beta=2, gamma=1)
    assert same(of("alphapo", pair, alpha=near, beta=2, gamma=1), simpo, digits=20)
    assert same(of("cpo_simpo", pair, beta=2, gamma=1, nll_weight=0), simpo)


@exactly
def test_group_losses_equal_one_another(pair):
    beta = mpf("0.1")
    one_hot = {"alpha": mpf("1e-3")}
    group = Group([pair.chosen, pair.rejected, CHOSEN], [2, 1, 0])
    values = [beta * side.h for side in group.best_first]
    first = -log_softmax(values)[0]
    assert same(of("s_dpo", group, beta=beta), first)
    assert same(of("infonca", group, beta=beta, **one_hot), first)
    rest = -log_softmax(values[1:])[0]
    assert same(of("dpo_pl", group, beta=beta), first + rest)
    assert same(of("nca", as_group(pair, 1, 0), beta=beta, **one_hot), of("nca_pair", pair, beta=beta))


@exactly
def test_bregman_members_follow_from_the_generic_line(pair):
    lam, scale = mpf("0.3"), mpf(4)
    ratio = mp.exp(-mpf("0.1") * pair.delta)
    members = {
        "kliep": (lambda r: r * log(r) - r, log, 0),
        "lsif": (lambda r: (r - 1) ** 2, lambda r: 2 * (r - 1), 1),
        "ba": (
            lambda r: (r ** (1 + lam) - r) / lam,
            lambda r: ((1 + lam) * r**lam - 1) / lam,
            1 / lam,
        ),
    }
    for member, (generator, slope, constant) in members.items():
        value = ORACLES["bregman_dpo"](pair, beta=mpf("0.1"), member=member, lam=lam, scale=scale)
        assert same(contrib.bregman_generic(ratio, generator, slope), value + constant), member
    basu = ORACLES["bregman_dpo"](pair, beta=mpf("0.1"), member="ba", lam=1, scale=scale)
    assert same(basu, ORACLES["bregman_dpo"](pair, beta=mpf("0.1"), member="lsif", lam=1, scale=scale))
    scaled = ORACLES["bregman_dpo"](pair, beta=mpf("0.1"), member="sba", lam=1, scale=scale)
    assert same(scaled, basu / 8)


def test_softmax_weights_sum_to_one():
    with mp.workdps(60):
        assert same(fsum(softmax([mpf(3), mpf(-10000), mpf(0)])), mpf(1))


def test_relu_keeps_zero():
    assert relu(mpf(-3)) == 0
