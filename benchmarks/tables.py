"""The tables of docs/benchmarks.md from `results/`, and the pictures: ``python -m benchmarks.tables``.

Tables are written between the two markers of their section.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import pictures, shapes
from benchmarks.measure import RESULTS, rows_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
LAYOUT_PICTURE, SPEED_PICTURE = (ROOT / "docs" / "images" / f"{name}.svg" for name in ("layouts", "speed"))
# The machine of the pictures.
CPU = RESULTS / "amd-epyc-2-cores.csv"
# of each kind of benchmark: shape, dtype
SIZES = (("32k", "float32"), ("32k", "bfloat16"), ("128k", "float32"), ("128k", "bfloat16"))
STEPS = (("1:1", "float32"), ("4:1", "float32"))
LAYOUTS = tuple((name, "float32") for name, shape in shapes.LAYOUTS.items() if shape.layers == 8)
CLOCKS = {"wall": "wall time", "process": "processor time (where the machine had other work)"}
Row = dict[str, str]


def render(folder: Path = RESULTS) -> str:
    """What stands between the markers, for each machine there are results of."""
    parts = [part for path in sorted(folder.glob("*.csv")) if (part := of_machine(path))]
    return "\n\n".join(parts)


def of_machine(path: Path) -> str:
    """The tables of one file, those that it has rows for."""
    rows = rows_of(path)
    large = {shape for shape, _ in LAYOUTS}
    shown = [row for row in rows if row.get("bench") in ("linear", "logits", "train_step")]
    shown += [row for row in rows if row.get("bench") == "layouts" and row["shape"] in large]
    if not shown:
        return ""
    parts = [f"{conditions(shown)} All rows, with spread and commit: `benchmarks/results/{path.name}`."]
    for frozen, head in (("False", "trainable"), ("True", "frozen")):
        products = "two" if frozen == "True" else "three"
        parts += table(
            f"Hidden states to DPO or KTO loss to gradient, {head} head: time over that of the {products} matrix "
            "products alone, peak extra memory in MiB, gradients included",
            [row for row in rows if row["bench"] == "linear" and row["frozen"] == frozen],
            SIZES,
            lambda row: f"{float(row['ratio']):.2f} · {mib(row)}",
        )
    for what in ("forward", "forward and backward"):
        parts += table(
            f"Logits to log-probs, {what}: time over that of `torch.compile`, peak extra memory in MiB, and the "
            "largest error of a log-prob against float64",
            [row for row in rows if row["bench"] == "logits" and row["what"] == what],
            SIZES,
            lambda row: f"{float(row['ratio']):.2f} · {mib(row)} · {float(row['logp_error']):.0e}",
        )
    parts += table(
        "A whole DPO training step by tokens of prompt to completion, references computed beforehand (Llama, 4 layers, "
        "H 256, V 32,000, 4 pairs of 256 tokens): time over that of TRL's DPOTrainer, peak extra memory in MiB",
        [row for row in rows if row["bench"] == "train_step"],
        STEPS,
        lambda row: f"{float(row['ratio']):.2f} · {mib(row)}",
    )
    parts += table(
        "A whole training step by layout of the batch (Llama, 8 layers, H 512, V 4,096): time over that of padded rows",
        [row for row in shown if row["bench"] == "layouts"],
        LAYOUTS,
        lambda row: f"{float(row['ratio']):.2f}",
    )
    return "\n\n".join(parts)


def conditions(rows: Sequence[Row]) -> str:
    """Machine, threads, versions, clock and load of rows."""
    loads = sorted({float(row["load"]) for row in rows})
    clocks = " and ".join(sorted({CLOCKS[row["clock"]] for row in rows}))
    threads = " or ".join(sorted({row["threads"] for row in rows}))
    return (
        f"Measured on {rows[0]['device'].replace('-', ' ')}, {threads} of them used ({rows[0]['versions']}), in turns "
        f"in one process: medians of {clocks}; load average {loads[0]:g} to {loads[-1]:g}."
    )


def table(
    title: str, rows: list[Row], columns: Sequence[tuple[str, str]], cell: Callable[[Row], str]
) -> list[str]:
    """A title and a table of ways and sizes, ours first; nothing without rows."""
    ways = dict.fromkeys(row["way"] for row in rows if row["way"] != "matmuls alone")
    cells = {(row["way"], row["shape"], row["dtype"]): row for row in rows}
    lines = []
    for way in sorted(ways, key=lambda way: (not way.startswith("prefloss"), "KTO" in way)):
        cells_of_way = [cells.get((way, *column)) for column in columns]
        texts = ["" if row is None else _shown(row, cell) for row in cells_of_way]
        name = f"**{way}**" if way.startswith("prefloss") else way
        lines.append(f"| {name} | {' | '.join(texts)} |")
    names = [f"V {shape}, {dtype}" if shape in ("32k", "128k") else shape for shape, dtype in columns]
    heading = f"| | {' | '.join(names)} |\n|---{'|---' * len(columns)}|"
    return [f"{title}:", "\n".join([heading, *lines])] if lines else []


def _shown(row: Row, cell: Callable[[Row], str]) -> str:
    """The cell of a row; of one that has no time, why, in a word or two."""
    if not row["median_ms"]:
        return row["note"].partition(":")[0]
    # a speed counts only with right numbers
    return cell(row) if row["ok"] == "True" else "wrong"


def mib(row: Row) -> str:
    """Peak extra memory, or a dash where it is unknown."""
    extra = row["peak_extra_bytes"]
    return f"{int(extra) / 2**20:.0f}" if extra else "–"


def layout_rows() -> list[Row]:
    """What is kept of layouts, with the tokens that each computes."""
    rows = [row for path in sorted(RESULTS.glob("*-cores.csv")) for row in rows_of(path)]
    return [row for row in rows if row["bench"] == "layouts" and row["tokens"]]


def by_layout(rows: Sequence[Row]) -> str:
    """Time, tokens, memory and errors of each batch by layout, from `layout_rows`; nothing without rows."""
    found = {(row["shape"], row["way"]): row for row in rows}
    lines = []
    for shape in shapes.LAYOUTS:
        padded, shared = found.get((shape, "padded")), found.get((shape, "shared_prefix"))
        if padded is None or shared is None:
            continue
        ratios = [found.get((shape, way)) for way in ("packed", "shared_prefix", "auto")]
        cells = ["" if row is None else f"{float(row['ratio']):.2f}" for row in ratios]
        tokens = int(shared["tokens"]) / int(padded["tokens"])
        memory = int(shared["peak_extra_bytes"]) / int(padded["peak_extra_bytes"])
        error = float(shared["gradient_error"])
        lines.append(f"| {shape} | {tokens:.2f} | {' | '.join(cells)} | {memory:.2f} | {error:.0e} |")
    heading = (
        "| batch: prompt+completion, tokens | tokens left | `packed` | `shared_prefix` | `auto` | memory | error of "
        "gradients |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([conditions(rows), "", heading, *lines]) if lines else ""


def replaced(page: str, section: str, text: str) -> str:
    """A page with other text between the markers of a section."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"page: expected the markers {begin} and {end}, in this order")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def written(page: str) -> str:
    """docs/benchmarks.md with the tables of today's results."""
    return replaced(replaced(page, "log-probs", render()), "layouts", by_layout(layout_rows()))


def main() -> None:
    """Write the page and the pictures."""
    PAGE.write_text(written(PAGE.read_text()))
    pictures.draw_layouts(layout_rows(), LAYOUT_PICTURE)
    pictures.draw_linear(rows_of(CPU), SPEED_PICTURE)


if __name__ == "__main__":
    main()
