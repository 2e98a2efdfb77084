"""The ops as autograd and torch.compile see them: shapes, ignored targets, what is saved for the backward pass.

Eager code runs `torch.autograd.Function`s, which cost less per call and can write gradients in place. torch.compile
puts custom ops, ``torch.ops.prefloss.*``, into its graphs. A graph must know every shape, so these return [2 or 5, N]
statistics and N (or `kept_tokens`) rows of what the scheme keeps, however many tokens count; unused rows are 0. Torch
requires flat schemas, so theirs list the options one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefloss.kernels.arguments import check_range
from prefloss.kernels.linear import backend_of, empty_memory, linear_backward, linear_forward, scale
from prefloss.kernels.naive import LogitTransform, compute_dtype
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import LinearInputs, select_targets

InputGradients = tuple[Tensor | None, ...]


def token_stats(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    plan: Plan,
    outputs: int,
    inplace_backward: bool = False,
) -> Tensor:
    """Statistics of each target: [..., V] logits and [...] targets -> [outputs, ...], 0 at ignored targets.

    `outputs` is 1 for log-probs alone or 5 for all of `softmax.STATS`.
    """
    y = targets.reshape(-1)
    if torch.compiler.is_compiling():
        stats = token_op(logits, y, *_flat(transform, ignore_index, plan, outputs))[:outputs]
    else:
        y = _negative_if_ignored(y, ignore_index)
        stats = _TokenStats.apply(logits, y, transform, plan, outputs, inplace_backward)
    return stats.reshape(outputs, *targets.shape)


def linear_token_stats(
    inputs: LinearInputs, selected: Tensor | None, ignore_index: int, plan: Plan, outputs: int
) -> Tensor:
    """The same from hidden states [..., H] and a head.

    `selected`: `tiles.select_targets`, or None in a compiled graph, which finds them when it runs.
    """
    hidden, weight, bias, targets, transform = inputs
    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if selected is None:
        options = _flat(transform, ignore_index, plan, outputs)
        stats = linear_op(x, weight, bias, y, *options)[0][:outputs]
    else:
        stats = _LinearTokenStats.apply(x, weight, bias, y[selected], selected, transform, plan, outputs)
    return stats.reshape(outputs, *targets.shape)


def _negative_if_ignored(targets: Tensor, ignore_index: int) -> Tensor:
    """-1 at ignored targets, and more than any vocabulary at others below 0, which are mistakes."""
    return torch.where(targets != ignore_index, targets & (2**63 - 1), -1)


class _NoSecondGradient(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("impl: 'chunked' can be differentiated once; 'naive' gives second derivatives")


def differentiable_once(
    backward: Callable[[Any, Tensor], InputGradients],
) -> Callable[[Any, Tensor], InputGradients]:
    """Like torch's once_differentiable, but a second derivative raises also where `grad` is a constant."""

    @functools.wraps(backward)
    def guarded(ctx: Any, grad: Tensor) -> InputGradients:
        with torch.no_grad():
            gradients = backward(ctx, grad)
        if not torch.is_grad_enabled():
            return gradients
        depends_on = [x for x in (grad, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if g is None else _NoSecondGradient.apply(g, *depends_on) for g in gradients)

    return guarded


class _TokenStats(torch.autograd.Function):
    """Logits [..., V] and N targets, -1 at those to leave out -> [outputs, N]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        logits, targets, transform, plan, outputs, inplace_backward = arguments
        stats = backend_of(plan.impl).token_forward(logits, targets, transform, plan.chunk_tokens, outputs)
        ctx.save_for_backward(logits, targets, stats)
        ctx.impl, ctx.options = plan.impl, (transform, plan.chunk_tokens, inplace_backward)
        # a copy, so that the caller may write over the result
        return stats[:outputs].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        return backend_of(ctx.impl).token_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5


class _LinearTokenStats(torch.autograd.Function):
    """Hidden [N, H], weight [V, H], bias [V], the n targets that count and their positions -> [outputs, N]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        hidden, weight, bias, targets, selected, transform, plan, outputs = arguments
        inputs = LinearInputs(_rows(hidden, selected), weight, bias, targets, transform)
        stats, kept = linear_forward(inputs, plan, outputs)
        ctx.save_for_backward(hidden, weight, bias, targets, selected, stats)
        # not through save_for_backward, because the backward pass writes over it
        ctx.kept, ctx.plan, ctx.transform = kept, plan, transform
        return stats.new_zeros(outputs, len(hidden)).index_copy_(1, selected, stats[:outputs])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> InputGradients:
        hidden, weight, bias, targets, selected, stats = ctx.saved_tensors
        grad = grad if len(selected) == len(hidden) else grad[:, selected]
        kept = ctx.kept
        if ctx.plan.scheme == "unscaled":
            d_x, d_weight, d_bias = scale(kept, grad, hidden.dtype), None, None
        else:
            # this pass writes over it; a second one computes the logits again
            ctx.kept = None
            inputs = LinearInputs(_rows(hidden, selected), weight, bias, targets, ctx.transform)
            d_x, d_weight, d_bias = linear_backward(
                grad, inputs, stats, kept, ctx.plan, ctx.needs_input_grad[:3]
            )
        # the largest of all tensors here
        del kept
        if d_x is not None and len(selected) < len(hidden):
            d_x = torch.zeros_like(hidden).index_copy_(0, selected, d_x)
        return d_x, d_weight, d_bias, *(None,) * 5


def _rows(hidden: Tensor, selected: Tensor) -> Tensor:
    return hidden if len(selected) == len(hidden) else hidden.index_select(0, selected)


_OPTIONS = (
    "int ignore_index, float logit_scale, float? softcap, float temperature, str scheme, int chunk_tokens, "
    "int kept_tokens, str impl, bool scale_inputs, int outputs"
)


def _flat(transform: LogitTransform, ignore_index: int, plan: Plan, outputs: int) -> tuple[Any, ...]:
    """The `_OPTIONS`; a plain function and tuple, which torch.compile traces in all versions."""
    softcap = None if transform.softcap is None else float(transform.softcap)
    floats = float(transform.logit_scale), softcap, float(transform.temperature)
    how = plan.scheme, plan.chunk_tokens, plan.kept_tokens, plan.impl, plan.scale_inputs
    return ignore_index, *floats, *how, outputs


def _nested(flat: tuple[Any, ...]) -> tuple[LogitTransform, int, Plan, int]:
    """What `_flat` was called with."""
    ignore_index, scale, softcap, temperature, *how, scale_inputs, outputs = flat
    plan = Plan(*how, scale_inputs=scale_inputs)
    return LogitTransform(scale, softcap, temperature), ignore_index, plan, outputs


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"


# Of ops that wait for the device, which a CUDA graph cannot record; older torch has no such tag.
_WAITS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def _custom_op(
    name: str, arguments: str, returns: str, tags: tuple[torch.Tag, ...] = ()
) -> Callable[..., Any]:
    # torch 2.5 has no argument for tags
    options: dict[str, Any] = {"tags": tags} if tags else {}
    schema = f"({arguments}) -> {returns}"
    return torch.library.custom_op(f"prefloss::{name}", mutates_args=(), schema=schema, **options)


@_custom_op("token_stats", f"Tensor logits, Tensor targets, {_OPTIONS}", "Tensor")
def token_op(logits: Tensor, targets: Tensor, *flat: Any) -> Tensor:
    """Logits [..., V] and targets [N] -> statistics [2 or 5, N]."""
    transform, ignore_index, plan, outputs = _nested(flat)
    check_range(targets, logits.shape[-1], ignore_index)
    y = _negative_if_ignored(targets, ignore_index)
    return backend_of(plan.impl).token_forward(logits, y, transform, plan.chunk_tokens, outputs)


@token_op.register_fake
def _(logits: Tensor, targets: Tensor, *flat: Any) -> Tensor:
    return _empty_stats(logits, targets, flat[-1])


@_custom_op(
    "token_stats_backward", f"Tensor grad, Tensor logits, Tensor targets, Tensor stats, {_OPTIONS}", "Tensor"
)
def token_backward_op(grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, *flat: Any) -> Tensor:
    """Gradient of the logits from that of the first `outputs` statistics."""
    transform, ignore_index, plan, outputs = _nested(flat)
    y = _negative_if_ignored(targets, ignore_index)
    token_backward = backend_of(plan.impl).token_backward
    return token_backward(grad[:outputs], logits, y, stats, transform, plan.chunk_tokens)


@token_backward_op.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_token(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)
    ctx.options = inputs[2:]


def _token_gradients(ctx: Any, grad: Tensor) -> InputGradients:
    d_logits = token_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return d_logits, None, *(None for _ in ctx.options)


token_op.register_autograd(_token_gradients, setup_context=_save_token)


@_custom_op("linear_token_stats", f"{_HEAD}, {_OPTIONS}", "(Tensor, Tensor)", _WAITS)
def linear_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *flat: Any
) -> tuple[Tensor, Tensor]:
    """Hidden [N, H], weight [V, H], bias [V] and targets [N] -> statistics [2 or 5, N] and what the scheme keeps."""
    transform, ignore_index, plan, outputs = _nested(flat)
    check_range(targets, len(weight), ignore_index)
    selected = select_targets(targets, ignore_index)
    memory = empty_memory(hidden, weight, plan)
    if len(selected) < len(memory):
        # the output of an op depends on its inputs only, not on what was in the memory before
        memory.zero_()
    x = hidden.index_select(0, selected)
    inputs = LinearInputs(x, weight, bias, targets[selected], transform)
    stats, _ = linear_forward(inputs, plan, outputs, memory)
    return stats.new_zeros(len(stats), len(hidden)).index_copy_(1, selected, stats), memory


