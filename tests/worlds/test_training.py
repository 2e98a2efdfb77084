"""Training: one run beside others is the run alone; every loss trains; batches and seeds."""

import pytest
import torch
from torch.optim import SGD

import prefloss
from prefloss import Labels, Pairs, Rankings
from prefloss.worlds import (
    Judge,
    LogLinear,
    Tabular,
    TokenTable,
    bandit,
    draw,
    expected,
    featured,
    fed,
    listed,
    optimum,
    spelled,
    sweep,
    train,
)
from prefloss.worlds import reward as expected_reward

SPELLED = TokenTable(spelled(prompts=2, words=2, longest=4))
CLEAN = {
    kind: draw(SPELLED.world, Judge(temperature=0.0), kind, 120, group=3)
    for kind in (Pairs, Labels, Rankings)
}
NOISY = {
    kind: draw(SPELLED.world, Judge(), kind, 24, seeds=[3, 5, 9], group=3)
    for kind in (Pairs, Labels, Rankings)
}

# As published: near a margin of 0 their slope points the other way.
OTHER_DIRECTION = ("discopop", "discopop_aql")


@pytest.mark.parametrize("name", [name for name, lacking in fed(SPELLED).items() if not lacking])
def test_every_loss_that_the_world_feeds_trains(name):
    data = CLEAN[prefloss.specs[name].feedback]
    runs = train(SPELLED, data, name, steps=20)
    assert runs.final.isfinite().all()
    log_probs = runs.log_probs()
    assert log_probs.isfinite().all()
    gained = (
        expected_reward(SPELLED.world, log_probs) - expected_reward(SPELLED.world, SPELLED.world.reference)
    ).item()
    assert (gained > 0.01) == (name not in OTHER_DIRECTION), gained


