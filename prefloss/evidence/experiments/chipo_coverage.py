"""Does chi-PO hold where most completions are rarely seen?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import at_kl, over_seeds, rows_of
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, Tabular, World, draw, kl, reward, sweep, train

COMMON, RARE = 10, 40
# A strength does not mean the same distance in both losses.
STRENGTHS = {"dpo": (0.1, 0.4, 0.8, 1.6, 3.2, 6.4), "chipo": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)}
NAMES = {"dpo": "DPO", "chipo": "chi-PO"}
MASS = {"40 rare completions": 0.1, "all covered alike": RARE / (COMMON + RARE)}
PAIRS = 500
FIXED_KL = 0.5


def covered(mass: float) -> World:
    """10 completions of rewards around 0.5 and 40 of reward -0.5, which the reference says with this probability."""
    shares = [(1 - mass) / COMMON] * COMMON + [mass / RARE] * RARE
    around = 0.5 + 0.3 * torch.randn(COMMON, generator=torch.Generator().manual_seed(0))
    return World(
        reward=torch.cat([around, torch.full((RARE,), -0.5)])[None], reference=torch.tensor([shares]).log()
    )


def run(seeds: Sequence[int]) -> Finding:
    """Train both losses with poor and with even coverage, and compare along the KL and at the smallest strength."""
    losses = [loss for name, strengths in STRENGTHS.items() for loss in sweep(name, strengths)]
    rows: list[dict[str, Any]] = []
    kls: dict[str, Tensor] = {}
    rewards: dict[str, Tensor] = {}
    for name, mass in MASS.items():
        world = covered(mass)
        data = draw(world, Judge(), Pairs, PAIRS, seeds=seeds)
        runs = train(Tabular(world), data, losses, steps=300, learning_rate=0.1)
        rows += rows_of(runs, data=name)
        shape = (len(STRENGTHS), -1, len(seeds))
        kls[name], rewards[name] = (
            kl(world, runs.log_probs()).view(shape),
            reward(world, runs.log_probs()).view(shape),
        )
    fixed = {
        name: torch.stack([at_kl(x, y, FIXED_KL) for x, y in zip(kls[name], rewards[name], strict=True)])
        for name in MASS
    }
    poor, even = MASS
    start = reward(covered(MASS[poor]), covered(MASS[poor]).reference).item()
    figures = [
        over_seeds(
            f"true reward at a KL of {FIXED_KL} nats, chi-PO minus DPO, {poor}",
            fixed[poor][1] - fixed[poor][0],
        ),
        over_seeds(
            f"true reward at a KL of {FIXED_KL} nats, chi-PO minus DPO, {even}",
            fixed[even][1] - fixed[even][0],
        ),
        over_seeds(
            f"true reward, DPO at its smallest beta minus the reference, {poor}", rewards[poor][0, 0] - start
        ),
        over_seeds(
            f"true reward, chi-PO at its smallest beta minus the reference, {poor}",
            rewards[poor][1, 0] - start,
        ),
    ]
    found, change = verdict(figures)
    return Finding(
        _summary(figures), figures, found, rows, lambda figure: _draw(figure, kls, rewards), change
    )


def verdict(figures: Sequence[Figure]) -> tuple[Verdict, str]:
    """Holds if chi-PO is ahead at equal KL where coverage is poor, by more than where it is even."""
    poor, even, *_ = figures
    if not poor.above(0):
        return Verdict.DOES_NOT_APPEAR, ""
    if even.value < poor.value / 2:
        return Verdict.HOLDS, ""
    return Verdict.HOLDS_WITH_A_CHANGE, "chi-PO is ahead with even coverage too."


def _summary(figures: Sequence[Figure]) -> str:
    poor, even, dpo, chipo = (figure.value for figure in figures)
    answer = "No" if verdict(figures)[0] is Verdict.DOES_NOT_APPEAR else "Yes, in a world made for it"
    return (
        f"{answer}. Where 40 of 50 completions share a tenth of the reference's probability, "
        f"{PAIRS} pairs judge each of them two or three times, and DPO believes their lucky wins: at a KL of "
        f"{FIXED_KL} nats chi-PO earns {poor:+.2f} more. Where all are covered alike the difference is {even:+.2f}. At "
        f"the smallest beta, poorly covered, DPO ends {dpo:+.2f} from the reference and chi-PO {chipo:+.2f}. The rare "
        "completions are all bad here; it cannot say how it goes where the best one is rare, nor where features tie "
        "them together."
    )


def _draw(figure: Any, kls: dict[str, Tensor], rewards: dict[str, Tensor]) -> None:
    for axis, (name, mass) in zip(panels(figure, 2, sharey=True), MASS.items(), strict=True):
        draw_frontier(axis, covered(mass))
        for which, label in enumerate(NAMES.values()):
            draw_means(axis, kls[name][which], rewards[name][which], label, which)
        axis.set(title=name, xlim=(0, 5.2))
        axis.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="chipo-coverage",
    title="chi-PO where data cover little",
    claim="KL regularisation does not stop DPO from believing completions that the data hardly cover; chi-PO, a change "
    "of one line, does.",
    source="Huang et al. 2024, arXiv:2407.13399",
    setup=f"A table of {COMMON} common completions (rewards around 0.5) and {RARE} rare ones (reward -0.5) that share "
    f"a tenth of the reference, or all alike; {PAIRS} Bradley-Terry pairs; 6 strengths of each loss, 300 steps of Adam "
    "at 0.1. chi-PO's bound of the reward is 1.",
    run=run,
)
