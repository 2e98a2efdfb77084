"""What the papers prove, to 1e-5."""

import math

import pytest
import torch

from prefloss import Labels, Pairs
from prefloss.worlds import (
    Judge,
    LogLinear,
    Panel,
    Tabular,
    World,
    bandit,
    drift,
    expected,
    frontier,
    kl,
    length,
    listed,
    optimum,
    population,
    reward,
    sweep,
    train,
)

TAUS = (0.1, 0.5, 1.0, 10.0)
CLOSE = {"atol": 1e-5, "rtol": 0.0}
WORLD = bandit(prompts=2, completions=8, longest=4)


def alike(completions):
    """A world whose completions are equally likely; rewards are not looked at."""
    return World(reward=torch.zeros(1, completions), reference=torch.zeros(1, completions))


def fitted(world, data, losses, steps=600, learning_rate=0.1):
    """Probabilities after training to the end, [losses, C]; the world has one prompt and the data one seed."""
    runs = train(Tabular(world), data, losses, steps=steps, learning_rate=learning_rate)
    return runs.log_probs()[:, 0, 0].exp()


def test_population_dpo_lands_on_the_frontier():
    """Rafailov et al. 2023, Eq. 4: the optimum is the reference times exp(r / beta)."""
    betas = [0.3, 1.0, 3.0]
    runs = train(
        Tabular(WORLD), population(WORLD, Judge(), Pairs), sweep("dpo", betas), steps=600, learning_rate=0.1
    )
    got, best = runs.log_probs()[:, 0], optimum(WORLD, torch.tensor(betas))
    torch.testing.assert_close(got.exp(), best.exp(), **CLOSE)
    distance, earned = frontier(WORLD, torch.tensor(betas))
    torch.testing.assert_close(kl(WORLD, got), distance, **CLOSE)
    torch.testing.assert_close(reward(WORLD, got), earned, **CLOSE)


def test_temperature_of_the_judge_scales_beta():
    runs = train(
        Tabular(WORLD),
        population(WORLD, Judge(temperature=2.0), Pairs),
        "dpo(beta=0.5)",
        steps=600,
        learning_rate=0.1,
    )
    torch.testing.assert_close(runs.log_probs()[0, 0].exp(), optimum(WORLD, 1.0).exp(), **CLOSE)


def test_ipo_on_two_actions_and_a_judge_without_doubt():
    """Azar et al. 2023, section 5.3: sigmoid(1 / (2 tau)), where DPO goes to 1."""
    world, data = alike(2), listed([(0, 1)])
    got = fitted(world, data, sweep("ipo(per_token=False)", TAUS))[:, 0]
    torch.testing.assert_close(
        got, torch.tensor([1 / (1 + math.exp(-1 / (2 * tau))) for tau in TAUS]).double()
    )
    assert (fitted(world, data, sweep("dpo", TAUS[:3]))[:, 0] > 0.999).all()


def test_ipo_on_the_total_order_of_three_actions():
    """D1 = {ab, bc, ac}: neighbours are 1 / (3 tau) apart."""
    log_probs = fitted(alike(3), listed([(0, 1), (1, 2), (0, 2)]), sweep("ipo(per_token=False)", TAUS)).log()
    gap = torch.tensor([1 / (3 * tau) for tau in TAUS]).double()
    torch.testing.assert_close(log_probs[:, 0] - log_probs[:, 1], gap, **CLOSE)
    torch.testing.assert_close(log_probs[:, 1] - log_probs[:, 2], gap, **CLOSE)


def test_ipo_keeps_an_action_that_always_lost_and_dpo_does_not():
    """D3' = {ab, ba, ac} in place of the paper's D3, which gives the third action no gradient."""
    world, data = alike(3), listed([(0, 1), (1, 0), (0, 2)])
    got = fitted(world, data, sweep("ipo(per_token=False)", TAUS))
    low = torch.tensor([math.exp(-1 / (2 * tau)) for tau in TAUS]).double()
    torch.testing.assert_close(got[:, 2], low / (2 + low), **CLOSE)
    torch.testing.assert_close(got[:, 0], got[:, 1], **CLOSE)
    assert (fitted(world, data, sweep("dpo", TAUS[:3]))[:, 2] < 1e-3).all()
    # The paper's own set.
    assert fitted(world, listed([(0, 1), (1, 0)]), "ipo")[0].tolist() == pytest.approx([1 / 3] * 3)


