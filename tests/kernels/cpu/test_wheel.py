"""The wheel's CPU library: which machines get it, that it needs no compiler there, and each of its levels."""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from prefloss.kernels.cpu import build, cache, library, native
from prefloss.logprobs import linear_token_logps, token_stats

ROOT = Path(__file__).parents[3]
PLATFORM = sysconfig.get_platform()
FOLDER = Path("prefloss/kernels/cpu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PLATFORM not in build.LEVELS, reason="no wheels with a library for this platform"),
]

# what the other process prints: where the library is from, its level, and a loss of the small sum of log-probs
PROBE = """
import torch
from prefloss.kernels.cpu import native
from prefloss.logprobs import linear_token_logps
x, targets = torch.eye(8).bfloat16(), torch.arange(8)
print(linear_token_logps(x, 3 * x, targets, impl="chunked").sum())
found = native.library()
print(f"{found.file} {found.level}" if found else "none")
"""


def built(folder, *options, **environment):
    """Run `python -m build` on this checkout; the folder gets the result."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *options, ROOT]
    return subprocess.run(
        list(map(str, command)), env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True,
        text=True,
    )  # fmt: skip


def unpacked(wheel, folder):
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    try:
        build.compiler()
    except build.CannotBuild as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("wheel")
    done = built(folder, "--wheel", PREFLOSS_BUILD_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel's content, as an installation has it."""
    return unpacked(wheel, tmp_path_factory.mktemp("site"))


@pytest.fixture
def no_compiler(tmp_path):
    """Variables of a machine that has none."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "CC": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def probe(site, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], env=os.environ | {"PYTHONPATH": str(site)} | environment,
        cwd=site, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss, found = done.stdout.splitlines()
    # 8 log-probs of exp(3) / (exp(3) + 7)
    assert loss == "tensor(-2.3920)"
    return found, done.stderr


def test_the_wheel_is_for_this_platform_and_any_python(wheel, site):
    assert wheel.name.endswith(f"-py3-none-{PLATFORM.replace('-', '_').replace('.', '_')}.whl")
    file = site / FOLDER / build.PREBUILT.name
    cache.check_digest(file)
    # one OpenMP runtime in a process, that of torch
    assert b"libgomp" not in file.read_bytes()


def test_the_fast_way_without_a_compiler(site, no_compiler):
    found, errors = probe(site, **no_compiler)
    file, level = found.split()
    assert file == str(site / FOLDER / build.PREBUILT.name)
    assert level in build.LEVELS[PLATFORM]
    assert not errors
    assert not Path(no_compiler["XDG_CACHE_HOME"]).exists()


def test_a_damaged_library_is_not_loaded(site, no_compiler, tmp_path, real_library):
    """AUDIT M8, for the wheel's library."""
    damaged = tmp_path / "damaged"
    shutil.copytree(site, damaged)
    file = damaged / FOLDER / build.PREBUILT.name
    os.truncate(file, 50_000)
    found, errors = probe(damaged, **no_compiler)
    assert found == "none"
    (line,) = errors.splitlines()
    assert "is damaged" in line
    assert "no C compiler (cc, gcc or clang) was found" in line
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n/bin/cp \'{real_library}\' "$2"\n')
    compiler.chmod(0o700)
    found, errors = probe(damaged, **no_compiler | {"CC": str(compiler)})
    assert found.endswith(" native")
    assert not errors


def test_every_level_computes_the_same(site, monkeypatch):
    file = site / FOLDER / build.PREBUILT.name
    loaded = ctypes.CDLL(str(file))
    loaded.prefloss_level.restype = ctypes.c_char_p
    levels = list(build.LEVELS[PLATFORM])
    # best last; those above the processor's would be illegal instructions
    for level in levels[: levels.index(loaded.prefloss_level().decode()) + 1]:
        functions = library.declared(loaded, file, level)
        monkeypatch.setattr(native, "library", lambda functions=functions: functions)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits = torch.randn(9, 1301).to(dtype).requires_grad_()
            targets = torch.randint(1301, (9,))
            for ways in ({}, {"softcap": 30.0, "temperature": 0.7}):
                got, want = (token_stats(logits, targets, impl=impl, **ways) for impl in ("chunked", "naive"))
                for name in ("logps", "logsumexp", "entropy", "log_sum_sq"):
                    torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
            weight = torch.randn(1301, 32).to(dtype).requires_grad_()
            hidden = torch.randn(9, 32).to(dtype).requires_grad_()
            gradients = [
                torch.autograd.grad(linear_token_logps(hidden, weight, targets, impl=impl).sum(), (hidden, weight))
                for impl in ("chunked", "naive")
            ]  # fmt: skip
            for got, want in zip(*gradients, strict=True):
                assert (got.float() - want.float()).norm() < 5e-3 * want.float().norm()


def test_the_level_is_the_processors(site):
    """Against what Linux says of the processor."""
    loaded = ctypes.CDLL(str(site / FOLDER / build.PREBUILT.name))
    loaded.prefloss_level.restype = ctypes.c_char_p
    cpu = Path("/proc/cpuinfo").read_text().split("\nflags", 1)[-1].split("\n", 1)[0].split()
    expected = "baseline"
    for level, needed in {
        "avx2": {"avx2", "fma", "f16c", "bmi2"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "avx512bf16": {"avx512_bf16"},
    }.items():
        if not needed <= set(cpu):
            break
        expected = level
    assert loaded.prefloss_level().decode() == expected


def test_bfloat16_products_are_in_the_wheel(site):
    """Most machines cannot run them, so this looks at the instructions."""
    if PLATFORM != "linux-x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump, for x86-64")
    file = site / FOLDER / build.PREBUILT.name
    shown = subprocess.run(["objdump", "-d", str(file)], check=True, capture_output=True, text=True).stdout
    assert shown.count("vdpbf16ps") > 100


def test_without_a_compiler_a_wheel_is_pure_python(no_compiler, tmp_path):
    done = built(tmp_path / "dist", "--wheel", **no_compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "a wheel without the CPU library: no C compiler" in done.stdout + done.stderr
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".sha256"))]
    assert built(tmp_path / "no", "--wheel", **no_compiler, PREFLOSS_BUILD_NATIVE="1").returncode != 0


def test_the_sdist_can_build_it(tmp_path):
    done = built(tmp_path, "--sdist")
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.iterdir()
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {
        "hatch_build.py",
        *(str(FOLDER / file) for file in ("native.c", "dispatch.c", "build.py")),
    } <= names
