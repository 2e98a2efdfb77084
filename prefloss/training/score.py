"""Log-probs of completions under a model, for every layout of a batch and for lists of rows."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefloss.arguments import instance, integer
from prefloss.data.tokens import Encoded, pad
from prefloss.logratios import completion_targets
from prefloss.training import attention, distributed
from prefloss.training.attention import Way
from prefloss.training.auto_layout import Choice, Lengths, choose
from prefloss.training.batch import PreferenceBatch, Rows
from prefloss.training.forward import ModelLogps, evaluating, model_logps, unwrapped
from prefloss.training.layouts import Packed
from prefloss.training.trial import Verdict, judge

logger = logging.getLogger(__name__)

# Training batches after which a model is tried again, as its weights have changed; then whenever they have doubled.
_REPEAT = 64


class _Known:
    """What is known of a model: verdicts by whether prompts are shared, and the layout chosen for it."""

    def __init__(self) -> None:
        self.verdicts: dict[bool, Verdict] = {}
        # Training batches by what they counted for: a verdict, or (None) a choice.
        self.batches: Counter[bool | None] = Counter()
        self.choice: Choice | None = None
        self.said: set[object] = set()

    def due(self, model: nn.Module, what: bool | None) -> bool:
        """Count a batch; whether a verdict or choice of an earlier one is made again."""
        # Evaluation does not count: its number of batches may differ between processes.
        if not (model.training and torch.is_grad_enabled()):
            return False
        self.batches[what] += 1
        count = self.batches[what]
        return count >= _REPEAT and count & (count - 1) == 0


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def batch_logps(model: nn.Module, rows: Rows) -> ModelLogps:
    """Log-prob of each target, [rows, T] as `rows.targets`.

    A packed batch runs packed if the model computes the same log-probs from it as from padded rows. That is tried at
    the model's first batch and again in training, on rows made for it (`trial`). Otherwise batches run as padded rows,
    and a warning says why, once. Padded rows that may run in another layout do where that takes less time
    (`explain_layout`); a line of the log says so.

    Args:
        model: A causal language model, wrapped as it is trained.
        rows: Of a batch.
    """
    packed, way = rows.packed, None
    if rows.prompts is not None and rows.inputs.keys() == {"input_ids", "attention_mask"}:
        layout = _chosen(model, rows.inputs["attention_mask"], rows.prompts).layout
        if layout != "padded":
            packed = Packed.of_padded(rows.inputs, rows.prompts, layout == "shared_prefix")
    if packed is not None:
        way = _way(model, packed)
    if packed is not None and way is not None:
        tokens = attention.arranged(unwrapped(model), packed, way)
    elif rows.packed is not None:
        tokens = rows.packed.padded()
    else:
        return model_logps(model, rows.inputs, rows.targets)
    return model_logps(model, tokens.inputs, rows.targets, positions=tokens.positions)


def explain_layout(model: nn.Module, batch: Mapping[str, Any]) -> Choice:
    """The layout that a batch of `PreferenceCollator(layout="auto")` takes with a model, and why.

    In a training on several processes, every process must call this.

    Args:
        model: A causal language model of transformers, on the device it runs on, wrapped as it is trained.
        batch: Of the collator.

    Returns:
        The choice; `print` it.

    Raises:
        ValueError: If the batch has a layout already.
    """
    instance("model", model, nn.Module, "a causal language model of transformers")
    rows = PreferenceBatch.of(batch).rows
    if rows.prompts is None:
        raise ValueError("batch: got one with a layout, expected one of PreferenceCollator(layout='auto')")
    device = next(model.parameters()).device
    lengths = Lengths.of(rows.inputs["attention_mask"], rows.prompts)
    return choose(model, lengths, device, lambda shares: _verdict(model, shares, device))


def _chosen(model: nn.Module, mask: Tensor, prompts: Tensor) -> Choice:
    """The layout for padded rows with this attention mask, [rows, T]."""
    known = _of(model)
    # Processes must choose together, so they do not at each batch.
    again = known.due(model, None) or distributed.size() == 1
    if known.choice is None or again:
        device = mask.device
        known.choice = choose(
            model, Lengths.of(mask, prompts), device, lambda shares: _verdict(model, shares, device)
        )
        if known.choice.layout not in known.said and distributed.rank() == 0:
            known.said.add(known.choice.layout)
            logger.info("%s: %s", type(unwrapped(model)).__name__, known.choice)
    return known.choice


def _of(model: nn.Module) -> _Known:
    return _known.setdefault(unwrapped(model), _Known())


def _verdict(model: nn.Module, shares: bool, device: torch.device) -> Verdict:
    known = _of(model)
    if shares not in known.verdicts:
        known.verdicts[shares] = judge(model, shares, device)
    return known.verdicts[shares]


def _way(model: nn.Module, packed: Packed) -> Way | None:
    """How the model's attention keeps the sequences of a batch apart; None: as padded rows."""
    known, shares, device = _of(model), packed.shares, packed.ids.device
    if shares in known.verdicts and known.due(model, shares) and known.verdicts[shares].way is not None:
        del known.verdicts[shares]
    way, longest, reason = _verdict(model, shares, device)
    if way is not None and (longest is None or int(packed.positions.max()) < longest):
        return way
    if shares not in known.said:
        known.said.add(shares)
        action = "share a prompt" if shares else "train on packed batches"
        which = "Its batches" if way is None else "Batches with longer ones"
        name = type(unwrapped(model)).__name__
        warnings.warn(
            f"layout: {name} cannot {action}: {reason}. {which} are laid out as padded rows.",
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
