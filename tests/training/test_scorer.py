"""A trained model as a reward model: the numbers of plain logits, of training, and what is refused."""

import copy
import re
import warnings

import pytest
import torch

import prefloss
from prefloss.data.table import ReferenceTable
from prefloss.data.tokens import encode
from prefloss.training import PreferenceCollator, PreferenceObjective, Reference, write_reference_table
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if not add_generation_prompt %}<eos>{% endif %}"
)
LONG = " ".join(tiny.WORDS[:12])
PROMPTS = ["w1 w2 w3", LONG, "w4", "w5 w6"]
RANKED = [
    [" w7", " w8 w9 w10 w11", " w12 w13"],
    [" w1", " w2 w3", " w4 w5 w6", " w7 w8 w9 w10", " w1 w2"],
    [" w14 w15 w16"],
    [" w17", " w17"],
]


@pytest.fixture(scope="module")
def words():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def policy():
    return tiny.model(0)


@pytest.fixture(scope="module")
def reference():
    return tiny.model(1)


def flat(lists):
    return [item for items in lists for item in items]


def plain(model, words, prompt, completion):
    """Log-probs of a completion's tokens from whole logits in float64, by plain torch."""
    start, end = encode(words, prompt, completion)
    ids = torch.tensor([start + end])
    with torch.no_grad():
        logps = model(input_ids=ids).logits.double().log_softmax(-1)
    return logps[0, len(start) - 1 : -1].gather(-1, ids[0, len(start) :, None]).squeeze(-1)


def by_plain_logits(model, words, prompts=PROMPTS, ranked=RANKED):
    return [plain(model, words, p, c) for p, sides in zip(prompts, ranked, strict=True) for c in sides]


def sums(values):
    return torch.stack([value.sum() for value in values])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 12, 4096])
def test_scores_are_those_of_plain_logits(words, policy, reference, batch_tokens):
    scorer = prefloss.Scorer(policy, words, reference, loss="dpo(beta=0.5)", batch_tokens=batch_tokens)
    scores = scorer(PROMPTS, RANKED, per_token=True)
    logps, ref_logps = (by_plain_logits(model, words) for model in (policy, reference))
    close(scores.logp, sums(logps))
    close(scores.ref_logp, sums(ref_logps))
    close(scores.reward, 0.5 * (sums(logps) - sums(ref_logps)))
    assert scores.tokens.tolist() == [len(row) for row in logps]
    assert scores.truncated.tolist() == [False] * len(scores)
    for i, (one, other) in enumerate(zip(logps, ref_logps, strict=True)):
        close(scores.token_rewards[i], 0.5 * (one - other))
    completions = [encode(words, p, c)[1] for p, sides in zip(PROMPTS, RANKED, strict=True) for c in sides]
    assert [ids.tolist() for ids in scores.token_ids] == completions


def test_one_completion_for_each_prompt_is_the_same(words, policy, reference):
    scorer = prefloss.Scorer(policy, words, reference)
    prompts = flat([prompt] * len(sides) for prompt, sides in zip(PROMPTS, RANKED, strict=True))
    one = scorer(prompts, flat(RANKED))
    close(one.reward, scorer(PROMPTS, RANKED).reward)
    # The second prompt has several completions, which share it; the last prompt's completions are the same.
    assert one.reward[-1] == one.reward[-2]
    mixed = scorer(PROMPTS, [RANKED[0][0], RANKED[1], RANKED[2][0], RANKED[3]])
    close(mixed.reward, one.reward[[0, *range(3, 11)]])


