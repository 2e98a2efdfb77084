"""Seam of TRL 1.15 and newer: each model has a fused head, which returns log-probs of the labels that it is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefloss.integrations.trl.passes import Pass, Passes, hooked


def fits(trainer: type) -> bool:
    """Whether this seam is in a trainer."""
    method: Any = getattr(trainer, "_compute_loss", None)
    return method is not None and hasattr(sys.modules.get(method.__module__), "add_fused_lm_head")


@contextmanager
def recorded(trainer: Any, batch: Mapping[str, Any]) -> Iterator[Passes]:
    """Collect the passes that `trainer` makes for `batch` inside."""
    passes = Passes(trainer, batch)

    def keep(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not kwargs.get("fused_lm_head"):
            return
        # Prompt-learning adapters prepend virtual tokens; the last columns are the real ones.
        width = kwargs["labels"].shape[1] - 1
        squares = output.log_sum_sq_probs
        squares = None if squares is None else squares[:, -width:]
        passes.found.append(Pass(kwargs["labels"], output.log_probs[:, -width:], output.aux_loss, squares))

    with hooked(trainer, keep):
        yield passes
