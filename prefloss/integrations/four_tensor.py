"""Any pair loss with the signature of many training loops: four log-prob tensors in, losses and rewards out.

- `FourTensorLoss`: one loss per pair, for loops of your own.
- `OpenRLHFLoss`: for `loss_fn` of OpenRLHF's DPOTrainer, which takes the mean.
- `TorchtuneLoss`: for `loss` in the configurations of torchtune's DPO recipes, which pass two objects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefloss import metrics
from prefloss.feedback import Pairs
from prefloss.logratios import LogRatios
from prefloss.registry import Loss, as_loss


class FourTensorLoss:
    """A pair loss for loops that pass (policy_chosen, policy_rejected, reference_chosen, reference_rejected).

    Args:
        loss: Name of a registered pair loss, or a `Loss`.
        **parameters: Its hyperparameters, if given by name.

    Raises:
        TypeError: If the loss does not take pairs, or parameters accompany a `Loss`.
        ValueError: If the loss is unknown, or has no KL strength to imply rewards with.

    Example:
        >>> dpo = FourTensorLoss("dpo", beta=0.1)
        >>> losses, chosen_rewards, rejected_rewards = dpo([-20.0], [-24.0], [-21.5], [-23.0])
        >>> losses, chosen_rewards, rejected_rewards
        (tensor([0.5759]), tensor([0.1500]), tensor([-0.1000]))
    """

    def __init__(self, loss: str | Loss, **parameters: Any) -> None:
        self.loss = as_loss(loss, parameters)
        if self.loss.spec.feedback is not Pairs:
            raise TypeError(
                f"loss: got {self.loss.name!r}, which takes {self.loss.spec.feedback.__name__}, expected a pair loss"
            )

    def __call__(
        self,
        policy_chosen: Tensor,
        policy_rejected: Tensor,
        reference_chosen: Tensor | None = None,
        reference_rejected: Tensor | None = None,
        *,
        chosen_tokens: Tensor | None = None,
        rejected_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and implied rewards of a batch.

        Args:
            policy_chosen: Sums of completion log-probs under the policy, [pairs], nats.
            policy_rejected: The same for the rejected completions.
            reference_chosen: The same under the reference; None for a reference-free loss.
            reference_rejected: The same for the rejected completions.
            chosen_tokens: Completion tokens, [pairs]; for losses that average per token.
            rejected_tokens: The same for the rejected completions.

        Returns:
            Losses (not reduced), chosen rewards and rejected rewards (beta * h, without gradient), each [pairs].
            Without a reference the rewards are beta times the policy's log-prob.

        Raises:
            ValueError: If the loss needs a reference or token counts that are not given.
        """
        pairs = Pairs(
            chosen=LogRatios(policy_chosen, reference_chosen, chosen_tokens),
            rejected=LogRatios(policy_rejected, reference_rejected, rejected_tokens),
        )
        return self.loss(pairs), *self.rewards(pairs)

    forward = __call__

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Implied rewards of both sides, without gradient, [pairs] each."""
        chosen, rejected = (self._rewards(side) for side in (pairs.chosen, pairs.rejected))
        return chosen, rejected

    def _rewards(self, ratios: LogRatios) -> Tensor:
        beta = 1.0 if self.loss.beta is None else self.loss.beta
        if ratios.reference is None:
            return beta * ratios.policy.detach()
        return metrics.implicit_rewards(ratios, beta)

    def __repr__(self) -> str:
        """The loss and its hyperparameters."""
        return f"FourTensorLoss({self.loss!r})"


def _check_fed(loss: Loss, slot: str) -> None:
    """Refuse now what would fail in the first step: a loss, or hyperparameters, that need more than sums."""
    reference = [0.0] if loss.spec.needs_reference else None
    side = LogRatios([-1.0], reference)  # type: ignore[arg-type]
    try:
        loss.eval()(Pairs(side, side))
    except ValueError as error:
        raise ValueError(
            f"loss: got {loss!r}, expected one that needs only sums of log-probs, which is all that {slot} receives "
            f"({error})"
        ) from error


class _Slot(nn.Module):
    """A loss in a trainer that supplies sums of log-probs and nothing else of the batch."""

    def __init__(self, loss: str | Loss, **parameters: Any) -> None:
        super().__init__()
        self.four = FourTensorLoss(loss, **parameters)
        _check_fed(self.four.loss, type(self).__name__)

    def _pairs(self, chosen: LogRatios, rejected: LogRatios) -> Pairs:
        # In these trainers, disabled gradients are the only sign of evaluation, where states must not change.
        self.four.loss.train(torch.is_grad_enabled())
        return Pairs(chosen=chosen, rejected=rejected)

    def extra_repr(self) -> str:
        """The loss and its hyperparameters."""
        return repr(self.four.loss)


class OpenRLHFLoss(_Slot):
    """A pair loss for `loss_fn` of OpenRLHF's DPOTrainer.

    Args:
        loss: Name of a registered pair loss, or a `Loss`, that needs sums of log-probs alone.
        **parameters: Its hyperparameters, if given by name.

    Raises:
        TypeError: If the loss does not take pairs, or parameters accompany a `Loss`.
        ValueError: If the loss is unknown, or needs more.

    Example:
        >>> loss_fn = OpenRLHFLoss("dpo", beta=0.1)
        >>> logps = torch.tensor([[-20.0], [-24.0], [-21.5], [-23.0]])
        >>> loss_fn(*logps)
        (tensor(0.5759), tensor([0.1500]), tensor([-0.1000]))
    """

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss, a scalar, and implied rewards of both sides, [pairs], of summed log-probs, [pairs], nats."""
        pairs = self._pairs(
            LogRatios(policy_chosen_logps, reference_chosen_logps),
            LogRatios(policy_rejected_logps, reference_rejected_logps),
        )
        return self.four.loss.mean(pairs), *self.four.rewards(pairs)


class TorchtuneLoss(_Slot):
    """A pair loss for torchtune's DPO recipes: `loss: {_component_: prefloss.integrations.four_tensor.TorchtuneLoss}`.

    Args:
        loss: Name of a registered pair loss, or a `Loss`, that needs sums of log-probs alone.
        **parameters: Its hyperparameters, if given by name; in a configuration, further keys beside `loss`.

    Raises:
        TypeError: If the loss does not take pairs, or parameters accompany a `Loss`.
        ValueError: If the loss is unknown, or needs more.
    """

    @property
    def is_reference_free(self) -> bool:
        """Whether the recipe may leave the reference out."""
        return not self.four.loss.spec.needs_reference

    def forward(self, policy_inputs: Any, reference_inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and implied rewards of both sides, [pairs] each.

        Args:
            policy_inputs: Has `chosen_logps` and `rejected_logps`, sums, [pairs], nats: torchtune's
                `ChosenRejectedOutputs`.
            reference_inputs: The same of the reference; None in them for a reference-free loss.
        """
        pairs = self._pairs(
            LogRatios(policy_inputs.chosen_logps, reference_inputs.chosen_logps),
            LogRatios(policy_inputs.rejected_logps, reference_inputs.rejected_logps),
        )
        return self.four.loss(pairs), *self.four.rewards(pairs)
