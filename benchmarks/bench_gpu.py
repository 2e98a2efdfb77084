"""Log-prob kernels on a GPU, some minutes, one command: ``python benchmarks/bench_gpu.py``.

Correctness against float64 comes first, and nothing is timed unless all of it holds. Then, in turns in one process:
logits to log-probs against the bytes that must move at the measured copy bandwidth, and hidden states to DPO loss to
gradient against the matmuls of the same run plus three passes over the logits. Medians go to the terminal and to
``benchmarks/results/<gpu>.csv``, where x is time over that of the limit.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_linear, measure
from benchmarks.measure import Record
from benchmarks.peers import liger_steps, linear_ways, logits_ways
from benchmarks.shapes import Linear
from prefloss.kernels import autograd, naive
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan, Scheme
from prefloss.kernels.tiles import LinearInputs, select_targets

DEVICE = "cuda"
PLAIN = LogitTransform()
TRANSFORMS = {
    "plain": PLAIN,
    "scaled": LogitTransform(1.3, None, 0.7),
    "softcap": LogitTransform(1.0, 30.0, 1.0),
}
IGNORED = -100
LIMIT = "limit"
# times of the limit that issue 4 asks of an H200; for the first two, fractions of the bandwidth
GOALS = {"forward": 1 / 0.85, "forward and backward": 1 / 0.80, "hidden to DPO to gradient": 1.15}

Step = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=16384, help="tokens, a multiple of 8 (default %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128256, 32000])
    parser.add_argument("--width", type=int, default=4096, help="of the hidden states (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--alone", action="store_true", help="prefloss without the peers, some of which compile"
    )
    parser.add_argument("--sweep", action="store_true", help="also time block sizes and numbers of warps")
    parser.add_argument("--out", type=Path, help="folder of the CSV (default benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: no CUDA or ROCm device here, so nothing was measured", file=sys.stderr)
        return 2
    if arguments.out is not None:
        measure.RESULTS = arguments.out
    print(*(f"{name:>18}  {value}" for name, value in measure.circumstances(DEVICE).items()), sep="\n")
    if not correct(DEVICE):
        print("bench_gpu: a correctness check failed, so nothing was timed", file=sys.stderr)
        return 1
    for vocabulary in arguments.vocabulary:
        torch.cuda.empty_cache()
        bandwidth = copy_bandwidth(arguments.rows, vocabulary, arguments.rounds)
        print(f"\nN {arguments.rows}, V {vocabulary}: a copy of the logits moves {bandwidth / 1e12:.2f} TB/s")
        bench_gather(arguments, vocabulary, bandwidth)
        for frozen in (True, False):
            bench_hidden(arguments, vocabulary, bandwidth, frozen)
        if arguments.sweep:
            sweep(arguments, vocabulary, bandwidth)
    return 0


def correct(
    device: str, *, vocabulary: int = 32003, rows: int = 257, hidden: int = 512, past: bool = True
) -> bool:
    """Every kernel and flag against float64, with a vocabulary that is a multiple of nothing; prints each error."""
    held = True

    def check(what: str, error: float, limit: float) -> None:
        nonlocal held
        passed = error <= limit
        held &= passed
        print(f"  {'ok  ' if passed else 'FAIL'} {what}: {error:.2e} (limit {limit:.2e})")

    print("correctness against float64")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, transform in TRANSFORMS.items():
            for outputs in (1, 5):
                check_gather(check, device, f"{name}, {outputs}", dtype, transform, outputs, rows, vocabulary)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, transform in TRANSFORMS.items():
            check_linear(check, device, name, dtype, transform, rows, vocabulary, hidden)
    if past:
        check_past_2_to_the_31(check, device)
    return held


def check_gather(
    check: Callable[..., None],
    device: str,
    name: str,
    dtype: torch.dtype,
    transform: LogitTransform,
    outputs: int,
    rows: int,
    vocabulary: int,
) -> None:
    x = (torch.randn(rows, vocabulary, device=device) * 4).to(dtype)
    # -inf in front and behind, a likely target, an ignored row of NaN
    x[:, :100] = x[:, -3:] = -torch.inf
    y = torch.randint(100, vocabulary - 3, (rows,), device=device)
    x[0, y[0]] = 25
    x[1], y[1] = torch.nan, IGNORED
    weights = torch.randn(outputs, rows, device=device)
    # top-1 has no gradient
    weights[4:] = 0
    exact = x.double().requires_grad_()
    exact_stats = naive.token_stats(exact, y, transform, IGNORED, outputs)
    (exact_stats * weights).sum().backward()
    assert exact.grad is not None
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        got = triton_tokens(leaf * 1, y, transform, outputs, inplace)
        (got * weights).sum().backward()
        assert leaf.grad is not None
        what = f"gather {dtype} {name}{', in place' if inplace else ''}"
        check(f"{what}: statistics", ((got - exact_stats).abs() / (1 + exact_stats.abs())).max().item(), 1e-5)
        check(f"{what}: gradient", relative(leaf.grad, exact.grad), rounding(dtype))


def check_linear(
    check: Callable[..., None],
    device: str,
    name: str,
    dtype: torch.dtype,
    transform: LogitTransform,
    rows: int,
    vocabulary: int,
    hidden: int,
) -> None:
    h, w, b = (
        (torch.randn(shape, device=device) * scale).to(dtype)
        for shape, scale in (((rows, hidden), 1.0), ((vocabulary, hidden), 0.2), ((vocabulary,), 1.0))
    )
    y = torch.randint(vocabulary, (rows,), device=device)
    y[::5] = IGNORED
    cases: tuple[tuple[Scheme, int, int], ...] = (
        ("recompute", 0, 1), ("recompute", 0, 5), ("unscaled", 0, 1), ("keep", rows, 1), ("keep", rows // 2, 5),
    )  # fmt: skip
    for scheme, kept, outputs in cases:
        weights = torch.randn(outputs, rows, device=device)
        weights[4:] = 0
        frozen = scheme == "unscaled"
        exact = [z.double().requires_grad_() for z in (h, w, b)]
        plain = [z.clone().requires_grad_() for z in (h, w, b)]
        leaves = [z.clone().requires_grad_(not frozen or z is h) for z in (h, w, b)]
        exact_stats = naive.linear_token_stats(exact[0], exact[1], exact[2], y, transform, IGNORED, outputs)
        (exact_stats * weights).sum().backward()
        # what autograd makes of the same in this precision, with float32 logits given to the softmax
        z = F.linear(plain[0], plain[1], plain[2]).float()
        (naive.token_stats(z, y, transform, IGNORED, outputs) * weights).sum().backward()
        plan = Plan(scheme, 48, kept, "triton")
        got = linear_stats(leaves[0], leaves[1], leaves[2], y, transform, plan, outputs)
        (got * weights).sum().backward()
        what = f"linear {dtype} {name}, {scheme} {kept}, {outputs}"
        check(f"{what}: statistics", ((got - exact_stats).abs() / (1 + exact_stats.abs())).max().item(), 1e-5)
        for part, leaf, other, right in zip(("hidden", "weight", "bias"), leaves, plain, exact, strict=True):
            if leaf.requires_grad:
                assert leaf.grad is not None
                limit = max(1.1 * relative(other.grad, right.grad), 0.4 * torch.finfo(dtype).eps, 2e-5)
                check(f"{what}: gradient of {part}", relative(leaf.grad, right.grad), limit)


def triton_tokens(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform = PLAIN,
    outputs: int = 1,
    inplace: bool = False,
) -> Tensor:
    return autograd.token_stats(logits, targets, transform, IGNORED, Plan(impl="triton"), outputs, inplace)


def linear_stats(
    x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, transform: LogitTransform, plan: Plan, outputs: int
) -> Tensor:
    inputs = LinearInputs(x, w, b, y, transform)
    return autograd.linear_token_stats(inputs, select_targets(y, IGNORED), IGNORED, plan, outputs)


def check_past_2_to_the_31(check: Callable[..., None], device: str) -> None:
    from prefloss.kernels.triton import launch

    rows, vocabulary = 17000, 128256
    x = torch.empty(rows, vocabulary, device=device, dtype=torch.bfloat16).normal_()
    y = torch.randint(vocabulary, (rows,), device=device)
    last = x[-8:].double().requires_grad_()
    exact_stats = naive.token_stats(last, y[-8:], PLAIN, IGNORED, 1)[0]
    exact_stats.sum().backward()
    stats = launch.token_forward(x, y, PLAIN, 1, 1)
    check("past 2**31 logits: log-probs", (stats[0, -8:] - exact_stats).abs().max().item(), 1e-5)
    upstream = torch.ones(1, rows, device=device)
    grad = launch.token_backward(upstream, x, y, stats, PLAIN, 1, over_logits=True)
    check("past 2**31 logits: gradient in place", relative(grad[-8:], last.grad), rounding(x.dtype))


def relative(x: Any, exact: Any) -> float:
    """Norm of the error over norm."""
    return ((x.double() - exact).norm() / exact.norm()).item()


def rounding(dtype: torch.dtype) -> float:
    """One rounding to the dtype, and what float32 arithmetic adds."""
    return torch.finfo(dtype).eps / 2 + 1e-5


def bench_gather(arguments: argparse.Namespace, vocabulary: int, bandwidth: float) -> None:
    torch.manual_seed(0)
    n = arguments.rows
    x = torch.empty(n, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_(std=4).requires_grad_()
    y = torch.randint(vocabulary, (n,), device=DEVICE)
    upstream = torch.randn(n, device=DEVICE)
    # it writes over these; that they hold a gradient in the next round changes no time
    other = x.detach().clone().requires_grad_()

    def gather(logits: Tensor, targets: Tensor) -> Tensor:
        return triton_tokens(logits, targets)[0]

    def inplace(logits: Tensor, targets: Tensor) -> Tensor:
        return triton_tokens(logits, targets, inplace=True)[0]

    def statistics_too(logits: Tensor, targets: Tensor) -> Tensor:
        return triton_tokens(logits, targets, outputs=5)[0]

    ways: dict[str, Callable[..., Tensor]] = {"prefloss": gather, "prefloss, all statistics": statistics_too}
    ways |= {} if arguments.alone else logits_ways()
    errors = {name: gather_errors(call, x, y, upstream) for name, call in ways.items()}

    def forward(call: Callable[..., Tensor]) -> Step:
        return lambda: call(x.detach(), y)

    def both(call: Callable[..., Tensor], leaf: Tensor) -> Step:
        # through a view, as logits are the result of an op and never a leaf
        return lambda: torch.autograd.grad((call(leaf.view_as(leaf), y) * upstream).sum(), leaf)

    read = x.nbytes / bandwidth * 1e3
    steps = {name: both(call, x) for name, call in ways.items()} | {
        "prefloss, in place": both(inplace, other)
    }
    for what, calls, limit in (
        ("forward", {name: forward(call) for name, call in ways.items()}, read),
        ("forward and backward", steps, 3 * read),
    ):
        records = in_turns(calls, arguments.rounds)
        for name, record in records.items():
            record.logp_error, record.gradient_error = errors[name.removesuffix(", in place")]
            record.ok = not name.startswith("prefloss") or record.logp_error < 1e-5
        row: dict[str, object] = {
            "bench": "gpu logits",
            "what": what,
            "shape": f"{n}x{vocabulary}",
            "dtype": "bfloat16",
            "frozen": "",
        }
        report(f"{what}, {n} x {vocabulary} bfloat16", records, limit, row, arguments)


def gather_errors(call: Callable[..., Tensor], x: Tensor, y: Tensor, upstream: Tensor) -> tuple[float, float]:
    """Largest error of the log-probs and relative error of the gradient, on some rows, against float64."""
    leaf, some = x.detach()[-64:].clone().requires_grad_(), y[-64:]
    exact = leaf.detach().double().requires_grad_()
    want = naive.token_stats(exact, some, PLAIN, IGNORED, 1)[0]
    (want * upstream[-64:]).sum().backward()
    got = call(leaf.view_as(leaf), some)
    (got * upstream[-64:]).sum().backward()
    return (got - want).abs().max().item(), relative(leaf.grad, exact.grad)


def bench_hidden(arguments: argparse.Namespace, vocabulary: int, bandwidth: float, frozen: bool) -> None:
    n, width = arguments.rows, arguments.width
    shape = Linear(4, n // 8, 0, width, vocabulary)
    problem = bench_linear.Problem(shape, torch.bfloat16, DEVICE, frozen)
    calls: dict[str, Callable[..., Tensor]] = {}
    # a tile of logits of 256 MiB, or of 512
    for mib in (256, 512):
        rows = max(1, mib * 2**18 // vocabulary)
        plans = {"2 matmuls": Plan("unscaled", rows, impl="triton")}
        if not frozen:
            plans = {
                "3 matmuls": Plan("keep", rows, n, "triton"),
                "1 GiB kept": Plan("keep", rows, 2**29 // vocabulary, "triton"),
                "4 matmuls": Plan("recompute", rows, impl="triton"),
            }
        for name, plan in plans.items():
            calls[f"prefloss, {name}, tile {mib} MiB"] = planned(plan)
    chunked = Plan("unscaled" if frozen else "recompute", max(1, 2**26 // vocabulary))
    calls["prefloss, no Triton"] = planned(chunked)
    calls |= {} if arguments.alone else linear_ways()
    steps: dict[str, Step] = {name: problem.by_tokens(call) for name, call in calls.items()}
    if not arguments.alone:
        steps |= {
            name: problem.whole_loss(call) for name, call in liger_steps("dpo", bench_linear.BETA).items()
        }
    errors = {name: linear_errors(call, problem) for name, call in calls.items()}
    floor = "matmuls alone"
    records = in_turns({floor: problem.matmuls(), **steps}, arguments.rounds)
    for name, record in records.items():
        record.logp_error, record.gradient_error = errors.get(name, (float("nan"),) * 2)
        record.ok = not name.startswith("prefloss") or record.logp_error < 1e-5
    gradients = sum(z.nbytes for z in problem.trained) / 2**20
    passes = 3 * n * vocabulary * 2 / bandwidth * 1e3
    limit = records[floor].median + passes
    what, head = "hidden to DPO to gradient", "frozen" if frozen else "trained"
    row = {
        "bench": "gpu linear",
        "what": what,
        "shape": f"{n}x{width}x{vocabulary}",
        "dtype": "bfloat16",
        "frozen": frozen,
    }
    report(f"{what}, {n} x {width} x {vocabulary} bfloat16, {head} head", records, limit, row, arguments)
    print(
        f"(of the limit {passes:.2f} ms are passes over the logits; of the MiB {gradients:.0f} are gradients)"
    )


def planned(plan: Plan) -> Callable[..., Tensor]:
    return lambda x, w, y: linear_stats(x, w, None, y, PLAIN, plan, 1)[0]


def linear_errors(call: Callable[..., Tensor], problem: bench_linear.Problem) -> tuple[float, float]:
    """Largest error of some log-probs, and the worse relative error of their gradients, against float64."""
    x = problem.hidden.detach().reshape(-1, problem.shape.width)[-256:]
    y = problem.targets.reshape(-1)[-256:]
    upstream = torch.randn(len(y), device=x.device)
    pairs = []
    for op, dtype in ((call, x.dtype), (exact_way, torch.float64)):
        leaf, head = (z.detach().to(dtype).requires_grad_() for z in (x, problem.weight))
        logps = op(leaf, head.requires_grad_(problem.weight.requires_grad), y)
        (logps * upstream).sum().backward()
        pairs.append((logps.detach(), [leaf.grad] if head.grad is None else [leaf.grad, head.grad]))
    (got, grads), (want, exact_stats) = pairs
    return (got - want).abs().max().item(), max(
        relative(a, b) for a, b in zip(grads, exact_stats, strict=True)
    )


def exact_way(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return (x @ w.T).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)


def report(
    title: str,
    records: dict[str, Record],
    limit: float,
    row: dict[str, object],
    arguments: argparse.Namespace,
) -> None:
    records = {**records, LIMIT: Record(LIMIT, [limit])}
    measure.report(title, records, LIMIT, row, DEVICE, not arguments.dry)
    # in the order in which they are offered: the best of them is not known beforehand
    for name, record in records.items():
        if name.startswith("prefloss") and record.ok:
            goal = 1 / GOALS[str(row["what"])]
            fraction = limit / record.median
            verdict = "reached" if fraction >= goal else "missed"
            print(f"{name}: {fraction:.3f} of the limit's speed, goal {goal:.3f}: {verdict}")


def in_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, Record]:
    """As `measure.in_turns`, by the device's own clock, and without the ways that memory does not suffice for."""
    records: dict[str, Record] = {}
    for name, step in steps.items():
        try:
            # the first call compiles and picks algorithms
            step()
            step()
            records[name] = Record(name, peak_mib=measure.peak_mib(step, DEVICE))
        except torch.cuda.OutOfMemoryError:
            print(f"{name}: out of memory")
        gc.collect()
        torch.cuda.empty_cache()
    names = list(records)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            records[name].milliseconds.append(milliseconds(steps[name]))
    return records


