"""Where does the mass go that no pair speaks of?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import GREY, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds, rows_over
from prefloss.evidence.reward_models import reward_model
from prefloss.feedback import Pairs
from prefloss.worlds import Data, Judge, LogLinear, Policy, Runs, Tabular, World, draw, optimum, sweep, train

BETAS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
SHOWN = 0.3
REFERENCE = 0.01
TIED = "DPO, y3 shares a feature with y1"
TIED_MODEL = "RLHF, reward model with that feature"
FREE = "DPO, free logits"
FREE_MODEL = "RLHF, reward model with a score each"


def three_completions() -> World:
    """y1 is good and y2 is not; y3 is bad and rare, and has three times the feature of y1."""
    share = (1 - REFERENCE) / 2
    return World(
        reward=torch.tensor([[1.0, 0.0, -3.0]]),
        reference=torch.tensor([[share, share, REFERENCE]]).log(),
        features=torch.tensor([[[1.0], [0.0], [3.0]]]),
    )


def pairs_of_two(world: World, seeds: Sequence[int]) -> Data:
    """200 judged pairs of y1 and y2 for each seed; y3 is in none."""
    never = torch.tensor([[0.0, 0.0, -math.inf]])
    return draw(world, Judge(), Pairs, 200, seeds=seeds, sampler=never)


def trained(policy: Policy, data: Data, start: Tensor | None = None) -> Runs:
    """DPO at each beta."""
    return train(policy, data, sweep("dpo", BETAS), steps=500, learning_rate=0.1, start=start)


def run(seeds: Sequence[int]) -> Finding:
    """Train on pairs of y1 and y2 alone, and look at y3."""
    world = three_completions()
    data, betas = pairs_of_two(world, seeds), torch.tensor(BETAS)[:, None]
    free, tied = Tabular(world), LogLinear(world)
    from_reference, from_y3 = trained(free, data), trained(free, data, torch.tensor([0.0, 0.0, 20.0]))
    arms = {
        TIED: trained(tied, data).log_probs(),
        TIED_MODEL: optimum(world, betas, reward_model(tied, data)),
        FREE: from_reference.log_probs(),
        FREE_MODEL: optimum(world, betas, reward_model(free, data)),
    }
    unseen = {name: policies.exp()[..., 0, 2] for name, policies in arms.items()}
    at, far = BETAS.index(SHOWN), BETAS.index(1.0)
    figures = [
        over_seeds(f"probability of y3, {name}, beta {SHOWN} (reference {REFERENCE})", values[at])
        for name, values in unseen.items()
    ] + [
        Figure(
            "probability of y3 after DPO with free logits that began at y3, beta 1",
            from_y3.log_probs().exp()[far, :, 0, 2].mean().item(),
        ),
        Figure(
            "largest difference between DPO's losses after the two starts, nats",
            (from_reference.final - from_y3.final).abs().max().item(),
            expected=0.0,
        ),
    ]
    rows = []
    for name, policies in arms.items():
        values = {f"y{i + 1}": policies.exp()[..., 0, i] for i in range(3)}
        rows += rows_over("beta", BETAS, seeds, values, arm=name)
    found, change = verdict(figures)
    return Finding(_summary(figures), figures, found, rows, lambda figure: _draw(figure, unseen), change)


def verdict(figures: Sequence[Figure]) -> tuple[Verdict, str]:
    """Holds if DPO's loss is blind to y3 and DPO carries mass there; unchanged if no reward model does the same."""
    tied, tied_model, _, _, began_there, blind = figures
    if blind.value > 1e-3 or began_there.value < 0.5 or not tied.above(10 * REFERENCE):
        return Verdict.DOES_NOT_APPEAR, ""
    if tied_model.below(10 * REFERENCE):
        return Verdict.HOLDS, ""
    change = (
        "RLHF does the same where its reward model sees the shared feature: the feature carries the mass."
    )
    return Verdict.HOLDS_WITH_A_CHANGE, change


def _summary(figures: Sequence[Figure]) -> str:
    tied, tied_model, free, free_model, began_there, blind = (figure.value for figure in figures)
    answer = "does not" if verdict(figures)[0] is Verdict.DOES_NOT_APPEAR else "can"
    return (
        f"DPO {answer} say what no pair mentions. At beta {SHOWN} y3 rises from {REFERENCE} to {tied:.2f} where it "
        f"shares a feature with the winner. RLHF gives it {tied_model:.2f} if its reward model sees that feature, and "
        f"{free_model:.4f} if each completion has a score of its own; DPO with free logits gives it {free:.4f}. DPO's "
        f"loss does not see y3 at all: begun at y3, DPO stays there with {began_there:.2f} at beta 1, and its loss "
        f"differs by {blind:.0e}. Three completions cannot say how often text shares features in this way."
    )


def _draw(figure: Any, unseen: dict[str, Tensor]) -> None:
    (axis,) = panels(figure, 1)
    for which, (name, values) in enumerate(unseen.items()):
        # Two pairs of arms lie on one another.
        nudged = torch.tensor(BETAS) * (1.04 if which % 2 else 1.0)
        draw_means(axis, nudged, values, name, which, dots=False)
    axis.axhline(REFERENCE, color=GREY, linestyle=":", label="reference")
    axis.set(
        xlabel="beta (small: far from the reference)", ylabel="probability of y3, which no pair mentions"
    )
    axis.set(xscale="log", yscale="log", ylim=(5e-5, 1.5))
    axis.set_xticks(BETAS, [str(beta) for beta in BETAS])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


EXPERIMENT = Experiment(
    name="off-support",
    title="Probability on completions that no pair mentions",
    claim="DPO's loss is minimal also for policies that give mass to completions outside the preference data, which "
    "the objective of RLHF rules out; so DPO can favour completions that nobody judged.",
    source="Xu et al. 2024, arXiv:2404.10719, section 4 (Theorem 4.1)",
    setup="Three completions: y1 (reward 1) and y2 (reward 0) at 0.495 each, and a bad y3 (reward -3) at 0.01. 200 "
    "pairs of y1 and y2 judged by Bradley-Terry. DPO with free logits and with one feature (y1 has 1, y2 has 0, y3 has "
    "3); RLHF with a reward model of either kind and the exact optimum. 500 steps of Adam.",
    run=run,
)
