import itertools

import pytest
import torch

from prefloss.kernels.cpu import native


@pytest.mark.parametrize(
    "sizes", [(1, 1, 2), (5, 70, 6), (7, 16, 1), (13, 130, 64), (100, 64, 2051), (256, 65, 1100)]
)
def test_native_matmul(sizes):
    if not native.multiplies(torch.bfloat16):
        pytest.skip("no compiler, or no bfloat16 on this processor")
    m, n, k = sizes
    for a_t, b_t, add in itertools.product((False, True), repeat=3):
        a = torch.randn(k, m).bfloat16().T if a_t else torch.randn(m, k).bfloat16()
        b = torch.randn(n, k).bfloat16().T if b_t else torch.randn(k, n).bfloat16()
        out = torch.full((m, n + 3), 3.0)
        assert native.multiply(a, b, out[:, :n], add)
        torch.testing.assert_close(
            out[:, :n].double(), a.double() @ b.double() + 3 * add, rtol=1e-5, atol=1e-4
        )
        assert (out[:, n:] == 3).all()
