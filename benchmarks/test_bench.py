"""``pytest benchmarks``: prefloss alone, timed by pytest-benchmark."""

import pytest
import torch

from benchmarks import bench_linear
from benchmarks.shapes import LINEAR


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_linear(benchmark, dtype, frozen):
    problem = bench_linear.Problem(LINEAR["32k"]._replace(pairs=1), dtype, "cpu", frozen)
    benchmark(problem.all_tokens(bench_linear.prefloss))
