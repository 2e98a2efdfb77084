"""Named settings for comparing losses: one world, and the judges and amounts of data that tell losses apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from prefloss.feedback import Labels, Pairs, Rankings
from prefloss.worlds.data import Data, draw
from prefloss.worlds.judges import Judge, Panel
from prefloss.worlds.world import World, spelled

# Added to a seed, each gives another stream than that of the training data. Torch reads 32 bits of a CPU seed, no more.
_HELD_OUT, _MORE_VOTES, _ORDER = 1 << 28, 2 << 28, 3 << 28


@lru_cache(maxsize=1)
def shared_world() -> World:
    """The world of all settings: 12 prompts, each with all 63 sequences of up to 5 tokens over 2 words and an end."""
    return spelled(prompts=12, words=2, longest=5, seed=0)


@dataclass(frozen=True)
class Setting:
    """A judge and an amount of data in the shared world.

    All losses learn from the same judged pairs: a loss of votes sees the chosen side of a pair as an upvote and the
    rejected one as a downvote, a loss of rankings sees rankings of two.

    Attributes:
        name: On the command line.
        facts: What is special here, in one line.
        judge: Who judges.
        pairs: Judged pairs of a seed to train on.
        downvotes: Downvotes for each upvote, at least 1; losses of votes get those beyond 1 from no pair.
        held_out: Judged pairs of a seed to validate on.
    """

    name: str
    facts: str
    judge: Judge | Panel = field(default_factory=Judge)
    pairs: int = 240
    downvotes: int = 1
    held_out: int = 240

    @property
    def world(self) -> World:
        """Where it is; the same for all settings."""
        return shared_world()

    def feedback(self, kind: type, seeds: Sequence[int]) -> Data:
        """What a loss of this kind trains on, one data set a seed.

        Raises:
            ValueError: If the kind is none of `Pairs`, `Labels` and `Rankings`.
        """
        pairs = draw(self.world, self.judge, Pairs, self.pairs, seeds=seeds)
        if kind is Pairs:
            return pairs
        if kind is Rankings:
            return _as_rankings(pairs)
        if kind is Labels:
            more = (self.downvotes - 1) * self.pairs
            return _as_votes(pairs, self._worse(more, seeds) if more else None, self.world, self.judge)
        raise ValueError(f"kind: got {kind!r}, expected Pairs, Labels or Rankings")

    def validation(self, seeds: Sequence[int]) -> Data:
        """Pairs that the same judge judged and no loss trains on."""
        held_out = [seed + _HELD_OUT for seed in seeds]
        return replace(draw(self.world, self.judge, Pairs, self.held_out, seeds=held_out), seeds=tuple(seeds))

    def _worse(self, count: int, seeds: Sequence[int]) -> Data:
        """The rejected sides of further pairs."""
        return draw(self.world, self.judge, Pairs, count, seeds=[seed + _MORE_VOTES for seed in seeds])


def settings() -> dict[str, Setting]:
    """All settings by name.

    Example:
        >>> settings()["flips"].facts
        '240 pairs, every fifth of them flipped'
    """
    lean = torch.randn(shared_world().reward.shape, generator=torch.Generator().manual_seed(1)).double()
    reward = shared_world().reward
    panel = Panel([Judge(taste=reward + 2 * lean), Judge(taste=reward - 2 * lean)], [0.5, 0.5])
    listed = (
        Setting("clean", "240 pairs, judged by the true reward with the noise of Bradley and Terry"),
        Setting("flips", "240 pairs, every fifth of them flipped", Judge(flips=0.2)),
        Setting(
            "length",
            "240 pairs from a judge that adds half a point of reward a token",
            Judge(length_bias=0.5),
        ),
        Setting("sparse", "48 pairs, four a prompt", pairs=48),
        Setting(
            "imbalanced",
            "96 pairs; a vote in ten is an upvote, as losses of votes get 768 downvotes more",
            pairs=96,
            downvotes=9,
        ),
        Setting(
            "judges", "240 pairs from two judges of opposite tastes, whose mean is the true reward", panel
        ),
    )
    return {setting.name: setting for setting in listed}


def _as_rankings(pairs: Data) -> Data:
    scores = torch.stack([pairs.fields["score_chosen"], pairs.fields["score_rejected"]], -1)
    return Data(Rankings, pairs.prompt, pairs.completions[..., :2], {"scores": scores}, pairs.seeds)


def _as_votes(pairs: Data, worse: Data | None, world: World, judge: Judge | Panel) -> Data:
    """Chosen sides as upvotes, then rejected sides and those of `worse` as downvotes, in an order drawn by the seed."""
    sources = [(pairs, 0, "score_chosen"), (pairs, 1, "score_rejected")]
    if worse is not None:
        sources.append((worse, 1, "score_rejected"))
    prompt = torch.cat([data.prompt for data, *_ in sources], -1)
    completion = torch.cat([data.completions[..., column] for data, column, _ in sources], -1)
    scores = torch.cat([data.fields[name] for data, _, name in sources], -1)
    desirable = (torch.arange(prompt.shape[-1]) < len(pairs)).expand(prompt.shape)
    expected = (world.reference.exp() * judge.utility(world)).sum(-1)
    fields = {"desirable": desirable, "scores": scores, "baseline": expected[prompt]}
    votes = Data(Labels, prompt, completion.unsqueeze(-1), fields, pairs.seeds).at(
        _orders(pairs.seeds, prompt.shape[-1])
    )
    # As KTO's data do: the completion of the next example is the one under a prompt that it does not answer.
    both = torch.cat([votes.completions, votes.completions.roll(-1, 1)], -1)
    return replace(votes, completions=both)


def _orders(seeds: Sequence[int], count: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + _ORDER) for seed in seeds]
    return torch.stack([torch.randperm(count, generator=generator) for generator in generators])
