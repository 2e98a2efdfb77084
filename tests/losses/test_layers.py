"""What may import what, and which names are public."""

import ast
import graphlib
import inspect
import pathlib
import warnings

import pytest

import prefloss
from prefloss import hyperparameters, losses, registry

ROOT = pathlib.Path(prefloss.__file__).parent
PUBLIC = {
    name for name in vars(losses) if not name.startswith("_") and inspect.isfunction(vars(losses)[name])
}


def imported(path):
    """Modules of prefloss that a file imports, at any depth: late imports and those for type checkers count too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prefloss"):
            for alias in node.names:
                inner = ROOT.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def test_the_losses_have_no_circles_and_import_nothing_from_above():
    graph = {}
    for path in (ROOT / "losses").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(imported(path))
        modules = ("losses.", "feedback", "logratios", "arguments", "_deprecated")
        below = tuple(f"prefloss.{module}" for module in modules)
        assert all(other.startswith(below) for other in graph[name]), name
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_package_of_losses_holds_every_loss_and_nothing_else():
    assert set(prefloss.specs) == PUBLIC
    assert all(getattr(losses, name) is spec.function for name, spec in prefloss.specs.items())


@pytest.mark.parametrize(
    "name", ["get", "register", "specs", "unregister", "Loss", "LossSpec", "capabilities", "parse"]
)
def test_old_names_of_the_registry_warn(name):
    with pytest.warns(
        DeprecationWarning, match=rf"prefloss\.losses\.{name} is now prefloss\.registry\.{name}"
    ):
        assert getattr(losses, name) is getattr(registry, name)


@pytest.mark.parametrize("name", ["Positive", "Interval", "State", "RunningMean", "Linear", "Moments"])
def test_old_names_of_hyperparameters_warn(name):
    with pytest.warns(DeprecationWarning, match=rf"is now prefloss\.hyperparameters\.{name}"):
        assert getattr(losses, name) is getattr(hyperparameters, name)


@pytest.mark.parametrize("module", [losses, registry])
def test_composite_is_a_weighted_sum_now(module):
    with pytest.warns(DeprecationWarning, match=r"Composite is now prefloss\.registry\.WeightedSum"):
        assert module.Composite is registry.WeightedSum


def test_reduce_over_is_sync_with_now():
    with pytest.warns(DeprecationWarning, match="Loss.reduce_over is now Loss.sync_with"):
        prefloss.get("dpo").reduce_over(lambda sums: sums)


def test_what_the_losses_never_had():
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        losses.nonsense  # noqa: B018
