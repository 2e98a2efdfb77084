"""References of every kind, and the check that policy and reference start as one."""

import copy

import pytest
import torch
from peft import LoraConfig

from prefloss.integrations.transformers import PreferenceLossCallback, Reference, model_logps
from prefloss.logratios import completion_targets
from prefloss.training.batch import Rows
from tests import tiny


def dropping():
    policy = tiny.model()
    policy.config.attention_dropout = 0.3
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return policy


def with_sums(folder, data, policy):
    """The data with the policy's own log-probs as ref columns."""
    policy = copy.deepcopy(policy).eval()
    trainer = tiny.plain_build(folder, tiny.plain_callback(policy, "dpo"), policy, data=data)
    sums = torch.from_numpy(trainer.predict(data).predictions[0])
    for side, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        data = data.add_column(name, sums[:, side].tolist())
    return data


def policy_copy(policy):
    return Reference.model(copy.deepcopy(policy))


@pytest.mark.parametrize("reference", [Reference.adapter_off(), Reference.adapter("sft")], ids=repr)
def test_an_adapted_policy_is_its_own_reference_without_dropout(tmp_path, reference):
    policy = second_adapter(False)
    frozen = next(value for name, value in policy.named_parameters() if ".default." in name)
    frozen.requires_grad_(False)
    trainer = tiny.plain_build(tmp_path, None, policy, data=tiny.pairs(4))
    ids = torch.tensor([[3, 4, 5, 6]])
    inputs, targets = {"input_ids": ids}, completion_targets(ids, torch.ones_like(ids))
    found = []
    for rate in (0.0, 0.5):
        for layer in policy.base_model.model.model.layers:
            layer.self_attn.attention_dropout = rate
        policy.train()
        found.append(reference.computed_logps(policy, Rows(inputs, targets), trainer.accelerator.autocast))
        assert policy.training
        assert policy.active_adapter == "default"
        assert not frozen.requires_grad
    assert torch.equal(*found)
    assert not torch.equal(found[0], model_logps(policy.eval(), inputs, targets).logps)


def test_cached_sums_train_as_the_model_does(tmp_path):
    data = tiny.pairs(12)
    cached = tiny.plain_train(
        tmp_path, "dpo", with_sums(tmp_path, data, tiny.model()), own={"reference": Reference.cached()}
    )
    live = tiny.plain_train(tmp_path, "dpo", data)
    assert tiny.losses_of(cached) == pytest.approx(tiny.losses_of(live), abs=1e-5)


def test_the_reference_is_frozen_and_never_drops(tmp_path):
    policy = tiny.model()
    reference = copy.deepcopy(policy).train()
    before = tiny.weights(reference)
    tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), policy, own={"reference": reference})
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert torch.equal(tiny.weights(reference), before)
    assert not torch.equal(tiny.weights(policy), before)


def bf16(model):
    return model.to(torch.bfloat16)


def second_adapter(init):
    policy = tiny.adapted(init_lora_weights=False)
    policy.add_adapter("sft", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init))
    for name, value in policy.named_parameters():
        if ".sft." in name:
            value.requires_grad_(False)
    return policy


WRONG = {
    "dropout": (dropping, policy_copy, r"dropout is on in the policy \(attention_dropout=0.3\)"),
    "weights": (tiny.model, lambda _: tiny.model(seed=1), r"the reference has other weights \(.* differs\)"),
    "dtype": (
        tiny.model,
        lambda p: bf16(copy.deepcopy(p)),
        r"another dtype \(torch.bfloat16, the policy torch.float32\)",
    ),
    "adapter": (
        lambda: tiny.adapted(init_lora_weights=False),
        lambda _: Reference.adapter_off(),
        "does not start at zero",
    ),
    "named": (
        lambda: second_adapter(False),
        lambda _: Reference.adapter("sft"),
        "'sft' holds other weights than 'default'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_policy_apart_from_its_reference_stops_training(tmp_path, name):
    make, reference, message = WRONG[name]
    policy = make()
    with pytest.raises(RuntimeError, match=f"step-0 check:.*{message}.*check_step_zero=False"):
        tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), policy, own={"reference": reference(policy)})
    policy = make()
    own = {"reference": reference(policy), "check_step_zero": False}
    tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), policy, own=own, max_steps=1)


