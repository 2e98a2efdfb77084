"""Proof for one release of TRL: `python -m tests.trainers.trl_matrix [PART...]` in its environment.

- `untouched`: without a prefloss loss, weights are the same to the bit before and after prefloss is imported and used.
- `own NAME`: TRL's loss by TRL and by us: losses of each step, evaluation and final weights, to 1e-5.
- `by hand LOSS`: a loss that TRL lacks, or a composition, against log-ratios of a plain forward pass.
- `enable`: a registered name as `loss_type`.
- `refused OPTION`: options of TRL that our losses cannot honour.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

if version("trl").startswith("1.15."):
    # Its log-probs are Triton kernels on every device; the interpreter runs them without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback
from trl.trainer import utils

from tests.trainers import proof
from tests.trainers.proof import BOUND, Proof

# TRL's loss type -> ours, where the names or the defaults differ.
OURS = {
    "bco_pair": "bco_pair(beta=0.1)",
    "nca_pair": "nca_pair(beta=0.1)",
    "sppo_hard": "sppo_hard(beta=0.1)",
    "discopop": "discopop(beta=0.1)",
    "aot": "aot(beta=0.1)",
    "aot_unpaired": "aot_unpaired(beta=0.1)",
    "aot_pair": "aot_unpaired(beta=0.1)",
    "sigmoid_norm": "ln_dpo(beta=0.1)",
    "sft": "nll(average='batch')",
    "apo_zero_unpaired": "kto_zero",
}
OPTIONS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "truncated": {"max_length": 7},
    "experts": {"policy": "Mixtral"},
    "adapters": {"policy": "adapters"},
}
HAND = {
    "dpo": ("simpo(beta=2.0)", "cpo(beta=0.3)", "0.7*ipo(tau=0.2) + 0.3*nll(average='batch')"),
    "kto": ("kto_logsigmoid(kl_baseline='zero')", "0.5*kto_zero + 0.5*simnpo"),
}
# Options of DPOConfig, and a loss that does not read them.
REFUSED = (
    ("label_smoothing", 0.1, "bco_pair"),
    ("use_weighting", True, "aot"),
    ("rpo_alpha", 1.0, "dpo"),
    ("reference_free", True, "dpo"),
)
# A mixture of experts, whose router loss TRL adds to its own, where that TRL does.
EXPERTS = {
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
}
FOLDER = tempfile.TemporaryDirectory()
Check = tuple[str, str, Callable[[], str]]


def model(kind: str = "Llama", seed: int = 0) -> Any:
    """A tiny Llama or Mixtral."""
    return proof.tiny(kind, seed, bos_token_id=None, **(EXPERTS if kind == "Mixtral" else {}))


class Run(NamedTuple):
    """Losses of the steps, loss of the evaluation, and final weights of a training."""

    losses: list[float]
    evaluated: float
    weights: torch.Tensor


def adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def rows(kind: str, count: int = 16, seed: int = 0) -> Dataset:
    text = proof.texts(seed)
    if kind == "dpo":
        made = [
            {"prompt": text(3, 5), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)}
            for _ in range(count)
        ]
    else:
        made = [
            {"prompt": text(3, 5), "completion": " " + text(1, 6), "label": i % 2 == 0} for i in range(count)
        ]
    # TRL 1.6 keeps precomputed references beside the data, on a disk.
    folder = tempfile.mkdtemp(dir=FOLDER.name)
    Dataset.from_list(made).save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def classes(kind: str) -> tuple[type, type]:
    return (trl.DPOTrainer, trl.DPOConfig) if kind == "dpo" else (trl.KTOTrainer, trl.KTOConfig)


def build(
    kind: str, folder: str, callbacks: list[Any] | None = None, *, policy: str = "Llama", **options: Any
) -> Any:
    trainer_class, config_class = classes(kind)
    adapted = policy == "adapters"
    family = "Llama" if adapted else policy
    torch.manual_seed(2)
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        # Adam would turn the rounding of gradients near 0 into steps of the learning rate.
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_length": 32,
        "seed": 1,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
        "remove_unused_columns": False,
        "precompute_ref_log_probs": False,
        **options,
    }
    known = config_class.__dataclass_fields__
    config = config_class(
        output_dir=folder, **{name: value for name, value in settings.items() if name in known}
    )
    data = rows(kind)
    trainer = trainer_class(
        model=model(family),
        ref_model=None if adapted else model(family, seed=1),
        **({"peft_config": adapters()} if adapted else {}),
        args=config,
        train_dataset=data,
        eval_dataset=rows(kind, 8, seed=1),
        processing_class=proof.tokenizer(),
        callbacks=callbacks or [],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(kind: str, callbacks: list[Any] | None = None, **options: Any) -> Run:
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(kind, folder, callbacks, **options)
        own_step = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            loss = own_step(*args, **kwargs)
            # What is logged is rounded in some versions.
            losses.append(loss.item())
            return loss

        trainer.training_step = step
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return Run(losses, evaluated, weights)


def untouched(kind: str, before: Run) -> str:
    after = train(kind)
    assert torch.equal(before.weights, after.weights), "other weights"
    assert before[:2] == after[:2], f"losses and evaluation {before[:2]} and {after[:2]}"
    return "losses, evaluation and weights are the same to the bit"


def own(kind: str, name: str, kernel: str = "trl", **settings: Any) -> str:
    from prefloss.integrations.trl import PreferenceLossCallback

    options = {**OPTIONS.get(name, {}), **settings}
    callback = PreferenceLossCallback(_ours(name), kernel=kernel, diagnose=False)
    theirs = train(kind, loss_type=name, **options)
    ours = train(kind, [callback], loss_type=name, **options)
    figures = {
        "losses": max(_apart(a, b) for a, b in zip(ours.losses, theirs.losses, strict=True)),
        "evaluation": _apart(ours.evaluated, theirs.evaluated),
        "weights": (ours.weights - theirs.weights).abs().max().item(),
    }
    if name == "bco_pair" and hasattr(trl.DPOTrainer, "dpo_loss"):
        # This TRL moves its reward shift in evaluations too.
        del figures["evaluation"]
    return proof.near(figures)


def _apart(found: float, wanted: float) -> float:
    """The difference, relative to values above 1."""
    return abs(found - wanted) / max(1.0, abs(wanted))


def _ours(name: str) -> str:
    # Since 0.29, TRL's has no reward shift.
    if name == "bco_pair" and not hasattr(trl.DPOTrainer, "dpo_loss"):
        return "bco_pair(beta=0.1, shift=0.0)"
    return OURS.get(name, name)


def from_plain_passes(kind: str, loss: str) -> float:
    """The mean loss of all rows from plain forward passes, without TRL."""
    import prefloss

    words = proof.tokenizer()

    def sums(which: Any, column: str) -> tuple[list[Any], list[int]]:
        found, counts = [], []
        for row in rows(kind):
            prompt = words(row["prompt"])["input_ids"]
            completion = [*words(row[column])["input_ids"], words.eos_token_id]
            ids = torch.tensor([[*prompt, *completion]])
            logps = which(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            found.append(logps[len(prompt) - 1 :].sum())
            counts.append(len(completion))
        return found, counts

    def ratios(column: str) -> Any:
        (policy, counts), (reference, _) = sums(model(), column), sums(model(seed=1), column)
        return prefloss.LogRatios(torch.stack(policy), torch.stack(reference), torch.tensor(counts))

    with torch.no_grad():
        if kind == "dpo":
            feedback: Any = prefloss.Pairs(ratios("chosen"), ratios("rejected"))
        else:
            feedback = prefloss.Labels(ratios("completion"), torch.tensor(rows(kind)["label"]))
        return prefloss.get(loss).mean(feedback).item()


def by_hand(kind: str, loss: str) -> str:
    from prefloss.integrations.trl import PreferenceLossCallback

    return _compared(kind, loss, [PreferenceLossCallback(loss, diagnose=False)])


def enabled(kind: str, loss: str) -> str:
    from prefloss.integrations.trl import disable, enable

    enable()
    try:
        return _compared(kind, loss, loss_type=loss)
    finally:
        disable()


def _compared(kind: str, loss: str, callbacks: list[Any] | None = None, **options: Any) -> str:
    """One step over all rows gives the loss of plain passes."""
    found = train(kind, callbacks, max_steps=1, per_device_train_batch_size=16, **options).losses[0]
    wanted = from_plain_passes(kind, loss)
    detail = f"trained {found:.6f}, by hand {wanted:.6f}"
    assert _apart(found, wanted) <= BOUND, detail
    return detail


def refused(option: str, value: Any, loss: str) -> str:
    from prefloss.integrations.trl import PreferenceLossCallback

    if option not in trl.DPOConfig.__dataclass_fields__:
        return "this version has no such option"
    try:
        with tempfile.TemporaryDirectory() as folder:
            build("dpo", folder, [PreferenceLossCallback(loss)], **{option: value})
    except ValueError as error:
        if option in str(error):
            return str(error)
        raise
    raise AssertionError(f"{option}={value!r} was taken without a word")


def checks(kind: str, before: Run) -> Iterator[Check]:
    """Trainer, name and function of each check of a trainer, after prefloss was used and removed."""
    from prefloss.integrations.trl import PreferenceLossCallback, disable, enable, options

    PreferenceLossCallback("ipo")
    enable()
    disable()
    trainer, config = classes(kind)[0].__name__, options.DPOConfig if kind == "dpo" else options.KTOConfig
    yield trainer, "untouched", lambda: untouched(kind, before)
    for name in sorted(options._OWN_LOSS_TYPES[config]):
        yield trainer, f"own {name}", lambda name=name: own(kind, name)
    first = "ipo" if kind == "dpo" else "kto"
    for setting, given in SETTINGS.items():
        if setting != "adapters" or importlib.util.find_spec("peft"):
            yield trainer, f"own {first}, {setting}", lambda given=given: own(kind, first, **given)
    if hasattr(utils, "add_fused_lm_head"):
        yield trainer, f"own {first}, our kernel", lambda: own(kind, first, kernel="prefloss")
    for loss in HAND[kind]:
        yield trainer, f"by hand {loss}", lambda loss=loss: by_hand(kind, loss)
    yield trainer, f"enable {HAND[kind][0]}", lambda: enabled(kind, HAND[kind][0])
    for option, *rest in REFUSED if kind == "dpo" else ():
        yield trainer, f"refused {option}", lambda option=option, rest=rest: refused(option, *rest)


def main() -> None:
    """Run every check of this release, or those named on the command line."""
    with Proof("trl", trl.__version__) as results:
        before = {kind: train(kind) for kind in ("dpo", "kto")}
        assert "prefloss" not in sys.modules, "prefloss was imported before the first run"
        for kind, run in before.items():
            for check in checks(kind, run):
                results.check(*check)


if __name__ == "__main__":
    main()
