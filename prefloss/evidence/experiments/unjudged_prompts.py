"""Few judged pairs, many unjudged prompts: what can be made of the prompts?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import GREY, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import at_kl, numbers, over_seeds, rows_over
from prefloss.evidence.reward_models import reward_model
from prefloss.feedback import Pairs
from prefloss.worlds import (
    Data,
    Judge,
    LogLinear,
    Tabular,
    World,
    draw,
    featured,
    kl,
    optimum,
    reward,
    sweep,
    train,
)

COUNTS = (30, 100, 300)
SHOWN = 100
UNJUDGED = 500
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
FIXED_KL = 0.5
DIRECT = "DPO on the judged pairs"
RLHF = "RLHF: reward model, exact optimum"
LABELLED = "DPO on pairs that the reward model labels"
SCORED = "its scores in the loss (RPO)"
SHARING = "DPO, a policy with the reward model's features"


def labelled(world: World, scores: Tensor, n: int, seeds: Sequence[int]) -> Data:
    """Pairs of unjudged completions as each seed's reward model would judge them; it gives its scores too."""
    # Seeds of their own: the judged pairs are of other draws.
    sets = [
        draw(world, Judge(taste=taste), Pairs, n, seeds=[10**6 + seed])
        for taste, seed in zip(scores, seeds, strict=True)
    ]
    prompt, completions = (
        torch.cat([each.prompt for each in sets]),
        torch.cat([each.completions for each in sets]),
    )
    given = torch.stack(
        [taste[at].gather(-1, of[:, :2]) for taste, at, of in zip(scores, prompt, completions, strict=True)]
    )
    fields = {"score_chosen": given[..., 0], "score_rejected": given[..., 1]}
    return Data(Pairs, prompt, completions, fields, tuple(seeds))


def arms(world: World, n: int, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Policies of each way at each beta, [betas, seeds, prompts, C], from n judged pairs."""
    judged = draw(world, Judge(), Pairs, n, seeds=seeds)
    scores = reward_model(LogLinear(world), judged)
    free, betas = Tabular(world), torch.tensor(BETAS)[:, None]
    more = labelled(world, scores, UNJUDGED, seeds)
    settings = {"steps": 200, "learning_rate": 0.1}
    two = train(free, more, [*sweep("dpo", BETAS), *sweep("rpo_bwd_kl", BETAS)], **settings).log_probs()
    return {
        DIRECT: train(free, judged, sweep("dpo", BETAS), **settings).log_probs(),
        RLHF: optimum(world, betas, scores),
        LABELLED: two[: len(BETAS)],
        SCORED: two[len(BETAS) :],
        SHARING: train(LogLinear(world), judged, sweep("dpo", BETAS), **settings).log_probs(),
    }


def run(seeds: Sequence[int]) -> Finding:
    """Give every way the same judged pairs, and compare true rewards at one KL."""
    world = featured(prompts=20, completions=20, dimensions=8)
    rows: list[dict[str, Any]] = []
    fixed: dict[str, list[Tensor]] = {}
    for n in COUNTS:
        for name, policies in arms(world, n, seeds).items():
            rewards, kls = reward(world, policies), kl(world, policies)
            fixed.setdefault(name, []).append(at_kl(kls, rewards, FIXED_KL))
            rows += rows_over("beta", BETAS, seeds, {"reward": rewards, "kl": kls}, arm=name, count=n)
    at = {name: torch.stack(values) for name, values in fixed.items()}  # counts, seeds
    shown = {name: values[COUNTS.index(SHOWN)] for name, values in at.items()}
    where = f"true reward at a KL of {FIXED_KL} nats, {SHOWN} judged pairs"
    figures = [
        over_seeds(f"{where}, {RLHF}, minus {DIRECT}", shown[RLHF] - shown[DIRECT]),
        over_seeds(f"{where}, {LABELLED}, minus {DIRECT}", shown[LABELLED] - shown[DIRECT]),
        over_seeds(f"{where}, {SCORED}, minus {RLHF}", shown[SCORED] - shown[RLHF], 0.0),
        over_seeds(f"{where}, {SHARING}, minus {RLHF}", shown[SHARING] - shown[RLHF], 0.0),
        over_seeds(f"{where}, {DIRECT}", shown[DIRECT]),
    ]
    found, change = verdict(figures)
    return Finding(_summary(figures), figures, found, rows, lambda figure: _draw(figure, world, at), change)


def verdict(figures: Sequence[Figure]) -> tuple[Verdict, str]:
    """Holds if all three uses of unjudged prompts gain; unchanged if they do so over a policy with features too."""
    rlhf, labels, scores, sharing, _ = figures
    if not (rlhf.above(0) and labels.above(0) and rlhf.value + scores.value > 0):
        return Verdict.DOES_NOT_APPEAR, ""
    if sharing.below(-0.05):
        return Verdict.HOLDS, ""
    change = "Only where the reward model sees likenesses that the policy does not: a policy with the same features "
    return Verdict.HOLDS_WITH_A_CHANGE, change + "gains nothing from unjudged prompts."


def _summary(figures: Sequence[Figure]) -> str:
    rlhf, labels, scores, sharing, direct = figures
    gained = verdict(figures)[0] is not Verdict.DOES_NOT_APPEAR
    return (
        ("Fit a reward model, if it generalises better than your policy" if gained else "No gain is shown")
        + ". With "
        f"{SHOWN} judged pairs and a KL of {FIXED_KL} nats, the true reward of RLHF is {rlhf} above that of DPO on the "
        f"judged pairs ({direct.value:.2f}), and that of DPO on pairs that the reward model labels {labels}. The "
        f"reward model's scores inside the loss differ from RLHF by {scores}. But a policy that sees the same features "
        f"as the reward model needs none of it: DPO on the judged pairs alone then differs from RLHF by {sharing}. "
        "It cannot say how well your model generalises by itself."
    )


def _draw(figure: Any, world: World, at: dict[str, Tensor]) -> None:
    (axis,) = panels(figure, 1)
    for which, (name, values) in enumerate(at.items()):
        # Three of them lie on one another.
        draw_means(axis, torch.tensor(COUNTS) * 1.05 ** (which - 2), values, name, which)
    axis.axhline(reward(world, world.reference).item(), color=GREY, linestyle=":", label="reference")
    axis.set(xlabel="judged pairs", ylabel=f"true reward at a KL of {FIXED_KL} nats", xscale="log")
    axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


EXPERIMENT = Experiment(
    name="unjudged-prompts",
    title="Few judged pairs, many unjudged prompts",
    claim="A reward model fitted to few judged pairs makes feedback out of unjudged prompts: by RLHF, by labelling "
    "pairs for DPO, or by its scores inside the loss.",
    source="asked by learners",
    setup=f"20 prompts with 20 completions of 8 features. {numbers(COUNTS)} judged Bradley-Terry pairs; the reward "
    f"model sees the features, the policy has a free logit for each completion, so it learns nothing of one from "
    f"another. The reward model labels {UNJUDGED} more pairs, by its own Bradley-Terry noise or with its scores. 7 "
    "betas from 0.25 to 16, 200 steps of Adam at 0.1.",
    run=run,
    seeds=10,
)
