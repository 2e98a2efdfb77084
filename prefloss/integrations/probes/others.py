"""Trainers of packages that compute their losses themselves: LLaMA-Factory, ms-swift and OpenRLHF."""

from __future__ import annotations

import inspect
import json
import tempfile
import typing
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from prefloss.integrations.probes.built import common, compared, tiny_model, tokenizer
from prefloss.integrations.probes.known import Rows
from prefloss.integrations.probes.prober import BETA, LossModule, Prober, Votes


def _llamafactory_dpo(name: str, *, beta: float, label_smoothing: float) -> Any:
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    arguments = FinetuningArguments(
        stage="dpo", pref_loss=name, pref_beta=beta, dpo_label_smoothing=label_smoothing
    )
    return _llamafactory(CustomDPOTrainer, arguments, reference=arguments.use_ref_model)


def _llamafactory_kto(name: str, *, beta: float) -> Any:
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.kto.trainer import CustomKTOTrainer

    return _llamafactory(CustomKTOTrainer, FinetuningArguments(stage="kto", pref_beta=beta), reference=True)


def _llamafactory(trainer: Any, arguments: Any, *, reference: bool) -> Any:
    from transformers import TrainingArguments

    return trainer(
        model=tiny_model(),
        ref_model=tiny_model() if reference else None,
        finetuning_args=arguments,
        processor=None,
        args=TrainingArguments(**common()),
        tokenizer=tokenizer(),
        data_collator=lambda examples: examples,
    )


def _llamafactory_names() -> list[str]:
    from llamafactory.hparams import FinetuningArguments

    return list(typing.get_args(typing.get_type_hints(FinetuningArguments)["pref_loss"]))


def _swift(kind: str, name: str, **options: Any) -> Any:
    """The trainer that `swift rlhf` builds, taken before it trains."""
    from swift.pipelines import rlhf_main
    from swift.pipelines.train.rlhf import SwiftRLHF

    folder = Path(tempfile.mkdtemp(prefix="prefloss-probe-"))
    tiny_model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    asked = {"role": "user", "content": "q p"}
    answered = [[asked, {"role": "assistant", "content": word}] for word in ("yes", "no")]
    rows: list[dict[str, Any]] = [{"messages": answered[0], "rejected_response": "no"}]
    if kind == "kto":
        # ms-swift drops rows whose mismatched completion would be their own.
        rows = [
            {"messages": messages, "label": label}
            for messages, label in zip(answered, (True, False), strict=True)
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **{"rlhf_type": kind, "loss_type": name, "model": folder / "model", "ref_model": folder / "model"},
        **{"model_type": "llama", "template": "default", "tuner_type": "full", "torch_dtype": "float32"},
        **{"dataset": folder / "rows.jsonl", "split_dataset_ratio": 0, "load_from_cache_file": "false"},
        **{"output_dir": folder, "use_cpu": "true", "use_hf": "true", "report_to": "none"},
        **{"check_model": "false", "gradient_checkpointing": "false", "max_length": 64},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **options},
    }
    found: list[Any] = []
    with mock.patch.object(SwiftRLHF, "train", lambda pipeline, trainer: found.append(trainer)):
        rlhf_main([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    return found[0]


def _swift_names() -> list[str]:
    from swift.rlhf_trainers import dpo_trainer

    return compared(inspect.getsource(dpo_trainer.DPOTrainer.dpo_loss))


def _labelled(trainer: Any, rows: Rows) -> dict[str, Any]:
    padded = rows.padded()
    del padded["completion_mask"]
    return {**padded, "labels": rows.labels()}


def _llamafactory_votes(trainer: Any, rows: Rows, desirable: list[bool]) -> dict[str, Any]:
    """Completions and mismatched ones, whose names begin with `kl_`."""
    values, count = _labelled(trainer, rows), len(desirable)
    mismatched = {f"kl_{key}": rows_of[count:] for key, rows_of in values.items()}
    completions = {key: rows_of[:count] for key, rows_of in values.items()}
    return {**completions, **mismatched, "kto_tags": torch.tensor(desirable)}


def _swift_votes(trainer: Any, rows: Rows, desirable: list[bool]) -> dict[str, Any]:
    """Completions and mismatched ones, whose names begin with `KL_`."""
    values, count = _labelled(trainer, rows), len(desirable)
    completions = {f"completion_{key}": rows_of[:count] for key, rows_of in values.items()}
    mismatched = {f"KL_completion_{key}": rows_of[count:] for key, rows_of in values.items()}
    return {**completions, **mismatched, "label": desirable}


def _openrlhf(name: str, *, beta: float) -> Any:
    from openrlhf.models import DPOLoss

    return DPOLoss(beta, ipo=name == "ipo")


LLAMAFACTORY = Prober(
    "llamafactory",
    "llamafactory",
    _llamafactory_names,
    _llamafactory_dpo,
    _labelled,
    # pref_beta weighs ORPO's term; simpo_gamma is 0.5 by default.
    lambda: {"orpo": f"orpo(odds_weight={BETA})", "simpo": "simpo(gamma=0.5)"},
)
LLAMAFACTORY_KTO = Votes(
    "llamafactory-kto", "llamafactory", lambda: ["kto"], _llamafactory_kto, _llamafactory_votes
)
SWIFT = Prober(
    "swift", "ms-swift", _swift_names, lambda name, **given: _swift("dpo", name, **given), _labelled
)
SWIFT_KTO = Votes(
    "swift-kto",
    "ms-swift",
    lambda: ["kto", "apo_zero_unpaired"],
    lambda name, **given: _swift("kto", name, **given),
    _swift_votes,
)
OPENRLHF = LossModule("openrlhf", "openrlhf", lambda: ["sigmoid", "ipo"], _openrlhf, dict)
