"""Any pair loss in the form of loops that pass four tensors."""

import pytest
import torch

import prefloss
from prefloss.integrations.four_tensor import FourTensorLoss

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
    with pytest.raises(TypeError, match="'kto', which takes Labels, wanted a pair loss"):
        FourTensorLoss("kto")
    with pytest.raises(TypeError, match="wanted them in the Loss"):
        FourTensorLoss(prefloss.get("dpo"), beta=0.1)
