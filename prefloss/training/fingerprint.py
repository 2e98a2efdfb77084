"""Short hashes of a model's weights and of a tokenizer, to detect different ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 4096
"""Values sampled from each parameter, evenly spaced. Training changes all of them; hashing all would take long."""


def weights_fingerprint(model: nn.Module, *, adapters: bool = True) -> str | None:
    """Hash of a model's parameters: names, shapes, and a sample of the values.

    The same values in float32 and in half precision give the same hash. Without adapters, a PEFT model has the hash of
    its base model.

    Args:
        model: A model of transformers, or a PEFT model.
        adapters: Include the parameters of PEFT adapters.

    Returns:
        32 hexadecimal digits; None if the parameters are sharded over processes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(_named(model, adapters)):
        if type(value.data) is not Tensor or value.is_meta or not value.numel():
            # A DTensor (FSDP2), or the placeholder of a parameter that DeepSpeed sharded.
            return None
        digest.update(f"{name} {tuple(value.shape)};".encode())
        flat = value.detach().reshape(-1)
        sample = flat[:: -(-len(flat) // _SAMPLED)].to("cpu", torch.float32)
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Dtype of the largest floating-point parameter; norms are often kept in float32."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return max(floating, key=torch.Tensor.numel).dtype if floating else None


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of everything that turns text into ids, except the chat template; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        spec = dict(tokenizer.get_vocab())
    else:
        spec = json.loads(backend.to_str())
        # Left over from the last call.
        spec.pop("truncation", None)
        spec.pop("padding", None)
    # Plain text gets the end token.
    return text_hash(json.dumps([spec, str(tokenizer.eos_token)], sort_keys=True))


def template_hash(tokenizer: Any) -> str | None:
    """Hash of the chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else text_hash(json.dumps(template, sort_keys=True))


def text_hash(text: str) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _named(model: Any, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters under names without PEFT's prefixes; adapters under a common name instead of their own."""
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
