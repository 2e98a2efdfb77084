"""The objective on a model and batches of a collator: its log-probs, its share of a step, its state."""

import copy
import math

import pytest
import torch

from prefloss.training import PreferenceCollator, PreferenceObjective, Reference
from tests import tiny

# Token 0 is one like any other.
PAIRS = [
    {"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7, 8, 1], "rejected_ids": [9, 1]},
    {"prompt_ids": [10, 4], "chosen_ids": [11, 0, 1], "rejected_ids": [12, 13, 14, 15, 1]},
    {"prompt_ids": [3, 16, 5, 9], "chosen_ids": [17, 1], "rejected_ids": [0, 19, 1]},
]


def by_definition(model, row, side):
    """Sum of a completion's log-probs, from the logits of its row alone."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return logps[len(row["prompt_ids"]) - 1 :].sum().item()


def apart():
    """A policy and another model as its reference."""
    return tiny.model(0), tiny.model(1)


def test_loss_and_log_probs_of_a_batch():
    policy, reference = apart()
    objective = PreferenceObjective("dpo", beta=0.5, reference=reference, check_step_zero=False)
    found = objective(policy, PreferenceCollator()(PAIRS))
    assert found.outputs.keys() == {"loss", "logps", "ref_logps"}
    for name, model in (("logps", policy), ("ref_logps", reference)):
        wanted = [[by_definition(model, row, side) for side in ("chosen", "rejected")] for row in PAIRS]
        torch.testing.assert_close(found.outputs[name], torch.tensor(wanted), rtol=1e-4, atol=1e-4)
        assert not found.outputs[name].requires_grad
    log_ratios = found.outputs["logps"] - found.outputs["ref_logps"]
    margins = log_ratios[:, 0] - log_ratios[:, 1]
    wanted = -torch.nn.functional.logsigmoid(0.5 * margins).mean()
    torch.testing.assert_close(found.loss, wanted)
    assert objective.metrics()["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_the_micro_batches_of_a_step_add_up():
    policy, reference = apart()
    objective = PreferenceObjective("0.8*dpo + 0.2*nll", reference=reference, check_step_zero=False)
    collate = PreferenceCollator()
    whole = objective(policy, collate(PAIRS)).loss
    batches = [collate(PAIRS[:2]), collate(PAIRS[2:])]
    objective.count(batches)
    assert [batch["prefloss_counts"].tolist() for batch in batches] == [[3, 3, 2]] * 2
    torch.testing.assert_close(sum(objective(policy, batch).loss for batch in batches), whole)
    with pytest.raises(ValueError, match="batches: got none"):
        objective.count([])


def test_the_first_examples_alone_count():
    policy, reference = apart()
    objective = PreferenceObjective("dpo", reference=reference, check_step_zero=False)
    batch = PreferenceCollator()(PAIRS)
    two = objective(policy, batch, examples=2)
    torch.testing.assert_close(two.loss, objective(policy, PreferenceCollator()(PAIRS[:2])).loss)
    assert two.outputs["logps"].shape == (3, 2)


def test_a_step_moves_schedules_and_ends_the_check_of_step_zero():
    policy = tiny.model()
    objective = PreferenceObjective("dpo(beta=linear(0.5, 0.1, steps=4))", reference=copy.deepcopy(policy))
    assert objective.fresh
    found = objective(policy.train(), PreferenceCollator()(PAIRS))
    assert found.loss.item() == pytest.approx(math.log(2))
    assert not objective.fresh
    objective.fresh = True
    objective.step()
    assert (objective.fresh, objective.steps) == (False, 1)
    assert objective.loss.beta == pytest.approx(0.4)
    other = PreferenceObjective("dpo(beta=linear(0.5, 0.1, steps=4))", reference=Reference.cached())
    other.load_state_dict(objective.state_dict())
    assert not other.fresh
    assert other.loss.beta == pytest.approx(0.4)


def test_evaluation_leaves_the_state_of_the_loss_and_the_training_metrics():
    policy, reference = apart()
    objective = PreferenceObjective("bco_pair", reference=reference, check_step_zero=False)
    batch = PreferenceCollator()(PAIRS)
    before = objective.state_dict()
    objective(policy.eval(), batch)
    assert objective.state_dict() == before
    assert "loss" not in objective.metrics()
    assert "loss" in objective.metrics(training=False)
    objective(policy.train(), batch)
    assert objective.state_dict() != before


def test_mismatched_completions_are_scored_by_both_models():
    policy, reference = apart()
    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": i != 1}
        for i, row in enumerate(PAIRS)
    ]
    objective = PreferenceObjective("kto", reference=reference, check_step_zero=False)
    found = objective(policy, PreferenceCollator(mismatched=True)(rows))
    h = (found.outputs["logps"] - found.outputs["ref_logps"]).tolist()
    following = [
        {"prompt_ids": a["prompt_ids"], "chosen_ids": b["chosen_ids"]}
        for a, b in zip(PAIRS, PAIRS[1:] + PAIRS[:1], strict=True)
    ]
    kl = max(
        0.0,
        sum(
            by_definition(policy, row, "chosen") - by_definition(reference, row, "chosen")
            for row in following
        )
        / 3,
    )
    signs = [1, -1, 1]
    wanted = [1 - 1 / (1 + math.exp(-0.1 * sign * (one - kl))) for sign, one in zip(signs, h, strict=True)]
    assert found.loss.item() == pytest.approx(sum(wanted) / 3, rel=1e-4)
