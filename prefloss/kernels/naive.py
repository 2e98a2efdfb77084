"""Each op in plain torch, as its definition. Autograd does the backward pass and stores [N, V] several times."""

from contextlib import AbstractContextManager, nullcontext
from math import log
from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """What happens to a logit before the softmax: scale, then softcap, then temperature.

    A logit of -inf marks a token that cannot occur. It stays -inf through the softcap, which would otherwise lift it
    to -softcap and give the token a share of the probability.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """Slope of the transform at 0; without a softcap, its slope everywhere."""
        return self.logit_scale / self.temperature

    def apply(self, logits: Tensor) -> Tensor:
        """The transformed logits, differentiable by autograd."""
        z = logits if self.logit_scale == 1 else logits * self.logit_scale
        if self.softcap is not None:
            z = torch.where(z == -torch.inf, -torch.inf, self.softcap * torch.tanh(z / self.softcap))
        return z if self.temperature == 1 else z / self.temperature

    def apply_(self, logits: Tensor) -> Tensor:
        """The same in place: chunking exists to avoid a second buffer of that size."""
        if self.softcap is None:
            return logits if self.factor == 1 else logits.mul_(self.factor)
        masked = logits == -torch.inf
        logits.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return logits.masked_fill_(masked, -torch.inf)

    def slope(self, z: Tensor) -> Tensor | float:
        """Derivative of the transform where its result is ``z``, so that the raw logits need not be kept."""
        if self.softcap is None:
            return self.factor
        # the clamp gives a masked logit, z = -inf, the slope 0 instead of -inf
        tanh = (z * (self.temperature / self.softcap)).clamp_(-1, 1)
        return tanh.square_().neg_().add_(1).mul_(self.factor)


class Model(NamedTuple):
    """Hidden states [..., H] of a model, and weight [V, H] and bias [V] of its head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which log-probs of ``dtype`` inputs are computed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off: it would round the logits to half precision, an error of 5e-2 nats per token.

    This does not reach a backward pass that runs under autocast, which torch advises against.
    """
    # meta tensors have shapes only and no autocast
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def token_stats(
    logits: Tensor, targets: Tensor, transform: LogitTransform, ignore_index: int, outputs: int = 5
) -> Tensor:
    """Log-prob, logsumexp, entropy, log sum p^2 and top-1 hit: [..., V] and [...] -> [outputs, ...], 0 if ignored.

    `outputs` is 1 for log-probs alone, or 5.
    """
    keep = targets != ignore_index
    with no_autocast(logits.device):
        # selected before any arithmetic: inf and NaN of an ignored row must not reach the gradient as 0 * NaN
        z = transform.apply(torch.where(keep[..., None], logits, 0).to(compute_dtype(logits.dtype)))
        safe_targets = torch.where(keep, targets, 0)
        all_logps = z.log_softmax(-1)
        logps = all_logps.gather(-1, safe_targets[..., None]).squeeze(-1)
        stats = [logps]
        if outputs > 1:
            # 0 log 0 is 0, and so is its gradient
            finite = torch.where(all_logps == -torch.inf, 0, all_logps)
            entropy = -(finite * all_logps.exp()).sum(-1)
            top1 = (logps >= all_logps.amax(-1)).to(logps.dtype).detach()
            stats += [z.logsumexp(-1), entropy, (2 * all_logps).logsumexp(-1), top1]
    return torch.where(keep, torch.stack(stats), 0)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    outputs: int = 5,
) -> Tensor:
    """The same with logits = hidden @ weight.T + bias, for [..., H] hidden, [V, H] weight and [V] bias."""
    with no_autocast(hidden.device):
        logits = _project(hidden, weight, bias, targets != ignore_index)
        return token_stats(logits, targets, transform, ignore_index, outputs)


def linear_token_kl(
    policy: Model, reference: Model, targets: Tensor, transform: LogitTransform, ignore_index: int
) -> Tensor:
    """KL(reference || policy), KL(policy || reference), entropy of the reference over log V -> [3, ...]."""
    keep = targets != ignore_index
    with no_autocast(policy.hidden.device):
        p, q = (transform.apply(_project(*m, keep)).log_softmax(-1) for m in (policy, reference))
    return torch.where(keep, divergences(p, q), 0)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """Logits [..., V] in the precision to compute in, of zeros where a position is ignored."""
    dtype = compute_dtype(hidden.dtype)
    # the gradient of weight sums over rows, so a NaN in an ignored hidden row would reach it
    rows = torch.where(keep[..., None], hidden, 0).to(dtype)
    return torch.nn.functional.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p), KL(p || q) and entropy of q over log V, of log-probs [..., V] -> [3, ...]."""

    def expected(logps: Tensor, values: Tensor) -> Tensor:
        probabilities = logps.exp()
        # 0 log 0 is 0; a token that only one of the two can produce makes a divergence infinite, as it should
        return torch.where(probabilities == 0, 0, probabilities * values).sum(-1)

    return torch.stack((expected(q, q - p), expected(p, p - q), -expected(q, q) / log(max(p.shape[-1], 2))))
