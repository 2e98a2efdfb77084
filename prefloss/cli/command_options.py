"""The options of each command, one dataclass each: typer reads them from here, and so does the code that runs."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import prefloss
from prefloss import registry
from prefloss.cli.console import CliError

# Beyond these, numbers are typing errors, and do not fit where torch and numpy keep them.
_MOST, _MOST_SEED = 10**9, 2**32 - 1

# Options of `prefloss train` that say where and how often its work is kept, and change nothing in it.
_KEEPING = ("output", "overwrite", "resume", "save_steps", "save_minutes", "keep")


@dataclass(frozen=True)
class TrainOptions:
    """The options of `prefloss train`; None where the default depends on the others."""

    loss: Annotated[str, Option(help="Name of a loss; `prefloss losses` lists them.")] = "dpo"
    param: Annotated[
        list[str] | None,
        Option(help="A hyperparameter of the loss, as tau=0.1; may be repeated.", metavar="NAME=VALUE"),
    ] = None
    model: Annotated[
        str | None, Option(help="Model folder or hub id. Without it, a small built-in model.")
    ] = None
    data: Annotated[
        Path | None,
        Option(
            help="Preference data: .jsonl, .json, .parquet or a save_to_disk folder. Without it, the "
            "generated world, whose true reward is known."
        ),
    ] = None
    output: Annotated[
        Path | None,
        Option(help="Folder for model, metrics and picture. Without it, prefloss-runs/<loss>-<number>."),
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Write into --output if it is not empty.")] = False
    steps: Annotated[
        int | None, Option(min=1, max=_MOST, help="Optimizer steps. (default: 400, or as --epochs says)")
    ] = None
    epochs: Annotated[
        float | None,
        Option(help="Passes over the data, if --steps is not given. (default: 1; built-in model: 3)"),
    ] = None
    learning_rate: Annotated[
        float | None,
        Option(help="Highest learning rate. (default: 1e-6, with --lora 1e-5; built-in model: 2e-4)"),
    ] = None
    batch_size: Annotated[
        int | None, Option(min=1, max=_MOST, help="Rows per forward pass. (default: 16; with --data 8)")
    ] = None
    max_tokens: Annotated[
        int | None,
        Option(min=1, max=_MOST, help="Tokens of a forward pass, at most, in place of --batch-size."),
    ] = None
    accumulate: Annotated[int, Option(min=1, max=_MOST, help="Forward passes per optimizer step.")] = 1
    max_length: Annotated[
        int, Option(min=2, max=_MOST, help="Longest prompt + completion, tokens; the rest is cut.")
    ] = 512
    eval_fraction: Annotated[float, Option(help="Share of the prompts of --data to hold out.")] = 0.1
    samples: Annotated[
        int | None,
        Option(
            min=0,
            max=10**6,
            help="Completions to sample for KL and true reward. (default: 256; with --data 64)",
        ),
    ] = None
    lora: Annotated[
        bool, Option("--lora", help="Train a LoRA adapter on the linear layers (needs peft).")
    ] = False
    lora_rank: Annotated[int, Option(min=1, max=2**16, help="Rank of the adapter.")] = 16
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, about a fifth slower.")
    ] = False
    bf16: Annotated[
        bool | None,
        Option(
            "--bf16/--no-bf16", help="Compute in bfloat16, weights in float32. (default: on GPUs that can)"
        ),
    ] = None
    warm_start: Annotated[
        int | None,
        Option(
            min=0,
            max=_MOST,
            help="Supervised steps that teach a model with random weights to speak. (default: 600; with --data 200)",
        ),
    ] = None
    seed: Annotated[int, Option(min=0, max=_MOST_SEED, help="Seed of everything random.")] = 0
    cpu: Annotated[bool, Option("--cpu", help="Stay on the CPU though there is an accelerator.")] = False
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Go on with the run in --output, from its last checkpoint; begin it if there is none.",
        ),
    ] = False
    save_steps: Annotated[
        int | None, Option(min=1, max=_MOST, help="Steps between checkpoints, in place of minutes.")
    ] = None
    save_minutes: Annotated[
        float | None, Option(help="Most minutes of work that a kill may lose. (default: 1)")
    ] = None
    keep: Annotated[int, Option(min=1, max=_MOST, help="Checkpoints to keep, the newest.")] = 2

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the LoRA adapter; None trains the whole model."""
        return self.lora_rank if self.lora else None

    def check(self) -> None:
        """Raise a `CliError` if options are out of range or contradict each other, or there is no such loss."""
        if not 0 <= self.eval_fraction < 1:
            raise CliError(f"--eval-fraction: got {self.eval_fraction}, expected a number >= 0 and < 1")
        for name, most in (("epochs", 1e6), ("learning_rate", math.inf), ("save_minutes", 1e6)):
            value = getattr(self, name)
            if value is not None and not (0 < value <= most and math.isfinite(value)):
                limit = f"a number > 0 and <= {most:g}" if math.isfinite(most) else "a number > 0 and finite"
                raise CliError(f"{_flag(name)}: got {value}, expected {limit}")
        for one, other in (("steps", "epochs"), ("save_steps", "save_minutes"), ("batch_size", "max_tokens")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise CliError(f"{_flag(one)} and {_flag(other)}: got both, expected one of them")
        if self.resume and self.overwrite:
            raise CliError("--resume and --overwrite: got both, expected one of them")
        if self.resume and self.output is None:
            raise CliError("--resume: got no --output, expected the folder of the run to go on with")
        if self.lora and self.model is None:
            raise CliError(
                "--lora: got no --model to adapt, expected one; the built-in model is small enough to train whole"
            )
        self.bound_loss()

    def bound_loss(self) -> prefloss.Loss:
        """The loss that `--loss` and `--param` name, or a `CliError` in the registry's words."""
        parameters: dict[str, Any] = {}
        for text in self.param or ():
            for name, value in _parsed(text).items():
                if name in parameters:
                    raise CliError(f"--param: got {name} twice, expected it once")
                parameters[name] = value
        try:
            return prefloss.get(self.loss, **parameters)
        except (TypeError, ValueError) as error:
            raise CliError(str(error)) from error

    @staticmethod
    def folder_name(loss: str) -> str:
        """A loss's name as that of a folder: a sum of losses is named like "0.8*dpo + 0.2*ipo"."""
        return re.sub(r"[^A-Za-z0-9._]+", "_", loss).strip("_")[:100]

    def settings(self) -> dict[str, Any]:
        """What changes the training, for a run's record; the model is recorded when it is loaded."""
        from prefloss.training import distributed

        left_out = (*_KEEPING, "loss", "param", "data", "model")
        return {
            "--loss": repr(self.bound_loss()),
            **{
                _flag(item.name): getattr(self, item.name)
                for item in fields(self)
                if item.name not in left_out
            },
            "content of --data": None if self.data is None else _digest(self.data),
            "processes": distributed.size(),
        }

    def to_go_on(self, folder: Path) -> str:
        """The command that goes on with this run."""
        words = ["prefloss", "train"]
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        if processes != "1":
            words = ["torchrun", "--nproc-per-node", processes, "--no-python", *words]
        options = replace(self, output=folder, overwrite=False, resume=True)
        for field in fields(options):
            value = getattr(options, field.name)
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(_flag(field.name) if value else _flag(f"no_{field.name}"))
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [_flag(field.name), str(item)]
        return shlex.join(words)


def _flag(name: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return f"--{name.replace('_', '-')}"


def _check_dtype(name: str) -> None:
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise CliError(f"--dtype: got {name!r}, expected one of auto, float32, bfloat16, float16")


def _digest(path: Path) -> str | None:
    """Hash of a file, or of all files in a folder; None if there is nothing that can be read."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    try:
        for item in files:
            digest.update(f"{item.relative_to(path)} {item.stat().st_size};".encode())
            with item.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _parsed(text: str) -> dict[str, Any]:
    """`tau=0.1` -> {"tau": 0.1}, as the registry reads it inside `ipo(tau=0.1)`; also true, false and null."""
    name, equals, value = text.partition("=")
    value = {"true": "True", "false": "False", "null": "None"}.get(value.strip(), value.strip())
    try:
        if not name.strip():
            raise ValueError(text)
        (term,) = registry.parse(f"loss({name}{equals}{value})")
    except ValueError as error:
        raise CliError(f"--param: got {text!r}, expected NAME=VALUE, as tau=0.1") from error
    return term.parameters


@dataclass(frozen=True)
class ReferenceOptions:
    """The options of `prefloss reference`."""

    model: Annotated[str, Option(help="Model folder or hub id: the reference.")]
    data: Annotated[
        list[Path],
        Option(
            help="Preference data, text or token ids: .jsonl, .json, .parquet or a save_to_disk folder. Repeatable."
        ),
    ]
    output: Annotated[Path, Option(help="Table to write, or to add to; ends in .parquet.")]
    tokenizer: Annotated[str | None, Option(help="Folder or hub id, if not the model's own.")] = None
    adapter: Annotated[
        str | None, Option(help="PEFT adapter to switch on. Without it, the model as it is.")
    ] = None
    revision: Annotated[str | None, Option(help="Branch, tag or commit of the model.")] = None
    dtype: Annotated[
        str, Option(help="Of the weights: auto (as they are saved), float32, bfloat16 or float16.")
    ] = "auto"
    batch_size: Annotated[int, Option(min=1, help="Completions per forward pass.")] = 8
    max_length: Annotated[
        int | None,
        Option(min=2, help="Longest prompt + completion, tokens; the rest is cut. (default: no cut)"),
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", help="Start anew, though --output or parts of it are there.")
    ] = False
    cpu: Annotated[bool, Option("--cpu", help="Stay on the CPU though there is an accelerator.")] = False

    def check(self) -> None:
        """Raise a `CliError` if there is no such dtype, or nothing to write to."""
        _check_dtype(self.dtype)
        if os.path.isdir(self.output):
            raise CliError(f"--output: {self.output} is a folder; expected a file, as table.parquet")
        if self.output.suffix != ".parquet":
            raise CliError(f"--output: got {self.output}, expected a name that ends in .parquet")


@dataclass(frozen=True)
class ScoreOptions:
    """The options of `prefloss score`; None where the default depends on the others."""

    model: Annotated[
        str, Option(help="Trained model or adapter: a folder, as of prefloss train, or a hub id.")
    ]
    data: Annotated[
        Path,
        Option(
            help="Pairs, votes, rankings or plain completions: .jsonl, .json, .parquet or a save_to_disk folder."
        ),
    ]
    output: Annotated[Path, Option(help="File for the rewards.")]
    reference: Annotated[
        str | None,
        Option(
            help="What the model was trained against: a model folder or hub id, `adapter` (adapters off), a table of "
            "prefloss reference, or `none`. (default: as the record of prefloss train says)"
        ),
    ] = None
    loss: Annotated[
        str | None,
        Option(
            help="Loss of the training, as dpo(beta=0.1). (default: as the record of prefloss train says)"
        ),
    ] = None
    format: Annotated[
        str | None,
        Option(help="table (CSV), jsonl, parquet or rewardbench. (default: by the ending of --output)"),
    ] = None
    per_token: Annotated[bool, Option("--per-token", help="Write the reward of each token too.")] = False
    html: Annotated[
        Path | None, Option(help="Page that shows completions with each token coloured by its reward.")
    ] = None
    chat: Annotated[
        bool, Option("--chat", help="Put plain text into the chat template: a user's prompt, an answer.")
    ] = False
    tokenizer: Annotated[str | None, Option(help="Folder or hub id, if not the model's own.")] = None
    revision: Annotated[str | None, Option(help="Branch, tag or commit of the model.")] = None
    dtype: Annotated[
        str, Option(help="Of the weights: auto (as they are saved), float32, bfloat16 or float16.")
    ] = "auto"
    max_length: Annotated[
        int | None,
        Option(
            min=2, max=_MOST, help="Longest prompt + completion, tokens. (default: the model's positions)"
        ),
    ] = None
    allow_truncation: Annotated[
        bool,
        Option("--allow-truncation", help="Cut longer rows and count them; without it they are an error."),
    ] = False
    batch_tokens: Annotated[int, Option(min=1, max=_MOST, help="Tokens of a forward pass, at most.")] = 4096
    overwrite: Annotated[
        bool, Option("--overwrite", help="Start anew, though --output or parts of it are there.")
    ] = False
    cpu: Annotated[bool, Option("--cpu", help="Stay on the CPU though there is an accelerator.")] = False

    @property
    def written_as(self) -> str:
        """The format of the output."""
        return self.format or {".jsonl": "jsonl", ".parquet": "parquet", ".csv": "table"}.get(
            self.output.suffix, ""
        )

    def check(self) -> None:
        """Raise a `CliError` if options do not go together, or there is nothing to write to."""
        _check_dtype(self.dtype)
        formats = ("table", "jsonl", "parquet", "rewardbench")
        if self.format is not None and self.format not in formats:
            raise CliError(f"--format: got {self.format!r}, expected one of {', '.join(formats)}")
        if not self.written_as:
            raise CliError(
                f"--output: got {self.output}, expected a name that ends in .jsonl, .parquet or .csv, or --format"
            )
        if self.per_token and self.written_as not in ("jsonl", "parquet"):
            raise CliError(
                f"--per-token: got the format {self.written_as}, which has one number a completion; expected jsonl or "
                "parquet"
            )
        for option, path in (("--output", self.output), ("--html", self.html)):
            if path is not None and os.path.isdir(path):
                raise CliError(f"{option}: {path} is a folder; expected a file")
            if path is not None and os.path.realpath(path) == os.path.realpath(self.data):
                raise CliError(f"{option}: got {path}, which --data reads; expected another file")
        if self.html is not None and not self.html.parent.is_dir():
            raise CliError(f"--html: no such folder: {self.html.parent}")
        if self.html is not None and os.path.realpath(self.html) == os.path.realpath(self.output):
            raise CliError(f"--html: got {self.html}, which is --output; expected another file")

    def settings(self) -> dict[str, Any]:
        """What changes the output, for its record; model, reference and loss are recorded when they are loaded."""
        names = ("per_token", "chat", "max_length", "allow_truncation", "batch_tokens")
        return {
            **{_flag(name): getattr(self, name) for name in names},
            "--format": self.written_as,
            "--html": self.html is not None,
            "content of --data": _digest(self.data),
        }


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of `prefloss reproduce`."""

    name: Annotated[str | None, Argument(help="The experiment to run; without it, all are listed.")] = None
    all: Annotated[bool, Option("--all", help="Run all of them, a process for each core.")] = False
    seeds: Annotated[
        int | None,
        Option(min=2, max=10**4, help="Number of seeds. (default: as many as the experiment is made for)"),
    ] = None
    first_seed: Annotated[
        int, Option(min=0, max=_MOST, help="The first of them; the others follow it one by one.")
    ] = 0
    output: Annotated[
        Path | None,
        Option(help="Folder; each experiment writes into one of its name. (default: prefloss-runs/evidence)"),
    ] = None

    def check(self) -> None:
        """Raise a `CliError` if there is both a name and --all, or an option that nothing would use."""
        if self.name is not None and self.all:
            raise CliError(f"--all: got it beside the name {self.name!r}, expected one of them")
        if self.name is None and not self.all and self != ReproduceOptions():
            raise CliError("got options without an experiment, expected NAME or --all beside them")
