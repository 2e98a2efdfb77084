"""Losses of low standing in the catalogue: little used, or their formula rests on one source."""

from mpmath import atan, exp, fsum, log, mpf, pi, sqrt

from tests.oracle.batch import deltas, std
from tests.oracle.numbers import (
    log1mexp,
    log_sigma,
    mean,
    oracle,
    relu,
    sigma,
    softmax,
    softplus,
)
from tests.oracle.token import log_ratios


def heated(values):
    """z / 0.05, which is Δ at the β that the discovered losses were found with."""
    return [20 * z for z in values]


@oracle("pair")
def discopop_cell(pair, *, beta):
    """CELL of 2406.08414. This and its five siblings: read in luchris429/DiscoPOP src/alignment/gpo.py."""
    z = beta * pair.delta
    return exp(-z) / 2 + softplus(-z) / 2


@oracle("pair")
def discopop_padll(pair, *, beta):
    """PADLL of 2406.08414: a mismatched pair weighs half."""
    decay = mpf(9) / 10 * (mpf(1) / 2 if pair.delta < 0 else 1)
    return decay * softplus(-beta * pair.delta)


@oracle("pair")
def discopop_pfl(pair, *, beta):
    """PFL of 2406.08414: the policy alone says whether the pair is already right."""
    z = beta * pair.delta
    return softplus(-z) / 2 if pair.chosen.policy > pair.rejected.policy else 2 * relu(1 - z)


@oracle("pairs")
def discopop_dbaql(batch, *, beta):
    """DBAQL of 2406.08414: blended by the batch variance (n - 1)."""
    z = [beta * delta for delta in deltas(batch)]
    blend = std(heated(z)) ** 2
    heat = mpf(9) / 10
    return [sigma(blend) * softplus(-x / heat) + sigma(-blend) * exp(-x * heat) for x in z]


@oracle("pairs")
def discopop_aql(batch, *, beta):
    """AQL of 2406.08414: blended by the distance to a moving quantile."""
    z = [beta * delta for delta in deltas(batch)]
    u = heated(z)
    quantile = mpf(1) / 2 + (sigma(mean(u)) - mpf(1) / 2) / 100
    return [
        sigma(quantile - y) * softplus(-x) + sigma(y - quantile) * relu(1 - x)
        for x, y in zip(z, u, strict=True)
    ]


@oracle("pairs")
def discopop_aqfl(batch, *, beta):
    """AQFL of 2406.08414: the quantile follows the spread and the share of mismatches."""
    z = [beta * delta for delta in deltas(batch)]
    u = heated(z)
    quantile = std(u) * mean([sigma(-y) for y in u])
    quantile += (sigma(mean(u)) - quantile) / 20
    distance = [abs(y - quantile) / 10 for y in u]
    return [sigma(d) * softplus(-x) + sigma(-d) * relu(1 - x) for x, d in zip(z, distance, strict=True)]


@oracle("pair")
def dpo_sigmoid_prob(pair, *, beta):
    """Preference probability itself, HALOs' legacy ablation. Not verified here."""
    return -sigma(beta * pair.delta)


@oracle("pair")
def cauchy(pair, *, beta):
    """Cauchy link. Read in CapitalOne-Research/RainbowPO trl/trainer/dpo_trainer.py."""
    z = beta * pair.delta
    share = atan(z) / pi + mpf(1) / 2 if z > -1 else -atan(1 / z) / pi
    return -log(share)


@oracle("pair")
def bregman_dpo(pair, *, beta, member, lam, scale):
    """Bregman PO, 2505.19601 Table 2, R = e^-z, additive constants dropped.

    Read in the authors' later SafeBPO loss/h_function.py; its LSIF (R² - 2R) does not follow from its own generator
    (R - 1)², whose R² - 2/R stands here. `lam` serves ba and sba, `scale` sba.
    """
    z = beta * pair.delta
    ratio = exp(-z)
    if member == "lr":
        return softplus(-z)
    if member == "kliep":
        return ratio - z
    if member == "lsif":
        return ratio**2 - 2 / ratio
    basu = exp(-(lam + 1) * z) - (lam + 1) / lam * exp(lam * z)
    return {"ba": basu, "sba": basu / (scale * (lam + 1))}[member]


def bregman_generic(ratio, generator, slope):
    """The paper's loss of any generator h: h'(R) R - h(R) - h'(1/R)."""
    return slope(ratio) * ratio - generator(ratio) - slope(1 / ratio)


def focal_modulator(pair, *, beta, gamma, detach=True):
    """FocalPO's weight where it is held still."""
    return sigma(beta * pair.delta) ** gamma if detach else None


@oracle("pair", freezes=focal_modulator)
def focalpo(pair, *, beta, gamma, detach=True, frozen):
    """FocalPO, 2501.06645: well-ranked pairs weigh more.

    Formula read in a public write-up. Whether the modulator carries a gradient is open: no write-up detaches it, oxRL
    does. `detach` has the catalogue's answer as default because the contract knows beta and gamma alone.
    """
    z = beta * pair.delta
    return -(frozen if detach else sigma(z) ** gamma) * log_sigma(z)


@oracle("pair")
def c2dpo(pair, *, beta, constraint_weight):
    """C2-DPO, 2502.17507: penalty on the summed log-ratios. Formula and 2e-4 seen in notes on the paper."""
    return -log_sigma(beta * pair.delta) + constraint_weight * (pair.chosen.h + pair.rejected.h) ** 2


