"""The public kit: does a loss keep what it promises? Its checks need hypothesis: pip install 'prefloss[test]'.

One call checks a loss of your own::

    from prefloss.testing import check_loss

    print(check_loss(my_loss))

and one decorator makes a pytest test of each check::

    @parametrize_loss_checks([my_loss])
    def test_my_loss_keeps_its_properties(loss, check):
        check(loss)

`identify(function)` says which registered loss a function computes, for instance that of another package's trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prefloss.testing.identify import Identity, compare, identify
from prefloss.testing.outcomes import CannotRun, CheckFailed, Hint, LossCheckError, Report, Skip
from prefloss.testing.subject import as_loss

if TYPE_CHECKING:
    from prefloss.testing import checks as checks
    from prefloss.testing import strategies as strategies
    from prefloss.testing.run import check_loss, loss_checks, parametrize_loss_checks

__all__ = [
    "CannotRun",
    "CheckFailed",
    "Hint",
    "Identity",
    "LossCheckError",
    "Report",
    "Skip",
    "as_loss",
    "check_loss",
    "checks",
    "compare",
    "identify",
    "loss_checks",
    "parametrize_loss_checks",
    "strategies",
]

# What needs hypothesis is imported where it is used: a trainer's environment may have none, and `identify` needs none.
_RUN = ("check_loss", "loss_checks", "parametrize_loss_checks")


def __getattr__(name: str) -> Any:
    if name in ("checks", "strategies"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _RUN:
        # The checks enter the table that `run` reads when they are imported.
        importlib.import_module(f"{__name__}.checks")
        return getattr(importlib.import_module(f"{__name__}.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
