"""Pieces of maths that several losses share, in the form that stays finite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.logratios import LogRatios


def expm1(x: Tensor) -> Tensor:
    """e^x - 1 for x <= 80, with every digit near 0, also where torch.compile builds it.

    torch.compile's CPU code for `torch.expm1` is exp(x) - 1, which is 0 below 6e-8.

    Example:
        >>> expm1(torch.tensor([-1e-9, 1.0]))
        tensor([-1.0000e-09,  1.7183e+00])
    """
    small = x.abs() < 1
    half = torch.tanh(torch.where(small, x, 0.0) / 2)
    return torch.where(small, 2 * half / (1 - half), torch.exp(torch.where(small, 0.0, x)) - 1)


def log1mexp(x: Tensor) -> Tensor:
    r""":math:`\log(1 - e^x)` for log-probabilities x <= 0, with every digit from both ends.

    A probability of 1 to rounding (x = 0) counts as one just below it: finite, with gradient 0. So does x > 0, which
    is no log-probability.

    Args:
        x: Log-probabilities, any shape, nats.

    Returns:
        Same shape, nats; at least the log of the smallest normal number (-87.3 in float32).

    Example:
        >>> log1mexp(torch.tensor([-1e-9, -1.0, -50.0]))
        tensor([-2.0723e+01, -4.5868e-01, -1.9287e-22])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch gets an argument that is harmless where it is not selected: `where` alone stops values, but 0 times
    # an infinite derivative is NaN.
    small = torch.log(-expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)


def log_odds(ratios: LogRatios) -> Tensor:
    r"""Log-odds of the mean token probability :math:`\bar p = \pi(y)^{1/|y|}`, [...], nats.

    Example:
        >>> log_odds(LogRatios(policy=[-20.0], tokens=[10]))
        tensor([-1.8546])
    """
    return ratios.policy_mean - log1mexp(ratios.policy_mean)


def nll(ratios: LogRatios) -> Tensor:
    """Negative log-likelihood under the policy per completion token, [...], nats per token.

    Example:
        >>> nll(LogRatios(policy=[-20.0], tokens=[10]))
        tensor([2.])
    """
    return -ratios.policy_mean


def bernoulli_kl(logit: Tensor, log_q: Tensor | float, log_not_q: Tensor | float) -> Tensor:
    r""":math:`KL(\sigma(z) \,\|\, q)` between two coins, nats; gradient through both.

    Args:
        logit: z, any shape.
        log_q: Log of q, same shape or a number.
        log_not_q: Log of 1 - q.

    Example:
        >>> bernoulli_kl(torch.tensor([0.0, 1e4]), math.log(0.5), math.log(0.5))
        tensor([0.0000, 0.6931])
    """
    # A probability that underflows meets a finite log, so 0 log 0 comes out as 0.
    log_p, log_not_p = F.logsigmoid(logit), F.logsigmoid(-logit)
    return torch.exp(log_p) * (log_p - log_q) + torch.exp(log_not_p) * (log_not_p - log_not_q)


def lengths(ratios: LogRatios) -> Tensor:
    """Token counts, [...], in the log-probs' dtype.

    Raises:
        ValueError: If they are unknown.
    """
    if ratios.tokens is None:
        raise ValueError("tokens: got None, expected completion token counts [...]: the loss reads lengths")
    return ratios.tokens.to(ratios.policy.dtype)


def gold_of(pairs: Pairs) -> LogRatios:
    """The third completion of each pair.

    Raises:
        ValueError: If the pairs carry none.
    """
    if pairs.gold is None:
        raise ValueError("gold: got None, expected log-ratios of a third completion, [pairs]")
    return pairs.gold


def scores_of(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected completions, each [pairs], in the log-ratios' dtype, no gradient.

    Raises:
        ValueError: If the pairs carry none.
    """
    if pairs.score_chosen is None or pairs.score_rejected is None:
        raise ValueError("score_chosen: got None, expected a score of each completion, [pairs]")
    dtype = pairs.chosen.policy.dtype
    return pairs.score_chosen.detach().to(dtype), pairs.score_rejected.detach().to(dtype)


def score_gap(pairs: Pairs) -> Tensor:
    """How much higher the chosen completion is scored, [pairs], in the scores' unit, without gradient.

    Raises:
        ValueError: If the pairs carry no scores.

    Example:
        >>> score_gap(Pairs.of([0.0], [0.0], score_chosen=[2.0], score_rejected=[0.5]))
        tensor([1.5000])
    """
    chosen, rejected = scores_of(pairs)
    return chosen - rejected


def refuse(wrong: Tensor, message: str) -> None:
    """Raise if any entry is True; silent where no value can be read (while compiling, or under `vmap`).

    Raises:
        ValueError: With the message.
    """
    if torch.compiler.is_compiling():
        return
    try:
        found = bool(wrong.any())
    except RuntimeError:
        # vmap refuses to turn a mapped tensor into a bool.
        return
    if found:
        raise ValueError(message)
