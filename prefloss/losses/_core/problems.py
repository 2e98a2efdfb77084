"""What goes wrong in preference training, in one word each: what losses declare in `helps` and users search by."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefloss.arguments import instance, shown
from prefloss.losses._core.names import squeezed


@dataclass(frozen=True)
class Problem:
    """Something that hurts, which some losses are made for.

    Attributes:
        meaning: What it is, as the end of "if ...".
        first: What to try before another loss; empty if there is nothing.
        experiment: The experiment that `first` rests on; `prefloss reproduce` repeats it.
        also: Other words for it.
    """

    meaning: str
    first: str = ""
    experiment: str = ""
    also: tuple[str, ...] = ()


PROBLEMS: Mapping[str, Problem] = types.MappingProxyType(
    {
        "noisy": Problem(
            "a share of the preferences or votes is wrong",
            "Try a smaller beta: flipped labels act like a larger one.",
            "flipped-labels",
            ("noise", "flips", "flipped-labels", "label-noise"),
        ),
        "length": Problem(
            "the judge likes long answers, or answers grow",
            also=("length-bias", "long-answers", "verbosity"),
        ),
        "over-optimisation": Problem(
            "the policy drifts far and gets worse while the loss still falls",
            "Try a larger beta or fewer steps, and watch the KL: held-out accuracy does not show when to stop.",
            "over-optimisation",
            ("over-optimization", "overoptimised", "overoptimized", "reward-hacking", "drift"),
        ),
        "falling-chosen": Problem(
            "the log-probs of chosen completions fall",
            "A small fall is usual. It is worst where chosen and rejected are alike: leave such pairs out.",
            "displacement",
            ("falling-chosen-log-probs", "falling", "displacement", "likelihood-displacement"),
        ),
        "few-upvotes": Problem(
            "upvotes are much rarer than downvotes",
            "Collect upvotes: no weight made up for those that were missing.",
            "kto-few-upvotes",
            also=("unbalanced", "imbalanced", "unbalanced-votes"),
        ),
        "few-pairs": Problem(
            "there are tens of judged pairs, not thousands",
            "Collect more pairs: they are worth more than any loss.",
            "dpo-frontier",
            ("little-data",),
        ),
        "deterministic": Problem(
            "the same answer wins each time, and DPO drives the other one to probability 0",
            also=("certain", "overfitting"),
        ),
        "several-judges": Problem(
            "judges disagree with one another",
            "DPO follows the majority of wins, which seldom differs from the best mean reward.",
            "several-judges",
            ("disagreement", "intransitive", "many-judges"),
        ),
        "off-policy": Problem("other models wrote the completions", also=("offline-data",)),
        "forget": Problem("some completions are to be unlearned", also=("unlearning",)),
    }
)
"""The words for what hurts; a loss declares with `register(helps={word: how})` which of them it is made for."""


def declared(name: str, helps: Any) -> Mapping[str, str]:
    """The trait `helps` of a loss: problem -> how the loss answers it, in a clause.

    Raises:
        TypeError: If it is no mapping of strings.
        ValueError: If a problem is unknown, or a clause empty.
    """
    where = f"{name}: helps"
    instance(where, helps, Mapping, "a mapping such as {'noisy': 'discounts flipped pairs'}")
    for problem, how in helps.items():
        if problem not in PROBLEMS:
            raise ValueError(f"{where}: {unknown(problem, PROBLEMS)}")
        instance(f"{where}: {problem}", how, str, "how the loss helps, in a clause")
        if not how.strip():
            raise ValueError(
                f"{where}: {problem}: got an empty text, expected how the loss helps, in a clause"
            )
    return types.MappingProxyType(dict(helps))


def unknown(word: object, known: Iterable[str], also: Mapping[str, str] | None = None) -> str:
    """The message for an unknown word: the near ones, then all.

    Args:
        word: What was given.
        known: All words.
        also: Other words -> the word that they stand for.
    """
    known = list(known)
    meant = {squeezed(name): name for name in known} | {
        squeezed(one): name for one, name in (also or {}).items()
    }
    near = difflib.get_close_matches(squeezed(str(word)[:200]), meant, n=4, cutoff=0.6)
    names = list(dict.fromkeys(meant[one] for one in near))[:2]
    hint = f"; did you mean {' or '.join(map(repr, names))}?" if names else ","
    return f"got {shown(word)}{hint} expected some of {', '.join(known)}"
