"""Attributes and methods of trainers, replaced for a while or once."""

from types import SimpleNamespace

import pytest

from prefloss.integrations.binding import attached, evaluation_prefix, replaced, wrap_method


def test_attributes_come_back_after_an_error():
    owner = SimpleNamespace(beta=0.1, kind="own")

    def fails():
        with replaced(owner, {"beta": 0.5, "kind": "ours"}):
            raise KeyError((owner.beta, owner.kind))

    with pytest.raises(KeyError, match=r"\(0.5, 'ours'\)"):
        fails()
    assert (owner.beta, owner.kind) == (0.1, "own")


def test_a_method_is_wrapped_once():
    class Trainer:
        def log(self, values):
            return [*values, "own"]

    def adding(method):
        return lambda self, values: method(self, [*values, "ours"])

    for _ in range(2):
        wrap_method(Trainer, "log", adding)
    assert Trainer().log([]) == ["ours", "own"]
    assert Trainer.log.__name__ == "log"


@pytest.mark.parametrize(
    ("logs", "prefix"),
    [
        ({"eval_runtime": 1.0}, "eval"),
        ({"test_runtime": 1.0}, "test"),
        ({"train_runtime": 1.0}, None),
        ({}, None),
    ],
)
def test_the_prefix_of_an_evaluation(logs, prefix):
    assert evaluation_prefix(logs) == prefix


def test_two_callbacks_of_a_kind_are_refused():
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[1, "a", "b"]))
    assert attached(trainer, int) == 1
    assert attached(trainer, float) is None
    with pytest.raises(ValueError, match="expected one PreferenceLossCallback"):
        attached(trainer, str)
