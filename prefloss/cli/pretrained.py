"""Models and tokenizers that were saved, or are on the hub: loaded whole, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefloss.cli.console import CliError, first_line, loading


def check_model_folder(name: str, adapter_advice: str, option: str = "--model") -> None:
    """Raise a `CliError` if a model's name is a missing folder, or the folder of an adapter."""
    path = Path(name)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise CliError(f"{option}: {name} is an adapter; {adapter_advice}")
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise CliError(f"{option}: no such folder: {name}")


def saved_model(name: str, option: str = "--model", **options: Any) -> Any:
    """A causal language model with all its weights; transformers would draw those that are missing at random."""
    with loading(f"{option}: {name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, found = loaded
    absent = sorted({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])})
    if absent:
        more = ", ..." if len(absent) > 3 else ""
        raise CliError(
            f"{option}: {name} lacks the weights of {len(absent)} parameters that {type(model).__name__} has, or has "
            f"them in another shape: {', '.join(absent[:3])}{more}; expected all weights (or, to train "
            "from random ones, a folder with config.json and no weights)"
        )
    return model


def model_to_score(
    name: str,
    adapter: str | None = None,
    *,
    option: str = "--model",
    dtype: str = "auto",
    revision: str | None = None,
    cpu: bool = False,
) -> Any:
    """A model in evaluation mode on the device of this process, with an adapter switched on if one is named."""
    model = saved_model(
        name, option, dtype=dtype if dtype == "auto" else getattr(torch, dtype), revision=revision
    )
    if adapter is not None:
        try:
            from peft import PeftModel
        except ModuleNotFoundError as error:
            raise CliError("--adapter: peft is not installed: pip install 'prefloss[peft]'") from error
        with loading(f"--adapter: {adapter}"):
            model = PeftModel.from_pretrained(model, adapter)
    device = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(device.type, local % torch.accelerator.device_count())
    return model.to(device or "cpu").eval()


def saved_tokenizer(name: str, option: str = "--model", **options: Any) -> Any:
    """The tokenizer in a folder or on the hub; the option that named it is named in the error."""
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    # Readers of damaged files raise errors of every kind.
    except Exception as error:
        raise CliError(
            f"{option}: {name} has no tokenizer that can be loaded: {first_line(error)}"
        ) from error
