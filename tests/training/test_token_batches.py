"""Batches by tokens: every example once, as many batches for each process, never above the budget."""

import itertools
import math
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from prefloss.training import Lengths, PreferenceCollator, TokenBatchSampler, token_lengths
from tests import tiny

LAYOUTS = ("padded", "packed", "shared_prefix")


@st.composite
def samplers(draw):
    """Lengths of any kind, a budget that fits two of the fewest, a number of processes, a seed."""
    count = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["padded", "summed", "mismatched"]))
    least = 2 if kind == "mismatched" else 1
    examples = draw(st.integers(count * least, 60))
    parts = 2 if kind == "mismatched" else 1
    length = st.integers(1, draw(st.sampled_from([1, 3, 40, 4000])))
    tokens = torch.tensor([[draw(length) for _ in range(parts)] for _ in range(examples)], dtype=torch.int32)
    rows = torch.tensor(
        [draw(st.integers(1, 8)) if kind == "padded" else 1 for _ in range(examples)], dtype=torch.int32
    )
    lengths = Lengths(
        tokens, rows, kind != "summed", draw(st.sampled_from([None, 30])) if parts == 2 else None, least
    )
    longest = max(lengths.of_batch([i]) for i in range(examples))
    widest = lengths.width(tokens.amax(0).tolist())
    smallest = {"padded": int(rows.max()) * 2 * widest, "summed": 2 * longest, "mismatched": 5 * widest}[kind]
    budget = draw(st.integers(smallest, 8 * smallest))
    return lengths, budget, count, draw(st.integers(0, 2**40))


def dealt(case, epoch=0):
    """The batches of each process."""
    lengths, budget, count, seed = case
    made = []
    for rank in range(count):
        sampler = TokenBatchSampler(lengths, budget, seed=seed, num_replicas=count, rank=rank)
        sampler.set_epoch(epoch)
        made.append([*sampler])
        assert len(made[-1]) == len(sampler)
    return made


@settings(max_examples=60, deadline=None)
@given(samplers(), st.integers(0, 9))
def test_every_example_once_within_the_budget(case, epoch):
    lengths, budget, _, _ = case
    made = dealt(case, epoch)
    assert len({len(batches) for batches in made}) == 1
    batches = [batch for of_rank in made for batch in of_rank]
    assert sorted(itertools.chain(*batches)) == [*range(len(lengths))]
    for batch in batches:
        assert len(batch) >= lengths.least
        assert lengths.of_batch(batch) <= budget


@settings(max_examples=30, deadline=None)
@given(samplers(), st.integers(0, 3), st.data())
def test_the_same_again_and_resumed_at_any_batch(case, epoch, data):
    lengths, budget, count, seed = case
    options = {"seed": seed, "num_replicas": count, "rank": data.draw(st.integers(0, count - 1))}
    sampler, other = (TokenBatchSampler(lengths, budget, **options) for _ in range(2))
    sampler.set_epoch(epoch)
    at = data.draw(st.integers(0, len(sampler)))
    iterator = iter(sampler)
    begun = [*itertools.islice(iterator, at)]
    state = sampler.state_dict()
    rest = [*iterator]
    assert begun + rest == dealt(case, epoch)[options["rank"]]
    other.load_state_dict(state)
    other.set_epoch(state["epoch"])
    assert [*other] == rest
    # The epochs after it are whole.
    assert [*other] == begun + rest
    assert state == TokenBatchSampler(lengths, budget, **options).state_dict(0) | {
        "epoch": epoch,
        "batches": at,
    }


@settings(max_examples=30, deadline=None)
@given(samplers())
def test_all_batches_are_dealt_in_turn(case):
    """As accelerate deals them: batch i goes to process i mod the number of processes."""
    lengths, budget, count, seed = case
    whole = [*TokenBatchSampler(lengths, budget, seed=seed, num_replicas=count, rank="all")]
    assert [whole[rank::count] for rank in range(count)] == dealt(case)


def log_normal(examples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(examples, generator=generator) * 0.7 + 5).exp().clamp(8, 2000).long()


