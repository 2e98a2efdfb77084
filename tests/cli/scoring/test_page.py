"""The page: every token in its colour, hostile text harmless, and no more than it says."""

import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from prefloss.cli.scoring import page
from prefloss.cli.scoring.rows import Kind, Row
from prefloss.demo.model import train_tokenizer
from prefloss.feedback import Pairs, Rankings
from tests.cli.scoring.tables import part

FACTS = {"title": "<b>title</b>", "lines": ["a & b"], "unit": "nats"}
HOSTILE = "</p><script>alert(1)</script> \" onclick='x' \x00\x1b[31m \u202e{{ 7 * 7 }} 🎉é日本"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to split into tokens"] * 4, vocab_size=280)


class Rows(list):
    def __init__(self, rows, count=None):
        super().__init__(rows)
        self.kind, self.count = rows[0].kind, count or len(rows)


def row(number, prompt, completions, feedback=Pairs, scores=(1.0, 0.0)):
    kind = Kind(feedback, True, isinstance(prompt, list))
    return Row(number, f"line {number}", kind, prompt, list(completions), list(scores), {})


def written(tmp_path, tokenizer, rows, rewards, **options):
    """The page of these rows, whose tokens have the reward that belongs to their completion."""
    ids = [tokenizer(text=text)["input_ids"] for each in rows for text in each.completions]
    table = part(rewards, sides=options.get("sides"))
    flat = [value for row in rewards for value in row]
    values = [[value] * len(each) for each, value in zip(ids, flat, strict=True)]
    for at, column in ((7, ids), (8, values)):
        field = table.schema.field(at)
        table = table.set_column(at, field, pa.array(column, field.type))
    path = Path(tmp_path, "page.html")
    page.write_page(path, Rows(rows, options.get("count")), table, tokenizer, FACTS)
    return path.read_text(encoding="utf-8")


def shown_text(text):
    """What a browser shows of the completions."""
    import html

    bodies = re.findall(r'<p class="text">(.*?)</p>', text, re.S)
    return [html.unescape(re.sub(r"<[^>]*>", "", body)) for body in bodies]


def test_hostile_text_is_text(tmp_path, tokenizer):
    text = written(tmp_path, tokenizer, [row(0, HOSTILE, [HOSTILE, "some words"])], [[2.0, -1.0]])
    assert text.count("<script>") == 1
    assert "<b>title" not in text
    assert "\x00" not in text
    assert "\x1b" not in text
    prompt, chosen, rejected = shown_text(text)
    wanted = HOSTILE.replace("\x00", "�").replace("\x1b", "�")
    assert (prompt.strip(), chosen, rejected) == (wanted, wanted, "some words")
    # Nothing is loaded from anywhere.
    assert not re.search(r"(src|href|url)\s*[=(]", text)
    assert "default-src 'none'" in text


def test_tokens_have_the_colour_of_their_reward(tmp_path, tokenizer):
    text = written(
        tmp_path,
        tokenizer,
        [row(0, "p", ["some", "words"]), row(1, "p", ["to", "into"])],
        [[4.0, -4.0], [0.0, 0.0]],
    )
    chosen, rejected, first, second = re.findall(r'<p class="text">(<i.*?)</p>', text, re.S)
    assert set(re.findall(r'class="(\w+)"', chosen)) == {"p10"}
    assert set(re.findall(r'class="(\w+)"', rejected)) == {"n10"}
    assert "class" not in first + second
    assert 'data-row="0" data-value="8.0"' in text
    assert "Row 0: margin +8.000" in text
    assert "All 2 rows." in text


def test_the_page_is_bounded_and_says_so(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(page, "MOST_ROWS", 3)
    monkeypatch.setattr(page, "MOST_TOKENS", 1)
    monkeypatch.setattr(page, "MOST_PROMPT", 10)
    monkeypatch.setattr(page, "MOST_SIDES", 2)
    rows = [row(i, "prompt " * 9, ["some words to split"] * 3, Rankings, [2.0, 1.0, 0.0]) for i in range(5)]
    text = written(tmp_path, tokenizer, rows, [[3.0, 2.0, 1.0]] * 5, count=1000, sides=("0", "1", "2"))
    assert text.count("<article") == 3
    assert "The first 3 of 1,000 rows." in text
    assert "1 more completions not shown." in text
    assert re.search(r"\[\d+ more tokens not shown\]", text)
    assert "characters left out" in text
    monkeypatch.setattr(page, "MOST_IN_ALL", 2)
    text = written(tmp_path, tokenizer, rows, [[3.0, 2.0, 1.0]] * 5, count=1000, sides=("0", "1", "2"))
    assert text.count("<article") == 1


def test_pieces_spell_whole_characters_and_keep_their_reward():
    # Two tokens spell one character; a lone half stays a half.
    decoder = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    ids = [*"aé🎉".encode(), 0xC3]
    found = list(page.pieces_of(decoder, ids, [1.0] * len(ids), 1.0))
    assert [(piece.text, piece.reward) for piece in found] == [
        ("a", 1.0),
        ("é", 2.0),
        ("🎉", 4.0),
        ("�", 1.0),
    ]
