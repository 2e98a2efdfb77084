"""Pair losses with few users: other functions of the margin, and other constraints on a side."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.losses._authoring import NonNegative, Positive, maths, register, rewards, transforms
from prefloss.losses.pairwise import dpo


@register(aliases={"DPOSigmoid": "HALOs (legacy branch)"}, difference_only=True, monotone=True)
def dpo_sigmoid_prob(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Minus the implied probability of the preference, without a logarithm.

    .. math::
        \ell = -\sigma(\beta (h_w - h_l))

    Returns:
        Loss of each pair, [pairs], in [-1, 0]; not reduced.

    Example:
        >>> dpo_sigmoid_prob(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([-0.5622])

    Note:
        Formula from third-party code only: an ablation in the code of the KTO paper, without an equation. Adding 1
        gives the second term of `apo_down`. Its gradient vanishes for pairs that are badly wrong. When to use: many
        flipped labels, as a bounded loss to compare with.

    Reference: an ablation in the code of Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    return -torch.sigmoid(beta * pairs.margin())


@register(difference_only=True, monotone=True)
def cauchy(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Negative log-likelihood of the preference under Cauchy noise.

    .. math::
        \ell = -\log\left(\frac{\arctan z}{\pi} + \frac{1}{2}\right), \quad z = \beta (h_w - h_l)

    Example:
        >>> cauchy(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.5482])

    Note:
        Single source: an option in the code of RainbowPO. The loss of a badly wrong pair grows like the logarithm of
        the margin, and that of a right one falls like its inverse, so outliers weigh less and settled pairs more than
        in `dpo`. When to use: noisy labels.

    Reference: an option in the code of Zhao et al. 2024, arXiv:2410.04203.
    """
    z = beta * pairs.margin()
    # Either tail as a small angle, so that neither 1/2 - 1/2 nor log(1 - x) loses its digits.
    one = torch.ones_like(z)
    wrong = -torch.log(torch.atan2(one, -z.clamp(max=0)) / math.pi)
    right = -torch.log1p(-torch.atan2(one, z.clamp(min=0)) / math.pi)
    return torch.where(z > 0, right, wrong)


@register(difference_only=True, monotone=True)
def bregman_dpo(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    member: Literal["lr", "kliep", "lsif", "ba", "sba"] = "sba",
    lam: Positive = 0.2,
    scale: Positive = 4.0,
) -> Tensor:
    r"""Bregman divergence between the preference ratio of the data and the policy's (BPO).

    .. math::
        \ell_\mathrm{sba} = \frac{R^{\lambda + 1}}{s (\lambda + 1)} - \frac{R^{-\lambda}}{s \lambda}, \quad
        \ell_\mathrm{ba} = R^{\lambda + 1} - \frac{\lambda + 1}{\lambda} R^{-\lambda}, \\
        \ell_\mathrm{lsif} = R^2 - \frac{2}{R}, \quad \ell_\mathrm{kliep} = R + \log R, \quad
        \ell_\mathrm{lr} = \log(1 + R), \quad R = e^{-\beta (h_w - h_l)}

    Args:
        member: Which divergence; `"lr"` is DPO.
        lam: Exponent λ of `"ba"` and `"sba"`.
        scale: Divisor s of `"sba"`.

    Returns:
        Loss of each pair, [pairs]; not reduced. Constants are left out; all but `"lr"` are unbounded below.

    Example:
        >>> bregman_dpo(Pairs.of(chosen=[0.0], rejected=[0.0]), member="sba", lam=0.2)  # 1/4.8 - 1/0.8
        tensor([-1.0417])
        >>> bregman_dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), member="lr")
        tensor([0.5759])

    Note:
        Formula from third-party code only: later code by the same authors, whose own repository is empty; `"lsif"`
        follows the general line there (R^2 - 2/R, `"ba"` at λ = 1), of which that code's -2R is a slip. `"sba"` is
        `"ba"` over s (λ + 1). Later recipes set s = 4 with λ = 0.2 or 0.3; the paper's default was not seen. Each
        exponent is clamped at 80, and flat beyond. Not `balanced_bpo`. When to use: to vary how hard wrong pairs are
        pulled.

    Reference: Kim et al. 2025, arXiv:2505.19601.
    """
    if member == "lr":
        return dpo(pairs, beta=beta)
    z = beta * pairs.margin()

    def power(exponent: float) -> Tensor:
        """R to a power."""
        return torch.exp((-exponent * z).clamp(max=maths.MAX_EXPONENT))

    if member == "kliep":
        return power(1) - z
    if member == "lsif":
        return power(2) - 2 * power(-1)
    if member == "ba":
        return power(lam + 1) - (lam + 1) / lam * power(-lam)
    return (power(lam + 1) / (lam + 1) - power(-lam) / lam) / scale


@register(aliases={"focal_po": "oxRL"}, difference_only=True)
def focalpo(pairs: Pairs, *, beta: Positive = 0.1, gamma: NonNegative = 2.0, detach: bool = True) -> Tensor:
    r"""DPO with wrongly ordered pairs discounted (FocalPO).

    .. math::
        \ell = -\operatorname{sg}[\sigma(z)^\gamma] \log \sigma(z), \quad z = \beta (h_w - h_l)

    Args:
        gamma: How strongly; 0 is DPO.
        detach: Give the factor in front no gradient.

    Example:
        >>> focalpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, gamma=2.0)
        tensor([0.1820])

    Note:
        Formula from third-party code only, oxRL's: the authors' repository is empty. Whether the paper stops the
        gradient was not settled: write-ups mention no stop, oxRL has one. Without it the gradient turns round below
        sigma(z) = e^(-1/gamma), which is 0.61 at gamma = 2, so that a fresh pair would be pushed the wrong way: then
        take a small gamma such as 0.05. No default could be verified. It raises the weight of pairs that are right, the
        reverse of the focal loss in vision. When to use: many pairs that cannot be learnt.

    Reference: Liu et al. 2025, arXiv:2501.06645.
    """
    log_p = F.logsigmoid(beta * pairs.margin())
    factor = torch.exp(gamma * log_p)
    return -(factor.detach() if detach else factor) * log_p


