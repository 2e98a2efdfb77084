"""Text to token ids, split into prompt and completion as TRL's trainers do, and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Text = str | list[dict[str, str]]
"""A prompt or a completion: plain text, or messages of role and content."""

Encoded = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""


def encode(tokenizer: Any, prompt: Text, completion: Text) -> Encoded:
    """Token ids of a prompt and its completion, split where TRL splits them.

    Plain text gets an end token; messages go through the chat template. The completion starts where
    the tokens of prompt and prompt + completion part.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        raise TypeError("prompt and completion: got plain text beside messages, expected both in one form")
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str) and isinstance(completion, str):
        end = str(tokenizer.eos_token)
        both = _ids(tokenizer(text=prompt + completion + ("" if completion.endswith(end) else end)))
    else:
        both = _ids(tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True))
    shared = 0
    for a, b in zip(prompt_ids, both, strict=False):
        if a != b:
            break
        shared += 1
    return both[:shared], both[shared:]


def encode_prompt(tokenizer: Any, prompt: Text) -> list[int]:
    """Token ids of a prompt, ready for a completion to follow."""
    if isinstance(prompt, str):
        return _ids(tokenizer(text=prompt))
    return _ids(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    )


def pad(rows: Sequence[Encoded], padding: int, max_length: int | None = None) -> dict[str, Tensor]:
    """One right-padded batch.

    Args:
        rows: Prompt and completion token ids.
        padding: Token id to pad with.
        max_length: Cut rows to this many tokens.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask`, integers, each [rows, T].
    """
    cut = [((prompt + completion)[:max_length], len(prompt)) for prompt, completion in rows]
    width = max(len(ids) for ids, _ in cut)
    input_ids = torch.full((len(cut), width), padding)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for i, (ids, start) in enumerate(cut):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        completion_mask[i, start : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def pad_id(tokenizer: Any) -> int:
    """What to pad with: the padding token, or the end token of a tokenizer without one."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])
