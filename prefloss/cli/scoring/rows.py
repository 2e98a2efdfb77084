"""The rows of a file to score, of every kind: what they hold, checked one by one, and in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefloss.data import DataError
from prefloss.data.errors import shown
from prefloss.data.files import rows_of
from prefloss.data.row_file import Share
from prefloss.data.rows import clean, is_blank, kind_of
from prefloss.data.tokens import Text
from prefloss.feedback import SIDES, Labels, Pairs, Rankings

# Columns that RewardBench's data sets and outputs have, and `messages`, which stands for a whole conversation.
_ALSO = frozenset(("id", "subset", "num_correct", "messages", "text_chosen", "text_rejected"))


@dataclass(frozen=True)
class Kind:
    """What all rows of a file are.

    Attributes:
        feedback: `Pairs`, `Labels` or `Rankings`.
        judged: Whether people's judgement is there: a label, or the scores of a ranking.
        conversational: Whether texts are messages.
    """

    feedback: type
    judged: bool
    conversational: bool

    @property
    def words(self) -> str:
        """What messages call such rows."""
        names = {Pairs: "pairs", Labels: "votes", Rankings: "rankings"}
        unjudged = {Labels: "completions without a label", Rankings: "rankings without scores"}
        name = names[self.feedback] if self.judged else unjudged[self.feedback]
        return f"{name}, {'messages' if self.conversational else 'plain text'}"

    def sides(self, count: int) -> tuple[str, ...]:
        """Names of a row's completions."""
        return tuple(map(str, range(count))) if self.feedback is Rankings else SIDES[self.feedback]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: In the file, from 0.
        place: Where it is, for messages.
        kind: What it is.
        prompt: Text or messages.
        completions: Of a pair chosen and rejected, of a ranking all, else one.
        scores: What people said about each of them, higher is better; None if they said nothing.
        other: Its other columns.
    """

    number: int
    place: str
    kind: Kind
    prompt: Text
    completions: list[Text]
    scores: list[float] | None
    other: Mapping[str, Any]

    @property
    def subset(self) -> str | None:
        """The part of a benchmark that it belongs to."""
        name = self.other.get("subset")
        return name if isinstance(name, str) else None

    @property
    def empty(self) -> bool:
        """Whether a completion has no text, and so no token that says anything."""
        return any(map(is_blank, self.completions))

    @classmethod
    def of(cls, number: int, place: str, columns: dict[str, Any]) -> Row:
        """Check the columns of a row.

        Raises:
            DataError: If a column is missing or holds something else than it should.
        """
        row, judged = _filled(_renamed(place, columns))
        feedback = kind_of(place, row)
        cleaned = clean(place, row, feedback)
        values = cleaned.row
        completions = values["completions"] if feedback is Rankings else [values[n] for n in SIDES[feedback]]
        if not completions:
            raise DataError(f"{place}: column 'completions': got an empty list, expected at least one")
        scores = {Pairs: [1.0, 0.0], Labels: [float(values.get("label", 0))]}.get(
            feedback, values.get("scores")
        )
        return cls(
            number,
            place,
            Kind(feedback, judged, cleaned.conversational),
            values["prompt"],
            completions,
            scores if judged else None,
            {name: columns[name] for name in columns if name not in {*values, "messages"}},
        )

    def as_chat(self) -> Row:
        """Plain text as messages: the prompt as the user's, each completion as the assistant's."""
        if self.kind.conversational:
            return self
        prompt: Text = [{"role": "user", "content": str(self.prompt)}]
        completions: list[Text] = [[{"role": "assistant", "content": str(text)}] for text in self.completions]
        kind = Kind(self.kind.feedback, self.kind.judged, conversational=True)
        return replace(self, kind=kind, prompt=prompt, completions=completions)


def _renamed(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns that the names of RewardBench and of chat data stand for."""
    if row.get("prompt_ids") is not None:
        raise DataError(f"{place}: got token ids, expected text or messages")
    if row.get("messages") is not None and row.get("completion") is None:
        return {"completion": _conversation(place, row["messages"]), "label": row.get("label")}
    if _is_texts(row.get("chosen")) and _is_texts(row.get("rejected")):
        return {**row, **_best_of(place, row), "chosen": None, "rejected": None}
    texts, prompt = (row.get("text_chosen"), row.get("text_rejected")), row.get("prompt")
    if isinstance(prompt, str) and all(isinstance(text, str) and text.startswith(prompt) for text in texts):
        sides = zip(("chosen", "rejected"), texts, strict=True)
        return row | {side: str(text)[len(prompt) :] for side, text in sides}
    return row