def test_epochs_and_seeds_differ_in_batches_and_order():
    lengths = log_normal(400)
    sampler = TokenBatchSampler(lengths, 8192)
    first = [*sampler]
    sampler.set_epoch(1)
    second = [*sampler]
    other = [*TokenBatchSampler(lengths, 8192, seed=7)]
    for one, two in itertools.combinations([first, second, other], 2):
        assert len(one) == len(two)
        # Other company, and not only another order.
        assert len(set(map(frozenset, one)) & set(map(frozenset, two))) < len(one) / 2
    # The longest do not come first.
    widths = [int(lengths[batch].max()) for batch in first]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_batches_are_nearly_full():
    lengths = log_normal(4000)
    sampler = TokenBatchSampler(lengths, 8192, num_replicas=3, rank="all")
    assert int(lengths.sum()) / (len(sampler) * 8192) > 0.92


def test_a_round_is_of_near_lengths():
    lengths = log_normal(4000)
    whole = [*TokenBatchSampler(lengths, 8192, num_replicas=4, rank="all")]
    widths = torch.tensor([int(lengths[batch].max()) for batch in whole]).view(-1, 4)
    assert float((widths.amin(1) / widths.amax(1)).median()) > 0.9


def test_fewer_examples_than_processes():
    with pytest.raises(
        ValueError, match=r"lengths: got 2 examples, expected at least 3: a batch for each of 3"
    ):
        TokenBatchSampler([5, 6], 100, num_replicas=3, rank=0)


def test_batches_of_one_example_cannot_always_be_dealt():
    message = re.escape(
        "max_tokens: got 10, at which nearly every batch has one example: 5 batches of 5 examples"
    )
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler([10] * 5, 10, num_replicas=2, rank=0)
    assert len(TokenBatchSampler([10] * 6, 10, num_replicas=2, rank=0)) == 3
    # Rounding the lengths up would leave one in each batch.
    assert len(TokenBatchSampler([99, 99, 99, 99, 101], 198, num_replicas=2, rank=0)) == 2


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        (
            [3, 20, 4, 30],
            {},
            ValueError,
            "row 1: got 20 tokens, expected at most max_tokens=16 together; so of 2 of 4",
        ),
        ([], {}, ValueError, "lengths: got no examples"),
        ([3, 0], {}, ValueError, "lengths: got 0 at 1, expected at least 1"),
        ([3.0], {}, TypeError, "lengths: got torch.float32"),
        ([[3]], {}, TypeError, "expected whole numbers, [examples]"),
        (["a"], {}, TypeError, "lengths: got list"),
        ([3], {"max_tokens": 0}, ValueError, "max_tokens: got 0"),
        ([3], {"seed": -1}, ValueError, "seed: got -1"),
        ([3], {"rank": 1}, ValueError, "rank: got 1 with num_replicas=None, expected both or neither"),
        (
            [3],
            {"rank": 1, "num_replicas": 1},
            ValueError,
            "rank: got 1, expected a number below num_replicas=1",
        ),
        ([3], {"rank": "own"}, TypeError, "rank: got 'own'"),
    ],
)
def test_refused(lengths, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TokenBatchSampler(lengths, **{"max_tokens": 16, **options})


def test_the_state_of_another_plan():
    state = TokenBatchSampler([3, 4, 5, 6], 12).state_dict()
    for other, name in (
        (TokenBatchSampler([3, 4, 5, 6], 13), "max_tokens: got 13"),
        (TokenBatchSampler([3, 4, 5, 6], 12, seed=1), "seed: got 1"),
        (TokenBatchSampler([3, 4, 6, 5], 12), "lengths: got"),
        (TokenBatchSampler([3, 4, 5, 6], 12, num_replicas=2, rank=0), "processes: got 2"),
    ):
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)
    sampler = TokenBatchSampler([3, 4, 5, 6], 12)
    with pytest.raises(ValueError, match="state: got 9 batches"):
        sampler.load_state_dict({**state, "batches": 9})
    with pytest.raises(ValueError, match="expected what state_dict gave"):
        sampler.load_state_dict({"epoch": 0})


def test_who_would_deal_again():
    """accelerate and Lightning ask for `batch_size` before they do."""
    own = TokenBatchSampler([3, 4, 5, 6], 12, num_replicas=2, rank=1)
    with pytest.raises(ValueError, match="the trainer would deal the batches out again"):
        own.batch_size  # noqa: B018
    for sampler in (
        TokenBatchSampler([3], 12),
        TokenBatchSampler([3, 4], 12, num_replicas=2, rank="all"),
    ):
        assert not hasattr(sampler, "batch_size")


