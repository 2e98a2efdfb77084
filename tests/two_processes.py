"""One training step on two gloo processes and on one, for the tests: `run(worker, ...)` starts them."""

import copy
import os
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from prefloss.integrations.transformers import PreferenceCollator, PreferenceObjective, Reference
from tests import tiny

RATE = 0.5
PAIRS = [
    {"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7, 8, 1], "rejected_ids": [9, 1]},
    {"prompt_ids": [10, 4], "chosen_ids": [11, 1], "rejected_ids": [12, 13, 14, 15, 1]},
    {"prompt_ids": [3, 16, 5, 9], "chosen_ids": [17, 1], "rejected_ids": [18, 19, 1]},
    {"prompt_ids": [20], "chosen_ids": [21, 22, 23, 1], "rejected_ids": [24, 25, 1]},
    {"prompt_ids": [26, 27], "chosen_ids": [28, 1], "rejected_ids": [29, 30, 31, 1]},
    {"prompt_ids": [3, 32], "chosen_ids": [33, 34, 1], "rejected_ids": [35, 1]},
]


def labels(upvoted):
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": i in upvoted}
        for i, row in enumerate(PAIRS)
    ]


RANKINGS = [
    {
        "prompt_ids": row["prompt_ids"],
        # Groups of two and three: on two processes they differ in width.
        "completions_ids": [row["chosen_ids"], row["rejected_ids"], [5, 1]][: 2 + (i < 3)],
        "scores": [2.0, 1.0, 0.0][: 2 + (i < 3)],
    }
    for i, row in enumerate(PAIRS)
]
CASES = {
    "dpo": ("dpo", PAIRS, {}),
    "two terms": ("0.8*dpo + 0.2*nll", PAIRS, {}),
    "aot": ("aot", PAIRS, {}),
    "dr_dpo": ("dr_dpo", PAIRS, {}),
    "bco": ("bco", labels({0, 2, 5}), {}),
    "bco_pair": ("bco_pair", PAIRS, {}),
    "kto": ("kto", labels({0, 3, 4}), {}),
    "kto, one rank all upvotes": ("kto", labels({0, 1, 2}), {}),
    "kto, running mean": ("kto(kl_baseline=running_mean)", labels({0, 1, 2}), {}),
    "dpo_pl": ("dpo_pl", RANKINGS, {}),
    "shared_prefix": ("dpo", PAIRS, {"layout": "shared_prefix"}),
}
# The mismatched completions of a batch follow its order, so one process must see the same neighbours as two.
KL_OF_HALVES = ("kto", "kto, one rank all upvotes")


def policy_and_reference():
    policy = tiny.model()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy, reference


def wrapped(policy, how):
    if how == "ddp":
        return DistributedDataParallel(policy)
    if how.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in policy.model.layers:
            fully_shard(layer, mesh=mesh)
        if how == "fsdp2, head apart":
            fully_shard(policy.lm_head, mesh=mesh)
        fully_shard(policy, mesh=mesh)
    if how == "head by vocabulary":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(policy, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return policy


def trained(case, how="alone", rank=0, size=1, steps=2, accumulate=1):
    """Weights, loss state and figures after some SGD steps; each process has its share of every batch."""
    loss, data, options = CASES[case]
    policy, reference = policy_and_reference()
    objective = PreferenceObjective(loss, reference=Reference.model(reference), check_step_zero=False)
    model = wrapped(policy, how).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    collate = PreferenceCollator(mismatched=objective.loss.name == "kto" and "running" not in loss, **options)
    if how == "head by vocabulary":
        # Both processes have every example, and half of the head.
        rank, size = 0, 1
    share = len(data) // size // accumulate
    figures = {}
    for _ in range(steps):
        mine = data[rank * len(data) // size :]
        batches = [collate(mine[i * share : (i + 1) * share]) for i in range(accumulate)]
        if size == 1 and case in KL_OF_HALVES:
            batches = [_with_kl_of_halves(collate, data)]
        objective.count(batches)
        optimizer.zero_grad()
        for batch in batches:
            objective(model, batch).loss.backward()
        optimizer.step()
        objective.step()
        figures = objective.metrics()
    flat = [getattr(value, "full_tensor", lambda value=value: value)() for value in policy.parameters()]
    weights = torch.cat([value.detach().flatten() for value in flat])
    return weights, objective.state_dict(), figures


def _with_kl_of_halves(collate, data):
    batch = collate(data)
    halves = [collate(data[:3]), collate(data[3:])]
    width = max(half["kl_input_ids"].shape[1] for half in halves)
    for name in ("kl_input_ids", "kl_attention_mask", "kl_completion_mask"):
        rows = [torch.nn.functional.pad(half[name], (0, width - half[name].shape[1])) for half in halves]
        batch[name] = torch.cat(rows)
    return batch


def _begin(rank, store, folder, worker, arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(HF_HUB_OFFLINE="1")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(worker(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(folder, worker, *arguments):
    """What `worker(rank, *arguments)` returns on each of two processes."""
    mp.spawn(_begin, args=(str(folder / "store"), str(folder), worker, arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
