"""`layout="auto"`: what each layout computes, which one is chosen, and that it changes no number."""

import logging
import warnings

import pytest
import torch
import transformers as hf

from prefloss.training import PreferenceCollator, PreferenceObjective, batch_logps, explain_layout
from prefloss.training.attention import Way
from prefloss.training.auto_layout import Kernel, Lengths, Work, choose, packed_work, padded_work
from prefloss.training.layouts import PROMPTS
from prefloss.training.trial import Verdict
from tests import tiny
from tests.training.architectures import SMALL
from tests.training.test_split_attention import group

SPLIT, MASK, POSITIONS = Way("split"), Way("mask"), Way("positions")
SDPA, EAGER, FLASH = Kernel(False, True, True), Kernel(False, False, False), Kernel(True, True, True)
# A shared prompt of 10 tokens, before 5 and 7 of the completions, and a row of its own.
LENGTHS = Lengths([(10, [15, 17]), (3, [8])])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Estimates for a CPU depend on its threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def model(**changes):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**SMALL, "max_position_embeddings": 1024, **changes})
    ).train()


def wide():
    """A model as it would be trained, without weights: an estimate needs its configuration."""
    with torch.device("meta"):
        return model(hidden_size=512, intermediate_size=1365, num_hidden_layers=8, num_attention_heads=8)


def chosen(lengths, verdict=None, policy=None):
    found = Verdict(SPLIT, None, "") if verdict is None else verdict
    return choose(wide() if policy is None else policy, lengths, torch.device("cpu"), lambda shares: found)


def computed(policy, layout, data):
    policy.zero_grad()
    result = PreferenceObjective("cpo", rankings_as="all")(policy, PreferenceCollator(layout=layout)(data))
    result.loss.backward()
    return result.outputs["logps"], torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def test_lengths_are_those_of_the_batch():
    data = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7]},
        {"prompt_ids": [4, 4, 4, 4], "chosen_ids": [7, 8], "rejected_ids": [5]},
    ]
    batch = PreferenceCollator(max_length=5)(data)
    found = Lengths.of(batch["attention_mask"], batch[PROMPTS])
    assert found == Lengths([(2, [5, 3]), (4, [5, 5])])
    assert found.sequences(share=True) == [6, 6]
    assert found.sequences(share=False) == [5, 3, 5, 5]


def test_work_is_the_tokens_and_the_pairs_that_attention_computes():
    exact = (15**2 + 17**2 + 8**2) / 2
    even = Lengths([(1, [4, 4])])
    # Three rows of 17 tokens with a mask; rows of one length need none.
    assert padded_work(LENGTHS, SDPA) == padded_work(LENGTHS, EAGER) == Work(51, 3 * 17**2, 1)
    assert padded_work(LENGTHS, FLASH) == Work(51, exact, 1)
    assert [padded_work(even, kernel).pairs for kernel in (SDPA, EAGER)] == [4**2, 2 * 4**2]
    # Padding 15 to 17 adds less than a tenth, padding 8 more.
    assert packed_work(LENGTHS, False, SPLIT, SDPA) == Work(40, 17**2 + 8**2 / 2, 2)
    # The prompt, the row alone, and completions of 7 and 5 in calls of their own.
    assert packed_work(LENGTHS, True, SPLIT, SDPA) == Work(
        30, (10**2 + 8**2) / 2 + 7 * (3.5 + 10) + 5 * (2.5 + 10), 4
    )
    assert packed_work(LENGTHS, True, SPLIT, EAGER) == Work(30, 10**2 + 8**2 + 7 * 17 + 5 * 15, 4)
    assert packed_work(LENGTHS, True, MASK, SDPA) == Work(44, 2 * 22**2, 1)
    assert packed_work(LENGTHS, False, POSITIONS, FLASH) == Work(40, exact, 1)


def test_the_kernel_is_that_of_the_attention_and_the_device():
    policy = model()
    found = []
    for name, device in (("sdpa", "cpu"), ("sdpa", "cuda"), ("eager", "cpu"), ("flash_attention_2", "cuda")):
        policy.config._attn_implementation = name
        found.append(Kernel.of(policy, torch.device(device)))
    assert found == [SDPA, Kernel(False, True, False), EAGER, FLASH]


def test_the_layout_of_the_least_time_is_chosen():
    groups = Lengths([(512, [1024] * 8)])
    assert chosen(groups).layout == "shared_prefix"
    assert chosen(groups).tokens == pytest.approx(4608 / 8192)
    assert chosen(groups).time < 0.7
    assert chosen(Lengths([(512, [1024]), (512, [700]), (512, [600])])).layout == "packed"
    even = chosen(Lengths([(512, [1024]), (512, [1024])]))
    assert (even.layout, even.time) == ("padded", 1.0)
    # To arrange few tokens costs more than to compute them.
    assert chosen(Lengths([(4, [6, 5])]), policy=model()).layout == "padded"


