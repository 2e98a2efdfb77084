"""Checks of what a loss declares beside its values: state, hyperparameters, its string and pickle, its docstring."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_origin

import torch
from torch import Tensor

from prefloss.feedback import Feedback
from prefloss.hyperparameters import Coerce, Draws, Interval, Parameter, plain_type
from prefloss.registry import Loss, get, specs
from prefloss.testing.fields import trainable, with_leaves
from prefloss.testing.outcomes import CannotRun
from prefloss.testing.run import check, for_all
from prefloss.testing.subject import Subject, as_loss, close, differs

STATE = "an object derived from prefloss.hyperparameters.State that is a hyperparameter"


@check(change=f"keep what the loss remembers in {STATE}, and declare stateful=True")
def check_state(subject: Subject) -> None:
    """A stateless loss forgets each call; a state belongs to one object, is saved and restored, and rests in eval."""
    first, second = subject.seeded(31, size=4, weight=True), subject.seeded(32, size=4)
    if not subject.loss.state:
        _check_stateless(subject, first, second)
        return
    if not subject.spec.stateful and not _state_was_passed(subject):
        states = f"a state in {', '.join(sorted(subject.loss.state))}"
        raise subject.failed("stateful=False", states, "no state", change="declare stateful=True")
    for part in (_check_moves, _check_moves_once, _check_not_shared, _check_rests, _check_restored):
        part(subject, first, second)


def _state_was_passed(subject: Subject) -> bool:
    """Whether the state came with a hyperparameter that is not the default, such as a schedule."""
    parameters = subject.spec.parameters.values()
    if not parameters or any(parameter.required for parameter in parameters):
        return bool(subject.loss.state)
    return subject.loss.state.keys() != get(subject.spec.name).state.keys()


def _check_stateless(subject: Subject, first: Feedback, second: Feedback) -> None:
    if subject.spec.stateful:
        change = f"keep it in {STATE}, or declare stateful=False"
        raise subject.failed("stateful=True", "no state at the defaults", "one", change=change)
    loss = subject.fresh()
    before, _, after = (subject.detached(loss, feedback) for feedback in (first, second, first))
    what = "values in training after another batch of a loss that declares no state"
    subject.expect(what, after, before, first, exactly=True)


def _check_moves(subject: Subject, first: Feedback, second: Feedback) -> None:
    before = copy.deepcopy(subject.fresh().state_dict())
    loss = subject.trained(first)
    loss.step()
    if loss.state_dict() == before:
        what, change = "state after a batch and a step in training", "save in state_dict what moves"
        raise subject.failed(what, str(before), "another one", first, change)


def _check_moves_once(subject: Subject, first: Feedback, second: Feedback) -> None:
    loss, calls = subject.fresh(), list[tuple[Any, ...]]()

    def recorded(state: Any, *inputs: Any) -> Any:
        calls.append((state, *inputs))
        return type(state).__mro__[1].__call__(state, *inputs)

    for state in loss.state.values():
        if callable(state) and not isinstance(state, Draws):
            state.__class__ = type(type(state).__name__, (type(state),), {"__call__": recorded})
    subject.detached(loss, first)
    for place, (state, *inputs) in enumerate(calls):
        for other, *others in calls[:place]:
            if state is other and all(map(_are_the_same, inputs, others)):
                change = "call the state once and keep what it returns: each call moves it"
                what = f"calls of {state.name} with the same numbers in one batch"
                raise subject.failed(what, "2", "1", first, change)


def _are_the_same(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return one is other or (tensors and close(one, other, relative=0.0))


def _check_not_shared(subject: Subject, first: Feedback, second: Feedback) -> None:
    other = subject.fresh()
    expected = subject.detached(subject.fresh(), first)
    before = copy.deepcopy(other.state_dict())
    subject.trained(second)
    values = subject.detached(subject.fresh(), first)
    if other.state_dict() != before or not torch.equal(values, expected):
        what = "values of a fresh object after another one was trained"
        change = "make the state in the constructor (or in Coerce), never in the module or class"
        raise subject.failed(what, values, expected, first, change)
    if subject.spec.parameters and not _state_was_passed(subject):
        one, another = as_loss(subject.spec), as_loss(subject.spec)
        shared = [name for name, state in one.state.items() if another.state[name] is state]
        if shared:
            what, change = f"get({subject.spec.name!r}) twice", "let Coerce make it from a string"
            raise subject.failed(what, f"the same {shared[0]}", "an object for each loss", change=change)


def _check_rests(subject: Subject, first: Feedback, second: Feedback) -> None:
    loss = subject.trained(first).eval()
    before = copy.deepcopy(loss.state_dict())
    subject.detached(loss, second)
    loss.step()
    if loss.state_dict() != before:
        what, change = "state after a batch in evaluation", "change it only where self.training is True"
        raise subject.failed(what, str(loss.state_dict()), str(before), second, change)


def _check_restored(subject: Subject, first: Feedback, second: Feedback) -> None:
    trained, restored = subject.trained(first), subject.fresh()
    trained.step()
    saved = trained.state_dict()
    try:
        restored.load_state_dict(json.loads(json.dumps(saved)))
    except (TypeError, ValueError) as error:
        what, change = f"state {saved} through JSON", "save plain numbers, strings and lists"
        raise subject.failed(what, str(error), "the same state", change=change) from error
    what = "values of a loss restored from state_dict, against the one that was not interrupted"
    change = "list every attribute that moves in `saved`"
    for feedback in (second, first):
        values, expected = (subject.detached(loss, feedback) for loss in (restored, trained))
        subject.expect(what, values, expected, feedback, change, exactly=True)


@check(
    change="use hyperparameters that are literals or objects with a repr; a state is written as the dict of its "
    "config(), which prefloss.hyperparameters.stateful reads"
)
def check_repr(subject: Subject) -> None:
    """`get(repr(loss))` gives a loss of the same values."""
    _check_copies(subject, "get(repr(loss))", lambda loss: get(repr(loss)))


@check(change="use hyperparameters that pickle can store")
def check_pickle(subject: Subject) -> None:
    """A loss comes back from pickle with its settings and its state."""
    how = "pickle.loads(pickle.dumps(loss))"
    _check_copies(subject, how, lambda loss: pickle.loads(pickle.dumps(loss)), with_state=True)


def _check_copies(
    subject: Subject, how: str, copied: Callable[[Loss], Loss], with_state: bool = False
) -> None:
    others = {
        name: subject.other_values(name)
        for name, parameter in subject.spec.parameters.items()
        if plain_type(parameter.type) in (int, float)
    }
    one_changed = [{name: values[-1]} for name, values in others.items() if values][:1]

    def body(feedback: Feedback) -> None:
        for changes in ({}, *one_changed):
            loss = subject.trained(*[feedback] * with_state, **changes)
            try:
                other = copied(loss)
            except Exception as error:
                got = f"{type(error).__name__}: {error}"
                raise subject.failed(f"{how} of {loss!r}", got, "a loss") from error
            values, expected = subject.detached(other.train(), feedback), subject.detached(loss, feedback)
            subject.expect(f"values of {how} of {loss!r}", values, expected, feedback, exactly=True)

    for_all(subject, body, size=3)


def _has_no_page(subject: Subject) -> str | None:
    if subject.is_sum:
        return "is a sum of losses, which have pages of their own"
    function = subject.spec.function
    starts = subject.spec.formula or "\nArgs:\n" in (inspect.getdoc(function) or "")
    if (function.__module__ or "").startswith("prefloss.") or starts:
        return None
    return "its docstring has no formula and no Args section; with them prefloss makes a page of it"


@check(_has_no_page)
def check_documentation(subject: Subject) -> None:
    """The docstring has a summary, the formula, and a description of every hyperparameter."""
    spec = subject.spec
    described = {
        "a first line that says what the loss is": spec.summary,
        "a `.. math::` block with the formula": spec.formula,
    }
    for name, parameter in spec.parameters.items():
        described[f"a line `{name}: ...` in its Args section"] = parameter.description
    missing = [what for what, text in described.items() if not text]
    if missing:
        raise subject.failed("docstring", repr(spec.summary), ", ".join(missing))


def _has_no_hyperparameters(subject: Subject) -> str | None:
    return None if subject.spec.parameters else "has no hyperparameters of its own"


@check(_has_no_hyperparameters)
def check_hyperparameters(subject: Subject) -> None:
    """A hyperparameter out of its range, of another type or of another name is refused when the loss is built.

    A string may also be refused when the loss is called.
    """
    parameters = subject.spec.parameters
    for name, parameter in parameters.items():
        for value, change in _refusable(parameter):
            _check_refused(subject, name, value, f"it takes {parameter.expected}", change)
    _check_refused(subject, "no_such_hyperparameter", 1.0, "it has none of that name", "")
    if specs.get(subject.spec.name) is subject.spec:
        required = {name: subject.loss.params[name] for name in parameters if parameters[name].required}
        for alias in subject.spec.aliases:
            try:
                loss = get(alias, **required)
                subject.detached(loss.eval(), subject.seeded(1, size=2))
            except (TypeError, ValueError) as error:
                change = "give it what the loss needs"
                raise subject.failed(f"alias {alias!r}", str(error), "a loss", change=change) from error
    unchecked = [name for name, parameter in parameters.items() if parameter.type is Any]
    if unchecked and parameters[unchecked[0]].constraint is None:
        change = "annotate it, so that a wrong value is refused: float, Positive, Literal['a', 'b'] ..."
        raise subject.hint(f"the annotation of {unchecked[0]}", "none", change)


TYPED = (
    "annotate it with its type and range, such as float, Positive or Annotated[float, Interval(ge=0, le=1)]"
)
COERCED = "let the function of its Coerce raise ValueError or TypeError for a value that it does not know"
CHOSEN = "annotate it with Literal['a', 'b', ...], its choices"


def _refusable(parameter: Parameter) -> Iterator[tuple[Any, str]]:
    """Values that the loss may not take, and what to change if it does."""
    if isinstance(parameter.constraint, Coerce):
        yield object(), COERCED
        return
    kind = plain_type(parameter.type)
    if get_origin(kind) is Literal or kind is str:
        yield "no such choice", CHOSEN
    elif kind is bool:
        yield from (("yes", TYPED), (1, TYPED))
    elif kind in (int, float):
        yield from ((value, TYPED) for value in (math.nan, math.inf, "0.1", True))
        if isinstance(parameter.constraint, Interval):
            allowed = parameter.constraint
            bounds = [x for x in (allowed.gt, allowed.ge, allowed.lt, allowed.le) if x is not None]
            near = [bound + step for bound in bounds for step in (0.0, -1e-6, 1e-6)]
            yield from ((value, TYPED) for value in near if value not in allowed)


def _check_refused(subject: Subject, name: str, value: Any, why: str, change: str) -> None:
    got, cause = "a loss", None
    try:
        loss = subject.fresh(**{name: value})
        if isinstance(value, str):
            loss.eval()(subject.seeded(5, size=3))
    except (TypeError, ValueError) as error:
        if name in str(error):
            return
        got, cause = str(error), error
    expected = f"a ValueError or TypeError that names {name}: {why}"
    raise subject.failed(f"get(..., {name}={value!r})", got, expected, change=change) from cause


@check(_has_no_hyperparameters)
def check_hyperparameter_effect(subject: Subject) -> None:
    """Every hyperparameter changes some value: none is accepted and ignored."""
    for name in subject.spec.parameters:
        # `beta` looks at the KL strength.
        others = [] if name == subject.spec.beta else subject.other_values(name)
        if others and not _has_effect(subject, name, others):
            what = f"values with {name}={others[0]!r} instead of {subject.loss.params[name]!r}"
            got, expected = "the same in every batch and with every other choice", "other ones somewhere"
            change = f"use {name} or take it out of the signature"
            raise subject.failed(what, got, expected, change=change)


def _has_effect(subject: Subject, name: str, others: list[Any]) -> bool:
    for choices in _choices(subject, name):
        for feedback in subject.searched(12, reference=True):
            base = _outcome(subject, feedback, choices)
            for value in others:
                other = _outcome(subject, feedback, {**choices, name: value})
                if base is not None and (other is None or differs(base, other)):
                    return True
    return False


def _choices(subject: Subject, name: str) -> Iterator[dict[str, Any]]:
    """No change, then each other choice of the hyperparameters that choose between forms."""
    yield {}
    for other, parameter in subject.spec.parameters.items():
        kind = plain_type(parameter.type)
        chooses = get_origin(kind) is Literal or kind is bool or other.endswith("_weight")
        if other != name and chooses:
            for value in subject.other_values(other):
                yield {other: value}


def _outcome(subject: Subject, feedback: Feedback, changes: dict[str, Any]) -> Tensor | None:
    """Values and gradient of the second batch in training, where a setting of the state shows; None if it raises."""
    try:
        loss = subject.fresh(**changes)
        if subject.loss.state:
            loss(subject.seeded(12, size=4, reference=True))
        attached, leaves = with_leaves(feedback, trainable(feedback))
        values = subject.call(loss, attached)
        gradients = subject.slopes(values.sum(), leaves, feedback)
    except (CannotRun, TypeError, ValueError):
        return None
    return torch.cat([values.detach(), *(slope.flatten() for slope in gradients.values())])
