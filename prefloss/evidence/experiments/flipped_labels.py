"""Flipped preferences: losses made for them, at one beta and at the same KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import COLOURS, MARKERS, draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds, rows_of, runs_at_kl
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, Runs, Tabular, bandit, draw, kl, optimum, population, reward, sweep, train

WORLD = bandit(prompts=2, completions=12)
FLIPS = (0.0, 0.1, 0.2, 0.4)
BETA, FLIP, KL = 0.5, 0.2, 1.0
BETAS = (0.1, 0.2, 0.4, 0.8, 2.0, 8.0)
NAMES = ("DPO", "cDPO", "robust DPO", "Dr. DPO")


def losses(flip: float) -> dict[str, str]:
    """Each loss told the share of flips, where it takes one."""
    expressions = ("dpo", f"cdpo(epsilon={flip})", f"robust_dpo(epsilon={flip})", "dr_dpo(beta_prime=1.0)")
    return dict(zip(NAMES, expressions, strict=True))


def on_everything(flip: float) -> Tensor:
    """Log-probs after training on all pairs at one beta, [losses, prompts, C].

    Without Dr. DPO: it weighs the pairs of a batch against each other, so a pair's probability cannot be its weight.
    """
    pairs = population(WORLD, Judge(flips=flip), Pairs)
    each = [loss for name in NAMES[:3] for loss in sweep(losses(flip)[name], [BETA])]
    return train(Tabular(WORLD), pairs, each, steps=300, learning_rate=0.1).log_probs()[:, 0]


def run(seeds: Sequence[int]) -> Finding:
    """Train on all pairs at one beta, and on 1,000 pairs of each seed over a sweep."""
    exact = {flip: on_everything(flip) for flip in FLIPS}
    robust = NAMES.index("robust DPO")
    best = optimum(WORLD, BETA).exp()
    error = max((policies[robust].exp() - best).abs().max().item() for policies in exact.values())
    # Completions are drawn alike: of one that is seen twice, robust DPO's loss has no lower bound.
    data = draw(WORLD, Judge(flips=FLIP), Pairs, 1000, seeds=seeds, sampler=torch.zeros_like(WORLD.reference))
    runs = {name: train(Tabular(WORLD), data, sweep(loss, BETAS)) for name, loss in losses(FLIP).items()}
    at = {name: runs_at_kl(each, KL) for name, each in runs.items()}
    plain, helped = (reward(WORLD, exact[FLIP][row]).item() for row in (0, robust))
    figures = [
        over_seeds(
            f"reward at a KL of {KL:g} nats, robust DPO minus DPO, 1,000 pairs, {FLIP:.0%} flips",
            at["robust DPO"] - at["DPO"],
        ),
        over_seeds("the same, cDPO minus DPO", at["cDPO"] - at["DPO"]),
        over_seeds("the same, Dr. DPO minus DPO", at["Dr. DPO"] - at["DPO"]),
        Figure(f"reward at beta {BETA}, robust DPO minus DPO, all pairs, {FLIP:.0%} flips", helped - plain),
        Figure(
            "robust DPO, all pairs: largest distance of a probability from the optimum without flips",
            error,
            None,
            0.0,
        ),
    ]
    return Finding(
        summary=(
            f"At beta {BETA} with {FLIP:.0%} flips in all pairs, robust DPO earns {helped:.2f} and DPO "
            f"{plain:.2f}: robust DPO ends where it would without flips (to {error:.0e}), DPO stays nearer "
            f"the reference. At the same KL of {KL:g} nats, on 1,000 pairs, robust DPO minus DPO is "
            f"{figures[0].signed}, cDPO {figures[1].signed}, Dr. DPO {figures[2].signed}."
        ),
        figures=figures,
        verdict=verdict(error, helped - plain, figures[0]),
        rows=[row for name, each in runs.items() for row in rows_of(each, arm=name)],
        draw=lambda figure: draw_picture(figure, exact, runs),
        change="At one beta alone. Flips shrink DPO's log-ratios as a larger beta would, and a smaller beta "
        "undoes it: at the same KL robust DPO shows no gain.",
    )


def verdict(error: float, at_beta: float, at_same_kl: Figure) -> Verdict:
    """Robust DPO undoes the flips of all pairs to 1e-3 and beats DPO there; unchanged if at the same KL too."""
    if error > 1e-3 or at_beta <= 0 or not math.isfinite(at_same_kl.value):
        return Verdict.DOES_NOT_APPEAR
    return Verdict.HOLDS if at_same_kl.above(0) else Verdict.HOLDS_WITH_A_CHANGE


def draw_picture(figure: Any, exact: dict[float, Tensor], runs: dict[str, Runs]) -> None:
    """Reward over the share of flips at one beta, and over KL."""
    left, right = panels(figure, 2)
    for row, name in enumerate(NAMES[:3]):
        rewards = [reward(WORLD, policies[row]) for policies in exact.values()]
        left.plot(FLIPS, rewards, color=COLOURS[row], marker=MARKERS[row], label=name)
    for row, name in enumerate(NAMES):
        log_probs = runs[name].log_probs()
        draw_means(right, kl(WORLD, log_probs), reward(WORLD, log_probs), name, row)
    left.axhline(reward(WORLD, WORLD.reference), color="k", linestyle=":", label="reference")
    left.set(xlabel="share of flipped pairs", ylabel="true reward", title=f"All pairs, beta {BETA}")
    left.legend(frameon=False, fontsize=9, loc="lower left")
    draw_frontier(right, WORLD)
    right.set(title=f"1,000 pairs, {FLIP:.0%} flipped, six betas", xlim=(0, 3.5))
    right.legend(frameon=False, fontsize=9, loc="lower right")


EXPERIMENT = Experiment(
    name="flipped-labels",
    title="Flipped labels: DPO and the losses made for them",
    claim="Where a known share of preferences is flipped, robust DPO is an unbiased estimate of DPO on clean "
    "preferences, and it, cDPO and Dr. DPO are more robust than DPO.",
    source="Chowdhury et al. 2024, arXiv:2403.00409, section 3; Mitchell 2023 (cDPO); Wu et al. 2024, "
    "arXiv:2407.07880",
    setup="2 prompts with 12 completions, normal rewards, free logits, a Bradley-Terry judge whose word is "
    f"reversed with probability {numbers(FLIPS)}; each loss knows that share. All pairs at beta {BETA}; 1,000 pairs "
    f"with {FLIP:.0%} flips over beta in {numbers(BETAS)}, Adam at 0.05, 300 steps.",
    run=run,
    seeds=20,
)
