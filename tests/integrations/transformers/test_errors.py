"""What the callback refuses, and the errors that name what is wrong."""

import pytest
import torch
from transformers import TrainerCallback

import prefloss
from prefloss.integrations.transformers import PreferenceLossCallback, Reference
from prefloss.integrations.trl import PreferenceLossCallback as TrlCallback
from tests import tiny


def test_each_trainer_has_its_own_callback(tmp_path):
    policy = tiny.model()
    with pytest.raises(
        TypeError, match=r"got DPOConfig.*PreferenceLossCallback of prefloss.integrations.trl"
    ):
        tiny.build("dpo", tmp_path, [tiny.plain_callback(policy, "dpo")])
    with pytest.raises(TypeError, match="expected TRL's DPOTrainer"):
        tiny.plain_build(tmp_path, TrlCallback("dpo"), policy, data=tiny.pairs(4))


def test_trl_trains_as_before_beside_a_plain_trainer(tmp_path):
    before = tiny.train("dpo", tmp_path, max_steps=2).losses
    tiny.plain_train(tmp_path, "hinge", tiny.pairs(8), max_steps=1)
    assert tiny.train("dpo", tmp_path, max_steps=2).losses == before


@pytest.mark.parametrize(
    ("loss", "data", "own", "message"),
    [
        ("dpo", "labels", {}, "feedback: got Labels.*single labels do not say"),
        ("dpo", "rankings", {}, r"which pairs to make .*rankings_as='best_worst' \| 'adjacent' \| 'all'"),
        ("kto_zero", "rankings", {}, "rankings_as='best_worst'"),
    ],
)
def test_feedback_that_gives_no_such_loss_is_refused(tmp_path, loss, data, own, message):
    rows = {"labels": tiny.labels, "rankings": tiny.rankings}[data](8)
    with pytest.raises(TypeError, match=message):
        tiny.plain_train(tmp_path, loss, rows, own=own)


def test_columns_that_the_loss_does_not_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="column 'score_chosen': dpo does not read it"):
        tiny.plain_train(tmp_path, "dpo", tiny.scored_pairs(8))
    rows = [{**row, "score": 1.0} for row in tiny.labels(8)]
    with pytest.raises(ValueError, match="column 'score': kto_zero does not read it"):
        tiny.plain_train(tmp_path, "kto_zero", rows)


def test_scores_that_the_loss_needs_are_asked_for(tmp_path):
    with pytest.raises(
        ValueError, match="odpo: got data without scores, expected the column score_chosen and score_rejected"
    ):
        tiny.plain_train(tmp_path, "odpo", tiny.pairs(8))


@pytest.mark.parametrize("loss", ["tdpo1", "xpo", "wpo"])
def test_a_loss_that_needs_more_than_a_forward_pass_is_refused(loss):
    with pytest.raises(ValueError, match=f"{loss}: needs .*use a loop of your own"):
        PreferenceLossCallback(loss, reference=Reference.adapter_off())


def test_hyperparameters_belong_in_the_loss():
    with pytest.raises(TypeError, match=r"hyperparameters: got \['beta'\] with a Loss"):
        PreferenceLossCallback(prefloss.get("dpo"), reference=Reference.cached(), beta=0.2)
    with pytest.raises(
        ValueError, match="rankings_as: got 'some', expected one of 'all', 'adjacent', 'best_worst' or None"
    ):
        PreferenceLossCallback("dpo", reference=Reference.cached(), rankings_as="some")


def test_settings_that_would_go_unused_are_refused(tmp_path):
    policy = tiny.model()
    with pytest.raises(ValueError, match=r"label_smoothing_factor: got 0\.1, expected 0"):
        tiny.plain_build(
            tmp_path,
            tiny.plain_callback(policy, "dpo"),
            policy,
            data=tiny.pairs(4),
            label_smoothing_factor=0.1,
        )
    trainer = tiny.plain_build(tmp_path, tiny.plain_callback(policy, "dpo"), policy, data=tiny.pairs(4))
    trainer.compute_loss_func = lambda *args, **kwargs: 0.0
    with pytest.raises(ValueError, match="compute_loss_func: got one beside PreferenceLossCallback"):
        trainer.train()


