"""Judges: what they draw agrees with the probabilities that they state."""

import pytest
import torch

from prefloss.worlds import Judge, Panel, World, bandit

WORLD = World(
    reward=torch.tensor([[1.0, 0.0, -0.5]]), reference=torch.zeros(1, 3), lengths=torch.tensor([1, 4, 2])
)
JUDGES = {
    "plain": Judge(),
    "cold": Judge(temperature=0.3),
    "flips": Judge(flips=0.2),
    "length": Judge(length_bias=0.5),
    "bar": Judge(bar=0.7),
    "without noise": Judge(temperature=0.0),
    "panel": Panel([Judge(), Judge(taste=torch.tensor([[0.0, 2.0, 0.0]]))], shares=[2, 1]),
}
judges = pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
N = 20_000


def asked(judge, completions, **options):
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(completions).expand(N, -1)
    return judge.scores(WORLD, torch.zeros(N, dtype=torch.long), rows, generator, **options)


def agrees(said, probability):
    # 4 standard errors of a share of N draws.
    error = 4 * (probability * (1 - probability) / N) ** 0.5 + 1e-9
    assert abs(said.double().mean() - probability) <= error


@judges
def test_wins_have_the_stated_probability(judge):
    scores = asked(judge, [0, 1])
    agrees(scores[:, 0] > scores[:, 1], judge.prefers(WORLD)[0, 0, 1])


@judges
def test_upvotes_have_the_stated_probability(judge):
    scores = asked(judge, [1], bar=True)
    agrees(scores[:, 0] > scores[:, 1], judge.upvotes(WORLD)[0, 1])


@judges
def test_one_of_two_wins(judge):
    wins = judge.prefers(WORLD)
    torch.testing.assert_close(wins + wins.mT, torch.ones_like(wins))


def test_bradley_terry_by_hand():
    assert Judge(temperature=2.0).prefers(WORLD)[0, 0, 1].item() == pytest.approx(1 / (1 + 2.718281828**-0.5))
    assert Judge(length_bias=0.5).utility(WORLD).tolist() == [[1.5, 2.0, 0.5]]
    assert Judge(temperature=0.0).prefers(WORLD)[0].tolist() == [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]


def test_rankings_are_plackett_luce():
    order = asked(Judge(temperature=0.5), [0, 1, 2]).argsort(-1, descending=True)
    strength = (WORLD.reward[0] / 0.5).exp()
    agrees(order[:, 0] == 1, strength[1] / strength.sum())
    first_0_then_2 = strength[0] / strength.sum() * strength[2] / (strength[1] + strength[2])
    agrees((order[:, 0] == 0) & (order[:, 1] == 2), first_0_then_2)


def test_a_flip_reverses_a_whole_ranking():
    order = asked(Judge(temperature=0.0, flips=0.25), [0, 1, 2]).argsort(-1, descending=True)
    backwards = order[:, 0] == 2
    assert set(map(tuple, order.tolist())) == {(0, 1, 2), (2, 1, 0)}
    agrees(backwards, torch.tensor(0.25))


def test_noise_of_the_scores_has_mean_zero():
    gap = asked(Judge(), [0, 1, 2]).mean(0) - WORLD.reward[0]
    assert gap.abs().max() < 0.04


def test_a_panel_of_one_says_what_its_judge_says():
    judge, panel = Judge(length_bias=0.2), Panel([Judge(length_bias=0.2)], [3.0])
    torch.testing.assert_close(panel.prefers(bandit()), judge.prefers(bandit()))
    assert torch.equal(asked(panel, [0, 1]), asked(judge, [0, 1]))


@pytest.mark.parametrize("make", [lambda: Judge(temperature=-1.0), lambda: Judge(flips=1.5)])
def test_judge_refuses_settings_out_of_range(make):
    with pytest.raises(ValueError, match=r"(temperature|flips): got -?1"):
        make()


@pytest.mark.parametrize("shares", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_panel_refuses_shares_that_do_not_fit(shares):
    with pytest.raises(ValueError, match="shares: got"):
        Panel([Judge(), Judge()], shares)
