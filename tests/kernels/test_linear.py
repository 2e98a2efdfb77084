"""Every scheme of the linear op gives the same numbers, and those of float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from prefloss.kernels import chunked, matmul, naive
from prefloss.kernels.plan import Plan
from tests.kernels.problems import PLAIN, TRAINED, TRANSFORMS, linear_stats, problem, relative

# kept tokens out of 27 that count
PLANS = {
    "unscaled": Plan("unscaled", 8),
    "keep": Plan("keep", 8, 40),
    "keep some": Plan("keep", 8, 11),
    "recompute": Plan("recompute", 8),
}


def run(inputs, targets, transform, upstream, plan=None):
    """Statistics and gradients of an op by a plan, or of the naive one without."""
    outputs = len(upstream)
    if plan is None:
        out = naive.linear_token_stats(*inputs, targets, transform, -100, outputs)
    else:
        out = linear_stats(*inputs, targets, transform, plan, outputs)
    trained = [x for x in inputs if x.requires_grad]
    return out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), trained)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_scheme_against_float64(dtype, trained, transform, row_passes):
    inputs, targets = problem(dtype, TRAINED[trained])
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    upstream = torch.randn(1, len(targets), dtype=torch.float64)
    want, exact_grads = run(exact, targets, transform, upstream)
    # the sum is exact to float32; then the gradient of a logit and the result are rounded once each
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3.2e-3, torch.float16: 3.5e-4}[dtype]
    results = {}
    for name, plan in PLANS.items():
        if name == "unscaled" and trained != "frozen":
            continue
        got, grads = run(inputs, targets, transform, upstream, plan)
        assert (got - want).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
        for g, w in zip(grads, exact_grads, strict=True):
            assert g.dtype == dtype
            assert relative(g, w) < limit, (name, relative(g, w))
        results[name] = got, grads
    for (one, first), (other, second) in itertools.combinations(results.values(), 2):
        assert torch.equal(one, other) or (one - other).abs().max() < 2e-6
        for g, w in zip(first, second, strict=True):
            assert relative(g, w.double()) < limit


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_statistics_and_their_gradients(trained, transform, row_passes):
    inputs, targets = problem(torch.float32, TRAINED[trained])
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    upstream = torch.randn(5, len(targets), dtype=torch.float64)
    upstream[4] = 0
    want, exact_grads = run(exact, targets, transform, upstream)
    for name, plan in PLANS.items():
        if name == "unscaled":
            continue
        got, grads = run(inputs, targets, transform, upstream, plan)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
        for g, w in zip(grads, exact_grads, strict=True):
            assert relative(g, w) < 5e-6, name


def test_a_second_backward_pass_recomputes_what_the_first_wrote_over(row_passes):
    for dtype in (torch.float32, torch.bfloat16):
        inputs, targets = problem(dtype, TRAINED["all"])
        out = linear_stats(*inputs, targets, plan=PLANS["keep"])
        once = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        twice = torch.autograd.grad(out.sum(), inputs)
        for a, b in zip(once, twice, strict=True):
            assert relative(a, b.double()) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("scheme", ["keep", "keep some", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_is_never_summed_whole_in_float32(dtype, scheme, row_passes, monkeypatch):
    # tiles of 9 rows and 64 columns, in place of all 301
    monkeypatch.setattr(chunked, "LEAST_COLUMNS", 64)
    inputs, targets = problem(dtype, TRAINED["all"])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(1, len(targets), dtype=torch.float64)
    _, exact_grads = run(exact, targets, PLAIN, upstream)
    sizes = []
    multiply = matmul.matmul
    monkeypatch.setattr(
        matmul, "matmul", lambda a, b, out, add=False: sizes.append(out.shape) or multiply(a, b, out, add)
    )
    plan = replace(PLANS[scheme], chunk_tokens=2)
    _, grads = run(inputs, targets, PLAIN, upstream, plan)
    for g, w in zip(grads, exact_grads, strict=True):
        assert relative(g, w) < (3.2e-3 if dtype == torch.bfloat16 else 3.5e-4)
    # the products of width 24 are 9 tokens by the head, or rows of its gradient
    assert {rows for rows, width in sizes if width == 24} - {9} == {64, 301 % 64}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("most_rows", [7, 2048])
def test_many_tiles_give_the_numbers_of_one(most_rows, transform, dtype, row_passes, monkeypatch):
    (hidden, weight, bias), targets = problem(dtype, TRAINED["all"], vocabulary=1000)
    with torch.no_grad():
        # the maximum of a row rises from span to span, and the first span is impossible
        bias += torch.linspace(0, 8, 1000).to(dtype)
        bias[:70] = -torch.inf
    targets = torch.where(targets == -100, -100, 70 + targets % 930)
    upstream = torch.randn(len(targets))
    results = {}
    for tiles in ("one", "many"):
        monkeypatch.setattr(chunked, "LEAST_COLUMNS", 64 if tiles == "many" else 1024)
        monkeypatch.setattr(chunked, "MOST_ROWS", most_rows if tiles == "many" else 2048)
        for name, plan in PLANS.items():
            plan = replace(plan, chunk_tokens=2 if tiles == "many" else 64)
            inputs = [hidden] if name == "unscaled" else [hidden, weight, bias]
            out = linear_stats(hidden, weight, bias, targets, transform, plan)
            results[name, tiles] = out[0], torch.autograd.grad((out[0] * upstream).sum(), inputs)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for name in PLANS:
        (one, exact_grads), (many, grads) = results[name, "one"], results[name, "many"]
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-12 if dtype == torch.float64 else 1e-5)
        for g, w in zip(grads, exact_grads, strict=True):
            assert relative(g, w.double()) < limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 13])
def test_backward_leaves_the_inputs_as_they_are(dtype, ignored, row_passes):
    # gradients are written over what the op itself holds, and where no target is ignored that is the caller's
    inputs, targets = problem(dtype, TRAINED["all"])
    targets = torch.where(targets == -100, 5, targets)
    targets[:ignored] = -100
    before = [x.detach().clone() for x in inputs]
    for name in ("keep", "keep some", "recompute"):
        out = linear_stats(*inputs, targets, plan=PLANS[name])
        torch.autograd.grad(out.sum(), inputs)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_bfloat16_gradients_err_no_more_than_those_of_rounded_logit_gradients(row_passes):
    # what peers do: log-probs in float32, each gradient of a logit rounded once, sums in float32, the result rounded
    inputs, targets = problem(torch.bfloat16, TRAINED["all"], n=100, width=48, vocabulary=1000)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(1, 100, dtype=torch.float64)
    _, exact_grads = run(exact, targets, PLAIN, upstream)
    logits = exact[0].detach() @ exact[1].detach().T + exact[2].detach()
    logits.requires_grad_()
    out = naive.token_stats(logits, targets, PLAIN, -100, 1)
    (dz,) = torch.autograd.grad((out * upstream).sum(), logits)
    dz = dz.bfloat16().double()
    peers = [dz @ exact[1].detach(), dz.T @ exact[0].detach(), dz.sum(0)]
    for plan in PLANS.values():
        head_is_frozen = plan.scheme == "unscaled"
        frozen = [inputs[0], *(x.detach() if head_is_frozen else x for x in inputs[1:])]
        _, grads = run(frozen, targets, PLAIN, upstream, plan)
        for got, want, peer in zip(grads, exact_grads, peers, strict=False):
            assert relative(got, want) < 1.15 * relative(peer.bfloat16(), want)
