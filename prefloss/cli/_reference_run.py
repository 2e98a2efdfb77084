"""One run of `prefloss reference`: model, table, closing words. Loads transformers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from prefloss import data as pdata
from prefloss.cli._errors import CliError
from prefloss.cli._facts import tell
from prefloss.cli._reference import ReferenceData, ReferenceSettings, progress, start_anew
from prefloss.data.table import TableError
from prefloss.training import distributed
from prefloss.training.build_table import Built, ReferenceBuilder, parts_folder
from prefloss.training.score import score_rows
from prefloss.training.table_lookup import header_of


def run(settings: ReferenceSettings, data: ReferenceData, console: Console) -> None:
    """Score the data and write the table.

    Raises:
        CliError: If model, data and table do not go together.
    """
    tell(console, "data", data.facts, data.warnings)
    model = _model(settings)
    tokenizer = _tokenizer(settings, data)
    header = header_of(
        model,
        tokenizer,
        max_length=settings.max_length,
        name=settings.model,
        revision=settings.revision,
        adapter=settings.adapter,
    )
    tell(console, "model", _model_facts(settings, model, header))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    if distributed.rank() == 0:
        _prepare(settings, console)
    distributed.barrier()
    most = _positions(model)

    def scored(rows: list[Any]) -> Any:
        _check(rows, most, model)
        padding = 0 if tokenizer is None else tokenizer.pad_token_id or 0
        return score_rows(model, rows, batch_size=settings.batch_size, padding=padding)

    began = time.perf_counter()
    try:
        builder = ReferenceBuilder(settings.output, header, scored, tokenizer=tokenizer)
        own = -(-sum(map(len, data.sets.values())) // distributed.size())
        with progress(console, own) as advance:
            built = builder.build(data.sets, advance)
    except (TableError, FloatingPointError, pdata.DataError, TypeError) as error:
        raise CliError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CliError(
            f"--batch-size: {settings.batch_size} rows at once do not fit into memory; try fewer, scored rows are kept"
        ) from error
    _conclude(console, settings.output, built, time.perf_counter() - began)


def _prepare(settings: ReferenceSettings, console: Console) -> None:
    """Remove what an earlier run left, or say that it is kept."""
    parts = parts_folder(settings.output)
    if settings.overwrite:
        start_anew(settings.output, parts)
    elif parts.exists():
        tell(console, "resume", (f"what an earlier run scored is kept, in {parts.name}",))


def _conclude(console: Console, output: Path, built: Built, seconds: float) -> None:
    table = built.table
    tokens = int(table.tokens.sum())
    mean = f", mean log-prob {table.logps.sum() / tokens:.3f} nats per token" if tokens else ""
    facts = [f"{len(table)} completions of {tokens} tokens{mean}"]
    facts.append(f"{built.scored} of them scored in this run, in {seconds:.1f} s")
    lost = (f"{built.empty} completions have no token within --max-length and are left out",)
    tell(console, "table", tuple(facts), lost if built.empty else ())
    console.print(
        Text.assemble((str(output), "bold"), (f"   Reference.table({str(output)!r})", "dim")), soft_wrap=True
    )


def _model(settings: ReferenceSettings) -> Any:
    from transformers import AutoModelForCausalLM

    name, path = settings.model, Path(settings.model)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise CliError(
            f"--model: {name} is an adapter; name its base model as --model, and the adapter as --adapter if the "
            "reference has it on"
        )
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise CliError(f"--model: no such folder: {name}")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise CliError(f"--model: {name} cannot be loaded: {_first_line(error)}") from error
    if settings.adapter is not None:
        model = _adapted(model, settings.adapter)
    return model.to(_device(settings)).eval()


def _adapted(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise CliError(
            "--adapter: needs peft, which is not installed: pip install 'prefloss[peft]'"
        ) from error
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise CliError(f"--adapter: {adapter} cannot be loaded: {_first_line(error)}") from error


def _tokenizer(settings: ReferenceSettings, data: ReferenceData) -> Any:
    """The tokenizer, or None if all data are token ids."""
    from transformers import AutoTokenizer

    if all("prompt_ids" in rows.column_names for rows in data.sets.values()):
        return None
    name = settings.tokenizer or settings.model
    option = "--tokenizer" if settings.tokenizer else "--model"
    try:
        found = AutoTokenizer.from_pretrained(
            name, revision=None if settings.tokenizer else settings.revision
        )
    except (OSError, ValueError) as error:
        raise CliError(
            f"{option}: {name} has no tokenizer that can be loaded: {_first_line(error)}"
        ) from error
    if data.messages is not None and not found.chat_template:
        raise CliError(
            f"{option}: {data.messages} holds messages, and the tokenizer of {name} has no chat template; expected the "
            "tokenizer of the training, with its template (--tokenizer)"
        )
    return found


def _device(settings: ReferenceSettings) -> torch.device:
    accelerator = None if settings.cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(accelerator.type, local % torch.accelerator.device_count())


def _positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check(rows: list[Any], positions: int | None, model: Any) -> None:
    """Refuse rows that the model would read nonsense from, or die on."""
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


def _model_facts(settings: ReferenceSettings, model: Any, header: Any) -> tuple[str, ...]:
    adapter = f" with the adapter {settings.adapter}" if settings.adapter else ""
    where = (
        f"{distributed.size()} processes" if distributed.size() > 1 else str(next(model.parameters()).device)
    )
    cut = "not cut" if settings.max_length is None else f"cut at {settings.max_length} tokens"
    return (
        f"{settings.model}{adapter}: {model.num_parameters() / 1e6:.1f} million parameters, {header.dtype}, on {where}",
        f"prompt and completion together {cut}",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
