"""Command lines that are refused: exit code 2, one error that names the option, no traceback, nothing written."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefloss.cli.app import app

PAIRS = [{"prompt": "p", "chosen": "good", "rejected": "bad"}] * 3

# Words of the command line after `train`, and what the error names.
TRAIN = [
    *((["--seed", value], "--seed") for value in ("-1", "4294967296", str(2**70), "x", "1.5", "nan", "")),
    *(
        (["--learning-rate", value], "--learning-rate")
        for value in ("0", "-1", "inf", "-inf", "nan", "1e999", "fast", "")
    ),
    *((["--epochs", value], "--epochs") for value in ("0", "-2", "inf", "nan", "1e300", "two")),
    *((["--eval-fraction", value], "--eval-fraction") for value in ("-0.1", "1", "nan", "inf", "half")),
    *((["--save-minutes", value], "--save-minutes") for value in ("0", "-1", "inf", "nan")),
    *((["--steps", value], "--steps") for value in ("0", "-5", "1e3", str(10**30), "many")),
    *((["--save-steps", value], "--save-steps") for value in ("0", "-1", str(10**30))),
    *((["--keep", value], "--keep") for value in ("0", "-1", "all")),
    *((["--batch-size", value], "--batch-size") for value in ("0", "-8", str(10**30))),
    *((["--accumulate", value], "--accumulate") for value in ("0", str(10**30))),
    *((["--max-length", value], "--max-length") for value in ("0", "1", str(10**30))),
    *((["--samples", value], "--samples") for value in ("-1", str(10**12))),
    *((["--warm-start", value], "--warm-start") for value in ("-1", str(10**30))),
    *((["--lora-rank", value], "--lora-rank") for value in ("0", str(10**9))),
    (["--steps", "3", "--epochs", "1"], "--steps and --epochs"),
    (["--save-steps", "3", "--save-minutes", "1"], "--save-steps and --save-minutes"),
    (["--output", "new", "--resume", "--overwrite"], "--resume and --overwrite"),
    (["--resume"], "--resume"),
    (["--output", "full", "--resume"], "--resume"),
    (["--output", "full"], "--output"),
    (["--output", "file"], "--output"),
    (["--output", "file/below"], "--output"),
    (["--output", "file/below", "--overwrite"], "--output"),
    (["--output", "/proc/prefloss"], "--output"),
    (["--output", "/sys/prefloss"], "--output"),
    (["--output", "/dev/full"], "--output"),
    (["--output", "x" * 300], "--output"),
    (["--output", "a\0b"], "--output"),
    (["--lora"], "--lora"),
    (["--model", "./nowhere"], "--model"),
    (["--model", "full"], "--model"),
    (["--model", "cut"], "--model"),
    (["--model", "noise"], "--model"),
    (["--model", "pickled"], "--model"),
    (["--model", "no-json"], "--model"),
    (["--model", "a\0b"], "--model"),
    (["--model", ""], "--model"),
    (["--data", "nothing.jsonl"], "nothing.jsonl"),
    (["--data", "file"], "file"),
    (["--data", "pairs.jsonl", "--output", "full"], "--output"),
    (["--loss", "dpoo"], "dpoo"),
    (["--loss", ""], "unknown loss"),
    (["--loss", "dpo("], "dpo("),
    (["--loss", "dpo(beta=nan)"], "beta"),
    (["--loss", "dpo_pl"], "dpo_pl"),
    (["--loss", "dro"], "dro"),
    (["--loss", "xpo"], "xpo"),
    (["--loss", "kto", "--batch-size", "1"], "--batch-size"),
    (["--param", "beta"], "--param"),
    (["--param", ""], "--param"),
    (["--param", "=1"], "--param"),
    (["--param", "beta=inf"], "beta"),
    (["--param", "beta=0"], "beta"),
    (["--param", "tau=1"], "tau"),
    (["--param", "beta=0.1", "--param", "beta=0.2"], "--param"),
    (["--bf16", "--no-such"], "--no-such"),
    (["spare"], "spare"),
]

LOSSES = [
    (["nothing"], "nothing"),
    ([""], "unknown loss"),
    (["dpo", "ipo"], "ipo"),
    (["--all"], "--all"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder with a file, a full folder, models that are none, and nothing else afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("file").write_text("x")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("full").mkdir()
    Path("full/precious").write_text("x")
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    for name, weights, content in (
        ("cut", "model.safetensors", b"\x40\0\0\0\0\0\0\0{"),
        ("noise", "model.safetensors", bytes(range(256))),
        ("pickled", "pytorch_model.bin", b"cos\nsystem\n(S'true'\ntR."),
        ("no-json", "model.safetensors", b""),
    ):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{" if name == "no-json" else json.dumps(config))
        Path(name, weights).write_bytes(content)
    before = _content()
    yield
    assert _content() == before


def _content():
    return sorted(
        os.path.join(root, name) for root, folders, files in os.walk(".") for name in [*folders, *files]
    )


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        *(("train", words, named) for words, named in TRAIN),
        *(("losses", words, named) for words, named in LOSSES),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else str(value),
)
def test_refused(command, words, named):
    """AUDIT: tracebacks in place of one error."""
    result = CliRunner(env={"COLUMNS": "1000", "TERM": "dumb"}).invoke(app, [command, *words])
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    # prefloss's own line, or typer's in a box.
    (line,) = [line for line in result.output.splitlines() if re.match(r"Error: |[│|] ", line)]
    assert named in line
