"""Checks that a loss works under torch.compile and under the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Feedback
from prefloss.testing import _fields
from prefloss.testing._run import check
from prefloss.testing._subject import Subject
from prefloss.testing._values import close, gradient, told

SIZES = (3, 5, 8, 13)
"""Batch sizes that a compiled loss gets, one after the other."""

MOST_GRAPHS = 3
"""The first compilation and two more."""


def _keeps_numbers(subject: Subject) -> str | None:
    if subject.loss.state:
        return f"keeps a state of Python numbers ({', '.join(sorted(subject.loss.state))})"
    return None


@check(_keeps_numbers)
def check_torch_compile(subject: Subject) -> None:
    """`torch.compile(fullgraph=True)` takes the loss: same values, batch sizes that change, at most two recompiles."""
    loss, graphs = subject.settled, 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    def function(feedback: Feedback) -> Tensor:
        return loss(feedback)

    torch._dynamo.reset()
    try:
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        for size in SIZES:
            feedback = subject.seeded(40 + size, size=size, places=3, dtype=torch.float32)
            _check_compiled(subject, compiled, feedback)
    finally:
        torch._dynamo.reset()
    if graphs > MOST_GRAPHS:
        raise subject.failed(
            f"batches of {SIZES} examples made {graphs} graphs, expected at most {MOST_GRAPHS}: take no Python number "
            "from a shape or a value"
        )


def _check_compiled(subject: Subject, compiled: Callable[[Feedback], Tensor], feedback: Feedback) -> None:
    leaves = {path: value.detach().requires_grad_() for path, value in _fields.trainable(feedback).items()}
    given = _fields.with_tensors(feedback, {**leaves})
    wanted = subject.values(subject.settled, given)
    try:
        found = compiled(given)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        problem = (
            f"torch.compile(fullgraph=True) raised {type(error).__name__}: {first}\n  Use no .item(), no float() or "
            "bool() of a tensor, no if on a value; torch.where chooses between values"
        )
        raise subject.failed(problem, feedback) from error
    if not close(found, wanted, 1e-5):
        raise subject.failed(f"compiled it gave {told(found)}, expected {told(wanted)}", feedback)


def _not_one_by_one(subject: Subject) -> str | None:
    if subject.loss.state:
        return f"keeps a state of Python numbers ({', '.join(sorted(subject.loss.state))})"
    return None if subject.spec.separable else "mixes the examples of a batch"


@check(_not_one_by_one)
def check_torch_func(subject: Subject) -> None:
    """`torch.func.vmap` over the examples gives their values, and `torch.func.grad` their gradient."""
    for seed in range(3):
        feedback = subject.seeded(50 + seed, size=3)
        per_example = {
            path: value for path, value in _fields.tensors(feedback).items() if _per_example(feedback, value)
        }
        _check_vmap(subject, feedback, per_example)
        _check_functional_gradient(subject, feedback, _fields.trainable(feedback))


def _per_example(feedback: Feedback, value: Tensor) -> bool:
    return value.shape[:1] == feedback.shape


def _check_vmap(subject: Subject, feedback: Feedback, mapped: dict[str, Tensor]) -> None:
    first = _fields.select(feedback, torch.tensor([0]))
    wanted = subject.detached(subject.settled, feedback)

    def alone(values: dict[str, Tensor]) -> Tensor:
        return subject.settled(
            _fields.with_tensors(first, {path: value.unsqueeze(0) for path, value in values.items()})
        )[0]

    try:
        found = torch.func.vmap(alone)(mapped)
    except Exception as error:
        raise subject.failed(_transform_problem("vmap", error), feedback) from error
    if not close(found, wanted):
        raise subject.failed(f"torch.func.vmap gave {told(found)}, expected {told(wanted)}", feedback)


def _check_functional_gradient(subject: Subject, feedback: Feedback, leaves: dict[str, Tensor]) -> None:
    _, wanted = gradient(subject, subject.settled, feedback, mean=False)

    def total(values: dict[str, Tensor]) -> Tensor:
        return subject.settled(_fields.with_tensors(feedback, {**values})).sum()

    try:
        found = torch.func.grad(total)(leaves)
    except Exception as error:
        raise subject.failed(_transform_problem("grad", error), feedback) from error
    for path, slope in wanted.items():
        if not close(found[path], slope):
            problem = f"torch.func.grad gave {told(found[path])} for {path}, expected {told(slope)} as autograd gives"
            raise subject.failed(problem, feedback)


def _transform_problem(transform: str, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return (
        f"torch.func.{transform} raised {type(error).__name__}: {first}\n  Use no .item(), no if on a value, no "
        "in-place operation; a custom autograd function needs setup_context and vmap"
    )
