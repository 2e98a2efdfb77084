"""Time and peak extra memory of several ways to do one thing, in one process, in turns."""

import csv
import ctypes
import functools
import gc
import hashlib
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformers", "triton")
# What is measured: the commit in a row is of these alone.
SOURCES = ("prefloss/kernels", "prefloss/logprobs.py", "benchmarks/*.py", "benchmarks/gpu/*.py")
# What was measured, then the numbers, then what they depend on.
KEYS = ("bench", "what", "shape", "dtype", "frozen")
COLUMNS = (
    *KEYS, "way", "median_ms", "min_ms", "max_ms", "rounds", "ratio", "baseline", "peak_extra_bytes", "logp_error",
    "gradient_error", "tokens", "ok", "device", "threads", "clock", "load", "commit", "versions", "date",
    "tflop_per_s", "gb_per_s", "note",
)  # fmt: skip
# The "machine" of rows whose times mean nothing: a GPU program that ran on the CPU to be tested.
STAND_IN = "stand-in"


@dataclass
class Record:
    """One way, measured: milliseconds, MiB beyond what was in use before, and errors against float64.

    `tokens`, where ways differ in them: those that the model computes.
    `flops` and `traffic` are what the task takes at least, operations and bytes. `note` says why there are no
    milliseconds, or what to know about them.
    """

    name: str
    milliseconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    logp_error: float = float("nan")
    gradient_error: float = float("nan")
    tokens: int | None = None
    ok: bool = True
    flops: float = 0.0
    traffic: float = 0.0
    note: str = ""

    @property
    def median(self) -> float:
        """NaN if nothing was timed."""
        return statistics.median(self.milliseconds) if self.milliseconds else math.nan

    @property
    def tflop_per_s(self) -> float:
        return self.flops / self.median / 1e9

    @property
    def gb_per_s(self) -> float:
        return self.traffic / self.median / 1e6


def in_turns(
    ways: dict[str, Callable[[], object]], rounds: int, device: str = "cpu", warm: bool = True
) -> dict[str, Record]:
    """Each way once to warm up, once for its memory, then all of them in every round, in an order that rotates.

    Without `warm`, the caller has called each way already.
    """
    records = {name: Record(name) for name in ways}
    # what lives already need not be searched again before every call
    gc.collect()
    gc.freeze()
    try:
        for name, way in ways.items():
            if warm:
                way()
            records[name].peak_mib = peak_mib(way, device)
        names = list(ways)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                gc.collect()
                records[name].milliseconds.append(milliseconds(ways[name], device))
    finally:
        gc.unfreeze()
    return records


