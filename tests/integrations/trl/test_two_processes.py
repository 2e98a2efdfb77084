"""TRL's trainers with a prefloss loss on two processes, against one with the whole batch."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from prefloss.integrations.transformers import PreferenceCollator
from prefloss.integrations.trl import PreferenceLossCallback
from tests import tiny
from tests import two_processes as two

pytestmark = pytest.mark.slow
CASES = {
    "dpo": ("dpo", "dpo", {}),
    "aot": ("dpo", "aot", {}),
    "dr_dpo": ("dpo", "dr_dpo", {}),
    # Some completions do not fit, more of them on one process than on the other.
    "cut away": ("dpo", "0.8*dpo + 0.2*nll", {"max_length": 5}),
    "bco": ("kto", "bco", {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"}),
    "prompts once": ("dpo", "dpo", {"layout": "shared_prefix"}),
    "our kernel": ("dpo", "ipo", {"kernel": "prefloss"}),
}
# Logged means; TRL's own of a rank are means of means where ranks count differently.
FIGURES = ("loss", "rewards/margins", "prefloss/chosen_falling", "prefloss/loss/nll")


def trained(folder, case, size):
    kind, loss, options = CASES[case]
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": size,
        "optim": "sgd",
        "learning_rate": 0.3,
        **options,
    }
    callback = PreferenceLossCallback(loss, kernel=options.pop("kernel", "trl"))
    layout = options.pop("layout", None)
    if layout:
        options["data_collator"] = PreferenceCollator(layout=layout)
    run = tiny.train(kind, folder / case.replace(" ", "-"), [callback], **options)
    figures = {name: run.logs[-1][name] for name in FIGURES if name in run.logs[-1]}
    return run.weights, callback.loss_state, figures


def worker(rank, folder):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **address)
    warnings.simplefilter("ignore")
    return {case: trained(Path(folder), case, 2) for case in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All cases, in one pair of processes: each takes seconds to start."""
    folder = tmp_path_factory.mktemp("two")
    return two.run(folder, worker, str(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(found, tmp_path, case):
    weights, state, figures = trained(tmp_path, case, 4)
    for their_weights, their_state, their_figures in (of_rank[case] for of_rank in found):
        torch.testing.assert_close(their_weights, weights, rtol=0, atol=3e-6)
        assert their_figures == pytest.approx(figures, abs=2e-5)
        for name, value in state.items():
            assert their_state[name] == pytest.approx(value, rel=1e-5, abs=1e-6)
