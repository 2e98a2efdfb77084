"""KTO on votes against DPO on the pairs that the votes were taken from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefloss.evidence.drawing import draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds, rows_of, runs_at_kl
from prefloss.feedback import Labels, Pairs
from prefloss.worlds import Data, Judge, Runs, Tabular, bandit, draw, kl, reward, sweep, train

WORLD = bandit(prompts=4, completions=12)
N = 500
BETAS = (0.4, 1.6, 3.2, 6.4, 12.8, 25.6)
# The first decides.
KLS = (0.5, 0.25, 0.75)
# As equal counts what costs less than this share of DPO's gain over the reference.
MARGIN = 0.1


def pairs_of(seeds: Sequence[int]) -> Data:
    """Judged pairs."""
    return draw(WORLD, Judge(), Pairs, N, seeds=seeds)


def votes_of(pairs: Data, upvotes: float = 1.0) -> Data:
    """An upvote for each chosen and a downvote for each rejected completion; the first share of upvotes is kept."""
    n = len(pairs)
    kept = round(upvotes * n)
    chosen, rejected = pairs.completions[..., :1], pairs.completions[..., 1:2]
    completions = torch.cat([chosen[:, :kept], rejected], 1)
    desirable = (torch.arange(kept + n) < kept).expand(len(pairs.seeds), -1)
    prompt = torch.cat([pairs.prompt[:, :kept], pairs.prompt], 1)
    return Data(Labels, prompt, completions, {"desirable": desirable}, pairs.seeds)


def kto(upvote_weight: float = 1.0) -> str:
    """The loss, with the exact KL as its baseline."""
    return f"kto(desirable_weight={upvote_weight}, kl_baseline='column')"


def against_dpo(name: str, runs: Runs, dpo: Runs) -> list[Figure]:
    """Differences of true reward at each KL, and at the KL at which the smallest beta stops."""
    own = kl(WORLD, runs.log_probs())[0]
    there = torch.cat([runs_at_kl(dpo, target)[i : i + 1] for i, target in enumerate(own.tolist())])
    return [
        *(
            over_seeds(
                f"reward at a KL of {target} nats, {name} minus DPO",
                runs_at_kl(runs, target) - runs_at_kl(dpo, target),
            )
            for target in KLS
        ),
        over_seeds(
            f"reward at beta {BETAS[0]}, {name} minus DPO at the same KL",
            reward(WORLD, runs.log_probs())[0] - there,
        ),
    ]


def gain(dpo: Runs, target: float) -> float:
    """DPO's mean reward at a KL above that of the reference."""
    return (runs_at_kl(dpo, target) - reward(WORLD, WORLD.reference)).mean().item()


def run(seeds: Sequence[int]) -> Finding:
    """Sweep beta for both."""
    pairs = pairs_of(seeds)
    dpo = train(Tabular(WORLD), pairs, sweep("dpo", BETAS))
    votes = train(Tabular(WORLD), votes_of(pairs), sweep(kto(), BETAS))
    figures = against_dpo("KTO", votes, dpo)
    possible, stops = gain(dpo, KLS[0]), kl(WORLD, votes.log_probs())[0].mean().item()
    return Finding(
        summary=(
            f"Without the pairs' links KTO earns {figures[0].signed} against DPO at a KL of {KLS[0]} nats, where DPO "
            f"gains {possible:.2f} over the reference; {figures[1].signed} at {KLS[1]} and {figures[2].signed} at "
            f"{KLS[2]}. With a small beta it stops by itself at a KL of {stops:.1f} nats, {figures[3].signed} against "
            "DPO there."
        ),
        figures=figures,
        verdict=verdict(figures[0], possible),
        rows=[row for name, runs in (("DPO", dpo), ("KTO", votes)) for row in rows_of(runs, arm=name)],
        draw=lambda figure: draw_picture(figure, {"DPO, pairs": dpo, "KTO, votes": votes}),
        change=f"Somewhat worse than DPO, by less than {MARGIN:.0%} of its gain.",
    )


def verdict(difference: Figure, possible: float) -> Verdict:
    """Not below DPO at the first KL, or below by less than a tenth of DPO's gain."""
    if not difference.below(0):
        return Verdict.HOLDS if difference.above(-MARGIN * possible) else Verdict.DOES_NOT_APPEAR
    return Verdict.HOLDS_WITH_A_CHANGE if difference.above(-MARGIN * possible) else Verdict.DOES_NOT_APPEAR


def draw_picture(figure: Any, arms: dict[str, Runs]) -> None:
    """Reward over KL, and over beta."""
    left, right = panels(figure, 2, sharey=True)
    draw_frontier(left, WORLD)
    for which, (name, runs) in enumerate(arms.items()):
        log_probs = runs.log_probs()
        strengths = torch.tensor([loss.params["beta"] for loss in runs.losses])
        draw_means(left, kl(WORLD, log_probs), reward(WORLD, log_probs), name, which)
        draw_means(right, strengths, reward(WORLD, log_probs), name, which, dots=False)
    left.set(title="At the same KL", xlim=(0, 4))
    left.legend(frameon=False, fontsize=9)
    right.set(title="At the same beta", xlabel="beta", xscale="log")
    right.set_xticks(BETAS, [f"{beta:g}" for beta in BETAS])
    right.minorticks_off()


EXPERIMENT = Experiment(
    name="kto-unpaired",
    title="KTO on single votes against DPO on pairs",
    claim="KTO, which takes single up- and downvotes, matches DPO on the preference pairs that they come from.",
    source="Ethayarajh et al. 2024, arXiv:2402.01306, abstract and section 4",
    setup=f"4 prompts with 12 completions, normal rewards, free logits, a Bradley-Terry judge; {N} pairs of "
    f"each seed for DPO, their {2 * N} sides as votes for KTO, whose baseline is the exact KL. Beta in "
    f"{numbers(BETAS)} for both, Adam at 0.05, 300 steps.",
    run=run,
    seeds=40,
)
