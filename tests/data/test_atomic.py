"""A file is replaced as a whole, or stays as it was."""

import multiprocessing
import os
import signal
import stat

import pytest

from prefloss.data.atomic import remove_unfinished, written_whole


def test_the_new_file_takes_the_path_with_the_mode_of_a_plain_open(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with written_whole(path) as unfinished:
        assert unfinished.parent == tmp_path
        assert unfinished.suffix == ".json"
        unfinished.write_text("new")
        assert path.read_text() == "old"
    (tmp_path / "plain").touch()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["numbers.json", "plain"]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("old")

    def write_half():
        with written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_a_link_that_waits_beside_the_file_is_not_followed(tmp_path):
    """AUDIT L1: the name beside the file was predictable, and opened through a link."""
    victim, path = tmp_path / "victim", tmp_path / "table.parquet"
    victim.write_text("precious")
    (tmp_path / f".{path.name}.{os.getpid()}.unfinished").symlink_to(victim)
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
    assert victim.read_text() == "precious"


def test_what_a_kill_left_is_removed(tmp_path):
    path = tmp_path / "numbers[1].json"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    path.with_name(".other.json.unfinished.json").touch()
    remove_unfinished(path)
    assert os.listdir(tmp_path) == [".other.json.unfinished.json"]


def _killed(path):
    with written_whole(path):
        os.kill(os.getpid(), signal.SIGKILL)
