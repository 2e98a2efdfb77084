import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from prefloss import logprobs
from prefloss.logprobs import (
    linear_token_kl,
    linear_token_logps,
    linear_token_stats,
    token_logps,
    token_stats,
)

IMPLS = ("naive", "chunked")
HALF = (torch.bfloat16, torch.float16)


def by_definition(logits, targets, *, temperature=1.0, logit_scale=1.0, softcap=None, ignore_index=-100):
    """The log-probs of the rows that count in float64, one row at a time."""
    z = logits.double() * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = (z / temperature).reshape(-1, z.shape[-1])
    logps = [
        row.sum() * 0 if y == ignore_index else torch.log_softmax(row, -1)[y]
        for row, y in zip(z, targets.reshape(-1).tolist(), strict=True)
    ]
    return torch.stack([*logps, z.sum() * 0])[:-1].reshape(targets.shape)


def assert_rounded(got, want, terms=0.0, slack=0.0):
    """Gradients: off by the rounding of their dtype, float32 noise of the largest entry, and some slack for each."""
    assert not got.isnan().any()
    eps = torch.finfo(got.dtype).eps
    scale = max(want.abs().max().item() if want.numel() else 0.0, terms)
    noise = (1e-14 if got.dtype == torch.float64 else 2e-6) * scale
    # 6e-8 is the smallest number of float16
    allowed = eps * want.abs() + noise + (6e-8 if got.dtype == torch.float16 else 0) + 1.01 * slack
    assert ((got.double() - want).abs() <= allowed).all(), (got, want)


