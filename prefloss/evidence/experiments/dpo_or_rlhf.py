"""DPO or RLHF? The same pairs, with and without a reward model between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import GREY, draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import at_kl, over_seeds, rows_over
from prefloss.evidence.reward_models import reward_model
from prefloss.feedback import Pairs
from prefloss.worlds import (
    Data,
    Judge,
    LogLinear,
    Policy,
    Tabular,
    World,
    bandit,
    climb,
    draw,
    kl,
    optimum,
    reward,
    train,
)

BETAS = (0.2, 0.3, 0.5, 0.8, 1.2, 1.6)
MIDDLE = 0.5
FIXED_KL = 0.5
PLAIN = "DPO, and RLHF that sees as much"
RICHER = "RLHF, reward model sees the squares too"
BOTH = "DPO or RLHF, all see the squares too"
SAMPLED = "RLHF, sampled"
DIFFERENCE = f"largest difference of a probability between DPO and RLHF at beta {BETAS[0]}"


def wide_world(completions: int = 1000, dimensions: int = 4) -> World:
    """Normal features of deviation 2, a reference that mostly says those near 0, and a reward with a hump."""
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(1, completions, dimensions, generator=generator, dtype=torch.float64)
    squares = (features**2).sum(-1)
    return World(reward=features[..., 0] - 0.225 * squares, reference=-0.375 * squares, features=features)


def with_squares(world: World) -> World:
    """The same world whose features have their squares beside them."""
    assert world.features is not None
    return replace(world, features=torch.cat([world.features, world.features**2], -1))


def difference(policy: Policy, data: Data) -> float:
    """Largest difference of a probability between DPO and the closed-form optimum for a reward model, both alike."""
    beta = BETAS[0]
    # DPO's log-ratios are the scores divided by beta; so is its step.
    direct = train(policy, data, f"dpo(beta={beta})", learning_rate=0.05 / beta).log_probs()[0]
    return (direct.exp() - optimum(policy.world, beta, reward_model(policy, data)).exp()).abs().max().item()


def arms(world: World, data: Data, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Policies of each way at each beta, [betas, seeds, prompts, C]."""
    narrow, wide = LogLinear(world), LogLinear(with_squares(world))
    betas, squared = torch.tensor(BETAS)[:, None], reward_model(wide, data)
    climbing = {"seeds": seeds, "steps": 200, "learning_rate": 0.1}
    return {
        PLAIN: optimum(world, betas, reward_model(narrow, data)),
        RICHER: climb(narrow, squared, BETAS, **climbing),
        BOTH: optimum(world, betas, squared),
        SAMPLED: climb(narrow, squared, BETAS[:1], samples=8, **climbing),
    }


def run(seeds: Sequence[int]) -> Finding:
    """Compare the two in a table, with the same features, and with a reward model that sees more or less."""
    table = Tabular(bandit(completions=20))
    judged = draw(table.world, Judge(), Pairs, 500, seeds=seeds)
    world = wide_world()
    data = draw(world, Judge(), Pairs, 300, seeds=seeds)
    policies = arms(world, data, seeds)
    rewards = {name: reward(world, policy) for name, policy in policies.items()}
    kls = {name: kl(world, policy) for name, policy in policies.items()}
    in_table = difference(table, judged)
    alike = max(difference(policy, data) for policy in (LogLinear(world), LogLinear(with_squares(world))))
    figures = [
        Figure(f"{DIFFERENCE}, in a table", in_table, expected=0.0),
        Figure(f"{DIFFERENCE}, same features", alike, expected=0.0),
        *_gaps(rewards, {name: at_kl(kls[name], rewards[name], FIXED_KL) for name in (PLAIN, RICHER, BOTH)}),
    ]
    sampled = rewards.pop(SAMPLED)[0] - rewards[RICHER][0]
    name = f"true reward at beta {BETAS[0]}, policy gradient with 8 samples a step minus exact gradient"
    figures.append(over_seeds(name, sampled))
    rows = []
    for arm in rewards:
        rows += rows_over("beta", BETAS, seeds, {"reward": rewards[arm], "kl": kls[arm]}, arm=arm)
    found, change = verdict(figures)
    return Finding(
        _summary(figures), figures, found, rows, lambda figure: _draw(figure, world, rewards, kls), change
    )


