"""The ops of `chunked`, with the compiled row operations and without."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from prefloss.kernels import chunked, matmul, naive, softmax
from prefloss.kernels.cpu import native
from prefloss.kernels.plan import Plan
from tests.kernels.problems import (
    CAPPED,
    PLAIN,
    TRANSFORMS,
    Watch,
    linear_stats,
    relative,
    token_stats,
)

pytestmark = pytest.mark.usefixtures("row_passes")
FOUR_TOKENS = Plan("recompute", 4)


def linear_problem(n=24, vocabulary=50, width=3, dtype=torch.float32, ignored=10):
    hidden, weight, bias = (
        torch.randn(s).to(dtype).requires_grad_() for s in ((n, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (n,))
    targets[torch.randperm(n)[:ignored]] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_op_never_makes_all_logits(dtype, transform):
    hidden, weight, bias, targets = linear_problem(dtype=dtype)
    saved = []
    with (
        Watch() as watch,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        out = linear_stats(hidden, weight, bias, targets, transform, FOUR_TOKENS)
        out.sum().backward()
    # 4 tokens at a time: the logits of a slice outweigh the gradient of the head
    assert watch.largest(torch.float32) == 4 * 50
    inputs = {x.data_ptr() for x in (hidden, weight, bias)}
    # two numbers a token
    assert max(x.numel() for x in saved if x.data_ptr() not in inputs) <= 2 * 24


@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
def test_token_op_makes_no_float32_copy_of_the_logits(transform):
    logits = torch.randn(2, 12, 50).bfloat16().requires_grad_()
    targets = torch.randint(50, (2, 12))
    saved = []
    with (
        Watch() as watch,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        # a shift makes a view whose rows are not evenly spaced
        token_stats(logits[:, :-1], targets[:, 1:], transform, 4).sum().backward()
    assert watch.largest(torch.float32) <= max(4 * 50, 5 * 22)
    assert max(x.numel() for x in saved if x.data_ptr() != logits.data_ptr()) <= 2 * 22
    assert {x.dtype for x in saved if x.numel() >= 22 * 50} == {torch.bfloat16}


def test_ignored_rows_are_not_multiplied():
    hidden, weight, bias, targets = linear_problem(n=24, ignored=10)
    with Watch() as watch:
        linear_stats(hidden, weight, bias, targets, PLAIN, FOUR_TOKENS)
    assert watch.rows_multiplied() == 14
    with Watch() as watch:
        out = linear_stats(hidden, weight, bias, torch.full((24,), -100))
        out.sum().backward()
    assert watch.rows_multiplied() == 0


@pytest.mark.parametrize(("frozen", "shape"), [("weight", (50, 3)), ("hidden", (24, 3)), ("bias", (50,))])
def test_frozen_inputs_cost_no_gradient(frozen, shape):
    hidden, weight, bias, targets = linear_problem()
    {"hidden": hidden, "weight": weight, "bias": bias}[frozen].requires_grad_(False)
    out = linear_stats(hidden, weight, bias, targets)
    with Watch() as watch:
        out.sum().backward()
    # what is made new, views of an input left out
    assert not any(
        out.shape == shape for name, _, out in watch.calls if name in ("zeros_like", "sum", "new_zeros")
    )


def test_gradients_of_a_half_precision_head_are_summed_in_float32():
    # 400 equal contributions, one per slice: a bfloat16 sum would stop growing at 256 times the first
    n, vocabulary = 400, 3
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(vocabulary, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(vocabulary, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    linear_stats(hidden, weight, bias, targets, PLAIN, Plan("recompute", 1)).sum().backward()
    # each contribution was rounded to bfloat16 once, and so was the sum; all the same, so the errors add up
    want = torch.tensor([n * 2 / 3, -n / 3, -n / 3])
    for got in (bias.grad, weight.grad[:, 0]):
        torch.testing.assert_close(got.float(), want, rtol=2 * 2.0**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_from_logits(transform, dtype):
    logits = (3 * torch.randn(4, 5, 2053)).to(dtype).requires_grad_()
    targets = torch.randint(2053, (4, 5))
    targets[0, :3] = -100
    # a token that cannot occur, a row that begins with a block of them, and a sure thing
    with torch.no_grad():
        logits[1, 1, 7] = -torch.inf
        logits[1, 2, :1500] = -torch.inf
        logits[1, 3, 11] = 60
    targets[1, 2], targets[1, 3] = 1999, 11
    exact = logits.detach().double().requires_grad_()
    upstream = torch.randn(5, 4, 5, dtype=torch.float64)
    upstream[4] = 0
    want = naive.token_stats(exact, targets, transform, -100)
    got = token_stats(logits, targets, transform, 3, outputs=5)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=atol)
    (d_logits,) = torch.autograd.grad((got * upstream).sum(), logits)
    (exact_grads,) = torch.autograd.grad((want * upstream).sum(), exact)
    # one rounding, of 2^-8 or 2^-11 at most and half of that on average
    limits = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
    assert relative(d_logits, exact_grads) < limits[dtype]
    assert (d_logits[0, :3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_over_the_logits(dtype):
    logits = torch.randn(6, 40).to(dtype).requires_grad_()
    targets = torch.tensor([1, -100, 3, 4, 39, 0])
    grads = []
    for inplace in (False, True):
        z = logits * 1
        out = token_stats(z, targets, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(out.square().sum(), z, retain_graph=True)
        grads.append(grad)
        assert (grad.data_ptr() == z.data_ptr()) == inplace
    assert torch.equal(*grads)
    # the logits are gone, and reading what autograd saved of them raises
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :-1],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:, :1].expand(-1, 3, -1),
        lambda x: x.permute(2, 0, 1),
    ],
)
def test_strided_logits(view):
    base = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    logits = view(base)
    targets = torch.randint(logits.shape[-1], logits.shape[:-1])
    targets[0, 0] = -100
    results = []
    for out in (naive.token_stats(logits, targets, CAPPED, -100, 1), token_stats(logits, targets, CAPPED, 2)):
        results.append((out, torch.autograd.grad(out.square().sum(), base)[0]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_second_derivative_is_refused_even_of_a_linear_loss():
    hidden, weight, bias, targets = linear_problem()
    logits = (hidden @ weight.T).detach().requires_grad_()
    for out, x in (
        (token_stats(logits, targets), logits),
        (linear_stats(hidden, weight, bias, targets), hidden),
    ):
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="'chunked' can be differentiated once; 'naive' gives second"):
            gradient.square().sum().backward()


def test_backward_under_autocast_keeps_its_precision():
    hidden, weight, bias, targets = linear_problem()
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = linear_stats(hidden, weight, bias, targets, CAPPED)
            grads.append(torch.autograd.grad(out.sum(), (hidden, weight, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.fixture
def mixed_matmul(monkeypatch):
    """The path of CUDA, half precision in and float32 out, with an emulation of its matmul."""

    def multiply(a, b, out, add=False):
        assert a.dtype == b.dtype
        product = torch.mm(a.to(out.dtype), b.to(out.dtype))
        return out.add_(product) if add else out.copy_(product)

    monkeypatch.setattr(matmul, "matmul", multiply)
    monkeypatch.setattr(matmul, "has_mixed_matmul", lambda x: x.dtype in (torch.bfloat16, torch.float16))
    # slices of the head of 5 rows
    monkeypatch.setattr(matmul, "HEAD_ELEMENTS", 15)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2.6e-3), (torch.float16, 3.5e-4)])
def test_mixed_precision_matmul(mixed_matmul, dtype, error):
    hidden, weight, bias, targets = linear_problem(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    got = linear_stats(hidden, weight, bias, targets, CAPPED, FOUR_TOKENS)[0]
    want = naive.linear_token_stats(*exact, targets, CAPPED, -100, 1)[0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (hidden, weight, bias)),
        torch.autograd.grad(want.sum(), exact),
        strict=True,
    ):
        assert (a - b).norm() < error * b.norm()


def test_small_gradients_survive_float16(mixed_matmul):
    # each logit gets 1e-6 / 5, which float16 would round by a tenth; the head gets 1000 times that
    hidden = torch.full((1, 1), 1000.0, dtype=torch.float16)
    weight = torch.zeros(5, 1, dtype=torch.float16, requires_grad=True)
    out = linear_stats(hidden, weight, None, torch.tensor([0]))[0]
    out.backward(torch.tensor([1e-6]))
    torch.testing.assert_close(weight.grad[1:], torch.full((4, 1), -2e-4).half(), rtol=2e-3, atol=0)


def test_token_op_where_no_answer_is_waited_for(monkeypatch):
    """The path of accelerators, which computes ignored rows too rather than ask which they are."""
    monkeypatch.setattr(chunked, "on_cpu", lambda x: False)
    monkeypatch.setattr(softmax, "on_cpu", lambda x: False)
    monkeypatch.setattr(native, "library", lambda: None)
    logits = torch.randn(6, 5)
    targets = torch.tensor([-100, -100, 1, -100, 4, 0])
    logits[targets == -100] = torch.nan
    results = []
    for chunk in (None, 2, 2**20):
        x = logits.clone().requires_grad_()
        out = naive.token_stats(x, targets, CAPPED, -100, 1)
        out = out if chunk is None else token_stats(x, targets, CAPPED, chunk)
        out.sum().backward()
        results.append((out, x.grad))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])


@pytest.mark.skipif(
    "dtype_out" not in torch.ops.aten.mm.overloads(), reason="this torch has no mm(out_dtype=)"
)
def test_mixed_precision_matmul_has_the_signature_of_torch():
    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((4, 3), (50, 3)))
        assert matmul.has_mixed_matmul(a)
        out = matmul.matmul(a, b.T, out=torch.empty(4, 50, device="cuda"))
    assert (out.shape, out.dtype) == ((4, 50), torch.float32)
