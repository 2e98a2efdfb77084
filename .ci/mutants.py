"""Change one thing in a module and see whether a test fails: make mutants ARGS='prefloss/logratios.py --sample 50'.

The changes are mutmut's and four more. Its runner leaves out decorated functions, which all losses are, and takes no
sample; cosmic-ray writes into the tree and loads torch for each mutant. Here a mutant is written into a copy of the
tree, and a fork of a process that has torch loaded runs the tests that reach the changed line, until one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import (
    mutation_operators,
    operator_arg_removal,
    operator_assignment,
    operator_lambda,
)

PYTEST = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
# Error texts, types and imports change no number.
SKIPPED = (cst.Annotation, cst.Raise, cst.Import, cst.ImportFrom, cst.FormattedString)
# `= None` instead of a value: an error in nearly every place, so it says little about the tests.
LEFT_OUT = (operator_assignment, operator_lambda)


def is_text(node: cst.CSTNode) -> bool:
    """Whether a node is a docstring or words for people."""
    docstring = isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)
    return docstring or (isinstance(node, cst.SimpleString) and " " in node.value)


def changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """What may stand in the place of a node."""
    for kind, operator in mutation_operators:
        if not isinstance(node, kind) or operator in LEFT_OUT:
            continue
        for changed in operator(node):
            if not (operator is operator_arg_removal and len(changed.args) == len(node.args)):
                yield changed
            if isinstance(node, cst.SimpleString):
                break
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
        yield node.func.value
    if isinstance(node, (cst.If, cst.While, cst.CompIf)):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield cst.Pass()
    if isinstance(node, cst.ComparisonTarget) and type(node.operator) in OPPOSITE:
        yield node.with_changes(operator=OPPOSITE[type(node.operator)]())


OPPOSITE = {
    cst.LessThan: cst.GreaterThan,
    cst.GreaterThan: cst.LessThan,
    cst.LessThanEqual: cst.GreaterThanEqual,
    cst.GreaterThanEqual: cst.LessThanEqual,
}


@dataclass
class Mutant:
    """One change of one module; `lines` are those it touches, `scope` those of the body of the function around it."""

    path: str
    module: cst.Module
    node: cst.CSTNode
    changed: cst.CSTNode
    lines: range
    scope: range
    function: str

    def source(self) -> str:
        """The whole module with the change."""
        return self.module.deep_replace(self.node, self.changed).code

    def diff(self) -> str:
        """The changed lines."""
        old, new = self.module.code.splitlines(), self.source().splitlines()
        found = list(difflib.unified_diff(old, new, lineterm="", n=0))[3:]
        return "\n".join([f"{self.path}:{self.lines[0]}", *found])


class Changes(cst.CSTVisitor):
    """Collects the mutants of a module."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.found, self.functions = path, [], []
        wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
        self.module, self.places = wrapper.module, wrapper.resolve(PositionProvider)
        self.module.visit(self)

    def lines(self, node: cst.CSTNode) -> range:
        """The lines of a node."""
        place = self.places[node]
        return range(place.start.line, place.end.line + 1)

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Note what may change at a node; skip what has no effect on numbers."""
        if isinstance(node, SKIPPED) or is_text(node):
            return False
        if isinstance(node, cst.FunctionDef):
            self.functions.append(node)
        if node in self.places:
            outer = self.functions[0] if self.functions else None
            around = (self.lines(outer.body), outer.name.value) if outer else (range(0), "")
            for changed in changes(node):
                self.found.append(Mutant(self.path, self.module, node, changed, self.lines(node), *around))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        """Close a function."""
        if self.functions and self.functions[-1] is original_node:
            self.functions.pop()


@dataclass(eq=False)
class Reach:
    """A pytest plugin: which tests run which lines, in how many seconds."""

    modules: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    def pytest_runtest_protocol(self, item) -> None:
        """Name the test that runs from here on."""
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        """Add up setup, call and teardown of a test that passed."""
        if report.passed:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def run(self, tests: list[str], answer: Path) -> int:
        """Run the tests once and write what they reach."""
        import coverage
        import pytest

        self.coverage = coverage.Coverage(
            data_file=None, include=[str(Path(m).resolve()) for m in self.modules]
        )
        self.coverage.start()
        code = pytest.main([*PYTEST, *tests], plugins=[self])
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {m: data.contexts_by_lineno(str(Path(m).resolve())) for m in self.modules}
        loaded = [
            name for name in sys.modules if name.partition(".")[0] not in ("prefloss", "tests", "__main__")
        ]
        answer.write_text(json.dumps({"seconds": self.seconds, "lines": lines, "loaded": loaded}))
        return int(code)


@dataclass(eq=False)
class Chosen:
    """A pytest plugin: runs these tests, in this order."""

    tests: list[str]

    def pytest_configure(self) -> None:
        """Draw the same examples each time, and do not shrink those that fail."""
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", deadline=None, max_examples=50, derandomize=True, phases=phases)
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items) -> None:
        """Keep the chosen tests."""
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[test] for test in self.tests if test in by_name]

    def run(self) -> int:
        """Exit status of pytest."""
        import pytest

        files = list(dict.fromkeys(test.partition("::")[0] for test in self.tests))
        return int(pytest.main([*PYTEST, "-x", *files], plugins=[self]))


def reaching(mutant: Mutant, reach: dict) -> set[str]:
    """Tests that run the changed line; if it runs at import alone, those of the function or module around it."""
    lines, passed = reach["lines"][mutant.path], reach["seconds"].keys()
    near, around = (
        {test for line in span for test in lines.get(str(line), ())} & passed
        for span in (mutant.lines, mutant.scope)
    )
    if near:
        return near
    files = {test.partition("::")[0] for tests in lines.values() for test in tests}
    around = around or {test for test in passed if test.partition("::")[0] in files}
    # A test that only reads what was declared runs no line of any module.
    running = {test for module in reach["lines"].values() for tests in module.values() for test in tests}
    return around | (passed - running)


def tests_of(mutant: Mutant, reach: dict, limit: float) -> list[str]:
    """Tests of a mutant, `limit` seconds in all: its namesake's first, one of each function, the fastest."""
    seconds = reach["seconds"]
    close = re.compile(rf"/test_{Path(mutant.path).stem}\.py|\b{mutant.function or '/'}\b")
    nth: Counter[str] = Counter()
    ranked = []
    for test in sorted(reaching(mutant, reach), key=seconds.__getitem__):
        function = test.partition("[")[0]
        ranked.append((not close.search(test), nth[function], seconds[test], test))
        nth[function] += 1
    chosen, total = [], 0.0
    for *_, cost, test in sorted(ranked):
        if total + cost <= limit or not chosen:
            chosen.append(test)
            total += cost
    return chosen


