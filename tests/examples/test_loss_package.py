"""The example package is installed, and its loss found by name, described and computed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import prefloss
assert "squared_margin" not in prefloss.specs
loss = prefloss.get("squared_margin", beta=0.5)
assert loss(prefloss.Pairs.of([4.0], [0.0])).tolist() == [1.0]
assert prefloss.specs["squared_margin"].paper == "arXiv:2402.05749"
print(loss)
"""


@pytest.mark.slow
def test_an_installed_packages_loss_is_found(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(tmp_path), str(ROOT / "examples" / "loss_package")], check=True)
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "squared_margin(beta=0.5)"
