"""The small model: text round-trips, weights follow the seed."""

import pytest
import torch

from prefloss.demo.model import END, tiny_llama, train_tokenizer, word_tokenizer
from prefloss.worlds.language import LanguageWorld


def test_every_sentence_of_the_world_round_trips_word_by_word():
    drawn = LanguageWorld(seed=0)
    rows = [drawn.spoken() for _ in range(1000)]
    tokenizer = word_tokenizer(text for row in rows for text in row.values())
    assert len(tokenizer) < 100
    later = [drawn.spoken() for _ in range(200)]
    for row in later:
        ids = tokenizer(text=row["completion"])["input_ids"]
        assert tokenizer.decode(ids) == row["completion"]
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("text", ["plain", "déjà vu 你好 \u2028\n\t", "a" * 300, ""])
def test_any_text_round_trips_through_bytes(text):
    tokenizer = train_tokenizer(["some text to learn from"], vocab_size=270)
    assert tokenizer.decode(tokenizer(text=text)["input_ids"]) == text


def test_the_end_token_is_one_token():
    for tokenizer in (word_tokenizer(["a b"]), train_tokenizer(["a b"], vocab_size=260)):
        assert tokenizer(text=f"a b{END}")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_chat_template_renders_a_prompt_as_the_start_of_the_whole():
    tokenizer = train_tokenizer(["a b"], vocab_size=260)
    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(prompt + answer, tokenize=False).startswith(start)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size: got 100, expected at least 258"):
        train_tokenizer(["a"], vocab_size=100)


def test_weights_follow_the_seed_and_leave_the_global_one_alone():
    tokenizer = word_tokenizer(["a b c"])

    def weights(seed):
        model = tiny_llama(tokenizer, hidden=8, layers=1, heads=1, seed=seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
