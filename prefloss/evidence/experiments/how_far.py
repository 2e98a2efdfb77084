"""How far is far? What a KL of 1, 3 and 10 nats does to samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.evidence.drawing import BLUE, ORANGE, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds
from prefloss.evidence.reward_models import reward_model
from prefloss.feedback import Pairs
from prefloss.worlds import Judge, LogLinear, World, draw, kl, optimum, reward, win_rate
from prefloss.worlds.language import LanguageWorld, true_reward, words

PROMPT = "Tell me about the sea:"
SENTENCES = 40_000
PAIRS = 300
KLS = (0.0, 1.0, 3.0, 10.0)


def written(count: int = SENTENCES) -> tuple[World, list[str]]:
    """Answers of the language world to one prompt, as often as drawn, and their words as features."""
    source = LanguageWorld(seed=0)
    drawn = Counter(source.completion(PROMPT) for _ in range(count))
    texts = list(drawn)
    vocabulary = {word: i for i, word in enumerate(sorted({word for text in texts for word in words(text)}))}
    features = torch.zeros(1, len(texts), len(vocabulary))
    for row, text in enumerate(texts):
        for word in words(text):
            features[0, row, vocabulary[word]] += 1
    rewards = torch.tensor([[true_reward(PROMPT, text) for text in texts]])
    counts = torch.tensor([[float(drawn[text]) for text in texts]])
    return World(reward=rewards, reference=counts.log(), features=features), texts


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
    for _ in range(40 if distance else 0):
        middle = (low + high) / 2
        policies = torch.log_softmax(world.reference + scores / middle.exp()[:, None, None], -1)
        near = kl(world, policies) < distance
        low, high = torch.where(near, low, middle), torch.where(near, middle, high)
    return policies


def said(policy: Tensor, texts: Sequence[str], count: int = 3) -> list[str]:
    """Samples of a policy, [1, C]; the same numbers decide at every KL."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.searchsorted(policy[0].exp().cumsum(-1), drawn).clamp_max(len(texts) - 1)
    return [texts[i].strip() for i in index.tolist()]


def run(seeds: Sequence[int]) -> Finding:
    """Let DPO's implicit reward carry the reference to each KL, and look at what it says there."""
    world, texts = written()
    data = draw(world, Judge(), Pairs, PAIRS, seeds=seeds)
    scores = reward_model(LogLinear(world), data, steps=100)
    policies = torch.stack([at_distance(world, scores, distance) for distance in KLS])
    measured = {
        "reached KL": kl(world, policies),
        "true reward": reward(world, policies),
        "win rate against the reference": win_rate(world, policies),
        "different sentences, effectively": (-(policies.exp() * policies).sum(-1)).mean(-1).exp(),
        "nats lost by a sample of the reference": -(world.reference.exp() * (policies - world.reference)).sum(-1).mean(-1),
    }
    figures = [
        over_seeds(f"{name}, {distance:g} nats", measured[name][KLS.index(distance)])
        for name in list(measured)[1:]
        for distance in KLS
    ]
    rows = [
        {"kl": distance, "seed": seed} | {name: values[i, j].item() for name, values in measured.items()}
        for i, distance in enumerate(KLS)
        for j, seed in enumerate(seeds)
    ]
    samples = {distance: said(policy[0], texts) for distance, policy in zip(KLS, policies, strict=True)}
    return Finding("TODO", figures, Verdict.HOLDS, rows, lambda figure: None)


EXPERIMENT = Experiment(name="how-far", title="", claim="", source="", setup="", run=run, seeds=10)
