"""The accelerate loop on one process and two, stopped and gone on; the shipped configurations."""

import json
import multiprocessing
import os
import runpy
import socket
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from prefloss.integrations.transformers import write_reference_table
from tests import tiny

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "accelerate_loop.py"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny.model().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    # As many as fill all batches, and none that reading drops: accelerate would repeat rows to make up for them.
    ranked = [row for row in tiny.rankings(60) if len(set(row["scores"])) > 1][:24]
    for name, rows in (("pairs", tiny.pairs(24)), ("votes", tiny.labels(24)), ("ranked", ranked)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(output, data="pairs", loss="dpo", table=None, **options):
    for state in (AcceleratorState, GradientState):
        state._reset_state(*([True] if state is AcceleratorState else []))
    main = runpy.run_path(str(SCRIPT))["main"]
    return main("model", f"{data}.jsonl", output, loss, table, **{"rate": 1e-3, "accumulate": 2, **options})


def weights(output):
    return torch.cat(
        [value.flatten() for _, value in sorted(load_file(f"{output}/model.safetensors").items())]
    )


def process(rank, port, output, options):
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    run(output, **options)
    torch.distributed.destroy_process_group()


def run_on_two(output, **options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A forked process may not use its parent's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(rank, port, output, options)) for rank in (0, 1)]
    for each in started:
        each.start()
    for each in started:
        each.join()
        assert each.exitcode == 0
    torch.set_num_threads(threads)


CASES = [("pairs", "dpo"), ("votes", "kto(kl_baseline=running_mean)"), ("ranked", "dpo_pl")]


@pytest.mark.parametrize(("data", "loss"), CASES)
def test_two_processes_and_one_end_in_the_same_weights(data, loss):
    run("one", data, loss, accumulate=4)
    run_on_two("two", data=data, loss=loss)
    torch.testing.assert_close(weights("two"), weights("one"), rtol=0, atol=1e-5)
    assert not torch.allclose(weights("one"), weights("model"), atol=1e-4)


def test_it_goes_on_after_the_last_epoch():
    options = {"data": "votes", "loss": "kto(kl_baseline=running_mean)"}
    whole = run("whole", **options)
    run("parts", epochs=1, **options)
    # What is diagnosed looks back further than this.
    assert run("parts", **options)["rewards/margins"] == whole["rewards/margins"]
    assert torch.equal(weights("parts"), weights("whole"))


def test_from_a_table():
    write_reference_table("t.parquet", tiny.model(), tiny.pairs(24), tiny.tokenizer())
    assert run("one", table="t.parquet")["loss"] == pytest.approx(run("two")["loss"], abs=1e-5)


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 60


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("ddp", "MULTI_GPU", {}),
        ("fsdp2", "FSDP", {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
        ("zero2", "DEEPSPEED", {"zero_stage": 2, "gradient_accumulation_steps": 1}),
        ("zero3", "DEEPSPEED", {"zero_stage": 3, "gradient_accumulation_steps": 1}),
    ],
)
def test_accelerate_reads_the_configurations(name, kind, wanted):
    config = load_config_from_file(str(ROOT / "examples" / "configs" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, 8, "bf16")
    assert wanted.items() <= {**config.fsdp_config, **config.deepspeed_config}.items()
