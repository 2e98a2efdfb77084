"""Sums of losses, modifiers and schedules, as written in one string."""

import copy
import pickle

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs, Rankings, registry
from prefloss.hyperparameters import Linear
from prefloss.logratios import PerToken
from prefloss.registry import WeightedSum

PAIRS = Pairs(
    chosen=LogRatios([-20.0, -3.0], [-21.5, -3.5], [10, 4]),
    rejected=LogRatios([-24.0, -5.0], [-23.0, -4.0], [8, 5]),
    score_chosen=[2.0, 1.0],
    score_rejected=[0.5, 0.9],
)


def test_a_sum_is_the_weighted_sum_of_its_terms():
    loss = prefloss.get("0.8*dpo(beta=0.1) + 0.2*hinge + ipo(tau=0.5)")
    parts = [prefloss.get("dpo"), prefloss.get("hinge"), prefloss.get("ipo", tau=0.5)]
    wanted = [weight * part.mean(PAIRS) for weight, part in zip((0.8, 0.2, 1.0), parts, strict=True)]
    torch.testing.assert_close(loss.mean(PAIRS), sum(wanted))
    found = loss.evaluate(PAIRS)
    assert list(found.terms) == list(found.means) == ["dpo", "hinge", "ipo"]
    torch.testing.assert_close(found.means["hinge"], parts[1].mean(PAIRS))
    assert loss.beta == 0.1
    assert loss.spec.difference_only
    assert repr(prefloss.get(repr(loss))) == repr(loss)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)


@pytest.mark.parametrize("text", ["dpo", " dpo ", "dpo()"])
def test_one_name_is_one_term(text):
    """AUDIT T1."""
    (term,) = registry.parse(text)
    assert (term.weight, term.name, dict(term.parameters)) == (1.0, "dpo", {})


def test_a_term_twice_keeps_two_metrics():
    assert list(prefloss.get("dpo(beta=0.1) + dpo(beta=1)").evaluate(PAIRS).means) == ["dpo_1", "dpo_2"]


def test_each_term_keeps_its_own_divisor():
    chosen = LogRatios([-2.0, -4.0], [-2.0, -4.0], [2, 2])
    rejected = LogRatios([-3.0, -3.0], [-3.0, -3.0], [3, 0])
    with registry.quiet():
        found = prefloss.get("dpo + nll").evaluate(Pairs(chosen, rejected))
    # The second pair has no rejected completion: dpo leaves it out, nll does not read that side.
    assert found.means["dpo"].item() == pytest.approx(0.693147, abs=1e-5)
    assert found.means["nll"].item() == pytest.approx((1.0 + 2.0) / 2)


def test_votes_among_pairs():
    loss = prefloss.get("0.5*dpo + 0.5*kto(kl_baseline=zero)")
    assert loss.spec.feedback is Pairs
    wanted = 0.5 * prefloss.get("dpo").mean(PAIRS) + 0.5 * prefloss.get("kto", kl_baseline="zero").mean(
        PAIRS.to_labels()
    )
    torch.testing.assert_close(loss.mean(PAIRS), wanted)
    torch.testing.assert_close(loss(PAIRS).mean(), wanted)


def test_a_sum_keeps_its_terms_state():
    loss = prefloss.get("dpo + 0.5*kto(kl_baseline=running_mean(decay=0.5))")
    loss.mean(PAIRS)
    state = loss.state_dict()
    assert list(state) == ["kto.kl_baseline"]
    other = prefloss.get(repr(loss))
    other.load_state_dict(state)
    torch.testing.assert_close(other.eval().mean(PAIRS), loss.eval().mean(PAIRS))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("0*dpo", ValueError, r"weight: got 0, expected a number > 0"),
        ("-1*dpo", ValueError, r"weight: got -1, expected a number > 0"),
        ("True*dpo", ValueError, r"weight: got True"),
        ("dpo*2", ValueError, r"'dpo' is not a literal"),
        ("dpo(0.1) + ipo", ValueError, r"'dpo\(0.1\)' is not a loss with keyword hyperparameters"),
        ("dpo + nonsense", ValueError, "unknown loss 'nonsense'"),
        ("dpo(**x) + ipo", ValueError, r"\*\* is not allowed"),
        ("dpo + (", ValueError, "expected a loss name"),
        ("dpo + dpo_pl", TypeError, "losses of different feedback"),
    ],
)
def test_what_is_no_sum(text, error, message):
    with pytest.raises(error, match=message):
        prefloss.get(text)
    with pytest.raises(TypeError, match="beside a sum of losses"):
        prefloss.get("dpo + ipo", beta=0.1)


def test_label_smoothing_is_the_expected_loss_under_flips():
    for name in ("dpo", "hinge", "ipo(tau=0.5)"):
        plain = prefloss.get(name)
        found = prefloss.get(name, label_smoothing=0.2)(PAIRS)
        torch.testing.assert_close(found, 0.8 * plain(PAIRS) + 0.2 * plain(PAIRS.swapped()))
    torch.testing.assert_close(
        prefloss.get("dpo", label_smoothing=0.1)(PAIRS), prefloss.get("cdpo", epsilon=0.1)(PAIRS)
    )


def test_margins_and_lengths_shift_the_scaled_margin():
    z = 0.1 * PAIRS.margin()
    gap = PAIRS.score_chosen - PAIRS.score_rejected
    found = prefloss.get("hinge", beta=0.1, score_margin=0.5)(PAIRS)
    torch.testing.assert_close(found, torch.relu(1 - (z - 0.5 * gap)))
    lengths = (PAIRS.chosen.tokens - PAIRS.rejected.tokens).float()
    found = prefloss.get("hinge", beta=0.1, length_penalty=0.01)(PAIRS)
    torch.testing.assert_close(found, torch.relu(1 - (z + 0.01 * lengths)))


