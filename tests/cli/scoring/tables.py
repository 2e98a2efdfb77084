"""Parts as `score_chunk` makes them, from rewards alone."""

import pyarrow as pa

from prefloss.cli.scoring.parts import SCHEMA

SIDES = {1: ("completion",), 2: ("chosen", "rejected")}


def part(rewards, tokens=None, given=None, first=0, sides=None, **columns):
    """A part of rows, each a list of rewards."""
    tokens = tokens or [[5] * len(row) for row in rewards]
    given = given or [[None] * len(row) for row in rewards]
    found = []
    for number, row in enumerate(zip(rewards, tokens, given, strict=True), start=first):
        names = sides or SIDES.get(len(row[0])) or tuple(map(str, range(len(row[0]))))
        for side, reward, count, score in zip(names, *row, strict=True):
            values = {name: column[number - first] for name, column in columns.items()}
            found.append(
                {
                    "row": number,
                    "side": side,
                    "reward": reward,
                    "logp": -1.0,
                    "tokens": count,
                    "truncated": False,
                }
                | {"given": score, **values}
            )
    return pa.Table.from_pylist(found, schema=SCHEMA)
