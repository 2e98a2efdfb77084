"""`prefloss reproduce`: the list, one experiment, all of them, and what it refuses."""

import csv
import json
import os

import pytest
from typer.testing import CliRunner

from prefloss.cli import reproduce
from prefloss.cli.app import app
from tests.cli.fake_experiments import GOOD_AND_BAD


@pytest.fixture(autouse=True)
def two_experiments(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "experiments", lambda: GOOD_AND_BAD)
    monkeypatch.chdir(tmp_path)


def invoked(*arguments, columns="80"):
    return CliRunner(env={"COLUMNS": columns}).invoke(app, ["reproduce", *map(str, arguments)])


def test_without_a_name_all_are_listed():
    result = invoked()
    assert result.exit_code == 0, result.output
    assert [line.split() for line in result.output.splitlines()] == [
        ["good", "Title", "of", "good"],
        ["bad", "Title", "of", "bad"],
    ]


def test_one_experiment_prints_and_writes_what_it_found(tmp_path):
    result = invoked("good", "--seeds", 3, "--first-seed", 5, "--output", tmp_path / "there")
    assert result.exit_code == 0, result.output
    for text in ("Claim.", "Source 2023.", "Set-up.", "The mean was found.", "3.52 to 8.48", "not reached"):
        assert text in result.output
    assert "holds with a change" in result.output
    assert "Other seeds." in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if str(tmp_path) not in line)
    folder = tmp_path / "there" / "good"
    results = json.loads((folder / "results.json").read_text())
    assert results["command"] == "prefloss reproduce good --seeds 3 --first-seed 5"
    assert results["measured"] == 6.0
    assert results["interval"] == pytest.approx([3.516, 8.484], abs=1e-3)
    assert results["verdict"] == "holds with a change"
    assert results["figures"][1]["value"] is None
    assert (results["claim"], results["source"]) == ("Claim.", "Source 2023.")
    with (folder / "results.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["5", "6", "7"]
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_it_takes_its_own_number_of_seeds_and_a_folder_of_its_own(tmp_path):
    assert invoked("good").exit_code == 0
    results = json.loads((tmp_path / "prefloss-runs/evidence/good/results.json").read_text())
    assert results["seeds"] == [0, 1, 2, 3]


def test_one_that_fails_leaves_the_others(tmp_path, monkeypatch):
    # One process less to start.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    stale = tmp_path / "out/bad/results.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    result = invoked("--all", "--output", tmp_path / "out", columns="120")
    assert result.exit_code == 2
    assert "good: holds with a change" in result.output
    assert "ZeroDivisionError: nothing to divide by" in result.output
    assert "Error: 1 of 2 experiments failed: bad" in result.output
    assert (tmp_path / "out/good/results.json").exists()
    assert not stale.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["goood"], "NAME: got 'goood', expected the name of an experiment; did you mean 'good'?"),
        (["good", "--all"], "--all: got it beside the name 'good', expected one of them"),
        (["--seeds", "3"], "got options without an experiment, expected NAME or --all beside them"),
        (["good", "--output", "/dev/null/x"], "--output: /dev/null/x cannot be made: Not a directory"),
        (["good", "--seeds", "1"], "Invalid value for '--seeds'"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message):
    result = invoked(*arguments, columns="1000")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
