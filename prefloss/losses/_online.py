"""Pair losses with a term on a sample of the reference policy, for exploration in online training."""

from __future__ import annotations

from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._core import maths
from prefloss.losses._core.parameters import NonNegative, Positive
from prefloss.losses._core.registry import register
from prefloss.losses.pairwise import dpo


@register(monotone=True, needs=("gold",))
def xpo(pairs: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1e-5) -> Tensor:
    r"""DPO that moves the policy away from the reference's own samples (exploratory PO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l)) + \alpha \log \pi(y_\mathrm{ref})

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats, and the policy's log-prob of y_ref: `gold` carries
            a sample of the reference policy.
        beta: Strength of the pull towards the reference.
        alpha: Strength of the exploration.

    Returns:
        Loss of each pair, [pairs], nats; not reduced. Unbounded below.

    Example:
        >>> gold = LogRatios(policy=[-30.0], reference=[-30.0])
        >>> xpo(Pairs(LogRatios.of([1.5]), LogRatios.of([-1.0]), gold=gold), beta=0.1)
        tensor([0.5756])

    Note:
        The sign is meant: a positive alpha makes the samples less likely (optimism). TRL's XPO trainer, gone by 1.16,
        agrees and sums over tokens. The term falls without bound, so keep alpha small. Not `chipo` (χPO). When to use:
        online, where the policy's own samples stop being new.

    Reference: Xie et al. 2024, arXiv:2405.21046.
    """
    return dpo(pairs, beta=beta) + alpha * maths.gold_of(pairs).policy
