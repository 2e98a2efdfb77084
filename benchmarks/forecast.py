"""A forecast of the GPU kernels' speed, without a GPU: ``python -m benchmarks.forecast``.

Nothing here is measured. The ops run on tensors without memory, so that their matrix products, launches and bytes can
be counted. Their kernels are compiled for the GPU; instructions, registers and reads come from the machine code. A
roofline model turns both into times. Needs Triton.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import sass
from benchmarks.gpu import cards, roofline
from benchmarks.gpu.cards import CARDS, Card
from benchmarks.gpu.trace import Event, Pass, Product, trace
from benchmarks.shapes import FORECAST, GpuLinear, GpuLogits
from prefloss.logprobs import linear_token_logps, token_logps

# Of an H200, issue 15: shares of a copy's speed, and times over that of the matrix products alone.
TARGETS = {
    ("forward", GpuLogits(16_384, 128_256)): 0.90,
    ("both", GpuLogits(16_384, 128_256)): 0.85,
    ("trainable", GpuLinear(16_384, 4096, 128_256)): 1.05,
    ("frozen", GpuLinear(16_384, 4096, 128_256)): 1.11,
    ("frozen", GpuLinear(16_384, 4096, 32_000)): 1.13,
}
# Free memory that the plan is made for, bytes.
FREE = 60 * 2**30


class Forecast(NamedTuple):
    """One task: what happens, and the limit in seconds: of a copy of the logits, or of the matrix products alone."""

    what: str
    size: GpuLogits | GpuLinear
    events: list[Event]
    limit: Callable[[Card], float]

    def ratio(self, card: Card) -> float:
        """For logits the share of a copy's speed, else the time over that of the products."""
        time, limit = roofline.total(self.events, card), self.limit(card)
        return limit / time if isinstance(self.size, GpuLogits) else time / limit


def of_logits(size: GpuLogits) -> Iterator[Forecast]:
    dtype = getattr(torch, size.dtype)
    x = torch.empty(size.tokens, size.vocabulary, dtype=dtype, device="meta", requires_grad=True)
    y = torch.empty(size.tokens, dtype=torch.int64, device="meta")

    def op(gradient: bool) -> None:
        logps = token_logps(x if gradient else x.detach(), y, softcap=size.softcap, impl="triton")
        if gradient:
            torch.autograd.grad(logps, x, torch.empty_like(logps))

    for what, passes in (("forward", 1), ("both", 3)):
        events = trace(lambda what=what: op(what == "both"), FREE)
        yield Forecast(what, size, events, lambda card, passes=passes: passes * x.nbytes / card.copy)


def of_hidden(size: GpuLinear) -> Iterator[Forecast]:
    dtype = getattr(torch, size.dtype)

    def meta(*shape: int, gradient: bool) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)

    y = torch.empty(size.tokens, dtype=torch.int64, device="meta")
    for what, products in (("trainable", 3), ("frozen", 2)):
        h = meta(size.tokens, size.width, gradient=True)
        w = meta(size.vocabulary, size.width, gradient=what == "trainable")

        def op(h: Tensor = h, w: Tensor = w) -> None:
            logps = linear_token_logps(h, w, y, softcap=size.softcap, impl="triton")
            torch.autograd.grad(logps, [x for x in (h, w) if x.requires_grad], torch.empty_like(logps))

        yield Forecast(what, size, trace(op, FREE), partial(roofline.total, products_alone(size)[:products]))


def products_alone(size: GpuLinear) -> list[Product]:
    """The matrix products of a task, each at once: logits, gradient of hidden states, gradient of the head."""
    n, width, vocabulary = size.tokens, size.width, size.vocabulary
    item = getattr(torch, size.dtype).itemsize
    moved = item * (n * width + width * vocabulary + n * vocabulary)
    return [
        Product(rows, inner, columns, item == 2, moved)
        for rows, inner, columns in ((n, width, vocabulary), (n, vocabulary, width), (vocabulary, n, width))
    ]


