"""`prefloss train` under torchrun: two processes train as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--steps",
    "3",
    "--warm-start",
    "2",
    "--samples",
    "4",
    "--save-steps",
    "1",
    "--eval-fraction",
    "0.2",
)


def train(folder, *arguments, processes=1):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else ()), "prefloss.cli", "train", "--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *OPTIONS, "--data", "pairs.jsonl", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def weights(folder):
    return torch.cat(
        [value.flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())]
    )


def numbers(folder):
    return json.loads((folder / "metrics.json").read_text())["measurements"]


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"Say {i}.\n", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on(data):
    done = train(data, "--batch-size", "4", "--output", "one")
    assert done.returncode == 0, done.stderr
    two = ("--batch-size", "2", "--output", "two", "--keep", "9")
    done = train(data, *two, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 paired rows") == 1
    torch.testing.assert_close(weights(data / "two"), weights(data / "one"), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(numbers(data / "two"), numbers(data / "one"), strict=True):
        assert ours["chosen"] == pytest.approx(theirs["chosen"], abs=1e-3)
    # As a kill after the second step leaves it.
    wanted = weights(data / "two")
    record = json.loads((data / "two/run.json").read_text())
    (data / "two/run.json").write_text(json.dumps({**record, "finished": False}))
    shutil.rmtree(data / "two/checkpoint-3")
    (data / "two/model.safetensors").unlink()
    done = train(data, *two, "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    assert torch.equal(weights(data / "two"), wanted)


@pytest.mark.slow
def test_a_fault_ends_all_processes_and_is_said_once(data):
    (data / "out").mkdir()
    (data / "out/precious").write_text("x")
    done = train(data, "--output", "out", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("Error: --output: out exists and is not empty") == 1
