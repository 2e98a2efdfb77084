"""The training batches, with what their whole optimizer step counts written on each of them.

Lightning hands out one batch at a time, but the mean over an optimizer step has to be known when its first batch is
used. So the loader is read as many batches ahead as are accumulated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any


class StepLoader:
    """A loader that reads the batches of an optimizer step together, and hands them out one by one.

    Args:
        loader: What is read; its attributes are this one's too, so that Lightning finds the sampler.
        trainer: Says how many batches make a step, and how many an epoch.
        count: Told of the batches of each step.
    """

    def __init__(self, loader: Any, trainer: Any, count: Callable[[list[Any]], None]) -> None:
        self._loader = loader
        self._trainer = trainer
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.islice(iter(self._loader), self._left())
        # Asked anew for each step: a callback may change it.
        while step := list(itertools.islice(batches, self._trainer.accumulate_grad_batches)):
            self._count(step)
            yield from step

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask before there is a loader.
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def _left(self) -> int | None:
        """Batches that the epoch still has: limited by the trainer, and begun where it resumes within an epoch."""
        limit = self._trainer.limit_train_batches
        try:
            most = limit if isinstance(limit, int) else int(len(self) * limit)
        except TypeError:
            return None
        return max(0, most - self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)
