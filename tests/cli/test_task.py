"""Files made into tasks: what is converted, what is said, what is warned of."""

import json

import pytest

import prefloss
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.task import task_of
from prefloss.feedback import Pairs, columns_of


@pytest.fixture
def task(tmp_path):
    def made(loss, rows, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return task_of(TrainOptions(data=path, **options), prefloss.get(loss))

    return made


def pairs(count, **columns):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", **columns} for i in range(count)]


def votes(up, down):
    return [{"prompt": f"p{i}", "completion": "c", "label": i < up} for i in range(up + down)]


def test_pairs_for_a_pair_loss(task):
    made = task("dpo", pairs(20))
    assert made.facts == (
        "data.jsonl: 20 paired rows (prompt, chosen, rejected), plain text",
        "18 rows to train on; 2 held out, none of whose prompts is trained on",
    )
    assert (len(made.train), len(made.better), len(made.worse), len(made.prompts)) == (18, 2, 2, 64)
    assert made.train.column_names == ["prompt", "chosen", "rejected"]
    assert made.reward is None


def test_pairs_for_a_label_loss_are_split_and_said_so(task):
    made = task("kto", pairs(20))
    assert made.train.column_names == ["prompt", "completion", "label"]
    assert len(made.train) == 36
    assert "kto learns from labels: each chosen became an upvote, each rejected a downvote" in made.facts
    # Held-out pairs stay pairs, to be compared.
    assert made.paired
    assert not made.warnings


def test_ranked_groups_become_pairs_and_said_so(task):
    rows = [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "scores": [1, 3, 2]} for i in range(10)]
    made = task("ipo", rows)
    assert made.train[0]["chosen"] == "b"
    assert made.train[0]["rejected"] == "a"
    assert "ranked rows became pairs: the best completion against the worst" in made.facts
    assert task("rebel", rows).train.column_names == [*columns_of(Pairs), "score_chosen", "score_rejected"]


def test_columns_that_the_loss_reads_come_along_and_others_are_named(task):
    rows = pairs(10, score_chosen=0.9, score_rejected=0.1, weight=2.0, id="x")
    assert task("rebel", rows).train.column_names == [
        *columns_of(Pairs),
        "weight",
        "score_chosen",
        "score_rejected",
    ]
    made = task("dpo", rows)
    assert made.train.column_names == [*columns_of(Pairs), "weight"]
    assert "dpo reads also: weight" in made.facts
    assert "columns that dpo does not read: score_chosen, score_rejected, id" in made.facts


def test_only_downvotes_can_be_trained_on_with_a_warning(task):
    made = task("kto", votes(0, 20))
    assert made.warnings == (
        "all 18 labels are downvotes: kto can train on them, but without upvotes it only learns what to avoid",
    )
    assert made.spoken_are == "the downvoted completions, for there are no others"
    assert (len(made.better), len(made.worse)) == (0, 2)


def test_only_upvotes_are_warned_of(task):
    assert "all 18 labels are upvotes" in task("kto", votes(20, 0)).warnings[0]


def test_uneven_votes_get_the_weight_that_evens_them(task):
    (warning,) = task("kto", votes(10, 90), eval_fraction=0.0).warnings
    assert warning.startswith("10 upvotes and 90 downvotes weigh 0.11 to 1; the KTO paper advises 1 to 1.33")
    # 90 / 10 * 1.15: in the middle of the advised range.
    assert "--param desirable_weight=10" in warning
    assert "--param undesirable_weight=7.8" in task("kto", votes(90, 10), eval_fraction=0.0).warnings[0]
    assert task("kto", votes(52, 48), eval_fraction=0.0).warnings == ()


def test_nothing_held_out_is_measured_on_training_rows(task):
    made = task("dpo", pairs(10), eval_fraction=0.0)
    assert not made.held_out
    assert (len(made.train), len(made.better)) == (10, 10)
    assert "none held out: measured on 10 of the training rows" in made.facts[-1]


def test_dropped_rows_are_warned_of(task):
    made = task("dpo", [*pairs(10), {"prompt": "p", "chosen": "", "rejected": "r"}])
    assert made.warnings == ("1 row dropped, empty 'chosen' (line 11)",)
