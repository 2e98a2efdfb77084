"""A plain transformers trainer of a tiny model on any feedback, for the tests of the integration."""

import copy
import random
from unittest import mock

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from prefloss.integrations.transformers import PreferenceCollator, PreferenceLossCallback, Reference
from tests.integrations.trl import tiny


def rankings(rows=48, seed=0, most=4):
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        count = rng.randint(2, most)
        made.append(
            {
                "prompt": tiny._text(rng, 2, 4),
                "completions": [" " + tiny._text(rng, 1, 6) for _ in range(count)],
                "scores": [float(rng.randint(0, 3)) for _ in range(count)],
            }
        )
    return Dataset.from_list(made)


def scored_pairs(rows=48, seed=0):
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {
                **row,
                "score_chosen": rng.uniform(1, 2),
                "score_rejected": rng.uniform(-1, 0),
                "weight": rng.uniform(0.5, 2),
            }
            for row in tiny.pairs(rows, seed)
        ]
    )


def callback(policy, loss, **options):
    options.setdefault("reference", Reference.model(copy.deepcopy(policy)))
    return PreferenceLossCallback(loss, **options)


def build(
    folder,
    item,
    policy,
    *,
    data,
    eval_data=None,
    max_length=None,
    collator=None,
    callbacks=(),
    kind=Trainer,
    **options,
):
    """A trainer with the callback `item`; options go to TrainingArguments."""
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "seed": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        **options,
    }
    return kind(
        policy,
        TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings),
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=collator or PreferenceCollator(tiny.tokenizer(), max_length=max_length),
        callbacks=[*callbacks, item] if item is not None else list(callbacks),
    )


def train(folder, loss, data, policy=None, *, own=None, resume=None, **options):
    """Train, and return the trainer; `own` goes to the callback, options to `build`."""
    policy = tiny.model() if policy is None else policy
    trainer = build(folder, callback(policy, loss, **(own or {})), policy, data=data, **options)
    # Every training ends in a full garbage collection, which takes longer than these trainings do.
    with mock.patch("gc.collect"):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in steps(trainer)]


def steps(trainer):
    """What was logged at each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def attached(trainer):
    return next(
        item for item in trainer.callback_handler.callbacks if isinstance(item, PreferenceLossCallback)
    )


def weights(model):
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])
