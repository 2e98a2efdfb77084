"""`prefloss train` in two processes, started as torchrun starts them: they train as one."""

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner

from prefloss.cli.app import app

FORK = multiprocessing.get_context("fork")
OPTIONS = (
    *("train", "--cpu", "--data", "pairs.jsonl", "--eval-fraction", "0.2"),
    *("--steps", "2", "--warm-start", "1", "--samples", "2", "--save-steps", "1"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"prompt": f"Say {i}.\n", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def one(arguments, rank, processes, port):
    """In a process of its own: what torchrun starts."""
    if processes > 1:
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(
            {k: str(v) for k, v in {"RANK": rank, "WORLD_SIZE": processes, **local, **where}.items()}
        )
    # What an earlier training in this process left.
    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, [*OPTIONS, *arguments])
    Path(f"shown-{rank}").write_text(f"{result.output}\n{result.exception!r}")
    os._exit(result.exit_code)


def train(*arguments, processes=1, code=0):
    """What each process showed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [FORK.Process(target=one, args=(arguments, rank, processes, port)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    shown = [Path(f"shown-{rank}").read_text() for rank in range(processes)]
    assert [process.exitcode for process in started] == [code] * processes, shown
    return shown


def weights(folder):
    return torch.cat(
        [value.flatten() for _, value in sorted(load_file(f"{folder}/model.safetensors").items())]
    )


def numbers(folder):
    return json.loads(Path(folder, "metrics.json").read_text())["measurements"]


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on():
    train("--batch-size", "4", "--output", "one")
    two = ("--batch-size", "2", "--output", "two", "--keep", "9")
    shown = train(*two, processes=2)
    assert "20 paired rows" in shown[0]
    assert "20 paired rows" not in shown[1]
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(numbers("two"), numbers("one"), strict=True):
        assert ours["chosen"] == pytest.approx(theirs["chosen"], abs=1e-3)
    # As a kill after the first step leaves it.
    wanted = weights("two")
    record = json.loads(Path("two/run.json").read_text())
    Path("two/run.json").write_text(json.dumps({**record, "finished": False}))
    shutil.rmtree("two/checkpoint-2")
    Path("two/model.safetensors").unlink()
    train(*two, "--resume", processes=2)
    assert torch.equal(weights("two"), wanted)
    assert "Error: processes: got 1, expected 2" in train(*two, "--resume", code=2)[0]


def test_a_fault_ends_all_processes_and_is_said_once():
    Path("out").mkdir()
    Path("out/precious").touch()
    shown = train("--output", "out", processes=2, code=2)
    assert sorted("Error: --output: out exists and is not empty" in text for text in shown) == [False, True]
    assert [path.name for path in Path("out").iterdir()] == ["precious"]
