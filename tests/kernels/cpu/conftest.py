import pytest

from prefloss.kernels.cpu import build


@pytest.fixture(scope="session")
def real_library(tmp_path_factory):
    """The library, compiled for this processor."""
    library = tmp_path_factory.mktemp("real") / "libprefloss.so"
    try:
        build.build_here(build.compiler(), library)
    except build.CannotBuild as error:
        pytest.skip(str(error))
    return library


@pytest.fixture
def fake_compiler(real_library, tmp_path, monkeypatch):
    """A compiler in a hurry: copies the library and writes a line to a file for each call, whose path is returned."""
    calls, script = tmp_path / "calls", tmp_path / "compiler"
    script.write_text(
        f"#!/bin/sh\necho called >> '{calls}'\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f"cp '{real_library}' \"$2\"\n"
    )
    script.chmod(0o700)
    calls.touch()
    monkeypatch.setenv("CC", str(script))
    return calls


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """The folder of compiled libraries, not yet made; temporary files go to a folder of this test too."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefloss"
