"""TRL's command line with every registered loss: `python -m prefloss.integrations.trl dpo --loss_type my_loss`.

Runs TRL's own training script in this process, so it works under `accelerate launch -m` too. `--import MODULE` before
the command imports a module that registers losses; `--kernel prefloss` scores completions with prefloss's fused path.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys

from prefloss.integrations.trl.enable import enable
from prefloss.integrations.trl.kernel import KERNELS

COMMANDS = ("dpo", "kto")


def main(argv: list[str] | None = None) -> None:
    """Parse our own arguments; pass the rest to TRL."""
    parser = argparse.ArgumentParser(
        prog="python -m prefloss.integrations.trl", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE")
    parser.add_argument("--kernel", choices=KERNELS, default="trl")
    parser.add_argument("command", choices=COMMANDS, help="TRL's training command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="TRL's own arguments; --help lists them")
    parsed = parser.parse_args(argv)
    # As `python script.py` does, so that modules in the working directory can be imported.
    sys.path.insert(0, os.getcwd())
    for module in parsed.modules:
        importlib.import_module(module)
    enable(kernel=parsed.kernel)
    script = importlib.import_module(f"trl.scripts.{parsed.command}")
    named = {"prog": f"{parser.prog} {parsed.command}"}
    # TRL 0.28 and older call it by the name of this file.
    takes = inspect.signature(script.make_parser).parameters
    trl_parser = script.make_parser(**(named if "prog" in takes else {}))
    script.main(*trl_parser.parse_args_and_config(parsed.arguments))


if __name__ == "__main__":
    main()
