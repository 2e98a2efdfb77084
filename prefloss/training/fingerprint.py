"""Short hashes of a model's weights and of a tokenizer: enough to notice that they are others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 4096
"""Values taken of each parameter, evenly spread. Training moves all of them, and a whole model takes long to hash."""


def weights_fingerprint(model: nn.Module, *, adapters: bool = True) -> str | None:
    """Hash of a model's parameters: names, shapes, and a sample of the values.

    It is the same for one model in float32 and, if the values are the same, in half precision; and for a PEFT model
    whose adapters do not count it is that of the base model.

    Args:
        model: A model of transformers, or a PEFT model.
        adapters: Whether the parameters of PEFT adapters count.

    Returns:
        32 hexadecimal digits; None where the parameters are spread over processes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(_named(model, adapters)):
        if type(value.data) is not Tensor or value.is_meta or not value.numel():
            # A DTensor (FSDP2), or what DeepSpeed leaves of a parameter that is elsewhere.
            return None
        digest.update(f"{name} {tuple(value.shape)};".encode())
        flat = value.detach().reshape(-1)
        sample = flat[:: -(-len(flat) // _SAMPLED)].to("cpu", torch.float32)
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """That of the largest floating parameter; norms are often kept in float32."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return max(floating, key=torch.Tensor.numel).dtype if floating else None


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of all that turns text into ids, without the chat template; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        spec = dict(tokenizer.get_vocab())
    else:
        spec = json.loads(backend.to_str())
        # Settings of the last call, not of the tokenizer.
        spec.pop("truncation", None)
        spec.pop("padding", None)
    # The end token closes plain text.
    return text_hash(json.dumps([spec, str(tokenizer.eos_token)], sort_keys=True))


def template_hash(tokenizer: Any) -> str | None:
    """Hash of the chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else text_hash(json.dumps(template, sort_keys=True))


def text_hash(text: str) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _named(model: Any, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters under names that PEFT does not change, those of adapters under one that is not the adapter's own."""
    config = getattr(model, "peft_config", {})
    for name, value in model.named_parameters():
        parts = name.split(".")
        if config and set(parts) & config.keys():
            if adapters:
                yield ".".join("adapter" if part in config else part for part in parts), value
        elif config:
            own = [part for part in parts if part not in ("base_layer", "original_module")]
            yield ".".join(own).removeprefix("base_model.model."), value
        else:
            yield name, value
