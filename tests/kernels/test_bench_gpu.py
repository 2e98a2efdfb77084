"""`benchmarks.bench_gpu` on its stand-in device: what goes right, and each thing that can go wrong on a machine."""

import csv
import json
import subprocess
from importlib.util import find_spec

import pytest
import torch

from benchmarks import bench_gpu, measure, peers
from benchmarks.gpu import checks, device, linear, logits, parts, tables
from benchmarks.gpu.bench import WAITS, Bench, Budget
from benchmarks.gpu.device import StandIn, Timing
from benchmarks.gpu.judge import Errors, LogitsJudge
from benchmarks.measure import Record
from benchmarks.shapes import GPU, GpuLinear, GpuLogits, GpuSizes
from prefloss.kernels import chunked
from prefloss.kernels.naive import LogitTransform


@pytest.fixture(autouse=True)
def few_peers(monkeypatch):
    """The peers that need no package and no compiler; results go where a test says."""
    monkeypatch.setattr(measure, "RESULTS", measure.RESULTS)
    monkeypatch.setattr(logits, "logits_ways", lambda absent: {"plain PyTorch": peers.naive_logits})
    monkeypatch.setattr(linear, "linear_ways", lambda absent: {"plain PyTorch": peers.naive_linear})
    monkeypatch.setattr(linear, "liger_steps", lambda loss, beta, absent: {})
    monkeypatch.setattr(linear, "cross_entropy_steps", lambda absent: {})


def bench_in(folder, part="peers", seconds=60.0, **options):
    return Bench(part, options.pop("device", StandIn()), Budget(seconds, **options), folder, rounds=1)


def rows_in(folder):
    with (folder / "stand-in.csv").open() as file:
        return list(csv.DictReader(file))


def verdict_in(folder, part):
    return json.loads((folder / "parts.json").read_text())[part]


def sizes(**chosen):
    """Tiny sizes of some parts, none of the others."""
    return GpuSizes(
        **{**dict.fromkeys(GpuSizes._fields[:6], ()), **chosen, "checks": (9, 16, 301), "past": None}
    )


SMALL = GpuLogits(6, 301)


@pytest.mark.parametrize("part", parts.PARTS)
def test_a_part_measures_and_judges_what_it_names(part, tmp_path, capsys):
    assert bench_gpu.main(["--stand-in", "--part", part, "--out", str(tmp_path), "--rounds", "1"]) == 0
    assert verdict_in(tmp_path, part)["verdict"] == "held"
    if part == "kernels":
        held = json.loads((tmp_path / "checks.json").read_text())
        assert len(held) > 200
        assert {check["status"] for check in held} == {"held"}
        assert {word for check in held for word in check["name"].split()} >= {
            "softcap,",
            "float16",
            "frozen,",
            "bias",
        }
        return
    rows = rows_in(tmp_path)
    assert {row["bench"] for row in rows} == {f"gpu {part}"}
    assert all(
        row["ok"] == "True" and float(row["median_ms"]) > 0 and row["device"] == "stand-in" for row in rows
    )
    assert {row["frozen"] for row in rows} == {"", "True", "False"}
    # an error of every way of ours, and none of the limits
    assert all(float(row["gradient_error"]) < 0.01 for row in rows if row["way"].startswith("prefloss"))


def test_a_peer_that_raises_or_is_wrong_gets_a_row_and_stops_nobody(tmp_path, monkeypatch):
    def broken(x, y):
        raise RuntimeError("no kernel image\nis available")

    def off(x, y):
        return peers.naive_logits(x, y) + 0.5

    def in_backward_only(x, y):
        return (
            peers.naive_logits(x, y)
            + peers.naive_logits(x, y).sin()
            - peers.naive_logits(x, y).sin().detach()
        )

    ways = {
        "broken": broken,
        "off": off,
        "no gradient": in_backward_only,
        "plain PyTorch": peers.naive_logits,
    }

    def listed(absent):
        absent["absent"] = "left out: no module absent"
        return ways

    monkeypatch.setattr(logits, "logits_ways", listed)
    bench = bench_in(tmp_path)
    parts.run_part(bench, sizes(peer_logits=(SMALL,)))
    rows = {row["way"]: row for row in rows_in(tmp_path) if row["what"] == "logits: forward and backward"}
    assert rows["broken"]["note"] == "RuntimeError: no kernel image"
    assert rows["absent"]["note"] == "left out: no module absent"
    right = {way: row["ok"] for way, row in rows.items()}
    assert right == {
        logits.LIMIT: "True", "prefloss": "True", "plain PyTorch": "True",
        "off": "False", "no gradient": "False", "broken": "False", "absent": "False",
    }  # fmt: skip
    verdict = verdict_in(tmp_path, "peers")
    # peers are no fault of ours
    assert verdict["verdict"] == "held"
    assert verdict["problems"] == ["broken: RuntimeError: no kernel image"]


