"""Several ranks in one process: threads that exchange tensors as a process group does."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefloss.training import distributed


class Ranks(threading.local):
    """The few functions of `torch.distributed` in use, between threads."""

    def __init__(self, count, barrier, shared):
        self.count, self.number = count, 0
        self.barrier, self.shared = barrier, shared

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self):
        return self.count

    def get_rank(self):
        return self.number

    def exchanged(self, value):
        self.shared[self.number] = value
        self.barrier.wait()
        found = [self.shared[number] for number in range(self.count)]
        self.barrier.wait()
        return found

    def all_gather(self, into, value):
        for place, found in zip(into, self.exchanged(value), strict=True):
            place.copy_(found)

    def all_gather_object(self, into, value):
        into[:] = self.exchanged(value)

    def all_reduce(self, value):
        value.copy_(sum(self.exchanged(value.clone())))


@pytest.fixture
def on_ranks(monkeypatch):
    """Run a function of the rank on several ranks; the results by rank."""

    def run(function, count=2):
        ranks = Ranks(count, threading.Barrier(count, timeout=20), {})
        monkeypatch.setattr(distributed, "dist", ranks)

        def work(number):
            ranks.number = number
            return function(number)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(work, range(count)))

    return run