@linear_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *flat: Any
) -> tuple[Tensor, Tensor]:
    _, _, plan, outputs = _nested(flat)
    return _empty_stats(hidden, targets, outputs), empty_memory(hidden, weight, plan)


@_custom_op(
    "linear_token_stats_backward",
    f"Tensor grad, {_HEAD}, Tensor stats, Tensor memory, bool[] needs, {_OPTIONS}",
    "(Tensor, Tensor, Tensor)",
    _WAITS,
)
def linear_backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, without elements where `needs` is false."""
    hidden, weight, bias, targets, stats, memory, needs, *_ = arguments
    transform, ignore_index, plan, outputs = _nested(arguments[7:])
    selected = select_targets(targets, ignore_index)
    grad, d_weight, d_bias = grad[:outputs, selected], None, None
    if plan.scheme == "unscaled":
        d_x = scale(memory[: len(selected)], grad, hidden.dtype)
    else:
        x = hidden.index_select(0, selected)
        inputs = LinearInputs(x, weight, bias, targets[selected], transform)
        kept = memory if min(len(selected), plan.kept_tokens) else None
        d_x, d_weight, d_bias = linear_backward(
            grad, inputs, stats[:, selected], kept, plan, tuple(needs), overwrite=False
        )
    if d_x is not None:
        d_x = hidden.new_zeros(hidden.shape).index_copy_(0, selected, d_x)
    d_hidden, d_weight, d_bias = (hidden.new_zeros(0) if d is None else d for d in (d_x, d_weight, d_bias))
    return d_hidden, d_weight, d_bias


@linear_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, *_, needs = arguments[:7]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _linear_gradients(ctx: Any, grad: Tensor, _: Any) -> InputGradients:
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    gradients = linear_backward_op(grad, *ctx.saved_tensors, needs, *ctx.options)
    needed = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *needed, None, *(None for _ in ctx.options)


linear_op.register_autograd(_linear_gradients, setup_context=_save_linear)


def _empty_stats(x: Tensor, targets: Tensor, outputs: int) -> Tensor:
    shape = (max(2, outputs), targets.shape[0])
    return torch.empty(shape, dtype=compute_dtype(x.dtype), device=x.device)
