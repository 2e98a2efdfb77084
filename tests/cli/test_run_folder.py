"""The folder of a run: one process at a time, and whole however a process ends."""

import json
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from prefloss.cli.console import CliError
from prefloss.cli.run_folder import taken
from tests.kills import killing_at, wrap_changes

FORK = multiprocessing.get_context("fork")
SETTINGS = {"--seed": 0}


def write(folder, name, **files):
    made = folder.unfinished / name
    made.mkdir()
    for file, text in files.items():
        (made / file).write_text(text)


def a_run(output, text, *, resume=False, overwrite=False):
    """What a training of two steps does with its folder, from where it stopped."""
    with taken(output, "dpo") as folder:
        folder.admit(SETTINGS, resume=resume, overwrite=overwrite)
        if folder.finished and resume:
            return
        folder.begin({"weights": "w"})
        for step in (1, 2, 3):
            last = folder.last_checkpoint()
            if last is None or int(last.name.rpartition("-")[2]) < step:
                write(folder, f"checkpoint-{step}", state=f"{text} {step}")
                folder.complete(f"checkpoint-{step}")
                folder.prune(2)
        folder.prune(2)
        write(folder, "output", config=text, tokenizer=text, metrics=text)
        folder.finish("output")


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def killed_at(moment, output, overwrite):
    """In a process of its own: be killed where the file system is about to change for the n-th time."""
    wrap_changes(killing_at(moment), ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"))
    a_run(output, "new", overwrite=overwrite)


def kills(tmp_path, overwrite):
    """For every moment: the folder as the kill left it."""
    moment, code = 0, None
    while code != 0:
        output = tmp_path / str(moment)
        if overwrite:
            a_run(output, "old")
        process = FORK.Process(target=killed_at, args=(moment, output, overwrite))
        process.start()
        process.join()
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        yield output
        moment += 1
    assert moment > 40


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """AUDIT M3, M4."""
    a_run(tmp_path / "whole", "new")
    wanted = content(tmp_path / "whole")
    assert set(wanted) == {
        *("run.json", "config", "tokenizer", "metrics"),
        *(f"checkpoint-{step}/state" for step in (2, 3)),
    }
    for output in kills(tmp_path, overwrite=False):
        for checkpoint in output.glob("checkpoint-*"):
            assert content(checkpoint) == {"state": f"new {checkpoint.name[-1]}"}
        a_run(output, "new", resume=True)
        assert content(output) == wanted


@pytest.mark.slow
def test_overwriting_leaves_the_old_run_until_there_is_a_new_one(tmp_path):
    """AUDIT M3."""
    a_run(tmp_path / "whole", "new")
    wanted, mixed = content(tmp_path / "whole"), 0
    for output in kills(tmp_path, overwrite=True):
        found = content(output)
        outputs = {found[name] for name in ("config", "tokenizer", "metrics")}
        if len(outputs) > 1:
            # Killed while the finished files take their places: the next process that takes the folder moves the rest.
            mixed += 1
            assert any(name.startswith(".finished/") for name in found)
        elif not any(text.startswith("new") for name, text in found.items() if name.startswith("checkpoint")):
            assert outputs == {"old"}
        record = json.loads(found["run.json"])
        a_run(output, "new", overwrite=True) if record["finished"] else a_run(output, "new", resume=True)
        assert content(output) == wanted
    assert mixed == 2


def test_two_that_start_together_get_two_numbers(tmp_path, monkeypatch):
    """AUDIT M2."""
    monkeypatch.chdir(tmp_path)
    with taken(None, "dpo") as one, taken(None, "dpo") as other:
        assert {one.path.name, other.path.name} == {"dpo-1", "dpo-2"}
    assert not Path("prefloss-runs").exists()


def test_a_second_process_with_the_same_output_is_refused(tmp_path):
    """AUDIT M2."""
    with (
        taken(tmp_path / "out", "dpo"),
        pytest.raises(CliError, match=r"--output: another process is at work in .*out"),
        taken(tmp_path / "out", "dpo"),
    ):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", ["file/below", "/proc/prefloss", "/sys/prefloss", "/dev/null/out", "a\0b", "x" * 300]
)
def test_a_folder_that_cannot_be_made_is_one_error(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(CliError, match=r"^--output: "), taken(tmp_path / path, "dpo"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_one_error(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(CliError, match=r"^--output: .* cannot be written to"), taken(tmp_path, "dpo"):
        pass
    tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 1}', "\0"])
def test_a_damaged_record_is_one_error(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CliError, match=r"--output: .*run.json"), taken(tmp_path, "dpo"):
        pass


def test_other_settings_are_named(tmp_path):
    with taken(tmp_path / "out", "dpo") as folder:
        folder.begin({"--seed": 0, "--steps": 9, "--lora": False})
        with pytest.raises(
            CliError, match=r"^--seed: got 1, expected 0, as .* \(other differences: --steps\)"
        ):
            folder.check_same({"--seed": 1, "--steps": 8, "--lora": False})


def test_nothing_is_left_of_a_run_that_kept_nothing(tmp_path):
    with taken(tmp_path / "a" / "b", "dpo") as folder:
        folder.begin(SETTINGS)
        assert (tmp_path / "a" / "b" / "run.json").exists()
    assert list(tmp_path.iterdir()) == []
