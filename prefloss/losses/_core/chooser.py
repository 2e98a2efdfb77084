"""Which loss for which data and which problem: a ranking by what papers claim and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from prefloss.losses import measured
from prefloss.losses._core.catalogue import specs
from prefloss.losses._core.expression import get
from prefloss.losses._core.modifiers import admitted
from prefloss.losses._core.problems import PROBLEMS
from prefloss.losses._core.question import MADE_FOR, SPOKEN, WORDS, Asked
from prefloss.losses._core.spec import LossSpec
from prefloss.losses.measured import Grade, Tried

MOST = 3
"""How many losses `suggest` names at most."""


@dataclass(frozen=True)
class Suggestion:
    """A loss that `suggest` names.

    Attributes:
        loss: With its hyperparameters, as `prefloss.get` takes it.
        name: Its name alone.
        modifiers: Modifiers that answer what the loss itself does not, with their values.
        why: What it does about the problem, in a sentence.
        known: How well that is known, in a few words.
        evidence: What is known, in sentences: the paper's claim, what was measured, and how it did over all worlds.
        needs: The data that it needs.
    """

    loss: str
    name: str
    modifiers: Mapping[str, Any]
    why: str
    known: str
    evidence: tuple[str, ...]
    needs: str


@dataclass(frozen=True)
class Suggestions(Sequence[Suggestion]):
    """What `suggest` returns: at most three suggestions, best first.

    Attributes:
        start: What to try before them, in sentences.
        notes: What else to know: losses whose claim did not hold, conflicts, and what is missing.
    """

    start: str
    notes: tuple[str, ...]
    found: tuple[Suggestion, ...] = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> Suggestion: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Suggestion]: ...
    def __getitem__(self, index: int | slice) -> Suggestion | Sequence[Suggestion]:
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        lines = [self.start]
        for one in self.found:
            lines += [
                "",
                one.loss,
                *(f"  {text}" for text in (one.why, *one.evidence, f"Needs: {one.needs}.")),
            ]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


def suggest(*words: str) -> Suggestions:
    """Losses for what you have and what hurts, by what papers claim and what was measured.

    Args:
        words: What you have (`pairs`, `votes`, `rankings`, `scores`, `no-reference`, `no-tokens`) and what hurts
            (`noisy`, `length`, `falling-chosen` ...), each by itself or several in one string with commas.

    Returns:
        At most three suggestions, best first. A loss that answers all of the problems comes before one that answers
        some; measured help before a claim alone; what needs less data before what needs more.

    Raises:
        TypeError: If a word is not a string.
        ValueError: If there is none, one is unknown (the message lists all) or two contradict each other.

    Example:
        >>> [one.loss for one in suggest("pairs", "length")][:2]
        ['r_dpo(beta=0.1, alpha=0.01)', 'sampo(beta=0.1, subset=draws(seed=0))']
    """
    asked = Asked.of(words)
    usable = [_Candidate.of(spec, asked) for spec in specs.values() if asked.admits(spec)]
    # A claim that did not hold is named where there is nothing else for that problem.
    unanswered = {*asked.problems}.difference(*(one.covered for one in usable))
    wanted = {*(asked.problems or asked.aims)}
    helping = [
        one for one in usable if one.covered & wanted or unanswered & {answer.aim for answer in one.answers}
    ]
    chosen = _best([one for one in helping if not _is_start(one, asked)], asked)
    return Suggestions(
        _start(asked), tuple(_notes(usable, chosen, asked)), tuple(one.suggestion(asked) for one in chosen)
    )


_KNOWN = {
    Grade.CLAIMED_AND_MEASURED: "claimed, and measured to help",
    Grade.MEASURED: "measured to help",
    Grade.MIXED: "claimed; measured to help in one setting and not in another",
    Grade.CLAIMED: "claimed; no result of ours",
    Grade.NO_DIFFERENCE: "claimed; no difference measured",
    Grade.CONTRADICTED: "claimed; measured to do worse",
}
_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class _Answer:
    """What a loss, or a modifier in it, does about one aim."""

    spec: LossSpec
    aim: str
    grade: Grade

    @property
    def how(self) -> str:
        return self.spec.helps.get(self.aim, "")

    @property
    def figures(self) -> list[Tried]:
        return _figures(self.spec, self.aim)


@dataclass(frozen=True)
class _Candidate:
    """A loss, perhaps with modifiers, and what it answers."""

    spec: LossSpec
    settings: Mapping[str, Any]
    answers: tuple[_Answer, ...]

    @classmethod
    def of(cls, spec: LossSpec, asked: Asked) -> _Candidate:
        """The loss with those modifiers that answer what it does not answer itself."""
        answers = [answer for aim in asked.aims if (answer := _answer(spec, aim))]
        settings: dict[str, Any] = {}
        if any(answer.grade > Grade.CONTRADICTED for answer in answers):
            for name, modifier in admitted(spec).items():
                if modifier.form is None:
                    continue
                form, parameter = specs[modifier.form[0]], modifier.form[1]
                open_aims = {*asked.aims} - {answer.aim for answer in answers}
                more = [answer for aim in asked.aims if aim in open_aims and (answer := _answer(form, aim))]
                if not asked.missing(form) and any(answer.grade > Grade.CONTRADICTED for answer in more):
                    settings[name] = form.parameters[parameter].default if parameter else True
                    answers += more
        return cls(spec, settings, tuple(answers))

    @property
    def covered(self) -> set[str]:
        """The aims that it answers, by a claim that was not contradicted or by measurement."""
        return {answer.aim for answer in self.answers if answer.grade > Grade.CONTRADICTED}

    def contradicted(self, problem: str) -> bool:
        """Whether the loss itself is made for a problem, and measurement says otherwise."""
        return any(
            (answer.spec, answer.aim, answer.grade) == (self.spec, problem, 0) for answer in self.answers
        )

    def rank(self, uncovered: set[str]) -> tuple[Any, ...]:
        """Higher is better: what it covers, how well that is known, what else it costs."""
        overall = measured.compared().get(self.spec.name)
        shown = 0 if overall is None or not overall.shown else (1 if overall.interval[0] > 0 else -1)
        return (
            len(self.covered & uncovered),
            sum(answer.grade for answer in self.answers),
            shown,
            -len(self.needs - {"tokens", "scores"}),
            # The losses of few users come after the others.
            ".contrib." not in getattr(self.spec.function, "__module__", ""),
            float("-inf") if overall is None else overall.interval[0],
        )

    @property
    def needs(self) -> set[str]:
        """Fields of the feedback that loss and modifiers need."""
        modifiers = admitted(self.spec)
        return {*self.spec.needs}.union(*(modifiers[name].needs for name in self.settings))

    def suggestion(self, asked: Asked) -> Suggestion:
        """It as users see it."""
        if any(parameter.required for parameter in self.spec.parameters.values()):
            loss = self.spec.name
        else:
            loss = repr(get(self.spec.name, **self.settings))
        named = [answer for answer in self.answers if answer.how] or self.answers
        clauses = "; ".join(dict.fromkeys(answer.how or _summary(answer.spec) for answer in named))
        evidence = [line for answer in self.answers for line in _evidence(answer)]
        if self.settings:
            evidence.append("Its parts were tried with DPO alone, not together.")
        overall = tuple(_overall(self.spec.name))
        reference = "a reference" if self.spec.needs_reference else "no reference"
        needs = ", ".join([WORDS[self.spec.feedback], reference, *sorted(self.needs)])
        why = f"{clauses[:1].upper()}{clauses[1:]}."
        known = ", ".join(
            dict.fromkeys(_KNOWN[answer.grade] for answer in named if answer.how or answer.figures)
        )
        known = known or " ".join(_overall(self.spec.name, brief=True)) or "not measured"
        return Suggestion(loss, self.spec.name, self.settings, why, known, (*evidence, *overall), needs)


def _summary(spec: LossSpec) -> str:
    return spec.summary.rstrip(".").replace("`", "") or f"the loss {spec.name}"


def _is_start(candidate: _Candidate, asked: Asked) -> bool:
    """Whether a candidate is the loss to start with, and no problem speaks for naming it again."""
    plain = candidate.spec.name == asked.start and not candidate.settings
    return plain and not {answer.aim for answer in candidate.answers} & {*asked.problems}


def _figures(spec: LossSpec, aim: str) -> list[Tried]:
    return [one for one in measured.tried() if one.loss == spec.name and one.problem == aim]


def _answer(spec: LossSpec, aim: str) -> _Answer | None:
    claimed = MADE_FOR[aim](spec) if aim in MADE_FOR else aim in spec.helps
    grade = measured.grade(claimed, _figures(spec, aim))
    return None if grade is None else _Answer(spec, aim, grade)


def _best(candidates: list[_Candidate], asked: Asked) -> list[_Candidate]:
    """At most three: what answers most first, then what answers what is left."""
    chosen: list[_Candidate] = []
    uncovered = {*asked.aims}
    rest = sorted(candidates, key=lambda one: one.spec.name)
    while rest and len(chosen) < MOST:
        best = max(rest, key=lambda one: one.rank(uncovered or {*asked.aims}))
        rest.remove(best)
        chosen.append(best)
        uncovered -= best.covered
    return chosen


def _start(asked: Asked) -> str:
    """What to do before another loss."""
    text = f"Start with {SPOKEN[asked.start]} and tune its beta"
    text += "; change only if " if asked.problems else "."
    text += " and ".join(PROBLEMS[problem].meaning for problem in asked.problems)
    text += "." if asked.problems else ""
    for problem in (PROBLEMS[name] for name in asked.problems):
        if problem.first:
            text += f" {problem.first} (Measured: {problem.experiment}.)"
    if "no-reference" in asked.given:
        text += " `prefloss reference` computes its reference log-probs once; training then holds one model."
    return text


def _notes(usable: list[_Candidate], chosen: list[_Candidate], asked: Asked) -> Iterator[str]:
    """Claims that did not hold, problems that no loss of these data answers, and conflicts."""
    for problem in asked.problems:
        made = [one for one in usable if any(answer.aim == problem for answer in one.answers)]
        if not made:
            yield _missing(problem, asked)
        for one in made:
            if one.contradicted(problem) and one not in chosen:
                figures = "; ".join(map(str, _figures(one.spec, problem)))
                yield f"{one.spec.name} is made for {problem}, but the claim did not appear here: {figures}."
    answered = [problem for problem in asked.problems if any(problem in one.covered for one in usable)]
    if chosen and not any(one.covered >= {*answered} for one in chosen):
        pairs = [
            (one.spec.name, " and ".join(word for word in answered if word in one.covered)) for one in chosen
        ]
        listed = ", ".join(f"{name} for {words}" for name, words in pairs if words)
        yield f"No loss answers {' and '.join(answered)} together; they are answered one by one: {listed}."
    if not chosen and not asked.aims:
        yield "Nothing that you named calls for another loss."


def _missing(problem: str, asked: Asked) -> str:
    """What would be needed for a loss that answers a problem."""
    others = [spec for spec in specs.values() if not asked.admits(spec) and _answer(spec, problem)]
    if not others:
        return f"No registered loss is made for {problem}."
    nearest = sorted(others, key=lambda spec: (len(asked.lacking(spec)), spec.name))[:MOST]
    needed = "; ".join(f"{spec.name} needs {' and '.join(asked.lacking(spec))}" for spec in nearest)
    return f"No loss of {' and '.join(asked.given)} answers {problem}: {needed}."


def _evidence(answer: _Answer) -> Iterator[str]:
    if answer.how:
        # A loss may have several papers; the clause then names the one that claims it.
        papers = " and ".join(_PAPER.findall(answer.how)) or answer.spec.reference.rstrip(".") or "its author"
        yield f"Claimed for {answer.aim}: {papers}{'' if answer.figures else '; not measured here'}."
    for figure in answer.figures:
        verdict = {True: "better", False: "worse", None: "no difference that matters"}[figure.better]
        yield f"Measured, {'without a result' if figure.value is None else verdict}: {figure}."


def _overall(name: str, brief: bool = False) -> Iterator[str]:
    """How a loss did over all worlds; nothing if it was not compared."""
    row = measured.compared().get(name)
    if row is None or row.difference is None:
        return
    if brief:
        yield f"{row.difference:+.2f} of reward over all worlds{'' if row.shown else ', no difference shown'}"
        return
    low, high = row.interval
    word = f"; after correction for {len(measured.compared()) - 1} losses no difference is shown"
    yield (
        f"In {len(row.worlds)} worlds at once: {row.difference:+.2f} ({low:+.2f} to {high:+.2f}) of reward against "
        f"{row.baseline}{'' if row.shown else word}."
    )
