"""Pair losses that depend on the whole batch: sorted, filtered, or with a margin or strength set by the batch.

The value of a pair depends on the others, so it changes with the micro-batch, with gradient accumulation and, where
no state is shared, with the number of ranks. A pair with an empty side is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss.feedback import Pairs, required
from prefloss.losses._authoring import (
    NonNegative,
    Positive,
    Share,
    maths,
    register,
    resolve,
    rewards,
    running,
)
from prefloss.losses.pairwise import dpo


@register(separable=False, monotone=True)
def aot(pairs: Pairs, *, beta: Positive = 0.01) -> Tensor:
    r"""Logistic loss between the sorted margins of policy and reference (AOT, paired).

    .. math::
        \ell_i = -\log \sigma\left(\beta \left(\delta^\pi_{(i)} - \delta^\mathrm{ref}_{(i)}\right)\right),
        \quad \delta^\pi = \log \frac{\pi(y_w)}{\pi(y_l)}, \; \delta^\mathrm{ref} =
        \log \frac{\pi_\mathrm{ref}(y_w)}{\pi_\mathrm{ref}(y_l)}, \; (i) \text{ the } i\text{-th smallest of the batch}

    Args:
        pairs: Reads the log-probs of both sides under policy and reference, [pairs], nats.

    Returns:
        Loss of each pair against the reference margin at its own place in the sorted batch, [pairs], nats; not reduced.

    Example:
        >>> chosen = LogRatios(policy=[-20.0, -10.0], reference=[-21.5, -12.0])
        >>> rejected = LogRatios(policy=[-24.0, -11.0], reference=[-23.0, -13.0])
        >>> aot(Pairs(chosen, rejected), beta=0.1)  # policy margins 4 and 1, reference margins 1.5 and 1
        tensor([0.5759, 0.6931])

    Note:
        The loss is the mean over the batch; the reference margin at a pair's place usually belongs to another pair. A
        batch of one is `dpo`. TRL, ms-swift and Axolotl agree and sort on each device alone; so does this. TRL adds
        label smoothing. When to use: to improve the distribution of margins rather than each margin.

    Reference: Melnyk et al. 2024, arXiv:2406.05882.
    """
    margin = pairs.chosen.policy - pairs.rejected.policy
    reference = required(pairs.chosen, "reference") - required(pairs.rejected, "reference")
    return -F.logsigmoid(beta * (margin - _at_the_same_place(reference, margin, pairs.valid)))


@register(aliases={"aot_pair": "TRL up to 0.27", "oxrl:aot": "oxRL"}, separable=False, monotone=True)
def aot_unpaired(pairs: Pairs, *, beta: Positive = 0.01) -> Tensor:
    r"""Logistic loss between the sorted log-ratios of chosen and of rejected completions (AOT, unpaired).

    .. math::
        \ell_i = -\log \sigma\left(\beta \left(h_{w(i)} - h_{l(i)}\right)\right),
        \quad (i) \text{ the } i\text{-th smallest of its side}

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats; the pairing does not matter.

    Returns:
        Loss of each chosen completion against the rejected one at its place in the sorted batch, [pairs], nats; not
        reduced.

    Example:
        >>> aot_unpaired(Pairs.of(chosen=[1.5, 0.0], rejected=[-1.0, 1.0]), beta=0.1)
        tensor([0.6685, 0.6444])

    Note:
        The loss is the mean over the batch; the rejected completion at a chosen one's place usually belongs to another
        pair. A batch of one is `dpo`. TRL called it `aot_pair` first; oxRL's `aot` is this one. For unequal numbers of
        good and bad completions the paper interpolates quantiles; this loss takes equal numbers. When to use: good and
        bad completions that answer different prompts.

    Reference: Melnyk et al. 2024, arXiv:2406.05882.
    """
    chosen = pairs.chosen.h
    return -F.logsigmoid(beta * (chosen - _at_the_same_place(pairs.rejected.h, chosen, pairs.valid)))


@register(separable=False, monotone=True, helps={"noisy": "discounts the pairs of a batch that fit worst"})
def dr_dpo(pairs: Pairs, *, beta: Positive = 0.1, beta_prime: Positive = 1.0) -> Tensor:
    r"""DPO with the worst pairs of the batch discounted (Dr. DPO, distributionally robustified).

    .. math::
        \ell = -\beta' \log \frac{1}{n} \sum_{i=1}^{n} e^{-\ell_i / \beta'},
        \quad \ell_i = -\log \sigma(\beta (h_w - h_l)_i)

    Args:
        beta_prime: Trust in the labels: pairs with a high loss count less when it is small; infinity is DPO.

    Returns:
        Loss of the batch, the same number for each pair, [pairs], nats; not reduced.

    Example:
        >>> dr_dpo(Pairs.of(chosen=[1.5, 0.0], rejected=[-1.0, 0.0]), beta=0.1)
        tensor([0.6328, 0.6328])

    Note:
        One number per batch, so weights of pairs only scale it. The official code takes the batch of each rank alone,
        and so does this: the mean over accumulated batches differs from the value of one large batch. The gradient
        flows through the weighting. Not `dro`. When to use: partly flipped labels.

    Reference: Wu et al. 2024, arXiv:2407.07880.
    """
    counted = pairs.valid.flatten()
    scaled = -dpo(pairs, beta=beta).flatten() / beta_prime
    total, some = maths.log_sum_exp(scaled, counted)
    log_mean = total - torch.log(counted.sum().clamp(min=1).to(scaled.dtype))
    return torch.where(some, -beta_prime * log_mean, 0.0).expand(pairs.shape)


@register(separable=False, monotone=True, holds_chosen=True)
def kto_pair(pairs: Pairs, *, beta: Positive = 0.1) -> Tensor:
    r"""Each side of a pair against the batch's mean log-ratio of the other (KTO for pairs, first version).

    .. math::
        \ell = 1 - \sigma(\beta (h_w - K_l)) + 1 - \sigma(\beta (K_w - h_l)),
        \quad K_\bullet = \max(0, \operatorname{mean} h_\bullet)

    Returns:
        Loss of each pair, [pairs], in [0, 2]; not reduced.

    Example:
        >>> kto_pair(Pairs.of(chosen=[1.5], rejected=[-1.0]), beta=0.1)  # K_w = 1.5, K_l = 0
        tensor([0.9004])

    Note:
        Withdrawn by its authors: use `kto`, or `apo_zero` on pairs. PaddleNLP, XTuner, turbo-alignment and old TRL have
        it; they let the gradient into the means K, here the means have no gradient, as in the paper. They average over
        the two sides, which gives half of this sum. When to use: to reproduce old runs.

    Reference: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    counted = pairs.valid
    chosen, rejected = pairs.chosen.h, pairs.rejected.h
    k_chosen, k_rejected = (maths.batch_mean(h.detach(), counted).clamp(min=0) for h in (chosen, rejected))
    # 1 - sigmoid(x) loses every digit for large x; sigmoid(-x) does not.
    return torch.sigmoid(-beta * (chosen - k_rejected)) + torch.sigmoid(-beta * (k_chosen - rejected))


