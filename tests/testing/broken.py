"""The kit is tested by what it catches: losses that are wrong on purpose, each for one check."""

import pytest

from prefloss.testing import CheckFailed, as_loss, checks

LIKE_DPO = {"difference_only": True, "monotone": True}
"""Traits of a logistic loss of the margin."""


class Broken:
    """The broken losses for the checks of one module of the kit."""

    def __init__(self, module):
        self.module, self.cases = module, {}

    def __call__(self, check, *words, **traits):
        """A loss that this check must refuse with these words in its message."""

        def decorate(function):
            self.cases[function.__name__] = (function, traits, check, words)
            return function

        return decorate

    def assert_caught(self, name):
        function, traits, check, words = self.cases[name]
        loss = as_loss(function, **traits)
        with pytest.raises(CheckFailed) as caught:
            dict(checks.loss_checks(loss, max_examples=10))[check](loss)
        message = str(caught.value)
        assert message.startswith(f"{name}: {check}: ")
        for word in words:
            assert word in message

    def assert_every_check_catches_one(self):
        names = {name for name in dir(self.module) if name.startswith("check_")}
        assert {f"check_{check}" for _, _, check, _ in self.cases.values()} == names
