"""Checks of gradients: right, somewhere not zero, none to what is data, finite at the ends of the range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios, PerToken
from prefloss.testing import _fields
from prefloss.testing._draws import Seeded, draw
from prefloss.testing._run import check, for_all
from prefloss.testing._subject import SEARCHED, Subject
from prefloss.testing._values import gradient, slopes, told

STEP = 1e-6
"""Step of the finite differences, nats."""


@check()
def check_data_gradient(subject: Subject) -> None:
    """Reference, KL baselines, scores and weights get no gradient, even where they could take one."""

    def body(feedback: Feedback) -> None:
        leaves = {path: value.detach().requires_grad_() for path, value in _fields.data(feedback).items()}
        policy = {
            path: value.detach().requires_grad_() for path, value in _fields.trainable(feedback).items()
        }
        given = _fields.with_tensors(feedback, {**leaves, **policy})
        for loss in (subject.fresh(), subject.settled):
            for path, slope in slopes(subject.values(loss, given).sum(), leaves).items():
                if bool((slope != 0).any()):
                    name = path.split(".")[-1]
                    problem = (
                        f"{path} has gradient {told(slope)}, expected none: it is data, so .detach() {name} where the "
                        "loss reads it"
                    )
                    raise subject.failed(problem, feedback)

    for_all(subject, body, weight=True)


@check()
def check_gradient_nonzero(subject: Subject) -> None:
    """Somewhere the loss has a gradient to the policy."""
    for feedback in subject.searched():
        _, gradients = gradient(subject, subject.settled, feedback)
        if any(bool((slope != 0).any()) for slope in gradients.values()):
            return
    raise subject.failed(
        f"in {SEARCHED} batches no policy log-prob had a gradient, so the loss trains nothing: look for .detach(), "
        "torch.no_grad(), .item() or .data, and for a comparison or rounding in place of a smooth function"
    )


@check()
def check_gradients(subject: Subject) -> None:
    """The gradient is that of the value: it agrees with float64 central differences.

    What the loss detaches is held at its value, so a stopped gradient is a constant here too. Where the slopes from
    the left and from the right differ, the loss has a kink, and another point is drawn.
    """
    wanted, compared = min(subject.examples, 6), 0
    for seed in range(6 * wanted):
        absent = subject.absences[seed % len(subject.absences)]
        magnitude = (10.0, 2.0, 40.0)[seed % 3]
        feedback = subject.seeded(300 + seed, absent, magnitude=magnitude, size=1 + seed % 3)
        compared += _compare_slopes(subject, feedback)
        if compared == wanted:
            return
    if not compared:
        raise subject.failed(
            f"found no point among {6 * wanted} where the slopes from left and right agree: smooth it"
        )


def _compare_slopes(subject: Subject, feedback: Feedback) -> bool:
    """Compare the gradients at a point; False if there is a kink."""
    leaves = {
        path: value.detach().clone().requires_grad_() for path, value in _fields.trainable(feedback).items()
    }
    constants = _Constants()
    loss = subject.settled

    def values() -> Tensor:
        with constants:
            return subject.values(loss, _fields.with_tensors(feedback, {**leaves}))

    base = values()
    constants.replay()
    exact = [slopes(value, leaves) for value in base]
    for path, leaf in leaves.items():
        for place in _places(feedback, path):
            left, right = _one_sided(values, leaf, place, base.detach())
            if left is None or right is None:
                return False
            found = torch.stack([slope[path][place] for slope in exact])
            numeric = (left + right) / 2
            scale = 1 + max(float(numeric.abs().max()), float(found.abs().max()))
            rounding = float(base.detach().abs().max()) * 1e-9
            if bool((left - right).abs().max() > 1e-3 * scale + rounding):
                return False
            if bool((found - numeric).abs().max() > 1e-5 * scale + rounding):
                problem = (
                    f"the gradient of the values to {path}{list(place)} is {told(found)}, and the slope of the values "
                    f"there is {told(numeric)}: look at backward() of a custom autograd function, and at in-place "
                    "operations"
                )
                raise subject.failed(problem, feedback)
    return True


def _places(feedback: Feedback, path: str) -> list[tuple[int, ...]]:
    """Where a leaf counts: at tokens that exist, at completions that are present."""
    part = _fields.parts(feedback)[path.split(".")[0]]
    counts = ~part.empty
    if isinstance(feedback, Rankings):
        counts = counts & feedback.present
    if part.per_token is not None:
        counts = counts.unsqueeze(-1) & part.per_token.mask
    return [tuple(place) for place in counts.nonzero().tolist()]


def _one_sided(
    values: Callable[[], Tensor], leaf: Tensor, place: tuple[int, ...], base: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Slopes of the values from the left and from the right, or None where the loss took another path."""
    found: list[Tensor | None] = []
    for step in (-STEP, STEP):
        with torch.no_grad():
            leaf[place] += step
        try:
            found.append((values().detach() - base) / step)
        except _AnotherPath:
            found.append(None)
        finally:
            with torch.no_grad():
                leaf[place] -= step
    return found[0], found[1]


class _AnotherPath(Exception):
    """The loss detached another number of tensors than at the first call."""