@register(
    separable=False,
    stateful=True,
    helps={"noisy": "leaves out pairs far from the usual margin and adapts beta to the batch"},
)
def beta_dpo(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    keep: Share = 0.8,
    moments: running.Spread = "running",
    draws: running.Seed = 0,
) -> Tensor:
    r"""DPO on pairs near the usual margin, at a strength set by the batch's margin (β-DPO).

    .. math::
        \ell_i = -\frac{n}{|S|} 1[i \in S] \log \sigma(\beta_b \Delta_i), \quad
        \beta_b = \max\left(10^{-3}, \beta \left(1 + \alpha (\operatorname{mean}_S \Delta - M)\right)\right),
        \quad \Delta = h_w - h_l

    Args:
        beta: Strength of the pull towards the reference at the usual margin.
        alpha: How much the strength follows the margin, in 1/nats; 0 keeps it fixed.
        keep: Share of the batch in S, drawn without replacement with weight exp(-((Δ - M) / std)^2 / 2).
        moments: M and std of the margin: `"running"`, moving ones with decay 0.9, or two numbers.
        draws: Seed of the draws.

    Returns:
        Loss of each pair, [pairs], nats; 0 outside S; not reduced.

    Example:
        >>> pairs = Pairs.of(chosen=[1.5, 0.5], rejected=[-1.0, 0.0])
        >>> beta_dpo(pairs, keep=1.0, moments=(0.5, 1.0))  # mean margin 1.5, so beta_b = 0.16
        tensor([0.5130, 0.6539])

    Note:
        This is the form of the authors' code: Δ without beta in the schedule (the paper's gap has it, so its alpha
        differs), moments of the global batch updated before use, the unbiased std, no gradient into beta_b or the
        filter. Their code also updates the moments in evaluation and once per micro-batch. While the std is 0 (first
        batches of one pair) all pairs are equally likely to be kept; at least one is. The filter and its mean are those
        of the rank. oxRL's `beta_dpo` sets the strength per pair, with gradient and no filter. When to use: noisy or
        uneven pairs, and batches of 16 or more.

    Reference: Wu et al. 2024, arXiv:2407.08639.
    """
    counted, margin = pairs.valid, pairs.margin()
    location, scale = resolve("moments", moments, margin, counted)
    fixed_margin = margin.detach()
    kept = _drawn(
        -0.5 * maths.standardised(fixed_margin, location, scale) ** 2,
        counted,
        keep,
        running.generator(draws),
    )
    strength = (beta * (1 + alpha * (maths.batch_mean(fixed_margin, kept) - location))).clamp(min=1e-3)
    values = -F.logsigmoid(strength * margin) * counted.sum() / kept.sum().clamp(min=1)
    return torch.where(kept, values, 0.0)


