"""The trial of packed rows: no batch, no weights and no length decide what it finds."""

import warnings

import pytest
import torch
import transformers as hf
from torch import nn

from prefloss.training import PreferenceCollator, batch_logps
from prefloss.training.forward import evaluating
from prefloss.training.split_attention import ARGUMENT
from tests.training.architectures import CONFIGS, SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*completion without tokens")


def example(prompt, *completions, first=5):
    """A ranking of completions, of so many tokens each."""
    ids = iter(range(first, 60))
    made = [[next(ids) for _ in range(count)] for count in completions]
    prompt_ids = [3 + (7 * i + first) % 50 for i in range(prompt)]
    return {"prompt_ids": prompt_ids, "completions_ids": made, "scores": [float(i) for i in range(len(made))]}


SHORT = [example(3, 2, 3), example(2, 4, 2, first=9)]
LONG = [example(25, 4, 5), example(20, 6, 3, first=8)]


def logps(model, layout, data, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = PreferenceCollator(layout=layout, **options)(data).rows
        found = batch_logps(model, rows).logps.sum(-1)
    return found, [str(entry.message) for entry in caught if "layout:" in str(entry.message)]


def check_equal(model, layout, data):
    torch.testing.assert_close(
        logps(model, layout, data)[0], logps(model, "padded", data)[0], rtol=1e-5, atol=1e-5
    )


def grow(model, deviation=0.3):
    """Weights as after a training, with which attention matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, deviation)


class Blind(hf.LlamaForCausalLM):
    """Attends to all tokens before, of whatever sequence, once its eyes are shut."""

    shut = True

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
        if self.shut and position_ids is not None:
            shape = (1, 1, position_ids.shape[1], position_ids.shape[1])
            attention_mask = torch.ones(shape, dtype=torch.bool).tril()
            kwargs.pop(ARGUMENT, None)
        return super().forward(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class Unplaced(hf.LlamaForCausalLM):
    """Counts positions from the start of the row."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


def llama(kind=hf.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return kind(hf.LlamaConfig(**{**SMALL, **options})).train()


BATCHES = {
    "completions cut away": ([example(6, 3, 3), example(7, 2, 2)], {"max_length": 5}),
    "completions of one token": ([example(3, 1, 1), example(4, 1, 1)], {}),
    "one row": ([example(3, 2)], {}),
    "equal tokens": (
        [{"prompt_ids": [5], "completions_ids": [[5, 5], [5, 5]], "scores": [1.0, 0.0]}] * 2,
        {},
    ),
}


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("case", BATCHES)
def test_any_first_batch_shows_what_the_model_does(case, layout):
    """AUDIT H1: the trial was made on rows of the first batch, which may hold nothing to compare."""
    first, options = BATCHES[case]
    model = llama(Blind)
    assert "its log-probs differ" in logps(model, layout, first, **options)[1][0]
    check_equal(model, layout, LONG)


@pytest.mark.parametrize("name", ["roformer", "opt", "gpt_neo", "bloom", "xlm", "moshi"])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_the_verdict_of_first_weights_and_short_rows_holds_for_grown_weights_and_long_rows(name, layout):
    """AUDIT H1, H3, H4, H5: RoFormer, GPT-Neo's window, Moshi's, which it does not apply, and XLM."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    # Longer than the short rows.
    for setting in ("window_size", "sliding_window"):
        if hasattr(config, setting):
            setattr(config, setting, 12)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    logps(model, layout, SHORT)
    grow(model)
    check_equal(model, layout, LONG)
    check_equal(model, layout, SHORT)


def test_a_model_whose_positions_cannot_be_set_shares_no_prompt():
    """AUDIT H1: at first weights, positions change a log-prob by less than rounding."""
    model = llama(Unplaced)
    assert "its positions cannot be set" in logps(model, "shared_prefix", SHORT)[1][0]
    # Without shared prompts, distances are those of padded rows.
    assert logps(model, "packed", SHORT)[1] == []
    grow(model)
    check_equal(model, "packed", LONG)
    check_equal(model, "shared_prefix", LONG)


def test_a_trial_that_shows_nothing_means_padded_rows():
    """AUDIT H1: attention without effect yet is no proof."""
    model = llama()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    for layout in ("packed", "shared_prefix"):
        notes = logps(model, layout, SHORT)[1] + logps(model, layout, SHORT)[1]
        assert len(notes) == 1
        assert "another prompt changes too little in its log-probs to compare them" in notes[0]


def test_a_model_is_tried_again_as_it_trains():
    """AUDIT H1: what held at the first batch was believed for the whole training."""
    model = llama(Blind)
    model.shut = False
    assert logps(model, "packed", SHORT)[1] == []
    model.shut = True
    notes = [note for _ in range(70) for note in logps(model, "packed", SHORT)[1]]
    assert len(notes) == 1
    check_equal(model, "packed", SHORT)


def test_sequences_beyond_what_was_tried_get_padded_rows():
    """AUDIT H3: the table of positions has no room for rows that pass the window by much."""
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=55))
    longer = [example(56, 4, 3)]
    assert logps(model, "shared_prefix", SHORT)[1] == []
    for said in (1, 0):
        found, notes = logps(model, "shared_prefix", longer)
        assert ["not tried on sequences of more than 55 tokens" in note for note in notes] == [True] * said
    assert torch.equal(found, logps(model, "padded", longer)[0])
    assert logps(model, "shared_prefix", SHORT)[1] == []


@pytest.mark.parametrize(
    "error", [AssertionError(), KeyError("mask"), AttributeError("shape"), NotImplementedError()]
)
def test_whatever_a_model_raises_it_gets_padded_rows(error):
    """AUDIT H5: XLM's AssertionError, with an empty message, ended the training."""

    class Raises(hf.LlamaForCausalLM):
        def forward(self, *args, attention_mask=None, **kwargs):
            if attention_mask is not None and attention_mask.ndim != 2:
                raise error
            return super().forward(*args, attention_mask=attention_mask, **kwargs)

    model = llama(Raises)
    assert f"forward refuses ({type(error).__name__}" in logps(model, "shared_prefix", SHORT)[1][0]
    check_equal(model, "shared_prefix", LONG)


def test_a_trial_leaves_modes_and_random_numbers_alone():
    model = llama(attention_dropout=0.5)
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        torch.manual_seed(3)
        wanted = logps(model, "packed", SHORT)[0]
        torch.manual_seed(3)
        # Now without a trial.
        assert torch.equal(logps(model, "packed", SHORT)[0], wanted)
    assert [module.training for module in model.modules()] == modes
    torch.set_rng_state(state)


def test_evaluating_restores_each_module():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_packs_and_finds_a_blind_model(layout, attention):
    def half(kind):
        config = hf.LlamaConfig(**{**SMALL, "hidden_size": 128}, attn_implementation=attention)
        torch.manual_seed(0)
        return kind(config).bfloat16().eval()

    assert logps(half(hf.LlamaForCausalLM), layout, SHORT)[1] == []
    assert "its log-probs differ" in logps(half(Blind), layout, SHORT)[1][0]
