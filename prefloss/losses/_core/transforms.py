"""Transforms of feedback that several losses and modifiers share: the maths of each stands here once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.logratios import LogRatios, PerToken
from prefloss.losses._core.maths import expm1

# exp stays finite in float32 up to 88; beyond the clamp a score is constant and its gradient 0.
MAX_EXPONENT = 80.0


@dataclass(frozen=True)
class Divergence:
    """An f-divergence between policy and reference: the score s(h) that takes the place of the log-ratio.

    Attributes:
        name: As written in a loss's string.
        score: h -> s.
    """

    name: str
    score: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        """As written in a loss's string."""
        return repr(self.name)


def forward_kl(h: Tensor) -> Tensor:
    r"""Score :math:`1 - e^{-h}` of the forward KL; -h above 80 is clamped.

    The 1 cancels in a difference of sums. It is kept, as TRL keeps it, because it does not in a difference of
    per-token means, and so that a completion on which policy and reference agree has score 0.
    """
    return alpha_divergence(h, 1.0)


def jensen_shannon(h: Tensor) -> Tensor:
    r"""Score :math:`\log 2 + \log \sigma(h)` of the Jensen-Shannon divergence."""
    return torch.log(h.new_tensor(2.0)) + F.logsigmoid(h)


def alpha_divergence(h: Tensor, alpha: float) -> Tensor:
    r"""Score :math:`(1 - e^{-\alpha h}) / \alpha`; -alpha h above 80 is clamped. The limit of alpha to 0 is h."""
    # expm1 keeps the digits that 1 - exp(x) loses near 0.
    return -expm1((-alpha * h).clamp(max=MAX_EXPONENT)) / alpha


def chi_squared(h: Tensor) -> Tensor:
    r"""Score :math:`e^h + h` of the mixed chi-squared divergence; h above 80 is clamped in the exponential."""
    return torch.exp(h.clamp(max=MAX_EXPONENT)) + h


def as_divergence(value: Any) -> Divergence:
    """A divergence from its name: `forward_kl`, `js`, `alpha(0.5)` or `chi_squared`.

    Raises:
        ValueError: If the name is unknown or alpha outside (0, 1).
        TypeError: If it is no name.
    """
    if isinstance(value, Divergence):
        return value
    if not isinstance(value, str):
        raise TypeError(f"got {value!r}, expected {DIVERGENCES}")
    named = {"forward_kl": forward_kl, "js": jensen_shannon, "chi_squared": chi_squared}
    if value in named:
        return Divergence(value, named[value])
    match = re.fullmatch(r"alpha\(([\d.]+)\)", value)
    if not match or not 0 < float(match.group(1)) < 1:
        raise ValueError(f"got {value!r}, expected {DIVERGENCES}")
    alpha = float(match.group(1))
    return Divergence(value, lambda h: alpha_divergence(h, alpha))


DIVERGENCES = "'forward_kl', 'js', 'chi_squared' or 'alpha(a)' with 0 < a < 1"


def scored(pairs: Pairs, score: Callable[[Tensor], Tensor]) -> Pairs:
    """The pairs with s(h) in place of the log-ratio h of each side."""
    return replace(pairs, chosen=_with_h(pairs.chosen, score), rejected=_with_h(pairs.rejected, score))


def shifted(pairs: Pairs, nats: Tensor) -> Pairs:
    """The pairs with the margin h_w - h_l raised by `nats`, [pairs]."""
    chosen = pairs.chosen
    return replace(pairs, chosen=replace(chosen, policy=chosen.policy + nats, per_token=None))


def reweighted_tail(pairs: Pairs, alpha: float) -> Pairs:
    r"""LD-DPO: of the longer side, tokens beyond the shorter side's length count :math:`\alpha`.

    Policy and reference alike; the token counts stay those of the completions.

    Raises:
        ValueError: If the pairs carry no per-token values.
    """
    chosen, rejected = rows_of(pairs.chosen, "chosen"), rows_of(pairs.rejected, "rejected")
    shared = torch.minimum(chosen.mask.sum(-1), rejected.mask.sum(-1))

    def side(rows: PerToken) -> LogRatios:
        place = rows.mask.cumsum(-1)
        # In the log-probs' own precision: two Python numbers would make float32 of a float64 loss.
        factor = torch.where(
            place <= shared.unsqueeze(-1), rows.policy.new_ones(()), rows.policy.new_tensor(alpha)
        )
        scale = replace(
            rows,
            policy=rows.policy * factor,
            reference=None if rows.reference is None else rows.reference * factor,
        )
        return scale.log_ratios()

    return replace(pairs, chosen=side(chosen), rejected=side(rejected))


def clamped_tokens(ratios: LogRatios, low: float, high: float) -> LogRatios:
    """Humanline: each token's log-ratio clamped to [low, high] nats before the sum; no gradient outside.

    Raises:
        ValueError: If the completions carry no per-token values with a reference.
    """
    rows = rows_of(ratios, "completions")
    if rows.reference is None:
        raise ValueError(
            "per_token.reference: got None, expected the reference's log-probs of each token, [..., T]"
        )
    h = (rows.policy - rows.reference).clamp(low, high)
    return replace(rows, policy=torch.where(rows.mask, rows.reference + h, 0.0)).log_ratios()


def confidence(pairs: Pairs) -> Tensor:
    r"""WPO's weight of each pair, [pairs], without gradient: :math:`\min(1, e^{a_w + a_l})`.

    a is the mean over tokens of the log-prob minus the log of the sum over the vocabulary of squared probabilities.

    Raises:
        ValueError: If the pairs carry no `per_token.log_sum_sq`.
    """
    total = pairs.chosen.policy.new_zeros(pairs.shape)
    for name in ("chosen", "rejected"):
        rows = rows_of(getattr(pairs, name), name)
        if rows.log_sum_sq is None:
            raise ValueError(
                f"{name}.per_token.log_sum_sq: got None, expected log sum of squared probabilities, [..., T]"
            )
        total = total + rows.mean(rows.policy - rows.log_sum_sq).detach()
    return torch.exp(total.clamp(max=0))


def rows_of(ratios: LogRatios, name: str) -> PerToken:
    """The per-token values of some completions.

    Raises:
        ValueError: If there are none.
    """
    if ratios.per_token is None:
        raise ValueError(
            f"{name}.per_token: got None, expected the log-probs of each token (keep_per_token=True)"
        )
    return ratios.per_token


def _with_h(ratios: LogRatios, score: Callable[[Tensor], Tensor]) -> LogRatios:
    s = score(ratios.h)
    return replace(ratios, policy=s, reference=torch.zeros_like(s), per_token=None)
