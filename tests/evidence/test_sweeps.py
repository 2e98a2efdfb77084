"""One loss in one world: what is measured, and that held-out pairs alone choose the strength."""

import json
from dataclasses import replace

import pytest
import torch

import prefloss
from prefloss.evidence import sweeps
from prefloss.evidence.sweeps import Budget, choose, data_hash, not_fed, run_sweep, validated_win_rate
from prefloss.worlds import Judge, World, draw, optimum, settings

SMALL = Budget(seeds=3, betas=(0.1, 1.0), steps=8, batch=16)


@pytest.mark.parametrize(
    "loss", ["dpo", "kto", "s_dpo", "orpo", "0.8*dpo(beta=0.1) + 0.2*nll", "beta_dpo", "tdpo2"]
)
def test_each_kind_of_loss_is_trained_and_measured(loss):
    found = run_sweep(loss, "sparse", SMALL)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))
    strengths = 1 if loss == "orpo" else 2
    assert len(found["rows"]) == 3 * strengths
    assert [row["chosen_by_validation"] for row in found["rows"]].count(True) == 3
    for row in found["rows"]:
        assert row["kl"] > 0
        assert 0 < row["accuracy"] < 1
    for seed, place in enumerate(found["chosen"]):
        row = found["rows"][place * 3 + seed]
        assert row["chosen_by_validation"]
        assert row["seed"] == seed
        assert row["reward"] == pytest.approx(sum(found["prompts"][seed]) / 12, abs=1e-5)
    assert found["curves"]["kl"][0] == 0
    assert found["curves"]["reward"][-1] == pytest.approx(sum(map(sum, found["prompts"])) / 36, abs=1e-5)


def test_a_sweep_is_the_same_again_and_another_budget_is_not():
    one, two = (run_sweep("ipo", "flips", SMALL)["rows"] for _ in range(2))
    assert one == two
    assert run_sweep("ipo", "flips", replace(SMALL, steps=9))["rows"] != one


def test_the_true_reward_chooses_nothing(monkeypatch):
    """With another true reward behind the same judgements, the same strengths are chosen."""
    before = run_sweep("dpo", "clean", SMALL)
    known = settings()["clean"]
    world = known.world
    unfair = World(
        reward=-world.reward,
        reference=world.reference,
        lengths=world.lengths,
        sequences=world.sequences,
        table=world.table,
    )

    class Unfair(type(known)):
        world = unfair

        def feedback(self, kind, seeds):
            return known.feedback(kind, seeds)

        def validation(self, seeds):
            return known.validation(seeds)

    monkeypatch.setattr(sweeps, "settings", lambda: {"clean": Unfair("clean", "")})
    after = run_sweep("dpo", "clean", SMALL)
    assert after["chosen"] == before["chosen"]
    assert after["rows"][0]["reward"] == pytest.approx(-before["rows"][0]["reward"])


def test_the_best_figure_is_chosen_and_of_equals_the_one_nearest_the_default():
    figures = torch.tensor([[0.7, 0.5, torch.nan, 0.6], [0.6, 0.5, 0.2, 0.6], [0.5, 0.5, torch.nan, 0.1]])
    assert choose(figures, default=1).tolist() == [0, 1, 1, 1]


def test_the_estimated_win_rate_is_near_the_exact_one():
    world = settings()["clean"].world
    held_out = draw(world, Judge(), prefloss.Pairs, 20000, seeds=[0])
    policy = optimum(world, 2.0)
    judged = Judge().prefers(world)
    exact = torch.einsum("pi,pj,pij->p", policy.exp(), world.reference.exp(), judged).mean().item()
    found = validated_win_rate(world, policy.expand(1, 1, -1, -1), held_out).item()
    # Pairs are of different completions, and the weights of all prompts are added up.
    assert found == pytest.approx(exact, abs=0.06)
    assert validated_win_rate(world, world.reference, held_out).item() == 0.5


def test_strengths_are_those_asked_for_or_around_the_loss_own():
    assert [loss.beta for loss in Budget().strengths(prefloss.get("simpo(beta=2.0)"))] == [
        0.125,
        0.5,
        2.0,
        8.0,
        32.0,
    ]
    assert [loss.beta for loss in SMALL.strengths(prefloss.get("ipo"))] == [0.1, 1.0]
    assert len(Budget().strengths(prefloss.get("nll"))) == 1


def test_every_loss_but_one_is_fed():
    assert not_fed(prefloss.specs) == {"tis_dpo": ["per_token.weight"]}


def test_the_hash_is_that_of_the_data():
    assert data_hash(["clean"], 2) == data_hash(["clean"], 2)
    assert (
        len({data_hash(worlds, seeds) for worlds, seeds in ((["clean"], 2), (["flips"], 2), (["clean"], 3))})
        == 3
    )
