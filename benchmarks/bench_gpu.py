"""The kernels on a GPU, in one call: ``python -m benchmarks.bench_gpu --out DIR``.

Four parts, each in a process of its own and each under eight minutes; ``--part`` runs one of them:

- kernels: every kernel and flag against float64
- alone: ours at the sizes of the published tables
- peers: ours and other implementations in turns, those that are installed
- sweep: odd vocabularies, few tokens, tiles of several sizes, blocks and warps of the kernels from logits

Times are the device's, without the host's. Errors are judged against what cuBLAS itself gives. Copy bandwidth and
matmul rate come from the same run. Rows go to ``DIR/<gpu>.csv`` as they are measured, checks to ``checks.json``, the
verdict of each part to ``parts.json``. The exit code is 0 if everything ran and is right.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, Budget
from benchmarks.gpu.device import Gpu, StandIn
from benchmarks.gpu.parts import PARTS, run_part
from benchmarks.measure import RESULTS
from benchmarks.shapes import GPU

# A part begins nothing after the first, and is ended after the second: a peer may compile for minutes.
SECONDS, MORE_SECONDS = 400.0, 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default %(default)s)"
    )
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each way (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a part (default %(default)s)")
    parser.add_argument(
        "--stand-in",
        action="store_true",
        help="tiny sizes on the CPU, to test this program; no speeds are meant",
    )
    options = parser.parse_args(arguments)
    if not options.stand_in and not torch.cuda.is_available():
        print("bench_gpu: no CUDA or ROCm device here, so nothing was measured", file=sys.stderr)
        return 2
    if options.part is None:
        return run_all(options)
    bench = Bench(
        options.part,
        StandIn() if options.stand_in else Gpu(),
        Budget(options.seconds),
        options.out,
        options.rounds,
    )
    run_part(bench, GPU["tiny" if options.stand_in else "full"])
    return conclude(options.out, [options.part])


def run_all(options: argparse.Namespace, run: Callable[..., object] = subprocess.run) -> int:
    """Each part in a process of its own, which is ended if it takes too long; then the verdicts."""
    passed = [f"--out={options.out}", f"--rounds={options.rounds}", f"--seconds={options.seconds}"]
    passed += ["--stand-in"] if options.stand_in else []
    (options.out / "parts.json").unlink(missing_ok=True)
    for part in PARTS:
        print(f"\n== {part}", flush=True)
        command = [sys.executable, "-m", "benchmarks.bench_gpu", "--part", part, *passed]
        try:
            run(command, timeout=options.seconds + MORE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            note(options.out, part, f"ended after {options.seconds + MORE_SECONDS:.0f} s")
    return conclude(options.out, list(PARTS))


def note(folder: Path, part: str, verdict: str) -> None:
    """Write the verdict of a part that could not write it itself."""
    path = folder / "parts.json"
    folder.mkdir(parents=True, exist_ok=True)
    parts = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**parts, part: {"verdict": verdict}}, indent=1) + "\n")


def conclude(folder: Path, names: list[str]) -> int:
    """Print the verdict of each part; 0 if all held."""
    path = folder / "parts.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    print("\nverdicts")
    for name in names:
        part = parts.get(name, {"verdict": "ended without a verdict"})
        print(f"  {name:8} {part['verdict']} ({part.get('seconds', '?')} s)")
        for kind in ("wrong", "missing", "problems"):
            for line in part.get(kind, ()):
                print(f"    {kind}: {line}")
    return int(any(parts.get(name, {}).get("verdict") != "held" for name in names))


if __name__ == "__main__":
    sys.exit(main())
