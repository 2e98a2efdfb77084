"""Models and tokenizers that were saved, or are on the hub: loaded whole, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloss.cli.console import CliError, first_line, loading


def check_model_folder(name: str, adapter_advice: str) -> None:
    """Raise a `CliError` if a model's name is a missing folder, or the folder of an adapter."""
    path = Path(name)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise CliError(f"--model: {name} is an adapter; {adapter_advice}")
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise CliError(f"--model: no such folder: {name}")


def saved_model(name: str, **options: Any) -> Any:
    """A causal language model with all its weights; transformers would draw those that are missing at random."""
    with loading(f"--model: {name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, found = loaded
    absent = sorted({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])})
    if absent:
        more = ", ..." if len(absent) > 3 else ""
        raise CliError(
            f"--model: {name} lacks the weights of {len(absent)} parameters that {type(model).__name__} has, or has "
            f"them in another shape: {', '.join(absent[:3])}{more}; expected all weights (or, to train "
            "from random ones, a folder with config.json and no weights)"
        )
    return model


def saved_tokenizer(name: str, option: str = "--model", **options: Any) -> Any:
    """The tokenizer in a folder or on the hub; the option that named it is named in the error."""
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    # Readers of damaged files raise errors of every kind.
    except Exception as error:
        raise CliError(
            f"{option}: {name} has no tokenizer that can be loaded: {first_line(error)}"
        ) from error
