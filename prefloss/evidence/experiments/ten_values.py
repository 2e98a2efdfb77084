"""Ten values of feedback against two, and against better, tie or worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import at_kl, over_seeds, rows_of
from prefloss.feedback import Pairs
from prefloss.worlds import Data, Judge, LogLinear, draw, featured, kl, reward, sweep, train

PAIRS = 100
BETAS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
FIXED_KL = 0.5
LEVELS = (2, 3, 5, 10)
DROPPED, HALVED = "better or worse, ties dropped", "better, tie, worse"
LABELS = {
    "dpo": "DPO",
    "rpo_sq": "RPO (squared), reads ratings",
    "soft_label_dpo": "soft-label DPO, tie = half",
}
# Sure enough: sigmoid(6) is 0.998.
SURE = 6.0


def rated(data: Data, levels: int) -> Data:
    """The same pairs with both completions rated on equally frequent levels, worth the mean score of the level each."""
    scores = torch.stack([data.fields["score_chosen"], data.fields["score_rejected"]], -1)
    order = scores.flatten(1).argsort(-1).argsort(-1)
    level = order * levels // order.shape[-1]
    mean = torch.zeros(len(scores), levels).double()
    mean = mean.scatter_reduce(-1, level, scores.flatten(1), "mean", include_self=False)
    worth = mean.gather(-1, level).view_as(scores)
    return with_scores(data, worth[..., 0], worth[..., 1])


def with_scores(data: Data, chosen: Tensor, rejected: Tensor) -> Data:
    """The same pairs with other scores."""
    return replace(data, fields={"score_chosen": chosen, "score_rejected": rejected})


def decided(data: Data, least: Tensor | float = 0.0) -> Data:
    """The same pairs, weighted 0 where the scores do not differ by more than this."""
    gap = data.fields["score_chosen"] - data.fields["score_rejected"]
    return replace(data, fields={"weight": (gap > least).double()})


def verdicts(data: Data) -> tuple[Data, Data]:
    """Better, tie or worse, with a third of the pairs tied: ties dropped, and ties as scores that do not differ."""
    gap = data.fields["score_chosen"] - data.fields["score_rejected"]
    least = gap.quantile(1 / 3, -1, keepdim=True)
    return decided(data, least), with_scores(data, SURE * (gap > least), torch.zeros_like(gap))


def run(seeds: Sequence[int]) -> Finding:
    """Give the same pairs and the same judge's opinion at several finenesses, and compare true rewards at one KL."""
    world = featured(prompts=2, completions=50, dimensions=8)
    data = draw(world, Judge(), Pairs, PAIRS, seeds=seeds)
    dropped, halved = verdicts(data)
    fed = {("order of each pair", "dpo"): data, (DROPPED, "dpo"): dropped, (HALVED, "soft_label_dpo"): halved}
    for levels in LEVELS:
        ratings = rated(data, levels)
        fed |= {(f"{levels} values", "dpo"): decided(ratings), (f"{levels} values", "rpo_sq"): ratings}
    fed["exact scores", "rpo_sq"] = data
    rows: list[dict[str, Any]] = []
    at: dict[tuple[str, str], Tensor] = {}
    for (name, loss), given in fed.items():
        runs = train(LogLinear(world), given, sweep(loss, BETAS), steps=200)
        rows += rows_of(runs, feedback=name)
        at[name, loss] = at_kl(kl(world, runs.log_probs()), reward(world, runs.log_probs()), FIXED_KL)
    where = f"true reward at a KL of {FIXED_KL} nats"
    order = at["order of each pair", "dpo"]
    figures = [
        over_seeds(
            f"{where}, RPO (squared): 10 values minus 2", at["10 values", "rpo_sq"] - at["2 values", "rpo_sq"]
        ),
        over_seeds(f"{where}, DPO: 10 values minus 2", at["10 values", "dpo"] - at["2 values", "dpo"]),
        over_seeds(
            f"{where}: 10 values (RPO) minus the order of each pair (DPO)", at["10 values", "rpo_sq"] - order
        ),
        over_seeds(
            f"{where}: exact scores minus 10 values (RPO)",
            at["exact scores", "rpo_sq"] - at["10 values", "rpo_sq"],
        ),
        over_seeds(
            f"{where}: ties as half and half minus ties dropped",
            at[HALVED, "soft_label_dpo"] - at[DROPPED, "dpo"],
        ),
        over_seeds(
            f"{where}: ties as half and half minus the order of each pair",
            at[HALVED, "soft_label_dpo"] - order,
        ),
    ]
    return Finding(_summary(figures), figures, verdict(figures), rows, lambda figure: _draw(figure, at))


def verdict(figures: Sequence[Figure]) -> Verdict:
    """Holds if ten values are better than two for both losses."""
    return Verdict.HOLDS if figures[0].above(0) and figures[1].above(0) else Verdict.DOES_NOT_APPEAR


def _summary(figures: Sequence[Figure]) -> str:
    graded, plain, order, exact, ties, three = figures
    shown = "Yes" if verdict(figures) is Verdict.HOLDS else "Not for both losses"
    return (
        f"{shown}: with {PAIRS} pairs, each completion rated by itself, and a KL of {FIXED_KL} nats, ten values earn "
        f"{graded} over thumbs up or down where the loss reads the ratings, and {plain} with DPO, which then loses "
        f"fewer pairs to equal ratings. Over just asking which of the two is better they earn {order}; exact "
        f"scores add {exact}. Better, tie or worse: to count a tie as half and half earns {ties} over dropping it, and "
        f"{three} over forcing a choice. The rater here uses its scale evenly; it cannot say what careless raters do."
    )


def _draw(figure: Any, at: dict[tuple[str, str], Tensor]) -> None:
    (axis,) = panels(figure, 1)
    names = list(dict.fromkeys(name for name, _ in at))
    for which, (loss, label) in enumerate(LABELS.items()):
        places = [(names.index(name), values) for (name, used), values in at.items() if used == loss]
        x, y = zip(*places, strict=True)
        draw_means(axis, torch.tensor(x) + 0.12 * (which - 1), torch.stack(y), label, which)
        axis.lines[-1].set_linestyle("none")
    axis.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    axis.set(ylabel=f"true reward at a KL of {FIXED_KL} nats")
    axis.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="ten-values",
    title="Ten values of feedback against two",
    claim="Finer feedback teaches more: ten values more than thumbs up or down, and a third answer, tie, more than a "
    "forced choice.",
    source="asked by learners",
    setup=f"2 prompts, 50 completions with 8 features, a log-linear policy. One noisy Bradley-Terry judge scores both "
    f"completions of {PAIRS} pairs; from the same scores come the order, ratings on 2 to 10 equally frequent levels "
    "(each worth the mean score of its level), and better, tie or worse with a third of ties. DPO drops ties; RPO "
    "(squared) reads ratings; soft-label DPO counts a tie as half and half. 8 betas, 200 steps of Adam.",
    run=run,
    seeds=15,
)
