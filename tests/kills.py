"""Processes that are killed just before they change something."""

import os
import signal
from collections.abc import Callable, Iterable
from unittest import mock


def killing_at(moment: int) -> Callable[[Callable], Callable]:
    """A wrapper of functions: this process is killed instead of the n-th call, from 0, of all that it wraps."""
    left = [moment]

    def then(function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    return then


def wrap_changes(then: Callable[[Callable], Callable], names: Iterable[str]) -> None:
    """Wrap functions of os, for the rest of this process."""
    for name in names:
        mock.patch(f"os.{name}", then(getattr(os, name))).start()
