"""Sequences as the leaves of a tree."""

import pytest
import torch

from prefloss.worlds.sequences import enumerate_sequences


@pytest.mark.parametrize(("words", "longest", "count"), [(1, 1, 2), (1, 3, 4), (2, 5, 63), (3, 4, 121)])
def test_leaves_of_any_table_sum_to_one(words, longest, count):
    sequences = enumerate_sequences(words, longest)
    table = torch.log_softmax(torch.randn(sequences.prefixes, words + 1).double(), -1)
    assert len(sequences.tokens) == count
    total = sequences.log_probs(table).sum(-1).exp().sum()
    torch.testing.assert_close(total, torch.ones(()).double())


def test_a_sequence_ends_at_its_end_token_or_at_the_longest_length():
    sequences = enumerate_sequences(words=2, longest=3)
    for tokens, mask in zip(sequences.tokens, sequences.mask, strict=True):
        said = tokens[mask].tolist()
        assert 2 not in said[:-1]
        assert said[-1] == 2 or len(said) == 3


def test_prefixes_are_shared_by_the_sequences_that_begin_alike():
    sequences = enumerate_sequences(words=2, longest=3)
    told = [tuple(t[m].tolist()) for t, m in zip(sequences.tokens, sequences.mask, strict=True)]
    first, second = told.index((0, 1, 2)), told.index((0, 1, 0))
    assert sequences.prefix[first].tolist() == sequences.prefix[second].tolist()
    # What stands before the third token is the prefix (0, 1), whose last token is 1.
    assert sequences.previous[sequences.prefix[first]].tolist() == [2, 0, 1]


@pytest.mark.parametrize("sizes", [{"words": 0, "longest": 2}, {"words": 2, "longest": 0}])
def test_refuses_nothing_to_spell_with(sizes):
    with pytest.raises(ValueError, match=r"(words|longest): got 0, expected at least 1"):
        enumerate_sequences(**sizes)
