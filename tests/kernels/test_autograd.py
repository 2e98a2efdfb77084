import pytest
import torch

from prefloss.kernels import autograd
from prefloss.logprobs import linear_token_logps, linear_token_stats, token_logps, token_stats

OPTIONS = (-100, 1.3, 3.0, 0.7)
TARGETS = torch.tensor([3, -100, 0, 8, 7, -100])


@pytest.mark.parametrize("outputs", [1, 5])
def test_token_op(outputs):
    logits = torch.randn(2, 3, 9, requires_grad=True)
    options = (*OPTIONS, "recompute", 4, 0, "chunked", False, outputs)
    torch.library.opcheck(autograd.token_op, (logits, TARGETS, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "kept", "frozen"),
    [("recompute", 0, 0), ("keep", 3, 0), ("keep", 6, 0), ("unscaled", 0, 1), ("score", 0, 2)],
)
def test_linear_op(scheme, kept, frozen, dtype):
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((6, 4), (9, 4), (9,)))
    hidden.requires_grad_(frozen < 2)
    weight.requires_grad_(frozen < 1)
    arguments = (hidden, weight, bias, TARGETS, *OPTIONS, scheme, 2, kept, "chunked", False, 1)
    torch.library.opcheck(autograd.linear_op, arguments)


def test_backward_op_from_logits():
    logits = torch.randn(2, 3, 9)
    options = (*OPTIONS, "recompute", 4, 0, "chunked", False, 5)
    stats = autograd.token_op(logits, TARGETS, *options)
    torch.library.opcheck(autograd.token_backward_op, (torch.randn(5, 6), logits, TARGETS, stats, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "kept", "needs"),
    [
        ("recompute", 0, [True, True, True]),
        ("keep", 3, [True, True, False]),
        ("unscaled", 0, [True, False, False]),
    ],
)
def test_linear_backward_op(scheme, kept, needs, dtype):
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((6, 4), (9, 4), (9,)))
    options = (*OPTIONS, scheme, 2, kept, "chunked", False, 1)
    stats, memory = autograd.linear_op(hidden, weight, bias, TARGETS, *options)
    arguments = (torch.randn(2, 6), hidden, weight, bias, TARGETS, stats, memory, needs, *options)
    torch.library.opcheck(autograd.linear_backward_op, arguments)


def compiled_equals_eager(call, inputs):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for op in (compiled, call):
        out = op(*inputs)
        trained = [x for x in inputs if x.requires_grad]
        results.append((out, *torch.autograd.grad(out.square().sum(), trained)))
    for got, want in zip(*results, strict=True):
        error = (got - want).double().norm() / want.double().norm()
        assert error < (5e-3 if want.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 4 * 4 * 9 * 4, 0])
def test_compiled_whole_with_a_loss_on_top(dtype, frozen, budget):
    hidden, weight = torch.randn(6, 4).to(dtype).requires_grad_(), torch.randn(9, 4).to(dtype)
    weight.requires_grad_(not frozen)

    def loss(hidden, weight):
        logps = linear_token_logps(hidden, weight, TARGETS, chunk_tokens=2, budget_bytes=budget)
        return torch.nn.functional.logsigmoid(logps[:3].sum() - logps[3:].sum())

    compiled_equals_eager(loss, (hidden, weight))


def test_statistics_compiled_whole():
    logits, hidden, weight = (torch.randn(s, requires_grad=True) for s in ((6, 9), (6, 4), (9, 4)))

    def by_logits(logits):
        stats = token_stats(logits, TARGETS, chunk_tokens=4, stats_gradient=True)
        return stats.entropy + stats.logps + stats.log_sum_sq

    def by_hidden(hidden, weight):
        stats = linear_token_stats(hidden, weight, TARGETS, chunk_tokens=4, stats_gradient=True)
        return stats.entropy + stats.logps + stats.logsumexp

    compiled_equals_eager(by_logits, (logits,))
    compiled_equals_eager(by_hidden, (hidden, weight))
    compiled_equals_eager(
        lambda x: token_logps(2 * x, TARGETS, chunk_tokens=4, inplace_backward=True), (logits,)
    )


def test_default_backend():
    # inductor itself, once: it may reorder and reuse what aot_eager leaves alone
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    call = torch.compile(lambda x, w: 2 * linear_token_logps(x, w, TARGETS, chunk_tokens=2), fullgraph=True)
    want = 2 * linear_token_logps(hidden, weight, TARGETS, chunk_tokens=2)
    try:
        got = call(hidden, weight)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no C++ compiler: {error}")
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(g, w)