@st.composite
def problems(draw):
    """Hidden states, head and targets of odd shapes, and the options of a call."""
    lead = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    vocabulary, width = draw(st.integers(1, 67)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, *HALF]))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    hidden = torch.randn(*lead, width).to(dtype)
    weight = (3 * torch.randn(vocabulary, width)).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if draw(st.booleans()) else None
    ignore_index = draw(st.sampled_from([-100, -1, 0]))
    targets = torch.randint(vocabulary, lead, dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    targets = torch.where(torch.rand(lead) < draw(st.sampled_from([0.0, 0.4, 1.0])), ignore_index, targets)
    options = {
        "temperature": draw(st.floats(0.3, 3)),
        "logit_scale": draw(st.floats(0.1, 2)),
        "softcap": draw(st.none() | st.floats(0.5, 30)),
        "ignore_index": ignore_index,
    }
    impl = draw(st.sampled_from(IMPLS))
    chunk = {"chunk_tokens": draw(st.none() | st.integers(1, 20))} if impl == "chunked" else {}
    return hidden, weight, bias, targets, options, dict(impl=impl, **chunk)


@given(problems())
def test_token_logps_and_gradient_against_float64(problem):
    hidden, weight, _, targets, options, kernel = problem
    logits = (hidden @ weight.T).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    got = token_logps(logits, targets, **options, **kernel)
    want = by_definition(exact, targets, **options)
    assert got.shape == targets.shape
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert (got[targets == options["ignore_index"]] == 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    # the entries of a row are differences of terms as large as the slope of its softmax
    assert_rounded(logits.grad, exact.grad, slope(options))


@given(problems())
def test_linear_token_logps_and_gradients_against_float64(problem):
    hidden, weight, bias, targets, options, kernel = problem
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    got = linear_token_logps(
        hidden, weight, targets, bias=inputs[2] if len(inputs) == 3 else None, **options, **kernel
    )
    logits = torch.einsum("...h,vh->...v", exact[0], exact[1])
    logits = logits + exact[2] if len(exact) == 3 else logits + 0
    want = by_definition(logits, targets, **options)
    assert got.shape == targets.shape
    assert got.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert (got[targets == options["ignore_index"]] == 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    grads = torch.autograd.grad((got * upstream).sum(), inputs)
    d_logits, *exact_grads = torch.autograd.grad((want * upstream).sum(), [logits, *exact])
    # each term of the sums may be off by one rounding of the gradient of a logit to bfloat16, and by the 16 bits
    # in which log-probs of half precision are kept
    terms, flat = d_logits.abs().reshape(-1, len(weight)), targets.reshape(-1, 1)
    rounding = {torch.bfloat16: 2.0**-8 + 2.5e-4, torch.float16: 2.5e-4}.get(hidden.dtype, 0.0)
    if options["softcap"] is not None and rounding:
        keep = flat != options["ignore_index"]
        terms = terms + 1e-4 / rounding * slope(options) * upstream.abs().reshape(-1, 1) * keep
    slack = (
        (terms @ exact[1].detach().abs()).reshape(hidden.shape),
        terms.T @ exact[0].detach().abs().reshape(-1, hidden.shape[-1]),
        terms.sum(0),
    )
    for got_grad, want_grad, allowed in zip(grads, exact_grads, slack, strict=False):
        assert_rounded(got_grad, want_grad, 10 * slope(options), rounding * allowed)


def slope(options):
    return options["logit_scale"] / options["temperature"]


@pytest.mark.parametrize("impl", IMPLS)
def test_values_worked_by_hand(impl):
    # odds 3 : 1, and 9 : 1 at half the temperature
    logits = torch.tensor([0.0, math.log(3)])
    for options, logp in (
        ({}, math.log(3 / 4)),
        ({"temperature": 0.5}, math.log(9 / 10)),
        ({"logit_scale": 2.0}, math.log(9 / 10)),
        # the scale comes before the cap, the temperature after it: tanh(atanh(1/2)) = 1/2
        ({"logit_scale": 2 * math.atanh(0.5) / math.log(3), "softcap": 2.0}, -math.log1p(math.exp(-1))),
        (
            {"logit_scale": 2 * math.atanh(0.5) / math.log(3), "softcap": 2.0, "temperature": 0.25},
            -math.log1p(math.exp(-4)),
        ),
    ):
        got = token_logps(logits, torch.tensor(1), impl=impl, **options)
        assert got.item() == pytest.approx(logp, abs=1e-6), options
        head = torch.eye(2)
        got = linear_token_logps(logits, head, torch.tensor(1), impl=impl, **options)
        assert got.item() == pytest.approx(logp, abs=1e-6), options


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_neither_overflow_nor_lose_digits(impl):
    logits = torch.tensor([[3e4, 3e4 - 1, -3e4], [3e4, 3e4 - 1, -3e4]], requires_grad=True)
    got = token_logps(logits, torch.tensor([1, 2]), impl=impl)
    log_sum = math.log1p(math.exp(-1))
    torch.testing.assert_close(got, torch.tensor([-1 - log_sum, -6e4 - log_sum]), rtol=1e-7, atol=1e-7)
    got.sum().backward()
    p = 1 / (1 + math.e)
    want = torch.tensor([[p - 1, 1 - p, 0], [p - 1, -p, 1]])
    torch.testing.assert_close(logits.grad, want, rtol=0, atol=0.02 if impl == "chunked" else 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_keeps_float32_accuracy_at_the_size_of_a_model(impl, dtype):
    hidden, weight = torch.randn(64, 512).to(dtype), (torch.randn(5003, 512) / 16).to(dtype)
    targets = torch.randint(5003, (64,))
    got = linear_token_logps(hidden, weight, targets, impl=impl)
    want = by_definition(hidden.double() @ weight.double().T, targets)
    assert (got - want).abs().max() < 1e-5
    logits = (4 * torch.randn(64, 5003)).to(dtype)
    assert (token_logps(logits, targets, impl=impl) - by_definition(logits, targets)).abs().max() < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(impl, softcap):
    targets = torch.tensor([[0, -100, 4], [2, 6, -100]])
    options = {"impl": impl, "softcap": softcap, "temperature": 0.7, "logit_scale": 1.3}
    options |= {"chunk_tokens": 2} if impl == "chunked" else {}
    logits, hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 7), (2, 3, 4), (7, 4), (7,))
    )

    def linear(hidden, weight, bias):
        return linear_token_logps(hidden, weight, targets, bias=bias, **options)

    assert gradcheck(lambda x: token_logps(x, targets, **options), logits)
    assert gradcheck(linear, (hidden, weight, bias))
    if impl == "naive":
        assert gradgradcheck(lambda x: token_logps(x, targets, **options), logits, fast_mode=True)
        assert gradgradcheck(linear, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,), ()])
