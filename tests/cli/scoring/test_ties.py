"""RewardBench 2's score of ties, against `process_single_model` of rewardbench 0.1.4 on the same numbers."""

import pytest

from prefloss.cli.scoring.ties import Group, prompt_of, ties_score

# Rows (id, rewards, number of right ones) and what rewardbench's own code says.
CASES = [
    (
        [
            ("ref:0", [-4.0, -3.3, -3.097803, -1.0, -6.1], 1),
            ("tied:0", [0.4, 2.0, -7.0, 0.3], 2),
            ("ref:1", [1.866441, -0.039987, -0.2, -0.1], 1),
            ("tied:1", [3.0, 1.227896, 0.0], 2),
        ],
        0.4435427572155166,
    ),
    (
        [
            ("ref:0", [2.192541, -0.0], 1),
            ("tied:0", [2.0, 2.0, 0.0, -0.045534, -0.169136], 2),
            ("ref:1", [0.256112, 1.0], 1),
            ("tied:1", [1.357765, 1.0, 1.720908, 1.695988, 1.0, -1.2, 0.0], 5),
            ("ref:2", [2.0, -1.0, -1.1, -0.55017], 1),
            ("tied:2", [-5.0, 6.1, -9.0, 8.040747, -7.2, -4.5], 5),
        ],
        0.5909080254584619,
    ),
]


@pytest.mark.parametrize(("rows", "wanted"), CASES)
def test_it_is_rewardbenchs(rows, wanted):
    groups = {prompt_of(name): Group(scores[:right], scores[right:]) for name, scores, right in rows}
    assert ties_score(groups) == pytest.approx(wanted, abs=1e-12)


def test_prompts_without_their_counterpart():
    assert ties_score({("ref", 1): Group([1.0], [0.0])}) == pytest.approx(0.3)
    assert ties_score({("tied", 1): Group([1.0, 2.0], [0.0])}) == pytest.approx(0.3)
    assert ties_score({("tied", 1): Group([1.0, 2.0], [])}) == 0
    assert ties_score({}) == 0


@pytest.mark.parametrize("name", ["3", "other:3", "tied:", "tied:x", "", None])
def test_other_ids_are_of_no_prompt(name):
    assert prompt_of(name) is None
