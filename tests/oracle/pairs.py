"""Pairs with a reference: contrasts of the two log-ratios, and losses that give each side its own target."""

from mpmath import exp, log

from tests.oracle.numbers import clip, log_sigma, oracle, relu, sigma


@oracle("pair")
def dpo(pair, *, beta, label_smoothing):
    """DPO, 2305.18290 Eq. 7, with the smoothing of the cDPO note."""
    z = beta * pair.delta
    return -(1 - label_smoothing) * log_sigma(z) - label_smoothing * log_sigma(-z)


@oracle("pair")
def cdpo(pair, *, beta, epsilon):
    """Conservative DPO (Mitchell's note, Eq. 3): cross-entropy against a label flipped with probability epsilon."""
    z = beta * pair.delta
    return -(1 - epsilon) * log_sigma(z) - epsilon * log_sigma(-z)


@oracle("pair")
def robust_dpo(pair, *, beta, epsilon):
    """Provably robust DPO, 2403.00409: the unbiased estimate of the DPO loss under label flips."""
    z = beta * pair.delta
    return (-(1 - epsilon) * log_sigma(z) + epsilon * log_sigma(-z)) / (1 - 2 * epsilon)


@oracle("pair")
def ipo(pair, *, tau, per_token):
    """IPO, 2310.12036 Eq. 17 (sums); per_token is the averaged form of most trainers."""
    margin = pair.chosen.h_mean - pair.rejected.h_mean if per_token else pair.delta
    return (margin - 1 / (2 * tau)) ** 2


@oracle("pair")
def hinge(pair, *, beta):
    """RSO's normalised hinge, 2309.06657."""
    return relu(1 - beta * pair.delta)


@oracle("pair")
def exo_pair(pair, *, beta, epsilon):
    """EXO on a pair, 2402.00856 Eq. 16: KL of the policy's preference to the smoothed label."""
    z = beta * pair.delta
    win = sigma(z) * (log_sigma(z) - log(1 - epsilon))
    return win + sigma(-z) * (log_sigma(-z) - log(epsilon))


@oracle("pair")
def discopop(pair, *, beta, tau):
    """DiscoPOP (log-ratio modulated loss), 2406.08414 Eq. 5."""
    z = beta * pair.delta
    modulation = sigma(z / tau)
    return sigma(-z / tau) * -log_sigma(z) + modulation * exp(-z)


@oracle("pair")
def gpo_exponential(pair, *, beta):
    """GPO with the exponential loss, 2402.05749 Table 1."""
    return exp(-beta * pair.delta)


@oracle("pair")
def gpo_truncated_quadratic(pair, *, beta):
    """GPO with the truncated square, 2402.05749 Table 1."""
    return relu(1 - beta * pair.delta) ** 2


@oracle("pair")
def gpo_savage(pair, *, beta):
    """GPO with the Savage loss, 2402.05749 Table 1."""
    return 1 / (1 + exp(beta * pair.delta)) ** 2


@oracle("pair")
def ln_dpo(pair, *, beta):
    """Length-normalised DPO, Tülu 3, 2411.15124 Eq. 6."""
    return -log_sigma(beta * (pair.chosen.h_mean - pair.rejected.h_mean))


@oracle("pair")
def r_dpo(pair, *, beta, alpha):
    """Length-regularised DPO, 2403.19159."""
    return -log_sigma(beta * pair.delta + alpha * (pair.chosen.tokens - pair.rejected.tokens))


@oracle("pair")
def hdpo(pair, *, beta, alpha):
    """H-DPO, 2411.07595: entropy's weight alpha falls on the policy alone."""
    policy = pair.chosen.policy - pair.rejected.policy
    reference = pair.chosen.reference - pair.rejected.reference
    return -log_sigma(alpha * beta * policy - beta * reference)


@oracle("pair")
def dpo_nll(pair, *, beta, nll_weight):
    """Iterative RPO, 2404.19733: DPO plus the chosen completion's NLL per token."""
    return -log_sigma(beta * pair.delta) + nll_weight * pair.chosen.nll


