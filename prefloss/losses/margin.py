"""Losses of the scaled margin z = beta (h_w - h_l) that differ from DPO in the function of z alone."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._authoring import FlipProbability, Interval, Positive, maths, register, smoothed
from prefloss.losses.pairwise import hinge


@register(
    difference_only=True,
    helps={"noisy": "expects a known share of flipped labels, so that the margin stays finite"},
)
def cdpo(pairs: Pairs, *, beta: Positive = 0.1, epsilon: FlipProbability = 0.1) -> Tensor:
    r"""Cross-entropy to labels that are flipped with a known probability (conservative DPO).

    .. math::
        \ell = -(1 - \epsilon) \log \sigma(z) - \epsilon \log \sigma(-z), \quad z = \beta (h_w - h_l)

    Args:
        epsilon: Probability that a preference is flipped.

    Example:
        >>> cdpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, epsilon=0.1)
        tensor([0.6009])

    Note:
        Equation 3 of the note that proposes it; the same as `dpo` with the modifier `label_smoothing`. HALOs has it as
        `cdpo` (epsilon 0.2), others as `label_smoothing` of DPO: OpenRLHF, LLaMA-Factory, torchtune, ms-swift and TRL
        up to 0.28. TRL since 0.29, Liger and Axolotl accept that setting and ignore it. No published default. The
        minimum is at sigma(z) = 1 - epsilon. When to use: noisy preferences, if the margin should stay finite.

    Reference: Mitchell 2023, "A note on DPO with noisy preferences" (no arXiv id), on DPO, arXiv:2305.18290.
    """
    z = beta * pairs.margin()
    return smoothed(-F.logsigmoid(z), -F.logsigmoid(-z), epsilon)


@register(
    aliases={"robust": "TRL, Liger, ms-swift, XTuner"},
    difference_only=True,
    monotone=True,
    helps={"noisy": "removes the bias of a known share of flipped labels"},
)
def robust_dpo(pairs: Pairs, *, beta: Positive = 0.1, epsilon: FlipProbability = 0.1) -> Tensor:
    r"""DPO made unbiased for labels that are flipped with a known probability (robust DPO).

    .. math::
        \ell = \frac{-(1 - \epsilon) \log \sigma(z) + \epsilon \log \sigma(-z)}{1 - 2 \epsilon},
        \quad z = \beta (h_w - h_l)

    Args:
        epsilon: Probability that a preference is flipped.

    Returns:
        Loss of each pair, [pairs], nats; not reduced. Unbounded below.

    Example:
        >>> robust_dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, epsilon=0.1)
        tensor([0.5447])

    Note:
        Unlike `cdpo` it is unbounded below: z = 100 and epsilon = 0.1 give -12.5. oxRL has a plus in place of the minus
        between the terms. TRL reads epsilon from `label_smoothing`. Not `r_dpo`, also called R-DPO. When to use: a
        known flip rate and few epochs.

    Reference: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    z = beta * pairs.margin()
    return (epsilon * F.logsigmoid(-z) - (1 - epsilon) * F.logsigmoid(z)) / (1 - 2 * epsilon)