def test_other_models_need_not_share_prompts(words):
    """A recurrent model gets padded rows, with a warning, and the same numbers."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=43, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    model = MambaForCausalLM(config)
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        scores = prefloss.Scorer(model, words, loss="cpo(beta=1.0)")(PROMPTS, RANKED)
    close(scores.reward, sums(by_plain_logits(model, words)))


def test_messages_are_those_of_the_chat_template(words, policy, reference):
    prompts = [[{"role": "system", "content": "w9"}, {"role": "user", "content": p}] for p in PROMPTS]
    ranked = [[[{"role": "assistant", "content": c.strip()}] for c in sides] for sides in RANKED]
    scorer = prefloss.Scorer(policy, words, reference)
    scores = scorer(prompts, ranked)
    logps, ref_logps = (by_plain_logits(model, words, prompts, ranked) for model in (policy, reference))
    close(scores.reward, 0.1 * (sums(logps) - sums(ref_logps)))
    # A lone list of messages is a completion, not several; plain text after messages becomes a message.
    close(scorer(prompts, [sides[0] for sides in ranked]).reward, scores.reward[[0, 3, 8, 9]])
    close(scorer(prompts, [sides[0].strip() for sides in RANKED]).reward, scores.reward[[0, 3, 8, 9]])


def test_an_adapter_is_scored_against_the_model_without_it(words):
    model = tiny.adapted(tiny.model(0), init_lora_weights=False).train()
    scores = prefloss.Scorer(model, words, "adapter")(PROMPTS, RANKED)
    bare = tiny.model(0)
    close(scores.ref_logp, sums(by_plain_logits(bare, words)))
    assert model.training
    close(scores.logp, sums(by_plain_logits(model.eval(), words)))
    assert (scores.logp - scores.ref_logp).abs().max() > 0.1
    close(prefloss.Scorer(model, words, bare)(PROMPTS, RANKED).reward, scores.reward)


def test_dropout_is_off_and_modes_and_gradients_stay(words):
    config = copy.deepcopy(tiny.model(0).config)
    config.attention_dropout = 0.5
    model, other = (type(tiny.model(0))(config) for _ in range(2))
    scorer = prefloss.Scorer(model.train(), words, other.train())
    assert scorer(PROMPTS, RANKED).reward.equal(scorer(PROMPTS, RANKED).reward)
    assert model.training
    assert other.training
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(words, dtype):
    model, other = tiny.model(0).to(dtype), tiny.model(1).to(dtype)
    scores = prefloss.Scorer(model, words, other)(PROMPTS, RANKED)
    logps, ref_logps = (sums(by_plain_logits(each, words)) for each in (model, other))
    apart = (scores.reward - 0.1 * (logps - ref_logps)).abs().max()
    assert apart < (1e-12 if dtype == torch.float64 else 0.05)
    assert scores.reward.dtype == torch.float64


def test_a_table_is_a_reference(tmp_path, words, policy, reference):
    rows = [
        {"prompt": p, "completions": sides, "scores": [0.0] * len(sides)}
        for p, sides in zip(PROMPTS, RANKED, strict=True)
    ]
    table = write_reference_table(tmp_path / "t.parquet", reference, rows, words)
    expected = prefloss.Scorer(policy, words, reference)(PROMPTS, RANKED)
    for given in (
        table,
        Reference.table(tmp_path / "t.parquet"),
        ReferenceTable.read(tmp_path / "t.parquet"),
    ):
        scorer = prefloss.Scorer(policy, words, given)
        close(scorer(PROMPTS, RANKED).reward, expected.reward)
    with pytest.raises(
        ValueError, match=re.escape("holds sums; expected a model or 'adapter' for rewards of tokens")
    ):
        scorer(PROMPTS, RANKED, per_token=True)
    with pytest.raises(ValueError, match=r"has no completions\[0\], token ids .* likely cause"):
        scorer(["w30 w31"], [" w32"])
    # A reward that reads no reference takes its tokens, and the table's sums beside them.
    free = prefloss.Scorer(policy, words, table, loss="simpo")(PROMPTS, RANKED, per_token=True)
    close(free.ref_logp, expected.ref_logp)


@pytest.mark.parametrize("loss", ["dpo(beta=0.3)", "kto_zero(beta=0.3)"])
@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_rewards_are_those_that_training_logs(words, policy, reference, loss, layout):
    rows = tiny.pairs(6) if loss.startswith("dpo") else tiny.labels(6)
    objective = PreferenceObjective(
        loss, reference=Reference.model(copy.deepcopy(reference)), check_step_zero=False, diagnose=False
    )
    objective(policy, PreferenceCollator(words, layout=layout)(list(rows)))
    logged = objective.metrics()
    scorer = prefloss.Scorer(policy, words, reference, loss=loss)
    if loss.startswith("dpo"):
        chosen, rejected = (
            scorer(list(rows["prompt"]), list(rows[side])).reward for side in ("chosen", "rejected")
        )
        assert logged["rewards/accuracies"] == pytest.approx(float((chosen > rejected).double().mean()))
    else:
        rewards, liked = (
            scorer(list(rows["prompt"]), list(rows["completion"])).reward,
            torch.tensor(rows["label"]),
        )
        chosen, rejected = rewards[liked], rewards[~liked]
    assert logged["rewards/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert logged["rewards/rejected"] == pytest.approx(float(rejected.mean()), abs=1e-5)


def test_truncation_is_that_of_training_and_must_be_allowed(words, policy, reference):
    with pytest.raises(
        ValueError, match=r"completions\[1\]\[2\]: got 12 tokens of prompt and 4 of completion"
    ):
        prefloss.Scorer(policy, words, reference, max_length=15)(PROMPTS, RANKED)
    scorer = prefloss.Scorer(policy, words, reference, max_length=15, allow_truncation=True)
    scores = scorer(PROMPTS, RANKED, per_token=True)
    assert scores.truncated.tolist() == [False] * 5 + [True, True] + [False] * 4
    assert scores.tokens[5:7].tolist() == [3, 3]
    whole = [encode(words, PROMPTS[1], RANKED[1][j]) for j in (2, 3)]
    assert [ids.tolist() for ids in scores.token_ids[5:7]] == [end[:3] for _, end in whole]
    cut = PreferenceCollator(words, max_length=15)(
        [{"prompt": PROMPTS[1], "chosen": RANKED[1][3], "rejected": RANKED[1][2]}]
    )
    objective = PreferenceObjective(
        "dpo(beta=0.1)", reference=copy.deepcopy(reference), check_step_zero=False, diagnose=False
    )
    objective(policy, cut)
    logged = objective.metrics()
    assert logged["rewards/chosen"] == pytest.approx(float(scores.reward[6]), abs=1e-6)
    assert logged["rewards/rejected"] == pytest.approx(float(scores.reward[5]), abs=1e-6)
    with pytest.raises(ValueError, match="expected at least one token to score within the first 12 tokens"):
        prefloss.Scorer(policy, words, reference, max_length=12, allow_truncation=True)(PROMPTS, RANKED)


def test_the_models_positions_are_a_limit(words, policy, reference):
    prompt = " ".join(["w1"] * 63)
    with pytest.raises(ValueError, match="expected at most 64 together; set max_length="):
        prefloss.Scorer(policy, words, reference)([prompt], [" w2"])
    assert len(prefloss.Scorer(policy, words, reference)([prompt[3:]], [" w2"])) == 1


def test_without_a_prompt_the_first_token_is_not_scored(policy, reference):
    scores = prefloss.Scorer(policy, None, reference).encoded([([], [5, 6, 7]), ([5], [6, 7])])
    assert scores.tokens.tolist() == [2, 2]
    close(scores.reward[0], scores.reward[1])


@pytest.mark.parametrize("row", [([5], "67"), [5, 6], ([5], [6.0]), ([5], [True]), None, ([5], [6], [7])])
def test_rows_are_pairs_of_token_ids(policy, reference, row):
    with pytest.raises(
        TypeError, match=r"rows\[1\]: got .*, expected two lists of token ids: prompt and completion"
    ):
        prefloss.Scorer(policy, None, reference).encoded([([5], [6]), row])


def test_nothing_to_score(words, policy, reference):
    scores = prefloss.Scorer(policy, words, reference)([], [], per_token=True)
    assert len(scores) == 0
    assert scores.token_rewards == []


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ("w1", ["w2"], "prompts: got 'w1', expected a list of texts"),
        (["w1"], "w2", "completions: got 'w2', expected a list"),
        (
            [{"role": "user", "content": "w1"}],
            ["w2"],
            "prompts: got one list of messages, expected a list of such lists",
        ),
        (["w1", "w2"], ["w3"], "completions: got 1, expected one for each of 2 prompts"),
        (["w1", "w2"], [" w3", ""], "prompts[1]: column 'completions'[0]: got an empty completion"),
        (["w1"], [[]], "prompts[0]: column 'completions': got an empty list"),
        (["w1"], [3], "prompts[0]: column 'completions'[0]: got 3"),
        ([None], [" w1"], "prompts[0]: column 'prompt'"),
        (["w1"], [[{"role": "assistant"}]], "missing 'content' of a message"),
    ],
)
def test_wrong_texts_are_named(words, policy, reference, prompts, completions, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        prefloss.Scorer(policy, words, reference)(prompts, completions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reference: got None with dpo, whose reward reads log-ratios"),
        ({"loss": "nll"}, "loss: got nll, which implies no reward of a completion: it raises one completion"),
        (
            {"loss": "tdpo2"},
            "loss: got tdpo2, whose reward needs per_token.kl, which a Scorer does not compute",
        ),
        ({"loss": "dpo + 1.0*ipo"}, "whose terms imply different rewards"),
        ({"loss": "doo"}, "doo"),
        ({"reference": Reference.cached()}, "reference: got Reference.cached(), expected a model, 'adapter'"),
        ({"reference": "adapter"}, "without PEFT adapters"),
        ({"reference": "base"}, "reference: got 'base'"),
        ({"reference": "itself"}, "shares its weights with the policy"),
        ({"loss": "cpo", "max_length": 1}, "max_length: got 1"),
        ({"loss": "cpo", "batch_tokens": 0}, "batch_tokens: got 0"),
        ({"loss": "cpo", "allow_truncation": 1}, "allow_truncation: got 1"),
        ({"loss": "cpo", "tokenizer": 3}, "tokenizer: got 3"),
        ({"loss": "cpo", "model": None}, "model: got None"),
        ({"loss": "cpo", "model": torch.nn.Linear(2, 2)}, "model: got Linear without output embeddings"),
    ],
)
def test_wrong_settings_are_named(words, policy, options, message):
    options = {"model": policy, "tokenizer": words, **options}
    if options.get("reference") == "itself":
        options["reference"] = policy
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        prefloss.Scorer(**options)


def test_text_needs_a_tokenizer(policy, reference):
    scorer = prefloss.Scorer(policy, None, reference)
    for call in (lambda: scorer(["w1"], [" w2"]), lambda: scorer.best_of(["w1"], 2)):
        with pytest.raises(TypeError, match="tokenizer: got None"):
            call()


def test_log_probs_that_are_not_finite_are_an_error(words, reference):
    broken = tiny.model(0)
    with torch.no_grad():
        broken.lm_head.weight[20] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"completions\[0\]: the log-prob of token 1 of 2 is nan under the policy"
    ):
        prefloss.Scorer(broken, words, reference)(["w1"], [" w2"])
    with pytest.raises(FloatingPointError, match=r"completions\[0\]: .* under the reference"):
        prefloss.Scorer(reference, words, broken)(["w1"], [" w2"])


def test_the_reward_function_of_trl(words, policy, reference):
    scorer = prefloss.Scorer(policy, words, reference)
    reward = scorer.reward_func()
    assert reward.__name__ == "implicit_reward"
    assert scorer.reward_func("mine").__name__ == "mine"
    found = reward(
        prompts=["w1", "w1"], completions=[" w2", " w3 w4"], completion_ids=[[5], [6, 7]], trainer_state=None
    )
    assert found == scorer(["w1", "w1"], [" w2", " w3 w4"]).reward.tolist()
    messages = [[{"role": "user", "content": "w1"}]]
    answers = [[{"role": "assistant", "content": "w2"}]]
    assert reward(prompts=messages, completions=answers) == scorer(messages, answers).reward.tolist()
    with pytest.raises(ValueError, match="completions: got 1, expected one for each of 2 prompts"):
        reward(prompts=["w1", "w1"], completions=["w2"])


def test_an_empty_sample_counts_with_its_end_token(words, policy, reference):
    reward = prefloss.Scorer(policy, words, reference, loss="dpo(beta=1.0)").reward_func()
    expected = [float((plain(policy, words, p, "") - plain(reference, words, p, "")).sum()) for p in PROMPTS]
    assert reward(prompts=PROMPTS, completions=[""] * 4) == pytest.approx(expected, abs=1e-5)


def test_best_of_n(words, policy, reference):
    scorer = prefloss.Scorer(policy, words, reference)
    best = scorer.best_of(PROMPTS[:2], 4, max_new_tokens=5)
    assert best.sample_rewards.shape == (2, 4)
    for i, prompt in enumerate(PROMPTS[:2]):
        assert len(set(best.samples[i])) > 1
        assert best.completions[i] == best.samples[i][int(best.sample_rewards[i].argmax())]
        assert best.rewards[i] == best.sample_rewards[i].max()
        kept = [text for text in best.samples[i] if text]
        close(
            scorer([prompt], [kept]).reward, best.sample_rewards[i][[bool(text) for text in best.samples[i]]]
        )
    chat = scorer.best_of([[{"role": "user", "content": "w1"}]], 2, max_new_tokens=3)
    assert chat.completions[0][0]["role"] == "assistant"
    assert len(scorer.best_of(["w1"], 1, max_new_tokens=3, do_sample=False).completions) == 1
    for options in ({"do_sample": False}, {"num_return_sequences": 3}):
        with pytest.raises(ValueError, match="expected sampling, and n alone"):
            scorer.best_of(["w1"], 2, **options)


def test_no_logits_are_stored(words, policy, reference, monkeypatch):
    """The head's own forward, which would make them, is never run."""

    def refuse(hidden):
        raise AssertionError("the head made logits")

    monkeypatch.setattr(policy.lm_head, "forward", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prefloss.Scorer(policy, words, reference)(PROMPTS, RANKED)) == 11
