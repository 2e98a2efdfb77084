"""Losses of one labelled completion at a time."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from prefloss.feedback import Labels
from prefloss.losses import _kl
from prefloss.losses._parameters import Coerce, NonNegative, Positive
from prefloss.losses._registry import register

Baseline = Annotated[str | _kl.KLBaseline, Coerce(_kl.as_parameter, _kl.WANTED)]


@register(separable=False, monotone=True, reads=("mismatched", "kl"))
def kto(
    labels: Labels,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    kl_baseline: Baseline = "auto",
) -> Tensor:
    r"""Prospect-theoretic value of an upvote or a downvote against a KL baseline (KTO).

    .. math::
        \ell = \lambda_D (1 - \sigma(\beta (h - z_0))) \text{ if desirable, else }
        \lambda_U (1 - \sigma(\beta (z_0 - h)))

    Args:
        labels: Reads the log-ratios h and the votes, [n], and what the baseline reads.
        beta: Strength of the pull towards the reference.
        desirable_weight: Weight λ_D of upvotes.
        undesirable_weight: Weight λ_U of downvotes; the paper keeps λ_D n_D / (λ_U n_U) in [1, 4/3].
        kl_baseline: Where z_0 comes from, nats: `"mismatched"` (the paper's estimate, max(0, mean h of mismatched
            pairs)), `"column"` (computed elsewhere), `"running_mean"`, `"zero"`, or `"auto"`: what the labels carry.

    Returns:
        Loss of each completion, [n]; not reduced. Every baseline works with one example and with one-sided votes.

    Example:
        >>> kto(Labels(completions=LogRatios.of([1.5, -1.0]), desirable=[True, False], kl=0.2))
        tensor([0.4675, 0.4700])

    Note:
        The baseline has no gradient and is clamped at 0 after the mean over all ranks (TRL, HALOs); NeMo-Aligner
        clamps per rank. Liger has no weights. TRL needs batches of two or more in a fixed order, because its
        mismatched pairs are neighbours in the batch; here the estimate is an input.

    Reference: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7.
    """
    z0 = _kl.resolve(kl_baseline)(labels).detach()
    gain = beta * (labels.completions.h - z0)
    # 1 - sigmoid(x) loses every digit for large x; sigmoid(-x) does not.
    upvoted = desirable_weight * torch.sigmoid(-gain)
    downvoted = undesirable_weight * torch.sigmoid(gain)
    return torch.where(labels.desirable, upvoted, downvoted)
