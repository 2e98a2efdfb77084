"""The output head of a causal model: its weight and bias, and the model's transform of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# Configuration names of factors on the logits and of softcaps.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# HyperCLOVA X multiplies by the setting that Granite and MiniCPM divide by.
_MULTIPLIES_BY_SCALING = ("hyperclovax",)


@dataclass(frozen=True)
class HeadSpec:
    """How logits come from hidden states: softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        module: The model's output embedding; an adapter's wrapper if there is one.
        logit_scale: Factor on the logits.
        softcap: Bound c of c * tanh(x / c), or None.
    """

    module: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> HeadSpec:
        """Read the head of a causal language model.

        Raises:
            TypeError: If the model has no output head, or one that is quantised or has an adapter other than plain
                LoRA.
        """
        get_head: Any = getattr(model, "get_output_embeddings", None)
        module: Any = None if get_head is None else get_head()
        if module is None:
            name = type(model).__name__
            raise TypeError(f"model: got {name} without output embeddings, expected a causal language model")
        spec = cls(module, *_transform(model))
        spec.weight_and_bias()  # Raises now for an unsupported head.
        return spec

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V] as the forward pass uses them; call this inside the head's forward.

        A LoRA adapter on the head is merged, with gradients to its factors. Sharded tensors are gathered.

        Raises:
            TypeError: If the head is quantised, or has another kind of adapter.
        """
        module: Any = self.module
        if hasattr(module, "base_layer"):
            return _with_lora(module)
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point():
            kind = "no weight" if weight is None else f"a weight of {weight.dtype}"
            name = type(module).__name__
            raise TypeError(f"model: got an output head {name} with {kind}, expected a floating-point one")
        return _whole(weight), _whole(getattr(module, "bias", None))

    def shard(self) -> tuple[Tensor, Tensor | None] | None:
        """This process's weight and bias if tensor parallelism splits the vocabulary; None otherwise."""
        module: Any = self.module
        weight = getattr(module, "weight", None)
        return (weight, getattr(module, "bias", None)) if _by_vocabulary(weight) else None

    def transformed(self, logits: Tensor) -> Tensor:
        """The logits after the model's scale and softcap."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _transform(model: Any) -> tuple[float, float | None]:
    config = model.config.get_text_config()
    scale = next(
        (getattr(config, name) for name in _MULTIPLIERS if getattr(config, name, None) is not None), None
    )
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        divides = config.model_type not in _MULTIPLIES_BY_SCALING
        scale = 1 / config.logits_scaling if divides else config.logits_scaling
    softcap = next(
        (getattr(config, name) for name in _SOFTCAPS if getattr(config, name, None) is not None), None
    )
    for name, value in (("logit scale", scale), ("softcap", softcap)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"model: got a {name} of {value!r} in {type(config).__name__}, expected a number")
    return 1.0 if scale is None else float(scale), None if softcap is None else float(softcap)


def _with_lora(module: Any) -> tuple[Tensor, Tensor | None]:
    base = module.base_layer
    weight, bias = HeadSpec(base).weight_and_bias()
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return weight, bias
    for name in module.active_adapters:
        is_plain = name in getattr(module, "lora_A", {}) and not getattr(module, "use_dora", {}).get(name)
        dropout: Any = module.lora_dropout[name] if is_plain else None
        if not is_plain or (isinstance(dropout, nn.Dropout) and dropout.p > 0 and module.training):
            raise TypeError(
                f"model: got the adapter {name!r} ({type(module).__name__}) on the output head, expected plain LoRA "
                "without dropout there; take the head out of target_modules"
            )
        low, high = _whole(module.lora_A[name].weight), _whole(module.lora_B[name].weight)
        weight = weight + (module.scaling[name] * (high @ low)).to(weight.dtype)
    return weight, bias


def _by_vocabulary(weight: Any) -> TypeGuard[Tensor]:
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.ndim != 1 or mesh.size() == 1:
        return False
    (placement,) = weight.placements
    return placement.is_shard(0)


def _whole(tensor: Any) -> Any:
    """A sharded tensor gathered from all processes; anything else unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