@register(separable=False, stateful=True, needs=("tokens",), reward=rewards.MEAN_LOG_PROB)
def alpha_dpo(
    pairs: Pairs,
    *,
    beta: Positive = 2.5,
    gamma: NonNegative = 1.5,
    alpha: NonNegative = 0.2,
    moments: running.Spread = "running",
) -> Tensor:
    r"""SimPO with a margin that grows where policy and reference already differ (α-DPO, AlphaDPO).

    .. math::
        \ell = -\log \sigma\left(\beta (\bar\pi_w - \bar\pi_l) - \operatorname{sg}\left[\gamma + \alpha \beta
        \frac{M - \mu}{s}\right]\right), \quad M = \bar h_w - \bar h_l, \; \bar x = \frac{x}{|y|},
        \; \pi \text{ the log-prob}

    Args:
        pairs: Reads the log-probs of both sides under policy and reference, [pairs], nats, and the token counts.
        beta: Slope, in tokens per nat.
        gamma: Margin, in nats: the paper's ratio gamma/beta times beta.
        alpha: How much the margin follows the standardised M.
        moments: Mean μ and std s of M: `"running"`, moving ones with decay 0.9, or two numbers.

    Example:
        >>> chosen = LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10])
        >>> rejected = LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8])
        >>> alpha_dpo(Pairs(chosen, rejected), moments=(0.0, 1.0))  # 2.5 * (3 - 2) - (1.5 + 0.5 * 0.275)
        tensor([0.3521])

    Note:
        This is the form of the authors' code: all log-probs per token, moments of the global batch that start at 0 and
        are updated before use, the unbiased std, no gradient into the bracket. Published (beta, gamma/beta, alpha):
        Llama-3 (2.5, 0.6, 0.2), the default here, or (10, 0.4, 0.2); Mistral (2.5, 0.15, 0.05); Gemma-2 (10, 0.4,
        0.05). While s is 0 (first batches of one pair) the margin is gamma. Not `alphapo`, nor the alpha-divergence.
        When to use: as `simpo`, with a reference.

    Reference: Wu et al. 2024, arXiv:2410.10148.
    """
    counted = pairs.valid
    gap = pairs.margin(per_token=True).detach()
    location, scale = resolve("moments", moments, gap, counted)
    margin = gamma + alpha * beta * maths.standardised(gap, location, scale)
    return -F.logsigmoid(beta * (pairs.chosen.policy_mean - pairs.rejected.policy_mean) - margin)


def _at_the_same_place(values: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    """For each entry of `among` that counts, the value at its place when both are sorted; 0 elsewhere."""
    # NaN sorts last: entries that do not count go to the end, and a NaN that counts is not lost.
    ordered = values.masked_fill(~keep, torch.nan).flatten().sort(stable=True).values
    place = among.masked_fill(~keep, torch.nan).flatten().argsort(dim=0, stable=True).argsort()
    return torch.where(keep, ordered[place].reshape(keep.shape), 0.0)


def _drawn(log_weight: Tensor, counted: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """True at a share of the pairs that count, rounded down but not to none, drawn without replacement."""
    uniform = torch.rand(counted.shape, generator=generator).to(log_weight.device)
    # The largest of log-weight + Gumbel noise are a weighted draw without replacement, also with weights of 0.
    noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(uniform.dtype).tiny)))
    # A pair whose weight underflows to 0 still comes before a pair that does not count.
    key = (log_weight + noise).clamp(min=torch.finfo(log_weight.dtype).min)
    order = key.masked_fill(~counted, -torch.inf).flatten().argsort(descending=True, stable=True)
    # The tolerance: 0.29 * 100 is 28.999999999999996.
    size = torch.floor(counted.sum() * share + 1e-6).clamp(min=1)
    return counted & (order.argsort().reshape(counted.shape) < size)
