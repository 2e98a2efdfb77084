"""Proof for one release of TRL; run in an environment with it: `python tests/trainers/trl_matrix.py [PART...]`.

A PART is a piece of a check's name, such as "dpo own ipo"; without one, all checks run. Prints one JSON line a check:
{framework, version, trainer, check, verdict, detail}. The exit status is 1 if one failed.

- `untouched`: without a prefloss loss, weights are the same to the bit before and after prefloss is imported and used.
- `own NAME`: TRL's loss by TRL and by us: losses of each step, evaluation and final weights, to 1e-5.
- `hand LOSS`: a loss that TRL lacks, or a composition, against log-ratios of a plain forward pass.
- `enable`: a registered name as `loss_type`.
- `refused OPTION`: options of TRL that our losses cannot honour.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
EOS = 1
BOUND = 1e-5
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
    "experts": {"policy": "experts"},
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
Outcome = tuple[bool, str]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def experts(seed: int = 0) -> MixtralForCausalLM:
    """A mixture of experts whose router loss TRL adds to its own, where that TRL does."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
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
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return MixtralForCausalLM(config).float()


def adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def rows(kind: str, count: int = 16, seed: int = 0) -> Dataset:
    rng = random.Random(seed)

    def text(shortest: int, longest: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))

    if kind == "dpo":
        made = [
            {"prompt": text(3, 5), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)}
            for _ in range(count)
        ]
    else:
        made = [
            {"prompt": text(3, 5), "completion": " " + text(1, 6), "label": i % 2 == 0} for i in range(count)
        ]
    return Dataset.from_list(made)


def classes(kind: str) -> tuple[type, type]:
    return (trl.DPOTrainer, trl.DPOConfig) if kind == "dpo" else (trl.KTOTrainer, trl.KTOConfig)


def build(
    kind: str, folder: str, callbacks: list[Any] | None = None, *, policy: str = "model", **options: Any
) -> Any:
    trainer_class, config_class = classes(kind)
    make = experts if policy == "experts" else model
    adapted = policy == "adapters"
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
        model=make(),
        ref_model=None if adapted else make(seed=1),
        **({"peft_config": adapters()} if adapted else {}),
        args=config,
        train_dataset=data,
        eval_dataset=rows(kind, 8, seed=1),
        processing_class=tokenizer(),
        callbacks=callbacks or [],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(kind: str, callbacks: list[Any] | None = None, **options: Any) -> tuple[list[float], float, Any]:
    """Losses of the steps, loss of the evaluation, and final weights."""
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
    return losses, evaluated, weights


def untouched(kind: str, before: Any) -> Outcome:
    after = train(kind)
    same = torch.equal(before[2], after[2]) and before[:2] == after[:2]
    return (
        same,
        "losses, evaluation and weights are the same to the bit"
        if same
        else "a run without prefloss differs",
    )


def own(kind: str, name: str, **settings: Any) -> Outcome:
    from prefloss.integrations.trl import PreferenceLossCallback

    options = {**OPTIONS.get(name, {}), **settings}
    theirs = train(kind, loss_type=name, **options)
    ours = train(kind, [PreferenceLossCallback(_ours(name), diagnose=False)], loss_type=name, **options)
    figures = {
        "losses": max(_apart(a, b) for a, b in zip(ours[0], theirs[0], strict=True)),
        "evaluation": _apart(ours[1], theirs[1]),
        "weights": (ours[2] - theirs[2]).abs().max().item(),
    }
    if name == "bco_pair" and hasattr(trl.DPOTrainer, "dpo_loss"):
        # This TRL moves its reward shift in evaluations too.
        del figures["evaluation"]
    return max(figures.values()) <= BOUND, ", ".join(f"{key} {value:.1e}" for key, value in figures.items())


def _apart(found: float, wanted: float) -> float:
    """The difference, relative to values above 1."""
    return abs(found - wanted) / max(1.0, abs(wanted))


