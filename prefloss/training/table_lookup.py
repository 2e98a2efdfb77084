"""Reference log-probs from a table: for batches, and as columns of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import prefloss
from prefloss.data.examples import read_example
from prefloss.data.table import (
    Header,
    ReferenceTable,
    TableError,
    as_scored,
    check_max_length,
    completion_key,
)
from prefloss.data.tokens import Encoded
from prefloss.feedback import Pairs, Rankings
from prefloss.training.batch import PreferenceBatch
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
    """The header of a table scored with this model and tokenizer.

    Args:
        model: The reference, with its adapters switched on or off as for scoring.
        tokenizer: For text; None if the data holds token ids.
        max_length: Tokens of prompt and completion together, at most.
        name: Name or path of the model; that of its configuration if None.
        revision: Of the model.
        adapter: Path of the active adapter.

    Raises:
        TypeError: If max_length is no integer.
        ValueError: If it is below 2.
        TableError: If the weights are sharded over processes.
    """
    check_max_length(max_length)
    weights = weights_fingerprint(model)
    if weights is None:
        raise TableError("model: got weights sharded over processes, expected a whole model in each")
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


def look_up(table: ReferenceTable, batch: PreferenceBatch) -> Tensor:
    """Log-probs of a batch's rows, [rows], nats, float32.

    Raises:
        TableError: If a row is not in the table; the message names it and the likely cause.
    """
    rows = [as_scored(row) for row in batch.rows.token_ids()]
    names = batch.row_names()
    logps = find(table, rows, [f"{names.get(i, f'row {i}')} of the batch" for i in range(len(rows))])
    return torch.tensor(logps, dtype=torch.float32, device=batch.rows.targets.device)


def with_reference_logps(
    data: Dataset,
    table: str | os.PathLike[str] | ReferenceTable,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
) -> Dataset:
    """A data set with columns of reference log-probs, read from a table.

    Pairs get `ref_chosen_logps` and `ref_rejected_logps`, labels and rankings `ref_logps`. Completions that truncation
    leaves without tokens get 0; losses leave them out.

    Args:
        data: Pairs, labels or rankings, as text, messages or token ids.
        table: A table that `prefloss reference` wrote, or its path.
        tokenizer: For text and messages.
        max_length: Length at which the trainer truncates rows.

    Raises:
        TableError: If the table does not fit, or lacks a row.
        ValueError: If a row of the data is malformed.
        TypeError: If there is text and no tokenizer.
    """
    check_max_length(max_length)
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
    logps = iter(find(table, rows, names, tokenizer))
    values = [[next(logps) for _ in example.rows] for example in read]
    if read[0].kind is Pairs:
        return {
            "ref_chosen_logps": [chosen for chosen, _ in values],
            "ref_rejected_logps": [rejected for _, rejected in values],
        }
    return {"ref_logps": values if read[0].kind is Rankings else [logp for (logp,) in values]}


def find(
    table: ReferenceTable, rows: Sequence[Encoded], names: Sequence[str], tokenizer: Any = None
) -> list[float]:
    """Log-prob of each row, nats; 0 for a row without tokens, which no table holds and every loss leaves out.

    Raises:
        TableError: If a row is not in the table; the message names it and the likely cause.
    """
    scored = [i for i, (_, completion) in enumerate(rows) if completion]
    places = table.find([completion_key(*rows[i]) for i in scored]).tolist() if scored else []
    missing = [i for i, place in zip(scored, places, strict=True) if place < 0]
    if missing:
        prompt, completion = rows[missing[0]]
        more = f" (and {len(missing) - 1} more of {len(rows)})" if len(missing) > 1 else ""
        cause = _cause(table.header, len(prompt) + len(completion), len(missing) == len(scored), tokenizer)
        raise TableError(
            f"{table.path}: has no {names[missing[0]]}{more}, token ids {_ids(prompt)} and then {_ids(completion)}; "
            f"likely cause: {cause}"
        )
    logps = [0.0] * len(rows)
    for i, place in zip(scored, places, strict=True):
        if table.tokens[place] != len(rows[i][1]):
            raise TableError(
                f"{table.path}: a damaged reference table: {names[i]} has {len(rows[i][1])} tokens, the table says "
                f"{table.tokens[place]}"
            )
        logps[i] = float(table.logps[place])
    return logps


def _cause(header: Header, length: int, all_missing: bool, tokenizer: Any) -> str:
    """Likely reason why a row is not in the table."""
    if tokenizer is not None and header.vocabulary not in (None, tokenizer_fingerprint(tokenizer)):
        return f"another tokenizer (the table's: {header.tokenizer}; here: {tokenizer.name_or_path or 'unnamed'})"
    if tokenizer is not None and header.vocabulary and header.chat_template != template_hash(tokenizer):
        return "the tokenizer had another chat template when the table was made"
    if header.max_length is not None and length > header.max_length:
        return f"the table was cut at max_length={header.max_length}, and this row has {length} tokens"
    if all_missing:
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
