"""Pictures of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shapes import BY_LENGTH
from prefloss.evidence.drawing import panels


def draw_layouts(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Time over that of padded rows, and tokens left, against the length of a sequence; nothing without rows."""
    times = {(row["shape"], row["way"]): float(row["ratio"]) for row in rows if row["shape"] in BY_LENGTH}
    if not times:
        return
    plt = _pyplot()
    figure = plt.figure(figsize=(8.5, 3.4), layout="constrained")
    for axis, kind in zip(panels(figure, 2, sharey=True), ("pairs", "rankings of 8"), strict=True):
        named = {name: shape for name, shape in BY_LENGTH.items() if name.startswith(kind)}
        for way in ("packed", "shared_prefix", "auto"):
            points = [
                (shape.prompt + shape.completion, times[name, way])
                for name, shape in named.items()
                if (name, way) in times
            ]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=way)
        count = next(iter(named.values())).completions
        axis.axhline((1 + count) / (2 * count), color="0.5", linestyle="--", label="tokens left")
        axis.axhline(1, color="0.8", zorder=0)
        axis.set(xscale="log", xlabel="tokens of a sequence, half of them prompt", title=kind, ylim=(0, 1.2))
        lengths = [shape.prompt + shape.completion for shape in named.values()]
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axis.minorticks_off()
    figure.axes[0].set_ylabel("time over padded rows")
    figure.axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_linear(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Time over the matrix products, and memory, of V 32,000 in bfloat16 with a trainable head."""
    kind = {"bench": "linear", "shape": "32k", "dtype": "bfloat16", "frozen": "False"}
    chosen = [row for row in rows if kind.items() <= row.items() and row["peak_extra_bytes"]]
    ways = [row for row in chosen if not any(word in row["way"] for word in ("KTO", "budget", "alone"))]
    ways.sort(key=lambda row: -float(row["ratio"]))
    plt = _pyplot()
    figure = plt.figure(figsize=(8.5, 2.9), layout="constrained")
    left, right = panels(figure, 2, sharey=True)
    colours = ["C0" if row["way"].startswith("prefloss") else "0.7" for row in ways]
    names = [row["way"] for row in ways]
    for axis, values, form, title in (
        (left, [float(row["ratio"]) for row in ways], "{:.2f}", "time over the three matrix products"),
        (right, [int(row["peak_extra_bytes"]) / 2**20 for row in ways], "{:.0f}", "peak extra memory, MiB"),
    ):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.set(title=title, xlim=(0, 1.15 * max(values)))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same file from the same rows.
    matplotlib.rcParams["svg.hashsalt"] = "prefloss"
    import matplotlib.pyplot as plt

    return plt
