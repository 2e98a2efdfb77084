"""The report of a run: table, sentences, picture, numbers."""

import io
import json

import pytest
from rich.console import Console

from prefloss.cli import report
from prefloss.demo.measure import Measurement

BEFORE = Measurement(0, 0.1, 0.1, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, ("before\x1b[31m",))
AFTER = Measurement(9, 3.0, 0.1, 2.0, 0.1, 0.75, 0.05, -1.0, -4.0, 0.8, ("after",))
UNKNOWN = Measurement(9, None, None, 2.0, 0.1, None, None, None, -4.0, None, ("after",))


def result(after=AFTER, **changes):
    usual = {
        "loss": "dpo(beta=[0.1])",
        "measurements": [BEFORE, after],
        "losses": [(1, 0.7), (2, float("nan"))],
        "ceiling": 0.8,
        "paired": True,
        "held_out": True,
        "holds_chosen": False,
        "setting": "built-in Llama on the generated world",
        "warm_loss": None,
        "prompts": ["Tell me:"],
        "seconds": {"training": 1.234},
        "about": {"seed": 0},
    }
    return report.Result(**{**usual, **changes})


def printed(*renderables):
    console = Console(file=io.StringIO(), width=200)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def test_the_table_says_what_each_number_is():
    text = printed(report.table(result()))
    assert "dpo(beta=[0.1]) after 9 steps" in text
    for cell in (
        "+3.00 ± 0.10",
        "2.00 ± 0.10",
        "75.0% ± 5.0%",
        "-1.00",
        "-4.00",
        "fell for 80.0% of them",
        "itself 80.0%",
    ):
        assert cell in text


def test_what_was_not_measured_has_no_row():
    text = printed(report.table(result(UNKNOWN)))
    assert "true reward" not in text
    assert "accuracy" not in text
    assert "log-prob of rejected" in text


def test_votes_are_called_votes():
    text = printed(report.table(result(paired=False)))
    assert "log-prob of upvoted" in text
    assert "upvoted above downvoted" in text


def test_falling_chosen_log_probs_are_explained():
    text = printed(*report.verdict(result()))
    assert "The true reward rose: +2.90 ± 0.14." in text
    assert (
        "That is no bug: the loss raises the margin between chosen and rejected, here to +3.00 nats" in text
    )
    assert "dpop" in text


def test_a_reward_within_the_noise_is_not_called_a_rise():
    flat = Measurement(9, 0.3, 0.1, 2.0, 0.1, 0.5, 0.05, -4.0, -4.0, 1.0)
    text = printed(*report.verdict(result(flat, held_out=False)))
    assert "The true reward did not clearly rise: +0.20 ± 0.14." in text
    assert "the margin did not grow" in text
    assert "Nothing was held out" in text


@pytest.mark.parametrize(("error", "words"), [(0.05, "clearly better than"), (0.2, "within the noise of")])
def test_without_a_true_reward_accuracy_is_judged_by_its_error(error, words):
    after = Measurement(9, accuracy=0.75, accuracy_error=error)
    assert f"The model orders held-out pairs {words} a coin: 75.0%." in printed(
        *report.verdict(result(after))
    )


def test_samples_cannot_drive_the_terminal():
    text = printed(report.samples(result()))
    assert "\x1b" not in text
    assert "before" in text


def test_metrics_are_json_without_nan(tmp_path):
    report.write_metrics(result(), tmp_path / "metrics.json")
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["after"]["reward"] == 3.0
    assert found["training_loss"] == [{"step": 1, "loss": 0.7}, {"step": 2, "loss": None}]
    assert "samples" not in found["after"]


@pytest.mark.parametrize("after", [AFTER, UNKNOWN], ids=["reward", "no reward"])
def test_the_picture_is_a_png(tmp_path, after):
    report.write_picture(result(after), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
