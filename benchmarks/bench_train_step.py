"""A whole DPO training step, forward to optimizer: ``python -m benchmarks.bench_train_step``.

Every way trains its own copy of one model on the same tokens, against reference log-probs computed beforehand.
`WAYS` holds them by name; a new one is a function from a `Problem` to a trainer.
"""

import argparse
import copy
import logging
import random
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from benchmarks.measure import in_turns, report
from benchmarks.shapes import TRAIN_STEP, TrainStep
from prefloss.integrations import trl
from prefloss.integrations.transformers import PreferenceCollator, PreferenceLossCallback, Reference

BETA = 0.1
BASELINE = "TRL DPOTrainer"
# of the gradients against float64, relative
GRADIENT_LIMIT = 1e-4


@dataclass
class Problem:
    """A model, and pairs of exactly the wanted lengths."""

    shape: TrainStep
    folder: str

    @cached_property
    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = self.shape
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=3 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=max(1, shape.width // 64),
            max_position_embeddings=shape.prompt + shape.completion,
            pad_token_id=0,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, self.shape.vocabulary))]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>"
        )

    @cached_property
    def pairs(self) -> Dataset:
        rng = random.Random(0)

        def text(tokens: int) -> str:
            return " ".join(f"w{rng.randrange(2, self.shape.vocabulary)}" for _ in range(tokens))

        # The end-of-sequence token comes on top.
        words = self.shape.completion - 1
        return Dataset.from_list(
            [
                {
                    "prompt": text(self.shape.prompt),
                    "chosen": " " + text(words),
                    "rejected": " " + text(words),
                }
                for _ in range(self.shape.pairs)
            ]
        )

    @cached_property
    def scored(self) -> Dataset:
        """The pairs with the reference's log-probs, as TRL computes them."""
        columns = ["ref_chosen_logps", "ref_rejected_logps"]
        found = trl_trainer(self).train_dataset
        return datasets.concatenate_datasets([self.pairs, found.select_columns(columns)], axis=1)

    def policy(self) -> LlamaForCausalLM:
        return copy.deepcopy(self.model)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the configurations of all trainers share."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.shape.pairs,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }


def trl_trainer(problem: Problem, *callbacks: Any) -> DPOTrainer:
    return DPOTrainer(
        model=problem.policy(),
        args=DPOConfig(
            **problem.arguments,
            beta=BETA,
            precompute_ref_log_probs=True,
            activation_checkpointing=False,
            max_length=None,
        ),
        train_dataset=problem.pairs,
        processing_class=problem.tokenizer,
        callbacks=list(callbacks),
    )


def trl_with(kernel: str) -> Callable[[Problem], DPOTrainer]:
    return lambda problem: trl_trainer(problem, trl.PreferenceLossCallback("dpo", kernel=kernel))


def plain(layout: Literal["padded", "packed", "shared_prefix"] = "padded") -> Callable[[Problem], Trainer]:
    """`transformers.Trainer` with our collator and callback."""

    def make(problem: Problem) -> Trainer:
        callback = PreferenceLossCallback(
            "dpo", beta=BETA, reference=Reference.cached(), check_step_zero=False
        )
        return Trainer(
            problem.policy(),
            TrainingArguments(**problem.arguments, remove_unused_columns=False),
            train_dataset=problem.scored,
            data_collator=PreferenceCollator(problem.tokenizer, layout=layout),
            callbacks=[callback],
        )

    return make


WAYS: dict[str, Callable[[Problem], Any]] = {
    BASELINE: trl_trainer,
    "TRL, our loss": trl_with("trl"),
    "TRL, our loss and kernel": trl_with("prefloss"),
    "prefloss, plain Trainer": plain(),
    "prefloss, prompts once": plain("shared_prefix"),
}


class Step:
    """A training step of a trainer on one batch."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.model = trainer.model

    def backward(self) -> torch.Tensor:
        """Loss and gradients, as the trainer makes them."""
        samples, items = self.trainer.get_batch_samples(iter([dict(self.batch)]), 1, self.model.device)
        self.model.train()
        return self.trainer.training_step(self.model, samples[0], items)

    def __call__(self) -> None:
        self.backward()
        self.trainer.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def gradient(self) -> torch.Tensor:
        """The first step's, all parameters in one row."""
        self.backward()
        found = gradients_of(self.model)
        self.model.zero_grad(set_to_none=True)
        return found


def gradients_of(model: torch.nn.Module) -> torch.Tensor:
    found = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def exact_gradient(problem: Problem) -> torch.Tensor:
    """The same of plain torch in float64, from all logits."""
    model = problem.policy().double()
    rows = problem.scored
    sides = []
    for side in ("chosen", "rejected"):
        ids = problem.tokenizer([a + b + "<eos>" for a, b in zip(rows["prompt"], rows[side], strict=True)])
        tokens = torch.tensor(ids["input_ids"])
        logps = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        policy = logps[:, problem.shape.prompt - 1 :].sum(-1)
        sides.append(policy - policy.detach())
    # Policy and reference coincide at the first step.
    (-F.logsigmoid(BETA * (sides[0] - sides[1]))).mean().backward()
    return gradients_of(model)


def run(name: str, shape: TrainStep, rounds: int, save: bool, only: tuple[str, ...] = ()) -> None:
    """Measure every way there is, or those named in `only` beside TRL's, and report."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        problem = Problem(shape, folder)
        chosen = {way: make for way, make in WAYS.items() if not only or way in (*only, BASELINE)}
        steps = {way: Step(make(problem)) for way, make in chosen.items()}
        wanted = exact_gradient(problem)
        errors = {
            way: ((step.gradient() - wanted).norm() / wanted.norm()).item() for way, step in steps.items()
        }
        del wanted
        records = in_turns(dict(steps), rounds)
    for way, record in records.items():
        record.gradient_error = errors[way]
        record.ok = errors[way] < GRADIENT_LIMIT
    row = {
        "bench": "train_step",
        "what": "DPO training step",
        "shape": name,
        "dtype": "float32",
        "frozen": False,
    }
    report(f"{row['what']}, references beforehand, {shape}", records, BASELINE, row, "cpu", save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["1:1", "4:1"], choices=TRAIN_STEP)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], choices=WAYS, help="names of the ways to measure")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for shape in arguments.shape:
        run(shape, TRAIN_STEP[shape], arguments.rounds, not arguments.dry, tuple(arguments.only))


if __name__ == "__main__":
    main()
