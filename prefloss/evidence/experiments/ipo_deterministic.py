"""IPO against DPO on preferences without doubt: two actions, and data sets over three actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import BLUE, GREY, ORANGE, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import numbers, over_seeds
from prefloss.feedback import Pairs
from prefloss.worlds import Data, Tabular, World, sweep, train

TAUS = (0.1, 0.3, 0.5, 1.0)
LOSSES = {"IPO": "ipo(per_token=False)", "DPO": "dpo"}
# Actions are numbers; the first of a pair is preferred.
SETS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "two actions {ab}": (2, [(0, 1)]),
    "D1 = {ab, bc, ac}": (3, [(0, 1), (1, 2), (0, 2)]),
    "D3 = {ab, ba}": (3, [(0, 1), (1, 0)]),
    "D3' = {ab, ba, ac}": (3, [(0, 1), (1, 0), (0, 2)]),
}
D1, D3, ALWAYS_LOST = list(SETS)[1:]

# Probabilities [taus, seeds, actions] of each set and loss.
Fits = dict[str, dict[str, Tensor]]


def closed_form(data: str, taus: Tensor) -> Tensor:
    """IPO's optimum under a uniform reference: probabilities, [taus, actions]."""
    # Log-ratio gaps to the first action, in units of 1 / (2 tau).
    gaps = {"two": (0.0, -1.0), "D1": (0.0, -2 / 3, -4 / 3), "D3": (0.0, 0.0, 0.0), "D3'": (0.0, 0.0, -1.0)}
    return torch.softmax(torch.tensor(gaps[data.split()[0]]).double() / (2 * taus[:, None]), -1)


