"""What TRL's trainer does beside the loss stays: saving and resuming, evaluation, experts, callbacks' state."""

import pytest
import torch
from datasets import Dataset

import prefloss
from prefloss.integrations.trl import PreferenceLossCallback
from prefloss.integrations.trl.callback import attached
from tests import tiny


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_router_loss_of_experts_is_kept(tmp_path, kind):
    theirs = tiny.train(kind, tmp_path, policy=tiny.experts(), max_steps=3)
    ours = tiny.train(kind, tmp_path, [PreferenceLossCallback(kind)], policy=tiny.experts(), max_steps=3)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
    assert ours.logs[-1]["aux_loss"] > 0


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_evaluation_reports_the_loss_and_every_metric(tmp_path, kind):
    held_out = tiny.pairs(10, seed=5) if kind == "dpo" else tiny.labels(10, seed=5)
    theirs = tiny.build(kind, tmp_path, eval_data=held_out)
    ours = tiny.build(kind, tmp_path, [PreferenceLossCallback(kind)], eval_data=held_out)
    # Before any training step: the loss must be bound already.
    expected, found = theirs.evaluate(), ours.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert {name for name in expected if not name.endswith(("_runtime", "_second"))} <= found.keys()
    assert "eval_prefloss/chosen_falling" in found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_outputs_are_returned_when_asked_for(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("hinge")])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(1.0, abs=1e-5)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    def callback():
        return PreferenceLossCallback("kto", kl_baseline={"name": "running_mean", "decay": 0.5})

    options = {"loss_type": "apo_zero_unpaired", "save_strategy": "steps", "save_steps": 10, "max_steps": 20}
    whole = tiny.train("kto", tmp_path / "whole", [callback()], **options)
    resumed = tiny.build("kto", tmp_path / "resumed", [callback()], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    found = torch.cat([parameter.detach().flatten() for parameter in resumed.model.parameters()])
    torch.testing.assert_close(found, whole.weights, rtol=0, atol=1e-6)
    assert attached(resumed).loss_state == attached(whole.trainer).loss_state
    assert attached(resumed).loss_state["kl_baseline"]["weight"] > 1


def test_resumed_with_restored_callbacks(tmp_path):
    options = {"loss_type": "apo_zero_unpaired", "save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    options["restore_callback_states_from_checkpoint"] = True
    baseline = {"name": "running_mean", "decay": 0.5}
    whole = tiny.train(
        "kto", tmp_path / "whole", [PreferenceLossCallback("kto", kl_baseline=baseline)], **options
    )
    resumed = tiny.build(
        "kto", tmp_path / "resumed", [PreferenceLossCallback("kto", kl_baseline=baseline)], **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert attached(resumed).loss.params["kl_baseline"].decay == 0.5
    assert attached(resumed).loss_state == attached(whole.trainer).loss_state


@pytest.mark.parametrize("upvoted", [0.0, 0.3])
@pytest.mark.parametrize("baseline", ["zero", "running_mean"])
def test_votes_one_at_a_time_shuffled_and_one_sided(tmp_path, baseline, upvoted):
    callback = PreferenceLossCallback("kto", kl_baseline=baseline)
    run = tiny.train(
        "kto",
        tmp_path,
        [callback],
        data=tiny.labels(16, upvoted=upvoted),
        loss_type="apo_zero_unpaired",
        per_device_train_batch_size=1,
        train_sampling_strategy="random",
        max_steps=8,
    )
    assert torch.isfinite(run.weights).all()
    assert run.losses[0] == pytest.approx(0.5, abs=1e-5)
    assert run.losses[-1] != run.losses[0]


def test_a_running_mean_stands_still_in_evaluation(tmp_path):
    callback = PreferenceLossCallback("kto", kl_baseline="running_mean")
    trainer = tiny.build("kto", tmp_path, [callback], eval_data=tiny.labels(8), loss_type="apo_zero_unpaired")
    trainer.evaluate()
    assert callback.loss_state["kl_baseline"]["weight"] == 0


def test_label_losses_train_on_pairs(tmp_path):
    run = tiny.train("dpo", tmp_path, [PreferenceLossCallback("kto", kl_baseline="zero")], max_steps=3)
    assert run.losses[0] == pytest.approx(0.5, abs=1e-5)
    assert "prefloss/chosen_falling" in run.logs[-1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_truncated_completion_is_left_out(tmp_path, monkeypatch):
    rows = [{"prompt": "w1 w2 w3", "chosen": " w4", "rejected": " w5"}] * 8
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo")], data=Dataset.from_list(rows))
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["completion_mask"][0] = 0
    monkeypatch.setattr(prefloss.losses._core.loss._Warned, "empty", False)
    with pytest.warns(UserWarning, match="1 of 4 examples have a completion without tokens"):
        loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert attached(trainer).objective.metrics(training=False)["prefloss/empty"] == 0.25


@pytest.mark.parametrize("item", ["score_chosen", "scores", "kl"])
def test_a_batch_item_that_the_loss_does_not_read_is_refused(tmp_path, item):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo")])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with pytest.raises(ValueError, match=f"column '{item}': dpo does not read it"):
        trainer.compute_loss(trainer.model, {**batch, item: torch.ones(4)})


def test_weights_of_examples_reach_the_loss(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("hinge")])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, {**batch, "weight": torch.tensor([0.0, 1.0, 2.0, 3.0])})
    assert loss.item() == pytest.approx(6 / 4, abs=1e-5)


def test_a_loss_that_is_not_finite_names_its_example(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("dpo")], precompute_ref_log_probs=True)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["ref_rejected_logps"][2] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"example 2 of this batch is nan.*rejected: policy -.*reference nan"
    ):
        trainer.compute_loss(trainer.model, batch)
