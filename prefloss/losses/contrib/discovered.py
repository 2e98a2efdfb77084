"""Other losses that the language model behind DiscoPOP proposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._authoring import Positive, maths, register
from prefloss.losses.pairwise import dpo, hinge

# The temperature of the batch statistics, a constant in the authors' code.
_TAU = 0.05


@register(aliases={"CELL": "DiscoPOP"}, difference_only=True, monotone=True)
def discopop_cell(pairs: Pairs, *, beta: Positive = 0.05) -> Tensor:
    r"""Half exponential, half logistic loss of the margin (CELL).

    .. math::
        \ell = \frac{1}{2} e^{-z} - \frac{1}{2} \log \sigma(z), \quad z = \beta (h_w - h_l)

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> discopop_cell(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.6774])

    Note:
        Low adoption: only the authors' repository has it. The exponent is clamped at 80, where float32 ends. When to
        use: to compare with `discopop`.

    Reference: Lu et al. 2024, arXiv:2406.08414, appendix.
    """
    exponential = torch.exp((-beta * pairs.margin()).clamp(max=maths.MAX_EXPONENT))
    return 0.5 * exponential + 0.5 * dpo(pairs, beta=beta)


@register(aliases={"PADLL": "DiscoPOP"}, difference_only=True)
def discopop_padll(pairs: Pairs, *, beta: Positive = 0.05) -> Tensor:
    r"""Logistic loss of the margin, halved where the pair is in the wrong order (PADLL).

    .. math::
        \ell = -0.9 \left(1 - \frac{1}{2} 1[h_w < h_l]\right) \log \sigma(\beta (h_w - h_l))

    Example:
        >>> discopop_padll(Pairs.of(chosen=[1.5, -1.0], rejected=[-1.0, 1.5]), beta=0.1)
        tensor([0.5183, 0.3717])

    Note:
        Low adoption: only the authors' repository has it. The loss jumps up where a pair reaches the right order. When
        to use: to compare with `discopop`.

    Reference: Lu et al. 2024, arXiv:2406.08414, appendix.
    """
    logistic = 0.9 * dpo(pairs, beta=beta)
    return torch.where(pairs.margin() < 0, 0.5 * logistic, logistic)


@register(aliases={"PFL": "DiscoPOP"})
def discopop_pfl(pairs: Pairs, *, beta: Positive = 0.05) -> Tensor:
    r"""Logistic loss where the policy prefers the chosen completion, steep hinge elsewhere (PFL).

    .. math::
        \ell = -\frac{1}{2} \log \sigma(z) \text{ if } \pi(y_w) > \pi(y_l), \text{ else } 2 \max(0, 1 - z),
        \quad z = \beta (h_w - h_l)

    Args:
        pairs: Reads the log-ratios h of both sides and the policy log-probs, [pairs], nats.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> chosen, rejected = LogRatios([-20.0], [-21.5]), LogRatios([-24.0], [-23.0])
        >>> discopop_pfl(Pairs(chosen, rejected), beta=0.1)
        tensor([0.2880])
        >>> discopop_pfl(Pairs(rejected, chosen), beta=0.1)
        tensor([2.5000])

    Note:
        Low adoption: only the authors' repository has it. The condition compares the policy's sums, so it favours the
        shorter completion, and the loss jumps there. When to use: to compare with `discopop`.

    Reference: Lu et al. 2024, arXiv:2406.08414, appendix.
    """
    preferred = pairs.chosen.policy > pairs.rejected.policy
    return torch.where(preferred, 0.5 * dpo(pairs, beta=beta), 2 * hinge(pairs, beta=beta))


@register(aliases={"DBAQL": "DiscoPOP"}, separable=False)
def discopop_dbaql(pairs: Pairs, *, beta: Positive = 0.05) -> Tensor:
    r"""Logistic and exponential loss, mixed by the variance of the batch's margins (DBAQL).

    .. math::
        \ell = -s \log \sigma(z / 0.9) + (1 - s) e^{-0.9 z}, \quad s = \sigma(\operatorname{var}(z / 0.05)),
        \quad z = \beta (h_w - h_l)

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> discopop_dbaql(Pairs.of(chosen=[1.5, 1.5], rejected=[-1.0, -1.0]), beta=0.1)  # variance 0
        tensor([0.6812, 0.6812])

    Note:
        Low adoption: only the authors' repository has it. The variance is the unbiased one of the pairs that count,
        with gradient; for one pair it is 0 here, NaN there. The exponent is clamped at 80. When to use: to compare with
        `discopop`.

    Reference: Lu et al. 2024, arXiv:2406.08414, appendix.
    """
    z = beta * pairs.margin()
    _, variance = _spread(z / _TAU, pairs.valid)
    # One exponential: (1 - s) times e^x would be 0 times infinity.
    exponential = torch.exp((F.logsigmoid(-variance) - 0.9 * z).clamp(max=maths.MAX_EXPONENT))
    return -torch.sigmoid(variance) * F.logsigmoid(z / 0.9) + exponential


@register(aliases={"AQL": "DiscoPOP"}, separable=False)
def discopop_aql(pairs: Pairs, *, beta: Positive = 0.05) -> Tensor:
    r"""Logistic loss and hinge, mixed by the margin against a quantile of the batch (AQL).

    .. math::
        \ell = -w \log \sigma(z) + (1 - w) \max(0, 1 - z), \quad w = \sigma(q - u), \;
        q = 0.5 + 0.01 (\sigma(\operatorname{mean} u) - 0.5), \; u = z / 0.05, \; z = \beta (h_w - h_l)

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> discopop_aql(Pairs.of(chosen=[0.0], rejected=[0.0]))  # w = 0.6225 of log 2, the rest of 1
        tensor([0.8090])

    Note:
        Low adoption: only the authors' repository has it. The mean is that of the pairs that count, and the gradient
        flows through w. When to use: to compare with `discopop`.

    Reference: Lu et al. 2024, arXiv:2406.08414, appendix.
    """
    scaled = beta * pairs.margin() / _TAU
    quantile = 0.5 + 0.01 * (torch.sigmoid(maths.batch_mean(scaled, pairs.valid)) - 0.5)
    above = scaled - quantile
    return torch.sigmoid(-above) * dpo(pairs, beta=beta) + torch.sigmoid(above) * hinge(pairs, beta=beta)


@register(aliases={"AQFL": "DiscoPOP"}, separable=False)
def discopop_aqfl(pairs: Pairs, *, beta: Positive = 0.05) -> Tensor:
    r"""Logistic loss and hinge, mixed by the margin's distance from a batch statistic (AQFL).

    .. math::
        \ell = -b \log \sigma(z) + (1 - b) \max(0, 1 - z), \quad b = \sigma(0.1 |u - q|), \;
        q = q_0 + 0.05 (\sigma(\operatorname{mean} u) - q_0), \\
        q_0 = \operatorname{std}(u) \operatorname{mean} \sigma(-u), \; u = z / 0.05, \; z = \beta (h_w - h_l)

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> discopop_aqfl(Pairs.of(chosen=[0.0], rejected=[0.0]))  # q = 0.025, b = 0.5006
        tensor([0.8464])

    Note:
        Low adoption: only the authors' repository has it. The standard deviation is the unbiased one of the pairs that
        count, with gradient; for one pair it is 0 here, NaN there. When to use: to compare with `discopop`.

    Reference: Lu et al. 2024, arXiv:2406.08414, appendix.
    """
    scaled, counted = beta * pairs.margin() / _TAU, pairs.valid
    mean, variance = _spread(scaled, counted)
    # The root has no gradient at 0: the argument is made harmless there first, since 0 times infinity is NaN.
    varies = variance > 0
    std = torch.where(varies, torch.sqrt(torch.where(varies, variance, 1.0)), 0.0)
    start = std * maths.batch_mean(torch.sigmoid(-scaled), counted)
    off = 0.1 * (scaled - (start + 0.05 * (torch.sigmoid(mean) - start))).abs()
    return torch.sigmoid(off) * dpo(pairs, beta=beta) + torch.sigmoid(-off) * hinge(pairs, beta=beta)


def _spread(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the values that count, scalars; of fewer than two the variance is 0."""
    mean = maths.batch_mean(values, counted)
    squares = torch.where(counted, (values - mean) ** 2, 0.0).sum()
    return mean, squares / (counted.sum() - 1).clamp(min=1)
