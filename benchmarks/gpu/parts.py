"""The parts of a run, each callable by itself, and what each measures."""

from __future__ import annotations

from collections.abc import Callable

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
    wrong = []
    for size in sizes.logits:
        wrong += measure_logits(bench, size)
    for size in sizes.linear:
        wrong += measure_linear(bench, size)
    return wrong


def peers(bench: Bench, sizes: GpuSizes) -> list[str]:
    """Ours and others in turns."""
    wrong = []
    for size in sizes.peer_logits:
        wrong += measure_logits(bench, size, peers=True)
    for size in sizes.peer_linear:
        wrong += measure_linear(bench, size, peers=True)
    return wrong


def sweep(bench: Bench, sizes: GpuSizes) -> list[str]:
    """Ours at odd vocabularies and few tokens, in tiles of several sizes, in several blocks and numbers of warps."""
    wrong = []
    for size in sizes.odd_logits:
        wrong += measure_logits(bench, size)
    for size in sizes.odd_linear:
        wrong += measure_linear(bench, size, sweep=True)
    if bench.device.impl == "triton":
        wrong += measure_logits(bench, sizes.logits[0], blocks=True)
    return wrong


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
    try:
        wrong = PARTS[bench.part](bench, sizes)
    except Exception as error:
        # nothing of the part was foreseen to raise here, but the rows that there are must count
        bench.problems.append(f"stopped by {type(error).__name__}: {error}")
        bench.close(["stopped"])
        raise
    bench.close(wrong)


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