def milliseconds(way: Callable[[], object], device: str = "cpu") -> float:
    # on a busy machine PREFLOSS_CLOCK=process counts this process's own time; with one thread that is comparable
    clock = time.process_time if os.environ.get("PREFLOSS_CLOCK") == "process" else time.perf_counter
    synchronize(device)
    start = clock()
    way()
    synchronize(device)
    return 1e3 * (clock() - start)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def peak_mib(way: Callable[[], object], device: str = "cpu") -> float:
    """Most memory during a call beyond that before it, inputs excluded, results included; NaN where unknown."""
    gc.collect()
    if device != "cpu":
        module = torch.get_device_module(device)
        module.synchronize()
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        way()
        module.synchronize()
        return (module.max_memory_allocated() - before) / 2**20
    try:
        # what malloc has and nobody uses would hide a call's own need
        ctypes.CDLL(None).malloc_trim(0)
        # 5 resets the peak that the kernel keeps for this process
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        way()
        return (_status("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return float("nan")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(key)


def machine(device: str = "cpu") -> str:
    """A name for the results file."""
    if device == STAND_IN:
        return STAND_IN
    if device != "cpu":
        return torch.get_device_module(device).get_device_name().replace(" ", "-").lower()
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}-{os.cpu_count()}-cores".replace(" ", "-").lower()


def circumstances(device: str) -> dict[str, str]:
    """What a number depends on besides the code that it measures."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "device": machine(device),
        "threads": str(torch.get_num_threads()),
        "clock": os.environ.get("PREFLOSS_CLOCK", "wall") if device in ("cpu", STAND_IN) else "device",
        "load": load,
        "commit": commit(),
        "versions": "; ".join(versions),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


@functools.cache
def commit() -> str:
    """The last commit that changed what is measured, with a plus if some of that is not committed.

    Without git or its folder: a hash of these files, which tells two states of the code apart as well.
    """
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    try:
        last = subprocess.run(
            [*git, "log", "-1", "--format=%h", "--", *SOURCES], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *SOURCES], check=False)
        return last.stdout.strip() + ("+" if changed.returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return f"sha256 {_hash_of_sources(root)}"


def _hash_of_sources(root: Path) -> str:
    found = {path for pattern in SOURCES for path in root.glob(pattern)}
    files = {file for path in found for file in (path.rglob("*.py") if path.is_dir() else (path,))}
    texts = (f"{file.relative_to(root)}\n{file.read_text()}" for file in sorted(files))
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]


def report(
    title: str, records: dict[str, Record], baseline: str, row: dict[str, object], device: str, save: bool
) -> None:
    """Print a table, and put its rows into the results of this machine, for those that had the same `KEYS`."""
    base = records[baseline].median
    print(f"\n{title}; x = time over that of '{baseline}'; load {os.getloadavg()[0]:.1f}")
    print(f"{'':36}{'ms':>9} {'(min-max)':>17} {'x':>6} {'MiB':>7} {'logp err':>9} {'grad err':>9}")
    for record in sorted(records.values(), key=lambda record: (not record.milliseconds, record.median)):
        print(_line(record, base), flush=True)
    if not save:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{machine(device)}.csv"
    around = circumstances(device)
    key = [str(row[name]) for name in KEYS]
    kept = [old for old in rows_of(path) if [old[name] for name in KEYS] != key] if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows({**row, **numbers(record, baseline, base), **around} for record in records.values())


def _line(record: Record, base: float) -> str:
    """A line of the printed table."""
    if not record.milliseconds:
        return f"{record.name:36}{'-':>9} {record.note}"
    digits = 0 if record.median > 100 else 2
    spread = f"({min(record.milliseconds):.{digits}f}-{max(record.milliseconds):.{digits}f})"
    # a speed counts only with right numbers
    ratio = f"{record.median / base:.2f}" if record.ok else "wrong"
    rates = (f" {record.tflop_per_s:6.0f} TFLOP/s" if record.flops else "") + (
        f" {record.gb_per_s:6.0f} GB/s" if record.traffic else ""
    )
    note = f" ({record.note})" if record.note else ""
    return (
        f"{record.name:36}{record.median:9.2f} {spread:>17} {ratio:>6} {record.peak_mib:7.0f} "
        f"{record.logp_error:9.1e} {record.gradient_error:9.1e}{rates}{note}"
    )


def numbers(record: Record, baseline: str, base: float) -> dict[str, object]:
    """The columns of one way; those of its times are empty if it has none."""
    times = record.milliseconds
    timed = {} if not times else {
        "median_ms": f"{record.median:.4f}",
        "min_ms": f"{min(times):.4f}",
        "max_ms": f"{max(times):.4f}",
        "ratio": f"{record.median / base:.3f}",
        "peak_extra_bytes": "" if record.peak_mib != record.peak_mib else round(record.peak_mib * 2**20),
        "tflop_per_s": f"{record.tflop_per_s:.1f}" if record.flops else "",
        "gb_per_s": f"{record.gb_per_s:.0f}" if record.traffic else "",
    }  # fmt: skip
    return {
        **timed,
        "way": record.name,
        "rounds": len(times),
        "baseline": baseline,
        "logp_error": f"{record.logp_error:.2e}",
        "gradient_error": f"{record.gradient_error:.2e}",
        "tokens": "" if record.tokens is None else record.tokens,
        "ok": record.ok and bool(times),
        "note": record.note,
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
