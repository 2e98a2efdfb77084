"""Packed batches and shared prompts: the same log-probs, gradients and trainings as padded rows, or padded rows."""

import random
import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from prefloss.integrations.transformers import PreferenceCollator, PreferenceObjective, Reference
from prefloss.training import split_attention
from tests import tiny
from tests.training.architectures import CONFIGS, HEADS, SMALL, V

COMPACT = ("packed", "shared_prefix")
ARCHITECTURES = {
    **CONFIGS,
    "mistral_window": lambda: hf.MistralConfig(**SMALL, sliding_window=4),
    "qwen3_window": lambda: hf.Qwen3Config(**HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2_window": lambda: hf.Gemma2Config(**HEADS, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_window": lambda: hf.Gemma3TextConfig(
        **HEADS, sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "llama4_chunks": lambda: hf.Llama4TextConfig(
        **HEADS, attention_chunk_size=4, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48
    ),
    "mixtral_unrouted": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
}  # fmt: skip
# Why each of these gets padded rows in each layout; all others take both.
STATE = {"packed": "carries a state", "shared_prefix": "carries a state"}
ROUTER = {"shared_prefix": "router loss"}
REFUSED = {
    "falcon_h1": STATE,
    "recurrent_gemma": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "rwkv": STATE,
    "mixtral": ROUTER,
    "qwen3_moe": ROUTER,
    # Its mask is made without the position ids, and its positions are counted from a mask of two dimensions alone.
    "bloom": {"packed": "log-probs differ", "shared_prefix": "forward refuses"},
    # Takes no position ids, though its forward takes any argument.
    "roformer": {"shared_prefix": "cannot share a prompt"},
    # Its window is not one that the mask of a shared prompt knows.
    "gpt_neo": {"shared_prefix": "log-probs differ"},
    "xlm": {"packed": "log-probs differ", "shared_prefix": "forward refuses (AssertionError"},
    "inkling2": STATE,
}
# Its recurrence writes in place over what its own backward needs.
NO_BACKWARD = ("rwkv",)


def examples(count=4, seed=0, most=4):
    rng = random.Random(seed)

    def ids(shortest, longest):
        return [rng.randint(3, V - 1) for _ in range(rng.randint(shortest, longest))]

    made = []
    for _ in range(count):
        completions = [ids(1, 6) for _ in range(rng.randint(2, most))]
        scores = [float(i) for i in range(len(completions))]
        made.append({"prompt_ids": ids(3, 8), "completions_ids": completions, "scores": scores})
    return made


def built(name, attention):
    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    for setting in [*vars(config)]:
        if "drop" in setting and isinstance(getattr(config, setting), float):
            setattr(config, setting, 0.0)
    config._experts_implementation = "eager"
    try:
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    except ValueError:
        pytest.skip(f"{name} has no {attention} attention")


def computed(model, layout, data, loss="cpo", **options):
    """Log-probs and gradient of a training batch, and what was warned of."""
    objective = PreferenceObjective(loss, rankings_as="all", **options)
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = objective(model, PreferenceCollator(layout=layout)(data))
    if model.config.model_type not in NO_BACKWARD:
        result.loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    notes = [str(entry.message) for entry in caught if "layout:" in str(entry.message)]
    return result.outputs["logps"], torch.cat(gradients) if gradients else torch.zeros(1), notes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_numbers_of_padded_rows(name, attention):
    model = built(name, attention)
    wanted, gradient, _ = computed(model, "padded", examples())
    for layout in COMPACT:
        logps, found, notes = computed(model, layout, examples())
        torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
        refused = REFUSED.get(name, {}).get(layout)
        assert [refused in note for note in notes] == [True] if refused else not notes


class Blind(hf.LlamaForCausalLM):
    """Takes a mask of four dimensions and the sequences of a row, and attends to whatever came before all the same."""

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = torch.ones_like(attention_mask).tril()
        kwargs.pop(split_attention.ARGUMENT, None)
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


def test_a_model_that_ignores_the_mask_is_found_out_and_gets_padded_rows():
    torch.manual_seed(0)
    model = Blind(hf.LlamaConfig(**SMALL, initializer_range=0.3))
    wanted, gradient, _ = computed(model, "padded", examples())
    logps, found, notes = computed(model, "shared_prefix", examples())
    assert len(notes) == 1
    assert "Blind cannot share a prompt: its log-probs differ from those of padded rows by" in notes[0]
    torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    # Said once.
    assert computed(model, "shared_prefix", examples(seed=1))[2] == []


def test_a_model_is_tried_on_a_shared_prompt_though_its_first_batch_has_none():
    torch.manual_seed(0)
    model = Blind(hf.LlamaConfig(**SMALL, initializer_range=0.3))
    votes = [
        {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10], "label": True},
        {"prompt_ids": [11, 12, 13], "completion_ids": [14, 15, 16], "label": False},
    ]
    _, _, notes = computed(
        model, "shared_prefix", votes, "kto_zero", reference=tiny.model(), check_step_zero=False
    )
    assert "Blind cannot share a prompt: its log-probs differ" in notes[0]


class Refuses(hf.LlamaForCausalLM):
    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("wants two dimensions")
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


def test_a_model_that_refuses_the_mask_gets_padded_rows():
    model = Refuses(hf.LlamaConfig(**SMALL))
    wanted, _, _ = computed(model, "padded", examples())
    logps, _, notes = computed(model, "shared_prefix", examples())
    assert "forward refuses (ValueError: wants two dimensions)" in notes[0]
    torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-5)


