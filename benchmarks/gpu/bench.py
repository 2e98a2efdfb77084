"""One part of a run: its device, its budget of time, and how it times several ways in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu.device import Device, Step
from benchmarks.measure import Record

NOT_RUN = "not run"
WAITS = "its host waits for the device, so host time is in it"


class Budget:
    """Seconds for a part; what would begin after them is written down as not run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock, self._start = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self._clock() - self._start

    @property
    def over(self) -> bool:
        return self.spent >= self.seconds


@dataclass
class Bench:
    """What every measurement of a part needs.

    `problems`: a line for each thing that raised. `missing`: what was not run, and why. `lost`: the way after which the
    device no longer answered; nothing runs after it.
    """

    part: str
    device: Device
    budget: Budget
    folder: Path
    rounds: int = 15
    lost: str = ""
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def why_not(self) -> str:
        """Why nothing may start now, or an empty text."""
        if self.lost:
            return f"{NOT_RUN}: the device does not answer after {self.lost}"
        if self.budget.over:
            return f"{NOT_RUN}: the {self.budget.seconds:.0f} s of this part were spent"
        return ""

    def attempt(self, name: str, call: Callable[[], Any]) -> tuple[Any, str]:
        """The result and an empty text; None and why there is none, whatever the call raised."""
        reason = self.why_not()
        if reason:
            self.missing.append(f"{name}: {reason}")
            return None, reason
        try:
            return call(), ""
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # of any kind: one way must not stop the others
            reason = shortened(error)
        if not self.device.answers():
            self.lost = name
        else:
            self.device.free()
        self.problems.append(f"{name}: {reason}")
        return None, reason

    def each(self, tasks: Mapping[str, Callable[[], list[str]]]) -> list[str]:
        """What is wrong in any of the tasks; one that raises is missing, and the others run."""
        wrong = []
        for name, task in tasks.items():
            found, reason = self.attempt(name, task)
            wrong += found or []
            if reason and not reason.startswith(NOT_RUN):
                self.missing.append(f"{name}: {reason}")
        return wrong

    def attempts(self, calls: Mapping[str, Callable[[], Any]], absent: dict[str, str]) -> dict[str, Any]:
        """The results of the calls that have one; why the others have none goes to `absent`."""
        results = {}
        for name, call in calls.items():
            result, reason = self.attempt(name, call)
            if reason:
                absent[name] = reason
            else:
                results[name] = result
        return results

    def in_turns(self, steps: Mapping[str, Step], absent: Mapping[str, str]) -> dict[str, Record]:
        """Each way twice to warm up, then all of them in every round, in an order that rotates.

        `absent`: ways that cannot be timed, and why; they get a record too.
        """
        records = {name: Record(name) for name in steps}
        delays = {name: self._warm(records[name], step) for name, step in steps.items()}
        for turn in range(self.rounds):
            names = [name for name, record in records.items() if record.note in ("", WAITS)]
            if not names or (turn and self.why_not()):
                break
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                self._time(records[name], steps[name], delays[name])
        return records | {name: Record(name, note=why) for name, why in absent.items()}

    def _warm(self, record: Record, step: Step) -> int:
        def warm() -> int:
            # the first call compiles and picks algorithms
            step()
            record.peak_mib = self.device.peak_mib(step)
            return self.device.delay(step)

        delay, record.note = self.attempt(record.name, warm)
        self.device.free()
        return delay or 0

    def _time(self, record: Record, step: Step, delay: int) -> None:
        if record.milliseconds and self.why_not():
            # it keeps the rounds that it had
            return
        timing, reason = self.attempt(record.name, lambda: self.device.timing(step, delay))
        if timing is not None:
            record.milliseconds.append(timing.milliseconds)
            record.note = "" if timing.queued else WAITS
        else:
            record.milliseconds.clear()
            record.note = reason

    def report(self, title: str, records: dict[str, Record], baseline: str, row: dict[str, object]) -> None:
        """Print a table, and write its rows into the folder at once."""
        measure.RESULTS = self.folder
        measure.report(
            title, records, baseline, {"bench": f"gpu {self.part}", **row}, self.device.machine, True
        )

    def close(self, wrong: list[str]) -> None:
        """Write how the part went into ``parts.json``."""
        path = self.folder / "parts.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = json.loads(path.read_text()) if path.exists() else {}
        parts[self.part] = {
            "verdict": "wrong" if wrong else "incomplete" if self.missing else "held",
            "seconds": round(self.budget.spent, 1),
            "wrong": wrong,
            "missing": self.missing,
            "problems": self.problems,
            **self.facts,
            **measure.circumstances(self.device.machine),
        }
        path.write_text(json.dumps(parts, indent=1) + "\n")


def shortened(error: BaseException) -> str:
    """The type of an exception and the first line of its text."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"
