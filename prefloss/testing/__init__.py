"""The public kit: does a loss keep what it promises? It needs hypothesis: pip install 'prefloss[test]'.

One call checks a loss of your own::

    from prefloss.testing import check_loss

    print(check_loss(my_loss))

and one decorator makes a pytest test of each check::

    @parametrize_loss_checks([my_loss])
    def test_my_loss_keeps_its_properties(loss, check):
        check(loss)
"""

from prefloss.testing import checks as checks
from prefloss.testing import strategies as strategies
from prefloss.testing.outcomes import CannotRun, CheckFailed, Hint, LossCheckError, Report, Skip
from prefloss.testing.run import check_loss, loss_checks, parametrize_loss_checks
from prefloss.testing.subject import as_loss

__all__ = [
    "CannotRun",
    "CheckFailed",
    "Hint",
    "LossCheckError",
    "Report",
    "Skip",
    "as_loss",
    "check_loss",
    "checks",
    "loss_checks",
    "parametrize_loss_checks",
    "strategies",
]
