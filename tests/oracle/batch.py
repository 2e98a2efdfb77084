"""Pairs of one batch that share something: a sort, a log-mean-exp, batch means or running state.

A running state enters as plain numbers, already updated with the batch: both its authors' codes update before use.
"""

from mpmath import exp, expm1, log1p, mpf, sqrt

from tests.oracle.numbers import log_sigma, mean, oracle, relu, sigma


def deltas(batch):
    """Gap of the log-ratios, pair by pair."""
    return [pair.delta for pair in batch]


def mean_margins(batch):
    """Gap of the log-ratios per token, pair by pair."""
    return [pair.chosen.h_mean - pair.rejected.h_mean for pair in batch]


def std(values):
    """Standard deviation with n - 1."""
    centre = mean(values)
    return sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def moved(values, *, ema, location, scale):
    """Mean and standard deviation of the state after a batch; both start at 0.

    Read in junkangwu/beta-DPO trainers.py (values are `deltas`) and junkangwu/alpha-DPO scripts/dpo_trainer.py
    (values are `mean_margins`).
    """
    ema, location, scale = mpf(ema), mpf(location), mpf(scale)
    return ema * location + (1 - ema) * mean(values), ema * scale + (1 - ema) * std(values)


@oracle("pairs")
def aot(batch, *, beta):
    """AOT on pairs, 2406.05882: quantiles of the policy's gaps against those of the reference's. As TRL has it."""
    policy = sorted(pair.chosen.policy - pair.rejected.policy for pair in batch)
    reference = sorted(pair.chosen.reference - pair.rejected.reference for pair in batch)
    return [-log_sigma(beta * (p - r)) for p, r in zip(policy, reference, strict=True)]


@oracle("pairs")
def aot_unpaired(batch, *, beta):
    """AOT unpaired, 2406.05882: quantiles of the chosen log-ratios against those of the rejected. As TRL has it."""
    chosen = sorted(pair.chosen.h for pair in batch)
    rejected = sorted(pair.rejected.h for pair in batch)
    return [-log_sigma(beta * (w - r)) for w, r in zip(chosen, rejected, strict=True)]


@oracle("pairs")
def dr_dpo(batch, *, beta, beta_prime):
    """Dr. DPO, 2407.07880; every pair carries the batch's one value. Read in junkangwu/Dr_DPO trainers.py."""
    # mean of exp(-loss / β') less 1, so that nothing is lost where all losses are near 0
    short = mean([expm1(log_sigma(beta * delta) / beta_prime) for delta in deltas(batch)])
    return [-beta_prime * log1p(short)] * len(batch)


def pair_baselines(batch, *, beta):
    """Batch means of the chosen and of the rejected log-ratios, not below 0."""
    return [relu(mean([pair.chosen.h for pair in batch])), relu(mean([pair.rejected.h for pair in batch]))]


@oracle("pairs", freezes=pair_baselines)
def kto_pair(batch, *, beta, frozen):
    """KTO on pairs, 2402.01306 v1: each half's baseline is the other half's mean.

    Formula read in uclaml/SPPO, LuJunru/SamPO and DiscoPOP, whose baselines carry a gradient; the paper's do not.
    """
    chosen_mean, rejected_mean = frozen
    return [
        sigma(-beta * (pair.chosen.h - rejected_mean)) + sigma(-beta * (chosen_mean - pair.rejected.h))
        for pair in batch
    ]


def batch_beta(batch, *, beta, alpha, location, kept):
    """β of the batch: pulled by how far the kept pairs' mean gap lies from the running mean."""
    gaps = [delta for delta, keep in zip(deltas(batch), kept, strict=True) if keep]
    return max(mpf("1e-3"), beta * (1 + alpha * (mean(gaps) - location)))


@oracle("pairs", freezes=batch_beta)
def beta_dpo(batch, *, beta, alpha, location, kept, frozen):
    """β-DPO, 2407.08639. Read in junkangwu/beta-DPO trainers.py.

    location: running mean of the gaps; kept: True for each pair that the filter drew. A kept pair weighs n over the
    number kept, so the mean over the batch is the mean over the kept pairs.
    """
    share = mpf(len(batch)) / sum(map(bool, kept))
    return [
        share * -log_sigma(frozen * pair.delta) if keep else mpf(0)
        for pair, keep in zip(batch, kept, strict=True)
    ]


def filter_weights(batch, *, location, scale):
    """Chance of each pair, up to a factor, in β-DPO's draw without replacement."""
    return [exp(-(((delta - mpf(location)) / mpf(scale)) ** 2) / 2) for delta in deltas(batch)]


def adaptive_margins(batch, *, beta, gamma, alpha, location, scale):
    """α-DPO's margin of each pair, in log-probs per token."""
    return [gamma / beta + alpha * (margin - location) / scale for margin in mean_margins(batch)]


@oracle("pairs", freezes=adaptive_margins)
def alpha_dpo(batch, *, beta, gamma, alpha, location, scale, frozen):
    """α-DPO, 2410.10148. Read in junkangwu/alpha-DPO scripts/dpo_trainer.py, with ln: true as in all its configs.

    location and scale: running mean and standard deviation of the per-token gaps; gamma in nats as SimPO's.
    """
    gaps = [pair.chosen.policy_mean - pair.rejected.policy_mean for pair in batch]
    return [-log_sigma(beta * (gap - margin)) for gap, margin in zip(gaps, frozen, strict=True)]
