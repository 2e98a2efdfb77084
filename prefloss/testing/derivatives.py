"""Checks of gradients: right, somewhere not zero, none to data; and of torch.compile and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prefloss.feedback import Feedback, Rankings
from prefloss.testing.fields import data, parts, select, tensors, trainable, with_leaves, with_tensors
from prefloss.testing.run import check
from prefloss.testing.subject import SEARCHED, Subject, close, shown

INFINITE_SLOPE = (
    "the slope is infinite there, as that of sqrt and log at 0: add to their argument, or clamp it"
)
BATCH_OF_ONE = "in a batch of one example, a statistic of the batch needs a gradient too"

STEP = 1e-6
"""Step of the finite differences, nats."""

SIZES, MOST_GRAPHS = (3, 5, 8, 13), 3
"""Batch sizes that a compiled loss gets, one after the other; the first compilation and two more."""


@check(draws={"weight": True})
def check_data_gradient(subject: Subject, feedback: Feedback) -> None:
    """Reference, KL baselines, scores and weights get no gradient, even where they could take one."""
    attached, leaves = with_leaves(feedback, data(feedback) | trainable(feedback))
    of_data = {path: leaves[path] for path in data(feedback)}
    for loss in subject.modes.values():
        for path, slope in subject.slopes(subject.call(loss, attached).sum(), of_data, attached).items():
            if bool((slope != 0).any()):
                change = f"it is data, so .detach() {path.split('.')[-1]} where the loss reads it"
                raise subject.failed(f"gradient of {path}", slope, "none", feedback, change)


@check(
    change="the loss trains nothing: look for .detach(), torch.no_grad(), .item() or .data, and for a comparison or "
    "rounding in place of a smooth function"
)
def check_gradient_nonzero(subject: Subject) -> None:
    """The loss has a gradient to the policy: finite at ordinary log-probs and at the start, somewhere not zero."""
    for turn, (size, magnitude) in enumerate(((3, 10.0), (3, 0.0), *[(1, 10.0), (1, 1.0)] * 3)):
        feedback = subject.seeded(90 + turn, subject.absence(turn), size=size, magnitude=magnitude)
        where = "from ordinary log-probs" if magnitude else "where policy and reference are equal"
        for loss in subject.modes.values():
            results = subject.results(loss, feedback)
            subject.expect_finite(results, where, feedback, BATCH_OF_ONE if size == 1 else INFINITE_SLOPE)
    for feedback in subject.searched():
        _, gradients = subject.gradient(subject.settled, feedback)
        if any(bool((slope != 0).any()) for slope in gradients.values()):
            return
    got = f"zeros in {SEARCHED} batches"
    raise subject.failed("gradient of the policy's log-probs", got, "another number somewhere")


@check(change="look at backward() of a custom autograd function, and at in-place operations")
def check_gradients(subject: Subject) -> None:
    """The gradient is that of the value: it agrees with float64 central differences.

    What the loss detaches is held at its value, so a stopped gradient is a constant here too. Where the slopes from
    the left and from the right differ, the loss has a kink, and another point is drawn.
    """
    points, compared = min(subject.examples, 6), 0
    for turn in range(6 * points):
        magnitude = (10.0, 2.0, 40.0)[turn % 3]
        feedback = subject.seeded(300 + turn, subject.absence(turn), magnitude=magnitude, size=1 + turn % 3)
        compared += _compare_slopes(subject, feedback)
        if compared == points:
            return
    if not compared:
        kinks = f"different ones at all of {6 * points} points"
        raise subject.failed("slopes from left and right", kinks, "equal ones", change="smooth it")


def _compare_slopes(subject: Subject, feedback: Feedback) -> bool:
    """Compare the gradients at a point; False if there is a kink."""
    _, leaves = with_leaves(feedback, trainable(feedback))
    loss, constants = subject.settled, _Constants()

    def values() -> Tensor:
        with constants:
            # Built again at each call: rows that a step changed have other sums.
            return subject.call(loss, with_tensors(feedback, leaves))

    base = values()
    exact = [subject.slopes(value, leaves, feedback) for value in base]
    rounding = float(base.detach().abs().max()) * 1e-9
    for path, leaf in leaves.items():
        for place in _places_that_count(feedback, path):
            try:
                left, right = (_slope(values, leaf, place, base.detach(), step) for step in (-STEP, STEP))
            except _AnotherPath:
                return False
            gradient = torch.stack([slope[path][place] for slope in exact])
            numeric = (left + right) / 2
            scale = 1 + max(float(numeric.abs().max()), float(gradient.abs().max()))
            if bool((left - right).abs().max() > 1e-3 * scale + rounding):
                return False
            if bool((gradient - numeric).abs().max() > 1e-5 * scale + rounding):
                what = f"gradient of the values to {path}{list(place)}"
                expected = f"{shown(numeric)}, the slope of the values there"
                raise subject.failed(what, gradient, expected, feedback)
    return True


def _places_that_count(feedback: Feedback, path: str) -> list[tuple[int, ...]]:
    """Places of a leaf at tokens that exist, at completions that are present."""
    part = parts(feedback)[path.split(".")[0]]
    counts = feedback.present & ~part.empty if isinstance(feedback, Rankings) else ~part.empty
    if part.per_token is not None:
        counts = counts.unsqueeze(-1) & part.per_token.mask
    return [tuple(place) for place in counts.nonzero().tolist()]


def _slope(
    values: Callable[[], Tensor], leaf: Tensor, place: tuple[int, ...], base: Tensor, step: float
) -> Tensor:
    """Slope of the values from one side."""
    start = leaf.detach()[place].clone()
    leaf.detach()[place] = start + step
    try:
        return (values().detach() - base) / step
    finally:
        leaf.detach()[place] = start


class _AnotherPath(Exception):
    """The loss detached another number of tensors than at the first call."""


class _Constants(TorchFunctionMode):
    """Records what the first call takes out of the graph, and gives it to the next: stopped gradients are constants."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._calls = 0

    def __enter__(self) -> _Constants:
        self._calls += 1
        self._again, self._graph = iter(self._kept), True
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._graph = args[0]
            return result
        # Under no_grad, but not in the forward of a custom autograd function, which turns the graph off by itself.
        apart = not self._graph and isinstance(result, Tensor) and result.is_floating_point()
        if not apart and func not in _TAKES_OUT:
            return result
        if self._calls == 1:
            # A copy: what was taken out may share its numbers with the leaf that moves.
            self._kept.append(result.clone() if isinstance(result, Tensor) else result)
            return result
        try:
            return next(self._again)
        except StopIteration:
            raise _AnotherPath from None


