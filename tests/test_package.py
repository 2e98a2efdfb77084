"""The package as users get it: what an import loads, what the wheel holds, that torch alone is enough."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import prefloss

ROOT = Path(__file__).parents[1]

OPTIONAL = {
    "accelerate",
    "datasets",
    "lightning",
    "matplotlib",
    "peft",
    "pyarrow",
    "pylatexenc",
    "pytorch_lightning",
    "rich",
    "transformers",
    "triton",
    "trl",
    "typer",
}

# DPO by hand: h = (1.5, -1), margin 2.5, beta 0.1, -log sigmoid(0.25) = 0.575939.
ONE_LOSS = """
import torch, prefloss
pairs = prefloss.Pairs(
    chosen=prefloss.LogRatios(
        policy=torch.tensor([-20.0]), reference=torch.tensor([-21.5]), tokens=torch.tensor([10])
    ),
    rejected=prefloss.LogRatios(
        policy=torch.tensor([-24.0]), reference=torch.tensor([-23.0]), tokens=torch.tensor([8])
    ),
)
loss = prefloss.get("dpo", beta=0.1)(pairs)
torch.testing.assert_close(loss, torch.tensor([0.575939]), rtol=0, atol=1e-6)
"""


def run(*command, cwd):
    """Run a command away from the checkout, which a bare `python -c` would import from."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def constraint(package):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def test_import_loads_torch_and_no_optional_package():
    # Torch itself may load some (triton, on CUDA builds), so only what prefloss adds to it counts.
    code = """
import sys, torch
before = set(sys.modules)
import prefloss
assert "prefloss.training" not in sys.modules
prefloss.Scorer
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    loaded = set(run(sys.executable, "-W", "error", "-c", code, cwd=ROOT).split())
    assert "prefloss" in loaded
    assert not loaded & OPTIONAL


# What takes time to load, or is loaded for tests alone.
HEAVY = OPTIONAL | {
    "dill",
    "hypothesis",
    "jinja2",
    "numpy",
    "pydantic",
    "pytest",
    "scipy",
    "sympy",
    "torchgen",
}


@pytest.mark.parametrize(
    ("imported", "extra", "ours"),
    [
        ("import prefloss", set(), {"kernels", "logprobs", "metrics", "training", "worlds", "data", "cli"}),
        (
            "import runpy, contextlib, io; sys.argv = ['prefloss', 'losses']\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
            "    runpy.run_module('prefloss', run_name='__main__')\n"
            "assert 'ipo' in out.getvalue()",
            # typer loads pydantic.
            {"pydantic", "rich", "typer"},
            {"kernels", "logprobs", "training", "demo"},
        ),
    ],
    ids=["import", "losses"],
)
def test_start_up_loads_nothing_heavy(imported, extra, ours):
    # Times depend on the machine; what is loaded does not.
    code = f"""
import sys, torch
before = set(sys.modules)
{imported}
print(*set(sys.modules) - before)
"""
    loaded = set(run(sys.executable, "-W", "error", "-c", code, cwd=ROOT).split())
    assert "prefloss.registry" in loaded
    assert not {name.partition(".")[0] for name in loaded} & (HEAVY - extra)
    assert not {name for name in loaded if name.startswith("torch.") and name.count(".") == 1}
    assert not {f"prefloss.{name}" for name in ours} & loaded


def test_modules_of_losses_are_there_after_one_import():
    # In a process of its own: other tests import these modules by name.
    code = """
import prefloss as p
p.registry.spec_of, p.hyperparameters.Linear, p.losses.dpo, p.metrics.Stat
# Those that are loaded when they are first used.
assert {"Scorer", "token_logps", "linear_token_logps", "logprobs", "metrics"} <= set(dir(p))
assert p.token_logps is p.logprobs.token_logps is p.token_logps
from prefloss import linear_token_logps, metrics
from prefloss.losses import suggest
assert suggest is p.losses.suggest
assert not hasattr(p, "nonsense")
"""
    run(sys.executable, "-W", "error", "-c", code, cwd=ROOT)


@pytest.mark.slow
def test_wheel_works_in_an_environment_with_torch_alone(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("prefloss-*.whl")

    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "prefloss").rglob("*.py")}
    assert {"prefloss/py.typed", *sources} <= held
    assert {name.partition("/")[0] for name in held - sources} == {
        f"prefloss-{prefloss.__version__}.dist-info",
        "prefloss",
    }

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "-q"]
    run(*install, "-c", ROOT / "constraints.txt", constraint("torch"), cwd=tmp_path)
    run(*install, "--no-deps", wheel, cwd=tmp_path)
    run(python, "-c", ONE_LOSS, cwd=tmp_path)
