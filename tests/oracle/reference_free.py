"""Pairs under the policy alone, and the plain NLL."""

from mpmath import exp, expm1, fsum

from tests.oracle.numbers import log1mexp, log_sigma, oracle, relu


def policy_gap(pair):
    """Gap of the summed policy log-probs."""
    return pair.chosen.policy - pair.rejected.policy


def mean_gap(pair):
    """Gap of the policy log-probs per token."""
    return pair.chosen.policy_mean - pair.rejected.policy_mean


def logit_of_mean(side):
    """Log-odds of the geometric mean of the token probabilities."""
    return side.policy_mean - log1mexp(side.policy_mean)


@oracle("pair")
def slic_hf(pair, *, delta, nll_weight):
    """SLiC-HF, 2305.10425: hinge on the summed log-probs, regularised on the gold or else the chosen one.

    Read in the HALOs trainer as copied by relative-preference-optimization.
    """
    target = pair.gold or pair.chosen
    return relu(delta - policy_gap(pair)) - nll_weight * target.policy


@oracle("pair")
def simpo(pair, *, beta, gamma):
    """SimPO, 2405.14734 Eq. 6. Read in copies of princeton-nlp/SimPO scripts/simpo_trainer.py."""
    return -log_sigma(beta * mean_gap(pair) - gamma)


@oracle("pair")
def cpo(pair, *, beta, nll_weight):
    """CPO, 2401.08417 Eq. 3; the NLL per token. Read in the README of fe1ixxu/CPO_SIMPO, by CPO's author."""
    return -log_sigma(beta * policy_gap(pair)) + nll_weight * pair.chosen.nll


@oracle("pair")
def cpo_simpo(pair, *, beta, gamma, nll_weight):
    """CPO-SimPO. Read in the README of fe1ixxu/CPO_SIMPO."""
    return -log_sigma(beta * mean_gap(pair) - gamma) + nll_weight * pair.chosen.nll


@oracle("pair")
def orpo(pair, *, odds_weight):
    """ORPO, 2403.07691 Eqs. 4-7. Read in xfactlab/orpo src/orpo_trainer.py; here the NLL is over the response."""
    odds = logit_of_mean(pair.chosen) - logit_of_mean(pair.rejected)
    return pair.chosen.nll - odds_weight * log_sigma(odds)


@oracle("pair")
def alphapo(pair, *, alpha, beta, gamma):
    """AlphaPO, 2501.03884: reward (1 - p^-alpha)/alpha of the mean token probability p. Taken from the catalogue."""
    chosen, rejected = (-expm1(-alpha * side.policy_mean) / alpha for side in (pair.chosen, pair.rejected))
    return -log_sigma(beta * (chosen - rejected) - gamma)


@oracle("pair")
def simper(pair):
    """SimPER, 2502.00883: difference of the inverse perplexities. Read in tengxiao1/SimPER scripts."""
    return exp(pair.rejected.policy_mean) - exp(pair.chosen.policy_mean)


@oracle("pair")
def tpo(pair, *, beta, nll_weight):
    """TPO, 2405.16681; the NLL on the gold completion. Read in TRL's page on it."""
    return -log_sigma(beta * policy_gap(pair)) + nll_weight * pair.gold.nll


@oracle("pair")
def tpo_l(pair, *, beta, gamma, nll_weight):
    """TPO-L, 2405.16681. Read in TRL's page on it."""
    return -log_sigma(beta * mean_gap(pair) - gamma) + nll_weight * pair.gold.nll


@oracle("pairs")
def nll(batch, *, average):
    """NLL of the chosen completions: per sequence, summed, or per token of the batch."""
    sums = [-pair.chosen.policy for pair in batch]
    if average == "sum":
        return sums
    if average == "sequence":
        return [pair.chosen.nll for pair in batch]
    tokens = fsum(pair.chosen.tokens for pair in batch)
    return [value * len(batch) / tokens for value in sums]
