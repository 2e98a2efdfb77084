"""The reward that each loss implies: what it is, its value, the loss as a function of it, and of its tokens."""

import math

import pytest
import torch

import prefloss
from prefloss.feedback import Pairs
from prefloss.logratios import LogRatios, PerToken
from prefloss.registry import Reward

# What the papers compare between the completions of a prompt.
NONE = None
REWARDS = {
    "β h": "a2po aot aot_unpaired apo_down apo_zero balanced_bpo bco bco_pair bdpo beta_dpo bregman_dpo c2dpo cal_dpo "
    "cauchy cdpo discopop discopop_aqfl discopop_aql discopop_cell discopop_dbaql discopop_padll discopop_pfl dpo "
    "dpo_nll dpo_pl dpo_shift dpo_sigmoid_prob dpop dr_dpo dro exo exo_pair focalpo gpo_exponential gpo_savage "
    "gpo_truncated_quadratic hinge infonca kto kto_logsigmoid kto_pair kto_zero lipo_lambda mallows_dpo margin_dpo "
    "minor_dpo nca nca_pair npo odpo robust_dpo rpo_bwd_kl rpo_fwd_kl rpo_relative rpo_sq s_dpo selm soft_label_dpo "
    "sppo sppo_hard wpo xpo",
    "β h / |y|": "ln_dpo",
    "β h, / |y| if per_token": "ipo",
    "β h + α |y|": "r_dpo",
    "α β log π(y) - β log π_ref(y)": "hdpo",
    "h / η": "rebel",
    "β (h + K)": "tdpo1",
    "β (h + α K)": "tdpo2",
    "β Σ clamp(h_t, log ε_P, log ε_R)": "humanline_dpo",
    "β Σ w_t (h_t - α K_t)": "tis_dpo",
    "β (1 - exp(-h))": "f_dpo_forward_kl",
    "β (log 2 + log σ(h))": "f_dpo_js",
    "β (1 - exp(-α h)) / α": "f_dpo_alpha",
    "β (exp(h) + h)": "chipo",
    "log π(y)": "slic_hf",
    "β log π(y)": "cpo tpo",
    "log π(y) / |y|": "pro rrhf",
    "β log π(y) / |y|": "alpha_dpo cpo_simpo simnpo simpo tpo_l",
    "β log π(y) / |y|, β h if reference": "gamma_po",
    "β (log π(y) - α log π_ref(y)) / |y| with α = mixing": "rainbowpo",
    "β (1 - p^-α) / α with p = π(y)^(1 / |y|)": "alphapo",
    "log(p / (1 - p)) with p = π(y)^(1 / |y|)": "asft orpo",
    "π(y)^(1 / |y|)": "simper",
    NONE: "ld_dpo nll sampo",
}
BY_LOSS = {name: formula for formula, names in REWARDS.items() for name in names.split()}


def test_every_loss_says_what_its_reward_is_or_why_it_has_none():
    assert BY_LOSS.keys() == prefloss.specs.keys()
    for name, spec in prefloss.specs.items():
        if BY_LOSS[name] is NONE:
            assert isinstance(spec.reward, str)
            with pytest.raises(
                ValueError, match=f"loss: got {name}, which implies no reward of a completion: "
            ):
                prefloss.get(name).reward  # noqa: B018
        else:
            assert repr(prefloss.get(name).reward).startswith(BY_LOSS[name])


def completion(policy, reference, **rows):
    """A completion of these tokens, with its rows: one entry."""
    policy, reference = torch.tensor([policy]).double(), torch.tensor([reference]).double()
    mask = torch.ones_like(policy, dtype=torch.bool)
    rows = {name: torch.tensor([value], dtype=torch.float64) for name, value in rows.items()}
    return PerToken(policy, reference, mask, **rows).log_ratios()


