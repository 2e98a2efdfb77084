"""Checks of what stands around the function: state, hyperparameters, its string and pickle, its docstring."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prefloss import registry
from prefloss.feedback import Feedback
from prefloss.hyperparameters import plain_type as _plain_type
from prefloss.losses._core.docstring import parse
from prefloss.losses._core.loss import Loss
from prefloss.testing._run import check, for_all
from prefloss.testing._settings import other_settings
from prefloss.testing._subject import Subject
from prefloss.testing._values import told


@check()
def check_state(subject: Subject) -> None:
    """A stateless loss forgets each call; a state belongs to one object, is saved and restored, and rests in eval."""
    first, second = subject.seeded(31, size=4, weight=True), subject.seeded(32, size=4)
    if not subject.loss.state:
        _check_stateless(subject, first, second)
        return
    if not subject.spec.stateful and not _given(subject):
        raise subject.failed(
            f"declares stateful=False, but keeps {sorted(subject.loss.state)}: declare stateful=True"
        )
    _check_moves(subject, first, second)
    _check_own_state(subject, first, second)
    _check_rests(subject, first, second)
    _check_restored(subject, first, second)


def _given(subject: Subject) -> bool:
    """Whether the state came with a hyperparameter that is not the default, such as a schedule."""
    return subject.loss.state.keys() != _default_state(subject)


def _default_state(subject: Subject) -> set[str]:
    if not subject.parameters or any(parameter.required for parameter in subject.parameters.values()):
        return set()
    return set(registry.get(subject.name).state)


def _check_stateless(subject: Subject, first: Feedback, second: Feedback) -> None:
    if subject.spec.stateful:
        raise subject.failed(
            "declares stateful=True, but no hyperparameter holds a state at its default: keep it in an object derived "
            "from prefloss.losses.State, or declare stateful=False"
        )
    loss = subject.fresh()
    before = subject.detached(loss, first)
    subject.detached(loss, second)
    after = subject.detached(loss, first)
    if not torch.equal(before, after):
        problem = (
            f"in training the same batch gave {told(before)} and, after another batch, {told(after)}, expected the same "
            "from a loss that declares no state: keep what it remembers in an object derived from "
            "prefloss.losses.State that is a hyperparameter, and declare stateful=True"
        )
        raise subject.failed(problem, first)


def _check_moves(subject: Subject, first: Feedback, second: Feedback) -> None:
    loss = subject.fresh()
    before = copy.deepcopy(loss.state_dict())
    subject.detached(loss, first)
    loss.step()
    if loss.state_dict() == before:
        problem = f"a batch and a step in training left the state at {before}: save in state_dict what moves"
        raise subject.failed(problem, first)


def _check_own_state(subject: Subject, first: Feedback, second: Feedback) -> None:
    used, other = subject.fresh(), subject.fresh()
    wanted = subject.detached(subject.fresh(), first)
    before = copy.deepcopy(other.state_dict())
    subject.detached(used, second)
    found = subject.detached(subject.fresh(), first)
    if other.state_dict() != before or not torch.equal(found, wanted):
        problem = (
            f"after another object of the same settings was trained, a fresh one gave {told(found)}, expected "
            f"{told(wanted)} as before: make the state in the constructor (or in Coerce), never in the module or class"
        )
        raise subject.failed(problem, first)
    if subject.parameters and not _given(subject):
        made = [registry.get(subject.name, **required(subject)) for _ in range(2)]
        shared = [name for name, state in made[0].state.items() if made[1].state[name] is state]
        if shared:
            raise subject.failed(
                f"get({subject.name!r}) gave the same {shared[0]} twice, expected an object of its own for each loss: "
                "let Coerce make it from a string"
            )


def required(subject: Subject) -> dict[str, Any]:
    return {name: subject.loss.params[name] for name, item in subject.parameters.items() if item.required}


def _check_rests(subject: Subject, first: Feedback, second: Feedback) -> None:
    loss = subject.fresh()
    subject.detached(loss, first)
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    subject.detached(loss, second)
    loss.step()
    if loss.state_dict() != before:
        problem = (
            f"a batch in evaluation moved the state from {before} to {loss.state_dict()}, expected it at rest: change "
            "it only where self.training is True"
        )
        raise subject.failed(problem, second)


def _check_restored(subject: Subject, first: Feedback, second: Feedback) -> None:
    trained, restored = subject.fresh(), subject.fresh()
    subject.detached(trained, first)
    trained.step()
    saved = trained.state_dict()
    try:
        restored.load_state_dict(json.loads(json.dumps(saved)))
    except (TypeError, ValueError) as error:
        problem = f"its state {saved} does not come back through JSON: {error}\n  Save plain numbers, strings and lists"
        raise subject.failed(problem) from error
    for feedback in (second, first):
        wanted, found = subject.detached(trained, feedback), subject.detached(restored, feedback)
        if not torch.equal(wanted, found):
            problem = (
                f"a loss restored from state_dict gave {told(found)}, expected {told(wanted)} as the one that was not "
                "interrupted: list every attribute that moves in `saved`"
            )
            raise subject.failed(problem, feedback)


@check()
def check_repr(subject: Subject) -> None:
    """`get(repr(loss))` gives a loss of the same values."""
    _check_copies(subject, "get(repr(loss))", lambda loss: registry.get(repr(loss)), state=False)


@check()
def check_pickle(subject: Subject) -> None:
    """A loss comes back from pickle with its settings and its state."""
    _check_copies(
        subject, "pickle.loads(pickle.dumps(loss))", lambda loss: pickle.loads(pickle.dumps(loss)), state=True
    )


def _check_copies(subject: Subject, how: str, copied: Callable[[Loss], Loss], state: bool) -> None:
    def body(feedback: Feedback) -> None:
        for changes in [{}, *_changed_numbers(subject)]:
            loss = subject.fresh(**changes)
            if state and loss.state:
                subject.detached(loss, feedback)
            try:
                other = copied(loss)
            except Exception as error:
                problem = f"{how} of {loss!r} raised {type(error).__name__}: {error}"
                raise subject.failed(
                    f"{problem}; expected hyperparameters that are literals or objects with a repr"
                ) from error
            found, wanted = subject.detached(other.train(), feedback), subject.detached(loss, feedback)
            if not torch.equal(found, wanted):
                raise subject.failed(
                    f"{how} of {loss!r} gave {told(found)}, expected {told(wanted)}", feedback
                )

    for_all(subject, body, size=3)


def _changed_numbers(subject: Subject) -> Iterator[dict[str, Any]]:
    for name, parameter in subject.parameters.items():
        others = other_settings(subject, name, parameter)
        if others and _plain_type(parameter.type) in (int, float):
            yield {name: others[-1]}
            return


def _no_page(subject: Subject) -> str | None:
    """A loss of prefloss has a page; one of somebody else's that has begun no page needs none."""
    function = subject.spec.function
    module = getattr(function, "__module__", "") or ""
    if subject.is_sum:
        return "is a sum of losses, which have pages of their own"
    text = parse(function)
    if module.startswith("prefloss.") or text.formula or text.args:
        return None
    return "its docstring has no formula and no Args section; with them prefloss makes a page of it"


@check(_no_page)
def check_documentation(subject: Subject) -> None:
    """The docstring has a summary, the formula, and a description of every hyperparameter."""
    text = parse(subject.spec.function)
    missing = [
        *(["a first line that says what the loss is"] if not text.summary else []),
        *(["a `.. math::` block with the formula"] if not text.formula else []),
        *(
            f"a line `{name}: ...` in its Args section"
            for name in subject.parameters
            if not text.args.get(name)
        ),
    ]
    if missing:
        raise subject.failed(f"the docstring lacks {', '.join(missing)}")
