import importlib
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

import prefloss
from prefloss import kernels
from prefloss.kernels import plan as planning
from prefloss.kernels.cpu import native
from prefloss.logprobs import explain, linear_token_logps, token_logps
from tests.kernels.problems import Watch

SIZES = {"tokens": 4096, "vocabulary": 128_256, "width": 1024}


@pytest.mark.parametrize(
    ("options", "scheme", "matmuls"),
    [
        ({"gradient": False}, "score", 1),
        ({"trainable_head": False}, "unscaled", 2),
        ({"trainable_head": False, "stats_gradient": True, "budget_bytes": 2**40}, "keep", 2),
        ({"trainable_head": False, "stats_gradient": True, "budget_bytes": 0}, "recompute", 3),
        ({"budget_bytes": 2**40}, "keep", 3),
        ({"budget_bytes": 0}, "recompute", 4),
        ({"impl": "naive"}, "autograd", 3),
        ({"impl": "naive", "gradient": False}, "autograd", 1),
    ],
)
def test_the_scheme_with_the_fewest_matmuls_that_fits(options, scheme, matmuls):
    plan = explain(**SIZES, **options)
    assert (plan.scheme, plan.matmuls) == (scheme, matmuls)
    assert scheme in str(plan)


def test_a_budget_is_used_up_and_not_passed():
    budget = 2**30
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plan = explain(**SIZES, budget_bytes=budget, dtype=dtype)
        assert plan.scheme == "keep"
        assert 0 < plan.kept_tokens < 4096
        assert plan.bytes_kept + plan.bytes_scratch <= budget
        one_more = plan.bytes_kept // plan.kept_tokens
        assert plan.bytes_kept + plan.bytes_scratch + one_more > budget
        assert plan.matmuls == pytest.approx(4 - plan.kept_tokens / 4096)
        assert "do not fit" in plan.why


@pytest.mark.parametrize(
    ("sizes", "dtype", "impl"),
    [
        ({"vocabulary": 32_000, "width": 1024}, torch.float32, "naive"),
        ({"vocabulary": 32_000, "width": 1024}, torch.bfloat16, "chunked"),
        ({"vocabulary": 32_000, "width": 1024}, torch.float16, "chunked"),
        ({"vocabulary": 1000, "width": 64}, torch.bfloat16, "naive"),
        ({"vocabulary": 32_000, "width": None}, torch.bfloat16, "naive"),
    ],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_few_tokens(sizes, dtype, impl, trainable):
    """AUDIT P1: plain torch would convert a large head in half precision as a whole."""
    plan = explain(tokens=8, dtype=dtype, trainable_head=trainable, **sizes)
    assert plan.impl == impl
    assert ("logits are few" in plan.why) == (impl == "naive")


def test_few_tokens_are_multiplied_with_wide_spans_of_the_head():
    """AUDIT P1: the fewer the tokens, the narrower the spans were, so that their overhead was larger than the work."""
    hidden, weight = torch.randn(4, 64, requires_grad=True), torch.randn(8192, 64)
    with Watch() as watch:
        linear_token_logps(hidden, weight, torch.zeros(4, dtype=torch.int64), impl="chunked").sum().backward()
    assert [name for name, _, _ in watch.calls if name in ("mm", "addmm")] == ["mm", "mm"]


def test_strict_refuses_a_fallback():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.zeros(6, dtype=torch.int64)
    linear_token_logps(hidden, weight, targets, chunk_tokens=2, strict=native.passes_over(torch.float32))
    with pytest.raises(
        RuntimeError, match="strict: got a fallback, expected none: 0 of 6 tokens fit the budget of 0"
    ):
        linear_token_logps(hidden, weight, targets, chunk_tokens=2, budget_bytes=0, strict=True)


def test_strict_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    logits, targets = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=r"strict: got a fallback, expected none: native\.c could not be compiled"
    ):
        token_logps(logits, targets, impl="chunked", strict=True)
    plan = explain(**SIZES, dtype=torch.bfloat16)
    assert (plan.row_passes, plan.head_sums) == ("torch", "upcast")
    assert "float32" in plan.fallback


def test_one_log_line_for_each_kind_of_plan(caplog, monkeypatch):
    monkeypatch.setattr(planning, "logged", set())
    logits, targets = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    with caplog.at_level(logging.INFO, "prefloss"):
        for _ in range(3):
            token_logps(logits, targets, impl="chunked")
            linear_token_logps(logits, logits, targets, impl="chunked")
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "prefloss: token log-probs of 6 tokens by chunked/recompute, 0 matmuls, 0 MiB kept, tiles of 6 tokens",
        "prefloss: linear log-probs of 6 tokens by chunked/score, 1 matmuls, 0 MiB kept, tiles of 6 tokens",
    ]


@pytest.mark.parametrize("budget", [-1, 1.5])
def test_a_bad_budget_is_named(budget):
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"budget_bytes: got .*, expected an int >= 0"):
        linear_token_logps(x, x, torch.zeros(6, dtype=torch.int64), budget_bytes=budget)


