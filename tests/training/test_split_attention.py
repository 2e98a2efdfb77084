"""Attention of packed rows without a mask over the row: the numbers of padded rows at lengths that fill no block."""

import itertools
import random

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefloss.training import PreferenceCollator, PreferenceObjective
from prefloss.training.attention import Way
from prefloss.training.branched_attention import branched_attention
from prefloss.training.split_attention import Sequences, register
from tests.training.architectures import SMALL, V

LONG = {**SMALL, "max_position_embeddings": 1024}


def group(prompt, completions, seed=0):
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(3, V) for _ in range(length)]

    scores = [float(i) for i in range(len(completions))]
    return {"prompt_ids": ids(prompt), "completions_ids": [ids(n) for n in completions], "scores": scores}


def computed(model, layout, data):
    model.zero_grad()
    result = PreferenceObjective("cpo", rankings_as="all")(model, PreferenceCollator(layout=layout)(data))
    result.loss.backward()
    return result.outputs["logps"], torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def recorded(model, monkeypatch):
    """Largest number of elements of a mask that attention got in a training step on shared prompts."""
    sizes = []
    own = torch.nn.functional.scaled_dot_product_attention

    def attention(*args, attn_mask=None, **kwargs):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return own(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return sizes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_long_groups_of_uneven_lengths_give_the_numbers_of_padded_rows(attention, checkpointing):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**LONG), attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    data = [group(300, [7, 200, 190, 64, 1]), group(5, [211, 209], seed=1), group(180, [30, 31, 33], seed=2)]
    wanted, gradient = computed(model, "padded", data)
    for layout in ("packed", "shared_prefix"):
        logps, found = computed(model, layout, data)
        torch.testing.assert_close(logps, wanted, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def test_no_mask_covers_the_row(monkeypatch):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LONG)).train()
    data = [group(300, [200, 200, 190, 64])]
    for layout in ("packed", "shared_prefix"):
        computed(model, layout, data)  # with its trial
    sizes = recorded(model, monkeypatch)
    for layout in ("packed", "shared_prefix"):
        computed(model, layout, data)
    assert sizes
    assert max(sizes) == 0


def test_calls_hold_sequences_of_near_lengths():
    sequences = torch.tensor([0] * 300 + [1] * 10 + [2] * 9)
    rows = torch.tensor([-1] * 100 + [0] * 100 + [1] * 95 + [2] * 5 + [-1] * 4 + [3] * 6 + [4] * 9)
    made, order = Sequences.of(sequences, rows, {"full_attention": None})
    # The prompt alone, the two short sequences together, then the completions of the prompt.
    assert [(call.lengths, call.prompt) for call in made.calls] == [
        ((100,), None),
        ((10, 9), None),
        ((100, 95), 0),
        ((5,), 0),
    ]
    assert sorted(order.tolist()) == list(range(len(rows)))


@pytest.mark.parametrize("lengths", [(7, 7, 7), (9, 4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_branched_attention_is_attention_with_a_mask(lengths, scale):
    torch.manual_seed(0)
    count, heads, groups, width, before = sum(lengths), 2, 2, 8, 11
    query = torch.randn(1, heads * groups, count, width, requires_grad=True)
    key, value = (torch.randn(1, heads, count, width, requires_grad=True) for _ in range(2))
    prompt = tuple(torch.randn(1, heads, before, width, requires_grad=True) for _ in range(2))
    inputs = (query, key, value, *prompt)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (row[:, None] == row) & torch.ones(count, count, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(count, before, dtype=torch.bool), own], 1)
    keys, values = (torch.cat(both, 2) for both in zip(prompt, (key, value), strict=True))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    found = branched_attention(query, key, value, prompt, lengths, scale)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_flash_attention_gets_the_lengths_of_keys_and_queries(monkeypatch):
    """A stand-in with FlashAttention's signature in transformers, which is absent here."""
    calls = []

    def flash(module, query, key, value, mask, scaling=None, **options):
        bounds = [options[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
        calls.append((mask, *bounds, options["max_length_q"], options["max_length_k"]))
        results = []
        for (q, q_end), (k, k_end) in zip(*map(itertools.pairwise, bounds), strict=True):
            own = torch.ones(q_end - q, k_end - k, dtype=torch.bool).tril(k_end - k - (q_end - q))
            results.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, q:q_end],
                    key[:, :, k:k_end],
                    value[:, :, k:k_end],
                    own,
                    scale=scaling,
                    enable_gqa=True,
                )
            )
        return torch.cat(results, 2).transpose(1, 2), None

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LONG)).train()
    data = [group(30, [7, 20, 19]), group(5, [11, 9], seed=1)]
    wanted, gradient = computed(model, "padded", data)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config._attn_implementation = "flash_attention_2"
    # Padded rows, which the trial compares with, stay with the attention that is here.
    monkeypatch.setattr("prefloss.training.score._way", lambda model, packed: Way("split"))
    logps, found = computed(model, "shared_prefix", data)
    torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    assert all(call[0] is None for call in calls)
    assert ([0, 20, 39], [0, 50, 99], 20, 50) in [call[1:] for call in calls]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_model_takes_shared_prompts(monkeypatch):
    # Its trial would compile more programs, for the lengths of the rows that it tries.
    monkeypatch.setattr("prefloss.training.score._way", lambda model, packed: Way("split"))
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**LONG, "num_hidden_layers": 1})).train()
    data = [group(30, [7, 20, 19])]
    wanted, gradient = computed(model, "padded", data)
    logps, found = computed(torch.compile(model, backend="eager"), "shared_prefix", data)
    torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_name", [False, True])
def test_other_calls_of_the_attention_are_left_alone(by_name):
    # Vision towers give the mask by name, and language models give it in its place.
    register("sdpa", hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)))
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    layer = torch.nn.Module()
    masks = ((), {"attention_mask": None}) if by_name else ((None,), {})
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        layer, query, key, value, *masks[0], is_causal=False, **masks[1]
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(found, expected)
