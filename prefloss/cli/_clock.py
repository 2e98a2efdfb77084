"""Wall time by part of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs from its creation; time inside nested parts counts for the inner one."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for this part; parts of one name add up."""
        since, outer = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - since
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = outer + spent

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._began

    @property
    def words(self) -> str:
        """As "imports 6, training 40"."""
        return ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items() if seconds >= 0.5)
