"""Command lines of `prefloss reference` with one thing wrong: one line of error each, code 2, and nothing written."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefloss.cli import processes, reference_table
from prefloss.cli.app import app
from prefloss.data.table import ReferenceTable
from tests import tiny

PAIR = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
IDS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    write("d.jsonl", PAIR, {**PAIR, "prompt": "w5"})
    return tmp_path


def write(name, *rows):
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def invoke(*changes):
    options = {"--model": "model", "--data": "d.jsonl", "--output": "t.parquet"} | dict(
        zip(changes[::2], changes[1::2], strict=True)
    )
    arguments = [
        text for name, value in options.items() if value is not None for text in (name, value) if text
    ]
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["reference", *arguments])


def data(*rows):
    return lambda: write("d.jsonl", *rows)


def weights(change):
    """Change the file of the weights."""

    def made():
        path = Path("model/model.safetensors")
        path.write_bytes(change(path.read_bytes()))

    return made


def pickled(content):
    def made():
        Path("model/model.safetensors").unlink()
        Path("model/pytorch_model.bin").write_bytes(content)

    return made


def config(**values):
    def made():
        path = Path("model/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return made


def file(name, content="x"):
    def made():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)

    return made


# What is prepared, what is given in place of good options, and words of the error.
CASES = [
    # Options.
    (None, ["--dtype", "int8"], "--dtype: got 'int8'"),
    (None, ["--dtype", ""], "--dtype"),
    (None, ["--batch-size", "0"], "--batch-size"),
    (None, ["--batch-size", "-1"], "--batch-size"),
    (None, ["--batch-size", "two"], "--batch-size"),
    (None, ["--max-length", "1"], "--max-length"),
    (None, ["--max-length", "-3"], "--max-length"),
    (None, ["--max-length", "8.5"], "--max-length"),
    (None, ["--model", None], "--model"),
    (None, ["--data", None], "--data"),
    (None, ["--output", None], "--output"),
    (None, ["--nonsense", "1"], "--nonsense"),
    # Output.
    (None, ["--output", "t.csv"], "--output: got t.csv, expected a name that ends in .parquet"),
    (None, ["--output", "model"], "--output: model is a folder"),
    (
        None,
        ["--output", "d.jsonl/t.parquet"],
        "d.jsonl/t.parquet: cannot be written: d.jsonl/t.parquet.parts: Not a dir",
    ),
    (None, ["--output", "/proc/t.parquet"], "/proc/t.parquet: cannot be written"),
    (None, ["--output", "/proc/1/x/t.parquet"], "cannot be written"),
    (None, ["--output", "/dev/null/t.parquet"], "Not a directory"),
    (None, ["--output", "x" * 300 + ".parquet"], "File name too long"),
    (file("t.parquet.parts"), [], "t.parquet: cannot be written: t.parquet.parts: File exists"),
    (lambda: os.symlink("/proc/nowhere", "t.parquet.parts"), [], "t.parquet: cannot be written"),
    (file("t.parquet"), [], "t.parquet: not a readable Parquet file"),
    (lambda: shutil.copy("d.jsonl", "t.parquet"), [], "t.parquet: not a readable Parquet file"),
    # Data.
    (None, ["--data", "absent.jsonl"], "absent.jsonl: no such file or folder"),
    (None, ["--data", "model"], "model: "),
    (file("d.csv"), ["--data", "d.csv"], "the ending '.csv'"),
    (data(), [], "d.jsonl: no rows"),
    (data({**PAIR, "chosen": ""}), [], "d.jsonl: no row is left"),
    (data(PAIR, {**PAIR, "chosen": 3}), [], "d.jsonl:2: column 'chosen': got 3"),
    (data(PAIR, "nonsense"), [], "d.jsonl:2:1: bad JSON"),
    (data({**PAIR, "weight": "0.5"}, PAIR), [], "d.jsonl:1: column 'weight': got '0.5'"),
    (
        data('{"prompt": "w1", "chosen": "a", "rejected": "b", "weight": 1' + "0" * 400 + "}"),
        [],
        "column 'weight'",
    ),
    (
        data(IDS, {**IDS, "chosen_ids": ["a"]}),
        [],
        "d.jsonl:2: column 'chosen_ids': got ['a'], expected a list of token",
    ),
    (
        data(IDS, {**IDS, "prompt_ids": [2**70]}),
        [],
        "d.jsonl:2: column 'prompt_ids': got [1180591620717411303424]",
    ),
    (data(IDS, {**IDS, "rejected_ids": [-1]}), [], "d.jsonl:2: column 'rejected_ids': got [-1]"),
    (data(IDS, {**IDS, "rejected_ids": []}), [], "d.jsonl:2: column 'rejected_ids': got an empty completion"),
    (data(IDS, {"prompt_ids": [1], "chosen_ids": [3]}), [], "d.jsonl:2: missing column 'rejected_ids'"),
    (data(IDS, PAIR), [], "d.jsonl:2: missing column 'prompt_ids', which line 1 has"),
    (data({**IDS, "chosen_ids": [2**31 - 1]}), [], "--data: holds the token id 2147483647"),
    (data({**IDS, "chosen_ids": [3] * 99}), [], "--max-length: a row has 101 tokens"),
    (file("d.parquet"), ["--data", "d.parquet"], "d.parquet: not a readable Parquet file"),
    (lambda: os.mkfifo("p.jsonl"), ["--data", "p.jsonl"], "p.jsonl: got a pipe or device"),
    # Model.
    (None, ["--model", "./absent"], "--model: no such folder: ./absent"),
    (lambda: Path("empty").mkdir(), ["--model", "empty"], "--model: empty cannot be loaded"),
    (weights(lambda raw: raw[:-100]), [], "--model: model cannot be loaded"),
    (weights(lambda raw: b""), [], "--model: model cannot be loaded"),
    (weights(lambda raw: b"\xff" * 8 + raw[8:]), [], "--model: model cannot be loaded"),
    (weights(lambda raw: raw[:20] + b"!!" + raw[22:]), [], "--model: model cannot be loaded"),
    (
        weights(lambda raw: raw.replace(b"model.norm.weight", b"model.morn.weight")),
        [],
        "--model: model lacks the weights of 1",
    ),
    (pickled(b"no pickle"), [], "--model: model cannot be loaded"),
    (pickled(pickle.dumps({"a": os.system})), [], "--model: model cannot be loaded"),
    (file("model/config.json", "{"), [], "--model: model cannot be loaded"),
    (file("model/config.json", "[]"), [], "--model: model cannot be loaded"),
    (config(model_type="nonsense"), [], "--model: model cannot be loaded"),
    (config(hidden_size=48), [], "--model: model "),
    (config(num_hidden_layers=9), [], "--model: model lacks the weights of "),
    (file("model/tokenizer.json", "{"), [], "--model: model has no tokenizer that can be loaded"),
    (None, ["--tokenizer", "./absent"], "--tokenizer: ./absent has no tokenizer"),
    (None, ["--adapter", "./absent"], "--adapter: ./absent cannot be loaded"),
    (
        file("adapter/adapter_config.json", "{"),
        ["--adapter", "adapter"],
        "--adapter: adapter cannot be loaded",
    ),
    (file("adapter/adapter_config.json", "{}"), ["--model", "adapter"], "--model: adapter is an adapter"),
]


@pytest.mark.parametrize(("prepare", "changes", "words"), CASES)
def test_it_is_refused_in_one_line(prepare, changes, words):
    """AUDIT, tracebacks in place of one error."""
    if prepare:
        prepare()
    before = sorted(map(str, Path().rglob("*")))
    result = invoke(*changes)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    # typer's own errors are boxes.
    errors = re.findall(r"^(?:Error: |│ )(.*)", result.output, re.M)
    assert len(errors) == 1
    assert words in errors[0]
    assert sorted(map(str, Path().rglob("*"))) == before


def test_a_full_disk_keeps_what_was_scored(monkeypatch):
    write("d.jsonl", *({**PAIR, "prompt": f"w{i}"} for i in range(20)))
    monkeypatch.setattr("prefloss.training.build_table.CHUNK", 4)
    write_part, parts = reference_table.ReferenceBuilder._part, []

    def full(self, place, rows):
        if len(parts) == 2:
            raise OSError(28, "No space left on device")
        parts.append(write_part(self, place, rows))
        return parts[-1]

    real = reference_table.ReferenceBuilder.__init__
    monkeypatch.setattr(
        reference_table.ReferenceBuilder, "__init__", lambda self, *a, **k: real(self, *a, **k, chunk=4)
    )
    monkeypatch.setattr(reference_table.ReferenceBuilder, "_part", full)
    result = invoke()
    assert result.exit_code == 2
    assert (
        "Error: --output: t.parquet cannot be written to: No space left on device; scored rows are kept"
        in result.output
    )
    assert len(list(Path("t.parquet.parts").glob("*.parquet"))) == 2
    monkeypatch.setattr(reference_table.ReferenceBuilder, "_part", write_part)
    again = invoke()
    assert "24 of them scored in this run" in again.output


def test_no_room_is_noticed_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 300))
    result = invoke("--model", "model")
    assert result.exit_code == 2
    assert "has 0 MiB free, and the table needs about" in result.output
    assert not Path("t.parquet.parts").exists()


def test_overwrite_keeps_the_old_table_when_it_fails():
    """AUDIT M1."""
    assert invoke().exit_code == 0
    before = Path("t.parquet").read_bytes()
    write("d.jsonl", PAIR, "nonsense")
    assert invoke("--overwrite", "").exit_code == 2
    assert Path("t.parquet").read_bytes() == before
    assert len(ReferenceTable.read("t.parquet")) == 4


def test_a_process_that_never_starts_is_waited_for_some_minutes(monkeypatch):
    """AUDIT L6: the others waited for 30 days."""
    assert timedelta(minutes=1) <= processes.MEETING <= timedelta(minutes=15)
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, value)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("waits for ever"))
    signal.alarm(60)
    result = invoke()
    signal.alarm(0)
    assert result.exit_code == 2
    assert "Error: WORLD_SIZE: got 2, but the processes cannot meet: " in result.output
