"""Proof for one release of Unsloth: `python -m tests.trainers.unsloth_matrix` in its environment.

Unsloth writes TRL's trainers anew from their source and puts its own in their place when it finds a GPU. The proof
calls the functions that do so, which need none. On a CPU, Unsloth computes the head of TRL's models itself; that is
taken too. The model is a plain tiny one: Unsloth's own need a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

from tests.trainers.proof import Proof

os.environ |= {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp(),
    "UNSLOTH_DATASET_NUM_PROC": "1",
}
# Of TRL's checks, those that run here: Unsloth writes all of a trainer's losses anew from one source.
CHECKS = ("untouched", "own sigmoid", "own hinge", "own ipo", "own apo_zero", "own kto")
REPLACE = """
import unsloth
from unsloth.models.rl import patch_trl_rl_trainers
from unsloth_zoo.cpu.ops import patch_trl_fused_lm_head
patch_trl_rl_trainers()
patch_trl_fused_lm_head()
"""
# What imports come in which order, and a word of the error; none if it trains.
ORDERS = {
    "trl, unsloth, prefloss": ("import trl" + REPLACE + "from prefloss.integrations.trl import *", ""),
    "prefloss, unsloth": (
        "from prefloss.integrations.trl import *" + REPLACE,
        "import unsloth before prefloss.integrations.trl",
    ),
}
_TRAIN = """
from tests.trainers import trl_matrix
from prefloss.integrations.trl import PreferenceLossCallback
kind = {kind!r}
assert trl_matrix.classes(kind)[0].__name__.startswith("Unsloth"), trl_matrix.classes(kind)
print(trl_matrix.by_hand(kind, trl_matrix.HAND[kind][0]))
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
    exec(REPLACE, {})
    from tests.trainers import trl_matrix

    with Proof("unsloth", version("unsloth")) as results:
        before = {kind: trl_matrix.train(kind) for kind in ("dpo", "kto")}
        assert "prefloss" not in sys.modules, "prefloss was imported before the first run"
        for kind, run in before.items():
            for trainer, name, check in trl_matrix.checks(kind, run):
                if name in CHECKS or name.startswith(("by hand", "enable")):
                    results.check(trainer, name, check)
            for order, (imports, word) in ORDERS.items():
                results.check(
                    trl_matrix.classes(kind)[0].__name__, f"order {order}", in_order, kind, imports, word
                )


if __name__ == "__main__":
    main()
