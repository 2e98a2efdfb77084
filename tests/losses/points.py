"""Points at which pair losses are checked, shared by the test files of this folder."""

import torch

import prefloss
from prefloss import LogRatios, Pairs

CHOSEN = LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10])
REJECTED = LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8])
GOLD = LogRatios(policy=[-18.0], reference=[-18.0], tokens=[10])
# h = 1.5 and -1, so a margin of 2.5 nats; the gold completion has an NLL of 1.8 per token.
POINT = Pairs(CHOSEN, REJECTED, gold=GOLD)

FAR = [-1e4, -100.0, 0.0, 100.0, 1e4]


def losses_of(module):
    """Names of the losses that a module defines."""
    return [name for name, spec in prefloss.specs.items() if spec.function.__module__ == module.__name__]


def scored(pairs, chosen, rejected):
    """The pairs with scores."""
    fields = {"score_chosen": torch.tensor(chosen), "score_rejected": torch.tensor(rejected)}
    return Pairs(pairs.chosen, pairs.rejected, gold=pairs.gold, **fields)


def grid(log_ratios, scores=(2.0, 0.5), tokens=(10, 8)):
    """Every combination of two of the log-ratios, and the two policy tensors, float32, with gradient.

    The reference's log-prob is so low that the policy's stays below 0 at the largest log-ratio.
    """
    h = torch.tensor(log_ratios)
    chosen, rejected = (side.reshape(-1) for side in torch.meshgrid(h, h, indexing="ij"))
    lowest = -h.abs().max() - 1
    policies = [(side + lowest).requires_grad_() for side in (chosen, rejected)]
    sides = [
        LogRatios(policy, torch.full_like(policy, lowest), torch.full(policy.shape, n))
        for policy, n in zip(policies, tokens, strict=True)
    ]
    gold = LogRatios(
        torch.full_like(chosen, -18.0), torch.full_like(chosen, -18.0), torch.full(chosen.shape, 10)
    )
    scores_of = [torch.full_like(chosen, score) for score in scores]
    return Pairs(*sides, gold=gold, score_chosen=scores_of[0], score_rejected=scores_of[1]), policies


def assert_finite(name, pairs, policies, **parameters):
    """Value and gradient of every pair are finite."""
    values = prefloss.get(name, **parameters)(pairs)
    gradients = torch.autograd.grad(values.sum(), policies, allow_unused=True)
    assert values.isfinite().all(), f"{name}: {values}"
    for gradient in gradients:
        assert gradient is None or gradient.isfinite().all(), f"{name}: {gradient}"
    return values, gradients


def assert_empty_is_left_out(name, **parameters):
    """A pair with an empty side gives 0, and no gradient to either side; its neighbour keeps its value."""
    loss = prefloss.get(name, **parameters)
    for empty in ("chosen", "rejected"):
        policies = [torch.tensor([-20.0, -20.0], requires_grad=True) for _ in range(2)]
        counts = {"chosen": [10, 10], "rejected": [8, 8]}
        counts[empty] = [10, 0]
        sides = [
            LogRatios(policy, torch.tensor([-21.5, -21.5]), counts[side])
            for side, policy in zip(counts, policies, strict=True)
        ]
        gold = LogRatios([-18.0, -18.0], [-18.0, -18.0], [10, 10])
        # Equal scores at the empty pair: what is not counted need not be sensible.
        pairs = Pairs(*sides, gold=gold, score_chosen=[2.0, 1.0], score_rejected=[1.0, 1.0])
        values = loss(pairs)
        assert values[1] == 0 or loss.counted(pairs)[1], name
        for gradient in torch.autograd.grad(values.sum(), policies, allow_unused=True):
            assert gradient is None or gradient.isfinite().all(), name
            assert gradient is None or loss.counted(pairs)[1] or gradient[1] == 0, name
