"""Pair losses with few users that depend on the whole batch."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.losses._authoring import (
    Interval,
    NonNegative,
    Positive,
    Reward,
    maths,
    register,
    resolve,
    running,
)


@register(
    needs_reference=False,
    separable=False,
    monotone=True,
    stateful=True,
    needs=("tokens",),
    reward=Reward(
        lambda ratios, *, beta, reference: beta * (ratios.h if reference else ratios.policy_mean),
        "β log π(y) / |y|, β h if reference",
        needs=frozenset(("tokens",)),
    ),
    helps={"noisy": "a smaller margin where a pair is ambiguous"},
)
def gamma_po(
    pairs: Pairs,
    *,
    beta: Positive = 10.0,
    gamma: NonNegative = 4.0,
    tau: Positive = 10.0,
    steps: Annotated[int, Interval(ge=1)] = 20,
    queue: running.Queue = "running",
    reference: bool = False,
) -> Tensor:
    r"""SimPO or DPO with a margin for each pair, larger where the pair is already right (γ-PO).

    .. math::
        \ell_i = -\log \sigma(g_i - \operatorname{sg}[\gamma_i]), \quad g = \beta (\bar\pi_w - \bar\pi_l), \quad
        \gamma_i = n \gamma p_i, \\
        p \approx \arg\min_p \tau \sum_i p_i \log(n p_i) - \frac{1}{n} \sum_i \log \sigma(g_i - n \gamma p_i),
        \quad \sum_i p_i = 1

    Args:
        pairs: Reads the policy log-probs of both sides, [pairs], nats, and the token counts; the log-ratios if
            `reference`.
        beta: Slope, in tokens per nat; with `reference` the strength of the pull towards it.
        gamma: Mean of the margins, in nats: the paper's ratio gamma/beta times beta.
        tau: Penalty on uneven margins.
        steps: Exponentiated-gradient steps of the search for p.
        queue: Gaps g of earlier batches that fill n up to 256: `"running"`, the last 2048, or numbers.
        reference: Use the gap β (h_w - h_l) of DPO, and subtract γ from its margins so that their mean is 0.

    Example:
        >>> chosen = LogRatios(policy=[-10.0, -10.0], tokens=[10, 10])
        >>> rejected = LogRatios(policy=[-20.0, -10.0], tokens=[10, 10])
        >>> gamma_po(Pairs(chosen, rejected), beta=2.0, gamma=1.0, tau=10.0, queue=())  # gaps 2 and 0
        tensor([0.3194, 1.2968])

    Note:
        Single source: the authors' code, whose search this follows: a step of min(0.5 / tau, 1) from even margins, and
        the margins before its last step. Published (beta, gamma/beta, tau): Llama-3 (10, 0.4, 10), the default; Gemma-2
        (10, 0.5, 20); Mistral (2.5, 0.15, 10); Qwen (10, 0.3, 3). Their queue starts with eight normal draws, here it
        is empty; each rank keeps its own. When to use: as `simpo`, with pairs of uneven quality.

    Reference: Sun et al. 2025, arXiv:2506.03690.
    """
    counted = pairs.valid
    gaps = beta * (pairs.margin() if reference else pairs.chosen.policy_mean - pairs.rejected.policy_mean)
    fixed_gaps = gaps.detach()
    earlier = resolve("queue", queue, fixed_gaps, counted)
    margins = _target_margins(fixed_gaps, counted, earlier, gamma, tau, steps)
    return -F.logsigmoid(gaps - (margins - gamma if reference else margins))


@register(separable=False, monotone=True, needs=("embedding",))
def rpo_relative(pairs: Pairs, *, beta: Positive = 0.1, temperature: Positive = 0.5) -> Tensor:
    r"""Each chosen against every rejected completion, weighted by the similarity of prompts (relative PO).

    .. math::
        \ell_i = -\frac{1}{n} \sum_{j=1}^{n} \log \sigma\left(\beta \omega_{ij} (h_{w,i} - h_{l,j})\right), \quad
        \omega_{i \cdot} = \mathrm{softmax}_j \frac{\cos(x_i, x_j) - 1}{\tau}

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats, and embeddings x of the prompts, [pairs, D].
        temperature: Temperature τ of the similarity of prompts.

    Example:
        >>> same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> rpo_relative(Pairs.of(chosen=[1.5, 0.0], rejected=[-1.0, 0.0], embedding=same))  # omega 1/2
        tensor([0.6445, 0.6808])

    Note:
        Low adoption: only the authors' repository has it. A mean over j, not a sum; the embeddings have no gradient. A
        batch of one is `dpo`. Only the pairs of this rank are compared. The authors also have a form without embeddings
        (0.8 own pair, 0.2 the others) and one for unequal numbers of good and bad completions. One of four methods
        called RPO. When to use: batches of similar prompts.

    Reference: Yin et al. 2024, arXiv:2402.10958.
    """
    counted = pairs.valid.flatten()
    prompts = F.normalize(required(pairs, "embedding").detach().to(pairs.chosen.policy.dtype), dim=-1)
    prompts = prompts.reshape(-1, prompts.shape[-1])
    others = counted.expand(len(counted), -1)
    weight = torch.exp(maths.log_softmax((prompts @ prompts.T - 1) / temperature, others))
    gaps = pairs.chosen.h.flatten().unsqueeze(-1) - pairs.rejected.h.flatten()
    values = torch.where(others, -F.logsigmoid(beta * weight * gaps), 0.0)
    return (values.sum(-1) / counted.sum().clamp(min=1)).reshape(pairs.shape)


def _target_margins(
    gaps: Tensor, counted: Tensor, earlier: list[float], gamma: float, tau: float, steps: int
) -> Tensor:
    """Margin of each pair that counts, [pairs]; 0 for the others. With the earlier gaps their mean is gamma."""
    before = gaps.new_tensor(list(earlier))
    known = torch.cat([before, gaps.flatten()])
    present = torch.cat([torch.ones_like(before, dtype=torch.bool), counted.flatten()])
    # In the gaps' own precision: a number times an integer tensor would be float32.
    count, rate = present.sum().to(gaps.dtype), min(0.5 / tau, 1.0)
    log_share = maths.log_softmax(torch.zeros_like(known), present)
    for _ in range(steps - 1):
        share = torch.exp(log_share)
        # 1e-10 as in the authors' code: it bounds the logarithm of a share that vanishes.
        slope = tau * (1 + torch.log(count * (share + 1e-10)))
        slope = slope + gamma * torch.sigmoid(gamma * count * share - known)
        log_share = maths.log_softmax(log_share - rate * slope, present)
    margins = gamma * count * torch.exp(log_share)
    return torch.where(counted, margins[len(before) :].reshape(gaps.shape), 0.0)
