"""Feedback: completions with what people or models said of them, and how one kind of feedback becomes another."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefloss import arguments
from prefloss.logratios import LogRatios, PerToken


@dataclass(frozen=True, eq=False)
class Pairs:
    """A chosen against a rejected completion of the same prompt.

    Attributes:
        chosen: Log-ratios of the preferred completions, [pairs].
        rejected: Log-ratios of the others, [pairs].
        weight: Multiplies the loss of each pair, [pairs]; None is 1.
        score_chosen: Graded feedback on the chosen completion (reward or win probability), [pairs].
        score_rejected: The same for the rejected one, [pairs].
        gold: Log-ratios of a third completion, [pairs]: a gold answer, or a sample of the reference policy.
        embedding: Embedding of the prompts, [pairs, D].

    Raises:
        ValueError: If shapes or devices differ, only one side is scored, or (read on the CPU) a weight is below 0.
        TypeError: If a side is not a LogRatios, or a field holds something that is no number.

    Example:
        >>> pairs = Pairs(chosen=LogRatios.of([1.5]), rejected=LogRatios.of([-1.0]))
        >>> pairs.margin()
        tensor([2.5000])
    """

    chosen: LogRatios
    rejected: LogRatios
    weight: Tensor | None = None
    score_chosen: Tensor | None = None
    score_rejected: Tensor | None = None
    gold: LogRatios | None = None
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        """Check and convert the fields."""
        _check_log_ratios("chosen", self.chosen)
        _check_beside("rejected", self.rejected, self.chosen)
        if self.gold is not None:
            _check_beside("gold", self.gold, self.chosen)
        if self.embedding is not None:
            embedding = _as_values("embedding", self.embedding, self.chosen.device)
            if embedding.shape[:-1] != self.chosen.shape or embedding.ndim == 0:
                expected = [*self.chosen.shape, "D"]
                raise ValueError(f"embedding: got shape {list(embedding.shape)}, expected {expected}")
            object.__setattr__(self, "embedding", embedding)
        if (self.score_chosen is None) != (self.score_rejected is None):
            missing = "score_chosen" if self.score_chosen is None else "score_rejected"
            raise ValueError(f"{missing}: got None, expected scores for both sides or for neither")
        for name in ("weight", "score_chosen", "score_rejected"):
            _convert_values(self, name, self.chosen)

    @classmethod
    def of(cls, chosen: Any, rejected: Any, **fields: Any) -> Pairs:
        """Pairs from log-ratios given directly, [pairs], nats.

        Example:
            >>> Pairs.of(chosen=[5.0], rejected=[0.0]).margin()
            tensor([5.])
        """
        return cls(chosen=LogRatios.of(chosen), rejected=LogRatios.of(rejected), **fields)

    @property
    def shape(self) -> torch.Size:
        """One entry per pair."""
        return self.chosen.shape

    @property
    def valid(self) -> Tensor:
        """True where all completions have tokens, [pairs]."""
        empty = self.chosen.empty | self.rejected.empty
        return ~empty if self.gold is None else ~(empty | self.gold.empty)

    @property
    def parts(self) -> tuple[LogRatios, ...]:
        """All log-ratios that the loss may read."""
        return (self.chosen, self.rejected) if self.gold is None else (self.chosen, self.rejected, self.gold)

    def swapped(self) -> Pairs:
        """The same pairs with the preference reversed."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            score_chosen=self.score_rejected,
            score_rejected=self.score_chosen,
        )

    def margin(self, per_token: bool = False) -> Tensor:
        r"""Difference of log-ratios :math:`h_w - h_l`, [pairs], nats (nats per token if `per_token`)."""
        if arguments.flag("per_token", per_token):
            return self.chosen.h_mean - self.rejected.h_mean
        return self.chosen.h - self.rejected.h

    def to_labels(self) -> Labels:
        """Every chosen completion as an upvote, every rejected one as a downvote: [2 * pairs], chosen first.

        Example:
            >>> Pairs.of(chosen=[5.0], rejected=[0.0]).to_labels().desirable
            tensor([ True, False])
        """
        chosen, rejected = self.chosen.flatten(), self.rejected.flatten()
        desirable = torch.zeros(2 * len(chosen), dtype=torch.bool, device=chosen.device)
        desirable[: len(chosen)] = True
        return Labels(
            completions=LogRatios.cat([chosen, rejected]),
            desirable=desirable,
            weight=_cat_values(self.weight, self.weight),
            scores=_cat_values(self.score_chosen, self.score_rejected),
        )

    def to_rankings(self) -> Rankings:
        """Every pair as a group of two, the chosen completion first: [pairs, 2].

        Scores are those of the pairs, or 1 and 0.

        Raises:
            ValueError: If a chosen completion is not scored above the rejected one.

        Example:
            >>> Pairs.of(chosen=[5.0], rejected=[0.0]).to_rankings().scores
            tensor([[1., 0.]])
        """
        chosen, rejected = self.chosen.flatten(), self.rejected.flatten()
        better = torch.ones_like(chosen.policy) if self.score_chosen is None else self.score_chosen.flatten()
        worse = (
            torch.zeros_like(rejected.policy)
            if self.score_rejected is None
            else self.score_rejected.flatten()
        )
        if self.score_chosen is not None and bool((better <= worse).any()):
            raise ValueError(
                "score_chosen: got a score not above score_rejected, expected the chosen one scored higher"
            )
        count = len(chosen)
        order = torch.arange(2 * count, device=chosen.device).reshape(2, count).T
        return Rankings(
            completions=LogRatios.cat([chosen, rejected])[order],
            scores=torch.stack([better, worse], dim=-1),
            weight=None if self.weight is None else self.weight.flatten(),
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """One completion at a time, upvoted or downvoted.

    Attributes:
        completions: Log-ratios of the completions, [n].
        desirable: True for an upvote, [n], bool.
        weight: Multiplies the loss of each completion, [n]; None is 1.
        scores: Graded feedback (reward), [n].
        mismatched: Log-ratios of completions under prompts they do not belong to, any shape: what KTO estimates
            its KL baseline from.
        kl: KL baseline computed elsewhere, scalar or [n], nats.
        baseline: Value of the prompt that a score is measured against, [n]; alone may carry a gradient.

    Raises:
        ValueError: If shapes or devices differ, or (read on the CPU) a weight is below 0.
        TypeError: If `completions` is not a LogRatios or `desirable` not boolean.

    Example:
        >>> Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False]).valid
        tensor([True, True])
    """

    completions: LogRatios
    desirable: Tensor
    weight: Tensor | None = None
    scores: Tensor | None = None
    mismatched: LogRatios | None = None
    kl: Tensor | None = None
    baseline: Tensor | None = None

    def __post_init__(self) -> None:
        """Check and convert the fields."""
        _check_log_ratios("completions", self.completions)
        upvotes = "torch.bool (True for an upvote)"
        desirable = _as_bools("desirable", self.desirable, upvotes, self.completions)
        object.__setattr__(self, "desirable", desirable)
        for name in ("weight", "scores", "baseline"):
            _convert_values(self, name, self.completions)
        if self.mismatched is not None:
            _check_log_ratios("mismatched", self.mismatched)
            arguments.check_device("mismatched", self.mismatched, "completions", self._device)
        if self.kl is not None:
            kl = _as_values("kl", self.kl, self._device).detach()
            if kl.ndim != 0 and kl.shape != self.completions.shape:
                raise ValueError(
                    f"kl: got shape {list(kl.shape)}, expected a scalar or {list(self.completions.shape)}"
                )
            object.__setattr__(self, "kl", kl)

    @property
    def _device(self) -> torch.device:
        return self.completions.device

    @property
    def shape(self) -> torch.Size:
        """One entry per completion."""
        return self.completions.shape

    @property
    def valid(self) -> Tensor:
        """True where the completion has tokens, [n]."""
        return ~self.completions.empty

    @property
    def parts(self) -> tuple[LogRatios, ...]:
        """All log-ratios that the loss may read."""
        return (self.completions,) if self.mismatched is None else (self.completions, self.mismatched)


@dataclass(frozen=True, eq=False)
class Rankings:
    """A group of completions of one prompt, each with a score.

    Attributes:
        completions: Log-ratios, [groups, K].
        scores: Higher is better, [groups, K]; equal scores are a tie.
        mask: False where a group has fewer than K completions, [groups, K]; None is all True.
        weight: Multiplies the loss of each group, [groups]; None is 1.

    Raises:
        ValueError: If shapes or devices differ, or (read on the CPU) the score of a completion that is there is NaN or
            infinite, or a weight below 0.
        TypeError: If `completions` is not a LogRatios or `mask` not boolean.

    Example:
        >>> group = Rankings(completions=LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]])
        >>> group.to_pairs().margin()
        tensor([2.5000])
    """

    completions: LogRatios
    scores: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        """Check and convert the fields."""
        _check_log_ratios("completions", self.completions)
        shape = self.completions.shape
        if len(shape) != 2:
            raise ValueError(f"completions: got shape {list(shape)}, expected [groups, K]")
        _convert_values(self, "scores", self.completions)
        if self.scores is None:
            raise TypeError("scores: got None, expected a number for each completion, higher is better")
        if self.mask is not None:
            there = "torch.bool (False where there is no completion)"
            mask = _as_bools("mask", self.mask, there, self.completions)
            object.__setattr__(self, "mask", mask)
        if arguments.readable(self.scores):
            wrong = self.present & ~self.scores.isfinite()
            arguments.refuse("scores", self.scores, wrong, "a finite number for each completion")
        _convert_values(self, "weight", self.completions, "completions[:, 0]", shape[:1])

    @property
    def shape(self) -> torch.Size:
        """One entry per group."""
        return self.completions.shape[:1]

    @property
    def present(self) -> Tensor:
        """True at completions that exist and have tokens, [groups, K]."""
        present = ~self.completions.empty
        return present if self.mask is None else present & self.mask

    @property
    def valid(self) -> Tensor:
        """True where a group has at least two completions to compare, [groups]."""
        return self.present.sum(-1) >= 2

    @property
    def parts(self) -> tuple[LogRatios, ...]:
        """All log-ratios that the loss may read."""
        return (self.completions,)

    def to_pairs(self, how: str = "best_worst") -> Pairs:
        """Pairs of completions of the same group, the better one chosen; ties and absent completions give none.

        Args:
            how: `"best_worst"` (at most one pair a group), `"adjacent"` (each against the next in rank) or
                `"all"` (each against every worse one).

        Returns:
            Pairs with scores, group by group; a group's weight goes to each of its pairs.

        Raises:
            ValueError: If `how` is another word.
        """
        if how not in RANKINGS_AS:
            raise ValueError(f"how: got {how!r}, expected {', '.join(map(repr, RANKINGS_AS))}")
        order = self.scores.masked_fill(~self.present, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        count = order.shape[-1]
        last = (self.present.sum(-1) - 1).clamp(min=0)
        grid = torch.ones(count, count, dtype=torch.bool, device=order.device)
        if how == "best_worst":
            picked = torch.zeros_like(grid).expand(len(order), -1, -1).clone()
            picked[torch.arange(len(order), device=order.device), 0, last] = True
        elif how == "adjacent":
            picked = (grid.triu(1) & ~grid.triu(2)).expand(len(order), -1, -1)
        else:
            picked = grid.triu(1).expand(len(order), -1, -1)
        sorted_scores = self.scores.gather(-1, order)
        sorted_present = self.present.gather(-1, order)
        better = sorted_scores.unsqueeze(-1) > sorted_scores.unsqueeze(-2)
        both = sorted_present.unsqueeze(-1) & sorted_present.unsqueeze(-2)
        group, winner, loser = (picked & better & both).nonzero(as_tuple=True)
        winner, loser = order[group, winner], order[group, loser]
        return Pairs(
            chosen=self.completions[group, winner],
            rejected=self.completions[group, loser],
            weight=None if self.weight is None else self.weight[group],
            score_chosen=self.scores[group, winner],
            score_rejected=self.scores[group, loser],
        )


Feedback = Pairs | Labels | Rankings
KINDS: tuple[type, ...] = (Pairs, Labels, Rankings)

SIDES: Mapping[type, tuple[str, ...]] = {
    Pairs: ("chosen", "rejected"),
    Labels: ("completion",),
    Rankings: ("completions",),
}
"""Columns that hold the completions of a row, by kind of feedback."""


@dataclass(frozen=True)
class Field:
    """A value that comes with the completions: its name in feedback, in data sets and in the traits of losses.

    Attributes:
        kind: Class that holds it: `Pairs`, `Labels` or `Rankings`; `LogRatios` or `PerToken` for what every completion
            has.
        name: Attribute of that class, and key of a batch.
        column: Column of a data set; None if it is computed, never stored.
        need: Entry of a loss's `needs` or `reads` that covers it; None if every loss of the kind uses it.
        meaning: One line for documentation and errors.
        required: True if every row must have it.
        old_column: Former name of the column, still accepted with a warning.
    """

    kind: type
    name: str
    column: str | None
    need: str | None
    meaning: str
    required: bool = False
    old_column: str | None = None


FIELDS: tuple[Field, ...] = (
    Field(Pairs, "weight", "weight", None, "multiplies the loss of the pair"),
    Field(Pairs, "score_chosen", "score_chosen", "scores", "score of the chosen completion"),
    Field(Pairs, "score_rejected", "score_rejected", "scores", "score of the rejected completion"),
    Field(Pairs, "gold", None, "gold", "log-ratios of a third completion of each prompt"),
    Field(Pairs, "embedding", None, "embedding", "embedding of each prompt"),
    Field(Labels, "desirable", "label", None, "true for an upvote, false for a downvote", required=True),
    Field(Labels, "weight", "weight", None, "multiplies the loss of the completion"),
    Field(Labels, "scores", "score", "scores", "score of the completion", old_column="scores"),
    Field(Labels, "mismatched", None, "mismatched", "log-ratios of completions under other prompts"),
    Field(Labels, "kl", "kl", "kl", "KL baseline computed elsewhere, nats"),
    Field(Labels, "baseline", "baseline", "baseline", "value of the prompt"),
    Field(Rankings, "scores", "scores", None, "a score of each completion, higher is better", required=True),
    Field(Rankings, "weight", "weight", None, "multiplies the loss of the group"),
    Field(LogRatios, "tokens", None, "tokens", "token counts of the completions"),
    Field(LogRatios, "per_token", None, "per_token", "log-probs of each token (keep_per_token=True)"),
    Field(PerToken, "log_sum_sq", None, "per_token.log_sum_sq", "log of the sum of squared probabilities"),
    Field(PerToken, "kl", None, "per_token.kl", "KL(reference || policy) over the vocabulary"),
    Field(
        PerToken, "reverse_kl", None, "per_token.reverse_kl", "KL(policy || reference) over the vocabulary"
    ),
    Field(
        PerToken,
        "reference_entropy",
        None,
        "per_token.reference_entropy",
        "the reference's normalised entropy",
    ),
    Field(PerToken, "weight", None, "per_token.weight", "importance weight of each token"),
)
"""Every value beside the log-probs. Collators, readers, checks, the kit and the docs derive their tables from it."""

NEEDS: tuple[str, ...] = tuple(dict.fromkeys(field.need for field in FIELDS if field.need))
"""Names that a loss may list in `needs` and `reads`."""

RANKINGS_AS = ("best_worst", "adjacent", "all")
"""How rankings become pairs, see `Rankings.to_pairs`."""


def fields_of(kind: type) -> tuple[Field, ...]:
    """The entries of `FIELDS` for one kind of feedback.

    Example:
        >>> [field.column for field in fields_of(Pairs) if field.column]
        ['weight', 'score_chosen', 'score_rejected']
    """
    return tuple(field for field in FIELDS if field.kind is kind)


@functools.cache
def columns_of(kind: type) -> tuple[str, ...]:
    """Columns that a data set of this kind must have, the prompt first.

    Example:
        >>> columns_of(Labels)
        ('prompt', 'completion', 'label')
    """
    required = (field.column for field in fields_of(kind) if field.required and field.column)
    return ("prompt", *SIDES[kind], *required)


@functools.cache
def optional_fields(kind: type) -> tuple[Field, ...]:
    """Fields that a data set of this kind may have: one number a row.

    Example:
        >>> [field.name for field in optional_fields(Labels)]
        ['weight', 'scores', 'kl', 'baseline']
    """
    return tuple(field for field in fields_of(kind) if field.column and not field.required)


def meaning_of(need: str, kind: type) -> str:
    """What an entry of `NEEDS` stands for in one kind of feedback, in words.

    Example:
        >>> meaning_of("gold", Pairs)
        'log-ratios of a third completion of each prompt (Pairs.gold)'
    """
    return " and ".join(
        f"{field.meaning} ({field.kind.__name__}.{field.name})" for field in _covered(need, kind)
    )


def has(feedback: Feedback, need: str) -> bool:
    """Whether feedback carries what an entry of `NEEDS` names, for all its completions.

    Example:
        >>> has(Pairs.of([1.5], [-1.0]), "tokens")
        False
    """
    fields = _covered(need, type(feedback))
    rows = [part.per_token for part in feedback.parts]
    owners = {type(feedback): (feedback,), LogRatios: feedback.parts, PerToken: rows}
    return bool(fields) and all(
        getattr(owner, field.name, None) is not None for field in fields for owner in owners[field.kind]
    )


def _covered(need: str, kind: type) -> list[Field]:
    return [field for field in FIELDS if field.need == need and field.kind in (kind, LogRatios, PerToken)]


def required(owner: Any, name: str) -> Any:
    """A field of feedback, of log-ratios or of their per-token rows.

    Raises:
        ValueError: If it is None.

    Example:
        >>> required(LogRatios.of([1.5], tokens=[10]), "tokens")
        tensor([10])
    """
    value = getattr(owner, name)
    if value is None:
        meanings = [field.meaning for field in FIELDS if isinstance(owner, field.kind) and field.name == name]
        expected = meanings[0] if meanings else "log-probs, nats"
        raise ValueError(f"{type(owner).__name__}.{name}: got None, expected {expected}")
    return value


def convert(feedback: Any, kind: type, rankings_as: str | None = None) -> Any:
    """Feedback in the kind that a loss takes: pairs as labels or rankings, rankings as pairs.

    Args:
        feedback: `Pairs`, `Labels` or `Rankings`.
        kind: One of these classes.
        rankings_as: How rankings become pairs, as `Rankings.to_pairs` takes it: `"best_worst"`, `"adjacent"` or
            `"all"`.

    Returns:
        The feedback itself if it is of that kind.

    Raises:
        TypeError: If the kind does not follow from the feedback, or rankings become pairs and `rankings_as` is None.
        ValueError: If `rankings_as` is unknown, or pairs become rankings and a chosen completion is not scored above
            the rejected one.

    Example:
        >>> convert(Pairs.of([1.5], [-1.0]), Labels).desirable
        tensor([ True, False])
    """
    arguments.instance("kind", kind, type, "Pairs, Labels or Rankings")
    if isinstance(feedback, kind):
        return feedback
    mismatch = f"feedback: got {type(feedback).__name__}, expected {kind.__name__}"
    if isinstance(feedback, Rankings):
        if rankings_as is None:
            raise TypeError(
                f"{mismatch}; say which pairs to make of rankings with rankings_as="
                f"{' | '.join(map(repr, RANKINGS_AS))}, or choose a loss that takes Rankings, such as 'dpo_pl'"
            )
        return convert(feedback.to_pairs(rankings_as), kind)
    if isinstance(feedback, Pairs) and kind in (Labels, Rankings):
        return feedback.to_labels() if kind is Labels else feedback.to_rankings()
    if isinstance(feedback, Labels):
        raise TypeError(
            f"{mismatch}; single labels do not say what to compare a completion with: choose a loss that takes "
            "Labels, such as 'kto'"
        )
    raise TypeError(mismatch)


def _check_log_ratios(name: str, value: Any) -> None:
    arguments.instance(name, value, LogRatios, "LogRatios(policy=, reference=, tokens=)")


def _check_beside(name: str, value: Any, chosen: LogRatios) -> None:
    _check_log_ratios(name, value)
    arguments.check_like(name, value, "chosen", chosen)


def _as_values(name: str, value: Any, device: torch.device) -> Tensor:
    value = arguments.tensor(name, value, "real numbers", device, floats=True)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected real numbers")
    arguments.check_device(name, value, "policy", device)
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _as_bools(name: str, value: Any, expected: str, like: LogRatios) -> Tensor:
    bools = arguments.tensor(name, value, expected, like.device)
    if not bools.numel() and not isinstance(value, Tensor):
        # The dtype of an empty list means nothing.
        bools = bools.bool()
    if bools.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {bools.dtype}, expected {expected}")
    arguments.check_like(name, bools, "completions", like)
    return bools


def _convert_values(
    feedback: Any, name: str, like: LogRatios, other: str = "policy", shape: torch.Size | None = None
) -> None:
    """Check a field of numbers. Scores and weights are data without gradient; a baseline may come from a model."""
    value = getattr(feedback, name)
    if value is None:
        return
    value = _as_values(name, value, like.device)
    arguments.check_shape(name, value, other, like.shape if shape is None else shape)
    if name == "weight" and arguments.readable(value):
        arguments.refuse(name, value, ~((value >= 0) & (value < math.inf)), "a finite number >= 0")
    object.__setattr__(feedback, name, value if name == "baseline" else value.detach())


def _cat_values(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return None
    return torch.cat([first.flatten(), second.flatten()])
