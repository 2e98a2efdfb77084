"""The output head of a causal model: its weight and bias, and the model's transform of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# Configuration names of factors on the logits, of divisors, and of softcaps.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class HeadSpec:
    """How logits come from hidden states: softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        module: The model's output embedding; an adapter's wrapper if there is one.
        logit_scale: Factor on the logits.
        softcap: Bound c of c * tanh(x / c), or None.
        vocabulary: Number of logits that the model keeps, where it cuts off those of padding; None for all.
    """

    module: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> HeadSpec:
        """Read the head of a causal language model, with the transform that its configuration most likely means.

        Raises:
            TypeError: If the model has no output head, or one that is quantised or has an adapter other than plain
                LoRA.
        """
        return cls.readings(model)[0]

    @classmethod
    def readings(cls, model: nn.Module) -> list[HeadSpec]:
        """All transforms that the configuration may mean, the likeliest first.

        Raises:
            TypeError: As `of`.
        """
        get_head: Any = getattr(model, "get_output_embeddings", None)
        module: Any = None if get_head is None else get_head()
        if module is None:
            name = type(model).__name__
            raise TypeError(f"model: got {name} without output embeddings, expected a causal language model")
        cls(module).weight_and_bias()  # Raises now for an unsupported head.
        config = text_config(model)
        vocabulary = getattr(config, "unpadded_vocab_size", None)
        # A divisor is a factor in some models; a model may apply nothing that is named.
        divisors = _numbers(config, _DIVISORS)
        factors = [*_numbers(config, _MULTIPLIERS), *(1 / value for value in divisors), *divisors, 1.0]
        softcaps = [*_numbers(config, _SOFTCAPS), None]
        return [cls(module, scale, softcap, vocabulary) for softcap in softcaps for scale in factors]

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V] of the logits that count; call this inside the head's forward.

        A LoRA adapter on the head is merged, with gradients to its factors. Sharded tensors are gathered.

        Raises:
            TypeError: If the head is quantised, or has another kind of adapter.
        """
        module: Any = self.module
        if hasattr(module, "base_layer"):
            return self._kept(*_with_lora(module))
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point():
            kind = "no weight" if weight is None else f"a weight of {weight.dtype}"
            name = type(module).__name__
            raise TypeError(f"model: got an output head {name} with {kind}, expected a floating-point one")
        return self._kept(_whole(weight), _whole(getattr(module, "bias", None)))

    def shard(self) -> tuple[Tensor, Tensor | None] | None:
        """This process's weight and bias if tensor parallelism splits the vocabulary; None otherwise."""
        module: Any = self.module
        weight = getattr(module, "weight", None)
        # A vocabulary that is cut off ends within a shard.
        whole = self.vocabulary is None or self.vocabulary >= self.rows
        return (weight, getattr(module, "bias", None)) if whole and _by_vocabulary(weight) else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        module: Any = self.module
        return getattr(module, "base_layer", module).weight.dtype

    @property
    def rows(self) -> int:
        """Rows of the whole weight; inside the head's forward."""
        module: Any = self.module
        return int(getattr(module, "base_layer", module).weight.shape[0])

    def _kept(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.vocabulary is None:
            return weight, bias
        return weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary]

    def transformed(self, logits: Tensor) -> Tensor:
        """The logits after the model's scale and softcap."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text decoder."""
    config: Any = model.config
    # Without `decoder`, a model with a text encoder has two of them; with it, a plain configuration is copied.
    has_both = getattr(config, "text_encoder", None) is not None
    return config.get_text_config(decoder=True) if has_both else config.get_text_config()


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(config, name, None) for name in names)
    return [
        float(value)
        for value in values
        if isinstance(value, int | float) and not isinstance(value, bool) and value
    ]


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
