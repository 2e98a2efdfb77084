"""Checks of what a model is run on: the types, and the token ids where the model itself stumbles over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from prefloss.arguments import instance

Forward = TypeVar("Forward", bound=Callable[..., Any])


def checked(forward: Forward) -> Forward:
    """A function of (model, inputs, targets, ...) that names the argument which is wrong.

    Token ids are not checked beforehand: some models take ids beyond their vocabulary, for images, say.

    Args:
        forward: The function.
    """

    @functools.wraps(forward)
    def call(model: Any, inputs: Any, targets: Any, *args: Any, **options: Any) -> Any:
        instance("model", model, nn.Module, "a causal language model of transformers")
        instance("inputs", inputs, Mapping, "keyword arguments of the model, such as input_ids")
        instance("targets", targets, Tensor, "the token that each position predicts, [rows, T]")
        try:
            return forward(model, inputs, targets, *args, **options)
        except IndexError as error:
            problem = _beyond_vocabulary(model, inputs)
            if problem is None:
                raise
            raise ValueError(problem) from error

    return call  # type: ignore[return-value]


def _beyond_vocabulary(model: Any, inputs: Mapping[str, Any]) -> str | None:
    """What is wrong with the token ids, or None."""
    ids = inputs.get("input_ids")
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not isinstance(ids, Tensor) or not ids.numel() or not embeddings:
        return None
    rows = max(embedding.num_embeddings for embedding in embeddings)
    worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
    if 0 <= worst < rows:
        return None
    return (
        f"input_ids: got the token id {worst}, expected 0 to {rows - 1}, the vocabulary of {type(model).__name__}; the "
        "data was made with another tokenizer, or tokens were added: model.resize_token_embeddings(len(tokenizer))"
    )
