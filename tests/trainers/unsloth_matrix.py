"""Proof for one release of Unsloth: `python -m tests.trainers.unsloth_matrix` in its environment.

Unsloth writes TRL's trainers anew from their source and puts its own in their place. Without a GPU it does that with
`UNSLOTH_ALLOW_CPU`; its own models need a GPU, so a plain one is trained with its trainers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version

from tests.trainers.proof import Proof

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp()}
# What imports come in which order, and a word of the error; none if it trains.
ORDERS = {
    "unsloth, trl, prefloss": ("import unsloth, trl\nfrom prefloss.integrations.trl import *", ""),
    "trl, unsloth, prefloss": ("import trl, unsloth\nfrom prefloss.integrations.trl import *", ""),
    "prefloss, unsloth": (
        "from prefloss.integrations.trl import *\nimport unsloth",
        "import unsloth before prefloss.integrations.trl",
    ),
}
_TRAIN = """
from tests.trainers import trl_matrix
from prefloss.integrations.trl import PreferenceLossCallback
kind = {kind!r}
assert trl_matrix.classes(kind)[0].__name__.startswith("Unsloth"), trl_matrix.classes(kind)
passed, detail = trl_matrix.hand(kind, trl_matrix.HAND[kind][0])
assert passed, detail
print(detail)
"""


def in_order(kind: str, imports: str, word: str) -> str:
    """A training in a process of its own, which imports as said."""
    done = subprocess.run(
        [sys.executable, "-c", imports + _TRAIN.format(kind=kind)],
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if word:
        assert done.returncode, "it trained"
        assert word in last, last
        return last
    assert done.returncode == 0, last
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Run every check of this release."""
    import unsloth  # noqa: F401

    from tests.trainers import trl_matrix

    results = Proof("Unsloth", version("unsloth"))

    def check(kind: str, name: str, run: Callable[..., tuple[bool, str]], *arguments: object) -> None:
        def told() -> str:
            passed, detail = run(kind, *arguments)
            assert passed, detail
            return detail

        results.check(trl_matrix.classes(kind)[0].__name__, name, told)

    before = {kind: trl_matrix.train(kind) for kind in ("dpo", "kto")}
    assert "prefloss" not in sys.modules, "prefloss was imported before the first run"
    for kind, names in (("dpo", ("sigmoid", "hinge", "ipo", "apo_zero")), ("kto", ("kto",))):
        for name in names:
            check(kind, f"own {name}", trl_matrix.own, name)
        for loss in trl_matrix.HAND[kind]:
            check(kind, f"by hand {loss}", trl_matrix.hand, loss)
        check(kind, "untouched", trl_matrix.untouched, before[kind])
        for order, (imports, word) in ORDERS.items():
            results.check(kind, f"order {order}", in_order, kind, imports, word)
    results.end()


if __name__ == "__main__":
    main()
