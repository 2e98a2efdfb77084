"""ms-swift's trainers with a prefloss loss in the place of theirs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from swift.pipelines.train import rlhf
from swift.rlhf_trainers import dpo_trainer as dpo
from swift.rlhf_trainers import kto_trainer as kto
from swift.trainers import TrainerFactory
from torch import Tensor

from prefloss.feedback import Labels, Pairs
from prefloss.integrations.binding import replaced
from prefloss.integrations.inherited import Host, expression
from prefloss.integrations.slot import LossSlot, Pass, SlotCallback
from prefloss.registry import Loss, get

_LD_ALPHA = (
    "ms-swift would weight the policy's tokens and not the reference's. Write it as a hyperparameter instead, which "
    "weights both: 'dpo(ld_alpha=0.5)'"
)
_HOSTS = {
    "dpo": Host(
        "ms-swift's DPO trainer",
        Pairs,
        frozenset(("tokens", "per_token")),
        {"beta": "beta", "label_smoothing": "label_smoothing", "discopop_tau": "discopop.tau"},
        {"ld_alpha": _LD_ALPHA, "reference_free": "choose a loss without a reference instead"},
    ),
    "kto": Host(
        "ms-swift's KTO trainer",
        Labels,
        frozenset(("tokens", "per_token", "mismatched")),
        {
            "beta": "beta",
            "desirable_weight": "desirable_weight",
            "undesirable_weight": "undesirable_weight",
        },
        {"use_liger_kernel": "its kernel computes ms-swift's own loss; leave it out"},
    ),
}
# Names that stay ms-swift's.
_OWN_NAMES = {
    "dpo": frozenset(
        (
            "sigmoid",
            "robust",
            "exo_pair",
            "hinge",
            "ipo",
            "bco_pair",
            "sppo_hard",
            "nca_pair",
            "aot_unpaired",
            "aot",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
        )
    ),
    "kto": frozenset(("kto", "apo_zero_unpaired")),
}
# One that each trainer computes from the same log-probs; it is replaced.
_STAND_IN = {"dpo": ["sigmoid"], "kto": "kto"}


def register() -> None:
    """Let ms-swift build its DPO and KTO trainers here, and prepare KTO's data.

    Raises:
        RuntimeError: In ms-swift's Megatron path.
    """
    if "swift.megatron" in sys.modules:
        raise RuntimeError(
            "prefloss: got ms-swift's Megatron trainers, which compute a loss of their own whatever --loss_type says "
            "(modelscope/ms-swift#10167); use `swift rlhf`"
        )
    mapping = TrainerFactory.TRAINER_MAPPING  # type: ignore[attr-defined]
    for kind, function in (("dpo", dpo_trainer), ("kto", kto_trainer)):
        mapping[kind] = f"{__name__}.{function.__name__}"
    own = rlhf.prepare_kto_dataset

    def prepare_kto_dataset(args: Any, *data: Any) -> Any:
        loss = _named_in("kto", args)
        if loss is None or loss.reads_mismatched:
            return own(args, *data)
        # ms-swift prepares no mismatched completions for this name.
        with replaced(args, {"loss_type": "apo_zero_unpaired"}):
            return own(args, *data)

    rlhf.prepare_kto_dataset = prepare_kto_dataset


def dpo_trainer(**settings: Any) -> Any:
    """ms-swift's DPO trainer; with a prefloss loss if `loss_type` has a name that is not ms-swift's."""
    return _built("dpo", dpo.DPOTrainer, DPOTrainer, settings)


def kto_trainer(**settings: Any) -> Any:
    """ms-swift's KTO trainer; with a prefloss loss if `loss_type` is not one of ms-swift's names."""
    return _built("kto", kto.KTOTrainer, KTOTrainer, settings)


def _built(kind: str, theirs: type, ours: type, settings: dict[str, Any]) -> Any:
    args, template = settings["args"], settings["template"]
    loss = _named_in(kind, args)
    if loss is None:
        return theirs(**settings)
    callback = SlotCallback(loss)
    callback.resolve(_HOSTS[kind], args)
    for option in ("packing", "padding_free"):
        if getattr(template, option, False):
            raise ValueError(
                f"{option}: got True beside a prefloss loss, which reads one completion in each row"
            )
    if getattr(template, "sequence_parallel_size", 1) > 1:
        raise ValueError(
            f"sequence_parallel_size: got {template.sequence_parallel_size} beside a prefloss loss, expected 1"
        )
    own = {"loss_type": _STAND_IN[kind], **({"loss_weights": None} if kind == "dpo" else {})}
    with replaced(args, own):
        trainer = ours(**settings)
    trainer.calculate_KL = callback.loss.reads_mismatched
    trainer.add_callback(callback)
    return trainer


def _named_in(kind: str, args: Any) -> Loss | None:
    """The prefloss loss that `loss_type` names; None if all names are ms-swift's."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    if _OWN_NAMES[kind].issuperset(names):
        return None
    return get(expression(names, getattr(args, "loss_weights", None)))


class _Recording(LossSlot):
    def get_per_token_logps(self, *args: Any, **kwargs: Any) -> Any:
        """ms-swift's own: log-probs, logits and where the completions stand."""
        scored = super().get_per_token_logps(*args, **kwargs)  # type: ignore[misc]
        self.passes.append(Pass(scored[0], scored[2]))
        return scored


class DPOTrainer(_Recording, dpo.DPOTrainer):
    """ms-swift's `DPOTrainer` with a prefloss loss; `rpo_alpha` and the router loss are added by ms-swift."""

    def pass_names(self) -> Sequence[str]:
        """ms-swift scores the reference for every loss."""
        return ("policy", "reference")

    def dpo_loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of both sides."""
        return self.pair_losses()


class KTOTrainer(_Recording, kto.KTOTrainer):
    """ms-swift's `KTOTrainer` with a prefloss loss; the router loss is added by ms-swift."""

    def pass_names(self) -> Sequence[str]:
        """Mismatched completions first, if the loss reads them."""
        names = ("kl_policy", "policy", "kl_reference", "reference")
        return names if self.calculate_KL else names[1::2]

    def kto_loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses, rewards of both kinds, and the KL estimate."""
        return self.label_losses(torch.as_tensor(self.batch["label"], dtype=torch.bool))