def _gaps(rewards: dict[str, Tensor], fixed: dict[str, Tensor]) -> list[Figure]:
    """What a reward model that sees more, and a policy that sees more, are worth."""
    more, less = (
        "true reward, RLHF whose reward model sees more than the policy, minus DPO",
        "true reward, DPO whose policy sees more than the reward model, minus RLHF",
    )
    first, middle = (
        {name: values[BETAS.index(beta)] for name, values in rewards.items() if name != SAMPLED}
        for beta in (BETAS[0], MIDDLE)
    )
    return [
        over_seeds(f"{more}, beta {BETAS[0]}", first[RICHER] - first[PLAIN]),
        over_seeds(f"{more}, beta {MIDDLE}", middle[RICHER] - middle[PLAIN]),
        over_seeds(f"{more}, KL of {FIXED_KL:g} nats", fixed[RICHER] - fixed[PLAIN]),
        over_seeds(f"{less}, beta {BETAS[0]}", first[BOTH] - first[PLAIN]),
        over_seeds(f"{less}, KL of {FIXED_KL:g} nats", fixed[BOTH] - fixed[PLAIN]),
    ]


def verdict(figures: Sequence[Figure]) -> tuple[Verdict, str]:
    """Holds if they are equal to 0.001 where they see the same and apart, both ways round, where they do not."""
    in_table, alike, richer, richer_middle, richer_fixed, poorer, _, _ = figures
    if max(in_table.value, alike.value) > 1e-3 or not (richer.above(0) and poorer.above(0)):
        return Verdict.DOES_NOT_APPEAR, ""
    if richer_middle.above(0) and richer_fixed.above(0):
        return Verdict.HOLDS, ""
    change = (
        f"A reward model that sees more than the policy helps at beta {BETAS[0]}, where DPO goes too far; at beta "
        f"{MIDDLE} the difference is {richer_middle.value:+.2f} and at equal KL {richer_fixed.value:+.2f}."
    )
    return Verdict.HOLDS_WITH_A_CHANGE, change


def _summary(figures: Sequence[Figure]) -> str:
    in_table, alike, richer, middle, fixed, poorer, poorer_fixed, _ = (figure.value for figure in figures)
    return (
        "Take the one that is easier for you to run. From the same pairs both end at the same policy where policy and "
        f"reward model see the same: probabilities differ by {max(in_table, alike):.0e} at most. If the reward model "
        f"sees more than the policy, RLHF minus DPO is {richer:+.2f} of reward at beta {BETAS[0]}, where DPO goes too "
        f"far and RLHF stops by itself, {middle:+.2f} at beta {MIDDLE}, and {fixed:+.2f} at a KL of "
        f"{FIXED_KL:g} nats. If the reward model sees less, DPO is better by {poorer:.2f} (at that KL by "
        f"{poorer_fixed:.2f}). This cannot show which case your language model is in, nor what sampling costs at scale."
    )


def _draw(figure: Any, world: World, rewards: dict[str, Tensor], kls: dict[str, Tensor]) -> None:
    left, right = panels(figure, 2, sharey=True)
    for which, (name, values) in enumerate(rewards.items()):
        draw_means(left, torch.tensor(BETAS), values, name, which, dots=False)
        draw_means(right, kls[name], values, name, which)
    start = reward(world, world.reference).item()
    left.axhline(start, color=GREY, linestyle=":", label="reference")
    left.set(xlabel="beta (small: far from the reference)", ylabel="true reward", xscale="log")
    left.set_xticks(BETAS, [str(beta) for beta in BETAS])
    left.minorticks_off()
    left.legend(fontsize=8)
    draw_frontier(right, world)
    right.set(xlim=(0, 6), ylim=(start - 0.7, 1), ylabel="")
    right.legend(*([part[-1]] for part in right.get_legend_handles_labels()), fontsize=8)


EXPERIMENT = Experiment(
    name="dpo-or-rlhf",
    title="DPO or RLHF?",
    claim="From the same pairs, DPO and RLHF end at the same policy where the reward model sees what the policy sees; "
    "with a reward model that sees more, RLHF is better, and with one that sees less, DPO is.",
    source="asked by learners; Rafailov et al. 2023, arXiv:2305.18290, section 4, and Shi et al. 2025, "
    "arXiv:2505.19770, section 3",
    setup="A table of 20 completions with 500 judged pairs; and 1,000 completions with 4 features, whose reward falls "
    "again far out (feature 1 minus 0.225 times the sum of squares), with 300 pairs. RLHF fits a Bradley-Terry reward "
    "model to the pairs of DPO, then takes the exact KL-regularised optimum, or climbs to the best policy of the "
    "family by gradient where the family has no such optimum. DPO and the reward model take the same 300 steps of "
    "Adam.",
    run=run,
)
