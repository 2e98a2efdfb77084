"""Hidden states to DPO loss to gradients, head trainable or frozen: ``python -m benchmarks.bench_linear``."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_turns, report
from benchmarks.peers import liger_dpo, linear_ways
from benchmarks.shapes import LINEAR, Linear
from prefloss.logprobs import linear_token_logps

BETA = 0.1
BASELINE = "TRL chunked, completion only"
# of the gradients against float64, relative; float32 logits and one rounding of each factor and result
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
# in bfloat16 of logits rounded to it, which most peers have
LOGP_LIMIT = 1e-5


class Problem:
    """Hidden states of chosen and rejected completions, [2 pairs, T, H], and a head; no reference model."""

    def __init__(self, shape: Linear, dtype: torch.dtype, device: str, frozen: bool) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.hidden = torch.randn(2 * shape.pairs, shape.sequence, shape.width, device=device).to(dtype)
        self.hidden.requires_grad_()
        weight = 2 * torch.randn(shape.vocabulary, shape.width, device=device) / shape.width**0.5
        self.weight = weight.to(dtype).requires_grad_(not frozen)
        self.targets = torch.randint(shape.vocabulary, self.hidden.shape[:2], device=device)
        self.targets[:, : shape.prompt] = -100
        self.kept = (self.targets != -100).reshape(-1).nonzero().squeeze(-1)
        self.trained = [self.hidden] if frozen else [self.hidden, self.weight]

    def loss(self, logps: Tensor) -> Tensor:
        """DPO of [2 pairs, T] log-probs, chosen first."""
        sums = logps.float().sum(-1)
        chosen, rejected = sums.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def by_tokens(self, call: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """A step with an op on [n, H] completion tokens."""

        def step() -> tuple[Tensor, ...]:
            x = self.hidden.reshape(-1, self.shape.width).index_select(0, self.kept)
            logps = call(x, self.weight, self.targets.reshape(-1)[self.kept])
            return torch.autograd.grad(self.loss(logps.reshape(2 * self.shape.pairs, -1)), self.trained)

        return step

    def all_tokens(self, call: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """A step with an op on [2 pairs, T, H] and targets with ignored ones, to log-probs."""
        return lambda: torch.autograd.grad(
            self.loss(call(self.hidden, self.weight, self.targets)), self.trained
        )

    def whole_loss(self, call: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """A step with somebody's fused loss."""
        return lambda: torch.autograd.grad(call(self.hidden, self.weight, self.targets), self.trained)

    def matmuls(self) -> Callable[[], object]:
        """The products of three (or two) schemes alone, into memory at hand: the floor."""
        x = self.hidden.detach().reshape(-1, self.shape.width)[self.kept]
        w = self.weight.detach()
        z, dx, dw = torch.mm(x, w.T), torch.empty_like(x), torch.empty_like(w)

        def step() -> None:
            torch.mm(x, w.T, out=z)
            torch.mm(z, w, out=dx)
            if len(self.trained) > 1:
                torch.mm(z.T, x, out=dw)

        return step


def prefloss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_token_logps(hidden, weight, targets, impl="chunked")


def prefloss_recompute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_token_logps(hidden, weight, targets, impl="chunked", budget_bytes=0)


def run(
    shape: Linear,
    dtype: torch.dtype,
    frozen: bool,
    rounds: int,
    device: str = "cpu",
    save: bool = True,
    name: str = "",
    only: tuple[str, ...] = (),
) -> None:
    """Measure every way there is, or those named in `only`, and report."""
    problem = Problem(shape, dtype, device, frozen)
    calls = linear_ways()
    steps = {way: problem.by_tokens(call) for way, call in calls.items()}
    for compiled in (False, True):
        liger = liger_dpo(compiled, BETA)
        if liger is not None:
            steps[f"Liger DPO{', compiled' if compiled else ''}"] = problem.whole_loss(liger)
    steps["prefloss"] = problem.all_tokens(prefloss)
    steps["prefloss, no budget"] = problem.all_tokens(prefloss_recompute)
    if only:
        steps = {way: step for way, step in steps.items() if way in only}
    errors = _errors(
        problem, {**calls, "prefloss": prefloss, "prefloss, no budget": prefloss_recompute}, steps
    )
    steps["matmul floor"] = problem.matmuls()
    records = in_turns(steps, rounds, device)
    for way, record in records.items():
        record.logp_error, record.gradient_error = errors.get(way, (float("nan"),) * 2)
        wrong = record.logp_error > LOGP_LIMIT or record.gradient_error > GRADIENT_LIMITS[dtype]
        record.ok = not (way.startswith("prefloss") and wrong)
    row = {
        "bench": "linear",
        "what": "hidden to DPO to gradient",
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "frozen": frozen,
    }
    title = f"{row['what']}, {shape}, {row['dtype']}, {'frozen' if frozen else 'trainable'} head"
    report(title, records, "matmul floor", row, device, save)


def _errors(
    problem: Problem,
    calls: dict[str, Callable[..., Tensor]],
    steps: dict[str, Callable[[], tuple[Tensor, ...]]],
) -> dict[str, tuple[float, float]]:
    """Largest error of some log-probs and worst relative error of the gradients, against float64."""
    some = problem.kept[:64]
    x, y = problem.hidden.detach().reshape(-1, problem.shape.width)[some], problem.targets.reshape(-1)[some]
    w = problem.weight.detach()
    exact = Problem.__new__(Problem)
    exact.__dict__.update(problem.__dict__)
    exact.hidden = problem.hidden.detach().double().requires_grad_()
    exact.weight = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)
    exact.trained = [exact.hidden] if len(problem.trained) == 1 else [exact.hidden, exact.weight]

    def logps(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return (x @ w.T).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)

    def loss(values: Tensor) -> Tensor:
        chosen, rejected = values.sum(-1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    exact.loss = loss
    wanted = exact.by_tokens(logps)()
    with torch.no_grad():
        want = logps(x.double(), w.double(), y)
        errors = {}
        for way, step in steps.items():
            got = calls[way](x, w, y) if way in calls else None
            error = float("nan") if got is None else (got - want).abs().max().item()
            with torch.enable_grad():
                grads = step()
            worst = max(
                ((a.reshape(b.shape) - b).norm() / b.norm()).item()
                for a, b in zip(grads, wanted, strict=True)
            )
            errors[way] = error, worst
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["32k"], choices=LINEAR)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--head", nargs="+", default=["trainable", "frozen"], choices=["trainable", "frozen"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="names of the ways to measure")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            for head in arguments.head:
                run(
                    LINEAR[shape], getattr(torch, dtype), head == "frozen", arguments.rounds, arguments.device,
                    not arguments.dry, shape, tuple(arguments.only),
                )  # fmt: skip


if __name__ == "__main__":
    main()
