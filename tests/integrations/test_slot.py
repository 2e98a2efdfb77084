from types import SimpleNamespace

import pytest
import torch
from transformers.trainer_callback import CallbackHandler

import prefloss
from prefloss.integrations.slot import LossSlot, Pass, SlotCallback


class Former:
    """Scores a batch as the former trainers do: forward passes, then a loss method with their sums."""

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        for scores, mask in batch["passes"]:
            self.score(scores, mask)
        losses, *rest = self.loss_method(*[scores.sum(-1) for scores, _ in batch["passes"]])
        return losses.mean() + batch.get("added", 0.0), rest

    def log(self, logs):
        self.logged = dict(logs)


class Trainer(LossSlot, Former):
    names = ("policy", "reference")

    def __init__(self, loss, training=True):
        self.model = SimpleNamespace(training=training)
        self.callback_handler = CallbackHandler([], None, None, None, None)
        self.callback_handler.add_callback(SlotCallback(loss, diagnose=False))

    def pass_names(self):
        return self.names

    def score(self, scores, mask):
        self.passes.append(Pass(scores, mask))

    def loss_method(self, *sums):
        return self.pair_losses()


class LabelTrainer(Trainer):
    names = ("kl_policy", "policy", "kl_reference", "reference")

    def loss_method(self, *sums):
        return self.label_losses(torch.tensor([True, False, False, True]))


def passes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [3], [2], [5]])
    return [(-torch.rand(4, 6, generator=generator) * mask, mask) for _ in range(count)]


@pytest.mark.parametrize(
    "loss", ["ipo(tau=0.3)", "simpo(beta=2.0)", "dpo(ld_alpha=0.5)", "0.5*dpo + 0.5*nll"]
)
def test_pair_losses_are_the_loss_of_what_was_scored(loss):
    (policy, mask), (reference, _) = passes(2)
    policy.requires_grad_()
    trainer = Trainer(loss)
    value, (chosen, rejected) = trainer.get_batch_loss_metrics(
        None, {"passes": [(policy, mask), (reference, mask)]}
    )
    both = prefloss.LogRatios.from_token_logps(policy, mask, reference, keep_per_token=True)
    expected = prefloss.get(loss).mean(prefloss.Pairs(both[:2], both[2:]))
    assert torch.allclose(value, expected)
    found, wanted = (torch.autograd.grad(item, policy)[0] for item in (value, expected))
    assert torch.allclose(found, wanted)
    assert not chosen.requires_grad
    assert torch.allclose(torch.cat([chosen, rejected]), (prefloss.get(loss).beta or 1.0) * both.h)


def test_terms_that_the_trainer_adds_stay():
    batch = {"passes": passes(2)}
    value, _ = Trainer("dpo").get_batch_loss_metrics(None, batch)
    more, _ = Trainer("dpo").get_batch_loss_metrics(None, {**batch, "added": 0.25})
    assert more - value == pytest.approx(0.25)


def test_a_trainer_without_a_reference():
    trainer = Trainer("simpo(beta=2.0)")
    trainer.names = ("policy",)
    ((scores, mask),) = passes(1)
    value, (chosen, _) = trainer.get_batch_loss_metrics(None, {"passes": [(scores, mask)]})
    both = prefloss.LogRatios.from_token_logps(scores, mask)
    assert torch.allclose(value, prefloss.get("simpo(beta=2.0)").mean(prefloss.Pairs(both[:2], both[2:])))
    assert torch.allclose(chosen, 2.0 * both.policy[:2])


def test_label_losses_read_the_mismatched_passes():
    scored = passes(4)
    trainer = LabelTrainer("kto(beta=0.3)")
    value, (liked, disliked, kl) = trainer.get_batch_loss_metrics(None, {"passes": scored})
    mismatched, completions = (
        prefloss.LogRatios.from_token_logps(scored[i][0], scored[i][1], scored[i + 2][0]) for i in (0, 1)
    )
    labels = prefloss.Labels(completions, torch.tensor([True, False, False, True]), mismatched=mismatched)
    assert torch.allclose(value, prefloss.get("kto(beta=0.3)").mean(labels))
    assert torch.allclose(kl, mismatched.h.mean().clamp(min=0))
    assert torch.allclose(liked, 0.3 * completions.h[[0, 3]])
    assert torch.allclose(disliked, 0.3 * completions.h[[1, 2]])


@pytest.mark.parametrize("training", [True, False])
def test_metrics_are_logged_beside_the_trainers_own(training):
    trainer = Trainer("dpo", training)
    trainer.get_batch_loss_metrics(None, {"passes": passes(2)})
    trainer.log({"loss": 7.0} if training else {"eval_loss": 7.0, "eval_runtime": 1.0})
    prefix = "" if training else "eval_"
    assert trainer.logged[f"{prefix}loss"] == 7.0
    assert f"{prefix}prefloss/chosen_falling" in trainer.logged


def test_a_trainer_that_scores_otherwise_is_stopped():
    with pytest.raises(RuntimeError, match=r"got 3 forward passes, expected 2: \['policy', 'reference'\]"):
        Trainer("dpo").get_batch_loss_metrics(None, {"passes": passes(3)})
    first, (scores, mask) = passes(2)
    with pytest.raises(RuntimeError, match="other completion tokens in the reference's forward pass"):
        Trainer("dpo").get_batch_loss_metrics(None, {"passes": [first, (scores, ~mask)]})


def test_a_step_without_the_loss_is_an_error():
    callback = Trainer("dpo").prefloss
    with pytest.raises(RuntimeError, match="was not used in a training step"):
        callback.on_step_end(None, None, None)


def test_checkpoints_build_the_callback_again():
    callback = SlotCallback("kto(kl_baseline='running_mean')")
    state = callback.state()
    again = SlotCallback(**state["args"])
    assert repr(again.loss) == repr(callback.loss)
    assert state["attributes"]["loss_state"] == callback.loss_state
