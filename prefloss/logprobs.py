"""Log-prob of each target token, from logits or from hidden states and a head; `explain` says how it is computed.

Targets are not shifted: ``targets[..., t]`` is the token that position t predicts, as in the result of
`prefloss.logratios.completion_targets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefloss.arguments import flag
from prefloss.kernels import autograd, kl, naive
from prefloss.kernels.arguments import (
    Impl,
    Options,
    check_linear,
    check_logits,
    check_reference,
    check_sizes,
    check_targets,
)
from prefloss.kernels.naive import LogitTransform, Model
from prefloss.kernels.plan import Plan, Request, make_plan, report
from prefloss.kernels.tiles import LinearInputs, select_targets


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
    """Divergences of two distributions over the vocabulary at each token; all [...], 0 at ignored targets.

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
        softcap: Bounds the scaled logits, > 0; None for no bound.
        ignore_index: Target of the positions to leave out; their logits may be inf or NaN.
        impl: "naive" is plain torch: it can be differentiated twice and compiled as one graph. "chunked" works a
            slice of tokens at a time and stores no second [..., V] but the gradient. "triton" is the same in Triton
            kernels, for float32 and half precision. "auto" chooses by size and device.
        chunk_tokens: Tokens per slice of "chunked", >= 1; None chooses by memory.
        inplace_backward: Let the backward pass of "chunked" write the gradient over the logits, which saves memory
            of their size. The logits are lost: code that reads them later (a metric, say) gets the gradient. Another
            op that saved them, and a second backward pass, raise torch's error about in-place changes. No effect under
            torch.compile.
        strict: Raise if a faster way is not available here, see `Plan.fallback` of `explain`.

    Returns:
        Log-probs, [...], nats, float32 (float64 for float64 logits); 0 and no gradient at ignored targets.

    Raises:
        RuntimeError: If `strict` and the plan has a fallback, or `impl` is "triton" and it cannot run here.
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, or an option is out of range.
        IndexError: If a target is neither in [0, V) nor `ignore_index`, on a CPU. An accelerator cannot say so without
            being waited for; there the log-prob of such a target is NaN, or plain torch reports an assertion.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
        >>> token_logps(logits, torch.tensor([0, 1, -100]))
        tensor([-0.6931, -0.0486,  0.0000])
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    options = Options(transform, ignore_index, impl, chunk_tokens, strict=strict)
    return _token_stats(logits, targets, options, 1, inplace_backward)[0]


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

    `token_logps` describes the other arguments and the errors. `stats_gradient`: whether logsumexp, entropy and
    log_sum_sq have a gradient; the log-probs always do.

    Returns:
        The numbers, each [...].

    Example:
        >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]))
        >>> stats.entropy.exp(), stats.log_sum_sq.exp(), stats.top1
        (tensor([4.]), tensor([0.2500]), tensor([True]))
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    options = Options(transform, ignore_index, impl, chunk_tokens, strict=strict)
    flag("stats_gradient", stats_gradient)
    return _name_stats(_token_stats(logits, targets, options, 5), stats_gradient)


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
    strict: bool = False,
    round_once: bool = False,
) -> Tensor:
    r"""Log-prob of each target token, from hidden states and the output head, without storing the logits.

    `token_logps` of the logits :math:`x = h W^\top + b`, which are summed in float32 whatever the dtype of h and W.
    "chunked" drops ignored positions before the matmul. What it keeps for the backward pass makes that as cheap as a
    memory budget allows (see `explain`). With a frozen head it keeps the gradient of each log-prob in its hidden
    state: two matmuls in all. With a trainable head it keeps the logits: three matmuls, or four for the tokens whose
    logits do not fit. Any loss may follow.

    The log-probs are those of float32 logits on every path. In bfloat16 each gradient of a logit is rounded to
    bfloat16 once (relative error up to 2^-8) where the device multiplies bfloat16, and half-precision logits are kept
    with an error of up to 2.5e-4 nats; all sums are float32, on a GPU whatever `torch.set_float32_matmul_precision` and
    `torch.backends.cuda.matmul` allow. Triton also rounds the hidden states times the gradients of their log-probs
    where the gradient of a head in half precision is computed from kept logits, see `round_once`. Inputs that need no
    gradient cost none.
    Errors are those of `token_logps`, and a TypeError if dtypes differ.

    Args:
        hidden: Last hidden states, floating point, [..., H].
        weight: Weight of the head, of the same dtype, [V, H].
        targets: Integer, [...]: position t of `hidden` predicts token ``targets[..., t]``; nothing is shifted.
        bias: Bias of the head, of the same dtype, [V], or None. -inf marks a token that cannot occur.
        temperature: Divides the logits last, > 0.
        logit_scale: Multiplies the logits first, > 0.
        softcap: Bounds the scaled logits, > 0; None for no bound.
        ignore_index: Target of the positions to leave out; their hidden states may be inf or NaN.
        impl: "naive", "chunked", "triton" or "auto", as in `token_logps`; "naive" computes the logits of all positions.
        chunk_tokens: Size of a tile of logits, as the number of tokens whose logits fill it, >= 1; None: by device.
        budget_bytes: Memory for what is kept between forward and backward and for tiles, without the gradients,
            >= 0; None for 1 GiB, on a GPU for half of its free memory. One tile is used whatever the budget is.
        strict: Raise if a faster way is not available here, see `Plan.fallback` of `explain`.
        round_once: With Triton, a trained head in half precision and logits kept: do not round the hidden states times
            the gradients of their log-probs. The error of the gradient of the head falls by a fifth, and a pass over
            the kept logits more is made.

    Returns:
        Log-probs, [...], nats, float32 (float64 for float64 inputs); 0 and no gradient at ignored targets.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> head = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> linear_token_logps(hidden, head, torch.tensor([0, 1]))
        tensor([-0.6931, -0.0486])
    """
    inputs = LinearInputs(hidden, weight, bias, targets, LogitTransform(logit_scale, softcap, temperature))
    options = Options(inputs.transform, ignore_index, impl, chunk_tokens, budget_bytes, strict, round_once)
    return _linear_token_stats(inputs, options, 1)[0]


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

    `linear_token_logps` describes the other arguments and the errors. `stats_gradient`: whether logsumexp, entropy
    and log_sum_sq have a gradient, which with a frozen head costs a third matmul; the log-probs always do.

    Example:
        >>> stats = linear_token_stats(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> stats.entropy.exp()
        tensor([4.])
    """
    inputs = LinearInputs(hidden, weight, bias, targets, LogitTransform(logit_scale, softcap, temperature))
    options = Options(inputs.transform, ignore_index, impl, chunk_tokens, budget_bytes, strict)
    flag("stats_gradient", stats_gradient)
    return _name_stats(_linear_token_stats(inputs, options, 5, stats_gradient), stats_gradient)


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

    Works a slice of tokens at a time. With a frozen head the gradients of both divergences in the hidden states are
    saved; with a trainable one the backward pass computes the logits of both models again. The reference gets no
    gradient.

    Args:
        hidden: Last hidden states of the policy, floating point, [..., H].
        weight: Weight of its head, [V, H].
        reference_hidden: Last hidden states of the reference, [..., H'].
        reference_weight: Weight of its head, [V, H'].
        targets: Integer, [...]; only whether a target is ignored matters.
        bias: Bias of the policy's head, [V], or None.
        reference_bias: Bias of the reference's head, [V], or None.
        temperature: Divides the logits of both last, > 0.
        logit_scale: Multiplies the logits of both first, > 0.
        softcap: Bounds the scaled logits of both, > 0; None for no bound.
        ignore_index: Target of the positions to leave out.
        chunk_tokens: Tokens per slice, >= 1; None chooses by memory.

    Returns:
        The divergences, each [...], in nats.

    Example:
        >>> hidden, head = torch.ones(1, 2), torch.eye(2)
        >>> linear_token_kl(hidden, head, hidden, head, torch.tensor([0])).kl
        tensor([0.])
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    policy = Model(hidden, weight, bias)
    reference = Model(reference_hidden, reference_weight, reference_bias)
    vocabulary = check_linear(*policy)
    check_reference(hidden, vocabulary, reference)
    Options(transform, ignore_index, chunk_tokens=chunk_tokens).check(hidden.dtype)
    targets = check_targets(targets, "hidden", hidden, vocabulary, ignore_index)
    reference_bias = None if reference_bias is None else reference_bias.detach()
    reference = Model(reference_hidden.detach(), reference_weight.detach(), reference_bias)
    out = kl.linear_token_kl(policy, reference, targets, transform, ignore_index, chunk_tokens)
    return TokenKL(out[0], out[1], out[2].detach())


def explain(
    *,
    tokens: int,
    vocabulary: int,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trainable_head: bool = True,
    gradient: bool = True,
    stats_gradient: bool = False,
    impl: Impl = "auto",
    chunk_tokens: int | None = None,
    budget_bytes: int | None = None,
    round_once: bool = False,
) -> Plan:
    """How `token_logps` or, with a `width`, `linear_token_logps` computes log-probs for these sizes on this machine.

    Args:
        tokens: Targets that count (not ignored).
        vocabulary: V.
        width: H of the hidden states; None for logits.
        dtype: Of logits, or of hidden states and head.
        device: Where they are.
        trainable_head: Whether weight or bias of the head gets a gradient.
        gradient: Whether any input gets one.
        stats_gradient: Whether entropy and the other statistics have one too.
        impl: As given to the op.
        chunk_tokens: As given to the op.
        budget_bytes: As given to the op.
        round_once: As given to the op.

    Returns:
        The plan; `print` it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size or an option is out of range, or there is no such device.

    Example:
        >>> plan = explain(tokens=4096, vocabulary=128_256, width=1024, trainable_head=False)
        >>> plan.scheme, plan.matmuls
        ('unscaled', 2)
    """
    flag("trainable_head", trainable_head)
    flag("gradient", gradient)
    flag("stats_gradient", stats_gradient)
    like = check_sizes(tokens, vocabulary, width, dtype, device)
    needs = "none" if not gradient else "head" if trainable_head else "hidden"
    options = Options(LogitTransform(), -100, impl, chunk_tokens, budget_bytes, round_once=round_once)
    options.check(dtype)
    return make_plan(Request(like, vocabulary, width, needs, stats_gradient, options), tokens)


def _token_stats(
    logits: Tensor, targets: Tensor, options: Options, outputs: int, inplace_backward: bool = False
) -> Tensor:
    """[outputs, ...] statistics from logits."""
    flag("inplace_backward", inplace_backward)
    check_logits(logits, inplace_backward)
    options.check(logits.dtype)
    transform, ignore_index, vocabulary = options.transform, options.ignore_index, logits.shape[-1]
    targets = check_targets(targets, "logits", logits, vocabulary, ignore_index)
    request = Request(logits, vocabulary, None, "none", False, options)
    plan = report(make_plan(request, targets.numel()), options.strict)
    if plan.impl == "naive":
        return naive.token_stats(logits, targets, transform, ignore_index, outputs)
    return autograd.token_stats(logits, targets, transform, ignore_index, plan, outputs, inplace_backward)


def _linear_token_stats(
    inputs: LinearInputs, options: Options, outputs: int, stats_gradient: bool = False
) -> Tensor:
    """[outputs, ...] statistics from hidden states and a head: select the targets that count, plan, run."""
    hidden, weight, bias, targets, _ = inputs
    vocabulary, ignore_index = check_linear(hidden, weight, bias), options.ignore_index
    options.check(hidden.dtype)
    targets = check_targets(targets, "hidden", hidden, vocabulary, ignore_index)
    inputs = inputs._replace(targets=targets)
    needs = _needs_gradient(hidden, weight, bias)
    request = Request(hidden, vocabulary, hidden.shape[-1], needs, stats_gradient, options)
    positions, selected = targets.numel(), None
    # a compiled graph selects the targets when it runs
    if not torch.compiler.is_compiling() and not request.naive(positions):
        selected = select_targets(targets, ignore_index)
    tokens = positions if selected is None else len(selected)
    plan = report(make_plan(request, tokens, positions), options.strict)
    if plan.impl == "naive":
        return naive.linear_token_stats(*inputs, ignore_index, outputs)
    return autograd.linear_token_stats(inputs, selected, ignore_index, plan, outputs)


def _needs_gradient(hidden: Tensor, *head: Tensor | None) -> Literal["none", "hidden", "head"]:
    if not torch.is_grad_enabled():
        return "none"
    if any(part is not None and part.requires_grad for part in head):
        return "head"
    return "hidden" if hidden.requires_grad else "none"


def _name_stats(stats: Tensor, stats_gradient: bool) -> TokenStats:
    logps, top1, others = stats[0], stats[4].detach() > 0.5, stats if stats_gradient else stats.detach()
    return TokenStats(logps, others[1], others[2], others[3], top1)
