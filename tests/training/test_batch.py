"""A batch stays a batch: moved, copied and pickled by trainers, and refused once it was cut."""

import copy
import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from lightning_utilities.core.apply_func import apply_to_collection

from prefloss import Labels, LogRatios, Pairs, Rankings
from prefloss.training import PreferenceBatch, PreferenceCollator

ROWS = {
    Pairs: [{"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 9, 1], "weight": 0.5}] * 2,
    Labels: [
        {"prompt_ids": [5], "completion_ids": [7, 1], "label": True, "score": 0.3},
        {"prompt_ids": [5], "completion_ids": [8], "label": False, "score": 0.1},
    ],
    Rankings: [
        {"prompt_ids": [5], "completions_ids": [[7], [8, 1], [9]], "scores": [3.0, 2.0, 1.0]},
        {"prompt_ids": [6], "completions_ids": [[7], [8]], "scores": [0.0, 1.0]},
    ],
}
LAYOUTS = ("padded", "packed", "shared_prefix")


def ratios(batch):
    policy = -torch.arange(len(batch.rows.targets)).float()
    return LogRatios(policy, torch.zeros_like(policy), batch.rows.tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ROWS)
def test_trainers_move_it_and_it_stays_a_batch(kind, layout):
    batch = PreferenceCollator(layout=layout)(ROWS[kind])
    before = batch.feedback(ratios(batch))
    for moved in (
        send_to_device(batch, "cpu"),
        apply_to_collection(batch, torch.Tensor, torch.Tensor.clone),
        copy.copy(batch),
        pickle.loads(pickle.dumps(batch)),
    ):
        assert type(moved) is PreferenceBatch
        assert moved is not batch
        assert moved.kind is kind
        after = moved.feedback(ratios(moved))
        for one, other in zip(before.parts, after.parts, strict=True):
            assert torch.equal(one.policy, other.policy)


def test_a_copy_forgets_what_was_derived_from_other_tensors():
    batch = PreferenceCollator()(ROWS[Pairs])
    assert batch.rows.tokens.tolist() == [2, 2, 3, 3]
    changed = copy.copy(batch)
    changed["completion_mask"] = torch.zeros_like(changed["completion_mask"])
    assert changed.rows.tokens.tolist() == [0, 0, 0, 0]


def test_a_plain_mapping_of_its_tensors_is_taken():
    batch = PreferenceCollator()(ROWS[Rankings])
    assert PreferenceBatch.recognizes(dict(batch))
    assert PreferenceBatch.of(dict(batch)).examples == 2


def test_other_batches_are_refused():
    assert not PreferenceBatch.recognizes({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(
        ValueError, match=r"batch: got \['input_ids'\], expected what PreferenceCollator writes"
    ):
        PreferenceBatch.of({"input_ids": torch.zeros(1, 2)})


def test_the_first_examples_alone():
    batch = PreferenceCollator()(ROWS[Labels])
    feedback = batch.feedback(ratios(batch), examples=1)
    assert feedback.desirable.tolist() == [True]
    assert feedback.scores.tolist() == pytest.approx([0.3])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_token_0_is_one_like_any_other(layout):
    """AUDIT T1."""
    batch = PreferenceCollator(layout=layout)(
        [{"prompt_ids": [3, 0], "chosen_ids": [0], "rejected_ids": [0, 1]}]
    )
    assert batch.rows.tokens.tolist() == [1, 2]
    assert list(batch.rows.token_ids()) == [([3, 0], [0]), ([3, 0], [0, 1])]
    assert batch["labels"].tolist() == [1]


def test_a_batch_that_was_sliced_is_refused():
    batch = PreferenceCollator()([{"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 1]}] * 4)
    # As accelerate's dispatcher does: the first half of all tensors.
    half = {name: value[: len(batch["input_ids"]) // 2] for name, value in batch.items()}
    with pytest.raises(ValueError, match=r"batch: got 4 rows for 4 examples; .*'dispatch_batches': False"):
        PreferenceBatch.of(half)
