"""Seam of TRL 0.29 to 1.14, and of KTOTrainer before: `selective_log_softmax(logits, labels)` of the trainer's module.

Each of its calls follows one forward pass and gives the log-prob of every token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from prefloss.integrations.binding import replaced
from prefloss.integrations.trl.passes import Pass, Passes, hooked
from prefloss.logratios import IGNORE_INDEX

# Where trainers call it; the last is a static method of KTOTrainer up to 1.5.
_CALLERS = ("_compute_loss", "concatenated_forward", "get_batch_logps")
_FUNCTIONS = ("selective_log_softmax", "selective_log_softmax_and_entropy")
# TRL 1.14 with `use_liger_kernel`: log-probs of completion tokens alone, from hidden states.
_CHUNKED = "_get_per_token_logps_and_entropies"

Keep = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def fits(trainer: type) -> bool:
    """Whether this seam is in a trainer."""
    return bool(modules_of(trainer)) and any(hasattr(trainer, name) for name in ("_compute_loss", "kto_loss"))


def modules_of(trainer: type) -> list[Any]:
    """The modules whose `selective_log_softmax` a trainer calls."""
    callers = [inspect.unwrap(getattr(trainer, name)) for name in _CALLERS if hasattr(trainer, name)]
    modules = [sys.modules.get(caller.__module__) for caller in callers]
    return [item for item in dict.fromkeys(modules) if hasattr(item, _FUNCTIONS[0])]


@contextmanager
def recorded(trainer: Any, batch: Mapping[str, Any]) -> Iterator[Passes]:
    """Collect the passes that `trainer` makes for `batch` inside."""
    passes = Passes(trainer, batch)
    expected = passes.expected()

    def keep(logps: Tensor, targets: Tensor, squares: Tensor | None, aux_loss: Tensor | None) -> Tensor:
        # TRL scores the prompt too; what a further pass would be is for `assign` to refuse.
        labels = torch.nn.functional.pad(targets, (1, 0))
        if len(passes.found) < len(expected):
            wanted = expected[len(passes.found)][1]
            if wanted.shape == labels.shape:
                labels = labels.masked_fill(wanted == IGNORE_INDEX, IGNORE_INDEX)
        passes.found.append(Pass(labels, logps, aux_loss, squares))
        return logps

    with token_logps(trainer, keep):
        yield passes


@contextmanager
def token_logps(trainer: Any, keep: Keep) -> Iterator[None]:
    """Hand the log-probs that a trainer computes inside to `keep`, and give the trainer what it returns.

    Args:
        trainer: The trainer.
        keep: Called with log-probs [rows, T], their token ids [rows, T], the log of the sum of squared probabilities
            [rows, T] if the trainer's `use_weighting` is set, and the router loss of the pass, if any.
    """
    router: list[Tensor | None] = [None]

    def note_router(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        router[0] = getattr(output, "aux_loss", None)

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def score(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(logits, labels, *args, **kwargs)
            squares = log_sum_sq(logits) if getattr(trainer, "use_weighting", False) else None
            if isinstance(result, tuple):
                return (keep(result[0], labels, squares, router[0]), *result[1:])
            return keep(result, labels, squares, router[0])

        return score

    own_chunked: Any = getattr(trainer, _CHUNKED, None)

    def chunked(model: Any, inputs: Any, input_ids: Tensor, completion_mask: Tensor) -> Any:
        logps, entropies, outputs = own_chunked(model, inputs, input_ids, completion_mask)
        logps = keep(logps, input_ids[:, 1:], None, getattr(outputs, "aux_loss", None))
        return logps, entropies, outputs

    with ExitStack() as stack:
        stack.enter_context(hooked(trainer, note_router))
        if own_chunked is not None:
            stack.enter_context(replaced(trainer, {_CHUNKED: chunked}))
        for module in modules_of(type(trainer)):
            names = [name for name in _FUNCTIONS if hasattr(module, name)]
            ours = {name: noting(getattr(module, name)) for name in names}
            stack.enter_context(replaced(module, ours))
        yield


@torch.no_grad()
def log_sum_sq(logits: Tensor) -> Tensor:
    """Log of the sum of squared probabilities, [...], of logits [..., V]."""
    return torch.logsumexp(2.0 * logits, dim=-1) - 2.0 * torch.logsumexp(logits, dim=-1)