# log π = -6, log π_ref = -8, so h = 2, of 4 tokens.
ONE = completion(
    [-1.0, -2.0, -0.5, -2.5], [-1.5, -1.0, -3.5, -2.0], kl=[0.1, 0.2, 0.3, 0.4], weight=[1.0, 0.5, 2.0, 1.0]
)
MEAN = math.exp(-1.5)
VALUES = {
    "dpo(beta=0.3)": 0.6,
    "kto(beta=0.3)": 0.6,
    "dro(tau=0.25)": 0.5,
    "ipo(tau=0.5, per_token=True)": 0.25,
    "ipo(tau=0.5, per_token=False)": 1.0,
    "ln_dpo(beta=3.0)": 1.5,
    "r_dpo(beta=0.3, alpha=0.05)": 0.8,
    "hdpo(beta=0.5, alpha=0.8)": 0.5 * (8 - 0.8 * 6),
    "rebel(eta=4.0)": 0.5,
    "tdpo1(beta=0.3)": 0.9,
    "tdpo2(beta=0.3, alpha=0.5)": 0.75,
    # h_t = 0.5, -1, 3, -0.5; the clamp to [-0.75, 1] makes 0.5 - 0.75 + 1 - 0.5.
    "humanline_dpo(beta=2.0, log_epsilon_p=-0.75, log_epsilon_r=1.0)": 0.5,
    "tis_dpo(beta=1.0)": 0.5 - 0.5 + 6 - 0.5,
    "f_dpo_forward_kl(beta=0.3)": 0.3 * (1 - math.exp(-2)),
    "f_dpo_js(beta=0.3)": 0.3 * math.log(2 / (1 + math.exp(-2))),
    "f_dpo_alpha(beta=0.3, alpha=0.5)": 0.6 * (1 - math.exp(-1)),
    "chipo(beta=0.3)": 0.3 * (math.exp(2) + 2),
    "slic_hf": -6.0,
    "cpo(beta=0.3)": -1.8,
    "rrhf": -1.5,
    "simpo(beta=2.0)": -3.0,
    "alpha_dpo(beta=2.0)": -3.0,
    "gamma_po(beta=2.0)": -3.0,
    "gamma_po(beta=0.3, reference=True)": 0.6,
    "rainbowpo(beta=2.0, mixing=0.25)": 2 * (-1.5 + 0.25 * 2),
    "alphapo(beta=2.0, alpha=0.5)": 2 * (1 - MEAN**-0.5) / 0.5,
    "alphapo(beta=2.0, alpha=0.0)": -3.0,
    "orpo": math.log(MEAN / (1 - MEAN)),
    "simper": MEAN,
    "dpo(beta=0.3, divergence='js')": 0.3 * math.log(2 / (1 + math.exp(-2))),
    "dpo(beta=0.3, length_penalty=0.05)": 0.8,
    "dpo(beta=2.0, humanline=(-0.75, 1.0))": 0.5,
    "kto(beta=2.0, humanline=(-0.75, 1.0))": 0.5,
    "ln_dpo(beta=2.0, humanline=(-0.75, 1.0))": 0.125,
    "dpo(beta=0.3, label_smoothing=0.1, score_margin=1.0)": 0.6,
    "dpo(beta=0.3) + 0.5*hinge(beta=0.3) + 1.0*nll": 0.6,
    "1.0*nll + 1.0*orpo + 0.5*asft(beta=0.3)": math.log(MEAN / (1 - MEAN)),
}


@pytest.mark.parametrize("loss", VALUES)
def test_rewards_by_hand(loss):
    assert prefloss.get(loss).reward(ONE).item() == pytest.approx(VALUES[loss], rel=1e-12)


def pairs(rows=8):
    """Pairs of 1 to 6 tokens, with rows and a gold completion."""
    torch.manual_seed(0)

    def side():
        mask = torch.arange(6) < torch.randint(1, 7, (rows, 1))
        values = {
            name: torch.where(mask, torch.rand(rows, 6).double(), 0.0)
            for name in ("kl", "weight", "reverse_kl")
        }
        logps = (torch.where(mask, -3 * torch.rand(rows, 6).double(), 0.0) for _ in range(2))
        return PerToken(*logps, mask, **values).log_ratios()

    return Pairs(side(), side(), gold=side())


