"""`prefloss reference`: the table it writes, in one process and two, killed and resumed; what it refuses."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from prefloss.cli import reference_table
from prefloss.cli.app import app
from prefloss.data.table import ReferenceTable
from prefloss.integrations.transformers import Reference
from tests import tiny


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    write("pairs.jsonl", tiny.pairs(12))
    return tmp_path


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def invoke(*arguments, data="pairs.jsonl", model="model", output="t.parquet"):
    options = ["--model", model, "--data", data, "--output", output, *arguments]
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["reference", *map(str, options)])


def run(*arguments, **options):
    result = invoke(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments, **options):
    result = invoke(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return next(line for line in result.output.splitlines() if line.startswith("Error: "))


def test_a_training_reads_the_table(tmp_path):
    said = run("--batch-size", 4, "--max-length", 9)
    assert "pairs.jsonl: 12 paired rows, plain text" in said
    assert "24 completions of" in said
    assert "24 of them scored in this run" in said
    table = ReferenceTable.read("t.parquet")
    assert (table.header.model, table.header.dtype, table.header.max_length) == ("model", "float32", 9)
    own = {"reference": Reference.table("t.parquet")}
    one = tiny.plain_train(tmp_path, "dpo", tiny.pairs(12), own=own, max_length=9)
    other = tiny.plain_train(tmp_path, "dpo", tiny.pairs(12), max_length=9)
    assert tiny.losses_of(one) == pytest.approx(tiny.losses_of(other), abs=1e-6)


def test_a_second_run_adds_what_is_new():
    run()
    before = Path("t.parquet").read_bytes()
    assert "0 of them scored in this run" in run()
    assert Path("t.parquet").read_bytes() == before
    write("more.jsonl", tiny.labels(3, seed=5))
    assert "3 of them scored in this run" in run("--data", "more.jsonl")
    assert len(ReferenceTable.read("t.parquet")) == 27


def test_token_ids_need_no_tokenizer():
    Path("model/tokenizer.json").unlink()
    Path("model/tokenizer_config.json").unlink()
    write("ids.jsonl", [{"prompt_ids": [3, 4], "chosen_ids": [5, 1], "rejected_ids": [6, 1]}])
    assert "ids.jsonl: 1 rows of token ids" in run(data="ids.jsonl")
    assert ReferenceTable.read("t.parquet").header.tokenizer is None
    assert "model has no tokenizer that can be loaded" in refused(data="pairs.jsonl", output="u.parquet")


def test_an_adapter_is_on_if_asked():
    adapted = get_peft_model(
        tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained("adapter")
    run()
    assert "model with the adapter adapter" in run("--adapter", "adapter", output="u.parquet")
    one, other = (ReferenceTable.read(name) for name in ("t.parquet", "u.parquet"))
    assert one.hashes() == other.hashes()
    assert (abs(one.logps - other.logps) > 1e-4).all()
    assert "start anew with --overwrite" in refused("--adapter", "adapter")
    assert "24 of them scored" in run("--adapter", "adapter", "--overwrite")
    assert "--model: adapter is an adapter; name its base model as --model" in refused(model="adapter")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["--dtype", "int8"], {}, "--dtype: got 'int8', expected one of auto, float32, bfloat16, float16"),
        ([], {"output": "table.csv"}, "--output: got table.csv, expected a name that ends in .parquet"),
        ([], {"output": "model"}, "--output: model is a folder"),
        ([], {"data": "absent.jsonl"}, "absent.jsonl: no such file or folder"),
        ([], {"model": "./absent"}, "--model: no such folder: ./absent"),
        (["--adapter", "./absent"], {}, "--adapter: ./absent cannot be loaded"),
        (["--tokenizer", "./absent"], {}, "--tokenizer: ./absent has no tokenizer"),
        (["--data", "long.jsonl"], {}, "--max-length: a row has 101 tokens, and the model positions for 64"),
        (["--data", "ids.jsonl"], {}, "--data: holds the token id 99, and LlamaForCausalLM embeds 43"),
    ],
)
def test_what_it_refuses(arguments, options, message):
    write("long.jsonl", [{"prompt": "w1", "completion": " w2" * 99, "label": True}])
    write("ids.jsonl", [{"prompt_ids": [3], "completion_ids": [99], "label": True}])
    assert message in refused(*arguments, **options)
    assert not Path("t.parquet").exists()


def test_messages_need_a_chat_template():
    said = [{"role": "user", "content": "w1 w2"}], [{"role": "assistant", "content": "w3"}]
    write("chat.jsonl", [{"prompt": said[0], "completion": said[1], "label": True}])
    assert "chat.jsonl holds messages, and the tokenizer of model has no chat template" in refused(
        data="chat.jsonl"
    )
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained("chat")
    run("--tokenizer", "chat", data="chat.jsonl")
    assert ReferenceTable.read("t.parquet").header.chat_template is not None


def test_damage_and_other_options_are_refused():
    run()
    assert "dtype float32 and bfloat16; write to another file" in refused("--dtype", "bfloat16")
    assert "max_length None and 8" in refused("--max-length", 8)
    Path("t.parquet").write_bytes(Path("t.parquet").read_bytes()[:100])
    assert "not a readable Parquet file, perhaps cut off" in refused()
    run("--overwrite")


@pytest.fixture
def two(monkeypatch):
    """Starts a run of two processes; they are ended when the test is."""
    # A forked process may not use its parent's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = []

    def start(*options, stall=False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        started.extend(context.Process(target=process, args=(rank, port, options, stall)) for rank in (0, 1))
        for each in started:
            each.start()
        return started

    yield start
    for each in started:
        each.kill()
        each.join()
    torch.set_num_threads(threads)


def process(rank, port, options, stall):
    """What torchrun starts; `stall` makes it hang in its second chunk, at the latest."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    own, calls = reference_table.score_rows, []

    def once(*args, **kwargs):
        calls.append(1)
        while stall and len(calls) > 1:
            time.sleep(1)
        return own(*args, **kwargs)

    reference_table.score_rows = once
    sys.exit(app(["reference", "--model", "model", *options], standalone_mode=False))


