"""Logits, or hidden states and a head, -> log-prob of each target token; chooses among the kernels.

Nothing is shifted here: ``targets[..., t]`` is the token that position t predicts, as
`prefloss.logratios.completion_targets` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefloss import plan as planning
from prefloss.kernels import chunked, kl, naive, ops
from prefloss.kernels.arguments import (
    Impl,
    check_choice,
    check_limits,
    check_linear,
    check_logits,
    check_reference,
    checked_targets,
    checked_transform,
)
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.rows import LOW_SOFTCAP
from prefloss.plan import Plan


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Numbers of each token's distribution over the vocabulary; all [...], 0 at ignored targets.

    Attributes:
        logps: Log-prob of the target, nats.
        logsumexp: Log of the sum of exp of the (transformed) logits, nats.
        entropy: Entropy, nats.
        log_sum_sq: Log of the sum of the squared probabilities, nats.
        top1: Whether no token is likelier than the target; bool.
    """

    logps: Tensor
    logsumexp: Tensor
    entropy: Tensor
    log_sum_sq: Tensor
    top1: Tensor


@dataclass(frozen=True, eq=False)
class TokenKL:
    """How two distributions over the vocabulary differ at each token; all [...], 0 at ignored targets.

    Attributes:
        kl: KL(reference || policy), nats, with gradient to the policy.
        reverse_kl: KL(policy || reference), nats, with gradient to the policy.
        reference_entropy: Entropy of the reference divided by log V, in [0, 1]; no gradient.
    """

    kl: Tensor
    reverse_kl: Tensor
    reference_entropy: Tensor


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
    strict: bool = False,
) -> Tensor:
    r"""Log-prob of each target token, from logits.

    .. math:: \log p_t = z_{t, y_t} - \log \sum_v e^{z_{t, v}}, \quad
        z = \frac{1}{T} \, c \tanh \frac{s x}{c}

    with logits x, targets y, `logit_scale` s, `softcap` c (without one, z = s x / T) and `temperature` T. Half
    precision is upcast to float32 before any of this, under autocast too.

    Args:
        logits: Floating point, [..., V]. -inf marks a token that cannot occur, with a softcap too.
        targets: Integer, [...]: position t of the logits predicts token ``targets[..., t]``; nothing is shifted.
        temperature: Divides the logits last, > 0.
        logit_scale: Multiplies the logits first, > 0.
        softcap: Bounds the scaled logits, > 0; None leaves them.
        ignore_index: Target of the positions to leave out, whatever their logits are (inf and NaN too).
        impl: "naive" is plain torch: it can be differentiated twice and compiled as one graph. "chunked" works a
            slice of tokens at a time and stores no second [..., V] but the gradient. "triton" is the same in Triton
            kernels, for float32 and half precision. "auto" chooses by size and device.
        chunk_tokens: Tokens per slice of "chunked", >= 1; None chooses by memory.
        inplace_backward: Let the backward pass of "chunked" write the gradient over the logits, which saves memory
            of their size. They hold no logits afterwards. Whether somebody reads them later (a metric, say) cannot
            be detected; another op that saved them for its own backward pass raises torch's error about in-place
            changes, and so does a second backward pass. Without effect under torch.compile, where the gradient
            gets memory of its own.
        strict: Refuse a slower way than this op has for such inputs, see `prefloss.explain`.

    Returns:
        Log-probs, [...], nats, float32 (float64 for float64 logits); 0 and no gradient at ignored targets.

    Raises:
        RuntimeError: If `strict` and there is a fallback, or `impl` is "triton" and it cannot run here.
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, or an option is out of range.
        IndexError: If a target is neither in [0, V) nor `ignore_index`. Checked on CPU, outside torch.compile.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
        >>> token_logps(logits, torch.tensor([0, 1, -100]))
        tensor([-0.6931, -0.0486,  0.0000])
    """
    stats = _token_stats(
        logits, targets, (temperature, logit_scale, softcap), ignore_index, impl, chunk_tokens, 1, strict,
        inplace_backward,
    )  # fmt: skip
    return stats[0]


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    chunk_tokens: int | None = None,
    stats_gradient: bool = False,
    strict: bool = False,
) -> TokenStats:
    """Log-prob of each target token and further numbers of its distribution, in one pass over the logits.

    Args:
        logits: As in `token_logps`, like all that follow.
        targets: As there.
        temperature: As there.
        logit_scale: As there.
        softcap: As there.
        ignore_index: As there.
        impl: As there.
        chunk_tokens: As there.
        stats_gradient: Whether logsumexp, entropy and log_sum_sq have a gradient; the log-probs always do.
        strict: As there.

    Returns:
        The numbers, each [...].

    Example:
        >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]))
        >>> stats.entropy.exp(), stats.log_sum_sq.exp(), stats.top1
        (tensor([4.]), tensor([0.2500]), tensor([True]))
    """
    stats = _token_stats(
        logits, targets, (temperature, logit_scale, softcap), ignore_index, impl, chunk_tokens, 5, strict
    )
    return _named(stats, stats_gradient)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    chunk_tokens: int | None = None,
    budget_bytes: int | None = None,
    skip_below: float = 0.0,
    strict: bool = False,
) -> Tensor:
    r"""Log-prob of each target token, from hidden states and the output head, without storing the logits.

    `token_logps` of the logits :math:`x = h W^\top + b`, which are accumulated in float32 whatever the dtype of h
    and W. "chunked" drops ignored positions before the matmul and keeps for the backward pass what makes it cheapest
    within a memory budget (`prefloss.explain` says what that is): with a frozen head the gradient of each log-prob
    in its hidden state, two matmuls in all; with a trainable one the logits, three matmuls, or four for the tokens
    whose logits do not fit. Any loss may follow. The log-probs are those of float32 logits on every path. In
    bfloat16 each gradient of a logit is rounded to bfloat16 once (relative error up to 2^-8) where the device
    multiplies bfloat16, and what is kept of half-precision logits errs by up to 2.5e-4 of each; all sums are
    float32. What needs no gradient costs none.

    Args:
        hidden: Last hidden states, floating point, [..., H].
        weight: Weight of the head, of the same dtype, [V, H].
        targets: Integer, [...]: position t of `hidden` predicts token ``targets[..., t]``; nothing is shifted.
        bias: Bias of the head, of the same dtype, [V], or None. -inf marks a token that cannot occur.
        temperature: Divides the logits last, > 0.
        logit_scale: Multiplies the logits first, > 0.
        softcap: Bounds the scaled logits, > 0; None leaves them.
        ignore_index: Target of the positions to leave out, whatever their hidden states are (inf and NaN too).
        impl: "naive", "chunked", "triton" or "auto", as in `token_logps`; "naive" computes the logits of all positions.
        chunk_tokens: Size of a tile of logits of "chunked", as many as so many tokens have, >= 1; None chooses by
            device.
        budget_bytes: Memory that "chunked" may use between forward and backward and for its tiles, >= 0, gradients
            left out; None for 1 GiB. One tile is used whatever the budget is.
        skip_below: Lets "chunked" leave tokens of the vocabulary out of the backward matmuls of a tile where none of
            their gradients of a logit exceeds this times the largest gradient of a log-prob in the tile, G,
            0 <= skip_below < 1. With S what is left out, the gradient of a hidden state is then off by at most
            skip_below * G * the sum of abs(W_v) over S, that of a row of W by skip_below * G * the sum of abs(h_t).
            0 leaves nothing out. For what it saves see benchmarks/bench_skip.py. Without effect under torch.compile.
        strict: Refuse a slower way than this op has for such inputs, see `prefloss.explain`.

    Returns:
        Log-probs, [...], nats, float32 (float64 for float64 inputs); 0 and no gradient at ignored targets.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ.
        ValueError: If shapes or devices do not match, or an option is out of range.
        IndexError: If a target is neither in [0, V) nor `ignore_index`. Checked on CPU, outside torch.compile.
        RuntimeError: If `strict` and there is a fallback, or `impl` is "triton" and it cannot run here.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> head = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> linear_token_logps(hidden, head, torch.tensor([0, 1]))
        tensor([-0.6931, -0.0486])
    """
    return _linear_token_stats(
        hidden, weight, bias, targets, (temperature, logit_scale, softcap), ignore_index, impl, chunk_tokens,
        budget_bytes, strict, 1, False, skip_below,
    )[0]  # fmt: skip


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    chunk_tokens: int | None = None,
    budget_bytes: int | None = None,
    stats_gradient: bool = False,
    strict: bool = False,
) -> TokenStats:
    """Log-prob of each target token and further numbers of its distribution, without storing the logits.

    Args:
        hidden: As in `linear_token_logps`, like all that follow.
        weight: As there.
        targets: As there.
        bias: As there.
        temperature: As there.
        logit_scale: As there.
        softcap: As there.
        ignore_index: As there.
        impl: As there.
        chunk_tokens: As there.
        budget_bytes: As there.
        stats_gradient: Whether logsumexp, entropy and log_sum_sq have a gradient; the log-probs always do. With a
            frozen head it costs a third matmul.
        strict: As there.

    Returns:
        The numbers, each [...].

    Example:
        >>> stats = linear_token_stats(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> stats.entropy.exp()
        tensor([4.])
    """
    stats = _linear_token_stats(
        hidden, weight, bias, targets, (temperature, logit_scale, softcap), ignore_index, impl, chunk_tokens,
        budget_bytes, strict, 5, stats_gradient,
    )  # fmt: skip
    return _named(stats, stats_gradient)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> TokenKL:
    """KL divergences between the next-token distributions of reference and policy, without storing the logits.

    A slice of tokens at a time. With a frozen head the gradients of both divergences in the hidden states are saved
    unscaled; with a trainable one the backward pass computes the logits of both models again. The reference gets no
    gradient.

    Args:
        hidden: Last hidden states of the policy, floating point, [..., H].
        weight: Weight of its head, [V, H].
        reference_hidden: The same of the reference, [..., H'].
        reference_weight: Weight of its head, [V, H'].
        targets: Integer, [...]; says which positions count, its values are not read otherwise.
        bias: Bias of the policy's head, [V], or None.
        reference_bias: Bias of the reference's head, [V], or None.
        temperature: Divides the logits of both last, > 0.
        logit_scale: Multiplies the logits of both first, > 0.
        softcap: Bounds the scaled logits of both, > 0; None leaves them.
        ignore_index: Target of the positions to leave out.
        chunk_tokens: Tokens per slice, >= 1; None chooses by memory.

    Returns:
        The divergences, each [...], in nats.

    Example:
        >>> hidden, head = torch.ones(1, 2), torch.eye(2)
        >>> linear_token_kl(hidden, head, hidden, head, torch.tensor([0])).kl
        tensor([0.])
    """
    transform = checked_transform(temperature, logit_scale, softcap)
    vocabulary = check_linear(hidden, weight, bias)
    check_reference(hidden, vocabulary, reference_hidden, reference_weight, reference_bias)
    targets = checked_targets(targets, "hidden", hidden, vocabulary, ignore_index)
    check_choice("chunked", chunk_tokens, hidden.dtype)
    out = kl.linear_token_kl(
        hidden, weight, bias, reference_hidden.detach(), reference_weight.detach(),
        None if reference_bias is None else reference_bias.detach(), targets, transform, ignore_index, chunk_tokens,
    )  # fmt: skip
    return TokenKL(out[0], out[1], out[2].detach())