@register(holds_chosen=True, helps={"falling-chosen": "holds the sum of the two log-ratios near 0"})
def c2dpo(pairs: Pairs, *, beta: Positive = 0.1, constraint_weight: NonNegative = 2e-4) -> Tensor:
    r"""DPO plus a square that keeps the two log-ratios balanced (C²-DPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l)) + \lambda (h_w + h_l)^2

    Args:
        constraint_weight: Weight λ of the square, in 1/nats squared.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> c2dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, constraint_weight=2e-4)
        tensor([0.5760])

    Note:
        Formula from third-party code only, oxRL's, and from notes on the paper; default as there. When to use: DPO
        under which both log-probs fall.

    Reference: Asadi et al. 2025, arXiv:2502.17507.
    """
    return dpo(pairs, beta=beta) + constraint_weight * (pairs.chosen.h + pairs.rejected.h) ** 2


@register(monotone=True, holds_chosen=True)
def minor_dpo(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""DPO that stops pushing the rejected completion below the reference (MinorDPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - \max(0, h_l)))

    Example:
        >>> minor_dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.6210])

    Note:
        Formula from third-party code only, oxRL's. At h_l = 0, where training starts, the rejected side has no
        gradient. When to use: DPO that lowers rejected completions too far.

    Reference: Xie et al. 2024, arXiv:2408.09834.
    """
    return -F.logsigmoid(beta * (pairs.chosen.h - torch.relu(pairs.rejected.h)))


@register(
    aliases={"oxrl:bpo": ("oxRL", {"alpha": 1.0})},
    monotone=True,
    holds_chosen=True,
    helps={"falling-chosen": "trains the worse side of each pair"},
)
def balanced_bpo(pairs: Pairs, *, beta: Positive = 0.1, alpha: Positive = 0.3) -> Tensor:
    r"""Logistic loss of the worse side (balanced preference optimization, BPO).

    .. math::
        \ell = -\log \sigma(\beta \min(h_w, -\alpha h_l))

    Args:
        alpha: Weight of the rejected side against the chosen one.

    Example:
        >>> balanced_bpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, alpha=1.0)
        tensor([0.6444])

    Note:
        Single source: the authors' repository, and oxRL with alpha 1. The authors ship the hinge max(0, 1 - u) of the
        same u with alpha = 0.3; this is their `balance_logistic_alpha`, and with alpha = 1 their `balance_logistic`.
        Only the worse side has a gradient; where they tie, as at the start, each has half. Not `bregman_dpo`. When to
        use: DPO that lowers the rejected side instead of raising the chosen one.

    Reference: Sun et al. 2025, arXiv:2506.03557.
    """
    return -F.logsigmoid(beta * torch.minimum(pairs.chosen.h, -alpha * pairs.rejected.h))


@register(
    aliases={"turbo:ASFT": "turbo-alignment"},
    needs_reference=False,
    monotone=True,
    holds_chosen=True,
    needs=("tokens",),
    reward=rewards.LOG_ODDS,
)
def asft(pairs: Pairs, *, beta: NonNegative = 0.1) -> Tensor:
    r"""NLL of the chosen completion plus unlikelihood of the rejected one (aligned SFT, ASFT).

    .. math::
        \ell = -(1 + \beta) \log \bar p_w - \beta \log(1 - \bar p_l), \quad
        \bar p = \pi(y \mid x)^{1 / |y|}

    Args:
        beta: Weight of the preference beside the NLL.

    Returns:
        Loss of each pair, [pairs], nats per token; not reduced.

    Example:
        >>> asft(Pairs(LogRatios([-20.0], tokens=[10]), LogRatios([-24.0], tokens=[8])), beta=0.1)
        tensor([2.2051])

    Note:
        Formula from third-party code only, turbo-alignment's, which writes it with log-odds; since the sigmoid of the
        log-odds is the probability, this is the same. A rejected completion of probability 1 counts as just below:
        finite, without gradient. LLaMA-Factory's `asft` is an unrelated method. When to use: no reference, as `orpo`.

    Reference: Wang et al. 2024, arXiv:2409.10571.
    """
    return (1 + beta) * transforms.nll(pairs.chosen) - beta * maths.log1mexp(pairs.rejected.policy_mean)


@register(monotone=True, needs=("gold",))
def selm(pairs: Pairs, *, beta: Positive = 0.01, alpha: NonNegative = 0.001) -> Tensor:
    r"""DPO that lowers the policy on samples of the reference, to explore (SELM).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l)) + \alpha \beta h_\mathrm{gold}

    Args:
        pairs: Reads the log-ratios h of both sides and of `gold`, a sample of the reference policy, [pairs], nats.
        alpha: Weight of the exploration term.

    Returns:
        Loss of each pair, [pairs], nats; not reduced. Unbounded below.

    Example:
        >>> selm(Pairs.of([1.5], [-1.0], gold=LogRatios.of([-2.0])), beta=0.1, alpha=0.1)
        tensor([0.5559])

    Note:
        Low adoption: only the authors' repository has it. The term is a sum over tokens, with gradient. Its recipes use
        beta 0.01 and alpha 0.001 (Zephyr, Phi-3) or 0.0001 (Llama-3). When to use: online data, beside `xpo`.

    Reference: Zhang et al. 2024, arXiv:2405.19332.
    """
    return dpo(pairs, beta=beta) + alpha * beta * required(pairs, "gold").h
