"""Seam of DPOTrainer up to TRL 0.28: `dpo_loss(chosen, rejected, reference chosen, reference rejected, ...)`.

It receives sums of log-probs. Where the trainer runs TRL's own forward pass on padded rows, the log-probs of the tokens
are recorded too, for losses that need token counts or per-token values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.integrations.binding import replaced
from prefloss.integrations.trl.passes import Pass, Passes, log_ratios, unknown_order
from prefloss.integrations.trl.token_logps import token_logps
from prefloss.logratios import IGNORE_INDEX, LogRatios


def fits(trainer: type) -> bool:
    """Whether this seam is in a trainer."""
    return hasattr(trainer, "dpo_loss") and hasattr(trainer, "get_batch_loss_metrics")


@contextmanager
def recorded(trainer: Any, batch: Mapping[str, Any]) -> Iterator[Passes]:
    """Collect what `trainer` gives its `dpo_loss` for `batch` inside."""
    sums = _Sums(trainer, batch)
    own = trainer.dpo_loss

    def dpo_loss(chosen: Tensor, rejected: Tensor, *args: Any, **kwargs: Any) -> Any:
        references = (
            *args[:2],
            *(kwargs[name] for name in ("ref_chosen_logps", "ref_rejected_logps") if name in kwargs),
        )
        sums.received.append((chosen, rejected, *references))
        return own(chosen, rejected, *args, **kwargs)

    def keep(logps: Tensor, targets: Tensor, squares: Tensor | None, aux_loss: Tensor | None) -> Tensor:
        noticing = logps.as_subclass(_Noticing)
        sums.scored.append((noticing, targets, squares, aux_loss))
        return noticing

    with replaced(trainer, {"dpo_loss": dpo_loss}), token_logps(trainer, keep):
        yield sums


class _Noticing(Tensor):
    """Log-probs of tokens that note where the trainer writes zeros: outside the completions."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore
    ignored: Tensor | None = None

    def __setitem__(self, index: Any, value: Any) -> None:
        self.ignored = index
        super().__setitem__(index, value)


class _Sums(Passes):
    """What one call of `dpo_loss` received, and the passes that its sums come from."""

    def __init__(self, trainer: Any, batch: Mapping[str, Any]) -> None:
        super().__init__(trainer, batch)
        self.received: list[tuple[Tensor, ...]] = []
        self.scored: list[tuple[_Noticing, Tensor, Tensor | None, Tensor | None]] = []

    def log_ratios(self) -> dict[str, LogRatios]:
        """Log-ratios of chosen and rejected completions as `completions`, [2 * pairs].

        Raises:
            RuntimeError: If the trainer called `dpo_loss` in another way than TRL up to 0.28.
        """
        if len(self.received) != 1 or len(self.received[0]) != 4:
            calls = [len(call) for call in self.received]
            raise unknown_order(f"calls of dpo_loss with {calls} log-probs", "one with 4")
        chosen, rejected, *references = self.received[0]
        policy, reference = torch.cat([chosen, rejected]), torch.cat(references)
        passes = [self._pass(*scored) for scored in self.scored]
        if not passes or any(item is None or len(item.labels) != len(policy) for item in passes):
            # Another forward pass than TRL's, or rows without padding.
            return {"completions": LogRatios(policy, reference)}
        found = [item for item in passes if item is not None]
        ratios = log_ratios(found[0], found[1] if len(found) == 2 else reference)
        if getattr(self._trainer.args, "ld_alpha", None) is None:
            # Where `keep_end` cut the whole prompt, TRL's sums leave the first token out, though it counts it.
            ratios = replace(ratios, policy=policy, reference=reference)
        return {"completions": ratios}

    def aux_loss(self) -> Tensor | None:
        """Router loss of the policy's pass, a scalar, if the model has one."""
        return self.scored[0][3] if self.scored else None

    def _pass(
        self, logps: _Noticing, targets: Tensor, squares: Tensor | None, aux_loss: Tensor | None
    ) -> Pass | None:
        if logps.ignored is None:
            return None
        labels = torch.nn.functional.pad(targets.masked_fill(logps.ignored, IGNORE_INDEX), (1, 0))
        return Pass(labels, logps.as_subclass(Tensor), aux_loss, squares)
