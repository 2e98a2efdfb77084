"""The results that the documentation shows are those of today's experiments."""

import json
from pathlib import Path

import pytest

from prefloss.evidence.experiments import experiments

RESULTS = Path(__file__).parents[2] / "docs" / "evidence" / "results"
RENEW = "renew it: prefloss reproduce {} --output docs/evidence/results"


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_has_results_of_its_own_words(name):
    experiment, folder = experiments()[name], RESULTS / name
    assert (folder / "results.json").exists(), RENEW.format(name)
    results = json.loads((folder / "results.json").read_text())
    for field in ("title", "claim", "source", "setup"):
        assert results[field] == getattr(experiment, field), RENEW.format(name)
    assert len(results["seeds"]) == experiment.seeds, RENEW.format(name)
    assert (folder / "picture.png").stat().st_size < 100_000
    assert (folder / "results.csv").stat().st_size < 200_000


def test_there_are_no_results_of_other_experiments():
    assert {folder.name for folder in RESULTS.iterdir()} == set(experiments())
