"""Likelihood displacement: preferring a completion makes it less likely, and what holds it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import COLOURS, GREY, MARKERS, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds
from prefloss.evidence.statistics import mean_interval
from prefloss.feedback import Pairs
from prefloss.worlds import Data, LogLinear, Runs, World, drift, listed, train

LOSSES = {
    "DPO": "dpo",
    "IPO": "ipo(per_token=False)",
    "DPOP": "dpop",
    "DPO + NLL": "dpo_nll",
    "Cal-DPO": "cal_dpo",
}
TOKENS = ("No", "Never", "Yes")
STEPS = (0, 2, 5, 10, 20, 40, 80, 150, 300)
WORDS, DIMENSIONS = 30, 6


def example() -> World:
    """No and Never point the same way, Yes is unlike both; only the hidden state is trained."""
    features = torch.tensor([[[1.0, 0.0], [1.0, -0.3], [0.0, 1.2]]])
    reference = torch.tensor([[0.49, 0.49, 0.02]]).log()
    return World(reward=torch.tensor([[1.0, 0.0, -1.0]]), reference=reference, features=features)


def vocabulary() -> World:
    """Words with normal features, equally likely."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, WORDS, DIMENSIONS, generator=generator, dtype=torch.float64)
    return World(reward=torch.zeros(1, WORDS), reference=torch.zeros(1, WORDS), features=features)


