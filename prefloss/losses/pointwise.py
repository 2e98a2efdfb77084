"""Losses of one labelled completion at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Labels, required
from prefloss.losses._authoring import NonNegative, Positive, register, resolve, rewards, running, transforms


def downvoted(labels: Labels) -> Tensor:
    """True at downvotes with tokens, [n]: what the unlearning losses count."""
    return labels.valid & ~labels.desirable


@register(
    separable=False,
    monotone=True,
    holds_chosen=True,
    reads=("mismatched", "kl"),
    helps={
        "few-upvotes": "weights upvotes and downvotes apart: desirable_weight is to make up for rare upvotes",
        "noisy": "saturates, so that votes which contradict the policy strongly pull less",
    },
)
def kto(
    labels: Labels,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    kl_baseline: running.Baseline = "auto",
) -> Tensor:
    r"""Prospect-theoretic value of an upvote or a downvote against a KL baseline (KTO).

    .. math::
        \ell = \lambda_D (1 - \sigma(\beta (h - z_0))) \text{ if desirable, else }
        \lambda_U (1 - \sigma(\beta (z_0 - h)))

    Args:
        labels: Reads the log-ratios h and the labels, [n], nats, and the fields of the baseline.
        undesirable_weight: Weight λ_U of downvotes; the paper keeps λ_D n_D / (λ_U n_U) in [1, 4/3].
        kl_baseline: Where z_0 comes from, nats: `"mismatched"` (the paper's estimate, max(0, mean h of mismatched
            pairs)), `"column"` (computed elsewhere), `"running_mean"`, `"zero"`, or `"auto"`: what the labels carry.

    Returns:
        Loss of each completion, [n]; not reduced. Every baseline works with one example and with labels of one kind.

    Example:
        >>> kto(Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False], kl=0.2))
        tensor([0.4675, 0.4700])

    Note:
        The baseline has no gradient and is clamped at 0 after the mean over all ranks (TRL, HALOs); NeMo-Aligner clamps
        per rank. Liger has no weights. TRL needs batches of two or more in a fixed order, because its mismatched pairs
        are neighbours in the batch; here the completions are an input.

    Reference: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7.
    """
    z0 = resolve("kl_baseline", kl_baseline, labels, functions=running.BASELINES).detach()
    gain = beta * (labels.completions.h - z0)
    # 1 - sigmoid(x) loses every digit for large x; sigmoid(-x) does not.
    upvoted = desirable_weight * torch.sigmoid(-gain)
    downvoted = undesirable_weight * torch.sigmoid(gain)
    return torch.where(labels.desirable, upvoted, downvoted)


@register(
    aliases={"apo_zero_unpaired": "TRL, ms-swift", "KTOZero": "HALOs (legacy branch)"},
    monotone=True,
    holds_chosen=True,
)
def kto_zero(
    labels: Labels,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    r"""KTO without a KL baseline (KTO-zero, unpaired APO-zero).

    .. math::
        \ell = \lambda_D (1 - \sigma(\beta h)) \text{ if desirable, else } \lambda_U \sigma(\beta h)

    Returns:
        Loss of each completion, [n]; not reduced.

    Example:
        >>> kto_zero(Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False]))
        tensor([0.4626, 0.4750])

    Note:
        On the two sides of a pair it adds up to `apo_zero`. Liger gives it for `kl=None`, without weights; HALOs keeps
        it as an ablation and does not recommend it. It pushes every upvoted completion above the reference and every
        downvoted one below. When to use: labels without pairs, if `kto`'s baseline is not available.

    Reference: D'Oosterlinck et al. 2024, arXiv:2408.06266; as an ablation Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    return kto(
        labels,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        kl_baseline="zero",
    )


@register(separable=False, stateful=True, holds_chosen=True)
def bco(labels: Labels, *, beta: Positive = 0.1, shift: running.Shift = "running") -> Tensor:
    r"""Cross-entropy of the label given the reward, shifted by the mean reward (BCO).

    .. math::
        \ell = -\log \sigma(\beta h - \delta) \text{ if desirable, else } -\log \sigma(-(\beta h - \delta))

    Args:
        shift: Reward shift δ: `"running"`, the mean of all rewards seen so far, or a number.

    Example:
        >>> bco(Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False]), shift=0.0)
        tensor([0.6210, 0.6444])

    Note:
        The running shift is that of TRL's BCOTrainer (gone in 1.16), whose pair form the paper's first author wrote: a
        cumulative mean of the rewards of both classes over all ranks, each reward counted once and included before use,
        with no moving average and no gradient. Published descriptions say a moving average of the two classes' means.
        Under gradient accumulation the mean moves once per micro-batch. BCO's weights for downvotes of another prompt
        distribution are data: pass them as `weight`. When to use: labels without pairs, as `kto`, with a gradient that
        stays large for badly wrong rewards.

    Reference: Jung et al. 2024, arXiv:2404.04656.
    """
    rewards = beta * labels.completions.h
    margin = rewards - resolve("shift", shift, rewards, labels.valid)
    return -F.logsigmoid(torch.where(labels.desirable, margin, -margin))


