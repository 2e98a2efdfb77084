"""Evaluation, prediction, checkpoints and resuming."""

import math

import pytest
import torch

from tests import tiny


def test_evaluation_is_exact_and_chooses_the_best_model(tmp_path):
    held_out = tiny.pairs(10, seed=5)
    trainer = tiny.plain_train(
        tmp_path,
        "0.7*dpo + 0.3*nll",
        tiny.pairs(),
        eval_data={"a": held_out, "b": held_out.select(range(3))},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_a_rewards/accuracies",
        learning_rate=5e-3,
    )
    evaluated = [entry for entry in trainer.state.log_history if "eval_a_rewards/accuracies" in entry]
    assert trainer.state.best_metric == max(entry["eval_a_rewards/accuracies"] for entry in evaluated)
    found = trainer.evaluate(held_out)
    # One batch of all ten is the truth; the trainer's batches are of four, four and two.
    trainer.args.per_device_eval_batch_size = 10
    whole = trainer.evaluate(held_out)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen", "eval_prefloss/loss/nll"):
        assert found[name] == pytest.approx(whole[name], abs=1e-5)
    assert found["eval_loss"] == pytest.approx(
        0.7 * found["eval_prefloss/loss/dpo"] + 0.3 * found["eval_prefloss/loss/nll"], abs=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*completion without tokens")
def test_evaluation_counts_examples_and_not_batches(tmp_path):
    policy = tiny.model()
    options = {"data": tiny.pairs(4), "eval_data": tiny.pairs(10, seed=5), "max_length": 5}
    item = tiny.plain_callback(policy, "simpo", reference=None, beta=2.0)
    trainer = tiny.plain_build(tmp_path, item, policy, **options)
    found = trainer.evaluate()
    assert found["eval_prefloss/empty"] > 0
    trainer.args.per_device_eval_batch_size = 10
    assert found["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


def test_prediction_gives_log_probs_and_metrics(tmp_path):
    policy = tiny.model()
    trainer = tiny.plain_build(tmp_path, tiny.plain_callback(policy, "dpo"), policy, data=tiny.pairs(4))
    output = trainer.predict(tiny.pairs(6))
    assert output.metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert output.metrics["test_rewards/accuracies"] == 0.0
    logps, reference = output.predictions
    assert logps.shape == (6, 2)
    assert logps == pytest.approx(reference)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    def run(folder, **options):
        own = {
            "kl_baseline": {"name": "running_mean", "decay": 0.5},
            "beta": {"name": "linear", "start": 0.5, "end": 0.1, "steps": 6},
        }
        return tiny.plain_train(
            folder, "kto", tiny.labels(), own=own, save_strategy="steps", save_steps=4, max_steps=8, **options
        )

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(tiny.weights(resumed.model), tiny.weights(whole.model), rtol=0, atol=1e-6)
    states = [tiny.callback_of(trainer).loss_state for trainer in (whole, resumed)]
    assert states[0] == states[1]
    assert states[0]["kl_baseline"]["weight"] > 1
    assert states[0]["beta"] == {"done": 8}


def test_resumed_with_restored_callbacks(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "restore_callback_states_from_checkpoint": True,
    }
    own = {"reference": None, "beta": {"name": "linear", "start": 3.0, "end": 2.0, "steps": 4}}
    whole = tiny.plain_train(tmp_path / "whole", "simpo", tiny.pairs(), own=own, **options)
    resumed = tiny.plain_train(
        tmp_path / "resumed",
        "simpo",
        tiny.pairs(),
        own=own,
        resume=str(tmp_path / "whole" / "checkpoint-2"),
        **options,
    )
    torch.testing.assert_close(tiny.weights(resumed.model), tiny.weights(whole.model), rtol=0, atol=1e-6)


def test_a_callback_cannot_be_made_anew_without_its_model(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    tiny.plain_train(tmp_path, "dpo", tiny.pairs(), max_steps=1, **options)
    with pytest.raises(TypeError, match="holds no reference model; leave restore_callback_states"):
        tiny.plain_train(tmp_path, "dpo", tiny.pairs(), resume=str(tmp_path / "checkpoint-1"), **options)


def test_state_and_schedules_stand_still_in_evaluation(tmp_path):
    policy = tiny.model()
    item = tiny.plain_callback(policy, "kto", kl_baseline="running_mean")
    tiny.plain_build(tmp_path, item, policy, data=tiny.labels(8), eval_data=tiny.labels(8)).evaluate()
    assert item.loss_state["kl_baseline"]["weight"] == 0
