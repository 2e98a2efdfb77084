"""OpenRLHF's DPO training with any registered loss of pairs.

`python -m prefloss.integrations.openrlhf --prefloss "simpo(beta=2.0)" ...` runs `openrlhf.cli.train_dpo` with all
of its options, and with a subclass of its `DPOTrainer` whose loss is ours.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.integrations.binding import replaced
from prefloss.integrations.inherited import Host
from prefloss.logratios import LogRatios
from prefloss.registry import Loss, get
from prefloss.training import FeedbackObjective


@dataclass(frozen=True)
class _Options:
    """OpenRLHF's options that change its loss, with its defaults."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo_enable: bool = False


_HOST = Host(
    "OpenRLHF's DPOTrainer",
    Pairs,
    frozenset(("tokens", "per_token")),
    {"beta": "beta", "label_smoothing": "label_smoothing"},
    {"ipo_enable": "leave it out and train 'openrlhf:ipo'"},
)


def trainer_with(loss: str | Loss, base: Any) -> type:
    """A subclass of OpenRLHF's `DPOTrainer` that trains with a loss.

    Forward passes, reference, metrics, the router loss and `nll_loss_coef` stay OpenRLHF's.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        base: `openrlhf.trainer.dpo_trainer.DPOTrainer`.

    Raises:
        RuntimeError: If this version of the trainer does not sum log-probs where prefloss reads them.
        ValueError, TypeError: When the trainer is built, if loss and options do not fit together.
    """
    if not callable(getattr(base, "_get_batch_logps", None)):
        raise RuntimeError(
            f"OpenRLHF: {base.__name__} has no method _get_batch_logps, which prefloss knows from 0.11; please report "
            "this with the versions of both"
        )

    class PreferenceTrainer(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            model = self.args.model
            options = _Options(self.beta, model.label_smoothing, model.ipo_enable)
            asked = get(loss) if isinstance(loss, str) else copy.deepcopy(loss)
            self.preference = FeedbackObjective(_HOST.resolve(asked, options), diagnose=False)
            self.loss_fn, self._passes, self._trained = self._preference_loss, [], 0

        def _get_batch_logps(
            self, per_token_logps: Tensor, attention_mask: Tensor, prompt_id_lens: Any
        ) -> Any:
            returned = super()._get_batch_logps(per_token_logps, attention_mask, prompt_id_lens)
            mask = attention_mask.bool()
            for row, prompt in enumerate(prompt_id_lens):
                mask[row, :prompt] = False
            mask = mask[:, 1:]
            _check_sums(per_token_logps, mask, returned[0])
            self._passes.append((per_token_logps, mask))
            return returned

        def _preference_loss(self, *sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            (policy, mask), (reference, _) = self._passes
            self._passes.clear()
            both = LogRatios.from_token_logps(policy, mask, reference, keep_per_token=True)
            pairs = Pairs(chosen=both[: len(both) // 2], rejected=both[len(both) // 2 :])
            training = torch.is_grad_enabled()
            value = self.preference.share(pairs, training=training)
            if training:
                # The schedules of the loss move on with each optimizer step.
                self._trained += 1
                if self._trained % self.strategy.accumulated_gradient == 0:
                    self.preference.step()
            beta = self.preference.loss.beta or 1.0
            return value, beta * pairs.chosen.h.detach(), beta * pairs.rejected.h.detach()

    return PreferenceTrainer


def _check_sums(per_token: Tensor, mask: Tensor, sums: Tensor) -> None:
    if per_token.shape != mask.shape or not torch.allclose((per_token * mask).sum(-1), sums):
        raise RuntimeError(
            "OpenRLHF: got other sums of log-probs than those of the completion tokens; this version scores "
            "completions in a way that prefloss does not know. Please report this with the versions of both"
        )


def main(words: Sequence[str] | None = None) -> None:
    """Run `openrlhf.cli.train_dpo` with a prefloss loss; further words are its own options."""
    parser = argparse.ArgumentParser(
        prog="python -m prefloss.integrations.openrlhf", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--prefloss", required=True, help="the loss, as 'simpo(beta=2.0)'")
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], help="a module that registers losses"
    )
    given, rest = parser.parse_known_args(words)
    for module in given.modules:
        importlib.import_module(module)
    try:
        loss = get(given.prefloss)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    trainers = importlib.import_module("openrlhf.trainer.dpo_trainer")
    ours = {"DPOTrainer": trainer_with(loss, trainers.DPOTrainer)}
    with replaced(trainers, ours), replaced(sys, {"argv": ["openrlhf.cli.train_dpo", *rest]}):
        runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")


if __name__ == "__main__":
    main()