# Where nothing but the logistic loss of the rewards' difference is left.
LOGISTIC = [
    "dpo",
    "ln_dpo",
    "r_dpo",
    "hdpo",
    "tdpo1",
    "tdpo2(alpha=0.7)",
    "humanline_dpo",
    "tis_dpo(alpha=0.3)",
    "f_dpo_forward_kl",
    "f_dpo_js",
    "f_dpo_alpha",
    "chipo(r_max=100.0)",
    "cpo(nll_weight=0.0)",
    "tpo(nll_weight=0.0)",
    "simpo(gamma=0.0)",
    "cpo_simpo(gamma=0.0, nll_weight=0.0)",
    "tpo_l(gamma=0.0, nll_weight=0.0)",
    "alphapo(gamma=0.0)",
    "alpha_dpo(gamma=0.0, alpha=0.0)",
    "gamma_po(gamma=0.0)",
    "gamma_po(gamma=0.0, reference=True)",
    "dpo(divergence='alpha(0.3)', length_penalty=0.1)",
]


@pytest.mark.parametrize("name", LOGISTIC)
def test_the_loss_is_that_of_the_difference_of_its_rewards(name):
    loss, batch = prefloss.get(name), pairs()
    margin = loss.reward(batch.chosen) - loss.reward(batch.rejected)
    torch.testing.assert_close(loss(batch), -torch.nn.functional.logsigmoid(margin))


def test_other_losses_are_functions_of_their_rewards():
    batch = pairs()
    for name, expected in {
        "hinge": lambda w, lo: torch.relu(1 - w + lo),
        "ipo(tau=0.2)": lambda w, lo: ((w - lo) / 0.2 - 1 / 0.4) ** 2,
        "sppo_hard(beta=0.1)": lambda w, lo: ((w - 0.5) ** 2 + (lo + 0.5) ** 2) / 0.1**2,
        "apo_zero": lambda w, lo: torch.sigmoid(-w) + torch.sigmoid(lo),
        "slic_hf(nll_weight=0.0)": lambda w, lo: torch.relu(1 - w + lo),
        "simper": lambda w, lo: lo - w,
    }.items():
        loss = prefloss.get(name)
        torch.testing.assert_close(
            loss(batch), expected(loss.reward(batch.chosen), loss.reward(batch.rejected))
        )
    orpo = prefloss.get("orpo(odds_weight=0.5)")
    odds_ratio = orpo.reward(batch.chosen) - orpo.reward(batch.rejected)
    nll = prefloss.get("nll")(batch)
    torch.testing.assert_close(orpo(batch), nll - 0.5 * torch.nn.functional.logsigmoid(odds_ratio))


def test_sums_of_terms_with_different_rewards_are_refused():
    with pytest.raises(
        ValueError, match=r"different rewards, dpo \(β h, beta=0.1\) and hinge \(β h, beta=0.2\)"
    ):
        prefloss.get("dpo(beta=0.1) + hinge(beta=0.2)").reward  # noqa: B018
    with pytest.raises(ValueError, match="got nll, which implies no reward"):
        prefloss.get("1.0*nll + 2.0*nll").reward  # noqa: B018
    with pytest.raises(
        ValueError, match="got ld_alpha, which implies no reward of a completion: how many tokens"
    ):
        prefloss.get("dpo(ld_alpha=0.5)").reward  # noqa: B018


