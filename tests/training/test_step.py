"""However the examples of an optimizer step fall into micro-batches, the step is the same."""

import pytest
import torch

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