@oracle("pair")
def minor_dpo(pair, *, beta):
    """MinorDPO, 2408.09834: no push below the reference. Read in oxRL alone."""
    return -log_sigma(beta * (pair.chosen.h - relu(pair.rejected.h)))


@oracle("pair")
def balanced_bpo(pair, *, beta, alpha):
    """Balanced PO, 2506.03557. Read in sunlin-ai/BPO train_dpo.py (balance_logistic_alpha; they ship the hinge)."""
    return -log_sigma(beta * min(pair.chosen.h, -alpha * pair.rejected.h))


def target_margins(batch, *, beta, gamma, tau, steps, queue, reference):
    """γ-PO's margins: exponentiated gradient on the past gaps and the batch's, mean held at gamma."""
    gaps = list(queue) + gamma_gaps(batch, beta, reference)
    count = len(gaps)
    rate, weights = min(1 / (2 * tau), mpf(1)), [mpf(1) / count] * count
    for _ in range(int(steps)):
        margins = [gamma * count * p for p in weights]
        slopes = [
            tau * (1 + log(count * (p + mpf("1e-10")))) + gamma * sigma(margin - gap)
            for p, margin, gap in zip(weights, margins, gaps, strict=True)
        ]
        weights = [p * exp(-rate * slope) for p, slope in zip(weights, slopes, strict=True)]
        weights = [p / fsum(weights) for p in weights]
    return [margin - (gamma if reference else 0) for margin in margins[len(queue) :]]


def gamma_gaps(batch, beta, reference):
    """SimPO's gap of each pair, or DPO's per-token one."""
    if reference:
        return [beta * (pair.chosen.h_mean - pair.rejected.h_mean) for pair in batch]
    return [beta * (pair.chosen.policy_mean - pair.rejected.policy_mean) for pair in batch]


@oracle("pairs", freezes=target_margins)
def gamma_po(batch, *, beta, gamma, tau, steps, queue, reference, frozen):
    """γ-PO, 2506.03690. Read in sunjie279/gammaPO scripts/simpo_trainer.py and xpo_trainer.py, get_gamma_dq.

    queue: the past gaps drawn for this batch; reference: False for γ-SimPO, True for γ-DPO, whose margins have gamma
    taken off again.
    """
    gaps = gamma_gaps(batch, beta, reference)
    return [-log_sigma(gap - margin) for gap, margin in zip(gaps, frozen, strict=True)]


def dispersion_factor(pair, dispersion):
    """Mallows' φ, from the normalised reference entropy averaged over both completions."""
    return -dispersion * log((pair.chosen.reference_entropy + pair.rejected.reference_entropy) / 2)


@oracle("pair")
def mallows_dpo(pair, *, beta, dispersion):
    """Mallows-DPO, 2405.14953. Read in haoxian-chen/MallowsPO mallowsPO_trainer.py."""
    return -log_sigma(beta * dispersion_factor(pair, dispersion) * pair.delta)


@oracle("pair")
def rainbowpo(pair, *, beta, gamma, mixing, dispersion):
    """RainbowPO, 2410.04203. Read in CapitalOne-Research/RainbowPO trl/trainer/dpo_trainer.py."""
    policy = pair.chosen.policy_mean - pair.rejected.policy_mean
    reference = pair.chosen.reference_mean - pair.rejected.reference_mean
    margin = policy - mixing * reference - (1 - mixing) * gamma
    return -log_sigma(beta * dispersion_factor(pair, dispersion) * margin)


def cosine(x, y):
    """Cosine of the angle between two vectors."""
    return fsum(a * b for a, b in zip(x, y, strict=True)) / sqrt(
        fsum(a * a for a in x) * fsum(b * b for b in y)
    )


@oracle("pairs")
def rpo_relative(batch, *, beta, temperature):
    """Relative PO, 2402.10958: every chosen against every rejected, near prompts first.

    Read in yinyueqin/relative-preference-optimization trainers.py RPOTrainer: rows of weights sum to 1, mean over the
    row.
    """
    values = []
    for pair in batch:
        weights = softmax([(cosine(pair.embedding, other.embedding) - 1) / temperature for other in batch])
        gaps = [pair.chosen.h - other.rejected.h for other in batch]
        values.append(mean([-log_sigma(beta * w * gap) for w, gap in zip(weights, gaps, strict=True)]))
    return values


@oracle("pair")
def tis_dpo(pair, *, beta, alpha):
    """TIS-DPO, 2410.04350. Read in exlaw/TIS-DPO trainers.py; alpha 0 is its token_level: false.

    Token weights on the log-ratios and on KL(policy ‖ reference).
    """
    margin = mpf(0)
    for sign, side in ((1, pair.chosen), (-1, pair.rejected)):
        values = log_ratios(side)
        if alpha:
            values = [h - alpha * kl for h, kl in zip(values, side.per_token_kl_policy, strict=True)]
        margin += sign * fsum(w * h for w, h in zip(side.per_token_weight, values, strict=True))
    return -log_sigma(beta * margin)


@oracle("pair")
def asft(pair, *, beta):
    """ASFT, 2409.10571: NLL plus beta times cross-entropies of the mean token probabilities. Not verified here."""
    chosen, rejected = pair.chosen.policy_mean, pair.rejected.policy_mean
    logits = [x - log1mexp(x) for x in (chosen, rejected)]
    return -chosen + beta * (-log_sigma(logits[0]) - log_sigma(-logits[1]))
