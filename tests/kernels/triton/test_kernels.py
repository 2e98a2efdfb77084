"""The Triton kernels in Triton's interpreter, on CPU tensors, against float64.

The interpreter has to be chosen before Triton is first imported, and would change what other tests of the process
run. So this file runs itself in a process of its own, where the classes below are the tests.
"""

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from prefloss.kernels import autograd, tiles
from prefloss.kernels.linear import empty_memory, linear_backward, linear_forward
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import LinearInputs
from tests.kernels import problems
from tests.kernels.problems import CAPPED, IGNORED, PLAIN, linear_stats

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from prefloss.kernels.triton import launch

SCALED = LogitTransform(1.3, None, 0.7)


def token_stats(logits, targets, transform=PLAIN, **options):
    return problems.token_stats(logits, targets, transform, impl="triton", **options)


def plan_of(scheme, chunk_tokens=2, kept_tokens=0, **more):
    return Plan(scheme, chunk_tokens, kept_tokens, impl="triton", **more)


ROUNDING = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter(request):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


test_in_the_interpreter.__test__ = not INTERPRETED


@pytest.fixture
def rounds_to_nearest(monkeypatch):
    """As a GPU does; the interpreter cuts off the digits that bfloat16 lacks, which is twice the error."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, mode)
        bits = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy()
        return bits.view("uint16").reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, lanes and tiles in a vocabulary of a few hundred."""
    monkeypatch.setattr(launch, "FORWARD", launch.Launch(128, 4))
    monkeypatch.setattr(launch, "BACKWARD", launch.Launch(128, 4))
    monkeypatch.setattr(launch, "TILE", launch.Launch(128, 4))
    monkeypatch.setattr(tiles, "TILE_COLUMNS", 128)


def statistics(x, y, transform):
    """What the kernels compute, in float64, from logits [n, V] and targets [n] that all count -> [5, n]."""
    z = x * transform.logit_scale
    if transform.softcap is not None:
        z = torch.where(x == -torch.inf, x, transform.softcap * torch.tanh(z / transform.softcap))
    z = z / transform.temperature
    lse = torch.logsumexp(z, -1)
    logp = z - lse[:, None]
    p = logp.exp()
    entropy = -torch.where(p == 0, 0, p * torch.where(p == 0, 0, logp)).sum(-1)
    picked = logp.gather(-1, y[:, None])[:, 0]
    # of the logits: less their logsumexp, two that differ by 1e-38 are equal
    top1 = (z.gather(-1, y[:, None])[:, 0] >= z.max(-1).values).double()
    return torch.stack((picked, lse, entropy, p.square().sum(-1).log(), top1))


def expected(x, y, transform, weights):
    """Statistics [5, n] and gradient of their weighted sum, 0 in ignored rows; x [n, V] float64 leaf or not."""
    keep = y != IGNORED
    stats = torch.zeros(5, len(y), dtype=torch.float64)
    kept = statistics(x[keep], y[keep], transform)
    stats[:, keep] = kept.detach()
    return stats, (kept * weights[:, keep].double()).sum()


def logits_and_targets(n=6, vocabulary=301, dtype=torch.float32, scale=3.0, ignored=1):
    x = (torch.randn(n, vocabulary) * scale).to(dtype)
    y = torch.randint(vocabulary, (n,))
    # a likely target, whose 1 - p must not cancel, and a row to leave out, whatever is in it
    y[0] = x[0].argmax()
    x[0, y[0]] += 9
    y[1 : 1 + ignored] = IGNORED
    x[1 : 1 + ignored] = float("nan")
    return x, y


