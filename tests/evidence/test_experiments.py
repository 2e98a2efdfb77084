"""Every experiment runs whatever the seeds; closed forms to 1e-3; each verdict follows from its figures."""

import csv
import json
import math
import re
from importlib import import_module

import pytest
import torch

from prefloss.evidence import Figure, Verdict
from prefloss.evidence.experiments import PAPERS, QUESTIONS, experiments
from prefloss.evidence.reproduction import reproduce
from prefloss.worlds import train

PACKAGE = "prefloss.evidence.experiments"
HOLDS, CHANGED, NOT = Verdict.HOLDS, Verdict.HOLDS_WITH_A_CHANGE, Verdict.DOES_NOT_APPEAR


def module(name):
    return import_module(f"{PACKAGE}.{name}")


def around(value, half=0.01):
    return Figure("", value, (value - half, value + half))


def test_names_are_unique_and_say_what_is_typed():
    known = experiments()
    assert len(known) == len(PAPERS) + len(QUESTIONS)
    for name, experiment in known.items():
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name)
        assert all((experiment.title, experiment.claim, experiment.source, experiment.setup))
        assert "arXiv:" in experiment.source or "asked by learners" in experiment.source
        # `prefloss reproduce` lists both on one line.
        assert len(experiment.title) <= 75


@pytest.fixture
def short_training(monkeypatch):
    """Three optimizer steps, wherever an experiment trains."""

    def short(*arguments, **settings):
        steps = min(settings.pop("steps", 3), 3)
        keep = [step for step in settings.pop("keep", ()) if step <= steps]
        return train(*arguments, steps=steps, keep=keep, **settings)

    for name in (*PAPERS, *QUESTIONS):
        monkeypatch.setattr(module(name), "train", short, raising=False)
    monkeypatch.setattr(module("displacement"), "STEPS", (0, 1, 2, 3))
    monkeypatch.setattr("prefloss.evidence.reward_models.train", short)


@pytest.mark.parametrize("name", PAPERS)
def test_an_experiment_runs_to_its_files(name, short_training, tmp_path):
    results = reproduce(module(name).EXPERIMENT, range(7, 9), tmp_path)
    assert results["verdict"] in [verdict.value for verdict in Verdict]
    assert bool(results["change"]) is (results["verdict"] == CHANGED.value)
    assert results["command"].endswith("--seeds 2 --first-seed 7")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    with (tmp_path / "results.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"7", "8"}
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_dpo_on_all_pairs_is_the_optimum():
    frontier = module("dpo_frontier")
    got = frontier.trained_on_everything().log_probs()[:, 0].exp()
    best = frontier.optimum(frontier.WORLD, torch.tensor(frontier.BETAS)).exp()
    torch.testing.assert_close(got, best, atol=1e-3, rtol=0.0)


def test_ipo_on_the_closed_forms():
    ipo = module("ipo_deterministic")
    two, *three = ipo.SETS
    fits = ipo.fitted([two], ipo.all_of([two]), 150, 0.3) | ipo.fitted(three, ipo.all_of(three), 150, 0.3)
    taus = torch.tensor(ipo.TAUS, dtype=torch.float64)
    for name, fit in fits.items():
        torch.testing.assert_close(fit["IPO"][:, 0], ipo.closed_form(name, taus), atol=1e-3, rtol=0.0)
    # Azar et al.: sigmoid(1 / (2 tau)), and neighbours 1 / (3 tau) apart.
    at = ipo.TAUS.index(0.5)
    assert fits[two]["IPO"][at, 0, 0] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)
    assert fits[ipo.D1]["IPO"][at, 0].tolist() == pytest.approx([0.563, 0.289, 0.148], abs=1e-3)


def test_robust_dpo_on_all_flipped_pairs_is_the_optimum_without_flips():
    flipped = module("flipped_labels")
    got = flipped.on_everything(0.2)[flipped.NAMES.index("robust DPO")].exp()
    best = flipped.optimum(flipped.WORLD, flipped.BETA).exp()
    torch.testing.assert_close(got, best, atol=1e-3, rtol=0.0)