def _conversation(place: str, messages: Any) -> list[Any]:
    """Messages whose last answer is to be scored."""
    roles = (
        [m.get("role") if isinstance(m, dict) else None for m in messages]
        if isinstance(messages, list)
        else []
    )
    if len(roles) < 2 or roles[0] == "assistant" or roles[-1] != "assistant":
        raise DataError(
            f"{place}: column 'messages': got {shown(messages)}, expected messages of which the last is the assistant's"
        )
    return messages


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _best_of(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of RewardBench 2: all right completions, then all wrong ones."""
    chosen, rejected = row["chosen"], row["rejected"]
    right = row.get("num_correct")
    if right is not None and right != len(chosen):
        raise DataError(
            f"{place}: column 'num_correct': got {shown(right)}, expected {len(chosen)}, as 'chosen' has"
        )
    return {"completions": [*chosen, *rejected], "scores": [1.0] * len(chosen) + [0.0] * len(rejected)}


def _filled(row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row with a judgement, and whether that is people's."""
    if row.get("completions") is not None and row.get("scores") is None:
        count = len(row["completions"]) if isinstance(row["completions"], list) else 0
        return {**row, "scores": [0.0] * count}, False
    if row.get("completion") is not None and row.get("label") is None:
        return {**row, "label": False}, False
    return row, True


@dataclass(frozen=True)
class Rows:
    """The rows of a file, checked; those with an empty completion are left out.

    Attributes:
        path: File or folder.
        kind: What its rows are, as they are scored.
        count: Number of all rows.
        chat: Whether plain text is scored as messages.
        notes: What was left out, one sentence.
    """

    path: Path
    kind: Kind
    count: int
    chat: bool
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return self._checked(enumerate(rows_of(self.path, also=_ALSO)))

    def chunks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """Chunks of so many rows of the file, by number; those that are not wanted are passed over."""
        rows = enumerate(rows_of(self.path, also=_ALSO))
        for number in range(-(-self.count // size)):
            chunk = list(itertools.islice(rows, size))
            if wanted(number):
                yield number, list(self._checked(chunk))

    def _checked(self, rows: Iterable[tuple[int, tuple[str, dict[str, Any]]]]) -> Iterator[Row]:
        for number, (place, columns) in rows:
            row = Row.of(number, place, columns)
            if not row.empty:
                yield row.as_chat() if self.chat else row


def check_rows(path: Path, share: Share, *, chat: bool = False) -> Rows:
    """Check every row of a file, before anything is scored.

    Args:
        path: File or folder, as `prefloss.data.read` takes.
        share: Of several processes that check it together.
        chat: Score plain text as messages.

    Raises:
        DataError: If there is no row to score, one is malformed, or not of the first one's kind.
    """

    def check() -> tuple[Kind, int, int, str]:
        first = next(rows_of(path, also=_ALSO), None)
        if first is None:
            raise DataError(f"{path}: no rows")
        kind, count, empty, where = Row.of(0, *first).kind, 0, 0, ""
        for place, columns in rows_of(path, share.rank, share.size, also=_ALSO):
            row = Row.of(0, place, columns)
            if row.kind != kind:
                raise DataError(f"{place}: got {row.kind.words}, expected {kind.words}, as in the first row")
            count += 1
            if row.empty:
                empty, where = empty + 1, where or place
        return kind, count, empty, where

    outcomes = share.together(check)
    kind = outcomes[0][0]
    count, empty = sum(found[1] for found in outcomes), sum(found[2] for found in outcomes)
    where = next((found[3] for found in outcomes if found[3]), "")
    if empty == count:
        raise DataError(f"{path}: no row is left to score: each of {count} has an empty completion")
    notes = (f"{empty:,} rows left out, for they have an empty completion (the first is {where})",)
    kind = Kind(kind.feedback, kind.judged, kind.conversational or chat)
    return Rows(path, kind, count, chat, notes if empty else ())
