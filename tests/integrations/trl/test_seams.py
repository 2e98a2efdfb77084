"""The seams of older TRLs, on small trainers of the same structure; `make trainers` runs the real ones."""

import sys
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from trl import DPOTrainer, KTOTrainer

from prefloss.integrations.trl import dpo_loss, fused_head, seams, token_logps

IDS = torch.tensor([[4, 5, 6, 7], [4, 5, 8, 0]])
COMPLETIONS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))


def selective_log_softmax(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


class Model(torch.nn.Module):
    """The next token's logits depend on the token alone."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.scale * TABLE[input_ids], aux_loss=self.scale * 3.0)


class Trainer:
    """What a seam reads of a trainer."""

    def __init__(self, use_weighting=False):
        self.model, self.ref_model = Model(1.0), Model(0.5)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model, keep_torch_compile: model)
        self.precompute_ref_logps = False
        self.args = SimpleNamespace(ld_alpha=None)
        self.use_weighting = use_weighting


class Older(Trainer):
    """DPOTrainer up to 0.28."""

    def concatenated_forward(self, model, batch):
        logits = model(batch["input_ids"]).logits
        labels = torch.roll(batch["input_ids"], -1, 1)
        mask = torch.roll(batch["completion_mask"], -1, 1).bool()
        labels[~mask] = 0
        logps = selective_log_softmax(logits, labels)
        logps[~mask] = 0
        return logps.roll(1, 1).sum(-1).chunk(2)

    def get_batch_loss_metrics(self, model, batch):
        policy = self.concatenated_forward(model, batch)
        with torch.no_grad():
            reference = self.concatenated_forward(self.ref_model, batch)
        return self.dpo_loss(*policy, *reference)[0].mean()

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, loss_type="sigmoid"):
        return (chosen - rejected - ref_chosen + ref_rejected,)


class Summing(Older):
    """A fork that scores completions in its own way."""

    def concatenated_forward(self, model, batch):
        logps = model(batch["input_ids"]).logits.log_softmax(-1)[:, :-1]
        logps = logps.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (logps * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)


class Newer(Trainer):
    """DPOTrainer from 0.29 to 1.14."""

    def _compute_loss(self, model, batch):
        shifted = batch["input_ids"][:, 1:]
        logps = selective_log_softmax(model(batch["input_ids"]).logits[:, :-1], shifted)
        logps[batch["completion_mask"][:, 1:] == 0] = 0.0
        with torch.no_grad():
            reference = selective_log_softmax(self.ref_model(batch["input_ids"]).logits[:, :-1], shifted)
        return (logps - reference).sum()


def batch():
    return {"input_ids": IDS.clone(), "completion_mask": COMPLETIONS}


def by_hand(scale):
    logps = (scale * TABLE[IDS[:, :-1]]).log_softmax(-1)
    return logps.gather(-1, IDS[:, 1:, None])[..., 0] * COMPLETIONS[:, 1:]


@pytest.mark.parametrize(
    ("kind", "seam", "run"),
    [(Older, dpo_loss, "get_batch_loss_metrics"), (Newer, token_logps, "_compute_loss")],
)
def test_a_seam_gives_log_ratios_of_the_completions(kind, seam, run):
    trainer = kind(use_weighting=True)
    own = getattr(trainer, run)(trainer.model, batch())
    with seams.recorder_of(kind)(trainer, batch()) as passes:
        assert torch.equal(getattr(trainer, run)(trainer.model, batch()), own)
    assert seams.recorder_of(kind) is seam.recorded
    ratios = passes.log_ratios()["completions"]
    torch.testing.assert_close(ratios.policy, by_hand(1.0).sum(-1))
    torch.testing.assert_close(ratios.reference, by_hand(0.5).sum(-1))
    assert ratios.tokens.tolist() == [2, 1]
    squares = (TABLE[IDS].softmax(-1) ** 2).sum(-1).log()
    found = ratios.per_token
    torch.testing.assert_close(found.log_sum_sq[found.mask], squares[:, :-1][COMPLETIONS[:, 1:] == 1])
    assert passes.aux_loss().item() == 3.0
    ratios.policy.sum().backward()
    assert trainer.model.scale.grad is not None
    # Nothing stays behind.
    assert {"dpo_loss", "_compute_loss"}.isdisjoint(vars(trainer))
    assert sys.modules[__name__].selective_log_softmax.__name__ == "selective_log_softmax"


def test_sums_alone_where_a_fork_scores_in_its_own_way():
    trainer = Summing()
    with dpo_loss.recorded(trainer, batch()) as passes:
        trainer.get_batch_loss_metrics(trainer.model, batch())
    ratios = passes.log_ratios()["completions"]
    torch.testing.assert_close(ratios.policy, by_hand(1.0).sum(-1))
    assert ratios.tokens is None
    assert ratios.per_token is None


def test_another_number_of_calls_is_refused():
    trainer = Older()
    with dpo_loss.recorded(trainer, batch()) as passes:
        pass
    with pytest.raises(RuntimeError, match=r"got calls of dpo_loss with \[\] log-probs, expected one with 4"):
        passes.log_ratios()


def test_passes_over_other_tokens_are_refused():
    trainer = Newer()
    with token_logps.recorded(trainer, batch()) as passes:
        trainer._compute_loss(trainer.model, {**batch(), "input_ids": (IDS + 1) % 9})
    with pytest.raises(RuntimeError, match="got other tokens in pass 0, expected those of 'policy'"):
        passes.log_ratios()


def test_this_trl_has_the_fused_head():
    assert seams.recorder_of(DPOTrainer) is seams.recorder_of(KTOTrainer) is fused_head.recorded


def test_versions_and_structures_that_nobody_knows(monkeypatch):
    with pytest.raises(RuntimeError, match=r"Trainer computes its loss in a way that prefloss does not know"):
        seams.recorder_of(Trainer)
    monkeypatch.setattr(seams, "VERSION", Version("0.17.0"))
    with pytest.raises(RuntimeError, match=r"prefloss was tested with TRL 0\.18 to 1\.16"):
        seams.recorder_of(DPOTrainer)


def test_a_newer_version_of_known_structure_is_tried(monkeypatch):
    warned = []
    monkeypatch.setattr(seams, "untested", lambda: True)
    monkeypatch.setattr(seams.logger, "warning_once", warned.append)
    assert seams.recorder_of(DPOTrainer) is fused_head.recorded
    assert "the newest that prefloss was tested with" in warned[0]
