"""What a prober is: a real trainer, built as its package builds it, that takes one step on known log-probs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Labels
from prefloss.integrations.probes.known import KnownModel, Rows
from prefloss.registry import Loss, get, specs

BETA, SMOOTHING = 0.3, 0.05
"""The KL strength and, for losses with a noise level, the label smoothing that a trainer is configured with."""


@dataclass(frozen=True)
class Prober:
    """A trainer of pairs.

    Attributes:
        framework: Its name on the command line.
        package: The package whose version counts.
        names: Gives the loss names that the installed version accepts.
        build: Loss name and options beta and label_smoothing -> a trainer.
        batch: Trainer, completions and, for `Votes`, what is desirable -> the batch that its `compute_loss` takes.
        means: Gives the names that mean something else in the installed version, or whose options the registry calls
            otherwise -> the loss with the values that the trainer is given.
            Other names mean the registry's alias for the package, such as `trl:bco_pair`, or the loss of that name.
        kin: The package for the registry's aliases, if it is another one.
    """

    framework: str
    package: str
    names: Callable[[], list[str]]
    build: Callable[..., Any]
    batch: Callable[..., dict[str, Any]]
    means: Callable[[], Mapping[str, str]] = dict
    kin: str = ""

    @property
    def feedback(self) -> type | None:
        """What a step takes: a kind of feedback, or None for four sums of log-probs."""
        return None

    @property
    def version(self) -> str:
        """The installed version; PackageNotFoundError if there is none."""
        return importlib.metadata.version(self.package)

    def asked(self, name: str) -> Loss:
        """The loss that a name means, with the hyperparameters that the trainer is configured with."""
        known = {alias for spec in specs.values() for alias in spec.aliases}
        own_form = f"{self.kin or self.package}:{name}"
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
            policy = torch.cat([chosen, rejected])
            reference = torch.cat([reference_chosen, reference_rejected])
            return computed(trainer, rows, policy, reference, self.batch(trainer, rows))

        return loss


class Votes(Prober):
    """A trainer of labels, with mismatched completions if it makes them."""

    @property
    def feedback(self) -> type | None:
        """Labels."""
        return Labels

    def asked(self, name: str) -> Loss:
        """The loss that a name means; KTO's baseline is the estimate from the mismatched completions."""
        loss = super().asked(name)
        return loss.replaced(kl_baseline="mismatched") if loss.reads_mismatched else loss

    def step(self, name: str) -> Callable[..., Tensor]:
        """The loss of a real step as a function of `Labels`; completions stand before mismatched ones."""
        trainer = self.build(name, beta=BETA)

        def loss(votes: Labels) -> Tensor:
            parts: list[Any] = [votes.completions, votes.mismatched]
            rows = Rows(torch.cat([part.tokens for part in parts]))
            policy, reference = (
                torch.cat([getattr(part, side) for part in parts]) for side in ("policy", "reference")
            )
            return computed(
                trainer, rows, policy, reference, self.batch(trainer, rows, votes.desirable.tolist())
            )

        return loss


class LossModule(Prober):
    """A trainer of which the loss module alone is run: `build` gives it, and it takes the four sums."""

    def step(self, name: str) -> Callable[..., Tensor]:
        """The module's loss as a function of four sums of log-probs, [pairs] each."""
        module = self.build(name, beta=BETA)
        return lambda chosen, rejected, ref_chosen, ref_rejected: module(
            chosen, rejected, ref_chosen, ref_rejected
        )[0]


def computed(trainer: Any, rows: Rows, policy: Tensor, reference: Tensor, batch: dict[str, Any]) -> Tensor:
    """What a trainer's own `compute_loss` gives for rows with these sums of log-probs, [rows] each."""
    config = trainer.model.config
    trainer.ref_model = KnownModel(rows.by_token(reference), config)
    return trainer.compute_loss(KnownModel(rows.by_token(policy), config), batch)
