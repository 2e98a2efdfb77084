"""What the worlds can feed."""

import pytest

import prefloss
from prefloss import Pairs
from prefloss.worlds import Judge, LogLinear, Tabular, TokenTable, bandit, draw, featured, fed, spelled, train


def test_a_token_world_feeds_all_but_the_losses_that_want_another_model():
    lacking = {name: needs for name, needs in fed(TokenTable(spelled())).items() if needs}
    # Importance weights come from two more models.
    assert lacking == {"tis_dpo": ["per_token.weight"]}


@pytest.mark.parametrize("policy", [Tabular(bandit()), LogLinear(featured())])
def test_a_world_without_tokens_feeds_what_reads_none(policy):
    lacking = fed(policy)
    assert lacking.keys() == prefloss.specs.keys()
    for name, needs in lacking.items():
        expected = sorted(need for need in prefloss.specs[name].needs if need.startswith("per_token"))
        assert needs == expected, name


def test_a_loss_that_cannot_be_fed_is_refused_by_name():
    world = bandit()
    with pytest.raises(ValueError, match=r"^tdpo1: per_token.kl: got None, expected KL"):
        train(Tabular(world), draw(world, Judge(), Pairs, 5), "tdpo1", steps=1)


def test_a_loss_of_another_kind_of_feedback_is_refused_by_name():
    world = bandit()
    with pytest.raises(TypeError, match=r"^kto: feedback: got Pairs, expected Labels"):
        train(Tabular(world), draw(world, Judge(), Pairs, 5), "kto", steps=1)
