"""How the loss gets into `transformers.Trainer`, which hands a callback no trainer.

The first callback made wraps three methods of the class once per process: `compute_loss`, `log`, and
`get_batch_samples`, where an optimizer step's batches are seen together before the first of them is used. Each wrapper
looks into the trainer's own list of callbacks, and without a `PreferenceLossCallback` there it calls the trainer's
method and does nothing else. Nothing is stored on the trainer. A subclass that overrides `compute_loss`, as TRL's
do, is as it was.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.trainer import Trainer

from prefloss.integrations._callback import attached


def install(kind: type) -> None:
    """Wrap the methods, unless they are.

    Args:
        kind: The callback's class.
    """
    for name, wrapped in (("compute_loss", _computing), ("log", _logging), ("get_batch_samples", _counting)):
        own = getattr(Trainer, name)
        if not hasattr(own, "_prefloss"):
            wrapper = functools.wraps(own)(wrapped(own, kind))
            wrapper._prefloss = True  # type: ignore[attr-defined]
            setattr(Trainer, name, wrapper)


def _computing(own: Any, kind: type) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        callback = attached(self, kind)
        if callback is None:
            return own(self, model, inputs, return_outputs, num_items_in_batch)
        outputs = callback._compute(self, model, inputs, num_items_in_batch)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    return compute_loss


def _logging(own: Any, kind: type) -> Any:
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        callback = attached(self, kind)
        if callback is not None:
            callback._add_figures(logs)
        return own(self, logs, *args, **kwargs)

    return log


def _counting(own: Any, kind: type) -> Any:
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        samples, num_items = own(self, *args, **kwargs)
        callback = attached(self, kind)
        if callback is not None:
            callback._count(samples)
        return samples, num_items

    return get_batch_samples
