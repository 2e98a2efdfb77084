"""Examples of any feedback -> one batch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from prefloss.arguments import choice, flag, function, instance, integer, shown
from prefloss.data.errors import DataError
from prefloss.data.examples import Example, read_example, unread_text
from prefloss.data.rows import kind_text
from prefloss.data.tokens import Encoded, pad
from prefloss.feedback import Labels, Pairs
from prefloss.logratios import IGNORE_INDEX
from prefloss.training.batch import MISMATCHED, REFERENCE, PreferenceBatch
from prefloss.training.layouts import PROMPTS, pack, prompts
from prefloss.training.model_inputs import check_no_raw, joined, model_input_names

Layout = Literal["auto", "padded", "packed", "shared_prefix"]
_LAYOUTS = get_args(Layout)
# This many labels of one kind, and none of the other, suggest a mistake.
_ONE_SIDED = 64


class PreferenceCollator:
    """Data collator for preferences. The columns say whether a row is a pair, a label or a ranking.

    - Pairs: `prompt`, `chosen`, `rejected`; optional `score_chosen` and `score_rejected`, `weight`.
    - Labels: `prompt`, `completion`, `label`; optional `score`, `weight`, `kl`, `baseline`.
    - Rankings: `prompt`, `completions`, `scores` (higher is better, any number of completions); optional `weight`.

    Texts are strings (an end token is added) or messages (the chat template is applied), split into prompt and
    completion where TRL splits them. Token ids are used unchanged: `prompt_ids` with `chosen_ids` and `rejected_ids`,
    `completion_ids` or `completions_ids`. Columns for reference log-probs computed beforehand (sums over the
    completion, nats) are `ref_chosen_logps` and `ref_rejected_logps`, or `ref_logps`.

    A completion without text or tokens does not stop a training: its example stays in the batch, and losses leave it
    out as they do with one that was cut away. `seen` counts it, and a warning names the first.

    Set `remove_unused_columns=False` in the trainer's arguments.

    Args:
        tokenizer: For text and messages; not needed for token ids.
        pad_token_id: Padding; the tokenizer's by default, or 0. It is masked, so any id of the vocabulary works.
        max_length: Tokens of a row, prompt and completion, at most; longer rows lose their end. Losses leave out a
            completion that was cut away entirely.
        layout: Arrangement of the tokens; the log-probs are the same. "padded": one row each, padded to the longest.
            "packed": no padding, all sequences in one row. "shared_prefix": packed, with each prompt once, followed
            by all its completions; each completion attends to the prompt and to itself. Models without support
            (state-space layers, attention without masks) get padded rows, with a warning. "auto": padded rows, which
            run in the layout of the least estimated time; see `prefloss.training.explain_layout`.
        mismatched: Also score each prompt of labelled data with the completion of the example before it (the first with
            that of the last), as TRL does, for KTO's estimate of the KL. Costs two more forward passes; needs batches
            of two examples or more.
        model_inputs: Columns that are inputs of the model beside the tokens, such as a processor's `pixel_values` and
            `image_grid_thw`. They belong to the prompt, and each of its rows gets them: `token_type_ids` and
            `mm_token_type_ids` [tokens of the prompt] as rows; all others joined along their first dimension in the
            order of the rows. Needs padded rows and token ids.

    Attributes:
        seen: Counts so far, in this process: `examples`, `identical` (two completions of a prompt are the same),
            `double_end` (two end tokens), `unread` (columns that nothing reads), `empty` (examples with a completion
            without text or tokens), `truncated_away`, `upvotes`, `downvotes`.

    Example:
        >>> collate = PreferenceCollator()
        >>> batch = collate([{"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 9, 1]}])
        >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
        ([[5, 6, 7, 1, 0], [5, 6, 8, 9, 1]], [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
        >>> batch["chosen_rows"], batch["rejected_rows"]
        (tensor([0]), tensor([1]))
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        pad_token_id: int | None = None,
        max_length: int | None = None,
        layout: Layout = "auto",
        mismatched: bool = False,
        model_inputs: Sequence[str] = (),
    ) -> None:
        if tokenizer is not None:
            function("tokenizer", tokenizer, "a tokenizer, or None for token ids")
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "pad_token_id", None)
        self.tokenizer = tokenizer
        self.pad_token_id = 0 if pad_token_id is None else integer("pad_token_id", pad_token_id, 0)
        self.max_length = None if max_length is None else integer("max_length", max_length, 2)
        if self.pad_token_id >= 2**31:
            raise ValueError(f"pad_token_id: got {shown(pad_token_id)}, expected a token id below 2**31")
        self.layout = choice("layout", layout, _LAYOUTS)
        self.mismatched = flag("mismatched", mismatched)
        self.model_inputs = model_input_names(model_inputs, self.layout)
        self.seen: Counter[str] = Counter()
        self._warned: set[str] = set()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """Make a batch: the tokens of its rows, and tensors that say which rows belong together.

        Returns:
            `input_ids`, `attention_mask`, `completion_mask`, right-padded rows [rows, T], for "auto" with
            `shared_prompts` [rows, 2] (the other layouts: one row [1, N] with `position_ids`, `sequence_ids`,
            `row_ids`, `targets`, `sources`, `shared`); `chosen_rows` and `rejected_rows` [pairs] (chosen rows come
            first), `completion_rows` and `label` [n], or `group_rows` and `scores` [groups, K] (-1 and 0 where a group
            has fewer); the optional feedback under its column's name (`scores` for `score`); `ref_logps` [rows]; and
            `labels` [examples], 1 or -100, as transformers' trainer counts examples that can be compared. With
            `mismatched`, the tokens of mismatched rows under names that begin with `kl_`.

        Raises:
            ValueError: If an example is not what its columns say, or unlike the others.
            TypeError: If there is text and no tokenizer, or an example is no row of columns.
        """
        if isinstance(examples, str | bytes | Mapping) or not isinstance(examples, Iterable):
            raise TypeError(f"examples: got {shown(examples)}, expected a list of rows")
        read, inputs = self._read(examples)
        if not read:
            raise ValueError("examples: got none, expected at least one")
        _check_alike(read)
        self._notice(read)
        kind = read[0].kind
        order = _order(read)
        batch = PreferenceBatch(self._tokens([example.rows for example in read], order))
        batch |= _side_rows(read, kind)
        for name in read[0].values:
            batch[name] = torch.tensor([example.values[name] for example in read], dtype=torch.float32)
        if read[0].reference is not None:
            batch[REFERENCE] = torch.tensor(
                [(read[i].reference or ())[j] for i, j in order], dtype=torch.float32
            )
        if self.mismatched:
            batch |= self._previous_completions(read, kind)
        for prefix in ("", MISMATCHED) if self.mismatched else ("",):
            width = batch[f"{prefix}input_ids"].shape[1]
            rows = joined(inputs, read, order, width) if self.model_inputs else {}
            batch |= {prefix + name: value for name, value in rows.items()}
        empty = sum(not ids for example in read for _, ids in example.rows)
        self.seen["truncated_away"] += int((batch.rows.tokens == 0).sum()) - empty
        batch["labels"] = torch.where(batch.blank().valid, 1, IGNORE_INDEX)
        return batch

    def _read(self, examples: Iterable[Mapping[str, Any]]) -> tuple[list[Example], list[dict[str, Any]]]:
        """The examples, and the model inputs of each by name."""
        read, inputs = [], []
        for index, example in enumerate(examples):
            columns = instance(f"example {index} of the batch", example, Mapping, "a row: column -> value")
            inputs.append(
                {name: columns[name] for name in self.model_inputs if columns.get(name) is not None}
            )
            rest = {name: value for name, value in columns.items() if name not in self.model_inputs}
            read.append(read_example(index, rest, self.tokenizer, allow_empty=True))
            check_no_raw(read[-1].place, rest, self.model_inputs)
        return read, inputs

    def _tokens(self, rows: list[list[Encoded]], order: list[tuple[int, int]]) -> dict[str, Tensor]:
        if self.layout in ("auto", "padded"):
            padded = pad([rows[i][j] for i, j in order], self.pad_token_id, self.max_length)
            if self.layout == "auto" and not self.model_inputs:
                padded[PROMPTS] = prompts(rows, order, True, self.max_length)
            return padded
        return pack(rows, order, self.layout == "shared_prefix", self.max_length)

    def _previous_completions(self, read: list[Example], kind: type) -> dict[str, Tensor]:
        if kind is not Labels:
            raise DataError(f"mismatched: got data of {kind_text(kind)}, expected labels")
        if len(read) < 2:
            raise DataError(
                "mismatched: got a batch of one example, expected two or more; or leave mismatched False and choose "
                "kl_baseline='running_mean', which works at any batch size"
            )
        # As TRL's KTOTrainer pairs them.
        previous = [read[-1], *read[:-1]]
        rows = [[(one.rows[0][0], other.rows[0][1])] for one, other in zip(read, previous, strict=True)]
        tokens = self._tokens(rows, [(i, 0) for i in range(len(rows))])
        return {MISMATCHED + name: value for name, value in tokens.items()}

    def _notice(self, read: list[Example]) -> None:
        end = getattr(self.tokenizer, "eos_token_id", None)
        self.seen["examples"] += len(read)
        for example in read:
            completions = [tuple(ids) for _, ids in example.rows]
            if not all(completions):
                self.seen["empty"] += 1
                self._warn("empty", f"{example.place}: has an empty completion; losses leave the example out")
            if len(set(completions)) < len(completions):
                self.seen["identical"] += 1
                self._warn(
                    "identical",
                    f"{example.place}: completions of one prompt are identical; they have no gradient",
                )
            if end is not None and any(ids[-2:] == (end, end) for ids in completions):
                self.seen["double_end"] += 1
                self._warn("double_end", f"{example.place}: a completion ends in two end-of-sequence tokens")
            if example.unread:
                self.seen["unread"] += 1
                names = unread_text(example.kind, example.unread)
                self._warn("unread", f"{example.place}: has columns that nothing reads: {names}")
            if example.kind is Labels:
                self.seen["upvotes" if example.label else "downvotes"] += 1
        labels = self.seen["upvotes"] + self.seen["downvotes"]
        if labels >= _ONE_SIDED and labels in (self.seen["upvotes"], self.seen["downvotes"]):
            side = "upvotes" if self.seen["upvotes"] else "downvotes"
            self._warn("one_sided", f"the first {labels} labels are all {side}; check the column 'label'")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"{message}. Shown once; PreferenceCollator.seen counts.", UserWarning, stacklevel=4
            )


def _check_alike(read: list[Example]) -> None:
    first = read[0]
    for example in read[1:]:
        if example.kind is not first.kind:
            raise DataError(
                f"{example.place}: got a row of {kind_text(example.kind)}, but {first.place} is of "
                f"{kind_text(first.kind)}"
            )
        if example.values.keys() != first.values.keys() or (example.reference is None) != (
            first.reference is None
        ):
            raise DataError(
                f"{example.place}: {_difference(first, example)}; expected it in every example or in none"
            )
    for one, other in (("score_chosen", "score_rejected"), ("score_rejected", "score_chosen")):
        if one in first.values and other not in first.values:
            raise DataError(f"{first.place}: missing column {other!r} beside {one!r}")


def _difference(first: Example, example: Example) -> str:
    names = sorted(first.values.keys() ^ example.values.keys()) or ["ref_logps"]
    column = {"scores": "score"}.get(names[0], names[0])
    has = names[0] in example.values or (names[0] == "ref_logps" and example.reference is not None)
    return (
        f"{'has' if has else 'lacks'} the column {column!r}, which {first.place} {'lacks' if has else 'has'}"
    )


def _order(read: list[Example]) -> list[tuple[int, int]]:
    """Example and completion of each row: all chosen ones first, as TRL does; rankings group by group."""
    if read[0].kind is Pairs:
        return [(i, side) for side in (0, 1) for i in range(len(read))]
    return [(i, j) for i, example in enumerate(read) for j in range(len(example.rows))]


def _side_rows(read: list[Example], kind: type) -> dict[str, Tensor]:
    rows = torch.arange(len(read))
    if kind is Pairs:
        return {"chosen_rows": rows, "rejected_rows": rows + len(read)}
    if kind is Labels:
        return {"completion_rows": rows, "label": torch.tensor([example.label for example in read])}
    width = max(len(example.rows) for example in read)
    group_rows = torch.full((len(read), width), -1)
    scores = torch.zeros(len(read), width)
    start = 0
    for i, example in enumerate(read):
        count = len(example.rows)
        group_rows[i, :count] = torch.arange(start, start + count)
        scores[i, :count] = torch.tensor(example.scores)
        start += count
    return {"group_rows": group_rows, "scores": scores}