def forked(work: Callable[[], int], limit: float, log: Path) -> int | None:
    """Exit status of some work in a process of its own; None if it took longer than `limit` seconds."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            os._exit(work())
        except BaseException:
            os._exit(1)
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None
    finally:
        # Also what the tests started.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def try_out(mutant: Mutant, reach: dict, limit: float, log: Path) -> str:
    """What the tests say of a mutant: killed, survived, timed out, not reached."""
    tests = tests_of(mutant, reach, limit)
    if not tests:
        return "not reached"
    path, source = Path(mutant.path), mutant.source()
    if source == mutant.module.code:
        return "same code"
    # Its bytecode may be as old and as long as the mutant.
    Path(importlib.util.cache_from_source(mutant.path)).unlink(missing_ok=True)
    path.write_text(source)
    try:
        expected = sum(reach["seconds"][test] for test in tests)
        code = forked(Chosen(tests).run, 30 + 5 * expected, log)
    finally:
        path.write_text(mutant.module.code)
    return {None: "timed out", 0: "survived", 5: "not reached"}.get(code, "killed")


def mirrored(modules: list[str]) -> list[str]:
    """Tests of some modules, as the tree mirrors them, and their docstring examples."""
    tests = dict.fromkeys(modules)
    for path in map(Path, modules):
        package = path.parts[1]
        tests[f"tests/{package}" if len(path.parts) > 2 else f"tests/test_{path.name}"] = None
    return [test for test in tests if Path(test).exists()]


def reached(options: argparse.Namespace, log: Path) -> dict:
    """What the unchanged tests reach; from the file of an earlier run where one is named."""
    answer = options.reach or log.with_name("reach.json")
    if not answer.exists():
        code = forked(lambda: Reach(options.modules).run(options.tests, answer), float("inf"), log)
        if code != 0:
            sys.exit(f"the unchanged tests fail (exit status {code}):\n{log.read_text()[-4000:]}")
    return json.loads(answer.read_text())


def main() -> None:
    """Try a sample of the mutants of some modules."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make mutants ARGS=...")
    parser.add_argument("modules", nargs="+", help="files of the package, e.g. prefloss/logratios.py")
    parser.add_argument("--tests", nargs="+", help="what pytest runs (default: the tests of these modules)")
    parser.add_argument("--sample", type=int, default=50, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument("--seconds", type=float, default=60, help="tests of so many seconds for a mutant")
    parser.add_argument(
        "--reach", type=lambda p: Path(p).resolve(), help="keep what the tests reach in this file"
    )
    options = parser.parse_args()
    options.tests = options.tests or mirrored(options.modules)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy, log = Path(folder, "tree"), Path(folder, "log")
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True
        )
        for name in filter(os.path.exists, listed.stdout.splitlines()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, copy / name)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ.update(CI="true", PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1")
        reach = reached(options, log)
        sys.dont_write_bytecode = True
        with warnings.catch_warnings(action="ignore"):
            for name in reach["loaded"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        found = [m for path in options.modules for m in Changes(path, Path(path).read_text()).found]
        random.Random(options.seed).shuffle(found)
        counts: Counter[str] = Counter()
        # Ctrl-C ends the run with the counts so far.
        with contextlib.suppress(KeyboardInterrupt):
            for mutant in found[: options.sample]:
                outcome = try_out(mutant, reach, options.seconds, log)
                counts[outcome] += 1
                if outcome not in ("killed", "same code"):
                    print(f"\n{outcome}: {mutant.diff()}", flush=True)
        told = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
        print(
            f"\n{counts.total()} of {len(found)} mutants of {' '.join(options.modules)}, seed {options.seed}: {told}"
        )


if __name__ == "__main__":
    main()
