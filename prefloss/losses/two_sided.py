"""Pair losses that give each side its own target, so they depend on more than the difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.losses._authoring import NonNegative, Positive, Share, register, resolve, running
from prefloss.losses.pairwise import dpo


@register(
    monotone=True,
    holds_chosen=True,
    helps={"falling-chosen": "pulls the chosen completion up, whatever the rejected one does"},
)
def apo_zero(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Chosen up and rejected down, each against the reference (APO-zero).

    .. math::
        \ell = 1 - \sigma(\beta h_w) + \sigma(\beta h_l)

    Returns:
        Loss of each pair, [pairs], in [0, 2]; not reduced.

    Example:
        >>> apo_zero(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.9376])

    Note:
        Peers agree: TRL, Liger, ms-swift, Axolotl, oxRL, turbo-alignment. On a pair it is `kto_zero` summed over the
        two sides. When to use: chosen completions that are better than the policy's own.

    Reference: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    # 1 - sigmoid(x) loses every digit for large x; sigmoid(-x) does not.
    return torch.sigmoid(-beta * pairs.chosen.h) + torch.sigmoid(beta * pairs.rejected.h)


@register
def apo_down(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Chosen down, rejected further down (APO-down).

    .. math::
        \ell = \sigma(\beta h_w) + 1 - \sigma(\beta (h_w - h_l))

    Returns:
        Loss of each pair, [pairs], in [0, 2]; not reduced.

    Example:
        >>> apo_down(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.9753])

    Note:
        Peers agree: TRL, Liger, ms-swift, Axolotl, oxRL, turbo-alignment. It lowers the chosen completion too, by
        design. When to use: the policy already writes better than the chosen completions.

    Reference: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    return torch.sigmoid(beta * pairs.chosen.h) + torch.sigmoid(-beta * pairs.margin())


@register(
    holds_chosen=True,
    helps={"falling-chosen": "raises the chosen completion's own reward, not its lead alone"},
)
def nca_pair(pairs: Pairs, *, beta: Positive = 0.01) -> Tensor:
    r"""Noise-contrastive estimate of each side's reward (NCA on pairs).

    .. math::
        \ell = -\log \sigma(\beta h_w) - \tfrac{1}{2} \log \sigma(-\beta h_w) - \tfrac{1}{2} \log \sigma(-\beta h_l)

    Example:
        >>> nca_pair(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([1.3286])

    Note:
        Peers agree: TRL, Liger, ms-swift, XTuner, PaddleNLP, oxRL; the authors recommend beta 0.01. It is `nca` with
        two completions and all weight on the chosen one. The chosen side has a finite optimum, sigma(beta h_w) = 2/3.
        When to use: to keep the chosen completion from falling, which DPO allows.

    Reference: Chen et al. 2024, arXiv:2402.05369.
    """
    chosen, rejected = beta * pairs.chosen.h, beta * pairs.rejected.h
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register(
    aliases={
        "trl:bco_pair": ("TRL since 0.29", {"shift": 0.0}),
        "liger:bco_pair": ("Liger", {"shift": 0.0}),
        "axolotl:bco_pair": ("Axolotl", {"shift": 0.0}),
        "oxrl:bco_pair": ("oxRL", {"shift": 0.0}),
        "biasedNCA": ("the NCA repository", {"shift": 0.0}),
    },
    separable=False,
    stateful=True,
)
def bco_pair(pairs: Pairs, *, beta: Positive = 0.01, shift: running.Shift = "running") -> Tensor:
    r"""Binary classifier of chosen against rejected with a reward shift (BCO on pairs).

    .. math::
        \ell = -\log \sigma(\beta h_w - \delta) - \log \sigma(-(\beta h_l - \delta))

    Args:
        shift: Reward shift δ: `"running"`, the mean over all batches so far of a batch's mean reward beta h, or a fixed
            number in nats.

    Example:
        >>> bco_pair(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, shift=0.0)
        tensor([1.2654])

    Note:
        The running shift is that of the author's TRL code, kept by LLaMA-Factory and ms-swift: every batch of a rank
        counts as one number, is included before use, and has no gradient; `bco` counts every reward. TRL since 0.29,
        Liger, Axolotl and oxRL have no shift (`trl:bco_pair`). With the running shift a pair's loss depends on its
        batch and the batches before it; evaluation does not move it. A micro-batch counts as a batch. When to use:
        labels in the form of pairs, and as a term of MPO.

    Reference: Jung et al. 2024, arXiv:2404.04656.
    """
    chosen, rejected = beta * pairs.chosen.h, beta * pairs.rejected.h
    counted = pairs.valid
    total = torch.where(counted, chosen + rejected, 0.0).detach().sum()
    mean = total / (2 * counted.sum()).clamp(min=1)
    delta = resolve("shift", shift, mean, counted.any())
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


@register(helps={"several-judges": "aims at wins and losses, which may run in circles"})
def sppo_hard(pairs: Pairs, *, beta: Positive = 0.001) -> Tensor:
    r"""Squared distance of each log-ratio from a win or a loss (SPPO with hard labels).

    .. math::
        \ell = \left(h_w - \frac{1}{2 \beta}\right)^2 + \left(h_l + \frac{1}{2 \beta}\right)^2

    Args:
        beta: Strength of the pull towards the reference, the paper's 1/eta, in 1/nats.

    Returns:
        Loss of each pair, [pairs], nats squared; not reduced.

    Example:
        >>> sppo_hard(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([28.2500])

    Note:
        TRL, Liger, ms-swift and others agree; the authors' repository halves it, which is half the learning rate here,
        and so does `sppo`, its form for win probabilities. The targets are 500 nats at the default beta, so a loss near
        500000 is normal. h is not multiplied by beta. When to use: iterative self-play with a judge.

    Reference: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7.
    """
    target = 1 / (2 * beta)
    return (pairs.chosen.h - target) ** 2 + (pairs.rejected.h + target) ** 2


@register(
    monotone=True,
    holds_chosen=True,
    helps={"falling-chosen": "a penalty where the chosen completion is less likely than under the reference"},
)
def dpop(pairs: Pairs, *, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> Tensor:
    r"""DPO with a penalty where the chosen completion is less likely than under the reference (DPO-Positive, Smaug).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l - \lambda \max(0, -h_w)))

    Args:
        penalty: Weight λ of the penalty; 0 is DPO.

    Example:
        >>> dpop(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([0.5759])
        >>> dpop(Pairs.of(chosen=[-1.0], rejected=[-1.0]), beta=0.1)
        tensor([5.0067])

    Note:
        The penalty is inside sigma and beta: PaddleNLP, SamPO and oxRL agree, mlx-lm-lora puts it outside. At h_w = 0,
        where training starts, its gradient is 0. The authors published no loss code; 50 is the weight of all copies.
        When to use: pairs that differ in few tokens, where DPO pushes the chosen completion down.

    Reference: Pal et al. 2024, arXiv:2402.13228.
    """
    return -F.logsigmoid(beta * (pairs.margin() - penalty * torch.relu(-pairs.chosen.h)))


@register(
    monotone=True,
    holds_chosen=True,
    helps={"falling-chosen": "bounds what lowering the rejected completion can earn"},
)
def bdpo(pairs: Pairs, *, beta: Positive = 0.1, mixture: Share = 0.5) -> Tensor:
    r"""DPO with the rejected side under a mixture of policy and reference (bounded DPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - \log(\lambda e^{h_l} + 1 - \lambda)))

    Args:
        mixture: Share λ of the policy in the mixture; 1 is DPO.

    Example:
        >>> bdpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, mixture=0.5)
        tensor([0.6036])

    Note:
        No peer has it; formula from the authors' write-up. The mixture's log-ratio never falls below log(1 - λ), so
        making an already unlikely rejected completion less likely gains little. When to use: DPO runs that drive all
        likelihoods down.

    Reference: Cho et al. 2025, arXiv:2506.12725.
    """
    h = pairs.rejected.h
    share = h.new_tensor(mixture)
    # log(1 - share) is -inf at a share of 1, which logaddexp takes.
    mixed = torch.logaddexp(torch.log(share) + h, torch.log1p(-share))
    return -F.logsigmoid(beta * (pairs.chosen.h - mixed))


@register(aliases={"caldpo": "oxRL"}, helps={"falling-chosen": "pulls each log-ratio to a reward of its own"})
def cal_dpo(pairs: Pairs, *, beta: Positive = 0.001, calibration_weight: NonNegative = 0.5) -> Tensor:
    r"""Logistic loss plus the squared distance of each log-ratio from its reward (Cal-DPO).

    .. math::
        \ell = -\log \sigma(h_w - h_l) + \lambda \left[\left(h_w - \frac{1}{2 \beta}\right)^2
        + \left(h_l + \frac{1}{2 \beta}\right)^2\right]

    Args:
        beta: Strength of the pull towards the reference, in 1/nats; sets the targets alone.
        calibration_weight: Weight λ of the squares.

    Returns:
        Loss of each pair, [pairs]; not reduced.

    Example:
        >>> cal_dpo(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)
        tensor([14.2039])

    Note:
        No beta inside the sigmoid, as in the authors' code, whose weight of the squares is 1/2 and beta 0.001 or 0.002.
        oxRL agrees. The squares are those of `sppo_hard`. When to use: implied rewards should have the scale of the
        true ones.

    Reference: Xiao et al. 2024, arXiv:2412.14516.
    """
    return dpo(pairs, beta=1.0) + calibration_weight * sppo_hard(pairs, beta=beta)


@register(monotone=True, helps={"falling-chosen": "gives the rejected side less weight"})
def dpo_shift(pairs: Pairs, *, beta: Positive = 0.1, rejected_weight: Share = 0.7) -> Tensor:
    r"""DPO with less weight on the rejected side (DPO-Shift).

    .. math::
        \ell = -\log \sigma(\beta (h_w - \lambda h_l))

    Args:
        rejected_weight: Weight λ of the rejected side; 1 is DPO.

    Example:
        >>> dpo_shift(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1, rejected_weight=0.7)
        tensor([0.5892])

    Note:
        The authors' recipes fix λ at 0.7 or move it between 0.5 and 1 during training: pass
        `rejected_weight=Linear(0.5, 1.0, steps=...)`. oxRL agrees. When to use: chosen completions that lose likelihood
        under DPO.

    Reference: Yang et al. 2025, arXiv:2502.07599.
    """
    return -F.logsigmoid(beta * (pairs.chosen.h - rejected_weight * pairs.rejected.h))
