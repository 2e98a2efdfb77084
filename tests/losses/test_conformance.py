"""The kit over every registered loss, reached through the registry, so there is no list to forget.

Then, with fewer checks, over the forms that a loss takes by its settings, over losses with modifiers, and sums.
"""

from typing import Literal, get_args, get_origin

import prefloss
from prefloss.hyperparameters import Coerce
from prefloss.registry import MODIFIERS
from prefloss.testing import parametrize_loss_checks

EXAMPLES = 6

KNOWN: dict[str, str] = {}

NUMBERS = (
    "shape_and_dtype",
    "single_example",
    "empty_examples",
    "extremes",
    "gradients",
    "torch_compile",
    "repr",
)
"""Checks that a form, a modifier or a sum could fail where the plain loss passes."""

SUMS = (
    "0.8*dpo(beta=0.1) + 0.2*hinge",
    "dpo + 0.5*kto_zero",
    "ipo(tau=0.5) + 1.0*nll",
    "0.8*dpo + 0.2*bco_pair",
)

MODIFIED = (
    "dpo(label_smoothing=0.1)",
    "hinge(divergence='js')",
    "dpo(divergence='alpha(0.5)')",
    "dpo(divergence='forward_kl')",
    "dpo(divergence='chi_squared')",
    "dpo(score_margin=0.5)",
    "ln_dpo(wpo=True)",
    "dpo(length_penalty=0.01)",
    "dpo(humanline=(-1.0, 1.5))",
    "kto(humanline=(-1.0, 1.5))",
    "ipo(ld_alpha=0.5)",
    "dpo(beta=linear(0.5, 0.1, steps=10))",
)


def forms():
    """Each loss with each other choice of the hyperparameters that choose between forms."""
    for name, spec in prefloss.specs.items():
        for parameter in spec.parameters.values():
            if isinstance(parameter.constraint, Coerce):
                continue
            choices = get_args(parameter.type) if get_origin(parameter.type) is Literal else ()
            if parameter.type is bool:
                choices = (True, False)
            for choice in choices:
                if choice != parameter.default:
                    yield prefloss.get(name, **{parameter.name: choice})


@parametrize_loss_checks(prefloss.specs.values(), expected_failures=KNOWN, max_examples=EXAMPLES, strict=True)
def test_registered_loss_keeps_its_properties(loss, check):
    check(loss)


@parametrize_loss_checks(forms(), only=NUMBERS, max_examples=EXAMPLES)
def test_form_of_a_loss_keeps_its_numbers(loss, check):
    check(loss)


@parametrize_loss_checks(MODIFIED, only=(*NUMBERS, "state", "weights"), max_examples=EXAMPLES)
def test_modified_loss_keeps_its_numbers(loss, check):
    check(loss)


@parametrize_loss_checks(SUMS, max_examples=EXAMPLES, strict=True)
def test_sum_of_losses_keeps_its_properties(loss, check):
    check(loss)


def test_every_modifier_is_checked():
    written = {
        modifier for modifier in MODIFIERS for loss in MODIFIED if modifier in prefloss.get(loss).params
    }
    assert written == set(MODIFIERS)
