"""Log-probs of completions under a model, for every layout of a batch and for lists of rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from prefloss.arguments import instance, integer
from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import completion_targets
from prefloss.training import attention
from prefloss.training.attention import Way
from prefloss.training.batch import Rows
from prefloss.training.forward import ModelLogps, evaluating, model_logps, unwrapped
from prefloss.training.layouts import Packed
from prefloss.training.trial import Verdict, judge

# Training batches after which a model is tried again, as its weights have changed; then whenever they have doubled.
_REPEAT = 64


class _Known:
    """A verdict on packed batches, the training batches since then, and whether it was warned of."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.batches = 0
        self.warned = False


# By whether prompts are shared.
_known: WeakKeyDictionary[nn.Module, dict[bool, _Known]] = WeakKeyDictionary()


def batch_logps(model: nn.Module, rows: Rows) -> ModelLogps:
    """Log-prob of each target, [rows, T] as `rows.targets`.

    A packed batch runs packed if the model computes the same log-probs from it as from padded rows. That is tried at
    the model's first batch and again in training, on rows made for it (`trial`). Otherwise batches run as padded rows,
    and a warning says why, once.

    Args:
        model: A causal language model, wrapped as it is trained.
        rows: Of a batch.
    """
    if rows.packed is None:
        return model_logps(model, rows.inputs, rows.targets)
    way = _way(model, rows.packed)
    tokens = rows.packed.padded() if way is None else attention.arranged(unwrapped(model), rows.packed, way)
    return model_logps(model, tokens.inputs, rows.targets, positions=tokens.positions)


def _way(model: nn.Module, packed: Packed) -> Way | None:
    """How the model's attention keeps the sequences of a batch apart; None: as padded rows."""
    policy = unwrapped(model)
    by_sharing = _known.setdefault(policy, {})
    known = by_sharing.get(packed.shares)
    if known is None:
        known = by_sharing[packed.shares] = _Known(judge(model, packed.shares, packed.ids.device))
    elif model.training and torch.is_grad_enabled():
        # Evaluation does not count: its number of batches may differ between processes.
        known.batches += 1
        again = known.batches >= _REPEAT and known.batches & (known.batches - 1) == 0
        if again and known.verdict.way is not None:
            known.verdict = judge(model, packed.shares, packed.ids.device)
    way, longest, reason = known.verdict
    if way is not None and (longest is None or int(packed.positions.max()) < longest):
        return way
    if not known.warned:
        known.warned = True
        action = "share a prompt" if packed.shares else "train on packed batches"
        which = "Its batches" if way is None else "Batches with longer ones"
        warnings.warn(
            f"layout: {type(policy).__name__} cannot {action}: {reason}. {which} are laid out as padded rows.",
            UserWarning,
            stacklevel=3,
        )
    return None


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
    instance("model", model, nn.Module, "a causal language model of transformers")
    integer("batch_size", batch_size, 1)
    scores: dict[int, Score] = {}
    # Batches of similar lengths need little padding.
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            scores.update(zip(picked, _scores(model, [rows[i] for i in picked], padding), strict=True))
            on_batch(len(picked))
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
