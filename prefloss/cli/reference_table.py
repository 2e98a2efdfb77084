"""`prefloss reference`: score a data set once, into a table that any training reads."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from prefloss import data as pdata
from prefloss.cli.command_options import ReferenceOptions, check_model_folder
from prefloss.cli.console import CliError, first_line, print_facts, quiet
from prefloss.data.read import read_token_ids
from prefloss.data.rows import KIND_WORDS
from prefloss.data.table import ReferenceTable, TableError
from prefloss.training import (
    Built,
    ReferenceBuilder,
    claimed,
    distributed,
    header_of,
    parts_folder,
    score_rows,
)

# How long processes wait for each other to start, and, at the end, for the slowest.
_MEETING, _SCORING = timedelta(minutes=5), timedelta(days=30)
# Bytes of a completion in the table, and as much again in a part of it.
_BYTES = 100


def write_reference(options: ReferenceOptions) -> None:
    """Score the data, write the table, print what is in it; a `CliError` if that cannot be done as asked."""
    options.check()
    # One process prints for all.
    console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")
    with _processes(), quiet(console), _as_one(), claimed(options.output, anew=options.overwrite) as resumes:
        _check_output(options)
        sets, messages = _read(options.data, console)
        _check_room(options, sets)
        model = _model(options)
        tokenizer = None
        if not all("prompt_ids" in rows.column_names for rows in sets.values()):
            tokenizer = _tokenizer(options, messages)
        if resumes:
            kept = f"what an earlier run scored is kept, in {parts_folder(options.output).name}"
            print_facts(console, "resume", (kept,))
        _run(options, sets, model, tokenizer, console)


@contextmanager
def _as_one() -> Iterator[None]:
    """What is wrong with the data or the output ends all processes, and one of them prints it."""
    try:
        yield
    except pdata.DataError as error:
        if distributed.rank() > 0:
            raise SystemExit(2) from error
        raise CliError(str(error)) from error


def _check_output(options: ReferenceOptions) -> None:
    """Refuse a table that cannot be added to before anything takes long."""
    if options.output.exists() and not options.overwrite:
        distributed.share().together(lambda: ReferenceTable.read(options.output).header)


def _check_room(options: ReferenceOptions, sets: dict[str, Any]) -> None:
    """Refuse a disk without room for the table and its parts."""
    sides = {name: len(columns) for name, columns in (("chosen", "ab"), ("chosen_ids", "ab"))}
    count = sum(len(rows) * max(sides.get(name, 1) for name in rows.column_names) for rows in sets.values())
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


@contextmanager
def _processes() -> Iterator[None]:
    """The group of processes that torchrun or accelerate launch started, if one did."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        yield
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_MEETING))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_SCORING)
    except (RuntimeError, ValueError) as error:
        raise CliError(
            f"the {os.environ['WORLD_SIZE']} processes that WORLD_SIZE names did not all start within "
            f"{_MEETING.seconds // 60} minutes: {first_line(error)}"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        raise CliError("another process ended before this one; its own message says why") from error
    finally:
        dist.destroy_process_group()


def _run(
    options: ReferenceOptions, sets: dict[str, Any], model: Any, tokenizer: Any, console: Console
) -> None:
    """Score the data, write the table."""
    header = header_of(
        model,
        tokenizer,
        max_length=options.max_length,
        name=options.model,
        revision=options.revision,
        adapter=options.adapter,
    )
    print_facts(console, "model", _model_facts(options, model, header.dtype))

    def scored(rows: list[Any]) -> Any:
        _check_rows(rows, model)
        padding = 0 if tokenizer is None else tokenizer.pad_token_id or 0
        return score_rows(model, rows, batch_size=options.batch_size, padding=padding)

    began = time.perf_counter()
    try:
        builder = ReferenceBuilder(
            options.output, header, scored, tokenizer=tokenizer, anew=options.overwrite
        )
        share = -(-sum(map(len, sets.values())) // distributed.size())
        columns = (
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=console.quiet) as progress:
            bar = progress.add_task("", total=share)
            built = builder.build_claimed(sets, lambda rows: progress.advance(bar, rows))
    except (FloatingPointError, TypeError) as error:
        raise CliError(str(error)) from error
    except OSError as error:
        raise CliError(
            f"--output: {options.output} cannot be written: {error.strerror or error}; scored rows are kept in "
            f"{parts_folder(options.output)}, and the same command goes on from there"
        ) from error
    except torch.OutOfMemoryError as error:
        raise CliError(
            f"--batch-size: {options.batch_size} rows at once do not fit into memory; try fewer, scored rows are kept"
        ) from error
    _print_table(console, options.output, built, time.perf_counter() - began)


def _model(options: ReferenceOptions) -> Any:
    from transformers import AutoModelForCausalLM

    name = options.model
    check_model_folder(
        name, "name its base model as --model, and the adapter as --adapter if the reference has it on"
    )
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=options.revision, output_loading_info=True
        )
        model, found = loaded
    # Loaders of damaged files raise errors of every kind.
    except Exception as error:
        raise CliError(f"--model: {name} cannot be loaded: {first_line(error)}") from error
    absent = sorted({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])})
    if absent:
        raise CliError(
            f"--model: {name} lacks the weights of {len(absent)} parameters that {type(model).__name__} has, or has "
            f"them in another shape: {', '.join(absent[:3])}"
        )
    if options.adapter is not None:
        try:
            from peft import PeftModel
        except ModuleNotFoundError as error:
            raise CliError("--adapter: peft is not installed: pip install 'prefloss[peft]'") from error
        try:
            model = PeftModel.from_pretrained(model, options.adapter)
        except Exception as error:
            raise CliError(f"--adapter: {options.adapter} cannot be loaded: {first_line(error)}") from error
    device = None if options.cpu else torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(device.type, local % torch.accelerator.device_count())
    return model.to(device or "cpu").eval()


def _tokenizer(options: ReferenceOptions, messages: str | None) -> Any:
    """The tokenizer; it needs a chat template if a data set holds messages."""
    from transformers import AutoTokenizer

    option, name, revision = "--model", options.model, options.revision
    if options.tokenizer is not None:
        option, name, revision = "--tokenizer", options.tokenizer, None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:
        raise CliError(
            f"{option}: {name} has no tokenizer that can be loaded: {first_line(error)}"
        ) from error
    if messages is not None and not tokenizer.chat_template:
        raise CliError(
            f"{option}: {messages} holds messages, and the tokenizer of {name} has no chat template; expected the "
            "tokenizer of the training, with its template (--tokenizer)"
        )
    return tokenizer


def _check_rows(rows: list[Any], model: Any) -> None:
    """Refuse rows that are longer than the model's positions, or hold ids that it does not embed."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
