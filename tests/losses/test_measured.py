"""What the package says was measured, against the results that are committed in docs/evidence."""

import json
from pathlib import Path

import pytest

from prefloss.losses import measured
from prefloss.losses.measured import Grade, Tried
from prefloss.registry import PROBLEMS

RESULTS = Path(__file__).parents[2] / "docs" / "evidence" / "results"


def figures_of(experiment):
    results = json.loads((RESULTS / experiment / "results.json").read_text())
    return {figure["name"]: figure for figure in results["figures"]}


@pytest.mark.parametrize(
    "one", measured.tried(), ids=lambda one: f"{one.loss}-{one.problem}-{one.figure[:20]}"
)
def test_a_figure_is_that_of_the_committed_results(one):
    figures = figures_of(one.experiment)
    figure = figures[one.figure]
    if figure["value"] is None:
        assert one.value is None
        return
    assert one.value == pytest.approx(figure["value"], abs=6e-5)
    if figure["interval"] is None:
        assert one.interval is None
    else:
        assert one.interval == pytest.approx(figure["interval"], abs=6e-5)
    if one.dpo_figure:
        assert one.dpo == pytest.approx(figures[one.dpo_figure]["value"], abs=6e-5)
    else:
        assert one.dpo == 0
        # The other figures are differences from DPO.
        assert "minus" in one.figure


def test_what_to_try_first_rests_on_an_experiment_that_was_run():
    for problem in PROBLEMS.values():
        assert bool(problem.first) is bool(problem.experiment)
        assert not problem.experiment or figures_of(problem.experiment)


def tried(value, low=None, high=None, dpo=0.0, higher=True):
    interval = None if low is None else (low, high)
    return Tried("dpo", "noisy", "e", "q", value, interval, dpo, higher, "f", "")


@pytest.mark.parametrize(
    ("figure", "better"),
    [
        (tried(0.5, 0.4, 0.6), True),
        (tried(-0.5, -0.6, -0.4), False),
        (tried(0.5, -0.1, 1.1), None),
        # Shown, and too small to matter.
        (tried(0.03, 0.02, 0.04), None),
        (tried(0.5), True),
        (tried(None), None),
        (tried(-2.0, -3.0, -1.0, dpo=-13.0), True),
        (tried(0.56, 0.55, 0.57, dpo=0.99, higher=False), True),
        (tried(0.56, 0.55, 0.57, dpo=0.2, higher=False), False),
    ],
)
def test_better_worse_or_not_known(figure, better):
    assert figure.better is better


def test_grades_put_measured_help_before_a_claim_and_a_claim_before_no_difference():
    help_, none, harm = tried(0.5, 0.4, 0.6), tried(0.0, -0.1, 0.1), tried(-0.5, -0.6, -0.4)
    assert measured.grade(True, [help_]) is Grade.CLAIMED_AND_MEASURED
    assert measured.grade(False, [help_]) is Grade.MEASURED
    assert measured.grade(True, [help_, none]) is measured.grade(True, [help_, harm]) is Grade.MIXED
    assert measured.grade(True, []) is Grade.CLAIMED
    assert measured.grade(True, [tried(None)]) is Grade.CLAIMED
    assert measured.grade(True, [none]) is Grade.NO_DIFFERENCE
    assert measured.grade(True, [harm]) is measured.grade(True, [harm, none]) is Grade.CONTRADICTED
    assert measured.grade(False, []) is measured.grade(False, [harm]) is None
    assert [*Grade] == sorted(Grade)


def test_a_figure_reads_as_a_sentence():
    assert tried(0.4954, 0.424, 0.5668).shown == "+0.50 (+0.42 to +0.57): q"
    assert str(tried(3.03, 2.83, 3.23, dpo=-13.43)) == "3.03 (2.83 to 3.23) against DPO's -13.43: q; e"
    assert tried(None).shown == "not reached: q"
