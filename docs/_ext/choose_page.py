"""docs/choose.md: which loss for which data and which problem, from `prefloss.losses.suggest`."""

from __future__ import annotations

import prefloss
from prefloss.losses import Suggestion, measured, suggest
from prefloss.registry import GIVEN, PROBLEMS

# Title -> what one has. Each is crossed with every problem.
DATA = {
    "Pairs": "pairs",
    "Pairs, and no memory for a reference": "pairs,no-reference",
    "Pairs with scores": "pairs,scores",
    "Pairs, with log-probs of whole completions alone": "pairs,no-tokens",
    "Votes": "votes",
    "Votes with scores": "votes,scores",
    "Rankings": "rankings",
}
INTRODUCTION = """# Which loss?

**Start with DPO (for votes with KTO, for rankings with `dpo_pl`); change only if something hurts.** More pairs,
supervised training first and another beta change more than the name of the loss:
[DPO or the others?](evidence/dpo-or-the-others.md)

Losses stand in the order of the evidence for them: claimed by a paper and measured to help, measured, claimed,
no difference measured. Where a measurement of ours contradicts a paper, the page says so. We measured in worlds small
enough to know the truth; they need not speak for your model.

The same for any combination, on the command line and in Python:

```bash
prefloss losses --for pairs,noisy,length
```

```python
from prefloss.losses import suggest

[one.loss for one in suggest("pairs", "length")][0]  # -> 'r_dpo(beta=0.1, alpha=0.01)'
```"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, given in DATA.items():
        parts += [f"## {title}\n\n`{given}`. {suggest(given).start}", table(given)]
    words = [f"| `{word}` | {entry.meaning} | {', '.join(entry.also)} |" for word, entry in GIVEN.items()]
    head = ["| Word | What you have, or lack | The same |", "| --- | --- | --- |"]
    parts += ["## Words for what you have", "\n".join([*head, *words])]
    parts += ["## What hurts, and what is known", *map(problem, PROBLEMS)]
    return "\n\n".join(parts) + "\n"


def table(given: str) -> str:
    """At most three losses for these data and each problem, and the problems that no loss of these data answers."""
    found = {name: suggest(given, name) for name in PROBLEMS}
    rows = [(f"[{name}](#{name}): {PROBLEMS[name].meaning}", one) for name, one in found.items() if one]
    if plain := suggest(given):
        rows.insert(0, ("nothing in particular", plain))
    lines = ["| What hurts | At most three losses, best first |", "| --- | --- |"]
    lines += [f"| {meaning} | {'<br>'.join(map(sentence, suggestions))} |" for meaning, suggestions in rows]
    missing = ", ".join(f"[{name}](#{name})" for name, one in found.items() if not one)
    return "\n".join([*lines, *(["", f"No loss of these data is made for {missing}."] if missing else [])])


def sentence(one: Suggestion) -> str:
    """A suggestion as a cell: the loss with its modifiers, why, and how well that is known."""
    modifiers = ", ".join(f"{name}={value!r}" for name, value in one.modifiers.items())
    return (
        f"[`{one.name}{f'({modifiers})' * bool(modifiers)}`](losses/{one.name}.md): {one.why} *{one.known}*"
    )


def problem(name: str) -> str:
    """One problem: what to try first, and what is known about every loss that it concerns."""
    entry = PROBLEMS[name]
    first = f" {entry.first} See [{entry.experiment}](evidence/{entry.experiment}.md)." if entry.first else ""
    lines = [f"### {name}", "", f"{entry.meaning[0].upper()}{entry.meaning[1:]}.{first}", ""]
    lines += ["| Loss | What its paper claims | Measured here |", "| --- | --- | --- |"]
    for loss, spec in sorted(prefloss.specs.items()):
        figures = [one for one in measured.tried() if (one.loss, one.problem) == (loss, name)]
        if name not in spec.helps and not figures:
            continue
        claim = spec.helps.get(name, "")
        claim += f" ({spec.paper})" * ("arXiv" not in claim and bool(claim))
        cell = "<br>".join(
            f"{one.shown} ([{one.experiment}](evidence/{one.experiment}.md))" for one in figures
        )
        lines.append(f"| [{loss}](losses/{loss}.md) | {claim} | {cell or 'no'} |")
    return "\n".join(lines)
