"""A tiny model, tokenizer and data sets, and one short training run, for the tests of the TRL integration."""

import copy
import random
from dataclasses import dataclass

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

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
