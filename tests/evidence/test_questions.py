"""The experiments on learners' questions run whatever the seeds, and their verdicts follow from their figures."""

import math

import pytest

from prefloss.evidence import Figure, Verdict, reward_models
from prefloss.evidence.experiments import (
    chipo_coverage,
    dpo_or_rlhf,
    graded_scores,
    how_far,
    off_support,
    several_judges,
    starting_model,
    ten_values,
    unjudged_prompts,
)
from prefloss.evidence.reproduction import reproduce
from prefloss.worlds import climb, train

HOLDS, CHANGED, NOT = Verdict.HOLDS, Verdict.HOLDS_WITH_A_CHANGE, Verdict.DOES_NOT_APPEAR


def figures(*values, half=0.01):
    return [Figure("", value, (value - half, value + half)) for value in values]


def exact(value):
    return Figure("", value)


@pytest.fixture
def small(monkeypatch):
    """Three optimizer steps wherever an experiment trains, and few sentences."""

    def short(function):
        return lambda *arguments, **settings: function(*arguments, **{**settings, "steps": 3})

    for module in (dpo_or_rlhf, unjudged_prompts, starting_model, ten_values, reward_models):
        monkeypatch.setattr(module, "train", short(train))
    monkeypatch.setattr(dpo_or_rlhf, "climb", short(climb))
    sentences = how_far.written(300)
    monkeypatch.setattr(how_far, "written", lambda: sentences)


@pytest.mark.parametrize("module", [dpo_or_rlhf, unjudged_prompts, starting_model, ten_values, how_far])
def test_a_question_runs_to_its_files(module, small, tmp_path):
    results = reproduce(module.EXPERIMENT, range(7, 9), tmp_path)
    assert results["verdict"] in [verdict.value for verdict in Verdict]
    assert bool(results["change"]) is (results["verdict"] == CHANGED.value)
    assert len((tmp_path / "results.csv").read_text().splitlines()) > 2
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        (dpo_or_rlhf, [exact(0.0), exact(0.0), *figures(1.0, 0.1, 0.1, 1.0, 0.1, 0.0)], HOLDS),
        (dpo_or_rlhf, [exact(0.0), exact(0.0), *figures(1.0, -0.2, 0.0, 1.0, 0.1, 0.0)], CHANGED),
        (dpo_or_rlhf, [exact(0.0), exact(0.01), *figures(1.0, 0.1, 0.1, 1.0, 0.1, 0.0)], NOT),
        (dpo_or_rlhf, [exact(0.0), exact(0.0), *figures(0.0, 0.1, 0.1, 1.0, 0.1, 0.0)], NOT),
        (unjudged_prompts, figures(0.5, 0.3, 0.0, -0.2, 0.2), HOLDS),
        (unjudged_prompts, figures(0.5, 0.3, 0.0, 0.0, 0.2), CHANGED),
        (unjudged_prompts, figures(0.5, 0.0, 0.0, 0.0, 0.2), NOT),
        (starting_model, [*figures(0.8, 0.05, 0.7, 0.3, 0.0), exact(1e-6)], HOLDS),
        (starting_model, [*figures(0.8, 0.05, 0.7, 0.3, 0.0), exact(0.01)], NOT),
        (starting_model, [*figures(0.1, 0.05, 0.7, 0.3, 0.0), exact(1e-6)], NOT),
        (ten_values, figures(0.1, 0.1, 0.0, 0.0, 0.0, 0.0), HOLDS),
        (ten_values, figures(0.1, 0.0, 0.0, 0.0, 0.0, 0.0), NOT),
        (graded_scores, figures(0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3), HOLDS),
        (graded_scores, figures(0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.3), CHANGED),
        (graded_scores, figures(0.0, 0.0, 0.1, 0.0, 0.0, 0.2, 0.3), NOT),
        (graded_scores, figures(math.nan, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3), NOT),
        (off_support, [*figures(0.9, 0.0, 0.0, 0.0), exact(1.0), exact(0.0)], HOLDS),
        (off_support, [*figures(0.9, 0.9, 0.0, 0.0), exact(1.0), exact(0.0)], CHANGED),
        (off_support, [*figures(0.01, 0.0, 0.0, 0.0), exact(1.0), exact(0.0)], NOT),
        (several_judges, [*figures(1.0, 0.1, 0.0, 0.1), exact(1.0), exact(1e-4)], HOLDS),
        (several_judges, [*figures(1.0, 0.0, 0.0, 0.1), exact(1.0), exact(1e-4)], NOT),
        (several_judges, [*figures(1.0, 0.1, 0.0, 0.1), exact(1.0), exact(0.1)], NOT),
        (chipo_coverage, figures(0.2, 0.0, 0.0, 0.0), HOLDS),
        (chipo_coverage, figures(0.2, 0.2, 0.0, 0.0), CHANGED),
        (chipo_coverage, figures(0.0, 0.0, 0.0, 0.0), NOT),
    ],
)
def test_the_verdict_follows_from_the_figures(module, given, expected):
    found = module.verdict(given)
    assert (found[0] if isinstance(found, tuple) else found) is expected


def test_far_is_measured_by_overlap_and_by_how_many_sentences_are_left():
    rewards, wins = figures(1.0, 1.0, 1.0), figures(0.7, 0.8, 0.9)
    far = [*figures(0.5, 0.2, 0.0), *figures(9000.0, 1000.0, 2.0)]
    assert how_far.verdict([*rewards, *wins, *far], 20_000.0) is HOLDS
    near = [*figures(0.5, 0.4, 0.3), *figures(9000.0, 1000.0, 2.0)]
    assert how_far.verdict([*rewards, *wins, *near], 20_000.0) is NOT
