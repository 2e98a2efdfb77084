"""Rankings of K completions against the best and the worst of the same K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds, rows_of, runs_at_kl
from prefloss.feedback import Rankings
from prefloss.worlds import Data, Judge, Runs, Tabular, bandit, best_and_worst, draw, kl, reward, sweep, train

WORLD = bandit(prompts=4, completions=20)
GROUPS, KL = 600, 1.0
SIZES = (2, 4, 8)
BETAS = (0.3, 0.8, 2.0, 5.0)
WHOLE, NEGATIVES, ENDS = "Plackett-Luce", "S-DPO", "DPO, best against worst"


def trained(size: int, seeds: Sequence[int]) -> dict[str, Runs]:
    """All three on the same groups; of two completions they are one loss."""
    groups = draw(WORLD, Judge(), Rankings, GROUPS, seeds=seeds, group=size)
    ends = trained_on(best_and_worst(groups), "dpo")
    if size == 2:
        return dict.fromkeys((WHOLE, NEGATIVES, ENDS), ends)
    return {WHOLE: trained_on(groups, "dpo_pl"), NEGATIVES: trained_on(groups, "s_dpo"), ENDS: ends}


def trained_on(data: Data, loss: str) -> Runs:
    """The loss over its sweep."""
    return train(Tabular(WORLD), data, sweep(loss, BETAS), steps=150, learning_rate=0.1)


def run(seeds: Sequence[int]) -> Finding:
    """Sweep beta for each loss and size."""
    runs = {size: trained(size, seeds) for size in SIZES}
    at = {
        size: {name: runs_at_kl(each, KL) for name, each in losses.items()} for size, losses in runs.items()
    }
    few, many = SIZES[0], SIZES[-1]
    figures = [
        over_seeds(
            f"reward at a KL of {KL:g} nats, S-DPO, K = {many} minus K = {few}",
            at[many][NEGATIVES] - at[few][NEGATIVES],
        ),
        over_seeds(
            f"the same at K = {many}, S-DPO minus DPO on best against worst",
            at[many][NEGATIVES] - at[many][ENDS],
        ),
        over_seeds(
            f"the same at K = {many}, Plackett-Luce minus S-DPO", at[many][WHOLE] - at[many][NEGATIVES]
        ),
        *(
            over_seeds(f"the same, {name}, K = {size}", at[size][name])
            for name in (WHOLE, NEGATIVES, ENDS)
            for size in SIZES
        ),
    ]
    return Finding(
        summary=(
            f"From {GROUPS} groups, at a KL of {KL:g} nats, S-DPO earns {at[few][NEGATIVES].mean():.2f} with "
            f"K = {few} and {at[many][NEGATIVES].mean():.2f} with K = {many}; a pair of the best and worst of "
            f"each group {at[many][ENDS].mean():.2f}, the whole ranking (Plackett-Luce) "
            f"{at[many][WHOLE].mean():.2f}."
        ),
        figures=figures,
        verdict=verdict(*figures[:2]),
        rows=[
            row
            for size, losses in runs.items()
            for name, each in losses.items()
            for row in rows_of(each, arm=name, k=size)
        ],
        draw=lambda figure: draw_picture(figure, runs, at),
        change="More completions help, but DPO on the best and worst of each group gains as much from them.",
    )


def verdict(more: Figure, against_ends: Figure) -> Verdict:
    """S-DPO gains from more completions, and more than pairs made of the same groups do."""
    if not more.above(0):
        return Verdict.DOES_NOT_APPEAR
    return Verdict.HOLDS if against_ends.above(0) else Verdict.HOLDS_WITH_A_CHANGE


def draw_picture(figure: Any, runs: dict[int, dict[str, Runs]], at: dict[int, dict[str, Tensor]]) -> None:
    """Reward over KL for the largest K, and at one KL over K."""
    left, right = panels(figure, 2)
    draw_frontier(left, WORLD)
    for which, (name, each) in enumerate(runs[SIZES[-1]].items()):
        log_probs = each.log_probs()
        draw_means(left, kl(WORLD, log_probs), reward(WORLD, log_probs), name, which)
        over_k = torch.stack([at[size][name] for size in SIZES])
        draw_means(right, torch.tensor(SIZES), over_k, name, which, dots=False)
    left.set(title=f"{GROUPS} groups of {SIZES[-1]}", xlim=(0, 3.5))
    left.legend(frameon=False, fontsize=9)
    right.set(
        xlabel="completions of a group, K",
        ylabel=f"true reward at a KL of {KL:g} nats",
        title="By group size",
    )
    right.set_xticks(SIZES)


EXPERIMENT = Experiment(
    name="k-wise",
    title="Rankings of K completions against pairs",
    claim="A loss on one preferred and several other completions (S-DPO) beats pairwise DPO, more so the "
    "more there are.",
    source="Chen et al. 2024, arXiv:2406.09215, abstract and section 4; Plackett-Luce: Rafailov et al. 2023, "
    "arXiv:2305.18290, appendix A.3",
    setup=f"4 prompts with 20 completions, normal rewards, free logits, a Bradley-Terry judge; {GROUPS} "
    f"groups of K = 2, 4 or 8 different completions. Beta in {numbers(BETAS)}, Adam at 0.1, 150 steps.",
    run=run,
    seeds=12,
)
