"""Checks of what callers pass in: taken, or refused with `name: got X, expected Y`.

Types, dtypes, shapes and devices are always checked. Values of tensors are checked where they can be read without
waiting (`readable`): an accelerator would have to finish its work first, and a compiled program cannot branch on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

# Tensors have at most 64 dimensions; a list that contains itself has no end.
_DEEPEST = 64
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOG_PROBS = "floating-point log-probs in nats"
_COUNTS = "integer token counts >= 0"


def shown(value: Any, width: int = 80) -> str:
    """A value as an error message quotes it: one line, cut at `width` characters."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, shape {list(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        # Python prints no number of more than 4,300 digits; and a class may have a broken repr.
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= width else f"{text[: width - 3]}..."


def integer(name: str, value: Any, least: int | None = None) -> int:
    """A whole number; TypeError if it is something else (True and False are), ValueError if it is too small."""
    expected = "a whole number" if least is None else f"a whole number >= {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    if least is not None and value < least:
        raise ValueError(f"{name}: got {shown(value)}, expected {expected}")
    return int(value)


def real(name: str, value: Any, *, above: float = -math.inf) -> float:
    """A finite number, as Python's own; TypeError if it is something else, such as True, ValueError if too small."""
    expected = "a finite number" if above == -math.inf else f"a finite number > {above:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    if not is_finite(value) or value <= above:
        raise ValueError(f"{name}: got {shown(value)}, expected {expected}")
    return int(value) if isinstance(value, Integral) else float(value)


def is_finite(value: Any) -> bool:
    """Whether a number fits a float and is neither infinite nor NaN."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def flag(name: str, value: Any) -> bool:
    """True or False; TypeError if it is something else, such as 1 or "no"."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {shown(value)}, expected True or False")
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of these words; ValueError otherwise."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {shown(value)}, expected one of {', '.join(map(repr, choices))}")
    return value


def instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    """An object of a class; TypeError otherwise."""
    if not isinstance(value, kind):
        # Not its repr, which may be that of a whole model.
        got = shown(value) if value is None or isinstance(value, str | type) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected {expected}")
    return value


def function(name: str, value: Any, expected: str) -> Any:
    """Something that can be called; TypeError otherwise."""
    if not callable(value):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    return value


def tensor(
    name: str,
    value: Any,
    expected: str,
    device: torch.device | None = None,
    *,
    floats: bool = False,
    bools: bool = True,
) -> Tensor:
    """A tensor as it is, or made of a number, nested lists, an array, or lists of tensors, whose gradient is kept.

    Args:
        name: The argument.
        value: What the caller passed.
        expected: What it may be, for messages.
        device: Of numbers that are not tensors yet.
        floats: Whether numbers that are not tensors yet become floats of torch's default dtype.
        bools: Whether True and False may stand for numbers in a list.

    Raises:
        TypeError: If it holds something that is no number.
        ValueError: If its lists differ in length, or a number does not fit the dtype.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            raise TypeError(f"{name}: got a sparse or nested tensor, expected {expected} in a dense tensor")
        return value
    if hasattr(value, "__array__"):
        array = value.__array__()
        if array.dtype.kind not in ("fiub" if bools else "fiu"):
            raise TypeError(f"{name}: got an array of {array.dtype}, expected {expected}")
        # A copy: the caller may go on writing into the array.
        numbers = torch.as_tensor(array.astype({"f": "f8", "b": "?"}.get(array.dtype.kind, "i8")))
    elif _holds_tensors(name, value, expected, bools):
        parts = [
            tensor(f"{name}[{i}]", part, expected, device, floats=floats, bools=bools)
            for i, part in enumerate(value)
        ]
        try:
            return torch.stack(parts)
        except RuntimeError as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
            raise ValueError(
                f"{name}: got tensors of shapes {shapes}, expected equal shapes and devices"
            ) from error
    else:
        try:
            numbers = torch.tensor(value, dtype=torch.float64 if floats else None)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{name}: got {shown(value)}, expected {expected}: {error}") from error
    if floats:
        wide, dtype = numbers, torch.get_default_dtype()
        numbers = wide.to(dtype)
        refuse(name, wide, numbers.isinf() & ~wide.isinf(), f"{expected} that fits {dtype}")
    return numbers.to(device)


def log_probs(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Log-probs as float32 or float64; TypeError if they are not floating point."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        value = tensor(name, value, _LOG_PROBS, device, floats=True, bools=False)
    if value.dtype not in _FLOATS:
        # float8 is a storage format that means nothing without its scale.
        which = ": float16, bfloat16, float32 or float64" if value.is_floating_point() else ""
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {_LOG_PROBS}{which}")
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def counts(name: str, value: Any, device: torch.device) -> Tensor:
    """Token counts; TypeError if they are not integers."""
    made = tensor(name, value, _COUNTS, device, bools=False)
    if not made.numel() and not isinstance(value, Tensor):
        # The dtype of an empty list means nothing.
        return made.long()
    check_integer(name, made, _COUNTS)
    return made


def check_integer(name: str, value: Tensor, expected: str) -> None:
    """TypeError if a tensor does not hold integers."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")