def test_a_peer_that_fails_while_it_is_timed_has_no_time(tmp_path):
    calls = []

    def second_round(x=None):
        calls.append(x)
        if len(calls) > 3:
            raise ValueError("late")

    bench = bench_in(tmp_path)
    bench.rounds = 3
    records = bench.in_turns({"late": second_round, "fine": lambda: None}, {})
    assert records["late"].note == "ValueError: late"
    assert not records["late"].milliseconds
    assert len(records["fine"].milliseconds) == 3


def test_out_of_memory_is_said_in_words(tmp_path):
    def much():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    assert bench_in(tmp_path).attempt("much", much) == (None, "out of memory")


def test_nothing_runs_after_the_device_is_lost(tmp_path):
    class Lost(StandIn):
        def answers(self):
            return False

    def broken():
        raise RuntimeError("illegal memory access")

    bench = bench_in(tmp_path, device=Lost())
    records = bench.in_turns({"fine": lambda: None, "broken": broken, "after": lambda: None}, {})
    assert records["broken"].note == "RuntimeError: illegal memory access"
    assert records["after"].note == "not run: the device does not answer after broken"
    bench.close([])
    assert verdict_in(tmp_path, "peers")["verdict"] == "incomplete"


def test_a_part_that_exceeds_its_budget_says_what_it_left(tmp_path):
    seconds = iter([0.0, *range(1, 10_000)])
    bench = bench_in(tmp_path, "sweep", 12.0, clock=lambda: next(seconds))
    parts.run_part(bench, sizes(odd_logits=(SMALL, GpuLogits(6, 302), GpuLogits(6, 303))))
    rows = rows_in(tmp_path)
    assert {row["shape"] for row in rows} == {"6x301"}
    left = [row for row in rows if row["note"] == "not run: the 12 s of this part were spent"]
    assert left
    assert all(row["median_ms"] == "" and row["ok"] == "False" for row in left)
    verdict = verdict_in(tmp_path, "sweep")
    # what was not run is not wrong
    assert (verdict["verdict"], verdict["wrong"]) == ("incomplete", [])
    whole = [line for line in verdict["missing"] if line.startswith("logits GpuLogits")]
    assert [line.partition("vocabulary=")[2][:3] for line in whole] == ["302", "303"]


def test_a_size_that_cannot_be_set_up_is_missing_and_the_others_run(tmp_path, monkeypatch):
    judged = logits.LogitsJudge

    def no_memory(x, *arguments):
        if x.shape[1] == 301:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return judged(x, *arguments)

    monkeypatch.setattr(logits, "LogitsJudge", no_memory)
    parts.run_part(bench_in(tmp_path, "alone"), sizes(logits=(SMALL, GpuLogits(6, 302))))
    assert {row["shape"] for row in rows_in(tmp_path)} == {"6x302"}
    verdict = verdict_in(tmp_path, "alone")
    assert verdict["verdict"] == "incomplete"
    assert [line.rpartition(": ")[2] for line in verdict["missing"]] == ["out of memory"]


