"""`make trainers`: prefloss in real releases of the trainers that it plugs into.

Makes one environment for each release, from the package index, runs the framework's proof in it (`tests/trainers`), and
writes a matrix: docs/integrations/matrix.md and matrix.json. The line "Proven with" of each framework's page is written
from it too. A release that cannot be installed is a row with its reason.

    make trainers                    every release; more than an hour on two cores
    make trainers ONLY=llamafactory  those of one framework; or of some releases (ONLY="trl-0.24.0 trl-1.6.0")

An environment is kept under ~/.cache/prefloss/trainers and made again when its release below changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path.home() / ".cache" / "prefloss" / "trainers"
PAGES = ROOT / "docs" / "integrations"
# Packages are those of this day, so that an environment made later has the same ones.
NEWEST = "2026-11-21"
TORCH = "torch==2.13.0"
# A proof of one release runs no longer than this, seconds.
LIMIT = 1800
PAGE = """# What was proven

`make trainers` makes an environment for each release below from the package index, without a GPU, and trains a tiny
model on preference rows in the real framework:

- its own losses, by the framework and by prefloss: the loss of each step and the final weights agree to 1e-5;
- losses that it lacks, and sums of losses, against log-ratios of plain forward passes;
- without a loss of prefloss: losses and weights are the same to the bit as before prefloss was imported;
- options that a loss cannot take over are refused by name.

Every check with its figures is in `matrix.json` beside this page's source. Packages that need a GPU were left out of
the environments: torchvision, torchaudio and xformers.

"""


@dataclass(frozen=True)
class Release:
    """One release of a framework.

    Attributes:
        framework: Name of the proof, `tests/trainers/FRAMEWORK_matrix.py`.
        package: Its package and version.
        instead: Requirements in the place of its own.
        more: Further packages.
        left_out: Packages that it requires and that are left out, because they need a GPU or torch's CUDA build.
        emptied: Modules that it imports, of packages left out, which are replaced by empty ones.
        python: Version of Python.
    """

    framework: str
    package: str
    instead: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    python: str = "3.11"

    @property
    def version(self) -> str:
        """The release's version."""
        return self.package.partition("==")[2]

    @property
    def name(self) -> str:
        """What ONLY accepts: `trl-0.24.0`."""
        return f"{self.framework}-{self.version}"


_TITLES = {
    "trl": "TRL",
    "llamafactory": "LLaMA-Factory",
    "swift": "ms-swift",
    "axolotl": "axolotl",
    "unsloth": "Unsloth",
    "openrlhf": "OpenRLHF",
}
_TRL = Release("trl", "trl==1.16.0", more=("peft",))
_LLAMAFACTORY = Release(
    "llamafactory", "llamafactory==0.9.5", left_out=("torchvision", "torchaudio"), emptied=("torchaudio",)
)
_SWIFT = Release("swift", "ms-swift==4.6.0")
_AXOLOTL = Release("axolotl", "axolotl==0.19.0", left_out=("xformers", "torchvision"))
_UNSLOTH = Release(
    "unsloth", "unsloth==2026.10.9", instead=("certifi>=2026.10.18",), left_out=("xformers", "torchvision")
)
_OPENRLHF = Release(
    "openrlhf",
    "openrlhf==0.11.2",
    left_out=("bitsandbytes", "deepspeed", "flash-attn", "optimum", "pynvml", "ray", "tensorboard", "wandb"),
)
# The releases that frameworks pin, and of those between them the ones whose trainers changed most.
_TRL_AND_TRANSFORMERS = {
    "0.18.2": "4.52.4",
    "0.19.1": "4.52.4",
    "0.21.0": "4.55.4",
    "0.24.0": "4.57.6",
    "0.27.2": "4.57.6",
    "0.28.0": "4.57.6",
    "0.29.1": "5.19.0",
    "1.0.0": "5.5.0",
    "1.4.0": "5.5.0",
    "1.5.0": "5.5.0",
    "1.6.0": "5.14.1",
    "1.7.0": "5.14.1",
    "1.9.0": "5.16.1",
    "1.13.0": "5.16.1",
    "1.14.0": "5.20.0",
    "1.15.0": "5.20.0",
    "1.16.0": "5.23.0",
}
# TRL 1.15 computes log-probs with Triton alone, and does not bring it.
_MORE = {"1.15.0": ("triton",)}
RELEASES = (
    *(
        replace(
            _TRL,
            package=f"trl=={version}",
            instead=(f"transformers=={transformers}",),
            more=(*_TRL.more, *_MORE.get(version, ())),
        )
        for version, transformers in _TRL_AND_TRANSFORMERS.items()
    ),
    replace(_LLAMAFACTORY, package="llamafactory==0.9.4"),
    _LLAMAFACTORY,
    replace(_SWIFT, package="ms-swift==4.5.3"),
    _SWIFT,
    replace(_AXOLOTL, package="axolotl==0.18.0", instead=(TORCH,)),
    _AXOLOTL,
    replace(_UNSLOTH, package="unsloth==2026.10.7"),
    _UNSLOTH,
    replace(_OPENRLHF, package="openrlhf==0.11.1"),
    _OPENRLHF,
)


