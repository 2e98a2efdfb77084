"""Losses with a wrong state, hyperparameter, string, pickle or docstring: each is caught by its check."""

from pathlib import Path
from typing import Annotated

import pytest
import torch.nn.functional as F

import prefloss
from prefloss import Pairs, registry, testing
from prefloss.hyperparameters import Coerce, NonNegative, Positive, State, stateful
from prefloss.testing import as_loss, check_loss, declared
from tests.testing.broken import LIKE_DPO, Broken

broken = Broken(declared)


@broken("hyperparameter_effect", "label_noise=", "take it out of the signature", **LIKE_DPO)
def ignores_a_hyperparameter(pairs: Pairs, *, beta: Positive = 0.1, label_noise: NonNegative = 0.0):
    return -F.logsigmoid(beta * pairs.margin())


@broken(
    "hyperparameters",
    "got a loss, expected a ValueError or TypeError that names beta",
    "its Coerce raise",
    **LIKE_DPO,
)
def accepts_any_beta(pairs: Pairs, *, beta: Annotated[float, Coerce(lambda value: value, "anything")] = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


class Remembered(State):
    """Mean margin, kept in the object or, wrongly, in the class; moved always or, rightly, in training."""

    name = "remembered"
    saved = ("total",)
    settings = ()

    def __init__(self, kept_by=None, always=False):
        super().__init__()
        self.owner, self.always = kept_by or self, always
        self.owner.total = 0.0

    def __deepcopy__(self, memo):
        copied = Remembered(None if self.owner is self else self.owner, self.always)
        copied.owner.total, copied.training = self.owner.total, self.training
        return copied

    def __call__(self, margin):
        if self.training or self.always:
            self.owner.total += float(margin.detach().sum())
        return self.owner.total

    def state_dict(self):
        return {"total": self.owner.total}

    def load_state_dict(self, state):
        self.owner.total = state["total"]


class Forgetful(Remembered):
    """Saves nothing of what moves."""

    def __deepcopy__(self, memo):
        copied = Forgetful()
        copied.total, copied.training = self.total, self.training
        return copied

    def load_state_dict(self, state):
        pass


def state_of(make):
    return Annotated[object, Coerce(lambda value: make() if isinstance(value, str) else value, "'new'")]


Everywhere = type("Everywhere", (), {"total": 0.0})


ONE_FOR_ALL = Remembered()


STATEFUL = {"stateful": True, "separable": False, "difference_only": True}


def remembering(pairs: Pairs, shift, beta):
    return -F.logsigmoid(beta * (pairs.margin() - 0.01 * shift(pairs.margin())))


@broken("state", "of a loss that declares no state: got", "declare stateful=True", **LIKE_DPO)
def keeps_a_hidden_count(pairs: Pairs, *, beta: Positive = 0.1):
    CALLS.append(None)
    return -F.logsigmoid(beta * pairs.margin()) * len(CALLS)


CALLS = []


@broken("state", "stateful=True: got no state", "or declare stateful=False", stateful=True, **LIKE_DPO)
def has_no_state(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("state", "state after a batch in evaluation: got", "self.training", **STATEFUL)
def moves_in_evaluation(
    pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(lambda: Remembered(always=True)) = "new"
):
    return remembering(pairs, shift, beta)


@broken("state", "never in the module or class", **STATEFUL)
def shares_its_numbers(
    pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(lambda: Remembered(kept_by=Everywhere)) = "new"
):
    return remembering(pairs, shift, beta)


@broken("state", "twice: got the same shift", "let Coerce make it", **STATEFUL)
def shares_its_object(pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(lambda: ONE_FOR_ALL) = "new"):
    return remembering(pairs, shift, beta)


@broken("state", "restored from state_dict", "not interrupted", **STATEFUL)
def restores_nothing(pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(Forgetful) = "new"):
    return remembering(pairs, shift, beta)


@broken("state", "stateful=False: got a state in shift", separable=False, difference_only=True)
def keeps_a_state_undeclared(pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(Remembered) = "new"):
    return remembering(pairs, shift, beta)


class Slope:
    """A hyperparameter whose repr is no literal."""

    value = 0.1

    def __eq__(self, other):
        return isinstance(other, Slope)

    __hash__ = None


@broken("repr", "get(repr(loss))", "use hyperparameters that are literals", **LIKE_DPO)
def has_an_unreadable_setting(
    pairs: Pairs, *, slope: Annotated[object, Coerce(lambda value: _slope(value), "0.1")] = 0.1
):
    return -F.logsigmoid(slope.value * pairs.margin())


def _slope(value):
    if value == 0.1 or isinstance(value, Slope):
        return Slope()
    raise ValueError(f"got {value!r}")


class Link:
    """A hyperparameter that pickle refuses."""

    def __init__(self):
        self.function = lambda x: -F.logsigmoid(x)

    def __repr__(self):
        return "'logistic'"

    def __deepcopy__(self, memo):
        return self


@broken("pickle", "pickle.loads", "pickle local object", **LIKE_DPO)
def has_a_setting_that_is_code(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    link: Annotated[object, Coerce(lambda value: _link(value), "'logistic'")] = "logistic",
):
    return link.function(beta * pairs.margin())


def _link(value):
    if value == "logistic" or isinstance(value, Link):
        return Link()
    raise ValueError(f"got {value!r}")


@broken("documentation", "a `.. math::` block", "`scale: ...`", **LIKE_DPO)
def half_documented(pairs: Pairs, *, scale: Positive = 0.1):
    """Logistic loss.

    Args:
        pairs: Reads the log-ratios of both sides.
    """
    return -F.logsigmoid(scale * pairs.margin())


@broken("hyperparameter_effect", "clip=", "take it out of the signature", **LIKE_DPO)
def ignores_an_optional_number(pairs: Pairs, *, beta: Positive = 0.1, clip: float | None = None):
    """AUDIT K6."""
    return -F.logsigmoid(beta * pairs.margin())


@broken("hyperparameters", "link='no such choice'", "annotate it with Literal", **LIKE_DPO)
def takes_any_string(pairs: Pairs, *, beta: Positive = 0.1, link: str = "logistic"):
    """AUDIT K6."""
    return (pairs.margin() * -beta).relu() if link == "hinge" else -F.logsigmoid(beta * pairs.margin())


@broken("hyperparameter_effect", "link='hinge'", **LIKE_DPO)
def checks_a_string_and_ignores_it(pairs: Pairs, *, beta: Positive = 0.1, link: str = "logistic"):
    """AUDIT K6."""
    if link not in ("logistic", "hinge"):
        raise ValueError(f"link: got {link!r}, expected 'logistic' or 'hinge'")
    return -F.logsigmoid(beta * pairs.margin())


class Average(State):
    """Mean of the margins so far."""

    name = "average"
    saved = ("total", "count")
    settings = ()

    def __init__(self):
        super().__init__()
        self.total = self.count = 0.0

    def __call__(self, margins, counted):
        if self.training:
            count, total, _ = self.totals(margins, counted)
            self.total, self.count = self.total + total, self.count + count
        return self.total / self.count if self.count else 0.0


def shifted(
    pairs: Pairs, *, beta: Positive = 0.1, shift: Annotated[str | Average, stateful(Average)] = "running"
):
    return -F.logsigmoid(beta * (pairs.margin() - shift(pairs.margin(), pairs.valid)))


@broken("state", "calls of average", "call the state once", **STATEFUL)
def moves_its_state_twice(
    pairs: Pairs, *, beta: Positive = 0.1, shift: Annotated[str | Average, stateful(Average)] = "running"
):
    shift(pairs.margin(), pairs.valid)
    return shifted(pairs, beta=beta, shift=shift)


def test_stateful_loss_is_written_with_public_names():
    """AUDIT K8."""
    check_loss(shifted, max_examples=2, skip={"torch_compile": "slow"}, stateful=True, separable=False)
    loss = as_loss(shifted, stateful=True, separable=False)
    with registry.registered(loss.spec):
        assert prefloss.get("shifted", shift={"name": "average"}).config() == loss.config()
        with pytest.raises(ValueError, match="shift: got 'no', expected 'running' or the object"):
            prefloss.get("shifted", shift="no")


def test_messages_name_public_modules_only():
    """AUDIT K8."""
    for path in Path(testing.__file__).parent.glob("*.py"):
        assert "losses._" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", broken.cases)
def test_broken_loss_is_caught_by_its_check(name):
    broken.assert_caught(name)


def test_every_check_has_a_broken_loss():
    broken.assert_every_check_catches_one()
