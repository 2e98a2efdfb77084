"""Losses of a group of completions of one prompt, ranked by their scores; absent completions are left out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Rankings
from prefloss.losses._authoring import NonNegative, Positive, maths, register, rewards


@register(monotone=True)
def dpo_pl(rankings: Rankings, *, beta: Positive = 0.1) -> Tensor:
    r"""Negative log-likelihood of the whole ranking under Plackett-Luce (DPO for rankings).

    .. math::
        \ell = -\sum_{k=1}^{K-1} \log \frac{e^{\beta h_{(k)}}}{\sum_{j \ge k} e^{\beta h_{(j)}}},
        \quad (1) \text{ the best}

    Args:
        rankings: Reads the log-ratios h, [groups, K], nats, and the order of the scores.

    Example:
        >>> dpo_pl(Rankings(LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]]), beta=0.1)
        tensor([1.6094])

    Note:
        With two completions it is `dpo`, to the last bit. The paper has no ties; here completions with equal scores
        keep the order in which they are given, so the first of two tied ones counts as better. The alternative,
        averaging over the orders of tied completions, is not implemented. No trainer has this loss. When to use: full
        rankings, if the lower places matter too.

    Reference: Rafailov et al. 2023, arXiv:2305.18290, Appendix A.3.
    """
    return _choices(rankings, beta).sum(-1)


@register(monotone=True)
def s_dpo(rankings: Rankings, *, beta: Positive = 1.0) -> Tensor:
    r"""Cross-entropy of the best completion against all others (S-DPO, softmax DPO).

    .. math::
        \ell = \log\Big(1 + \sum_{l} e^{\beta (h_l - h_w)}\Big), \quad w \text{ the best, } l \text{ the others}

    Args:
        rankings: Reads the log-ratios h, [groups, K], nats, and which score is highest.

    Example:
        >>> s_dpo(Rankings(LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]]), beta=0.1)
        tensor([0.9838])

    Note:
        The first term of `dpo_pl`, and `infonca` with all target mass on the best. The scores below the best are not
        compared with one another; of several best ones the first is the winner. The authors' script has beta 1 and
        three negatives, their Python default is 0.1; their code exponentiates naively and overflows at a gap of 95
        nats. When to use: one good completion and many bad ones, as in recommendation.

    Reference: Chen et al. 2024, arXiv:2406.09215.
    """
    return torch.where(_best(rankings), _choices(rankings, beta), 0.0).sum(-1)


@register
def infonca(rankings: Rankings, *, beta: Positive = 0.01, alpha: Positive = 1.0) -> Tensor:
    r"""Cross-entropy between the softmax of the scores and that of the log-ratios (InfoNCA).

    .. math::
        \ell = -\sum_i q_i \log p_i, \quad q = \mathrm{softmax}(r / \alpha), \; p = \mathrm{softmax}(\beta h)

    Args:
        alpha: Temperature of the scores, in their units: scores that differ by much more make q one-hot.

    Returns:
        Loss of each group, [groups], nats; not reduced. Its minimum is the entropy of q, not 0.

    Example:
        >>> infonca(Rankings(LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]]), beta=0.1, alpha=1.0)
        tensor([1.0332])

    Note:
        The authors run alpha = 1e-4 on UltraFeedback's scores, which is one-hot on the best, and add 0.01 to the first
        score to break ties; equal scores share the mass here. The default of 1 is ours: set alpha in the units of your
        scores. When to use: reward-model scores whose distances mean something; it compares completions only with one
        another, while `nca` also compares each with the reference.

    Reference: Chen et al. 2024, arXiv:2402.05369.
    """
    target = maths.log_softmax(_scores(rankings) / alpha, rankings.present)
    log_p = maths.log_softmax(beta * _log_ratios(rankings), rankings.present)
    return -torch.where(rankings.present, torch.exp(target) * log_p, 0.0).sum(-1)


@register(helps={"falling-chosen": "compares each completion with the reference, not with one another alone"})
def nca(rankings: Rankings, *, beta: Positive = 0.01, alpha: Positive = 1.0) -> Tensor:
    r"""Each completion against the reference, weighted by the softmax of the scores (NCA).

    .. math::
        \ell = -\sum_i \left[q_i \log \sigma(\beta h_i) + \frac{1}{K} \log \sigma(-\beta h_i)\right],
        \quad q = \mathrm{softmax}(r / \alpha)

    Args:
        alpha: Temperature of the scores, in their units: scores that differ by much more make q one-hot.

    Example:
        >>> nca(Rankings(LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]]), beta=0.1, alpha=1.0)
        tensor([1.3545])

    Note:
        K is the number of completions present. With two of them and one-hot q it is `nca_pair`. The authors run alpha =
        1e-4 on UltraFeedback's scores, which is one-hot on the best; the default of 1 is ours: set alpha in the units
        of your scores. When to use: as `infonca`, if good completions must not become less likely.

    Reference: Chen et al. 2024, arXiv:2402.05369.
    """
    present, h = rankings.present, beta * _log_ratios(rankings)
    target = torch.exp(maths.log_softmax(_scores(rankings) / alpha, present))
    count = present.sum(-1, keepdim=True).clamp(min=1)
    return -torch.where(present, target * F.logsigmoid(h) + F.logsigmoid(-h) / count, 0.0).sum(-1)


@register
def exo(rankings: Rankings, *, beta: Positive = 0.1, beta_r: Positive = 0.1) -> Tensor:
    r"""Reverse KL from the softmax of the log-ratios to that of the scores (EXO).

    .. math::
        \ell = \sum_i p_i \log \frac{p_i}{q_i}, \quad p = \mathrm{softmax}(\beta h), \;
        q = \mathrm{softmax}(r / \beta_r)

    Args:
        beta: Strength of the pull towards the reference, the paper's beta_pi.
        beta_r: Temperature of the scores, in their units.

    Returns:
        Loss of each group, [groups], nats; not reduced. At least 0.

    Example:
        >>> exo(Rankings(LogRatios.of([[1.5, 0.4, -1.0]]), scores=[[2.0, 1.0, 0.0]]), beta=0.1, beta_r=1.0)
        tensor([0.2315])

    Note:
        The gradient flows through the probabilities p in front of the logarithm too: a stop-gradient there gives a
        different loss. The authors' scripts set (beta_r, beta) to (0.5, 0.5) or (0.1, 0.1). The completions should be
        samples of the reference policy; for samples of the policy the paper has an importance-weighted form, which is
        not implemented. When to use: reward-model scores, for a mode-seeking policy.

    Reference: Ji et al. 2024, arXiv:2402.00856.
    """
    log_q = maths.log_softmax(_scores(rankings) / beta_r, rankings.present)
    log_p = maths.log_softmax(beta * _log_ratios(rankings), rankings.present)
    return torch.where(rankings.present, torch.exp(log_p) * (log_p - log_q), 0.0).sum(-1)


@register(needs_reference=False, monotone=True, needs=("tokens",), reward=rewards.UNSCALED_MEAN_LOG_PROB)
def rrhf(rankings: Rankings, *, rank_weight: NonNegative = 1.0, nll_weight: NonNegative = 1.0) -> Tensor:
    r"""Hinge on every pair in the wrong order, plus the NLL of the best completion (RRHF).

    .. math::
        \ell = \lambda \sum_{r_i < r_j} \max(0, \bar p_i - \bar p_j) - \mu \bar p_{(1)},
        \quad \bar p_i = \frac{1}{|y_i|} \log \pi(y_i \mid x)

    Args:
        rankings: Reads the policy log-probs, [groups, K], nats, the token counts, and the order of the scores.
        rank_weight: Weight λ of the hinges.
        nll_weight: Weight μ of the NLL of the best completion.

    Returns:
        Loss of each group, [groups], nats per token; not reduced.

    Example:
        >>> made = LogRatios(policy=[[-20.0, -24.0]], tokens=[[10, 8]])
        >>> rrhf(Rankings(completions=made, scores=[[1.0, 0.0]]))
        tensor([2.])
        >>> rrhf(Rankings(completions=made, scores=[[0.0, 1.0]]))  # wrong order by 1 nat per token
        tensor([4.])

    Note:
        Tied completions are not compared; of several best ones the first gets the NLL. The paper sums the NLL over
        tokens; the official code averages it over the padded row, prompt included; here it is the mean over the
        completion's tokens, as the hinges are. The official class defaults to a rank weight of 100, its script sets the
        paper's 1. When to use: no memory for a reference model.

    Reference: Yuan et al. 2023, arXiv:2304.05302.
    """
    mean = torch.where(rankings.present, rankings.completions.policy_mean, 0.0)
    wrong = torch.relu(mean.unsqueeze(-2) - mean.unsqueeze(-1))
    hinges = torch.where(_scored_worse(rankings), wrong, 0.0).sum((-2, -1))
    return rank_weight * hinges - nll_weight * torch.where(_best(rankings), mean, 0.0).sum(-1)


@register(needs_reference=False, monotone=True, needs=("tokens",), reward=rewards.UNSCALED_MEAN_LOG_PROB)
def pro(rankings: Rankings, *, nll_weight: NonNegative = 0.05) -> Tensor:
    r"""Each completion against those below it, at temperatures from the score gaps, plus NLL (PRO).

    .. math::
        \ell = \sum_{k=1}^{K-1} \log\Big(1 + \sum_{i > k} e^{\bar p_i (r_k - r_i) - \bar p_k T_k}\Big)
        - \mu (K-1)^2 \log \pi(y_{(1)} \mid x), \quad T_k = \max_{i > k} (r_k - r_i)

    Args:
        nll_weight: Weight μ of the NLL of the best completion, before its factor (K - 1)^2.

    Example:
        >>> made = LogRatios(policy=[[-20.0, -24.0]], tokens=[[10, 8]])
        >>> pro(Rankings(completions=made, scores=[[1.0, 0.0]]), nll_weight=0.0)
        tensor([0.3133])

    Note:
        p is the mean log-prob per token, but the NLL the sum over tokens, times (K - 1)^2, as in the authors' code; K
        is the number of completions present. The paper divides by temperatures 1 / (r_k - r_i), which are infinite at a
        tie; the product is the code's form and stays finite: a tie adds log 2 or more. The scores set the temperatures,
        so their scale matters. When to use: several scored completions and no reference model.

    Reference: Song et al. 2023, arXiv:2306.17492.
    """
    scores, policy = _scores(rankings), torch.where(rankings.present, rankings.completions.policy, 0.0)
    mean = torch.where(rankings.present, rankings.completions.policy_mean, 0.0)
    worse = _worse(rankings)
    gaps = torch.where(worse, _apart(scores), 0.0)
    below, some = maths.log_sum_exp(mean.unsqueeze(-2) * gaps, worse)
    ranked = torch.where(some, -F.logsigmoid(mean * _largest(gaps) - below), 0.0).sum(-1)
    factor = (rankings.present.sum(-1) - 1).clamp(min=0) ** 2
    return ranked - nll_weight * (factor * torch.where(_best(rankings), policy, 0.0).sum(-1))


@register
def lipo_lambda(rankings: Rankings, *, beta: Positive = 0.05) -> Tensor:
    r"""Logistic loss of every pair, weighted by what swapping it would do to the DCG (LiPO-λ).

    .. math::
        \ell = \sum_{r_i > r_j} \left|2^{r_i} - 2^{r_j}\right|
        \left|\frac{1}{\log(1 + \tau_i)} - \frac{1}{\log(1 + \tau_j)}\right|
        \log\left(1 + e^{-\beta (h_i - h_j)}\right), \quad \tau \text{ the rank by } h \text{, best } 1

    Example:
        >>> lipo_lambda(Rankings(LogRatios.of([[1.5, -1.0]]), scores=[[1.0, 0.0]]), beta=0.1)
        tensor([0.3067])

    Note:
        The gain is 2^r, so scores belong near [0, 1]; r is clamped at 115, where the gain leaves float32. The weights
        have no gradient: ranks are piecewise constant. The ranks are those of the policy now, so the value jumps where
        two completions change places; equal h, as before the first step, rank in the order given. Tied scores are not
        compared. The formula comes from two write-ups, not from the paper. When to use: graded lists where the top
        places matter most.

    Reference: Liu et al. 2024, arXiv:2402.01878.
    """
    h = _log_ratios(rankings)
    gain = torch.exp2(_scores(rankings).clamp(max=maths.MAX_EXPONENT / math.log(2)))
    discount = 1 / torch.log1p(_ranks(h.detach(), rankings.present).to(h.dtype))
    weight = _apart(gain).abs() * _apart(discount).abs()
    losses = weight * -F.logsigmoid(beta * _apart(h))
    return torch.where(_scored_worse(rankings), losses, 0.0).sum((-2, -1))


def _choices(rankings: Rankings, beta: float) -> Tensor:
    """Negative log-probability that each completion is chosen among itself and those below it, [groups, K]."""
    # With one completion below, this is dpo's expression digit for digit; log1p keeps what log(1 + x) would lose.
    below, some = maths.log_sum_exp(-beta * _apart(_log_ratios(rankings)), _worse(rankings))
    return torch.where(some, -F.logsigmoid(-below), 0.0)


def _log_ratios(rankings: Rankings) -> Tensor:
    # An absent completion may hold anything, NaN too.
    return torch.where(rankings.present, rankings.completions.h, 0.0)


def _scores(rankings: Rankings) -> Tensor:
    return torch.where(rankings.present, rankings.scores.detach(), 0.0)


def _apart(values: Tensor) -> Tensor:
    """Each value minus each other one, [groups, K, K]."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def _both(rankings: Rankings) -> Tensor:
    """True at [group, k, j] where both completions are present."""
    return rankings.present.unsqueeze(-1) & rankings.present.unsqueeze(-2)


def _scored_worse(rankings: Rankings) -> Tensor:
    """True at [group, k, j] where j has a lower score than k, both present."""
    return _both(rankings) & (_apart(_scores(rankings)) > 0)


def _worse(rankings: Rankings) -> Tensor:
    """True at [group, k, j] where j ranks below k, both present; ties rank in the order given."""
    return _both(rankings) & (_apart(_ranks(_scores(rankings), rankings.present)) < 0)


def _best(rankings: Rankings) -> Tensor:
    """True at the first of the best completions, [groups, K]; nowhere in an empty group."""
    return rankings.present & (_ranks(_scores(rankings), rankings.present) == 1)


def _ranks(values: Tensor, present: Tensor) -> Tensor:
    """Rank of each value, highest 1, [groups, K]; ties in the order given, absent ones last."""
    order = values.masked_fill(~present, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return 1 + order.argsort(dim=-1)


def _largest(gaps: Tensor) -> Tensor:
    return gaps.amax(-1) if gaps.shape[-1] else gaps.sum(-1)
