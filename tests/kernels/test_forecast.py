"""The forecast counts what ops do, and computes times that can be checked by hand."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import cards
from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.roofline import Work

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks import forecast, sass
from benchmarks.gpu import roofline
from benchmarks.gpu.trace import Pass, Product, trace
from benchmarks.shapes import FORECAST, GpuLinear, GpuLogits

H200 = CARDS["H200"]


def traced(size, what):
    (found,) = [
        one
        for one in (forecast.of_hidden if len(size) == 5 else forecast.of_logits)(size)
        if one.what == what
    ]
    return found


def products_of(events):
    return [event for event in events if isinstance(event, Product)]


def test_a_trace_counts_products_passes_and_no_views():
    x = torch.empty(30, 20, dtype=torch.bfloat16, device="meta")
    out = torch.empty(30, 50, device="meta")

    def op():
        torch.mm(
            x, torch.empty(50, 20, dtype=torch.bfloat16, device="meta").T, out_dtype=torch.float32, out=out
        )
        out.mul_(2)
        out[3:].view(-1).zero_()
        torch.empty(5, device="meta").expand(7, 5).sum()

    product, *passes = trace(op, 1e9)
    assert product == Product(30, 20, 50, True, moved=2 * 30 * 20 + 2 * 50 * 20 + 4 * 30 * 50)
    assert product.flops == 2 * 30 * 20 * 50
    assert passes == [Pass("mul_", 2 * 4 * 1500), Pass("zero_", 4 * 27 * 50), Pass("sum", 4 * 5 + 4)]


@pytest.mark.parametrize(("what", "least", "most"), [("trainable", 3, 4), ("frozen", 2, 2)])
def test_the_products_of_a_task_are_those_of_its_plan(what, least, most):
    size = GpuLinear(16_384, 4096, 128_256)
    flops = sum(product.flops for product in products_of(traced(size, what).events))
    once = 2.0 * size.tokens * size.width * size.vocabulary
    assert least - 1e-9 <= flops / once <= most + 1e-9


def test_launches_cover_all_logits():
    forward = traced(GpuLogits(500, 3000), "forward")
    (launch,) = [event for event in forward.events if isinstance(event, sass.Launch)]
    assert launch.arguments[0].shape == (500, 3000)
    both = traced(GpuLogits(500, 3000), "both")
    assert len([event for event in both.events if isinstance(event, sass.Launch)]) == 2


def test_a_product_counts_whole_tiles_and_rounds():
    one = Product(1, 1000, 1, True, moved=0)
    all_tiles = H200.multiprocessors * 128 * 256 * 1000 * 2.0
    assert roofline.padded_flops(one, H200) == all_tiles
    assert roofline.padded_flops(Product(128 * 132, 1000, 256, True, moved=0), H200) == all_tiles
    assert roofline.padded_flops(Product(128 * 132 + 1, 1000, 256, True, moved=0), H200) == 2 * all_tiles
    large = Product(16_384, 4096, 128_256, True, moved=0)
    assert roofline.seconds(large, H200) == pytest.approx(large.flops / 790e12, rel=2e-3)
    # a product of few operations takes its bytes
    moved = Product(1, 1, 1, True, moved=43 * 10**9)
    assert roofline.seconds(moved, H200) == pytest.approx(0.01)


@pytest.fixture
def launch(monkeypatch):
    """A launch over 2**30 bfloat16 logits, and a way to choose what its machine code says."""
    x = torch.empty(2**13, 2**17, dtype=torch.bfloat16, device="meta")
    work = {"registers": 32, "spilled": 0, "occupancy": 1.0, "instructions": 1.0, "special": 0.1, "reads": 1,
            "load_bytes": 16, "in_flight": 64, "writes": False}  # fmt: skip

    def code(**changed):
        monkeypatch.setattr(roofline, "work_of", lambda *_: Work(**{**work, **changed}))
        return sass.Launch(SimpleNamespace(__name__="kernel"), 2**13, 4, (x,), {})

    return code


def test_a_kernel_takes_the_longest_of_bytes_instructions_and_special_functions(launch):
    copied = 2**31 / H200.copy
    assert roofline.seconds(launch(), H200) == pytest.approx(copied)
    assert roofline.seconds(launch(reads=2), H200) == pytest.approx(2 * copied)
    # in place, each logit is read and written
    assert roofline.seconds(launch(writes=True), H200) == pytest.approx(2 * copied)
    slots = 132 * 1.98e9 * 32 * 4 * cards.ISSUE_SHARE
    assert roofline.seconds(launch(instructions=40.0), H200) == pytest.approx(40 * 2**30 / slots)
    assert roofline.seconds(launch(special=9.0), H200) == pytest.approx(9 * 2**30 / (132 * 1.98e9 * 16))
    # 8 warps of each multiprocessor with 2 bytes a thread cannot keep the memory busy
    slow = roofline.seconds(launch(occupancy=0.125, in_flight=2), H200)
    assert slow == pytest.approx(2**31 / (8 * 132 * 32 * 2 / cards.LATENCY))


def test_nothing_is_faster_than_the_gap_between_kernels():
    assert roofline.seconds(Pass("neg", 4), H200) == cards.LAUNCH


def test_every_number_of_a_gpu_has_a_source():
    assert list(CARDS) == ["A100", "H100", "H200", "B200"]
    assert all(len(card.source) > 40 for card in CARDS.values())
    assert {card.arch for card in CARDS.values()} == {80, 90, 100}
    assert pytest.approx((4.3e12, 790e12)) == (H200.copy, H200.products(half=True))


def test_targets_are_sizes_that_are_forecast():
    logits, linear = FORECAST["full"]
    assert {size for _, size in forecast.TARGETS} <= {*logits, *linear}


def test_every_table_says_forecast(monkeypatch, capsys):
    work = Work(32, 0, 1.0, 8.0, 1.0, 1, 16, 64, False)
    monkeypatch.setattr(roofline, "work_of", lambda *_: work)
    assert forecast.main(["--cards", "H200", "B200", "--sizes", "tiny"]) == 0
    blocks = [block for block in capsys.readouterr().out.split("\n\n") if not block.startswith("|")]
    assert [block.strip().split(",")[0] for block in blocks] == ["Forecast"] * 4
    assert "not a measurement" in blocks[0]
    assert "lower bounds" in blocks[0]


def test_the_work_of_a_kernel_is_read_from_its_machine_code():
    forward, both = forecast.of_logits(GpuLogits(16_384, 128_256))
    *_, launch = forward.events
    work = roofline.work_of(launch, 90)
    assert (work.reads, work.load_bytes, work.spilled, work.writes) == (1, 16, 0, False)
    assert 1 <= work.special < work.instructions < 12
    assert roofline.moved(launch, work) == 2 * 16_384 * 128_256
    *_, backward = both.events
    work = roofline.work_of(backward, 90)
    assert (work.reads, work.load_bytes, work.spilled, work.writes) == (1, 16, 0, True)
    # no faster than a copy, and as fast where it is the whole limit
    assert 0.9 < both.ratio(H200) <= 1
