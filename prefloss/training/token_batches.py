"""Batches of a fixed budget of tokens, of examples of near lengths, for one process or several."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from prefloss.arguments import instance, integer, shown
from prefloss.training import distributed
from prefloss.training.collator import PreferenceCollator
from prefloss.training.lengths import Lengths, token_lengths

# Lengths are rounded up to this many significant bits, so that examples of nearly one length change places.
_BITS = 5
# Lengths that are held as Python numbers at a time.
_BLOCK = 2**16


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of at most so many tokens, of examples of near lengths: a `batch_sampler` of a torch `DataLoader`.

    Every epoch has every example once, and every process as many batches, the same number in every epoch. Batches are
    made for all processes together and dealt in rounds, one to each; those of a round have near lengths. Where their
    number is no multiple of the number of processes, the largest batches are split to fill the last round. Nothing is
    left out or repeated.

    In each epoch, examples of nearly one length change places, and rounds, batches of a round and examples of a batch
    are shuffled, by the seed and the epoch alone.

    Args:
        lengths: Tokens of each example, as `token_lengths(data, collator)` counts them; or whole numbers, for examples
            that are one padded row each.
        max_tokens: Tokens of a batch, at most: padded rows x the longest, or the sum of the tokens, by the layout. With
            mismatched rows, each of the two blocks has at most so many.
        seed: Of the order.
        num_replicas: Processes that share the data. None: those of torch.distributed, when an epoch begins.
        rank: Number of this process, beside `num_replicas`. None: that of torch.distributed. "all": the batches of all
            processes, round by round, for accelerate, whose `prepare` deals them out.

    Attributes:
        epoch: Number of the epoch, from 0. Call `set_epoch` before each.

    Raises:
        ValueError: If an example is longer than `max_tokens`, or there are fewer examples than processes.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> sampler = TokenBatchSampler([3, 9, 4, 3], max_tokens=12)
        >>> sorted(map(sorted, sampler))
        [[0, 2, 3], [1]]
    """

    def __init__(
        self,
        lengths: Lengths | Sequence[int] | Tensor,
        max_tokens: int,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
    ) -> None:
        self.lengths = Lengths.of(lengths)
        self.max_tokens = integer("max_tokens", max_tokens, 1)
        self.seed = integer("seed", seed, 0)
        self._num_replicas = None if num_replicas is None else integer("num_replicas", num_replicas, 1)
        self._rank: int | str | None = rank if rank is None or rank == "all" else integer("rank", rank, 0)
        if rank != "all" and (rank is None) != (num_replicas is None):
            raise ValueError(f"rank: got {rank} with num_replicas={num_replicas}, expected both or neither")
        if isinstance(self._rank, int) and self._rank >= self.num_replicas:
            raise ValueError(f"rank: got {rank}, expected a number below num_replicas={num_replicas}")
        self.epoch = 0
        self._done = self._first = 0
        self._plans: dict[int, _Plan] = {}
        _check_fits(self.lengths, self.max_tokens)
        self._plan()

    @classmethod
    def of(
        cls, data: Any, collator: PreferenceCollator, max_tokens: int, **options: Any
    ) -> TokenBatchSampler:
        """Batches of a data set for a collator: reads the data once, see `token_lengths`.

        Args:
            data: A `datasets.Dataset`, or a list of rows.
            collator: Makes the batches.
            max_tokens: Tokens of a batch, at most.
            **options: `seed`, `num_replicas`, `rank`.
        """
        return cls(token_lengths(data, collator), max_tokens, **options)

    @property
    def num_replicas(self) -> int:
        """Processes that share the data."""
        return distributed.size() if self._num_replicas is None else self._num_replicas

    @property
    def rank(self) -> int | str:
        """Number of this process, or "all"."""
        return distributed.rank() if self._rank is None else self._rank

    @property
    def sampler(self) -> TokenBatchSampler:
        """Itself: accelerate and Lightning set the epoch of a batch sampler's `sampler`."""
        return self

    @property
    def batch_size(self) -> int:
        """Absent: what asks for it would deal the batches of a process out again.

        Raises:
            AttributeError: In one process, or if the batches are all processes'.
            ValueError: If they are this process's own.
        """
        if self.num_replicas > 1 and self.rank != "all":
            raise ValueError(
                f"rank: got {self.rank}, one of {self.num_replicas} processes, but the trainer would deal the batches "
                "out again; in Lightning, set Trainer(use_distributed_sampler=False); where accelerate prepares the "
                "loader, set TokenBatchSampler(rank='all')"
            )
        raise AttributeError("batch_size: a TokenBatchSampler has batches of different sizes")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next."""
        epoch = integer("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._done, self._first = epoch, 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch, for this process; of all of them with `rank="all"`. The same in every epoch."""
        batches = len(self._plan().starts) - 1
        return batches if self.rank == "all" else batches // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        plan = self._plan()
        with torch.device("cpu"):
            order, numbers = _dealt(plan, self.num_replicas, (self.seed + self.epoch) % 2**63)
        mine = numbers.flatten() if isinstance(self.rank, str) else numbers[:, self.rank]
        first, self._first = self._first, 0
        self._done = first
        for number in mine[first:].tolist():
            self._done += 1
            yield order[plan.starts[number] : plan.starts[number + 1]].tolist()

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the epoch stands: plain numbers.

        Args:
            batches: Batches that were used. None: those that were handed out, which is more with the worker processes
                of a `DataLoader`, because they read ahead.
        """
        done = self._done if batches is None else integer("batches", batches, 0)
        return {"epoch": self.epoch, "batches": done, "plan": self.plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the epoch stood: the next iteration begins after the batches that were used.

        Raises:
            ValueError: If it is the state of other data, `max_tokens`, seed or number of processes.
            TypeError: If it is no state.
        """
        instance("state", state, Mapping, "what state_dict gave")
        if state.keys() != {"epoch", "batches", "plan"}:
            raise ValueError(f"state: got {shown(sorted(map(str, state)))}, expected what state_dict gave")
        self.check_plan(state["plan"])
        done = integer("state: batches", state["batches"], 0)
        if done > len(self):
            raise ValueError(f"state: got {done} batches, expected at most the {len(self)} of an epoch")
        self.epoch = integer("state: epoch", state["epoch"], 0)
        self._done = self._first = done

    @property
    def plan(self) -> dict[str, int]:
        """What the batches depend on: plain numbers."""
        tokens = self.lengths.tokens.long() * (self.lengths.rows.long() + 1)[:, None]
        places = torch.arange(1, tokens.numel() + 1, device=tokens.device).view_as(tokens)
        return {
            "examples": len(self.lengths),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "processes": self.num_replicas,
            "lengths": int((tokens * places).sum()),
        }

    def check_plan(self, plan: Any) -> None:
        """Refuse to go on with batches of another plan.

        Raises:
            ValueError: If they differ: examples would be left out or repeated.
        """
        own = self.plan
        differing = [name for name in own if not isinstance(plan, Mapping) or plan.get(name) != own[name]]
        if differing:
            name = differing[0]
            got = plan.get(name) if isinstance(plan, Mapping) else plan
            raise ValueError(
                f"{name}: got {own[name]}, but the state to go on with was made with {shown(got)}; within an epoch, "
                "the data, max_tokens, the seed and the number of processes must stay as they were"
            )

    def _plan(self) -> _Plan:
        count = self.num_replicas
        if count not in self._plans:
            with torch.device("cpu"):
                self._plans = {count: _plan(self.lengths, self.max_tokens, count)}
        return self._plans[count]

    def __repr__(self) -> str:
        """Examples and budget."""
        return f"{type(self).__name__}({len(self.lengths)} examples, max_tokens={self.max_tokens})"


