"""What the loss would ignore is refused, and what it needs is asked for, by the name of the column."""

import pytest

import prefloss
from prefloss import Labels, Pairs, Rankings
from prefloss.training import PreferenceObjective
from prefloss.training.checks import check_fields


@pytest.mark.parametrize(
    ("loss", "kind", "present"),
    [
        ("dpo", Pairs, {"weight"}),
        ("margin_dpo", Pairs, {"score_chosen", "score_rejected"}),
        ("bco", Labels, {"weight"}),
        ("dpo_pl", Rankings, {"scores", "weight"}),
        # Pairs made of rankings carry their scores.
        ("margin_dpo", Rankings, {"scores"}),
    ],
)
def test_what_a_loss_reads_is_taken(loss, kind, present):
    check_fields(prefloss.get(loss), kind, present)


@pytest.mark.parametrize(
    ("loss", "kind", "present", "message"),
    [
        ("dpo", Pairs, {"score_chosen"}, "column 'score_chosen': dpo does not read it"),
        ("dpo", Pairs, {"kl"}, "column 'kl': dpo does not read it"),
        ("bco", Labels, {"scores"}, "column 'score': bco does not read it"),
        (
            "margin_dpo",
            Pairs,
            (),
            "margin_dpo: got data without scores, expected the column score_chosen and",
        ),
        ("a2po", Labels, {"scores"}, "a2po: got data without baseline, expected the column baseline"),
        ("a2po", Pairs, {"score_chosen", "score_rejected"}, "a2po: got data without baseline"),
    ],
)
def test_what_it_does_not_read_or_lacks_is_named(loss, kind, present, message):
    with pytest.raises(ValueError, match=message):
        check_fields(prefloss.get(loss), kind, present)


def test_a_loss_that_no_forward_pass_serves_is_refused():
    with pytest.raises(ValueError, match="tpo: needs gold, which PreferenceObjective does not compute"):
        PreferenceObjective("tpo")