def check_gather(x, y, transform, outputs=5):
    weights = torch.randn(outputs, len(y))
    full = torch.nn.functional.pad(weights, (0, 0, 0, 5 - outputs))
    exact = x.detach().double().requires_grad_()
    exact_stats, total = expected(exact, y, transform, full)
    total.backward()
    leaf = x.detach().clone().requires_grad_()
    stats = token_stats(leaf, y, transform, outputs=outputs)
    assert stats.dtype == torch.float32
    torch.testing.assert_close(stats.double(), exact_stats[:outputs], rtol=3e-6, atol=3e-6)
    (stats * weights).sum().backward()
    assert leaf.grad.dtype == x.dtype
    # a logsumexp of 100 has digits down to 4e-6, and a probability is off by as much of itself
    tolerance = ROUNDING[x.dtype] + 3e-7 * max(exact_stats[1].abs().tolist(), default=0)
    # 1 - tanh^2 is exact to a unit of float32 of the 1, whatever is left of it
    slope = 0 if transform.softcap is None else transform.logit_scale / transform.temperature
    atol = tolerance / 10 + 1.2e-7 * slope * weights.abs().max().item() if len(y) else 0
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=atol)
    assert not leaf.grad[y == IGNORED].any()


@pytest.mark.usefixtures("small_blocks", "rounds_to_nearest")
class TestGather:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("transform", "outputs"), [(PLAIN, 1), (SCALED, 5), (CAPPED, 1), (CAPPED, 5)])
    def test_equals_float64(self, dtype, transform, outputs):
        check_gather(*logits_and_targets(dtype=dtype), transform, outputs)

    @pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 256])
    def test_any_vocabulary(self, vocabulary):
        check_gather(*logits_and_targets(3, vocabulary), SCALED)

    @settings(max_examples=15)
    @given(st.data())
    def test_any_input(self, data):
        n, vocabulary = data.draw(st.integers(0, 3)), data.draw(st.integers(2, 260))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        softcap = data.draw(st.none() | st.floats(1, 50))
        transform = LogitTransform(data.draw(st.floats(0.1, 4)), softcap, data.draw(st.floats(0.3, 3)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        x = (torch.randn(n, vocabulary, generator=generator) * data.draw(st.floats(0, 8))).to(dtype)
        y = torch.randint(vocabulary, (n,), generator=generator)
        y[torch.rand(n, generator=generator) < 0.2] = IGNORED
        masked = torch.rand(n, vocabulary, generator=generator) < data.draw(st.sampled_from([0, 0.3, 0.9]))
        # the target can occur, or its log-prob would be -inf and entropy's gradient with it
        masked[torch.arange(n), y.clamp(min=0)] = False
        check_gather(x.masked_fill_(masked, -torch.inf), y, transform, data.draw(st.sampled_from([1, 5])))

    def test_masked_logits(self):
        x, y = logits_and_targets()
        # more than a whole block in front, so that the first maximum is -inf
        x[:, :200] = -torch.inf
        y[y >= 0] = torch.randint(200, 301, (5,))
        check_gather(x, y, PLAIN)
        check_gather(x, y, CAPPED)

    def test_masked_target(self):
        x, y = logits_and_targets(ignored=0)
        x[2, y[2]] = -torch.inf
        for transform in (PLAIN, CAPPED):
            leaf = x.clone().requires_grad_()
            logps = token_stats(leaf, y, transform)[0]
            assert logps[2] == -torch.inf
            assert logps.isfinite().sum() == 5
            logps.backward(torch.ones(6))
            assert leaf.grad.isfinite().all()
            # as autograd of log_softmax: no softcap, then slope 1, else 0
            assert leaf.grad[2, y[2]] == (0 if transform.softcap else 1)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_nothing_possible_or_not_a_number(self):
        x, y = logits_and_targets(ignored=0)
        x[2] = -torch.inf
        x[3, 200] = float("nan")
        x[4, 7] = torch.inf
        logps = token_stats(x, y, PLAIN)[0]
        assert logps.isnan().tolist() == [False, False, True, True, True, False]

    def test_target_of_another_shard(self):
        # the gradient that reaches the logsumexp is all that such a row gets
        x, y = logits_and_targets(ignored=0)
        y[2] = 301
        leaf = x.requires_grad_()
        stats = token_stats(leaf, y, PLAIN, outputs=5)
        assert stats[0, 2] == -torch.inf
        stats[1, 2].backward()
        torch.testing.assert_close(leaf.grad[2], x.detach()[2].softmax(-1))

    def test_two_shards_make_the_whole(self):
        x, y = logits_and_targets(ignored=0)
        whole, leaf = (x.clone().requires_grad_() for _ in range(2))
        weights = torch.rand(6)
        (token_stats(whole, y, SCALED)[0] * weights).sum().backward()
        picked, sums = [], []
        for first, last in ((0, 140), (140, 301)):
            mine = (y >= first) & (y < last)
            stats = token_stats(
                leaf[:, first:last], torch.where(mine, y - first, last - first), SCALED, outputs=5
            )
            picked.append(torch.where(mine, stats[0] + stats[1], 0))
            sums.append(stats[1])
        logps = sum(picked) - torch.stack(sums).logsumexp(0)
        torch.testing.assert_close(logps, token_stats(x, y, SCALED)[0])
        (logps * weights).sum().backward()
        torch.testing.assert_close(leaf.grad, whole.grad)

    def test_large_logits(self):
        # a difference of 0.25 in 10,000 survives, as it would not in z - logsumexp
        x = torch.full((1, 300), -1e4)
        x[0, 7], x[0, 290] = 1e4, 1e4 - 0.25
        logps = token_stats(x, torch.tensor([290]), PLAIN)[0]
        torch.testing.assert_close(logps.double(), -torch.tensor([0.25]).double().exp().add(1).log())

    def test_likely_target_keeps_its_gradient(self):
        x = torch.zeros(1, 300)
        x[0, 5] = 14.0
        x.requires_grad_()
        token_stats(x, torch.tensor([5]), PLAIN)[0].backward(torch.ones(1))
        rest = 299 * torch.exp(torch.tensor(-14.0).double())
        torch.testing.assert_close(x.grad[0, 5].double(), rest / (1 + rest), rtol=1e-3, atol=0)

    def test_ties_are_hits(self):
        x = torch.zeros(3, 200)
        x[:, 150] = x[:, 20] = 2.0
        assert token_stats(x, torch.tensor([20, 150, 3]), PLAIN, outputs=5)[4].tolist() == [
            1,
            1,
            0,
        ]

    @pytest.mark.parametrize(
        ("vocabulary", "dtype", "transform", "outputs"),
        [(139, torch.bfloat16, CAPPED, 5), (139, torch.float32, PLAIN, 1), (5, torch.float16, PLAIN, 1)],
    )
    def test_rows_begin_anywhere(self, vocabulary, dtype, transform, outputs):
        # each of the places among 16 bytes; what is next to a row is never part of it, nor written to
        x, y = logits_and_targets(9, vocabulary, dtype)
        memory = torch.full((9 * vocabulary + 19,), float("nan"), dtype=dtype)
        view = memory[3 : 3 + 9 * vocabulary].view(9, vocabulary).copy_(x)
        check_gather(view, y, transform, outputs)
        leaf = view.requires_grad_()
        token_stats(leaf, y, transform, inplace_backward=True).sum().backward()
        assert memory[:3].isnan().all()
        assert memory[3 + 9 * vocabulary :].isnan().all()
        assert memory[3 : 3 + 9 * vocabulary].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradient_whose_rows_begin_elsewhere(self, dtype):
        # of a shifted [B, T, V] with an odd vocabulary
        base, y = (torch.randn(3, 4, 131) * 3).to(dtype), torch.randint(131, (3, 3))
        leaf = base[:, :-1].requires_grad_()
        exact = leaf.detach().double().requires_grad_()
        statistics(exact.reshape(9, 131), y.reshape(-1), CAPPED)[0].sum().backward()
        token_stats(leaf, y, CAPPED).sum().backward()
        tolerance = ROUNDING[dtype]
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=tolerance, atol=tolerance / 5)

    def test_few_rows_get_more_warps_and_the_same_result(self, monkeypatch):
        x, y = logits_and_targets()
        few = token_stats(x, y, SCALED, outputs=5)
        monkeypatch.setattr(launch, "FEW_ROWS", 0)
        torch.testing.assert_close(few, token_stats(x, y, SCALED, outputs=5), equal_nan=True)

    def test_targets_that_are_none(self):
        # the ops that users call report them on a CPU; a device would have to wait for that
        x, y = logits_and_targets(ignored=0)
        right = token_stats(x, y, PLAIN, outputs=5)
        wrong = y.clone()
        wrong[1:5] = torch.tensor([-1, -5, 302, 2**33])
        stats = token_stats(x, wrong, PLAIN, outputs=5)
        assert stats[0].isnan().tolist() == [False, True, True, True, True, False]
        torch.testing.assert_close(stats[1:4], right[1:4])
        leaf = x.requires_grad_()
        token_stats(leaf, wrong, PLAIN)[0].nansum().backward()
        expected_grad = 1 - x.detach()[0].double().softmax(-1)[y[0]]
        torch.testing.assert_close(leaf.grad[0, y[0]].double(), expected_grad, rtol=1e-3, atol=2e-7)

    def test_empty(self):
        x = torch.zeros(0, 5, requires_grad=True)
        token_stats(x, torch.zeros(0, dtype=torch.long), PLAIN)[0].sum().backward()
        assert x.grad.shape == (0, 5)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_strides(self, inplace):
        base = torch.randn(2, 4, 40)
        y = torch.randint(40, (2, 3))
        y[1, 1] = IGNORED
        views = [
            base[:, :-1],
            base[:, :-1, ::2].repeat_interleave(2, -1)[..., :40],
            base.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:],
            base[:, 0:1].expand(2, 3, 40),
            torch.randn(2, 3, 60)[..., 7:47],
        ]
        for view in views:
            exact = view.double().requires_grad_()
            exact_stats, total = expected(
                exact.reshape(6, 40), y.reshape(-1), PLAIN, torch.eye(5, 1).expand(5, 6)
            )
            total.backward()
            before = view.clone()
            x = view.detach().requires_grad_()
            out = token_stats(x, y, PLAIN, inplace_backward=inplace)
            torch.testing.assert_close(out[0].double(), exact_stats[0].reshape(2, 3), rtol=1e-6, atol=1e-6)
            out.sum().backward()
            torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-6, atol=1e-7)
            over = inplace and view.stride(-1) == 1 and 0 not in view.stride()
            assert torch.equal(view, x.grad if over else before)

    def test_four_dimensions_that_make_no_matrix(self):
        x = torch.randn(2, 3, 2, 20)[:, 1:].transpose(0, 1).requires_grad_()
        y = torch.randint(20, (2, 2, 2))
        torch.testing.assert_close(
            token_stats(x, y, PLAIN)[0], x.log_softmax(-1).gather(-1, y[..., None])[..., 0]
        )

    def test_inplace_leaves_the_gaps(self):
        base = torch.randn(4, 50)
        before = base.clone()
        x = base[:, 3:33].requires_grad_()
        token_stats(x, torch.tensor([1, 29, IGNORED, 0]), CAPPED, inplace_backward=True).sum().backward()
        assert torch.equal(base[:, 3:33], x.grad)
        assert torch.equal(base[:, :3], before[:, :3])
        assert torch.equal(base[:, 33:], before[:, 33:])

    def test_inplace_is_refused_a_second_time(self):
        x, y = logits_and_targets()
        leaf = x.requires_grad_()
        total = token_stats(leaf * 1, y, inplace_backward=True).sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()

    def test_second_derivative_is_refused(self):
        x = torch.randn(2, 9, requires_grad=True)
        (grad,) = torch.autograd.grad(
            token_stats(x, torch.tensor([1, 2]), PLAIN)[0].sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match="differentiated once"):
            grad.sum().backward()

    def test_offsets_pass_2_to_the_31(self, far_apart):
        # row 3 begins 3 * 2**30 logits after row 0, in 8 GB of which a few pages exist
        x = far_apart(4, 40)
        x.copy_(torch.randn(4, 40))
        y = torch.tensor([3, 39, 0, 17])
        out = launch.token_forward(x, y, PLAIN, 1, 5)
        exact_stats = statistics(x.double(), y, PLAIN)
        torch.testing.assert_close(out.double(), exact_stats, rtol=1e-6, atol=1e-6)
        before = x.double().clone().requires_grad_()
        statistics(before, y, PLAIN)[0].sum().backward()
        grad = launch.token_backward(torch.ones(1, 4), x, y, out, PLAIN, 1, over_logits=True)
        torch.testing.assert_close(grad.double(), before.grad, rtol=1e-3, atol=1e-4)


