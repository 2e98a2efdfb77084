"""The shared maths: exact values, and gradients where the plain forms have none."""

import math

import pytest
import torch

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


def test_refuse_raises_where_values_can_be_read():
    maths.refuse(torch.tensor([False, False]), "never")
    with pytest.raises(ValueError, match="x: got 1, expected 2"):
        maths.refuse(torch.tensor([False, True]), "x: got 1, expected 2")

    def mapped(x):
        maths.refuse(x > 0, "never")
        return x

    assert torch.vmap(mapped)(torch.tensor([1.0, -1.0])).tolist() == [1.0, -1.0]
