"""A trainer's own loss options: each is taken over by the loss, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefloss.feedback import Labels, Pairs
from prefloss.registry import Loss, LossSpec, WeightedSum, admitted

# (loss, option, value) -> the hyperparameter that the option sets and its value; None if the loss does not read the
# option, "" if it reads it and nothing is to be set.
Meaning = Callable[[LossSpec, str, Any], tuple[str | None, Any]]


@dataclass(frozen=True)
class Host:
    """A trainer that gives its log-probs to a loss.

    Attributes:
        name: Its name in messages.
        feedback: What it gives: `Pairs` or `Labels`.
        supplies: Fields of the feedback that it can give.
        options: Its options that change its loss -> the hyperparameter that they set. "beta" is the KL strength,
            whatever the loss calls it; "simpo.gamma" belongs to one loss alone.
        refused: Options that no loss can take over -> what to do instead.
    """

    name: str
    feedback: type
    supplies: frozenset[str]
    options: Mapping[str, str]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def resolve(self, loss: Loss, args: Any) -> Loss:
        """The loss with its hyperparameters: those stated, those of the trainer's options, the loss's defaults.

        An option at its default counts as unset. In a sum of losses, an option goes to each term that has it.

        Args:
            loss: The loss that the user asked for.
            args: The trainer's configuration, a dataclass.

        Raises:
            ValueError: If an option is set that no term of the loss reads, or that contradicts a stated
                hyperparameter, or the trainer cannot supply what the loss needs.
            TypeError: If the loss takes a kind of feedback that the trainer does not give.
        """
        changed = changed_options(args, (*self.options, *self.refused))
        for option in changed.keys() & self.refused.keys():
            raise ValueError(
                f"{option}: got {changed[option]!r} beside a prefloss loss; {self.refused[option]}"
            )
        loss = inherit(loss, changed, self._meaning)
        self._check_fed(loss)
        return loss

    def _meaning(self, spec: LossSpec, option: str, value: Any) -> tuple[str | None, Any]:
        owner, _, name = self.options[option].rpartition(".")
        if owner and spec.name != owner:
            return None, value
        if name == "beta":
            return spec.beta, value
        if name == "label_smoothing" and "epsilon" in spec.parameters:
            return "epsilon", value
        return (name if name in spec.parameters or name in admitted(spec) else None), value

    def _check_fed(self, loss: Loss) -> None:
        kinds = (Pairs, Labels) if self.feedback is Pairs else (Labels,)
        if loss.spec.feedback not in kinds:
            raise TypeError(
                f"loss: got {loss.name!r}, which takes {loss.spec.feedback.__name__}, but {self.name} gives "
                f"{' or '.join(kind.__name__ for kind in kinds)}"
            )
        for need in sorted(loss.needs - self.supplies):
            raise ValueError(
                f"{loss.name}: needs {need}, which {self.name} does not give; use a loop of your own"
            )
        for _, term in loss.terms:
            if self.feedback is Pairs and term.reads_mismatched:
                got = term.params.get("kl_baseline", "mismatched")
                raise ValueError(
                    f"{term.name}: kl_baseline: got {got!r}, but {self.name} scores no mismatched completions; choose "
                    "'running_mean' or 'zero', or train it on labels"
                )


def changed_options(args: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of a dataclass's fields that are not at their default: name -> value."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    values = {name: getattr(args, name) for name in names if name in defaults}
    return {name: value for name, value in values.items() if value != defaults[name]}


def inherit(
    loss: Loss,
    options: Mapping[str, Any],
    meaning: Meaning,
    *,
    owner: str = "",
    hints: Mapping[str, str] | None = None,
) -> Loss:
    """The loss with the values of a trainer's options.

    Args:
        loss: The loss that the user asked for.
        options: The options that are set, name -> value.
        meaning: Which hyperparameter of a loss an option sets.
        owner: Goes before the names of options in messages, such as "DPOConfig.".
        hints: Option -> what to do if no loss reads it.

    Raises:
        ValueError: If no term of the loss reads an option, or one contradicts a stated hyperparameter.
    """
    read: set[str] = set()
    terms = []
    for weight, term in loss.terms:
        changes = {}
        for option, given in options.items():
            parameter, value = meaning(term.spec, option, given)
            if parameter is not None:
                read.add(option)
            if not parameter:
                continue
            if term.stated.get(parameter, value) != value:
                raise ValueError(
                    f"{owner}{option}: got {given!r}, but {term.name} was given "
                    f"{parameter}={term.stated[parameter]!r}; set it in one place"
                )
            changes[parameter] = value
        terms.append((weight, term.replaced(**changes) if changes else term))
    for option in sorted(options.keys() - read):
        hint = (hints or {}).get(option, " or choose a loss that does")
        raise ValueError(
            f"{owner}{option}: got {options[option]!r}, but {loss.name} does not read it; leave it at its default{hint}"
        )
    # A plain loss is its own only term.
    return terms[0][1] if loss.terms[0].loss is loss else WeightedSum(terms)


def expression(names: Sequence[str], weights: Sequence[float] | None) -> str:
    """A list of loss names and weights as one expression."""
    if len(names) == 1 and weights in (None, [1.0]):
        return names[0]
    return " + ".join(
        f"{weight!r}*{name}" for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
    )
