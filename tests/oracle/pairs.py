"""Pairs with a reference: contrasts of the two log-ratios, and losses that give each side its own target."""

from mpmath import exp, log

from tests.oracle.numbers import clip, log_sigma, oracle, relu, sigma


@oracle("pair")
def dpo(pair, *, beta, label_smoothing):
    """DPO, 2305.18290 Eq. 7, with the smoothing of the cDPO note. Read in TRL and in copies of the authors' code."""
    z = beta * pair.delta
    return -(1 - label_smoothing) * log_sigma(z) - label_smoothing * log_sigma(-z)


@oracle("pair")
def cdpo(pair, *, beta, epsilon):
    """Conservative DPO (Mitchell's note, Eq. 3): cross-entropy against a label flipped with probability epsilon.

    Read in copies of eric-mitchell/direct-preference-optimization.
    """
    z = beta * pair.delta
    return -(1 - epsilon) * log_sigma(z) - epsilon * log_sigma(-z)


@oracle("pair")
def robust_dpo(pair, *, beta, epsilon):
    """Provably robust DPO, 2403.00409: the unbiased estimate of the DPO loss under label flips. Read in TRL."""
    z = beta * pair.delta
    return (-(1 - epsilon) * log_sigma(z) + epsilon * log_sigma(-z)) / (1 - 2 * epsilon)


@oracle("pair")
def ipo(pair, *, tau, per_token):
    """IPO, 2310.12036 Eq. 17 (sums); per_token is the averaged form, the authors' word to TRL. Read in TRL."""
    margin = pair.chosen.h_mean - pair.rejected.h_mean if per_token else pair.delta
    return (margin - 1 / (2 * tau)) ** 2


@oracle("pair")
def hinge(pair, *, beta):
    """RSO's normalised hinge, 2309.06657. Read in TRL and its page on the paper."""
    return relu(1 - beta * pair.delta)


@oracle("pair")
def exo_pair(pair, *, beta, epsilon):
    """EXO on a pair, 2402.00856 Eq. 16: KL of the policy's preference to the smoothed label. Read in TRL."""
    z = beta * pair.delta
    win = sigma(z) * (log_sigma(z) - log(1 - epsilon))
    return win + sigma(-z) * (log_sigma(-z) - log(epsilon))


@oracle("pair")
def discopop(pair, *, beta, tau):
    """DiscoPOP (log-ratio modulated loss), 2406.08414 Eq. 5. Read in luchris429/DiscoPOP src/alignment/gpo.py."""
    z = beta * pair.delta
    modulation = sigma(z / tau)
    return sigma(-z / tau) * -log_sigma(z) + modulation * exp(-z)


@oracle("pair")
def gpo_exponential(pair, *, beta):
    """GPO with the exponential loss, 2402.05749 Table 1. Read in sunlin-ai/BPO, which borrows it."""
    return exp(-beta * pair.delta)


@oracle("pair")
def gpo_truncated_quadratic(pair, *, beta):
    """GPO with the truncated square, 2402.05749 Table 1. Read in sunlin-ai/BPO, which borrows it."""
    return relu(1 - beta * pair.delta) ** 2


@oracle("pair")
def gpo_savage(pair, *, beta):
    """GPO with the Savage loss, 2402.05749 Table 1. Read in sunlin-ai/BPO, which borrows it."""
    return 1 / (1 + exp(beta * pair.delta)) ** 2


@oracle("pair")
def ln_dpo(pair, *, beta):
    """Length-normalised DPO, Tülu 3, 2411.15124 Eq. 6. Read in TRL (sigmoid_norm)."""
    return -log_sigma(beta * (pair.chosen.h_mean - pair.rejected.h_mean))


@oracle("pair")
def r_dpo(pair, *, beta, alpha):
    """Length-regularised DPO, 2403.19159. Read in LuJunru/SamPO dpo_trainer.py (lenN); the sign follows from the
    objective E[r] - alpha |y| - beta KL."""
    return -log_sigma(beta * pair.delta + alpha * (pair.chosen.tokens - pair.rejected.tokens))


@oracle("pair")
def hdpo(pair, *, beta, alpha):
    """H-DPO, 2411.07595: entropy's weight alpha falls on the policy alone. Derived from its objective; read in oxRL."""
    policy = pair.chosen.policy - pair.rejected.policy
    reference = pair.chosen.reference - pair.rejected.reference
    return -log_sigma(alpha * beta * policy - beta * reference)


@oracle("pair")
def dpo_nll(pair, *, beta, nll_weight):
    """Iterative RPO, 2404.19733: DPO plus the chosen completion's NLL per token. Read in TRL's page on the paper."""
    return -log_sigma(beta * pair.delta) + nll_weight * pair.chosen.nll


@oracle("pair")
def apo_zero(pair, *, beta):
    """APO-zero, 2408.06266 Eq. 7. Read in TRL."""
    return sigma(-beta * pair.chosen.h) + sigma(beta * pair.rejected.h)


@oracle("pair")
def apo_down(pair, *, beta):
    """APO-down, 2408.06266 Eq. 8. Read in TRL."""
    return sigma(beta * pair.chosen.h) + sigma(-beta * pair.delta)


