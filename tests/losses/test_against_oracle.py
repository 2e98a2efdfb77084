"""Every registered loss against the mpmath oracle: values and gradients at drawn points, float32 and float64.

The oracle (tests/oracle) is written from the papers and shares nothing with prefloss; tests/losses/bridge.py hands
both the same numbers.
"""

import collections

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

import prefloss
from tests.losses import bridge
from tests.oracle.gradients import gradient
from tests.oracle.registry import ORACLES

# Relative error allowed to the arithmetic of one loss.
EPS = {torch.float32: 1.2e-7, torch.float64: 2e-15}
# Exponentials are clamped near e^80 (their docstrings say so): beyond, values differ from the paper's by design.
CLAMPED = 1e30


def same(name, drawn, feedback, rng):
    """Hyperparameters for prefloss and for the oracle, where they are not the same numbers."""
    ours, theirs = dict(drawn), dict(drawn)
    if name == "dpo":
        theirs["label_smoothing"] = ours["label_smoothing"] = rng.choice((0.0, 0.2))
    if "kl_baseline" in prefloss.specs[name].parameters:
        ours["kl_baseline"], theirs["kl_baseline"] = "column", feedback.kl.item()
    if "shift" in prefloss.specs[name].parameters:
        ours["shift"] = theirs["delta"] = rng.uniform(-1, 1)
        theirs.pop("shift", None)
    return ours, theirs


def oracle_of(name, records, theirs):
    """Values of each example, and derivatives of their sum by (example, side, field) path."""
    oracle = ORACLES[name]
    if oracle.reads.endswith("s"):
        return oracle(records, **theirs), gradient(oracle, records, **theirs)
    values = [oracle(record, **theirs) for record in records]
    found = {}
    for place, record in enumerate(records):
        found |= {(place, *path): value for path, value in gradient(oracle, record, **theirs).items()}
    return values, found


# Losses whose hyperparameters are states or draws: compared below, with the state's numbers handed to the oracle.
WITH_STATE = ("alpha_dpo", "beta_dpo", "gamma_po", "sampo")


@pytest.mark.parametrize("name", [name for name in prefloss.specs if name not in WITH_STATE])
@given(seed=st.integers(0, 10**9), double=st.booleans(), size=st.integers(1, 3), spread=st.sampled_from((1.0, 1.0, 30.0)))
@settings(max_examples=12)
def test_values_and_gradients(name, seed, double, size, spread):
    rng, dtype = bridge.seeded(seed), torch.float64 if double else torch.float32
    spec = prefloss.specs[name]
    drawn = bridge.hyperparameters(spec, rng)
    batch = bridge.Batch(spec.feedback, spec.needs, rng, dtype, size, spread)
    ours, theirs = same(name, drawn, batch.feedback, rng)
    compare(prefloss.get(name, **ours), batch, *oracle_of(name, batch.records, theirs))


compared = collections.Counter()


@pytest.fixture(autouse=True)
def counted(request):
    """Tell the closing line (tests/conftest.py) how many numbers were compared."""
    yield
    request.node.user_properties.append(("oracle_points", compared.pop("points", 0)))


def compare(loss, batch, wanted, wanted_gradient):
    dtype = batch.rows.policy.dtype
    assume(max(abs(float(value)) for value in wanted) < CLAMPED)
    found = loss(batch.feedback)
    assert found.dtype == dtype
    gradients = batch.gradients(found.sum())
    expected = batch.wanted_gradient(wanted_gradient)
    # What rounding of the inputs alone does to a result: eps times each input times its derivative.
    conditioning = sum(
        (expected[name].abs() * leaf.detach().abs().double()).sum().item()
        for name, leaf in (("policy", batch.rows.policy), ("kl", batch.rows.kl), ("reverse_kl", batch.rows.reverse_kl))
    )
    wanted = torch.tensor([float(value) for value in wanted], dtype=torch.float64)
    slack = EPS[dtype] * (100 * (1 + wanted.abs().max().item()) + 20 * conditioning)
    torch.testing.assert_close(found.double(), wanted, rtol=100 * EPS[dtype], atol=slack)
    compared["points"] += len(wanted_gradient) + wanted.numel()
    for name, value in gradients.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            value.double(), expected[name], rtol=200 * EPS[dtype], atol=slack + 300 * EPS[dtype] * (1 + largest)
        )


def test_every_loss_has_an_oracle():
    missing = sorted(set(prefloss.specs) - set(ORACLES))
    assert not missing, f"write an oracle in tests/oracle for {missing}"
