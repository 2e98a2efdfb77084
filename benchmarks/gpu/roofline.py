"""Times of traced events by a roofline model: a forecast, not a measurement.

A product takes the longer of its operations and its bytes, where operations are those of whole tiles of 128 x 256
results, in whole rounds over the multiprocessors. A Triton kernel takes the longest of its bytes, its instructions and
its special functions, the last two read from its machine code. Its bytes move at the rate of a copy, or at what the
loads of its resident threads allow, if that is less. Other torch ops take their bytes. Each takes at least the gap
between two kernels. Rows are not rescaled between tiles, which few rows need. Caches, the ends of kernels and the power
limit are left out, so the times are lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch

from benchmarks import sass
from benchmarks.gpu.cards import ISSUE_SHARE, ISSUED, LATENCY, LAUNCH, SPECIAL, Card
from benchmarks.gpu.trace import Event, Pass, Product

TILE_ROWS, TILE_COLUMNS = 128, 256
# Kernels that pass over those rows only whose reference moved since the tile before, by the value of their flag TARGET.
RARE = {("scale_rows_kernel", False)}


class Work(NamedTuple):
    """What a kernel does per logit, from its machine code: instructions, special functions, and reads of each logit.

    `load_bytes`: of its widest load. `in_flight`: bytes that a thread loads before it must wait for them.
    `writes`: whether it stores as it loads, several bytes at a time.
    """

    registers: int
    spilled: int
    occupancy: float
    instructions: float
    special: float
    reads: int
    load_bytes: int
    in_flight: int
    writes: bool


def work_of(launch: sass.Launch, arch: int) -> Work:
    """The work of a launch, compiled for `arch`."""
    return _compiled(_Key(launch), arch)


class _Key:
    """A launch, equal to another that compiles to the same code."""

    def __init__(self, launch: sass.Launch) -> None:
        self.launch = launch
        kinds = [_kind(argument) for argument in launch.arguments]
        self._key = repr((launch.kernel.__name__, launch.warps, sorted(launch.constants.items()), kinds))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _kind(argument: object) -> object:
    """What Triton compiles for: dtype and alignment; of an int, whether 16 divides it, and if it is 1 or wide."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, abs(argument) < 2**31
    return type(argument)


@cache
def _compiled(key: _Key, arch: int) -> Work:
    code = sass.compile_launch(key.launch, arch)
    size = key.launch.arguments[0].element_size()
    # loops that load about as much as the main one read the logits once more
    most = sum(code.main.loads)
    loops = [loop for loop in code.loops if loop.loads and 2 * sum(loop.loads) > most]
    if not loops or code.main is code.whole:
        counts = code.per_logit(), code.per_logit("MUFU")
        loops = [code.whole]
    else:
        counts = tuple(
            sum(len(loop.named(*names) if names else loop) / loop.logits(size) for loop in loops)
            for names in ((), ("MUFU",))
        )
    loads = code.main.loads
    widest, writes = max(loads, default=0), max(code.whole.stores, default=0) >= 8
    return Work(
        code.registers, code.spilled, code.occupancy(), *counts, len(loops), widest, sum(loads), writes
    )  # fmt: skip


def seconds(event: Event, card: Card) -> float:
    """The forecast of one event."""
    if isinstance(event, Pass):
        time = event.moved / card.copy
    elif isinstance(event, Product):
        time = max(padded_flops(event, card) / card.products(event.half), event.moved / card.copy)
    else:
        time = _kernel(event, card)
    return max(time, LAUNCH)


def padded_flops(product: Product, card: Card) -> float:
    """Operations of whole tiles in whole rounds, as far as that is more than those asked for."""
    tiles = -(-product.rows // TILE_ROWS) * -(-product.columns // TILE_COLUMNS)
    rounds = -(-tiles // card.multiprocessors)
    return rounds * card.multiprocessors * 2.0 * TILE_ROWS * TILE_COLUMNS * product.inner


def _is_rare(launch: sass.Launch) -> bool:
    return (launch.kernel.__name__, launch.constants.get("TARGET")) in RARE


def _kernel(launch: sass.Launch, card: Card) -> float:
    if _is_rare(launch):
        return 0.0
    work, logits = work_of(launch, card.arch), launch.arguments[0].numel()
    lanes = card.multiprocessors * card.clock * sass.LANES
    issue = logits * work.instructions / (lanes * ISSUED * ISSUE_SHARE)
    special = logits * work.special / (card.multiprocessors * card.clock * SPECIAL)
    resident = int(work.occupancy * sass.WARPS) // launch.warps * card.multiprocessors
    loading = min(launch.programs, resident) * launch.warps * sass.LANES
    bandwidth = min(card.copy, loading * work.in_flight / LATENCY)
    return max(moved(launch, work) / bandwidth, issue, special)


def moved(launch: sass.Launch, work: Work) -> int:
    """Bytes of the logits, as often as they are read, and of each other argument of their size, written once.

    What stores and has no such argument writes over what it read. Of larger arguments few elements are looked up.
    """
    if _is_rare(launch):
        return 0
    first, *others = (x for x in launch.arguments if isinstance(x, torch.Tensor))
    same = [x for x in others if x.numel() == first.numel()] or ([first] if work.writes else [])
    return work.reads * first.numel() * first.element_size() + sum(x.numel() * x.element_size() for x in same)


def total(events: Iterable[Event], card: Card) -> float:
    """Events one after another."""
    return sum(seconds(event, card) for event in events)


def parts(events: Iterable[Event], card: Card) -> dict[str, float]:
    """Seconds of products, of Triton kernels and of other ops."""
    names: dict[str, Callable[[Event], bool]] = {
        "products": lambda e: isinstance(e, Product),
        "kernels": lambda e: isinstance(e, sass.Launch),
        "other ops": lambda e: isinstance(e, Pass),
    }
    events = list(events)
    return {name: total((e for e in events if test(e)), card) for name, test in names.items()}
