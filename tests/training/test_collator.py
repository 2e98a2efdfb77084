"""Examples of every kind become one batch; a bad one is named."""

import pytest
import torch

from prefloss.feedback import KINDS, Labels, Pairs, Rankings, optional_fields
from prefloss.integrations.transformers import PreferenceCollator
from prefloss.integrations.trl import FeedbackCollator
from prefloss.logratios import LogRatios
from prefloss.training import PreferenceBatch
from tests import tiny

PAIR = {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}
LABEL = {"prompt": "w1 w2", "completion": " w3", "label": True}
RANKING = {"prompt": "w1", "completions": [" w2", " w3 w4", " w5"], "scores": [0.5, 2.0, 1.0]}
IDS = {"prompt_ids": [4, 5], "chosen_ids": [6, 7, 1], "rejected_ids": [8, 1]}


def collate(*examples, **options):
    return PreferenceCollator(tiny.tokenizer(), **options)(examples)


def feedback(batch):
    """What a model that gives row i a log-prob of -i would make of the batch."""
    rows = -torch.arange(len(batch["input_ids"])).float()
    batch = PreferenceBatch.of(batch)
    assert batch.rows.inputs.keys() == {"input_ids", "attention_mask"}
    return batch.feedback(LogRatios(rows, None, batch.rows.tokens))


def test_pairs_text_and_ids_are_the_same():
    text = collate(PAIR, PAIR)
    ids = PreferenceCollator()([IDS, IDS])
    assert text.keys() == ids.keys()
    assert all(torch.equal(text[name], ids[name]) for name in text)
    assert text["input_ids"].tolist() == [[4, 5, 6, 7, 1]] * 2 + [[4, 5, 8, 1, 0]] * 2
    assert text["completion_mask"].sum(-1).tolist() == [3, 3, 2, 2]
    found = feedback(text)
    assert isinstance(found, Pairs)
    assert found.chosen.policy.tolist() == [0, -1]
    assert found.rejected.policy.tolist() == [-2, -3]


def test_messages_go_through_the_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    row = {
        "prompt": [{"role": "user", "content": "w1 w2"}],
        "completion": [{"role": "assistant", "content": "w3"}],
        "label": False,
    }
    batch = PreferenceCollator(tokenizer)([row])
    assert batch["input_ids"].tolist() == [[4, 5, 1, 6, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1]]


def test_labels_with_everything():
    found = feedback(
        collate(*({**LABEL, "label": i, "score": i, "weight": 2.0, "kl": 0.1, "baseline": 3} for i in (1, 0)))
    )
    assert isinstance(found, Labels)
    assert found.desirable.tolist() == [True, False]
    assert found.scores.tolist() == [1.0, 0.0]
    assert found.weight.tolist() == [2.0, 2.0]
    assert found.baseline.tolist() == [3.0, 3.0]


def test_the_old_name_of_the_score_is_read_with_a_warning():
    with pytest.warns(DeprecationWarning, match="column 'scores' of labelled rows is now called 'score'"):
        batch = collate({**LABEL, "scores": 0.5})
    assert batch["scores"].tolist() == [0.5]


def test_rankings_of_different_sizes():
    two = {"prompt": "w1", "completions": [" w2", " w3"], "scores": [0, 1], "ref_logps": [-3.0, -4.0]}
    batch = collate(two, {**RANKING, "ref_logps": [-5.0, -6.0, -7.0]})
    assert batch["group_rows"].tolist() == [[0, 1, -1], [2, 3, 4]]
    assert batch["ref_logps"].tolist() == [-3, -4, -5, -6, -7]
    found = feedback(batch)
    assert isinstance(found, Rankings)
    assert found.present.tolist() == [[True, True, False], [True, True, True]]
    assert found.completions.policy[1].tolist() == [-2, -3, -4]


def test_references_beside_pairs_follow_the_rows():
    rows = [{**PAIR, "ref_chosen_logps": -1.0 - i, "ref_rejected_logps": -11.0 - i} for i in range(2)]
    assert collate(*rows)["ref_logps"].tolist() == [-1, -2, -11, -12]


def test_a_completion_cut_away_is_kept_and_not_counted():
    collator = PreferenceCollator(tiny.tokenizer(), max_length=3)
    batch = collator([PAIR, {**PAIR, "prompt": "w1 w2 w3"}])
    assert batch["input_ids"].shape == (4, 3)
    assert batch["labels"].tolist() == [1, -100]
    assert collator.seen["truncated_away"] == 2


