"""Single completions with a thumb up or down, or with a score."""

from mpmath import mpf

from tests.oracle.numbers import log_sigma, oracle, sigma


def signed(vote, value):
    """The value for a thumb up, its negative for a thumb down."""
    return value if vote.desirable else -value


def weight(vote, desirable_weight, undesirable_weight):
    """λ of the vote's side."""
    return desirable_weight if vote.desirable else undesirable_weight


@oracle("vote")
def kto(vote, *, beta, desirable_weight, undesirable_weight, kl_baseline):
    """KTO, 2402.01306 Eqs. 7-8; kl_baseline is z0, a number because the paper detaches it.

    Read in the HALOs trainer as copied by relative-preference-optimization.
    """
    value = sigma(-signed(vote, beta * (vote.side.h - kl_baseline)))
    return weight(vote, desirable_weight, undesirable_weight) * value


@oracle("vote")
def kto_zero(vote, *, beta, desirable_weight, undesirable_weight):
    """KTO with z0 = 0, APO-zero's unpaired reading. Taken from the catalogue."""
    value = sigma(-signed(vote, beta * vote.side.h))
    return weight(vote, desirable_weight, undesirable_weight) * value


@oracle("vote")
def kto_logsigmoid(vote, *, beta, desirable_weight, undesirable_weight, kl_baseline):
    """KTO's ablation with log σ in place of σ. Taken from the catalogue."""
    value = -log_sigma(signed(vote, beta * (vote.side.h - kl_baseline)))
    return weight(vote, desirable_weight, undesirable_weight) * value


@oracle("vote")
def bco(vote, *, beta, delta):
    """BCO, 2404.04656, without the density-ratio weights; delta is the reward shift, detached.

    Read in TRL's experimental BCO trainer, which the author wrote.
    """
    return -log_sigma(signed(vote, beta * vote.side.h - delta))


@oracle("vote")
def npo(vote, *, beta):
    """NPO, 2404.05868; a thumb up adds nothing. Read in OPTML-Group/Unlearn-Simple TOFU/dataloader.py."""
    return mpf(0) if vote.desirable else -2 / beta * log_sigma(-beta * vote.side.h)


@oracle("vote")
def simnpo(vote, *, beta, gamma):
    """SimNPO, 2410.07163; a thumb up adds nothing. Read in OPTML-Group/Unlearn-Simple TOFU/dataloader.py.

    gamma stands outside beta, as in the paper; the code has it inside. They agree at their default, 0.
    """
    return mpf(0) if vote.desirable else -2 / beta * log_sigma(-beta * vote.side.policy_mean - gamma)


@oracle("vote")
def dro(vote, *, tau):
    """DRO-V, 2405.19107; baseline is V(x). Read in a public write-up of the paper."""
    return (vote.score - vote.baseline - tau * vote.side.h) ** 2 / 2


@oracle("vote")
def a2po(vote, *, beta):
    """A*-PO, 2505.20686; baseline is V*(x). Read in TRL's experimental trainer."""
    return (beta * vote.side.h - (vote.score - vote.baseline)) ** 2