class NotInstalled(Exception):
    """Why a release has no environment."""


def environment(release: Release) -> Path:
    """The Python of a release's environment, which is made if it is not there.

    Raises:
        NotInstalled: If the release cannot be installed, or would bring CUDA with it.
    """
    settings = json.dumps([NEWEST, TORCH, asdict(release)])
    folder = CACHE / f"{release.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        print(f"{release.name}: install", flush=True)
        _uv(["venv", "--clear", "--python", release.python, str(folder)])
        overrides = folder / "overrides.txt"
        absent = (f'{name}; sys_platform == "none"' for name in release.left_out)
        overrides.write_text("\n".join([*release.instead, *absent]))
        wanted = ["--overrides", str(overrides), TORCH, release.package, *release.more]
        planned = _uv(["pip", "install", "--python", str(python), "--dry-run", *wanted])
        if cuda := re.findall(r"\+ (nvidia-cu\S+)", planned):
            raise NotInstalled(
                f"torch would come with {cuda[0]}: name a folder with a CPU build in PIP_FIND_LINKS"
            )
        _uv(["pip", "install", "--python", str(python), *wanted])
        for module in release.emptied:
            (_site_packages(folder) / f"{module}.py").write_text('__version__ = "0"\n')
        done.touch()
    return python


def _site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python*")) / "site-packages"