def test_a_length_penalty_keeps_the_precision_of_the_log_probs():
    """AUDIT: it was computed in float32 for float64 log-probs."""
    sides = [LogRatios(torch.tensor([h], dtype=torch.float64), [0.0], [n]) for h, n in ((0.3, 7), (0.1, 4))]
    found = prefloss.get("hinge", beta=0.1, length_penalty=0.01)(Pairs(*sides))
    assert found.item() == pytest.approx(1 - (0.1 * 0.2 + 0.01 * 3), abs=1e-15)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha(0.5)", "chi_squared"])
def test_a_divergence_changes_the_score(divergence):
    found = prefloss.get("hinge", divergence=divergence)(PAIRS)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, prefloss.get("hinge")(PAIRS))
    far = Pairs.of(chosen=[1e4, -1e4], rejected=[-1e4, 1e4])
    assert torch.isfinite(prefloss.get("dpo", divergence=divergence)(far)).all()


def rows(policy, reference, mask, squares):
    return PerToken(
        torch.tensor(policy), torch.tensor(reference), torch.tensor(mask), torch.tensor(squares)
    ).log_ratios()


TOKENS = Pairs(
    chosen=rows([[-1.0, -2.0, -3.0]], [[-1.5, -1.0, -1.0]], [[True, True, True]], [[-0.1, -0.2, -0.3]]),
    rejected=rows([[-2.0, -0.5, 0.0]], [[-1.0, -1.5, 0.0]], [[True, True, False]], [[-0.3, -0.4, 0.0]]),
)


def test_token_modifiers_by_hand():
    # Two tokens are shared; the third of the chosen side counts half: h_w = 0.5 - 1 - 2 / 2, h_l = -1 + 1.
    found = prefloss.get("hinge", beta=1.0, ld_alpha=0.5)(TOKENS)
    torch.testing.assert_close(found, torch.tensor([1 - (-1.5 - 0.0)]))
    # Clamped to [-1, 1.5]: the third token's -2 becomes -1.
    found = prefloss.get("hinge", beta=1.0, humanline=True)(TOKENS)
    torch.testing.assert_close(found, torch.tensor([1 - (-1.5 - 0.0)]))
    a_w, a_l = (-6.0 + 0.6) / 3, (-2.5 + 0.7) / 2
    weight = torch.tensor([a_w + a_l]).exp()
    torch.testing.assert_close(
        prefloss.get("hinge", beta=1.0, wpo=True)(TOKENS), weight * prefloss.get("hinge", beta=1.0)(TOKENS)
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("kto", {"label_smoothing": 0.1}, "does not depend on the difference of two scores alone"),
        ("apo_zero", {"divergence": "js"}, "does not depend on the difference"),
        ("ipo", {"score_margin": 0.1}, "does not scale a margin in nats by beta"),
        ("robust_dpo", {"label_smoothing": 0.1}, r"has its own noise level \(epsilon\)"),
        ("simpo", {"divergence": "js"}, "has no reference to diverge from"),
        ("aot", {"wpo": True}, "mixes the pairs of a batch"),
        ("soft_label_dpo", {"score_margin": 1.0}, "reads scores itself"),
        ("tdpo1", {"ld_alpha": 0.5}, "reads tokens itself"),
        ("dpo_pl", {"wpo": True}, "takes no pairs"),
    ],
)
def test_a_loss_refuses_a_modifier_with_the_reason(name, given, message):
    with pytest.raises(TypeError, match=message):
        prefloss.get(name, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"divergence": "alpha(1.5)"},
        {"divergence": "kl"},
        {"humanline": (1, -1)},
        {"label_smoothing": 0.5},
        {"ld_alpha": 2},
    ],
)
def test_modifiers_have_ranges(given):
    with pytest.raises(ValueError, match="expected"):
        prefloss.get("dpo", **given)


def test_a_schedule_moves_a_hyperparameter():
    loss = prefloss.get("dpo", beta=Linear(0.5, 0.1, steps=4))
    assert loss.beta == 0.5
    torch.testing.assert_close(loss(PAIRS), prefloss.get("dpo", beta=0.5)(PAIRS))
    loss.step()
    loss.eval().step()
    assert loss.beta == pytest.approx(0.4)
    loss.train()
    for _ in range(10):
        loss.step()
    assert loss.beta == pytest.approx(0.1)
    config = loss.config()
    assert repr(prefloss.get(config.pop("name"), **config)) == repr(loss)
    assert prefloss.get("dpo(beta=linear(0.5, 0.1, steps=4))").beta == 0.5
    other = prefloss.get("dpo", beta={"name": "cosine", "start": 0.5, "end": 0.1, "steps": 2})
    other.step()
    assert other.beta == pytest.approx(0.3)
    other.load_state_dict({"beta": {"done": 0}})
    assert other.beta == 0.5
    with pytest.raises(ValueError, match=r"beta: got -0.1, expected a number > 0"):
        prefloss.get("dpo", beta=Linear(0.5, -0.1, steps=4))
    with pytest.raises(TypeError, match="expected"):
        prefloss.get("ipo", per_token=Linear(0.5, 0.1, steps=4))


def test_a_sum_of_listwise_losses():
    groups = Rankings(LogRatios.of([[1.5, 0.4, -1.0]]), [[2.0, 1.0, 0.0]])
    loss = prefloss.get("dpo_pl + s_dpo")
    assert isinstance(loss, WeightedSum)
    assert loss(groups).shape == (1,)
