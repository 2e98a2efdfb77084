"""Models that read images: the callback in TRL's DPOTrainer, and our own collator."""

import copy

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from prefloss.integrations.trl import PreferenceLossCallback
from tests import tiny, vision


def train(folder, callbacks=(), **options):
    config = DPOConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-3,
        max_length=None,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        gradient_checkpointing=False,
        **options,
    )
    policy, recorder = vision.model(), tiny.Losses()
    trainer = DPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(policy),
        args=config,
        train_dataset=vision.pairs(),
        processing_class=vision.processor(),
        callbacks=[recorder, *callbacks],
    )
    trainer.train()
    return tiny.Run(trainer, recorder.logs)


def tower(model):
    return torch.cat(
        [value.detach().flatten() for name, value in model.named_parameters() if "vision_tower" in name]
    )


@pytest.mark.parametrize(("trl_type", "ours"), [("sigmoid", "dpo"), ("ipo", "ipo")])
def test_the_callback_trains_as_trl_does(tmp_path, trl_type, ours):
    theirs = train(tmp_path, loss_type=[trl_type])
    for kernel in ("trl", "prefloss"):
        run = train(tmp_path, [PreferenceLossCallback(ours, kernel=kernel)], loss_type=[trl_type])
        assert run.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(run.weights, theirs.weights, rtol=0, atol=1e-5)
        # The images take part: their tower learns.
        assert not torch.allclose(tower(run.trainer.model), tower(vision.model()), atol=1e-4)