@oracle("pair")
def nca_pair(pair, *, beta):
    """NCA on a pair, 2402.05369. Read in TRL; the group form in thu-ml/Noise-Contrastive-Alignment."""
    chosen, rejected = beta * pair.chosen.h, beta * pair.rejected.h
    return -log_sigma(chosen) - log_sigma(-chosen) / 2 - log_sigma(-rejected) / 2


@oracle("pair")
def bco_pair(pair, *, beta, delta):
    """BCO on a pair, 2404.04656: binary cross-entropy of the rewards shifted by delta.

    Read in copies of the loss that its author gave to TRL (pull request 1524).
    """
    return -log_sigma(beta * pair.chosen.h - delta) - log_sigma(-(beta * pair.rejected.h - delta))


@oracle("pair")
def sppo_hard(pair, *, beta):
    """SPPO with win probabilities 1 and 0, 2405.00675 Eq. 4.7 (without the repository's one half). Read in TRL."""
    target = 1 / (2 * beta)
    return (pair.chosen.h - target) ** 2 + (pair.rejected.h + target) ** 2


@oracle("pair")
def dpop(pair, *, beta, penalty):
    """DPO-Positive, 2402.13228: the reward margin less what the chosen log-prob lost against the reference.

    Read in LuJunru/SamPO and sunlin-ai/BPO; the authors publish no loss code.
    """
    return -log_sigma(beta * (pair.delta - penalty * relu(-pair.chosen.h)))


@oracle("pair")
def bdpo(pair, *, beta, mixture):
    """Bounded DPO, 2506.12725: the rejected policy is mixed with the reference. Taken from the catalogue."""
    rejected = log(mixture * exp(pair.rejected.h) + (1 - mixture))
    return -log_sigma(beta * (pair.chosen.h - rejected))


@oracle("pair")
def cal_dpo(pair, *, beta, calibration_weight):
    """Cal-DPO, 2412.14516: no beta inside the logistic term. Read in tengxiao1/Cal-DPO scripts/dpo_trainer.py."""
    target = 1 / (2 * beta)
    calibration = (pair.chosen.h - target) ** 2 + (pair.rejected.h + target) ** 2
    return -log_sigma(pair.delta) + calibration_weight * calibration


@oracle("pair")
def dpo_shift(pair, *, beta, rejected_weight):
    """DPO-Shift, 2502.07599. Read in Meaquadddd/DPO-Shift scripts/dposhift_trainer.py."""
    return -log_sigma(beta * (pair.chosen.h - rejected_weight * pair.rejected.h))


@oracle("pair")
def f_dpo_forward_kl(pair, *, beta):
    """f-DPO with the forward KL, 2309.16240: f'(u) = -1/u. Read in alecwangcq/f-divergence-dpo trainers.py."""
    return -log_sigma(beta * (exp(-pair.rejected.h) - exp(-pair.chosen.h)))


@oracle("pair")
def f_dpo_js(pair, *, beta):
    """f-DPO with the Jensen-Shannon divergence, 2309.16240: f'(u) = log(2u/(1+u)), and 2u/(1+u) is 2σ(h).

    Read in alecwangcq/f-divergence-dpo trainers.py.
    """
    return -log_sigma(beta * (log_sigma(pair.chosen.h) - log_sigma(pair.rejected.h)))


@oracle("pair")
def f_dpo_alpha(pair, *, beta, alpha):
    """f-DPO with the alpha divergence of the paper, 2309.16240: f'(u) = (1 - u^-alpha)/alpha.

    Read in alecwangcq/f-divergence-dpo trainers.py.
    """
    chosen, rejected = ((1 - exp(-alpha * side.h)) / alpha for side in (pair.chosen, pair.rejected))
    return -log_sigma(beta * (chosen - rejected))


@oracle("pair")
def chipo(pair, *, beta, r_max):
    """χPO, 2407.13399 Alg. 1: link φ(u) = u + log u. Link read in oxRL, clip taken from the catalogue."""
    margin = beta * (exp(pair.chosen.h) + pair.chosen.h - exp(pair.rejected.h) - pair.rejected.h)
    return -log_sigma(clip(margin, -2 * r_max, 2 * r_max))


@oracle("pair")
def mpo(pair, *, beta, delta, preference_weight, quality_weight, nll_weight):
    """Mixed preference optimization, 2411.10442: DPO, BCO on the pair and the NLL, weighted. As TRL's page has it."""
    chosen, rejected = beta * pair.chosen.h - delta, beta * pair.rejected.h - delta
    preference = -log_sigma(beta * pair.delta)
    quality = -log_sigma(chosen) - log_sigma(-rejected)
    return preference_weight * preference + quality_weight * quality + nll_weight * pair.chosen.nll


@oracle("pair")
def xpo(pair, *, beta, alpha):
    """Exploratory PO, 2405.21046: gold is a sample of the reference; its summed policy log-prob is pushed down.

    Read in TRL's experimental trainer, which the authors helped to write.
    """
    return -log_sigma(beta * pair.delta) + alpha * pair.gold.policy


@oracle("pair")
def selm(pair, *, beta, alpha):
    """SELM, 2405.19332. Read in shenao-zhang/SELM scripts/selm_trainer.py."""
    return -log_sigma(beta * pair.delta) + alpha * beta * pair.gold.h
