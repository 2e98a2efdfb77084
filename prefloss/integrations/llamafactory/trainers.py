"""LLaMA-Factory's trainers with a prefloss loss in the place of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.kto import trainer as kto
from torch import Tensor
from torch.nn.functional import pad

from prefloss.feedback import Labels, Pairs
from prefloss.integrations.binding import replaced
from prefloss.integrations.inherited import Host
from prefloss.integrations.slot import LossSlot, Pass
from prefloss.logprobs import token_logps

_OPTIONS = {
    "pref_beta": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "simpo.gamma",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
}
_REFUSED = {
    "pref_loss": "prefloss names the loss to train; leave pref_loss out",
    "pref_bco_weight": "write the sum instead, as in prefloss: '0.5*dpo + 0.5*bco_pair'",
    "ld_alpha": "LLaMA-Factory would weight the policy's tokens and not the reference's. Write it as a hyperparameter "
    "instead, which weights both: 'dpo(ld_alpha=0.5)'",
}
HOSTS = {
    "dpo": Host("LLaMA-Factory's DPO stage", Pairs, frozenset(("tokens", "per_token")), _OPTIONS, _REFUSED),
    "kto": Host(
        "LLaMA-Factory's KTO stage",
        Labels,
        frozenset(("tokens", "per_token", "mismatched")),
        _OPTIONS,
        _REFUSED,
    ),
}


class _Recording(LossSlot):
    """Records what LLaMA-Factory's `get_batch_logps` is given; pref_ftx is added by LLaMA-Factory."""

    _module: Any
    finetuning_args: Any

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Score completions with `token_logps`, in the place of LLaMA-Factory's function."""

        def get_batch_logps(
            logits: Tensor, labels: Tensor, label_pad_token_id: int = IGNORE_INDEX, ld_alpha: Any = None
        ) -> tuple[Tensor, Tensor]:
            # As long as the labels: a slice of the logits would be copied.
            targets = pad(labels[:, 1:], (0, 1), value=label_pad_token_id)
            mask = targets != label_pad_token_id
            log_probs = token_logps(logits, targets, ignore_index=label_pad_token_id)
            self.passes.append(Pass(log_probs, mask))
            return log_probs.sum(-1), mask.sum(-1)

        with replaced(self._module, {"get_batch_logps": get_batch_logps}):
            yield


class DPOTrainer(_Recording, dpo.CustomDPOTrainer):
    """`CustomDPOTrainer` with a prefloss loss."""

    _module = dpo

    def pass_names(self) -> Sequence[str]:
        """The reference is left out for losses that need none."""
        return ("policy", "reference") if self.finetuning_args.use_ref_model else ("policy",)

    def compute_preference_loss(self, *logps: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of both sides."""
        return self.pair_losses()


class KTOTrainer(_Recording, kto.CustomKTOTrainer):
    """`CustomKTOTrainer` with a prefloss loss."""

    _module = kto

    def pass_names(self) -> Sequence[str]:
        """LLaMA-Factory scores mismatched completions for every loss."""
        return ("policy", "kl_policy", "reference", "kl_reference")

    def kto_loss(self, *logps: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses, rewards of both kinds, and the KL estimate."""
        return self.label_losses(self.batch["kto_tags"])
