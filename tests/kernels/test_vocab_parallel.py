"""Two processes with half of the head each against one with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from prefloss.kernels import naive, vocab_parallel
from prefloss.kernels.naive import LogitTransform

TRANSFORM = LogitTransform(1.3, 3.0, 0.7)
# uneven: 30 rows in one process, 21 in the other
SPLIT, VOCABULARY = 30, 51


def inputs(dtype):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 7, 6), torch.randn(VOCABULARY, 6), torch.randn(VOCABULARY)
    targets = torch.randint(VOCABULARY, (2, 7))
    targets[0, :3] = -100
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], targets, torch.randn(2, 7)


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        for dtype, as_dtensor in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
            compare(rank, dtype, as_dtensor)
    finally:
        dist.destroy_process_group()


def compare(rank, dtype, as_dtensor):
    (hidden, weight, bias), targets, upstream = inputs(dtype)
    if as_dtensor:
        mesh = init_device_mesh("cpu", (2,))
        mine = slice(0, 26) if rank == 0 else slice(26, VOCABULARY)
        shard, part = (
            distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)
        )
    else:
        mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, VOCABULARY)
        shard, part = (x.detach()[mine].clone().requires_grad_() for x in (weight, bias))
    got = vocab_parallel.linear_token_logps(
        hidden, shard, targets, bias=part, chunk_tokens=4, **TRANSFORM._asdict()
    )
    grads = torch.autograd.grad((got * upstream).sum(), (hidden, shard, part))
    grads = [g.to_local() if as_dtensor and i else g for i, g in enumerate(grads)]
    whole = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = naive.linear_token_stats(*whole, targets, TRANSFORM, -100, 1)[0]
    d_hidden, d_weight, d_bias = torch.autograd.grad((want * upstream).sum(), whole)
    assert (got - want).abs().max() < 1e-5
    # few terms, of both signs, each rounded: more than the 2e-3 of a long sum
    limit = 6e-3 if dtype == torch.bfloat16 else 1e-5
    for g, w in zip(grads, (d_hidden, d_weight[mine], d_bias[mine]), strict=True):
        assert (g.double() - w).norm() < limit * w.norm(), (dtype, as_dtensor)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path):
    mp.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=2)
