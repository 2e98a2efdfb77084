"""Reference tables in training: the same numbers as the model that scored them, or an error that says why not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DPOTrainer, KTOTrainer

from prefloss.data.table import ReferenceTable, TableError, write_table
from prefloss.integrations import trl
from prefloss.integrations.transformers import (
    PreferenceCollator,
    PreferenceLossCallback,
    Reference,
    with_reference_logps,
    write_reference_table,
)
from prefloss.integrations.trl import trainer_with_table
from prefloss.training import header_of
from prefloss.training.fingerprint import tokenizer_fingerprint, weights_fingerprint
from tests import tiny


def write(path, model, data, max_length=None):
    write_reference_table(path, model, data, tiny.tokenizer(), max_length=max_length, batch_size=3)
    return path


KINDS = {
    "dpo": tiny.pairs,
    "kto(kl_baseline=zero)": tiny.labels,
    "dpo_pl": tiny.rankings,
}


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("max_length", [None, 7])
def test_a_table_trains_as_the_model_does(tmp_path, loss, max_length):
    data = KINDS[loss](12)
    path = write(tmp_path / "t.parquet", tiny.model(), data, max_length=max_length)
    options = {"data": data, "max_length": max_length}
    table = tiny.plain_train(tmp_path, loss, own={"reference": Reference.table(path)}, **options)
    live = tiny.plain_train(tmp_path, loss, **options)
    assert tiny.losses_of(table) == pytest.approx(tiny.losses_of(live), abs=1e-6)
    torch.testing.assert_close(tiny.weights(table.model), tiny.weights(live.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_table_serves_every_layout(tmp_path, layout):
    data = tiny.rankings(12)
    path = write(tmp_path / "t.parquet", tiny.model(), data, max_length=7)
    collator = PreferenceCollator(tiny.tokenizer(), max_length=7, layout=layout)
    options = {"data": data, "collator": collator}
    table = tiny.plain_train(tmp_path, "dpo_pl", own={"reference": Reference.table(path)}, **options)
    live = tiny.plain_train(tmp_path, "dpo_pl", **options)
    assert tiny.losses_of(table) == pytest.approx(tiny.losses_of(live), abs=1e-5)


def test_a_table_holds_what_the_model_says(tmp_path):
    model, data = tiny.model(), tiny.pairs(12)
    table = ReferenceTable.read(write(tmp_path / "t.parquet", model, data))
    columns = with_reference_logps(data, table, tiny.tokenizer())
    trainer = tiny.plain_build(tmp_path, tiny.plain_callback(model, "dpo"), model, data=data)
    live = torch.from_numpy(trainer.predict(data).predictions[1])
    found = torch.tensor([columns["ref_chosen_logps"], columns["ref_rejected_logps"]]).T
    torch.testing.assert_close(found, live, rtol=1e-6, atol=1e-6)
    assert table.header.dtype == "float32"


def test_columns_train_as_the_table_does(tmp_path):
    data = tiny.pairs(12)
    path = write(tmp_path / "t.parquet", tiny.model(), data)
    columns = with_reference_logps(data, path, tiny.tokenizer())
    one = tiny.plain_train(tmp_path, "dpo", columns, own={"reference": Reference.cached()})
    other = tiny.plain_train(tmp_path, "dpo", data, own={"reference": Reference.table(path)})
    assert tiny.losses_of(one) == tiny.losses_of(other)


def test_columns_of_votes_and_rankings(tmp_path):
    for data in (tiny.labels(6), tiny.rankings(6)):
        path = write(tmp_path / f"{len(data.column_names)}.parquet", tiny.model(), data)
        found = with_reference_logps(data, path, tiny.tokenizer())["ref_logps"]
        wanted = [len(row.get("completions", "?")) for row in data]
        assert [len(row) if isinstance(row, list) else 1 for row in found] == wanted
        # AUDIT T1: a vote has a number, not a list of one.
        assert all(isinstance(row, list) == ("completions" in data.column_names) for row in found)


@pytest.mark.parametrize("max_length", [None, 7])
def test_trl_reads_the_table(tmp_path, max_length):
    data = tiny.pairs(16)
    path = write(tmp_path / "t.parquet", tiny.model(), data, max_length=max_length)
    options = {"data": data, "max_steps": 3, "max_length": max_length}
    live = tiny.train("dpo", tmp_path, **options)
    recorder = tiny.Losses()
    trainer = with_table(DPOTrainer, path, tmp_path, [recorder], **options)
    assert trainer.ref_model is None
    trainer.train()
    assert [entry["loss"] for entry in recorder.logs] == pytest.approx(live.losses, abs=1e-5)


def test_trl_reads_the_table_beside_our_callback(tmp_path):
    data = tiny.pairs(16)
    path = write(tmp_path / "t.parquet", tiny.model(), data)
    options = {"data": data, "max_steps": 3}
    live = tiny.train("dpo", tmp_path, [trl.PreferenceLossCallback("ipo", tau=0.1)], **options)
    recorder = tiny.Losses()
    own = [recorder, trl.PreferenceLossCallback("ipo", tau=0.1)]
    with_table(DPOTrainer, path, tmp_path, own, **options).train()
    assert [entry["loss"] for entry in recorder.logs] == pytest.approx(live.losses, abs=1e-4)


def with_table(kind, path, folder, callbacks=(), *, data, **options):
    from trl import DPOConfig, KTOConfig

    config = DPOConfig if kind is DPOTrainer else KTOConfig
    settings = {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "seed": 1}
    return trainer_with_table(kind, path)(
        model=tiny.model(),
        args=config(
            output_dir=str(folder),
            precompute_ref_log_probs=True,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            **{"activation_checkpointing": False, **settings, **options},
        ),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def test_trl_trains_votes_from_the_table(tmp_path):
    data = tiny.labels(16)
    path = write(tmp_path / "t.parquet", tiny.model(), data)
    with pytest.raises(TableError, match="tables hold no mismatched completions of KTO"):
        with_table(KTOTrainer, path, tmp_path, data=data)
    trainer = with_table(KTOTrainer, path, tmp_path, data=data, max_steps=1, loss_type="apo_zero_unpaired")
    trainer.train()
    with pytest.raises(TypeError, match=r"expected DPOTrainer of TRL 0\.29 or newer, or KTOTrainer"):
        trainer_with_table(type(tiny.plain_build(tmp_path, None, tiny.model(), data=data)), path)


def test_a_missing_row_is_named(tmp_path):
    data = tiny.pairs(12)
    path = write(tmp_path / "t.parquet", tiny.model(), data.select(range(11)))
    message = (
        r"has no (chosen|rejected) completion of example \d of the batch \(and 1 more of 8\), "
        r"token ids \[[\d, .]*\] and then \[[\d, .]*\]; likely cause: new or changed data"
    )
    with pytest.raises(TableError, match=message):
        tiny.plain_train(tmp_path, "dpo", data, own={"reference": Reference.table(path)})
    with pytest.raises(
        TableError, match=r"has no completion 1 of row 12 of the data.*it adds what is missing"
    ):
        with_reference_logps(data, path, tiny.tokenizer())


def test_the_likely_cause(tmp_path):
    data = tiny.pairs(12)
    path = write(tmp_path / "t.parquet", tiny.model(), data, max_length=5)
    own = {"reference": Reference.table(path)}
    with pytest.raises(TableError, match=r"the table was cut at max_length=5, and this row has \d+ tokens"):
        tiny.plain_train(tmp_path, "dpo", data, own=own)
    path = write(tmp_path / "u.parquet", tiny.model(), data)
    with pytest.raises(
        TableError, match=r"other data, another tokenizer or chat template .*the table's: None\)"
    ):
        tiny.plain_train(tmp_path, "dpo", tiny.pairs(12, seed=9), own={"reference": Reference.table(path)})
    words = tiny.tokenizer()
    words.add_tokens(["w1 w2"])
    with pytest.raises(TableError, match=r"another tokenizer \(the table's: \w+; here: unnamed\)"):
        with_reference_logps(tiny.pairs(12, seed=9), path, words)
    words = tiny.tokenizer()
    words.chat_template = "{{ messages }}"
    with pytest.raises(TableError, match="had another chat template"):
        with_reference_logps(tiny.pairs(12, seed=9), path, words)


def test_a_wrong_table_fails_the_check_of_step_0(tmp_path):
    data = tiny.pairs(12)
    path = write(tmp_path / "t.parquet", tiny.model(seed=1), data)
    own = {"reference": Reference.table(path)}
    with pytest.raises(RuntimeError, match=r"step-0 check: .*the table was scored with other weights"):
        tiny.plain_train(tmp_path, "dpo", data, own=own)
    half = write(tmp_path / "half.parquet", tiny.model(seed=1).bfloat16(), data)
    with pytest.raises(
        RuntimeError, match="the table was scored in bfloat16 weights, the policy has float32"
    ):
        tiny.plain_train(tmp_path, "dpo", data, own={"reference": Reference.table(half)})


def test_a_damaged_token_count_is_noticed(tmp_path):
    data = tiny.pairs(4)
    table = ReferenceTable.read(write(tmp_path / "t.parquet", tiny.model(), data))
    write_table(table.path, table.header, table.hashes(), table.logps.tolist(), (table.tokens + 1).tolist())
    with pytest.raises(
        TableError, match=r"a damaged reference table: completion 1 of row 1 of the data has \d tokens"
    ):
        with_reference_logps(data, table.path, tiny.tokenizer())


def test_losses_of_single_tokens_refuse_a_table(tmp_path):
    path = write(tmp_path / "t.parquet", tiny.model(), tiny.pairs(4))
    with pytest.raises(ValueError, match="reads the log-prob of each token; it holds only their sums"):
        PreferenceLossCallback("ld_dpo", reference=Reference.table(path))


def test_a_table_survives_a_checkpoint(tmp_path):
    reference = Reference.table(write(tmp_path / "t.parquet", tiny.model(), tiny.pairs(4)))
    again = Reference.of(reference.config())
    assert again.value.hashes() == reference.value.hashes()
    assert repr(again) == f"Reference.table({str(tmp_path / 't.parquet')!r})"


def test_tables_that_fit_pass_the_check_of_step_0(tmp_path):
    data = tiny.pairs(8)
    path = write(tmp_path / "half.parquet", tiny.model().bfloat16(), data)
    tiny.plain_train(tmp_path, "dpo", data, tiny.model().bfloat16(), own={"reference": Reference.table(path)})
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(tiny.model(), lora)
    path = write(tmp_path / "adapted.parquet", policy, data)
    tiny.plain_train(tmp_path, "dpo", data, policy, own={"reference": Reference.table(path)})


def test_a_new_adapter_starts_at_the_table(tmp_path):
    data = tiny.pairs(8)
    path = write(tmp_path / "t.parquet", tiny.model(), data)
    policy = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    tiny.plain_train(tmp_path, "dpo", data, policy, own={"reference": Reference.table(path)})


def test_fingerprints_of_weights():
    model = tiny.model()
    own = weights_fingerprint(model)
    assert own == weights_fingerprint(tiny.model()) != weights_fingerprint(tiny.model(seed=1))
    assert weights_fingerprint(model.bfloat16()) == weights_fingerprint(model.float()) != own
    policy = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert weights_fingerprint(policy, adapters=False) == own
    before = weights_fingerprint(policy)
    assert before != own
    with torch.no_grad():
        next(value for name, value in policy.named_parameters() if "lora_B" in name).add_(1.0)
    assert weights_fingerprint(policy) != before
    assert weights_fingerprint(policy, adapters=False) == own
    with torch.device("meta"):
        assert weights_fingerprint(torch.nn.Linear(2, 2)) is None


def test_a_fingerprint_of_a_tokenizer_is_not_of_its_last_call():
    tokenizer = tiny.tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_spread_weights_have_no_header():
    with torch.device("meta"), pytest.raises(TableError, match="sharded over processes"):
        header_of(tiny.LlamaForCausalLM(tiny.model().config))


@pytest.mark.parametrize(
    "options", [{"max_length": -3}, {"max_length": 1}, {"batch_size": 0}, {"batch_size": -1}]
)
def test_lengths_that_leave_nothing_to_score_are_refused(tmp_path, options):
    """AUDIT M10: a negative length cut tokens off each row, and the table was wrong."""
    (name,) = options
    data, path = tiny.pairs(4), tmp_path / "t.parquet"
    with pytest.raises(ValueError, match=f"{name}: got "):
        write_reference_table(path, tiny.model(), data, tiny.tokenizer(), **options)
    assert not list(tmp_path.iterdir())
    if name == "max_length":
        write_reference_table(path, tiny.model(), data, tiny.tokenizer())
        with pytest.raises(ValueError, match="max_length: got "):
            with_reference_logps(data, path, tiny.tokenizer(), **options)