@oracle("pair")
def apo_zero(pair, *, beta):
    """APO-zero, 2408.06266 Eq. 7."""
    return sigma(-beta * pair.chosen.h) + sigma(beta * pair.rejected.h)


@oracle("pair")
def apo_down(pair, *, beta):
    """APO-down, 2408.06266 Eq. 8."""
    return sigma(beta * pair.chosen.h) + sigma(-beta * pair.delta)


@oracle("pair")
def nca_pair(pair, *, beta):
    """NCA on a pair, 2402.05369."""
    chosen, rejected = beta * pair.chosen.h, beta * pair.rejected.h
    return -log_sigma(chosen) - log_sigma(-chosen) / 2 - log_sigma(-rejected) / 2


@oracle("pair")
def bco_pair(pair, *, beta, delta):
    """BCO on a pair, 2404.04656: binary cross-entropy of the rewards shifted by delta."""
    return -log_sigma(beta * pair.chosen.h - delta) - log_sigma(-(beta * pair.rejected.h - delta))


@oracle("pair")
def sppo_hard(pair, *, beta):
    """SPPO with win probabilities 1 and 0, 2405.00675 Eq. 4.7 (without the repository's one half)."""
    target = 1 / (2 * beta)
    return (pair.chosen.h - target) ** 2 + (pair.rejected.h + target) ** 2


@oracle("pair")
def dpop(pair, *, beta, penalty):
    """DPO-Positive, 2402.13228: the reward margin less what the chosen log-prob lost against the reference."""
    return -log_sigma(beta * (pair.delta - penalty * relu(-pair.chosen.h)))


@oracle("pair")
def bdpo(pair, *, beta, mixture):
    """Bounded DPO, 2506.12725: the rejected policy is mixed with the reference."""
    rejected = log(mixture * exp(pair.rejected.h) + (1 - mixture))
    return -log_sigma(beta * (pair.chosen.h - rejected))


@oracle("pair")
def cal_dpo(pair, *, beta, calibration_weight):
    """Cal-DPO, 2412.14516: no beta inside the logistic term."""
    target = 1 / (2 * beta)
    calibration = (pair.chosen.h - target) ** 2 + (pair.rejected.h + target) ** 2
    return -log_sigma(pair.delta) + calibration_weight * calibration


@oracle("pair")
def dpo_shift(pair, *, beta, rejected_weight):
    """DPO-Shift, 2502.07599."""
    return -log_sigma(beta * (pair.chosen.h - rejected_weight * pair.rejected.h))


@oracle("pair")
def f_dpo_forward_kl(pair, *, beta):
    """f-DPO with the forward KL, 2309.16240: f'(u) = -1/u."""
    return -log_sigma(beta * (exp(-pair.rejected.h) - exp(-pair.chosen.h)))


@oracle("pair")
def f_dpo_js(pair, *, beta):
    """f-DPO with the Jensen-Shannon divergence, 2309.16240: f'(u) = log(2u/(1+u)), and 2u/(1+u) is 2σ(h)."""
    return -log_sigma(beta * (log_sigma(pair.chosen.h) - log_sigma(pair.rejected.h)))


@oracle("pair")
def f_dpo_alpha(pair, *, beta, alpha):
    """f-DPO with the alpha divergence of the paper, 2309.16240: f'(u) = (1 - u^-alpha)/alpha."""
    chosen, rejected = ((1 - exp(-alpha * side.h)) / alpha for side in (pair.chosen, pair.rejected))
    return -log_sigma(beta * (chosen - rejected))


@oracle("pair")
def chipo(pair, *, beta, r_max):
    """χPO, 2407.13399 Alg. 1: link φ(u) = u + log u."""
    margin = beta * (exp(pair.chosen.h) + pair.chosen.h - exp(pair.rejected.h) - pair.rejected.h)
    return -log_sigma(clip(margin, -2 * r_max, 2 * r_max))
