"""Sums and gathered examples over processes, here threads of one: what reaches each rank, and its gradient."""

import torch

from prefloss import Labels, LogRatios, Pairs, PerToken, Rankings
from prefloss.training import distributed


def test_one_process_sums_and_gathers_itself():
    value = torch.ones(2, requires_grad=True)
    assert (distributed.size(), distributed.rank()) == (1, 0)
    assert distributed.all_sum(value) is value
    assert distributed.gather("a") == ["a"]
    pairs = Pairs.of([1.0], [2.0])
    assert distributed.gather_feedback(pairs) is pairs


def test_sums_and_objects_over_ranks(on_ranks):
    def work(number):
        own = torch.tensor([1.0, 10.0 * number], requires_grad=True)
        summed = distributed.all_sum(own)
        assert not summed.requires_grad
        assert own.tolist() == [1.0, 10.0 * number]
        return summed.tolist(), distributed.gather({"rank": number}), distributed.size(), distributed.rank()

    everyone = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert on_ranks(work, 3) == [([3.0, 30.0], everyone, 3, number) for number in range(3)]


def rows_of(number, width):
    """Per-token values of `number + 1` completions; their numbers name rank, row and token."""
    values = 100.0 * number + torch.arange((number + 1) * width, dtype=torch.float32).reshape(-1, width)
    mask = torch.ones_like(values, dtype=torch.bool)
    return PerToken(values.requires_grad_(), -values, mask, weight=values + 0.5)


def test_examples_of_all_ranks_stand_by_rank_and_are_padded(on_ranks):
    def work(number):
        rows = rows_of(number, 2 + number)
        ratios = rows.log_ratios()
        pairs = Pairs(ratios, LogRatios.of(torch.full((number + 1,), float(number)), ratios.tokens))
        gathered = distributed.gather_feedback(pairs)
        assert gathered.weight is None
        assert gathered.chosen.reference.tolist() == [-1.0, -303.0, -312.0]
        assert gathered.rejected.h.tolist() == [0.0, 1.0, 1.0]
        assert gathered.chosen.tokens.tolist() == [2, 3, 3]
        assert gathered.chosen.tokens.dtype == torch.int64
        assert gathered.chosen.per_token.mask.tolist() == [[True, True, False], [True] * 3, [True] * 3]
        assert gathered.chosen.per_token.weight[0].tolist() == [0.5, 1.5, 0.0]
        # Each example counts with a factor of its own: gradients reach this rank's alone.
        (gathered.chosen.policy * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
        return gathered.chosen.policy.tolist(), rows.policy.grad.tolist()

    first, second = on_ranks(work)
    assert first == ([1.0, 303.0, 312.0], [[2.0, 2.0]])
    assert second == ([1.0, 303.0, 312.0], [[3.0] * 3, [5.0] * 3])


def test_a_scalar_is_the_mean_over_ranks(on_ranks):
    def work(number):
        votes = Labels(LogRatios.of([float(number)]), [number == 1], kl=torch.tensor(float(2 * number)))
        gathered = distributed.gather_feedback(votes)
        return (
            gathered.kl.item(),
            gathered.kl.shape,
            gathered.desirable.tolist(),
            gathered.completions.h.tolist(),
        )

    assert on_ranks(work) == [(1.0, (), [False, True], [0.0, 1.0])] * 2


def test_groups_of_other_sizes_are_padded_with_absent_completions(on_ranks):
    def work(number):
        count = 2 + number
        scores = torch.arange(float(count))[None]
        mask = torch.ones(1, count, dtype=torch.bool)
        gathered = distributed.gather_feedback(
            Rankings(LogRatios.of(scores), scores, mask, weight=[number + 1.0])
        )
        return gathered.scores.tolist(), gathered.present.tolist(), gathered.weight.tolist()

    wanted = ([[0.0, 1.0, 0.0], [0.0, 1.0, 2.0]], [[True, True, False], [True] * 3], [1.0, 2.0])
    assert on_ranks(work) == [wanted] * 2
