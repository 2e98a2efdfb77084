"""Feedback on the completions of a world, as their numbers: drawn from a judge, exact, or listed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefloss.feedback import Labels, Pairs, Rankings
from prefloss.worlds.judges import Judge, Panel
from prefloss.worlds.world import World


@dataclass(frozen=True, eq=False)
class Data:
    """Feedback of one kind for several seeds, n examples each.

    Attributes:
        kind: `Pairs`, `Labels` or `Rankings`.
        prompt: Number of each example's prompt, [seeds, n].
        completions: Numbers of its completions, [seeds, n, columns]. Pairs: chosen, rejected and, if there is a third
            column, gold. Labels: the completion and, if there is a second column, the mismatched one. Rankings: the
            whole group.
        fields: Fields of the feedback beside the log-ratios by name, [seeds, n] or, for Rankings' scores,
            [seeds, n, columns].
        seeds: Where the data came from; training orders its batches by them too.
    """

    kind: type
    prompt: Tensor
    completions: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Check that all tensors are of the same seeds and examples."""
        expected = (len(self.seeds), self.prompt.shape[-1])
        for name, value in {"prompt": self.prompt, "completions": self.completions, **self.fields}.items():
            if value.shape[:2] != expected:
                raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(expected)} in front")

    def __len__(self) -> int:
        """Number of examples of a seed."""
        return self.prompt.shape[-1]

    def at(self, index: Tensor) -> Data:
        """Some examples of each seed; index is [seeds, m]."""
        seed = torch.arange(len(self.seeds)).unsqueeze(-1)
        fields = {name: value[seed, index] for name, value in self.fields.items()}
        return Data(self.kind, self.prompt[seed, index], self.completions[seed, index], fields, self.seeds)


def taken(values: Tensor, data: Data, per_token: bool = False) -> Tensor:
    """The values at the completions of the data: [..., prompts, C] -> [..., seeds, n, columns].

    Args:
        values: Without a dimension for the seeds, or with one as the last before prompts; as many as the data has, or
            any number if the data has one.
        data: Whose completions.
        per_token: The values have a last dimension for the tokens, and so has the result.

    Raises:
        ValueError: If the data names a prompt or a completion that is not there.
    """
    if not per_token:
        return taken(values.unsqueeze(-1), data, per_token=True).squeeze(-1)
    *runs, prompts, completions, tokens = values.shape
    for name, numbers, count in (
        ("prompt", data.prompt, prompts),
        ("completions", data.completions, completions),
    ):
        if numbers.min() < 0 or numbers.max() >= count:
            raise ValueError(f"{name}: got number {numbers.max().item()}, expected 0 to {count - 1}")
    index = (data.prompt.unsqueeze(-1) * completions + data.completions).flatten(1)
    lead = torch.broadcast_shapes(torch.Size(runs), index.shape[:1])
    flat = values.flatten(-3, -2).expand(*lead, -1, -1)
    picked = flat.gather(-2, index.unsqueeze(-1).expand(*lead, -1, tokens))
    return picked.reshape(*lead, *data.completions.shape[1:], tokens)


def draw(
    world: World,
    judge: Judge | Panel,
    kind: type,
    n: int,
    *,
    seeds: Sequence[int] = (0,),
    group: int = 2,
    sampler: Tensor | None = None,
) -> Data:
    """Feedback of n examples for each seed: prompts at random, different completions of each, and the judge's word.

    A seed draws the same prompts, completions and noise whoever judges; the completion of a label is the first of the
    pair or ranking that the seed draws. Pairs carry scores and, as gold, a sample of the reference. Labels carry a
    score, the completion of the next example as the mismatched one, and, as baseline, the prompt's expected score under
    the reference.

    Args:
        world: Where from.
        judge: Who is asked.
        kind: `Pairs`, `Labels` or `Rankings`.
        n: Examples of each seed.
        seeds: One data set each.
        group: Completions of a ranking.
        sampler: Log-probs that the completions are drawn with, [prompts, C]; the reference if it is None.

    Raises:
        ValueError: If the kind is another, or the world has fewer completions than a group.
    """
    if kind not in _DRAWN:
        raise ValueError(f"kind: got {kind!r}, expected Pairs, Labels or Rankings")
    size = {Pairs: 2, Labels: 1}.get(kind, group)
    if n < 1 or not seeds:
        raise ValueError(f"n: got {n} examples and {len(seeds)} seeds, expected at least one of each")
    if not 1 <= size <= world.completions:
        raise ValueError(
            f"group: got {size}, expected at most the {world.completions} completions of the world"
        )
    sampler = world.reference if sampler is None else sampler
    each = [_drawn(world, judge, kind, n, size, sampler, seed) for seed in seeds]
    prompt, completions, fields = zip(*each, strict=True)
    joined = {name: torch.stack([values[name] for values in fields]) for name in fields[0]}
    return Data(kind, torch.stack(prompt), torch.stack(completions), joined, tuple(seeds))


