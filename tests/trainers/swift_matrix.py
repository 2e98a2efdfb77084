"""Proof for one release of ms-swift: `python -m tests.trainers.swift_matrix` in its environment."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.trainers import proof
from tests.trainers.proof import Own, Training

# ms-swift's loss type -> its options, and our loss under the same options.
OWN_PAIRS: Own = {
    "sigmoid": ({}, "dpo()"),
    "sigmoid, label_smoothing": ({"label_smoothing": 0.1}, "dpo()"),
    "sigmoid, rpo_alpha": ({"rpo_alpha": 0.5}, "dpo()"),
    "sigmoid, accumulated": ({"gradient_accumulation_steps": 2}, "dpo()"),
    "sigmoid, LoRA": ({"tuner_type": "lora", "lora_rank": 4, "ref_model": None}, "dpo()"),
    "robust": ({"label_smoothing": 0.1}, "robust()"),
    "exo_pair": ({"label_smoothing": 0.001}, "exo_pair()"),
    "hinge": ({}, "hinge()"),
    "ipo": ({}, "ipo()"),
    "bco_pair": ({}, "bco_pair()"),
    "sppo_hard": ({}, "sppo_hard()"),
    "nca_pair": ({}, "nca_pair()"),
    "aot_unpaired": ({}, "aot_unpaired()"),
    "aot": ({}, "aot()"),
    "apo_zero": ({}, "apo_zero()"),
    "apo_down": ({}, "apo_down()"),
    "discopop": ({}, "discopop()"),
    "sft": ({"beta": None}, "nll(average='batch')"),
}
OWN_LABELS: Own = {
    "kto": ({}, "kto()"),
    "kto, weights": ({"desirable_weight": 1.5, "undesirable_weight": 0.5}, "kto()"),
    "apo_zero_unpaired": ({}, "kto_zero()"),
}
REFUSED: dict[str, dict[str, Any]] = {
    "ld_alpha": {"ld_alpha": 0.5},
    "label_smoothing": {"label_smoothing": 0.1, "prefloss": "nca_pair()"},
    "beta": {"prefloss": "dpo(beta=0.4)"},
    "padding_free": {"padding_free": True},
    "unknown loss": {"prefloss": "simmpo"},
    "takes Rankings": {"prefloss": "dpo_pl()"},
}


def words(folder: Path, kind: str, **options: Any) -> list[str]:
    """The command line of a training."""
    settings = {
        "rlhf_type": kind,
        "model": folder / "model",
        "ref_model": folder / "reference",
        "model_type": "llama",
        "template": "default",
        "tuner_type": "full",
        "dataset": folder / f"{kind}.jsonl",
        "split_dataset_ratio": 0,
        "load_from_cache_file": "false",
        "torch_dtype": "float32",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "use_hf": "true",
        "output_dir": tempfile.mkdtemp(dir=folder),
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": "false",
        "seed": 1,
        "max_length": 64,
        "beta": 0.3,
        "gradient_checkpointing": "false",
        **options,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return [
        word
        for name, value in given.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def write_data(folder: Path) -> None:
    text = proof.texts()
    lines = {"dpo": [], "kto": []}
    for i in range(32):
        asked = {
            "messages": [
                {"role": "user", "content": text(3, 5)},
                {"role": "assistant", "content": text(1, 6)},
            ]
        }
        lines["dpo"].append({**asked, "rejected_response": text(1, 6)})
        lines["kto"].append({**asked, "label": i % 3 > 0})
    for kind, rows in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Matrix:
    """ms-swift in a folder with model, reference and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references = proof.References(str(folder / "reference"))

    def train(self, kind: str, by_hand: Any = None, **options: Any) -> Training:
        from swift.pipelines import rlhf_main
        from swift.trainers import mixin

        with mock.patch.object(mixin, "check_local_model_is_latest"), proof.watched(by_hand) as training:
            rlhf_main(words(self.folder, kind, **options))
        return training

    def train_ours(self, kind: str, loss: Any, by_hand: Any = None, **options: Any) -> Training:
        from prefloss.integrations.swift import PLUGIN

        return self.train(kind, by_hand, **{"external_plugins": PLUGIN, "loss_type": loss, **options})

    def own(self, kind: str, name: str, options: dict[str, Any], ours: str) -> str:
        theirs = self.train(kind, loss_type=name.split(",")[0], **options)
        return proof.same(theirs, self.train_ours(kind, ours, **options))

    def by_hand(self, kind: str, loss: str, **options: Any) -> str:
        prefix = "" if kind == "dpo" else "completion_"

        def value(model: Any, batch: Any) -> torch.Tensor:
            desirable = None if kind == "dpo" else torch.tensor(batch["label"])
            return proof.expected(loss, self.references.scores(model, batch, prefix), desirable)

        return proof.agrees_by_hand(self.train_ours(kind, loss, value, **{"beta": None, **options}))

    def weighted(self) -> str:
        """Several names with weights are a sum."""
        sums = {"loss_type": ["ipo(tau=0.2)", "nll"], "loss_weights": [0.7, 0.3]}
        return self.by_hand("dpo", "0.7*ipo(tau=0.2) + 0.3*nll", **sums)

    def untouched(self, kind: str, before: Training) -> str:
        proof.identical(before, self.train(kind))
        return proof.identical(before, self.train_ours(kind, {"dpo": "sigmoid", "kto": "kto"}[kind]))


def main() -> None:
    """Run every check of this release."""
    with proof.proving("ms-swift", write_data) as (results, folder):
        matrix = Matrix(folder)
        results.check_all(matrix, {"dpo": OWN_PAIRS, "kto": OWN_LABELS}, REFUSED)
        results.check("dpo", "by hand --loss_type ipo(tau=0.2) nll --loss_weights 0.7 0.3", matrix.weighted)


if __name__ == "__main__":
    main()