class _Plan(NamedTuple):
    """The batches of every epoch.

    Attributes:
        order: Examples, near lengths together, [examples].
        kinds: Number of the length at each place of `order`, rising, [examples]: examples of one may change places.
        starts: First place of each batch, then the number of examples.
    """

    order: Tensor
    kinds: Tensor
    starts: list[int]


def _check_fits(lengths: Lengths, most: int) -> None:
    """Refuse an example that is longer than a batch may be.

    Raises:
        ValueError: Naming the first.
    """
    if not len(lengths):
        raise ValueError("lengths: got no examples, expected at least one")
    if lengths.least > 1:
        # Any examples may meet: three at most, where their number is odd.
        count, width = 2 * lengths.least - 1, lengths.width(lengths.tokens.amax(0).tolist())
        prompt, completion = lengths.tokens.argmax(0).tolist()
        if count * width > most:
            raise ValueError(
                f"max_tokens: got {most}, expected at least {count * width}: with mismatched rows, {count} rows of "
                f"{width} tokens must fit, the longest prompt (row {prompt}) with the longest completion (row "
                f"{completion}); raise max_tokens, or set the collator's max_length"
            )
        return
    rows = lengths.rows.long() if lengths.padded else 1
    tokens = lengths.tokens.long().sum(1)
    too_long = (tokens * rows > most).nonzero().flatten().tolist()
    if too_long:
        row = too_long[0]
        count = int(lengths.rows[row])
        length = (
            f"{count} rows of {tokens[row]} tokens"
            if lengths.padded and count > 1
            else f"{tokens[row]} tokens"
        )
        raise ValueError(
            f"row {row}: got {length}, expected at most max_tokens={most} together; so of {len(too_long)} of "
            f"{len(lengths)} rows; raise max_tokens, set the collator's max_length, or leave them out"
        )