def population(world: World, judge: Judge | Panel, kind: type, sampler: Tensor | None = None) -> Data:
    """All feedback that a judge could give, each piece weighted by its probability; a loss's mean is its expectation.

    Pairs are all ordered pairs of different completions, with the scores that the judge would give without noise: the
    chosen one may have the lower, which makes NaN of a loss that takes the logarithm of the difference (`odpo`).
    Labels are all completions, once upvoted and once downvoted. Both have the completions' probability under the
    sampler.

    Raises:
        ValueError: If the kind is another: rankings are too many to list.
    """
    sampler = world.reference if sampler is None else torch.log_softmax(sampler.double(), -1)
    probs, utility = sampler.exp(), judge.utility(world)
    if kind is Pairs:
        said = judge.prefers(world) * probs.unsqueeze(-1) * probs.unsqueeze(-2)
        prompt, chosen, rejected = (
            (~torch.eye(world.completions).bool()).expand(said.shape).nonzero(as_tuple=True)
        )
        completions, weight = torch.stack([chosen, rejected], -1), said[prompt, chosen, rejected]
        fields = {"score_chosen": utility[prompt, chosen], "score_rejected": utility[prompt, rejected]}
    elif kind is Labels:
        up = judge.upvotes(world)
        said = torch.stack([up * probs, (1 - up) * probs])
        down, prompt, completion = torch.ones_like(said).nonzero(as_tuple=True)
        completions, weight = torch.stack([completion, completion.roll(1)], -1), said.flatten()
        baseline = (probs * utility).sum(-1)
        fields = {"desirable": down == 0, "scores": utility[prompt, completion], "baseline": baseline[prompt]}
    else:
        raise ValueError(f"kind: got {kind!r}, expected Pairs or Labels")
    fields["weight"] = weight * len(weight) / weight.sum()
    return Data(kind, prompt[None], completions[None], {name: value[None] for name, value in fields.items()})


def listed(pairs: Sequence[tuple[int, int]]) -> Data:
    """Pairs of completions of the first prompt by their numbers, chosen first.

    Example:
        >>> listed([(0, 1), (1, 0), (0, 2)]).completions
        tensor([[[0, 1],
                 [1, 0],
                 [0, 2]]])
    """
    completions = torch.tensor(pairs)[None]
    return Data(Pairs, torch.zeros_like(completions[..., 0]), completions)


def best_and_worst(rankings: Data) -> Data:
    """The first against the last completion of each ranking, with their scores."""
    ends = torch.stack([rankings.fields["scores"].argmax(-1), rankings.fields["scores"].argmin(-1)], -1)
    scores = rankings.fields["scores"].gather(-1, ends)
    fields = {"score_chosen": scores[..., 0], "score_rejected": scores[..., 1]}
    return Data(Pairs, rankings.prompt, rankings.completions.gather(-1, ends), fields, rankings.seeds)


_DRAWN = (Pairs, Labels, Rankings)


def _drawn(
    world: World, judge: Judge | Panel, kind: type, n: int, size: int, sampler: Tensor, seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prompts, completions and fields of one seed."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(world.prompts, (n,), generator=generator)
    completions = _sampled(sampler[prompt], size, generator)
    gold = _sampled(world.reference[prompt], 1, generator)
    scores = judge.scores(world, prompt, completions, generator, bar=kind is Labels)
    if kind is Rankings:
        return prompt, completions, {"scores": scores}
    if kind is Labels:
        baseline = (world.reference.exp() * judge.utility(world)).sum(-1)[prompt]
        fields = {"desirable": scores[:, 0] > scores[:, 1], "scores": scores[:, 0], "baseline": baseline}
        return prompt, torch.cat([completions, completions.roll(-1, 0)], -1), fields
    scores, order = scores.sort(-1, descending=True)
    fields = {"score_chosen": scores[:, 0], "score_rejected": scores[:, 1]}
    return prompt, torch.cat([completions.gather(-1, order), gold], -1), fields


def _sampled(log_probs: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Different completions of each row [n, C], in the order drawn, [n, size]."""
    uniform = torch.rand(log_probs.shape, generator=generator, dtype=torch.float64)
    # The largest of log-probs + Gumbel noise are a draw without replacement.
    return (log_probs - torch.log(-torch.log(uniform))).topk(size, -1).indices
