"""The kit over two tables: every mistake is caught, with one message about its cause; no sound loss is refused."""

import hypothesis
import pytest

from prefloss.testing import CheckFailed, LossCheckError, as_loss, check_loss, loss_checks
from tests.testing import mistakes, sound

MISTAKES = {row[0].__name__: row for row in mistakes.functions()}
SLOW = {"torch_compile": "takes longer than all others"}

OF_EACH_KIND = (
    "mean",
    "log_of_margin",
    "standardised",
    "subtracts_in_place",
    "clamps_a_saved_tensor",
    "noise",
    "seeds_torch",
    "infinite_slope",
    "flipped",
    "downvotes_raised",
    "rejected_data",
    "centred",
    "sorted",
    "softplus_by_hand",
    "mask_from_the_left",
    "exp_of_scores",
    "takes_anything",
    "state_moved_twice",
)


@pytest.fixture(autouse=True, scope="module")
def without_shrinking():
    """The simplest draw is for readers, and takes longer than all else here."""
    name = hypothesis.settings.get_current_profile_name()
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("without_shrinking", phases=phases)
    hypothesis.settings.load_profile("without_shrinking")
    yield
    hypothesis.settings.load_profile(name)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught(name):
    """AUDIT K1 to K7."""
    function, check, words, traits = MISTAKES[name]
    loss = as_loss(function, **traits)
    with pytest.raises(CheckFailed) as caught:
        dict(loss_checks(loss, max_examples=4))[check](loss)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_mistake_gives_one_message(name):
    """AUDIT K7."""
    function, check, _, traits = MISTAKES[name]
    with pytest.raises(LossCheckError) as caught:
        check_loss(function, max_examples=2, skip=SLOW, **traits)
    assert list(caught.value.report.failed) == [check]


@pytest.mark.parametrize(
    ("function", "traits"), [pytest.param(*row, id=row[0].__name__) for row in sound.functions()]
)
def test_sound_loss_has_no_failure(function, traits):
    check_loss(function, max_examples=2, skip=SLOW, **traits)


def test_tables_are_large():
    assert len(MISTAKES) >= 130
    assert len([*sound.functions()]) >= 55