def test_r_dpo_takes_the_length_out_of_the_judge():
    """Park et al. 2024: with alpha equal to the bias, the optimum of the true reward."""
    judge = Judge(length_bias=0.5)
    data = population(WORLD, judge, Pairs)
    losses = ["r_dpo(beta=1.0, alpha=0.5)", "r_dpo(beta=1.0, alpha=0.25)", "dpo(beta=1.0)"]
    exact, half, plain = train(Tabular(WORLD), data, losses, steps=600, learning_rate=0.1).log_probs()[:, 0]
    torch.testing.assert_close(exact.exp(), optimum(WORLD, 1.0).exp(), **CLOSE)
    torch.testing.assert_close(
        plain.exp(), optimum(WORLD, 1.0, judge.utility(WORLD)).exp(), atol=1e-5, rtol=0.0
    )
    assert length(WORLD, exact) < length(WORLD, half) < length(WORLD, plain)
    assert reward(WORLD, exact) > reward(WORLD, plain)


def test_robust_dpo_takes_flips_out_of_the_labels():
    """Chowdhury et al. 2024: with epsilon equal to the share of flips, the optimum without any."""
    data = population(WORLD, Judge(flips=0.2), Pairs)
    robust, plain = train(
        Tabular(WORLD),
        data,
        ["robust_dpo(beta=1.0, epsilon=0.2)", "dpo(beta=1.0)"],
        steps=600,
        learning_rate=0.1,
    ).log_probs()[:, 0]
    torch.testing.assert_close(robust.exp(), optimum(WORLD, 1.0).exp(), **CLOSE)
    assert kl(WORLD, plain) < kl(WORLD, robust)


def test_displacement_needs_shared_features():
    """Razin et al. 2024: No preferred to Never makes Yes likely, since the hidden state moves towards it."""
    features = torch.tensor([[[1.0, 0.0], [1.0, -0.3], [0.0, 1.2]]])
    start = torch.tensor([[0.49, 0.49, 0.02]])
    world = World(reward=torch.tensor([[1.0, 0.0, -1.0]]), reference=start.log(), features=features)
    data, keep = listed([(0, 1)]), (0, 10, 20, 40, 80)
    runs = train(LogLinear(world), data, ["dpo", "dpop"], steps=300, keep=keep, learning_rate=0.1)
    h = [drift(world, runs.log_probs(step), data) for step in (*keep, 300)]
    margins = torch.stack([chosen - rejected for chosen, rejected in h])[:, 0, 0]
    chosen = torch.stack([chosen for chosen, _ in h])[:, 0, 0]
    assert (margins.diff() > 0).all()
    # It rises at first, until Yes has gained.
    assert (chosen[2:].diff() < 0).all()
    assert chosen[-1] < -5
    dpo, dpop = runs.log_probs()[:, 0, 0].exp()
    assert dpo[2] > 0.99
    assert dpop[0] > 0.45
    # On the way, where Never is .06 and No .19: the path is a line, so it does not depend on the steps.
    theta = torch.tensor([0.0, math.log(0.19 / 0.06) / 0.3]).double()
    on_the_way = LogLinear(world).log_probs(theta).exp()
    torch.testing.assert_close(on_the_way[0], torch.tensor([0.19, 0.06, 0.75]).double(), atol=0.01, rtol=0.0)
    assert runs.theta[300][0, 0, 0].item() == pytest.approx(0.0, abs=1e-9)
    assert fitted(world, data, "dpo", steps=300)[0, 0] > 0.9


def test_dpo_orders_by_borda_count_where_judges_differ():
    """2502.16320: the mean reward of the types prefers another completion than the share of wins does."""
    # Two thirds like the first a little better; one third likes the second much better.
    types = [torch.tensor([[1.0, 0.0, -2.0]]), torch.tensor([[0.0, 9.0, -2.0]])]
    world = World(reward=(2 * types[0] + types[1]) / 3, reference=torch.zeros(1, 3))
    panel = Panel([Judge(taste=taste, temperature=0.3) for taste in types], [2, 1])
    got = train(
        Tabular(world), population(world, panel, Pairs), "dpo(beta=1.0)", steps=600, learning_rate=0.1
    ).log_probs()[0, 0, 0]
    borda = panel.prefers(world)[0].mean(-1)
    assert got.argsort().tolist() == borda.argsort().tolist()
    assert got.argmax() != world.reward[0].argmax()


def test_unpaired_votes_find_the_better_half():
    """KTO without pairs, with the exact KL as its baseline: votes of the population alone raise the reward."""
    data = population(WORLD, Judge(), Labels)
    runs = train(Tabular(WORLD), data, "kto(beta=1.0, kl_baseline='column')", steps=500)
    got = runs.log_probs()[0, 0]
    assert reward(WORLD, got) > reward(WORLD, WORLD.reference) + 0.5
    upvoted = (WORLD.reward > 0).double()
    assert expected(got, upvoted) > expected(WORLD.reference, upvoted)
