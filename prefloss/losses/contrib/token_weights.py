"""Pair losses with few users that read each token: entropies of the reference, importance weights."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.logratios import LogRatios
from prefloss.losses._authoring import Interval, NonNegative, Positive, Reward, register, transforms


@register(
    monotone=True,
    needs=("per_token.reference_entropy",),
    helps={"several-judges": "a lower strength where many answers are plausible"},
)
def mallows_dpo(pairs: Pairs, *, beta: Positive = 0.1, dispersion: Positive = 0.29) -> Tensor:
    r"""DPO at a strength set by how sure the reference is of its completions (Mallows-DPO).

    .. math::
        \ell = -\log \sigma(\beta \phi (h_w - h_l)), \quad \phi = -d \log \frac{e_w + e_l}{2}, \quad
        e = \frac{1}{|y|} \sum_t \frac{H(\pi_\mathrm{ref}(\cdot \mid t))}{\log V}

    Args:
        dispersion: Scale d that brings φ to about 1; a statistic of the data.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens, mask, entropy = torch.tensor([[-1.0]]), torch.tensor([[True]]), torch.tensor([[0.1]])
        >>> chosen = PerToken(tokens, tokens - 1, mask, reference_entropy=entropy).log_ratios()
        >>> rejected = PerToken(tokens, tokens + 1, mask, reference_entropy=entropy).log_ratios()
        >>> mallows_dpo(Pairs(chosen, rejected), beta=0.1)  # phi = 0.29 * 2.3026
        tensor([0.6286])

    Note:
        Low adoption: only the authors' repositories have it. The entropies have no gradient; one below the smallest
        normal number counts as that. The default of d is the authors' statistic of their data. When to use: prompts
        with one answer mixed with prompts that have many.

    Reference: Chen et al. 2024, arXiv:2405.14953.
    """
    return -F.logsigmoid(beta * _sharpness(pairs, dispersion) * pairs.margin())


@register(
    monotone=True,
    needs=("tokens", "per_token.reference_entropy"),
    reward=Reward(
        lambda ratios, *, beta, mixing: beta * (ratios.policy_mean - mixing * ratios.reference_mean),
        "β (log π(y) - α log π_ref(y)) / |y| with α = mixing",
        needs=frozenset(("reference", "tokens")),
    ),
)
def rainbowpo(
    pairs: Pairs,
    *,
    beta: Positive = 10.0,
    gamma: NonNegative = 0.1,
    mixing: Annotated[float, Interval(ge=0, le=1)] = 0.25,
    dispersion: Positive = 0.29,
) -> Tensor:
    r"""Mean log-probs, part of the reference, part of a fixed margin, and Mallows' strength (RainbowPO).

    .. math::
        \ell = -\log \sigma\left(\beta \phi \left[(\bar\pi_w - \bar\pi_l) - \alpha (\bar\rho_w - \bar\rho_l)
        - (1 - \alpha) \gamma\right]\right), \quad \bar x = \frac{x}{|y|}, \;
        \pi, \rho \text{ the log-probs of policy and reference}

    Args:
        pairs: Reads the log-probs of both sides under policy and reference, [pairs], nats, the token counts, and at
            each token the reference's entropy over that of the uniform distribution, [pairs, T].
        beta: Slope, in tokens per nat.
        gamma: Margin, in nats per token.
        mixing: Share α of the reference against the fixed margin.
        dispersion: Scale d of the strength φ, as in `mallows_dpo`.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens, mask, entropy = torch.tensor([[-1.0]]), torch.tensor([[True]]), torch.tensor([[0.1]])
        >>> chosen = PerToken(tokens, tokens, mask, reference_entropy=entropy).log_ratios()
        >>> rejected = PerToken(tokens - 1, tokens, mask, reference_entropy=entropy).log_ratios()
        >>> rainbowpo(Pairs(chosen, rejected), beta=1.0)  # 0.66775 * (1 - 0.75 * 0.1)
        tensor([0.4313])

    Note:
        Low adoption: only the authors' repository has it. The margin stands inside beta and is scaled by 1 - α, unlike
        that of `simpo`. Defaults are those of the code's classes. The entropies have no gradient. When to use: to try
        which of its parts (length, reference, margin, strength) helps on your data.

    Reference: Zhao et al. 2024, arXiv:2410.04203.
    """
    chosen, rejected = pairs.chosen, pairs.rejected
    policy = chosen.policy_mean - rejected.policy_mean
    reference = chosen.reference_mean - rejected.reference_mean
    score = policy - mixing * reference - (1 - mixing) * gamma
    return -F.logsigmoid(beta * _sharpness(pairs, dispersion) * score)


@register(
    monotone=True,
    needs=("per_token.weight",),
    reads=("per_token.reverse_kl",),
    reward=Reward(
        lambda ratios, *, beta, alpha: beta * _weighted_score(ratios, alpha),
        "β Σ w_t (h_t - α K_t)",
        needs=frozenset(("reference", "per_token.weight")),
    ),
)
def tis_dpo(pairs: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 0.0) -> Tensor:
    r"""DPO with an importance weight on each token (TIS-DPO).

    .. math::
        \ell = -\log \sigma\left(\beta \left[h^w_w - h^w_l - \alpha (K_w - K_l)\right]\right), \quad
        h^w = \sum_t w_t h_t, \quad K = \sum_t w_t \mathrm{KL}(\pi(\cdot \mid t) \,\|\, \pi_\mathrm{ref}(\cdot \mid t))

    Args:
        pairs: Reads the log-probs of each token under policy and reference, [pairs, T], nats, its weight, and unless
            alpha is 0 its KL.
        alpha: Weight of the KL offset: 0 in the authors' configuration, 1 in the paper.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
        >>> chosen = PerToken(tokens, tokens - 1, mask, weight=torch.tensor([[1.3, 0.7]])).log_ratios()
        >>> rejected = PerToken(tokens, tokens + 1, mask, weight=torch.tensor([[0.5, 0.5]])).log_ratios()
        >>> tis_dpo(Pairs(chosen, rejected), beta=0.1)  # 2 against -1
        tensor([0.5544])

    Note:
        Low adoption: only the authors' repository has it. The weights are data, computed beforehand from two
        contrastive models (the code clips them to [0.7, 1.3] or so), and have no gradient. The KL has the policy in
        front, the reverse of `tdpo1`, and a gradient on both sides. When to use: answers that differ in a few decisive
        words.

    Reference: Liu et al. 2024, arXiv:2410.04350.
    """
    return -F.logsigmoid(
        beta * (_weighted_score(pairs.chosen, alpha) - _weighted_score(pairs.rejected, alpha))
    )


def _sharpness(pairs: Pairs, dispersion: float) -> Tensor:
    """Mallows' φ, [pairs], without gradient: large where the reference is sure."""
    chosen, rejected = (
        required(side, "per_token").mean(transforms.per_token(side, "reference_entropy"))
        for side in (pairs.chosen, pairs.rejected)
    )
    entropy = (0.5 * (chosen + rejected)).detach()
    return -dispersion * torch.log(entropy.clamp(min=torch.finfo(entropy.dtype).tiny))


def _weighted(ratios: LogRatios, values: Tensor) -> Tensor:
    """Sum over tokens of the values times the importance weights, [...]."""
    rows = required(ratios, "per_token")
    # 0 outside the mask, where a weight may be anything and would reach the gradients.
    return rows.sum(torch.where(rows.mask, transforms.per_token(ratios, "weight").detach(), 0.0) * values)


def _weighted_score(ratios: LogRatios, alpha: float) -> Tensor:
    """Weighted log-ratio of a completion, less alpha times its weighted KL, [...], nats."""
    rows = required(ratios, "per_token")
    h = _weighted(ratios, rows.policy - transforms.per_token(ratios, "reference").detach())
    return h if alpha == 0 else h - alpha * _weighted(ratios, transforms.per_token(ratios, "reverse_kl"))
