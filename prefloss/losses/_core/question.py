"""The words of a question to `suggest`: what a user has, lacks and suffers from."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prefloss.arguments import instance
from prefloss.feedback import KINDS, Labels, Pairs, Rankings
from prefloss.losses._core.catalogue import specs
from prefloss.losses._core.names import squeezed
from prefloss.losses._core.problems import PROBLEMS, Problem, unknown
from prefloss.losses._core.spec import LossSpec


@dataclass(frozen=True)
class Given:
    """What a user has or lacks.

    Attributes:
        meaning: In words.
        also: Other words for it.
        without: The word that it contradicts.
    """

    meaning: str
    also: tuple[str, ...] = ()
    without: str = ""


# Word -> the kind of feedback, and the loss to start with.
KIND_OF: Mapping[str, tuple[type, str]] = {
    "pairs": (Pairs, "dpo"),
    "rankings": (Rankings, "dpo_pl"),
    "votes": (Labels, "kto"),
}
SPOKEN = {"dpo": "DPO", "dpo_pl": "DPO for rankings (dpo_pl)", "kto": "KTO"}
WORDS = {kind: word for word, (kind, _) in KIND_OF.items()}

GIVEN: Mapping[str, Given] = types.MappingProxyType(
    {
        "pairs": Given("a chosen and a rejected completion of a prompt", ("preferences", "chosen-rejected")),
        "votes": Given(
            "single completions, each with an upvote or a downvote", ("labels", "thumbs", "unpaired")
        ),
        "rankings": Given(
            "several completions of a prompt, each with a score", ("groups", "lists", "listwise")
        ),
        "scores": Given("numbers that grade completions", ("graded-scores", "graded", "ratings", "rewards")),
        "reference": Given("a reference model, or its log-probs", ("reference-model",), "no-reference"),
        "no-reference": Given(
            "no memory for a reference model", ("reference-free", "no-memory"), "reference"
        ),
        "tokens": Given("token counts of the completions", ("token-counts",), "no-tokens"),
        "no-tokens": Given("log-probs of whole completions alone", ("no-token-counts", "sums"), "tokens"),
    }
)
"""The words for what a user has."""


# Words for data -> whether a loss is made for them. A loss that counts some examples alone is for special uses.
MADE_FOR: Mapping[str, Callable[[LossSpec], bool]] = {
    "votes": lambda spec: spec.feedback is Labels and spec.valid is None,
    "rankings": lambda spec: spec.feedback is Rankings,
    "scores": lambda spec: "scores" in spec.needs or spec.feedback is Rankings,
    "no-reference": lambda spec: not spec.needs_reference and spec.valid is None,
}


@dataclass(frozen=True)
class Asked:
    """The words of a question: what is there, and what hurts."""

    given: tuple[str, ...]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, words: Iterable[str]) -> Asked:
        texts = [instance("words", text, str, "words such as 'votes' and 'noisy'") for text in words]
        listed = [word.strip() for text in texts for word in text.split(",") if word.strip()]
        if not listed:
            raise ValueError(f"words: got none, expected some of {', '.join([*GIVEN, *PROBLEMS])}")
        found = tuple(dict.fromkeys(_meant(word) for word in listed))
        for word in found:
            if word in GIVEN and GIVEN[word].without in found:
                raise ValueError(
                    f"words: got both {GIVEN[word].without!r} and {word!r}, expected one of them"
                )
        return cls(tuple(w for w in found if w in GIVEN), tuple(w for w in found if w in PROBLEMS))

    @property
    def kinds(self) -> tuple[type, ...]:
        """The kinds of feedback that are there; all if none is named."""
        return tuple(KIND_OF[word][0] for word in self.given if word in KIND_OF) or KINDS

    @property
    def aims(self) -> tuple[str, ...]:
        """What a loss should answer: what hurts, else what is special about the data."""
        hurts = (*self.problems, *(word for word in self.given if word == "scores"))
        return hurts or tuple(word for word in self.given if word in MADE_FOR)

    def admits(self, spec: LossSpec) -> bool:
        """Whether the data are enough for a loss."""
        return not self.lacking(spec)

    def lacking(self, spec: LossSpec) -> list[str]:
        """What a loss needs and is not there."""
        kind = [] if spec.feedback in self.kinds else [WORDS[spec.feedback]]
        return kind + self.missing(spec)

    def missing(self, spec: LossSpec) -> list[str]:
        """What a loss, or a modifier's form of DPO, needs beside its kind of feedback and is not there."""
        has_scores = "scores" in self.given or not any(word in KIND_OF for word in self.given)
        counts = [need for need in spec.needs if need.startswith(("tokens", "per_token"))]
        return [
            *(["scores"] if "scores" in spec.needs and not has_scores else []),
            *(["a reference"] if spec.needs_reference and "no-reference" in self.given else []),
            *(["token counts"] if counts and "no-tokens" in self.given else []),
        ]

    @property
    def start(self) -> str:
        """The loss to start with: of the data that is there, else of those that the problems are about."""
        claimed = {spec.feedback for spec in specs.values() if set(self.problems) & spec.helps.keys()}
        kinds = [word for word in self.given if word in KIND_OF]
        kinds = kinds or [word for word, (kind, _) in KIND_OF.items() if kind in claimed]
        return KIND_OF[min(kinds, key=[*KIND_OF].index) if kinds else "pairs"][1]


def _meant(word: str) -> str:
    """The word that a user's word stands for."""
    words: dict[str, Given | Problem] = {**GIVEN, **PROBLEMS}
    also = {other: name for name, entry in words.items() for other in entry.also}
    meant = {squeezed(one): name for one, name in ({name: name for name in words} | also).items()}
    if squeezed(word) not in meant:
        raise ValueError(f"words: {unknown(word, words, also)}")
    return meant[squeezed(word)]