def check_ids(name: str, value: Any) -> None:
    """TypeError if it is no integer tensor, ValueError if it is a single number."""
    instance(name, value, Tensor, "an integer tensor [..., T]")
    check_integer(name, value, "an integer tensor [..., T]")
    if value.ndim == 0:
        raise ValueError(f"{name}: got shape [], expected [..., T]")


def mask(name: str, value: Any) -> Tensor:
    """A mask as booleans; TypeError if it holds no numbers, ValueError if some are neither 0 nor 1."""
    expected = "True or False (or 1 or 0) for each token"
    value = tensor(name, value, expected)
    if value.dtype is torch.bool:
        return value
    if value.is_complex():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")
    # A mask of fractions would become all True, so floating-point numbers are worth a wait.
    if value.is_floating_point() or readable(value):
        refuse(name, value, (value != 0) & (value != 1), expected)
    return value.bool()


def check_shape(name: str, value: Any, other: str, shape: torch.Size) -> None:
    """ValueError if something does not have the shape of another argument."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(shape)} as {other} has")


def check_device(name: str, value: Any, other: str, device: torch.device) -> None:
    """ValueError if something is not on the device of another argument."""
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, expected {device} as {other} has")


def check_like(name: str, value: Any, other: str, like: Any) -> None:
    """ValueError if something does not have the shape and device of another argument."""
    check_shape(name, value, other, like.shape)
    check_device(name, value, other, like.device)


def readable(value: Tensor) -> bool:
    """Whether values can be read at no cost: on the CPU, outside `torch.compile`."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def least(value: Tensor) -> float:
    """The smallest value; NaN if one is NaN, there is none, or none can be read (see `readable` and `any_true`)."""
    if not readable(value) or not value.numel():
        return math.nan
    try:
        return value.detach().min().item()
    except RuntimeError:
        # vmap and fake tensors have no values to read.
        return math.nan


def any_true(wrong: Tensor) -> bool:
    """Whether an entry is True; False where no value can be read (while compiling, under `vmap`, fake tensors)."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(wrong.any())
    except RuntimeError:
        # vmap refuses to turn a mapped tensor into a bool.
        return False


def refuse(name: str, value: Tensor, wrong: Tensor, expected: str) -> None:
    """ValueError with the first value that is wrong, if there is one that can be read."""
    if any_true(wrong):
        raise ValueError(f"{name}: got {shown(value[wrong][0].item())}, expected {expected}")


def _holds_tensors(name: str, value: Any, expected: str, bools: bool, depth: int = 0) -> bool:
    """Whether tensors or arrays are among the numbers; TypeError if something else is."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if depth > _DEEPEST:
            raise ValueError(f"{name}: got lists nested more than {_DEEPEST} deep, expected {expected}")
        found = [_holds_tensors(name, part, expected, bools, depth + 1) for part in value]
        return any(found)
    if isinstance(value, Tensor) or (depth and hasattr(value, "__array__") and not isinstance(value, Real)):
        return True
    if not isinstance(value, Real) or (isinstance(value, bool) and not bools):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    return False
