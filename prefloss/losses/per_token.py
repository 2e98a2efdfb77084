"""Losses of pairs that read more than the sum of a completion's token log-probs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.logratios import LogRatios
from prefloss.losses._authoring import Interval, NonNegative, Positive, Reward, register, running, transforms
from prefloss.losses.pairwise import dpo

_KL = frozenset(("reference", "per_token.kl"))


@register(
    monotone=True,
    needs=("per_token",),
    reward=transforms.NO_TAIL,
    helps={"length": "counts the longer side's surplus tokens less"},
)
def ld_dpo(
    pairs: Pairs, *, beta: Positive = 0.1, alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
) -> Tensor:
    r"""DPO where the longer side's surplus tokens count less (LD-DPO).

    .. math::
        \ell = -\log \sigma(\beta (h^\alpha_w - h^\alpha_l)), \quad h^\alpha =
        \sum_{t \le m} h_t + \alpha \sum_{t > m} h_t, \quad m = \min(|y_w|, |y_l|)

    Args:
        pairs: Reads the log-probs of each token under policy and reference, [pairs, T], nats.
        alpha: Weight of the tokens beyond the shorter side's length; 1 is DPO.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> both = PerToken(tokens, torch.full((2, 3), -1.5), mask).log_ratios()
        >>> ld_dpo(Pairs(both[:1], both[1:]), alpha=0.5)  # h_w = 1 + 0.5 * 0.5, h_l = -1
        tensor([0.5870])

    Note:
        The same as `dpo` with the modifier `ld_alpha`. Policy and reference are weighted alike, as in TRL since 0.29
        (`ld_alpha`) and turbo-alignment. TRL up to 0.28, LLaMA-Factory and ms-swift weight the policy alone, so that
        equal models have a loss other than log 2; and TRL up to 0.28 counts columns from the row's start. turbo-
        alignment raises a negative log-prob to a fractional power: NaN. It needs per-token reference log-probs:
        precomputed sums are not enough. When to use: DPO that makes answers longer.

    Reference: Liu et al. 2024, arXiv:2409.06411.
    """
    return dpo(transforms.reweighted_tail(pairs, alpha), beta=beta)


@register(
    monotone=True,
    stateful=True,
    needs=("per_token",),
    reward=transforms.NO_TAIL,
    helps={"length": "compares equally many tokens of both sides"},
)
def sampo(pairs: Pairs, *, beta: Positive = 0.1, subset: running.Seed = 0) -> Tensor:
    r"""DPO on equally many tokens of both sides, drawn at random from the longer (SamPO).

    .. math::
        \ell = -\log \sigma\Big(\beta \Big(\sum_{t \in S_w} h_t - \sum_{t \in S_l} h_t\Big)\Big),
        \quad |S_w| = |S_l| = \min(|y_w|, |y_l|)

    Args:
        pairs: Reads the log-probs of each token under policy and reference, [pairs, T], nats.
        subset: Seed of the draws.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> both = PerToken(tokens, torch.full((2, 3), -1.5), mask).log_ratios()
        >>> sampo(Pairs(both[:1], both[1:]), beta=0.1)  # two tokens each: 2 * 0.5 against 2 * -0.5
        tensor([0.5981])

    Note:
        Tokens are drawn without replacement, anew at each call in training, and are the same for policy and reference;
        the authors' code draws again for the reference. The shorter side keeps all its tokens. One call draws one order
        of places for all pairs, so a pair's loss does not depend on other pairs or on padding. The plain function draws
        the same tokens from a seed each time; `get` makes a state that continues. When to use: DPO that makes answers
        longer, if the end of an answer matters as much as its start (else `ld_dpo`).

    Reference: Lu et al. 2024, arXiv:2406.10957.
    """
    rows = [required(side, "per_token") for side in (pairs.chosen, pairs.rejected)]
    width = max(row.mask.shape[-1] for row in rows)
    order = torch.rand(width, generator=running.generator(subset)).to(pairs.chosen.device)
    shared = torch.minimum(rows[0].mask.sum(-1), rows[1].mask.sum(-1)).unsqueeze(-1)
    chosen, rejected = (row.log_ratios(_first_of(order, row.mask, shared)) for row in rows)
    return dpo(replace(pairs, chosen=chosen, rejected=rejected), beta=beta)


@register(
    needs=("per_token.log_sum_sq",),
    helps={"off-policy": "weights each pair by how likely the policy is to write it"},
)
def wpo(pairs: Pairs, *, beta: Positive = 0.01) -> Tensor:
    r"""DPO weighted by how likely the policy is to write the pair (WPO).

    .. math::
        \ell = -\operatorname{sg}\left[\min(1, e^{a_w + a_l})\right] \log \sigma(\beta (h_w - h_l)), \quad
        a = \frac{1}{|y|} \sum_t \Big(\log \pi(y_t) - \log \sum_v \pi_t(v)^2\Big)

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats; of each token, [pairs, T], the policy's log-prob and
            the log of the sum over the vocabulary of its squared probabilities.

    Returns:
        Loss of each pair, [pairs], nats; not reduced. At most the loss of `dpo`.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
        >>> side = PerToken(tokens, tokens, mask, log_sum_sq=torch.tensor([[-1.0, -1.0]])).log_ratios()
        >>> wpo(Pairs(side, side))  # a = -0.5 on both sides: log 2 times e^-1
        tensor([0.2550])

    Note:
        The same as `dpo` with the modifier `wpo`, which other losses take too. The product of both sides' weights is
        clamped, not each, and has no gradient. TRL since 0.29 (`use_weighting`) lacks the clamp min(1, .): a pair can
        count more than once there. open-instruct multiplies a sum over tokens by a row of masks and keeps the gradient;
        oxRL has neither the squared probabilities nor the stop-gradient. When to use: preferences between completions
        of other models.

    Reference: Zhou et al. 2024, arXiv:2406.11827, Eq. 2.
    """
    return transforms.confidence(pairs) * dpo(pairs, beta=beta)


@register(
    monotone=True,
    needs=("per_token.kl",),
    reward=Reward(lambda ratios, *, beta: beta * (ratios.h + _summed_kl(ratios)), "β (h + K)", needs=_KL),
)
def tdpo1(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""DPO minus the difference of the sides' token-wise KL (TDPO, first form).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l - (K_l - K_w))), \quad
        K = \sum_t \mathrm{KL}\left(\pi_\mathrm{ref}(\cdot \mid t) \,\|\, \pi(\cdot \mid t)\right)

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
        >>> chosen = PerToken(tokens, tokens - 1, mask, kl=torch.tensor([[0.5, 0.5]])).log_ratios()
        >>> rejected = PerToken(tokens, tokens, mask, kl=torch.tensor([[1.0, 1.0]])).log_ratios()
        >>> tdpo1(Pairs(chosen, rejected), beta=0.1)  # margin 2, K_w = 1, K_l = 2
        tensor([0.6444])

    Note:
        Sums over tokens, never means; the KL runs over the whole vocabulary with the reference in front, and the
        gradient flows through both sides' K. The authors' code takes log(softmax) and is NaN where a probability
        underflows. When to use: to compare with `tdpo2`, the usual choice; this form lets the chosen side's KL grow.

    Reference: Zeng et al. 2024, arXiv:2404.11999.
    """
    return _tdpo(pairs, beta, 1.0, _summed_kl(pairs.chosen))


