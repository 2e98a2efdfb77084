"""DPO's reward at each KL: exactly, with all feedback there is, and with n pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds, rows_of, shortfall
from prefloss.feedback import Pairs
from prefloss.worlds import (
    Judge,
    Runs,
    Tabular,
    bandit,
    draw,
    frontier,
    kl,
    optimum,
    population,
    reward,
    sweep,
    train,
)

BETAS = (0.3, 0.5, 1.0, 2.0, 4.0)
PAIRS = (50, 200, 800, 3200)
WORLD = bandit(prompts=2, completions=12)


def trained_on_everything() -> Runs:
    """DPO on every pair, weighted by its probability."""
    pairs = population(WORLD, Judge(), Pairs)
    return train(Tabular(WORLD), pairs, sweep("dpo", BETAS), steps=500, learning_rate=0.1)


def run(seeds: Sequence[int]) -> Finding:
    """Train on the population and on n pairs of each seed."""
    exact = trained_on_everything().log_probs()[:, 0]
    error = (exact.exp() - optimum(WORLD, torch.tensor(BETAS)).exp()).abs().max().item()
    drawn = {
        n: train(
            Tabular(WORLD),
            draw(WORLD, Judge(), Pairs, n, seeds=seeds),
            sweep("dpo", BETAS),
            learning_rate=0.1,
        )
        for n in PAIRS
    }
    gaps = {n: shortfall(WORLD, runs.log_probs()) for n, runs in drawn.items()}
    gain = (frontier(WORLD, torch.tensor(BETAS))[1] - reward(WORLD, WORLD.reference)).mean().item()
    figures = [
        Figure("largest distance of a probability from the closed-form optimum, all pairs", error, None, 0.0),
        *(
            over_seeds(f"reward below the frontier at the same KL, {n} pairs", gap.mean(0))
            for n, gap in gaps.items()
        ),
        Figure("mean gain of the frontier over the reference, same betas", gain),
    ]
    few, many = figures[1].value, figures[len(PAIRS)].value
    return Finding(
        summary=(
            f"On all pairs DPO is the best policy at its KL: no probability is off by more than {error:.0e}. "
            f"With {PAIRS[0]} pairs it is {few:.2f} of reward below the frontier, with {PAIRS[-1]} "
            f"{many:.3f}, of a possible gain of {gain:.2f}."
        ),
        figures=figures,
        verdict=verdict(error, figures[len(PAIRS)], gain),
        rows=[row for n, runs in drawn.items() for row in rows_of(runs, n=n)],
        draw=lambda figure: draw_picture(figure, exact, drawn, gaps),
        change=f"It needs more than {PAIRS[-1]} pairs: with these a tenth of the gain or more is missing.",
    )


def verdict(error: float, most_data: Figure, gain: float) -> Verdict:
    """On the frontier to 1e-3 with all pairs, and less than a tenth of the gain below it with the most pairs."""
    if error > 1e-3:
        return Verdict.DOES_NOT_APPEAR
    return Verdict.HOLDS if most_data.below(0.1 * gain) else Verdict.HOLDS_WITH_A_CHANGE


def draw_picture(figure: Any, exact: Tensor, drawn: dict[int, Runs], gaps: dict[int, Tensor]) -> None:
    """Reward over KL, and the distance from the frontier over the number of pairs."""
    left, right = panels(figure, 2)
    draw_frontier(left, WORLD)
    for which, (n, runs) in enumerate(drawn.items()):
        log_probs = runs.log_probs()
        draw_means(left, kl(WORLD, log_probs), reward(WORLD, log_probs), f"{n} pairs", which)
    left.plot(kl(WORLD, exact), reward(WORLD, exact), "k*", markersize=9, label="all pairs")
    left.set(title="DPO, five betas each", xlim=(0, 3.5))
    left.legend(frameon=False, fontsize=9, loc="lower right")
    for which, beta in enumerate(BETAS):
        over_n = torch.stack([gaps[n][which] for n in PAIRS])
        draw_means(right, torch.tensor(PAIRS), over_n, f"beta {beta:g}", which, dots=False)
    right.set(
        xlabel="pairs",
        ylabel="reward below the frontier",
        xscale="log",
        yscale="log",
        title="What is missing",
    )
    right.set_xticks(PAIRS, [str(n) for n in PAIRS])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=9)


EXPERIMENT = Experiment(
    name="dpo-frontier",
    title="DPO's reward at each KL, with all pairs and with few",
    claim="The optimum of the KL-regularised reward is the reference times exp(r / beta), and DPO reaches it "
    "from pairs alone; its frontier of reward over KL dominates those of the methods it was compared with.",
    source="Rafailov et al. 2023, arXiv:2305.18290, Eq. 4 and section 6.1, Fig. 2",
    setup="2 prompts with 12 completions, normal rewards, free logits, a Bradley-Terry judge; beta in "
    f"{numbers(BETAS)}. All pairs weighted by their probability, and {numbers(PAIRS)} drawn pairs; Adam at "
    "0.1. The frontier is computed, so other methods are not needed to draw it.",
    run=run,
    seeds=20,
)
