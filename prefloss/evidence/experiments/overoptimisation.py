"""Over-optimisation: the true reward has a peak over KL, and the implicit accuracy does not show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefloss.evidence.drawing import draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds, rows_of
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, LogLinear, Runs, Tabular, World, accuracy, draw, kl, reward, sweep, train

BETAS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.5, 3.0)
# Fixed beforehand: the best point of a line through normal features is near the first, and the second is far beyond.
NEAR, FAR = BETAS.index(0.5), BETAS.index(0.05)


def hump_world(completions: int = 1500, dimensions: int = 4) -> World:
    """Features of deviation 2; the reference mostly says those near 0, and the reward falls again far out."""
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(1, completions, dimensions, generator=generator, dtype=torch.float64)
    squares = (features**2).sum(-1)
    return World(reward=features[..., 0] - 0.225 * squares, reference=-0.375 * squares, features=features)


def run(seeds: Sequence[int], steps: int = 300) -> Finding:
    """Sweep DPO over beta with shared features and with a free logit for each completion, on the same pairs."""
    world = hump_world()
    data = draw(world, Judge(), Pairs, 300, seeds=seeds)
    held_out = draw(world, Judge(temperature=0.0), Pairs, 2000, seeds=[2**20])
    runs = {
        "shared features": train(LogLinear(world), data, sweep("dpo", BETAS), steps=steps, learning_rate=0.1),
        "free logits": train(Tabular(world), data, sweep("dpo", BETAS), steps=steps, learning_rate=0.1),
    }
    rewards = {name: reward(world, each.log_probs()) for name, each in runs.items()}
    shared = runs["shared features"].log_probs()
    share = accuracy(world, shared, held_out)
    figures = [
        over_seeds(
            f"true reward at beta {BETAS[NEAR]} minus that at {BETAS[FAR]}, shared features",
            rewards["shared features"][NEAR] - rewards["shared features"][FAR],
        ),
        over_seeds("the same with free logits", rewards["free logits"][NEAR] - rewards["free logits"][FAR]),
        over_seeds(
            f"held-out implicit accuracy at beta {BETAS[FAR]} minus that at {BETAS[NEAR]}, shared features",
            share[FAR] - share[NEAR],
        ),
        over_seeds(f"KL at beta {BETAS[NEAR]}, nats, shared features", kl(world, shared)[NEAR]),
        over_seeds(f"KL at beta {BETAS[FAR]}, nats, shared features", kl(world, shared)[FAR]),
    ]
    fall, free, change, near, far = figures
    return Finding(
        summary=(
            f"With shared features the true reward falls by {fall.value:.2f} from a KL of {near.value:.1f} to "
            f"one of {far.value:.1f} nats, while the implicit accuracy on held-out pairs changes by "
            f"{change.value:+.3f}: it does not tell. With free logits the reward changes by "
            f"{-free.value:+.2f} between the same betas."
        ),
        figures=figures,
        verdict=verdict(fall, free, change),
        rows=[row for name, each in runs.items() for row in rows_of(each, held_out, policy=name)],
        draw=lambda figure: draw_picture(figure, world, runs, held_out),
        change="It needs completions that share features, and a reward that falls again beyond what the "
        "reference says: the same data do not show it with a free logit for each completion.",
    )


def verdict(fall: Figure, free: Figure, change: Figure) -> Verdict:
    """The reward falls far out and the accuracy does not fall with it; unchanged if free logits show it too."""
    if not fall.above(0) or change.below(-0.02):
        return Verdict.DOES_NOT_APPEAR
    return Verdict.HOLDS if free.above(0) else Verdict.HOLDS_WITH_A_CHANGE


def draw_picture(figure: Any, world: World, runs: dict[str, Runs], held_out: Any) -> None:
    """True reward and implicit accuracy over KL."""
    left, right = panels(figure, 2)
    for which, (name, each) in enumerate(runs.items()):
        log_probs = each.log_probs()
        draw_means(left, kl(world, log_probs), reward(world, log_probs), name, which)
        draw_means(right, kl(world, log_probs), accuracy(world, log_probs, held_out), name, which)
    left.axhline(reward(world, world.reference), color="k", linestyle=":", label="reference")
    left.set(xlabel="KL(policy ‖ reference), nats", ylabel="true reward", title="True reward")
    right.set(xlabel="KL(policy ‖ reference), nats", title="Implicit accuracy")
    right.set(ylabel="held-out pairs ordered as the truth", ylim=(0.45, 1.0))
    left.legend(frameon=False)


EXPERIMENT = Experiment(
    name="over-optimisation",
    title="Over-optimisation: true reward and accuracy far from the reference",
    claim="Direct alignment over-optimises as RLHF does: over KL the true reward rises, peaks and falls, and "
    "the implicit reward's accuracy does not predict it.",
    source="Rafailov et al. 2024, arXiv:2406.02900, abstract and section 3",
    setup="1,500 completions with 4 normal features; the reward is the first feature minus 0.225 times the "
    "sum of squares, the reference mostly says those near 0. 300 pairs from it, a Bradley-Terry judge; DPO, "
    f"beta in {numbers(BETAS)}, Adam at 0.1, 300 steps. Policies: a weight for each feature, or a free logit for each "
    "completion.",
    run=run,
)
