"""State-space models, tiny.experts, adapters, checkpointing, mixed precision."""

import copy
import math

import pytest
import torch
from peft import LoraConfig
from transformers import MambaConfig, MambaForCausalLM

from prefloss.integrations.transformers import Reference, model_logps
from prefloss.logratios import completion_targets
from tests import tiny


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=43, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=1
        )
    )


@pytest.mark.filterwarnings("ignore:.*fast path")
def test_a_state_space_model_trains(tmp_path):
    trainer = tiny.plain_train(tmp_path, "dpo", tiny.pairs(16), mamba(), max_steps=8, learning_rate=5e-3)
    assert tiny.losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert min(tiny.losses_of(trainer)) < 0.69


def test_ddp_finds_the_parameters_in_use(tmp_path):
    """It follows the graph of the model's outputs, from which the log-probs are not computed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = tiny.model()
        wrapped = torch.nn.parallel.DistributedDataParallel(policy, find_unused_parameters=True)
        ids = torch.tensor([[3, 4, 5, 6]])
        model_logps(
            wrapped, {"input_ids": ids}, completion_targets(ids, torch.ones_like(ids))
        ).logps.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    found = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    logps = policy(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    logps.sum().backward()
    for grad, parameter in zip(found, policy.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_router_loss_of_experts_is_kept(tmp_path):
    policy = tiny.experts()
    for accumulate in (1, 2):
        trainer = tiny.plain_train(
            tmp_path,
            "dpo",
            tiny.pairs(),
            copy.deepcopy(policy),
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            eval_data=tiny.pairs(8),
        )
        first = tiny.steps_of(trainer)[0]
        assert first["aux_loss"] > 0
        assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["aux_loss"], abs=1e-4)
    found = trainer.evaluate()
    assert found["eval_loss"] > 0.5 * found["eval_aux_loss"]


def test_adapters_train_against_the_model_without_them(tmp_path):
    lora = tiny.adapted()
    ours = tiny.plain_train(
        tmp_path, "dpo", tiny.pairs(), lora, own={"reference": Reference.adapter_off()}, learning_rate=1e-2
    )
    assert tiny.losses_of(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert tiny.losses_of(ours)[-1] != tiny.losses_of(ours)[0]
    base = tiny.model().state_dict()
    kept = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in lora.state_dict().items()
    }
    assert all(torch.equal(kept[name], value) for name, value in base.items())


def test_an_adapter_is_the_reference_of_another(tmp_path):
    lora = tiny.adapted(init_lora_weights=False)
    lora.add_adapter("sft", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    source = {name: value for name, value in lora.named_parameters() if ".default." in name}
    for name, value in lora.named_parameters():
        if ".sft." in name:
            value.data.copy_(source[name.replace(".sft.", ".default.")])
            value.requires_grad_(False)
    before = {name: value.requires_grad for name, value in lora.named_parameters()}
    trainer = tiny.plain_train(
        tmp_path, "dpo", tiny.pairs(), lora, own={"reference": Reference.adapter("sft")}
    )
    assert tiny.losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert tiny.losses_of(trainer)[-1] != tiny.losses_of(trainer)[0]
    assert {name: value.requires_grad for name, value in lora.named_parameters()} == before
    assert lora.active_adapter == "default"


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_checkpointing_and_mixed_precision(tmp_path, options):
    usual = tiny.plain_train(tmp_path, "dpo", tiny.pairs())
    other = tiny.plain_train(tmp_path, "dpo", tiny.pairs(), **options)
    assert tiny.losses_of(other)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert tiny.losses_of(other) == pytest.approx(tiny.losses_of(usual), abs=1e-2)
