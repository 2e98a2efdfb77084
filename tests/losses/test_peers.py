"""Peers as a third witness: the losses of Liger, and of TRL's CPO, ORPO and A2PO trainers, on the same tensors.

TRL's DPO and KTO trainers witness in tests/integrations/trl/test_witness.py. Where a peer departs from the paper, the
case says so and pins the setting that reproduces it.
"""

from types import SimpleNamespace

import pytest
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="the test extra installs liger-kernel")
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction as LigerCPO  # noqa: E402
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as LigerDPO  # noqa: E402
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction as LigerKTO  # noqa: E402
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction as LigerORPO  # noqa: E402
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction as LigerSimPO  # noqa: E402

N = 7
FULL_TARGET = torch.zeros(2 * N, 1)


@pytest.fixture
def sides():
    """Chosen and rejected completions with a policy that asks for gradients."""
    generator = torch.Generator().manual_seed(11)

    def side():
        tokens = torch.randint(3, 12, (N,), generator=generator)
        policy = -tokens * (0.5 + 2 * torch.rand(N, generator=generator))
        reference = policy + torch.randn(N, generator=generator)
        return policy.requires_grad_(), reference, tokens

    return side(), side()


def as_pairs(sides):
    return Pairs(*(LogRatios(policy, reference, tokens) for policy, reference, tokens in sides))


def assert_same(ours, theirs, leaves):
    """Values and gradients agree."""
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    mine_and_theirs = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs))
    for mine, other in zip(*mine_and_theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "options", "name", "given"),
    [
        ("sigmoid", {}, "dpo", {"beta": 0.1}),
        ("hinge", {}, "hinge", {"beta": 0.1}),
        ("exo_pair", {"label_smoothing": 1e-3}, "exo_pair", {"beta": 0.1, "epsilon": 1e-3}),
        ("nca_pair", {}, "nca_pair", {"beta": 0.1}),
        ("robust", {"label_smoothing": 0.1}, "robust_dpo", {"beta": 0.1, "epsilon": 0.1}),
        # Liger's has no reward shift.
        ("bco_pair", {}, "liger:bco_pair", {"beta": 0.1}),
        ("sppo_hard", {}, "sppo_hard", {"beta": 0.1}),
        ("apo_zero", {}, "apo_zero", {"beta": 0.1}),
        ("apo_down", {}, "apo_down", {"beta": 0.1}),
        ("discopop", {"discopop_tau": 0.05}, "discopop", {"beta": 0.1, "tau": 0.05}),
        # Liger ignores label smoothing with sigmoid: its number is plain DPO's.
        ("sigmoid", {"label_smoothing": 0.3}, "dpo", {"beta": 0.1}),
    ],
)
def test_liger_dpo(sides, loss_type, options, name, given):
    (chosen, ref_chosen, _), (rejected, ref_rejected, _) = sides
    theirs = LigerDPO.preference_loss_fn(
        chosen, rejected, FULL_TARGET, ref_chosen, ref_rejected, beta=0.1, loss_type=loss_type, **options
    )[0]
    assert_same(prefloss.get(name, **given).mean(as_pairs(sides)), theirs, [chosen, rejected])


def means(sides):
    return [policy / tokens for policy, _, tokens in sides]


def test_liger_sigmoid_norm(sides):
    (chosen, ref_chosen, n_w), (rejected, ref_rejected, n_l) = sides
    theirs = LigerDPO.preference_loss_fn(
        chosen / n_w, rejected / n_l, FULL_TARGET, ref_chosen / n_w, ref_rejected / n_l, beta=5.0
    )[0]
    assert_same(prefloss.get("ln_dpo", beta=5.0).mean(as_pairs(sides)), theirs, [chosen, rejected])


