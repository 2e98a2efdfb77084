"""Batches of a `PreferenceCollator` in TRL's DPOTrainer: packed, or with prompts computed once.

TRL's step reads padded rows only, so prefloss computes the whole step of such a batch: forward passes, loss, figures.
What is TRL's stays TRL's: reference model and adapters, data set, saving.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import KTOTrainer

from prefloss.diagnosis import Diagnosis
from prefloss.integrations.transformers._callback import unrepeated
from prefloss.registry import Loss
from prefloss.training.batch import ROWS, Structure
from prefloss.training.layouts import score
from prefloss.training.objective import PreferenceObjective, Reference


def made(batch: Mapping[str, Any]) -> bool:
    """Whether a `PreferenceCollator` made the batch."""
    return any(all(name in batch for name in names) for names in ROWS.values())


def objective(trainer: Any, loss: Loss, diagnosis: Diagnosis | None) -> PreferenceObjective:
    """The loss with the trainer's own reference, watched by the callback's diagnosis.

    Raises:
        TypeError: If the trainer is a KTOTrainer.
    """
    if isinstance(trainer, KTOTrainer):
        raise TypeError(
            "data_collator: got PreferenceCollator in a KTOTrainer, expected TRL's own, which builds the mismatched "
            "completions; or train with transformers.Trainer and prefloss.integrations.transformers"
        )
    made = PreferenceObjective(
        loss,
        reference=_reference(trainer),
        check_step_zero=False,
        autocast=trainer.accelerator.autocast,
        diagnose=False,
    )
    made.diagnosis = diagnosis
    return made


def compute_loss(trainer: Any, own: PreferenceObjective, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The loss of a batch, and outputs whose `logits` are the completions' log-probs, [pairs, 2]. Logs the figures."""
    training = trainer.model.training
    own.steps = trainer.state.global_step
    examples = None if training else unrepeated(trainer, batch)
    result = own(trainer.model_wrapped, batch, examples=examples)
    logged = trainer._metrics["train" if training else "eval"]
    for name, value in own.metrics(training=training).items():
        if name != "loss":
            logged[name].append(value)
    return result.loss, (result.loss, SimpleNamespace(logits=result.outputs["logps"]))


def reference_sums(trainer: Any, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Reference log-probs of chosen and rejected completions, [pairs] each, nats: TRL's `compute_ref_log_probs`."""
    structure, inputs = Structure.split(batch)
    reference = _reference(trainer, cached=False)
    reference.bind(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    with torch.no_grad():
        found = reference.logps(trainer.accelerator.autocast, model, inputs, structure)
    if found is None:
        # Without a reference model, TRL scores with the policy before it trains.
        with torch.no_grad():
            found = score(model, structure, inputs).logps
    return tuple(found.sum(-1).chunk(2))


def _reference(trainer: Any, cached: bool = True) -> Reference:
    """Where TRL takes it from: cached columns, a model, an adapter named "ref", or adapters off."""
    if cached and trainer.precompute_ref_logps:
        return Reference.cached()
    if trainer.ref_model is not None:
        return Reference.model(trainer.ref_model)
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not hasattr(policy, "peft_config"):
        return Reference.none()
    return Reference.adapter("ref") if "ref" in policy.peft_config else Reference.adapter_off()