@pytest.mark.parametrize("loss", [*VALUES, "f_dpo_js(beta=0.5)", "dpo(divergence='chi_squared', beta=0.01)"])
def test_rewards_of_tokens_add_up(loss):
    reward, batch = prefloss.get(loss).reward, pairs().chosen
    tokens = reward.of_tokens(batch)
    torch.testing.assert_close(tokens.sum(-1), reward(batch))
    assert (tokens[~batch.per_token.mask] == 0).all()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dpo(beta=2.0)", [1.0, -2.0, 6.0, -1.0]),
        ("ln_dpo(beta=2.0)", [0.25, -0.5, 1.5, -0.25]),
        ("simpo(beta=2.0)", [-0.5, -1.0, -0.25, -1.25]),
        ("r_dpo(beta=2.0, alpha=0.1)", [1.1, -1.9, 6.1, -0.9]),
        ("hdpo(beta=2.0, alpha=0.5)", [2.0, 0.0, 6.5, 1.5]),
        ("humanline_dpo(beta=2.0, log_epsilon_p=-0.75, log_epsilon_r=1.0)", [1.0, -1.5, 2.0, -1.0]),
        ("tdpo1(beta=1.0)", [0.6, -0.8, 3.3, -0.1]),
    ],
)
def test_rewards_of_tokens_by_hand(loss, expected):
    torch.testing.assert_close(
        prefloss.get(loss).reward.of_tokens(ONE), torch.tensor([expected], dtype=torch.float64)
    )


def test_tokens_of_a_bent_reward_count_with_its_slope():
    reward = prefloss.get("orpo").reward
    tokens = reward.of_tokens(ONE)[0]
    # d log(p / (1 - p)) / d log π = 1 / (|y| (1 - p)); the rest is shared out equally, so differences show the slope.
    slope = 1 / (4 * (1 - MEAN))
    torch.testing.assert_close(tokens - tokens[0], slope * (ONE.per_token.policy[0] + 1.0))


def test_an_empty_completion_has_no_tokens_to_share_a_reward():
    empty = PerToken(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)).log_ratios()
    for name in ("dpo", "simpo", "orpo"):
        assert prefloss.get(name).reward.of_tokens(empty).tolist() == [[0.0, 0.0]]


def test_a_loss_of_ones_own_declares_its_reward():
    try:

        @prefloss.register(name="with_reward", reward=lambda ratios, *, slope: slope * ratios.policy_mean)
        def with_reward(pairs: Pairs, *, slope: float = 2.0) -> torch.Tensor:
            """Own."""
            return slope * pairs.margin()

        @prefloss.register(name="silent")
        def silent(pairs: Pairs, *, slope: float = 2.0) -> torch.Tensor:
            """Own."""
            return slope * pairs.margin()

        assert prefloss.get("with_reward(slope=4.0)").reward(ONE).item() == -6.0
        with pytest.raises(ValueError, match=r"got silent, which implies no reward .* declares none"):
            prefloss.get("silent").reward  # noqa: B018
        with pytest.raises(TypeError, match="wrong: reward: got the hyperparameter 'tau', expected some of"):
            prefloss.register(name="wrong", reward=Reward(lambda ratios, *, tau: tau * ratios.h, "τ h"))(
                silent
            )
        with pytest.raises(TypeError, match="wrong: reward: got 3, expected a function"):
            prefloss.register(name="wrong", reward=3)(silent)
    finally:
        for name in ("with_reward", "silent"):
            prefloss.registry.unregister(name)


def test_rewards_read_the_schedule_of_a_hyperparameter():
    loss = prefloss.get("dpo", beta=prefloss.hyperparameters.Linear(0.1, 0.3, steps=2))
    assert loss.reward(ONE).item() == pytest.approx(0.2)
    loss.step()
    assert loss.reward(ONE).item() == pytest.approx(0.4)


def test_what_the_reward_lacks_is_an_error():
    with pytest.raises(ValueError, match="reference: got None"):
        prefloss.get("dpo").reward(LogRatios(policy=[-1.0]))
    with pytest.raises(ValueError, match="tokens: got None"):
        prefloss.get("simpo").reward(LogRatios(policy=[-1.0]))
