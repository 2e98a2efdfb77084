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
from prefloss.data.files import rows_of
from prefloss.data.rows import KIND_WORDS
from prefloss.data.table import TableError
from prefloss.training import Built, ReferenceBuilder, distributed, header_of, parts_folder, score_rows


def write_reference(options: ReferenceOptions) -> None:
    """Score the data, write the table, print what is in it; a `CliError` if that cannot be done as asked."""
    options.check()
    # One process prints for all.
    console = Console(highlight=False, quiet=int(os.environ.get("RANK", "0")) != 0)
    sets, messages = _read(options.data, console)
    with _processes(), quiet(console):
        model = _model(options)
        tokenizer = None
        if not all("prompt_ids" in rows.column_names for rows in sets.values()):
            tokenizer = _tokenizer(options, messages)
        _run(options, sets, model, tokenizer, console)


def _read(paths: list[Path], console: Console) -> tuple[dict[str, Any], str | None]:
    """Data sets by name, and the name of one that holds messages, or None."""
    sets: dict[str, Any] = {}
    facts, warnings, messages = [], [], None
    try:
        for path in paths:
            name, rows = (path.name if path.name not in sets else str(path)), _token_ids(path)
            if rows is None:
                data = pdata.read(path)
                rows, form = data.rows, "messages" if data.conversational else "plain text"
                facts.append(f"{name}: {len(rows)} {KIND_WORDS[data.kind]} rows, {form}")
                warnings += data.notes
                messages = name if data.conversational else messages
            else:
                facts.append(f"{name}: {len(rows)} rows of token ids")
            sets[name] = rows
    except (pdata.DataError, OSError) as error:
        raise CliError(str(error)) from error
    print_facts(console, "data", facts, warnings)
    return sets, messages


def _token_ids(path: Path) -> Any:
    """The rows of a file that holds token ids, or None."""
    first = next(rows_of(path), None)
    if first is None or first[1].get("prompt_ids") is None:
        return None
    from datasets import Dataset

    return Dataset.from_list([row for _, row in rows_of(path)])


@contextmanager
def _processes() -> Iterator[None]:
    """The group of processes that torchrun or accelerate launch started, if one did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    # They meet at the end only, however long the slowest takes.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
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
    _prepare(options, console)

    def scored(rows: list[Any]) -> Any:
        _check_rows(rows, model)
        padding = 0 if tokenizer is None else tokenizer.pad_token_id or 0
        return score_rows(model, rows, batch_size=options.batch_size, padding=padding)

    began = time.perf_counter()
    try:
        builder = ReferenceBuilder(options.output, header, scored, tokenizer=tokenizer)
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
            built = builder.build(sets, lambda rows: progress.advance(bar, rows))
    except (TableError, FloatingPointError, pdata.DataError, TypeError) as error:
        raise CliError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CliError(
            f"--batch-size: {options.batch_size} rows at once do not fit into memory; try fewer, scored rows are kept"
        ) from error
    _print_table(console, options.output, built, time.perf_counter() - began)


def _prepare(options: ReferenceOptions, console: Console) -> None:
    """Make the folder; remove what an earlier run left, or print that it is kept."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    parts = parts_folder(options.output)
    if distributed.rank() == 0 and options.overwrite:
        options.output.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
    elif distributed.rank() == 0 and parts.exists():
        print_facts(console, "resume", (f"what an earlier run scored is kept, in {parts.name}",))
    distributed.barrier()


def _model(options: ReferenceOptions) -> Any:
    from transformers import AutoModelForCausalLM

    name = options.model
    check_model_folder(
        name, "name its base model as --model, and the adapter as --adapter if the reference has it on"
    )
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=options.revision)
    except (OSError, ValueError) as error:
        raise CliError(f"--model: {name} cannot be loaded: {first_line(error)}") from error
    if options.adapter is not None:
        try:
            from peft import PeftModel
        except ModuleNotFoundError as error:
            raise CliError("--adapter: peft is not installed: pip install 'prefloss[peft]'") from error
        try:
            model = PeftModel.from_pretrained(model, options.adapter)
        except (OSError, ValueError, RuntimeError) as error:
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
    except (OSError, ValueError) as error:
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
