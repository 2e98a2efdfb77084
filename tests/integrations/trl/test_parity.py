"""The callback trains exactly as TRL does where TRL has the loss: every step's loss, and the final weights."""

import pytest
import torch
from peft import LoraConfig

from prefloss.integrations.trl import PreferenceLossCallback, attach
from prefloss.training import PreferenceCollator
from tests import tiny

LOSSES = {
    "sigmoid": ("dpo", "dpo"),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
    "kto": ("kto", "kto"),
}


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora": {"peft_config": lora},
    "checkpointed": {"activation_checkpointing": True},
    "all": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "precompute_ref_log_probs": True,
        "peft_config": lora,
        "activation_checkpointing": True,
    },
}


def options(loss, setting):
    made = {name: value() if callable(value) else value for name, value in SETTINGS[setting].items()}
    kind, _ = LOSSES[loss]
    return {**made, "loss_type": [loss] if kind == "dpo" else loss}


def assert_same_run(ours, theirs):
    assert len(ours.losses) == len(theirs.losses) == 20
    assert max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)) < 1e-5
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_are_those_of_trl(tmp_path, loss, setting):
    kind, name = LOSSES[loss]
    theirs = tiny.train(kind, tmp_path, **options(loss, setting))
    ours = tiny.train(kind, tmp_path, [PreferenceLossCallback(name)], **options(loss, setting))
    assert_same_run(ours, theirs)
    # The two runs agree because the losses do, not because one of them went unused.
    assert "prefloss/empty" in ours.logs[-1]
    assert "prefloss/empty" not in theirs.logs[-1]
    shared = theirs.logs[-1].keys() - {"step_time", "total_flos"}
    assert shared <= ours.logs[-1].keys()
    for name in shared:
        if name.startswith(("rewards/", "logps/", "logits/", "kl")):
            assert ours.logs[-1][name] == pytest.approx(theirs.logs[-1][name], abs=1e-4)


@pytest.mark.parametrize("loss", ["ipo", "kto"])
def test_attach_trains_as_the_callback_does(tmp_path, loss):
    kind, name = LOSSES[loss]
    theirs = tiny.train(kind, tmp_path, **options(loss, "plain"))
    recorder = tiny.Losses()
    trainer = tiny.build(kind, tmp_path, [recorder])
    attach(trainer, name)
    trainer.train()
    assert_same_run(tiny.Run(trainer, recorder.logs), theirs)


def test_weights_of_votes_come_from_the_configuration(tmp_path):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
    theirs = tiny.train("kto", tmp_path, **weights)
    callback = PreferenceLossCallback("kto")
    ours = tiny.train("kto", tmp_path, [callback], **weights)
    assert_same_run(ours, theirs)
    assert {name: callback.loss.params[name] for name in weights} == weights


def test_the_loss_is_not_trls_when_it_is_another(tmp_path):
    theirs = tiny.train("dpo", tmp_path)
    ours = tiny.train("dpo", tmp_path, [PreferenceLossCallback("hinge")])
    assert ours.losses[0] == pytest.approx(1.0, abs=1e-5)
    assert theirs.losses[0] == pytest.approx(0.693147, abs=1e-5)


def test_our_collator_mismatches_as_trl_does(tmp_path):
    """AUDIT U2: the same completion goes to the same prompt, in each batch."""
    rows = tiny.build("kto", tmp_path, data=tiny.labels(8)).train_dataset
    for start in (0, 4):
        batch = [rows[i] for i in range(start, start + 4)]
        ours = PreferenceCollator(mismatched=True)(batch)
        found = [completion for _, completion in ours.mismatched.token_ids()]
        assert found == [row["KL_completion_ids"] for row in batch]
