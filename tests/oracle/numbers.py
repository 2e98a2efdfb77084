"""Plain numbers for the oracle: a completion, what people said of completions, and a handful of functions.

All fields become mpmath numbers on construction. A Python float keeps its exact binary value (0.1 is the double next
to one tenth), because that is the number the code under test was given; pass mpf("0.1") for the decimal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from numbers import Real
from typing import Any

import mpmath
from mpmath import mp, mpf

DIGITS = 50


def number(value: Any) -> Any:
    """Exact mpf of a plain number; lists entry by entry; anything else unchanged."""
    if isinstance(value, (list, tuple)):
        return [number(entry) for entry in value]
    if isinstance(value, Real) and not isinstance(value, (bool, mpf)):
        return mpmath.mpmathify(int(value) if isinstance(value, int) else float(value))
    return value


class Numbers:
    """Base of the records below: each numeric field becomes exact."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, number(getattr(self, field.name)))


@dataclasses.dataclass(frozen=True)
class Side(Numbers):
    """One completion under the policy and the reference: sums of log-probs in nats, and the token count.

    The lists run over the response tokens that the mask counts. A token-level loss reads the lists alone and sums
    them itself, every other loss the sums alone; what a loss does not read may stay away.
    """

    policy: Any = None
    reference: Any = None
    tokens: Any = None
    per_token_policy: Any = None
    per_token_reference: Any = None
    # log of the sum over the vocabulary of the policy's squared probabilities
    per_token_log_sum_sq: Any = None
    # KL(reference ‖ policy) and KL(policy ‖ reference) over the vocabulary
    per_token_kl: Any = None
    per_token_kl_policy: Any = None
    # importance weights of TIS-DPO
    per_token_weight: Any = None
    # mean over the tokens of the reference's entropy over log(vocabulary size), Mallows-DPO and RainbowPO
    reference_entropy: Any = None

    @property
    def h(self):
        """Log-ratio of the policy to the reference."""
        return self.policy - self.reference

    @property
    def h_mean(self):
        """Log-ratio per token."""
        return self.h / self.tokens

    @property
    def policy_mean(self):
        """Policy log-prob per token."""
        return self.policy / self.tokens

    @property
    def reference_mean(self):
        """Reference log-prob per token."""
        return self.reference / self.tokens

    @property
    def nll(self):
        """Negative log-likelihood per response token."""
        return -self.policy_mean


@dataclasses.dataclass(frozen=True)
class Pair(Numbers):
    """A chosen and a rejected completion of one prompt, perhaps with scores and a third completion."""

    chosen: Side
    rejected: Side
    score_chosen: Any = None
    score_rejected: Any = None
    gold: Side | None = None
    # of the prompt, Relative Preference Optimization
    embedding: Any = None

    @property
    def delta(self):
        """Gap of the log-ratios, chosen minus rejected."""
        return self.chosen.h - self.rejected.h

    @property
    def gap(self):
        """Gap of the scores, chosen minus rejected."""
        return self.score_chosen - self.score_rejected


@dataclasses.dataclass(frozen=True)
class Vote(Numbers):
    """One completion with a thumb up or down, or with a score and a baseline."""

    side: Side
    desirable: bool = True
    score: Any = None
    baseline: Any = None


@dataclasses.dataclass(frozen=True)
class Group(Numbers):
    """Several completions of one prompt with their scores; higher is better."""

    sides: list
    scores: list

    @property
    def best_first(self):
        """The sides by falling score; Python's sort keeps the order of ties."""
        order = sorted(range(len(self.sides)), key=lambda i: -self.scores[i])
        return [self.sides[i] for i in order]


def oracle(reads: str, freezes: Callable | None = None) -> Callable:
    """Make a plain formula an oracle: exact hyperparameters, at least 50 digits, and what it reads on record.

    `reads` is "pair", "pairs", "vote", "votes" or "group"; the plural takes a list and gives a list. `freezes`
    computes, from the same arguments, what the paper detaches. The oracle takes that as `frozen`, and computes it
    where the caller does not; `gradient` holds it still.
    """

    def mark(function):
        @functools.wraps(function)
        def exact(data, **hyper):
            with mp.workdps(max(DIGITS, mp.dps)):
                hyper = {name: number(value) for name, value in hyper.items()}
                if freezes and hyper.get("frozen") is None:
                    given = {name: value for name, value in hyper.items() if name != "frozen"}
                    hyper["frozen"] = number(freezes(data, **given))
                return function(data, **hyper)

        exact.reads = reads
        exact.freezes = freezes
        return exact

    return mark


def sigma(x):
    """Logistic function; relative accuracy at both ends."""
    return 1 / (1 + mpmath.exp(-x))


def log_sigma(x):
    """Log of the logistic function."""
    return -mpmath.log1p(mpmath.exp(-x))


def softplus(x):
    """log(1 + e^x)."""
    return mpmath.log1p(mpmath.exp(x))


def relu(x):
    """Larger of x and 0."""
    return max(x, mpf(0))


def clip(x, low, high):
    """The value of [low, high] nearest to x."""
    return min(max(x, low), high)


def mean(values):
    """Arithmetic mean."""
    return mpmath.fsum(values) / len(values)


def log_softmax(values):
    """Log of e^x_i over its sum, entry by entry; the own term is taken out of the sum, so none cancels."""
    return [
        -mpmath.log1p(mpmath.fsum(mpmath.exp(other - x) for j, other in enumerate(values) if j != i))
        for i, x in enumerate(values)
    ]


def softmax(values):
    """e^x_i over its sum, entry by entry."""
    return [mpmath.exp(x) for x in log_softmax(values)]


def log1mexp(x):
    """log(1 - e^x), x < 0."""
    return mpmath.log(-mpmath.expm1(x))


def bernoulli_kl(a, b):
    """KL(Bern(σ(a)) ‖ Bern(σ(b))), both given by their logits so that σ near 1 keeps its distance from 1."""
    return sigma(a) * (log_sigma(a) - log_sigma(b)) + sigma(-a) * (log_sigma(-a) - log_sigma(-b))
