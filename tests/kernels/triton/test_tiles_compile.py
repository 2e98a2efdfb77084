"""What the fused linear op moves and needs on a GPU, from its launches and from compiled kernels; no GPU is needed.

In a process of its own: the interpreter, which other tests of these kernels switch on, compiles nothing.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefloss.kernels import plan as planning
from prefloss.kernels.arguments import Options
from prefloss.kernels.linear import linear_backward, linear_forward, scale
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.plan import Request, make_plan
from prefloss.kernels.tiles import LinearInputs

COMPILES = "PREFLOSS_COMPILES" in os.environ
PLAIN = LogitTransform()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_in_a_process_that_compiles(request, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PREFLOSS_COMPILES": "1",
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": str(request.config.rootpath),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


test_in_a_process_that_compiles.__test__ = not COMPILES


class Touched(TorchDispatchMode):
    """The largest number of logits that an op other than a product reads or writes, views and new memory left out."""

    def __init__(self):
        super().__init__()
        self.logits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # the meta device copies the operands of products that it cannot multiply
        if not (func.is_view or name in ("mm", "addmm", "_to_copy", "new_empty", "empty", "empty_strided")):
            of = [
                x for x in (out, *args) if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] > 4096
            ]
            # sums of rows are few
            self.logits = max([self.logits, *(x.numel() for x in of if x.numel() > 2**24)])
        return out


def launches_of(dtype, trainable, vocabulary=128_256, tokens=16_384, transform=PLAIN, outputs=1, **more):
    """The plan of a large card, and the launches of forward and backward by it on tensors without memory."""
    from benchmarks.sass import recorded

    x, weight = (torch.empty(n, 4096, dtype=dtype, device="meta") for n in (tokens, vocabulary))
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    options = Options(transform, -100, "triton", **more)
    gradient, stats_gradient = "head" if trainable else "hidden", outputs > 1
    plan = make_plan(Request(x, vocabulary, 4096, gradient, stats_gradient, options), tokens)
    inputs = LinearInputs(x, weight.requires_grad_(trainable), None, targets, transform)
    grad = torch.empty(outputs, tokens, device="meta")
    with recorded() as launches, Touched() as touched:
        stats, kept = linear_forward(inputs, plan, outputs)
        if plan.scheme == "unscaled":
            scale(kept, grad, dtype)
        else:
            linear_backward(grad, inputs, stats, kept, plan, (True, trainable, False))
    return plan, launches, touched.logits


def variant_of(launch):
    """What Triton compiles a kernel again for: constants, and whether an integer is 1 or a multiple of 16."""
    integers = [
        (value == 1, value % 16 == 0)
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False)
        if isinstance(value, int) and not parameter.do_not_specialize
    ]
    return launch.kernel.__name__, launch.warps, tuple(integers), tuple(launch.constants.items())


@pytest.fixture
def large_card(monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 60 * 2**30)


@pytest.mark.usefixtures("large_card")
class TestTiles:
    __test__ = COMPILES

    @pytest.mark.parametrize(
        ("dtype", "trainable", "most"),
        [(torch.bfloat16, True, 6), (torch.bfloat16, False, 6), (torch.float32, True, 8)],
    )
    def test_bytes_per_logit(self, dtype, trainable, most):
        """12 to 16 before: a tile was read twice, and kept logits were read and written once more."""
        from benchmarks.sass import compile_launch

        plan, launches, touched = launches_of(dtype, trainable)
        assert touched == 0
        moved, compiled = 0, {}
        for launch in launches:
            name, tile = launch.kernel.__name__, launch.arguments[0]
            if name in ("tile_finish_kernel", "scale_rows_kernel"):
                # once for a row, or for a row of hidden states
                continue
            if name not in compiled:
                code = compiled[name] = compile_launch(launch, 90)
                # a program reads and writes nothing twice: there is no loop
                assert not code.loops
            assert launch.constants == compiled[name].launch.constants
            wide = sum(
                size for size in compiled[name].whole.loads + compiled[name].whole.stores if size == 16
            )
            moved += wide * 32 * launch.warps / launch.constants["BLOCK"] * tile.numel()
        assert moved / (16_384 * 128_256) == plan.bytes_per_logit == most

    @pytest.mark.parametrize("arch", [80, 90, 100])
    def test_a_row_fits_the_registers(self, arch):
        from benchmarks.sass import compile_launch

        _, launches, _ = launches_of(torch.bfloat16, True)
        for kernel, registers in (("tile_stats_kernel", 64), ("tile_finish_kernel", 72)):
            launch = next(launch for launch in launches if launch.kernel.__name__ == kernel)
            code = compile_launch(launch, arch)
            assert code.spilled == 0
            # of 64 two programs of 512 threads run at a time
            assert code.registers <= registers
        assert launches[0].constants["BLOCK"] / (32 * launches[0].warps) == 32

    def test_all_flags_fit_too(self):
        from benchmarks.sass import compile_launch

        capped = LogitTransform(1.0, 30.0, 1.0)
        _, launches, _ = launches_of(torch.float32, True, 50_257, transform=capped, outputs=5)
        code = compile_launch(launches[0], 90)
        assert code.spilled == 0
        assert code.registers <= 128

    @pytest.mark.parametrize("trainable", [True, False])
    def test_nothing_is_compiled_again_for_another_number_of_tokens(self, trainable):
        """A stride that is a multiple of 16 in one batch and not in the next compiled kernels in mid-training."""
        variants = []
        for tokens in (16_384, 16_381, 9_001, 130):
            _, launches, _ = launches_of(torch.bfloat16, trainable, tokens=tokens)
            variants.append({variant_of(launch) for launch in launches})
        assert all(variant == variants[0] for variant in variants)

    def test_every_launch_has_whole_blocks_of_rows(self):
        for tokens in (16_384, 16_381, 9_001):
            _, launches, _ = launches_of(torch.bfloat16, True, tokens=tokens)
            rows = [launch.programs for launch in launches if launch.kernel.__name__ == "tile_stats_kernel"]
            assert sum(rows) == 8 * tokens
            # the last ones of each of the 8 spans make up the rest
            assert sum(count % 128 > 0 for count in rows) == 8 * (tokens % 128 > 0)
