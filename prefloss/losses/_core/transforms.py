"""Formulas on feedback that several losses and modifiers share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.logratios import LogRatios, PerToken
from prefloss.losses._core import maths


def nll(ratios: LogRatios) -> Tensor:
    """Negative log-likelihood under the policy per completion token, [...], nats per token.

    Example:
        >>> nll(LogRatios(policy=[-20.0], tokens=[10]))
        tensor([2.])
    """
    return -ratios.policy_mean


def log_odds(ratios: LogRatios) -> Tensor:
    r"""Log-odds of the mean token probability :math:`\bar p = \pi(y)^{1/|y|}`, [...], nats.

    Example:
        >>> log_odds(LogRatios(policy=[-20.0], tokens=[10]))
        tensor([-1.8546])
    """
    return ratios.policy_mean - maths.log1mexp(ratios.policy_mean)


def lengths(ratios: LogRatios) -> Tensor:
    """Token counts, [...], in the log-probs' dtype."""
    return required(ratios, "tokens").to(ratios.policy.dtype)


def scores_of(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected completions, each [pairs], in the log-ratios' dtype, no gradient."""
    dtype = pairs.chosen.policy.dtype
    chosen, rejected = required(pairs, "score_chosen"), required(pairs, "score_rejected")
    return chosen.detach().to(dtype), rejected.detach().to(dtype)


def score_gap(pairs: Pairs) -> Tensor:
    """How much higher the chosen completion is scored, [pairs], in the scores' unit, without gradient.

    Example:
        >>> score_gap(Pairs.of([0.0], [0.0], score_chosen=[2.0], score_rejected=[0.5]))
        tensor([1.5000])
    """
    chosen, rejected = scores_of(pairs)
    return chosen - rejected


def per_token(ratios: LogRatios, name: str) -> Tensor:
    """What the per-token rows hold under a name, [..., T]."""
    return required(required(ratios, "per_token"), name)


@dataclass(frozen=True)
class Divergence:
    """An f-divergence between policy and reference: the score s(h) that takes the place of the log-ratio."""

    name: str
    score: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        """As written in a loss's string."""
        return repr(self.name)


DIVERGENCES = "'forward_kl', 'js', 'chi_squared' or 'alpha(a)' with 0 < a < 1"


def as_divergence(value: Any) -> Divergence:
    """A divergence from its name, one of `DIVERGENCES`."""
    if isinstance(value, Divergence):
        return value
    if not isinstance(value, str):
        raise TypeError
    named = {"forward_kl": maths.forward_kl, "js": maths.jensen_shannon, "chi_squared": maths.chi_squared}
    if value in named:
        return Divergence(value, named[value])
    match = re.fullmatch(r"alpha\(([\d.]+)\)", value)
    if not match or not 0 < float(match.group(1)) < 1:
        raise ValueError
    alpha = float(match.group(1))
    return Divergence(value, lambda h: maths.alpha_divergence(h, alpha))


def scored(pairs: Pairs, score: Callable[[Tensor], Tensor]) -> Pairs:
    """The pairs with s(h) in place of the log-ratio h of each side."""
    return replace(
        pairs, chosen=scored_side(pairs.chosen, score), rejected=scored_side(pairs.rejected, score)
    )


def scored_side(ratios: LogRatios, score: Callable[[Tensor], Tensor]) -> LogRatios:
    """Completions with s(h) in place of the log-ratio h."""
    s = score(ratios.h)
    return replace(ratios, policy=s, reference=torch.zeros_like(s), per_token=None)


def shifted(pairs: Pairs, nats: Tensor) -> Pairs:
    """The pairs with the margin h_w - h_l raised by `nats`, [pairs]."""
    chosen = pairs.chosen
    return replace(pairs, chosen=replace(chosen, policy=chosen.policy + nats, per_token=None))


NO_TAIL = (
    "how many tokens of a completion count depends on the length of the other one of its pair; score with "
    "'dpo(beta=...)' to count them all"
)
"""Why a reward of one completion does not exist where the shorter side decides which tokens count."""


def reweighted_tail(pairs: Pairs, alpha: float) -> Pairs:
    r"""LD-DPO: of the longer side, tokens beyond the shorter side's length count :math:`\alpha`.

    Policy and reference alike; the token counts stay those of the completions.
    """
    chosen, rejected = required(pairs.chosen, "per_token"), required(pairs.rejected, "per_token")
    shared = torch.minimum(chosen.mask.sum(-1), rejected.mask.sum(-1))

    def side(rows: PerToken) -> LogRatios:
        place = rows.mask.cumsum(-1)
        # In the log-probs' own precision: two Python numbers would make float32 of a float64 loss.
        factor = torch.where(
            place <= shared.unsqueeze(-1), rows.policy.new_ones(()), rows.policy.new_tensor(alpha)
        )
        scaled_reference = None if rows.reference is None else rows.reference * factor
        return replace(rows, policy=rows.policy * factor, reference=scaled_reference).log_ratios()

    return replace(pairs, chosen=side(chosen), rejected=side(rejected))


def clamped_tokens(feedback: Any, low: float, high: float) -> Any:
    """Humanline: each token's log-ratio clamped to [low, high] nats before the sum; no gradient outside."""
    names = ("chosen", "rejected") if isinstance(feedback, Pairs) else ("completions",)
    return replace(feedback, **{name: clamped(getattr(feedback, name), low, high) for name in names})


def clamped(ratios: LogRatios, low: float, high: float) -> LogRatios:
    """Completions with each token's log-ratio clamped to [low, high] nats."""
    rows, reference = required(ratios, "per_token"), per_token(ratios, "reference")
    h = (rows.policy - reference).clamp(low, high)
    made = replace(rows, policy=torch.where(rows.mask, reference + h, 0.0)).log_ratios()
    return made if ratios.tokens is None else replace(made, tokens=ratios.tokens)


def confidence(pairs: Pairs) -> Tensor:
    r"""WPO's weight of each pair, [pairs], without gradient: :math:`\min(1, e^{a_w + a_l})`.

    a is the mean over tokens of the log-prob minus the log of the sum over the vocabulary of squared probabilities.
    """
    total = pairs.chosen.policy.new_zeros(pairs.shape)
    for side in (pairs.chosen, pairs.rejected):
        rows = required(side, "per_token")
        total = total + rows.mean(rows.policy - per_token(side, "log_sum_sq")).detach()
    return torch.exp(total.clamp(max=0))