@register(
    monotone=True,
    needs=("per_token.kl",),
    reward=Reward(
        lambda ratios, *, beta, alpha: beta * (ratios.h + alpha * _summed_kl(ratios)),
        "β (h + α K)",
        needs=_KL,
    ),
    helps={"over-optimisation": "controls the KL token by token"},
)
def tdpo2(pairs: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 0.5) -> Tensor:
    r"""DPO minus the difference of the sides' token-wise KL, the chosen one's held (TDPO, second form).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l - \alpha (K_l - \operatorname{sg}[K_w]))), \quad
        K = \sum_t \mathrm{KL}\left(\pi_\mathrm{ref}(\cdot \mid t) \,\|\, \pi(\cdot \mid t)\right)

    Args:
        alpha: Weight of the KL difference.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
        >>> chosen = PerToken(tokens, tokens - 1, mask, kl=torch.tensor([[0.5, 0.5]])).log_ratios()
        >>> rejected = PerToken(tokens, tokens, mask, kl=torch.tensor([[1.0, 1.0]])).log_ratios()
        >>> tdpo2(Pairs(chosen, rejected), beta=0.1, alpha=0.5)  # margin 2, K_w = 1, K_l = 2
        tensor([0.6210])

    Note:
        The stop-gradient is on the chosen side's K alone, so the rejected side's KL is reduced, and raising the chosen
        side's KL brings no gain. The authors' function defaults to this form, their configuration file to `tdpo1`. When
        to use: DPO that drifts far from the reference at single tokens.

    Reference: Zeng et al. 2024, arXiv:2404.11999.
    """
    return _tdpo(pairs, beta, alpha, _summed_kl(pairs.chosen).detach())


