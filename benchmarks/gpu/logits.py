"""Logits to log-probs, against the bytes that must move at the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

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
# logits at a time and warps that the sweep tries: 8 to 128 logits a thread
BLOCKS = tuple(
    (block, warps)
    for block in (1024, 2048, 4096, 8192, 16384)
    for warps in (1, 2, 4, 8, 16)
    if 256 <= block // warps <= 4096
)


def ours(softcap: float | None, impl: str, inplace: bool = False) -> Way:
    def prefloss(logits: Tensor, targets: Tensor) -> Tensor:
        return token_logps(logits, targets, softcap=softcap, impl=impl, inplace_backward=inplace)

    return prefloss


def ours_with_statistics(softcap: float | None, impl: str) -> Way:
    def prefloss(logits: Tensor, targets: Tensor) -> Tensor:
        stats = token_stats(logits, targets, softcap=softcap, impl=impl, stats_gradient=True)
        return torch.stack((stats.logps, stats.logsumexp, stats.entropy, stats.log_sum_sq))

    return prefloss


@contextmanager
def in_blocks(block: int, warps: int) -> Iterator[None]:
    """The kernels from logits work on so many logits at a time, on so many warps."""
    from prefloss.kernels.triton import launch

    chosen = launch.Launch(block, warps)
    with patch.multiple(launch, FORWARD=chosen, BACKWARD=chosen):
        yield


def measure_logits(bench: Bench, size: GpuLogits, peers: bool = False, blocks: bool = False) -> list[str]:
    """Time forward, and forward with the gradient, of one size; what of ours is wrong or failed.

    With `peers`, ours and theirs; with `blocks`, ours in several blocks and numbers of warps.
    """
    torch.manual_seed(0)
    device, dtype = bench.device.name, getattr(torch, size.dtype)
    x = torch.empty(size.tokens, size.vocabulary, device=device, dtype=dtype).normal_(std=4).requires_grad_()
    y = torch.randint(size.vocabulary, (size.tokens,), device=device)
    upstream = torch.randn(size.tokens, device=device)
    ways: dict[str, Way] = {"prefloss": ours(size.softcap, bench.device.impl)}
    launches = {f"prefloss, {block} on {warps} warps": (block, warps) for block, warps in BLOCKS if blocks}
    ways |= dict.fromkeys(launches, ways["prefloss"])
    if not (peers or blocks):
        ways["prefloss, all statistics"] = ours_with_statistics(size.softcap, bench.device.impl)
        ways[IN_PLACE] = ours(size.softcap, bench.device.impl, inplace=True)
    absent: LeftOut = {}
    ways |= logits_ways(absent) if peers else {}
    judged = LogitsJudge(x, y, upstream, LogitTransform(1.0, size.softcap, 1.0))
    judging = {name: partial(judged.errors, call) for name, call in ways.items()}
    errors = bench.attempts(launched_in(judging, launches), absent)
    ways = {name: ways[name] for name in errors}
    wrong = []
    for what, passes, steps in (
        ("forward", 1, _forward(ways, x, y)),
        ("forward and backward", 3, _both(ways, x, y, upstream)),
    ):
        records = bench.in_turns({LIMIT: copy_of(x, passes), **launched_in(steps, launches)}, absent)
        for record in records.values():
            record.traffic = passes * x.nbytes
        row: dict[str, object] = {
            "what": f"logits: {what}{softcapped(size.softcap)}{', in blocks' if blocks else ''}",
            "shape": f"{size.tokens}x{size.vocabulary}",
            "dtype": size.dtype,
            "frozen": "",
        }
        title = f"{row['what']}, {row['shape']} {size.dtype}"
        wrong += [f"{title}: {line}" for line in judge(records, errors, judged.limits)]
        bench.report(title, records, LIMIT, row)
    return wrong


def launched_in(calls: dict[str, Step], launches: dict[str, tuple[int, int]]) -> dict[str, Step]:
    """The calls, each with the launch that is given for it, if there is one."""

    def launched(call: Step, block: int, warps: int) -> object:
        with in_blocks(block, warps):
            return call()

    return {
        name: partial(launched, call, *launches[name]) if name in launches else call
        for name, call in calls.items()
    }


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
