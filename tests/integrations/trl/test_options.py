"""Options of TRL's configurations are taken over or refused by name, never ignored."""

import pytest

from prefloss.integrations.inherited import expression
from prefloss.integrations.trl import PreferenceLossCallback
from tests import tiny


def resolved(tmp_path, kind, loss, given=None, **options):
    callback = PreferenceLossCallback(loss, **(given or {}))
    tiny.build(kind, tmp_path, [callback], **options)
    return callback.loss


def test_beta_is_the_kl_strength_whatever_its_name(tmp_path):
    assert resolved(tmp_path, "dpo", "ipo", beta=0.3).params["tau"] == 0.3
    assert resolved(tmp_path, "dpo", "dpo", beta=0.3, label_smoothing=0.2).params == {
        "beta": 0.3,
        "label_smoothing": 0.2,
    }


def test_rewards_are_logged_with_the_losses_beta(tmp_path):
    run = tiny.train("dpo", tmp_path, [PreferenceLossCallback("ipo", tau=0.5)], max_steps=3)
    entry = run.logs[-1]
    assert entry["rewards/chosen"] == pytest.approx(0.5 * entry["prefloss/logratios/chosen"], rel=1e-4)


def test_defaults_of_trl_say_nothing(tmp_path):
    assert resolved(tmp_path, "dpo", "hinge", given={"beta": 0.7}).params["beta"] == 0.7


def test_the_same_value_twice_is_no_contradiction(tmp_path):
    assert resolved(tmp_path, "dpo", "ipo", given={"tau": 0.3}, beta=0.3).params["tau"] == 0.3


@pytest.mark.parametrize(
    ("loss", "given", "options", "message"),
    [
        ("ipo", {}, {"discopop_tau": 0.1}, r"DPOConfig.discopop_tau: got 0.1, but ipo does not read it"),
        (
            "bco_pair",
            {},
            {"label_smoothing": 0.1},
            r"label_smoothing: got 0.1, but bco_pair does not read it",
        ),
        (
            "bco_pair",
            {},
            {"f_divergence_type": "js_divergence"},
            r"f_divergence_type: got 'js.*', but bco_pair",
        ),
        ("aot", {}, {"use_weighting": True}, r"use_weighting: got True, but aot does not read it"),
        ("dpo", {"wpo": True}, {}, r"DPOConfig\(use_weighting=True\) makes DPOTrainer compute it"),
        ("dpo", {}, {"ld_alpha": 0.5, "precompute_ref_log_probs": True}, "keeps only the reference's sums"),
        ("tdpo1", {}, {}, r"tdpo1: needs per_token.kl, which DPOTrainer does not compute"),
        ("tpo", {}, {}, "tpo: needs gold, which DPOTrainer does not compute"),
        ("ipo", {"tau": 0.2}, {"beta": 0.3}, r"DPOConfig.beta: got 0.3, but ipo was given tau=0.2"),
        ("ipo(tau=0.2)", {}, {"beta": 0.3}, r"DPOConfig.beta: got 0.3, but ipo was given tau=0.2"),
        (
            "ipo",
            {},
            {"loss_type": ["hinge"]},
            r"DPOConfig.loss_type: got \['hinge'\], but the loss to train is ipo",
        ),
        ("kto", {}, {}, "DPOTrainer scores no mismatched completions; choose 'running_mean' or 'zero'"),
    ],
)
def test_what_the_loss_does_not_read_is_refused(tmp_path, loss, given, options, message):
    with pytest.raises(ValueError, match=message):
        resolved(tmp_path, "dpo", loss, given, **options)


def test_kto_without_mismatched_completions_needs_another_baseline(tmp_path):
    with pytest.raises(ValueError, match="KTOTrainer builds no mismatched completions"):
        resolved(tmp_path, "kto", "kto", loss_type="apo_zero_unpaired")


def test_a_pair_loss_in_a_label_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'dpo', which takes Pairs, but KTOTrainer gives Labels"):
        resolved(tmp_path, "kto", "dpo")


def test_an_alias_means_the_same_loss(tmp_path):
    assert resolved(tmp_path, "dpo", "sigmoid", loss_type=["sigmoid"]).name == "dpo"


def test_the_weight_of_a_single_term_stays(tmp_path):
    """AUDIT T1."""
    loss = resolved(tmp_path, "dpo", "0.5*ipo", beta=0.3)
    assert [(weight, term.params["tau"]) for weight, term in loss.terms] == [(0.5, 0.3)]


@pytest.mark.parametrize(
    ("names", "weights", "wanted"),
    [
        (["sigmoid"], None, "sigmoid"),
        (["sigmoid"], [1.0], "sigmoid"),
        (["sigmoid"], [0.5], "0.5*sigmoid"),
        (["sigmoid", "sft"], None, "1.0*sigmoid + 1.0*sft"),
        (["sigmoid", "sft"], [0.8, 0.2], "0.8*sigmoid + 0.2*sft"),
    ],
)
def test_trls_list_of_losses_as_an_expression(names, weights, wanted):
    """AUDIT T1."""
    assert expression(names, weights) == wanted
