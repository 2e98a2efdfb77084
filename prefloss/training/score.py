"""Log-probs of completions under a model, for every layout of a batch and for lists of rows."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import completion_targets
from prefloss.training import attention, distributed
from prefloss.training.batch import Rows
from prefloss.training.forward import ModelLogps, model_logps, unwrapped
from prefloss.training.layouts import TARGETS, Arranged, Packed, pack

# Rounding tolerance of the trial, nats: in half precision, and in float32 for each square root of layers times width.
# A wrong mask changes log-probs far more.
_HALF, _SINGLE = 5e-2, 2.5e-6

# For each model, whether it computes the same log-probs packed; by whether prompts are shared.
_verdicts: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def batch_logps(model: nn.Module, rows: Rows) -> ModelLogps:
    """Log-prob of each target, [rows, T] as `rows.targets`.

    A packed batch runs packed if the model computes the same log-probs from it as from padded rows. That is tried once
    for each model, on the first two rows. Where it fails, batches run as padded rows, and a warning says why.

    Args:
        model: A causal language model, wrapped as it is trained.
        rows: Of a batch.
    """
    if rows.packed is None:
        return model_logps(model, rows.inputs, rows.targets)
    packed, policy = rows.packed, unwrapped(model)
    verdicts = _verdicts.setdefault(policy, {})
    if packed.shares not in verdicts:
        reason = attention.unsupported(policy, packed.shares) or _trial(model, rows, packed.shares)
        verdicts[packed.shares] = reason is None
        if reason is not None:
            action = "share a prompt" if packed.shares else "train on packed batches"
            warnings.warn(
                f"layout: {type(policy).__name__} cannot {action}: {reason}. Its batches are laid out as padded rows.",
                UserWarning,
                stacklevel=2,
            )
    arranged = attention.arranged(policy, packed) if verdicts[packed.shares] else packed.padded()
    return _logps(model, arranged, rows.targets)


def _logps(model: nn.Module, arranged: Arranged, targets: Tensor) -> ModelLogps:
    return model_logps(model, arranged.inputs, targets, positions=arranged.positions)


def _trial(model: nn.Module, rows: Rows, shares: bool) -> str | None:
    """Compare packed with padded log-probs on the first rows; what is wrong, or None.

    All processes make the same forward passes and reach the same verdict.
    """
    packed, targets = _trial_rows(rows, shares)
    policy, training = unwrapped(model), model.training
    model.eval()
    problem = None
    with torch.no_grad():
        padded_logps = _logps(model, packed.padded(), targets).logps
        try:
            packed_logps = _logps(model, attention.arranged(policy, packed, one_row=True), targets).logps
            difference = float((packed_logps - padded_logps).abs().max())
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            problem, difference = f"its forward refuses ({type(error).__name__}: {error})", float("inf")
    model.train(training)
    # Written so that NaN fails too.
    fails = problem is not None or not difference <= _tolerance(policy, targets.device)
    if not bool(distributed.all_sum(torch.tensor(int(fails), device=targets.device))):
        return None
    return problem or f"its log-probs differ from those of padded rows by {difference:.2g} nats"


def _trial_rows(rows: Rows, shares: bool) -> tuple[Packed, Tensor]:
    """The first prompt with the completions of the first two rows, then the second row; with their targets.

    That way a prompt is shared, if the layout shares any, and two sequences lie side by side, whatever the batch holds.
    """
    first_two = list(itertools.islice(rows.token_ids(), 2))
    (prompt, _), (_, other) = first_two[0], first_two[-1]
    examples = [[first_two[0], (prompt, other)], [first_two[-1]]]
    batch = pack(examples, [(0, 0), (0, 1), (1, 0)], shares, None)
    batch = {name: value.to(rows.targets.device) for name, value in batch.items()}
    return Packed.of(batch), batch[TARGETS]


def _tolerance(policy: nn.Module, device: torch.device) -> float:
    if next(policy.parameters()).dtype.itemsize == 2 or torch.is_autocast_enabled(device.type):
        return _HALF
    config: Any = policy.config
    config = config.get_text_config()
    return _SINGLE * max(64, config.num_hidden_layers * config.hidden_size) ** 0.5


class Score(NamedTuple):
    """The score of one completion.

    Attributes:
        logp: Sum of its tokens' log-probs, nats.
        tokens: Number of tokens scored.
    """

    logp: float
    tokens: int


def score_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    padding: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Score completions in evaluation mode, without gradient.

    Args:
        model: A causal language model of transformers, on the device it runs on.
        rows: Token ids of prompt and completion, truncated as in training.
        batch_size: Rows of a forward pass.
        padding: Token id of the padding.
        on_batch: Called with the number of rows after each forward pass.

    Returns:
        One score per row, in their order.
    """
    training = model.training
    model.eval()
    scores: dict[int, Score] = {}
    # Batches of similar lengths need little padding.
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    try:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            scores.update(zip(picked, _scores(model, [rows[i] for i in picked], padding), strict=True))
            on_batch(len(picked))
    finally:
        model.train(training)
    return [scores[i] for i in range(len(rows))]


@torch.no_grad()
def _scores(model: nn.Module, rows: list[Encoded], padding: int) -> list[Score]:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in pad(rows, padding).items()}
    targets = completion_targets(batch["input_ids"], batch.pop("completion_mask"))
    logps = model_logps(model, batch, targets).logps
    # Summed in float64, so that the order of addition, which depends on the device, does not show.
    sums, tokens = logps.double().sum(-1).tolist(), (targets >= 0).sum(-1).tolist()
    return [Score(logp, count) for logp, count in zip(sums, tokens, strict=True)]
