"""Reward models fitted to pairs."""

from __future__ import annotations

from torch import Tensor

from prefloss.worlds import Data, Policy, train


def reward_model(policy: Policy, pairs: Data, steps: int = 300, learning_rate: float = 0.05) -> Tensor:
    """Scores of a Bradley-Terry reward model, [seeds, prompts, C], up to a constant for each prompt.

    It sees of a completion what the policy would see. Its loss is that of DPO at beta 1, with the difference of two
    scores as the margin, so the log-ratios of that policy are the scores.

    Args:
        policy: Its parameters are those of the reward model, and start at 0.
        pairs: What to fit.
        steps: Of Adam.
        learning_rate: Its step size.
    """
    runs = train(policy, pairs, "dpo(beta=1.0)", steps=steps, learning_rate=learning_rate)
    return runs.log_probs()[0] - policy.world.reference
