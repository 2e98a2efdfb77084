"""Measurements: against values by hand, and before anything was trained."""

import copy
import math

import pytest
import torch

from prefloss.data.tokens import encode, encode_prompt
from prefloss.demo.measure import Meter, accuracy, standard_error
from prefloss.demo.model import tiny_llama, word_tokenizer
from prefloss.worlds.language import LanguageWorld, true_reward


@pytest.fixture(scope="module")
def start():
    drawn = LanguageWorld(seed=0)
    pairs = [drawn.pair() for _ in range(30)]
    tokenizer = word_tokenizer(text for pair in pairs for text in pair.values())
    return tokenizer, tiny_llama(tokenizer, hidden=16, layers=1, heads=2), pairs


def meter(start, policy, reference, **options):
    tokenizer, _, pairs = start
    prompts = [pair["prompt"] for pair in pairs]
    usual = {
        "better": [encode(tokenizer, pair["prompt"], pair["chosen"]) for pair in pairs],
        "worse": [encode(tokenizer, pair["prompt"], pair["rejected"]) for pair in pairs],
        "prompts": [encode_prompt(tokenizer, prompt) for prompt in prompts],
        "reward": lambda i, text: true_reward(prompts[i % len(prompts)], text),
        "max_new_tokens": 6,
        "batch_size": 7,
    }
    return Meter(policy=policy, reference=reference, tokenizer=tokenizer, **{**usual, **options})


def constant(model, logits):
    """A copy that predicts the same distribution everywhere."""
    made = copy.deepcopy(model)
    head = torch.nn.Linear(made.config.hidden_size, len(logits))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(logits)
    made.lm_head = head
    return made


def pushed(model):
    """A copy that has moved a little in all directions."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return moved


def test_policy_and_reference_alike_give_zero(start):
    found = meter(start, start[1], copy.deepcopy(start[1]))(0)
    assert (found.chosen, found.rejected, found.kl, found.accuracy) == (0.0, 0.0, 0.0, 0.5)
    assert found.chosen_falling == 0.0
    assert len(found.samples) == 30
    assert -5 <= found.reward <= 5


def test_a_measurement_changes_nothing(start):
    policy = copy.deepcopy(start[1]).train()
    before = torch.get_rng_state()
    measure = meter(start, policy, start[1])
    assert measure(3) == measure(3)
    assert policy.training
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_size_does_not_matter(start):
    policy = pushed(start[1])
    one, many = (meter(start, policy, start[1], batch_size=size, prompts=[])(0) for size in (1, 30))
    assert one.chosen == pytest.approx(many.chosen, abs=1e-4)
    assert one.rejected == pytest.approx(many.rejected, abs=1e-4)


def test_kl_and_log_ratios_of_known_distributions(start):
    # The reference is uniform over all tokens but the end, so that each sample has 8 tokens; the policy gives one
    # token b nats more. With n tokens and p that token's share: KL per token = p b - log((n - 1 + e^b) / n).
    tokenizer, model, _ = start
    size, b, token = len(tokenizer), 2.0, tokenizer.convert_tokens_to_ids(" the")
    logits = torch.zeros(size)
    logits[tokenizer.eos_token_id] = -math.inf
    tilted = logits.clone()
    tilted[token] = b
    n = size - 1
    p = math.exp(b) / (n - 1 + math.exp(b))
    shift = math.log((n - 1 + math.exp(b)) / n)
    prompts = [encode_prompt(tokenizer, "Tell me about the sea:")] * 400
    held_out = [([3], [token, token, 4]), ([3, 4, 5], [4])]
    measure = meter(
        start,
        constant(model, tilted),
        constant(model, logits),
        better=held_out,
        worse=held_out[1:] * 2,
        prompts=prompts,
        max_new_tokens=8,
    )
    found = measure(0)
    assert found.kl == pytest.approx(8 * (p * b - shift), abs=4 * found.kl_error)
    assert found.kl_error < 0.1
    assert found.chosen == pytest.approx((2 * b - 3 * shift - shift) / 2, abs=1e-4)
    assert found.rejected == pytest.approx(-shift, abs=1e-4)
    assert found.chosen_falling == 0.5
    # A win and a tie: mean 0.75, and by hand a standard error of 0.25.
    assert found.accuracy == pytest.approx(0.75)
    assert found.accuracy_error == pytest.approx(0.25)


def test_completions_cut_away_are_left_out(start):
    found = meter(start, pushed(start[1]), start[1], max_length=2, prompts=[])(0)
    assert (found.chosen, found.rejected, found.accuracy) == (None, None, None)


def test_accuracy_of_pairs_and_of_all_against_all():
    better, worse = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 3.0])
    # By hand: win, tie, loss.
    assert accuracy(better, worse, paired=True) == pytest.approx(0.5)
    # 2 beats 1 and 0; 0 ties with 0; the rest lose.
    assert accuracy(better, worse, paired=False) == pytest.approx(2.5 / 9)


def test_standard_error_by_hand():
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(torch.tensor([1.0])) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kept", ["better", "prompts"])
def test_a_policy_that_diverged_is_said(start, value, kept):
    """AUDIT: a run that diverges to NaN dies when sampling."""
    tokenizer, model, _ = start
    policy = constant(model, torch.full((len(tokenizer),), value))
    nothing = {name: () for name in ("better", "worse", "prompts") if name != kept}
    nothing["paired"] = False
    with pytest.raises(FloatingPointError, match="not finite"):
        meter(start, policy, model, **nothing)(step=3)