def test_a_prompt_is_there_once_and_positions_start_anew():
    data = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}]
    packed = PreferenceCollator(layout="packed")(data)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert packed["sequence_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    shared = PreferenceCollator(layout="shared_prefix")(data)
    assert shared["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert shared["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert shared["row_ids"].tolist() == [[-1, -1, 0, 0, 1]]
    assert shared["targets"].tolist() == [[7, 8], [9, -100]]
    # The last token of the prompt predicts the first of both.
    assert shared["sources"].tolist() == [[1, 2], [1, 0]]


def test_examples_with_the_same_prompt_share_it():
    data = [
        {"prompt_ids": [5, 6], "completion_ids": [7], "label": True},
        {"prompt_ids": [5, 6], "completion_ids": [8], "label": False},
        {"prompt_ids": [4], "completion_ids": [8], "label": False},
    ]
    batch = PreferenceCollator(layout="shared_prefix")(data)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 4, 8]]


def test_the_layout_says_whether_prompts_are_shared_whatever_the_batch():
    # A process whose batch has no two rows of a prompt must make the same forward passes as the others.
    apart = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 1], "label": True},
        {"prompt_ids": [4], "completion_ids": [8, 1], "label": False},
    ]
    together = [apart[0], {**apart[1], "prompt_ids": [5, 6]}]
    for layout, shares in (("packed", False), ("shared_prefix", True)):
        for data in (apart, together):
            packed = PreferenceCollator(layout=layout)(data).rows.packed
            assert packed is not None
            assert packed.shares is shares


