"""One forward pass of a causal model that ends in log-probs instead of logits.

The model runs with all its wrappers and inputs, so that the hooks of DDP, FSDP and DeepSpeed fire. Only the forward of
its output head is replaced: it scores the completion tokens and returns a probe of a few known numbers instead of
logits. The model's outputs for the probe show whether its transform of the logits is the one that its configuration
names.
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
from prefloss.training.inputs import checked

_PROBE = (-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 30.0)


class ModelLogps(NamedTuple):
    """Results of a scored forward pass.

    Attributes:
        logps: Log-prob of each target, [rows, T], nats, float32; 0 where ignored.
        aux_loss: Router loss of a mixture of experts, a scalar, or None.
    """

    logps: Tensor
    aux_loss: Tensor | None


@checked
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
        model: A causal language model of transformers, possibly wrapped by DDP, FSDP, an engine or PEFT.
        inputs: Keyword arguments of the model: input ids, attention mask, position ids, images. No labels.
        targets: Token that each position predicts, [rows, T], `IGNORE_INDEX` where nothing is scored:
            `prefloss.logratios.completion_targets`.
        positions: Position that predicts each target, as an index into the flattened inputs; `targets` may then have
            any shape, and `positions` has the same. None: `targets` have the shape of the inputs.
        temperature: Divides the logits, > 0.
        impl: As for `prefloss.linear_token_logps`.

    Returns:
        Log-probs, and the router loss if the model gave one.

    Raises:
        TypeError: If the model's head is not supported; the message says why.
        ValueError: If targets and hidden states (or positions) differ in shape, labels are among the inputs, or a token
            id is beyond the model's vocabulary (on the CPU).
    """
    if "labels" in inputs:
        raise ValueError(
            "inputs: got labels, expected them as targets: the model would compute a loss without logits"
        )
    spec = HeadSpec.of(unwrapped(model))
    scored: list[Tensor] = []

    def score(hidden: Any) -> Any:
        whole = hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden
        at_targets, ids = _at_targets(_without_virtual(whole, inputs), targets, positions)
        logps = _head_logps(spec, at_targets, ids, temperature, impl)
        scored.append(logps if positions is None else _spread(logps, targets))
        probe = torch.tensor(_PROBE, dtype=_dtype(spec), device=whole.device)
        # DDP finds the parameters in use from the model's outputs, so the outputs must depend on the log-probs (see
        # also _Through). where() passes on none of their values, not even NaN.
        probe = torch.where(
            torch.zeros_like(probe, dtype=torch.bool), scored[-1].sum().to(probe.dtype), probe
        )
        return _like(hidden, probe.expand(*whole.shape[:-1], len(_PROBE)))

    with _replaced_forward(spec.module, score):
        outputs = model(**inputs, use_cache=False) if _takes_cache(model) else model(**inputs)
    if len(scored) != 1:
        raise TypeError(f"model: got {len(scored)} calls of the output head in a forward pass, expected one")
    _check_transform(spec, outputs.logits, type(unwrapped(model)).__name__)
    return ModelLogps(_Through.apply(scored[0], outputs.logits), getattr(outputs, "aux_loss", None))


class _Through(torch.autograd.Function):
    """Identity that makes the model's output a parent of the log-probs in the graph.

    FSDP and DeepSpeed re-gather a module's weights when its output receives a gradient. The log-probs left the head by
    another path, so the backward pass must reach the output, with gradient 0, before the head.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor, logits: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.zeros((), dtype=ctx.dtype, device=grad.device).expand(ctx.shape)


def _head_logps(spec: HeadSpec, hidden: Tensor, targets: Tensor, temperature: float, impl: str) -> Tensor:
    """Log-probs of targets from hidden states, by the whole head or by this process's shard of it."""
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
    """The probe as a DTensor if the hidden states are one: hooks of a tensor-parallel head expect that."""
    if not hasattr(hidden, "device_mesh"):
        return probe
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh
    return DTensor.from_local(probe, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _without_virtual(hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states of the input tokens: prompt-learning adapters prepend virtual ones."""
    ids = inputs.get("input_ids")
    return hidden if ids is None or hidden.ndim < 3 else hidden[:, -ids.shape[1] :]


def _at_targets(hidden: Tensor, targets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states that predict something, [..., H], and the tokens they predict, [...]."""
    if positions is None:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"targets: got shape {list(targets.shape)}, expected {list(hidden.shape[:-1])} as hidden states have"
            )
        return hidden, targets
    if positions.shape != targets.shape:
        raise ValueError(
            f"positions: got shape {list(positions.shape)}, expected {list(targets.shape)} as targets have"
        )
    scored = targets != IGNORE_INDEX
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions[scored]), targets[scored]


def _spread(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of scored targets, [n], at their places in the shape of `targets`; 0 elsewhere."""
    return logps.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, logps)


@contextmanager
def _replaced_forward(head: nn.Module, score: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run `score` as the head's forward; the head's hooks still fire."""
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
    expected = spec.transformed(probe)
    # Any position does, since the transform acts on single numbers; the last one always exists.
    actual = logits.reshape(-1, logits.shape[-1])[-1]
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        outputs = [round(x, 4) for x in actual.detach().float().tolist()]
        raise TypeError(
            f"model: got {model}, which turns logits {list(_PROBE)} into {outputs}; expected the scale of "
            f"{spec.logit_scale} and the softcap of {spec.softcap} that its configuration names. Its log-probs cannot "
            "be computed without its logits"
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
