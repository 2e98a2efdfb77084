from dataclasses import dataclass

import pytest

import prefloss
from prefloss.feedback import Labels, Pairs
from prefloss.integrations.inherited import Host, changed_options, expression


@dataclass
class Options:
    strength: float = 0.1
    smoothing: float = 0.0
    margin: float = 0.5
    liked: float = 1.0
    odd: bool = False


OPTIONS = {
    "strength": "beta",
    "smoothing": "label_smoothing",
    "margin": "simpo.gamma",
    "liked": "desirable_weight",
}
PAIRS = Host("its trainer", Pairs, frozenset({"tokens"}), OPTIONS, {"odd": "leave it out"})
LABELS = Host("its trainer", Labels, frozenset({"tokens", "mismatched"}), OPTIONS)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("ipo", {"strength": 0.3}, "ipo(tau=0.3)"),
        ("dpo(beta=0.5)", {}, "dpo(beta=0.5)"),
        ("dpo(beta=0.5)", {"strength": 0.5}, "dpo(beta=0.5)"),
        ("dpo", {"smoothing": 0.2}, "dpo(label_smoothing=0.2)"),
        ("robust", {"smoothing": 0.2}, "robust(epsilon=0.2)"),
        ("simpo", {"margin": 0.7}, "simpo(gamma=0.7)"),
        ("0.5*dpo + 0.5*nll", {"strength": 0.4}, "0.5*dpo(beta=0.4) + 0.5*nll"),
        ("kto(kl_baseline='zero')", {"liked": 2.0}, "kto(kl_baseline='zero', desirable_weight=2.0)"),
    ],
)
def test_takes_options_over(loss, options, expected):
    resolved = PAIRS.resolve(prefloss.get(loss), Options(**options))
    assert repr(resolved) == repr(prefloss.get(expected))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("nll", {"strength": 0.3}, "strength: got 0.3, but nll does not read it"),
        ("cpo_simpo", {"margin": 0.7}, "margin: got 0.7, but cpo_simpo does not read it"),
        ("dpo(beta=0.5)", {"strength": 0.3}, "strength: got 0.3, but dpo was given beta=0.5"),
        ("nca_pair", {"smoothing": 0.1}, "smoothing: got 0.1, but nca_pair does not read it"),
        ("dpo", {"odd": True}, "odd: got True beside a prefloss loss; leave it out"),
        ("odpo", {}, "odpo: needs scores, which its trainer does not give"),
        ("kto", {}, "kto: kl_baseline: got 'auto', but its trainer scores no mismatched completions"),
    ],
)
def test_refuses_what_no_loss_reads(loss, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        PAIRS.resolve(prefloss.get(loss), Options(**options))


def test_refuses_feedback_that_the_trainer_does_not_give():
    with pytest.raises(TypeError, match="loss: got 'dpo', which takes Pairs, but its trainer gives Labels"):
        LABELS.resolve(prefloss.get("dpo"), Options())
    with pytest.raises(TypeError, match="takes Rankings, but its trainer gives Pairs or Labels"):
        PAIRS.resolve(prefloss.get("dpo_pl"), Options())
    assert LABELS.resolve(prefloss.get("kto"), Options()).reads_mismatched


def test_changed_options_leave_out_what_the_release_has_not():
    assert changed_options(Options(strength=0.2), ("strength", "margin", "unheard_of")) == {"strength": 0.2}


def test_expression_of_names_and_weights():
    assert expression(["ipo(tau=0.2)"], None) == "ipo(tau=0.2)"
    assert expression(["dpo"], [0.5]) == "0.5*dpo"
    assert expression(["dpo", "nll"], None) == "1.0*dpo + 1.0*nll"
