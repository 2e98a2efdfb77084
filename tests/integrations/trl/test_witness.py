"""TRL as a third witness: each of its losses against ours, on the same log-probs of a policy that has moved."""

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

import prefloss
from prefloss.integrations.trl import FeedbackCollator, PreferenceLossCallback, attach, detach
from tests import tiny

# TRL's loss type and options -> our name, with what we must be told where TRL's form is not the paper's.
WITNESSED = {
    "sigmoid": ("dpo", {}),
    "sigmoid_norm": ("ln_dpo", {"beta": 0.1}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo_pair": ("exo_pair", {}),
    "nca_pair": ("nca_pair", {"beta": 0.1}),
    "robust": ("robust_dpo", {}),
    # TRL's has no reward shift.
    "bco_pair": ("bco_pair", {"beta": 0.1, "shift": 0.0}),
    "sppo_hard": ("sppo_hard", {"beta": 0.1}),
    "aot": ("aot", {"beta": 0.1}),
    "aot_unpaired": ("aot_unpaired", {"beta": 0.1}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {"beta": 0.1}),
    # TRL's is one mean over all chosen tokens of the batch.
    "sft": ("nll", {"average": "batch"}),
}
OPTIONS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Weights of a policy that has left its reference."""
    return tiny.train("dpo", tmp_path_factory.mktemp("moved"), max_steps=20, learning_rate=1e-2).trainer.model


def batch_loss_and_gradient(trainer):
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    )


def moved_trainer(folder, moved, **options):
    trainer = tiny.build("dpo", folder, per_device_train_batch_size=8, **options)
    trainer.model.load_state_dict(moved.state_dict())
    return trainer


@pytest.mark.parametrize("trl_type", WITNESSED)
def test_every_loss_of_trl(tmp_path, moved, trl_type):
    name, given = WITNESSED[trl_type]
    options = OPTIONS.get(trl_type, {})
    trainer = moved_trainer(tmp_path, moved, loss_type=[trl_type], **options)
    theirs, their_gradient = batch_loss_and_gradient(trainer)
    attach(trainer, name, **given)
    ours, our_gradient = batch_loss_and_gradient(trainer)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)
    detach(trainer)
    assert batch_loss_and_gradient(trainer)[0] == theirs


@pytest.mark.parametrize(
    ("options", "modifiers"),
    [
        ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
        ({"f_divergence_type": "forward_kl"}, {"divergence": "forward_kl"}),
        ({"f_divergence_type": "js_divergence"}, {"divergence": "js"}),
        # TRL's alpha is 1 - the paper's.
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            {"divergence": "alpha(0.7)"},
        ),
    ],
)
@pytest.mark.parametrize("trl_type", ["sigmoid", "hinge", "ipo"])
def test_options_of_trl_are_modifiers(tmp_path, moved, trl_type, options, modifiers):
    trainer = moved_trainer(tmp_path, moved, loss_type=[trl_type], **options)
    theirs, their_gradient = batch_loss_and_gradient(trainer)
    callback = attach(trainer, WITNESSED[trl_type][0])
    assert {name: str(callback.loss.params[name]).strip("'") for name in modifiers} == {
        name: str(value) for name, value in modifiers.items()
    }
    ours, our_gradient = batch_loss_and_gradient(trainer)
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_wpo_is_trls_with_the_papers_bound(tmp_path, moved):
    trainer = moved_trainer(tmp_path, moved, use_weighting=True)
    theirs, _ = batch_loss_and_gradient(trainer)
    attach(trainer, "dpo")
    with_modifier, _ = batch_loss_and_gradient(trainer)
    detach(trainer)
    attach(trainer, "wpo", beta=0.1)
    assert batch_loss_and_gradient(trainer)[0] == pytest.approx(with_modifier, rel=1e-6)
    # The paper bounds a weight by 1; TRL since 0.29 does not, and this policy is surer than that of some pairs.
    assert with_modifier < theirs


def test_a_sum_of_losses_is_trls(tmp_path, moved):
    trainer = moved_trainer(
        tmp_path, moved, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
    )
    theirs, their_gradient = batch_loss_and_gradient(trainer)
    expression = "0.8*dpo(beta=0.1) + 0.2*bco_pair(beta=0.1, shift=0.0) + 1.0*nll(average='batch')"
    callback = attach(trainer, expression)
    ours, our_gradient = batch_loss_and_gradient(trainer)
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)
    names = {"prefloss/loss/dpo", "prefloss/loss/bco_pair", "prefloss/loss/nll"}
    assert names <= callback.objective.metrics().keys()


def test_unpaired_apo_is_kto_without_a_baseline(tmp_path):
    options = {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 8, "max_steps": 5}
    theirs = tiny.train("kto", tmp_path, **options)
    ours = tiny.train("kto", tmp_path, [PreferenceLossCallback("kto_zero")], **options)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-6)


def test_scores_reach_a_graded_loss(tmp_path):
    def scored(row, index):
        return {"score_chosen": 1.0 + index % 3, "score_rejected": 0.5}

    data = tiny.pairs().map(scored, with_indices=True)
    collator = FeedbackCollator(DataCollatorForPreference(pad_token_id=0))
    callback = PreferenceLossCallback("margin_dpo", margin_weight=1.0)
    trainer = tiny.build(
        "dpo", tmp_path, [callback], data=data, data_collator=collator, remove_unused_columns=False
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    gap = batch["score_chosen"] - batch["score_rejected"]
    # Policy and reference agree, so what is left of the margin is the gap of the scores.
    wanted = torch.nn.functional.softplus(gap).mean().item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(wanted, abs=1e-5)
    trainer.train()


def test_the_score_of_a_vote_has_an_old_name():
    collator = FeedbackCollator(lambda examples: {})
    assert collator([{"score": 0.5}])["scores"].tolist() == [0.5]
    with pytest.warns(DeprecationWarning, match="column 'scores' is now called 'score'"):
        assert collator([{"scores": 0.5}])["scores"].tolist() == [0.5]
    with pytest.raises(ValueError, match="scores: got it beside score, its new name, expected one of them"):
        collator([{"score": 0.5, "scores": 0.5}])


def test_a_graded_loss_without_scores_says_how_to_pass_them(tmp_path):
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("margin_dpo")])
    with pytest.raises(ValueError, match=r"margin_dpo: got data without scores, .*FeedbackCollator"):
        trainer.train()


def test_schedules_move_with_optimizer_steps(tmp_path):
    callback = PreferenceLossCallback("dpo", beta=prefloss.losses.Linear(0.5, 0.1, steps=4))
    tiny.train("dpo", tmp_path, [callback], max_steps=2, gradient_accumulation_steps=2)
    assert callback.loss.beta == pytest.approx(0.3)


def test_a_column_that_trl_drops_is_noticed(tmp_path):
    data = tiny.pairs().add_column("weight", [2.0] * 64)
    trainer = tiny.build("dpo", tmp_path, [PreferenceLossCallback("hinge")], data=data)
    with pytest.raises(
        ValueError, match=r"column 'weight': the data has it and hinge reads it, but TRL drops it"
    ):
        trainer.train()
    trainer = tiny.build(
        "dpo",
        tmp_path,
        [PreferenceLossCallback("hinge")],
        data=data,
        remove_unused_columns=False,
        max_steps=1,
    )
    trainer.data_collator = FeedbackCollator(trainer.data_collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2.0, abs=1e-5)
