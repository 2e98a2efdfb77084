"""`suggest`: the losses that it names, in which order, and what it says of the rest."""

import itertools

import pytest
import torch

import prefloss
from prefloss import Pairs
from prefloss.losses import measured, suggest
from prefloss.registry import MODIFIERS, PROBLEMS

KINDS = ("pairs", "votes", "rankings")
LACKS = ((), ("no-reference",), ("no-tokens",), ("scores",), ("scores", "no-reference"))
NEEDED = {"pairs": prefloss.Pairs, "votes": prefloss.Labels, "rankings": prefloss.Rankings}


def names(*words):
    return [one.name for one in suggest(*words)]


@pytest.fixture
def registered():
    """Registers losses of a test, and takes them out again."""
    added = []

    def add(function, **traits):
        added.append(function.__name__)
        return prefloss.register(**traits)(function)

    yield add
    for name in added:
        prefloss.registry.unregister(name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lacks", LACKS)
def test_suggestions_run_and_keep_to_what_is_there(kind, lacks):
    hurts = [(), *itertools.combinations(PROBLEMS, 1), *itertools.combinations(PROBLEMS, 2)]
    for problems in hurts:
        found = suggest(kind, *lacks, *problems)
        assert len(found) <= 3
        assert found.start.startswith("Start with ")
        assert all(PROBLEMS[problem].meaning in found.start for problem in problems)
        for one in found:
            loss = prefloss.get(one.loss)
            assert loss.spec.feedback is NEEDED[kind]
            assert "no-reference" not in lacks or not loss.spec.needs_reference
            assert "no-tokens" not in lacks or not any(need.startswith(("tok", "per")) for need in loss.needs)
            assert "scores" in lacks or "scores" not in loss.needs
            assert one.why.endswith(".")
            assert one.evidence
            assert set(one.needs.split(", ")[2:]) == loss.needs


def test_what_was_measured_to_help_comes_first_and_what_was_not_is_said():
    found = suggest("pairs", "length")
    assert [one.name for one in found] == ["r_dpo", "sampo", "simpo"]
    assert any("better: +0.50 (+0.42 to +0.57)" in line for line in found[0].evidence)
    assert any("arXiv:2403.19159" in line for line in found[0].evidence)
    against = {note.split()[0]: note for note in found.notes}
    assert "-0.65" in against["ld_dpo"]
    assert "-0.27" in against["ln_dpo"]


def test_a_claim_that_did_not_hold_is_named_with_its_figure_where_nothing_else_is_there():
    (kto,) = suggest("votes", "few-upvotes")
    assert kto.name == "kto"
    assert kto.known == "claimed; measured to do worse"
    assert any("worse: -0.25" in line for line in kto.evidence)


def test_one_loss_for_both_problems_comes_before_losses_for_one():
    for one in suggest("pairs", "noisy", "length"):
        assert one.modifiers
        assert "tried with DPO alone" in " ".join(one.evidence)
    assert suggest("noisy,length")[0].loss == "robust_dpo(beta=0.1, epsilon=0.1, length_penalty=0.01)"
    both = [
        name
        for name, spec in prefloss.specs.items()
        if {"falling-chosen", "over-optimisation"} <= spec.helps.keys()
    ]
    assert names("falling-chosen", "over-optimisation")[0] in both


def test_problems_that_no_loss_answers_together_are_a_stated_conflict():
    found = suggest("pairs", "falling-chosen", "deterministic", "several-judges")
    assert any("together" in note for note in found.notes)
    assert {"ipo", "sppo_hard"} <= {one.name for one in found}


def test_what_would_be_needed_is_said_of_the_impossible():
    found = suggest("votes", "several-judges")
    assert not found
    assert "No loss of votes answers several-judges" in found.notes[0]
    assert "sppo needs pairs and scores" in found.notes[0]
    assert "needs token counts" in suggest("pairs", "no-tokens", "length").notes[0]


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (("pairs",), "Start with DPO"),
        (("noisy",), "Start with DPO"),
        (("scores",), "Start with DPO"),
        (("votes", "noisy"), "Start with KTO"),
        (("few-upvotes",), "Start with KTO"),
        (("forget",), "Start with KTO"),
        (("rankings",), "Start with DPO for rankings"),
        (("votes", "pairs"), "Start with DPO"),
    ],
)
def test_the_start_is_the_plain_loss_of_the_data(words, start):
    assert suggest(*words).start.startswith(start)
    assert prefloss.specs["dpo"].feedback is Pairs


