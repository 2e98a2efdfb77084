"""What is measured on, with a clock of its own: a GPU, or a stand-in for tests of these programs on the CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from benchmarks import measure
from prefloss import kernels

Step = Callable[[], object]

# written before each timing, so that a step finds nothing of its input in the cache; a B200 has 126 MB of it
FLUSH_BYTES = 2**28
# How long the device idles before the first event while the host queues the step: about 0.5, 5 and 50 ms.
DELAYS = (10**6, 10**7, 10**8)


class Timing(NamedTuple):
    """`queued`: the host had queued the whole step before the device began it, so no host time is in it."""

    milliseconds: float
    queued: bool


class Device(Protocol):
    """`name`: where tensors are made. `machine`: what results are filed under. `impl`: of our ops. `real`: a GPU."""

    name: str
    machine: str
    impl: str
    real: bool

    def timing(self, step: Step, delay: int) -> Timing: ...

    def delay(self, step: Step) -> int: ...

    def peak_mib(self, step: Step) -> float: ...

    def free(self) -> None: ...

    def answers(self) -> bool: ...


class Gpu:
    """The current CUDA or ROCm device."""

    name, machine, impl, real = "cuda", "cuda", "triton", True

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.name)

    def timing(self, step: Step, delay: int) -> Timing:
        """Device time of a step whose launches wait in a queue until `delay` cycles have passed."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        torch.cuda._sleep(delay)
        begin.record()
        kept = step()
        end.record()
        queued = not begin.query()
        end.synchronize()
        del kept
        return Timing(begin.elapsed_time(end), queued)

    def delay(self, step: Step) -> int:
        """The shortest delay in which the host can queue the step; the shortest of all if it waits for the device."""
        return next((delay for delay in DELAYS if self.timing(step, delay).queued), DELAYS[0])

    def peak_mib(self, step: Step) -> float:
        return measure.peak_mib(step, self.name)

    def free(self) -> None:
        """Give back the memory that nothing uses; an exception may still hold the tensors of what failed."""
        gc.collect()
        torch.cuda.empty_cache()

    def answers(self) -> bool:
        """Whether it still computes: after an illegal access every later call fails in this process."""
        try:
            torch.cuda.synchronize()
            return bool((torch.ones(1, device=self.name) + 1).item() == 2)
        except RuntimeError:
            return False


class StandIn:
    """The CPU, timed by the host's clock: nothing that it measures says anything about a GPU."""

    name, machine, real = "cpu", measure.STAND_IN, False

    def __init__(self) -> None:
        self.impl = "triton" if kernels.available() else "chunked"

    def timing(self, step: Step, delay: int) -> Timing:
        start = time.perf_counter()
        step()
        return Timing(1e3 * (time.perf_counter() - start), True)

    def delay(self, step: Step) -> int:
        return 0

    def peak_mib(self, step: Step) -> float:
        step()
        return float("nan")

    def free(self) -> None:
        return

    def answers(self) -> bool:
        return True