def test_votes_are_the_sides_of_the_pairs():
    kto = module("kto_unpaired")
    pairs = kto.pairs_of([3, 4])
    votes = kto.votes_of(pairs, upvotes=0.1)
    assert len(votes) == kto.N // 10 + kto.N
    up = votes.fields["desirable"]
    assert up.sum(-1).tolist() == [kto.N // 10] * 2
    assert votes.completions[1, up[1], 0].tolist() == pairs.completions[1, : kto.N // 10, 0].tolist()
    assert votes.completions[1, ~up[1], 0].tolist() == pairs.completions[1, :, 1].tolist()


def test_alike_words_have_the_higher_score():
    displacement = module("displacement")
    world = displacement.vocabulary()
    words = world.features[0]
    for alike in (True, False):
        pairs = displacement.pair_of_each_seed(world, range(5), alike).completions[:, 0]
        assert (pairs[:, 0] != pairs[:, 1]).all()
        for chosen, rejected in pairs:
            others = [i for i in range(len(words)) if i != chosen]
            products = (words[others] @ words[chosen]).tolist()
            assert (words[rejected] @ words[chosen]).item() == pytest.approx(
                (max if alike else min)(products)
            )


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("dpo_frontier", (1e-6, around(0.02), 1.0), HOLDS),
        ("dpo_frontier", (1e-6, around(0.2), 1.0), CHANGED),
        ("dpo_frontier", (0.01, around(0.02), 1.0), NOT),
        ("overoptimisation", (around(1.0), around(0.0), around(0.0)), CHANGED),
        ("overoptimisation", (around(1.0), around(1.0), around(0.0)), HOLDS),
        ("overoptimisation", (around(0.0), around(0.0), around(0.0)), NOT),
        ("overoptimisation", (around(1.0), around(0.0), around(-0.1)), NOT),
        ("flipped_labels", (1e-6, 0.5, around(0.1)), HOLDS),
        ("flipped_labels", (1e-6, 0.5, around(0.0)), CHANGED),
        ("flipped_labels", (1e-6, 0.5, around(math.nan)), NOT),
        ("flipped_labels", (0.1, 0.5, around(0.1)), NOT),
        ("kto_unpaired", (around(0.0), 1.0), HOLDS),
        ("kto_unpaired", (around(-0.05), 1.0), CHANGED),
        ("kto_unpaired", (around(-0.5), 1.0), NOT),
        ("kto_unpaired", (around(math.nan), 1.0), NOT),
        # Too wide to say that they are equal.
        ("kto_unpaired", (around(0.0, half=0.5), 1.0), NOT),
        ("displacement", (torch.tensor([0.0, 0.0, 1.0]), around(-1.0), around(1.0), around(-1.0)), HOLDS),
        ("displacement", (torch.tensor([0.0, 0.0, 1.0]), around(0.0), around(1.0), around(-1.0)), CHANGED),
        ("displacement", (torch.tensor([0.9, 0.1, 0.0]), around(-1.0), around(1.0), around(-1.0)), NOT),
        ("length_bias", (1e-6, around(0.1), around(-1.0)), HOLDS),
        ("length_bias", (1e-6, around(0.0), around(-1.0)), CHANGED),
        ("length_bias", (0.1, around(0.1), around(-1.0)), NOT),
        ("k_wise", (around(0.1), around(0.1)), HOLDS),
        ("k_wise", (around(0.1), around(0.0)), CHANGED),
        ("k_wise", (around(0.0), around(0.1)), NOT),
    ],
)
def test_the_verdict_follows_from_the_figures(name, arguments, expected):
    assert module(name).verdict(*arguments) is expected


@pytest.mark.parametrize(
    ("off", "winner", "lost", "paper", "expected"),
    [
        (1e-6, 0.999, 0.001, (0.33, 0.33), CHANGED),
        (1e-6, 0.999, 0.001, (0.33, 0.01), HOLDS),
        (0.1, 0.999, 0.001, (0.33, 0.33), NOT),
        (1e-6, 0.7, 0.001, (0.33, 0.33), NOT),
        (1e-6, 0.999, 0.2, (0.33, 0.33), NOT),
    ],
)
def test_the_verdict_on_ipo(off, winner, lost, paper, expected):
    probability = dict(zip(("IPO", "DPO"), torch.tensor(paper)[:, None], strict=True))
    lost = {"IPO": torch.tensor([0.2]), "DPO": torch.tensor([lost])}
    assert module("ipo_deterministic").verdict(off, winner, lost, probability) is expected
