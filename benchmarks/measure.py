"""Time and peak extra memory of several ways to do one thing, in one process, in turns."""

import csv
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton")


@dataclass
class Record:
    """One way, measured: milliseconds, MiB beyond what was resident before, and errors against float64."""

    name: str
    milliseconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    logp_error: float = float("nan")
    gradient_error: float = float("nan")
    ok: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def in_turns(ways: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, Record]:
    """Each way once to warm up, once for its memory, then all of them in every round, in an order that rotates."""
    records = {name: Record(name) for name in ways}
    for name, way in ways.items():
        way()
        records[name].peak_mib = peak_mib(way, device)
    names = list(ways)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            records[name].milliseconds.append(milliseconds(ways[name], device))
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
        # 5 resets the peak that the kernel keeps for this process
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        way()
        return (_status("VmHWM") - before) / 2**10
    except OSError:
        return float("nan")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(key)


def machine(device: str = "cpu") -> str:
    """A name for the results file."""
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
    versions = {"torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "device": machine(device),
        "threads": str(torch.get_num_threads()),
        "load": load,
        "clock": os.environ.get("PREFLOSS_CLOCK", "wall"),
        "commit": commit,
        **versions,
    }


def report(
    title: str, records: dict[str, Record], baseline: str, row: dict[str, object], device: str, save: bool
) -> None:
    """Print a table and add its rows to the results of this machine."""
    base = records[baseline].median
    print(f"\n{title}; x = time over that of '{baseline}'")
    print(f"{'':34}{'ms':>9} {'(min-max)':>17} {'x':>6} {'MiB':>7} {'logp err':>9} {'grad err':>9}")
    for record in sorted(records.values(), key=lambda record: record.median):
        spread = f"({min(record.milliseconds):.0f}-{max(record.milliseconds):.0f})"
        # a speed counts only with right numbers
        ratio = f"{record.median / base:.2f}" if record.ok else "wrong"
        print(
            f"{record.name:34}{record.median:9.1f} {spread:>17} {ratio:>6} {record.peak_mib:7.0f} "
            f"{record.logp_error:9.1e} {record.gradient_error:9.1e}"
        )
    if not save:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine(device)}.csv"
    fresh = not path.exists()
    around = circumstances(device)
    with path.open("a", newline="") as file:
        writer = None
        for record in records.values():
            values = asdict(record)
            times = values.pop("milliseconds")
            values |= {
                "median_ms": record.median,
                "min_ms": min(times),
                "max_ms": max(times),
                "rounds": len(times),
            }
            values = {**row, **values, "x": record.median / base, "baseline": baseline, **around}
            writer = writer or csv.DictWriter(file, fieldnames=list(values))
            if fresh:
                writer.writeheader()
                fresh = False
            writer.writerow(values)
