"""Tables over all losses: names in other trainers, and what can be combined."""

from __future__ import annotations

import prefloss
from prefloss.registry import MODIFIERS, capabilities


def pages() -> dict[str, str]:
    """The pages of this module by file name."""
    return {"capabilities.md": _capabilities(), "names.md": _names()}


def _names() -> str:
    rows = []
    for spec in prefloss.specs.values():
        for alias, entry in spec.aliases.items():
            preset = ", ".join(f"{key}={value!r}" for key, value in entry.parameters.items())
            rows.append(
                f"| `{alias}` | {entry.peers} | [{spec.name}]({spec.name}.md) | {f'`{preset}`' if preset else ''} |"
            )
    table = "\n".join(["| name | used by | loss | sets |", "| --- | --- | --- | --- |", *sorted(rows)])
    return (
        "# Names in other trainers\n\nAliases: `prefloss.get` takes these names too. A name with a colon is a "
        "trainer's own form of a loss. Options of trainers stand in "
        f"[From other trainers](../integrations/migration.md).\n\n{table}\n"
    )


def _capabilities() -> str:
    columns = ["feedback", "reference", "needs", *MODIFIERS, "fused", "state"]
    rows = []
    for name in sorted(prefloss.specs):
        row = capabilities(prefloss.specs[name])
        cells = [
            row[column].split(":")[0] if column not in ("feedback", "needs") else row[column]
            for column in columns
        ]
        rows.append(f"| [{name}]({name}.md) | " + " | ".join(cells) + " |")
    head = "| loss | " + " | ".join(columns) + " |"
    modifiers = "\n".join(f"- `{name}`: {item.parameter.description}" for name, item in MODIFIERS.items())
    return (
        "# Capabilities\n\nWhere a cell says no, `prefloss.get` refuses and says why; the reason stands on the loss's "
        f"own page.\n\nThe modifiers, given as further hyperparameters:\n\n{modifiers}\n\n"
        + "\n".join([head, "| --- " * (len(columns) + 1) + "|", *rows])
        + "\n"
    )
