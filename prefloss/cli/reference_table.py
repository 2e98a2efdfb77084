"""`prefloss reference`: score a data set once, into a table that any training reads."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from prefloss import data as pdata
from prefloss.cli.command_options import ReferenceOptions
from prefloss.cli.console import CliError, print_facts, quiet
from prefloss.cli.processes import together
from prefloss.cli.run_folder import unwritable
from prefloss.data.read import read_token_ids
from prefloss.data.rows import KIND_WORDS
from prefloss.data.table import ReferenceTable, TableError
from prefloss.training import (
    Built,
    ReferenceBuilder,
    claimed,
    distributed,
    header_of,
    score_rows,
)
from prefloss.training.head import text_config

# Bytes of a completion in the table, and as much again in a part of it.
_BYTES = 100


def write_reference(options: ReferenceOptions, console: Console) -> None:
    """Score the data, write the table, print what is in it; a `CliError` if that cannot be done as asked."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(console))
        with together():
            resumes = stack.enter_context(claimed(options.output, anew=options.overwrite))
            _check_output(options)
            sets, messages = _read(options.data, console)
            _check_room(options, sets)
            model = _model(options)
            tokenizer = None
            if not all("prompt_ids" in rows.column_names for rows in sets.values()):
                tokenizer = _tokenizer(options, messages)
            builder = _builder(options, model, tokenizer)
        if resumes:
            kept = f"what an earlier run scored is kept, in {builder.folder.name}"
            print_facts(console, "resume", (kept,))
        print_facts(console, "model", _model_facts(options, model, builder.header.dtype))
        _score(options, sets, builder, console)


def _check_output(options: ReferenceOptions) -> None:
    """Refuse a table that cannot be added to before anything takes long."""
    if options.output.exists() and not options.overwrite:
        distributed.share().together(lambda: ReferenceTable.read(options.output).header)


def _check_room(options: ReferenceOptions, sets: dict[str, Any]) -> None:
    """Refuse a disk without room for the table and its parts."""
    pairs = {"chosen", "chosen_ids"}
    count = sum(len(rows) * (1 if pairs.isdisjoint(rows.column_names) else 2) for rows in sets.values())
    free = shutil.disk_usage(options.output.parent).free
    if free < count * _BYTES:
        raise TableError(
            f"--output: {options.output.parent} has {free / 2**20:.0f} MiB free, and the table needs about "
            f"{count * _BYTES / 2**20:.0f} MiB; make room, or write elsewhere"
        )


def _read(paths: list[Path], console: Console) -> tuple[dict[str, Any], str | None]:
    """Data sets by name, and the name of one that holds messages, or None; each process checks its part of each."""
    sets: dict[str, Any] = {}
    facts, warnings, messages = [], [], None
    share = distributed.share()
    for path in paths:
        name = path.name if path.name not in sets else str(path)
        if name in sets:
            raise pdata.DataError(f"--data: got {path} twice, expected each file once")
        rows = read_token_ids(path, share)
        if rows is None:
            data = pdata.read(path, share)
            rows, form = data.rows, "messages" if data.conversational else "plain text"
            facts.append(f"{name}: {len(rows)} {KIND_WORDS[data.kind]} rows, {form}")
            warnings += data.notes
            messages = name if data.conversational else messages
        else:
            facts.append(f"{name}: {len(rows)} rows of token ids")
        sets[name] = rows
    print_facts(console, "data", facts, warnings)
    return sets, messages


def _builder(options: ReferenceOptions, model: Any, tokenizer: Any) -> ReferenceBuilder:
    """Writes the table with the scores of this model."""
    header = header_of(
        model,
        tokenizer,
        max_length=options.max_length,
        name=options.model,
        revision=options.revision,
        adapter=options.adapter,
    )
    padding = 0 if tokenizer is None else tokenizer.pad_token_id or 0

    def scored(rows: list[Any]) -> Any:
        _check_rows(rows, model)
        return score_rows(model, rows, batch_size=options.batch_size, padding=padding)

    return ReferenceBuilder(options.output, header, scored, tokenizer=tokenizer, anew=options.overwrite)


