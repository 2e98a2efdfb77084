"""KTO's mismatched completions in a plain trainer: the paper's baseline, and what cannot have it."""

import copy

import pytest
import torch

import prefloss
from prefloss.integrations.transformers import (
    PreferenceCollator,
    PreferenceObjective,
    Reference,
    model_logps,
)
from prefloss.logratios import LogRatios, completion_targets
from tests import tiny
from tests.two_processes import labels, policy_and_reference

DATA = labels({0, 2, 3})


def sums(model, batch, prefix=""):
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
    inputs = {"input_ids": ids, "attention_mask": batch[f"{prefix}attention_mask"]}
    return model_logps(model, inputs, completion_targets(ids, mask)).logps.sum(-1)


def test_the_baseline_is_the_mean_log_ratio_of_mismatched_completions():
    # The other way round, so that the mean is above 0 and not cut off there.
    reference, policy = policy_and_reference()
    batch = PreferenceCollator(mismatched=True)(DATA)
    objective = PreferenceObjective("kto", reference=Reference.model(reference), check_step_zero=False)
    found = objective(policy.train(), batch).loss
    with torch.no_grad():
        h, of_others = (
            sums(policy, batch, prefix) - sums(reference, batch, prefix) for prefix in ("", "kl_")
        )
        tokens = torch.ones(len(DATA), dtype=torch.long)
        given = prefloss.Labels(
            LogRatios(h, torch.zeros_like(h), tokens),
            batch["label"],
            kl=of_others.mean().clamp(min=0),
        )
        wanted = prefloss.get("kto").mean(given)
    assert of_others.mean() > 0
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_layouts_give_the_same(layout):
    def loss(layout):
        policy, reference = policy_and_reference()
        objective = PreferenceObjective("kto", reference=Reference.model(reference), check_step_zero=False)
        return objective(policy.train(), PreferenceCollator(mismatched=True, layout=layout)(DATA)).loss.item()

    assert loss(layout) == pytest.approx(loss("padded"), abs=1e-6)


def test_a_training_passes_the_check_of_step_0_and_reads_the_baseline(tmp_path):
    policy = tiny.model()
    trainer = tiny.plain_train(
        tmp_path,
        "kto",
        tiny.labels(16),
        policy,
        own={"reference": Reference.model(copy.deepcopy(policy))},
        collator=PreferenceCollator(tiny.tokenizer(), mismatched=True),
    )
    assert tiny.losses_of(trainer)[0] == pytest.approx(0.5, abs=1e-6)


def test_a_loss_that_does_not_read_them_refuses_them():
    policy, reference = policy_and_reference()
    objective = PreferenceObjective("kto_zero", reference=Reference.model(reference), check_step_zero=False)
    with pytest.raises(
        ValueError,
        match=r"mismatched completions with kto.*, which does not read them; expected",
    ):
        objective(policy.train(), PreferenceCollator(mismatched=True)(DATA))


def test_cached_references_know_nothing_of_them():
    policy, _ = policy_and_reference()
    rows = [{**row, "ref_logps": -3.0} for row in DATA]
    objective = PreferenceObjective("kto", reference=Reference.cached(), check_step_zero=False)
    with pytest.raises(
        ValueError, match=r"mismatched: got Reference.cached\(\), which gives no log-probs of"
    ):
        objective(policy.train(), PreferenceCollator(mismatched=True)(rows))
