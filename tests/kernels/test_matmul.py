"""Products with the head, and the settings of torch that must not reach them."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefloss.kernels import linear, matmul
from prefloss.kernels.cpu import native
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import LinearInputs
from tests.kernels.problems import PLAIN

CUDA = torch.backends.cuda.matmul
HALVES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def tf32():
    """Whether float32 is multiplied as TF32, by the old setting and by the new one."""
    try:
        old = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # torch refuses where only the new one is set
        return CUDA.fp32_precision == "tf32"
    assert getattr(CUDA, "fp32_precision", "tf32" if old else "ieee") == ("tf32" if old else "ieee")
    return old


class Settings(TorchDispatchMode):
    """Of each product: the dtypes of its factors, and what torch's settings were."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.seen.append((args[-2].dtype, tf32(), *(getattr(CUDA, name) for name in HALVES)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def products(monkeypatch):
    """Settings during the products of forward and backward, on a CPU that is taken for a GPU."""
    monkeypatch.setattr(linear, "full_precision", lambda _: matmul.full_precision(torch.device("cuda")))

    def seen(dtype, scheme):
        x, weight, targets = torch.randn(8, 16), torch.randn(96, 16), torch.zeros(8, dtype=torch.int64)
        inputs, plan = LinearInputs(x.to(dtype), weight.to(dtype), None, targets, PLAIN), Plan(scheme, 4)
        with Settings() as settings:
            stats, kept = linear.linear_forward(inputs, plan, 1)
            if scheme == "recompute":
                linear.linear_backward(torch.ones(1, 8), inputs, stats, kept, plan, (True, True, False))
        assert len(settings.seen) >= 2
        return settings.seen

    return seen


@pytest.fixture
def loose():
    """What a program may set to save time, and would reach these products."""
    before = {name: getattr(CUDA, name) for name in HALVES}
    torch.set_float32_matmul_precision("high")
    for name in HALVES:
        setattr(CUDA, name, True)
    yield
    torch.set_float32_matmul_precision("highest")
    for name, value in before.items():
        setattr(CUDA, name, value)


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("scheme", ["recompute", "unscaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_whatever_is_allowed(monkeypatch, products, dtype, scheme):
    monkeypatch.setattr(native, "library", lambda: None)
    for _, *allowed in products(dtype, scheme):
        assert allowed == [False, False, False]
    # and as before afterwards
    assert tf32()
    assert torch.get_float32_matmul_precision() == "high"
    assert all(getattr(CUDA, name) for name in HALVES)


@pytest.mark.usefixtures("loose")
def test_settings_come_back_after_an_error():
    seen = []
    with pytest.raises(IndexError), matmul.full_precision(torch.device("cuda")):
        seen[tf32()]
    assert tf32()
    assert all(getattr(CUDA, name) for name in HALVES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_of_half_precision_are_multiplied_in_tf32(monkeypatch, dtype):
    """Without a mixed matmul a GPU multiplied float32 copies in float32, at a tenth of the speed or less."""
    monkeypatch.setattr(matmul, "on_cpu", lambda x: False)
    monkeypatch.setattr(matmul, "_device_has_mixed_matmul", lambda *_: False)
    a, b, out = torch.randn(8, 8).to(dtype), torch.randn(8, 8).to(dtype), torch.empty(8, 8)
    with Settings() as settings:
        matmul.matmul(a, b, out)
        torch.testing.assert_close(out, a.float() @ b.float())
        matmul.matmul(a, b, out, add=True)
        matmul.project(a, b, None, out)
        matmul.matmul(out.clone(), out.clone(), out)
    exact = [seen[1] for seen in settings.seen if seen[0] == torch.float32]
    assert exact == [True, False, True, True, False]


def test_tf32_holds_all_bits_of_half_precision():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = every.view(dtype)
        bits = x[x.isfinite()].float().view(torch.int32)
        # of float32's 23 bits behind the point the 13 that TF32 leaves out
        assert not (bits & (2**13 - 1)).any()


def test_parts_of_the_head_sum_to_the_whole(monkeypatch):
    monkeypatch.setattr(matmul, "HEAD_ELEMENTS", 15)
    for dtype, add in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        dz, weight, out = torch.randn(4, 11), torch.randn(11, 3).to(dtype), torch.randn(4, 3)
        want = dz.double() @ weight.double() + (out.double() if add else 0)
        matmul.add_product(dz, weight, out, add)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(CUDA, "fp32_precision"), reason="this torch has the old setting only")
def test_the_new_setting_is_heeded_and_comes_back():
    CUDA.fp32_precision = "tf32"
    try:
        with matmul.full_precision(torch.device("cuda")):
            assert not tf32()
        assert CUDA.fp32_precision == "tf32"
    finally:
        CUDA.fp32_precision = "ieee"
