import ctypes
import itertools
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from prefloss.kernels import softmax
from prefloss.kernels.cpu import build, library, native
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.tiles import TileSpec
from prefloss.logprobs import linear_token_logps

EMULATION = Path(__file__).with_name("avx512bf16.h")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The functions for AVX-512 with bfloat16, whose instructions are done in plain C, and the library they are in."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulated instructions are those of x86-64")
    file = tmp_path_factory.mktemp("emulated") / "libprefloss.so"
    flags = ("-DLEVEL=emulated", "-include", str(EMULATION), "-Wno-psabi", "-O1", "-shared")
    try:
        command = [*build.compiler(), *build.FLAGS, *flags, "-o", str(file), str(build.SOURCE), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
    except (build.CannotBuild, subprocess.CalledProcessError) as error:
        pytest.skip(str(error))
    loaded = ctypes.CDLL(str(file))
    return library.declared(loaded, file, "emulated"), loaded


@pytest.fixture(params=["native", "emulated"])
def products(request, monkeypatch):
    """The test runs with the processor's bfloat16 products, if it has them, and with emulated ones."""
    if request.param == "emulated":
        functions, _ = request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "library", lambda: functions)
    elif not native.multiplies(torch.bfloat16):
        pytest.skip("no compiler, or no bfloat16 on this processor")


@pytest.mark.parametrize(
    "sizes", [(1, 1, 2), (5, 70, 6), (7, 16, 1), (13, 130, 64), (100, 64, 2051), (256, 65, 1100)]
)
def test_native_matmul(sizes, products):
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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tokens", [3, 50])
def test_log_probs_with_native_products(tokens, frozen, products):
    hidden = torch.randn(tokens, 70).bfloat16().requires_grad_()
    weight = torch.randn(333, 70).bfloat16().requires_grad_(not frozen)
    targets = torch.randint(333, (tokens,))
    trained = [hidden] if frozen else [hidden, weight]
    results = {}
    for impl in ("naive", "chunked"):
        logps = linear_token_logps(hidden, weight, targets, impl=impl)
        results[impl] = [logps, *torch.autograd.grad(logps.sum(), trained)]
    (logps, *gradients), (expected, *exact) = results["chunked"], results["naive"]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    for got, want in zip(gradients, exact, strict=True):
        assert (got.float() - want.float()).norm() < 5e-3 * want.float().norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_without_memory_leaves_its_result_alone(transposed, emulated, monkeypatch):
    """AUDIT, the malloc that fails among threads: part of the sum was written, and plain torch then added all of it."""
    functions, loaded = emulated
    monkeypatch.setattr(native, "library", lambda: functions)
    left = ctypes.c_int.in_dll(loaded, "allocations_left")
    a, b = torch.randn(130, 64).bfloat16(), torch.randn(64, 200).bfloat16()
    a = a.T.contiguous().T if transposed else a
    out = torch.ones(130, 200)
    for allocations in range(2 if transposed else 1):
        left.value = allocations
        assert not native.multiply(a, b, out, add=True)
        assert (out == 1).all()
    left.value = -1
    assert native.multiply(a, b, out, add=True)


def test_a_projection_without_memory_raises(emulated, monkeypatch):
    """AUDIT, the malloc that fails among threads: this wrote through NULL."""
    functions, loaded = emulated
    monkeypatch.setattr(native, "library", lambda: functions)
    left = ctypes.c_int.in_dll(loaded, "allocations_left")
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    spec = TileSpec(torch.zeros(40, dtype=torch.int64), 0, LogitTransform())
    for allocations in range(2):
        left.value = allocations
        with pytest.raises(MemoryError, match="not enough memory for the workspace"):
            native.project(x, weight, None, spec, softmax.new_sums(40, x), True)
    left.value = -1
    native.project(x, weight, None, spec, softmax.new_sums(40, x), True)
