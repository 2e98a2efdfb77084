"""What every test gets: fixed seeds, one torch thread per worker, poisoned memory, a hypothesis profile."""

import os

# No window, whatever the machine; read when matplotlib is imported.
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

import prefloss

# The first call of a torch op is slow, so no deadline. CI draws the same examples on every run.
hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads on top of that only wait for one another.
    torch.set_num_threads(1)

# Fresh memory holds NaN, so that a kernel which skips an element shows. Torch does this in its deterministic mode
# (torch.utils.deterministic.fill_uninitialized_memory); warn_only because some CUDA ops have no deterministic form.
# Patching torch.empty instead would break `with torch.device("meta")`, which looks constructors up by identity.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seeded():
    """Same random numbers in a test whichever tests ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Docstring examples of the whole package find torch and the public names, without an import in each."""
    names = {name: getattr(prefloss, name) for name in ("LogRatios", "Pairs", "Labels", "Rankings")}
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.dtest.globs = {"prefloss": prefloss, "torch": torch, **names, **item.dtest.globs}


class Proof:
    """Counts for the closing line: kit checks and oracle points, of all workers."""

    checks = 0
    not_applicable = 0
    points = 0


def pytest_runtest_logreport(report):
    """Runs in the controlling process for the reports of every worker."""
    if "test_conformance" in report.nodeid and report.when == "call":
        Proof.checks += report.passed
    if "test_conformance" in report.nodeid and report.skipped:
        Proof.not_applicable += 1
    if report.when == "teardown":
        Proof.points += sum(value for name, value in report.user_properties if name == "oracle_points")


def pytest_terminal_summary(terminalreporter):
    """What the losses were put through."""
    if Proof.checks or Proof.points:
        terminalreporter.write_line(
            f"prefloss: {len(prefloss.specs)} losses; kit checks: {Proof.checks} passed, {Proof.not_applicable} not "
            f"applicable; oracle points compared: {Proof.points}"
        )
