"""A loss in OpenRLHF's DPOTrainer: a stand-in with its structure (openrlhf/trainer/dpo_trainer.py, 0.11.2)."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefloss.integrations.openrlhf import main, trainer_with

PROMPTS, LENGTHS = [1, 2, 1, 2], torch.tensor([3, 2, 2, 4])
MASK = (torch.arange(6) < torch.tensor(PROMPTS)[:, None] + LENGTHS[:, None]).long()


class DPOTrainer:
    def __init__(self, beta=0.1, accumulated=1, **model):
        options = {"label_smoothing": 0.0, "ipo_enable": False, **model}
        self.args = SimpleNamespace(model=SimpleNamespace(**options))
        self.strategy = SimpleNamespace(accumulated_gradient=accumulated)
        self.beta, self.loss_fn = beta, None

    def _get_batch_logps(self, per_token_logps, attention_mask, prompt_id_lens):
        loss_masks = attention_mask.clone().bool()
        for mask, source_len in zip(loss_masks, prompt_id_lens, strict=True):
            mask[:source_len] = False
        loss_masks = loss_masks[:, 1:]
        sums = (per_token_logps * loss_masks).sum(-1)
        return sums, sums / loss_masks.sum(-1)

    def step(self, policy, reference):
        known = []
        for logps in (policy, reference):
            with torch.set_grad_enabled(logps is policy and torch.is_grad_enabled()):
                known += self._get_batch_logps(logps, MASK, PROMPTS)[0].chunk(2)
        return self.loss_fn(*known)


def rows(seed):
    torch.manual_seed(seed)
    return -2 * torch.rand(4, 5, dtype=torch.float64)


def by_hand(policy, reference):
    sums = [DPOTrainer()._get_batch_logps(logps, MASK, PROMPTS)[0] for logps in (policy, reference)]
    return sums[0], sums[0] - sums[1]


def test_a_sum_and_a_loss_of_means_are_those_by_hand():
    policy, reference = rows(0).requires_grad_(), rows(1)
    sums, h = by_hand(policy, reference)
    means = sums / LENGTHS
    cases = {
        "simpo(beta=2.0, gamma=0.5)": -logsigmoid(2.0 * (means[:2] - means[2:]) - 0.5).mean(),
        "0.8*hinge(beta=0.3) + 0.2*nll": 0.8 * torch.relu(1 - 0.3 * (h[:2] - h[2:])).mean()
        - 0.2 * means[:2].mean(),
    }
    for loss, expected in cases.items():
        value, chosen, _ = trainer_with(loss, DPOTrainer)().step(policy, reference)
        torch.testing.assert_close(value, expected)
        found, wanted = (
            torch.autograd.grad(each, policy, retain_graph=True)[0] for each in (value, expected)
        )
        torch.testing.assert_close(found, wanted)
        assert chosen.shape == (2,)
        assert not chosen.requires_grad


def test_its_options_are_taken_over_or_refused():
    trainer = trainer_with("ipo(per_token=False)", DPOTrainer)(beta=0.3)
    assert trainer.preference.loss.params["tau"] == 0.3
    assert (
        trainer_with("dpo", DPOTrainer)(label_smoothing=0.2).preference.loss.params["label_smoothing"] == 0.2
    )
    for loss, options, match in (
        ("dpo", {"ipo_enable": True}, "ipo_enable: got True beside a prefloss loss"),
        ("nca_pair", {"label_smoothing": 0.2}, "label_smoothing: got 0.2, but nca_pair does not read it"),
        ("dpo(beta=0.5)", {"beta": 0.3}, "beta: got 0.3, but dpo was given beta=0.5"),
        ("odpo", {}, "odpo: needs scores"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer_with(loss, DPOTrainer)(**options)


def test_a_schedule_moves_on_with_each_optimizer_step():
    trainer = trainer_with("dpo(beta=linear(0.5, 0.1, steps=2))", DPOTrainer)(accumulated=2)
    betas = []
    for _ in range(4):
        betas.append(round(trainer.preference.loss.beta, 6))
        trainer.step(rows(0).requires_grad_(), rows(1))
        with torch.no_grad():
            trainer.step(rows(0), rows(1))
    assert betas == [0.5, 0.5, 0.3, 0.3]


def test_a_version_that_sums_otherwise_is_noticed():
    class Means(DPOTrainer):
        def _get_batch_logps(self, *arguments):
            return super()._get_batch_logps(*arguments)[::-1]

    with pytest.raises(RuntimeError, match="got other sums of log-probs"):
        trainer_with("dpo", Means)().step(rows(0), rows(1))
    with pytest.raises(RuntimeError, match="no method _get_batch_logps"):
        trainer_with("dpo", object)


def test_the_launcher_replaces_the_trainer_while_it_runs(monkeypatch, tmp_path, capsys):
    package = tmp_path / "openrlhf"
    for folder in (package, package / "trainer", package / "cli"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (package / "trainer" / "dpo_trainer.py").write_text("class DPOTrainer:\n    _get_batch_logps = print\n")
    lines = (
        "import sys",
        "from openrlhf.trainer.dpo_trainer import DPOTrainer",
        "print(DPOTrainer.__name__, sys.argv[1:])",
    )
    (package / "cli" / "train_dpo.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    main(["--prefloss", "simpo(beta=2.0)", "--model.beta", "0.1"])
    assert capsys.readouterr().out == "PreferenceTrainer ['--model.beta', '0.1']\n"
    assert sys.modules["openrlhf.trainer.dpo_trainer"].DPOTrainer.__name__ == "DPOTrainer"
    with pytest.raises(SystemExit, match="2"):
        main(["--prefloss", "simmpo"])
    assert "unknown loss 'simmpo'; did you mean 'simpo'" in capsys.readouterr().err
    for name in [name for name in sys.modules if name.partition(".")[0] == "openrlhf"]:
        monkeypatch.delitem(sys.modules, name)