def test_what_is_planned_is_what_is_done():
    """Memory and matmuls as `explain` says, counted on the ops themselves."""
    hidden, weight = torch.randn(30, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(64, (30,))
    for head, budget in ((True, 2**20), (True, 10 * 64 * 4 + 8 * 64 * 4), (True, 0), (False, 2**20)):
        frozen = weight if head else weight.detach()
        plan = explain(
            tokens=30, vocabulary=64, width=16, trainable_head=head, budget_bytes=budget, chunk_tokens=8
        )
        with Watch() as watch:
            out = linear_token_logps(hidden, frozen, targets, chunk_tokens=8, budget_bytes=budget)
            out.sum().backward()
        products = [args for name, args, _ in watch.calls if name in ("mm", "addmm")]
        flops = sum(a[-2].shape[0] * a[-2].shape[1] * a[-1].shape[1] for a in products)
        assert flops == pytest.approx(plan.matmuls * 30 * 64 * 16)


def test_old_places_of_explain_warn_and_work():
    for module in (prefloss, importlib.import_module("prefloss.plan")):
        with pytest.warns(DeprecationWarning, match=r"is now prefloss\.logprobs\.explain"):
            assert module.explain is explain


LARGE = {"tokens": 16_384, "vocabulary": 128_256, "width": 4096, "dtype": torch.bfloat16}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`explain` for a GPU that is not there, with so many GiB free."""
    monkeypatch.setattr(kernels, "available", lambda: True)

    def explained(free_gib, **options):
        monkeypatch.setattr(planning, "free_bytes", lambda device: int(free_gib * 2**30))
        with FakeTensorMode():
            return explain(**{**LARGE, **options}, device="cuda")

    return explained


def test_a_gpu_with_room_keeps_all_logits(on_a_gpu):
    """A budget of 1 GiB on every device kept 3,066 of these tokens, and recomputed the rest."""
    plan = on_a_gpu(60)
    assert (plan.scheme, plan.matmuls, plan.kept_tokens, plan.recomputed_tokens) == ("keep", 3, 16_384, 0)
    assert (plan.impl, plan.fallback) == ("triton", None)
    assert "all tokens fit" in str(plan)
    # what is kept is the gradient of the logits; besides the gradients there are tiles and float32 sums
    assert plan.bytes_kept == pytest.approx(16_384 * 128_256 * 2, rel=0.01)
    assert plan.bytes_scratch < 2**30
    assert plan.bytes_per_logit == 6
    assert on_a_gpu(60, trainable_head=False).bytes_per_logit == 6
    assert on_a_gpu(60, dtype=torch.float32).bytes_per_logit == 8


def test_tiles_of_a_gpu_are_whole_blocks_and_grow_with_the_card(on_a_gpu):
    sizes = []
    for free in (2, 8, 24, 60, 130):
        for tokens in (16_384, 10_007, 700):
            for options in ({}, {"trainable_head": False}, {"gradient": False}, {"vocabulary": 50_257}):
                plan = on_a_gpu(free, **{**LARGE, "tokens": tokens, **options})
                assert plan.tile_rows % 128 == 0 or plan.tile_rows == tokens
                assert plan.tile_columns % 128 == 0
                assert plan.tile_columns <= 2**14
                assert plan.tile_rows * plan.tile_columns * 4 <= 2**29
        sizes.append(on_a_gpu(free).tile_rows)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-2] == sizes[-1] == 8192


def test_a_short_gpu_keeps_logits_where_the_gradient_of_the_head_will_be(on_a_gpu):
    plan = on_a_gpu(8)
    assert (plan.matmuls, plan.kept_tokens) == (3, 16_384)
    assert 3500 <= plan.head_tokens <= 4096
    assert plan.bytes_kept == pytest.approx((16_384 - plan.head_tokens) * 128_256 * 2, rel=0.01)
    # a frozen head has no such gradient, and enough memory is better used for one product
    assert on_a_gpu(8, trainable_head=False, stats_gradient=True).head_tokens == 0
    assert on_a_gpu(60).head_tokens == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("free", [0.5, 1, 2, 3, 4, 5, 6, 7])
def test_a_gpu_is_never_planned_fuller_than_the_budget(on_a_gpu, free, dtype):
    plan = on_a_gpu(free, dtype=dtype)
    assert plan.kept_tokens + plan.recomputed_tokens == 16_384
    assert plan.matmuls == pytest.approx(3 + plan.recomputed_tokens / 16_384)
    if plan.kept_tokens:
        assert plan.bytes_kept + plan.bytes_scratch <= free * 2**29
    if plan.recomputed_tokens:
        assert plan.kept_tokens % 128 == 0
        assert "projected again" in plan.fallback


def test_what_a_gpu_has_free_counts_what_torch_holds_and_does_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * 2**30)
    assert planning.free_bytes(torch.device("cuda")) == 53 * 2**30


def test_round_once_buys_a_pass(on_a_gpu):
    assert on_a_gpu(60).scale_inputs
    for options in ({"round_once": True}, {"stats_gradient": True}):
        plan = on_a_gpu(60, **options)
        assert (plan.scale_inputs, plan.matmuls, plan.bytes_per_logit) == (False, 3, 10)
    with pytest.raises(TypeError, match="round_once: got"):
        explain(**SIZES, round_once=1)
