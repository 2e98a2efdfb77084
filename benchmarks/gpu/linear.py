"""Hidden states to a loss to the gradients, against the matrix products alone, timed in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.bench_linear import BETA, FLOOR, Problem
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Step
from benchmarks.gpu.judge import Errors, LinearJudge, judge
from benchmarks.gpu.logits import softcapped
from benchmarks.peers import LeftOut, cross_entropy_steps, liger_steps, linear_ways
from benchmarks.shapes import GpuLinear
from prefloss.logprobs import explain, linear_token_logps

# Tiles of logits that the sweep tries, MiB of float32.
TILES = (128, 256, 512, 1024)


class Way(NamedTuple):
    """A step to the gradients, and the log-probs that its forward pass returns, if it returns any."""

    step: Step
    logps: Callable[[], Tensor] | None


def ours(problem: Problem, size: GpuLinear, impl: str, **options: int) -> Way:
    def prefloss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_token_logps(hidden, weight, targets, softcap=size.softcap, impl=impl, **options)

    def logps() -> Tensor:
        return prefloss(problem.hidden, problem.weight, problem.targets).detach()

    return Way(problem.all_tokens(prefloss), logps)


def planned(size: GpuLinear, bench: Bench, frozen: bool, **options: int) -> str:
    """The plan of ours, for the terminal: how the device was used."""
    plan = explain(
        tokens=size.tokens, vocabulary=size.vocabulary, width=size.width, dtype=getattr(torch, size.dtype),
        device=bench.device.name, trainable_head=not frozen, impl=bench.device.impl, **options,
    )  # fmt: skip
    return f"{plan.scheme}, {plan.matmuls:.2f} matmuls, {plan.kept_tokens} tokens kept, tiles of {plan.chunk_tokens}"


def measure_linear(bench: Bench, size: GpuLinear, peers: bool = False, sweep: bool = False) -> list[str]:
    """Time one size with a trained and with a frozen head; what of ours is wrong or failed."""
    wrong = []
    losses = ("dpo", "cross-entropy") if peers else ("dpo",)
    for loss in losses:
        problem = Problem(size.pairs, getattr(torch, size.dtype), bench.device.name, False, loss)
        judged = LinearJudge(problem, size.softcap)
        for frozen in (False, True):
            # Liger and QuACK compute the gradient of the head in any case
            if not (frozen and loss == "cross-entropy"):
                problem.train(head=not frozen)
                wrong += _measure(bench, size, problem, judged, frozen, loss, peers, sweep)
    return wrong


def _measure(
    bench: Bench, size: GpuLinear, problem: Problem, judged: LinearJudge, frozen: bool, loss: str, peers: bool,
    sweep: bool,
) -> list[str]:  # fmt: skip
    absent: LeftOut = {}
    ways = _ours(bench, size, problem, frozen, sweep and not peers)
    ways |= _peers(problem, loss, absent) if peers else {}
    errors = bench.attempts({name: partial(_errors, way, judged) for name, way in ways.items()}, absent)
    records = bench.in_turns({FLOOR: problem.matmuls(), **{name: ways[name].step for name in errors}}, absent)
    for record in records.values():
        record.flops = (1 + len(problem.trained)) * 2.0 * size.tokens * size.width * size.vocabulary
    head = "frozen" if frozen else "trainable"
    row: dict[str, object] = {
        "what": f"linear: hidden to {loss} to gradient{softcapped(size.softcap)}",
        "shape": f"{size.tokens}x{size.width}x{size.vocabulary}",
        "dtype": size.dtype,
        "frozen": frozen,
    }
    title = f"{row['what']}, {row['shape']} {size.dtype}, {head} head"
    wrong = [f"{title}: {line}" for line in judge(records, errors, judged.limits)]
    bench.report(title, records, FLOOR, row)
    print(f"(prefloss: {planned(size, bench, frozen)})")
    return wrong


def _ours(bench: Bench, size: GpuLinear, problem: Problem, frozen: bool, sweep: bool) -> dict[str, Way]:
    impl = bench.device.impl
    # as a user calls it, without any option, where the device has a Triton path to choose
    ways = {"prefloss": ours(problem, size, "auto" if bench.device.real else impl)}
    if sweep:
        tiles = {mib: max(1, mib * 2**18 // size.vocabulary) for mib in TILES}
        ways |= {
            f"prefloss, tiles of {mib} MiB": ours(problem, size, impl, chunk_tokens=rows)
            for mib, rows in tiles.items()
        }
    elif not frozen:
        ways["prefloss, budget of 1 GiB"] = ours(problem, size, impl, budget_bytes=2**30)
        ways["prefloss, no budget"] = ours(problem, size, impl, budget_bytes=0)
    return ways


def _peers(problem: Problem, loss: str, absent: LeftOut) -> dict[str, Way]:
    if loss == "cross-entropy":
        steps = cross_entropy_steps(absent)
        return {name: Way(problem.whole_loss(call), None) for name, call in steps.items()}
    x, w, y = problem.hidden, problem.weight, problem.targets

    def way(call: Callable[..., Tensor]) -> Way:
        return Way(problem.by_tokens(call), lambda: call(x.flatten(0, 1), w, y.flatten()).detach())

    ways = {name: way(call) for name, call in linear_ways(absent).items()}
    fused = liger_steps(loss, BETA, absent)
    return ways | {name: Way(problem.whole_loss(call), None) for name, call in fused.items()}


def _errors(way: Way, judged: LinearJudge) -> Errors:
    gradients = way.step()
    return judged.errors(None if way.logps is None else way.logps(), gradients)
