"""Validation of the arguments of the log-prob ops; each error names the argument."""

from __future__ import annotations

from math import inf
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prefloss import kernels
from prefloss.arguments import flag, instance, integer, shown
from prefloss.kernels.naive import LogitTransform, Model

Impl = Literal["auto", "naive", "chunked", "triton"]
_IMPLS = get_args(Impl)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Options(NamedTuple):
    """Options that the ops share, see `prefloss.token_logps` and `prefloss.linear_token_logps`."""

    transform: LogitTransform
    ignore_index: int
    impl: Impl = "chunked"
    chunk_tokens: int | None = None
    budget_bytes: int | None = None
    strict: bool = False
    round_once: bool = False

    def check(self, dtype: torch.dtype) -> None:
        """Raise if an option is of the wrong type or out of range, or not possible for inputs of a dtype."""
        # a scale <= 0 would turn the -inf of a token that cannot occur into inf or NaN
        _check_positive("logit_scale", self.transform.logit_scale)
        _check_positive("temperature", self.transform.temperature)
        if self.transform.softcap is not None:
            _check_positive("softcap", self.transform.softcap)
        flag("strict", self.strict)
        flag("round_once", self.round_once)
        if not isinstance(self.ignore_index, int) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index: got {type(self.ignore_index).__name__}, expected an int")
        budget = self.budget_bytes
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
            raise ValueError(f"budget_bytes: got {budget!r}, expected an int >= 0")
        self._check_impl(dtype)

    def _check_impl(self, dtype: torch.dtype) -> None:
        impl, chunk = self.impl, self.chunk_tokens
        if impl not in _IMPLS:
            raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(map(repr, _IMPLS))}")
        if impl == "triton" and dtype == torch.float64:
            raise ValueError(
                "impl: got 'triton' for float64, expected 'auto', 'naive' or 'chunked': Triton computes in float32"
            )
        if impl == "triton" and not kernels.available():
            raise RuntimeError(
                "impl: got 'triton' without Triton or a device that it compiles for, expected 'auto' or 'chunked'"
            )
        if chunk is None:
            return
        if impl == "naive":
            raise ValueError(
                f"chunk_tokens: got {chunk!r}, expected None with impl='naive', which has no slices"
            )
        if not isinstance(chunk, int) or isinstance(chunk, bool):
            raise TypeError(f"chunk_tokens: got {type(chunk).__name__}, expected an int >= 1")
        if chunk < 1:
            raise ValueError(f"chunk_tokens: got {chunk}, expected an int >= 1")


def check_logits(logits: Tensor, inplace_backward: bool) -> None:
    """Validate logits, [..., V]; with `inplace_backward`, reject leaves."""
    _check_tensor("logits", logits, floating=True)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [..., V] with V >= 1")
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward: got leaf logits, expected the output of a model: a leaf is still in use after backward"
        )


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> int:
    """Check that hidden states, weight and bias fit together; the vocabulary size V."""
    _check_tensor(f"{prefix}hidden", hidden, floating=True)
    if hidden.dim() == 0:
        raise ValueError(f"{prefix}hidden: got shape [], expected [..., H]")
    _check_head(f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}weight: got shape {list(weight.shape)}, expected [V, {hidden.shape[-1]}] with V >= 1 for "
            f"{prefix}hidden of shape {list(hidden.shape)}"
        )
    vocabulary = weight.shape[0]
    if bias is not None:
        _check_head(f"{prefix}bias", bias, f"{prefix}hidden", hidden)
        if bias.shape != (vocabulary,):
            raise ValueError(
                f"{prefix}bias: got shape {list(bias.shape)}, expected [{vocabulary}], one for each row of weight"
            )
    return vocabulary


def check_reference(hidden: Tensor, vocabulary: int, reference: Model) -> None:
    """Check that the reference has the vocabulary and the positions of the policy."""
    rows = check_linear(*reference, "reference_")
    if rows != vocabulary:
        raise ValueError(f"reference_weight: got {rows} rows, expected {vocabulary} (V) as weight has")
    if reference.hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"reference_hidden: got shape {list(reference.hidden.shape)}, expected {list(hidden.shape[:-1])}, as "
            "hidden has, and any width"
        )


def check_targets(
    targets: Tensor, like_name: str, like: Tensor, vocabulary: int, ignore_index: int
) -> Tensor:
    """Check that targets fit `like`, [..., V] or [..., H]; the targets as int64."""
    _check_tensor("targets", targets, floating=False)
    if targets.shape != like.shape[:-1]:
        raise ValueError(
            f"targets: got shape {list(targets.shape)}, expected {list(like.shape[:-1])}, that of {like_name} "
            "without its last dimension"
        )
    _check_device("targets", targets, like_name, like)
    targets = targets.long()
    # a compiled graph cannot branch on the answer; its ops check when they run
    if not torch.compiler.is_compiling():
        check_range(targets, vocabulary, ignore_index)
    return targets


def check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise if a target is neither in the vocabulary nor ignored.

    Only on a CPU. An accelerator would have to wait for the answer, so there the log-prob of such a target is NaN.
    """
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if outside.any():
        raise IndexError(
            f"targets: got {targets[outside][0].item()}, expected 0 <= target < {vocabulary} (V) or "
            f"ignore_index={ignore_index}"
        )


def check_sizes(
    tokens: int, vocabulary: int, width: int | None, dtype: torch.dtype, device: str | torch.device
) -> Tensor:
    """Check what a plan is made for; an empty tensor of that dtype on that device."""
    integer("tokens", tokens, 0)
    integer("vocabulary", vocabulary, 1)
    if width is not None:
        integer("width", width, 1)
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        raise TypeError(f"dtype: got {shown(dtype)}, expected a floating-point dtype, such as torch.bfloat16")
    instance("device", device, (str, torch.device), "a device, such as 'cpu'")
    try:
        return torch.empty(0, dtype=dtype, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: got {shown(str(device))}, expected one of this machine ({error})"
        ) from error


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a float")
    if not 0 < value < inf:
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")


def _check_tensor(name: str, value: Tensor, *, floating: bool) -> None:
    expected = "a floating-point tensor" if floating else "an integer tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    # float8 is left out: it is a storage format that means nothing without its scale
    if not (value.dtype in _DTYPES if floating else integer):
        of = " of float16, bfloat16, float32 or float64" if floating else ""
        raise TypeError(f"{name}: got {value.dtype}, expected {expected}{of}")


def _check_head(name: str, value: Tensor, hidden_name: str, hidden: Tensor) -> None:
    _check_tensor(name, value, floating=True)
    if value.dtype != hidden.dtype:
        # under autocast too: only the caller can know which of the two should be rounded
        raise TypeError(
            f"{name}: got {value.dtype}, expected {hidden.dtype} as {hidden_name} has; cast one of them"
        )
    _check_device(name, value, hidden_name, hidden)


def _check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device} as {like_name} has")
