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


# The oracle gives a value to each place of the sorted batch, prefloss to the pair that stands there.
BY_PLACE = {
    "aot": lambda pairs: pairs.chosen.policy - pairs.rejected.policy,
    "aot_unpaired": lambda pairs: pairs.chosen.h,
}
# Losses that read the spread of a batch, which one pair does not have.
TWO_AT_LEAST = ("discopop_dbaql", "discopop_aqfl")
# Losses whose hyperparameters are states or draws: compared below, with the state's numbers handed to the oracle.
WITH_STATE = ("alpha_dpo", "beta_dpo", "gamma_po", "sampo")


@pytest.mark.parametrize("name", [name for name in prefloss.specs if name not in WITH_STATE])
@given(
    seed=st.integers(0, 10**9),
    double=st.booleans(),
    size=st.integers(1, 3),
    spread=st.sampled_from((1.0, 1.0, 30.0)),
)
@settings(max_examples=12)
def test_values_and_gradients(name, seed, double, size, spread):
    rng, dtype = bridge.seeded(seed), torch.float64 if double else torch.float32
    spec = prefloss.specs[name]
    drawn = bridge.hyperparameters(spec, rng)
    if name in TWO_AT_LEAST:
        size += 1
    batch = bridge.Batch(spec.feedback, spec.needs | spec.reads, rng, dtype, size, spread)
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
    if loss.name in BY_PLACE:
        found = found[BY_PLACE[loss.name](batch.feedback).argsort(stable=True)]
    assert found.dtype == dtype
    gradients = batch.gradients(found.sum())
    expected = batch.wanted_gradient(wanted_gradient)
    # What rounding of the inputs alone does to a result: eps times each input times its derivative.
    conditioning = sum(
        (expected[name].abs() * leaf.detach().abs().double()).sum().item()
        for name, leaf in (
            ("policy", batch.rows.policy),
            ("kl", batch.rows.kl),
            ("reverse_kl", batch.rows.reverse_kl),
        )
    )
    wanted = torch.tensor([float(value) for value in wanted], dtype=torch.float64)
    slack = EPS[dtype] * (100 * (1 + wanted.abs().max().item()) + 20 * conditioning)
    torch.testing.assert_close(found.double(), wanted, rtol=100 * EPS[dtype], atol=slack)
    compared["points"] += len(wanted_gradient) + wanted.numel()
    for name, value in gradients.items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            value.double(),
            expected[name],
            rtol=200 * EPS[dtype],
            atol=slack + 300 * EPS[dtype] * (1 + largest),
        )


def drawn_batch(name, seed, double, size, **changes):
    """Hyperparameters and a batch for a loss with a state."""
    rng, dtype = bridge.seeded(seed), torch.float64 if double else torch.float32
    spec = prefloss.specs[name]
    drawn = {
        k: v
        for k, v in bridge.hyperparameters(spec, rng).items()
        if k not in ("moments", "draws", "subset", "queue")
    }
    return {**drawn, **changes}, bridge.Batch(spec.feedback, spec.needs, rng, dtype, size)


@given(seed=st.integers(0, 10**9), double=st.booleans(), size=st.integers(2, 4))
@settings(max_examples=12)
def test_alpha_dpo_with_its_moments(seed, double, size):
    drawn, batch = drawn_batch("alpha_dpo", seed, double, size)
    loss = prefloss.get("alpha_dpo", **drawn)
    loss(batch.feedback)
    # The moments are updated before they are used: hold them still, and hand the oracle what the loss then uses.
    moments = loss.eval().params["moments"]
    theirs = {**drawn, "location": float(moments.mean), "scale": float(moments.std)}
    compare(loss, batch, *oracle_of("alpha_dpo", batch.records, theirs))


@given(seed=st.integers(0, 10**9), double=st.booleans(), size=st.integers(2, 4))
@settings(max_examples=12)
def test_beta_dpo_with_its_moments_and_draws(seed, double, size):
    drawn, batch = drawn_batch("beta_dpo", seed, double, size)
    loss = prefloss.get("beta_dpo", **drawn)
    loss(batch.feedback)
    loss.eval()
    kept = (loss(batch.feedback) != 0).tolist()
    assert sum(kept) == max(1, int(size * drawn["keep"]))
    moments = loss.params["moments"]
    theirs = {"beta": drawn["beta"], "alpha": drawn["alpha"], "location": float(moments.mean), "kept": kept}
    compare(loss, batch, *oracle_of("beta_dpo", batch.records, theirs))


@given(seed=st.integers(0, 10**9), double=st.booleans(), size=st.integers(1, 3))
@settings(max_examples=12)
def test_sampo_with_its_draws(seed, double, size):
    drawn, batch = drawn_batch("sampo", seed, double, size)
    loss = prefloss.get("sampo", subset=seed % 100, **drawn).eval()
    touched = batch.gradients(loss(batch.feedback).sum())["policy"] != 0
    for row in range(size):
        places = [touched[start + row].nonzero().flatten().tolist() for start in (0, size)]
        counts = [int(batch.rows.mask[start + row].sum()) for start in (0, size)]
        assert len(places[0]) == len(places[1]) == min(counts)
        theirs = {**drawn, "chosen_tokens": places[0], "rejected_tokens": places[1]}
        wanted = ORACLES["sampo"](batch.records[row], **theirs)
        assert loss(batch.feedback)[row].item() == pytest.approx(float(wanted), rel=1e-5)


@given(seed=st.integers(0, 10**9), double=st.booleans(), size=st.integers(1, 3))
@settings(max_examples=8)
def test_gamma_po_with_its_queue(seed, double, size):
    drawn, batch = drawn_batch("gamma_po", seed, double, size, reference=False, steps=20)
    queue = [0.5, -1.0, 2.0]
    compare(
        prefloss.get("gamma_po", queue=queue, **drawn),
        batch,
        *oracle_of("gamma_po", batch.records, {**drawn, "queue": queue}),
    )


def test_every_loss_has_an_oracle():
    missing = sorted(set(prefloss.specs) - set(ORACLES))
    assert not missing, f"write an oracle in tests/oracle for {missing}"
