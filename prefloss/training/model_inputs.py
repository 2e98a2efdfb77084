"""Inputs of a model beside tokens, such as images: from the columns of examples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.arguments import shown
from prefloss.data.errors import DataError
from prefloss.data.examples import Example

# A type for each token of the prompt; all others belong to the prompt as a whole.
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
# What a processor makes inputs of. A collator that left these out would train without them.
_RAW = ("image", "images", "video", "videos", "audio", "audios")


def model_input_names(names: Sequence[str], layout: str) -> tuple[str, ...]:
    """The argument `model_inputs` of a collator, checked.

    Raises:
        TypeError: If it is no list of names.
        ValueError: If a layout other than padded rows is asked for.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"model_inputs: got {shown(names)}, expected a list of columns, such as ['pixel_values']"
        )
    if names and layout not in ("auto", "padded"):
        raise ValueError(
            f"layout: got {layout!r} beside model_inputs={[*names]!r}, expected 'padded': in one row without padding, "
            "images would no longer stand beside their tokens"
        )
    return tuple(names)


def check_no_raw(place: str, example: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse an example with images and the like that nothing would read.

    Args:
        place: What error messages call the example.
        example: Its columns.
        names: Columns that are inputs of the model.

    Raises:
        DataError: If it has one.
    """
    for name, value in example.items():
        raw = name in _RAW or str(name).startswith("pixel_values")
        absent = value is None or (isinstance(value, list) and not value)
        if raw and name not in names and not absent:
            raise DataError(
                f"{place}: column {name!r}: got {shown(value)}, which the collator does not read; run the model's "
                "processor, and give token ids (prompt_ids, chosen_ids, ...) and its other outputs, named in "
                "PreferenceCollator(model_inputs=['pixel_values', ...])"
            )


def joined(
    inputs: Sequence[Mapping[str, Any]], read: Sequence[Example], order: Sequence[tuple[int, int]], width: int
) -> dict[str, Tensor]:
    """Tensors of a batch of padded rows, each row with the inputs of its prompt.

    Args:
        inputs: The model inputs of each example by name.
        read: The examples.
        order: Example and completion of each row.
        width: Tokens of the padded rows.

    Returns:
        Types of tokens, [rows, width], 0 at completions and padding. All others joined along their first dimension in
        the order of the rows: images of LLaVA [images, channels, height, width], patches of Qwen2-VL [patches, n].

    Raises:
        DataError: If an example lacks an input that another has, a prompt is longer than the rows, or the tensors of
            examples do not fit together.
    """
    for example, given in zip(read, inputs, strict=True):
        missing = [name for name in inputs[0] if name not in given] or [
            name for name in given if name not in inputs[0]
        ]
        if missing:
            raise DataError(
                f"{example.place}: column {missing[0]!r}: expected it in every example or in none"
            )
        prompt = max(len(ids) for ids, _ in example.rows)
        if given and prompt > width:
            raise DataError(
                f"{example.place}: got a prompt of {prompt} tokens and max_length={width}, which would cut tokens that "
                "stand for images; expected a larger max_length"
            )
    return {name: _join(name, inputs, read, order, width) for name in inputs[0]}


def _join(
    name: str,
    inputs: Sequence[Mapping[str, Any]],
    read: Sequence[Example],
    order: Sequence[tuple[int, int]],
    width: int,
) -> Tensor:
    values = [_tensor(example.place, name, given[name]) for example, given in zip(read, inputs, strict=True)]
    if name in _PER_TOKEN:
        return torch.stack([_types(read[i], j, name, values[i], width) for i, j in order])
    try:
        return torch.cat([values[i] for i, _ in order])
    except RuntimeError as error:
        shapes = [list(value.shape) for value in values]
        raise DataError(
            f"column {name!r}: got tensors of shapes {shapes}, expected the same shape but for the first dimension"
        ) from error


def _tensor(place: str, name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{place}: column {name!r}: got {shown(value)}, expected numbers or a tensor"
        ) from error
    if tensor.dim() == 0:
        raise DataError(
            f"{place}: column {name!r}: got {shown(value)}, expected a tensor with a first dimension"
        )
    return tensor


def _types(example: Example, completion: int, name: str, types: Tensor, width: int) -> Tensor:
    prompt = len(example.rows[completion][0])
    if types.shape != (prompt,):
        raise DataError(
            f"{example.place}: column {name!r}: got shape {list(types.shape)}, expected one for each of the prompt's "
            f"{prompt} tokens"
        )
    row = types.new_zeros(width)
    row[:prompt] = types
    return row
