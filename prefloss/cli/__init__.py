"""The command line: `prefloss train`, `reference`, `score`, `losses`, `probe`, `reproduce`, `compare`.

Nothing outside this folder imports typer, rich or matplotlib.
"""

from __future__ import annotations

import sys

_EXTRA = {
    *(
        "click",
        "datasets",
        "jinja2",
        "matplotlib",
        "numpy",
        "pyarrow",
        "pylatexenc",
        "rich",
        "scipy",
        "transformers",
    ),
    *("trl", "typer"),
}


def main() -> None:
    """Run the command line; a missing package of the `cli` extra ends it with how to install it."""
    try:
        from prefloss.cli.app import app

        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(
            f"prefloss: this command needs {missing}, which is not installed: pip install 'prefloss[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
