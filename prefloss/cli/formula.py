r"""LaTeX formulas as plain unicode: `\frac{1}{2\tau}` -> `1/(2τ)`."""

from __future__ import annotations

import re
from typing import Any

from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
from pylatexenc.latexwalker import get_default_latex_context_db as walker_context_db
from pylatexenc.macrospec import MacroSpec, MacroStandardArgsParser

_RAISED = dict(zip("0123456789+-()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", strict=True))
# Letters stay as _w and _l: unicode lowers some of them only, and a formula needs them all alike.
_LOWERED = dict(zip("0123456789+-()", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎", strict=True))
# Braces, with up to two levels of braces inside.
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"


def unicode_of(latex: str) -> str:
    r"""A formula on one line.

    Example:
        >>> unicode_of(r"\ell = \left(h_w - h_l - \frac{1}{2\tau}\right)^2")
        'ℓ = (h_w - h_l - 1/(2τ))²'
    """
    flat = " ".join(latex.split()).replace(r"\left", "").replace(r"\right", "").replace(r"\|", "‖")
    # TeX drops the space after a macro; here it separates words, and a function needs one.
    flat = re.sub(r"\\(log|exp|max|min|sup|inf)(?=[\\A-Za-z0-9])", r"\\\1 ", flat)
    # The logarithm of a fraction alone; of a mean, 1/n times a sum, only the author knows where it ends.
    flat = re.sub(rf"\\(log|exp) (\\t?frac{_GROUP}{_GROUP})(?=\s*(?:$|[-+,)\]|]))", r"\\\1(\2)", flat)
    flat = re.sub(r"(\\(?!bar|hat|tilde|overline)[A-Za-z]+) ", r"\1{} ", flat)
    flat = re.sub(rf"(\\t?frac{_GROUP}{_GROUP})(?=[\\A-Za-z])", r"\1 ", flat)
    text = _CONVERTER.latex_to_text(_marked_scripts(flat))
    text = re.sub(r"(?<=\d) (?=[α-ωϕϵ])", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _marked_scripts(latex: str) -> str:
    r"""`x_{ij}` -> `\lowered{ij}`: pylatexenc prints scripts as they stand."""
    return re.sub(rf"([_^])\s*({_GROUP}|\\[A-Za-z]+(?:{_GROUP})?|[^\s\\{{])", _script, latex)


def _script(match: re.Match[str]) -> str:
    inner = match[2][1:-1] if match[2].startswith("{") else match[2]
    return rf"\{'raised' if match[1] == '^' else 'lowered'}{{{_marked_scripts(inner)}}}"


def _fraction(node: Any, l2tobj: LatexNodes2Text) -> str:
    top, bottom = (l2tobj.nodelist_to_text([arg]).strip() for arg in node.nodeargs[-2:])
    return f"{_grouped(top)}/{_grouped(bottom)}"


def _grouped(text: str) -> str:
    """Parentheses where a fraction would be misread without them."""
    single = re.fullmatch(r"[\w.|]+|\w+\([^()]*\)", text) and not re.fullmatch(r"\d+\D+", text)
    return text if single else f"({text})"


def _scripted(table: dict[str, str], sign: str) -> Any:
    def text(node: Any, l2tobj: LatexNodes2Text) -> str:
        inner = l2tobj.nodelist_to_text([node.nodeargs[-1]]).strip()
        if all(character in table for character in inner):
            return "".join(table[character] for character in inner)
        bare = inner.isalnum() or len(inner) == 1 or re.fullmatch(r"\([^()]*\)", inner)
        return f"{sign}{inner}" if bare else f"{sign}({inner})"

    return text


def _converter() -> LatexNodes2Text:
    to_text = get_default_latex_context_db()
    to_text.add_context_category(
        "prefloss",
        prepend=True,
        macros=[
            MacroTextSpec("frac", _fraction),
            MacroTextSpec("tfrac", _fraction),
            MacroTextSpec("raised", _scripted(_RAISED, "^")),
            MacroTextSpec("lowered", _scripted(_LOWERED, "_")),
            MacroTextSpec("mathrm", "%s"),
        ],
    )
    walker = walker_context_db()
    walker.add_context_category(
        "prefloss",
        prepend=True,
        macros=[
            MacroSpec("raised", MacroStandardArgsParser("{")),
            MacroSpec("lowered", MacroStandardArgsParser("{")),
            MacroSpec("tfrac", MacroStandardArgsParser("{{")),
        ],
    )

    class Converter(LatexNodes2Text):
        def latex_to_text(self, latex: str, **parse_flags: Any) -> str:
            return super().latex_to_text(latex, latex_context=walker, **parse_flags)

    return Converter(latex_context=to_text, math_mode="text", strict_latex_spaces=False)


_CONVERTER = _converter()
