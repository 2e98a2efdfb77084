"""The named settings: equal data for all kinds of losses, and each judge as its line says."""

import pytest
import torch

from prefloss import Labels, Pairs, Rankings
from prefloss.worlds import settings

SEEDS = range(20)


def wins_of_the_better(setting, pairs):
    reward = setting.world.reward[pairs.prompt.unsqueeze(-1), pairs.completions]
    return (reward[..., 0] > reward[..., 1]).double().mean().item()


def test_votes_and_rankings_are_the_pairs():
    setting = settings()["clean"]
    pairs, votes, groups = (setting.feedback(kind, [3, 4]) for kind in (Pairs, Labels, Rankings))
    assert torch.equal(groups.completions, pairs.completions[..., :2])
    assert len(votes) == 2 * len(pairs)
    for seed in range(2):
        for column, up in ((0, True), (1, False)):
            ours = votes.fields["desirable"][seed] == up
            voted = sorted(
                zip(votes.prompt[seed][ours].tolist(), votes.completions[seed, ours, 0].tolist(), strict=True)
            )
            judged = zip(
                pairs.prompt[seed].tolist(), pairs.completions[seed, :, column].tolist(), strict=True
            )
            assert voted == sorted(judged)


def test_a_tenth_of_the_votes_are_upvotes():
    setting = settings()["imbalanced"]
    votes = setting.feedback(Labels, SEEDS)
    assert votes.fields["desirable"].double().mean().item() == pytest.approx(0.1)
    assert len(setting.feedback(Pairs, SEEDS)) == 96


def test_flips_and_length_show_in_the_pairs():
    known = settings()
    clean, flipped = (
        wins_of_the_better(known[name], known[name].feedback(Pairs, SEEDS)) for name in ("clean", "flips")
    )
    assert flipped == pytest.approx(0.8 * clean + 0.2 * (1 - clean), abs=0.02)
    longer = known["length"].feedback(Pairs, SEEDS)
    lengths = known["length"].world.lengths.expand(known["length"].world.reward.shape)
    gap = lengths[longer.prompt.unsqueeze(-1), longer.completions].double()
    assert (gap[..., 0] - gap[..., 1]).mean().item() > 0.1


def test_the_judges_agree_with_the_truth_on_average():
    setting = settings()["judges"]
    torch.testing.assert_close(setting.judge.utility(setting.world), setting.world.reward)


@pytest.mark.parametrize("name", settings())
def test_no_validation_pair_set_is_the_training_set(name):
    setting = settings()[name]
    held_out, pairs = setting.validation([0, 1]), setting.feedback(Pairs, [0, 1])
    assert held_out.seeds == (0, 1)
    assert not torch.equal(held_out.prompt[:, :48], pairs.prompt[:, :48])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: got"):
        settings()["clean"].feedback(int, [0])