def test_a_wrong_kernel_is_reported_as_wrong(tmp_path, monkeypatch, capsys):
    right = chunked.token_forward

    def wrong(*arguments, **options):
        stats = right(*arguments, **options)
        # one row in one statistic, by what a float32 sum of 128,256 terms may never be off
        stats[0, 0] += 2e-4
        return stats

    monkeypatch.setattr(chunked, "token_forward", wrong)
    assert bench_gpu.main(["--stand-in", "--part", "kernels", "--out", str(tmp_path)]) == 1
    found = {
        check["name"]
        for check in json.loads((tmp_path / "checks.json").read_text())
        if check["status"] == "wrong"
    }
    assert "logits bfloat16 plain, 1 of 5 statistics: statistics" in found
    assert not any(name.startswith("linear") for name in found)
    parts.run_part(bench_in(tmp_path, "alone"), sizes(logits=(SMALL,)))
    ours = [row for row in rows_in(tmp_path) if row["way"].startswith("prefloss")]
    assert {row["ok"] for row in ours} == {"False"}
    assert "wrong" in capsys.readouterr().out
    assert verdict_in(tmp_path, "alone")["verdict"] == "wrong"


def test_a_wrong_gradient_of_the_head_is_wrong(tmp_path, monkeypatch):
    ours = linear.linear_token_logps

    def halved(hidden, weight, targets, **options):
        return ours(hidden, weight * 0.5 + weight.detach() * 0.5, targets, **options)

    monkeypatch.setattr(linear, "linear_token_logps", halved)
    parts.run_part(bench_in(tmp_path, "alone"), sizes(linear=(GpuLinear(32, 16, 301),)))
    right = {row["frozen"]: row["ok"] for row in rows_in(tmp_path) if row["way"] == "prefloss"}
    assert right == {"False": "False", "True": "True"}


def test_a_check_that_raises_is_failed(tmp_path, monkeypatch):
    def raises():
        raise RuntimeError("launch failed")

    cases = {"first": raises, "second": lambda: [("statistics", 0.5, 1.0), ("gradient", float("nan"), 1.0)]}
    monkeypatch.setattr(checks, "cases", lambda *_: iter(cases.items()))
    wrong = checks.run_checks(bench_in(tmp_path, "kernels"), GPU["tiny"])
    assert wrong == ["first: failed", "second: gradient: wrong"]


@pytest.mark.parametrize("error", [float("nan"), 2.0])
def test_errors_that_are_large_or_no_numbers_are_not_within_limits(error):
    limits = Errors(1.0, 1.0)
    assert Errors(0.5, 0.5).within(limits)
    assert Errors(None, 0.5).within(limits)
    assert not Errors(error, 0.5).within(limits)
    assert not Errors(0.5, error).within(limits)


def test_the_limit_of_logits_lets_plain_torch_pass_and_no_less_exact_way():
    torch.manual_seed(1)
    x, y = (torch.randn(5, 4001) * 4).bfloat16(), torch.randint(4001, (5,))
    judged = LogitsJudge(x, y, torch.randn(5), LogitTransform())
    ours = judged.limits.ours
    assert judged.errors(peers.naive_logits).within(ours)
    assert not judged.errors(lambda z, t: peers.naive_logits(z, t, torch.bfloat16).float()).within(ours)


def test_runs_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    uncached = measure.commit.__wrapped__
    first = uncached()
    assert first.startswith("sha256 ")
    assert len(first) == len("sha256 ") + 12
    assert uncached() == first


def test_each_part_has_a_process_that_is_ended_in_time(tmp_path, capsys):
    calls = []

    def run(command, timeout, check):
        part = command[command.index("--part") + 1]
        calls.append((part, timeout))
        if part == "peers":
            raise subprocess.TimeoutExpired(command, timeout)
        bench_in(tmp_path, part).close([])

    options = bench_gpu.argparse.Namespace(out=tmp_path, rounds=1, seconds=bench_gpu.SECONDS, stand_in=True)
    assert bench_gpu.run_all(options, run) == 1
    # eight minutes, and the whole in less than 35
    assert calls == [(part, 460.0) for part in parts.PARTS]
    assert verdict_in(tmp_path, "peers") == {"verdict": "ended after 460 s"}
    assert verdict_in(tmp_path, "sweep")["verdict"] == "held"
    assert "peers    ended after 460 s" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--out", str(tmp_path)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Queue:
    """A device that works through a queue, in milliseconds: the host adds to it without waiting, unless it must."""

    def __init__(self, host=0.0):
        self.now, self.free_at, self.host, self.log = 0.0, 0.0, host, []

    def work(self, milliseconds, name):
        self.free_at = max(self.now, self.free_at) + milliseconds
        self.log.append(name)

    def wait(self):
        self.now = max(self.now, self.free_at)


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(queue.now, queue.free_at)

        def query(self):
            return queue.now >= self.at

        def synchronize(self):
            queue.wait()

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.work(cycles / 2e6, "sleep"))
    return queue


