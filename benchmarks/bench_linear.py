"""Hidden states to DPO or KTO loss to gradients, head trainable or frozen: ``python -m benchmarks.bench_linear``."""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_turns, report
from benchmarks.peers import liger_steps, linear_ways
from benchmarks.shapes import LINEAR, Linear
from prefloss.logprobs import linear_token_logps

BETA = 0.1
# sums of log-probs without a reference are large, and with a usual beta KTO's sigmoid of them is 0
KTO_BETA = 1e-3
FLOOR = "matmuls alone"
# tokens of the exact gradients at a time
EXACT_TOKENS = 256
# of the gradients against float64, relative; float32 logits and one rounding of each factor and result
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
# in bfloat16 of logits rounded to it, which most peers have
LOGP_LIMIT = 1e-5


def dpo(logps: Tensor) -> Tensor:
    """DPO of [2 pairs, T] log-probs, chosen first, without a reference."""
    chosen, rejected = logps.sum(-1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def cross_entropy(logps: Tensor) -> Tensor:
    """Mean cross-entropy of [2 pairs, T] log-probs."""
    return -logps.mean()


def kto(logps: Tensor) -> Tensor:
    """KTO of [2 pairs, T] log-probs, desired first, without a reference or a baseline."""
    desired, undesired = logps.sum(-1).chunk(2)
    return (1 - torch.sigmoid(KTO_BETA * torch.cat((desired, -undesired)))).mean()


LOSSES = {"dpo": dpo, "kto": kto, "cross-entropy": cross_entropy}


class Problem:
    """Hidden states of chosen and rejected completions, [2 pairs, T, H], and a head; no reference model."""

    def __init__(
        self, shape: Linear, dtype: torch.dtype, device: str, frozen: bool, loss: str = "dpo"
    ) -> None:
        torch.manual_seed(0)
        self.loss = LOSSES[loss]
        self.shape = shape
        self.hidden = torch.randn(2 * shape.pairs, shape.sequence, shape.width, device=device).to(dtype)
        self.hidden.requires_grad_()
        weight = 2 * torch.randn(shape.vocabulary, shape.width, device=device) / shape.width**0.5
        self.weight = weight.to(dtype)
        self.targets = torch.randint(shape.vocabulary, self.hidden.shape[:2], device=device)
        self.targets[:, : shape.prompt] = -100
        self.kept = (self.targets != -100).reshape(-1).nonzero().squeeze(-1)
        self.train(head=not frozen)

    def train(self, head: bool) -> None:
        """Choose whether the head gets a gradient."""
        self.weight.requires_grad_(head)
        self.trained = [self.hidden, self.weight] if head else [self.hidden]

    def by_tokens(self, call: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """A step with an op on [n, H] completion tokens."""

        def step() -> tuple[Tensor, ...]:
            x = self.hidden.reshape(-1, self.shape.width).index_select(0, self.kept)
            logps = call(x, self.weight, self.targets.reshape(-1)[self.kept])
            return torch.autograd.grad(
                self.loss(logps.float().reshape(2 * self.shape.pairs, -1)), self.trained
            )

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
    loss: str = "dpo",
) -> None:
    """Measure every way there is, or those named in `only`, and report."""
    problem = Problem(shape, dtype, device, frozen, loss)
    # that a log-prob op is followed by one loss or another makes no difference; a fused loss is one of its own
    calls = linear_ways() if loss == "dpo" else {}
    steps = {way: problem.by_tokens(call) for way, call in calls.items()}
    beta = BETA if loss == "dpo" else KTO_BETA
    steps |= {way: problem.whole_loss(call) for way, call in liger_steps(loss, beta).items()}
    ours = {"prefloss": prefloss, "prefloss, no budget": prefloss_recompute}
    if loss == "kto":
        ours = {"prefloss, KTO": prefloss}
    steps |= {way: problem.all_tokens(call) for way, call in ours.items()}
    if only:
        steps = {way: step for way, step in steps.items() if way in only}
    errors = _errors(problem, {**calls, **ours}, steps)
    steps[FLOOR] = problem.matmuls()
    steps[FLOOR]()
    records = in_turns(steps, rounds, device, warm=False)
    for way, record in records.items():
        record.logp_error, record.gradient_error = errors.get(way, (float("nan"),) * 2)
        wrong = record.logp_error > LOGP_LIMIT or record.gradient_error > GRADIENT_LIMITS[dtype]
        record.ok = not (way.startswith("prefloss") and wrong)
    row = {
        "bench": "linear",
        "what": f"hidden to {loss.upper()} to gradient",
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "frozen": frozen,
    }
    title = f"{row['what']}, {shape}, {row['dtype']}, {'frozen' if frozen else 'trainable'} head"
    report(title, records, FLOOR, row, device, save)


def exact_logps(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return (x @ w.T).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)


def exact_gradients(problem: Problem) -> list[Tensor]:
    """Of hidden states and head in float64, some tokens at a time."""
    x = problem.hidden.detach().reshape(-1, problem.shape.width)[problem.kept].double()
    w = problem.weight.detach().double().requires_grad_(problem.weight.requires_grad)
    y = problem.targets.reshape(-1)[problem.kept]
    parts = list(torch.arange(len(x), device=x.device).split(EXACT_TOKENS))
    with torch.no_grad():
        logps = torch.cat([exact_logps(x[part], w, y[part]) for part in parts])
    logps.requires_grad_()
    problem.loss(logps.reshape(2 * problem.shape.pairs, -1)).backward()
    d_hidden = torch.zeros_like(problem.hidden, dtype=w.dtype).view(-1, problem.shape.width)
    for part in parts:
        leaf = x[part].requires_grad_()
        exact_logps(leaf, w, y[part]).backward(logps.grad[part])
        d_hidden[problem.kept[part]] = leaf.grad
    return [d_hidden.view_as(problem.hidden), w.grad][: len(problem.trained)]


def _errors(
    problem: Problem,
    calls: dict[str, Callable[..., Tensor]],
    steps: dict[str, Callable[[], tuple[Tensor, ...]]],
) -> dict[str, tuple[float, float]]:
    """Largest error of some log-probs and worst relative error of the gradients, against float64."""
    x = problem.hidden.detach().reshape(-1, problem.shape.width)[problem.kept]
    w, y = problem.weight.detach(), problem.targets.reshape(-1)[problem.kept]
    exact_grads = exact_gradients(problem)
    want = exact_logps(x[:64].double(), w.double(), y[:64])
    errors = {}
    for way, step in steps.items():
        with torch.no_grad():
            # of all of them, as in the step: another size would be compiled for, too
            error = (calls[way](x, w, y)[:64] - want).abs().max().item() if way in calls else float("nan")
        worst = max(
            ((a.reshape(b.shape) - b).norm() / b.norm()).item()
            for a, b in zip(step(), exact_grads, strict=True)
        )
        errors[way] = error, worst
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["32k"], choices=LINEAR)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--head", nargs="+", default=["trainable", "frozen"], choices=["trainable", "frozen"])
    parser.add_argument("--loss", nargs="+", default=["dpo", "kto"], choices=["dpo", "kto"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="names of the ways to measure")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    sizes = itertools.product(arguments.shape, arguments.dtype, arguments.head, arguments.loss)
    for shape, dtype, head, loss in sizes:
        run(
            LINEAR[shape], getattr(torch, dtype), head == "frozen", arguments.rounds, arguments.device,
            not arguments.dry, shape, tuple(arguments.only), loss,
        )  # fmt: skip


if __name__ == "__main__":
    main()
