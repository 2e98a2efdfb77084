"""What `prefloss score` computes with: model, tokenizer, loss and reference, loaded and checked against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefloss
from prefloss.cli.command_options import ScoreOptions
from prefloss.cli.console import CliError, loading
from prefloss.cli.pretrained import check_model_folder, model_to_score, saved_tokenizer
from prefloss.cli.scoring.record import Record
from prefloss.cli.scoring.rows import Kind
from prefloss.data.table import ReferenceTable
from prefloss.training.fingerprint import dtype_of, template_hash, tokenizer_fingerprint, weights_fingerprint

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Setup:
    """Everything that gives rewards.

    Attributes:
        model: The trained model.
        tokenizer: Its tokenizer.
        loss: Its loss.
        reference: As `prefloss.Scorer` takes it.
        reference_name: What it is, in words.
        warnings: What may be wrong, in sentences.
    """

    model: Any
    tokenizer: Any
    loss: prefloss.Loss
    reference: Any
    reference_name: str
    warnings: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(dtype_of(self.model)).removeprefix("torch.")

    @property
    def embedded(self) -> int:
        """Token ids that both models know: those below it."""
        models = [self.model, *([self.reference] if hasattr(self.reference, "get_input_embeddings") else [])]
        return min(model.get_input_embeddings().num_embeddings for model in models)

    def settings(self) -> dict[str, Any]:
        """What the rewards depend on, for the output's record."""
        reference: Any = self.reference
        if isinstance(reference, ReferenceTable):
            reference = reference.header.weights
        elif not isinstance(reference, str | None):
            reference = weights_fingerprint(reference)
        return {
            "--loss": repr(self.loss),
            "weights of --model": weights_fingerprint(self.model),
            "--dtype": self.dtype,
            "--reference": reference,
            "tokenizer of --model": tokenizer_fingerprint(self.tokenizer),
            "chat template of --model": template_hash(self.tokenizer),
        }


def loss_of(options: ScoreOptions, record: Record) -> tuple[prefloss.Loss, tuple[str, ...]]:
    """The loss that the options name, or that of the training; and a warning if they differ."""
    name = options.loss or record.loss
    if name is None:
        raise CliError(
            f"--loss: got none, and {options.model} has no record of prefloss train; expected the loss of its training "
            "with its parameters, as 'dpo(beta=0.1)'"
        )
    try:
        loss = prefloss.get(name)
        # Refuses a loss without one.
        _ = loss.reward
    except (TypeError, ValueError) as error:
        raise CliError(f"--loss: {error}") from error
    if record.loss in (None, name, repr(loss)):
        return loss, ()
    return loss, (f"the training in {record.folder} had the loss {record.loss}",)


def setup_of(options: ScoreOptions, record: Record, loss: prefloss.Loss, kind: Kind) -> Setup:
    """Load all; a `CliError` if something cannot be loaded, or they do not go together."""
    name, warnings = _reference_name(options, record, loss)
    check_model_folder(_adapter(options.model, "--model")[1], "")
    tokenizer = _tokenizer(options, record, kind)
    model = _model(options, options.model, "--model", options.revision)
    if name == "none":
        return Setup(model, tokenizer, loss, None, name, warnings)
    if name == "adapter":
        if not hasattr(model, "disable_adapter"):
            raise CliError(
                f"--reference: got 'adapter', and {options.model} has none; expected another reference"
            )
        return Setup(model, tokenizer, loss, name, "the model with its adapters off")
    if name.endswith(".parquet"):
        return Setup(model, tokenizer, loss, _table(options, name, tokenizer), f"the table {name}")
    reference = _model(options, name, "--reference")
    _check_same_tokens(tokenizer, name)
    return Setup(model, tokenizer, loss, reference, name, _warnings(record, model, reference))


