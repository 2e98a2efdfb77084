"""How the loss gets into a trainer, and out again."""

import pytest
import torch
import trl
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer

import prefloss
from prefloss.integrations.trl import PreferenceLossCallback, attach, detach
from prefloss.integrations.trl.callback import attached
from tests import tiny


def batch_loss(trainer):
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


@pytest.fixture
def trained(tmp_path):
    """A trainer whose policy has left the reference, so that losses differ."""
    return tiny.train("dpo", tmp_path, max_steps=5).trainer


def test_a_trainer_without_the_callback_is_untouched(tmp_path):
    before = tiny.train("dpo", tmp_path)
    PreferenceLossCallback("ipo")
    with_callback = tiny.train("dpo", tmp_path, [PreferenceLossCallback("ipo")])
    after = tiny.train("dpo", tmp_path)
    assert after.losses == before.losses
    assert torch.equal(after.weights, before.weights)
    assert after.logs[-1].keys() == before.logs[-1].keys()
    assert after.trainer.__dict__.keys() == before.trainer.__dict__.keys()
    assert with_callback.losses != before.losses


def test_added_after_construction_and_removed(trained):
    own = batch_loss(trained)
    trained.add_callback(PreferenceLossCallback("ipo"))
    ours = batch_loss(trained)
    trained.remove_callback(PreferenceLossCallback)
    assert ours != pytest.approx(own)
    assert batch_loss(trained) == own
    assert trained.loss_types == ["sigmoid"]
    assert trained.beta == 0.1


def test_attach_and_detach(trained):
    own = batch_loss(trained)
    attach(trained, "ipo", tau=0.2)
    assert batch_loss(trained) != pytest.approx(own)
    detach(trained)
    assert batch_loss(trained) == own
    assert "compute_loss" not in trained.__dict__
    with pytest.raises(ValueError, match="without a prefloss loss"):
        detach(trained)


def test_attach_equals_the_callback(trained):
    attach(trained, "ipo", tau=0.2)
    attached_loss = batch_loss(trained)
    detach(trained)
    trained.add_callback(PreferenceLossCallback("ipo", tau=0.2))
    assert batch_loss(trained) == attached_loss


def test_attach_twice_is_refused(trained):
    attach(trained, "ipo")
    with pytest.raises(ValueError, match=r"ipo\(tau=0.1.*detach"):
        attach(trained, "hinge")


def test_two_callbacks_are_refused(trained):
    trained.add_callback(PreferenceLossCallback("ipo"))
    trained.add_callback(PreferenceLossCallback("hinge"))
    with pytest.raises(ValueError, match="expected one PreferenceLossCallback"):
        batch_loss(trained)


def test_one_callback_serves_one_trainer(tmp_path):
    callback = PreferenceLossCallback("ipo")
    tiny.build("dpo", tmp_path, [callback])
    with pytest.raises(RuntimeError, match="one callback for each"):
        tiny.build("dpo", tmp_path, [callback])


def test_a_loss_object_is_taken(trained):
    callback = attach(trained, prefloss.get("ipo", tau=0.2))
    assert callback.loss.params["tau"] == 0.2
    with pytest.raises(TypeError, match="expected them in the Loss"):
        PreferenceLossCallback(prefloss.get("ipo"), tau=0.2)


def test_hyperparameters_in_the_name(trained):
    assert attach(trained, "ipo(tau=0.2)").loss.params["tau"] == 0.2


def test_another_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"got one with TrainingArguments, expected TRL's DPOTrainer"):
        Trainer(
            model=tiny.model(),
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            callbacks=[PreferenceLossCallback("ipo")],
        )


def test_a_subclass_that_goes_around_the_loss_is_stopped(tmp_path):
    class Own(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self._compute_loss(model, inputs, return_outputs)

    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("ipo")])
    trainer.__class__ = Own
    with pytest.raises(RuntimeError, match="call super"):
        trainer.train()


def test_a_subclass_that_calls_super_trains_with_the_loss(tmp_path):
    class Own(DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("hinge")])
    trainer.__class__ = Own
    assert batch_loss(trainer) == pytest.approx(2.0, abs=1e-5)
    with pytest.raises(TypeError, match="compute_loss is overridden in Own; add a PreferenceLossCallback"):
        attach(trainer, "hinge")


def test_attached_finds_the_callback(trained):
    assert attached(trained) is None
    callback = attach(trained, "ipo")
    assert attached(trained) is callback


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer"])
def test_trainers_that_took_the_place_of_trls_are_refused(name, monkeypatch, tmp_path):
    callback = PreferenceLossCallback("ipo")
    monkeypatch.setattr(trl, name, type(f"Unsloth{name}", (Trainer,), {}))
    with pytest.raises(
        RuntimeError, match=f"trl.{name}: got .*Unsloth{name}.*import unsloth before prefloss"
    ):
        tiny.build("dpo", tmp_path, [callback])