def test_without_a_problem_pairs_need_no_other_loss_and_scores_are_used():
    assert not suggest("pairs")
    # The one loss that earned more than DPO over all worlds after correction.
    assert names("pairs", "scores")[0] == "rpo_fwd_kl"
    assert not {"kto", "npo", "simnpo"} & {*names("votes")}


@pytest.mark.parametrize(
    "words",
    [
        ("votes,noisy",),
        ("votes", "noisy"),
        (" Votes , NOISE ",),
        ("labels", "label_noise"),
        ("votes,noisy,votes",),
    ],
)
def test_words_may_come_in_one_string_in_any_case_or_by_another_name(words):
    assert suggest(*words) == suggest("votes", "noisy")


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ((), ValueError, "words: got none, expected some of pairs, votes"),
        ((" , ",), ValueError, "words: got none"),
        (
            ("noizy",),
            ValueError,
            r"words: got 'noizy'; did you mean 'noisy'\? expected some of pairs, .*forget",
        ),
        (("pairs", "lenght-bias"), ValueError, "did you mean 'length'"),
        (("reference", "no-reference"), ValueError, "expected one of them"),
        ((["pairs"],), TypeError, "words: got"),
        ((None,), TypeError, "words: got"),
    ],
)
def test_words_that_mean_nothing_are_errors(words, error, said):
    with pytest.raises(error, match=said):
        suggest(*words)


def test_a_loss_of_ones_own_is_suggested_for_what_it_helps(registered):
    def own(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
        """A loss of mine."""
        return -beta * pairs.margin()

    registered(own, helps={"off-policy": "looks away"})
    (mine,) = [one for one in suggest("pairs", "off-policy") if one.name == "own"]
    assert mine.why == "Looks away."
    assert mine.evidence == ("Claimed for off-policy: its author; not measured here.",)
    assert "own" not in names("pairs", "length")


@pytest.mark.parametrize(
    ("helps", "error", "said"),
    [
        ({"nosy": "x"}, ValueError, "own: helps: got 'nosy'; did you mean 'noisy'"),
        ({"noisy": ""}, ValueError, "own: helps: noisy: got an empty text"),
        ({"noisy": 3}, TypeError, "own: helps: noisy"),
        (("noisy",), TypeError, "own: helps: got"),
        ("noisy", TypeError, "own: helps: got"),
    ],
)
def test_wrong_claims_are_refused_when_a_loss_is_registered(helps, error, said):
    def own(pairs: Pairs) -> torch.Tensor:
        return pairs.margin()

    with pytest.raises(error, match=said):
        prefloss.register(helps=helps)(own)
    assert "own" not in prefloss.specs


def test_every_claim_has_a_paper_and_every_problem_a_loss():
    for spec in prefloss.specs.values():
        assert not spec.helps or spec.reference, spec.name
    answered = {problem for spec in prefloss.specs.values() for problem in spec.helps}
    assert answered == {*PROBLEMS}


@pytest.mark.parametrize("name", [name for name, modifier in MODIFIERS.items() if modifier.form])
def test_a_modifier_is_the_loss_that_it_borrows_its_claims_from(name):
    form, parameter = MODIFIERS[name].form
    spec = prefloss.specs[form]
    value = spec.parameters[parameter].default if parameter else True
    each = torch.linspace(-3.0, -0.2, 12).reshape(2, 6)
    sides = [
        prefloss.PerToken(
            rows, rows - 0.3 * rows.cos(), torch.arange(6) < torch.tensor([[4], [6]]), log_sum_sq=rows
        )
        for rows in (each, each.flip(0, 1) * 1.1)
    ]
    first, second = (side.log_ratios() for side in sides)
    pairs = Pairs(first, second.__getitem__([1, 0]), score_chosen=[1.0, 2.0], score_rejected=[0.0, 1.5])
    beta = spec.parameters["beta"].default
    torch.testing.assert_close(
        prefloss.get(form)(pairs), prefloss.get("dpo", beta=beta, **{name: value})(pairs)
    )


def test_all_measured_losses_are_registered_and_all_problems_known():
    assert {one.loss for one in measured.tried()} | measured.compared().keys() <= prefloss.specs.keys()
    assert {one.problem for one in measured.tried()} <= {*PROBLEMS, *KINDS}
