"""Tiny models, a tokenizer, data sets of each kind, and short trainings in TRL and in transformers' Trainer."""

import copy
import random
from dataclasses import dataclass
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from prefloss.integrations.transformers import PreferenceCollator, PreferenceLossCallback, Reference

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def tokenizer():
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def experts():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=43,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
            router_aux_loss_coef=0.5,
            output_router_logits=True,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def adapted(policy=None, **options):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(model() if policy is None else policy, config)


def _text(rng, shortest, longest):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))


def pairs(rows=64, seed=0):
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": _text(rng, 3, 5), "chosen": " " + _text(rng, 1, 6), "rejected": " " + _text(rng, 1, 6)}
            for _ in range(rows)
        ]
    )


def labels(rows=64, seed=0, upvoted=0.5):
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "prompt": _text(rng, 3, 5),
                "completion": " " + _text(rng, 1, 6),
                "label": rng.random() < upvoted,
            }
            for _ in range(rows)
        ]
    )


class Losses(TrainerCallback):
    """Keeps what the trainer logs at each step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


@dataclass
class Run:
    trainer: object
    logs: list

    @property
    def losses(self):
        return [entry["loss"] for entry in self.logs]

    @property
    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.trainer.model.parameters()])


def build(
    kind,
    folder,
    callbacks=(),
    *,
    data=None,
    eval_data=None,
    policy=None,
    peft_config=None,
    data_collator=None,
    **options,
):
    """A trainer of a tiny model; `kind` is "dpo" or "kto", options go to TRL's configuration."""
    trainer_class, config_class = (DPOTrainer, DPOConfig) if kind == "dpo" else (KTOTrainer, KTOConfig)
    policy = model() if policy is None else policy
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "seed": 1,
        "save_strategy": "no",
        "activation_checkpointing": False,
        **options,
    }
    config = config_class(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, **settings
    )
    needs_model = peft_config is None and not settings.get("precompute_ref_log_probs")
    return trainer_class(
        model=policy,
        ref_model=copy.deepcopy(policy) if needs_model else None,
        args=config,
        train_dataset=data if data is not None else (pairs() if kind == "dpo" else labels()),
        eval_dataset=eval_data,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        data_collator=data_collator,
        peft_config=peft_config,
    )


def train(kind, folder, callbacks=(), **options):
    """Build, train, and return what was logged."""
    recorder = Losses()
    trainer = build(kind, folder, [recorder, *callbacks], **options)
    trainer.train()
    return Run(trainer, recorder.logs)


def rankings(rows=48, seed=0, most=4):
    rng = random.Random(seed)
    made = []
    for _ in range(rows):
        count = rng.randint(2, most)
        made.append(
            {
                "prompt": _text(rng, 2, 4),
                "completions": [" " + _text(rng, 1, 6) for _ in range(count)],
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
            for row in pairs(rows, seed)
        ]
    )


def plain_callback(policy, loss, **options):
    options.setdefault("reference", Reference.model(copy.deepcopy(policy)))
    return PreferenceLossCallback(loss, **options)


def plain_build(
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
        data_collator=collator or PreferenceCollator(tokenizer(), max_length=max_length),
        callbacks=[*callbacks, item] if item is not None else list(callbacks),
    )


def plain_train(folder, loss, data, policy=None, *, own=None, resume=None, **options):
    """Train, and return the trainer; `own` goes to the callback, options to `build`."""
    policy = model() if policy is None else policy
    trainer = plain_build(folder, plain_callback(policy, loss, **(own or {})), policy, data=data, **options)
    # Every training ends in a full garbage collection, which takes longer than these trainings do.
    with mock.patch("gc.collect"):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in steps_of(trainer)]


def steps_of(trainer):
    """What was logged at each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def callback_of(trainer):
    return next(
        item for item in trainer.callback_handler.callbacks if isinstance(item, PreferenceLossCallback)
    )


def weights(model):
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])