EDGES = {
    "cut completions": [{"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [4]}],
    "cut away whole": [{"prompt_ids": [5, 6, 7, 8, 9, 10], "chosen_ids": [9], "rejected_ids": [4]}],
    "without a prompt": [{"prompt_ids": [], "chosen_ids": [9, 10, 11], "rejected_ids": [4, 5]}],
}


@pytest.mark.parametrize("layout", COMPACT)
@pytest.mark.parametrize("case", EDGES)
def test_odd_rows_give_the_numbers_of_padded_rows(case, layout):
    model = tiny.model().train()
    other = {"prompt_ids": [12, 13], "chosen_ids": [14, 15, 16], "rejected_ids": [17]}

    def of(layout):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*completion without tokens")
            batch = PreferenceCollator(layout=layout, max_length=5)([*EDGES[case], other])
            return PreferenceObjective("cpo")(model, batch).outputs["logps"]

    torch.testing.assert_close(of(layout), of("padded"), rtol=0, atol=1e-5)


def test_prompts_that_part_at_their_end_share_what_they_have_in_common():
    from prefloss.training.layouts import pack

    rows = [[([5, 6, 7], [8, 9]), ([5, 6], [10, 11])]]
    batch = pack(rows, [(0, 0), (0, 1)], share=True, max_length=None)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    # Token 7 belongs to the first row's prompt: nothing scores it.
    assert batch["targets"].tolist() == [[8, 9], [10, 11]]
    assert batch["sources"].tolist() == [[2, 3], [1, 5]]


DATA = {"pairs": tiny.pairs, "labels": tiny.labels, "rankings": tiny.rankings, "scored": tiny.scored_pairs}
TRAININGS = {
    ("dpo", "pairs"): {},
    ("ld_dpo", "pairs"): {},
    ("kto_zero", "labels"): {},
    ("bco", "labels"): {},
    ("dpo_pl", "rankings"): {},
    ("margin_dpo", "scored"): {},
    ("0.8*dpo + 0.2*nll", "pairs"): {"gradient_accumulation_steps": 2},
    ("ipo", "pairs"): {"gradient_checkpointing": True},
}


@pytest.mark.parametrize(("loss", "data"), TRAININGS, ids="-".join)
def test_trainings_are_those_of_padded_rows(tmp_path, loss, data):
    def trained(layout):
        collator = PreferenceCollator(tiny.tokenizer(), layout=layout, max_length=8)
        trainer = tiny.plain_train(tmp_path, loss, DATA[data](16), collator=collator, **TRAININGS[loss, data])
        return tiny.losses_of(trainer), tiny.weights(trainer.model)

    losses, weights = trained("padded")
    for layout in COMPACT:
        found = trained(layout)
        assert found[0] == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(found[1], weights, rtol=0, atol=2e-5)


def test_lora_with_its_base_as_the_reference_shares_prompts(tmp_path):
    def trained(layout):
        torch.manual_seed(0)
        policy = get_peft_model(
            tiny.model(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        trainer = tiny.plain_train(
            tmp_path,
            "dpo",
            tiny.pairs(16),
            policy,
            own={"reference": Reference.adapter_off()},
            collator=PreferenceCollator(tiny.tokenizer(), layout=layout),
        )
        return tiny.losses_of(trainer), tiny.weights(trainer.model)

    (losses, weights), found = trained("padded"), trained("shared_prefix")
    assert found[0] == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(found[1], weights, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_an_adapter_that_puts_tokens_before_each_row_gets_padded_rows():
    torch.manual_seed(0)
    model = get_peft_model(
        hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    wanted, gradient, _ = computed(model, "padded", examples())
    for layout in COMPACT:
        logps, found, notes = computed(model, layout, examples())
        torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
        assert "its adapter puts tokens of its own before every row" in notes[0]


def test_evaluation_and_prediction_are_those_of_padded_rows(tmp_path):
    def evaluated(layout):
        policy = tiny.model()
        trainer = tiny.plain_build(
            tmp_path,
            tiny.plain_callback(policy, "dpo", check_step_zero=False, reference=tiny.model(seed=1)),
            policy,
            data=tiny.pairs(8),
            eval_data=tiny.pairs(10, seed=2),
            collator=PreferenceCollator(tiny.tokenizer(), layout=layout),
        )
        return trainer.evaluate(), trainer.predict(tiny.pairs(6, seed=3)).predictions

    (figures, (logps, ref_logps)), (found, predicted) = evaluated("padded"), evaluated("shared_prefix")
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[name] == pytest.approx(figures[name], abs=1e-5)
    assert predicted[0] == pytest.approx(logps, abs=1e-5)
    assert predicted[1] == pytest.approx(ref_logps, abs=1e-5)


def test_an_unknown_layout_is_refused():
    with pytest.raises(
        ValueError, match="layout: got 'flat', expected one of 'auto', 'padded', 'packed', 'shared_prefix'"
    ):
        PreferenceCollator(layout="flat")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma3_window", "llama4_chunks"])
def test_flex_attention_reads_the_same_sequences(name):
    def logps(attention, layout):
        model = built(name, attention).eval()
        # Uncompiled, which is quicker here, and forward only: on a CPU it has no backward pass.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            batch = PreferenceCollator(layout=layout)(examples())
            return PreferenceObjective("cpo", rankings_as="all")(model, batch).outputs["logps"]

    wanted = logps("sdpa", "padded")
    for layout in COMPACT:
        torch.testing.assert_close(logps("flex_attention", layout), wanted, rtol=0, atol=1e-5)