def milliseconds(step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    kept = step()
    end.record()
    end.synchronize()
    del kept
    return begin.elapsed_time(end)


def copy_bandwidth(n: int, vocabulary: int, rounds: int) -> float:
    """Bytes read and written in a second by a copy of the logits."""
    x = torch.empty(n, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / in_turns({"copy": lambda: y.copy_(x)}, rounds)["copy"].median * 1e3


def sweep(arguments: argparse.Namespace, vocabulary: int, bandwidth: float) -> None:
    """Which blocks and warps suit the two gather kernels; printed, not saved."""
    from prefloss.kernels.triton import launch

    x = torch.empty(arguments.rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    y = torch.randint(vocabulary, (len(x),), device=DEVICE)
    grad = torch.randn(1, len(x), device=DEVICE)
    stats = launch.token_forward(x, y, PLAIN, 1, 1)
    usual, read = (launch.FORWARD, launch.BACKWARD), x.nbytes / bandwidth * 1e3
    print("\nblock and warps: speed of forward and backward, of the limit's")
    for block in (1024, 2048, 4096, 8192, 16384):
        for warps in (1, 2, 4, 8, 16):
            # 8 to 128 logits a thread
            if 256 <= block // warps <= 4096:
                launch.FORWARD = launch.BACKWARD = launch.Launch(block, warps)
                records = in_turns(
                    {
                        "forward": lambda: launch.token_forward(x, y, PLAIN, 1, 1),
                        "backward": lambda: launch.token_backward(grad, x, y, stats, PLAIN, 1),
                    },
                    arguments.rounds,
                )
                ahead, back = records["forward"].median, records["backward"].median
                print(f"{block:6} {warps:3}: {read / ahead:.3f} {2 * read / back:.3f}")
    launch.FORWARD, launch.BACKWARD = usual


if __name__ == "__main__":
    sys.exit(main())