def pair_of_each_seed(world: World, seeds: Sequence[int], alike: bool) -> Data:
    """A word drawn by each seed, preferred to the word most or least like it by the paper's score."""
    assert world.features is not None
    words = world.features[0]
    # <h_w, h_l> - |h_w|^2, the centred hidden embedding similarity (CHES).
    score = words @ words.T - (words**2).sum(-1, keepdim=True)
    score.fill_diagonal_(float("-inf") if alike else float("inf"))
    chosen = torch.stack(
        [torch.randint(WORDS, (1,), generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    rejected = score[chosen].argmax(-1) if alike else score[chosen].argmin(-1)
    completions = torch.stack([chosen, rejected], -1)
    return Data(Pairs, torch.zeros_like(chosen), completions, seeds=tuple(seeds))


def changes(world: World, pairs: Data) -> dict[str, tuple[Tensor, Tensor]]:
    """Change of the log-prob of the preferred and of the other word, [seeds] each, for each loss."""
    runs = train(LogLinear(world), pairs, list(LOSSES.values()), steps=100)
    chosen, rejected = drift(world, runs.log_probs(), pairs)
    return {name: (chosen[row], rejected[row]) for row, name in enumerate(LOSSES)}


def off_the_line(runs: Runs) -> float:
    """DPO moves along w_No - w_Never alone: largest distance of a probability from the policy there of its margin."""
    policy, features = runs.policy, runs.policy.world.features
    assert features is not None
    direction = features[0, 0] - features[0, 1]
    far = 0.0
    for theta in runs.theta.values():
        along = (theta[0, 0] @ direction) / (direction @ direction) * direction
        gap = policy.log_probs(theta[0, 0]).exp() - policy.log_probs(along).exp()
        far = max(far, gap.abs().max().item())
    return far


def run(seeds: Sequence[int]) -> Finding:
    """The example step by step, then a pair of alike and a pair of unlike words for each seed."""
    runs = train(
        LogLinear(example()),
        listed([(0, 1)]),
        list(LOSSES.values()),
        steps=STEPS[-1],
        learning_rate=0.1,
        keep=STEPS,
    )
    paths = torch.stack([runs.log_probs(step)[:, 0, 0].exp() for step in STEPS])
    end = dict(zip(LOSSES, paths[-1], strict=True))
    world = vocabulary()
    moved = {alike: changes(world, pair_of_each_seed(world, seeds, alike)) for alike in (True, False)}
    held = {
        name: over_seeds(
            f"change of the preferred word's log-prob, nats, alike pairs, {name}", moved[True][name][0]
        )
        for name in LOSSES
    }
    margins = moved[True]["DPO"][0] - moved[True]["DPO"][1]
    figures = [
        held["DPO"],
        over_seeds("margin, nats, alike pairs, DPO", margins),
        over_seeds(
            "alike minus unlike pairs, the same change, DPO", moved[True]["DPO"][0] - moved[False]["DPO"][0]
        ),
        over_seeds(
            "change of the preferred word's log-prob, nats, unlike pairs, DPO", moved[False]["DPO"][0]
        ),
        *(held[name] for name in LOSSES if name != "DPO"),
        *(Figure(f"probability of No after training, {name}", end[name][0].item()) for name in LOSSES),
        Figure(
            "example: distance of DPO's path from the line along w_No - w_Never",
            off_the_line(runs),
            None,
            0.0,
        ),
    ]
    return Finding(
        summary=(
            f"Trained to prefer No to Never, DPO takes No from 0.49 to {end['DPO'][0]:.2g} and Yes to "
            f"{end['DPO'][2]:.2f}; No ends at {end['DPOP'][0]:.2f} with DPOP and {end['DPO + NLL'][0]:.2f} "
            f"with an NLL term. Over random words the preferred one changes by {held['DPO'].value:+.2f} nats "
            f"where the two are alike and by {figures[3].value:+.2f} where they are not. Of alike words "
            f"these losses hold it up: {', '.join(name for name in LOSSES if not held[name].below(0))}."
        ),
        figures=figures,
        verdict=verdict(end["DPO"], *figures[:3]),
        rows=rows(moved, seeds),
        draw=lambda figure: draw_picture(figure, paths, moved),
        change="In the paper's own kind of example; over random words the fall, or its tie to likeness, is not clear.",
    )


def verdict(end: Tensor, fall: Figure, margin: Figure, by_likeness: Figure) -> Verdict:
    """No falls in the example; over random words the preferred one falls as the margin grows, most where alike."""
    if end[0] > 0.4 or end[2] < 0.5:
        return Verdict.DOES_NOT_APPEAR
    falls = fall.below(0) and margin.above(0) and by_likeness.below(0)
    return Verdict.HOLDS if falls else Verdict.HOLDS_WITH_A_CHANGE


def rows(moved: dict[bool, dict[str, tuple[Tensor, Tensor]]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a run of the random words."""
    return [
        {"pair": "alike" if alike else "unlike", "loss": name, "seed": seed}
        | {"chosen": chosen[i].item(), "rejected": rejected[i].item()}
        for alike, losses in moved.items()
        for name, (chosen, rejected) in losses.items()
        for i, seed in enumerate(seeds)
    ]


def draw_picture(figure: Any, paths: Tensor, moved: dict[bool, dict[str, tuple[Tensor, Tensor]]]) -> None:
    """DPO's probabilities over steps, No's over steps for each loss, and the change over random words."""
    figure.set_size_inches(12, 4)
    left, middle, right = panels(figure, 3)
    for token, name in enumerate(TOKENS):
        left.plot(STEPS, paths[:, 0, token], color=COLOURS[token], marker=MARKERS[token], label=name)
    for row, name in enumerate(LOSSES):
        middle.plot(STEPS, paths[:, row, 0], color=COLOURS[row], marker=MARKERS[row], label=name)
    for axis, title in ((left, "DPO, No preferred to Never"), (middle, "No, by loss")):
        axis.set(xlabel="optimizer steps", ylabel="probability", ylim=(-0.03, 1.03), title=title)
        axis.set_xscale("symlog", linthresh=STEPS[1])
        axis.set_xlim(0, STEPS[-1] * 1.1)
        axis.set_xticks(STEPS[:2] + STEPS[3:], [str(step) for step in STEPS[:2] + STEPS[3:]])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9)
    for alike, shift in ((True, -0.15), (False, 0.15)):
        means = torch.tensor([mean_interval(chosen.tolist()) for chosen, _ in moved[alike].values()])
        places, bars = [i + shift for i in range(len(LOSSES))], (means[:, :1].T - means[:, 1:].T).abs()
        label = "most alike" if alike else "least alike"
        right.errorbar(
            places, means[:, 0], bars, fmt="os"[not alike], color=COLOURS[not alike], capsize=3, label=label
        )
    right.axhline(0, color=GREY, linewidth=1)
    right.set_xticks(range(len(LOSSES)), list(LOSSES), fontsize=9)
    right.set(ylabel="change of log-prob of the preferred, nats", title="Random words, by pair")
    right.legend(frameon=False, fontsize=9)


EXPERIMENT = Experiment(
    name="displacement",
    title="Likelihood displacement, and what holds the preferred answer up",
    claim="Preference learning can lower the probability of the preferred response while the margin grows, "
    "and move it to one of opposite meaning, most where preferred and rejected are alike in the hidden space.",
    source="Razin et al. 2024, arXiv:2410.08847, section 4 and definition 2 (CHES)",
    setup="Three tokens: No and Never have like features, Yes differs; reference 0.49, 0.49, 0.02; only the "
    f"hidden state is trained, Adam at 0.1. Then {WORDS} words with {DIMENSIONS} normal features, uniform "
    "reference; each seed draws a word, preferred to the one most and to the one least like it; 100 steps at "
    "0.05. Losses at their defaults.",
    run=run,
)
