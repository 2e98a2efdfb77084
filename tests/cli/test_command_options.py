"""Options of the commands: hyperparameters of the loss."""

import pytest

from prefloss.cli.command_options import TrainOptions


@pytest.mark.parametrize(
    ("loss", "param", "name", "value"),
    [
        ("ipo", "tau=0.5", "tau", 0.5),
        ("ipo", " tau = 5e-1 ", "tau", 0.5),
        ("ipo", "per_token=false", "per_token", False),
        ("ipo", "per_token=False", "per_token", False),
        ("kto", "kl_baseline=zero", "kl_baseline", "zero"),
    ],
)
def test_a_hyperparameter_is_read_as_in_an_expression(loss, param, name, value):
    assert TrainOptions(loss=loss, param=[param]).bound_loss().params[name] == value


@pytest.mark.parametrize(
    "param", ['kl_baseline={"name": "running_mean", "decay": 0.5}', "kl_baseline=running_mean(decay=0.5)"]
)
def test_a_hyperparameter_may_have_settings_of_its_own(param):
    assert TrainOptions(loss="kto", param=[param]).bound_loss().params["kl_baseline"].decay == 0.5
