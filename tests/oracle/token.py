"""Losses that look inside the completions: they read the per-token lists."""

from mpmath import exp, fsum, mpf

from tests.oracle.numbers import clip, log_sigma, mean, oracle


def log_ratios(side):
    """Log-ratio of each token."""
    return [p - r for p, r in zip(side.per_token_policy, side.per_token_reference, strict=True)]


def token_gap(pair):
    """Gap of the summed token log-ratios."""
    return fsum(log_ratios(pair.chosen)) - fsum(log_ratios(pair.rejected))


@oracle("pair")
def ld_dpo(pair, *, beta, alpha):
    """LD-DPO, 2409.06411: tokens past the shorter length weigh alpha, for policy and reference alike.

    Read in TRL's dpo_trainer.py (ld_alpha) and its page on the paper.
    """
    shared = min(len(pair.chosen.per_token_policy), len(pair.rejected.per_token_policy))
    chosen, rejected = (
        fsum(h if t < shared else alpha * h for t, h in enumerate(log_ratios(side)))
        for side in (pair.chosen, pair.rejected)
    )
    return -log_sigma(beta * (chosen - rejected))


@oracle("pair")
def sampo(pair, *, beta, chosen_tokens, rejected_tokens):
    """SamPO, 2406.10957: only the drawn tokens count, as many on both sides. Places start at 0.

    Read in LuJunru/SamPO dpo_trainer.py: the longer side is drawn from without replacement, the shorter is whole.
    """
    sums = []
    for side, places in ((pair.chosen, chosen_tokens), (pair.rejected, rejected_tokens)):
        ratios = log_ratios(side)
        sums.append(fsum(ratios[int(place)] for place in places))
    return -log_sigma(beta * (sums[0] - sums[1]))


def on_policy_weight(pair, *, beta):
    """WPO's weight: how likely the policy is to write both completions, at most 1."""
    aligned = [
        mean([p - q for p, q in zip(side.per_token_policy, side.per_token_log_sum_sq, strict=True)])
        for side in (pair.chosen, pair.rejected)
    ]
    return min(mpf(1), exp(aligned[0] + aligned[1]))


@oracle("pair", freezes=on_policy_weight)
def wpo(pair, *, beta, frozen):
    """WPO, 2406.11827 Eq. 2 with sampled alignment. Read in wzhouad/WPO scripts/run_wpo.py."""
    return -frozen * log_sigma(beta * token_gap(pair))


@oracle("pair")
def tdpo1(pair, *, beta):
    """TDPO1, 2404.11999. Read in Vance0124/Token-level-Direct-Preference-Optimization trainers.py."""
    divergence = fsum(pair.rejected.per_token_kl) - fsum(pair.chosen.per_token_kl)
    return -log_sigma(beta * (token_gap(pair) - divergence))


def chosen_divergence(pair, *, beta, alpha):
    """Sequential KL of the chosen completion."""
    return fsum(pair.chosen.per_token_kl)


@oracle("pair", freezes=chosen_divergence)
def tdpo2(pair, *, beta, alpha, frozen):
    """TDPO2, 2404.11999: the chosen side's divergence is detached. Read in the same file as TDPO1."""
    return -log_sigma(beta * (token_gap(pair) - alpha * (fsum(pair.rejected.per_token_kl) - frozen)))


@oracle("pair")
def humanline_dpo(pair, *, beta, log_epsilon_p, log_epsilon_r):
    """Humanline DPO, 2509.24207: each token's log-ratio is clipped. Read in ContextualAI/HALOs train/trainers.py."""
    chosen, rejected = (
        fsum(clip(h, log_epsilon_p, log_epsilon_r) for h in log_ratios(side))
        for side in (pair.chosen, pair.rejected)
    )
    return -log_sigma(beta * (chosen - rejected))