def _score(
    options: ReferenceOptions, sets: dict[str, Any], builder: ReferenceBuilder, console: Console
) -> None:
    """Score the data, write the table, print what is in it."""
    began = time.perf_counter()
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    share = -(-sum(map(len, sets.values())) // distributed.size())
    try:
        with Progress(*columns, console=console, transient=True, disable=console.quiet) as progress:
            bar = progress.add_task("", total=share)
            built = builder.build_claimed(sets, lambda rows: progress.advance(bar, rows))
    except (FloatingPointError, TypeError) as error:
        raise CliError(str(error)) from error
    except OSError as error:
        kept = f"; scored rows are kept in {builder.folder}, and the same command goes on from there"
        raise unwritable(options.output, error, kept) from error
    except torch.OutOfMemoryError as error:
        raise CliError(
            f"--batch-size: {options.batch_size} rows at once do not fit into memory; try fewer, scored rows are kept"
        ) from error
    _print_table(console, options.output, built, time.perf_counter() - began)


def _model(options: ReferenceOptions) -> Any:
    # transformers takes seconds to load, so options and data are checked before.
    from prefloss.cli.pretrained import check_model_folder, model_to_score

    check_model_folder(
        options.model,
        "name its base model as --model, and the adapter as --adapter if the reference has it on",
    )
    return model_to_score(
        options.model, options.adapter, dtype=options.dtype, revision=options.revision, cpu=options.cpu
    )


def _tokenizer(options: ReferenceOptions, messages: str | None) -> Any:
    """The tokenizer; it needs a chat template if a data set holds messages."""
    from prefloss.cli.pretrained import saved_tokenizer

    option, name, revision = "--model", options.model, options.revision
    if options.tokenizer is not None:
        option, name, revision = "--tokenizer", options.tokenizer, None
    tokenizer = saved_tokenizer(name, option, revision=revision)
    if messages is not None and not tokenizer.chat_template:
        raise CliError(
            f"{option}: {messages} holds messages, and the tokenizer of {name} has no chat template; expected the "
            "tokenizer of the training, with its template (--tokenizer)"
        )
    return tokenizer


def _check_rows(rows: list[Any], model: Any) -> None:
    """Refuse rows that are longer than the model's positions, or hold ids that it does not embed."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    if positions is not None and longest > positions:
        raise CliError(
            f"--max-length: a row has {longest} tokens, and the model positions for {positions}; expected a cut at "
            f"{positions} or less, the same as in training"
        )
    largest = max(max(prompt + completion) for prompt, completion in rows)
    vocabulary = model.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise CliError(
            f"--data: holds the token id {largest}, and {type(model).__name__} embeds {vocabulary}; is it of another "
            "tokenizer?"
        )


def _model_facts(options: ReferenceOptions, model: Any, dtype: str) -> tuple[str, ...]:
    adapter = f" with the adapter {options.adapter}" if options.adapter else ""
    processes = distributed.size()
    where = f"{processes} processes" if processes > 1 else str(next(model.parameters()).device)
    cut = "not cut" if options.max_length is None else f"cut at {options.max_length} tokens"
    return (
        f"{options.model}{adapter}: {model.num_parameters() / 1e6:.1f} million parameters, {dtype}, on {where}",
        f"prompt and completion together {cut}",
    )


def _print_table(console: Console, output: Path, built: Built, seconds: float) -> None:
    table = built.table
    tokens = int(table.tokens.sum())
    mean = f", mean log-prob {table.logps.sum() / tokens:.3f} nats per token" if tokens else ""
    facts = (
        f"{len(table)} completions of {tokens} tokens{mean}",
        f"{built.scored} of them scored in this run, in {seconds:.1f} s",
    )
    lost = (f"{built.empty} completions have no token within --max-length and are left out",)
    print_facts(console, "table", facts, lost if built.empty else ())
    line = Text.assemble((str(output), "bold"), (f"   Reference.table({str(output)!r})", "dim"))
    console.print(line, soft_wrap=True)
