"""The parts of a run, each callable by itself, and what each measures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.checks import run_checks
from benchmarks.gpu.linear import measure_linear
from benchmarks.gpu.logits import measure_logits
from benchmarks.shapes import GpuSizes

# Elements of the copy and width of the product that give the rates of the device.
COPIED, MULTIPLIED = 2**31, 8192


def alone(bench: Bench, sizes: GpuSizes) -> list[str]:
    """Ours, at the sizes of the published tables."""
    return bench.each(
        {f"logits {size}": partial(measure_logits, bench, size) for size in sizes.logits}
        | {f"hidden {size}": partial(measure_linear, bench, size) for size in sizes.linear}
    )


def peers(bench: Bench, sizes: GpuSizes) -> list[str]:
    """Ours and others in turns."""
    return bench.each(
        {f"logits {size}": partial(measure_logits, bench, size, peers=True) for size in sizes.peer_logits}
        | {f"hidden {size}": partial(measure_linear, bench, size, peers=True) for size in sizes.peer_linear}
    )


def sweep(bench: Bench, sizes: GpuSizes) -> list[str]:
    """Ours at odd vocabularies and few tokens, in tiles of several sizes, in several blocks and numbers of warps."""
    tasks = {f"logits {size}": partial(measure_logits, bench, size) for size in sizes.odd_logits}
    tasks |= {f"hidden {size}": partial(measure_linear, bench, size, sweep=True) for size in sizes.odd_linear}
    if bench.device.impl == "triton":
        tasks |= {
            f"blocks {size}": partial(measure_logits, bench, size, blocks=True) for size in sizes.logits[:1]
        }
    return bench.each(tasks)


PARTS: dict[str, Callable[[Bench, GpuSizes], list[str]]] = {
    "kernels": run_checks,
    "alone": alone,
    "peers": peers,
    "sweep": sweep,
}


def run_part(bench: Bench, sizes: GpuSizes) -> None:
    """Measure the rates of the device, run the part, and write ``parts.json``."""
    rates, _ = bench.attempt("rates of the device", lambda: rates_of(bench))
    bench.facts["rates"] = rates
    bench.close(PARTS[bench.part](bench, sizes))


def rates_of(bench: Bench) -> dict[str, float]:
    """Bytes read and written by a copy, TB/s, and operations of a matrix product of random numbers, TFLOP/s."""
    if not bench.device.real:
        return {}
    x = torch.empty(COPIED, device=bench.device.name, dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    a, b = x[: 2 * MULTIPLIED**2].view(2, MULTIPLIED, MULTIPLIED)
    steps = {"copy": lambda: y.copy_(x), "product": lambda: torch.mm(a, b)}
    records = bench.in_turns(steps, {})
    return {
        "copy_tb_per_s": 2 * x.nbytes / records["copy"].median / 1e9,
        "product_tflop_per_s": 2 * MULTIPLIED**3 / records["product"].median / 1e9,
    }