@register(
    valid=downvoted,
    helps={"forget": "lowers completions without better ones, more slowly than gradient ascent"},
)
def npo(labels: Labels, *, beta: Positive = 0.1) -> Tensor:
    r"""DPO without its winner, to unlearn completions (NPO).

    .. math::
        \ell = -\frac{2}{\beta} \log \sigma(-\beta h) \text{ if undesirable, else } 0

    Returns:
        Loss of each completion, [n], nats; not reduced. Upvotes give 0 and do not count in the mean.

    Example:
        >>> npo(Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False]))
        tensor([ 0.0000, 12.8879])

    Note:
        The factor 2/β makes the gradient at the reference that of gradient ascent on the NLL, and the limit of β to 0
        is gradient ascent itself. It is usually combined with a loss on data to keep, as in `npo + 1.0*nll`. Not NeMo,
        whose names also start with N. When to use: completions to forget, without better ones.

    Reference: Zhang et al. 2024, arXiv:2404.05868.
    """
    return torch.where(labels.desirable, 0.0, -2 / beta * F.logsigmoid(-beta * labels.completions.h))


@register(
    needs_reference=False,
    needs=("tokens",),
    valid=downvoted,
    reward=rewards.MEAN_LOG_PROB,
    helps={"forget": "lowers completions by their mean log-prob per token, without a reference"},
)
def simnpo(labels: Labels, *, beta: Positive = 2.5, gamma: NonNegative = 0.0) -> Tensor:
    r"""NPO without a reference, on the mean log-prob per token (SimNPO).

    .. math::
        \ell = -\frac{2}{\beta} \log \sigma\left(-\frac{\beta}{|y|} \log \pi(y \mid x) - \gamma\right)
        \text{ if undesirable, else } 0

    Args:
        beta: Slope, in tokens per nat.
        gamma: Margin, in nats.

    Returns:
        Loss of each completion, [n], nats per token; not reduced. Upvotes give 0 and do not count in the mean.

    Example:
        >>> completions = LogRatios(policy=[-20.0, -2.4], tokens=[10, 8])
        >>> simnpo(Labels(completions=completions, desirable=[True, False]))
        tensor([0.0000, 0.3095])

    Note:
        The official code subtracts gamma from the mean NLL before multiplying by beta, the paper after; they agree at
        its default of 0. Its beta is 2.5, and 4.5 on TOFU's 10 % split. When to use: as `npo`, where short completions
        are forgotten too slowly or no reference fits in memory.

    Reference: Fan et al. 2024, arXiv:2410.07163.
    """
    margin = beta * transforms.nll(labels.completions) - gamma
    return torch.where(labels.desirable, 0.0, -2 / beta * F.logsigmoid(margin))


@register(needs=("scores", "baseline"))
def a2po(labels: Labels, *, beta: Positive = 1e-3) -> Tensor:
    r"""Squared distance of the log-ratio from the advantage (A*-PO).

    .. math::
        \ell = \left(\beta h - (r - V^*(x))\right)^2

    Args:
        labels: Reads the log-ratios h, [n], nats, the scores r and the baseline V*, [n]; not the labels.
        beta: Strength of the pull towards the reference, the paper's beta_2, in scores per nat.

    Returns:
        Loss of each completion, [n], scores squared; not reduced.

    Example:
        >>> completions = LogRatios(policy=[-20.0], reference=[-21.5])
        >>> a2po(Labels(completions=completions, desirable=[True], scores=[1.0], baseline=[0.3]))
        tensor([0.4879])

    Note:
        The baseline is computed before training from rewards r_k of reference samples: V* = beta_1 log mean_k exp(r_k /
        beta_1), beta_1 = 0.5 in TRL. It has no gradient; `dro` trains its own. When to use: a reward function and
        on-policy samples, one per prompt.

    Reference: Brantley et al. 2025, arXiv:2505.20686.
    """
    advantage = required(labels, "scores") - required(labels, "baseline").detach()
    return (beta * labels.completions.h - advantage) ** 2
