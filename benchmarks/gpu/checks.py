"""Every kernel and flag on the device, against float64, through the public functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.bench import NOT_RUN, Bench
from benchmarks.gpu.judge import FACTOR, IGNORED, LogitsJudge, product, relative
from benchmarks.shapes import GpuLogits, GpuSizes
from prefloss.kernels import naive
from prefloss.kernels.naive import LogitTransform
from prefloss.logprobs import TokenStats, linear_token_logps, linear_token_stats, token_logps, token_stats

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TRANSFORMS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(1.0, 30.0, 1.0),
    "scaled": LogitTransform(1.3, None, 0.7),
}
# float32 arithmetic: of a statistic, relative to 1 + its size, and of a gradient, relative to its norm
STATISTICS, GRADIENT = 1e-5, 1e-5
# token_stats and its kin return five numbers, the other functions one
ALL = 5


class Check(NamedTuple):
    """An error that is at most `limit`, or a `note` on why there is none."""

    name: str
    error: float = float("nan")
    limit: float = float("nan")
    note: str = ""

    @property
    def status(self) -> str:
        if self.note:
            return NOT_RUN if self.note.startswith(NOT_RUN) else "failed"
        return "held" if self.error <= self.limit else "wrong"


def run_checks(bench: Bench, sizes: GpuSizes) -> list[str]:
    """Run them all, write them to ``checks.json``, and return those that did not hold."""
    checks: list[Check] = []
    for name, call in cases(sizes, bench.device.name, bench.device.impl):
        found, reason = bench.attempt(name, call)
        checks += [Check(name, note=reason)] if reason else [
            Check(f"{name}: {what}", error, limit) for what, error, limit in found
        ]  # fmt: skip
        for check in checks[-(len(found) if found else 1) :]:
            print(f"  {check.status:8}{check.name}  {check.error:.2e} (limit {check.limit:.2e}) {check.note}")
    counts = {
        status: sum(check.status == status for check in checks) for status in ("held", "wrong", "failed")
    }
    bench.facts["checks"] = {**counts, NOT_RUN: sum(check.status == NOT_RUN for check in checks)}
    bench.folder.mkdir(parents=True, exist_ok=True)
    rows = [{**check._asdict(), "status": check.status} for check in checks]
    (bench.folder / "checks.json").write_text(json.dumps(rows, indent=1) + "\n")
    return [f"{check.name}: {check.status}" for check in checks if check.status in ("wrong", "failed")]


Found = list[tuple[str, float, float]]


def cases(sizes: GpuSizes, device: str, impl: str) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Names of the checks, and what runs them: the usual first, as time may not suffice for all."""
    rows, width, vocabulary = sizes.checks
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for kind, transform in TRANSFORMS.items():
            for outputs in (1, ALL):
                x, y = logits_and_targets(rows, vocabulary, dtype, device)
                name = f"logits {short} {kind}, {outputs} of {ALL} statistics"
                yield name, partial(of_logits, x, y, transform, outputs, impl)
            for scheme, options in SCHEMES.items():
                for outputs in (1, ALL):
                    name = f"linear {short} {kind}, {scheme}, {outputs} of {ALL} statistics"
                    shape = (rows, width, vocabulary)
                    yield (
                        name,
                        partial(of_hidden, shape, dtype, device, transform, scheme, options, outputs, impl),
                    )
    for odd_rows, odd in ((3, 5), (1, 301), (64, 4096), (5, 4097), (7, 50_257)):
        x, y = logits_and_targets(odd_rows, odd, torch.bfloat16, device)
        yield f"logits of {odd_rows} rows, V {odd}", partial(of_logits, x, y, LogitTransform(), 1, impl)
    x, y = logits_and_targets(2 * rows, vocabulary, torch.bfloat16, device)
    # what is left when trainers shift: the last row of each batch is skipped
    shifted = x.view(2, rows, vocabulary)[:, :-1], y.view(2, rows)[:, :-1]
    yield "logits, rows [:, :-1] of [B, T, V]", partial(of_logits, *shifted, LogitTransform(), 1, impl)
    yield (
        "logits, all targets ignored",
        partial(of_logits, x, torch.full_like(y, IGNORED), LogitTransform(), 1, impl),
    )
    yield "logits, in place", partial(in_place, x, y, impl)
    for dtype in DTYPES[:2]:
        shape, plain = (rows, width, vocabulary), TRANSFORMS["plain"]
        name = f"linear {str(dtype).removeprefix('torch.')}, the bias a column of a matrix"
        yield name, partial(of_hidden, shape, dtype, device, plain, "keep", {}, 1, impl, apart=True)
    if sizes.past is not None:
        yield "logits past 2**31 elements", partial(past_2_to_the_31, sizes.past, device, impl)


# options of the linear op that lead to each scheme, for a head of V rows of H elements
SCHEMES: dict[str, dict[str, int]] = {
    "keep": {},
    "recompute": {"budget_bytes": 0, "chunk_tokens": 48},
    "tiles": {"chunk_tokens": 48},
    "frozen": {},
}