_TAKES_OUT = {Tensor.detach, torch.detach, Tensor.item, Tensor.tolist, Tensor.data.__get__}  # type: ignore[attr-defined]


def _keeps_state(subject: Subject) -> str | None:
    states = ", ".join(sorted(subject.loss.state))
    return f"keeps a state of Python numbers ({states})" if states else None


@check(
    _keeps_state,
    change="use no .item(), no float() or bool() of a tensor, no if on a value; torch.where chooses between values",
)
def check_torch_compile(subject: Subject) -> None:
    """`torch.compile(fullgraph=True)` takes the loss: same values, batch sizes that change, at most two recompiles."""
    loss, graphs = subject.settled, list[torch.fx.GraphModule]()

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    try:
        compiled = torch.compile(
            lambda feedback: loss(feedback), fullgraph=True, dynamic=True, backend=backend
        )
        for size in SIZES:
            feedback = subject.seeded(40 + size, size=size, places=3, dtype=torch.float32)
            attached, _ = with_leaves(feedback, trainable(feedback))
            eager = subject.call(loss, attached)
            values = _transformed(subject, "torch.compile(fullgraph=True)", compiled, attached, feedback)
            if not close(values, eager, 1e-5):
                raise subject.failed("compiled values", values, eager, feedback)
    finally:
        torch._dynamo.reset()
    if len(graphs) > MOST_GRAPHS:
        change = "take no Python number from a shape or a value"
        what, got = f"batches of {SIZES} examples", f"{len(graphs)} graphs"
        raise subject.failed(what, got, f"at most {MOST_GRAPHS}", change=change)


def _transformed(
    subject: Subject, what: str, function: Callable[[Any], Any], argument: Any, feedback: Feedback
) -> Any:
    """What a transformed loss returns, or a failure with the first line of its error."""
    try:
        return function(argument)
    except Exception as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        got = f"{type(error).__name__}: {first_line}"
        raise subject.failed(what, got, "no error", feedback) from error


def _is_not_functional(subject: Subject) -> str | None:
    return _keeps_state(subject) or (None if subject.spec.separable else "mixes the examples of a batch")


@check(
    _is_not_functional,
    change="use no .item(), no if on a value, no in-place operation; a custom autograd function needs setup_context "
    "and vmap",
)
def check_torch_func(subject: Subject) -> None:
    """`torch.func.vmap` over the examples gives their values, and `torch.func.grad` their gradient."""
    for seed in range(3):
        _check_vmap_and_grad(subject, subject.seeded(50 + seed, size=3))


def _check_vmap_and_grad(subject: Subject, feedback: Feedback) -> None:
    first = select(feedback, torch.tensor([0]))

    def alone(values: dict[str, Tensor]) -> Tensor:
        example = with_tensors(first, {path: value.unsqueeze(0) for path, value in values.items()})
        return subject.settled(example)[0]

    def total(values: dict[str, Tensor]) -> Tensor:
        return subject.settled(with_tensors(feedback, values)).sum()

    per_example = {
        path: value for path, value in tensors(feedback).items() if value.shape[:1] == feedback.shape
    }
    values = _transformed(subject, "torch.func.vmap", torch.func.vmap(alone), per_example, feedback)
    subject.expect("values of torch.func.vmap", values, subject.settled_values(feedback), feedback)
    leaves = trainable(feedback)
    gradients = _transformed(subject, "torch.func.grad", torch.func.grad(total), leaves, feedback)
    for path, slope in subject.gradient(subject.settled, feedback, mean=False)[1].items():
        subject.expect(f"torch.func.grad of {path}", gradients[path], slope, feedback)