def _plan(lengths: Lengths, most: int, processes: int) -> _Plan:
    """Sort by length, cut into batches, and fill the last round."""
    if len(lengths) < processes * lengths.least:
        each = "" if lengths.least == 1 else f" of {lengths.least}"
        raise ValueError(
            f"lengths: got {len(lengths)} examples, expected at least {processes * lengths.least}: a batch{each} for "
            f"each of {processes} processes"
        )
    # Exact lengths where rounding leaves too few examples in a batch.
    for bits in (_BITS, 32):
        tokens = _rounded(lengths, most, bits)
        order, kinds = _sorted(lengths, tokens, most)
        units = _cut(lengths, tokens[order], lengths.rows[order], most)
        filled = _filled(units, processes)
        if filled is not None:
            starts = [unit * lengths.least for unit in filled[:-1]]
            return _Plan(order, kinds, [*starts, len(lengths)])
    few = "one example" if lengths.least == 1 else f"{lengths.least} examples"
    raise ValueError(
        f"max_tokens: got {most}, at which nearly every batch has {few}: {len(units) - 1} batches of {len(lengths)} "
        f"examples cannot be dealt evenly to {processes} processes; expected twice as many tokens, or a number of "
        f"examples that {processes * lengths.least} divides"
    )


def _rounded(lengths: Lengths, most: int, bits: int) -> Tensor:
    """Lengths rounded up to significant bits; never above what fits a batch, [examples, parts]."""
    tokens = lengths.tokens.long()
    step = 2 ** (tokens.clamp(min=1).double().log2().floor().long() + 1 - bits).clamp(min=0)
    fits = most // lengths.rows.long()[:, None] if lengths.padded else torch.tensor(most)
    rounded = torch.minimum((tokens + step - 1) // step * step, torch.minimum(tokens.amax(0), fits))
    return torch.maximum(rounded, tokens)


def _sorted(lengths: Lengths, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The examples sorted by their lengths, the longest first, and the number of each place's length."""
    columns = [*tokens.unbind(1), lengths.rows.long()]
    if tokens.shape[1] > 1:
        # Near in both: strips of near prompts, in each of which completions are sorted.
        whole = int(tokens.sum())
        strips = math.isqrt(max(1, whole // most))
        place = torch.empty_like(columns[0]).scatter_(
            0, columns[0].argsort(stable=True), torch.arange(len(lengths))
        )
        columns = [place * strips // len(lengths), columns[1], columns[0]]
    order = torch.arange(len(lengths))
    for column in reversed(columns):
        order = order[column[order].argsort(stable=True, descending=True)]
    changes = _changes(torch.stack([column[order] for column in columns], 1))
    return order, torch.cat([torch.zeros(1).long(), changes.cumsum(0)])


def _cut(lengths: Lengths, tokens: Tensor, rows: Tensor, most: int) -> list[int]:
    """Starts of batches, each as long as fits, in units of the fewest examples that a batch may have; then the end."""
    size, parts = lengths.least, tokens.shape[1]
    count = len(rows) // size
    if size > 1:
        # The last unit takes the examples that are left.
        tail = tokens[(count - 1) * size :].amax(0, keepdim=True)
        tokens = torch.cat([tokens[: (count - 1) * size].view(count - 1, size, parts).amax(1), tail])
        rows = torch.cat(
            [rows.new_full((count - 1,), size), rows.new_tensor([len(rows) - (count - 1) * size])]
        )
        if not lengths.padded:
            tokens = tokens * rows[:, None]
    starts, at, total, widest = [0], 0, 0, [0] * parts
    values = torch.cat([rows.long()[:, None], tokens], 1)
    firsts = torch.cat(
        [torch.zeros(1).long(), _changes(values).nonzero().flatten() + 1, torch.tensor([count])]
    )
    for run, run_length in zip(values[firsts[:-1]].split(_BLOCK), firsts.diff().split(_BLOCK), strict=True):
        for (more, *longest), left in zip(run.tolist(), run_length.tolist(), strict=True):
            while left:
                wider = [*map(max, widest, longest)]
                width = lengths.width(wider) if lengths.padded else 1
                fit = (most // width - total) // (more if lengths.padded else sum(longest))
                if fit < 1 and at > starts[-1]:
                    starts.append(at)
                    total, widest = 0, [0] * parts
                    continue
                taken = min(left, max(1, fit))
                at, left, widest = at + taken, left - taken, wider
                total += taken * (more if lengths.padded else sum(longest))
    return [*starts, count]


def _changes(values: Tensor) -> Tensor:
    """Whether each row differs from the one before, without the first."""
    return (values[1:] != values[:-1]).any(1)


def _filled(starts: list[int], processes: int) -> list[int] | None:
    """Split the largest batches until their number is a multiple of the number of processes; None if it cannot be."""
    missing = -(len(starts) - 1) % processes
    largest = [(start - end, start, end) for start, end in itertools.pairwise(starts)]
    heapq.heapify(largest)
    for _ in range(missing):
        size, start, end = heapq.heappop(largest)
        if size == -1:
            return None
        middle = (start + end) // 2
        for part in ((start, middle), (middle, end)):
            heapq.heappush(largest, (part[0] - part[1], *part))
    return [*sorted(start for _, start, _ in largest), starts[-1]]


def _dealt(plan: _Plan, processes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The examples of an epoch, [examples], and the number of each process's batch in each round.

    Returns:
        Examples, so that `starts` cuts them into batches; and numbers of batches, [rounds, processes].
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor(plan.starts)
    batches = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    # Those of one length change places; then each batch is shuffled.
    order = plan.order[_shuffled(plan.kinds, generator)][_shuffled(batches, generator)]
    rounds = torch.randperm((len(starts) - 1) // processes, generator=generator)
    turns = torch.rand(len(rounds), processes, generator=generator).argsort(1)
    return order, rounds[:, None] * processes + turns


def _shuffled(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Places in a random order within groups, whose numbers rise."""
    places = torch.randperm(len(groups), generator=generator)
    return places[groups[places].argsort(stable=True)]
