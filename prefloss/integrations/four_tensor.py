"""Any pair loss in the form that many training loops call: four log-prob tensors in, losses and rewards out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prefloss import diagnostics
from prefloss.feedback import Pairs
from prefloss.logratios import LogRatios
from prefloss.losses import Loss, get


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
        if isinstance(loss, Loss):
            if parameters:
                raise TypeError(f"parameters: got {sorted(parameters)} with a Loss, wanted them in the Loss")
            self.loss = loss
        else:
            self.loss = get(loss, **parameters)
        if self.loss.spec.feedback is not Pairs:
            raise TypeError(
                f"loss: got {self.loss.name!r}, which takes {self.loss.spec.feedback.__name__}, wanted a pair loss"
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
        return self.loss(pairs), self._rewards(pairs.chosen), self._rewards(pairs.rejected)

    forward = __call__

    def _rewards(self, ratios: LogRatios) -> Tensor:
        beta = 1.0 if self.loss.beta is None else self.loss.beta
        if ratios.reference is None:
            return beta * ratios.policy.detach()
        return diagnostics.implicit_rewards(ratios, beta)

    def __repr__(self) -> str:
        """The loss and its hyperparameters."""
        return f"FourTensorLoss({self.loss!r})"
