"""Proof for one release of axolotl: `python -m tests.trainers.axolotl_matrix` in its environment."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.trainers import proof
from tests.trainers.proof import Own, Scores, Training

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
PLUGIN = "prefloss.integrations.axolotl.PreflossPlugin"
# axolotl's loss type -> its options, and our loss under the same options. It hands loss types to TRL.
OWN_PAIRS: Own = {
    "sigmoid": ({}, "dpo"),
    # Since 0.29, TRL's "sigmoid" does not read label_smoothing.
    "robust, dpo_label_smoothing": ({"dpo_label_smoothing": 0.1}, "robust_dpo"),
    "sigmoid, accumulated": ({"gradient_accumulation_steps": 2}, "dpo"),
    "sigmoid, LoRA": ({"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}, "dpo"),
    "hinge": ({}, "hinge"),
    "ipo": ({}, "ipo"),
    "apo_zero": ({}, "apo_zero"),
}
OWN_LABELS: Own = {
    "kto": ({}, "kto"),
    "kto, weights": ({"kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.5}, "kto"),
}
REFUSED: dict[str, dict[str, Any]] = {
    "loss_type": {"dpo_loss_type": ["ipo"]},
    "label_smoothing": {"dpo_label_smoothing": 0.1, "prefloss": "nca_pair"},
    "beta": {"rl_beta": 0.2},
    "rl: got": {"kind": "orpo"},
    "unknown loss": {"prefloss": "simmpo"},
    "takes Rankings": {"prefloss": "dpo_pl"},
}
FIELDS = {
    "dpo": {"field_chosen": "chosen", "field_rejected": "rejected"},
    "kto": {"field_completion": "completion", "field_label": "label"},
}


def configuration(folder: Path, rl: str, **options: Any) -> dict[str, Any]:
    """A training as axolotl's YAML says it."""
    kind = "kto" if rl == "kto" else "dpo"
    rows = {"path": str(folder / f"{kind}.jsonl"), "ds_type": "json", "split": "train"}
    return {
        "base_model": str(folder / "model"),
        "rl": rl,
        "datasets": [{**rows, "type": {"field_prompt": "prompt", **FIELDS[kind]}}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": tempfile.mkdtemp(dir=folder),
        "dataset_num_proc": 0,  # in this process
        "sequence_len": 64,
        "special_tokens": {"pad_token": "<pad>"},
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "remove_unused_columns": False,  # as axolotl wants it for KTO
        "rl_beta": 0.3,
        "seed": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        **options,
    }


def write_data(folder: Path) -> None:
    text = proof.texts()
    for kind, made in (
        ("dpo", lambda i: {"chosen": " " + text(1, 6), "rejected": " " + text(1, 6)}),
        ("kto", lambda i: {"completion": " " + text(1, 6), "label": i % 3 > 0}),
    ):
        rows = [{"prompt": text(3, 5), **made(i)} for i in range(32)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Matrix:
    """axolotl in a folder with model and data; its reference is the model as it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references = proof.References(str(folder / "model"))

    def train(self, kind: str, by_hand: Any = None, **options: Any) -> Training:
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.cli.config import load_cfg
        from axolotl.cli.train import do_train

        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(configuration(self.folder, kind, **options)))
        with proof.watched(by_hand) as training:
            do_train(load_cfg(str(path)), TrainerCliArgs())
        return training

    def train_ours(self, kind: str, loss: str | None, by_hand: Any = None, **options: Any) -> Training:
        named = {} if loss is None else {"prefloss": loss}
        return self.train(kind, by_hand, plugins=[PLUGIN], **named, **options)

    def own(self, kind: str, name: str, options: dict[str, Any], ours: str) -> str:
        named = {"dpo_loss_type": [name.split(",")[0]]} if kind == "dpo" else {}
        return proof.same(self.train(kind, **named, **options), self.train_ours(kind, ours, **options))

    def by_hand(self, kind: str, loss: str) -> str:
        def value(model: Any, batch: Any) -> torch.Tensor:
            # A list up to TRL 1.8.
            desirable = torch.as_tensor(batch["label"]).bool() if kind == "kto" else None
            return proof.expected(loss, self.scores(model, batch), desirable)

        return proof.agrees_by_hand(self.train_ours(kind, loss, value, rl_beta=0.1))

    def scores(self, model: Any, batch: Any) -> Scores:
        """Log-probs of TRL's batch."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        return self.references.scores(model, {**batch, "labels": labels})

    def untouched(self, kind: str, before: Training) -> str:
        proof.identical(before, self.train(kind))
        return proof.identical(before, self.train_ours(kind, None))


def main() -> None:
    """Run every check of this release."""
    with proof.proving("axolotl", write_data) as (results, folder):
        results.check_all(Matrix(folder), {"dpo": OWN_PAIRS, "kto": OWN_LABELS}, REFUSED)


if __name__ == "__main__":
    main()
