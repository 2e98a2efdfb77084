"""Whether a model computes the same from packed rows as from padded ones: tried on rows made for it.

The yardstick is the model's own: hidden states may differ by a small part of what another prompt, or another position,
changes in them. So fresh weights, with which attention hardly matters, give the verdict of trained ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.data.tokens import Encoded
from prefloss.training import attention, distributed
from prefloss.training.attention import Way
from prefloss.training.forward import evaluating, head_inputs, unwrapped
from prefloss.training.head import text_config
from prefloss.training.layouts import Arranged, Packed, pack

# Largest difference from padded rows, as a part of what another prompt, or another position, changes; by whether the
# model computes in half precision. A wrong mask makes about 1; so do wrong positions, unless the model ignores them.
_LARGEST = {True: 0.3, False: 0.01}
_LARGEST_BY_POSITION = {True: 0.6, False: 0.05}
# The widest window to exceed, and by how much, tokens.
_WIDEST, _BEYOND = 8192, 2048
# Tokens of a short prompt and of each completion, at most.
_SHORT = 16

# Settings that may limit which tokens a token attends to, and settings of other things with such names.
_LIMITS = re.compile(r"window|chunk|block|local|top_?k|stride|compress|span|extent|distance")
_OTHERS = re.compile(
    r"expert|moe|group|layer|pattern|type|dim|feed_forward|lm_head|num_blocks|dropout|multiple"
)


class Verdict(NamedTuple):
    """How a model runs packed batches.

    Attributes:
        way: How its attention keeps sequences apart, or None if it does not.
        longest: Longest sequence that this holds for, tokens; None for all.
        reason: Why there is no way, or why no longer sequence.
    """

    way: Way | None
    longest: int | None
    reason: str


def judge(model: nn.Module, shares: bool, device: torch.device) -> Verdict:
    """Try a model, wrapped as it is trained. Every process must call this; all get the same verdict.

    Args:
        model: A causal language model.
        shares: Whether completions share a prompt.
        device: Of the batches.
    """
    policy = unwrapped(model)
    reason = attention.unsupported(policy, shares)
    if reason is not None:
        return Verdict(None, None, reason)
    stages, longest = _stages(text_config(policy))
    problems = []
    for way in attention.ways(policy, shares):
        attempts = (_attempt(model, way, shares, lengths, device) for lengths in stages)
        problem = next((text for text in attempts if text is not None), None)
        if problem is None:
            return Verdict(way, longest, f"it was not tried on sequences of more than {longest} tokens")
        problems.append((way.by == "split", problem))
    # Other ways than splitting need less of a model, so what is wrong with them says more.
    return Verdict(None, None, min(problems, key=lambda found: found[0])[1])


def _attempt(
    model: nn.Module, way: Way, shares: bool, lengths: tuple[int, int], device: torch.device
) -> str | None:
    """What is wrong with packed rows of these lengths, on any process; None if nothing is."""
    try:
        made = (_packed(examples, shares, device) for examples in _examples(model, shares, *lengths))
        problem = _problem(model, way, *made)
    except Exception as error:  # Whatever the code of a model raises.
        problem = f"its forward refuses ({type(error).__name__}: {error})"
    failed = distributed.all_sum(torch.tensor(int(problem is not None), device=device))
    return (problem or "it fails in another process") if failed else None


def _problem(model: nn.Module, way: Way, packed: Packed, changed: Packed) -> str | None:
    """What is wrong with packed rows, or None; `changed` holds the same completions after other prompts."""
    alone = _alone(model, packed)
    half = alone.dtype.itemsize == 2 or torch.is_autocast_enabled(alone.device.type)
    alone = alone.float()
    context = _norm(_alone(model, changed).float() - alone)
    tokens = attention.arranged(unwrapped(model), packed, way, one_row=True)
    states = _states(model, tokens).float()
    apart = _norm(states - alone)
    rounding = torch.finfo(torch.bfloat16 if half else torch.float32).eps * _norm(alone)
    if not bool((context > 8 * rounding).all()):
        return "another prompt changes too little in its log-probs to compare them"
    if not bool((apart < _LARGEST[half] * context).all()):
        part = float((apart / context).max())
        return (
            f"its log-probs differ from those of padded rows by {part:.2g} times what another prompt changes"
        )
    if not packed.shares:
        return None
    # Every second row follows another completion of its prompt. Half its positions are within every table.
    positions = tokens.inputs["position_ids"]
    second = tokens.rows % 2 == 1
    halved = tokens.inputs | {"position_ids": torch.where(second, positions // 2, positions)}
    moved = _norm(_states(model, tokens._replace(inputs=halved)).float() - states)
    if not bool((apart < _LARGEST_BY_POSITION[half] * moved)[1::2].all()):
        return "its positions cannot be set, or change too little to be checked"
    return None


def _states(model: nn.Module, tokens: Arranged) -> Tensor:
    """Hidden states that predict each target, [rows, C, H]."""
    with evaluating(model):
        return head_inputs(model, tokens.inputs).flatten(0, 1)[tokens.positions]


def _alone(model: nn.Module, packed: Packed) -> Tensor:
    """The same from one row after another, which takes the least memory."""
    count = packed.sources.shape[1]
    with evaluating(model):
        rows = [head_inputs(model, {"input_ids": packed.ids[tokens][None]}) for tokens in packed.whole_rows()]
    return torch.stack([states[0, -count - 1 : -1] for states in rows])


def _norm(states: Tensor) -> Tensor:
    return states.flatten(1).norm(dim=1)


def _packed(examples: list[list[Encoded]], shares: bool, device: torch.device) -> Packed:
    order = [(i, j) for i, example in enumerate(examples) for j in range(len(example))]
    batch = pack(examples, order, shares, None)
    return Packed.of({name: value.to(device) for name, value in batch.items()})


def _examples(model: nn.Module, shares: bool, short: int, long: int) -> Iterator[list[list[Encoded]]]:
    """Two completions of a short prompt, and one of a long prompt (two if they share it); then after other prompts.

    The prompts keep their last token, which predicts the completions, so that only attention carries the change.
    """
    tokens = torch.tensor(_ordinary_tokens(unwrapped(model)))
    # The same on every process.
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return tokens[torch.randint(len(tokens), (count,), generator=generator)].tolist()

    completions = [[draw(short) for _ in range(count)] for count in (2, 2 if shares else 1)]
    prompts = [draw(short), draw(long)]
    for changed in (prompts, [[*draw(len(prompt) - 1), prompt[-1]] for prompt in prompts]):
        yield [[(prompt, one) for one in both] for prompt, both in zip(changed, completions, strict=True)]


def _ordinary_tokens(policy: Any) -> list[int]:
    """The vocabulary without tokens of images, padding and the like."""
    text = text_config(policy)
    special = {*_special(policy.config), *_special(text)}
    return [token for token in range(text.vocab_size) if token not in special]


def _special(config: Any) -> Iterator[int]:
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, list) else [value]


def _stages(config: Any) -> tuple[list[tuple[int, int]], int | None]:
    """Tokens of the prompts of each stage, and the longest sequence that they stand for, tokens; None: any.

    In the first stage, all rows side by side are within a table of positions, even if the model counts them on. Only
    then come rows beyond what limits attention.
    """
    room = getattr(config, "max_position_embeddings", None) or 2 * (_WIDEST + _BEYOND)
    short = max(2, min(_SHORT, room // 10))
    limits = set(_limits(config.to_dict()))
    # Limits may multiply: so many blocks of so many tokens.
    limits |= {a * b for a in limits for b in limits if a < b and a * b <= _WIDEST}
    most = room - short
    exceeded = {limit for limit in limits if limit <= min(_WIDEST, most - short)}
    long = max((min(most, limit + min(limit, _BEYOND)) for limit in exceeded), default=0)
    stages = [(short, short)] if long <= short else [(short, short), (short, long)]
    return stages, min(limits - exceeded, default=None)


def _limits(value: Any, named: bool = False) -> Iterator[int]:
    """Windows, chunks and the like in a configuration, tokens."""
    if isinstance(value, dict):
        for name, item in value.items():
            name = str(name)
            yield from _limits(item, (named or bool(_LIMITS.search(name))) and not _OTHERS.search(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _limits(item, named)
    elif named and isinstance(value, int) and not isinstance(value, bool) and value > 1:
        yield value
