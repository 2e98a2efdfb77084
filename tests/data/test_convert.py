"""Conversions between kinds, and the split by prompt."""

import pytest
from datasets import Dataset

from prefloss.data import Preferences, as_pairs, label_counts, pairs_to_labels, ranked_to_pairs, split
from prefloss.feedback import Labels


def test_ranked_rows_give_best_against_worst_with_scores():
    ranked = Dataset.from_list(
        [
            {
                "prompt": "p",
                "completions": ["mid", "best", "", "worst"],
                "scores": [2.0, 3.0, 9.0, 1.0],
                "weight": 0.5,
            }
        ]
    )
    assert ranked_to_pairs(ranked).to_list() == [
        {
            "prompt": "p",
            "chosen": "best",
            "rejected": "worst",
            "score_chosen": 3.0,
            "score_rejected": 1.0,
            "weight": 0.5,
        }
    ]


def test_pairs_become_twice_as_many_labels():
    pairs = Dataset.from_list(
        [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(20)]
    )
    labels = pairs_to_labels(pairs)
    assert label_counts(labels) == (20, 20)
    assert {(row["prompt"], row["completion"], row["label"]) for row in labels.to_list()} == {
        (f"p{i}", f"{side}{i}", side == "c") for i in range(20) for side in "cr"
    }
    # KTO estimates its baseline from neighbours, which should answer different prompts.
    prompts = labels["prompt"]
    assert sum(prompts[i] == prompts[i + 1] for i in range(39)) < 5
    assert labels.to_list() == pairs_to_labels(pairs).to_list()
    assert labels.to_list() != pairs_to_labels(pairs, seed=1).to_list()


def test_labels_from_pairs_keep_scores_and_weights():
    pair = {
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "score_chosen": 0.9,
        "score_rejected": 0.2,
        "weight": 3.0,
    }
    rows = pairs_to_labels(Dataset.from_list([pair])).to_list()
    assert {row["completion"]: (row["score"], row["weight"]) for row in rows} == {
        "c": (0.9, 3.0),
        "r": (0.2, 3.0),
    }


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_split_keeps_every_row_and_no_prompt_on_both_sides(fraction):
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": str(i // 3)}], "n": i} for i in range(60)]
    )
    train, held_out = split(rows, fraction)
    assert sorted([*train["n"], *held_out["n"]]) == list(range(60))
    assert len(train) > 0
    assert len(held_out) > 0
    assert not {str(p) for p in train["prompt"]} & {str(p) for p in held_out["prompt"]}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_split_is_about_the_fraction(fraction):
    rows = Dataset.from_list([{"prompt": f"p{i}"} for i in range(4000)])
    train, held_out = split(rows, fraction, seed=3)
    assert len(held_out) / 4000 == pytest.approx(fraction, abs=0.025)
    assert len(train) + len(held_out) == 4000
    assert held_out["prompt"][:20] != split(rows, fraction, seed=4)[1]["prompt"][:20]


def test_split_stays_when_rows_are_added_and_reordered():
    """Issue 11, item 3: a hash of the prompt decides."""
    prompts = [f"p{i}" for i in range(300)]
    some, more = (Dataset.from_list([{"prompt": p} for p in names]) for names in (prompts[100:], prompts))
    before = set(split(some, 0.3)[1]["prompt"])
    after = set(split(more.shuffle(seed=1), 0.3)[1]["prompt"])
    assert before == after & set(prompts[100:])


def test_split_of_two_prompts_has_one_on_each_side():
    for seed in range(20):
        rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
        train, held_out = split(rows, 0.01 if seed % 2 else 0.99, seed)
        assert set(train["prompt"]) ^ set(held_out["prompt"]) == {"a", "b"}


def test_split_of_nothing_and_of_one_prompt_holds_nothing_out():
    rows = Dataset.from_list([{"prompt": "same", "n": i} for i in range(4)])
    assert [len(part) for part in split(rows, 0.5)] == [4, 0]
    assert [len(part) for part in split(rows, 0.0)] == [4, 0]
    with pytest.raises(ValueError, match=r"fraction: got 1, expected a number >= 0 and < 1"):
        split(rows, 1)


def test_labelled_rows_give_no_pairs():
    labelled = Dataset.from_list([{"prompt": "p", "completion": "c", "label": True}])
    with pytest.raises(ValueError, match=r"x: got labelled .*, expected paired or ranked rows"):
        as_pairs(Preferences(labelled, Labels, False, "x"))
