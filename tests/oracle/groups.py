"""Several scored completions of one prompt."""

from mpmath import exp, fsum, log1p, mpf

from tests.oracle.numbers import log_sigma, log_softmax, oracle, relu, softmax, softplus


def scaled(sides, beta):
    """β h of each side."""
    return [beta * side.h for side in sides]


@oracle("group")
def dpo_pl(group, *, beta):
    """DPO under Plackett-Luce, 2305.18290 App. A.3: the best of what remains, K - 1 times. Taken from the catalogue."""
    values = scaled(group.best_first, beta)
    return -fsum(log_softmax(values[k:])[0] for k in range(len(values) - 1))


@oracle("group")
def s_dpo(group, *, beta):
    """S-DPO, 2406.09215: the best against all others. Read in chenyuxin1999/S-DPO trainer/softmax_dpo_trainer.py."""
    best, *others = scaled(group.best_first, beta)
    return log1p(fsum(exp(other - best) for other in others))


@oracle("group")
def infonca(group, *, beta, alpha):
    """InfoNCA, 2402.05369. Read in thu-ml/Noise-Contrastive-Alignment reward_trainer.py."""
    targets = softmax([score / alpha for score in group.scores])
    return -fsum(q * logp for q, logp in zip(targets, log_softmax(scaled(group.sides, beta)), strict=True))


@oracle("group")
def nca(group, *, beta, alpha):
    """NCA, 2402.05369. Read in thu-ml/Noise-Contrastive-Alignment reward_trainer.py."""
    targets = softmax([score / alpha for score in group.scores])
    values = scaled(group.sides, beta)
    up = fsum(q * log_sigma(x) for q, x in zip(targets, values, strict=True))
    return -up - fsum(log_sigma(-x) for x in values) / len(values)


@oracle("group")
def exo(group, *, beta, beta_r):
    """EXO, 2402.00856: reverse KL of the policy's distribution over the group to the scores'.

    Read in haozheji/exact-optimization src/align_stage/loss.py.
    """
    policy = log_softmax(scaled(group.sides, beta))
    target = log_softmax([score / beta_r for score in group.scores])
    return fsum(exp(p) * (p - q) for p, q in zip(policy, target, strict=True))


@oracle("group")
def rrhf(group, *, rank_weight, nll_weight):
    """RRHF, 2304.05302. Read in GanjinZero/RRHF train.py, whose NLL is a mean over the padded row; here per token."""
    means = [side.policy_mean for side in group.sides]
    order = range(len(means))
    rank = fsum(relu(means[i] - means[j]) for i in order for j in order if group.scores[i] < group.scores[j])
    return rank_weight * rank + nll_weight * group.best_first[0].nll


@oracle("group")
def pro(group, *, nll_weight):
    """PRO, 2306.17492. Read in AlibabaResearch/DAMO-ConvAI PRO/train/utils/process_manager.py.

    Mean log-probs times the reward gap to the k-th best; the k-th best itself times its largest gap. The summed NLL of
    the best weighs nll_weight (K - 1)^2.
    """
    order = sorted(range(len(group.sides)), key=lambda i: -group.scores[i])
    means = [group.sides[i].policy_mean for i in order]
    scores = [group.scores[i] for i in order]
    terms = []
    for k in range(len(order) - 1):
        gaps = [scores[k] - score for score in scores[k + 1 :]]
        values = [means[k] * max(gaps)] + [p * gap for p, gap in zip(means[k + 1 :], gaps, strict=True)]
        terms.append(-log_softmax(values)[0])
    return fsum(terms) - nll_weight * (len(order) - 1) ** 2 * group.best_first[0].policy


def lambda_weights(group, *, beta):
    """LambdaRank's weight of each pair, by the ranks of the current h (best 1) and the gains 2^score."""
    values = scaled(group.sides, beta)
    discount = [log1p(1 + sum(other > value for other in values)) for value in values]
    gain = [mpf(2) ** score for score in group.scores]
    order = range(len(values))
    return [[abs(gain[i] - gain[j]) * abs(1 / discount[i] - 1 / discount[j]) for j in order] for i in order]


@oracle("group", freezes=lambda_weights)
def lipo_lambda(group, *, beta, frozen):
    """LiPO-λ, 2402.01878; frozen are the pairs' weights.

    Verified in public write-ups of the paper (weight, gain, discount, logistic pair loss), not in the paper itself.
    """
    values = scaled(group.sides, beta)
    order = range(len(values))
    return fsum(
        frozen[i][j] * softplus(values[j] - values[i])
        for i in order
        for j in order
        if group.scores[i] > group.scores[j]
    )
