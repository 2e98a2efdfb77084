"""`prefloss score` as it is called: rewards against plain logits, what training recorded, and one line of error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from prefloss.cli.app import app
from prefloss.data.tokens import encode
from prefloss.training.fingerprint import tokenizer_fingerprint
from tests import tiny

TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("model", 0), ("ref", 1)):
        tiny.model(seed).save_pretrained(name)
        tiny.tokenizer().save_pretrained(name)
    write("pairs.jsonl", tiny.pairs(12))
    return tmp_path


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def invoke(*changes, width="1000"):
    """The command with these options in place of good ones; None leaves one out."""
    options = {"--model": "model", "--data": "pairs.jsonl", "--output": "s.jsonl"}
    options |= {"--reference": "ref", "--loss": "dpo(beta=0.5)"}
    options |= dict(zip(changes[::2], changes[1::2], strict=True))
    words = [
        text for name, value in options.items() if value is not None for text in (name, str(value)) if text
    ]
    return CliRunner(env={"COLUMNS": width}).invoke(app, ["score", *words])


def run(*changes, **options):
    result = invoke(*changes, **options)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*changes):
    result = invoke(*changes)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    return line


def lines(name="s.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def log_prob(model, prompt, completion):
    """From plain logits, in float64."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model.double().eval()(ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()


@pytest.mark.parametrize(
    ("kind", "sides"),
    [(tiny.pairs, ("chosen", "rejected")), (tiny.labels, ("completion",)), (tiny.rankings, None)],
)
def test_rewards_are_log_ratios_of_plain_logits(kind, sides):
    write("pairs.jsonl", kind(9, seed=3))
    run()
    found, tokenizer = lines(), tiny.tokenizer()
    models = tiny.model(0), tiny.model(1)
    at = 0
    for number, row in enumerate(kind(9, seed=3)):
        texts = row["completions"] if sides is None else [row[side] for side in sides]
        for side, text in zip(sides or map(str, range(len(texts))), texts, strict=True):
            encoded = encode(tokenizer, row["prompt"], text)
            logp, ref = (log_prob(model, *encoded) for model in models)
            assert (found[at]["row"], found[at]["side"], found[at]["tokens"]) == (
                number,
                side,
                len(encoded[1]),
            )
            assert found[at]["logp"] == pytest.approx(logp, abs=1e-4)
            assert found[at]["ref_logp"] == pytest.approx(ref, abs=1e-4)
            assert found[at]["reward"] == pytest.approx(0.5 * (logp - ref), abs=1e-4)
            at += 1
    assert at == len(found)


def test_it_ends_with_a_summary_of_80_columns(folder):
    said = run("--html", "page.html", width="80")
    assert max(map(len, said.splitlines())) <= 80
    assert "24 completions of 12 rows" in said
    assert "95% interval" in said
    assert "ECE" in said
    assert {path.name for path in folder.glob("s.jsonl*")} == {
        *("s.jsonl", "s.jsonl.summary.json", "s.jsonl.reliability.png")
    }
    assert Path("page.html").read_text().count("<article") == 12
    again = run("--html", "page.html", width="80")
    assert "s.jsonl is finished; nothing is left to score." in again
    assert said[said.index("accuracy") :] == again[again.index("accuracy") :]


def test_a_table_is_a_reference():
    reference = ["reference", "--model", "ref", "--data", "pairs.jsonl", "--output", "t.parquet"]
    assert CliRunner().invoke(app, reference).exit_code == 0
    run()
    wanted = lines()
    run("--reference", "t.parquet", "--overwrite", "")
    assert [row["reward"] for row in lines()] == pytest.approx([row["reward"] for row in wanted], abs=1e-5)
    assert "was scored with another --max-length: got 30, expected None" in refused(
        "--reference", "t.parquet", "--max-length", "30", "--output", "u.jsonl"
    )
    assert "holds sums" in refused("--reference", "t.parquet", "--per-token", "", "--output", "u.jsonl")


def test_an_adapter_against_its_base(folder):
    adapted = tiny.adapted(tiny.model(), init_lora_weights=False)
    adapted.save_pretrained("adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "model"}))
    run("--model", "adapter", "--reference", "adapter")
    tokenizer, base = tiny.tokenizer(), tiny.model()
    row = tiny.pairs(12)[0]
    encoded = encode(tokenizer, row["prompt"], row["chosen"])
    wanted = 0.5 * (log_prob(adapted, *encoded) - log_prob(base, *encoded))
    assert lines()[0]["reward"] == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted) > 1e-3


def test_truncation_is_an_error_unless_allowed():
    assert "pairs.jsonl:1: chosen: got" in refused("--max-length", "6")
    said = run("--max-length", "6", "--allow-truncation", "")
    found = lines()
    assert "truncated" in said
    assert sum(row["truncated"] for row in found) > 0
    assert json.loads(Path("s.jsonl.summary.json").read_text())["summary"]["truncated"] == sum(
        row["truncated"] for row in found
    )


def test_messages_and_plain_text_as_messages():
    assert "--chat asks for messages, and the tokenizer of model has no chat template" in refused(
        "--chat", ""
    )
    for name in ("model", "ref"):
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(name)
    assert "--chat puts it into the chat template" in run("--output", "plain.jsonl")
    run("--chat", "")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in tiny.pairs(12)
    ]
    write("messages.jsonl", rows)
    run("--data", "messages.jsonl", "--output", "m.jsonl")
    assert lines("m.jsonl") == lines()
    assert lines("plain.jsonl") != lines()


