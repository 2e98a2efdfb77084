"""Parameters to log-probs."""

import pytest
import torch

from prefloss.worlds import LogLinear, Tabular, TokenTable, bandit, featured, spelled

FAMILIES = {
    "tabular": lambda: Tabular(bandit(prompts=3)),
    "log-linear": lambda: LogLinear(featured()),
    "token table": lambda: TokenTable(spelled()),
    "shared token table": lambda: TokenTable(spelled(), shared=True),
}
families = pytest.mark.parametrize("policy", [make() for make in FAMILIES.values()], ids=FAMILIES)


@families
def test_parameters_of_zero_are_the_reference(policy):
    log_probs = policy.log_probs(torch.zeros(policy.shape).double())
    torch.testing.assert_close(log_probs, policy.world.reference)


@families
def test_any_parameters_give_probabilities_that_sum_to_one(policy):
    log_probs = policy.log_probs(torch.randn(2, 5, *policy.shape).double())
    assert log_probs.shape == (2, 5, *policy.world.reward.shape)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:-1]).double())


@families
def test_runs_do_not_touch_one_another(policy):
    theta = torch.randn(4, *policy.shape).double()
    torch.testing.assert_close(policy.log_probs(theta)[2], policy.log_probs(theta[2]))


@pytest.mark.parametrize("shared", [False, True])
def test_log_probs_of_tokens_add_up_to_those_of_the_sequence(shared):
    policy = TokenTable(spelled(), shared=shared)
    theta = torch.randn(3, *policy.shape).double()
    torch.testing.assert_close(policy.per_token(theta)["policy"].sum(-1), policy.log_probs(theta))
    reference = policy.per_token_reference()
    torch.testing.assert_close(reference["reference"].sum(-1), policy.world.reference)
    assert torch.equal(reference["mask"].sum(-1), policy.world.lengths)


def test_kl_of_tokens_adds_up_to_that_of_sequences():
    """KL(policy || reference) of sequences is the expected sum of the KLs at their prefixes."""
    policy = TokenTable(spelled())
    theta = torch.randn(policy.shape).double()
    log_probs, tokens = policy.log_probs(theta), policy.per_token(theta)
    mask = policy.per_token_reference()["mask"]
    by_token = (log_probs.exp() * torch.where(mask, tokens["reverse_kl"], 0.0).sum(-1)).sum(-1)
    whole = (log_probs.exp() * (log_probs - policy.world.reference)).sum(-1)
    torch.testing.assert_close(by_token, whole)


def test_values_over_the_vocabulary_by_hand():
    policy = TokenTable(spelled(prompts=1, words=1, longest=1))
    values = policy.per_token(torch.randn(policy.shape).double())
    p, q = values["policy"].flatten().exp(), policy.per_token_reference()["reference"].flatten().exp()
    torch.testing.assert_close(values["log_sum_sq"].flatten()[0], (p**2).sum().log())
    torch.testing.assert_close(values["kl"].flatten()[0], (q * (q / p).log()).sum())
    entropy = policy.per_token_reference()["reference_entropy"].flatten()[0]
    torch.testing.assert_close(entropy, -(q * q.log2()).sum())


def test_families_refuse_a_world_that_lacks_what_they_see():
    with pytest.raises(ValueError, match="without features"):
        LogLinear(bandit())
    with pytest.raises(ValueError, match="no tokens"):
        TokenTable(bandit())