@register(difference_only=True)
def exo_pair(
    pairs: Pairs, *, beta: Positive = 0.1, epsilon: Annotated[float, Interval(gt=0, lt=0.5)] = 1e-3
) -> Tensor:
    r"""Reverse KL from the implied preference to a smoothed label (EXO on pairs).

    .. math::
        \ell = \sigma(z) \log \frac{\sigma(z)}{1 - \epsilon} + \sigma(-z) \log \frac{\sigma(-z)}{\epsilon},
        \quad z = \beta (h_w - h_l)

    Args:
        epsilon: Probability of the rejected completion in the target; 0 would make the loss infinite.

    Example:
        >>> exo_pair(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, epsilon=1e-3)
        tensor([2.3395])

    Note:
        TRL, Liger and ms-swift read epsilon from `label_smoothing`; TRL refuses 0, ms-swift replaces it by 1e-3. The
        authors' own repository has the fixed log-targets 0 and -10 instead of log(1 - epsilon) and log(epsilon). The
        minimum is at sigma(z) = 1 - epsilon. When to use: as DPO, for a mode-seeking policy; `exo` takes a whole group
        with rewards.

    Reference: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    return maths.bernoulli_kl(beta * pairs.margin(), math.log1p(-epsilon), math.log(epsilon))


@register(aliases={"lrml": "DiscoPOP"}, difference_only=True)
def discopop(pairs: Pairs, *, beta: Positive = 0.05, tau: Positive = 0.05) -> Tensor:
    r"""Logistic and exponential loss, mixed by the margin itself (DiscoPOP, log-ratio modulated loss).

    .. math::
        \ell = -(1 - m) \log \sigma(z) + m e^{-z}, \quad m = \sigma(z / \tau), \quad z = \beta (h_w - h_l)

    Args:
        tau: Width of the change from one to the other, in units of z.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> discopop(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, tau=0.05)
        tensor([0.7774])

    Note:
        Peers agree: TRL, Liger, ms-swift, oxRL. Not convex: it has a local minimum at a negative margin. The product m
        e^(-z) is 0 times infinity in float32 from z = -90 on, so it is one exponential here, its exponent clamped at
        80, which a tau up to 1 never reaches. When to use: to try a loss that a language model proposed.

    Reference: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    """
    z = beta * pairs.margin()
    exponential = torch.exp((F.logsigmoid(z / tau) - z).clamp(max=maths.MAX_EXPONENT))
    return -torch.sigmoid(-z / tau) * F.logsigmoid(z) + exponential


@register(aliases={"gpo_exp": "oxRL"}, difference_only=True, monotone=True)
def gpo_exponential(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Exponential loss of the margin (GPO, boosting's loss).

    .. math::
        \ell = e^{-\beta (h_w - h_l)}

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> gpo_exponential(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.7788])

    Note:
        The exponent is clamped at 80, beyond which float32 would overflow: the loss is flat there, with gradient 0. One
        bad pair can outweigh a batch. GPO's squared loss (z - 1)^2 is `ipo` on sums times beta^2, with tau = beta/2.
        When to use: clean preferences, if every reversed pair should count.

    Reference: Tang et al. 2024, arXiv:2402.05749, Table 1.
    """
    return torch.exp((-beta * pairs.margin()).clamp(max=maths.MAX_EXPONENT))


@register(aliases={"gpo_trunc_quad": "oxRL"}, difference_only=True, monotone=True)
def gpo_truncated_quadratic(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Squared hinge of the margin (GPO, truncated quadratic).

    .. math::
        \ell = \max(0, 1 - \beta (h_w - h_l))^2

    Args:
        beta: Slope inside the square; the loss is 0 from a margin of 1/beta nats on.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> gpo_truncated_quadratic(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.5625])

    Note:
        Formula checked against oxRL, the one peer that has it. When to use: as `hinge`, with a gradient that vanishes
        at the margin and grows with the error.

    Reference: Tang et al. 2024, arXiv:2402.05749, Table 1.
    """
    return hinge(pairs, beta=beta) ** 2


@register(difference_only=True, monotone=True)
def gpo_savage(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Squared probability of the reversed preference (GPO, Savage loss).

    .. math::
        \ell = \sigma(-\beta (h_w - h_l))^2

    Returns:
        Loss of each pair, [pairs], in [0, 1]; not reduced.

    Example:
        >>> gpo_savage(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.1917])

    Note:
        Formula checked against oxRL, the one peer that has it. Not convex: a badly reversed pair has almost no
        gradient, so outliers count little, and a pair that starts badly reversed stays so. When to use: mislabelled
        outliers.

    Reference: Tang et al. 2024, arXiv:2402.05749, Table 1.
    """
    return torch.sigmoid(-beta * pairs.margin()) ** 2
