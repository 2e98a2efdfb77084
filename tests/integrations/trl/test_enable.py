"""Registered names in TRL's own configurations and on its command line."""

import inspect
import json
import sys
from unittest import mock

import pytest
import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import prefloss
from prefloss.integrations.trl import PreferenceLossCallback, disable, enable, options
from prefloss.integrations.trl import kernel as kernel_module
from prefloss.integrations.trl.__main__ import main
from prefloss.integrations.trl.callback import attached
from tests import tiny


@pytest.fixture
def exponential():
    """A user's own loss."""

    @prefloss.register
    def test_exponential(pairs: prefloss.Pairs, *, beta: float = 0.1) -> torch.Tensor:
        return torch.exp(-beta * pairs.margin())

    yield "test_exponential"
    prefloss.losses.unregister("test_exponential")


@pytest.fixture
def enabled():
    enable()
    yield
    disable()


def test_names_that_trl_knows_are_those_of_this_version():
    source = inspect.getsource(DPOTrainer._compute_loss)
    named = {line.split('"')[1] for line in source.splitlines() if 'if loss_type == "' in line}
    assert named == options._OWN_LOSS_TYPES[DPOConfig]
    assert (
        set(KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"])
        == options._OWN_LOSS_TYPES[KTOConfig]
    )


def test_a_users_loss_by_name(tmp_path, enabled, exponential):
    run = tiny.train("dpo", tmp_path, loss_type=[exponential], beta=0.5, max_steps=3)
    assert run.losses[0] == pytest.approx(1.0, abs=1e-5)
    assert run.trainer.args.loss_type == [exponential]


def test_hyperparameters_in_the_name(tmp_path, enabled):
    run = tiny.train("dpo", tmp_path, loss_type="ipo(tau=0.5)", max_steps=1)
    assert run.losses[0] == pytest.approx(1.0, abs=1e-5)


def test_names_that_trl_knows_stay_its_own(tmp_path, enabled):
    trainer = tiny.build("dpo", tmp_path, loss_type=["sigmoid", "sft"])
    assert "compute_loss" not in trainer.__dict__


def test_a_label_loss_that_reads_no_mismatched_completions(tmp_path, enabled):
    run = tiny.train(
        "kto", tmp_path, loss_type="kto(kl_baseline='zero')", per_device_train_batch_size=1, max_steps=3
    )
    assert run.trainer.args.loss_type == "kto(kl_baseline='zero')"
    assert not run.trainer.calculate_KL


def test_unknown_names_are_refused_before_anything_is_built(tmp_path, enabled):
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        tiny.build("dpo", tmp_path, loss_type=["hing"])
    with pytest.raises(ValueError, match=r"discopop_tau: got 0\.1, but ipo does not read it"):
        tiny.build("dpo", tmp_path, loss_type=["ipo(tau=0.5)"], discopop_tau=0.1)


def test_several_names_are_a_sum(tmp_path, enabled):
    trainer = tiny.build("dpo", tmp_path, loss_type=["dpo", "hinge"], loss_weights=[0.8, 0.2], beta=0.3)
    assert repr(attached(trainer).loss) == "0.8*dpo(beta=0.3) + 0.2*hinge(beta=0.3)"


def test_with_the_callback_too(tmp_path, enabled):
    callback = PreferenceLossCallback("ipo", tau=0.5)
    trainer = tiny.build("dpo", tmp_path, [callback], loss_type=["ipo(tau=0.5)"])
    assert "compute_loss" not in trainer.__dict__
    with pytest.raises(ValueError, match="but the loss to train is ipo"):
        tiny.build("dpo", tmp_path, [PreferenceLossCallback("ipo")], loss_type=["dpo"])


def test_disable_undoes_everything(exponential, tmp_path):
    before = DPOTrainer.__init__, KTOTrainer.__init__, KTOConfig.__dataclass_fields__["loss_type"].metadata
    enable()
    enable()
    disable()
    after = DPOTrainer.__init__, KTOTrainer.__init__, KTOConfig.__dataclass_fields__["loss_type"].metadata
    assert after == before
    with pytest.raises(ValueError, match="Unknown loss type: test_exponential"):
        tiny.train("dpo", tmp_path, loss_type=[exponential])


@pytest.mark.parametrize(
    ("command", "loss_type", "data"),
    [
        ("dpo", "ipo(tau=0.5)", tiny.pairs(8)),
        ("dpo", "command_line_loss", tiny.pairs(8)),
        ("kto", "kto(kl_baseline='zero')", tiny.labels(8)),
    ],
)
def test_trls_command_line(tmp_path, monkeypatch, command, loss_type, data):
    monkeypatch.chdir(tmp_path)
    model, folder = tiny.model(), tmp_path / "model"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "command_line_losses.py").write_text(
        "import prefloss, torch\n"
        "@prefloss.register\n"
        "def command_line_loss(pairs: prefloss.Pairs, *, beta: float = 0.1) -> torch.Tensor:\n"
        "    return torch.exp(-beta * pairs.margin())\n"
    )
    options = {
        "model_name_or_path": folder,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "loss_type": loss_type,
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "path", [*sys.path])
    stats = kernel_module.linear_token_stats
    try:
        with mock.patch.object(kernel_module, "linear_token_stats", wraps=stats) as scored:
            main(["--import", "command_line_losses", "--kernel", "prefloss", command, *flags])
    finally:
        disable()
        prefloss.losses.unregister("command_line_loss")
        del sys.modules["command_line_losses"]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert scored.called
