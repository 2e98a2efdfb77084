"""The supervised warm start."""

import copy

import pytest
import torch

from prefloss.demo.model import tiny_llama, word_tokenizer
from prefloss.demo.warm_start import WarmStart, warm_start

ROWS = [([3, 4], [5, 6, 1]), ([3], [5, 1])]


def model():
    return tiny_llama(word_tokenizer(["a b c d e"]), hidden=16, layers=1, heads=2)


def test_the_completions_become_likely():
    losses = []
    final = warm_start(
        model(),
        ROWS,
        padding=0,
        steps=60,
        batch_size=4,
        learning_rate=1e-2,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 60
    assert losses[0] > 1.5
    assert final < 0.3
    assert final == pytest.approx(sum(losses[-6:]) / 6)


def test_the_same_seed_trains_the_same_weights():
    trained = [model() for _ in range(2)]
    for each in trained:
        warm_start(each, ROWS, padding=0, steps=3, batch_size=2)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_stopped_at_any_step_it_ends_with_the_same_weights(tmp_path):
    """AUDIT M4: with dropout, too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    first = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=16))

    def warming(model):
        return WarmStart(model, ROWS, padding=0, steps=5, batch_size=2)

    whole = copy.deepcopy(first)
    loss = warming(whole).run()
    for stop in range(1, 5):
        stopped = warming(copy.deepcopy(first))

        def on_step(step, loss, warm=stopped, stop=stop):
            if step == stop:
                torch.save(warm.state_dict(), tmp_path / "state.pt")
                raise InterruptedError

        with pytest.raises(InterruptedError):
            stopped.run(on_step)
        other = copy.deepcopy(first)
        resumed = warming(other)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.run() == loss
        for a, b in zip(whole.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_loss_that_is_no_number_is_said():
    with pytest.raises(FloatingPointError, match=r"the loss of warm-up step [2-9] is"):
        warm_start(model(), ROWS, padding=0, steps=9, batch_size=2, learning_rate=1e30)


def test_padding_tokens_and_prompts_are_not_learned():
    # A row without completion tokens has loss 0 and moves nothing, weight decay aside.
    assert warm_start(model(), [([3, 4], [])], padding=0, steps=1) == 0.0


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows: got none, expected at least one prompt with a completion"):
        warm_start(model(), [], padding=0, steps=1)