class _Constants(TorchFunctionMode):
    """Records what a loss takes out of the graph, then gives the same back: stopped gradients are constants."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._place: int | None = None
        self._graph = True

    def replay(self) -> None:
        """From here on give back what was recorded."""
        self._place = 0

    def __enter__(self) -> _Constants:
        """Start at the first of the recorded values."""
        self._place = self._place if self._place is None else 0
        self._graph = True
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and keep or replace what it gives."""
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._graph = args[0]
            return result
        # Under no_grad, but not in the forward of a custom autograd function, which turns the graph off by itself.
        apart = not self._graph and isinstance(result, Tensor) and result.is_floating_point()
        return self._constant(result) if apart or func in _TAKES_OUT else result

    def _constant(self, result: Any) -> Any:
        if self._place is None:
            self._kept.append(result)
            return result
        if self._place >= len(self._kept):
            raise _AnotherPath
        self._place += 1
        return self._kept[self._place - 1]


_TAKES_OUT = {Tensor.detach, torch.detach, Tensor.item, Tensor.tolist, Tensor.data.__get__}  # type: ignore[attr-defined]

ENDS = (0.0, 1e-6, 1.0, 30.0, 90.0, 1e3, 1e4)
"""Log-ratios of the extreme draws, of both signs, nats."""


@check()
def check_extremes(subject: Subject) -> None:
    """Log-ratios from -1e4 to 1e4 nats in float32, given as float32, bfloat16 or float16, keep all numbers finite."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for feedback in _extreme(subject):
            given = _fields.cast_to(feedback, dtype)
            _check_finite(subject, given)
            # A gradient in half precision overflows where the loss's own does not.
            wide = _fields.cast_to(given, torch.float32)
            for loss in (subject.fresh(), subject.settled):
                _check_finite_gradient(subject, loss, wide)


def _check_finite(subject: Subject, feedback: Feedback) -> None:
    values = subject.detached(subject.settled, feedback)
    if not bool(torch.isfinite(values).all()):
        bad = ~torch.isfinite(values)
        problem = (
            f"got {told(values[bad][:1])} in float32, expected a finite value: write log(sigmoid(x)) as "
            "F.logsigmoid(x), 1 - sigmoid(x) as sigmoid(-x), log(sum(exp(x))) as logsumexp, and clamp the argument "
            "of an exp that may overflow"
        )
        raise subject.failed(problem, _worst(subject, feedback, bad))


def _check_finite_gradient(subject: Subject, loss: Any, feedback: Feedback) -> None:
    _, gradients = gradient(subject, loss, feedback, mean=False)
    for path, slope in gradients.items():
        bad = ~torch.isfinite(slope)
        if bool(bad.any()):
            problem = (
                f"the gradient of {path} is {told(slope[bad][:1])} in float32, expected a finite one: torch.where sends "
                "the gradient through the branch that it does not select too, so make the argument of both safe"
            )
            raise subject.failed(
                problem, _worst(subject, feedback, bad.flatten(1).any(-1) if bad.ndim > 1 else bad)
            )


def _worst(subject: Subject, feedback: Feedback, bad: Tensor) -> Feedback:
    """One example that shows the problem, if the loss looks at examples one by one."""
    return _fields.select(feedback, bad.nonzero()[:1, 0]) if subject.spec.separable else feedback


def _extreme(subject: Subject) -> list[Feedback]:
    """Every combination of extreme log-ratios; short and long completions; likely and unlikely ones."""
    signed = torch.tensor([*(-end for end in reversed(ENDS)), *ENDS[1:]], dtype=torch.float64)
    sides = {Pairs: 2, Labels: 1, Rankings: 3}[subject.spec.feedback]
    if sides == 3:
        signed = signed[::2]
    grid = torch.cartesian_prod(*[signed] * sides).reshape(-1, sides)
    return [
        _with_log_ratios(subject, grid, below=below, tokens=tokens)
        for below, tokens in ((0.0, 1), (1e-6, 2), (20.0, 2000))
    ]


def _with_log_ratios(subject: Subject, grid: Tensor, below: float, tokens: int) -> Feedback:
    count = len(grid)
    wanted = subject.wanted(size=count, places=3, dtype=torch.float32, masked=False)
    drawn = draw(Seeded(21), subject.spec.feedback, wanted)
    if isinstance(drawn, Pairs):
        chosen, rejected = (_completions(drawn.chosen, grid[:, side], below, tokens) for side in (0, 1))
        return replace(drawn, chosen=chosen, rejected=rejected)
    ratios = grid if isinstance(drawn, Rankings) else grid[:, 0]
    drawn = replace(drawn, completions=_completions(drawn.completions, ratios, below, tokens))
    if isinstance(drawn, Rankings):
        return drawn
    twice = _fields.select(drawn, torch.arange(count).repeat_interleave(2))
    return replace(twice, desirable=torch.arange(2 * count) % 2 == 0)  # type: ignore[call-arg]


def _completions(like: LogRatios, log_ratios: Tensor, below: float, tokens: int) -> LogRatios:
    """Completions with these log-ratios: the likelier of policy and reference has log-prob `-below`."""
    policy = (-below - (-log_ratios).clamp(min=0)).float()
    reference = (-below - log_ratios.clamp(min=0)).float()
    rows = like.per_token
    if rows is None:
        counts = torch.full(policy.shape, tokens)
        return LogRatios(policy, None if like.reference is None else reference, counts)
    return _fields.summed(_spread(rows, policy, None if rows.reference is None else reference))


def _spread(rows: PerToken, policy: Tensor, reference: Tensor | None) -> PerToken:
    share = rows.mask / rows.mask.sum(-1, keepdim=True)

    def over(values: Tensor) -> Tensor:
        return values.unsqueeze(-1) * share

    spread = over(policy)
    log_sum_sq = None if rows.log_sum_sq is None else spread
    return replace(
        rows, policy=spread, reference=None if reference is None else over(reference), log_sum_sq=log_sum_sq
    )
