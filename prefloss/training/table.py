"""Reference log-probs from a table: for batches, for columns of a data set, for the trainers of TRL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import prefloss
from prefloss.data.examples import read_example
from prefloss.data.table import Header, ReferenceTable, TableError, as_scored, completion_key
from prefloss.data.tokens import Encoded
from prefloss.feedback import Pairs, Rankings
from prefloss.training.batch import ROWS, Structure
from prefloss.training.fingerprint import (
    dtype_of,
    template_hash,
    text_hash,
    tokenizer_fingerprint,
    weights_fingerprint,
)

if TYPE_CHECKING:
    from datasets import Dataset


def header_of(
    model: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
) -> Header:
    """What a table is scored with.

    Args:
        model: The reference, as it scores: with its adapters, or without.
        tokenizer: For text; None if the data holds token ids.
        max_length: Tokens of prompt and completion together, at most.
        name: Name or path of the model; that of its configuration if None.
        revision: Of the model.
        adapter: Path of the adapter that is on.

    Raises:
        TableError: If the weights are spread over processes.
    """
    weights = weights_fingerprint(model)
    if weights is None:
        raise TableError("model: got weights that are spread over processes, expected a whole model in each")
    config = model.config
    return Header(
        model=name or config.name_or_path or type(model).__name__,
        revision=revision or getattr(config, "_commit_hash", None),
        adapter=adapter,
        weights=weights,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        tokenizer=None if tokenizer is None else tokenizer.name_or_path or type(tokenizer).__name__,
        vocabulary=tokenizer_fingerprint(tokenizer),
        chat_template=template_hash(tokenizer),
        max_length=max_length,
        prefloss=prefloss.__version__,
    )


def look_up(table: ReferenceTable, structure: Structure, inputs: Mapping[str, Any]) -> Tensor:
    """Log-probs of a batch's rows, [rows], nats, float32.

    Args:
        table: The table.
        structure: Of the batch.
        inputs: The model's share of the batch.

    Raises:
        TableError: If a row is not in the table; the message names it and the likely cause.
    """
    rows = [as_scored(row) for row in structure.completions(inputs)]
    names = _names(structure)
    logps = _find(table, rows, [f"{names.get(i, f'row {i}')} of the batch" for i in range(len(rows))])
    return torch.tensor(logps, dtype=torch.float32, device=structure.targets.device)


def with_reference_logps(
    data: Dataset,
    table: str | os.PathLike[str] | ReferenceTable,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
) -> Dataset:
    """A data set with the columns of reference log-probs that trainers read, from a table.

    Pairs get `ref_chosen_logps` and `ref_rejected_logps`, votes and rankings `ref_logps`. Completions that the cut
    leaves without tokens get 0: no loss reads it.

    Args:
        data: Pairs, votes or rankings, as text, messages or token ids.
        table: That `prefloss reference` wrote, or its path.
        tokenizer: For text and messages.
        max_length: That the trainer cuts rows to.

    Raises:
        TableError: If the table does not fit, or lacks a row.
        ValueError: If a row of the data is malformed.
        TypeError: If there is text and no tokenizer.
    """
    table = table if isinstance(table, ReferenceTable) else ReferenceTable.read(table)

    def columns(batch: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return _columns(table, examples, places, tokenizer, max_length)

    # The function holds a tokenizer and a whole table: hashing those for datasets' cache takes longer than the lookup.
    return data.map(
        columns,
        with_indices=True,
        batched=True,
        new_fingerprint=text_hash(f"{data._fingerprint} {table.header} {len(table)} {max_length}"),
        load_from_cache_file=False,
    )


def reads_table(trainer: type, table: str | os.PathLike[str] | ReferenceTable) -> type:
    """A class of TRL's trainers that takes reference log-probs from a table where it would compute them beforehand.

    Build it with `precompute_ref_log_probs=True`; no reference model is then loaded, and no forward pass is made.

    Args:
        trainer: `DPOTrainer`, `KTOTrainer`, or a subclass.
        table: That `prefloss reference` wrote, or its path.

    Raises:
        TypeError: If it has no such step.
        TableError: If the table cannot be read.
    """
    if not hasattr(trainer, "_precompute_ref_logps"):
        raise TypeError(
            f"trainer: got {trainer!r}, which precomputes no reference log-probs, expected TRL's DPOTrainer or KTOTrainer"
        )
    found = table if isinstance(table, ReferenceTable) else ReferenceTable.read(table)

    def precompute(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        if getattr(self.args, "truncation_mode", "keep_start") != "keep_start":
            raise TableError(
                f"truncation_mode: got {self.args.truncation_mode!r}, expected 'keep_start': {found.path} was scored so"
            )
        if getattr(self, "calculate_KL", False):
            raise TableError(
                f"{found.path}: KTO's mismatched completions are in no table; leave them out with "
                "loss_type='apo_zero_unpaired', which beside PreferenceLossCallback says no more than that"
            )
        # The data holds token ids by now; the tokenizer is for the message about what is missing.
        return with_reference_logps(dataset, found, self.processing_class, max_length=self.args.max_length)

    return type(f"{trainer.__name__}WithTable", (trainer,), {"_precompute_ref_logps": precompute})


def _columns(
    table: ReferenceTable,
    examples: list[dict[str, Any]],
    places: list[int],
    tokenizer: Any,
    max_length: int | None,
) -> dict[str, list[Any]]:
    read = [
        read_example(i, example, tokenizer, place=f"row {place + 1} of the data")
        for i, (place, example) in enumerate(zip(places, examples, strict=True))
    ]
    rows = [as_scored(row, max_length) for example in read for row in example.rows]
    names = [f"completion {j + 1} of {example.place}" for example in read for j in range(len(example.rows))]
    logps = iter(_find(table, rows, names, tokenizer))
    found = [[next(logps) for _ in example.rows] for example in read]
    if read[0].kind is Pairs:
        return {
            "ref_chosen_logps": [chosen for chosen, _ in found],
            "ref_rejected_logps": [rejected for _, rejected in found],
        }
    return {"ref_logps": found if read[0].kind is Rankings else [logp for (logp,) in found]}


def _find(
    table: ReferenceTable, rows: Sequence[Encoded], names: Sequence[str], tokenizer: Any = None
) -> list[float]:
    """Log-prob of each row; 0 for one without tokens, which is in no table and which every loss leaves out."""
    asked = [i for i, (_, completion) in enumerate(rows) if completion]
    there = table.find([completion_key(*rows[i]) for i in asked]).tolist() if asked else []
    lost = [i for i, row in zip(asked, there, strict=True) if row < 0]
    if lost:
        prompt, completion = rows[lost[0]]
        more = f" (and {len(lost) - 1} more of {len(rows)})" if len(lost) > 1 else ""
        cause = _cause(table.header, len(prompt) + len(completion), len(lost) == len(asked), tokenizer)
        raise TableError(
            f"{table.path}: has no {names[lost[0]]}{more}, token ids {_ids(prompt)} and then {_ids(completion)}; "
            f"likely cause: {cause}"
        )
    found = [0.0] * len(rows)
    for i, row in zip(asked, there, strict=True):
        if table.tokens[row] != len(rows[i][1]):
            raise TableError(
                f"{table.path}: a damaged reference table: {names[i]} has {len(rows[i][1])} tokens, there "
                f"{table.tokens[row]}"
            )
        found[i] = float(table.logps[row])
    return found


def _cause(header: Header, length: int, all_lost: bool, tokenizer: Any) -> str:
    """Why a row is not in the table. Its header cannot say so before: another cut may leave all rows as they are."""
    if tokenizer is not None and header.vocabulary not in (None, tokenizer_fingerprint(tokenizer)):
        return f"another tokenizer (the table's: {header.tokenizer}; here: {tokenizer.name_or_path or 'unnamed'})"
    if tokenizer is not None and header.vocabulary and header.chat_template != template_hash(tokenizer):
        return "the tokenizer had another chat template when the table was made"
    if header.max_length is not None and length > header.max_length:
        return f"the table was cut at max_length={header.max_length}, and this row has {length} tokens"
    if all_lost:
        return (
            f"other data, another tokenizer or chat template (the table's tokenizer: {header.tokenizer}), or another "
            f"max_length (the table's: {header.max_length})"
        )
    return (
        "new or changed data: run `prefloss reference` again, it adds what is missing; or another max_length (the "
        f"table's: {header.max_length})"
    )


def _ids(ids: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(map(str, ids[:most]))
    return f"[{shown}{', ...' if len(ids) > most else ''}]"


def _names(structure: Structure) -> dict[int, str]:
    """What the rows of a batch are to the user."""
    sides = [structure.items[name].tolist() for name in ROWS[structure.kind]]
    if structure.kind is Pairs:
        return {
            row: f"{side} completion of example {i}"
            for side, rows in zip(("chosen", "rejected"), sides, strict=True)
            for i, row in enumerate(rows)
        }
    rows = [row if isinstance(row, list) else [row] for row in sides[0]]
    return {
        row: f"completion {j} of example {i}" for i, group in enumerate(rows) for j, row in enumerate(group)
    }
