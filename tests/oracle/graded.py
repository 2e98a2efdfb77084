"""Pairs whose two completions carry scores."""

from mpmath import log

from tests.oracle.numbers import bernoulli_kl, log_sigma, oracle, sigma


@oracle("pair")
def soft_label_dpo(pair, *, beta, eta):
    """Cross-entropy of DPO's preference against the Bradley-Terry preference of the scores. No paper of its own."""
    z, target = beta * pair.delta, eta * pair.gap
    return -sigma(target) * log_sigma(z) - sigma(-target) * log_sigma(-z)


@oracle("pair")
def margin_dpo(pair, *, beta, margin_weight):
    """DPO with the score gap as a margin (Llama 2's for reward models; no DPO paper)."""
    return -log_sigma(beta * pair.delta - margin_weight * pair.gap)


@oracle("pair")
def odpo(pair, *, beta, alpha, scale):
    """DPO with an offset, 2402.10571. Read in rycolab/odpo trainers.py, which has the log alone."""
    offset = {"log": log, "identity": lambda gap: gap}[scale](pair.gap)
    return -log_sigma(beta * pair.delta - alpha * offset)


@oracle("pair")
def rpo_bwd_kl(pair, *, beta, eta):
    """Reward-aware PO, 2406.11704: KL of the scores' preference to the policy's. Read in NVIDIA/NeMo-Aligner."""
    return bernoulli_kl(eta * pair.gap, beta * pair.delta)


@oracle("pair")
def rpo_fwd_kl(pair, *, beta, eta):
    """Reward-aware PO, 2502.00203: KL of the policy's preference to the scores'. Read in NVIDIA/NeMo-Aligner."""
    return bernoulli_kl(beta * pair.delta, eta * pair.gap)


@oracle("pair")
def rpo_sq(pair, *, beta, eta):
    """Reward-aware PO, 2502.00203: squared distance of the two gaps. Read in NVIDIA/NeMo-Aligner."""
    return (beta * pair.delta - eta * pair.gap) ** 2


@oracle("pair")
def rebel(pair, *, eta):
    """REBEL, 2404.16767; the reference is the previous iterate. Read in ZhaolinGao/REBEL src/nectar/rebel.py."""
    return (pair.delta - eta * pair.gap) ** 2


@oracle("pair")
def sppo(pair, *, beta):
    """SPPO, 2405.00675: scores are win probabilities against the policy. Read in uclaml/SPPO sppo/trainer.py."""
    sides = ((pair.chosen, pair.score_chosen), (pair.rejected, pair.score_rejected))
    return sum((side.h - (score - 0.5) / beta) ** 2 for side, score in sides) / 2