def test_tensors_and_arrays_are_read():
    data = tiny.Dataset.from_list([IDS, IDS]).with_format("torch")
    assert torch.equal(PreferenceCollator()([data[0]])["input_ids"], PreferenceCollator()([IDS])["input_ids"])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            [PAIR, {**PAIR, "chosen": None}],
            r"example 1 of the batch: column 'chosen': got null, expected a string",
        ),
        ([PAIR, {"prompt": "w1", "chosen": " w2"}], r"example 1 of the batch: missing column 'rejected'"),
        (
            [{**RANKING, "scores": [1.0, 2.0]}],
            r"column 'scores': got 2 scores, expected one for each of 3 completions",
        ),
        ([{**LABEL, "label": 0.5}], r"column 'label': got 0.5, expected true or false"),
        ([{**PAIR, "weight": float("nan")}], r"column 'weight': got nan, expected a finite number"),
        (
            [PAIR, LABEL],
            r"example 1 of the batch: got a row of labelled.*but example 0 of the batch is of paired",
        ),
        (
            [{**PAIR, "weight": 1.0}, PAIR],
            r"example 1 of the batch: lacks the column 'weight', which example 0",
        ),
        ([{**PAIR, "score_chosen": 1.0}], r"missing column 'score_rejected' beside 'score_chosen'"),
        (
            [{**PAIR, "ref_chosen_logps": -1.0}],
            r"missing column 'ref_rejected_logps' beside 'ref_chosen_logps'",
        ),
        (
            [{**LABEL, "ref_logps": 3.0}],
            r"column 'ref_logps': got 3.0, expected a log-prob in nats, at most 0",
        ),
        (
            [{**RANKING, "ref_logps": [-1.0]}],
            r"column 'ref_logps': got \[-1.0\], expected a log-prob for each of 3 completions",
        ),
        ([{**PAIR, "weight": -1.0}], r"column 'weight': got -1.0, expected a finite number >= 0"),
        (
            [{**PAIR, "weight": 10**400}],
            r"column 'weight': got 1000.*expected a finite number >= 0 of at most 3.4e\+38",
        ),
        ([{**LABEL, "score": 1e39}], r"column 'score': got 1e\+39, expected a finite number of at most"),
        ([{**RANKING, "completions": [], "scores": []}], r"column 'completions': got an empty list"),
        (
            [{"prompt_ids": [1], "completions_ids": [], "scores": []}],
            r"column 'completions': got an empty list",
        ),
        (
            [{**IDS, "chosen_ids": [1.5]}],
            r"column 'chosen_ids': got \[1.5\], expected a list of token ids >= 0",
        ),
        ([{"prompt_ids": [1], "chosen_ids": [2]}], r"missing column 'rejected_ids' beside 'chosen_ids'"),
        ([{"chosen_ids": [1], "rejected_ids": [2]}], r"missing column 'prompt_ids'"),
        ([{}], r"has no columns; the trainer took the others out because remove_unused_columns is True"),
        (
            [{"label": 1}],
            r"has only 'label'; the trainer took the others out because remove_unused_columns is True",
        ),
        ([], r"examples: got none, expected at least one"),
    ],
)
def test_a_bad_example_is_named(examples, message):
    with pytest.raises(ValueError, match=message):
        collate(*examples)


@pytest.mark.parametrize(
    ("whole", "example", "rows"),
    [
        (PAIR, {**PAIR, "rejected": " "}, [False, False, False, True]),
        (IDS, {**IDS, "chosen_ids": []}, [False, True, False, False]),
        (LABEL, {**LABEL, "completion": ""}, [False, True]),
        (
            {**RANKING, "completions": [" w1", " w3"], "scores": [1.0, 2.0]},
            {**RANKING, "completions": [" w1", ""], "scores": [1.0, 2.0]},
            [False, False, False, True],
        ),
    ],
)
def test_an_empty_completion_is_counted_and_does_not_stop_a_training(whole, example, rows):
    """AUDIT U3."""
    collator = PreferenceCollator(tiny.tokenizer())
    with pytest.warns(
        UserWarning, match=r"example 1 of the batch: has an empty completion; losses leave the"
    ):
        batch = collator([whole, example])
    assert (batch.rows.tokens == 0).tolist() == rows
    assert batch["labels"].tolist() == [1, -100]
    assert collator.seen["empty"] == 1
    assert collator.seen["truncated_away"] == 0