def fitted(
    names: Sequence[str], data: Data, steps: int, learning_rate: float, batch_size: int | None = None
) -> Fits:
    """Probabilities of the actions after training, [taus, seeds, actions], for each set and loss.

    The sets are of as many actions each, and stand one after the other where data has its seeds.
    """
    actions = SETS[names[0]][0]
    policy = Tabular(World(reward=torch.zeros(1, actions), reference=torch.zeros(1, actions)))
    losses = [loss for name in LOSSES.values() for loss in sweep(name, TAUS)]
    runs = train(policy, data, losses, steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    probs = runs.log_probs()[:, :, 0].exp().unflatten(1, (len(names), -1)).unflatten(0, (len(LOSSES), -1))
    return {
        name: {loss: probs[row, :, at] for row, loss in enumerate(LOSSES)} for at, name in enumerate(names)
    }


def drawn_pairs(names: Sequence[str], n: int, seeds: Sequence[int]) -> Data:
    """N pairs for each set and seed, drawn with replacement."""
    draws = []
    for name in names:
        pairs = torch.tensor(SETS[name][1])
        for seed in seeds:
            draws.append(
                pairs[torch.randint(len(pairs), (n,), generator=torch.Generator().manual_seed(seed))]
            )
    completions = torch.stack(draws)
    return Data(Pairs, torch.zeros_like(completions[..., 0]), completions, seeds=tuple(seeds) * len(names))


def all_of(names: Sequence[str]) -> Data:
    """Every pair of each set equally often."""
    most = math.lcm(*(len(SETS[name][1]) for name in names))
    sets = [torch.tensor(SETS[name][1]) for name in names]
    completions = torch.stack([pairs.repeat(most // len(pairs), 1) for pairs in sets])
    return Data(Pairs, torch.zeros_like(completions[..., 0]), completions, seeds=tuple(range(len(names))))


def run(seeds: Sequence[int], steps: int = 1000) -> Finding:
    """Train to the optimum on each whole set, and as the paper does on batches of 9 draws."""
    two, *three = SETS
    whole = fitted([two], all_of([two]), 500, 0.1) | fitted(three, all_of(three), 500, 0.1)
    drawn = fitted(three, drawn_pairs(three, 9 * steps, seeds), steps, 0.01, batch_size=9)
    taus = torch.tensor(TAUS, dtype=torch.float64)
    off = {name: (whole[name]["IPO"][:, 0] - closed_form(name, taus)).abs().max().item() for name in SETS}
    winner = min(whole[name]["DPO"][:, 0, 0].min().item() for name in list(SETS)[:2])
    lost, paper = ({loss: whole[name][loss][:, 0, 2] for loss in LOSSES} for name in (ALWAYS_LOST, D3))
    most, at = max(off.values()), TAUS.index(0.5)
    a_on_d1 = {loss: drawn[D1][loss][at, :, 0] for loss in LOSSES}
    figures = [
        Figure(
            "IPO: largest distance of a probability from the closed form, all sets and tau", most, None, 0.0
        ),
        Figure("DPO: smallest probability of the winner over tau, two actions and D1", winner, None, 1.0),
        Figure("DPO: largest probability of what always lost in D3'", lost["DPO"].max().item(), None, 0.0),
        Figure("both: probability of c on the paper's D3", paper["DPO"].mean().item(), None, 1 / 3),
        over_seeds(
            "IPO: probability of a on D1, tau 0.5, batches",
            a_on_d1["IPO"],
            closed_form(D1, taus)[at, 0].item(),
        ),
        over_seeds("DPO: probability of a on D1, tau 0.5, batches", a_on_d1["DPO"], 1.0),
    ]
    return Finding(
        summary=(
            f"IPO's optimum is within {most:.0e} of the closed form on every set; DPO gives the winner at "
            f"least {winner:.4f} whatever tau is. In D3' DPO leaves the action that always lost "
            f"{lost['DPO'].max():.1e}, IPO {lost['IPO'].min():.3f} to {lost['IPO'].max():.3f}. On the paper's own D3 "
            f"both leave it {paper['DPO'].mean():.3f}."
        ),
        figures=figures,
        verdict=verdict(most, winner, lost, paper),
        rows=rows(drawn, seeds),
        draw=lambda figure: draw(figure, whole, drawn),
        change="The paper's D3 = {ab, ba} never mentions the third action, so no loss moves it. With ac "
        "added, as D3', the difference shows.",
    )


def verdict(off: float, winner: float, lost: dict[str, Tensor], paper: dict[str, Tensor]) -> Verdict:
    """IPO on the closed forms to 1e-3 and DPO at the corner; unchanged only if the paper's D3 shows it too."""
    if off > 1e-3 or winner < 0.99 or lost["DPO"].max() > 0.01:
        return Verdict.DOES_NOT_APPEAR
    apart = paper["IPO"].min() > 2 * paper["DPO"].max()
    return Verdict.HOLDS if apart else Verdict.HOLDS_WITH_A_CHANGE


def rows(drawn: Fits, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a run, with the probabilities of a, b and c."""
    return [
        {"data": name, "loss": loss, "tau": tau, "seed": seed}
        | {f"p_{action}": p[i, j, k].item() for k, action in enumerate("abc")}
        for name, fits in drawn.items()
        for loss, p in fits.items()
        for i, tau in enumerate(TAUS)
        for j, seed in enumerate(seeds)
    ]


def seeds_of(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Points of a scatter plot, from [taus, seeds]."""
    return torch.tensor(TAUS)[:, None].expand_as(probs) * 1.04, probs


def draw(figure: Any, whole: Fits, drawn: Fits) -> None:
    """Probability of one action over tau, a panel for each set."""
    figure.set_size_inches(11, 3.4)
    grid = torch.linspace(0.08, 1.05, 200, dtype=torch.float64)
    axes = panels(figure, len(SETS), sharey=True)
    for axis, name in zip(axes, SETS, strict=True):
        action = 2 if name.startswith("D3") else 0
        axis.plot(
            grid, closed_form(name, grid)[:, action], color=GREY, linestyle="--", label="IPO, closed form"
        )
        for loss, colour, marker in (("IPO", BLUE, "o"), ("DPO", ORANGE, "s")):
            exact = whole[name][loss][:, 0, action]
            axis.plot(
                TAUS, exact, marker, color=colour, fillstyle="none", markersize=8, label=f"{loss}, whole set"
            )
            if name in drawn:
                axis.scatter(
                    *seeds_of(drawn[name][loss][..., action]),
                    s=9,
                    color=colour,
                    label=f"{loss}, a seed's batches",
                )
        axis.set(title=name, xlabel="tau, 1/nats", ylim=(-0.03, 1.05))
        axis.set_ylabel(f"probability of {'c' if action == 2 else 'a'}")
        axis.yaxis.set_tick_params(labelleft=True)
    axes[-1].legend(frameon=False, loc="upper right", fontsize=9)


EXPERIMENT = Experiment(
    name="ipo-deterministic",
    title="IPO and DPO where preferences are certain",
    claim="Where one action always wins, DPO's optimum gives it all the probability, however strong the "
    "regularisation; IPO's optimum stays at a distance of the reference that tau sets.",
    source="Azar et al. 2023, arXiv:2310.12036, sections 5.3 and 5.4",
    setup="Two or three actions, uniform reference, free logits; tau of IPO and beta of DPO in "
    f"{numbers(TAUS)}. Optimum: Adam at 0.1, 500 steps on the whole set. As in the paper: Adam at 0.01, "
    "batches of 9 draws with replacement, 1,000 steps (the paper: 18,000).",
    run=run,
    seeds=10,
)
