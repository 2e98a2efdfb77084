"""Proof for one release of LLaMA-Factory: `python -m tests.trainers.llamafactory_matrix` in its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.trainers import proof
from tests.trainers.proof import Own, Training

BETA = 0.3
# LLaMA-Factory's options -> our loss under the same options; `pref_loss` is left out for ours.
OWN_PAIRS: Own = {
    "sigmoid": ({}, "dpo"),
    "sigmoid, dpo_label_smoothing": ({"dpo_label_smoothing": 0.1}, "dpo"),
    "sigmoid, pref_ftx": ({"pref_ftx": 0.5}, "dpo"),
    "sigmoid, accumulated": ({"gradient_accumulation_steps": 2}, "dpo"),
    "sigmoid, LoRA": ({"finetuning_type": "lora", "lora_rank": 4}, "dpo"),
    # Since TRL 0.20, `dpo_loss` takes the loss type as an argument, and LLaMA-Factory passes none: it trains sigmoid.
    "hinge": ({}, "dpo"),
    "ipo": ({}, "ln_dpo"),
    "kto_pair": ({}, "dpo"),
    "simpo": ({"simpo_gamma": 0.7}, "simpo"),
    "orpo": ({"pref_beta": 0.1}, "orpo(odds_weight=0.1)"),
}
OWN_LABELS: Own = {
    "kto": ({}, "kto"),
    "kto, weights": ({"kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5}, "kto"),
    "kto, pref_ftx": ({"pref_ftx": 0.2}, "kto"),
}
REFUSED: dict[str, dict[str, Any]] = {
    "pref_loss": {"pref_loss": "ipo"},
    "pref_bco_weight": {"pref_bco_weight": 0.5},
    "ld_alpha": {"ld_alpha": 0.5},
    "dpo_label_smoothing": {"dpo_label_smoothing": 0.1, "prefloss": "nca_pair"},
    "pref_beta": {"pref_beta": 0.2, "prefloss": "dpo(beta=0.4)"},
    "stage": {"kind": "sft"},
    "unknown loss": {"prefloss": "simmpo"},
    "takes Rankings": {"prefloss": "dpo_pl"},
}


def configuration(folder: Path, stage: str, **options: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "model"),
        "ref_model": str(folder / "reference"),
        "stage": stage,
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "pairs" if stage == "dpo" else "labels",
        "dataset_dir": str(folder / "data"),
        "template": "default",
        "cutoff_len": 64,
        "overwrite_cache": True,
        "output_dir": tempfile.mkdtemp(dir=folder),
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
        "pref_beta": BETA,
        **options,
    }


def write_data(folder: Path) -> None:
    text = proof.texts()
    pairs = [
        {"instruction": text(3, 5), "input": "", "chosen": text(1, 6), "rejected": text(1, 6)}
        for _ in range(32)
    ]
    labels = [
        {"instruction": text(3, 5), "input": "", "output": text(1, 6), "kto_tag": i % 3 > 0}
        for i in range(32)
    ]
    columns = {"prompt": "instruction", "query": "input"}
    information = {
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {**columns, "chosen": "chosen", "rejected": "rejected"},
        },
        "labels": {
            "file_name": "labels.json",
            "columns": {**columns, "response": "output", "kto_tag": "kto_tag"},
        },
    }
    (folder / "data").mkdir()
    for name, value in (("pairs", pairs), ("labels", labels), ("dataset_info", information)):
        (folder / "data" / f"{name}.json").write_text(json.dumps(value))


class Matrix:
    """LLaMA-Factory in a folder with model, reference and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references = proof.References(str(folder / "reference"))

    def train(self, kind: str, **options: Any) -> Training:
        from llamafactory.train import tuner

        with proof.watched() as training:
            tuner.run_exp(configuration(self.folder, kind, **options))
        return training

    def train_ours(self, kind: str, loss: str | None, by_hand: Any = None, **options: Any) -> Training:
        from prefloss.integrations.llamafactory import run_exp

        named = {} if loss is None else {"prefloss": loss}
        with proof.watched(by_hand) as training:
            run_exp(configuration(self.folder, kind, **named, **options))
        return training

    def own(self, kind: str, name: str, options: dict[str, Any], ours: str) -> str:
        # LoRA's reference is the model with its adapter off.
        options = {**options, **({"ref_model": None} if "finetuning_type" in options else {})}
        named = {"pref_loss": name.split(",")[0]} if kind == "dpo" else {}
        return proof.same(self.train(kind, **named, **options), self.train_ours(kind, ours, **options))

    def by_hand(self, kind: str, loss: str) -> str:
        def value(model: Any, batch: Any) -> torch.Tensor:
            return proof.expected(loss, self.references.scores(model, batch), batch.get("kto_tags"))

        return proof.agrees_by_hand(self.train_ours(kind, loss, value, pref_beta=0.1))

    def untouched(self, kind: str, before: Training) -> str:
        proof.identical(before, self.train(kind))
        return proof.identical(before, self.train_ours(kind, None))

    def two_processes(self) -> str:
        """Two gloo processes that LLaMA-Factory's launcher starts: the same weights by LLaMA-Factory and by us."""
        import yaml
        from safetensors.torch import load_file

        weights = []
        for module, options in (
            ("llamafactory.cli", {}),
            ("prefloss.integrations.llamafactory", {"prefloss": "dpo"}),
        ):
            out = self.folder / module
            path = self.folder / f"{module}.yaml"
            path.write_text(
                yaml.safe_dump(
                    configuration(self.folder, "dpo", **{**options, "output_dir": str(out), "max_steps": 2})
                )
            )
            environment = {
                **os.environ,
                "FORCE_TORCHRUN": "1",
                "NPROC_PER_NODE": "2",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            done = subprocess.run(
                [sys.executable, "-m", module, "train", str(path)],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            logged = json.loads((out / "trainer_state.json").read_text())["log_history"][0]
            assert ("prefloss/chosen_falling" in logged) == bool(options), f"{module} logged {sorted(logged)}"
            weights.append(load_file(out / "model.safetensors"))
        worst = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
        assert worst <= proof.BOUND, f"weights {worst:.1e}"
        return f"weights {worst:.1e}"


def main() -> None:
    """Run every check of this release."""
    with proof.proving("llamafactory", write_data) as (results, folder):
        matrix = Matrix(folder)
        results.check_all(matrix, {"dpo": OWN_PAIRS, "kto": OWN_LABELS}, REFUSED)
        results.check("dpo", "two processes", matrix.two_processes)


if __name__ == "__main__":
    main()
