"""The tables of the README from `results/`: ``python -m benchmarks.tables`` writes them between their two markers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import shapes
from benchmarks.measure import RESULTS, rows_of

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# of each kind of benchmark: shape, dtype
SIZES = (("32k", "float32"), ("32k", "bfloat16"), ("128k", "float32"), ("128k", "bfloat16"))
STEPS = (("1:1", "float32"), ("4:1", "float32"))
LAYOUTS = tuple((shape, "float32") for shape in shapes.LAYOUTS if shape != "tiny")
CLOCKS = {"wall": "wall time", "process": "processor time (where the machine had other work)"}
Row = dict[str, str]


def render(folder: Path = RESULTS) -> str:
    """What stands between the markers, for each machine there are results of."""
    parts = [part for path in sorted(folder.glob("*.csv")) if (part := of_machine(path))]
    return "\n\n".join(parts)


def of_machine(path: Path) -> str:
    """The tables of one file, those that it has rows for."""
    rows = rows_of(path)
    shown = [row for row in rows if row.get("bench") in ("linear", "logits", "train_step", "layouts")]
    if not shown:
        return ""
    loads = sorted({float(row["load"]) for row in shown})
    clocks = " and ".join(sorted({CLOCKS[row["clock"]] for row in shown}))
    threads = " or ".join(sorted({row["threads"] for row in shown}))
    parts = [
        f"Measured on {path.stem.replace('-', ' ')}, {threads} of them used ({shown[0]['versions']}), in turns in one "
        f"process: medians of {clocks}; load average {loads[0]:g} to {loads[-1]:g}. All rows, with spread and commit: "
        f"[{path.name}](benchmarks/results/{path.name})."
    ]
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
        [row for row in rows if row["bench"] == "layouts"],
        LAYOUTS,
        lambda row: f"{float(row['ratio']):.2f}",
    )
    return "\n\n".join(parts)


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


def replaced(page: str, text: str, name: str = "README.md") -> str:
    """A page with other text between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{name}: expected the markers {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(), render()))
