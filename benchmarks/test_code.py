"""Every combination that `tests/kernels/triton/test_code.py` checks some of: ``pytest benchmarks/test_code.py``."""

import pytest

from tests.kernels.triton import test_code


@pytest.mark.parametrize(("dtype", "flags", "arch"), test_code.ALL)
def test_every_combination(dtype, flags, arch):
    test_code.check(dtype, flags, arch)
