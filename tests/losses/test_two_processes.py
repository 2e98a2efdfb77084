"""States of losses on two gloo processes: each rank sees half of the batch, both keep the state of the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import prefloss
from prefloss import Labels, LogRatios, Pairs

GENERATOR = torch.Generator().manual_seed(5)
H = torch.randn(3, 8, generator=GENERATOR)
TOKENS = torch.randint(1, 9, (8,), generator=GENERATOR)


def batch(loss, step, rows):
    h = H[step, rows]
    chosen = LogRatios(h, torch.zeros_like(h), TOKENS[rows])
    if loss.spec.feedback is Labels:
        return Labels(chosen, desirable=torch.arange(8)[rows] % 3 == 0)
    return Pairs(chosen, LogRatios(-h.flip(0), torch.zeros_like(h), TOKENS[rows]))


def all_sum(values):
    values = values.clone()
    dist.all_reduce(values)
    return values


def worker(rank, name, store, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    loss = prefloss.get(name)
    loss.sync_with(all_sum)
    # Unequal shares: the state must count examples, not ranks.
    rows = slice(0, 3) if rank == 0 else slice(3, 8)
    for step in range(3):
        loss(batch(loss, step, rows))
    queue.put((rank, loss.state_dict()))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bco", "kto(kl_baseline=running_mean)"])
def test_two_ranks_keep_the_state_of_one(tmp_path, name):
    alone = prefloss.get(name)
    for step in range(3):
        alone(batch(alone, step, slice(0, 8)))
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(worker, args=(name, str(tmp_path / "store"), queue), nprocs=2)
    for _ in range(2):
        _, state = queue.get()
        for parameter, wanted in alone.state_dict().items():
            assert state[parameter] == pytest.approx(wanted)
