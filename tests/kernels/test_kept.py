import torch

from prefloss.kernels import kept
from prefloss.kernels.plan import Plan
from prefloss.kernels.tiles import slices
from tests.kernels.problems import linear_stats


def test_kept_logits_lie_in_the_gradient_buffer_of_the_head(monkeypatch):
    weight = torch.randn(301, 24, requires_grad=True)
    spans = list(slices(301, 64))
    for tokens, parts in ((5, [5]), (24, [24]), (30, [24, 6])):
        memory = kept.allocate(torch.randn(30, 24), weight, tokens, spans)
        assert [part.stop - part.start for part, _ in memory.parts] == parts
        for span in spans:
            tile = memory.parts[0][1][span.start]
            assert tile.data_ptr() == memory.home[span].data_ptr()
            assert tile.numel() <= memory.home[span].numel()
    # ... and the gradient is written there
    hidden, targets = torch.randn(30, 24), torch.randint(301, (30,))
    homes = []
    make = kept.allocate
    monkeypatch.setattr(kept, "allocate", lambda *a: homes.append(make(*a)) or homes[-1])
    out = linear_stats(hidden, weight, None, targets, plan=Plan("keep", 8, 30))
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    assert gradient.data_ptr() == homes[0].home.data_ptr()
    # a frozen head has no gradient buffer
    assert kept.allocate(torch.randn(30, 24), weight.detach(), 30, spans).home is None
    # of the codes of a half-precision head a few fewer fit, for their references
    memory = kept.allocate(
        torch.randn(30, 24).bfloat16(), weight.detach().bfloat16().requires_grad_(), 24, spans
    )
    assert [part.stop - part.start for part, _ in memory.parts] == [22, 2]