def test_two_processes_write_the_table_of_one(two):
    write("many.jsonl", tiny.pairs(300))
    for each in two("--data", "many.jsonl", "--output", "t.parquet"):
        each.join()
        assert each.exitcode == 0
    run(data="many.jsonl", output="u.parquet")
    assert Path("t.parquet").read_bytes() == Path("u.parquet").read_bytes()
    assert not Path("t.parquet.parts").exists()


def test_an_error_of_the_second_process_is_printed_and_ends_both(two, capfd):
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    write("ids.jsonl", [row] * 256 + [{**row, "chosen_ids": [3] * 99}])
    for each in two("--data", "ids.jsonl", "--output", "t.parquet"):
        each.join()
        assert each.exitcode == 2
    assert "--max-length: a row has 101 tokens" in capfd.readouterr().err.replace("\n", " ")
    assert not Path("t.parquet").exists()


def test_two_processes_killed_and_one_that_goes_on(two):
    write("many.jsonl", tiny.pairs(640))
    processes = two("--data", "many.jsonl", "--output", "t.parquet", stall=True)
    parts = Path("t.parquet.parts")
    # An unfinished part has a name that begins with a dot.
    while len(list(parts.glob("[!.]*.parquet"))) < 2:
        assert all(each.is_alive() for each in processes)
        time.sleep(0.01)
    # Both at once: the second would end by itself without the first.
    for each in processes:
        each.kill()
    for each in processes:
        each.join()
        assert each.exitcode == -signal.SIGKILL
    assert not Path("t.parquet").exists()
    said = run(data="many.jsonl")
    assert "what an earlier run scored is kept, in t.parquet.parts" in said
    assert "256 of them scored in this run" in said
    run(data="many.jsonl", output="u.parquet")
    assert Path("t.parquet").read_bytes() == Path("u.parquet").read_bytes()
