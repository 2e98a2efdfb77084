"""The folder that a run writes to."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from prefloss.cli._errors import CliError
from prefloss.cli._settings import Settings

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")


def choose(settings: Settings, loss: str) -> Path:
    """The folder that `--output` names, or the first free prefloss-runs/<loss>-<number>; not made yet.

    Raises:
        CliError: If it is a file, or is not empty and `--overwrite` is not given.
    """
    if settings.output is None:
        # A sum of losses has a name like "0.8*dpo + 0.2*ipo".
        slug = re.sub(r"[^A-Za-z0-9._]+", "_", loss).strip("_")
        folders = (Path("prefloss-runs") / f"{slug}-{number}" for number in itertools.count(1))
        return next(folder for folder in folders if not folder.exists())
    folder = settings.output
    if folder.exists() and not folder.is_dir():
        raise CliError(f"--output: {folder} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not settings.overwrite:
        raise CliError(f"--output: {folder} exists and is not empty; choose another, or add --overwrite")
    return folder


def save(folder: Path, model: object, tokenizer: object) -> None:
    """Write model and tokenizer in transformers' format, in place of weights that an earlier run left there."""
    # Shards of a larger model, or an adapter, would be loaded together with what is written now.
    for pattern in _WEIGHTS:
        for stale in folder.glob(pattern):
            stale.unlink()
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