def _token_stats(
    logits: Tensor,
    targets: Tensor,
    options: tuple[float, float, float | None],
    ignore_index: int,
    impl: Impl,
    chunk_tokens: int | None,
    outputs: int,
    strict: bool,
    inplace_backward: bool = False,
) -> Tensor:
    """[outputs, ...] statistics from logits."""
    check_logits(logits, inplace_backward)
    transform = checked_transform(*options)
    targets = checked_targets(targets, "logits", logits, logits.shape[-1], ignore_index)
    check_choice(impl, chunk_tokens, logits.dtype)
    plan = planning.plan_token(logits, targets.numel(), logits.shape[-1], impl, chunk_tokens)
    planning.note(plan, strict)
    if plan.impl == "naive":
        return naive.token_stats(logits, targets, transform, ignore_index, outputs)
    if not torch.compiler.is_compiling():
        return _kernels(plan.impl).token_stats(
            logits, targets, transform, ignore_index, chunk_tokens, outputs, inplace_backward
        )
    flat = targets.reshape(-1)
    safe = torch.where(flat != ignore_index, flat, -1)
    chunk = chunk_tokens or max(1, 2**26 // logits.shape[-1])
    stats = ops.token_stats(logits, safe, *_transform_options(transform), chunk, outputs, plan.impl)
    return stats[:outputs].reshape(outputs, *targets.shape)


def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: tuple[float, float, float | None],
    ignore_index: int,
    impl: Impl,
    chunk_tokens: int | None,
    budget_bytes: int | None,
    strict: bool,
    outputs: int,
    stats_gradient: bool,
    skip_below: float = 0.0,
) -> Tensor:
    """[outputs, ...] statistics from hidden states and a head."""
    vocabulary = check_linear(hidden, weight, bias)
    transform = checked_transform(*options)
    targets = checked_targets(targets, "hidden", hidden, vocabulary, ignore_index)
    check_choice(impl, chunk_tokens, hidden.dtype)
    check_limits(budget_bytes, skip_below)
    temperature, _, softcap = options
    head = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    hidden_only = torch.is_grad_enabled() and hidden.requires_grad and not head

    def plan_for(tokens: int) -> Plan:
        plan = planning.plan_linear(
            hidden, tokens, vocabulary, hidden.shape[-1], hidden_only, head, stats_gradient, impl, chunk_tokens,
            budget_bytes, targets.numel(), softcap is not None and softcap / temperature < LOW_SOFTCAP,
        )  # fmt: skip
        return planning.note(plan, strict)

    if planning.is_naive(impl, targets.numel() * vocabulary, chunk_tokens):
        plan_for(targets.numel())
        return naive.linear_token_stats(hidden, weight, bias, targets, transform, ignore_index, outputs)
    if not torch.compiler.is_compiling():
        kernel = "triton" if planning.uses_triton(impl, hidden) else "chunked"
        return _kernels(kernel).linear_token_stats(
            hidden,
            weight,
            bias,
            targets,
            transform,
            ignore_index,
            lambda n: planning.path_of(plan_for(n), skip_below),
            outputs,
        )
    plan = plan_for(targets.numel())
    path = planning.path_of(plan)
    stats, _ = ops.linear_token_stats(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), ignore_index,
        *_transform_options(transform), path.scheme, path.chunk_tokens, path.kept_tokens, outputs, plan.impl,
    )  # fmt: skip
    return stats[:outputs].reshape(outputs, *targets.shape)


def _kernels(impl: str) -> Any:
    """The module of that name; Triton is imported where it is used."""
    if impl == "triton":
        from prefloss.kernels import tiles

        return tiles
    return chunked


def _transform_options(transform: LogitTransform) -> tuple[float, float | None, float]:
    """As the custom ops take them."""
    cap = None if transform.softcap is None else float(transform.softcap)
    return float(transform.logit_scale), cap, float(transform.temperature)


def _named(stats: Tensor, stats_gradient: bool) -> TokenStats:
    logps, top1, others = stats[0], stats[4].detach() > 0.5, stats if stats_gradient else stats.detach()
    return TokenStats(logps, others[1], others[2], others[3], top1)
