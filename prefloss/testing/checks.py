"""Every property that a loss can be checked for, and which of them apply to a given loss.

Each check takes a loss, its spec, its name or its function, returns nothing if the loss has the property, and raises
`CheckFailed` with the values, the draw and what to change if it has not; `Skip` if the property does not apply.
"""

from __future__ import annotations

import functools

from prefloss.testing._compiled import check_torch_compile as check_torch_compile
from prefloss.testing._compiled import check_torch_func as check_torch_func
from prefloss.testing._declared import check_documentation as check_documentation
from prefloss.testing._declared import check_pickle as check_pickle
from prefloss.testing._declared import check_repr as check_repr
from prefloss.testing._declared import check_state as check_state
from prefloss.testing._direction import check_difference_only as check_difference_only
from prefloss.testing._direction import check_monotone as check_monotone
from prefloss.testing._empty import check_empty_examples as check_empty_examples
from prefloss.testing._gradients import check_data_gradient as check_data_gradient
from prefloss.testing._gradients import check_extremes as check_extremes
from prefloss.testing._gradients import check_gradient_nonzero as check_gradient_nonzero
from prefloss.testing._gradients import check_gradients as check_gradients
from prefloss.testing._hyperparameters import check_hyperparameter_effect as check_hyperparameter_effect
from prefloss.testing._hyperparameters import check_hyperparameters as check_hyperparameters
from prefloss.testing._needs import check_needs as check_needs
from prefloss.testing._numbers import check_nan as check_nan
from prefloss.testing._numbers import check_padding as check_padding
from prefloss.testing._numbers import check_precision as check_precision
from prefloss.testing._numbers import check_ties as check_ties
from prefloss.testing._run import MAX_EXAMPLES, PROPERTIES, Check
from prefloss.testing._subject import Checkable, Skip, Subject, as_loss, registered
from prefloss.testing._traits import check_beta as check_beta
from prefloss.testing._traits import check_needs_reference as check_needs_reference
from prefloss.testing._traits import check_preference as check_preference
from prefloss.testing._traits import check_separability as check_separability
from prefloss.testing._values import check_batch_permutation as check_batch_permutation
from prefloss.testing._values import check_determinism as check_determinism
from prefloss.testing._values import check_no_mutation as check_no_mutation
from prefloss.testing._values import check_shape_and_dtype as check_shape_and_dtype
from prefloss.testing._values import check_single_example as check_single_example
from prefloss.testing._values import check_weights as check_weights

FIRST = "shape_and_dtype"
"""Runs before the others: a loss that fails to return values has no other property."""


def names() -> tuple[str, ...]:
    """The names of all checks, `shape_and_dtype` first."""
    return (FIRST, *sorted(name for name in PROPERTIES if name != FIRST))


def loss_checks(loss: Checkable, *, max_examples: int = MAX_EXAMPLES) -> list[tuple[str, Check | Skip]]:
    """Every check by name: the check, or why it does not apply to this loss.

    Args:
        loss: A loss, its spec, its name or its function.
        max_examples: Draws that each check makes.

    Example:
        >>> dict(loss_checks("simpo" if "simpo" in prefloss.specs else "kto"))["state"] is not None
        True
    """
    bound = as_loss(loss)
    with registered(bound.spec):
        subject = Subject(bound)
        return [(name, _check_or_skip(name, subject, max_examples)) for name in names()]


def _check_or_skip(name: str, subject: Subject, max_examples: int) -> Check | Skip:
    reason = PROPERTIES[name].skipped(subject)
    if reason:
        return Skip(reason)
    bound = functools.partial(PROPERTIES[name].check, max_examples=max_examples)
    return functools.update_wrapper(bound, PROPERTIES[name].check)  # type: ignore[return-value]
