"""Inputs of the kernels, runs of an op by a given plan, and counts of what it does."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefloss.kernels import autograd
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import LinearInputs, select_targets

PLAIN = LogitTransform()
CAPPED = LogitTransform(1.3, 3.0, 0.7)
TRANSFORMS = [PLAIN, CAPPED, LogitTransform(0.5, None, 2.0)]
# hidden, weight, bias: which of them get a gradient
TRAINED = {"frozen": (True, False, False), "all": (True, True, True), "head": (False, True, False)}
IGNORED = -100


def linear_stats(hidden, weight, bias, targets, transform=PLAIN, plan=None, outputs=1):
    """The statistics from hidden states by a plan, "chunked" in tiles of 8 tokens unless given."""
    inputs = LinearInputs(hidden, weight, bias, targets, transform)
    plan = plan or Plan("recompute", 8)
    return autograd.linear_token_stats(inputs, select_targets(targets, IGNORED), IGNORED, plan, outputs)


def token_stats(logits, targets, transform=PLAIN, chunk=2**20, impl="chunked", **options):
    """The statistics from logits, "chunked" in slices of `chunk` tokens unless given."""
    options = {"outputs": 1, **options}
    return autograd.token_stats(
        logits, targets, transform, IGNORED, Plan(chunk_tokens=chunk, impl=impl), **options
    )


def problem(dtype, trained, seed=0, n=40, width=24, vocabulary=301):
    """Hidden states, weight and bias, and targets of which 13 are ignored."""
    torch.manual_seed(seed)
    hidden, weight, bias = torch.randn(n, width), torch.randn(vocabulary, width) / 3, torch.randn(vocabulary)
    inputs = [
        x.to(dtype).requires_grad_(need) for x, need in zip((hidden, weight, bias), trained, strict=True)
    ]
    targets = torch.randint(vocabulary, (n,))
    targets[torch.randperm(n)[:13]] = IGNORED
    return inputs, targets


def relative(got, want):
    """Norm of the error over norm."""
    return ((got.double() - want).norm() / want.norm()).item()


class Watch(TorchDispatchMode):
    """Records what each torch op returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.calls.append((func.overloadpacket.__name__, args, out))
        return out

    def largest(self, dtype):
        return max(out.numel() for _, _, out in self.calls if out.dtype == dtype)

    def rows_multiplied(self):
        return sum(len(args[0]) for name, args, _ in self.calls if name == "mm")
