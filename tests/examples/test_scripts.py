"""The scripts in examples/ run offline and learn what they say."""

import runpy
from pathlib import Path

import pytest

import prefloss

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def registry():
    """An example may register a loss."""
    before = set(prefloss.specs)
    yield
    for name in set(prefloss.specs) - before:
        prefloss.losses.unregister(name)


@pytest.mark.parametrize(
    ("name", "steps", "metric", "least"),
    [
        ("rankings_plackett_luce", 25, "eval_rewards/accuracies", 0.7),
        ("kto_upvotes", 20, "eval_rewards/margins", 0.1),
        ("mamba_dpo", 40, "eval_rewards/accuracies", 0.6),
        ("lora_dpo", 25, "eval_rewards/accuracies", 0.7),
        ("trl_own_loss", 20, "eval_rewards/accuracies", 0.7),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fast path", "ignore:'pin_memory'")
@pytest.mark.usefixtures("registry")
def test_an_example_learns(name, steps, metric, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = FOLDER / f"{name}.py"
    assert len(script.read_text().splitlines()) < 60
    assert runpy.run_path(str(script))["main"](steps)[metric] > least
