"""Batches by tokens in transformers' Trainer: the budget, resuming, accumulation, two processes."""

import itertools
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import DataLoader

from prefloss.integrations.transformers import PreferenceCollator
from prefloss.training import TokenBatchSampler
from tests import tiny
from tests import two_processes as two

BUDGET = 64


class Noting(PreferenceCollator):
    """Keeps the prompts and the number of tokens of each batch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.prompts, self.tokens = [], []

    def __call__(self, examples):
        batch = super().__call__(examples)
        self.prompts.append([example["prompt"] for example in examples])
        self.tokens.append(
            max(batch[name].numel() for name in ("input_ids", "kl_input_ids") if name in batch)
        )
        return batch


def trained(
    folder, loss="dpo", data=None, *, resume=None, max_tokens=BUDGET, mismatched=False, kind=None, **options
):
    collator = Noting(tiny.tokenizer(), mismatched=mismatched)
    data = tiny.pairs(24) if data is None else data
    settings = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **options,
    }
    own = {"max_tokens": max_tokens}
    kinds = {} if kind is None else {"kind": kind}
    trainer = tiny.plain_train(
        folder, loss, data, own=own, resume=resume, collator=collator, **kinds, **settings
    )
    return trainer, collator


@pytest.mark.parametrize(
    ("loss", "data", "mismatched"),
    [
        ("dpo", tiny.pairs, False),
        ("kto", tiny.labels, True),
        ("dpo_pl", tiny.rankings, False),
    ],
)
def test_each_epoch_has_every_row_within_the_budget(tmp_path, loss, data, mismatched):
    data = data(23)
    trainer, collator = trained(tmp_path, loss, data, mismatched=mismatched, max_tokens=100)
    half = len(collator.prompts) // 2
    epochs = collator.prompts[:half], collator.prompts[half:]
    assert all(sorted(itertools.chain(*epoch)) == sorted(data["prompt"]) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert max(collator.tokens) <= 100
    assert trainer.state.global_step == len(collator.prompts)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_within_an_epoch_as_if_never_stopped(tmp_path, accumulate):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": accumulate}
    whole, seen = trained(tmp_path, **options)
    steps = range(3, whole.state.global_step, 3)
    assert len(steps) >= 2
    for step in (steps[0], steps[-1]):
        resumed, rest = trained(tmp_path / "again", resume=str(tmp_path / f"checkpoint-{step}"), **options)
        assert rest.prompts == seen.prompts[-len(rest.prompts) :]
        assert torch.equal(tiny.weights(resumed.model), tiny.weights(whole.model))
    for budget, message in (
        (70, "but the state to go on with was made with 64"),
        (None, "was trained with 64"),
    ):
        with pytest.raises(ValueError, match=f"max_tokens: got {budget}, .*{message}"):
            trained(tmp_path, resume=str(tmp_path / "checkpoint-3"), max_tokens=budget, **options)


def test_a_step_is_the_mean_over_its_examples(tmp_path):
    """Micro-batches of different sizes: one step over a whole epoch is that of all rows at once."""
    data = tiny.pairs(24)
    options = {"num_train_epochs": 1, "learning_rate": 0.1}
    many, collator = trained(tmp_path, data=data, gradient_accumulation_steps=100, **options)
    assert many.state.global_step == 1
    assert len({len(batch) for batch in collator.prompts}) > 1
    one, _ = trained(tmp_path, data=data, max_tokens=10_000, **options)
    torch.testing.assert_close(tiny.weights(many.model), tiny.weights(one.model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("even", [True, False])
def test_dealt_out_by_accelerate(even):
    """Also after the first batches of an epoch were skipped, as `skip_first_batches` does."""
    lengths = [3 + i % 9 for i in range(50)]
    whole = TokenBatchSampler(lengths, 30, num_replicas=3, rank="all")
    for rank in range(3):
        shard = BatchSamplerShard(whole, num_processes=3, process_index=rank, even_batches=even)
        own = [*TokenBatchSampler(lengths, 30, num_replicas=3, rank=rank)]
        assert len(shard) == len(own)
        assert [*shard] == own
        assert [*SkipBatchSampler(shard, 2)] == own[2:]
        with pytest.raises(ValueError, match=r"rank: got .*set TokenBatchSampler\(rank='all'\)"):
            BatchSamplerShard(
                TokenBatchSampler(lengths, 30, num_replicas=3, rank=rank), num_processes=3, process_index=rank
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 9}, r"row \d+: got 2 rows of \d+ tokens, expected at most max_tokens=9"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: got True beside max_tokens"),
        (
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy: got 'sequential' beside max_tokens",
        ),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches: got True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches: got True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: got True"),
        ({"remove_unused_columns": True}, "remove_unused_columns: got True"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
    ],
)
def test_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **options)


def test_a_trainer_with_a_loader_of_its_own(tmp_path):
    class Own(tiny.Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 4, collate_fn=self.data_collator)

    with pytest.raises(
        ValueError, match="max_tokens: got 64, but the trainer's class makes its own training loader"
    ):
        trained(tmp_path, kind=Own)


def test_a_streamed_data_set(tmp_path):
    data = tiny.pairs(8).to_iterable_dataset()
    with pytest.raises(TypeError, match="data: got IterableDataset, expected rows that have a length"):
        trained(tmp_path, data=data, max_steps=2)


def run_of(folder, resume=None):
    """Two epochs on the processes that there are, saved within the second."""
    trainer, collator = trained(
        folder,
        data=tiny.pairs(23),
        resume=resume,
        save_strategy="steps",
        save_steps=4,
        ddp_find_unused_parameters=False,
    )
    return tiny.weights(trainer.model), collator.prompts, trainer.state.global_step


def worker(rank, folder):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **address)
    warnings.simplefilter("ignore")
    whole = run_of(Path(folder) / "two")
    # Accelerate hides the sampler here: the epoch has to reach it all the same.
    resumed = run_of(Path(folder) / "again", str(Path(folder) / "two" / "checkpoint-8"))
    return whole, resumed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path):
    ranks = two.run(tmp_path, worker, str(tmp_path))
    prompts = [whole[1] for whole, _ in ranks]
    steps = ranks[0][0][2]
    assert [len(batches) for batches in prompts] == [steps, steps]
    assert steps // 2 < 8 < steps
    for epoch in (slice(steps // 2), slice(steps // 2, None)):
        both = [prompt for batches in prompts for batch in batches[epoch] for prompt in batch]
        assert sorted(both) == sorted(tiny.pairs(23)["prompt"])
    for whole, resumed in ranks:
        assert resumed[1] == whole[1][8:]
        assert torch.equal(resumed[0], whole[0])
        assert torch.equal(whole[0], ranks[0][0][0])
    # The same steps on one process: each round of two batches is one step, whatever their sizes.
    data = tiny.pairs(23)
    collate = PreferenceCollator(tiny.tokenizer())
    sampler = TokenBatchSampler.of(data, collate, BUDGET, seed=1, num_replicas=2, rank="all")

    class Rounds(tiny.Trainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(DataLoader(data, batch_sampler=sampler, collate_fn=collate))

    alone, _ = trained(
        tmp_path / "one", data=data, max_tokens=None, kind=Rounds, gradient_accumulation_steps=2
    )
    torch.testing.assert_close(tiny.weights(alone.model), ranks[0][0][0], rtol=0, atol=5e-6)


def test_the_callback_is_built_again_from_its_state(tmp_path):
    trainer, _ = trained(tmp_path, num_train_epochs=1)
    state = tiny.callback_of(trainer).state()
    assert state["args"]["max_tokens"] == BUDGET
    assert re.match(r"\d+", str(state["attributes"]["batch_plan"]["examples"]))
