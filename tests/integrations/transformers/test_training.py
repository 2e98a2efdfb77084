"""The callback in a plain trainer: every feedback, exact accumulation, evaluation, resuming, other models."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

import prefloss
from prefloss.integrations.transformers import PreferenceLossCallback, Reference
from tests.integrations.transformers import plain
from tests.integrations.trl import tiny
from tests.integrations.trl.test_training import experts

DATA = {
    "pairs": tiny.pairs,
    "labels": tiny.labels,
    "rankings": plain.rankings,
    "scored": plain.scored_pairs,
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
    ("dpo", "rankings"): {"pairs": "all"},
    ("ipo", "rankings"): {"pairs": "best_worst"},
    ("margin_dpo", "scored"): {},
    ("ld_dpo", "pairs"): {},
    ("0.8*dpo + 0.2*nll", "pairs"): {},
    ("0.5*dpo + 0.5*kto_zero", "pairs"): {},
}


@pytest.mark.parametrize(("loss", "data"), STEPS, ids="-".join)
def test_feedback_of_every_kind_trains(tmp_path, loss, data):
    trainer = plain.train(tmp_path, loss, DATA[data](16), own=STEPS[loss, data], max_steps=8, learning_rate=5e-3)
    found = plain.losses(trainer)
    assert all(map(math.isfinite, found))
    assert len(set(found)) == 8
    if data != "labels":
        assert trainer.state.log_history[-2]["rewards/accuracies" if "simpo" not in loss else "logps/chosen"] is not None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_are_those_of_trl(tmp_path, accumulate):
    options = {
        "max_steps": 10,
        "per_device_train_batch_size": 4 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-3,
    }
    theirs = tiny.train("dpo", tmp_path, gradient_checkpointing=False, **options)
    ours = plain.train(tmp_path, "dpo", tiny.pairs(), **options)
    assert plain.losses(ours) == pytest.approx(theirs.losses, abs=1e-5)
    torch.testing.assert_close(plain.weights(ours.model), theirs.weights, rtol=0, atol=1e-5)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        assert plain_logs(ours)[-1][name] == pytest.approx(theirs.logs[-1][name], abs=1e-4)


def plain_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class TakesNoLossArguments(tiny.LlamaForCausalLM):
    accepts_loss_kwargs = False


ACCUMULATED = {
    ("dpo", "pairs"): {},
    ("kto_zero", "labels"): {},
    ("npo", "labels"): {},
    ("dpo_pl", "rankings"): {},
    ("dpo", "rankings"): {"pairs": "all"},
    # Its two terms count other examples.
    ("0.8*dpo + 0.2*nll", "pairs"): {},
}


@pytest.mark.filterwarnings("ignore:.*completion without tokens")
@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize(("loss", "data"), ACCUMULATED, ids="-".join)
def test_one_batch_or_many_give_the_same_step(tmp_path, loss, data, accepts):
    def step(size, accumulate):
        policy = tiny.model()
        if not accepts:
            policy.__class__ = TakesNoLossArguments
        # SGD: the weights tell the gradient. Some completions do not fit and are empty, and some only on one side.
        trainer = plain.train(
            tmp_path,
            loss,
            DATA[data](12, seed=3),
            policy,
            own=ACCUMULATED[loss, data],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_length=5 if data != "rankings" else 4,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        assert trainer.model_accepts_loss_kwargs is accepts
        return trainer

    whole, parts, single = step(12, 1), step(3, 4), step(1, 12)
    assert plain_logs(whole)[0]["prefloss/empty"] > 0
    assert plain.losses(parts) == pytest.approx(plain.losses(whole), abs=1e-6)
    for other in (parts, single):
        torch.testing.assert_close(plain.weights(other.model), plain.weights(whole.model), rtol=0, atol=2e-6)


def test_a_short_last_step_of_an_epoch_counts_right(tmp_path):
    def epoch(size, accumulate):
        options = {"optim": "sgd", "num_train_epochs": 1, "max_steps": -1, "max_grad_norm": 0.0, "learning_rate": 0.5}
        return plain.train(
            tmp_path,
            "dpo",
            tiny.pairs(10),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            **options,
        )

    one, many = epoch(6, 1), epoch(2, 3)
    assert one.state.global_step == many.state.global_step == 2
    torch.testing.assert_close(plain.weights(one.model), plain.weights(many.model), rtol=0, atol=2e-6)


def test_a_subclass_that_fetches_its_own_batches_gets_the_mean_of_means(tmp_path):
    class Fetches(plain.Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches = [next(epoch_iterator) for _ in range(num_batches)]
            return batches, self._get_num_items_in_batch(batches, device)

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = plain.train(tmp_path, "dpo", tiny.pairs(), kind=Fetches, **options)
    theirs = plain.train(tmp_path, "dpo", tiny.pairs(), **options)
    torch.testing.assert_close(plain.weights(ours.model), plain.weights(theirs.model), rtol=0, atol=1e-6)


def test_evaluation_is_exact_and_chooses_the_best_model(tmp_path):
    held_out = tiny.pairs(10, seed=5)
    trainer = plain.train(
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


def test_prediction_gives_log_probs_and_metrics(tmp_path):
    policy = tiny.model()
    trainer = plain.build(tmp_path, plain.callback(policy, "dpo"), policy, data=tiny.pairs(4))
    output = trainer.predict(tiny.pairs(4))
    assert output.metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert output.metrics["test_rewards/accuracies"] == 0.0
    logps, reference = output.predictions
    assert logps.shape == (8,)
    assert logps == pytest.approx(reference)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    def run(folder, **options):
        own = {"kl_baseline": {"name": "running_mean", "decay": 0.5}, "beta": {"name": "linear", "start": 0.5, "end": 0.1, "steps": 6}}
        return plain.train(
            folder, "kto", tiny.labels(), own=own, save_strategy="steps", save_steps=4, max_steps=8, **options
        )

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(plain.weights(resumed.model), plain.weights(whole.model), rtol=0, atol=1e-6)
    states = [trainer.callback_handler.callbacks[-1].loss_state for trainer in (whole, resumed)]
    assert states[0] == states[1]
    assert states[0]["kl_baseline"]["weight"] > 1
    assert states[0]["beta"] == {"done": 8}


def test_resumed_with_restored_callbacks(tmp_path):
    policy = tiny.model()
    data = plain.build(tmp_path, plain.callback(policy, "dpo"), policy, data=tiny.pairs(16)).predict(tiny.pairs(16))
    sums = data.predictions[0].reshape(2, -1, order="F") if False else None
    assert sums is None
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "restore_callback_states_from_checkpoint": True}
    own = {"reference": None, "beta": {"name": "linear", "start": 3.0, "end": 2.0, "steps": 4}}
    whole = plain.train(tmp_path / "whole", "simpo", tiny.pairs(), own=own, **options)
    resumed = plain.train(
        tmp_path / "resumed", "simpo", tiny.pairs(), own=own, resume=str(tmp_path / "whole" / "checkpoint-2"), **options
    )
    torch.testing.assert_close(plain.weights(resumed.model), plain.weights(whole.model), rtol=0, atol=1e-6)


def test_state_and_schedules_stand_still_in_evaluation(tmp_path):
    policy = tiny.model()
    item = plain.callback(policy, "kto", kl_baseline="running_mean")
    plain.build(tmp_path, item, policy, data=tiny.labels(8), eval_data=tiny.labels(8)).evaluate()
    assert item.loss_state["kl_baseline"]["weight"] == 0


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=43, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=1)
    )


@pytest.mark.filterwarnings("ignore:.*fast path")
def test_a_state_space_model_trains(tmp_path):
    trainer = plain.train(tmp_path, "dpo", tiny.pairs(16), mamba(), max_steps=8, learning_rate=5e-3)
    assert plain.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert min(plain.losses(trainer)) < 0.69


def test_router_loss_of_experts_is_kept(tmp_path):
    policy = experts()
    for accumulate in (1, 2):
        trainer = plain.train(
            tmp_path,
            "dpo",
            tiny.pairs(),
            copy.deepcopy(policy),
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            eval_data=tiny.pairs(8),
        )
        first = plain_logs(trainer)[0]
        assert first["aux_loss"] > 0
        assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["aux_loss"], abs=1e-4)
    found = trainer.evaluate()
    assert found["eval_loss"] > 0.5 * found["eval_aux_loss"]


def adapted(policy=None, **options):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(tiny.model() if policy is None else policy, config)


def test_adapters_train_against_the_model_without_them(tmp_path):
    lora = adapted()
    ours = plain.train(tmp_path, "dpo", tiny.pairs(), lora, own={"reference": Reference.adapter_off()}, learning_rate=1e-2)
    other = adapted(tiny.model())
    other.load_state_dict(adapted().state_dict())
    torch.manual_seed(0)
    assert plain.losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert plain.losses(ours)[-1] != plain.losses(ours)[0]
    base = tiny.model().state_dict()
    kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): value for name, value in lora.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in base.items())


def test_an_adapter_is_the_reference_of_another(tmp_path):
    lora = adapted(init_lora_weights=False)
    lora.add_adapter("sft", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    source = {name: value for name, value in lora.named_parameters() if ".default." in name}
    for name, value in lora.named_parameters():
        if ".sft." in name:
            value.data.copy_(source[name.replace(".sft.", ".default.")])
            value.requires_grad_(False)
    before = {name: value.requires_grad for name, value in lora.named_parameters()}
    trainer = plain.train(tmp_path, "dpo", tiny.pairs(), lora, own={"reference": Reference.adapter("sft")})
    assert plain.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert plain.losses(trainer)[-1] != plain.losses(trainer)[0]
    assert {name: value.requires_grad for name, value in lora.named_parameters()} == before
    assert lora.active_adapter == "default"


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True}, {"torch_compile": False, "group_by_length": False}][:2]
)
def test_checkpointing_and_mixed_precision(tmp_path, options):
    usual = plain.train(tmp_path, "dpo", tiny.pairs())
    other = plain.train(tmp_path, "dpo", tiny.pairs(), **options)
    assert plain.losses(other)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert plain.losses(other) == pytest.approx(plain.losses(usual), abs=1e-2)


def test_the_trainer_has_its_own_loss_back_without_the_callback(tmp_path):
    policy = tiny.model()
    trainer = plain.build(tmp_path, plain.callback(policy, "dpo"), policy, data=tiny.pairs(8))
    trainer.remove_callback(PreferenceLossCallback)
    ids = torch.tensor([[3, 4, 5]])
    batch = {"input_ids": ids, "labels": ids}
    assert trainer.compute_loss(policy, batch).item() == pytest.approx(policy(**batch).loss.item())
    assert isinstance(prefloss.get("dpo"), prefloss.Loss)
