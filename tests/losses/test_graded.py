"""Losses of scored pairs: published check values, points worked by hand, extremes, what a score must be."""

import math

import pytest
import torch

import prefloss
from prefloss import LogRatios, Pairs
from prefloss.losses import graded
from tests.losses.points import FAR, POINT, assert_empty_is_left_out, assert_finite, grid, losses_of, scored

LOG_2 = math.log(2)

NAMES = losses_of(graded)


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("name", "scores", "value"),
    [
        ("soft_label_dpo", (math.log(4), 0.0), 0.625939),
        ("margin_dpo", (0.5, 0.0), 0.825939),
        ("odpo(alpha=1.0)", (3.0, 1.0), 0.939070),
        ("rpo_bwd_kl", (2.0, 1.0), 0.060972),
        ("rpo_fwd_kl", (2.0, 1.0), 0.065690),
        ("rpo_sq", (2.0, 1.0), 0.5625),
        ("rebel", (2.0, 1.0), 2.25),
        ("sppo(beta=0.1)", (0.8, 0.2), 3.125),
    ],
)
def test_check_values(name, scores, value):
    pairs = scored(POINT, *([score] for score in scores))
    assert prefloss.get(name)(pairs).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "margin", "gap", "value"),
    [
        ("soft_label_dpo(beta=1.0)", math.log(3), math.log(3), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        # A pair whose scores are the other way round.
        ("soft_label_dpo(beta=1.0, eta=2.0)", math.log(3), -LOG_2, 0.2 * math.log(4 / 3) + 0.8 * math.log(4)),
        ("margin_dpo(beta=1.0, margin_weight=2.0)", 3.0, 1.0, softplus(-1.0)),
        ("odpo(beta=1.0, alpha=2.0)", 3.0, math.e, softplus(-1.0)),
        ("odpo(beta=1.0, alpha=2.0, scale='identity')", 3.0, 1.0, softplus(-1.0)),
        ("odpo(beta=1.0, alpha=2.0, scale='identity')", 3.0, -1.0, softplus(-5.0)),
        ("rpo_bwd_kl(beta=1.0)", math.log(3), math.log(3), 0.0),
        ("rpo_bwd_kl(beta=1.0)", 0.0, math.log(3), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("rpo_fwd_kl(beta=1.0)", math.log(3), math.log(3), 0.0),
        ("rpo_fwd_kl(beta=1.0)", 0.0, math.log(3), 0.5 * math.log(4 / 3)),
        ("rpo_sq(beta=0.5, eta=3.0)", 2.0, 1.0, 4.0),
        ("rebel(eta=3.0)", 2.0, 1.0, 1.0),
    ],
)
def test_points_worked_by_hand(name, margin, gap, value):
    pairs = scored(Pairs.of([margin], [0.0]), [gap], [0.0])
    assert prefloss.get(name)(pairs).item() == pytest.approx(value, abs=1e-6)


def test_sppo_at_a_win_is_half_of_its_hard_form():
    pairs, _ = grid([-3.0, 0.5, 7.0], scores=(1.0, 0.0))
    for beta in (0.001, 0.1):
        hard = prefloss.get("sppo_hard", beta=beta)(pairs)
        assert torch.allclose(2 * prefloss.get("sppo", beta=beta)(pairs), hard)


def test_backward_kl_is_the_soft_label_less_an_entropy():
    pairs, policies = grid([-3.0, 0.5, 7.0])
    soft, kl = prefloss.get("soft_label_dpo", eta=0.7)(pairs), prefloss.get("rpo_bwd_kl", eta=0.7)(pairs)
    q = 1 / (1 + math.exp(-0.7 * 1.5))
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert torch.allclose(soft - kl, torch.tensor(entropy))
    gradients = [
        torch.autograd.grad(values.sum(), policies[0], retain_graph=True)[0] for values in (soft, kl)
    ]
    assert torch.allclose(*gradients, atol=1e-7)


def test_exo_is_forward_kl_to_a_smoothed_label():
    pairs, _ = grid([-3.0, 0.5, 7.0], scores=(math.log(9), 0.0))
    assert torch.allclose(
        prefloss.get("rpo_fwd_kl")(pairs), prefloss.get("exo_pair", epsilon=0.1)(pairs), atol=1e-6
    )


def test_rebel_is_rpo_sq_rescaled():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    squared = prefloss.get("rpo_sq", beta=0.5, eta=3.0)(pairs)
    assert torch.allclose(squared, 0.25 * prefloss.get("rebel", eta=6.0)(pairs))


def test_margin_dpo_is_dpo_with_the_modifier():
    pairs, _ = grid([-3.0, 0.5, 7.0])
    modified = prefloss.get("dpo", score_margin=0.4)
    assert torch.allclose(prefloss.get("margin_dpo", margin_weight=0.4)(pairs), modified(pairs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scores", [(2.0, 0.5), (1e4, -1e4), (1.0, 0.0)])
def test_extremes(name, scores):
    assert_finite(name, *grid(FAR, scores=scores))


@pytest.mark.parametrize("name", NAMES)
def test_extremes_of_reversed_scores(name):
    given = {"scale": "identity"} if name == "odpo" else {}
    assert_finite(name, *grid(FAR, scores=(-1e4, 1e4)), **given)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_completion_is_left_out(name):
    assert_empty_is_left_out(name)


@pytest.mark.parametrize("name", NAMES)
def test_scores_get_no_gradient_and_keep_the_dtype(name):
    score = torch.tensor([0.75], dtype=torch.float64, requires_grad=True)
    h = torch.tensor([1.0], requires_grad=True)
    sides = LogRatios(h, torch.zeros(1)), LogRatios.of([0.0])
    value = prefloss.get(name)(Pairs(*sides, score_chosen=score, score_rejected=[0.25]))
    assert value.dtype == torch.float32
    _, gradient = torch.autograd.grad(value, [h, score], allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_needed(name):
    with pytest.raises(
        ValueError, match=f"{name}: scores: got None, expected score of the chosen completion"
    ):
        prefloss.get(name)(POINT)
    with pytest.raises(ValueError, match="score_chosen: got None"):
        prefloss.specs[name].function(POINT)


@pytest.mark.parametrize("gap", [0.0, -1.0])
def test_odpo_needs_the_chosen_completion_scored_higher(gap):
    pairs = scored(Pairs.of([1.0, 1.0], [0.0, 0.0]), [2.0, gap], [1.0, 0.0])
    with pytest.raises(ValueError, match="odpo: score_chosen: got a score not above score_rejected"):
        prefloss.get("odpo")(pairs)
    assert prefloss.get("odpo", scale="identity")(pairs).isfinite().all()


def test_odpo_marks_a_pair_without_a_log_where_it_cannot_raise():
    def value(gap):
        zero = torch.zeros(1)
        pairs = Pairs.of(zero, zero, score_chosen=gap.reshape(1), score_rejected=zero)
        return prefloss.losses.odpo(pairs)[0]

    values = torch.vmap(value)(torch.tensor([1.0, 0.0, -1.0]))
    assert values[0].item() == pytest.approx(LOG_2)
    assert values[1:].isnan().all()


def test_odpo_knows_two_scales():
    with pytest.raises(ValueError, match="odpo: scale: got 'ratio', expected one of 'log', 'identity'"):
        prefloss.get("odpo", scale="ratio")


def test_turbo_alignments_name():
    assert prefloss.get("sigmoid_with_margin").name == "margin_dpo"