def test_padding_is_what_was_asked_for_or_the_tokenizers():
    """AUDIT T1."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token_id = 2
    for options, wanted in (({}, 0), ({"pad_token_id": 9}, 9), ({"tokenizer": tokenizer}, 2)):
        assert PreferenceCollator(**options)([IDS])["input_ids"][1, -1] == wanted
    assert PreferenceCollator(tokenizer, pad_token_id=9)([IDS])["input_ids"][1, -1] == 9


def test_completions_that_were_cut_away_are_counted():
    """AUDIT T1."""
    collator = PreferenceCollator(max_length=2)
    collator([IDS, {"prompt_ids": [4], "chosen_ids": [6, 1], "rejected_ids": [1]}])
    assert collator.seen["truncated_away"] == 2


@pytest.mark.parametrize("label", [True, False])
def test_votes_of_one_kind_are_said_once(label):
    """AUDIT T1: 64 of one kind, not 63, and not with one of the other."""
    vote = {"prompt_ids": [4], "completion_ids": [5, 1], "label": label}
    PreferenceCollator()([vote] * 63)
    PreferenceCollator()([vote] * 63 + [{**vote, "label": not label}])
    with pytest.warns(UserWarning, match=f"first 64 labels are all {'upvotes' if label else 'downvotes'}"):
        PreferenceCollator()([vote] * 64)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"weight": 1.0}, "has the column 'weight', which .* lacks"),
        ({"weight": 1.0}, {}, "lacks the column 'weight', which .* has"),
        (
            {},
            {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
            "has the column 'ref_logps', which .* lacks",
        ),
        (
            {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
            {},
            "lacks the column 'ref_logps', which .* has",
        ),
    ],
)
def test_a_column_of_some_examples_alone_is_named(first, second, message):
    """AUDIT T1."""
    with pytest.raises(ValueError, match=message):
        PreferenceCollator()([{**IDS, **first}, {**IDS, **second}])


def test_text_needs_a_tokenizer():
    with pytest.raises(TypeError, match="example 0 of the batch: got text, but tokenizer is None"):
        PreferenceCollator()([PAIR])


def test_a_bad_length_is_refused():
    with pytest.raises(ValueError, match="max_length: got 0, expected a whole number >= 2"):
        PreferenceCollator(max_length=0)


@pytest.mark.parametrize(
    ("example", "name", "message"),
    [
        ({**PAIR, "chosen": PAIR["rejected"]}, "identical", "completions of one prompt are identical"),
        ({**IDS, "chosen_ids": [6, 1, 1]}, "double_end", "ends in two end-of-sequence tokens"),
        (
            {**PAIR, "weights": 2.0, "scores_chosen": 1.0, "id": "x", "source": None},
            "unread",
            r"nothing reads: 'weights' \(did you mean 'weight'\?\), 'scores_chosen' \(did you mean 'score_chosen'\?\), "
            r"'id'\. Shown once",
        ),
        ({**IDS, "kl": 1.0}, "unread", "nothing reads: 'kl'"),
    ],
)
def test_what_is_odd_is_counted_and_said_once(example, name, message, recwarn):
    collator = PreferenceCollator(tiny.tokenizer())
    with pytest.warns(UserWarning, match=message):
        collator([example, example])
    collator([example])
    assert collator.seen[name] == 3
    assert not recwarn.list


def test_votes_of_one_kind_are_noticed():
    collator = PreferenceCollator(tiny.tokenizer())
    collator([LABEL] * 63)
    with pytest.warns(UserWarning, match="the first 64 labels are all upvotes"):
        collator([LABEL])


def test_the_trainer_says_why_columns_are_gone(tmp_path):
    policy = tiny.model()
    rows = [dict(row) for row in tiny.pairs(4)]
    trainer = tiny.plain_build(
        tmp_path, tiny.plain_callback(policy, "dpo"), policy, data=rows, remove_unused_columns=True
    )
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


VOTES = [
    {"prompt_ids": [5, 6], "completion_ids": [7, 1], "label": True},
    {"prompt_ids": [8], "completion_ids": [9, 10, 1], "label": False},
    {"prompt_ids": [11, 12, 13], "completion_ids": [14], "label": True},
]


def test_mismatched_completions_are_those_of_the_example_before():
    """AUDIT U2: as TRL's KTOTrainer pairs them."""
    batch = PreferenceCollator(mismatched=True)(VOTES)
    assert batch["kl_input_ids"].tolist() == [[5, 6, 14, 0, 0, 0], [8, 7, 1, 0, 0, 0], [11, 12, 13, 9, 10, 1]]
    assert batch["kl_completion_mask"].tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            VOTES[:1],
            "mismatched: got a batch of one example, expected two or more; .* kl_baseline='running_mean'",
        ),
        (
            [{"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8]}] * 2,
            "mismatched: got data of paired .*, expected labels",
        ),
    ],
)
def test_mismatched_completions_that_cannot_be_are_errors(examples, message):
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(mismatched=True)(examples)


@pytest.mark.parametrize("field", [field for kind in KINDS for field in optional_fields(kind)])
def test_every_optional_column_reaches_the_batch(field):
    """AUDIT A6: one table names the columns, for every collator."""
    row = {Pairs: IDS, Labels: VOTES[0], Rankings: {**RANKING}}[field.kind]
    values = {field.column: 0.5}
    if field.column.startswith("score_"):
        values = {"score_chosen": 0.5, "score_rejected": 0.5}
    assert collate({**row, **values})[field.name].tolist() == [0.5]
    if field.kind is not Rankings:
        passed = FeedbackCollator(lambda examples: {})([{**row, **values}])
        assert passed[field.name].tolist() == [0.5]


@pytest.mark.filterwarnings("ignore:.*have a completion without tokens")
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_a_training_goes_on_past_an_empty_completion(tmp_path, layout):
    """AUDIT U3."""
    policy = tiny.model()
    rows = [dict(row) for row in tiny.pairs(8)]
    rows[5]["rejected"] = ""
    collator = PreferenceCollator(tiny.tokenizer(), layout=layout)
    with pytest.warns(UserWarning, match="has an empty completion"):
        trainer = tiny.plain_train(tmp_path, "dpo", rows, policy, collator=collator, max_steps=2)
    assert collator.seen["empty"] == 1
    assert all(loss == loss for loss in tiny.losses_of(trainer))
