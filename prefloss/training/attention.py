"""Inputs and masks that keep the sequences of a packed batch apart in a model's attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.training import split_attention
from prefloss.training.head import text_config
from prefloss.training.layouts import Arranged, Packed
from prefloss.training.split_attention import KINDS, Sequences

_MASKED = ("sdpa", "eager", "flex_attention")


class Way(NamedTuple):
    """How a model's attention is kept within a sequence.

    Attributes:
        by: "split": each sequence has an attention call, or a row of one. "positions": transformers derives the starts
            of sequences from the position ids. "mask": a mask over the row.
        windowed: Whether a window that the configuration names is that of every layer, if it names no kinds of layers.
    """

    by: Literal["split", "positions", "mask"]
    windowed: bool = True


def ways(policy: nn.Module, shares: bool) -> list[Way]:
    """What may work for a model, the cheapest first. Position ids do not tell completions of a prompt apart.

    Args:
        policy: The model, unwrapped.
        shares: True if completions of the batch share a prompt.
    """
    config = text_config(policy)
    name = attention_of(config)
    unclear = getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None)
    windowed = (True, False) if unclear else (True,)
    flash = name.startswith("flash_attention")
    # FlashAttention reads the starts of sequences from the position ids at no cost.
    splits = name in ("sdpa", "eager") or (flash and shares)
    split = [Way("split", each) for each in windowed] if splits else []
    by_positions = [] if shares else [Way("positions")]
    masks = [Way("mask", each) for each in windowed] if name in _MASKED else []
    return [*split, *by_positions, *masks]


def unsupported(policy: nn.Module, shares: bool) -> str | None:
    """Why a model's class or configuration rules out packed batches; None if nothing does.

    Args:
        policy: The model, unwrapped.
        shares: True if completions of the batch share a prompt.
    """
    config = text_config(policy)
    kinds = set(getattr(config, "layer_types", None) or ()) - set(KINDS)
    if getattr(policy, "_is_stateful", False) or kinds:
        named = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"it carries a state from token to token{named}, which a packed batch would mix"
    if any(
        getattr(item, "is_prompt_learning", False) for item in getattr(policy, "peft_config", {}).values()
    ):
        return "its adapter puts tokens of its own before every row"
    arguments = inspect.signature(_inner(policy).forward).parameters
    if "position_ids" not in arguments and not any(
        item.kind is item.VAR_KEYWORD for item in arguments.values()
    ):
        return "its forward takes no position_ids"
    if shares and not ways(policy, shares):
        return f"its attention, {attention_of(config)}, takes no mask; load the model with attn_implementation='sdpa'"
    if shares and getattr(config, "output_router_logits", False):
        return "its router loss would weigh a shared prompt once"
    return None


def arranged(policy: nn.Module, packed: Packed, way: Way, one_row: bool = False) -> Arranged:
    """The tokens of a batch with what the model's attention needs to keep its sequences apart.

    Args:
        policy: The model, unwrapped.
        packed: The batch.
        way: That works for the model.
        one_row: Put all sequences into one row, whatever that costs.
    """
    config = text_config(policy)
    attention = attention_of(config)
    # A router's statistics would count padding; flash and flex attention skip what lies between sequences.
    one_row = (
        one_row or attention not in ("sdpa", "eager") or bool(getattr(config, "output_router_logits", False))
    )
    if way.by == "split":
        split_attention.register(attention, policy)
        sequences, order = Sequences.of(
            packed.sequences, packed.rows, _limits(config, packed.positions, way.windowed)
        )
        tokens = packed.in_order(order)
        tokens.inputs["attention_mask"] = sequences.markers(packed.ids.device)
        tokens.inputs[split_attention.ARGUMENT] = sequences
        return tokens
    tokens = packed.arranged(one_row)
    if way.by == "mask":
        tokens.inputs["attention_mask"] = _masks(policy, config, attention, tokens, way.windowed)
    return tokens


def _inner(policy: Any) -> Any:
    """The transformers model inside PEFT, whose forward accepts any argument."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def attention_of(config: Any) -> str:
    """Name of the attention function that a configuration asks for."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def _limits(config: Any, positions: Tensor, windowed: bool) -> dict[str, int | None]:
    """Tokens that a token reaches, by each kind of layer that the model has; None for all."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    window = getattr(config, "sliding_window", None)
    if not kinds:
        kinds = ["sliding_attention" if window and windowed else "full_attention"]
    reach = int(positions.max()) + 1
    chunk = getattr(config, "attention_chunk_size", None)
    limits = {
        "full_attention": None,
        "sliding_attention": window if window and window < reach else None,
        "chunked_attention": chunk if chunk and chunk < reach else None,
    }
    return {kind: limits[kind] for kind in kinds}


def _masks(policy: Any, config: Any, attention: str, tokens: Arranged, windowed: bool) -> Any:
    limits = _limits(config, tokens.inputs["position_ids"], windowed)
    masks_by_kind: dict[Any, Any] = {}

    def mask(kind: str) -> Any:
        limit = limits[kind]
        key = None if limit is None else kind
        if key not in masks_by_kind:
            masks_by_kind[key] = _MAKERS[attention](
                policy, tokens, None if limit is None else _within(kind, limit)
            )
        return masks_by_kind[key]

    masks = {kind: mask(kind) for kind in limits}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _within(kind: str, limit: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether a query position reaches a key position."""
    if kind == "sliding_attention":
        return lambda query, key: query - key < limit
    return lambda query, key: query // limit == key // limit


def _allowed(tokens: Arranged, within: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
    """Whether each token may attend to each other one, [B, 1, T, T]."""
    sequences, rows, positions = tokens.sequences, tokens.rows, tokens.inputs["position_ids"]
    width = sequences.shape[1]
    same = sequences[:, :, None] == sequences[:, None, :]
    shared_or_own = (rows[:, None, :] < 0) | (rows[:, :, None] == rows[:, None, :])
    causal = torch.ones(width, width, dtype=torch.bool, device=rows.device).tril()
    allowed = same & shared_or_own & causal
    if within is not None:
        allowed &= within(positions[:, :, None], positions[:, None, :]) | (sequences < 0)[:, :, None]
    return allowed[:, None]


def _for_sdpa(policy: Any, tokens: Arranged, within: Any) -> Tensor:
    allowed = _allowed(tokens, within)
    if allowed.device.type != "cpu" or policy.dtype != torch.float32:
        return allowed
    # On a CPU, SDPA converts a boolean mask like this in every layer.
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)


def _additive(policy: Any, tokens: Arranged, within: Any) -> Tensor:
    """For eager attention, which adds its mask to the scores."""
    allowed = _allowed(tokens, within)
    zeros = torch.zeros(allowed.shape, dtype=policy.dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(policy.dtype).min)


def _blocks(policy: Any, tokens: Arranged, within: Any) -> Any:
    """For FlexAttention: only blocks that hold an allowed pair are computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    sequences, rows, positions = tokens.sequences, tokens.rows, tokens.inputs["position_ids"]

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = sequences[b, q] == sequences[b, k]
        seen = same & ((rows[b, k] < 0) | (rows[b, q] == rows[b, k])) & (k <= q)
        if within is None:
            return seen
        return seen & (within(positions[b, q], positions[b, k]) | (sequences[b, q] < 0))

    count, width = sequences.shape
    return create_block_mask(allowed, count, None, width, width, device=str(sequences.device))


_MAKERS: dict[str, Callable[..., Any]] = {"sdpa": _for_sdpa, "eager": _additive, "flex_attention": _blocks}