@register(
    monotone=True,
    needs=("per_token",),
    reward=Reward(
        lambda ratios, *, beta, log_epsilon_p, log_epsilon_r: (
            beta * transforms.clamped(ratios, log_epsilon_p, log_epsilon_r).h
        ),
        "β Σ clamp(h_t, log ε_P, log ε_R)",
        needs=frozenset(("reference", "per_token")),
    ),
    helps={"off-policy": "clamps each token's log-ratio, in place of sampling from the policy"},
)
def humanline_dpo(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    log_epsilon_p: Annotated[float, Interval(le=0)] = -1.0,
    log_epsilon_r: Annotated[float, Interval(ge=0)] = 1.5,
) -> Tensor:
    r"""DPO on token log-ratios clamped to a perceptible range (Humanline DPO).

    .. math::
        \ell = -\log \sigma(\beta (h_w - h_l)), \quad
        h = \sum_t \mathrm{clamp}\left(h_t, \log \epsilon_P, \log \epsilon_R\right)

    Args:
        pairs: Reads the log-probs of each token under policy and reference, [pairs, T], nats.
        log_epsilon_p: Lowest log-ratio of a token, nats.
        log_epsilon_r: Highest log-ratio of a token, nats.

    Example:
        >>> from prefloss.logratios import PerToken
        >>> tokens = torch.tensor([[-1.0, -1.0], [-1.0, -5.0]])
        >>> both = PerToken(tokens, torch.full((2, 2), -3.0), torch.ones(2, 2).bool()).log_ratios()
        >>> humanline_dpo(Pairs(both[:1], both[1:]))  # h_w = 1.5 + 1.5, h_l = 1.5 - 1
        tensor([0.5759])

    Note:
        The same as `dpo` with the modifier `humanline`, which KTO and other losses take too, as in HALOs. A token
        outside the bounds has no gradient. HALOs copies the policy into the reference from time to time; with a fixed
        reference the clamp binds ever more tokens. When to use: offline data, with a reference that is updated.

    Reference: Liu et al. 2025, arXiv:2509.24207.
    """
    return dpo(transforms.clamped_tokens(pairs, log_epsilon_p, log_epsilon_r), beta=beta)


def _summed_kl(ratios: LogRatios) -> Tensor:
    """KL(reference || policy) summed over the tokens of a completion, [...], nats, with gradient."""
    return required(ratios, "per_token").sum(transforms.per_token(ratios, "kl"))


def _tdpo(pairs: Pairs, beta: float, alpha: float, chosen: Tensor) -> Tensor:
    offset = alpha * (_summed_kl(pairs.rejected) - chosen)
    return -F.logsigmoid(beta * (pairs.margin() - offset))


def _first_of(order: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """The `count` tokens of each row that come first when its places are ordered by `order`, [..., T]."""
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    keys = torch.where(mask, order[place], torch.inf)
    rank = keys.argsort(dim=-1, stable=True).argsort(dim=-1)
    return mask & (rank < count)
