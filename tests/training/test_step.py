"""However the examples of an optimizer step fall into micro-batches, the step is the same."""

import math

import pytest
import torch

from prefloss import LogRatios, Pairs, get
from prefloss.training import FeedbackObjective, Router
from prefloss.training.step import sum_counts
from tests import tiny

DATA = {"pairs": tiny.pairs, "labels": tiny.labels, "rankings": tiny.rankings}


class TakesNoLossArguments(tiny.LlamaForCausalLM):
    accepts_loss_kwargs = False


ACCUMULATED = {
    ("dpo", "pairs"): {},
    ("kto_zero", "labels"): {},
    ("npo", "labels"): {},
    ("dpo_pl", "rankings"): {},
    ("dpo", "rankings"): {"rankings_as": "all"},
    # Its two terms count other examples.
    ("0.8*dpo + 0.2*nll", "pairs"): {},
}


@pytest.mark.filterwarnings("ignore:.*completion without tokens")
@pytest.mark.parametrize(
    ("loss", "data", "accepts"), [(*case, True) for case in ACCUMULATED] + [("dpo", "pairs", False)]
)
def test_one_batch_or_many_give_the_same_step(tmp_path, loss, data, accepts):
    def step(size, accumulate):
        policy = tiny.model()
        if not accepts:
            policy.__class__ = TakesNoLossArguments
        # SGD: the weights tell the gradient. Some completions do not fit and are empty, and some only on one side.
        trainer = tiny.plain_train(
            tmp_path,
            loss,
            DATA[data](12, seed=3),
            policy,
            own=ACCUMULATED[loss, data],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_length=5 if data != "rankings" else 4,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        assert trainer.model_accepts_loss_kwargs is accepts
        return trainer

    whole, parts, single = step(12, 1), step(3, 4), step(1, 12)
    # A ranking's figures are of its best and worst completion that have tokens.
    assert data == "rankings" or tiny.steps_of(whole)[0]["prefloss/empty"] > 0
    assert whole.data_collator.seen["truncated_away"] > 0
    assert tiny.losses_of(parts) == pytest.approx(tiny.losses_of(whole), abs=1e-6)
    for other in (parts, single):
        torch.testing.assert_close(tiny.weights(other.model), tiny.weights(whole.model), rtol=0, atol=2e-6)


def test_a_short_last_step_of_an_epoch_counts_right(tmp_path):
    def epoch(size, accumulate):
        options = {
            "optim": "sgd",
            "num_train_epochs": 1,
            "max_steps": -1,
            "max_grad_norm": 0.0,
            "learning_rate": 0.5,
        }
        return tiny.plain_train(
            tmp_path,
            "dpo",
            tiny.pairs(10),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            **options,
        )

    one, many = epoch(6, 1), epoch(2, 3)
    assert one.state.global_step == many.state.global_step == 2
    torch.testing.assert_close(tiny.weights(one.model), tiny.weights(many.model), rtol=0, atol=2e-6)


def test_a_subclass_that_fetches_its_own_batches_gets_the_mean_of_means(tmp_path):
    class Fetches(tiny.Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches = [next(epoch_iterator) for _ in range(num_batches)]
            return batches, self._get_num_items_in_batch(batches, device)

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = tiny.plain_train(tmp_path, "dpo", tiny.pairs(), kind=Fetches, **options)
    theirs = tiny.plain_train(tmp_path, "dpo", tiny.pairs(), **options)
    torch.testing.assert_close(tiny.weights(ours.model), tiny.weights(theirs.model), rtol=0, atol=1e-6)


FEEDBACK = Pairs.of(chosen=[1.5, -1.0, 0.5], rejected=[0.0, 1.0, -2.0])
MARGINS = torch.tensor([1.5, -2.0, 2.5])
DPO = torch.nn.functional.softplus(-0.5 * MARGINS).mean().item()


def shared(objective, feedback=FEEDBACK, training=True, **options):
    return objective.share(feedback, training=training, **options).item()


def test_shares_of_a_batch_by_hand():
    """AUDIT T1: the mean of the batch, or its part of a larger step, with the router's loss."""
    objective = FeedbackObjective("dpo", beta=0.5)
    assert shared(objective) == pytest.approx(DPO)
    assert shared(objective, whole_step=False) == pytest.approx(DPO)
    assert objective.counts(FEEDBACK).tolist() == [3, 1]
    # Three of six examples, one of two micro-batches.
    assert shared(objective, step_counts=torch.tensor([6, 2])) == pytest.approx(DPO / 2)
    router = Router(torch.tensor(4.0), 0.25)
    assert shared(objective, router=router) == pytest.approx(DPO + 1.0)
    assert shared(objective, router=router, whole_step=False) == pytest.approx(DPO + 1.0)
    assert shared(objective, router=router, step_counts=torch.tensor([6, 2])) == pytest.approx(DPO / 2 + 0.5)


def test_figures_of_a_loss_and_of_a_sum():
    """AUDIT T1: the logged loss has its router's part; a sum names its terms, a plain loss has one name."""
    objective = FeedbackObjective("dpo", beta=0.5)
    assert "loss" not in objective.metrics()
    shared(objective, router=Router(torch.tensor(4.0), 0.25))
    shared(objective, Pairs.of([0.0], [0.0]), router=Router(torch.tensor(2.0), 0.25))
    found = objective.metrics()
    assert found["loss"] == pytest.approx((3 * DPO + math.log(2)) / 4 + 0.25 * 3.0)
    assert found["rewards/margins"] == pytest.approx(0.5 * 2.0 / 4)
    assert found["aux_loss"] == 3.0
    assert "prefloss/loss/dpo" not in found
    summed = FeedbackObjective("0.5*dpo(beta=0.5) + 2*hinge(beta=1.0)", diagnose=False)
    shared(summed)
    hinge = (1 - MARGINS).clamp(min=0).mean().item()
    found = summed.metrics()
    assert found["loss"] == pytest.approx(0.5 * DPO + 2 * hinge)
    assert found["prefloss/loss/dpo"] == pytest.approx(DPO)
    assert found["prefloss/loss/hinge"] == pytest.approx(hinge)
    assert "loss" not in summed.metrics()


def test_counts_are_summed_over_ranks_unless_these_cannot_talk_yet(on_ranks):
    """AUDIT T1."""
    own = [torch.tensor([2, 1]), torch.tensor([3, 1])]
    assert on_ranks(lambda number: sum_counts(own).tolist()) == [[10, 4]] * 2
    assert on_ranks(lambda number: sum_counts(own, over_processes=False).tolist()) == [[5, 2]] * 2


def test_metrics_of_training_can_be_forgotten():
    objective = FeedbackObjective("dpo")
    shared(objective)
    shared(objective, training=False)
    objective.forget_metrics()
    assert "loss" not in objective.metrics()
    assert "loss" in objective.metrics(training=False)


def test_rewards_of_a_loss_without_a_strength_are_in_nats():
    """AUDIT T1."""
    objective = FeedbackObjective("simper", diagnose=False)
    side = LogRatios([-4.0], [-6.0], [2])
    shared(objective, Pairs(side, LogRatios([-5.0], [-6.0], [2])))
    assert objective.metrics()["rewards/chosen"] == 2.0


def test_another_loss_is_the_one_that_is_diagnosed_too():
    objective, other = FeedbackObjective("dpo"), get("ipo")
    objective.replace_loss(other)
    assert objective.loss is other
    assert objective.diagnosis.loss is other


@pytest.mark.parametrize(
    "loss",
    [
        "dpo",
        "0.8*dpo + 0.2*nll",
        "aot",
        "dr_dpo",
        "bco_pair",
        "0.5*bco_pair + 0.5*aot",
        "beta_dpo",
        # Its state is summed over the ranks; those above see the examples of all.
        "kto(kl_baseline=running_mean)",
    ],
)
def test_ranks_of_any_size_train_as_one(on_ranks, loss):
    """AUDIT T1: the mean over ranks of value and gradient is that of the whole batch; figures and states agree."""
    policy = torch.tensor([[-3.0, -9.0, -5.0], [-4.0, -2.0, -8.0]])
    reference = torch.tensor([[-5.0, -6.0, -5.5], [-4.5, -3.0, -4.0]])
    counts = torch.tensor([[2, 3, 4], [1, 2, 3]])

    def trained(rows):
        leaf = policy.clone().requires_grad_()
        sides = [LogRatios(leaf[i, rows], reference[i, rows], counts[i, rows]) for i in (0, 1)]
        objective = FeedbackObjective(loss)
        total = objective.share(Pairs(*sides), training=True)
        total.backward()
        figures = objective.metrics()
        return total.item(), leaf.grad, figures, objective.state_dict()

    value, gradient, figures, state = trained(slice(0, 3))
    parts = on_ranks(lambda number: trained([slice(0, 2), slice(2, 3)][number]))
    assert sum(part[0] for part in parts) / 2 == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(sum(part[1] for part in parts) / 2, gradient)
    for part in parts:
        assert part[2] == pytest.approx(figures, rel=1e-4, abs=1e-6)
        assert str(part[3]) == str(state)
