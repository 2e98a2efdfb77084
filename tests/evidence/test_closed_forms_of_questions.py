"""What the experiments on learners' questions compare with: closed forms, and a fit by other hands."""

import math

import pytest
import torch
from scipy.optimize import minimize

from prefloss import Pairs
from prefloss.evidence.experiments import (
    chipo_coverage,
    how_far,
    off_support,
    several_judges,
    starting_model,
    ten_values,
)
from prefloss.evidence.reward_models import reward_model
from prefloss.worlds import (
    Judge,
    LogLinear,
    Panel,
    World,
    draw,
    featured,
    kl,
    optimum,
    population,
    sweep,
    train,
    win_rate,
)


def test_a_reward_model_is_the_bradley_terry_fit_of_scipy():
    world = featured(prompts=2, completions=20, dimensions=3)
    pairs = draw(world, Judge(), Pairs, 200, seeds=[4])
    prompt, (chosen, rejected) = pairs.prompt[0], pairs.completions[0, :, :2].T
    difference = (world.features[prompt, chosen] - world.features[prompt, rejected]).numpy()
    fit = minimize(
        lambda w: torch.nn.functional.softplus(-torch.tensor(difference @ w)).mean().item(), [0.0] * 3
    )
    scores, by_hand = reward_model(LogLinear(world), pairs)[0], world.features @ torch.tensor(fit.x)
    torch.testing.assert_close(scores.diff(dim=-1), by_hand.diff(dim=-1), atol=1e-3, rtol=0.0)


def test_mass_off_the_support_follows_its_closed_form():
    """Endless pairs of y1 and y2 make the weight of the feature 1 / beta, and y3 has three times the feature."""
    world, betas = off_support.three_completions(), torch.tensor([0.3, 1.0])
    never = torch.tensor([[0.0, 0.0, -math.inf]])
    data = population(world, Judge(), Pairs, never)
    runs = train(LogLinear(world), data, sweep("dpo", betas.tolist()), steps=400, learning_rate=0.05)
    expected = torch.softmax(world.reference + torch.tensor([1.0, 0.0, 3.0]) / betas[:, None], -1)
    torch.testing.assert_close(runs.log_probs()[:, 0, 0].exp(), expected, atol=1e-3, rtol=0.0)


def test_borda_counts_of_one_judge_and_of_several():
    world = World(reward=torch.tensor([[0.0, 0.0]]), reference=torch.tensor([[0.25, 0.75]]).log())
    sure = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]]).double()
    torch.testing.assert_close(several_judges.borda(world, sure), torch.tensor([[0.875, 0.375]]).double())
    world, first, second = several_judges.panels_of([7])
    panel = Panel([Judge(taste=first), Judge(taste=second)], [0.6, 0.4])
    ratios = several_judges.fitted(world, panel)
    implied = torch.sigmoid(ratios.unsqueeze(-1) - ratios.unsqueeze(-2))
    counts = several_judges.borda(world, panel.prefers(world))
    torch.testing.assert_close(several_judges.borda(world, implied), counts, atol=1e-3, rtol=0.0)


def test_the_optimum_multiplies_the_odds_of_the_good_thing():
    world = starting_model.base()
    expected = starting_model.ceiling(torch.tensor(starting_model.CHANCES))
    torch.testing.assert_close(starting_model.good(optimum(world, starting_model.BETA)), expected)


def test_seeds_of_the_starting_model_do_not_touch_one_another():
    reference = starting_model.base().reference
    settings = {"loss": "dpo", "n": 20, "steps": 5}
    together = starting_model.trained(reference.expand(2, -1, -1), [3, 8], **settings)
    alone = starting_model.trained(reference[None], [8], **settings)
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0.0)


def test_ratings_keep_the_order_and_endless_ones_the_scores():
    data = draw(featured(), Judge(), Pairs, 50, seeds=[1, 2])
    two, all_ = ten_values.rated(data, 2), ten_values.rated(data, 100)
    assert all(len(row.unique()) == 2 for row in torch.cat(list(two.fields.values()), 1))
    assert (two.fields["score_chosen"] >= two.fields["score_rejected"]).all()
    for name, scores in all_.fields.items():
        torch.testing.assert_close(scores, data.fields[name])


def test_a_third_of_the_pairs_are_ties():
    data = draw(featured(), Judge(), Pairs, 60, seeds=[1])
    dropped, halved = ten_values.verdicts(data)
    assert dropped.fields["weight"].sum() == 40
    assert torch.equal(halved.fields["score_chosen"] > 0, dropped.fields["weight"] > 0)


@pytest.mark.parametrize("n", [4, 54])
def test_best_of_n_lies_at_its_closed_form(n):
    """Exact on 20,000 completions of different rewards: the best of n has the n-th power of the cumulative share."""
    share = torch.arange(1, 20_001).double() / 20_000
    best = share**n - torch.cat([share.new_zeros(1), share[:-1]]) ** n
    world = World(reward=share[None], reference=torch.zeros(1, 20_000))
    log_probs = best.clamp_min(1e-300).log()[None]
    assert kl(world, log_probs).item() == pytest.approx(how_far.best_of(n), abs=1e-3)
    assert win_rate(world, log_probs).item() == pytest.approx(n / (n + 1), abs=1e-3)
    assert how_far.samples_for(how_far.best_of(n)) == pytest.approx(n, rel=1e-6)


def test_policies_are_put_at_a_distance():
    world = featured(prompts=1, completions=200, dimensions=4)
    scores = torch.stack([world.reward, 3 * world.features[..., 0]])
    for distance in (0.0, 0.5, 2.0):
        found = kl(world, how_far.at_distance(world, scores, distance))
        torch.testing.assert_close(found, torch.full((2,), distance).double(), atol=1e-6, rtol=0.0)


def test_coverage_is_what_the_worlds_differ_in():
    shares = [
        chipo_coverage.covered(mass).reference.exp()[0, chipo_coverage.COMMON :].sum() for mass in (0.1, 0.8)
    ]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.1, 0.8]).double(), atol=1e-6, rtol=0.0)
