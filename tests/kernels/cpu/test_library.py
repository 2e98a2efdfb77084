"""Which CPU library is loaded: never a damaged one, never one that others can write to, and never silently none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefloss.kernels.cpu import build, cache, library

# what the other process prints: where the library is from, or "none"
PROBE = """
from prefloss.kernels.cpu import native
found = [native.library() for _ in range(2)][0]
print(found.file if found else "none")
"""


def probe(code=PROBE, **environment):
    """Start `code` in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "PREFLOSS_NATIVE"} | environment
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip


def works(found):
    """Whether a function of the library can be called."""
    return found.multiplies() in (0, 1)


def times(calls):
    return len(calls.read_text().splitlines())


def test_compiled_once_and_then_found(fake_compiler, cache_folder):
    first, second = library.compiled(), library.compiled()
    assert works(first)
    assert works(second)
    assert first.file == second.file
    assert first.file.parent == cache_folder
    assert first.level == "native"
    assert times(fake_compiler) == 1
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".sha256", ".so"]
    assert {path.stat().st_mode & 0o777 for path in cache_folder.iterdir()} == {0o600}


def replace(file, content):
    """By another file: this process has the old one in its memory."""
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o600)


def cut(file):
    replace(file, file.read_bytes()[:20_000])


def flip(file):
    content = bytearray(file.read_bytes())
    content[64:20_000:7] = bytes(len(content[64:20_000:7]))
    replace(file, content)


def empty(file):
    replace(file, b"")


def forget_digest(file):
    build.digest_file(file).unlink()


def spoil_digest(file):
    build.digest_file(file).write_bytes(b"\xff\xfe\n")


def remove(file):
    file.unlink()


def other_library(file):
    """The digest is right, but the functions are missing."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    replace(file, Path(next(path for path in loaded if "/libm.so" in path or "/libm-" in path)).read_bytes())
    build.digest_file(file).write_text(build.digest(file))


def writable_by_all(file):
    file.chmod(0o666)


def link(file):
    target = file.with_name("elsewhere")
    file.rename(target)
    file.symlink_to(target)


def of_another_user(file):
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, 54321, -1)


@pytest.mark.parametrize("damage", [cut, flip, empty, forget_digest, spoil_digest, remove, other_library])
def test_a_damaged_library_is_built_again(damage, fake_compiler, cache_folder):
    """AUDIT M8."""
    damage(library.compiled().file)
    again = library.compiled()
    assert works(again)
    assert times(fake_compiler) == 2
    cache.check(again.file)


@pytest.mark.parametrize("change", [writable_by_all, link, of_another_user])
def test_a_library_that_others_can_write_to_is_built_again(change, fake_compiler, cache_folder):
    """AUDIT L2."""
    found = library.compiled().file
    change(found)
    again = library.compiled()
    assert works(again)
    assert times(fake_compiler) == 2
    status = again.file.lstat()
    assert (status.st_uid, status.st_mode & 0o177777) == (os.getuid(), 0o100600)


def test_a_folder_that_others_can_write_to_is_not_used(fake_compiler, cache_folder):
    cache_folder.mkdir(parents=True)
    cache_folder.chmod(0o777)
    assert works(library.compiled())
    assert not list(cache_folder.iterdir())


def test_no_home_and_an_unknown_user(fake_compiler, cache_folder, monkeypatch):
    """AUDIT M7."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert works(library.compiled())
    assert not cache_folder.exists()
    assert not list((cache_folder.parents[1] / "tmp").iterdir())


