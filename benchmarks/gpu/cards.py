"""What the forecast knows of each GPU, with the source of each number."""

from __future__ import annotations

from typing import NamedTuple

# What large copies and products reach of the peaks: on an H200 with torch 2.11 a copy of 8.6 GB moved 4.3 TB/s of 4.8,
# and a bf16 product of 8,192 squared ran at 769 to 798 TFLOP/s of 989 (October and November 2026). The other GPUs are
# assumed to reach the same shares.
COPY_SHARE, PRODUCT_SHARE = 4.3 / 4.8, 790 / 989
# Share of the issue slots that a kernel fills whose instructions depend on each other; an assumption.
ISSUE_SHARE = 0.9
# Warp instructions per clock of a multiprocessor, and results of its special function units (CUDA programming guide,
# table of arithmetic throughput: 16 for compute capabilities 8.0, 9.0 and 10.0).
ISSUED, SPECIAL = 4, 16
# From the end of one kernel to the beginning of the next in a queue, seconds; an assumption.
LAUNCH = 2e-6
# From a load to its value where memory is busy, seconds; an assumption.
LATENCY = 8e-7


class Card(NamedTuple):
    """Peaks: bytes per second, operations per second of half precision and of float32; clock in Hz; memory in bytes."""

    name: str
    arch: int
    bandwidth: float
    half: float
    single: float
    multiprocessors: int
    clock: float
    memory: float
    source: str

    @property
    def copy(self) -> float:
        """Bytes that a copy reads and writes in a second."""
        return self.bandwidth * COPY_SHARE

    def products(self, half: bool) -> float:
        """Operations of large matrix products in a second."""
        return (self.half if half else self.single) * PRODUCT_SHARE


CARDS = {
    card.name: card
    for card in (
        Card(
            "A100", 80, 2.039e12, 312e12, 19.5e12, 108, 1.41e9, 80e9,
            "NVIDIA A100 80GB SXM datasheet (2,039 GB/s, 312 and 19.5 TFLOPS); A100 whitepaper (108 SMs, 1,410 MHz)",
        ),
        Card(
            "H100", 90, 3.35e12, 989e12, 67e12, 132, 1.98e9, 80e9,
            "NVIDIA H100 SXM datasheet (3.35 TB/s, 1,979 TFLOPS with sparsity, 67 TFLOPS); H100 whitepaper (132 SMs); "
            "1,980 MHz read on an H200",
        ),
        Card(
            "H200", 90, 4.8e12, 989e12, 67e12, 132, 1.98e9, 141e9,
            "NVIDIA H200 SXM datasheet (4.8 TB/s, 1,979 TFLOPS with sparsity, 67 TFLOPS); 132 SMs and 1,980 MHz read "
            "on one",
        ),
        Card(
            "B200", 100, 8e12, 2250e12, 80e12, 148, 1.965e9, 180e9,
            "NVIDIA HGX B200 datasheet (8 TB/s, 4.5 PFLOPS with sparsity, 80 TFLOPS of float32); 148 SMs and about "
            "1,965 MHz from public reports",
        ),
    )
}  # fmt: skip
