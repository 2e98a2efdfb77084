"""TRL's DPOTrainer on batches of a `PreferenceCollator`: the training that it makes of its own padded batches."""

import pytest
import torch
from peft import LoraConfig

from prefloss.integrations.transformers import PreferenceCollator
from prefloss.integrations.trl import PreferenceLossCallback
from tests import tiny

LAYOUTS = ("padded", "packed", "shared_prefix")
SETTINGS = {
    "reference model": {},
    "lora": {"peft_config": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}


def trained(folder, setting, layout=None, loss="ipo", **options):
    options = {"max_steps": 5, **SETTINGS[setting], **options}
    if "peft_config" in options:
        options["peft_config"] = options["peft_config"]()
    collator = None if layout is None else PreferenceCollator(layout=layout, pad_token_id=0)
    torch.manual_seed(0)
    return tiny.train("dpo", folder, [PreferenceLossCallback(loss)], data_collator=collator, **options)


@pytest.mark.parametrize("setting", SETTINGS)
def test_trainings_are_those_of_trls_own_batches(tmp_path, setting):
    theirs = trained(tmp_path / "theirs", setting)
    for layout in LAYOUTS:
        ours = trained(tmp_path / layout, setting, layout)
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-5)
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=2e-5)
        for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert ours.logs[-1][name] == pytest.approx(theirs.logs[-1][name], abs=1e-4)


def test_evaluation_is_that_of_trls_own_batches(tmp_path):
    def evaluated(collator):
        callback = PreferenceLossCallback("dpo")
        # Batches of one size: TRL logs the mean of their means.
        held_out = tiny.pairs(16, seed=4)
        trainer = tiny.build("dpo", tmp_path, [callback], eval_data=held_out, data_collator=collator)
        return trainer.evaluate()

    found, wanted = evaluated(PreferenceCollator(layout="shared_prefix")), evaluated(None)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_logps/rejected"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-5)


def test_a_kto_trainer_keeps_its_own_collator(tmp_path):
    trainer = tiny.build(
        "kto", tmp_path, [PreferenceLossCallback("kto")], data_collator=PreferenceCollator(layout="packed")
    )
    with pytest.raises(
        TypeError, match="data_collator: got PreferenceCollator in a KTOTrainer, expected TRL's own"
    ):
        trainer.train()


@pytest.mark.parametrize("diagnose", [True, False])
def test_the_diagnosis_is_switched_for_these_batches_too(tmp_path, diagnose):
    callback = PreferenceLossCallback("dpo", diagnose=diagnose)
    run = tiny.train(
        "dpo", tmp_path, [callback], data_collator=PreferenceCollator(layout="packed"), max_steps=2
    )
    assert ("prefloss/kl_per_token" in run.logs[-1]) is diagnose
