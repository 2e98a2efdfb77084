"""Models that read images: the callback in TRL's trainers, and our own collator."""

import copy

import pytest
import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from prefloss.integrations.trl import PreferenceLossCallback
from tests import tiny, vision

KINDS = {"dpo": (DPOTrainer, DPOConfig, vision.pairs), "kto": (KTOTrainer, KTOConfig, vision.labels)}


def train(folder, callbacks=(), kind="dpo", family="llava", **options):
    trainer_class, config_class, rows = KINDS[kind]
    config = config_class(
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
    policy, recorder = vision.model(family=family), tiny.Losses()
    trainer = trainer_class(
        model=policy,
        ref_model=copy.deepcopy(policy),
        args=config,
        train_dataset=rows(family=family),
        processing_class=vision.processor(family),
        callbacks=[recorder, *callbacks],
    )
    trainer.train()
    return tiny.Run(trainer, recorder.logs)


def tower(model):
    return torch.cat(
        [
            value.detach().flatten()
            for name, value in model.named_parameters()
            if "vision_tower" in name or "visual." in name
        ]
    )


# KTO's mismatched completions are about images too.
CASES = {
    "llava sigmoid": ("llava", "dpo", "sigmoid", "dpo"),
    "llava ipo": ("llava", "dpo", "ipo", "ipo"),
    "qwen2_vl ipo": ("qwen2_vl", "dpo", "ipo", "ipo"),
    "gemma3 sigmoid": ("gemma3", "dpo", "sigmoid", "dpo"),
    "gemma3 kto": ("gemma3", "kto", "kto", "kto"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_callback_trains_as_trl_does(tmp_path, case):
    family, kind, trl_type, ours = CASES[case]
    setting = {"kind": kind, "family": family, "loss_type": [trl_type] if kind == "dpo" else trl_type}
    theirs = train(tmp_path, **setting)
    for kernel in ("trl", "prefloss"):
        run = train(tmp_path, [PreferenceLossCallback(ours, kernel=kernel)], **setting)
        assert run.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(run.weights, theirs.weights, rtol=0, atol=1e-5)
        # The images take part: their tower learns.
        assert not torch.allclose(tower(run.trainer.model), tower(vision.model(family=family)), atol=1e-4)
