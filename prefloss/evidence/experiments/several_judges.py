"""What does DPO learn from judges of several minds?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from prefloss.evidence.drawing import COLOURS, GREY, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, Panel, Tabular, World, population, train

PANELS = 100
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
SHOWN = 0.3


def panels_of(seeds: Sequence[int]) -> tuple[World, Tensor, Tensor]:
    """A world with a prompt for each of 100 panels of each seed, and the tastes of both judges, [prompts, 3]."""
    shape = (PANELS, 3)
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append(
            [size * torch.randn(shape, generator=generator, dtype=torch.float64) for size in (1.5, 1.5, 0.5)]
        )
    first, second, reference = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return World(reward=first, reference=reference), first, second


def borda(world: World, prefers: Tensor) -> Tensor:
    """How often each completion beats one that the reference says, [prompts, C]; itself it beats half the time."""
    return (prefers * world.reference.exp().unsqueeze(-2)).sum(-1)


def fitted(world: World, panel: Panel) -> Tensor:
    """Log-ratios of DPO at beta 1 on all pairs that the panel could judge, [prompts, 3]."""
    # Among thousands of prompts a rare pair's gradient is below Adam's usual eps.
    adam = partial(Adam, eps=1e-16)
    data = population(world, panel, Pairs)
    runs = train(Tabular(world), data, "dpo(beta=1.0)", steps=400, learning_rate=0.1, optimizer=adam)
    return runs.log_probs()[0, 0] - world.reference


def run(seeds: Sequence[int]) -> Finding:
    """Compare DPO's order of three completions with that of Borda counts and of mean rewards, panel by panel."""
    world, first, second = panels_of(seeds)
    followed, reversed_, cost, distance = [], [], [], 0.0
    example: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        panel = Panel([Judge(taste=first), Judge(taste=second)], [1 - share, share])
        ratios, mean, prefers = fitted(world, panel), panel.utility(world), panel.prefers(world)
        count = borda(world, prefers)
        implied = borda(world, torch.sigmoid(ratios.unsqueeze(-1) - ratios.unsqueeze(-2)))
        distance = max(distance, (count - implied).abs().max().item())
        same = (ratios.argsort(-1) == count.argsort(-1)).all(-1)
        loss = mean.amax(-1) - mean.gather(-1, ratios.argmax(-1, keepdim=True))[:, 0]
        for found, values in ((followed, same.double()), (reversed_, (loss > 0).double()), (cost, loss)):
            found.append(values.view(len(seeds), PANELS).mean(-1))
        rows += [
            {
                "share": share,
                "seed": seed,
                "order_of_borda": a.item(),
                "not_the_best": b.item(),
                "cost": c.item(),
            }
            for seed, a, b, c in zip(seeds, followed[-1], reversed_[-1], cost[-1], strict=True)
        ]
        if share == SHOWN:
            worst = loss.argmax()
            tastes = {"majority": first[worst], "minority": second[worst], "mean reward": mean[worst]}
            example = {name: values - values.mean() for name, values in tastes.items()}
            example["DPO's implicit reward"] = ratios[worst] - ratios[worst].mean()
    at = SHARES.index(SHOWN)
    figures = [
        over_seeds(f"share of panels that DPO orders by Borda count, minority {SHOWN}", followed[at], 1.0),
        over_seeds(
            f"share of panels whose best mean reward is not DPO's favourite, minority {SHOWN}", reversed_[at]
        ),
        over_seeds("the same with judges of one mind", reversed_[0], 0.0),
        over_seeds(
            f"mean reward of the best minus that of DPO's favourite, all panels, minority {SHOWN}", cost[at]
        ),
        Figure(
            "the same in the panel where it is largest",
            (example["mean reward"].max() - _favourite(example)).item(),
        ),
        Figure("largest distance of a Borda count from the one that DPO implies", distance, expected=0.0),
    ]
    return Finding(
        summary=_summary(figures),
        figures=figures,
        verdict=verdict(figures),
        rows=rows,
        draw=lambda figure: _draw(figure, example, torch.stack(reversed_)),
    )


def _favourite(example: dict[str, Tensor]) -> Tensor:
    """Mean reward of the completion that DPO raises most."""
    return example["mean reward"][example["DPO's implicit reward"].argmax()]


def verdict(figures: Sequence[Figure]) -> Verdict:
    """Holds if DPO's counts and order are Borda's, and that makes another favourite than the mean reward's."""
    order, reversed_, alone, *_, distance = figures
    found = order.value > 0.99 and distance.value < 1e-3 and reversed_.above(0.01) and alone.value < 0.01
    return Verdict.HOLDS if found else Verdict.DOES_NOT_APPEAR


def _summary(figures: Sequence[Figure]) -> str:
    order, reversed_, alone, cost, worst, _ = (figure.value for figure in figures)
    return (
        f"It learns who wins most often, not who is liked most on average. With a {SHOWN:.0%} minority DPO orders "
        f"{order:.1%} of {PANELS} random panels a seed by Borda count, and in {reversed_:.1%} its favourite is not the "
        f"completion of the highest mean reward (judges of one mind: {alone:.1%}). That costs {cost:.2f} of mean "
        f"reward over all panels, and {worst:.1f} in the worst. How often real judges differ so much it cannot say."
    )


def _draw(figure: Any, example: dict[str, Tensor], reversed_: Tensor) -> None:
    left, right = panels(figure, 2)
    for which, (name, values) in enumerate(example.items()):
        places = [place + 0.2 * (which - 1.5) for place in range(3)]
        left.bar(places, values.tolist(), 0.19, color=COLOURS[3 - which], label=name)
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set_xticks(range(3), ["y1", "y2", "y3"])
    left.set(title=f"where it costs most (minority {SHOWN:.0%})", ylabel="reward, less the mean of the three")
    left.legend(fontsize=8)
    draw_means(right, torch.tensor(SHARES), 100 * reversed_, "", 0)
    right.set(
        xlabel="share of the second judge",
        ylabel="panels whose best is not DPO's favourite, %",
        ylim=(0, None),
    )


EXPERIMENT = Experiment(
    name="several-judges",
    title="DPO on judges of several minds",
    claim="Where judges differ, DPO does not order completions by their mean reward but by their normalised Borda "
    "count: how often each one beats another of the data.",
    source="Shirali et al. 2025, arXiv:2502.16320",
    setup=f"Three completions, two kinds of Bradley-Terry judges with normal tastes of deviation 1.5, {PANELS} panels "
    f"a seed; the second kind judges a share of {numbers(SHARES)} of all pairs. Population DPO (every pair, weighted "
    "by its probability) at beta 1 with free logits, 400 steps of Adam.",
    run=run,
)