def _reference_name(
    options: ScoreOptions, record: Record, loss: prefloss.Loss
) -> tuple[str, tuple[str, ...]]:
    """The reference as the option names it, or as the training had it; and a warning if the loss reads none."""
    name = options.reference or record.reference or "none"
    if "reference" not in loss.reward.needs:
        unread = options.reference not in (None, "none")
        warning = f"the reward of {loss.name} reads no reference: --reference {name} is left out"
        return "none", (warning,) if unread else ()
    if name == "none":
        raise CliError(
            f"--reference: got none, and the reward of {loss.name} is measured against one; expected the model that "
            "the training began with, 'adapter' to switch adapters off, or a table of prefloss reference"
        )
    return name, ()


def _model(options: ScoreOptions, name: str, option: str, revision: str | None = None) -> Any:
    adapter, base = _adapter(name, option)
    check_model_folder(base, "", option)
    return model_to_score(
        base, adapter, option=option, dtype=options.dtype, revision=revision, cpu=options.cpu
    )


def _adapter(name: str, option: str) -> tuple[str | None, str]:
    """The folder of an adapter, or None, and the model itself or that of the adapter."""
    config = Path(name) / _ADAPTER
    if not config.exists() or (Path(name) / "config.json").exists():
        return None, name
    with loading(f"{option}: {name}"):
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CliError(f"{option}: {config} names no base model; expected base_model_name_or_path")
    return name, base


def _tokenizer(options: ScoreOptions, record: Record, kind: Kind) -> Any:
    option, name, revision = "--model", options.model, options.revision
    if options.tokenizer is not None:
        option, name, revision = "--tokenizer", options.tokenizer, None
    elif not (Path(name) / "tokenizer_config.json").exists():
        # Many adapters are saved without one.
        name = _adapter(name, option)[1]
    tokenizer = saved_tokenizer(name, option, revision=revision)
    if tokenizer.eos_token is None:
        raise CliError(
            f"{option}: the tokenizer of {name} has no end token (eos_token), which ends a completion"
        )
    record.check_tokenizer(tokenizer, option)
    if kind.conversational and not tokenizer.chat_template:
        what = "--chat asks for messages" if options.chat else f"{options.data} holds messages"
        raise CliError(
            f"{option}: {what}, and the tokenizer of {name} has no chat template; expected the tokenizer of the "
            "training, with its template (--tokenizer)"
        )
    return tokenizer


def _check_same_tokens(tokenizer: Any, name: str) -> None:
    """Refuse a reference whose own tokenizer gives tokens other numbers."""
    try:
        theirs: Mapping[str, int] = saved_tokenizer(name, "--reference").get_vocab()
    except CliError:
        # Saved without one.
        return
    ours = tokenizer.get_vocab()
    apart = [token for token, number in theirs.items() if ours.get(token, number) != number]
    if apart:
        raise CliError(
            f"--reference: {name} has another tokenizer: {apart[0]!r} is token {theirs[apart[0]]} there and "
            f"{ours[apart[0]]} in the model's; expected the model that the training began with"
        )


def _table(options: ScoreOptions, name: str, tokenizer: Any) -> ReferenceTable:
    """A table that was scored with this tokenizer and length."""
    table = ReferenceTable.read(name)
    for what, then, now in (
        ("tokenizer", table.header.vocabulary, tokenizer_fingerprint(tokenizer)),
        ("chat template", table.header.chat_template, template_hash(tokenizer)),
        ("--max-length", table.header.max_length, options.max_length),
    ):
        if then != now:
            raise CliError(
                f"--reference: {name} was scored with another {what}: got {now}, expected {then}; write a table with "
                "prefloss reference and the same"
            )
    return table


def _warnings(record: Record, model: Any, reference: Any) -> tuple[str, ...]:
    weights = weights_fingerprint(reference)
    if weights is not None and weights == weights_fingerprint(model):
        return ("the reference has the weights of the model: every reward is 0",)
    then = None if record.warmed_up else record.settings.get("weights of --model")
    if then is not None and then != weights:
        return (
            f"the reference has other weights than the model that the training in {record.folder} began with",
        )
    return ()
