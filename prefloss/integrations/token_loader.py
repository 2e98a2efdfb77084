"""Batches by tokens in trainers of transformers: their training loader, with another batch sampler."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_callback import TrainerCallback

from prefloss.training import Lengths, TokenBatchSampler


def check_args(args: Any) -> None:
    """Refuse training arguments that make batches in another way.

    Raises:
        ValueError: If there is one.
    """
    accelerator = args.accelerator_config
    for name, value, default in (
        ("dataloader_drop_last", args.dataloader_drop_last, False),
        ("auto_find_batch_size", args.auto_find_batch_size, False),
        ("train_sampling_strategy", getattr(args, "train_sampling_strategy", "random"), "random"),
        ("group_by_length", getattr(args, "group_by_length", False), False),
        ("accelerator_config.split_batches", getattr(accelerator, "split_batches", False), False),
        ("accelerator_config.dispatch_batches", bool(getattr(accelerator, "dispatch_batches", None)), False),
    ):
        if value != default:
            raise ValueError(
                f"{name}: got {value!r} beside max_tokens, expected {default!r}: it makes other batches"
            )


def sampler_for(trainer: Any, lengths: Lengths, max_tokens: int) -> TokenBatchSampler:
    """Batches of all processes, seeded as the trainer's own; accelerate deals them out."""
    args = trainer.args
    seed = args.seed if args.data_seed is None else args.data_seed
    processes = trainer.accelerator.num_processes
    return TokenBatchSampler(lengths, max_tokens, seed=seed, num_replicas=processes, rank="all")


def token_loader(trainer: Any, sampler: TokenBatchSampler) -> Any:
    """The trainer's training loader with these batches.

    Raises:
        ValueError: If some processes would share their batches, as in tensor parallelism.
    """
    args = trainer.args
    loader = trainer.accelerator.prepare(
        DataLoader(
            trainer.train_dataset,
            batch_sampler=sampler,
            collate_fn=trainer.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
    )
    shares = getattr(loader.batch_sampler, "num_processes", 1)
    if shares != sampler.num_replicas:
        raise ValueError(
            f"max_tokens: got {sampler.num_replicas} processes with batches for {shares}, expected batches of its own "
            "for each: it works with data parallelism alone"
        )
    return loader


def sampler_of(loader: Any) -> TokenBatchSampler | None:
    """The sampler in a loader that accelerate may have wrapped, or None."""
    while loader is not None and not isinstance(loader, TokenBatchSampler):
        loader = getattr(loader, "batch_sampler", None)
    return loader


class SetEpoch(TrainerCallback):
    """Chooses the epoch's batches: within a resumed epoch, accelerate hides the sampler from the trainer."""

    def __init__(self, sampler: TokenBatchSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the epoch from the trainer's state."""
        self._sampler.set_epoch(int(state.epoch or 0))
