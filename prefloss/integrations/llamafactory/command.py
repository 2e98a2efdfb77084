"""LLaMA-Factory's commands, with `prefloss` in the configuration of `train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory import launcher  # type: ignore[attr-defined]
from llamafactory.train import tuner
from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.kto import workflow as kto

from prefloss.arguments import shown
from prefloss.integrations.binding import replaced
from prefloss.integrations.llamafactory.trainers import HOSTS, DPOTrainer, KTOTrainer
from prefloss.integrations.slot import SlotCallback

_own_run_exp = tuner.run_exp


class ConfigurationError(ValueError):
    """What a configuration asks for cannot be trained; the message is for its author."""


def main() -> None:
    """LLaMA-Factory's command line, with `prefloss` in what `train` reads.

    Where LLaMA-Factory starts several processes, each of them runs this module in place of LLaMA-Factory's launcher.
    """
    # As `python script.py` does, so that modules in the working directory can be imported.
    sys.path.insert(0, os.getcwd())
    try:
        if sys.argv[1:2] == ["train"] and "TORCHELASTIC_RUN_ID" in os.environ:
            del sys.argv[1]
            run_exp()
        else:
            # The launcher starts `torchrun ... {__file__} {arguments}`.
            itself = {"__file__": f"-m {__package__} train"}
            with replaced(launcher, itself), replaced(tuner, {"run_exp": run_exp}):
                launcher.launch()
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run_exp(args: Any = None, callbacks: Any = None) -> None:
    """LLaMA-Factory's `run_exp`: train as a configuration says, `prefloss` included.

    Args:
        args: The configuration, a dict or a list of command-line words; None reads `sys.argv`.
        callbacks: For the trainer.

    Raises:
        ConfigurationError: If the loss is unknown, the stage cannot train it, or the configuration sets an option that
            it does not read.
    """
    expression, args = _taken_out(tuner.read_args(args))
    if expression is None:
        _own_run_exp(args, callbacks)
        return
    if tuner.get_ray_args(args).use_ray:
        raise ConfigurationError(
            "use_ray: got True beside prefloss, which ray's workers would not get; use torchrun"
        )
    callback = _callback(expression)
    with _trainers_of(callback):
        _own_run_exp(args, [*(callbacks or []), callback])


def _taken_out(args: Any) -> tuple[Any, Any]:
    """The value of `prefloss`, None if it is not there, and the arguments without it."""
    if isinstance(args, dict):
        return args.get("prefloss"), {name: value for name, value in args.items() if name != "prefloss"}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prefloss")
    own, rest = parser.parse_known_args(args)
    return own.prefloss, rest


def _callback(expression: Any) -> SlotCallback:
    if not isinstance(expression, str):
        raise ConfigurationError(
            f"prefloss: got {shown(expression)}, expected a loss as text, such as 'simpo(beta=2.0)'"
        )
    try:
        return SlotCallback(expression)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"prefloss: {error}") from error


@contextmanager
def _trainers_of(callback: SlotCallback) -> Iterator[None]:
    """A context in which LLaMA-Factory builds trainers with the callback's loss."""
    own_get_train_args = tuner.get_train_args

    def get_train_args(args: Any) -> Any:
        parsed = own_get_train_args(args)
        _resolve(callback, model_args=parsed[0], finetuning_args=parsed[3])
        return parsed

    with (
        replaced(tuner, {"get_train_args": get_train_args}),
        replaced(dpo, {"CustomDPOTrainer": DPOTrainer}),
        replaced(kto, {"CustomKTOTrainer": KTOTrainer}),
    ):
        yield


def _resolve(callback: SlotCallback, *, model_args: Any, finetuning_args: Any) -> None:
    """Give the loss the configuration's options, and the configuration what the loss needs."""
    for args, option in ((model_args, "use_kt"), (finetuning_args, "use_mca")):
        if getattr(args, option, False):
            raise ConfigurationError(
                f"{option}: got True beside prefloss, which has no place in that trainer"
            )
    if finetuning_args.stage not in HOSTS:
        raise ConfigurationError(
            f"stage: got {finetuning_args.stage!r} beside prefloss, expected one of {', '.join(map(repr, HOSTS))}"
        )
    try:
        loss = callback.resolve(HOSTS[finetuning_args.stage], finetuning_args)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
    if not loss.spec.needs_reference and finetuning_args.stage == "dpo":
        # LLaMA-Factory loads no reference for this name; its loss is not used.
        finetuning_args.pref_loss, finetuning_args.use_ref_model = "simpo", False
