"""Worlds and their makers."""

from dataclasses import replace

import pytest
import torch

from prefloss.worlds import World, bandit, featured, spelled


@pytest.mark.parametrize("make", [bandit, featured, spelled])
def test_a_seed_makes_the_same_world(make):
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(first.reward, again.reward)
    assert torch.equal(first.reference, again.reference)
    assert not torch.equal(first.reward, other.reward)


@pytest.mark.parametrize("make", [bandit, featured, spelled])
def test_the_reference_is_normalised_and_every_completion_has_tokens(make):
    world = make(prompts=3)
    torch.testing.assert_close(world.reference.exp().sum(-1), torch.ones(3).double())
    assert world.reward.shape == world.lengths.shape == (world.prompts, world.completions)
    assert world.lengths.min() >= 1


def test_hump_lowers_the_reward_far_out_alone():
    flat, humped = featured(hump=0.0), featured(hump=0.225)
    torch.testing.assert_close(humped.reward, flat.reward - 0.225 * (flat.features**2).sum(-1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": torch.zeros(3)}, r"reward: got shape \[3\]"),
        ({"reference": torch.zeros(2, 3)}, r"reference: got shape \[2, 3\], expected \[2, 4\]"),
        ({"reward": torch.zeros(2, 0)}, r"reward: got shape \[2, 0\]"),
        ({"lengths": torch.ones(3).long()}, r"lengths: got shape \[3\]"),
        ({"lengths": torch.zeros(4).long()}, r"lengths: got 0 as the least"),
        ({"lengths": torch.ones(4)}, r"lengths: got 1.0 as the least, expected integers"),
        ({"features": torch.zeros(2, 3, 5)}, r"features: got shape \[2, 3\]"),
    ],
)
def test_refuses_shapes_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        World(**{"reward": torch.zeros(2, 4), "reference": torch.zeros(2, 4), **fields})


def test_refuses_a_reference_that_its_table_does_not_spell():
    world = spelled()
    with pytest.raises(ValueError, match="sums over tokens of the table"):
        replace(world, reference=torch.zeros_like(world.reference))
    other = torch.log_softmax(2 * world.table, -1)
    moved = replace(world, table=other, reference=world.sequences.log_probs(other).sum(-1))
    assert not torch.equal(moved.reference, world.reference)
