"""The formats of the output: a table for spreadsheets, JSON lines, Parquet, and RewardBench's two."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from prefloss.cli.scoring.parts import COLUMNS, PER_TOKEN, SCHEMA
from prefloss.cli.scoring.rows import Row, Rows
from prefloss.data.tokens import Text
from prefloss.feedback import Pairs, Rankings

Tables = Iterable[pa.Table]


def columns(per_token: bool) -> list[str]:
    """Columns of the output."""
    return [*COLUMNS, *PER_TOKEN] if per_token else list(COLUMNS)


def write_parquet(path: Path, parts: Tables, per_token: bool, settings: Mapping[str, Any]) -> None:
    """The columns as Parquet; the settings are in the file's metadata."""
    schema = pa.schema([SCHEMA.field(name) for name in columns(per_token)])
    schema = schema.with_metadata({"prefloss.score": json.dumps(settings)})
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for part in parts:
            writer.write_table(part.select(schema.names).replace_schema_metadata(schema.metadata))


def write_table(path: Path, parts: Tables, per_token: bool) -> None:
    """The columns as comma-separated values, a line for each completion."""
    schema = pa.schema([SCHEMA.field(name) for name in columns(per_token)])
    with pcsv.CSVWriter(path, schema) as writer:
        for part in parts:
            writer.write_table(part.select(schema.names))


def write_lines(path: Path, parts: Tables, per_token: bool) -> None:
    """The columns as JSON lines, a line for each completion."""
    _write_lines(path, (row for part in parts for row in part.select(columns(per_token)).to_pylist()))


def write_rewardbench(
    path: Path, rows: Rows, parts: Callable[[], Tables], tokenizer: Any, model: Mapping[str, str]
) -> None:
    """What RewardBench writes beside its scores: `outputs.jsonl` of version 1, for rankings the scores of version 2.

    Args:
        path: File.
        rows: The rows.
        parts: Gives their scores, from the first on.
        tokenizer: Renders messages.
        model: The columns "model", "model_type" and "chat_template" of version 2.
    """
    if rows.kind.feedback is Rankings:
        _write_columns(path, lambda: _groups(rows, parts(), tokenizer), model)
    else:
        _write_lines(path, _outputs(rows, parts(), tokenizer))


def _outputs(rows: Rows, parts: Tables, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Rows of version 1: of pairs, or of single completions."""
    for row, rewards in _with_rewards(rows, parts):
        texts = [_rendered(tokenizer, row.prompt, completion) for completion in row.completions]
        found: dict[str, Any] = {"prompt": _rendered(tokenizer, row.prompt)}
        if row.kind.feedback is Pairs:
            found |= {"results": int(rewards[0] > rewards[1])}
            found |= {"scores_chosen": rewards[0], "scores_rejected": rewards[1]}
            found |= {"text_chosen": texts[0], "text_rejected": texts[1]}
        else:
            found |= {"results": rewards[0], "text": texts[0]}
        # The data's other columns come last, as there.
        yield found | {name: value for name, value in row.other.items() if name not in found}


def _groups(rows: Rows, parts: Tables, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Rows of version 2."""
    for row, rewards in _with_rewards(rows, parts):
        given = row.scores or [0.0] * len(rewards)
        right = sum(score == max(given) for score in given) if row.scores else 0
        yield {
            "id": row.other.get("id"),
            "num_correct": right,
            "results": None if (row.subset or "").lower() == "ties" or not right else picked(rewards, given),
            "scores": rewards,
            "subset": row.subset,
            "text": [_rendered(tokenizer, row.prompt, completion) for completion in row.completions],
        }


def picked(rewards: list[float], given: list[float]) -> float:
    """Share of the completions of the highest reward that people scored highest.

    Example:
        >>> picked([2.0, 2.0, 1.0], [1.0, 0.0, 0.0])
        0.5
    """
    top = [
        score == max(given) for reward, score in zip(rewards, given, strict=True) if reward == max(rewards)
    ]
    return sum(top) / len(top)


def _with_rewards(rows: Rows, parts: Tables) -> Iterator[tuple[Row, list[float]]]:
    rewards = (reward for part in parts for reward in part["reward"].to_pylist())
    for row in rows:
        yield row, [next(rewards) for _ in row.completions]


def _rendered(tokenizer: Any, prompt: Text, completion: Text | None = None) -> str:
    """The text of both, as the template writes messages."""
    if isinstance(prompt, str):
        return prompt + (completion if isinstance(completion, str) else "")
    messages = [*prompt, *(completion or ())]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            # Dates and bytes of a Parquet file have no form in JSON.
            file.write(json.dumps(row, default=str) + "\n")


def _write_columns(
    path: Path, rows: Callable[[], Iterator[dict[str, Any]]], constant: Mapping[str, str]
) -> None:
    """One object with a list for each column: read once for each, so that none is in memory."""
    names = ("id", "num_correct", "results", "scores", "subset", "text")
    with path.open("w", encoding="utf-8") as file:
        file.write("{\n")
        for name in names:
            file.write(f'    "{name}": [')
            for number, row in enumerate(rows()):
                file.write((", " if number else "") + json.dumps(row[name], default=str))
            file.write("],\n")
        file.write(
            ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in constant.items())
        )
        file.write("\n}\n")
