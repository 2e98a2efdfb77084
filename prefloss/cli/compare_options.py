"""The options of `prefloss compare`."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import prefloss
from prefloss.cli.console import CliError
from prefloss.evidence.sweeps import Budget, is_baseline, not_fed
from prefloss.worlds import settings

_MOST = 10**6


@dataclass(frozen=True)
class CompareOptions:
    """The options of `prefloss compare`; None where the default depends on the others."""

    output: Annotated[Path, Option(help="Folder of the report; the same command goes on with what is there.")]
    losses: Annotated[
        list[str] | None,
        Argument(
            help="Losses, as `dpo ipo 'simpo(gamma=0.5)' '0.8*dpo + 0.2*nll'`. dpo is added if it is not there, but "
            "for losses of votes on --data."
        ),
    ] = None
    every: Annotated[bool, Option("--all", help="Compare all losses that the worlds can feed.")] = False
    world: Annotated[
        list[str] | None,
        Option(help=f"Compare in this world; may be repeated. (default: {', '.join(settings())})"),
    ] = None
    betas: Annotated[
        list[str] | None,
        Option(
            help="KL strengths to try, as 0.1,0.5,2. (default: five around each loss's own; with --data its own)"
        ),
    ] = None
    seeds: Annotated[
        int | None, Option(min=2, max=1000, help="Seeds of each loss. (default: 10; with --data 3)")
    ] = None
    steps: Annotated[
        int | None,
        Option(min=1, max=_MOST, help="Optimizer steps of a run. (default: 150; with --data as in train)"),
    ] = None
    data: Annotated[
        Path | None, Option(help="Your own pairs or votes, as for `prefloss train`, in place of the worlds.")
    ] = None
    model: Annotated[
        str | None,
        Option(help="Model folder or hub id to train on --data. Without it, a small built-in model."),
    ] = None

    def check(self) -> None:
        """Raise a `CliError` if there is nothing to compare, or options contradict each other."""
        if self.every and self.losses:
            raise CliError(f"--all: got losses by name too ({self.losses[0]}), expected one of them")
        if not self.every and not self.losses:
            raise CliError("losses: got none, expected names, as `prefloss compare dpo ipo`, or --all")
        if self.data is None and self.model is not None:
            raise CliError("--model: got no --data to train it on, expected both")
        if self.data is not None and (self.every or self.world):
            raise CliError(
                f"--data and {'--all' if self.every else '--world'}: got both, expected one of them"
            )
        if self.data is not None and len(self.strengths or ()) > 1:
            raise CliError(
                f"--betas: got {len(self.strengths or ())} with --data, expected one: the held-out rows cannot both "
                "choose a strength and report on it"
            )
        for name in self.worlds:
            if name not in settings():
                raise CliError(f"--world: got {name!r}, expected one of {', '.join(settings())}")
        self.bound_losses()

    @property
    def worlds(self) -> tuple[str, ...]:
        """Names of the worlds, each once."""
        return tuple(dict.fromkeys(self.world or settings()))

    @property
    def strengths(self) -> tuple[float, ...] | None:
        """What --betas says; None if it was not given. A `CliError` if that is no list of numbers above 0."""
        if self.betas is None:
            return None
        return tuple(dict.fromkeys(_strength(word) for text in self.betas for word in text.split(",")))

    @property
    def budget(self) -> Budget:
        """What each loss gets in the worlds."""
        given = {"seeds": self.seeds, "betas": self.strengths, "steps": self.steps}
        return Budget(**{name: value for name, value in given.items() if value is not None})

    def bound_losses(self) -> dict[str, prefloss.Loss]:
        """The losses by the words that name them; a `CliError` for one that cannot be compared.

        DPO is among them, unless losses of votes alone are named for own data: these may hold no pairs.
        """
        bound = {text: self._bound(text) for text in (prefloss.specs if self.every else self.losses or ())}
        only_votes = bound and all(loss.spec.feedback is prefloss.Labels for loss in bound.values())
        if not any(is_baseline(text) for text in bound) and not (only_votes and self.data):
            bound = {"dpo": self._bound("dpo"), **bound}
        seen: dict[str, str] = {}
        for text, loss in bound.items():
            if repr(loss) in seen:
                raise CliError(
                    f"losses: got {text!r} and {seen[repr(loss)]!r}, which are the same, expected one of them"
                )
            seen[repr(loss)] = text
        if self.data is None:
            lacking = not_fed(bound)
            if lacking and not self.every:
                text, names = next(iter(lacking.items()))
                raise CliError(
                    f"{text}: needs {', '.join(names)}, which the worlds do not have; leave it out"
                )
            bound = {text: loss for text, loss in bound.items() if text not in lacking}
        return bound

    def _bound(self, text: str) -> prefloss.Loss:
        try:
            float(text)
        except ValueError:
            pass
        else:
            raise CliError(
                f"losses: got {text!r}, expected names; several strengths are written --betas 0.1,0.5"
            )
        if text in settings():
            raise CliError(
                f"losses: got the world {text!r}, expected names of losses; write --world for each world"
            )
        try:
            loss = prefloss.get(text)
            self.budget.strengths(loss)
        except (TypeError, ValueError) as error:
            raise CliError(str(error)) from error
        return loss

    def command(self) -> str:
        """The command line that asks for this."""
        words = ["prefloss", "compare", *(self.losses or ())]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "every":
                words += ["--all"] if value else []
            elif field.name != "losses" and value is not None:
                for item in value if isinstance(value, list) else [value]:
                    words += [f"--{field.name}", str(item)]
        return shlex.join(words)


def _strength(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise CliError(f"--betas: got {word!r}, expected numbers > 0, as 0.1,0.5,2")
    return value
