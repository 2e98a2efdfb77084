"""What does a trainer train under each name? A real TRL, and trainers that train something else."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid
from typer.testing import CliRunner

from prefloss.cli.app import app
from prefloss.integrations.probes import FRAMEWORKS, KnownModel, Rows
from prefloss.testing import compare

SUMS, TOKENS = torch.tensor([-3.0, -40.0, -7.5, -0.2]), torch.tensor([2, 5, 1, 3])


def run(*words):
    return CliRunner().invoke(app, ["probe", *words], env={"COLUMNS": "160"})


def test_the_model_gives_each_completion_its_log_prob():
    rows = Rows(TOKENS)
    model, padded = KnownModel(rows.by_token(SUMS), None), rows.padded()
    logits = model(padded["input_ids"]).logits[:, :-1].log_softmax(-1)
    counted = rows.labels()[:, 1:] != -100
    by_token = logits.gather(-1, padded["input_ids"][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close((by_token * counted).sum(-1), SUMS, rtol=1e-5, atol=1e-5)
    fused = model(padded["input_ids"], labels=rows.labels(), fused_lm_head=True).log_probs
    torch.testing.assert_close(fused.sum(-1), SUMS)


def test_the_installed_trl_trains_what_is_asked():
    result = run("trl", "ipo", "bco_pair")
    assert result.exit_code == 0, result.output
    assert "ipo(tau=0.3, per_token=True)" in result.output
    assert "2 same" in result.output


def test_the_installed_kto_trainer_trains_what_is_asked():
    result = run("trl-kto")
    assert result.exit_code == 0, result.output
    assert "kl_baseline=mismatched" in result.output
    assert "2 same" in result.output


@pytest.mark.parametrize(
    ("planted", "trained"),
    [
        pytest.param({"name": "sigmoid"}, "dpo(beta=0.3)", id="sigmoid whatever is asked"),
        pytest.param({"beta": 0.1}, "hinge(beta=0.1)", id="ignores beta"),
    ],
)
def test_a_trainer_that_trains_something_else_is_found(planted, trained, monkeypatch):
    honest = FRAMEWORKS["trl"]

    def build(name, **options):
        return honest.build(**{"name": name, **options, **planted})

    accepted = ["sigmoid", "hinge", "ipo"]
    liar = replace(honest, framework="liar", build=build, names=lambda: accepted)
    monkeypatch.setattr("prefloss.cli.probe.FRAMEWORKS", {"liar": liar})
    result = run("liar", "hinge")
    assert result.exit_code == 1
    assert trained in result.output
    assert "1 differs" in result.output


def test_a_loss_module_alone(monkeypatch):
    class DPOLoss:
        """OpenRLHF's, as far as it is called."""

        def __init__(self, beta, label_smoothing=0.0, ipo=False):
            self.beta, self.ipo = beta, ipo

        def __call__(self, chosen, rejected, reference_chosen, reference_rejected):
            margin = (chosen - rejected) - (reference_chosen - reference_rejected)
            squares, sigmoids = (margin - 1 / (2 * self.beta)) ** 2, -logsigmoid(self.beta * margin)
            return (squares if self.ipo else sigmoids).mean(), margin, margin

    for name, holds in (("openrlhf", {}), ("openrlhf.models", {"DPOLoss": DPOLoss})):
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    prober = FRAMEWORKS["openrlhf"]
    sigmoid, ipo = (prober.step(name) for name in ("sigmoid", "ipo"))
    assert compare(sigmoid, prober.asked("sigmoid"))
    assert compare(ipo, prober.asked("ipo"))
    assert not compare(ipo, prober.asked("sigmoid"))


def test_names_and_packages_that_are_not_there(monkeypatch):
    for words, message in (
        (["trlx"], "trainer: got 'trlx', expected one of trl, "),
        (["trl", "simmpo"], "name: got 'simmpo', expected one of sigmoid, "),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert message in result.output
    absent = replace(FRAMEWORKS["trl"], package="no-such-package")
    monkeypatch.setattr("prefloss.cli.probe.FRAMEWORKS", {"trl": absent})
    result = run("trl")
    assert result.exit_code == 2
    assert "trl: the package no-such-package is not installed here" in result.output