def logits_and_targets(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits with tokens that cannot occur in front and behind, a likely target, and an ignored row of NaN."""
    torch.manual_seed(0)
    x = (torch.randn(rows, vocabulary, device=device) * 4).to(dtype)
    edge = vocabulary // 3
    x[:, : min(edge, 100)] = x[:, vocabulary - min(edge, 3) :] = -torch.inf
    y = torch.randint(min(edge, 100), vocabulary - min(edge, 3), (rows,), device=device)
    if rows > 1:
        # of one row alone, its gradient would be what is left of 1 - 1
        x[0, y[0]] = 25
        x[1], y[1] = torch.nan, IGNORED
    return x, y


def stacked(stats: TokenStats) -> Tensor:
    return torch.stack((stats.logps, stats.logsumexp, stats.entropy, stats.log_sum_sq, stats.top1.float()))


def weights_of(got: Tensor) -> Tensor:
    """Random weights of the statistics, for a gradient; top-1 has none."""
    weights = torch.randn(got.shape, device=got.device)
    weights[4:] = 0
    return weights


def statistics_check(got: Tensor, exact: Tensor, beyond: float = 0.0) -> tuple[str, float, float]:
    error = ((got - exact).abs() / (1 + exact.abs())).max().item()
    return "statistics", error, STATISTICS + beyond


def of_logits(x: Tensor, y: Tensor, transform: LogitTransform, outputs: int, impl: str) -> Found:
    scale, softcap, temperature = transform
    options = {"logit_scale": scale, "softcap": softcap, "temperature": temperature, "impl": impl}
    leaf = x.clone().requires_grad_()
    if outputs == 1:
        got = token_logps(leaf, y, **options)[None]
    else:
        got = stacked(token_stats(leaf, y, stats_gradient=True, **options))
    weights = weights_of(got)
    exact = x.double().requires_grad_()
    want = naive.token_stats(exact, y, transform, IGNORED, outputs)
    (gradient,) = torch.autograd.grad((got * weights).sum(), leaf)
    (exact_gradient,) = torch.autograd.grad((want * weights).sum(), exact)
    limit = torch.finfo(x.dtype).eps / 2 + GRADIENT
    return [statistics_check(got, want), ("gradient", _error(gradient, exact_gradient), limit)]


def _error(gradient: Tensor, exact: Tensor) -> float:
    """Relative, or infinite where a gradient must be zero everywhere and is not."""
    if not exact.any():
        return float("inf") if gradient.any() or gradient.isnan().any() else 0.0
    return relative(gradient, exact)


def in_place(x: Tensor, y: Tensor, impl: str) -> Found:
    """The gradient written over the logits is the one that is returned otherwise, bit by bit."""
    gradients = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logps = token_logps(leaf * 1, y, inplace_backward=inplace, impl=impl)
        gradients += torch.autograd.grad(logps.sum(), leaf)
    return [("gradients that differ", float((gradients[0] != gradients[1]).sum().item()), 0.0)]


def of_hidden(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, transform: LogitTransform, scheme: str,
    options: dict[str, int], outputs: int, impl: str, apart: bool = False,
) -> Found:  # fmt: skip
    """From hidden states and a head with a bias, whose elements lie `apart` if it is a column of a matrix."""
    torch.manual_seed(0)
    rows, width, vocabulary = shape
    h = torch.randn(rows, width, device=device).to(dtype)
    w = (torch.randn(vocabulary, width, device=device) * 0.2).to(dtype)
    b = torch.randn(vocabulary, 1 + apart, device=device).to(dtype)[:, 0]
    y = torch.randint(vocabulary, (rows,), device=device)
    y[::5] = IGNORED
    scale, softcap, temperature = transform
    passed = {"logit_scale": scale, "softcap": softcap, "temperature": temperature, "impl": impl, **options}
    leaves = [h.requires_grad_(), w.requires_grad_(scheme != "frozen"), b.requires_grad_(scheme != "frozen")]
    if outputs == 1:
        got = linear_token_logps(h, w, y, bias=b, **passed)[None]
    else:
        got = stacked(linear_token_stats(h, w, y, bias=b, stats_gradient=True, **passed))
    weights = weights_of(got)
    gradients = torch.autograd.grad((got * weights).sum(), [leaf for leaf in leaves if leaf.requires_grad])
    exact, exact_gradients = by_products(h, w, b, y, transform, weights, torch.float64)
    cublas, cublas_gradients = by_products(h, w, b, y, transform, weights, dtype)
    _, beyond, _ = statistics_check(cublas, exact)
    found = [statistics_check(got, exact, FACTOR * beyond)]
    for part, gradient in enumerate(gradients):
        right = exact_gradients[part]
        limit = FACTOR * relative(cublas_gradients[part], right) + GRADIENT
        found.append((f"gradient of {('hidden', 'weight', 'bias')[part]}", _error(gradient, right), limit))
    return found


def by_products(
    h: Tensor, w: Tensor, b: Tensor, y: Tensor, transform: LogitTransform, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Statistics and gradients by the device's own matrix products of `dtype`, each factor rounded to it once."""
    x, head = h.detach().to(dtype), w.detach().to(dtype)
    z = (product(x, head.T).double() + b.detach().double()).requires_grad_()
    stats = naive.token_stats(z, y, transform, IGNORED, len(weights))
    (dz,) = torch.autograd.grad((stats * weights).sum(), z)
    rounded = dz.to(dtype)
    gradients = [product(rounded, head), product(rounded.T, x), rounded.double().sum(0)]
    # as autograd returns them
    given = torch.float64 if dtype == torch.float64 else h.dtype
    return stats.detach(), [gradient.to(given).double() for gradient in gradients]


def past_2_to_the_31(size: GpuLogits, device: str, impl: str) -> Found:
    x = torch.empty(size.tokens, size.vocabulary, device=device, dtype=torch.bfloat16).normal_()
    y = torch.randint(size.vocabulary, (size.tokens,), device=device)
    judged = LogitsJudge(x, y, torch.ones(size.tokens, device=device), LogitTransform())
    logp, gradient = judged.errors(lambda logits, targets: token_logps(logits, targets, impl=impl))
    limits = judged.limits.ours
    return [("log-probs", logp, limits.logp), ("gradient", gradient, limits.gradient)]
