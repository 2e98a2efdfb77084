"""What the registry adds to docstrings: the Args and Returns that every loss shares."""

import inspect

import pytest
import torch

import prefloss
from prefloss import Labels, Pairs, registry


def undocumented(labels: Labels, *, beta: float = 0.1, nll_weight: float = 1.0, own: int = 3) -> torch.Tensor:
    r"""Squared distance of each log-ratio from 0.

    .. math::
        \ell = h^2

    Args:
        own: A number of its own.

    Note:
        Only here.
    """
    return labels.completions.h**2


def test_a_spec_describes_what_every_loss_shares():
    spec = registry.spec_from(undocumented)
    assert [parameter.description for parameter in spec.parameters.values()] == [
        "Strength of the pull towards the reference.",
        "Weight α of the negative log-likelihood per token.",
        "A number of its own.",
    ]
    assert spec.returns == "Loss of each completion, [n], nats; not reduced."


def test_help_shows_it_too():
    before = undocumented.__doc__
    with registry.registered(registry.spec_from(undocumented)):
        assert undocumented.__doc__ == before
    try:
        assert prefloss.register(undocumented) is undocumented
        args, rest = inspect.getdoc(undocumented).split("Args:\n")[1].split("\n\nReturns:\n")
        assert [line.split(":")[0].strip() for line in args.splitlines()] == [
            "labels",
            "beta",
            "nll_weight",
            "own",
        ]
        assert rest == "    Loss of each completion, [n], nats; not reduced.\n\nNote:\n    Only here."
    finally:
        registry.unregister("undocumented")


def test_a_strength_is_described_only_against_a_reference():
    def undocumented(labels: Labels, *, beta: float = 0.1) -> torch.Tensor:
        return labels.completions.policy

    spec = registry.spec_from(undocumented, "free", needs_reference=False)
    assert spec.parameters["beta"].description == ""


def test_a_docstring_without_a_formula_stays():
    def short(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
        """One line."""
        return pairs.margin()

    prefloss.register(short)
    registry.unregister("short")
    assert short.__doc__ == "One line."


@pytest.mark.parametrize("name", prefloss.specs)
def test_every_loss_documents_its_parameters_and_values(name):
    text = inspect.getdoc(prefloss.specs[name].function)
    assert text.count("\nArgs:\n") == text.count("\nReturns:\n") == text.count("\nExample:\n") == 1
    for parameter in prefloss.specs[name].parameters.values():
        assert f"\n    {parameter.name}: " in text
        assert parameter.description
