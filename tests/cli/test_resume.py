"""`prefloss train --resume`: a run that was killed or stopped ends as one that was not."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from prefloss.cli import task, training_run
from prefloss.cli.app import app
from prefloss.demo.measure import Meter
from prefloss.demo.warm_start import WarmStart

FORK = multiprocessing.get_context("fork")
SHORT = ("--steps", "3", "--warm-start", "3", "--samples", "4", "--save-steps", "1", "--cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # A smaller world, which is tokenised sooner.
    for name, size in (("ROWS", 40), ("HELD_OUT", 8), ("SPOKEN", 40)):
        monkeypatch.setattr(task, name, size)
    # Its picture is compared once, and takes longer than the rest.
    monkeypatch.setattr(
        training_run, "write_picture", lambda result, path: path.write_text(str(result.losses))
    )


def train(*arguments, output="out", options=SHORT, code=0):
    arguments = ["train", *options, *map(str, arguments), "--output", str(output)]
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, arguments)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result.output


def result_of(output="out"):
    """All files of the finished run that do not hold times."""
    files = {path.name: path.read_bytes() for path in Path(output).iterdir() if path.is_file()}
    metrics = json.loads(files.pop("metrics.json"))
    return {**files, "run.json": None, "metrics": {**metrics, "seconds": None}}


def in_a_process(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def killed_at(moment, arguments, output, count):
    """Train, and be killed at the n-th step, measurement or change of the file system; count these moments."""

    def then(function):
        def wrapped(*args, **kwargs):
            if count.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count.value += 1
            return function(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "rename", "rmdir"):
        mock.patch(f"os.{name}", then(getattr(os, name))).start()
    mock.patch.object(WarmStart, "_step", then(WarmStart._step)).start()
    mock.patch.object(Meter, "__call__", then(Meter.__call__)).start()
    mock.patch.object(torch.optim.AdamW, "step", then(torch.optim.AdamW.step)).start()
    train(*arguments, output=output)


def survived(arguments, moments):
    """Kill a run at these shares of its way; each ends as the whole one. Returns the number of moments there were."""
    count = FORK.Value("i", 0)
    assert in_a_process(killed_at, -1, arguments, "whole", count) == 0
    wanted, total = result_of("whole"), count.value
    for share in moments:
        moment, count.value = int(share * total), 0
        assert in_a_process(killed_at, moment, arguments, f"at-{moment}", count) == -signal.SIGKILL
        train(*arguments, "--resume", output=f"at-{moment}")
        assert result_of(f"at-{moment}") == wanted, moment
    return total


@pytest.mark.slow
def test_killed_on_the_way_it_ends_the_same():
    """AUDIT M4."""
    assert survived((), (0.05, 0.2, 0.45, 0.7, 0.96)) > 80


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--loss", "kto(kl_baseline=running_mean)"),
        ("--loss", "bco", "--accumulate", "2"),
        ("--loss", "0.5*dpo + 0.5*ipo", "--steps", "9", "--batch-size", "8"),
    ],
    ids=["state", "accumulation", "epochs"],
)
def test_killed_on_the_way_it_ends_the_same_with(arguments):
    survived(arguments, (0.6, 0.85))


@pytest.mark.slow
def test_killed_on_the_way_an_adapter_ends_the_same():
    """AUDIT M4."""
    train(output="first")
    survived(("--model", "first", "--lora", "--lora-rank", "2", "--learning-rate", "1e-3"), (0.6,))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number):
    """AUDIT M4."""
    train(output="whole")
    step = WarmStart._step

    def interrupted(self):
        os.kill(os.getpid(), number)
        return step(self)

    with mock.patch.object(WarmStart, "_step", interrupted):
        shown = train("--save-minutes", "9", options=SHORT[:-3], code=128 + number)
    command = "prefloss train --output out --steps 3 --samples 4 --warm-start 3 --resume --save-minutes 9.0"
    assert (
        f"Stopped: after step 1 of 3 of the warm-up; kept in out/warm-up.pt; go on with: {command}" in shown
    )
    step = torch.optim.AdamW.step

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", stopped):
        shown = train("--save-minutes", "9", "--resume", options=SHORT[:-3], code=128 + number)
    assert "after step 2 of 3 of the warm-up" in shown
    train("--save-minutes", "9", "--resume", options=SHORT[:-3])
    assert result_of() == result_of("whole")
    assert "is finished; there is nothing to go on with" in train("--resume", options=SHORT[:-3])


def test_a_training_that_is_stopped_keeps_its_last_step():
    """AUDIT M4."""
    train(output="whole")
    measured = Meter.__call__

    def stopped(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(self, step)

    with mock.patch.object(Meter, "__call__", stopped):
        shown = train(code=143)
    assert "Stopped: after step 2 of 3; kept in out/checkpoint-2; go on with: prefloss train" in shown
    train("--resume")
    assert result_of() == result_of("whole")


def test_a_second_ctrl_c_quits_at_once():
    def twice(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(Meter, "__call__", twice):
        assert "Stopped: at once" in train(code=130)
    train("--resume")


def test_resuming_with_other_options_names_them():
    train()
    assert "Error: --seed: got 1, expected 0, as the run in out" in train("--resume", "--seed", "1", code=2)
    assert "Error: --loss: got ipo" in train("--resume", "--loss", "ipo", code=2)
    assert "Error: --output: out holds a run, finished; add --resume" in train(code=2)


def test_other_data_are_named():
    rows = [{"prompt": f"Say {i}.\n", "chosen": "Yes, gladly.", "rejected": "No."} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("--data", "pairs.jsonl")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert "Error: content of --data: got " in train("--data", "pairs.jsonl", "--resume", code=2)


def test_nothing_to_go_on_with_begins_the_run():
    train("--resume")
    assert result_of()["metrics"]["steps"] == 3


def test_old_checkpoints_are_removed():
    train("--keep", "1")
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert Path("out/warm-start/model.safetensors").exists()
    assert not Path("out/warm-up.pt").exists()


def test_a_disk_that_fills_up_leaves_what_was_kept():
    """AUDIT M3, M4."""
    train(output="whole")
    saved = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return saved(value, path, *args, **kwargs)

    with mock.patch("torch.save", full):
        shown = train(code=2)
    assert (
        "Error: --output: out cannot be written to: No space left on device; kept in out/checkpoint-1"
        in shown
    )
    train("--resume")
    assert result_of() == result_of("whole")


def test_a_disk_that_is_full_at_the_end_keeps_the_training():
    """AUDIT M4."""
    train(output="whole")
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(training_run, "write_metrics", full):
        assert "kept in out/checkpoint-3; go on with: prefloss train" in train(code=2)
    train("--resume")
    assert result_of() == result_of("whole")


def test_a_training_that_diverges_keeps_what_was_good():
    """AUDIT: a run that diverges to NaN."""
    shown = train("--learning-rate", "1e30", "--save-minutes", "9", options=SHORT[:-3], code=2)
    assert "Error: the training diverged: " in shown
    assert "with a lower --learning-rate, or from what was kept: --model out/" in shown
    weights = torch.cat([value.flatten() for value in load(Path("out")).values()])
    assert torch.isfinite(weights).all()


def test_a_model_that_has_diverged_already_is_refused():
    """AUDIT: a run that diverges to NaN dies when sampling."""
    from safetensors.torch import load_file, save_file

    train(output="first")
    broken = {name: value * float("nan") for name, value in load_file("first/model.safetensors").items()}
    save_file(broken, "first/model.safetensors", {"format": "pt"})
    assert "Error: --model: first has weights that are NaN or infinite" in train("--model", "first", code=2)
    assert not Path("out").exists()


def load(folder):
    from safetensors.torch import load_file

    last = max(folder.glob("checkpoint-*"), default=folder / "warm-start")
    return load_file(last / "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_checkpoint_is_one_error(name):
    train(options=(*SHORT, "--keep", "9"))
    record = json.loads(Path("out/run.json").read_text())
    Path("out/run.json").write_text(json.dumps({**record, "finished": False}))
    os.rename("out/checkpoint-3", "elsewhere")
    Path("out/checkpoint-2", name).write_bytes(b"damaged")
    assert "Error: --resume: out/checkpoint-2 cannot be loaded: " in train("--resume", code=2)