def _uv(arguments: list[str]) -> str:
    variables = {
        "UV_EXCLUDE_NEWER": NEWEST,
        "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""),
        "UV_LINK_MODE": "hardlink",
    }
    done = subprocess.run(
        ["uv", *arguments],
        env={**variables, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise NotInstalled(" ".join(done.stdout[done.stdout.find("error:") :].split()))
    return done.stdout


def prove(release: Release) -> list[dict[str, str]]:
    """The lines of a release's proof; one line with the reason if it could not run."""
    try:
        python = environment(release)
    except NotInstalled as error:
        return [_line(release, "install", "NOT INSTALLED", str(error)[:400])]
    print(f"{release.name}: prove", flush=True)
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [str(python), "-m", f"tests.trainers.{release.framework}_matrix"],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return [_line(release, "run", "FAILED", f"ran longer than {LIMIT} seconds")]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"framework"')]
    if not lines or (done.returncode and not any(line["verdict"] == "FAILED" for line in lines)):
        last = done.stderr.strip().splitlines() or ["no output"]
        lines.append(_line(release, "run", "FAILED", f"exit status {done.returncode}: {last[-1][:400]}"))
    for line in lines:
        print(
            f"  {line['verdict']:>6}  {line['trainer']}: {line['check']}: {line['detail']}"[:200], flush=True
        )
    return lines


def _line(release: Release, check: str, verdict: str, detail: str) -> dict[str, str]:
    return {
        "framework": release.framework,
        "version": release.version,
        "trainer": "",
        "check": check,
        "verdict": verdict,
        "detail": detail,
    }


def table(matrix: Mapping[str, Any]) -> str:
    """The matrix as a Markdown table: a row a release."""
    rows = [
        "| Framework | Version | Its own losses, by both | Losses by hand | Without prefloss | Verdict |",
        "|---|---|---|---|---|---|",
    ]
    for release in sorted(matrix.values(), key=lambda item: _order(item["framework"], item["version"])):
        lines = release["lines"]
        failed = [f"{line['check']}: {line['detail']}" for line in lines if line["verdict"] != "same"]
        cells = [
            release["framework"],
            release["version"],
            _passed(lines, "own "),
            _passed(lines, "by hand "),
            _passed(lines, "untouched"),
            "the same" if not failed else f"**{len(failed)} not**: {failed[0][:120]}",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def proven(framework: str, matrix: Mapping[str, Any]) -> str:
    """The sentence that a framework's page begins with: which releases are proven, and which are not."""
    releases = [release for release in matrix.values() if release["framework"] == framework]
    releases.sort(key=lambda release: _order(framework, release["version"]))
    whole = {release["version"]: _whole(release["lines"]) for release in releases}
    missing = [version for version in whole if not whole[version]]
    versions = ", ".join(version for version in whole if whole[version]) or "no release"
    but = f"; not whole with {', '.join(missing)}" if missing else ""
    return f"Proven with {_TITLES[framework]} {versions}{but}: [what was proven](matrix.md)."


def _whole(lines: Iterable[Mapping[str, str]]) -> bool:
    return all(line["verdict"] == "same" for line in lines)


def _passed(lines: Iterable[Mapping[str, str]], prefix: str) -> str:
    chosen = [line for line in lines if line["check"].startswith(prefix)]
    return f"{sum(line['verdict'] == 'same' for line in chosen)} of {len(chosen)}" if chosen else "-"


def _order(framework: str, version: str) -> tuple[str, list[int]]:
    return framework, [int(part) for part in re.findall(r"\d+", version)]


def main() -> int:
    """Prove the chosen releases and write the matrix; 1 if a check failed, but not for what cannot be installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="frameworks, or releases such as trl-0.24.0")
    only = parser.parse_args().only
    for name in only:
        if not any(name in (release.framework, release.name) for release in RELEASES):
            names = ", ".join(release.name for release in RELEASES)
            parser.error(f"ONLY: got {name!r}, expected a framework or one of {names}")
    chosen = [
        release for release in RELEASES if not only or {release.framework, release.name}.intersection(only)
    ]
    rows = {release.name: _row(release) for release in chosen}
    print(table(rows))
    return int(any(line["verdict"] == "FAILED" for row in rows.values() for line in row["lines"]))


def _row(release: Release) -> dict[str, Any]:
    """Prove a release and put it into the matrix, which keeps the rows of the others."""
    lines = prove(release)
    changed = {"instead": list(release.instead), "left_out": list(release.left_out)}
    row = {"framework": release.framework, "version": release.version, **changed, "lines": lines}
    path = PAGES / "matrix.json"
    matrix = json.loads(path.read_text()) if path.exists() else {}
    known = {item.name for item in RELEASES}
    matrix = {**{name: old for name, old in matrix.items() if name in known}, release.name: row}
    path.write_text(json.dumps(matrix, indent=1, sort_keys=True) + "\n")
    write_pages(matrix)
    return row


def write_pages(matrix: Mapping[str, Any]) -> None:
    """Write the matrix's page, and the line "Proven with" of each framework's."""
    (PAGES / "matrix.md").write_text(PAGE + table(matrix))
    for framework in {release["framework"] for release in matrix.values()}:
        page = PAGES / f"{framework}.md"
        sentence = proven(framework, matrix)
        page.write_text(re.sub(r"^Proven with .*", sentence, page.read_text(), count=1, flags=re.M))


if __name__ == "__main__":
    sys.exit(main())
