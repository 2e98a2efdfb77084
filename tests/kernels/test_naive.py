import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefloss import kernels
from prefloss.kernels.naive import LogitTransform

TRANSFORMS = st.builds(
    LogitTransform, st.floats(0.1, 3), st.none() | st.floats(0.5, 30), temperature=st.floats(0.2, 3)
)


@given(TRANSFORMS, st.integers(0, 2**32 - 1))
def test_transform_in_place_and_its_slope_agree_with_autograd(transform, seed):
    x = (
        4 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).requires_grad_()
    z = transform.apply(x)
    z.sum().backward()
    torch.testing.assert_close(transform.apply_(x.detach().clone()), z.detach())
    slope = torch.as_tensor(transform.slope(z.detach()), dtype=torch.float64).expand_as(x)
    torch.testing.assert_close(slope, x.grad)


@pytest.mark.parametrize("transform", [LogitTransform(2.0, None, 0.5), LogitTransform(2.0, 3.0, 0.5)])
def test_transform_keeps_a_masked_logit_masked(transform):
    x = torch.tensor([-math.inf, 1.0])
    z = transform.apply(x)
    assert z[0] == transform.apply_(x)[0] == -math.inf
    assert z[1].isfinite()
    slope = transform.slope(z)
    assert math.isfinite(slope) if isinstance(slope, float) else slope.isfinite().all()


@pytest.mark.parametrize(
    ("interpreted", "device", "installed", "expected"),
    [
        (False, False, True, False),
        (False, True, True, True),
        (False, True, False, False),
        (True, False, True, True),
        (True, False, False, False),
    ],
)
def test_available_needs_triton_and_something_to_run_it(
    monkeypatch, interpreted, device, installed, expected
):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    assert kernels.available() is expected
