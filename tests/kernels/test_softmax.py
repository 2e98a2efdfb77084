"""Passes over rows, and logits in 16 bits."""

import pytest
import torch

from prefloss.kernels import naive, softmax
from prefloss.kernels.cpu import native
from prefloss.kernels.tiles import TileSpec, slices
from tests.kernels.problems import PLAIN, TRANSFORMS


def decoded(codes, vocabulary):
    references = softmax.references_of(codes, vocabulary).repeat_interleave(native.PANEL, -1)[:, :vocabulary]
    codes = codes[:, :vocabulary]
    return torch.where(codes == -32768, -torch.inf, (codes - 32767.0) / 2048 + references)


def test_kept_logits_are_off_by_a_quarter_of_a_thousandth(row_passes):
    z = torch.randn(3, 4003) * 8
    lse = z.logsumexp(-1)
    codes = torch.empty(3, softmax.code_columns(4003), dtype=torch.int16)
    softmax.encode(z.clone(), PLAIN, lse, codes)
    logp = z - lse[:, None]
    large = logp > -31.9
    assert (decoded(codes, 4003) - z)[large].abs().max() < 2.5e-4
    assert (decoded(codes, 4003)[logp < -32.1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("n", "width", "vocabulary"), [(1, 2, 1), (7, 6, 64), (200, 2050, 131), (9, 64, 4003)]
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_projection_keeps_codes_and_statistics(n, width, vocabulary, transform):
    x, weight, bias = torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)
    x, weight, bias = x.bfloat16(), (weight * 2 / width**0.5).bfloat16(), bias.bfloat16()
    if not native.projects(x, weight):
        pytest.skip("no compiler, or no bfloat16 on this processor")
    targets = torch.randint(vocabulary, (n,))
    # one in another shard of the vocabulary, and one to leave out
    targets[-1] = vocabulary
    targets[0] = -1
    bias[: min(vocabulary - 1, 70)] = -torch.inf
    z = transform.apply((x.double() @ weight.double().T) + bias)
    want = naive.token_stats(z, targets.clamp(0, vocabulary - 1), PLAIN, -100)
    want[0, -1], want[4, -1], want[:, 0] = -torch.inf, 0, 0
    stats, sums = torch.full((5, n), torch.nan), softmax.new_sums(n, x)
    codes = torch.empty(n, softmax.code_columns(vocabulary), dtype=torch.int16)
    softmax.project(x, weight, bias, TileSpec(targets, 0, transform), sums, True, codes)
    softmax.finish(sums, targets, stats)
    torch.testing.assert_close(stats[:, 1:].double(), want[:, 1:], rtol=1e-6, atol=1e-5)
    assert not stats[:, 0].any()
    got, likely = decoded(codes, vocabulary), z - want[1, :, None] > -31
    likely[0] = False
    # besides half a step, float32 sums
    assert torch.where(likely, got - z, 0).abs().max() < 2.5e-4 + 1e-5
    # in any number of rows, on any number of threads, without codes: bit for bit the same
    again = softmax.new_sums(n, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in slices(n, 5):
            spec = TileSpec(targets[part], 0, transform)
            softmax.project(x[part], weight, bias, spec, again[part], True, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, sums)