@pytest.fixture
def far_apart(monkeypatch):
    """Float16 matrices whose rows are 2**30 elements apart, in memory that is only promised."""
    # it would copy each argument onto itself after the call, all 8 GB
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    maps = []

    def make(rows, columns):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, rows * 2**31, flags=flags)
        maps.append(memory)
        return torch.frombuffer(memory, dtype=torch.float16).view(rows, 2**30)[:, :columns]

    yield make
    maps.clear()


def linear_problem(n=6, vocabulary=301, width=5, dtype=torch.float32, bias=True, frozen=False, scale=1.0):
    hidden, weight, shift = (
        (torch.randn(shape) * scale).to(dtype) for shape in ((n, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (n,))
    targets[1:2] = IGNORED
    hidden[1:2] = float("nan")
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    return hidden, weight, shift.requires_grad_(not frozen) if bias else None, targets


def check_linear(problem, plan, transform, outputs=1, most=3e-5):
    """Statistics and gradients against float64; the head's gradients where it has any."""
    hidden, weight, bias, targets = problem
    weights = torch.randn(outputs, len(targets))
    exact = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    keep = targets != IGNORED
    logits = exact[0][keep] @ exact[1].T + (0 if exact[2] is None else exact[2])
    exact_stats = statistics(logits, targets[keep], transform)[:outputs]
    (exact_stats * weights[:, keep].double()).sum().backward()
    out = linear_stats(hidden, weight, bias, targets, transform, plan, outputs)
    torch.testing.assert_close(out[:, keep].double(), exact_stats.detach(), rtol=3e-6, atol=3e-6)
    assert not out[:, ~keep].any()
    (out * weights).sum().backward()
    for x, y in zip((hidden, weight, bias), exact, strict=True):
        if x is None or not x.requires_grad:
            continue
        assert x.grad.dtype == x.dtype
        # rows left out have no gradient, whatever is in them
        error = (x.grad.double() - y.grad).norm() / y.grad.norm()
        assert error <= most, error
        x.grad = None


SCHEMES = [
    ("recompute", plan_of("recompute"), False),
    ("recompute, frozen", plan_of("recompute"), True),
    ("keep", plan_of("keep", 2, 100), False),
    ("keep some", plan_of("keep", 2, 3), False),
    ("keep, inputs scaled", plan_of("keep", 2, 100, scale_inputs=True), False),
    ("keep some, inputs scaled", plan_of("keep", 2, 3, scale_inputs=True), False),
    ("keep in the gradient", plan_of("keep", 2, 100, head_tokens=2, scale_inputs=True), False),
    ("keep some in the gradient", plan_of("keep", 2, 3, head_tokens=1), False),
    ("unscaled", plan_of("unscaled"), True),
]


class Matmuls(TorchDispatchMode):
    """Operations of all matmuls, and the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        # bytes are the interpreter's own copies
        if isinstance(out, torch.Tensor) and out.dtype != torch.uint8:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.usefixtures("small_blocks", "rounds_to_nearest")
class TestLinear:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("transform", [PLAIN, CAPPED])
    @pytest.mark.parametrize(
        ("plan", "frozen"), [case[1:] for case in SCHEMES], ids=[case[0] for case in SCHEMES]
    )
    def test_equals_float64(self, plan, frozen, transform):
        check_linear(linear_problem(frozen=frozen), plan, transform)

    @pytest.mark.parametrize("plan", [plan_of("recompute"), plan_of("keep", 2, 3)])
    @pytest.mark.parametrize("transform", [PLAIN, CAPPED])
    def test_all_statistics(self, plan, transform):
        check_linear(linear_problem(), plan, transform, outputs=5)

    @pytest.mark.parametrize(("plan", "frozen"), [case[1:] for case in SCHEMES[:1] + SCHEMES[2:]])
    @pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3.5e-4), (torch.bfloat16, 3.5e-3)])
    def test_half_precision(self, plan, frozen, dtype, most):
        # of half-precision inputs float32 statistics, and gradients of two roundings: of each logit's and the result;
        # of three where hidden states are multiplied by the gradients of the log-probs and rounded
        most *= 1.5 if plan.scale_inputs else 1
        check_linear(linear_problem(dtype=dtype, frozen=frozen), plan, PLAIN, most=most)

    @pytest.mark.parametrize(("plan", "frozen"), [case[1:] for case in SCHEMES[:1] + SCHEMES[2:]])
    def test_bfloat16_gradients_are_no_worse_than_autograd(self, plan, frozen):
        problem = linear_problem(16, 200, 32, torch.bfloat16, bias=False, frozen=frozen, scale=0.7)
        hidden, weight, _, targets = problem
        leaves = [hidden] if frozen else [hidden, weight]
        keep = targets != IGNORED
        weights = torch.randn(16)[keep]

        def gradients(logits):
            logps = logits.log_softmax(-1).gather(-1, targets[keep][:, None])[:, 0]
            return torch.autograd.grad((logps * weights).sum(), leaves)

        exact = gradients(hidden.double()[keep] @ weight.double().T)
        autograd = gradients((hidden[keep] @ weight.T).float())
        logps = linear_stats(hidden, weight, None, targets, PLAIN, plan)[0, keep]
        ours = torch.autograd.grad((logps * weights).sum(), leaves)
        for mine, theirs, exact_stats in zip(ours, autograd, exact, strict=True):
            errors = [(x.double() - exact_stats).nan_to_num().norm() for x in (mine, theirs)]
            assert errors[0] <= 1.05 * errors[1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scaled", [True, False])
    def test_all_numerators_in_the_gradient_of_the_head(self, dtype, scaled):
        # each is read for the gradient that is written over it
        plan = plan_of("keep", 2, 100, head_tokens=100, scale_inputs=scaled)
        problem = linear_problem(vocabulary=256, width=8, dtype=dtype)
        check_linear(problem, plan, PLAIN, most=3e-5 if dtype == torch.float32 else 5.3e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_what_the_third_rounding_costs(self, dtype):
        # many tokens, so that errors are near their mean: sqrt(3 / 2) for the head, nothing for hidden states
        problem = linear_problem(64, 128, 48, dtype, bias=False, scale=0.7)
        hidden, weight, _, targets = problem
        keep, weights = targets != IGNORED, torch.randn(64)
        leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        logps = (leaves[0][keep] @ leaves[1].T).log_softmax(-1).gather(-1, targets[keep][:, None])[:, 0]
        exact = torch.autograd.grad((logps * weights[keep]).sum(), leaves)
        errors = []
        for scaled in (True, False):
            plan = plan_of("keep", 64, 64, scale_inputs=scaled)
            out = linear_stats(hidden, weight, None, targets, PLAIN, plan)[0]
            got = torch.autograd.grad((out * weights).sum(), (hidden, weight))
            errors.append([problems.relative(a, b) for a, b in zip(got, exact, strict=True)])
        (d_x, d_weight), (d_x_once, d_weight_once) = errors
        assert d_x <= 1.1 * d_x_once
        assert d_weight <= 1.5 * d_weight_once

    @pytest.mark.parametrize(
        ("plan", "frozen"), [case[1:] for case in SCHEMES], ids=[case[0] for case in SCHEMES]
    )
    def test_bias_with_gaps(self, plan, frozen):
        hidden, weight, _, targets = linear_problem(frozen=frozen)
        column = torch.randn(301, 3)[:, 0].requires_grad_(not frozen)
        assert column.stride(0) == 3
        check_linear((hidden, weight, column, targets), plan, PLAIN)

    def test_half_precision_with_everything(self):
        check_linear(linear_problem(dtype=torch.float16), plan_of("keep", 2, 3), CAPPED, 5, most=5e-4)

    @pytest.mark.parametrize(
        ("dtype", "growth", "most"), [(torch.float16, 30, 6e-4), (torch.bfloat16, 70, 6e-3)]
    )
    @pytest.mark.parametrize("plan", [SCHEMES[i][1] for i in (2, 4, 6, 8)])
    def test_logits_that_grow_from_span_to_span(self, plan, dtype, growth, most):
        # by more than a number of the dtype can be above the reference of the first span
        hidden, weight, bias, targets = linear_problem(dtype=dtype, frozen=plan.scheme == "unscaled")
        with torch.no_grad():
            bias[130:260] += growth / 2
            bias[260:] += growth
        targets[targets != IGNORED] = torch.tensor([3, 140, 270, 300, 299])
        check_linear((hidden, weight, bias, targets), plan, PLAIN, most=most)

    def test_score_keeps_nothing(self):
        hidden, weight, bias, targets = linear_problem()
        with torch.no_grad(), Matmuls() as watch:
            out = linear_stats(hidden, weight, bias, targets, PLAIN, plan_of("score"))[0]
        logits = (hidden @ weight.T + bias).detach()
        exact_stats = torch.nn.functional.cross_entropy(
            logits, targets, reduction="none", ignore_index=IGNORED
        )
        torch.testing.assert_close(out, -exact_stats.nan_to_num())
        assert watch.operations == 2 * 5 * 301 * 5

    def test_number_of_matmuls(self):
        for (_, plan, frozen), most in zip(SCHEMES, (4, 3, 3, 3.4, 3, 3.4, 3, 3.4, 2), strict=True):
            hidden, weight, _, targets = linear_problem(vocabulary=150, frozen=frozen)
            with Matmuls() as watch:
                out = linear_stats(hidden, weight, None, targets, PLAIN, plan)
                out.sum().backward()
            assert watch.operations == round(most * 2 * 5 * 150 * 5)

    def test_never_makes_all_logits(self):
        hidden, weight, bias, targets = linear_problem(n=9, width=3)
        for plan in (plan_of("recompute"), plan_of("unscaled")):
            with Matmuls() as watch:
                linear_stats(hidden, weight, bias, targets, PLAIN, plan)
            # a tile of 128 columns is the narrowest, 4 rows of it are more than the 2 whole rows asked for
            assert watch.largest <= max(4 * 128, 2 * 320, weight.numel())

    def test_masked_tokens(self):
        # the first tiles hold nothing that can occur
        hidden, weight, bias, targets = linear_problem()
        for plan in (plan_of("recompute"), plan_of("keep", 2, 3), plan_of("unscaled")):
            frozen = plan.scheme == "unscaled"
            masked = bias.detach().clone()
            masked[:260] = -torch.inf
            y = torch.where(targets == IGNORED, targets, torch.randint(260, 301, (6,)))
            problem = hidden.detach().clone().requires_grad_(), weight.detach().clone(), masked, y
            problem[1].requires_grad_(not frozen)
            check_linear(problem, plan, CAPPED if frozen else PLAIN)

    def test_target_of_another_shard(self):
        hidden, weight, _, targets = linear_problem(frozen=True)
        targets[2] = 301
        for plan in (plan_of("recompute"), plan_of("keep", 2, 3), plan_of("unscaled")):
            hidden.grad = None
            out = linear_stats(hidden, weight, None, targets, PLAIN, plan, 1)
            assert out[0, 2] == -torch.inf
            # of the logsumexp with its sign turned: all that there is to a target elsewhere
            out.backward(torch.ones(1, 6))
            p = (hidden.detach()[2].double() @ weight.double().T).softmax(-1)
            torch.testing.assert_close(hidden.grad[2].double(), -(p @ weight.double()), rtol=1e-5, atol=1e-6)

    def test_small_gradients_in_float16(self):
        # 1e-7 times a probability is nothing in float16, and so is what it adds to the head
        hidden, weight, _, targets = linear_problem(dtype=torch.float16, bias=False)
        grads = []
        for factor in (1.0, 1e-4):
            out = linear_stats(hidden, weight, None, targets, PLAIN, plan_of("recompute"))[0]
            x = hidden.detach()[targets != IGNORED]
            y, kept = targets[targets != IGNORED], torch.full((1, 5), factor)
            inputs, plan = LinearInputs(x, weight.detach(), None, y, PLAIN), plan_of("recompute")
            stats, _ = linear_forward(inputs, plan, 1)
            assert torch.equal(out[targets != IGNORED], stats[0])
            grads.append(linear_backward(kept, inputs, stats, None, plan, (True, True, False)))
        for large, small in zip(grads[0][:2], grads[1][:2], strict=True):
            torch.testing.assert_close(small.double() * 1e4, large.double(), rtol=1e-2, atol=6e-4)

    def test_second_backward_computes_again(self):
        hidden, weight, bias, targets = linear_problem()
        out = linear_stats(hidden, weight, bias, targets, PLAIN, plan_of("keep", 2, 100))
        first = torch.autograd.grad(out.sum(), (hidden, weight, bias), retain_graph=True)
        second = torch.autograd.grad(out.sum(), (hidden, weight, bias))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kept", [3, 5])
    def test_memory_of_the_caller(self, kept):
        # what a custom op passes: memory of its own, not to be written over in backward
        hidden, weight, _, targets = linear_problem(dtype=torch.bfloat16, bias=False)
        x, y = hidden.detach()[targets != IGNORED], targets[targets != IGNORED]
        inputs, plan, grad = (
            LinearInputs(x, weight.detach(), None, y, PLAIN),
            plan_of("keep", 2, kept),
            torch.randn(1, 5),
        )
        memory = empty_memory(x, weight, plan)
        stats, saved = linear_forward(inputs, plan, 1, memory)
        assert saved.parts[0].tiles.data_ptr() == memory.data_ptr()
        before = memory.clone()
        results = [
            linear_backward(grad, inputs, stats, memory, plan, (True, True, False), overwrite)
            for overwrite in (False, True)
        ]
        assert not torch.equal(memory, before)
        for a, b in zip(results[0][:2], results[1][:2], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)

    def test_as_a_custom_op(self):
        hidden, weight, _, targets = linear_problem(vocabulary=140, bias=False)
        hidden = hidden.detach().nan_to_num().requires_grad_()
        options = (IGNORED, 1.0, None, 1.0, "keep", 2, 3, "triton", False, 1)
        torch.library.opcheck(autograd.linear_op, (hidden, weight, None, targets, *options))

    def test_no_tokens(self):
        for _, plan, frozen in SCHEMES:
            hidden, weight, bias, _ = linear_problem(frozen=frozen)
            none = torch.full((6,), IGNORED)
            out = linear_stats(hidden, weight, bias, none, PLAIN, plan)
            out.sum().backward()
            assert not out.any()
            assert not hidden.grad.any()
            assert frozen or not (weight.grad.any() or bias.grad.any())

    def test_offsets_pass_2_to_the_31(self, far_apart):
        # kept softmax, rows far apart
        x, weight, y = torch.randn(4, 5).half(), torch.randn(40, 5).half(), torch.tensor([3, 39, 0, 17])
        memory, plan, inputs = (
            far_apart(4, 128),
            plan_of("keep", 4, 4),
            LinearInputs(x, weight, None, y, PLAIN),
        )
        stats, _ = linear_forward(inputs, plan, 1, memory.view(torch.int16))
        p = (x.double() @ weight.double().T).softmax(-1)
        others = torch.ones_like(p).scatter_(1, y[:, None], 0)
        scale = memory[:, 64:66].view(torch.float32).double()
        torch.testing.assert_close(memory[:, :40].double() * scale, p * others, rtol=1e-3, atol=1e-6)
        grad, kept = torch.ones(1, 4), memory.view(torch.int16)
        d_x, _, _ = linear_backward(grad, inputs, stats, kept, plan, (True, False, False))
        torch.testing.assert_close(
            d_x.double(), weight.double()[y] - p @ weight.double(), rtol=2e-3, atol=2e-3
        )

    @settings(max_examples=8)
    @given(st.data())
    def test_any_input(self, data):
        n, vocabulary = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 280))
        torch.manual_seed(data.draw(st.integers(0, 2**32)))
        _, plan, frozen = data.draw(st.sampled_from(SCHEMES))
        plan = replace(plan, chunk_tokens=data.draw(st.integers(1, 9)))
        # where these plans are made, the other statistics have no gradient
        alone = plan.scheme == "unscaled" or plan.scale_inputs
        outputs = 1 if alone else data.draw(st.sampled_from([1, 5]))
        transform = LogitTransform(data.draw(st.floats(0.2, 3)), data.draw(st.none() | st.floats(2, 40)))
        check_linear(linear_problem(n, vocabulary, frozen=frozen), plan, transform, outputs)
