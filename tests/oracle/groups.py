"""Several scored completions of one prompt."""

from mpmath import exp, fsum, log1p

from tests.oracle.numbers import log_sigma, log_softmax, oracle, relu, softmax


def scaled(sides, beta):
    """β h of each side."""
    return [beta * side.h for side in sides]


@oracle("group")
def dpo_pl(group, *, beta):
    """DPO under Plackett-Luce, 2305.18290 App. A.3: the best of what remains, K - 1 times."""
    values = scaled(group.best_first, beta)
    return -fsum(log_softmax(values[k:])[0] for k in range(len(values) - 1))


@oracle("group")
def s_dpo(group, *, beta):
    """S-DPO, 2406.09215: the best against all others."""
    best, *others = scaled(group.best_first, beta)
    return log1p(fsum(exp(other - best) for other in others))


@oracle("group")
def infonca(group, *, beta, alpha):
    """InfoNCA, 2402.05369."""
    targets = softmax([score / alpha for score in group.scores])
    return -fsum(q * logp for q, logp in zip(targets, log_softmax(scaled(group.sides, beta)), strict=True))


@oracle("group")
def nca(group, *, beta, alpha):
    """NCA, 2402.05369."""
    targets = softmax([score / alpha for score in group.scores])
    values = scaled(group.sides, beta)
    up = fsum(q * log_sigma(x) for q, x in zip(targets, values, strict=True))
    return -up - fsum(log_sigma(-x) for x in values) / len(values)


@oracle("group")
def exo(group, *, beta, beta_r):
    """EXO, 2402.00856: reverse KL of the policy's distribution over the group to the scores'."""
    policy = log_softmax(scaled(group.sides, beta))
    target = log_softmax([score / beta_r for score in group.scores])
    return fsum(exp(p) * (p - q) for p, q in zip(policy, target, strict=True))


@oracle("group")
def rrhf(group, *, rank_weight, nll_weight):
    """RRHF, 2304.05302."""
    means = [side.policy_mean for side in group.sides]
    order = range(len(means))
    rank = fsum(relu(means[i] - means[j]) for i in order for j in order if group.scores[i] < group.scores[j])
    return rank_weight * rank + nll_weight * group.best_first[0].nll