def assumptions(chosen: list[Card]) -> str:
    """What the model takes for granted, and the numbers of each GPU with their sources."""
    model = " ".join((roofline.__doc__ or "").split())
    rows = [
        f"| {card.name} | {card.bandwidth / 1e12:.2f} | {card.copy / 1e12:.2f} | {card.half / 1e12:.0f} | "
        f"{card.products(True) / 1e12:.0f} | {card.single / 1e12:.1f} | {card.multiprocessors} | "
        f"{card.clock / 1e9:.2f} | {card.source} |"
        for card in chosen
    ]
    return "\n".join(
        [
            f"Forecast, not a measurement. {model}",
            f"Copies reach {cards.COPY_SHARE:.2f} of the peak and products {cards.PRODUCT_SHARE:.2f} of theirs, as on "
            f"an H200 in use. A kernel fills {cards.ISSUE_SHARE} of the issue slots. Kernels are "
            f"{cards.LAUNCH * 1e6:.0f} us apart. A load takes {cards.LATENCY * 1e9:.0f} ns. {FREE / 2**30:.0f} GiB are "
            "free for the plan. Float32 products use no TF32.",
            "",
            "| GPU | peak TB/s | copy TB/s | peak TFLOP/s | product TFLOP/s | float32 peak | SMs | GHz | source |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def name_of(size: GpuLogits | GpuLinear) -> str:
    softcap = "" if size.softcap is None else ", softcap"
    return f"{'x'.join(str(number) for number in size if isinstance(number, int))} {size.dtype}{softcap}"


def kernels_table(forecasts: list[Forecast], card: Card) -> str:
    """What the compiler made of each kernel that the tasks launch, once for each code."""
    lines = {}
    for forecast in forecasts:
        for event in forecast.events:
            if isinstance(event, sass.Launch):
                work = roofline.work_of(event, card.arch)
                flags = ",".join(name for name, value in event.constants.items() if value is True)
                name = f"{event.kernel.__name__.removesuffix('_kernel')} {sass.TYPES[event.arguments[0].dtype]} {flags}"
                lines.setdefault((name, work), name_of(forecast.size))
    rows = [
        f"| {name} | {size} | {work.registers} | {work.spilled} | {work.occupancy:.0%} | {work.instructions:.1f} | "
        f"{work.special:.2f} | {work.reads} | {work.load_bytes} |"
        for (name, work), size in lines.items()
    ]
    return "\n".join(
        [
            f"\nForecast, kernels as compiled for sm_{card.arch} (from machine code, no GPU):\n",
            "| kernel | first at | registers | spilled bytes | occupancy | instructions a logit | special functions a "
            "logit | reads of a logit | bytes a load |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def ratios_table(title: str, forecasts: list[Forecast], chosen: list[Card]) -> str:
    """A row for each task, with the target of an H200 where there is one."""
    rows = []
    for forecast in forecasts:
        target = TARGETS.get((forecast.what, forecast.size))
        ratios = [f"{forecast.ratio(card):.3f}" for card in chosen]
        outside = bytes_a_logit(forecast)
        rows.append(
            f"| {name_of(forecast.size)}, {forecast.what} | {' | '.join(ratios)} | {target or ''} | {outside:.1f} |"
        )
    heading = f"| | {' | '.join(card.name for card in chosen)} | target (H200) | bytes a logit |"
    return "\n".join([f"\n{title}:\n", heading, "|---" * (len(chosen) + 3) + "|", *rows])


def bytes_a_logit(forecast: Forecast) -> float:
    """Bytes that all but the matrix products move, per logit of the task."""
    moved = sum(
        event.moved if isinstance(event, Pass) else roofline.moved(event, roofline.work_of(event, 90))
        for event in forecast.events
        if not isinstance(event, Product)
    )
    return moved / (forecast.size.tokens * forecast.size.vocabulary)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--sizes", default="full", choices=list(FORECAST))
    options = parser.parse_args(arguments)
    chosen = [CARDS[name] for name in options.cards]
    logits, linear = FORECAST[options.sizes]
    from_logits = [forecast for size in logits for forecast in of_logits(size)]
    from_hidden = [forecast for size in linear for forecast in of_hidden(size)]
    print(assumptions(chosen))
    print(kernels_table(from_logits + from_hidden, chosen[-1]))
    share = "Forecast, logits to log-probs: share of the speed of a copy of the same bytes"
    print(ratios_table(share, from_logits, chosen))
    times = "Forecast, hidden states to gradient: time over that of the matrix products alone"
    print(ratios_table(times, from_hidden, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
