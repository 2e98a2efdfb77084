"""What `prefloss train` refuses: exit code 2, one paragraph, no traceback, nothing written."""

import json
import os

import pytest
from typer.testing import CliRunner

import prefloss
from prefloss.cli.app import app
from prefloss.demo.model import tiny_llama, word_tokenizer

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
LABELLED = {"prompt": "p", "completion": "good", "label": True}


def refused(*arguments):
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return next(line for line in result.output.splitlines() if line.startswith("Error: "))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs write to the working directory if nothing else is asked."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not os.path.exists("prefloss-runs") or not os.listdir("prefloss-runs")


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def labelled(tmp_path):
    (tmp_path / "votes.jsonl").write_text(json.dumps(LABELLED) + "\n")
    return tmp_path / "votes.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "dpoo"], "unknown loss 'dpoo'; did you mean 'dpo'"),
        (["--param", "tau=1"], "dpo: unknown hyperparameter 'tau'"),
        (["--param", "beta=-1"], "dpo: beta: got -1, expected a number > 0"),
        (["--loss", "ipo", "--param", "tau=big"], "ipo: tau: got 'big', expected a number > 0"),
        (["--param", "beta"], "--param: got 'beta', expected NAME=VALUE, as tau=0.1"),
        (["--param", "beta=0.1", "--param", "beta=0.2"], "--param: got beta twice, expected it once"),
        (
            ["--loss", "dpo(beta=0.1)", "--param", "beta=0.2"],
            "dpo(beta=0.1): beta: got it both in the name and as",
        ),
        (["--loss", "dpo_pl"], "dpo_pl takes Rankings, and TRL has no trainer for ranked groups"),
        (["--loss", "dro"], "dro needs the value of each prompt"),
        (["--steps", "3", "--epochs", "1"], "--steps and --epochs: got both, expected one of them"),
        (
            ["--batch-size", "3", "--max-tokens", "9"],
            "--batch-size and --max-tokens: got both, expected one of them",
        ),
        (
            ["--max-tokens", "99", "--accumulate", "2"],
            "--accumulate: got 2 with --max-tokens, expected 1: TRL's",
        ),
        (["--epochs", "0"], "--epochs: got 0.0, expected a number > 0"),
        (["--learning-rate", "0"], "--learning-rate: got 0.0, expected a number > 0"),
        (["--eval-fraction", "1"], "--eval-fraction: got 1.0, expected a number >= 0 and < 1"),
        (["--lora"], "--lora: got no --model to adapt, expected one"),
        (["--data", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
        (["--model", "./nowhere"], "--model: no such folder: ./nowhere"),
        (
            ["--loss", "kto", "--batch-size", "1"],
            "--batch-size: got 1, expected at least 2, because kto estimates its KL baseline from mismatched rows",
        ),
        (["--loss", "xpo"], "xpo: needs gold, which DPOTrainer does not compute"),
    ],
)
def test_refused(arguments, message):
    assert refused(*arguments).startswith(f"Error: {message}")


def test_the_registrys_words_are_shown_unchanged():
    with pytest.raises(TypeError) as caught:
        prefloss.get("ipo", tua=1)
    assert refused("--loss", "ipo", "--param", "tua=1") == f"Error: {caught.value}"


def test_a_pair_loss_refuses_votes_and_names_both(labelled):
    message = refused("--loss", "ipo", "--data", labelled)
    assert (
        "ipo compares two completions, but votes.jsonl holds labelled (prompt, completion, label) rows"
        in message
    )
    assert "losses that learn from labels: kto" in message


def test_a_malformed_file_is_named_with_line_and_column(pairs):
    pairs.write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "chosen": 3}) + "\n")
    expected = f"Error: {pairs}:2: column 'chosen': got 3, expected a string or a list of messages"
    assert refused("--data", pairs) == expected


def test_a_loss_that_reads_scores_refuses_data_without(pairs):
    message = refused("--loss", "rebel", "--data", pairs)
    assert "rebel needs graded feedback: numbers in the columns score_chosen and score_rejected" in message
    assert "pairs.jsonl has none" in message


def test_a_full_output_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert (
        refused("--output", "out")
        == "Error: --output: out exists and is not empty; choose another folder, or add --overwrite"
    )
    (tmp_path / "file").write_text("x")
    assert refused("--output", "file") == "Error: --output: file is a file; expected a folder"
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_model_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is a folder without config.json" in refused("--model", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "is an adapter; merge it into its model first" in refused("--model", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "nonsense"}')
    assert "cannot be loaded" in refused("--model", tmp_path / "empty")


def test_a_model_without_all_its_weights_is_refused(tmp_path):
    """AUDIT: cut safetensors; transformers would draw what is missing at random."""
    from safetensors.torch import load_file, save_file

    tokenizer = word_tokenizer(["a b c"])
    tiny_llama(tokenizer, hidden=16, layers=1, heads=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file(dict(list(weights.items())[2:]), tmp_path / "model/model.safetensors", {"format": "pt"})
    message = refused("--model", tmp_path / "model")
    assert f"--model: {tmp_path / 'model'} lacks the weights of 2 parameters" in message
    assert "lm_head.weight" in message


def test_processes_that_cannot_meet_are_one_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused().startswith("Error: WORLD_SIZE: got 2, but the processes cannot meet: ")
