"""`prefloss train` end to end, with very few steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefloss.cli import task
from prefloss.cli.app import app

SHORT = ["--steps", "2", "--warm-start", "2", "--samples", "4", "--cpu"]
USER = {"role": "user", "content": "Hello?"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # A smaller world, which is tokenised sooner.
    for name, size in (("ROWS", 300), ("HELD_OUT", 40), ("SPOKEN", 300)):
        monkeypatch.setattr(task, name, size)


def train(*arguments, options=SHORT):
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["train", *options, *map(str, arguments)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def metrics(folder="out"):
    return json.loads(Path(folder, "metrics.json").read_text())


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_without_arguments_a_complete_example():
    shown = train()
    folder = Path("prefloss-runs/dpo-1")
    assert {path.name for path in folder.iterdir()} >= {
        "metrics.json",
        "curves.png",
        "config.json",
        "tokenizer.json",
    }
    found = metrics(folder)
    assert [m["step"] for m in found["measurements"]] == [0, 1, 2]
    assert (found["before"]["kl"], found["before"]["chosen"], found["before"]["accuracy"]) == (0.0, 0.0, 0.5)
    assert found["after"]["kl"] != 0.0
    assert found["loss_parameters"] == {"beta": 0.1}
    assert len(found["training_loss"]) == 2
    # Before the first step the margin is 0, so DPO's loss is ln 2.
    assert found["training_loss"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "the generated world, seed 0: 300 judged pairs" in shown
    model, tokenizer = load(folder)
    assert model.config.vocab_size == len(tokenizer)
    # A second run takes the next number; the same seed gives the same numbers.
    train()
    assert metrics("prefloss-runs/dpo-2")["after"] == found["after"]


def test_votes_with_kto_and_hyperparameters():
    rows = [{"prompt": f"Say {i}.\n", "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(12)]
    shown = train(
        "--loss", "kto", "--param", "beta=0.2", "--data", write("votes.jsonl", rows), "--output", "out"
    )
    assert "votes.jsonl: 12 labelled rows (prompt, completion, label), plain text" in shown
    assert "byte-level BPE trained on the data's text" in shown
    assert "supervised, on the preferred completions: 2 steps" in shown
    assert metrics()["loss_parameters"]["beta"] == 0.2
    assert metrics()["before"]["reward"] is None


def test_conversations_with_a_sum_of_losses_and_weights():
    rows = [
        {
            "prompt": [{**USER, "content": f"Hello {i}?"}],
            "chosen": [{"role": "assistant", "content": "Good day."}],
            "rejected": [{"role": "assistant", "content": "Go."}],
            "weight": 0.5,
        }
        for i in range(8)
    ]
    shown = train("--loss", "0.5*dpo + 0.5*ipo(tau=0.2)", "--data", write("chat.jsonl", rows))
    assert "chat.jsonl: 8 paired rows (prompt, chosen, rejected), conversational" in shown
    assert "reads also: weight" in shown
    assert Path("prefloss-runs/0.5_dpo_0.5_ipo-1/curves.png").exists()


def test_a_trained_model_can_be_trained_on_and_with_lora():
    train("--output", "first")
    shown = train("--model", "first", "--loss", "hinge", "--lora", "--lora-rank", "2", "--output", "out")
    assert "its own weights" in shown
    assert Path("out/adapter_config.json").exists()
    assert metrics()["lora_rank"] == 2
    assert (metrics()["before"]["kl"], metrics()["before"]["chosen"]) == (0.0, 0.0)


def test_a_configuration_alone_gives_random_weights_and_a_tokenizer():
    config = {
        "model_type": "llama",
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"Say {i}.", "chosen": "Yes, gladly.", "rejected": "No."} for i in range(8)]
    shown = train("--model", "config", "--data", write("pairs.jsonl", rows), "--output", "out")
    assert "random weights, for the folder holds a configuration only" in shown
    assert "no tokenizer there: trained a byte-level BPE" in shown
    assert "--max-length 512 cut to the 128 positions of the model" in shown
    assert load("out")[0].config.vocab_size == 400


def test_overwriting_replaces_the_weights_of_another_model(tmp_path):
    Path("out").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "mine.txt"):
        Path("out", name).write_text("{}")
    train("--output", "out", "--overwrite")
    assert {path.name for path in Path("out").glob("*safetensors*")} == {"model.safetensors"}
    assert Path("out/mine.txt").exists()
    load("out")


def test_prompts_that_fill_the_length_are_an_error():
    rows = [{"prompt": "a long prompt, all of it", "chosen": "Yes", "rejected": "No"}]
    result = CliRunner().invoke(
        app, ["train", *SHORT, "--max-length", "2", "--data", write("x.jsonl", rows), "--output", "out"]
    )
    assert result.exit_code == 2
    assert "--max-length: all 1 rows have a prompt that alone fills 2 tokens" in result.output
    assert not Path("out").exists()


def test_version_and_help_load_nothing_slow():
    code = """
import sys
from prefloss.cli import task
from prefloss.cli.app import app
app(["--version"], standalone_mode=False)
print(*sorted({"transformers", "trl", "datasets", "matplotlib", "pyarrow"} & set(sys.modules)), sep=",")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    version, loaded = done.stdout.splitlines()
    assert version.startswith("prefloss ")
    assert loaded == ""


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_says_how_to_install_it(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from prefloss.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"{missing}, which is not installed: pip install 'prefloss[cli]'")


def test_bfloat16_does_not_pass_for_learning():
    # Policy and reference round alike, so before the first step they agree.
    shown = train("--bf16", "--output", "out")
    assert "on cpu in bfloat16" in shown
    assert (metrics()["before"]["kl"], metrics()["before"]["chosen"]) == (0.0, 0.0)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_batches_by_tokens(loss):
    options = ["--epochs", "1", "--warm-start", "2", "--samples", "4", "--cpu", "--max-tokens", "2000"]
    shown = train("--loss", loss, "--output", "out", options=options)
    assert "epochs of at most 2000 tokens" in shown
    found = metrics()
    assert (found["max_tokens"], found["batch_size"]) == (2000, None)
    # 300 rows of some twenty tokens: fewer steps than with 16 rows each.
    assert found["steps"] == len(found["training_loss"]) < 300 / 16
    message = (
        r"Error: --max-tokens: of the rows to train on, row \d+: got .* tokens, expected at most max_tokens=5"
    )
    refused = CliRunner(env={"COLUMNS": "400"}).invoke(
        app, ["train", "--loss", loss, *options[:-1], "5", "--warm-start", "0"]
    )
    assert refused.exit_code == 2
    assert re.search(message, refused.output)