@pytest.fixture
def gpu(queue, monkeypatch):
    class Memory:
        def zero_(self):
            queue.work(0.1, "flush")

    monkeypatch.setattr(device.torch, "empty", lambda *_, **__: Memory())
    return device.Gpu()


def test_the_time_of_a_gpu_has_no_host_time_in_it(queue, gpu):
    def step():
        for _ in range(10):
            # the host takes longer to launch a kernel than the device to run it
            queue.now += 0.3
            queue.work(0.1, "kernel")

    delay = gpu.delay(step)
    assert delay == 10**7
    queue.log.clear()
    timing = gpu.timing(step, delay)
    assert timing.queued
    assert timing.milliseconds == pytest.approx(1.0)
    assert queue.log[:3] == ["flush", "sleep", "kernel"]
    # too short a delay lets the host's time in, and says so
    short = gpu.timing(step, 10**6)
    assert not short.queued
    assert short.milliseconds > 2


def test_a_step_whose_host_waits_for_the_device_is_marked(queue, gpu, tmp_path):
    def step():
        queue.work(0.1, "kernel")
        queue.wait()
        queue.now += 0.2
        queue.work(0.1, "kernel")

    assert gpu.delay(step) == 10**6
    assert gpu.timing(step, 10**6) == Timing(pytest.approx(0.4), False)
    bench = bench_in(tmp_path, device=gpu)
    monkey = {"peak_mib": lambda step: 0.0, "free": lambda: None}
    for name, value in monkey.items():
        setattr(gpu, name, value)
    assert bench.in_turns({"waits": step}, {})["waits"].note == WAITS


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_sweep_launches_in_the_blocks_that_it_names():
    from prefloss.kernels.triton import launch

    before, seen = (launch.FORWARD, launch.BACKWARD), {}
    chosen = {"wide": (8192, 8)}
    calls = {name: lambda name=name: seen.update({name: launch.FORWARD}) for name in ("wide", "usual")}
    for call in logits.launched_in(calls, chosen).values():
        call()
    assert seen == {"wide": (8192, 8), "usual": before[0]}
    assert before == (launch.FORWARD, launch.BACKWARD)


def test_rates_come_from_bytes_and_operations():
    record = Record("one", [2.0, 4.0, 3.0], flops=3e12, traffic=6e9)
    assert (record.tflop_per_s, record.gb_per_s) == (1000, 2000)
    row = measure.numbers(record, "one", 3.0)
    assert (row["tflop_per_s"], row["gb_per_s"], row["ratio"]) == ("1000.0", "2000", "1.000")


def test_tables_of_a_gpu_are_those_of_the_page(tmp_path):
    bench = bench_in(tmp_path, "alone")
    bench.device.machine = "nvidia-h999"
    records = {
        "limit": Record("limit", [2.0], traffic=8e9), "prefloss": Record("prefloss", [2.5], traffic=8e9),
        "peer": Record("peer", note="out of memory"), "other": Record("other", [1.0], ok=False),
    }  # fmt: skip
    row = {"what": "logits: forward", "shape": "6x301", "dtype": "bfloat16", "frozen": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "machine", lambda name: name)
        bench.report("title", records, "limit", row)
    text = tables.render(tmp_path)
    assert "Measured on nvidia h999" in text
    assert "| **prefloss** | 1.250 · 3200 GB/s |" in text
    assert "| peer | out of memory |" in text
    assert "| other | wrong |" in text
    (tmp_path / "nvidia-h999.csv").rename(tmp_path / "stand-in.csv")
    assert tables.render(tmp_path) == tables.NOTHING


def test_the_page_shows_the_results_that_are_kept():
    page = tables.PAGE.read_text()
    assert tables.replaced(page, "gpu", tables.render()) == page, "run python -m benchmarks.gpu.tables"