def test_wrong_cached_sums_stop_training(tmp_path):
    data = with_sums(tmp_path, tiny.pairs(8), tiny.model(seed=1))
    with pytest.raises(RuntimeError, match=r"Reference.cached\(\).*the cached sums come from other weights"):
        tiny.plain_train(tmp_path, "dpo", data, own={"reference": Reference.cached()})


def test_a_second_training_starts_away_from_the_reference(tmp_path):
    trainer = tiny.plain_train(tmp_path, "dpo", tiny.pairs(8))
    trainer.train()


@pytest.mark.filterwarnings("ignore:.*completion without tokens")
def test_a_batch_without_completions_leaves_the_check_to_the_next(tmp_path):
    long = {"prompt": "w1 w2 w3 w4 w5", "chosen": " w1", "rejected": " w2"}
    short = {"prompt": "w1", "chosen": " w1", "rejected": " w2"}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_length": 4}
    with pytest.raises(RuntimeError, match="step-0 check"):
        tiny.plain_train(
            tmp_path, "dpo", [long, long, long, short], own={"reference": tiny.model(seed=1)}, **options
        )


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (lambda p: p, ValueError, "shares its weights with the policy"),
        (lambda p: Reference.adapter_off(), TypeError, "a LlamaForCausalLM without PEFT adapters"),
        (lambda p: Reference.cached(), ValueError, "data without ref_chosen_logps and ref_rejected_logps"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(tmp_path, reference, error, message):
    policy = tiny.model()
    with pytest.raises(error, match=message):
        tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), policy, own={"reference": reference(policy)})
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"expected one of \['default', 'sft'\]"),
        ("default", "the one in training"),
        ("sft", "is trainable"),
    ],
)
def test_an_adapter_that_cannot_be_a_reference_is_refused(tmp_path, name, message):
    policy = second_adapter(True)
    if name == "sft":
        for key, value in policy.named_parameters():
            value.requires_grad_("lora" in key)
    with pytest.raises(ValueError, match=message):
        tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), policy, own={"reference": Reference.adapter(name)})


def test_the_base_model_of_a_peft_model_is_no_reference(tmp_path):
    base = tiny.model()
    with pytest.raises(ValueError, match=r"Reference.adapter_off\(\) for a PEFT model"):
        tiny.plain_train(tmp_path, "dpo", tiny.pairs(8), tiny.adapted(base), own={"reference": base})


@pytest.mark.parametrize(
    "reference",
    [Reference.adapter_off(), Reference.adapter("sft"), Reference.cached(), Reference.none()],
    ids=repr,
)
def test_a_reference_is_made_again_from_its_config(reference):
    """AUDIT T1: with the name of its adapter."""
    again = Reference.of(reference.config())
    assert (again.kind, again.value) == (reference.kind, reference.value)
    assert repr(again) == repr(reference)
    assert Reference.of(reference) is reference


def test_a_loss_of_log_ratios_needs_a_reference():
    with pytest.raises(
        ValueError, match=r"reference: got Reference.none\(\) with dpo.*Reference.adapter_off\(\)"
    ):
        PreferenceLossCallback("dpo")
    with pytest.raises(ValueError, match="reads the log-prob of each token; it holds only"):
        PreferenceLossCallback("ld_dpo", reference=Reference.cached())
    with pytest.raises(TypeError, match=r"reference: got 'base', expected Reference.model"):
        PreferenceLossCallback("dpo", reference="base")
    with pytest.raises(TypeError, match="model: got str, expected a causal language model"):
        Reference.model("base")


def test_computed_and_cached_references_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"columns ref_\*logps: got reference log-probs with the data"):
        tiny.plain_train(tmp_path, "dpo", with_sums(tmp_path, tiny.pairs(4), tiny.model()))
