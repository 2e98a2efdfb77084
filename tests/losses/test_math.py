"""The shared maths: exact values, and gradients where the plain forms have none."""

import math

import pytest
import torch

from prefloss import LogRatios, Pairs
from prefloss.losses._core import maths

LOG_2 = math.log(2)


@pytest.mark.parametrize(
    ("x", "value", "slope"),
    [
        (-LOG_2, -LOG_2, -1.0),
        (-math.log(4), math.log(3 / 4), -1 / 3),
        (-math.log(4 / 3), math.log(1 / 4), -3.0),
        (-1e-9, -20.72326584, -1e9),
        (-1e-30, -69.07755279, -1e30),
        (-50.0, -1.928749848e-22, -1.928749848e-22),
        (-1e4, 0.0, 0.0),
    ],
)
def test_log1mexp_and_its_slope(x, value, slope):
    x = torch.tensor(x, requires_grad=True)
    result = maths.log1mexp(x)
    (gradient,) = torch.autograd.grad(result, x)
    assert result.item() == pytest.approx(value, rel=1e-6)
    assert gradient.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [0.0, -1e-45, 1e-6, 1e4])
def test_a_certain_completion_has_finite_log1mexp_and_no_slope(x, dtype):
    x = torch.tensor(x, dtype=dtype, requires_grad=True)
    result = maths.log1mexp(x)
    (gradient,) = torch.autograd.grad(result, x)
    assert result.isfinite()
    assert result < -87
    assert gradient.isfinite()


def test_plain_forms_of_log1mexp_fail_there():
    assert torch.log1p(-torch.exp(torch.tensor(-1e-9))) == -math.inf
    x = torch.tensor([0.0, -1.0], requires_grad=True)
    both = torch.where(x > -LOG_2, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    (gradient,) = torch.autograd.grad(both[1], x)
    assert gradient[0].isnan()


@pytest.mark.parametrize(
    ("policy", "odds"), [(-LOG_2, 0.0), (math.log(0.75), math.log(3)), (-1e-8, 18.420681)]
)
def test_log_odds_of_the_mean_probability(policy, odds):
    ratios = LogRatios(policy=torch.tensor([4 * policy], dtype=torch.float64), tokens=[4])
    assert maths.log_odds(ratios).item() == pytest.approx(odds, rel=1e-6, abs=1e-12)


def test_nll_is_per_token_and_zero_without_tokens():
    assert maths.nll(LogRatios(policy=[-20.0, -3.0], tokens=[10, 0])).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("z", "q", "value"),
    [
        (0.0, 0.5, 0.0),
        (math.log(3), 0.75, 0.0),
        (math.log(3), 0.5, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        (0.0, 0.75, 0.5 * math.log(4 / 3)),
        (1e4, 0.25, math.log(4)),
        (-1e4, 0.25, math.log(4 / 3)),
    ],
)
def test_bernoulli_kl(z, q, value):
    z = torch.tensor(z, requires_grad=True)
    result = maths.bernoulli_kl(z, math.log(q), math.log(1 - q))
    (gradient,) = torch.autograd.grad(result, z)
    assert result.item() == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert gradient.isfinite()


def test_bernoulli_kl_of_opposite_certainties():
    far = torch.tensor(1e4)
    certain = torch.nn.functional.logsigmoid(far), torch.nn.functional.logsigmoid(-far)
    assert maths.bernoulli_kl(-far, *certain).item() == 1e4
    assert maths.bernoulli_kl(far, *certain).item() == 0


def test_lengths_take_the_dtype_of_the_log_probs():
    assert maths.lengths(LogRatios(torch.tensor([-1.0]).double(), tokens=[3])).dtype == torch.float64
    with pytest.raises(ValueError, match="tokens: got None, expected completion token counts"):
        maths.lengths(LogRatios(policy=[-1.0]))


def test_what_a_loss_misses_is_named():
    pairs = Pairs.of([0.0], [0.0])
    with pytest.raises(ValueError, match="gold: got None, expected log-ratios of a third completion"):
        maths.gold_of(pairs)
    with pytest.raises(ValueError, match="score_chosen: got None, expected a score of each completion"):
        maths.score_gap(pairs)


def test_scores_have_the_dtype_of_the_log_ratios_and_no_gradient():
    score = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    pairs = Pairs.of([0.0], [0.0], score_chosen=score, score_rejected=[0.5])
    gap = maths.score_gap(pairs)
    assert gap.item() == 1.5
    assert gap.dtype == torch.float32
    assert not gap.requires_grad


def test_refuse_raises_where_values_can_be_read():
    maths.refuse(torch.tensor([False, False]), "never")
    with pytest.raises(ValueError, match="x: got 1, expected 2"):
        maths.refuse(torch.tensor([False, True]), "x: got 1, expected 2")

    def mapped(x):
        maths.refuse(x > 0, "never")
        return x

    assert torch.vmap(mapped)(torch.tensor([1.0, -1.0])).tolist() == [1.0, -1.0]
