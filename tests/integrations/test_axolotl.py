"""The plugin on a stand-in of axolotl's base class; `make trainers` runs it in axolotl itself."""

from types import SimpleNamespace

import pydantic
import pytest

from tests.integrations import standins


@pytest.fixture
def axolotl(monkeypatch):
    standins.install(monkeypatch, ["axolotl.integrations.base"])[
        "axolotl.integrations.base"
    ].BasePlugin = object
    with standins.imported("prefloss.integrations.axolotl") as ours:
        yield ours


def test_the_configured_loss_is_a_callback_of_the_trainer(axolotl):
    plugin = axolotl.PreflossPlugin()
    assert plugin.get_input_args() == "prefloss.integrations.axolotl.PreflossArgs"
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(rl="dpo", prefloss="ipo(tau=0.3)"), None)
    assert repr(callback) == "PreferenceLossCallback(ipo(tau=0.3, per_token=True))"
    assert plugin.add_callbacks_pre_trainer(SimpleNamespace(rl="sft", prefloss=None), None) == []


def test_a_training_without_pairs_or_labels_is_refused(axolotl):
    with pytest.raises(ValueError, match="rl: got 'orpo' beside prefloss, expected one of 'dpo', 'kto'"):
        axolotl.PreflossPlugin().add_callbacks_pre_trainer(SimpleNamespace(rl="orpo", prefloss="ipo"), None)


@pytest.mark.parametrize("loss", ["simmpo", "dpo(beta=-1)", "dpo(bta=1)"])
def test_a_misspelt_loss_is_an_error_of_the_configuration(axolotl, loss):
    with pytest.raises(pydantic.ValidationError, match=r"simmpo|beta: got -1|bta"):
        axolotl.PreflossArgs(prefloss=loss)
    assert axolotl.PreflossArgs(prefloss="ipo").prefloss == "ipo"
    assert axolotl.PreflossArgs().prefloss is None
