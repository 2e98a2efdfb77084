"""Logits, or hidden states and a head, -> log-prob of each target token; chooses among the kernels.

Nothing is shifted here: ``targets[..., t]`` is the token that position t predicts, as
`prefloss.logratios.completion_targets` makes it.
"""

from __future__ import annotations

from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor

from prefloss.kernels import chunked, naive
from prefloss.kernels.naive import LogitTransform

Impl = Literal["auto", "naive", "chunked", "triton"]
_IMPLS = get_args(Impl)

# "auto" takes naive up to so many logits: there the two take the same time (CPU), and naive can be compiled whole
# and differentiated twice. Beyond it naive's 12 to 16 bytes per logit count, and asking for that much fresh memory
# takes longer than computing the logits twice.
_NAIVE_ELEMENTS = 2**20

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
            slice of tokens at a time and stores no second [..., V] but the gradient. "auto" chooses by size.
        chunk_tokens: Tokens per slice of "chunked", >= 1; None chooses by memory.

    Returns:
        Log-probs, [...], nats, float32 (float64 for float64 logits); 0 and no gradient at ignored targets.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not match, or an option is out of range.
        IndexError: If a target is neither in [0, V) nor `ignore_index`. Checked on CPU, outside torch.compile.
        NotImplementedError: If `impl` is "triton".

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
        >>> token_logps(logits, torch.tensor([0, 1, -100]))
        tensor([-0.6931, -0.0486,  0.0000])
    """
    _check_tensor("logits", logits, floating=True)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, wanted [..., V] with V >= 1")
    transform = _checked_transform(temperature, logit_scale, softcap)
    targets = _checked_targets(targets, "logits", logits, logits.shape[-1], ignore_index)
    if _choose(impl, logits.numel(), chunk_tokens) == "naive":
        return naive.token_logps(logits, targets, transform, ignore_index)
    return chunked.token_logps(logits, targets, transform, ignore_index, chunk_tokens)


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
) -> Tensor:
    r"""Log-prob of each target token, from hidden states and the output head, without storing the logits.

    `token_logps` of the logits :math:`x = h W^\top + b`, which are accumulated and kept in float32 whatever the
    dtype of h and W. "chunked" drops ignored positions before the matmul and computes the logits of each slice
    again in the backward pass; the gradients of weight and bias are summed in float32. What needs no gradient (a
    frozen head) costs none.

    Args:
        hidden: Last hidden states, floating point, [..., H].
        weight: Weight of the head, of the same dtype, [V, H].
        targets: Integer, [...]: position t of `hidden` predicts token ``targets[..., t]``; nothing is shifted.
        bias: Bias of the head, of the same dtype, [V], or None. -inf marks a token that cannot occur.
        temperature: Divides the logits last, > 0.
        logit_scale: Multiplies the logits first, > 0.
        softcap: Bounds the scaled logits, > 0; None leaves them.
        ignore_index: Target of the positions to leave out, whatever their hidden states are (inf and NaN too).
        impl: "naive", "chunked" or "auto", as in `token_logps`; "naive" computes the logits of all positions.
        chunk_tokens: Tokens per slice of "chunked", >= 1; None chooses by memory.

    Returns:
        Log-probs, [...], nats, float32 (float64 for float64 inputs); 0 and no gradient at ignored targets.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ.
        ValueError: If shapes or devices do not match, or an option is out of range.
        IndexError: If a target is neither in [0, V) nor `ignore_index`. Checked on CPU, outside torch.compile.
        NotImplementedError: If `impl` is "triton".

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> head = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> linear_token_logps(hidden, head, torch.tensor([0, 1]))
        tensor([-0.6931, -0.0486])
    """
    _check_tensor("hidden", hidden, floating=True)
    if hidden.dim() == 0:
        raise ValueError("hidden: got shape [], wanted [..., H]")
    _check_head("weight", weight, hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, wanted [V, {hidden.shape[-1]}] with V >= 1 for hidden of "
            f"shape {list(hidden.shape)}"
        )
    vocabulary = weight.shape[0]
    if bias is not None:
        _check_head("bias", bias, hidden)
        if bias.shape != (vocabulary,):
            raise ValueError(
                f"bias: got shape {list(bias.shape)}, wanted [{vocabulary}], one for each row of weight"
            )
    transform = _checked_transform(temperature, logit_scale, softcap)
    targets = _checked_targets(targets, "hidden", hidden, vocabulary, ignore_index)
    if _choose(impl, targets.numel() * vocabulary, chunk_tokens) == "naive":
        return naive.linear_token_logps(hidden, weight, bias, targets, transform, ignore_index)
    return chunked.linear_token_logps(hidden, weight, bias, targets, transform, ignore_index, chunk_tokens)


def _choose(impl: Impl, elements: int, chunk_tokens: int | None) -> Literal["naive", "chunked"]:
    """The kernel that `impl` stands for, for so many logits."""
    if impl not in _IMPLS:
        raise ValueError(f"impl: got {impl!r}, wanted one of {', '.join(map(repr, _IMPLS))}")
    if impl == "triton":
        raise NotImplementedError(
            "impl: 'triton' comes in a later release; wanted 'auto', 'naive' or 'chunked'"
        )
    if chunk_tokens is not None:
        if impl == "naive":
            raise ValueError(
                f"chunk_tokens: got {chunk_tokens!r}, wanted None with impl='naive', which has no slices"
            )
        if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool):
            raise TypeError(f"chunk_tokens: got {type(chunk_tokens).__name__}, wanted an int >= 1")
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: got {chunk_tokens}, wanted an int >= 1")
        return "chunked"
    if impl == "auto":
        return "naive" if elements <= _NAIVE_ELEMENTS else "chunked"
    return impl


def _checked_transform(temperature: float, logit_scale: float, softcap: float | None) -> LogitTransform:
    # a scale <= 0 would turn the -inf of a token that cannot occur into inf or NaN
    _check_positive("logit_scale", logit_scale)
    _check_positive("temperature", temperature)
    if softcap is not None:
        _check_positive("softcap", softcap)
    return LogitTransform(logit_scale, softcap, temperature)


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a float")
    if not 0 < value < inf:
        raise ValueError(f"{name}: got {value}, wanted a finite number > 0")


def _check_tensor(name: str, value: Tensor, *, floating: bool) -> None:
    wanted = "a floating-point tensor" if floating else "an integer tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    # float8 is left out: it is a storage format that means nothing without its scale
    if floating != (value.dtype in _DTYPES) or (not floating and not _is_integer(value.dtype)):
        of = " of float16, bfloat16, float32 or float64" if floating else ""
        raise TypeError(f"{name}: got {value.dtype}, wanted {wanted}{of}")


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _check_head(name: str, value: Tensor, hidden: Tensor) -> None:
    _check_tensor(name, value, floating=True)
    if value.dtype != hidden.dtype:
        # under autocast too: which of the two is meant to be rounded is not for a loss to guess
        raise TypeError(f"{name}: got {value.dtype}, wanted {hidden.dtype} as hidden has; cast one of them")
    _check_device(name, value, "hidden", hidden)


def _check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, wanted {like.device} as {like_name} has")


def _checked_targets(
    targets: Tensor, like_name: str, like: Tensor, vocabulary: int, ignore_index: int
) -> Tensor:
    """The targets as int64, once they are known to fit `like`, [..., V] or [..., H]."""
    _check_tensor("targets", targets, floating=False)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, wanted an int")
    if targets.shape != like.shape[:-1]:
        raise ValueError(
            f"targets: got shape {list(targets.shape)}, wanted {list(like.shape[:-1])}, that of {like_name} "
            "without its last dimension"
        )
    _check_device("targets", targets, like_name, like)
    targets = targets.long()
    # An accelerator would have to wait for the answer (its gather traps instead), and a compiled graph cannot
    # branch on it.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        if outside.any():
            raise IndexError(
                f"targets: got {targets[outside][0].item()}, wanted 0 <= target < {vocabulary} (V) or "
                f"ignore_index={ignore_index}"
            )
    return targets
