"""Which registered loss does a function compute?"""

import pytest
import torch
from torch.nn.functional import logsigmoid, relu

import prefloss
from prefloss import Labels
from prefloss.integrations.four_tensor import FourTensorLoss
from prefloss.testing import compare, identify

# Losses that are alike, and one of each other kind.
SOME = [
    "dpo",
    "ipo",
    "hinge",
    "cdpo",
    "robust_dpo",
    "exo_pair",
    "gpo_exponential",
    "nca_pair",
    "apo_zero",
    "aot",
]
READ_TOKENS = ["simpo", "cpo", "cpo_simpo", "orpo", "alphapo", "nll", "ln_dpo"]


def margin(chosen, rejected, reference_chosen, reference_rejected):
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def smoothed(*logps):
    scaled = 0.23 * margin(*logps)
    return -0.85 * logsigmoid(scaled) - 0.15 * logsigmoid(-scaled)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda a, b, c, d: -logsigmoid(0.37 * margin(a, b, c, d)), "dpo(beta=0.37)"),
        (lambda a, b, c, d: relu(1 - 2.5 * margin(a, b, c, d)).mean(), "hinge(beta=2.5)"),
        (lambda a, b, c, d: ((margin(a, b, c, d) - 1 / 0.6) ** 2).sum(), "ipo(tau=0.3, per_token=False)"),
        (smoothed, "cdpo(beta=0.23, epsilon=0.15)"),
    ],
    ids=["each", "mean", "sum", "smoothed"],
)
def test_a_function_of_four_tensors(function, found):
    identity = identify(function, among=SOME)
    assert str(identity).startswith(f"{found}, in value and gradient")
    assert identity.loss is identity.nearest
    assert (identity.factor, identity.offset) == (1, 0)


@pytest.mark.parametrize(
    ("reduce", "returns"), [(torch.clone, "each"), (torch.mean, "mean"), (torch.sum, "sum")]
)
def test_how_it_is_reduced(reduce, returns):
    found = identify(lambda a, b, c, d: reduce(-logsigmoid(margin(a, b, c, d))), among=["dpo"])
    assert repr(found.loss) == "dpo(beta=1.0)"
    assert found.returns == returns


def test_a_factor_and_a_constant_are_stated():
    turned = identify(
        lambda a, b, c, d: 4 - 3 * logsigmoid(-0.2 * margin(a, b, c, d)), among=["dpo", "hinge"]
    )
    assert not turned
    scaled = identify(lambda a, b, c, d: 4 + 3 * logsigmoid(0.2 * margin(a, b, c, d)), among=["dpo", "hinge"])
    assert (scaled.factor, scaled.offset) == (-3, 4)
    assert str(scaled) == "-3 * dpo(beta=0.2) + 4, in value and gradient: one value per example"


def test_the_simplest_loss_comes_first_and_its_equals_with_it():
    found = identify(lambda a, b, c, d: -logsigmoid(0.2 * margin(a, b, c, d)), among=["cdpo", "dpo"])
    assert repr(found.loss) == "dpo(beta=0.2)"
    assert [*map(repr, found.equals)] == ["cdpo(beta=0.2, epsilon=0.0)"]


def test_none_of_them():
    found = identify(lambda a, b, c, d: torch.sin(margin(a, b, c, d)), among=SOME)
    assert not found
    assert found.loss is None
    assert str(found).startswith("none of 10 losses; nearest: ")
    # The right value with half the gradient for the chosen side is another training.
    halved = identify(
        lambda a, b, c, d: -logsigmoid(0.2 * margin((a + a.detach()) / 2, b, c, d)), among=["dpo", "hinge"]
    )
    assert not halved


def test_token_counts_and_no_reference():
    simpo = FourTensorLoss("simpo", beta=2.0, gamma=0.7)
    found = identify(simpo, among=READ_TOKENS)
    assert repr(found.loss) == "simpo(beta=2.0, gamma=0.7)"

    def odds(chosen, rejected, chosen_tokens, rejected_tokens):
        means = chosen / chosen_tokens, rejected / rejected_tokens
        log_odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        return (-means[0] - 0.4 * logsigmoid(log_odds[0] - log_odds[1])).mean()

    assert repr(identify(odds, among=READ_TOKENS).loss) == "orpo(odds_weight=0.4)"


def test_a_modifier():
    loss = prefloss.get("hinge", beta=0.3, label_smoothing=0.2)
    found = identify(FourTensorLoss(loss), among=["dpo", "hinge"])
    assert repr(found.loss) == "hinge(beta=0.3, label_smoothing=0.2)"


def test_feedback():
    zero = prefloss.get("kto", beta=0.3, kl_baseline="zero", undesirable_weight=1.5)
    among = ["kto", "kto_zero", "npo", "kto_logsigmoid"]
    found = identify(lambda labels: zero(labels), feedback=Labels, among=among)
    assert repr(found.loss) == "kto_zero(beta=0.3, desirable_weight=1.0, undesirable_weight=1.5)"
    loss = prefloss.get("tdpo2", beta=0.2, alpha=0.7)
    assert repr(identify(loss, among=["tdpo1", "tdpo2"]).loss) == repr(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_in_single_precision(dtype):
    def single(a, b, c, d):
        return -logsigmoid(0.3 * margin(*(logp.to(dtype) for logp in (a, b, c, d))))

    assert repr(identify(single, among=["dpo", "ipo"], tolerance=1e-3).loss) == "dpo(beta=0.3)"


def test_compare_fits_nothing():
    def dpo(a, b, c, d):
        return -logsigmoid(0.1 * margin(a, b, c, d))

    assert compare(dpo, prefloss.get("dpo", beta=0.1))
    assert not compare(dpo, prefloss.get("dpo", beta=0.11))
    with pytest.raises(ValueError, match=r"loss: got simpo\(.*expected one that reads only"):
        compare(dpo, prefloss.get("simpo"))


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (3, TypeError, "function: got 3"),
        (lambda a, b, c: a, TypeError, "takes a, b, c, expected four log-prob tensors"),
        (lambda a, b, c, d: 1.0, TypeError, "function: returned float, expected losses of shape"),
        (lambda a, b, c, d: a[:2], TypeError, "function: returned a tensor"),
        (lambda a, b, c, d: a.detach(), ValueError, "without a gradient"),
    ],
)
def test_what_is_refused(function, error, match):
    with pytest.raises(error, match=match):
        identify(function, among=["dpo"])


def test_names_are_checked():
    with pytest.raises(ValueError, match="among: got 'simmpo', expected names of registered losses"):
        identify(lambda a, b, c, d: a, among=["simmpo"])
    with pytest.raises(ValueError, match=r"among: got \['simpo'\], expected losses that read only"):
        identify(lambda a, b, c, d: a, among=["simpo"])
    with pytest.raises(TypeError, match="feedback: got <class 'int'>, expected Pairs"):
        identify(lambda pairs: pairs, feedback=int)
