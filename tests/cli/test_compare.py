"""`prefloss compare`: the same command goes on after a kill, other settings are refused, mistakes are one line."""

import csv
import json
import os

import pytest
from typer.testing import CliRunner

from prefloss.cli import compare as command
from prefloss.cli.app import app
from prefloss.demo.model import tiny_llama, word_tokenizer

TINY = ["--world", "sparse", "--steps", "3", "--seeds", "2", "--betas", "0.1,1"]
PAIRS = [
    {"prompt": f"say {word} ", "chosen": f"{word} please", "rejected": f"no {word} ever"}
    for word in ("tea", "bread", "salt", "milk", "rice", "soup", "corn", "plum")
]


def run(*arguments):
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})


def rows_in(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_stopped_comparison_goes_on_and_gives_what_an_unstopped_one_gives(tmp_path, one_core, monkeypatch):
    losses = ["dpo", "ipo", "0.8*dpo(beta=0.1) + 0.2*nll"]
    assert run(*losses, *TINY, "--output", tmp_path / "whole").exit_code == 0
    calls, real = [], command.run_sweep

    def stopped(*arguments):
        calls.append(arguments[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(command, "run_sweep", stopped)
    parts = tmp_path / "parts"
    first = run(*losses, *TINY, "--output", parts)
    assert first.exit_code == 130
    assert "Traceback" not in first.output
    assert not (parts / "report.html").exists()
    # A kill in the middle of a line.
    with (parts / "runs.jsonl").open("a") as file:
        file.write('{"loss": "0.8*dpo')
    second = run(*losses, *TINY, "--output", parts)
    assert second.exit_code == 0, second.output
    assert "2 of 3 sweeps are there already" in second.output
    assert calls == [*losses, losses[2]]
    assert rows_in(parts) == rows_in(tmp_path / "whole")
    assert len(rows_in(parts)) == 3 * 2 * 2
    text = (parts / "report.html").read_text()
    assert "prefloss compare dpo ipo" in text
    again = run(*losses, *TINY, "--output", parts)
    assert again.exit_code == 0
    assert len(calls) == 4


def test_other_settings_in_the_same_folder_are_refused(tmp_path, one_core):
    folder = tmp_path / "out"
    assert run("dpo", "hinge", *TINY, "--output", folder).exit_code == 0
    before = (folder / "report.html").read_text()
    for change in (
        ["dpo", "ipo", *TINY],
        ["dpo", "hinge", *TINY[:-1], "0.1,2"],
        ["dpo", "hinge", *TINY, "--world", "clean"],
    ):
        refused = run(*change, "--output", folder)
        assert refused.exit_code == 2, refused.output
        assert "as the run in" in refused.output
    assert (folder / "report.html").read_text() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    refused = run("dpo", "ipo", *TINY, "--output", tmp_path)
    assert refused.exit_code == 2
    assert "holds something else than a comparison" in refused.output
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    assert run("dpo", "kto", *TINY, "--output", tmp_path / "two").exit_code == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert run("dpo", "kto", *TINY, "--output", tmp_path / "one").exit_code == 0
    assert rows_in(tmp_path / "two") == rows_in(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "losses: got none, expected names"),
        (["dpo", "--all"], "--all: got losses by name too (dpo), expected one of them"),
        (["dpoo"], "unknown loss 'dpoo'; did you mean 'dpo'"),
        (["dpo", "dpo(beta=0.1)"], "which are the same, expected one of them"),
        (["dpo", "0.5"], "several strengths are written --betas 0.1,0.5"),
        (["dpo", "flips"], "write --world for each world"),
        (["dpo", "--world", "clear"], "--world: got 'clear', expected one of clean, flips"),
        (["dpo", "--betas", "0.1,x"], "--betas: got 'x', expected numbers > 0"),
        (["dpo", "--betas", "0"], "--betas: got '0', expected numbers > 0"),
        (["dpo", "--betas", "inf"], "--betas: got 'inf', expected numbers > 0"),
        (["dpo", "--seeds", "1"], "--seeds"),
        (["dpo", "--model", "m"], "--model: got no --data to train it on, expected both"),
        (["tis_dpo"], "tis_dpo: needs per_token.weight, which the worlds do not have"),
        (["dpo", "--data", "pairs.jsonl", "--world", "clean"], "--data and --world: got both"),
        (["dpo", "--data", "pairs.jsonl", "--betas", "0.1,1"], "--betas: got 2 with --data, expected one"),
        (["dpo", "ipo", "--data", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "--output", "out")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not os.path.exists("out")


@pytest.fixture
def saved_model(tmp_path):
    tokenizer = word_tokenizer([" ".join(row.values()) for row in PAIRS])
    model = tiny_llama(tokenizer, hidden=16, max_length=64, seed=0)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_own_data_are_compared_without_a_ranking_of_quality(tmp_path, saved_model):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 3))
    folder = tmp_path / "out"
    arguments = [
        "dpo",
        "hinge",
        "--data",
        data,
        "--model",
        saved_model,
        "--steps",
        2,
        "--seeds",
        2,
        "--output",
        folder,
    ]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "This report ranks no quality" in done.output
    rows = rows_in(folder)
    assert [(row["loss"], row["seed"]) for row in rows] == [
        ("dpo", "0"),
        ("dpo", "1"),
        ("hinge", "0"),
        ("hinge", "1"),
    ]
    for row in rows:
        assert row["reward"] == ""
        assert 0 <= float(row["accuracy"]) <= 1
        assert 0.5 <= float(row["confidence"]) <= 1
        assert float(row["length"]) > 0
    assert not (folder / "training").exists()
    again = run(*arguments)
    assert again.exit_code == 0
    assert "run 1 of" not in again.output
