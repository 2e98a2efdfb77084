"""Two processes that each have half of every batch train as one that has all of it."""

import pytest
import torch

from tests import two_processes as two

pytestmark = pytest.mark.slow
SHARDED = ["dpo", "aot", "kto", "bco", "shared_prefix"]
WAYS = {
    "ddp": list(two.CASES),
    "fsdp2": SHARDED,
    "fsdp2, head apart": ["dpo", "kto"],
    "head by vocabulary": ["dpo", "dpo_pl", "shared_prefix"],
    "ddp, accumulated": ["dpo", "two terms", "dpo_pl"],
}
FADING = ("prefloss/kl_per_token", "prefloss/length_correlation")


def worker(rank):
    return {
        (how, case): two.trained(
            case, how.removesuffix(", accumulated"), rank, size=2, accumulate=3 if "accumulated" in how else 1
        )
        for how, cases in WAYS.items()
        for case in cases
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All cases, in one pair of processes: each takes seconds to start."""
    return two.run(tmp_path_factory.mktemp("two"), worker)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "case"), [(how, case) for how, cases in WAYS.items() for case in cases])
def test_two_processes_train_as_one(found, how, case):
    weights, state, figures = two.trained(case)
    for rank in (0, 1):
        their_weights, their_state, their_figures = found[rank][how, case]
        torch.testing.assert_close(their_weights, weights, rtol=0, atol=2e-6)
        # With half of the head each, both processes count every example, and older ones fade sooner.
        faded = FADING if how == "head by vocabulary" else ()
        expected = {name: value for name, value in figures.items() if name not in faded}
        assert {name: their_figures[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        for name, value in state.items():
            assert their_state[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_the_cases_move_the_weights():
    before = two.policy_and_reference()[0]
    start = torch.cat([value.detach().flatten() for value in before.parameters()])
    assert (two.trained("dpo")[0] - start).abs().max() > 1e-3
