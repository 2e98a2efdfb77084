"""Policy gradients: they end at the closed form, and the sampled one near it."""

import pytest
import torch

from prefloss.worlds import LogLinear, Tabular, bandit, climb, expected, featured, kl, optimum, reward

BETAS = [0.5, 1.0]


def test_climbing_free_logits_ends_at_the_closed_form():
    world = bandit(prompts=2, completions=6)
    climbed = climb(Tabular(world), world.reward, BETAS, steps=400)[:, 0]
    best = optimum(world, torch.tensor(BETAS))
    torch.testing.assert_close(climbed.exp(), best.exp(), atol=1e-3, rtol=0.0)


def test_samples_end_near_the_closed_form():
    world = bandit(completions=6)
    climbed = climb(Tabular(world), world.reward, BETAS, samples=16, seeds=range(4), learning_rate=0.02)
    best = optimum(world, torch.tensor(BETAS))[:, None]
    assert expected(climbed, climbed - best).max() < 0.03


def test_a_run_does_not_depend_on_its_neighbours():
    world = bandit(completions=6)
    worth = torch.stack([world.reward, -world.reward, 2 * world.reward])
    settings = {"samples": 3, "steps": 10}
    together = climb(Tabular(world), worth, BETAS, seeds=[3, 5, 9], **settings)
    alone = climb(Tabular(world), worth[1:2], BETAS[1:], seeds=[5], **settings)
    torch.testing.assert_close(together[1, 1], alone[0, 0])


def test_the_best_of_a_family_is_better_than_its_neighbours():
    """Features can say less than free logits: below the optimum, above all other weights."""
    world = featured(completions=20, dimensions=2, hump=0.3)
    policy = LogLinear(world)
    best = climb(policy, world.reward, [0.3], steps=500)[0, 0]

    def objective(log_probs):
        return reward(world, log_probs) - 0.3 * kl(world, log_probs)

    others = policy.log_probs(torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double())
    assert objective(best) > objective(others).max() - 1e-6
    assert objective(best) < objective(optimum(world, 0.3)) - 0.01


@pytest.mark.parametrize("settings", [{"samples": 1}, {"betas": [0.5, 0.0]}, {"seeds": [1, 2]}])
def test_climb_refuses_settings_out_of_range(settings):
    world = bandit(completions=3)
    with pytest.raises(ValueError, match=r"(samples: got 1|betas: got 0.0|worth: got 1 seeds), expected"):
        climb(Tabular(world), world.reward[None], **{"betas": [1.0], **settings})
