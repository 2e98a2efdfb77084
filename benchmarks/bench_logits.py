"""Logits to log-probs, forward alone and with the gradient: ``python -m benchmarks.bench_logits``."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import in_turns, report
from benchmarks.peers import logits_ways
from benchmarks.shapes import LOGITS, Logits
from prefloss.logprobs import token_logps, token_stats

BASELINE = "torch.compile"
# of the log-probs against float64: F.cross_entropy and TRL round those of bfloat16 logits, by 5e-2
LOGP_LIMIT = 1e-5


def prefloss(logits: Tensor, targets: Tensor) -> Tensor:
    return token_logps(logits, targets, impl="chunked")


def prefloss_inplace(logits: Tensor, targets: Tensor) -> Tensor:
    return token_logps(logits, targets, impl="chunked", inplace_backward=True)


def prefloss_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    stats = token_stats(logits, targets, impl="chunked", stats_gradient=True)
    return torch.stack((stats.logps, stats.entropy))


def run(
    shape: Logits, dtype: torch.dtype, rounds: int, device: str = "cpu", save: bool = True, name: str = ""
) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(shape.tokens, shape.vocabulary, device=device)).to(dtype)
    targets = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    upstream = torch.randn(shape.tokens, device=device)
    ways = {"prefloss": prefloss, "prefloss, with entropy": prefloss_statistics, **logits_ways()}
    errors = {way: _errors(call, logits, targets, upstream) for way, call in ways.items()}

    def forward(call: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: call(logits, targets)

    def both(call: Callable[..., Tensor], x: Tensor) -> Callable[[], object]:
        # through a view, as logits are the result of an op and never a leaf
        return lambda: torch.autograd.grad((call(x.view_as(x), targets) * upstream).sum(), x)

    x = logits.clone().requires_grad_()
    steps = {way: both(call, x) for way, call in ways.items()}
    # it writes over the logits; that they hold a gradient in the next round changes no time
    y = logits.clone().requires_grad_()
    steps["prefloss, in place"] = both(prefloss_inplace, y)
    for what, calls in (
        ("forward", {way: forward(call) for way, call in ways.items()}),
        ("forward and backward", steps),
    ):
        records = in_turns(calls, rounds, device)
        for way, record in records.items():
            record.logp_error, record.gradient_error = errors[way.removesuffix(", in place")]
            record.ok = record.logp_error < LOGP_LIMIT or not way.startswith("prefloss")
        baseline = BASELINE if BASELINE in records else "plain PyTorch"
        row = {
            "bench": "logits",
            "what": what,
            "shape": name,
            "dtype": str(dtype).removeprefix("torch."),
            "frozen": "",
        }
        title = f"{what}, {shape.tokens} x {shape.vocabulary} {row['dtype']}"
        report(title, records, baseline, row, device, save)


def _errors(
    call: Callable[..., Tensor], logits: Tensor, targets: Tensor, upstream: Tensor
) -> tuple[float, float]:
    """Largest error of the log-probs and relative error of the gradient, on some rows, against float64."""
    # of all of them, as in the step: another size would be compiled for, too
    x = logits.clone().requires_grad_()
    got = call(x.view_as(x), targets)
    (grad,) = torch.autograd.grad((got * upstream).sum(), x)
    exact, y, g = x.detach()[:64].double().requires_grad_(), targets[:64], upstream[:64]
    logps = exact.log_softmax(-1)
    want = logps.gather(-1, y[:, None]).squeeze(-1)
    if got.dim() > 1:
        want = torch.stack((want, -(logps.exp() * logps).sum(-1)))
    (exact_grads,) = torch.autograd.grad((want * g).sum(), exact)
    error = (got[..., :64] - want).abs().max().item()
    return error, ((grad[:64] - exact_grads).norm() / exact_grads.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["32k", "128k"], choices=LOGITS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            run(
                LOGITS[shape],
                getattr(torch, dtype),
                arguments.rounds,
                arguments.device,
                not arguments.dry,
                shape,
            )


if __name__ == "__main__":
    main()