def record(**settings):
    """What prefloss train leaves beside a model."""
    settings = {
        "--loss": "dpo(beta=0.5)",
        "tokenizer of --model": tokenizer_fingerprint(tiny.tokenizer()),
        **settings,
    }
    Path("model/run.json").write_text(json.dumps({"settings": settings, "finished": True}))
    Path("model/metrics.json").write_text(json.dumps({"loss": "dpo(beta=0.5)", "model": "ref"}))


def test_loss_and_reference_come_from_the_record_of_the_training():
    run()
    wanted = Path("s.jsonl").read_bytes()
    record(**{"chat template of --model": None})
    run("--loss", None, "--reference", None, "--output", "r.jsonl")
    assert Path("r.jsonl").read_bytes() == wanted
    assert "the training in model had the loss dpo(beta=0.5)" in run(
        "--loss", "ipo(tau=0.5)", "--output", "i.jsonl"
    )
    # Beside a checkpoint too.
    shutil.copytree("model", "checkpoint-3", ignore=shutil.ignore_patterns("run.json", "metrics.json"))
    for name in ("run.json", "metrics.json"):
        shutil.move(f"model/{name}", name)
    run("--model", "checkpoint-3", "--loss", None, "--output", "c.jsonl")
    assert Path("c.jsonl").read_bytes() == wanted


def test_another_tokenizer_or_template_than_in_training_is_refused():
    record(**{"tokenizer of --model": "0" * 32})
    assert "--model: got another tokenizer" in refused()
    record(**{"chat template of --model": "0" * 32})
    assert "--model: got another chat template" in refused()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["--data", "bad.jsonl"], "bad.jsonl:2:1: bad JSON"),
        (["--data", "empty.jsonl"], "empty.jsonl: no rows"),
        (["--data", "model"], "model: "),
        (["--output", "s.txt"], "--output: got s.txt, expected a name that ends in .jsonl, .parquet or .csv"),
        (["--output", "model"], "--output: "),
        (["--output", "pairs.jsonl"], "--output: got pairs.jsonl, which --data reads"),
        (["--output", "model/config.json/s.jsonl"], "cannot be written"),
        (["--format", "xml"], "--format: got 'xml', expected one of table, jsonl, parquet, rewardbench"),
        (["--format", "table", "--per-token", ""], "--per-token: got the format table"),
        (["--html", "absent/page.html"], "--html: no such folder: absent"),
        (["--html", "s.jsonl"], "--html: got s.jsonl, which is --output"),
        (["--html", "model"], "--html: model is a folder"),
        (["--dtype", "int8"], "--dtype: got 'int8'"),
        (["--loss", None], "--loss: got none, and model has no record of prefloss train"),
        (["--loss", "dpo(beta=-1)"], "--loss: dpo: beta"),
        (["--loss", "nonsense"], "--loss: "),
        (["--loss", "dpo("], "--loss: "),
        (["--loss", "tdpo1"], "--loss: "),
        (["--reference", None], "--reference: got none, and the reward of dpo is measured against one"),
        (["--reference", "none"], "--reference: got none"),
        (["--reference", "adapter"], "--reference: got 'adapter', and model has none"),
        (["--reference", "./absent"], "--reference: no such folder: ./absent"),
        (["--reference", "absent.parquet"], "absent.parquet: no such file"),
        (["--reference", "small"], "holds the token id"),
        (["--reference", "other"], "--reference: other has another tokenizer: "),
        (["--model", "./absent"], "--model: no such folder: ./absent"),
        (["--tokenizer", "./absent"], "--tokenizer: ./absent has no tokenizer"),
        (["--data", "long.jsonl"], "long.jsonl:1: completion: got 1 tokens of prompt and 100 of completion"),
    ],
)
def test_a_bad_command_line_is_one_line_of_error(folder, changes, words):
    Path("bad.jsonl").write_text(json.dumps(dict(tiny.pairs(1)[0])) + "\nnonsense\n")
    Path("empty.jsonl").write_text("")
    write("long.jsonl", [{"prompt": "w1", "completion": " w2" * 99}])
    if "small" in changes:
        config = tiny.model().config
        config.vocab_size = 20
        type(tiny.model())(config).save_pretrained("small")
    if "other" in changes:
        shutil.copytree("ref", "other")
        text = Path("other/tokenizer.json").read_text()
        Path("other/tokenizer.json").write_text(text.replace('"w7"', '"w7a"').replace('"w8"', '"w7"'))
    before = sorted(map(str, Path().rglob("*")))
    assert words in refused(*changes)
    assert sorted(map(str, Path().rglob("*"))) == before


def test_a_loss_without_a_reference():
    said = run("--loss", "simpo(beta=2.0)", "--reference", None)
    assert "no reference" in said
    first = lines()[0]
    assert first["ref_logp"] is None
    assert first["reward"] == pytest.approx(2 * first["logp"] / first["tokens"])
    assert "--reference ref is left out" in run("--loss", "simpo(beta=2.0)", "--output", "t.jsonl")


def test_equal_completions_tie():
    rows = [{**row, "rejected": row["chosen"]} if i % 2 else row for i, row in enumerate(tiny.pairs(12))]
    write("pairs.jsonl", [*rows, rows[0]])
    assert "6 of 13 comparisons have equal rewards" in run("--batch-tokens", "30")
    found = [row["reward"] for row in lines()]
    assert found[2:4] == [found[2]] * 2
    assert found[-2:] == found[:2]
