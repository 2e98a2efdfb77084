"""Do scores in the loss help where pairs are few?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import GREY, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import at_kl, over_seeds, rows_of
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, LogLinear, draw, featured, kl, reward, sweep, train

COUNTS = (10, 30, 100, 300)
FEW = 30
BETAS = (0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
FIXED_KL = 0.5
# The squared RPO at beta is REBEL with eta = 1 / beta, times beta squared.
LOSSES = {"DPO": "dpo", "ODPO": "odpo", "RPO (backward KL)": "rpo_bwd_kl", "REBEL": "rpo_sq"}


def run(seeds: Sequence[int]) -> Finding:
    """Train on more and more scored pairs, and compare true rewards at one KL."""
    world = featured(prompts=2, completions=50, dimensions=8)
    every = [loss for name in LOSSES.values() for loss in sweep(name, BETAS)]
    shape = (len(LOSSES), len(BETAS), len(seeds))
    rows: list[dict[str, Any]] = []
    fixed, free = [], []
    for n in COUNTS:
        data = draw(world, Judge(temperature=0.5), Pairs, n, seeds=seeds)
        runs = train(LogLinear(world), data, every, steps=200)
        rows += rows_of(runs, count=n)
        policies = runs.log_probs()
        rewards, kls = reward(world, policies).view(shape), kl(world, policies).view(shape)
        fixed.append(torch.stack([at_kl(x, y, FIXED_KL) for x, y in zip(kls, rewards, strict=True)]))
        free.append(rewards[:, BETAS.index(1.0)])
    at_fixed, at_beta = torch.stack(fixed, 1), torch.stack(free, 1)  # losses, counts, seeds
    gains = at_fixed - at_fixed[:1]
    figures = [
        over_seeds(
            f"true reward at a KL of {FIXED_KL} nats, {name} minus DPO, {n} pairs",
            gains[which, COUNTS.index(n)],
        )
        for n in (FEW, COUNTS[-1])
        for which, name in enumerate(LOSSES)
        if which
    ]
    worth = at_fixed[0, COUNTS.index(100)] - at_fixed[0, COUNTS.index(FEW)]
    figures.append(over_seeds(f"true reward at that KL, DPO with 100 pairs minus DPO with {FEW}", worth))
    found, change = verdict(figures)
    return Finding(
        _summary(figures), figures, found, rows, lambda figure: _draw(figure, gains, at_beta), change
    )


def verdict(figures: Sequence[Figure]) -> tuple[Verdict, str]:
    """Holds if ODPO gains with few pairs and less with many; with a change if another loss of scores does."""
    for name, few, many in zip(("ODPO", "RPO", "REBEL"), figures[:3], figures[3:6], strict=True):
        if few.above(0) and few.value > many.value:
            if name == "ODPO":
                return Verdict.HOLDS, ""
            return Verdict.HOLDS_WITH_A_CHANGE, f"ODPO does not gain at equal KL here; {name} does."
    return Verdict.DOES_NOT_APPEAR, ""


def _summary(figures: Sequence[Figure]) -> str:
    odpo, rpo, rebel, *_, data = figures
    answer = (
        "No gain is shown at equal KL"
        if verdict(figures)[0] is Verdict.DOES_NOT_APPEAR
        else "Yes, at equal KL"
    )
    return (
        f"{answer}. With {FEW} pairs and a KL of {FIXED_KL} nats, the true reward differs from DPO's by "
        f"{odpo} for ODPO, {rpo} for RPO and {rebel} for REBEL; 100 pairs in place of {FEW} are worth {data}. At equal "
        "beta the losses differ much more, because a beta means another distance from the reference in each. It cannot "
        "say what scores are worth that are more reliable than the order of the pair: here both come from one noisy "
        "rating."
    )


def _draw(figure: Any, gains: Tensor, at_beta: Tensor) -> None:
    left, right = panels(figure, 2)
    for which, name in enumerate(LOSSES):
        if which:
            # Side by side, not on one another.
            draw_means(
                left, torch.tensor(COUNTS) * 1.06 ** (which - 2), gains[which], name, which, dots=False
            )
        draw_means(right, torch.tensor(COUNTS) * 1.0, at_beta[which], name, which, dots=False)
    left.axhline(0, color=GREY, linestyle="--", label="DPO")
    left.set(title=f"at a KL of {FIXED_KL} nats", ylabel="true reward minus DPO's")
    right.set(title="at beta 1 (the KL differs)", ylabel="true reward")
    for axis in (left, right):
        axis.set(xlabel="judged pairs", xscale="log")
        axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axis.minorticks_off()
        axis.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="graded-scores",
    title="Scores in the loss against few pairs",
    claim="A loss that reads how much better the chosen completion is aligns better than DPO, above all where pairs "
    "are few.",
    source="ODPO: Amini et al. 2024, arXiv:2402.10571; RPO: Adler et al. 2024, arXiv:2406.11704; REBEL: Gao et al. "
    "2024, arXiv:2404.16767",
    setup="2 prompts, 50 completions with 8 features, a log-linear policy; one judge of temperature 0.5 scores both "
    "sides, and the scores give the order. 10 to 300 pairs, 6 betas from 0.5 to 64 (REBEL: eta = 1 / beta), "
    "200 steps of Adam.",
    run=run,
    seeds=15,
)
