"""What `prefloss train` recorded beside a model: loss, reference, tokenizer and template of its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefloss.cli.console import CliError, first_line
from prefloss.cli.run_folder import RECORD, WARM_START
from prefloss.training.fingerprint import template_hash, tokenizer_fingerprint

_METRICS = "metrics.json"


@dataclass(frozen=True)
class Record:
    """A training.

    Attributes:
        folder: Where it is recorded; None without a record.
        loss: As `dpo(beta=0.1)`.
        reference: As `--reference` takes it.
        settings: As the run folder keeps them.
    """

    folder: Path | None = None
    loss: str | None = None
    reference: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def warmed_up(self) -> bool:
        """Whether the training began with other weights than it was given."""
        return self.folder is not None and (self.folder / WARM_START).is_dir()

    def check_tokenizer(self, tokenizer: Any, option: str) -> None:
        """Raise a `CliError` if this is not the tokenizer of the training, or its template is another."""
        for name, got in (
            ("tokenizer", tokenizer_fingerprint(tokenizer)),
            ("chat template", template_hash(tokenizer)),
        ):
            setting = f"{name} of --model"
            if setting in self.settings and self.settings[setting] != got:
                raise CliError(
                    f"{option}: got another {name} (hash {got}) than the training in {self.folder} had (hash "
                    f"{self.settings[setting]}); expected the same, because rewards of other tokens mean nothing"
                )


def record_of(model: str) -> Record:
    """The record of a model's training, in its folder, or beside a checkpoint.

    Raises:
        CliError: If there is one that cannot be read.
    """
    path = Path(model)
    # A checkpoint lies in the folder of its run.
    for folder in (path, path.resolve().parent) if path.name.startswith("checkpoint-") else (path,):
        run, metrics = _read(folder / RECORD), _read(folder / _METRICS)
        settings = run.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        loss = settings.get("--loss", metrics.get("loss"))
        if isinstance(loss, str):
            return Record(folder, loss, _reference(folder, settings, metrics), settings)
    return Record()


def _reference(folder: Path, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    """Where the training began."""
    if settings.get("--lora") or metrics.get("lora_rank"):
        return "adapter"
    if (folder / WARM_START).is_dir():
        return str(folder / WARM_START)
    model = metrics.get("model")
    return model if isinstance(model, str) and model != "built-in" else None


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CliError(f"--model: {path} cannot be read: {first_line(error)}") from error
    return value if isinstance(value, dict) else {}
