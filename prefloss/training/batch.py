"""The structure of a batch: which rows are compared with which, what people said of them, and who counts.

A batch is one padded block of rows, or one row without padding (`_packing`), whatever the feedback; a few tensors
beside it say which rows belong together. The collator writes them, the training step takes them out again before the
model sees the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import IGNORE_INDEX, LogRatios, completion_targets
from prefloss.registry import Loss
from prefloss.registry import WeightedSum as Composite
from prefloss.training import packing
from prefloss.training.packing import Packed

ROWS: Mapping[type, tuple[str, ...]] = {
    Pairs: ("chosen_rows", "rejected_rows"),
    Labels: ("completion_rows",),
    Rankings: ("group_rows",),
}
"""Index tensors of each kind: [pairs] twice, [n], or [groups, K] with -1 where a group has fewer than K."""

VALUES: Mapping[type, tuple[str, ...]] = {
    Pairs: ("weight", "score_chosen", "score_rejected"),
    Labels: ("weight", "scores", "kl", "baseline"),
    Rankings: ("weight",),
}
"""Tensors of optional feedback, one value per example."""

REFERENCE = "ref_logps"
"""Reference log-probs computed beforehand, [rows], nats."""

COUNTS = "prefloss_counts"
"""Examples that each term of the loss counts in the whole optimizer step, on all ranks, and its micro-batches,
[terms + 1]."""

MISMATCHED = "kl_"
"""Begins the names of the tokens of prompts with the completions of other examples."""

_OTHERS = ("completion_mask", "label", "scores", "labels", REFERENCE, COUNTS, *packing.NAMES)
_HOWS = ("all", "adjacent", "best_worst")


@dataclass(frozen=True)
class Structure:
    """What a batch holds beside the model's inputs.

    Attributes:
        kind: `Pairs`, `Labels` or `Rankings`.
        targets: Token that each position predicts, [rows, T], `IGNORE_INDEX` where nothing is scored.
        items: The other tensors by name.
        packed: The tokens of a batch without padding; then `targets` are the first of each row.
        mismatched: The same of prompts with the completions of other examples, and what is the model's of those.
    """

    kind: type
    targets: Tensor
    items: Mapping[str, Tensor]
    packed: Packed | None = None
    mismatched: tuple[Structure, dict[str, Any]] | None = None

    @classmethod
    def split(cls, inputs: Mapping[str, Any]) -> tuple[Structure, dict[str, Any]]:
        """The structure of a batch, and what is the model's.

        Raises:
            ValueError: If the batch was not made by a `PreferenceCollator`, or by something that writes as it does.
        """
        kind = next((kind for kind, names in ROWS.items() if all(name in inputs for name in names)), None)
        if kind is None or not {"completion_mask", packing.SOURCES} & inputs.keys():
            raise ValueError(
                f"batch: got {sorted(inputs)}, expected what PreferenceCollator writes; give the trainer "
                "data_collator=PreferenceCollator(tokenizer)"
            )
        apart = {name: value for name, value in inputs.items() if name.startswith(MISMATCHED)}
        own = {*_OTHERS, *apart, *(name for names in (*ROWS.values(), *VALUES.values()) for name in names)}
        items = {name: value for name, value in inputs.items() if name in own and name not in apart}
        of_model = {name: value for name, value in inputs.items() if name not in own}
        found = cls._of_tokens(kind, inputs, items)
        _check_whole(found)
        if apart:
            tokens = {name.removeprefix(MISMATCHED): value for name, value in apart.items()}
            other = cls._of_tokens(kind, tokens, {"completion_rows": items["completion_rows"]})
            rest = {name: value for name, value in tokens.items() if name not in own}
            found = replace(found, mismatched=(other, rest))
        return found, of_model

    @classmethod
    def _of_tokens(cls, kind: type, tokens: Mapping[str, Any], items: Mapping[str, Tensor]) -> Structure:
        if packing.SOURCES in tokens:
            return cls(kind, tokens[packing.TARGETS], items, Packed.read(tokens))
        return cls(kind, completion_targets(tokens["input_ids"], tokens["completion_mask"]), items)

    @property
    def tokens(self) -> Tensor:
        """Completion tokens of each row, [rows]."""
        return (self.targets >= 0).sum(-1)

    @property
    def examples(self) -> int:
        """Number of pairs, labelled completions or groups."""
        return len(self.items[ROWS[self.kind][0]])

    def first(self, count: int) -> Structure:
        """The same rows, with the first examples alone."""
        by_example = {*ROWS[self.kind], *VALUES[self.kind], "label", "scores", "labels"}
        items = {name: value[:count] if name in by_example else value for name, value in self.items.items()}
        return replace(self, items=items)

    def completions(self, inputs: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids of prompt and completion of each row, cut as the batch cut them.

        Args:
            inputs: The model's share of the batch.
        """
        if self.packed is not None:
            rows = [self.packed.ids[places].tolist() for places in self.packed.whole_rows()]
        else:
            mask = inputs["attention_mask"].bool()
            rows = [ids[kept].tolist() for ids, kept in zip(inputs["input_ids"], mask, strict=True)]
        for ids, count in zip(rows, self.tokens.tolist(), strict=True):
            yield ids[: len(ids) - count], ids[len(ids) - count :]

    def per_example(self, values: Tensor) -> Tensor:
        """Values of rows, [rows], by example: [pairs, 2], [n], or [groups, K] with `IGNORE_INDEX` where none is."""
        sides = [self.items[name] for name in ROWS[self.kind]]
        if self.kind is Pairs:
            return torch.stack([values[side] for side in sides], dim=-1)
        return torch.where(sides[0] >= 0, values[sides[0].clamp(min=0)], float(IGNORE_INDEX))

    def feedback(self, ratios: LogRatios, mismatched: LogRatios | None = None) -> Feedback:
        """The feedback of the batch from the log-ratios of its rows, [rows], and of mismatched completions."""
        sides = [self.items[name] for name in ROWS[self.kind]]
        values: dict[str, Any] = {name: self.items.get(name) for name in VALUES[self.kind]}
        if self.kind is Pairs:
            return Pairs(ratios[sides[0]], ratios[sides[1]], **values)
        if self.kind is Labels:
            return Labels(ratios[sides[0]], self.items["label"].bool(), mismatched=mismatched, **values)
        return Rankings(ratios[sides[0].clamp(min=0)], self.items["scores"], mask=sides[0] >= 0, **values)

    def blank(self) -> Feedback:
        """The same feedback with every log-prob 0: enough to know which examples count."""
        zeros = torch.zeros(len(self.targets), device=self.targets.device)
        return self.feedback(LogRatios(zeros, zeros, self.tokens))


