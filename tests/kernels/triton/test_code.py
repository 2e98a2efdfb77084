"""The machine code of the kernels from logits, as launches of production shapes would run it. No GPU is needed.

`pytest benchmarks/test_code.py` checks the same of every combination.
"""

from importlib.util import find_spec
from itertools import product

import pytest
import torch

from benchmarks.sass import compile_launch, recorded, specialized
from prefloss.kernels.naive import LogitTransform

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

PLAIN, CAPPED = LogitTransform(), LogitTransform(softcap=30.0)
# by name: transform, statistics, and how many instructions a logit may take, forward and backward
FLAGS = {
    "plain": (PLAIN, 1, 7.0, 20.0),
    "softcap": (CAPPED, 1, 14.0, 32.0),
    "all statistics": (PLAIN, 5, 10.5, 26.0),
    "all statistics, softcap": (CAPPED, 5, 18.5, 36.0),
}


def launches(dtype, flags, tokens=16_384, vocabulary=50_257, shifted=0):
    """Forward and backward launch; `shifted` sequences of 1,024 tokens lose their last."""
    from prefloss.kernels.triton import launch

    transform, outputs, _, _ = FLAGS[flags]
    x = torch.empty(tokens, vocabulary, dtype=dtype, device="meta")
    if shifted:
        x = torch.empty(shifted, 1024, vocabulary, dtype=dtype, device="meta")[:, :-1]
        tokens = shifted * 1023
    y = torch.empty(tokens, dtype=torch.long, device="meta")
    with recorded() as found:
        stats = launch.token_forward(x, y, transform, 1, outputs)
        launch.token_backward(torch.empty(outputs, tokens, device="meta"), x, y, stats, transform, 1)
    return found


def check(dtype, flags, arch):
    _, _, *most = FLAGS[flags]
    for launch, limit in zip(launches(dtype, flags), most, strict=True):
        code = compile_launch(launch, arch)
        said = dtype, flags, arch, launch.kernel.__name__, code.registers, code.per_logit()
        assert code.spilled == 0, said
        assert code.registers <= 80, said
        assert code.shared <= 1024, said
        assert code.per_logit() <= limit, said
        # all whole vectors at 16 bytes, and single logits at the two ends of a row alone
        loop = code.main is not code.whole
        assert {*code.main.loads} == {16} if loop else 16 in code.main.loads, said
        assert loop or 16 in code.main.stores, said


CASES = [
    (torch.bfloat16, "plain", 90),
    (torch.bfloat16, "softcap", 80),
    (torch.float32, "all statistics", 90),
    (torch.bfloat16, "plain", 100),
]
ALL = list(product((torch.bfloat16, torch.float16, torch.float32), FLAGS, (80, 90, 100)))


@pytest.mark.parametrize(("dtype", "flags", "arch"), CASES)
def test_code(dtype, flags, arch):
    check(dtype, flags, arch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_code_for_all_vocabularies_and_places(dtype):
    first, others = None, [{"vocabulary": v} for v in (32_000, 50_257, 128_256)]
    others += [{"tokens": n} for n in (2047, 4096, 65_537)] + [{"shifted": b} for b in (3, 16, 64)]
    for sizes in others:
        forward, backward = launches(dtype, "plain", **sizes)
        compiled = [(specialized(one), one.warps) for one in (forward, backward)]
        # gradient rows of a shifted odd vocabulary begin elsewhere than the logits'
        compiled[1][0][1].pop("ALIKE")
        first = first or compiled
        assert compiled == first, sizes


def test_few_rows_fill_a_device():
    for tokens in (1, 132, 600, 1023, 1024, 16_384):
        forward, backward = launches(torch.bfloat16, "plain", tokens=tokens)
        assert forward.programs == tokens
        # 132 multiprocessors, with a quarter of the warps of each, have enough loads on the way
        assert tokens < 132 or forward.programs * forward.warps >= 132 * 16
        assert backward.programs == tokens * 13
