import pytest
import torch

from prefloss.kernels import autograd, chunked, linear
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import LinearInputs, select_targets
from prefloss.logprobs import linear_token_logps, linear_token_stats, token_logps, token_stats

PLAIN = LogitTransform()
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


def test_ops_that_wait_for_the_device_are_in_no_cuda_graph():
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    ops = torch.ops.prefloss
    for op in (ops.linear_token_stats, ops.linear_token_stats_backward):
        assert torch.Tag.cudagraph_unsafe in op.default.tags
    for op in (ops.token_stats, ops.token_stats_backward):
        assert torch.Tag.cudagraph_unsafe not in op.default.tags


@pytest.mark.parametrize("wrong", [-5, -1, 9, 12])
def test_ops_of_a_graph_check_targets(wrong):
    y = TARGETS.where(TARGETS != 8, wrong)
    options = (*OPTIONS, "recompute", 4, 0, "chunked", False, 1)
    with pytest.raises(IndexError, match=rf"targets: got {wrong}, expected 0 <= target < 9 \(V\)"):
        autograd.token_op(torch.randn(2, 3, 9), y, *options)
    with pytest.raises(IndexError, match=rf"targets: got {wrong}, expected 0 <= target < 9 \(V\)"):
        autograd.linear_op(torch.randn(6, 4), torch.randn(9, 4), None, y, *options)


def test_on_a_device_a_wrong_target_is_not_a_number(monkeypatch):
    # a device cannot report it without being waited for
    for module in (chunked, linear):
        monkeypatch.setattr(module, "on_cpu", lambda x: False)
    y = torch.tensor([3, -100, 0, -5, 12, 9])
    plan = Plan("recompute", 8)
    found = [autograd.token_stats(torch.randn(6, 9), y, PLAIN, -100, plan, 1)[0]]
    inputs = LinearInputs(torch.randn(6, 4), torch.randn(9, 4), None, y, PLAIN)
    found.append(autograd.linear_token_stats(inputs, select_targets(y, -100), -100, plan, 1)[0])
    for logps in found:
        assert logps.isnan().tolist() == [False, False, False, True, True, False]
        # a target just past the vocabulary is that of another shard
        assert logps[5] == -torch.inf
