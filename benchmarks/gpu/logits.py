"""Logits to log-probs, against the bytes that must move at the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Step
from benchmarks.gpu.judge import LogitsJudge, judge
from benchmarks.peers import LeftOut, logits_ways
from benchmarks.shapes import GpuLogits
from prefloss.kernels.naive import LogitTransform
from prefloss.logprobs import token_logps, token_stats

LIMIT = "copy of the same bytes"
IN_PLACE = "prefloss, in place"
Way = Callable[[Tensor, Tensor], Tensor]


def ours(softcap: float | None, impl: str, inplace: bool = False) -> Way:
    def prefloss(logits: Tensor, targets: Tensor) -> Tensor:
        return token_logps(logits, targets, softcap=softcap, impl=impl, inplace_backward=inplace)

    return prefloss


def ours_with_statistics(softcap: float | None, impl: str) -> Way:
    def prefloss(logits: Tensor, targets: Tensor) -> Tensor:
        stats = token_stats(logits, targets, softcap=softcap, impl=impl, stats_gradient=True)
        return torch.stack((stats.logps, stats.logsumexp, stats.entropy, stats.log_sum_sq))

    return prefloss


def measure_logits(bench: Bench, size: GpuLogits, peers: bool = False) -> list[str]:
    """Time forward, and forward with the gradient, of one size; what of ours is wrong or failed."""
    torch.manual_seed(0)
    device, dtype = bench.device.name, getattr(torch, size.dtype)
    x = torch.empty(size.tokens, size.vocabulary, device=device, dtype=dtype).normal_(std=4).requires_grad_()
    y = torch.randint(size.vocabulary, (size.tokens,), device=device)
    upstream = torch.randn(size.tokens, device=device)
    ways: dict[str, Way] = {"prefloss": ours(size.softcap, bench.device.impl)}
    if not peers:
        ways["prefloss, all statistics"] = ours_with_statistics(size.softcap, bench.device.impl)
        ways[IN_PLACE] = ours(size.softcap, bench.device.impl, inplace=True)
    absent: LeftOut = {}
    ways |= logits_ways(absent) if peers else {}
    judged = LogitsJudge(x, y, upstream, LogitTransform(1.0, size.softcap, 1.0))
    errors = bench.attempts({name: partial(judged.errors, call) for name, call in ways.items()}, absent)
    ways = {name: ways[name] for name in errors}
    wrong = []
    for what, passes, steps in (
        ("forward", 1, _forward(ways, x, y)),
        ("forward and backward", 3, _both(ways, x, y, upstream)),
    ):
        records = bench.in_turns({LIMIT: copy_of(x, passes), **steps}, absent)
        for record in records.values():
            record.traffic = passes * x.nbytes
        row: dict[str, object] = {
            "what": f"logits: {what}{softcapped(size.softcap)}",
            "shape": f"{size.tokens}x{size.vocabulary}",
            "dtype": size.dtype,
            "frozen": "",
        }
        title = f"{row['what']}, {row['shape']} {size.dtype}"
        wrong += [f"{title}: {line}" for line in judge(records, errors, judged.limits)]
        bench.report(title, records, LIMIT, row)
    return wrong


def _forward(ways: dict[str, Way], x: Tensor, y: Tensor) -> dict[str, Step]:
    plain = x.detach()
    return {name: lambda call=call: call(plain, y) for name, call in ways.items() if name != IN_PLACE}


def _both(ways: dict[str, Way], x: Tensor, y: Tensor, upstream: Tensor) -> dict[str, Step]:
    # "in place" writes over its own; that they hold a gradient in the next round changes no time
    leaves = {name: x.detach().clone().requires_grad_() if name == IN_PLACE else x for name in ways}

    def step(call: Way, leaf: Tensor) -> Step:
        # through a view, as logits are the result of an op and never a leaf
        def both() -> object:
            got = call(leaf.view_as(leaf), y)
            return torch.autograd.grad(((got if got.dim() == 1 else got[0]) * upstream).sum(), leaf)

        return both

    return {name: step(call, leaves[name]) for name, call in ways.items()}


def copy_of(x: Tensor, passes: int) -> Step:
    """Copies that read and write together as many bytes as `passes` over x."""
    source = x.detach().view(-1)
    # half of the bytes are read and half are written
    parts = [source[: len(source) // 2]] if passes == 1 else [source, source[: len(source) // 2]]
    memory = torch.empty_like(parts[0])
    return lambda: [memory[: len(part)].copy_(part) for part in parts]


def softcapped(softcap: float | None) -> str:
    return "" if softcap is None else ", softcap"