@pytest.mark.parametrize(("name", "value"), [("HOME", ""), ("HOME", "here"), ("XDG_CACHE_HOME", "here")])
def test_a_home_that_is_no_absolute_path_is_none(
    name, value, fake_compiler, cache_folder, tmp_path, monkeypatch
):
    """AUDIT L5."""

    class User:
        pw_dir = str(tmp_path / "home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: User)
    monkeypatch.chdir(tmp_path / "tmp")
    assert library.compiled().file.parent == tmp_path / "home" / ".cache" / "prefloss"
    assert not list((tmp_path / "tmp").iterdir())


def test_a_cache_without_room_or_permission(fake_compiler, cache_folder, monkeypatch):
    """The folder's disk is full, or there is no folder: built among temporary files."""
    compiler = Path(os.environ["CC"])
    compiler.write_text(
        compiler.read_text().replace("cp ", f'case "$2" in {cache_folder}*) exit 1;; esac; cp ')
    )
    assert works(library.compiled())
    assert times(fake_compiler) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert works(library.compiled())


def test_a_folder_that_may_not_run_code(fake_compiler, cache_folder, monkeypatch):
    """A file system mounted with noexec, as /tmp often is."""

    class Status:
        f_flag = os.ST_NOEXEC

    monkeypatch.setattr("os.statvfs", lambda path: Status)
    assert works(library.compiled())


def test_words_of_the_compiler(fake_compiler, cache_folder, monkeypatch):
    """AUDIT L3."""
    monkeypatch.setenv("CC", f"/usr/bin/env '{os.environ['CC']}'")
    assert works(library.compiled())
    for command, why in {
        "'cc": 'CC: got "\'cc", expected a command: No closing quotation',
        "no-such-compiler -m64": "no-such-compiler could not be run: .* No such file",
        "false": "false failed with status 1",
        "true": "libprefloss.so",
    }.items():
        monkeypatch.setenv("CC", command)
        with pytest.raises((build.CannotBuild, OSError), match=why):
            library.compiled()


def test_a_compiler_that_writes_no_utf_8(tmp_path, cache_folder, monkeypatch):
    """AUDIT L4."""
    compiler = tmp_path / "compiler"
    compiler.write_bytes(b"#!/bin/sh\nprintf 'native.c:1: error: \\377\\376 \\303\\n' >&2\nexit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(build.CannotBuild, match=r"failed with status 3: native\.c:1: error: \ufffd"):
        library.compiled()


def test_what_a_killed_process_left_is_removed(fake_compiler, cache_folder):
    """AUDIT L5."""
    compiler = Path(os.environ["CC"])
    fast = compiler.read_text()
    compiler.write_text(fast.replace("cp ", "sleep 60; cp "))
    killed = probe()
    deadline = time.monotonic() + 60
    while not times(fake_compiler) and time.monotonic() < deadline:
        time.sleep(0.02)
    (left,) = cache_folder.iterdir()
    compiler.write_text(fast)
    # another process must not remove it while the first one builds
    library.compiled().file.unlink()
    assert left.exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert works(library.compiled())
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".sha256", ".so"]


def test_several_processes_at_once(fake_compiler, cache_folder):
    """As torchrun starts them, each without a library in the cache."""
    compiler = Path(os.environ["CC"])
    compiler.write_text(compiler.read_text().replace("cp ", "sleep 0.5; cp "))
    processes = [probe() for _ in range(3)]
    results = [process.communicate() for process in processes]
    assert [errors for _, errors in results] == [""] * 3
    assert len({output for output, _ in results}) == 1
    assert works(library.compiled())
    assert times(fake_compiler) <= 3
    assert sorted(path.suffix for path in cache_folder.iterdir()) == [".sha256", ".so"]


def test_one_warning_where_the_slow_way_is_taken(tmp_path):
    output, errors = probe(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path)).communicate()
    assert output == "none\n"
    (line,) = errors.splitlines()
    assert "CPU log-probs run in plain PyTorch, which takes longer: no-such-compiler could not be run" in line
    assert "Install a C compiler such as gcc" in line


@pytest.mark.parametrize(("value", "error"), [("0", ""), ("off", "PREFLOSS_NATIVE: got 'off', expected 0")])
def test_the_slow_way_on_request(value, error):
    output, errors = probe(CC="no-such-compiler", PREFLOSS_NATIVE=value).communicate()
    assert output == ("" if error else "none\n")
    assert error in errors if error else not errors
