"""One forward pass of a causal model that ends in log-probs instead of logits.

The model runs whole, wrapped as it may be, with all its inputs, so that hooks of DDP, FSDP and DeepSpeed fire. Only
its output head is stood in for: where it would multiply by [V, H], the completion tokens are scored, and a probe of a
few known numbers goes on in place of the logits. What the model makes of the probe shows whether its transform of the
logits is the one that was read from its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.kernels import vocab_parallel
from prefloss.logprobs import linear_token_logps
from prefloss.logratios import IGNORE_INDEX
from prefloss.training.head import HeadSpec

_PROBE = (-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 30.0)


class ModelLogps(NamedTuple):
    """What a scored forward pass gives.

    Attributes:
        logps: Log-prob of each target, [rows, T], nats, float32; 0 where ignored.
        aux_loss: Router loss of a mixture of experts, a scalar, or None.
    """

    logps: Tensor
    aux_loss: Tensor | None


def model_logps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> ModelLogps:
    """Log-probs of targets under a causal language model, without its logits.

    Args:
        model: A causal language model of transformers; wrapped by DDP, FSDP, an engine or PEFT if you like.
        inputs: Everything the model takes: input ids, attention mask, position ids, images. No labels.
        targets: Token that each position predicts, [rows, T], `IGNORE_INDEX` where nothing is scored:
            `prefloss.logratios.completion_targets`.
        positions: Position that predicts each target, as an index into all of the inputs' positions, row after row;
            of the shape of `targets`, which may then be any. None: `targets` lie as the inputs do.
        temperature: Divides the logits, > 0.
        impl: As for `prefloss.linear_token_logps`.

    Returns:
        Log-probs, and the router loss if the model gave one.

    Raises:
        TypeError: If the model's head has no exact form here; the message says why.
        ValueError: If targets and hidden states (or positions) differ in shape, or labels are among the inputs.
    """
    if "labels" in inputs:
        raise ValueError(
            "inputs: got labels, expected them as targets: the model would compute a loss from no logits"
        )
    spec = HeadSpec.of(unwrapped(model))
    found: list[Tensor] = []

    def score(hidden: Any) -> Any:
        whole = hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden
        at_targets, wanted = _at_targets(_real(whole, inputs), targets, positions)
        logps = _head_logps(spec, at_targets, wanted, temperature, impl)
        found.append(logps if positions is None else _spread(logps, targets))
        probe = torch.tensor(_PROBE, dtype=_dtype(spec), device=whole.device)
        # DDP looks for the parameters in use from the model's outputs, so these must lead to the log-probs (see
        # _Through, too); where() hands on nothing of them, not even NaN.
        probe = torch.where(torch.zeros_like(probe, dtype=torch.bool), found[-1].sum().to(probe.dtype), probe)
        return _like(hidden, probe.expand(*whole.shape[:-1], len(_PROBE)))

    with _standing_in(spec.module, score):
        outputs = model(**inputs, use_cache=False) if _takes_cache(model) else model(**inputs)
    if len(found) != 1:
        raise TypeError(f"model: got {len(found)} calls of the output head in a forward pass, expected one")
    _check_transform(spec, outputs.logits, type(unwrapped(model)).__name__)
    return ModelLogps(_Through.apply(found[0], outputs.logits), getattr(outputs, "aux_loss", None))


class _Through(torch.autograd.Function):
    """Log-probs as they are; in the backward pass the model's output has its gradient, 0, before them.

    FSDP and DeepSpeed bring a module's weights back when its output gets a gradient. The log-probs left the head by
    another way; so they wait for that of its output, which the probe makes depend on them.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor, logits: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.zeros((), dtype=ctx.dtype, device=grad.device).expand(ctx.shape)


def _head_logps(spec: HeadSpec, hidden: Tensor, targets: Tensor, temperature: float, impl: str) -> Tensor:
    """Log-probs of targets from hidden states, by the whole head or by each process's part of it."""
    transform: dict[str, Any] = {
        "temperature": temperature,
        "logit_scale": spec.logit_scale,
        "softcap": spec.softcap,
    }
    shard = spec.shard()
    if shard is not None:
        weight, bias = shard
        return vocab_parallel.linear_token_logps(
            hidden.to(weight.dtype), weight, targets.to(hidden.device), bias=bias, **transform
        )
    weight, bias = spec.weight_and_bias()
    return linear_token_logps(
        hidden.to(weight.dtype),
        weight,
        targets.to(weight.device),
        bias=bias,
        impl=impl,  # type: ignore[arg-type]
        **transform,
    )


def _dtype(spec: HeadSpec) -> torch.dtype:
    module: Any = spec.module
    return getattr(module, "base_layer", module).weight.dtype


def _like(hidden: Any, probe: Tensor) -> Any:
    """The probe as the hooks of a tensor-parallel head expect its output: on a mesh, if the input came on one."""
    if not hasattr(hidden, "device_mesh"):
        return probe
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh
    return DTensor.from_local(probe, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _real(hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states of the inputs' own positions: adapters of the prompt-learning kind put some before them."""
    ids = inputs.get("input_ids")
    return hidden if ids is None or hidden.ndim < 3 else hidden[:, -ids.shape[1] :]


def _at_targets(hidden: Tensor, targets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states and the targets that they predict, [..., H] and [...]."""
    if positions is None:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"targets: got shape {list(targets.shape)}, expected {list(hidden.shape[:-1])} as the hidden states have"
            )
        return hidden, targets
    if positions.shape != targets.shape:
        raise ValueError(
            f"positions: got shape {list(positions.shape)}, expected {list(targets.shape)} as targets have"
        )
    scored = targets != IGNORE_INDEX
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions[scored]), targets[scored]


def _spread(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of the targets that count, [n], where they lie among all."""
    return logps.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, logps)


@contextmanager
def _standing_in(head: nn.Module, score: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `score` take the place of the head's forward; its hooks still fire."""
    own = head.__dict__.get("forward")
    head.forward = lambda hidden, *args, **kwargs: score(hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


def _check_transform(spec: HeadSpec, logits: Tensor, model: str) -> None:
    probe = torch.tensor(_PROBE, dtype=logits.dtype, device=logits.device)
    wanted = spec.transformed(probe)
    # The last position: prefixes of padding or images do not matter to a transform of single numbers.
    found = logits.reshape(-1, logits.shape[-1])[-1]
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance):
        made = [round(x, 4) for x in found.detach().float().tolist()]
        raise TypeError(
            f"model: {model} turns logits {list(_PROBE)} into {made}, which is "
            f"not a scale of {spec.logit_scale} and a softcap of {spec.softcap} as read from its configuration; its "
            "log-probs cannot be computed without its logits"
        )


def _takes_cache(model: nn.Module) -> bool:
    return hasattr(getattr(unwrapped(model), "config", None), "use_cache")


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, an engine, a compiled module or PEFT."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