def _ours(name: str) -> str:
    # Since 0.29, TRL's has no reward shift.
    if name == "bco_pair" and not hasattr(trl.DPOTrainer, "dpo_loss"):
        return "bco_pair(beta=0.1, shift=0.0)"
    return OURS.get(name, name)


def by_hand(kind: str, loss: str) -> float:
    """The mean loss of all rows from plain forward passes, without TRL."""
    import prefloss

    words = tokenizer()

    def sums(which: Any, column: str) -> tuple[list[Any], list[int]]:
        found, counts = [], []
        for row in rows(kind):
            prompt = words(row["prompt"])["input_ids"]
            completion = [*words(row[column])["input_ids"], EOS]
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


def hand(kind: str, loss: str) -> Outcome:
    from prefloss.integrations.trl import PreferenceLossCallback

    callback = PreferenceLossCallback(loss, diagnose=False)
    found = train(kind, [callback], max_steps=1, per_device_train_batch_size=16)[0][0]
    wanted = by_hand(kind, loss)
    return _apart(found, wanted) <= BOUND, f"trained {found:.6f}, by hand {wanted:.6f}"


def enabled(kind: str, loss: str) -> Outcome:
    from prefloss.integrations.trl import disable, enable

    enable()
    try:
        found = train(kind, loss_type=loss, max_steps=1, per_device_train_batch_size=16)[0][0]
    finally:
        disable()
    wanted = by_hand(kind, loss)
    return _apart(found, wanted) <= BOUND, f"trained {found:.6f}, by hand {wanted:.6f}"


def refused(kind: str, option: str, value: Any, loss: str) -> Outcome:
    from prefloss.integrations.trl import PreferenceLossCallback

    if option not in classes(kind)[1].__dataclass_fields__:
        return True, "this version has no such option"
    try:
        with tempfile.TemporaryDirectory() as folder:
            build(kind, folder, [PreferenceLossCallback(loss)], **{option: value})
    except ValueError as error:
        return option in str(error), str(error)
    return False, f"{option}={value!r} was taken without a word"


def checks() -> Iterator[tuple[str, str, Callable[[], Outcome]]]:
    """Trainer, name and function of each check."""
    before = {kind: train(kind) for kind in ("dpo", "kto")}
    assert "prefloss" not in sys.modules, "prefloss was imported before the first run"
    from prefloss.integrations.trl import PreferenceLossCallback, disable, enable, options

    PreferenceLossCallback("ipo")
    enable()
    disable()
    for kind in ("dpo", "kto"):
        yield kind, "untouched", lambda kind=kind: untouched(kind, before[kind])
        config = options.DPOConfig if kind == "dpo" else options.KTOConfig
        for name in sorted(options._OWN_LOSS_TYPES[config]):
            yield kind, f"own {name}", lambda kind=kind, name=name: own(kind, name)
        first = "ipo" if kind == "dpo" else "kto"
        for setting, given in SETTINGS.items():
            if setting != "adapters" or importlib.util.find_spec("peft"):
                yield (
                    kind,
                    f"own {first}, {setting}",
                    lambda kind=kind, given=given, first=first: own(kind, first, **given),
                )
        for loss in HAND[kind]:
            yield kind, f"hand {loss}", lambda kind=kind, loss=loss: hand(kind, loss)
        name = HAND[kind][0]
        yield kind, f"enable {name}", lambda kind=kind, name=name: enabled(kind, name)
    for given in REFUSED:
        yield "dpo", f"refused {given[0]}", lambda given=given: refused("dpo", *given)


def main(parts: list[str]) -> int:
    """Run the checks that hold one of the parts, or all; 1 if one failed."""
    failed = False
    for kind, check, run in checks():
        if parts and not any(part in f"{kind} {check}" for part in parts):
            continue
        try:
            passed, detail = run()
        except Exception as error:  # a check that cannot run is a failed one, and the others still run
            passed, detail = False, f"{type(error).__name__}: {error}"
        failed |= not passed
        line = {
            "framework": "trl",
            "version": trl.__version__,
            "trainer": classes(kind)[0].__name__,
            "check": check,
            "verdict": "same" if passed else "FAILED",
            "detail": detail,
        }
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
