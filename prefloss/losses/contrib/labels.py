"""Losses of single labelled completions that have few users."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Labels, required
from prefloss.losses._authoring import NonNegative, Positive, register, resolve, running


@register(beta="tau", needs=("scores", "baseline"), holds_chosen=True)
def dro(labels: Labels, *, tau: Positive = 1.0) -> Tensor:
    r"""Half the squared difference between the reward and what value and policy explain (DRO-V).

    .. math::
        \ell = \frac{1}{2} \left(r - V(x) - \tau h\right)^2

    Args:
        labels: Reads the log-ratios h, [n], nats, the scores r and the baseline V, [n]; not the labels.
        tau: Strength of the pull towards the reference, in scores per nat.

    Returns:
        Loss of each completion, [n], scores squared; not reduced.

    Example:
        >>> completions = LogRatios(policy=[-20.0], reference=[-21.5])
        >>> dro(Labels(completions=completions, desirable=[True], scores=[1.0], baseline=[0.3]))
        tensor([0.3200])

    Note:
        Formula from third-party code only, and from a write-up of the paper. V is a value head trained by the same
        loss: its gradient flows if `baseline` has one. The paper rescales the policy's gradient by 1 / tau in practice;
        this does not. Not `dr_dpo`. When to use: one scored completion per prompt, and no pairs.

    Reference: Richemond et al. 2024, arXiv:2405.19107.
    """
    scores, baseline = required(labels, "scores"), required(labels, "baseline")
    return 0.5 * (scores - baseline - tau * labels.completions.h) ** 2


@register(separable=False, monotone=True, holds_chosen=True, reads=("mismatched", "kl"))
def kto_logsigmoid(
    labels: Labels,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    kl_baseline: running.Baseline = "auto",
) -> Tensor:
    r"""KTO with the logarithm of the sigmoid: steep where a label is badly wrong.

    .. math::
        \ell = -\lambda_D \log \sigma(\beta (h - z_0)) \text{ if desirable, else }
        -\lambda_U \log \sigma(\beta (z_0 - h))

    Args:
        labels: Reads the log-ratios h and the labels, [n], nats, and the fields of the baseline.
        kl_baseline: Where z_0 comes from, as in `kto`.

    Example:
        >>> kto_logsigmoid(Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False], kl=0.2))
        tensor([0.6303, 0.6349])

    Note:
        Low adoption: an ablation on the legacy branch of HALOs. With z_0 as a running mean of rewards it is `bco`. When
        to use: to see whether the saturation of `kto` is what helps.

    Reference: an ablation in the code of Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    z0 = resolve("kl_baseline", kl_baseline, labels, functions=running.BASELINES).detach()
    gain = beta * (labels.completions.h - z0)
    upvoted = -desirable_weight * F.logsigmoid(gain)
    downvoted = -undesirable_weight * F.logsigmoid(-gain)
    return torch.where(labels.desirable, upvoted, downvoted)
