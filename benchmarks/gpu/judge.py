"""Which numbers are right: errors against float64, and how large they may be.

A GPU's matrix products are not exact, and how they sum differs from one GPU to the next. So an op from hidden states is
measured against what cuBLAS itself gives on the same GPU: log-probs and gradients from its own products, with float32
logits and one rounding of each factor. A fixed limit would call right numbers wrong, or wrong ones right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.bench_linear import EXACT_TOKENS, Problem
from benchmarks.gpu.bench import NOT_RUN
from benchmarks.measure import Record
from prefloss.kernels import naive
from prefloss.kernels.naive import LogitTransform

# How many times the error of cuBLAS, or of plain torch on the same logits, ours may be.
FACTOR = 2.0
# Peers may have logits rounded to half precision and sums in it; beyond this they compute something else.
PEER_GRADIENT = 0.05
PEER_FACTOR = 4.0
IGNORED = -100
# Rows that are compared, spread over all.
COMPARED = 64


class Errors(NamedTuple):
    """Largest error of a log-prob, nats, and norm of the gradient's error over its norm, the worst of the inputs.

    `logp` is None for a way that returns no log-probs.
    """

    logp: float | None
    gradient: float

    def within(self, limits: Errors) -> bool:
        """False for NaN too."""
        right = self.logp is None or (limits.logp is not None and self.logp <= limits.logp)
        return right and self.gradient <= limits.gradient


class Limits(NamedTuple):
    """The largest errors that ours may have, and those that peers may have."""

    ours: Errors
    peers: Errors

    def of(self, name: str) -> Errors:
        return self.ours if is_ours(name) else self.peers


def is_ours(name: str) -> bool:
    return name.startswith("prefloss")


def relative(x: Tensor, exact: Tensor) -> float:
    """Norm of the error over norm."""
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def arithmetic(logps: Tensor) -> float:
    """What float32 arithmetic on logits adds to an error of log-probs: some units of the largest."""
    return 2**-20 * (1 + logps.abs().max().item())


def spread(rows: int, device: torch.device) -> Tensor:
    """Positions of the rows that are compared, the first and the last among them."""
    return torch.linspace(0, rows - 1, min(rows, COMPARED), device=device).long().unique()


def judge(records: Mapping[str, Record], errors: Mapping[str, Errors], limits: Limits) -> list[str]:
    """Write errors into the records and whether they are small enough; the names of ours that are wrong or failed."""
    for name, found in errors.items():
        if name in records:
            records[name].logp_error = math.nan if found.logp is None else found.logp
            records[name].gradient_error = found.gradient
            records[name].ok = found.within(limits.of(name))
    return [
        f"{name}: {record.note or 'wrong numbers'}"
        for name, record in records.items()
        if is_ours(name) and not (record.ok and (record.milliseconds or record.note.startswith(NOT_RUN)))
    ]


class LogitsJudge:
    """Judges log-probs and gradients from given logits [n, V], of their sum weighted by `upstream`, [n]."""

    def __init__(self, x: Tensor, y: Tensor, upstream: Tensor, transform: LogitTransform) -> None:
        self._rows = rows = spread(len(x), x.device)
        self._problem = x, y, upstream
        some = x.detach()[rows]
        self._exact = _of_logits(some.double(), y[rows], upstream[rows], transform)
        plain, slope = self._compare(*_of_logits(some, y[rows], upstream[rows], transform))
        logp = FACTOR * plain + arithmetic(self._exact[0])
        gradient = FACTOR * slope + 1e-5
        # some peers return log-probs in the dtype of the logits
        rounded = (self._exact[0].to(x.dtype) - self._exact[0]).abs().max().item()
        self.limits = Limits(Errors(logp, gradient), Errors(logp + PEER_FACTOR * rounded, PEER_GRADIENT))

    def errors(self, call: Callable[[Tensor, Tensor], Tensor]) -> Errors:
        """Of a way that gives log-probs, [n], or log-probs and more, [k, n]."""
        x, y, upstream = self._problem
        leaf = x.detach().clone().requires_grad_()
        got = call(leaf.view_as(leaf), y)
        got = got if got.dim() == 1 else got[0]
        (grad,) = torch.autograd.grad((got * upstream).sum(), leaf)
        return Errors(*self._compare(got.detach()[self._rows], grad[self._rows]))

    def _compare(self, logps: Tensor, gradient: Tensor) -> tuple[float, float]:
        want, exact = self._exact
        return (logps - want).abs().max().item(), relative(gradient, exact)


def _of_logits(x: Tensor, y: Tensor, upstream: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """Log-probs and gradient by plain torch, in float64 or float32."""
    leaf = x.requires_grad_()
    logps = naive.token_stats(leaf, y, transform, IGNORED, 1)[0]
    (gradient,) = torch.autograd.grad((logps * upstream).sum(), leaf)
    return logps.detach(), gradient


class LinearJudge:
    """Judges log-probs [n] and gradients of a problem whose tokens all count."""

    def __init__(self, problem: Problem, softcap: float | None) -> None:
        self._transform = LogitTransform(1.0, softcap, 1.0)
        self._exact_logps, self._exact_grads = self._by(problem, torch.float64)
        logps, gradients = self._by(problem, problem.weight.dtype)
        logp = FACTOR * self._logp_error(logps) + arithmetic(self._exact_logps)
        gradient = FACTOR * self._gradient_error(gradients) + 1e-5
        x, w, y = _flat(problem)
        rows = spread(len(x), x.device)
        rounded = self._logps((x[rows] @ w.T).double(), y[rows]) - self._exact_logps[rows]
        self.limits = Limits(
            Errors(logp, gradient),
            Errors(logp + PEER_FACTOR * rounded.abs().max().item(), PEER_GRADIENT),
        )

    def errors(self, logps: Tensor | None, gradients: Sequence[Tensor]) -> Errors:
        """Of all log-probs, if a way returns them, and of the gradients of hidden states and of a head that has one."""
        error = None if logps is None else self._logp_error(logps)
        return Errors(error, self._gradient_error(gradients))

    def _logp_error(self, logps: Tensor) -> float:
        return (logps.reshape(-1) - self._exact_logps).abs().max().item()

    def _gradient_error(self, gradients: Sequence[Tensor]) -> float:
        # a frozen head has no gradient
        pairs = zip(gradients, self._exact_grads, strict=False)
        return max(relative(got.reshape(want.shape), want) for got, want in pairs)

    def _logps(self, z: Tensor, y: Tensor) -> Tensor:
        return naive.token_stats(z, y, self._transform, IGNORED, 1)[0]

    def _by(self, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Log-probs and gradients by matrix products of a dtype with logits in at least float32."""
        x, w, y = _flat(problem)
        x, w = x.to(dtype), w.to(dtype)
        parts = list(torch.arange(len(x), device=x.device).split(EXACT_TOKENS))
        logps = torch.cat([self._logps(product(x[part], w.T).double(), y[part]) for part in parts])
        leaf = logps.reshape(2 * problem.shape.pairs, -1).requires_grad_()
        (upstream,) = torch.autograd.grad(problem.loss(leaf), leaf)
        # so that the smallest entries do not vanish in float16; powers of two round nothing
        unit = 2.0 ** torch.floor(torch.log2(upstream.abs().max())) * 2.0**-14
        upstream = upstream.flatten() / unit
        d_x, d_w = [], torch.zeros(w.shape, dtype=torch.promote_types(dtype, torch.float32), device=w.device)
        for part in parts:
            z = product(x[part], w.T).double().requires_grad_()
            (dz,) = torch.autograd.grad((self._logps(z, y[part]) * upstream[part]).sum(), z)
            dz = dz.to(dtype)
            d_x.append(product(dz, w).double() * unit)
            d_w += product(dz.T, x[part])
        # rounded once, to what autograd returns
        given = torch.float64 if dtype == torch.float64 else problem.weight.dtype
        return logps.detach(), [torch.cat(d_x).to(given).double(), d_w.mul_(unit).to(given).double()]


def _flat(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    x = problem.hidden.detach().reshape(-1, problem.shape.width)
    return x, problem.weight.detach(), problem.targets.reshape(-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product with sums and result in at least float32, by the device's own library."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cpu" or torch.version.hip is not None:
        return a.to(wide) @ b.to(wide)
    return torch.mm(a, b, out_dtype=wide)
