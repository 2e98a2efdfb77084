"""The callback in a plain trainer: every feedback trains, as TRL does where TRL has the loss; and leaves no trace."""

import math

import pytest
import torch

from prefloss.integrations.transformers import PreferenceLossCallback
from tests import tiny

DATA = {
    "pairs": tiny.pairs,
    "labels": tiny.labels,
    "rankings": tiny.rankings,
    "scored": tiny.scored_pairs,
}
STEPS = {
    ("dpo", "pairs"): {},
    ("simpo", "pairs"): {"reference": None},
    ("kto_zero", "labels"): {},
    ("kto_zero", "pairs"): {},
    ("bco", "labels"): {},
    ("npo", "labels"): {},
    ("dpo_pl", "rankings"): {},
    ("dpo_pl", "pairs"): {},
    ("dpo", "rankings"): {"rankings_as": "all"},
    ("ipo", "rankings"): {"rankings_as": "best_worst"},
    ("margin_dpo", "scored"): {},
    ("ld_dpo", "pairs"): {},
    ("0.8*dpo + 0.2*nll", "pairs"): {},
    ("0.5*dpo + 0.5*kto_zero", "pairs"): {},
}


@pytest.mark.parametrize(
    ("loss", "data"), STEPS, ids=lambda pair: "-".join(pair) if isinstance(pair, tuple) else str(pair)
)
def test_feedback_of_every_kind_trains(tmp_path, loss, data):
    trainer = tiny.plain_train(
        tmp_path, loss, DATA[data](16), own=STEPS[loss, data], max_steps=8, learning_rate=5e-3
    )
    found = tiny.losses_of(trainer)
    assert all(map(math.isfinite, found))
    assert len(set(found)) == 8
    assert "rewards/margins" in tiny.steps_of(trainer)[-1] or loss == "simpo" or data == "labels"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_are_those_of_trl(tmp_path, accumulate):
    options = {
        "max_steps": 10,
        "per_device_train_batch_size": 4 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-3,
    }
    theirs = tiny.train("dpo", tmp_path, gradient_checkpointing=False, **options)
    ours = tiny.plain_train(tmp_path, "dpo", tiny.pairs(), **options)
    assert tiny.losses_of(ours) == pytest.approx(theirs.losses, abs=1e-5)
    torch.testing.assert_close(tiny.weights(ours.model), theirs.weights, rtol=0, atol=1e-5)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        assert tiny.steps_of(ours)[-1][name] == pytest.approx(theirs.logs[-1][name], abs=1e-4)


def test_the_trainer_has_its_own_loss_back_without_the_callback(tmp_path):
    policy = tiny.model()
    trainer = tiny.plain_build(tmp_path, tiny.plain_callback(policy, "dpo"), policy, data=tiny.pairs(8))
    trainer.remove_callback(PreferenceLossCallback)
    ids = torch.tensor([[3, 4, 5]])
    batch = {"input_ids": ids, "labels": ids}
    assert trainer.compute_loss(policy, batch).item() == pytest.approx(policy(**batch).loss.item())