def test_a_model_that_cannot_pack_gets_padded_rows_and_is_not_tried_in_vain():
    refusal = Verdict(None, None, "it sees too far")
    found = chosen(Lengths([(512, [1024] * 8)]), refusal)
    assert str(found) == (
        "layout: padded, because shared_prefix is not possible: it sees too far; "
        "packed would take an estimated 1.00 of the time"
    )

    def tried(shares):
        raise AssertionError("nothing is gained")

    assert choose(wide(), Lengths([(5, [9])]), torch.device("cpu"), tried).layout == "padded"


def test_processes_choose_together(on_ranks):
    own = [Lengths([(512, [1024] * 8)]), Lengths([(512, [1024])])]
    assert chosen(own[1]).layout == "padded"
    found = on_ranks(lambda rank: chosen(own[rank]))
    assert found[0] == found[1]
    assert found[0].layout == "shared_prefix"
    assert found[0].tokens == pytest.approx((4608 + 1024) / (8192 + 1024))


def test_all_processes_run_the_layout_that_they_chose(on_ranks):
    votes = [{"prompt_ids": [token] * 300, "completion_ids": [7, 8], "label": True} for token in (5, 6)]
    gains, alone = PreferenceCollator()([group(600, [350, 300, 200, 150])]), PreferenceCollator()(votes)

    def shape(rank):
        """Of the second batch, for which one process would take padded rows."""
        policy, shapes = model(), []
        batch_logps(policy, (alone if rank else gains).rows)
        policy.get_input_embeddings().register_forward_hook(
            lambda module, ids, out: shapes.append(tuple(ids[0].shape))
        )
        batch_logps(policy, alone.rows)
        return shapes

    assert explain_layout(model(), alone).layout == "padded"
    assert on_ranks(shape) == [[(1, 604)], [(1, 604)]]


def test_the_default_takes_the_numbers_of_padded_rows_and_says_which_layout(caplog):
    policy = model()
    data = [group(600, [350, 300, 200, 64]), group(100, [90], seed=1)]
    assert explain_layout(policy, PreferenceCollator()(data)).layout == "shared_prefix"
    with caplog.at_level(logging.INFO, "prefloss.training"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            logps, gradient = computed(policy, "auto", data)
    said = [record.message for record in caplog.records if "layout" in record.message]
    assert len(said) == 1
    assert said[0].startswith("LlamaForCausalLM: layout: shared_prefix, which computes 0.")
    wanted, padded = computed(policy, "padded", data)
    torch.testing.assert_close(logps, wanted, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(gradient, padded, rtol=1e-4, atol=1e-5)
    shapes = []
    policy.get_input_embeddings().register_forward_hook(lambda module, ids, out: shapes.append(ids[0].shape))
    computed(policy, "auto", data)
    assert shapes == [(1, 600 + 350 + 300 + 200 + 64 + 100 + 90)]


def test_a_batch_that_was_joined_shares_only_what_is_equal():
    policy = model()
    rows = [
        PreferenceCollator()([{"prompt_ids": [prompt] * 900, "completion_ids": [7, 8], "label": True}] * 3)
        for prompt in (5, 6)
    ]
    joined = type(rows[0])({name: torch.cat([batch[name] for batch in rows]) for name in rows[0]})
    assert explain_layout(policy, joined).layout == "shared_prefix"
    found = batch_logps(policy, joined.rows).logps
    wanted = torch.cat([batch_logps(policy, batch.rows).logps for batch in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_inputs_beside_the_tokens_keep_padded_rows():
    row = {"prompt_ids": [5] * 300, "chosen_ids": [7], "rejected_ids": [8]}
    assert PROMPTS in PreferenceCollator()([row])
    batch = PreferenceCollator(model_inputs=["pixel_values"])([{**row, "pixel_values": torch.zeros(1, 3)}])
    assert PROMPTS not in batch
    with pytest.raises(ValueError, match="batch: got one with a layout, expected one of PreferenceCollator"):
        explain_layout(tiny.model(), batch)


def test_a_compiled_model_keeps_padded_rows():
    groups = Lengths([(512, [1024] * 8)])
    for compiled in (torch.compile(wide(), backend="eager"), wide()):
        if isinstance(compiled, hf.PreTrainedModel):
            compiled.model.layers[0].compile(backend="eager")
        found = chosen(groups, policy=compiled)
        assert (found.layout, "compiled" in found.reason) == ("padded", True)
