"""Draws, the population, and lists by hand."""

import pytest
import torch

from prefloss import Labels, Pairs, Rankings
from prefloss.worlds import Data, Judge, bandit, best_and_worst, draw, listed, population, spelled
from prefloss.worlds.data import taken

WORLD = bandit(prompts=3, completions=6)


@pytest.mark.parametrize("kind", [Pairs, Labels, Rankings])
def test_a_seed_draws_the_same_whatever_is_drawn_beside_it(kind):
    together, alone = draw(WORLD, Judge(), kind, 20, seeds=[4, 7]), draw(WORLD, Judge(), kind, 20, seeds=[7])
    assert torch.equal(together.prompt[1], alone.prompt[0])
    assert torch.equal(together.completions[1], alone.completions[0])
    for name, value in alone.fields.items():
        assert torch.equal(together.fields[name][1], value[0])


def test_kinds_and_judges_share_the_draws_of_a_seed():
    pairs, votes = draw(WORLD, Judge(), Pairs, 50), draw(WORLD, Judge(), Labels, 50)
    flipped = draw(WORLD, Judge(flips=1.0), Pairs, 50)
    assert torch.equal(pairs.prompt, votes.prompt)
    # The voted completion is one of the pair's two.
    assert (pairs.completions[..., :2] == votes.completions[..., :1]).any(-1).all()
    assert torch.equal(flipped.completions[..., :2], pairs.completions[..., :2].flip(-1))


def test_the_chosen_one_has_the_higher_score_and_is_another_completion():
    pairs = draw(WORLD, Judge(temperature=3.0, flips=0.3), Pairs, 200, seeds=range(3))
    assert (pairs.fields["score_chosen"] > pairs.fields["score_rejected"]).all()
    assert (pairs.completions[..., 0] != pairs.completions[..., 1]).all()


def test_a_judge_without_noise_is_never_wrong():
    pairs = draw(WORLD, Judge(temperature=0.0), Pairs, 200)
    reward = taken(WORLD.reward, pairs)
    assert (reward[..., 0] > reward[..., 1]).all()
    torch.testing.assert_close(pairs.fields["score_chosen"], reward[..., 0])


def test_completions_come_from_the_sampler():
    drawn = draw(WORLD, Judge(), Labels, 20_000)
    counts = torch.stack([(drawn.completions[0, :, 0] == c).double() for c in range(6)]).T
    first = counts[drawn.prompt[0] == 0]
    torch.testing.assert_close(first.mean(0), WORLD.reference[0].exp(), atol=0.02, rtol=0.0)
    narrow = torch.full((3, 6), -torch.inf).double()
    narrow[:, 2:4] = 0.0
    assert set(draw(WORLD, Judge(), Pairs, 50, sampler=narrow).completions[..., :2].unique().tolist()) == {
        2,
        3,
    }


def test_population_is_what_draws_tend_to():
    # Pairs of two completions of one prompt: the draw without replacement changes nothing.
    world = bandit(prompts=1, completions=2)
    whole, drawn = population(world, Judge(), Pairs), draw(world, Judge(), Pairs, 20_000)
    share = (drawn.completions[0, :, 0] == 0).double().mean()
    weight = whole.fields["weight"][0] / len(whole)
    torch.testing.assert_close(weight[whole.completions[0, :, 0] == 0].sum(), share, atol=0.015, rtol=0.0)


@pytest.mark.parametrize("kind", [Pairs, Labels])
def test_weights_of_the_population_are_probabilities_times_their_number(kind):
    whole = population(WORLD, Judge(flips=0.1), kind)
    assert len(whole) == 3 * 6 * (5 if kind is Pairs else 2)
    torch.testing.assert_close(whole.fields["weight"].mean(), torch.ones(()).double())


def test_labels_of_the_population_upvote_as_the_judge_does():
    judge = Judge(bar=0.4)
    whole = population(WORLD, judge, Labels)
    up, weight = whole.fields["desirable"][0], whole.fields["weight"][0] / len(whole)
    expected = (judge.upvotes(WORLD) * WORLD.reference.exp()).sum(-1).mean()
    torch.testing.assert_close(weight[up].sum(), expected)


def test_best_and_worst_of_a_ranking_are_the_ends_of_its_scores():
    rankings = draw(WORLD, Judge(), Rankings, 30, group=4)
    pairs, scores = best_and_worst(rankings), rankings.fields["scores"]
    assert torch.equal(pairs.fields["score_chosen"], scores.amax(-1))
    assert torch.equal(pairs.fields["score_rejected"], scores.amin(-1))
    assert (pairs.completions[..., :1] == rankings.completions).any(-1).all()


def test_taken_finds_values_with_and_without_runs_and_tokens():
    data = Data(
        Pairs, torch.tensor([[0, 1], [1, 1]]), torch.tensor([[[0, 1], [2, 3]], [[4, 5], [0, 0]]]), {}, (0, 1)
    )
    values = torch.arange(12.0).reshape(2, 6)
    expected = torch.tensor([[[0.0, 1.0], [8.0, 9.0]], [[10.0, 11.0], [6.0, 6.0]]])
    assert torch.equal(taken(values, data), expected)
    runs = values + 100 * torch.arange(3.0).reshape(3, 1, 1, 1)
    assert torch.equal(taken(runs, data), expected + 100 * torch.arange(3.0).reshape(3, 1, 1, 1))
    by_token = torch.stack([values, -values], -1)
    assert torch.equal(taken(by_token, data, per_token=True), torch.stack([expected, -expected], -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: draw(WORLD, Judge(), Rankings, 5, group=7), "group: got 7, expected at most the 6"),
        (lambda: draw(WORLD, Judge(), dict, 5), "kind: got"),
        (lambda: draw(WORLD, Judge(), Pairs, 0), "n: got 0 examples and 1 seeds"),
        (lambda: draw(WORLD, Judge(), Pairs, 5, seeds=[]), "n: got 5 examples and 0 seeds"),
        # Not the completion 1 of the next prompt.
        (lambda: taken(WORLD.reward, listed([(0, 7)])), "completions: got number 7, expected 0 to 5"),
        (lambda: population(WORLD, Judge(), Rankings), "kind: got"),
        (lambda: Data(Pairs, torch.zeros(2, 3).long(), torch.zeros(1, 3, 2).long()), "prompt: got shape"),
    ],
)
def test_refuses_what_cannot_be_drawn(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_listed_pairs_are_of_the_first_prompt():
    data = listed([(1, 0), (2, 0)])
    assert data.prompt.tolist() == [[0, 0]]
    assert taken(spelled().reward, data).shape == (1, 2, 2)