def _check_whole(structure: Structure) -> None:
    """Refuse a batch of which something made another, by slicing or joining its tensors.

    Raises:
        ValueError: If its rows are not as many as its examples speak of.
    """
    if structure.kind is Rankings:
        # How many completions a group has is on the device; this much is known.
        fits = structure.items["group_rows"].shape == structure.items["scores"].shape
    else:
        fits = len(structure.targets) == len(ROWS[structure.kind]) * structure.examples
    if not fits:
        raise ValueError(
            f"batch: got {len(structure.targets)} rows for {structure.examples} examples; the tensors of a "
            "PreferenceCollator's batch belong together and cannot be sliced or joined; accelerate does so with "
            "streamed data: set accelerator_config={'dispatch_batches': False}"
        )


def as_wanted(feedback: Feedback, loss: Loss, pairs: str | None) -> Feedback:
    """The feedback in the kind that a loss takes, where that kind follows from it.

    Args:
        feedback: Of the batch.
        loss: The loss.
        pairs: How rankings become pairs: "all", "adjacent" or "best_worst".

    Raises:
        TypeError: If it does not follow, or rankings meet a pair loss and `pairs` is None.
        ValueError: If pairs become rankings and a chosen completion is not scored above the rejected one.
    """
    wanted = loss.spec.feedback
    if isinstance(feedback, wanted):
        return feedback
    if isinstance(feedback, Labels):
        raise TypeError(
            f"data: got labelled completions (prompt, completion, label), but {loss.name} takes {wanted.__name__}, and "
            "single votes do not say what to compare them with; choose a loss that takes Labels, such as 'kto'"
        )
    if isinstance(feedback, Rankings):
        if pairs is None:
            raise TypeError(
                f"data: got rankings (prompt, completions, scores), but {loss.name} takes {wanted.__name__}; say which "
                "pairs to make of them with PreferenceLossCallback(..., pairs='all' | 'adjacent' | 'best_worst'), or "
                "choose a loss that takes Rankings, such as 'dpo_pl'"
            )
        feedback = feedback.to_pairs(pairs)
    if wanted is Pairs:
        return feedback
    return feedback.to_labels() if wanted is Labels else feedback.to_rankings()


def check_pairs(pairs: str | None) -> None:
    """Refuse what is no way to make pairs of rankings.

    Raises:
        ValueError: If it is none of the three, nor None.
    """
    if pairs is not None and pairs not in _HOWS:
        raise ValueError(f"pairs: got {pairs!r}, expected one of {', '.join(map(repr, _HOWS))} or None")


def terms_of(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    """Weight and loss of each term of a sum; a plain loss is a sum of one."""
    return loss.terms if isinstance(loss, Composite) else ((1.0, loss),)


def looks_across(loss: Loss) -> bool:
    """Whether an example's loss depends on the others of its batch."""
    # The other baselines of the KTO family come from earlier batches, or from nowhere.
    own = ("auto", "mismatched")
    return any(
        not term.spec.separable and term.params.get("kl_baseline", own[0]) in own
        for _, term in terms_of(loss)
    )


def counts(loss: Loss, feedback: Feedback) -> Tensor:
    """How many examples each term counts, [terms]; a term may leave out others than an empty completion."""
    seen = [(term, as_wanted(feedback, term, None)) for _, term in terms_of(loss)]
    return torch.stack([term.counted(given).sum() for term, given in seen])
