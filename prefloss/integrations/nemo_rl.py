"""NeMo-RL's DPO training with any registered loss of pairs, chosen in its configuration.

`python -m prefloss.integrations.nemo_rl examples/run_dpo.py --config dpo.yaml`, with `prefloss: "simpo(beta=2.0)"`
under `dpo:`. Without that entry NeMo-RL trains its own loss.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.integrations.inherited import Host
from prefloss.logratios import LogRatios
from prefloss.registry import Loss, get


@dataclass(frozen=True)
class _Options:
    """NeMo-RL's options that change its loss, with its defaults."""

    reference_policy_kl_penalty: float = 0.05
    preference_average_log_probs: bool = False
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0


_HOST = Host(
    "NeMo-RL",
    Pairs,
    frozenset(("tokens", "per_token")),
    {"reference_policy_kl_penalty": "beta"},
    {
        "preference_average_log_probs": "train a loss that averages, such as 'ln_dpo'",
        "preference_loss_weight": "give the loss a weight: '0.5*dpo(beta=0.1)'",
        "sft_loss_weight": "add the term to the loss: 'dpo + 0.1*nll'",
    },
)


class PreferenceLoss:
    """A loss function of NeMo-RL's protocol (`nemo_rl.algorithms.loss.interfaces.LossFunction`).

    It is sent to the workers by pickle, which holds the loss's name: prefloss, and a package with losses of your own,
    have to be installed in their environment.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed, or a `Loss`. It must take each pair alone and
            keep no state: a worker sees one micro-batch at a time and forgets it.
        options: NeMo-RL's `dpo` configuration.
        use_fused_linear_logprobs: As in NeMo-RL's own loss.

    Raises:
        ValueError: If the loss does not fit.
        TypeError: If it takes no pairs.
    """

    def __init__(
        self, loss: str | Loss, options: Any = None, use_fused_linear_logprobs: bool = False
    ) -> None:
        interfaces = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
        asked = get(loss) if isinstance(loss, str) else loss
        known = {name: getattr(options, name, default) for name, default in vars(_Options()).items()}
        self.loss = _HOST.resolve(asked, _Options(**known))
        if self.loss.spec.feedback is not Pairs:
            kind = self.loss.spec.feedback.__name__
            raise TypeError(f"loss: got {self.loss.name!r}, which takes {kind}, expected a loss of pairs")
        if self.loss.couples_batch or self.loss.state:
            raise ValueError(
                f"loss: got {self.loss!r}, expected one that takes each pair alone and keeps no state or schedule: "
                "NeMo-RL's workers see one micro-batch at a time"
            )
        self.loss_type, self.input_type = interfaces.LossType.SEQUENCE_LEVEL, interfaces.LossInputType.LOGPROB
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """This micro-batch's part of the mean over all pairs of the step, and NeMo-RL's metrics.

        Args:
            next_token_logprobs: [2 * pairs, T - 1], nats; rows chosen and rejected in turn.
            data: `token_mask` and `reference_policy_logprobs`, [2 * pairs, T], and `sample_mask`, [2 * pairs].
            global_valid_seqs: Valid rows of the whole step.
            global_valid_toks: Not read.
        """
        # A row that fills the batch up may hold anything; without tokens, neither its values nor its gradient count.
        counted = data["sample_mask"].bool()
        mask = data["token_mask"][:, 1:].bool() & counted.unsqueeze(-1)
        reference = data["reference_policy_logprobs"][:, :-1]
        rows = LogRatios.from_token_logps(next_token_logprobs, mask, reference, keep_per_token=True)
        pairs = Pairs(chosen=rows[::2], rejected=rows[1::2])

        def share(values: Tensor) -> Tensor:
            return values.sum() / (global_valid_seqs / 2)

        loss = share(self.loss(pairs))
        beta = self.loss.beta or 1.0
        chosen, rejected = beta * pairs.chosen.h.detach(), beta * pairs.rejected.h.detach()
        return loss, {
            "loss": loss.item(),
            "sft_loss": 0.0,
            "preference_loss": loss.item(),
            "accuracy": share((chosen > rejected).float()).item(),
            "rewards_chosen_mean": share(chosen).item(),
            "rewards_rejected_mean": share(rejected).item(),
            "num_valid_samples": counted[::2].sum().item(),
        }


def loss_of(own: Any) -> Any:
    """NeMo-RL's class `DPOLossFn` -> a function that builds ours if the configuration names it, else NeMo-RL's."""

    def build(config: Any, use_fused_linear_logprobs: bool = False) -> Any:
        asked = getattr(config, "prefloss", None)
        if asked is None:
            return own(config, use_fused_linear_logprobs=use_fused_linear_logprobs)
        return PreferenceLoss(asked, config, use_fused_linear_logprobs)

    return build


def main(words: Sequence[str] | None = None) -> None:
    """Run NeMo-RL's `run_dpo.py`, whose path is the first word, with the loss that its configuration names."""
    script, *rest = sys.argv[1:] if words is None else words
    algorithm: Any = importlib.import_module("nemo_rl.algorithms.dpo")
    algorithm.DPOLossFn = loss_of(algorithm.DPOLossFn)
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m prefloss.integrations.nemo_rl examples/run_dpo.py --config dpo.yaml")
    main()