@pytest.mark.parametrize("rows", [tiny.pairs(4), [dict(row) for row in tiny.pairs(4)]], ids=["set", "list"])
def test_columns_that_the_trainer_takes_out(tmp_path, rows):
    """AUDIT U1."""
    policy = tiny.model()
    trainer = tiny.plain_build(
        tmp_path, tiny.plain_callback(policy, "dpo"), policy, data=rows, remove_unused_columns=True
    )
    with pytest.raises(ValueError, match=r"remove_unused_columns: got True, expected False.*PreferenceColl"):
        trainer.train()
    with pytest.raises(ValueError, match="remove_unused_columns"):
        trainer.evaluate(rows)


@pytest.mark.parametrize(
    ("processing", "name"), [(None, "default_data_collator"), ("tokenizer", "DataCollatorWithPadding")]
)
def test_a_forgotten_collator(tmp_path, processing, name):
    """AUDIT U1."""
    policy = tiny.model()
    trainer = tiny.Trainer(
        policy,
        tiny.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False
        ),
        train_dataset=tiny.pairs(4),
        processing_class=processing and tiny.tokenizer(),
        callbacks=[tiny.plain_callback(policy, "dpo")],
    )
    with pytest.raises(
        ValueError, match=f"data_collator: got {name} of transformers, expected PreferenceColl"
    ):
        trainer.train()


def test_one_callback_serves_one_trainer(tmp_path):
    policy = tiny.model()
    item = tiny.plain_callback(policy, "dpo")
    trainer = tiny.plain_build(tmp_path, item, policy, data=tiny.pairs(4))
    with pytest.raises(RuntimeError, match="is in another trainer already"):
        tiny.plain_build(tmp_path, item, policy, data=tiny.pairs(4))
    trainer.add_callback(tiny.plain_callback(policy, "ipo"))
    with pytest.raises(ValueError, match="expected one PreferenceLossCallback"):
        trainer.train()


def test_a_trainer_that_goes_around_the_loss_is_stopped(tmp_path):
    class Around(tiny.Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(inputs["input_ids"]).logits.mean()

    policy = tiny.model()
    trainer = tiny.plain_build(
        tmp_path, tiny.plain_callback(policy, "dpo"), policy, data=tiny.pairs(8), kind=Around
    )
    with pytest.raises(RuntimeError, match="was not used in a training step"):
        trainer.train()


def test_a_batch_of_another_collator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected what PreferenceCollator writes"):
        tiny.plain_train(
            tmp_path,
            "dpo",
            tiny.pairs(8),
            collator=lambda rows: {"input_ids": torch.ones(len(rows), 3).long()},
        )


def test_a_loss_that_is_not_finite_names_its_example(tmp_path):
    policy = tiny.model()
    with torch.no_grad():
        policy.model.embed_tokens.weight[tiny.tokenizer().convert_tokens_to_ids("w39")] = torch.nan
    rows = [{"prompt": "w1", "chosen": " w2", "rejected": " w3"} for _ in range(4)]
    rows[2] = {"prompt": "w39", "chosen": " w2", "rejected": " w3"}

    class Ordered(tiny.Trainer):
        def _get_train_sampler(self, *args):
            return None

    with pytest.raises(
        FloatingPointError, match=r"dpo of example 2 of this batch is nan \(1 of 4.*chosen: policy nan"
    ):
        tiny.plain_train(tmp_path, "dpo", rows, policy, kind=Ordered)


def test_a_loss_across_the_batch_says_what_accumulation_does(tmp_path):
    policy = tiny.model()
    options = {"data": tiny.pairs(4), "gradient_accumulation_steps": 2}
    with pytest.warns(
        UserWarning, match="aot: an example's loss depends on its batch.*accumulation does not enlarge it"
    ):
        tiny.plain_build(tmp_path, tiny.plain_callback(policy, "aot"), policy, **options)


def test_another_callback_sees_the_figures(tmp_path):
    class Sees(TrainerCallback):
        seen = None

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen = self.seen or dict(logs)

    item = Sees()
    tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), callbacks=[item], max_steps=1)
    assert item.seen["rewards/accuracies"] == 0.0
