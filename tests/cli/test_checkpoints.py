"""When a run saves, and what it does with a signal."""

import itertools
import os
import signal
import time

import pytest

from prefloss.cli.checkpoints import Schedule, StopRequest


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_by_steps_every_so_many():
    schedule = Schedule(3, 1.0)
    assert [step for step in range(1, 8) if schedule.due(step)] == [3, 6]


def test_by_minutes_no_more_is_at_stake_than_allowed(clock):
    """AUDIT M4."""
    schedule, saved_at = Schedule(None, 1.0), [0.0]
    for step in range(1, 40):
        clock[0] += 7.0
        if schedule.due(step):
            with schedule.saving():
                saved_at.append(clock[0])
                clock[0] += 4.0
    # From one save to the end of the next.
    assert all(later + 4.0 - earlier <= 60.0 for earlier, later in itertools.pairwise(saved_at))
    assert len(saved_at) == 6


def test_a_long_measurement_is_saved_before(clock):
    schedule = Schedule(None, 1.0)
    clock[0] = 5.0
    assert not schedule.due(1)
    clock[0] = 10.0
    assert schedule.due(2, more=50.0)


def test_signals_are_noted_and_a_second_ctrl_c_is_not_waited_for():
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with stop.heard():
        os.kill(os.getpid(), signal.SIGINT)
        # torchrun sends SIGTERM after it.
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
