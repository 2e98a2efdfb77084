"""The trainers that can be probed: each is built as its package builds it, and takes one step on known log-probs."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
import tempfile
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prefloss.integrations.probes.known import KnownModel, Rows
from prefloss.registry import Loss, get, specs

BETA, SMOOTHING = 0.3, 0.05
"""The KL strength and, for losses with a noise level, the label smoothing that a trainer is configured with."""


@dataclass(frozen=True)
class Prober:
    """A framework's trainer.

    Attributes:
        framework: Its name on the command line.
        package: The package whose version counts.
        names: Gives the loss names that the installed version accepts.
        build: Loss name and options beta and label_smoothing -> a trainer.
        batch: Trainer and completions -> the batch that its `compute_loss` takes.
        means: Gives the names that mean something else in the installed version, or whose options the registry calls
            otherwise -> the loss with the values that the trainer is given.
            Other names mean the registry's alias for the package, such as `trl:bco_pair`, or the loss of that name.
    """

    framework: str
    package: str
    names: Callable[[], list[str]]
    build: Callable[..., Any]
    batch: Callable[[Any, Rows], dict[str, Any]]
    means: Callable[[], Mapping[str, str]] = dict

    @property
    def version(self) -> str:
        """The installed version; PackageNotFoundError if there is none."""
        return importlib.metadata.version(self.package)

    def asked(self, name: str) -> Loss:
        """The loss that a name means, with the hyperparameters that the trainer is configured with."""
        known = {alias for spec in specs.values() for alias in spec.aliases}
        own_form = f"{self.package}:{name}"
        loss = get(self.means().get(name, own_form if own_form in known else name))
        changes = {loss.spec.beta: BETA} if loss.spec.beta else {}
        if "epsilon" in loss.spec.parameters:
            changes["epsilon"] = SMOOTHING
        return loss.replaced(**{k: v for k, v in changes.items() if k not in loss.stated})

    def step(self, name: str) -> Callable[..., Tensor]:
        """The loss of a real step as a function of four sums of log-probs and two token counts, [pairs] each."""
        smoothing = SMOOTHING if "epsilon" in self.asked(name).params else 0.0
        trainer = self.build(name, beta=BETA, label_smoothing=smoothing)

        def loss(
            chosen: Tensor,
            rejected: Tensor,
            reference_chosen: Tensor,
            reference_rejected: Tensor,
            *,
            chosen_tokens: Tensor,
            rejected_tokens: Tensor,
        ) -> Tensor:
            rows = Rows(torch.cat([chosen_tokens, rejected_tokens]))
            config = trainer.model.config
            policy = KnownModel(rows.by_token(torch.cat([chosen, rejected])), config)
            reference = rows.by_token(torch.cat([reference_chosen, reference_rejected]))
            trainer.ref_model = KnownModel(reference, config)
            return trainer.compute_loss(policy, self.batch(trainer, rows))

        return loss


def _tiny_model() -> Any:
    """A Llama that no step reads; trainers look at its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(("<pad>", "</s>", "q", "p", "yes", "no", "<unk>"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _common() -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="prefloss-probe-")
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
    }


def _build_trl(name: str, **options: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": "q p", "chosen": "yes", "rejected": "no"}] * 2)
    several = "list" in str(DPOConfig.__dataclass_fields__["loss_type"].type)
    return DPOTrainer(
        model=_tiny_model(),
        ref_model=_tiny_model(),
        # Up to TRL 0.20, loss_type is a string.
        args=DPOConfig(loss_type=[name] if several else name, **options, **_common()),  # type: ignore[arg-type]
        train_dataset=rows,
        processing_class=_tokenizer(),
    )


def _trl_names() -> list[str]:
    from trl.trainer import dpo_trainer

    return _compared(inspect.getsource(dpo_trainer))


def _trl_means() -> dict[str, str]:
    # With a running mean up to 0.28.
    from trl import DPOTrainer

    return {"bco_pair": "bco_pair"} if hasattr(DPOTrainer, "dpo_loss") else {}


def _compared(source: str) -> list[str]:
    """The loss types with which a trainer's code compares its own."""
    single = re.findall(r"""loss_type == ["'](\w+)["']""", source)
    listed = re.findall(r"""loss_type in [\[(]([^\])]+)[\])]""", source)
    return list(
        dict.fromkeys(single + [name for names in listed for name in re.findall(r"""["'](\w+)["']""", names)])
    )


def _trl_batch(trainer: Any, rows: Rows) -> dict[str, Any]:
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


def _build_llamafactory(name: str, *, beta: float, label_smoothing: float) -> Any:
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from transformers import TrainingArguments

    arguments = FinetuningArguments(
        stage="dpo", pref_loss=name, pref_beta=beta, dpo_label_smoothing=label_smoothing
    )
    return CustomDPOTrainer(
        model=_tiny_model(),
        ref_model=_tiny_model() if arguments.use_ref_model else None,
        finetuning_args=arguments,
        processor=None,
        args=TrainingArguments(**_common()),
        tokenizer=_tokenizer(),
        data_collator=lambda examples: examples,
    )


def _llamafactory_names() -> list[str]:
    from llamafactory.hparams import FinetuningArguments

    return list(typing.get_args(typing.get_type_hints(FinetuningArguments)["pref_loss"]))


def _labelled(trainer: Any, rows: Rows) -> dict[str, Any]:
    padded = rows.padded()
    del padded["completion_mask"]
    return {**padded, "labels": rows.labels()}


def _build_swift(name: str, **options: Any) -> Any:
    """The trainer that `swift rlhf` builds, taken before it trains."""
    from swift.pipelines import rlhf_main
    from swift.pipelines.train.rlhf import SwiftRLHF

    folder = Path(tempfile.mkdtemp(prefix="prefloss-probe-"))
    _tiny_model().save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    messages = [{"role": "user", "content": "q p"}, {"role": "assistant", "content": "yes"}]
    (folder / "pairs.jsonl").write_text(json.dumps({"messages": messages, "rejected_response": "no"}) + "\n")
    settings = {
        **{"rlhf_type": "dpo", "loss_type": name, "model": folder / "model", "ref_model": folder / "model"},
        **{"model_type": "llama", "template": "default", "tuner_type": "full", "torch_dtype": "float32"},
        **{"dataset": folder / "pairs.jsonl", "split_dataset_ratio": 0, "load_from_cache_file": "false"},
        **{
            "output_dir": folder,
            "use_cpu": "true",
            "use_hf": "true",
            "report_to": "none",
            "check_model": "false",
        },
        **{"gradient_checkpointing": "false", "max_length": 64, **options},
    }
    found: list[Any] = []
    with mock.patch.object(SwiftRLHF, "train", lambda pipeline, trainer: found.append(trainer)):
        rlhf_main([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    return found[0]


def _swift_names() -> list[str]:
    from swift.rlhf_trainers import dpo_trainer

    return _compared(inspect.getsource(dpo_trainer.DPOTrainer.dpo_loss))


FRAMEWORKS: Mapping[str, Prober] = {
    one.framework: one
    for one in (
        Prober("trl", "trl", _trl_names, _build_trl, _trl_batch, _trl_means),
        Prober(
            "llamafactory",
            "llamafactory",
            _llamafactory_names,
            _build_llamafactory,
            _labelled,
            # pref_beta weighs ORPO's term; simpo_gamma is 0.5 by default.
            lambda: {"orpo": f"orpo(odds_weight={BETA})", "simpo": "simpo(gamma=0.5)"},
        ),
        Prober("swift", "ms-swift", _swift_names, _build_swift, _labelled),
    )
}
"""What `prefloss probe` knows, by the name on the command line."""