def test_liger_simpo_has_no_nll_inside(sides):
    chosen, rejected = means(sides)
    theirs = LigerSimPO.preference_loss_fn(chosen, rejected, FULL_TARGET, beta=2.0, gamma=1.0)[0]
    leaves = [sides[0][0], sides[1][0]]
    assert_same(prefloss.get("simpo", beta=2.0, gamma=1.0).mean(as_pairs(sides)), theirs, leaves)


def test_liger_orpo_and_cpo_without_their_nll(sides):
    leaves = [sides[0][0], sides[1][0]]
    pairs = as_pairs(sides)
    theirs = LigerORPO.preference_loss_fn(*means(sides), FULL_TARGET, beta=0.1)[0]
    nll = prefloss.get("nll").mean(pairs)
    assert_same(prefloss.get("orpo", odds_weight=0.1).mean(pairs), theirs + nll, leaves)
    theirs = LigerCPO.preference_loss_fn(*leaves, FULL_TARGET, beta=0.1)[0]
    nll = prefloss.get("nll").mean(pairs)
    assert_same(prefloss.get("cpo", beta=0.1, nll_weight=1.0).mean(pairs), theirs + nll, leaves)


@pytest.mark.parametrize("kl", [None, torch.tensor(0.3)])
def test_liger_kto(sides, kl):
    (policy, reference, tokens), _ = sides
    desirable = torch.arange(N) % 3 == 0
    theirs = LigerKTO.preference_loss_fn(policy, desirable, torch.zeros(N, 1), reference, beta=0.1, kl=kl)[0]
    labels = Labels(LogRatios(policy, reference, tokens), desirable, kl=kl)
    ours = prefloss.get("kto", kl_baseline="zero" if kl is None else "column").mean(labels)
    assert_same(ours, theirs, [policy])


def trl_cpo(loss_type, chosen, rejected, **settings):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type=loss_type,
        **{"alpha": 0.0, "label_smoothing": 0.0, **settings},
    )
    return CPOTrainer.cpo_loss(stand_in, chosen, rejected)[0].mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "alphapo", "hinge"])
def test_trl_cpo(sides, loss_type):
    leaves = [sides[0][0], sides[1][0]]
    pairs = as_pairs(sides)
    if loss_type == "sigmoid":
        theirs = trl_cpo("sigmoid", *leaves, beta=0.1) + prefloss.get("nll").mean(pairs)
        ours = prefloss.get("cpo", beta=0.1, nll_weight=1.0).mean(pairs)
    elif loss_type == "simpo":
        # TRL adds an NLL of weight 1 to what it calls simpo; cpo_simpo is that sum.
        theirs = trl_cpo("simpo", *means(sides), beta=2.0, simpo_gamma=1.0) + prefloss.get("nll").mean(pairs)
        ours = prefloss.get("cpo_simpo", beta=2.0, gamma=1.0, nll_weight=1.0).mean(pairs)
    elif loss_type == "alphapo":
        theirs = trl_cpo("simpo", *means(sides), beta=2.5, simpo_gamma=0.1, alpha=0.25)
        ours = prefloss.get("alphapo", alpha=0.25, beta=2.5, gamma=0.1).mean(pairs)
    else:
        # TRL's CPO hinge has unit margin and slope beta; SLiC's margin is in nats: delta = 1 / beta, times beta.
        theirs = trl_cpo("hinge", *leaves, beta=0.1)
        ours = 0.1 * prefloss.get("slic_hf", delta=10.0, nll_weight=0.0).mean(pairs)
    assert_same(ours, theirs, leaves)


@pytest.mark.filterwarnings("ignore")
def test_trl_orpo(sides):
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    stand_in = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.1)
    pairs = as_pairs(sides)
    # The losses that it returns are the bonus; its trainer subtracts them from the NLL (of prompt and completion).
    bonus = ORPOTrainer.odds_ratio_loss(stand_in, *means(sides))[0].mean()
    theirs = prefloss.get("nll").mean(pairs) - bonus
    assert_same(prefloss.get("orpo", odds_weight=0.1).mean(pairs), theirs, [sides[0][0], sides[1][0]])
