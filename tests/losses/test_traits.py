"""What losses say of themselves, against what their gradients and hyperparameters show."""

from dataclasses import replace

import pytest
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs, PerToken, Rankings
from prefloss.diagnosis import resists_falling

LENGTH = 16


def fallen_pair(needs):
    """A pair whose chosen completion lost 20 nats against the reference, the rejected one 40; and both policies."""
    policy = [torch.tensor([h - 40.0], requires_grad=True) for h in (-20.0, -40.0)]
    each = torch.ones(1, LENGTH)
    sides = [
        PerToken(
            policy=(side / LENGTH).unsqueeze(-1) * each,
            reference=-40.0 / LENGTH * each,
            mask=each.bool(),
            log_sum_sq=-each,
            kl=0.1 * each,
            reverse_kl=0.1 * each,
            reference_entropy=0.3 * each,
            weight=each,
        ).log_ratios()
        for side in policy
    ]
    pairs = Pairs(
        *sides,
        score_chosen=[1.0] if "scores" in needs else None,
        score_rejected=[0.0] if "scores" in needs else None,
        gold=LogRatios([-40.0], [-40.0], [LENGTH]) if "gold" in needs else None,
        embedding=torch.ones(1, 2) if "embedding" in needs else None,
    )
    return pairs, policy


def pull_and_push(loss):
    """How strongly a loss raises the chosen and lowers the rejected completion of the fallen pair."""
    feedback, policy = fallen_pair(loss.needs)
    if loss.spec.feedback is Labels:
        baseline = torch.full((2,), 0.5) if "baseline" in loss.needs else None
        feedback = replace(feedback.to_labels(), kl=torch.tensor(0.0), baseline=baseline)
    up, down = torch.autograd.grad(loss.eval()(feedback).sum(), policy, allow_unused=True)
    return (0.0 if up is None else -up.item()), (0.0 if down is None else down.item())


@pytest.mark.parametrize(
    "name", [name for name, spec in prefloss.specs.items() if spec.feedback is not Rankings]
)
def test_a_loss_that_holds_chosen_completions_pulls_harder_than_it_pushes(name):
    pull, push = pull_and_push(prefloss.get(name))
    assert prefloss.specs[name].holds_chosen == (pull > 0 and pull >= 1.5 * push)


@pytest.mark.parametrize("name", ["dpo", "dpop", "kto_zero", "1.0*dpop + 0.5*apo_zero"])
def test_the_diagnosis_measures_what_the_loss_declares(name):
    loss = prefloss.get(name)
    assert resists_falling(loss) == loss.spec.holds_chosen


def test_a_sum_holds_chosen_completions_if_all_its_terms_do():
    assert prefloss.get("dpop + 0.1*apo_zero").spec.holds_chosen
    assert not prefloss.get("dpop + 0.1*dpo").spec.holds_chosen


@pytest.mark.parametrize(
    ("loss", "couples", "reads"),
    [
        ("dpo", False, False),
        ("aot", True, False),
        ("kto", True, True),
        ("kto(kl_baseline=mismatched)", True, True),
        ("kto(kl_baseline=column)", False, False),
        ("kto(kl_baseline=zero)", False, False),
        ("kto(kl_baseline=running_mean)", False, False),
        ("kto_zero", False, False),
        ("bco", True, False),
        ("dpo + 0.5*kto(kl_baseline=zero)", False, False),
        ("dpo + 0.5*kto", True, True),
        ("dpo + aot", True, False),
    ],
)
def test_what_a_loss_looks_at_depends_on_its_hyperparameters(loss, couples, reads):
    loss = prefloss.get(loss)
    assert (loss.couples_batch, loss.reads_mismatched) == (couples, reads)


def test_a_baseline_of_ones_own_may_read_mismatched_completions():
    loss = prefloss.get("kto", kl_baseline=lambda labels: torch.tensor(0.0))
    assert loss.reads_mismatched
    assert not loss.couples_batch


def test_counts_of_the_terms():
    chosen = LogRatios([-2.0, -4.0], [-2.0, -4.0], [2, 2])
    pairs = Pairs(chosen, LogRatios([-3.0, 0.0], [-3.0, 0.0], [3, 0]))
    assert prefloss.get("dpo").counts(pairs).tolist() == [1]
    # nll reads the chosen side alone, npo the rejected one; kto_zero counts each side as a label.
    loss = prefloss.get("dpo + nll + npo + kto_zero")
    assert loss.counts(pairs).tolist() == [1, 2, 1, 3]
    with pytest.raises(TypeError, match="feedback: got Labels, expected Pairs"):
        loss.counts(pairs.to_labels())
