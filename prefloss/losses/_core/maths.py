"""Pieces of maths that several losses share, in the form that stays finite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.arguments import any_true

# exp stays finite in float32 up to 88; beyond the clamp a score is constant and its gradient 0.
MAX_EXPONENT = 80.0


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

    A probability that rounds to 1 (x = 0) counts as one just below it: finite, with gradient 0. So does x > 0.
    The result is at least the log of the smallest normal number (-87.3 in float32).

    Example:
        >>> log1mexp(torch.tensor([-1e-9, -1.0, -50.0]))
        tensor([-2.0723e+01, -4.5868e-01, -1.9287e-22])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch gets a harmless argument where it is not selected: `where` stops the value, but 0 times an infinite
    # derivative is NaN.
    small = torch.log(-expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)


def forward_kl(h: Tensor) -> Tensor:
    r"""Score :math:`1 - e^{-h}` of the forward KL; -h above 80 is clamped.

    The 1 cancels in a difference of sums, but not in a difference of per-token means. It is kept, as in TRL, so that
    a completion on which policy and reference agree has score 0.
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


def bernoulli_kl(logit: Tensor, log_q: Tensor | float, log_not_q: Tensor | float) -> Tensor:
    r""":math:`KL(\sigma(z) \,\|\, q)` between two coins, nats, from z, log q and log(1 - q); gradient through all.

    Example:
        >>> bernoulli_kl(torch.tensor([0.0, 1e4]), math.log(0.5), math.log(0.5))
        tensor([0.0000, 0.6931])
    """
    # A probability that underflows meets a finite log, so 0 log 0 comes out as 0.
    log_p, log_not_p = F.logsigmoid(logit), F.logsigmoid(-logit)
    return torch.exp(log_p) * (log_p - log_q) + torch.exp(log_not_p) * (log_not_p - log_not_q)


def batch_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values that count, a scalar; 0 if none does."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def ratio(total: Tensor | float, count: Tensor | float, like: Tensor) -> Tensor:
    """A sum over its count, 0 where nothing was counted: a scalar of the dtype and device of `like`."""
    total, count = (torch.as_tensor(one, dtype=torch.float64, device=like.device) for one in (total, count))
    return (total / torch.where(count > 0, count, torch.inf)).to(like.dtype)


def standardised(values: Tensor, location: Tensor | float, scale: Tensor | float) -> Tensor:
    """Distance from the location in units of the scale; 0 where the scale is 0."""
    scale = torch.as_tensor(scale, dtype=values.dtype, device=values.device)
    return (values - location) / torch.where(scale > 0, scale, torch.inf)


def log_sum_exp(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials of the values that count along the last dimension, and whether there are any.

    Where none counts the first is a finite number without gradient.
    """
    logits, some = _masked_logits(values, counted)
    return torch.logsumexp(logits, -1), some.squeeze(-1)


def log_softmax(values: Tensor, counted: Tensor) -> Tensor:
    """Log-softmax over the values of each row that count; 0 elsewhere."""
    return torch.where(counted, torch.log_softmax(_masked_logits(values, counted)[0], -1), 0.0)


def _masked_logits(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    # -inf takes a value out of a sum of exponentials. A row of -inf alone has NaN gradients, so it gets zeros.
    some = counted.any(-1, keepdim=True)
    return values.masked_fill(~counted, -torch.inf).masked_fill(~some, 0.0), some


def refuse(wrong: Tensor, message: str) -> None:
    """Raise ValueError if any entry is True; silent where no value can be read (while compiling, or under `vmap`)."""
    if any_true(wrong):
        raise ValueError(message)