def test_nothing_to_score_gives_zeros_with_zero_gradients(impl, shape):
    targets = torch.full(shape, -100)
    logits = torch.randn(*shape, 5, requires_grad=True)
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((*shape, 4), (5, 4), (5,)))
    for got, inputs in (
        (token_logps(logits, targets, impl=impl), (logits,)),
        (linear_token_logps(hidden, weight, targets, bias=bias, impl=impl), (hidden, weight, bias)),
    ):
        assert got.shape == shape
        assert (got == 0).all()
        got.sum().backward()
        for x in inputs:
            assert x.grad.shape == x.shape
            assert (x.grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_ignored_positions_may_hold_inf_and_nan(impl, softcap, bad):
    options = {"impl": impl, "softcap": softcap}
    options |= {"chunk_tokens": 2} if impl == "chunked" else {}
    targets = torch.tensor([2, -100, 1, -100, -100, -100])
    keep = targets != -100
    clean = torch.randn(6, 5), torch.randn(6, 4), torch.randn(5, 4)
    logits, hidden, weight = (x.clone() for x in clean)
    logits[~keep], hidden[~keep] = bad, bad
    results = []
    for scores, states, head in ((logits, hidden, weight), clean):
        for x in (scores, states, head):
            x.requires_grad_()
        by_logits = token_logps(scores, targets, **options)
        by_hidden = linear_token_logps(states, head, targets, **options)
        (by_logits.sum() + by_hidden.sum()).backward()
        results.append((by_logits, by_hidden, scores.grad, states.grad, head.grad))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_masked_vocabulary_is_as_if_it_were_not_there(impl, softcap):
    options = {"impl": impl, "softcap": softcap, "logit_scale": 1.3, "temperature": 0.7}
    allowed = torch.tensor([0, 2, 3])
    logits = torch.randn(4, 6)
    masked = torch.full_like(logits, -math.inf)
    masked[:, allowed] = logits[:, allowed]
    masked.requires_grad_()
    small = logits[:, allowed].requires_grad_()
    position = torch.tensor([0, 1, 2, 1])
    got = token_logps(masked, allowed[position], **options)
    want = token_logps(small, position, **options)
    torch.testing.assert_close(got, want)
    (got.sum() + want.sum()).backward()
    torch.testing.assert_close(masked.grad[:, allowed], small.grad)
    assert (masked.grad[:, [1, 4, 5]] == 0).all()

    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    bias = torch.full((6,), -math.inf).index_fill(0, allowed, 0.5).requires_grad_()
    got = linear_token_logps(hidden, weight, allowed[position], bias=bias, **options)
    torch.testing.assert_close(got, token_logps(hidden @ weight[allowed].T + 0.5, position, **options))
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), (hidden, weight, bias)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_that_cannot_occur_has_probability_0(impl):
    logits = torch.tensor([[-math.inf, 0.0, 0.0]], requires_grad=True)
    got = token_logps(logits, torch.tensor([0]), impl=impl)
    assert got.item() == -math.inf
    got.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_at_a_position_that_counts_stays_nan(impl):
    logits = torch.randn(3, 4)
    logits[1, 2] = math.nan
    got = token_logps(logits, torch.tensor([0, 1, 2]), impl=impl)
    assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_at_ignored_positions_is_dropped(impl):
    logits = torch.randn(2, 4, requires_grad=True)
    got = token_logps(logits, torch.tensor([1, -100]), impl=impl)
    got.backward(torch.tensor([1.0, math.nan]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_get_no_gradient(impl):
    targets = torch.tensor([1, -100, 3])
    hidden, weight, bias = (torch.randn(s) for s in ((3, 4), (5, 4), (5,)))
    free = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_token_logps(free[0], free[1], targets, bias=free[2], impl=impl)
    exact_grads = torch.autograd.grad(out.sum(), free)
    for trained in range(3):
        inputs = [hidden, weight, bias]
        inputs[trained] = inputs[trained].clone().requires_grad_()
        out = linear_token_logps(inputs[0], inputs[1], targets, bias=inputs[2], impl=impl)
        out.sum().backward()
        torch.testing.assert_close(inputs[trained].grad, exact_grads[trained])
        assert all(x.grad is None for i, x in enumerate(inputs) if i != trained)
    assert not linear_token_logps(hidden, weight, targets, bias=bias, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_lower_the_precision(impl):
    targets = torch.randint(50, (3, 4))
    hidden, weight, logits = torch.randn(3, 4, 16), torch.randn(50, 16), torch.randn(3, 4, 50)
    want = linear_token_logps(hidden, weight, targets, impl=impl), token_logps(logits, targets, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_token_logps(hidden, weight, targets, impl=impl), token_logps(logits, targets, impl=impl)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_result_may_be_written_over(impl):
    logits = torch.randn(3, 4, requires_grad=True)
    targets = torch.tensor([1, 2, -100])
    (want,) = torch.autograd.grad(2 * token_logps(logits, targets, impl=impl).sum(), logits)
    (got,) = torch.autograd.grad(token_logps(logits, targets, impl=impl).mul_(2).sum(), logits)
    assert torch.equal(got, want)


def test_nothing_is_shifted():
    logits = torch.randn(2, 5, 7)
    targets = torch.randint(7, (2, 5))
    assert token_logps(logits, targets)[1, 3].item() == pytest.approx(
        logits[1, 3].log_softmax(-1)[targets[1, 3]].item()
    )


def test_auto_chooses_by_size(monkeypatch):
    from prefloss.kernels import autograd, naive

    used = []
    for module in (naive, autograd):
        for name in ("token_stats", "linear_token_stats"):
            monkeypatch.setattr(module, name, lambda *_, module=module: used.append(module) or torch.zeros(1))
    small, large = torch.zeros(4, 5), torch.zeros(1, 1).expand(2**11, 2**10)
    for logits in (small, large):
        token_logps(logits, torch.zeros(len(logits), dtype=torch.int64))
        linear_token_logps(logits[:, :2], large[:, :2], torch.zeros(len(logits), dtype=torch.int64))
    token_logps(small, torch.zeros(4, dtype=torch.int64), chunk_tokens=2)
    assert used == [naive, naive, autograd, autograd, autograd]


# torch's own, where it resumes after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled(impl):
    # aot_eager traces forward and backward as the default backend does, without its seconds of C++
    compiled = torch.compile(linear_token_logps, fullgraph=True, backend="aot_eager")
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    # the second call ignores other positions and has other options: nothing of the first may be baked in
    for targets, temperature in (
        (torch.tensor([[1, 2, -100], [8, -100, 3]]), 1.0),
        (torch.zeros(2, 3).long(), 0.5),
    ):
        options = {"temperature": temperature, "softcap": 3.0, "impl": impl}
        got = compiled(hidden, weight, targets, **options)
        want = linear_token_logps(hidden, weight, targets, **options)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out.sum(), (hidden, weight)) for out in (got, want)]
        for got_grad, want_grad in zip(*grads, strict=True):
            torch.testing.assert_close(got_grad, want_grad)


def test_meta_tensors_give_shapes():
    with torch.device("meta"):
        got = linear_token_logps(
            torch.empty(2, 3, 4), torch.empty(9, 4), torch.empty(2, 3, dtype=torch.int64)
        )
    assert got.shape == (2, 3)


LOGITS, TARGETS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)

SHARED_ERRORS = [
    ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a finite number > 0"),
    ({"temperature": -1}, ValueError, "temperature: got -1, expected"),
    ({"temperature": math.nan}, ValueError, "temperature: got nan, expected"),
    ({"temperature": torch.tensor(1.0)}, TypeError, "temperature: got Tensor, expected a float"),
    ({"logit_scale": math.inf}, ValueError, "logit_scale: got inf, expected"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale: got 0.0, expected"),
    ({"softcap": 0.0}, ValueError, "softcap: got 0.0, expected"),
    ({"softcap": -30.0}, ValueError, "softcap: got -30.0, expected"),
    ({"impl": "fast"}, ValueError, "impl: got 'fast', expected one of 'auto', 'naive', 'chunked', 'triton'"),
    ({"impl": "triton"}, RuntimeError, "impl: got 'triton' without Triton or a device that it compiles for"),
    (
        {"impl": "naive", "chunk_tokens": 8},
        ValueError,
        "chunk_tokens: got 8, expected None with impl='naive'",
    ),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens: got 0, expected an int >= 1"),
    ({"chunk_tokens": 1.5}, TypeError, "chunk_tokens: got float, expected an int >= 1"),
    ({"skip_below": 0.0}, TypeError, "unexpected keyword argument 'skip_below'"),
    ({"ignore_index": None}, TypeError, "ignore_index: got NoneType, expected an int"),
    ({"targets": [0]}, TypeError, "targets: got list, expected an integer tensor"),
    ({"targets": TARGETS.float()}, TypeError, "targets: got torch.float32, expected an integer tensor"),
    ({"targets": TARGETS.bool()}, TypeError, "targets: got torch.bool, expected an integer tensor"),
    ({"targets": TARGETS[:, 1:]}, ValueError, "targets: got shape [2, 2], expected [2, 3], that of"),
    ({"targets": TARGETS.to("meta")}, ValueError, "targets: got device meta, expected cpu as"),
    (
        {"targets": TARGETS + 5},
        IndexError,
        "targets: got 5, expected 0 <= target < 5 (V) or ignore_index=-100",
    ),
    (
        {"targets": TARGETS - 1},
        IndexError,
        "targets: got -1, expected 0 <= target < 5 (V) or ignore_index=-100",
    ),
]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def assert_raises(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *SHARED_ERRORS,
        ({"logits": LOGITS.numpy()}, TypeError, "logits: got ndarray, expected a floating-point tensor"),
        ({"logits": LOGITS.long()}, TypeError, "logits: got torch.int64, expected a floating-point tensor"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits: got shape [], expected [..., V]"),
        (
            {"logits": LOGITS[..., :0]},
            ValueError,
            "logits: got shape [2, 3, 0], expected [..., V] with V >= 1",
        ),
    ],
)
def test_token_logps_says_what_is_wrong(change, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS, **change}
    assert_raises(error, message, lambda: token_logps(**arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *SHARED_ERRORS,
        ({"hidden": HIDDEN.int()}, TypeError, "hidden: got torch.int32, expected a floating-point tensor"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden: got shape [], expected [..., H]"),
        ({"weight": WEIGHT.T}, ValueError, "weight: got shape [4, 5], expected [V, 4]"),
        ({"weight": WEIGHT[0]}, ValueError, "weight: got shape [4], expected [V, 4]"),
        ({"weight": WEIGHT[:0]}, ValueError, "weight: got shape [0, 4], expected [V, 4] with V >= 1"),
        (
            {"weight": WEIGHT.bfloat16()},
            TypeError,
            "weight: got torch.bfloat16, expected torch.float32 as hidden",
        ),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight: got device meta, expected cpu as hidden has"),
        ({"bias": BIAS[:4]}, ValueError, "bias: got shape [4], expected [5], one for each row of weight"),
        ({"bias": BIAS.double()}, TypeError, "bias: got torch.float64, expected torch.float32 as hidden has"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias: got device meta, expected cpu as hidden has"),
        ({"bias": np.zeros(5)}, TypeError, "bias: got ndarray, expected a floating-point tensor"),
    ],
)
def test_linear_token_logps_says_what_is_wrong(change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change}
    assert_raises(error, message, lambda: linear_token_logps(**arguments))


def test_defaults():
    """AUDIT T1: of every op, as they are documented."""
    common = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None, "ignore_index": -100}
    run = {**common, "impl": "auto", "chunk_tokens": None, "strict": False}
    linear = {**run, "bias": None, "budget_bytes": None, "round_once": False}
    for op, wanted in (
        (token_logps, {**run, "inplace_backward": False}),
        (token_stats, {**run, "stats_gradient": False}),
        (linear_token_logps, linear),
        (
            linear_token_stats,
            {**{k: v for k, v in linear.items() if k != "round_once"}, "stats_gradient": False},
        ),
        (linear_token_kl, {**common, "bias": None, "reference_bias": None, "chunk_tokens": None}),
    ):
        found = inspect.signature(op).parameters.values()
        assert {p.name: p.default for p in found if p.default is not inspect.Parameter.empty} == wanted


@pytest.mark.parametrize("op", [token_logps, token_stats, linear_token_logps, linear_token_stats])
def test_strict_refuses_the_slower_way_in_every_op(monkeypatch, op):
    """AUDIT T1."""
    make_plan = logprobs.make_plan
    monkeypatch.setattr(
        logprobs, "make_plan", lambda *args: replace(make_plan(*args), fallback="no compiler")
    )
    inputs = [
        torch.randn(3, 4),
        *([torch.randn(7, 4)] if "linear" in op.__name__ else []),
        torch.tensor([0, 1, 2]),
    ]
    with pytest.raises(RuntimeError, match="no compiler"):
        op(*inputs, strict=True)


@pytest.mark.parametrize("biased", ["neither", "policy", "reference", "both"])
def test_divergences_by_definition(biased):
    """AUDIT T1: each bias counts where it is given; the reference gets no gradient."""
    hidden, reference_hidden = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 3, 5, dtype=torch.float64),
    )
    head, reference_head = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    biases = [
        torch.randn(7, dtype=torch.float64) if biased in ("both", name) else None
        for name in ("policy", "reference")
    ]
    inputs = [
        x.requires_grad_() for x in (hidden, head, reference_hidden, reference_head, *biases) if x is not None
    ]
    targets = torch.tensor([[0, -1, 6], [3, 3, -1]])
    found = linear_token_kl(
        hidden,
        head,
        reference_hidden,
        reference_head,
        targets,
        bias=biases[0],
        reference_bias=biases[1],
        temperature=0.7,
        logit_scale=0.5,
        softcap=2.0,
        ignore_index=-1,
        chunk_tokens=2,
    )

    def log_probs(states, weight, bias):
        logits = states @ weight.T + (0 if bias is None else bias)
        return torch.log_softmax(2 * torch.tanh(0.5 * logits / 2) / 0.7, -1)

    p = log_probs(hidden, head, biases[0])
    q = log_probs(reference_hidden, reference_head, biases[1]).detach()
    keep = targets != -1
    kl, reverse = (torch.where(keep, x.sum(-1), 0.0) for x in (q.exp() * (q - p), p.exp() * (p - q)))
    torch.testing.assert_close(found.kl, kl)
    torch.testing.assert_close(found.reverse_kl, reverse)
    entropy = torch.where(keep, -(q.exp() * q).sum(-1) / math.log(7), 0.0)
    torch.testing.assert_close(found.reference_entropy, entropy)
    assert not found.reference_entropy.requires_grad
    grads = torch.autograd.grad((found.kl - 2 * found.reverse_kl).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((kl - 2 * reverse).sum(), inputs, allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(grad, want)
