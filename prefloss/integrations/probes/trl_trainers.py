"""TRL's trainers, and those of the packages that train with subclasses of them: axolotl and Unsloth."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from prefloss.integrations.probes.built import common, compared, tiny_model, tokenizer
from prefloss.integrations.probes.known import Rows
from prefloss.integrations.probes.prober import Prober, Votes

_PAIRS = [{"prompt": "q p", "chosen": "yes", "rejected": "no"}] * 2
_VOTES = [{"prompt": "q p", "completion": "yes", "label": label} for label in (True, False)]


def _build(trainer: Any, config: Any, rows: list[dict[str, Any]], name: str, **options: Any) -> Any:
    from datasets import Dataset

    several = "list" in str(config.__dataclass_fields__["loss_type"].type)
    settings = {**common(), "per_device_train_batch_size": len(rows), **options}
    return trainer(
        model=tiny_model(),
        ref_model=tiny_model(),
        # Up to TRL 0.20, and in KTO's configuration, loss_type is a string.
        args=config(loss_type=[name] if several else name, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def _dpo(name: str, **options: Any) -> Any:
    import trl

    return _build(trl.DPOTrainer, trl.DPOConfig, _PAIRS, name, **options)


def _kto(name: str, **options: Any) -> Any:
    import trl

    return _build(trl.KTOTrainer, trl.KTOConfig, _VOTES, name, **options)


def _axolotl_dpo(name: str, **options: Any) -> Any:
    from axolotl.core.trainers.dpo import DPOStrategy

    classes = DPOStrategy.get_trainer_class(), DPOStrategy.get_training_args_class()
    return _build(*classes, _PAIRS, name, **options)


def _axolotl_kto(name: str, **options: Any) -> Any:
    from axolotl.core.trainers import AxolotlKTOTrainer
    from axolotl.core.training_args import AxolotlKTOConfig

    return _build(AxolotlKTOTrainer, AxolotlKTOConfig, _VOTES, name, **options)


def _dpo_names() -> list[str]:
    from trl.trainer import dpo_trainer

    return compared(inspect.getsource(dpo_trainer))


def _kto_names() -> list[str]:
    import trl

    # Since 0.26 in another package, and for a while a subclass that only warned.
    modules = {part.__module__ for part in trl.KTOTrainer.__mro__ if part.__name__ == "KTOTrainer"}
    return sorted(
        {name for module in modules for name in compared(inspect.getsource(importlib.import_module(module)))}
    )


def _after_unsloth(function: Any) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        # Puts its own trainers in the place of TRL's.
        importlib.import_module("unsloth")
        return function(*arguments, **options)

    return run


def _means() -> dict[str, str]:
    # With a running mean up to 0.28.
    from trl import DPOTrainer

    return {"bco_pair": "bco_pair"} if hasattr(DPOTrainer, "dpo_loss") else {}


def _pairs(trainer: Any, rows: Rows) -> dict[str, Any]:
    """A batch of pairs; up to TRL 0.28 prompts and completions are apart."""
    if not hasattr(trainer, "dpo_loss"):
        return rows.padded()
    padded, half = rows.padded(), len(rows.tokens) // 2
    ids, mask = padded["input_ids"], padded["attention_mask"]
    prompt = {"prompt_input_ids": ids[:half, :2], "prompt_attention_mask": mask[:half, :2]}
    sides = {"chosen": slice(half), "rejected": slice(half, None)}
    completions = {
        f"{side}_{key}": values[place, 2:]
        for side, place in sides.items()
        for key, values in (("input_ids", ids), ("attention_mask", mask))
    }
    return {**prompt, **completions}


def _votes(trainer: Any, rows: Rows, desirable: list[bool]) -> dict[str, Any]:
    """A batch of labels under the names of all versions: a trainer reads its own and passes the rest to the model."""
    padded, count = {**rows.padded(), "labels": rows.labels()}, len(desirable)
    batch: dict[str, Any] = {}
    for prefix, place in (("", slice(count)), ("KL_", slice(count, None))):
        for key, values in padded.items():
            batch[f"{prefix}completion_{key.removeprefix('completion_')}"] = values[place]
            batch[f"{prefix}{key}"] = values[place]
    del batch["labels"], batch["KL_labels"]
    # Up to TRL 1.5, a list.
    label = desirable if hasattr(trainer, "kto_loss") else torch.tensor(desirable)
    return {**batch, "label": label}


TRL = Prober("trl", "trl", _dpo_names, _dpo, _pairs, _means)
TRL_KTO = Votes("trl-kto", "trl", _kto_names, _kto, _votes)
AXOLOTL = Prober("axolotl", "axolotl", _dpo_names, _axolotl_dpo, _pairs, _means, "trl")
AXOLOTL_KTO = Votes("axolotl-kto", "axolotl", _kto_names, _axolotl_kto, _votes, kin="trl")
UNSLOTH = Prober(
    "unsloth",
    "unsloth",
    _after_unsloth(_dpo_names),
    _after_unsloth(_dpo),
    _pairs,
    _means,
    "trl",
)
UNSLOTH_KTO = Votes(
    "unsloth-kto", "unsloth", _after_unsloth(_kto_names), _after_unsloth(_kto), _votes, kin="trl"
)
