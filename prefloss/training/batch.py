"""A batch of preferences: rows of tokens, which rows are compared, and what people said about them.

The rows are one padded block, or one row without padding (`layouts`), for every kind of feedback. A few tensors beside
them say which rows belong together. A batch is a dict of tensors, so that any trainer can move it to a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prefloss.arguments import check_integer, instance, readable, refuse
from prefloss.feedback import SIDES, Feedback, Labels, Pairs, Rankings, optional_fields
from prefloss.logratios import IGNORE_INDEX, LogRatios, completion_targets
from prefloss.training import layouts
from prefloss.training.layouts import Packed

SIDE_ROWS: Mapping[type, tuple[str, ...]] = {
    Pairs: ("chosen_rows", "rejected_rows"),
    Labels: ("completion_rows",),
    Rankings: ("group_rows",),
}
"""Row numbers by kind of feedback: [pairs] twice, [n], or [groups, K] with -1 where a group has fewer than K."""

REFERENCE = "ref_logps"
"""Reference log-probs computed beforehand, [rows], nats."""

COUNTS = "prefloss_counts"
"""Examples that each term of the loss counts in the whole optimizer step on all ranks, then its number of
micro-batches, [terms + 1]."""

MISMATCHED = "kl_"
"""Prefix of the tokens of prompts paired with completions of other examples."""

_OTHER_NAMES = frozenset(
    ("completion_mask", "label", "scores", "labels", REFERENCE, COUNTS, layouts.PROMPTS, *layouts.NAMES)
)


@dataclass(frozen=True)
class Rows:
    """The tokens of a batch.

    Attributes:
        inputs: Keyword arguments of the model; of a packed batch, what is not in `packed`.
        targets: Token that each position predicts, [rows, T], `IGNORE_INDEX` where nothing is scored. In a packed batch
            they are left-aligned in each row.
        packed: The tokens of a batch without padding, or None.
        prompts: Of padded rows that may run in another layout, what they share (`layouts.PROMPTS`); or None.
    """

    inputs: dict[str, Any]
    targets: Tensor
    packed: Packed | None = None
    prompts: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Completion tokens of each row, [rows]."""
        return (self.targets >= 0).sum(-1)

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        packed = None if self.packed is None else self.packed.to(device)
        prompts = None if self.prompts is None else self.prompts.to(device)
        return Rows(inputs, self.targets.to(device), packed, prompts)

    def token_ids(self) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and completion ids of each row, truncated as in the batch."""
        if self.packed is not None:
            rows = [self.packed.ids[tokens].tolist() for tokens in self.packed.whole_rows()]
        else:
            mask = self.inputs["attention_mask"].bool()
            rows = [ids[kept].tolist() for ids, kept in zip(self.inputs["input_ids"], mask, strict=True)]
        for ids, count in zip(rows, self.tokens.tolist(), strict=True):
            yield ids[: len(ids) - count], ids[len(ids) - count :]


class PreferenceBatch(dict[str, Any]):
    """The tensors of a batch by name, with what they mean. `PreferenceCollator` makes it.

    Trainers move a batch by building another one of its class from moved tensors.
    """

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> PreferenceBatch:
        """A batch as a trainer hands it over, checked.

        Raises:
            TypeError: If it is no mapping.
            ValueError: If it does not come from a `PreferenceCollator`, or was sliced or joined since.
        """
        if not isinstance(batch, PreferenceBatch):
            instance("batch", batch, Mapping, "a batch that a PreferenceCollator made")
        typed = batch if isinstance(batch, PreferenceBatch) else cls(batch)
        typed._check_whole()
        return typed

    @staticmethod
    def recognizes(batch: Mapping[str, Any]) -> bool:
        """Whether the names are those that `PreferenceCollator` writes."""
        return _kind(batch) is not None and bool({"completion_mask", layouts.SOURCES} & batch.keys())

    @cached_property
    def kind(self) -> type:
        """`Pairs`, `Labels` or `Rankings`."""
        kind = _kind(self)
        if kind is None or not self.recognizes(self):
            raise ValueError(
                f"batch: got {sorted(map(str, self))}, expected what PreferenceCollator writes; give the trainer "
                "data_collator=PreferenceCollator(tokenizer)"
            )
        return kind

    @cached_property
    def rows(self) -> Rows:
        """The rows to train on."""
        return self._rows({name: value for name, value in self.items() if not name.startswith(MISMATCHED)})

    @cached_property
    def mismatched(self) -> Rows | None:
        """Prompts with the completions of other examples, for KTO's estimate of the KL; None if there are none."""
        prefixed = {name for name in self if name.startswith(MISMATCHED)}
        if not prefixed:
            return None
        return self._rows({name.removeprefix(MISMATCHED): self[name] for name in prefixed})

    @property
    def sides(self) -> list[Tensor]:
        """Row numbers of each side, see `SIDE_ROWS`."""
        return [self[name] for name in SIDE_ROWS[self.kind]]

    @property
    def examples(self) -> int:
        """Number of pairs, labelled completions or groups."""
        return len(self.sides[0])

    def feedback(
        self, ratios: LogRatios, mismatched: LogRatios | None = None, *, examples: int | None = None
    ) -> Feedback:
        """The feedback of the batch.

        Args:
            ratios: Log-ratios of its rows, [rows].
            mismatched: Log-ratios of the mismatched rows.
            examples: Only the first so many examples; None for all.
        """
        sides = [side[:examples] for side in self.sides]
        names = [field.name for field in optional_fields(self.kind) if field.name in self]
        values = {name: self[name][:examples] for name in names}
        if self.kind is Pairs:
            return Pairs(ratios[sides[0]], ratios[sides[1]], **values)
        if self.kind is Labels:
            desirable = self["label"][:examples].bool()
            return Labels(ratios[sides[0]], desirable, mismatched=mismatched, **values)
        scores = self["scores"][:examples]
        return Rankings(ratios[sides[0].clamp(min=0)], scores, mask=sides[0] >= 0, **values)

    def blank(self) -> Feedback:
        """The same feedback with every log-prob 0: enough to count examples."""
        zeros = torch.zeros(len(self.rows.targets), device=self.rows.targets.device)
        return self.feedback(LogRatios(zeros, zeros, self.rows.tokens))

    def per_example(self, values: Tensor) -> Tensor:
        """Values of rows, [rows], by example: [pairs, 2], [n], or [groups, K] with `IGNORE_INDEX` where none is."""
        if self.kind is Pairs:
            return torch.stack([values[side] for side in self.sides], dim=-1)
        side = self.sides[0]
        return torch.where(side >= 0, values[side.clamp(min=0)], float(IGNORE_INDEX))

    def row_names(self) -> dict[int, str]:
        """What each row is to the user, for messages."""
        sides = [side.tolist() for side in self.sides]
        if self.kind is Pairs:
            return {
                row: f"{side} completion of example {i}"
                for side, rows in zip(SIDES[Pairs], sides, strict=True)
                for i, row in enumerate(rows)
            }
        groups = [row if isinstance(row, list) else [row] for row in sides[0]]
        return {
            row: f"completion {j} of example {i}"
            for i, group in enumerate(groups)
            for j, row in enumerate(group)
        }

    def _rows(self, tensors: Mapping[str, Any]) -> Rows:
        optional = {field.name for field in optional_fields(self.kind)}
        ours = _OTHER_NAMES | optional | set(SIDE_ROWS[self.kind])
        inputs = {name: value for name, value in tensors.items() if name not in ours}
        if layouts.SOURCES in tensors:
            return Rows(inputs, tensors[layouts.TARGETS], Packed.of(tensors))
        targets = completion_targets(tensors["input_ids"], tensors["completion_mask"])
        return Rows(inputs, targets, prompts=tensors.get(layouts.PROMPTS))

    def _check_whole(self) -> None:
        """Refuse a batch whose tensors are not those of a collator, or were sliced or joined.

        Raises:
            TypeError: If one is absent or something else.
            ValueError: If the number of rows does not fit the examples, or there is no such row.
        """
        tokens = (*layouts.NAMES, "position_ids") if layouts.SOURCES in self else ("completion_mask",)
        for name in ("input_ids", *SIDE_ROWS[self.kind], *tokens):
            instance(f"batch: {name}", self.get(name), Tensor, "a tensor as PreferenceCollator writes it")
        if self.kind is Rankings:
            # The number of completions in each group is on the device; shapes are known without a wait.
            fits = self["group_rows"].shape == self["scores"].shape
        else:
            fits = len(self.rows.targets) == len(SIDE_ROWS[self.kind]) * self.examples
        if not fits:
            raise ValueError(
                f"batch: got {len(self.rows.targets)} rows for {self.examples} examples; the tensors of a "
                "PreferenceCollator's batch belong together and cannot be sliced or joined; accelerate does so with "
                "streamed data: set accelerator_config={'dispatch_batches': False}"
            )
        count, lowest = len(self.rows.targets), -1 if self.kind is Rankings else 0
        for name in SIDE_ROWS[self.kind]:
            rows = self[name]
            check_integer(f"batch: {name}", rows, "row numbers")
            if readable(rows):
                refuse(
                    f"batch: {name}", rows, (rows < lowest) | (rows >= count), f"row numbers below {count}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the tensors alone, not what was derived from them."""
        return type(self), (dict(self),)


def _kind(batch: Mapping[str, Any]) -> type | None:
    return next((kind for kind, names in SIDE_ROWS.items() if all(name in batch for name in names)), None)
