"""The diagnosis in real trainings: where chosen completions fall it says so, in every trainer; else it is silent."""

import copy
import random
import warnings
from unittest import mock

import pytest
import torch
from datasets import Dataset

from prefloss.diagnosis import Diagnosis, DiagnosisWarning, Thresholds
from prefloss.integrations import trl
from prefloss.integrations.transformers import PreferenceLossCallback, Reference
from tests import tiny

WATCHED = {"falling_pairs", "saturated", "zero_gradient", "batch_without_gradient", "kl_per_token"}
FALLING = Thresholds(examples=16, memory=64, kl=None, length=None)


def alike(rows=32):
    """Pairs that differ in one word: what pushes the rejected completion down pushes the chosen one, too."""
    rng, made = random.Random(0), []
    for _ in range(rows):
        words = [rng.choice(tiny.WORDS) for _ in range(8)]
        chosen, rejected = " ".join(words), " ".join([rng.choice(tiny.WORDS), *words[1:]])
        made.append({"prompt": tiny._text(rng, 2, 3), "chosen": " " + chosen, "rejected": " " + rejected})
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def tuned():
    """A model that has learnt both completions of every pair."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    texts = [row["prompt"] + row[side] + " <eos>" for row in alike() for side in ("chosen", "rejected")]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def trained(where, folder, model, loss="dpo", diagnose=FALLING, **options):
    """Logs and warnings of a training by `where`, "transformers" or "trl"."""
    settings = {"max_steps": 16, "learning_rate": 2e-3, "per_device_train_batch_size": 8, **options}
    policy = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as heard, mock.patch("gc.collect"):
        warnings.simplefilter("always")
        if where == "trl":
            callback = trl.PreferenceLossCallback(loss, diagnose=diagnose)
            logs = tiny.train("dpo", folder, [callback], data=alike(), policy=policy, **settings).logs
        else:
            trainer = tiny.plain_train(folder, loss, alike(), policy, own={"diagnose": diagnose}, **settings)
            logs = tiny.steps_of(trainer)
    said = [str(item.message) for item in heard if issubclass(item.category, DiagnosisWarning)]
    return logs, said


@pytest.mark.parametrize("where", ["transformers", "trl"])
def test_a_training_where_chosen_fall_is_told_so(tmp_path, tuned, where):
    logs, said = trained(where, tmp_path, tuned)
    assert "Chosen completions are becoming less likely" in said[0]
    assert "Losses that do: " in said[0]
    assert len(said) <= 3
    for name in WATCHED:
        assert f"prefloss/{name}" in logs[-1]
    assert logs[-1]["prefloss/falling_pairs"] >= 0.5
    assert logs[-1]["logps/chosen"] < logs[0]["logps/chosen"]
    assert logs[-1]["rewards/margins"] > 0
    assert not any("length/" in name for name in logs[-1])


@pytest.mark.parametrize("loss", ["dpop", "1.0*dpo + 1.0*nll"])
def test_losses_that_resist_do(tmp_path, tuned, loss):
    logs, said = trained("transformers", tmp_path, tuned, loss)
    assert said == []
    assert logs[-1]["prefloss/logratios/chosen"] > -3


@pytest.mark.parametrize("where", ["transformers", "trl"])
def test_switched_off_it_says_and_logs_nothing(tmp_path, tuned, where):
    on, _ = trained(where, tmp_path, tuned, max_steps=3)
    off, said = trained(where, tmp_path, tuned, max_steps=3, diagnose=False)
    assert said == []
    assert not WATCHED & {name.removeprefix("prefloss/") for name in off[-1]}
    # It looks, and does not touch.
    assert [entry["loss"] for entry in on] == [entry["loss"] for entry in off]


@pytest.mark.parametrize("where", ["transformers", "trl"])
def test_micro_batches_give_the_figures_of_one_batch(tmp_path, tuned, where):
    whole, _ = trained(where, tmp_path, tuned, max_steps=3)
    parts, _ = trained(
        where, tmp_path, tuned, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    for name in WATCHED - {"batch_without_gradient"}:
        assert parts[-1][f"prefloss/{name}"] == pytest.approx(whole[-1][f"prefloss/{name}"], abs=0.02)


def test_half_precision(tmp_path, tuned):
    logs, said = trained("transformers", tmp_path, tuned, bf16=True)
    assert "Chosen completions are becoming less likely" in said[0]
    assert logs[-1]["prefloss/zero_gradient"] == 0


def test_evaluation_is_not_watched(tmp_path, tuned):
    trainer = tiny.plain_build(
        tmp_path, tiny.plain_callback(tuned, "dpo"), copy.deepcopy(tuned), data=alike(8), eval_data=alike(8)
    )
    with mock.patch.object(Diagnosis, "figures") as figures:
        assert "eval_rewards/margins" in trainer.evaluate()
    assert not figures.called


@pytest.mark.parametrize("kind", [PreferenceLossCallback, trl.PreferenceLossCallback])
def test_thresholds_survive_a_checkpoint(kind):
    options = {"reference": Reference.adapter_off()} if kind is PreferenceLossCallback else {}
    callback = kind("dpo", diagnose=FALLING, **options)
    again = kind(**callback.state()["args"])
    assert again.state() == callback.state()
    assert again.state()["args"]["diagnose"]["examples"] == 16
    with pytest.raises(TypeError, match="diagnose: got 3"):
        kind("dpo", diagnose=3, **options)
