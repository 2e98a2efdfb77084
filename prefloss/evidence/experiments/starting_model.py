"""How much does the starting model matter?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from prefloss.evidence.drawing import GREY, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds, rows_over
from prefloss.feedback import Pairs
from prefloss.worlds import Data, Judge, Tabular, World, draw, population, train

GOOD, OTHERS = 2, 18
GAIN = 3.0
# Probability that the starting model says something good.
CHANCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
SHOWN = 0.001
PAIRS, DEMONSTRATIONS = 300, 30
BETA = 1.0
DPO_LOSS = f"dpo(beta={BETA})"
DPO, SFT, BOTH = "DPO", "SFT", "SFT, then DPO"


def base() -> World:
    """A prompt for each chance: good completions of reward 3, which have that chance, and others of reward 0."""
    shares = [[chance / GOOD] * GOOD + [(1 - chance) / OTHERS] * OTHERS for chance in CHANCES]
    worth = [GAIN] * GOOD + [0.0] * OTHERS
    return World(reward=torch.tensor([worth] * len(CHANCES)), reference=torch.tensor(shares).log())


def good(log_probs: Tensor) -> Tensor:
    """Probability of a good completion, [..., C] -> [...]."""
    return log_probs.exp()[..., :GOOD].sum(-1)


def ceiling(chance: Tensor) -> Tensor:
    """The same under the optimum: the odds grow by exp(gain / beta), wherever they begin."""
    return torch.sigmoid(torch.logit(chance.double()) + GAIN / BETA)


def trained(
    references: Tensor, seeds: Sequence[int], loss: str, n: int, steps: int, sampler: Tensor | None = None
) -> Tensor:
    """Every seed's policies after n pairs of each prompt, from references [seeds, prompts, C] of their own.

    All seeds are prompts of one world, because references differ: with free logits prompts have nothing in common.
    """
    world = base()
    parts = [
        draw(
            replace(world, reference=reference),
            Judge(),
            Pairs,
            n * world.prompts,
            seeds=[seed],
            sampler=sampler,
        )
        for seed, reference in zip(seeds, references, strict=True)
    ]
    prompt = torch.cat([part.prompt + i * world.prompts for i, part in enumerate(parts)], 1)
    data = Data(Pairs, prompt, torch.cat([part.completions for part in parts], 1))
    joint = World(reward=world.reward.repeat(len(parts), 1), reference=references.flatten(0, 1))
    # Adam's usual eps would let the number of seeds matter.
    adam = partial(Adam, eps=1e-16)
    runs = train(Tabular(joint), data, loss, steps=steps, learning_rate=0.1, optimizer=adam)
    return runs.log_probs()[0, 0].view(references.shape)


def arms(seeds: Sequence[int]) -> dict[str, Tensor]:
    """Policies with DPO, with supervised training on demonstrations, and with both, [seeds, prompts, C] each."""
    reference = base().reference
    start = reference.expand(len(seeds), -1, -1)
    # Demonstrations are good completions at equal odds.
    expert = torch.tensor([[0.0] * GOOD + [-torch.inf] * OTHERS]).expand(reference.shape)
    shown = trained(start, seeds, "nll(average='sum')", DEMONSTRATIONS, steps=30, sampler=expert)
    return {
        DPO: trained(start, seeds, DPO_LOSS, PAIRS, steps=200),
        SFT: shown,
        BOTH: trained(shown, seeds, DPO_LOSS, PAIRS, steps=200),
    }


def run(seeds: Sequence[int]) -> Finding:
    """Train from references that say the good thing more and more often, with and without demonstrations first."""
    chance = {name: good(policies).T for name, policies in arms(seeds).items()}  # chances, seeds
    world, best = base(), ceiling(torch.tensor(CHANCES))
    endless = train(Tabular(world), population(world, Judge(), Pairs), DPO_LOSS, steps=400).log_probs()[0, 0]
    rare, common = CHANCES.index(SHOWN), CHANCES.index(0.1)
    mended, frequent = (chance[BOTH][at] - chance[DPO][at] for at in (rare, -1))
    what = "probability of a good completion"
    figures = [
        over_seeds(f"{what} from {SHOWN}, {BOTH}, minus {DPO}", mended),
        over_seeds(f"{what} from {SHOWN}, {DPO}", chance[DPO][rare], best[rare].item()),
        over_seeds(f"{what} from 0.1, {DPO}", chance[DPO][common], best[common].item()),
        over_seeds(f"{what} from {SHOWN}, {SFT} alone", chance[SFT][rare]),
        over_seeds(f"{what} from {CHANCES[-1]}, {BOTH}, minus {DPO}", frequent),
        Figure(
            "largest distance of DPO with endless pairs from the closed form",
            (good(endless) - best).abs().max().item(),
            expected=0.0,
        ),
    ]
    rows = [
        row for arm in chance for row in rows_over("chance", CHANCES, seeds, {"good": chance[arm]}, arm=arm)
    ]
    return Finding(_summary(figures), figures, verdict(figures), rows, lambda figure: _draw(figure, chance))


def verdict(figures: Sequence[Figure]) -> Verdict:
    """Holds if endless pairs end on the closed form, DPO seldom says what it began with rarely, and SFT mends that."""
    mended, rare, *_, distance = figures
    found = distance.value < 1e-3 and rare.below(0.25) and mended.above(0.25)
    return Verdict.HOLDS if found else Verdict.DOES_NOT_APPEAR


def _summary(figures: Sequence[Figure]) -> str:
    mended, rare, common, sft, frequent, _ = figures
    answer = "Very much" if verdict(figures) is Verdict.HOLDS else "Less than expected"
    return (
        f"{answer}. DPO multiplies the odds of the good thing; it does not invent it. From a chance of {SHOWN}, "
        f"{PAIRS} pairs of the model's own completions give {rare.value:.3f} (endless pairs: {rare.expected:.3f}); "
        f"from 0.1 they give {common.value:.2f} (endless: {common.expected:.2f}). {DEMONSTRATIONS} demonstrations "
        f"first give {sft.value:.2f} from {SHOWN}, and DPO after them {mended.value:+.2f} over DPO alone; from 0.3 the "
        f"same is worth {frequent.value:+.2f}. All demonstrations are good here; it cannot say what mediocre ones do."
    )


def _draw(figure: Any, chance: dict[str, Tensor]) -> None:
    (axis,) = panels(figure, 1)
    chances = torch.tensor(CHANCES)
    for which, (name, values) in enumerate(chance.items()):
        draw_means(axis, chances, values, name, which)
    grid = torch.logspace(-3, -0.5, 100)
    axis.plot(grid, ceiling(grid), "--", color=GREY, label="DPO with endless pairs (closed form)")
    axis.plot(grid, grid, ":", color=GREY, label="starting model")
    axis.set(
        xlabel="probability of a good completion before",
        ylabel="probability of a good completion after",
        xscale="log",
    )
    axis.set_xticks(CHANCES, [str(value) for value in CHANCES])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


EXPERIMENT = Experiment(
    name="starting-model",
    title="How much the starting model matters",
    claim="Preference training strengthens what the starting model says now and then; what it hardly ever says has to "
    "be shown to it first.",
    source="asked by learners",
    setup=f"{GOOD} good completions (reward 3) and {OTHERS} others (reward 0), free logits. The reference says a good "
    f"one with a chance of {CHANCES[0]} to {CHANCES[-1]}. {PAIRS} Bradley-Terry pairs of the model's own completions, "
    f"DPO at beta {BETA}, 200 steps of Adam at 0.1; or first {DEMONSTRATIONS} good demonstrations, 30 steps of nll, "
    "and then the same DPO from there.",
    run=run,
)
