"""Log-probs of a batch's completions under a model, however the batch lays out its tokens."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefloss.training import attention, distributed
from prefloss.training.batch import Structure
from prefloss.training.forward import ModelLogps, model_logps, unwrapped
from prefloss.training.packing import TARGETS, Arranged, Packed, pack

# Log-probs of the probe may differ by rounding alone, nats: in half precision, and in float32 for each square root of
# layers times width, by which rounding grows. The effect of a wrong mask grows much faster.
_HALF, _SINGLE = 5e-2, 2.5e-6

_verdicts: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def score(model: nn.Module, structure: Structure, inputs: Mapping[str, Any]) -> ModelLogps:
    """Log-prob of each target of a batch, [rows, T] as `structure.targets`.

    A packed batch is given to the model as it is if the model computes the same log-probs from it as from padded rows.
    That is tried once for each model, on the first two rows; where it fails, batches are laid out as padded
    rows, and a warning says why.

    Args:
        model: A causal language model, wrapped as it is trained.
        structure: Of the batch.
        inputs: The model's share of the batch.
    """
    if structure.packed is None:
        return model_logps(model, inputs, structure.targets)
    packed, policy = structure.packed, unwrapped(model)
    shares = packed.shares
    known = _verdicts.setdefault(policy, {})
    if shares not in known:
        reason = attention.why_not(policy, shares) or _tried(model, structure, shares)
        known[shares] = reason is None
        if reason is not None:
            what = "share a prompt" if shares else "train on packed batches"
            warnings.warn(
                f"layout: {type(policy).__name__} cannot {what}: {reason}. Its batches are laid out as padded rows.",
                UserWarning,
                stacklevel=2,
            )
    found = attention.arranged(policy, packed) if known[shares] else packed.duplicated()
    return _scored(model, found, structure.targets)


def _scored(model: nn.Module, found: Arranged, targets: Tensor) -> ModelLogps:
    return model_logps(model, found.inputs, targets, positions=found.positions)


def _tried(model: nn.Module, structure: Structure, shares: bool) -> str | None:
    """What is wrong with the model's log-probs of the first rows, packed, against padded rows; None if nothing.

    All processes make the same forward passes and come to the same verdict.
    """
    part, targets = _probe(structure, shares)
    policy, training = unwrapped(model), model.training
    model.eval()
    problem = None
    with torch.no_grad():
        padded = _scored(model, part.duplicated(), targets).logps
        try:
            ours = _scored(model, attention.arranged(policy, part, one_row=True), targets).logps
            apart = float((ours - padded).abs().max())
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            problem, apart = f"its forward refuses ({type(error).__name__}: {error})", float("inf")
    model.train(training)
    # NaN is apart, too.
    fails = problem is not None or not apart <= _tolerance(policy, targets.device)
    if not bool(distributed.all_sum(torch.tensor(int(fails), device=targets.device))):
        return None
    return problem or f"its log-probs differ from those of padded rows by {apart:.2g} nats"


def _probe(structure: Structure, shares: bool) -> tuple[Packed, Tensor]:
    """Of the first two rows, the first prompt with both completions, and the second row; with their targets.

    So a prompt is shared, where the layout shares any, and sequences lie side by side, whatever the batch has.
    """
    rows = list(itertools.islice(structure.completions({}), 2))
    (prompt, _), (_, other) = rows[0], rows[-1]
    examples = [[rows[0], (prompt, other)], [rows[-1]]]
    batch = pack(examples, [(0, 0), (0, 1), (1, 0)], shares, None)
    batch = {name: value.to(structure.targets.device) for name, value in batch.items()}
    return Packed.read(batch), batch[TARGETS]


def _tolerance(policy: nn.Module, device: torch.device) -> float:
    if next(policy.parameters()).dtype.itemsize == 2 or torch.is_autocast_enabled(device.type):
        return _HALF
    config: Any = policy.config
    config = config.get_text_config()
    return _SINGLE * max(64, config.num_hidden_layers * config.hidden_size) ** 0.5