ROWS = {
    "pairs": tiny.pairs,
    "labels": tiny.labels,
    "rankings": tiny.rankings,
    "scores": tiny.scored_pairs,
    "mismatched": tiny.labels,
}


def computed(batch):
    """Tokens of the blocks that a model gets."""
    return [batch[name].numel() for name in ("input_ids", "kl_input_ids") if name in batch]


@pytest.mark.filterwarnings("ignore:.*completion without tokens")
@pytest.mark.filterwarnings("ignore:.*identical")
@pytest.mark.parametrize("max_length", [None, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ROWS)
def test_counted_as_the_collator_makes_them(kind, layout, max_length):
    data = ROWS[kind](30)
    collate = PreferenceCollator(
        tiny.tokenizer(), layout=layout, max_length=max_length, mismatched=kind == "mismatched"
    )
    lengths = token_lengths(data, collate)
    exact = kind != "mismatched"
    if exact:
        found = [computed(collate([row]))[0] for row in data]
        assert [lengths.of_batch([i]) for i in range(len(data))] == found
    sampler = TokenBatchSampler(lengths, 90, seed=3)
    for batch in sampler:
        made = computed(collate([data[i] for i in batch]))
        assert max(made) <= lengths.of_batch(batch) <= 90
        assert not exact or layout == "shared_prefix" or made[0] == lengths.of_batch(batch)
    assert sorted(itertools.chain(*sampler)) == [*range(30)]


def test_a_plain_loader():
    data = tiny.pairs(20)
    collate = PreferenceCollator(tiny.tokenizer())
    sampler = TokenBatchSampler.of(data, collate, max_tokens=80, seed=1)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    batches = [*loader]
    assert len(batches) == len(loader) == len(sampler)
    assert sum(batch.examples for batch in batches) == 20
    assert max(batch["input_ids"].numel() for batch in batches) <= 80


def test_rows_of_images_are_counted_without_reading_them():
    rows = [
        {
            "prompt_ids": [5, 5, 6],
            "chosen_ids": [7],
            "rejected_ids": [8, 9],
            "pixel_values": torch.zeros(1, 2, 2),
        }
        for _ in range(3)
    ]
    collate = PreferenceCollator(model_inputs=["pixel_values"])
    assert token_lengths(rows, collate).tokens.flatten().tolist() == [5, 5, 5]
    data = Dataset.from_list([{**row, "pixel_values": row["pixel_values"].tolist()} for row in rows])
    assert token_lengths(data, collate).tokens.flatten().tolist() == [5, 5, 5]


def test_measuring_names_the_row():
    rows = [*tiny.pairs(3), {"prompt": "w1", "chosen": 3, "rejected": " w2"}]
    with pytest.raises(ValueError, match=r"row 3: column 'chosen': got 3"):
        token_lengths(rows, PreferenceCollator(tiny.tokenizer()))
    with pytest.raises(TypeError, match=r"data: got IterableDataset, expected rows that have a length"):
        token_lengths(tiny.pairs(3).to_iterable_dataset(), PreferenceCollator(tiny.tokenizer()))
    with pytest.raises(ValueError, match=r"mismatched: got data of paired"):
        token_lengths(tiny.pairs(3), PreferenceCollator(tiny.tokenizer(), mismatched=True))
    rows = [{"prompt_ids": [3] * 50, "chosen_ids": [4], "rejected_ids": [5] * 50}]
    with pytest.raises(ValueError, match=r"row 0: got 2 rows of 100 tokens, expected at most max_tokens=150"):
        TokenBatchSampler.of(rows, PreferenceCollator(), 150)


def test_mismatched_rows_must_fit_together():
    data = tiny.labels(9)
    collate = PreferenceCollator(tiny.tokenizer(), mismatched=True)
    with pytest.raises(
        ValueError, match=r"max_tokens: got 30, expected at least \d+: with mismatched rows, 3 rows"
    ):
        TokenBatchSampler.of(data, collate, 30)


def test_a_million_rows_take_little_memory():
    lengths = Lengths.of(log_normal(1_000_000))
    sampler = TokenBatchSampler(lengths, 65536, num_replicas=8, rank=0)
    assert lengths.tokens.element_size() + lengths.rows.element_size() == 8
    assert len(sampler) == math.ceil((len(sampler._plan().starts) - 1) / 8)
    assert len(next(iter(sampler))) > 8
