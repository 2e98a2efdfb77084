"""How far is far? What a KL of 1, 3 and 10 nats does to samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import draw_means
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds, rows_over
from prefloss.evidence.reward_models import reward_model
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, LogLinear, World, draw, kl, reward, win_rate
from prefloss.worlds.language import LanguageWorld, true_reward, words

PROMPT = "Tell me about the sea:"
SENTENCES = 30_000
PAIRS = 300
KLS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)
SHOWN = (1.0, 3.0, 10.0)
TRUE, WINS = "true reward", "win rate against the reference"
OVERLAP, COUNT = "overlap with the reference", "different sentences, effectively"


def written(count: int = SENTENCES) -> tuple[World, list[str]]:
    """Answers of the language world to one prompt, as often as drawn, and their words as features."""
    source = LanguageWorld(seed=0)
    drawn = Counter(source.completion(PROMPT) for _ in range(count))
    texts = list(drawn)
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in texts for word in words(text)}))}
    found = torch.tensor(
        [(row, vocabulary[word]) for row, text in enumerate(texts) for word in words(text)]
    ).T
    features = torch.zeros(len(texts), len(vocabulary)).index_put_(
        tuple(found), torch.ones(()), accumulate=True
    )
    rewards = torch.tensor([[true_reward(PROMPT, text) for text in texts]])
    counts = torch.tensor([[float(drawn[text]) for text in texts]])
    return World(reward=rewards, reference=counts.log(), features=features[None]), texts


def best_of(n: float) -> float:
    """KL of taking the best of n samples, where no two are equally good: log n - (n - 1) / n, nats."""
    return math.log(n) - (n - 1) / n


def samples_for(distance: float) -> float:
    """The n whose best is that far."""
    low, high = 0.0, distance + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if best_of(math.exp(middle)) < distance else (low, middle)
    return math.exp(low)


def at_distance(world: World, scores: Tensor, distance: float) -> Tensor:
    """The optimum for scores [seeds, prompts, C] whose KL is this, [seeds, prompts, C]; beta is found by halving."""
    low, high = (torch.full((len(scores),), value).double() for value in (-8.0, 8.0))
    policies = world.reference.expand_as(scores)
    for _ in range(30 if distance else 0):
        middle = (low + high) / 2
        policies = torch.log_softmax(world.reference + scores / middle.exp()[:, None, None], -1)
        near = kl(world, policies) < distance
        low, high = torch.where(near, low, middle), torch.where(near, middle, high)
    return policies


def said(policy: Tensor, texts: Sequence[str], count: int = 3) -> list[str]:
    """Samples of a policy, [1, C], log-probs."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.searchsorted(policy[0].exp().cumsum(-1), drawn).clamp_max(len(texts) - 1)
    return [texts[int(i)].strip() for i in index]


def run(seeds: Sequence[int]) -> Finding:
    """Let DPO's implicit reward carry the reference to each KL, and look at what it says there."""
    world, texts = written()
    scores = reward_model(LogLinear(world), draw(world, Judge(), Pairs, PAIRS, seeds=seeds), steps=100)
    policies = torch.stack([at_distance(world, scores, distance) for distance in KLS])
    start = world.reference.exp()
    measured = {
        TRUE: reward(world, policies),
        WINS: win_rate(world, policies),
        OVERLAP: torch.minimum(policies.exp(), start).sum(-1).mean(-1),
        COUNT: (-(policies.exp() * policies).sum(-1)).mean(-1).exp(),
    }
    figures = [
        over_seeds(f"{name}, KL {distance:g}", values[KLS.index(distance)])
        for name, values in measured.items()
        for distance in SHOWN
    ]
    rows = rows_over("kl", KLS, seeds, measured)
    samples = {distance: said(policies[KLS.index(distance), 0], texts) for distance in (0.0, *SHOWN)}
    whole = measured[COUNT][0, 0].item()
    return Finding(
        summary=_summary(figures, whole, measured[TRUE][0, 0].item()),
        figures=figures,
        verdict=verdict(figures, whole),
        rows=rows,
        draw=lambda figure: _draw(figure, measured[TRUE], samples),
    )


def verdict(figures: Sequence[Figure], whole: float) -> Verdict:
    """Holds if half of the samples is left at 1 nat, a third at most at 3, and 1 % of the sentences at most at 10."""
    overlap, count = figures[6:9], figures[9:12]
    found = overlap[0].above(1 / 3) and overlap[1].below(1 / 3) and count[2].below(whole / 100)
    return Verdict.HOLDS if found else Verdict.DOES_NOT_APPEAR


def _summary(figures: Sequence[Figure], whole: float, start: float) -> str:
    value = [figure.value for figure in figures]
    rewards, wins, overlap, count = value[:3], value[3:6], value[6:9], value[9:12]
    return (
        f"1 nat is another tone: {overlap[0]:.0%} of the samples could still be the reference's, and they win "
        f"{wins[0]:.0%} of the time against it. 3 nats are another model ({overlap[1]:.0%} and {wins[1]:.0%}). 10 nats "
        f"are a parrot: of {whole:,.0f} sentences it says about {count[2]:.0f}. The true reward goes from {start:.1f} "
        f"to {rewards[0]:.1f}, {rewards[1]:.1f} and {rewards[2]:.1f}. In general the best of n samples lies at "
        f"log n - (n - 1)/n nats: 1 nat is the best of {samples_for(1):.0f}, 3 of {samples_for(3):.0f}, 10 of "
        f"{samples_for(10):,.0f}. These are sentences of ten words; a KL over a long text is spread over its tokens, "
        "and the same nats mean less for each."
    )


def _draw(figure: Any, rewards: Tensor, samples: dict[float, list[str]]) -> None:
    figure.set_size_inches(11, 4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
    draw_means(left, torch.tensor(KLS), rewards, "", 0)
    left.set(xlabel="KL from the reference, nats", ylabel="true reward")
    right.axis("off")
    lines = []
    for distance, texts in samples.items():
        lines += ["reference" if not distance else f"KL {distance:g}", *(f"    {text}" for text in texts), ""]
    right.text(0, 1, "\n".join(lines), va="top", fontsize=8.5, linespacing=1.35, transform=right.transAxes)


EXPERIMENT = Experiment(
    name="how-far",
    title="How far is far: a KL of 1, 3 and 10 nats",
    claim="A KL of 1 nat changes the tone of samples, 3 nats change most of them, and at 10 nats a handful of "
    "sentences is left.",
    source="asked by learners",
    setup=f"{SENTENCES:,} sentences of the language world for one prompt, as often as its grammar says them. DPO fits "
    f"{PAIRS} Bradley-Terry pairs with the counts of the words as features (100 steps of Adam); beta is then set so "
    "that the KL is the one named. Overlap: the probability that both share; sentences: e to the entropy.",
    run=run,
    seeds=5,
)
