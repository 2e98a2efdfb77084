"""Any pair loss in the form of loops that pass four tensors."""

from dataclasses import dataclass

import pytest
import torch

import prefloss
from prefloss.integrations.four_tensor import FourTensorLoss, OpenRLHFLoss, TorchtuneLoss

POLICY_CHOSEN = torch.tensor([-20.0, -3.0], requires_grad=True)
REST = (torch.tensor([-24.0, -5.0]), torch.tensor([-21.5, -3.5]), torch.tensor([-23.0, -4.0]))


def test_losses_and_rewards():
    losses, chosen, rejected = FourTensorLoss("dpo", beta=0.1)(POLICY_CHOSEN, *REST)
    wanted = prefloss.get("dpo", beta=0.1)(prefloss.Pairs.of([1.5, 0.5], [-1.0, -1.0]))
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(chosen, torch.tensor([0.15, 0.05]))
    torch.testing.assert_close(rejected, torch.tensor([-0.1, -0.1]))
    assert losses.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad


def test_token_counts_for_losses_that_average():
    loss = FourTensorLoss(prefloss.get("ipo", tau=0.1))
    with pytest.raises(ValueError, match="tokens: got None"):
        loss(POLICY_CHOSEN, *REST)
    tokens = {"chosen_tokens": torch.tensor([10, 4]), "rejected_tokens": torch.tensor([8, 5])}
    losses, _, _ = loss(POLICY_CHOSEN, *REST, **tokens)
    assert losses[0].item() == pytest.approx((0.15 + 0.125 - 5) ** 2, rel=1e-5)


def test_without_a_reference():
    losses, chosen, _ = FourTensorLoss("cpo", beta=0.1, nll_weight=0.0)(
        POLICY_CHOSEN, REST[0], chosen_tokens=torch.tensor([10, 4]), rejected_tokens=torch.tensor([8, 5])
    )
    torch.testing.assert_close(losses, torch.nn.functional.softplus(-0.1 * torch.tensor([4.0, 2.0])))
    torch.testing.assert_close(chosen, 0.1 * POLICY_CHOSEN.detach())
    with pytest.raises(ValueError, match="dpo: reference: got None"):
        FourTensorLoss("dpo")(POLICY_CHOSEN, REST[0])


def test_it_is_called_as_a_module_is():
    loss = FourTensorLoss("hinge")
    assert torch.equal(loss.forward(POLICY_CHOSEN, *REST)[0], loss(POLICY_CHOSEN, *REST)[0])
    assert repr(loss) == "FourTensorLoss(hinge(beta=0.1))"


def test_what_it_refuses():
    with pytest.raises(TypeError, match="'kto', which takes Labels, expected a pair loss"):
        FourTensorLoss("kto")
    with pytest.raises(TypeError, match="expected them in the Loss"):
        FourTensorLoss(prefloss.get("dpo"), beta=0.1)


class Linear(torch.nn.Module):
    """Stands in for a model: log-probs of two completions from two parameters."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([-20.0, -24.0]))

    def sums(self, batch):
        return batch * self.weight[0], batch * self.weight[1]


def openrlhf_step(loss_fn, policy, reference, batch):
    """What OpenRLHF's DPOTrainer does with its loss in a step (openrlhf/trainer/dpo_trainer.py, August 2026)."""
    with torch.no_grad():
        known = reference.sums(batch)
    preference_loss, chosen_reward, reject_reward = loss_fn(*policy.sums(batch), *known)
    loss = preference_loss + 0 * 0.5
    loss.backward()
    return {
        "loss": preference_loss.item(),
        "acc": (chosen_reward > reject_reward).float().mean().item(),
        "chosen_reward": chosen_reward.mean().item(),
        "reject_reward": reject_reward.mean().item(),
    }


def test_in_the_slot_of_openrlhf():
    policy, reference = Linear(), Linear()
    with torch.no_grad():
        reference.weight += torch.tensor([-1.5, 1.0])
    found = openrlhf_step(OpenRLHFLoss("dpo", beta=0.1), policy, reference, torch.ones(4))
    assert found == pytest.approx(
        {"loss": 0.575939, "acc": 1.0, "chosen_reward": 0.15, "reject_reward": -0.1}
    )
    # d/dw of -log sigmoid(beta * margin), summed over equal pairs and averaged.
    assert policy.weight.grad.tolist() == pytest.approx([-0.0437823, 0.0437823], abs=1e-6)
    assert reference.weight.grad is None


@dataclass
class Outputs:
    """As torchtune's ChosenRejectedOutputs."""

    chosen_logps: torch.Tensor | None
    rejected_logps: torch.Tensor | None
    chosen_logits: torch.Tensor | None
    rejected_logits: torch.Tensor | None


def torchtune_step(loss_fn, policy, reference, batch):
    """What torchtune's DPO recipes do with their loss (recipes/full_dpo_distributed.py, April 2026)."""
    outputs = Outputs(*policy.sums(batch), batch, batch)
    # The recipe lets go of the logits before it calls the loss.
    del outputs.chosen_logits, outputs.rejected_logits
    known = Outputs(None, None, None, None)
    if not loss_fn.is_reference_free:
        with torch.no_grad():
            known = Outputs(*reference.sums(batch), batch, batch)
        del known.chosen_logits, known.rejected_logits
    loss, chosen_rewards, rejected_rewards = loss_fn(outputs, known)
    accuracies = (chosen_rewards > rejected_rewards).float()
    assert loss.shape == chosen_rewards.shape == rejected_rewards.shape == accuracies.shape == batch.shape
    loss = loss.mean() / 2
    loss.backward()
    return loss.item(), accuracies.mean().item()


def test_in_the_slot_of_torchtune():
    policy, reference = Linear(), Linear()
    with torch.no_grad():
        reference.weight += torch.tensor([-1.5, 1.0])
    component = TorchtuneLoss(loss="dpo", beta=0.1)
    loss, accuracy = torchtune_step(component, policy, reference, torch.ones(4))
    assert (loss, accuracy) == (pytest.approx(0.575939 / 2), 1.0)
    assert policy.weight.grad.tolist() == pytest.approx([-0.0437823 / 2, 0.0437823 / 2], abs=1e-6)
    free = TorchtuneLoss(loss="slic_hf", delta=5.0, nll_weight=0.0)
    assert free.is_reference_free
    loss, _ = torchtune_step(free, Linear(), None, torch.ones(4))
    assert loss == pytest.approx((5 - 4) / 2)


@pytest.mark.parametrize("slot", [OpenRLHFLoss, TorchtuneLoss])
def test_a_slot_refuses_what_it_cannot_feed(slot):
    with pytest.raises(ValueError, match=rf"ipo\(.*which is all that {slot.__name__} receives.*tokens"):
        slot("ipo")
    slot("ipo", per_token=False)
    with pytest.raises(ValueError, match=r"odpo\(.*score"):
        slot("odpo")


def test_evaluation_moves_no_state():
    loss_fn = OpenRLHFLoss("bco_pair")
    batch = [torch.tensor([-20.0, -3.0]), *REST]
    with torch.no_grad():
        loss_fn(*batch)
    before = loss_fn.four.loss.state_dict()
    batch[0].requires_grad_()
    loss_fn(*batch)
    assert loss_fn.four.loss.state_dict() != before