@pytest.mark.parametrize(
    "losses",
    [
        sweep("dpo", [0.1, 0.5]),
        ["dpo", "hinge", "ipo(per_token=False)", "0.5*dpo + 0.5*nll"],
        sweep("kto", [0.1, 0.5]),
        ["kto(kl_baseline='column')", "kto(kl_baseline='mismatched')", "bco"],
        sweep("bdpo", [0.1, 0.5]),
        ["bdpo(mixture=0.3)", "bdpo(mixture=0.6)"],
        ["dpo(beta=linear(0.5, 0.1, steps=5))", "dr_dpo", "beta_dpo"],
        sweep("tdpo2", [0.1, 0.5]),
        # What they keep from batch to batch is kept for each run.
        sweep("bco", [0.1, 0.5]),
        sweep("alpha_dpo", [0.5, 2.5]),
        [*sweep("beta_dpo", [0.1, 0.5]), *sweep("bco_pair", [0.1, 0.5]), "gamma_po"],
        ["kto(kl_baseline='running_mean')", "kto(kl_baseline='running_mean', beta=0.5)"],
        sweep("s_dpo", [0.1, 0.5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_run_beside_others_is_the_run_alone(losses, batch_size):
    first = prefloss.get(losses[0]) if isinstance(losses[0], str) else losses[0]
    data = NOISY[first.spec.feedback]
    settings = {"steps": 12, "batch_size": batch_size}
    together = train(SPELLED, data, losses, **settings).log_probs()
    for row, loss in enumerate(losses):
        for column, seed in enumerate(data.seeds):
            alone = train(SPELLED, one_seed(data, seed, column), loss, **settings)
            torch.testing.assert_close(alone.log_probs()[0, 0], together[row, column], atol=1e-6, rtol=0.0)


def one_seed(data, seed, column):
    part = slice(column, column + 1)
    fields = {name: value[part] for name, value in data.fields.items()}
    return type(data)(data.kind, data.prompt[part], data.completions[part], fields, (seed,))


def test_a_run_agrees_with_plain_autograd():
    """Gradients of the registry's loss on hand-made feedback, without any of the machinery."""
    world = featured(prompts=2, completions=5, dimensions=3)
    data = draw(world, Judge(), Pairs, 10)
    theta = torch.zeros(3).double().requires_grad_()
    adjust = torch.optim.Adam([theta], lr=0.05)
    for _ in range(10):
        logits = world.reference + world.features @ theta
        h = torch.log_softmax(logits, -1) - world.reference
        chosen, rejected = (h[data.prompt[0], data.completions[0, :, side]] for side in (0, 1))
        adjust.zero_grad()
        prefloss.get("dpo", beta=0.3).mean(Pairs.of(chosen, rejected)).backward()
        adjust.step()
    runs = train(LogLinear(world), data, "dpo(beta=0.3)", steps=10)
    torch.testing.assert_close(runs.theta[10][0, 0], theta.detach())


def test_a_run_that_breaks_leaves_the_others_alone():
    world = bandit(completions=5)
    data = draw(world, Judge(), Pairs, 20, seeds=[0, 1])
    start = torch.zeros(1, 2, 1, 5).double()
    start[0, 1] = torch.nan
    runs = train(Tabular(world), data, "dpo", steps=5, start=start)
    assert runs.log_probs()[0, 0].isfinite().all()
    assert runs.log_probs()[0, 1].isnan().all()


def test_losses_are_copied_with_their_state():
    world = bandit()
    loss = prefloss.get("bco")
    train(Tabular(world), draw(world, Judge(), Labels, 10), loss, steps=3)
    assert loss.state_dict() == prefloss.get("bco").state_dict()


def test_exact_kl_is_given_where_a_loss_reads_the_column():
    world = bandit()
    data = draw(world, Judge(), Labels, 50)
    named = ["kto(kl_baseline='column', beta=1.0)", "kto(kl_baseline='zero', beta=1.0)", "kto(beta=1.0)"]
    column, zero, mismatched = train(Tabular(world), data, named, steps=30).log_probs()
    assert not torch.allclose(column, zero)
    assert not torch.allclose(column, mismatched)


def test_batches_are_passes_over_the_data_in_an_order_of_the_seed():
    world = bandit()
    data = draw(world, Judge(), Pairs, 10, seeds=[0, 1])
    whole = train(Tabular(world), data, "dpo", steps=4, batch_size=10).log_probs()
    torch.testing.assert_close(whole, train(Tabular(world), data, "dpo", steps=4).log_probs())
    # 10 examples are three batches of 3, and one is left for the next pass.
    parts = train(Tabular(world), data, ["dpo", "ipo"], steps=7, batch_size=3)
    assert parts.log_probs().isfinite().all()


def test_steps_are_kept_where_asked():
    world = bandit()
    runs = train(Tabular(world), draw(world, Judge(), Pairs, 10), "dpo", steps=6, keep=[0, 3])
    assert sorted(runs.theta) == [0, 3, 6]
    torch.testing.assert_close(runs.log_probs(0)[0, 0], world.reference)
    with pytest.raises(ValueError, match="step: got 4, expected one that was kept"):
        runs.log_probs(4)


def test_sweep_refuses_a_loss_without_a_strength():
    with pytest.raises(ValueError, match="'nll', which has no KL strength"):
        sweep("nll", [0.1])


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"batch_size": 11},
        {"steps": 0},
        {"losses": []},
        {"keep": [2]},
        {"start": torch.zeros(3)},
    ],
)
def test_train_refuses_settings_out_of_range(settings):
    world = bandit()
    with pytest.raises(ValueError, match=r"(batch_size|keep|start): got|expected at least one of each"):
        train(Tabular(world), draw(world, Judge(), Pairs, 10), **{"losses": "dpo", "steps": 1, **settings})


def test_more_pairs_bring_the_policy_closer_to_the_optimum():
    world = bandit(completions=10)
    best = optimum(world, 1.0)
    apart = [
        expected(best, best - train(Tabular(world), data, "dpo(beta=1.0)", steps=200).log_probs()).mean()
        for data in (draw(world, Judge(), Pairs, n, seeds=range(5)) for n in (30, 300, 3000))
    ]
    assert apart[0] > 3 * apart[1] > 9 * apart[2]


def test_another_optimizer_takes_the_same_gradient():
    """One step of SGD on one pair: half of beta up and half of beta down."""
    runs = train(
        Tabular(bandit(completions=3)),
        listed([(0, 2)]),
        "dpo(beta=0.4)",
        steps=1,
        learning_rate=1.0,
        optimizer=SGD,
    )
    torch.testing.assert_close(runs.theta[1].flatten(), torch.tensor([0.2, 0.0, -0.2]).double())
