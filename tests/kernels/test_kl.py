import pytest
import torch

from prefloss.kernels import kl, naive
from tests.kernels.problems import TRAINED, TRANSFORMS, problem, relative


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_against_float64(dtype, transform, trained, row_passes):
    inputs, targets = problem(dtype, TRAINED[trained])
    reference, _ = problem(dtype, (False, False, False), seed=1, width=17)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact_reference = [x.double() for x in reference]
    upstream = torch.randn(3, len(targets), dtype=torch.float64)
    upstream[2] = 0
    results = []
    for policy, out in (
        (
            exact,
            naive.linear_token_kl(kl.Model(*exact), kl.Model(*exact_reference), targets, transform, -100),
        ),
        (inputs, kl.linear_token_kl(kl.Model(*inputs), kl.Model(*reference), targets, transform, -100, 8)),
    ):
        trained_inputs = [x for x in policy if x.requires_grad]
        results.append((out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), trained_inputs)))
    (want, exact_grads), (got, grads) = results
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2.6e-3}[dtype]
    for g, w in zip(grads, exact_grads, strict=True):
        assert relative(g, w) < limit
