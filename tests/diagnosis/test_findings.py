"""A diagnosis speaks where it must, stays silent where it must, and says so once."""

import math
import warnings

import pytest
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs, Rankings
from prefloss.diagnosis import (
    NAMES,
    Diagnosis,
    DiagnosisWarning,
    Thresholds,
    config_of,
    resisting,
    resists_falling,
)
from prefloss.diagnosis.gradients import gradients, sizes_at_start


def side(h, tokens=None, reference=True):
    h = torch.tensor(h)
    policy = (h - 20).requires_grad_()
    tokens = torch.full_like(h, 10, dtype=torch.long) if tokens is None else torch.tensor(tokens)
    return LogRatios(policy, torch.full_like(h, -20.0) if reference else None, tokens)


def pairs(chosen, rejected, lengths=(None, None), **fields):
    return Pairs(side(chosen, lengths[0]), side(rejected, lengths[1]), **fields)


def feed(diagnosis, feedback, batches=1):
    """What a trainer does with a training batch."""
    for _ in range(batches):
        evaluation = diagnosis.loss.train().evaluate(feedback)
        found = diagnosis.figures(feedback, feedback, evaluation)
        assert found.keys() <= NAMES
        diagnosis.add({name: (float(stat.sum), float(stat.count)) for name, stat in found.items()})


def watch(loss="dpo", **thresholds):
    return Diagnosis(prefloss.get(loss), Thresholds(**{"examples": 4, **thresholds}))


HEALTHY = ([0.5, 1.0, -0.2, 2.0], [-0.5, 0.3, -0.1, 1.0])
FALLEN = ([-3.0, -4.0, -2.0, 1.0], [-6.0, -9.0, -2.5, -1.0])


def test_a_healthy_training_is_left_alone():
    diagnosis = watch()
    for step in range(1, 20):
        feed(diagnosis, pairs(*HEALTHY, lengths=([3, 9, 5, 4], [4, 4, 4, 4])))
        assert diagnosis.judge(step) == []
    shown = diagnosis.shown()
    assert shown["falling_pairs"] == shown["saturated"] == shown["zero_gradient"] == 0
    assert shown["kl_per_token"] == pytest.approx(-sum(map(sum, HEALTHY)) / 37)


def test_chosen_that_fall_while_the_margin_grows():
    diagnosis = watch()
    feed(diagnosis, pairs(*HEALTHY))
    assert diagnosis.judge(10) == []
    feed(diagnosis, pairs(*FALLEN), 40)
    with pytest.warns(DiagnosisWarning, match="becoming less likely") as heard:
        found = diagnosis.judge(20)
    # 3 of 4 now, and a faded rest of the 4 before.
    assert found[0].value == pytest.approx(120 / 164, abs=0.01)
    text = str(heard[0].message)
    assert text.startswith("step 20: Chosen completions are becoming less likely: 73% of recent pairs")
    assert f"Losses that do: {', '.join(resisting())};" in text
    assert "since step 20." in text


def test_a_finding_is_said_once_then_when_worse_then_when_it_comes_back():
    diagnosis = watch(memory=4)

    def judged(share, step):
        h = [-3.0] * round(10 * share) + [1.0] * (10 - round(10 * share))
        feed(diagnosis, pairs(h, [value - 1 for value in h]), 5)
        return [finding.since for finding in diagnosis.judge(step)]

    with pytest.warns(DiagnosisWarning) as heard:
        said = [
            judged(share, step) for step, share in enumerate((0.6, 0.7, 0.9, 0.45, 0.7, 0.2, 0.6), start=1)
        ]
    assert said == [[1], [], [1], [], [], [], [7]]
    assert len(heard) == 3
    assert "worse than at the last warning" in str(heard[1].message)


def test_chosen_that_fall_with_a_falling_margin_are_another_matter():
    diagnosis = watch()
    feed(diagnosis, pairs([-3.0] * 4, [0.0] * 4))
    assert diagnosis.judge(1) == []


def test_upvoted_completions_that_fall():
    h, up = [-3.0, -4.0, -9.0, -8.0], [True, True, False, False]
    diagnosis = watch("kto_zero", examples=2, kl=None)
    feed(diagnosis, Labels(side(h), torch.tensor(up)))
    with pytest.warns(DiagnosisWarning, match="100% of recent pairs.*kto_zero pulls such completions up"):
        diagnosis.judge(1)
    silent = watch("kto_zero", examples=2, kl=None)
    feed(silent, Labels(side(h), ~torch.tensor(up)))
    assert silent.judge(1) == []


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_falling_upvotes_do_not_depend_on_how_a_batch_is_split(size):
    """AUDIT L12."""
    h, up = [-3.0, -4.0, 0.5, -9.0, -8.0, -1.0], [True, True, True, False, False, False]
    diagnosis = watch("kto_zero")
    total = {}
    for start in range(0, 6, size):
        labels = Labels(side(h[start : start + size]), torch.tensor(up[start : start + size]))
        for name, (value, count) in diagnosis.figures(labels).items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + float(value), before[1] + float(count))
    diagnosis.add(total)
    assert diagnosis.shown()["falling_pairs"] == pytest.approx(2 / 3)


def test_saturation_is_measured_against_the_start():
    diagnosis = watch(length=None)
    # beta 0.1: the gradient is 0.05 at the start, and 5e-6 at a margin of 100 nats.
    feed(diagnosis, pairs([60.0] * 9 + [0.0], [-40.0] * 9 + [0.0]))
    with pytest.warns(DiagnosisWarning, match="saturated: 90% of recent examples have less than 1%"):
        diagnosis.judge(1)
    silent = watch()
    # A margin of 40 leaves 3.6%.
    feed(silent, pairs([20.0] * 10, [-20.0] * 10))
    assert silent.judge(1) == []


def test_a_weight_does_not_look_like_saturation():
    diagnosis = watch()
    feed(diagnosis, pairs(*HEALTHY, weight=torch.full((4,), 1e-6)))
    assert diagnosis.shown()["saturated"] == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_margin_that_follows_length(sign):
    torch.manual_seed(0)
    longer = torch.randint(-9, 10, (50,))
    margin = sign * longer + torch.randn(50)
    diagnosis = watch()
    feed(diagnosis, pairs(margin.tolist(), [0.0] * 50, ((longer + 10).tolist(), [10] * 50)))
    word = "longer" if sign > 0 else "shorter"
    with pytest.warns(DiagnosisWarning, match=f"follows length.*so {word} completions win"):
        diagnosis.judge(1)
    expected = torch.corrcoef(torch.stack([longer.float(), margin]))[0, 1].item()
    assert diagnosis.shown()["length_correlation"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lengths", [[10] * 50, list(range(5, 55))])
def test_a_margin_that_does_not_follow_length(lengths):
    torch.manual_seed(0)
    diagnosis = watch(falling=None)
    feed(diagnosis, pairs(torch.randn(50).tolist(), [0.0] * 50, (lengths, [10] * 50)))
    assert diagnosis.judge(1) == []
    if len(set(lengths)) == 1:
        assert "length_correlation" not in diagnosis.shown()


def test_distance_from_the_reference_names_its_estimator():
    diagnosis = watch(falling=None)
    feed(diagnosis, pairs([-15.0] * 4, [-30.0] * 4))
    with pytest.warns(
        DiagnosisWarning, match=r"2.25 nats per token.*KL\(reference \|\| policy\) if the reference"
    ):
        diagnosis.judge(1)
    assert diagnosis.findings[0].name == "kl"


def test_a_batch_without_gradient_names_its_example():
    diagnosis = watch("hinge", falling=None, saturated=None, kl=None)
    feed(diagnosis, pairs([40.0, 50.0], [0.0, 0.0]))
    with pytest.warns(
        DiagnosisWarning, match=r"in 100% of the batches.*hinge of example 0 \(chosen: policy 20"
    ):
        diagnosis.judge(1)
    # The next window is told anew, and a finding that stays is not repeated.
    feed(diagnosis, pairs([40.0, 50.0], [0.0, 0.0]))
    assert diagnosis.judge(2) == []
    silent = watch("hinge", saturated=None, kl=None)
    feed(silent, pairs([40.0, 5.0], [0.0, 0.0]))
    assert silent.judge(1) == []
    assert silent.shown()["zero_gradient"] == 0.5


@prefloss.register(name="root_of_margin", monotone=False)
def root_of_margin(pairs: Pairs) -> torch.Tensor:
    """Its value is finite at a margin of 0, and its gradient is not.

    .. math:: \\ell = -\\sqrt{h_w - h_l}
    """
    return -(pairs.margin().clamp(min=0).sqrt())


prefloss.registry.unregister("root_of_margin")


@pytest.fixture
def root():
    prefloss.register(name="root_of_margin")(root_of_margin)
    yield "root_of_margin"
    prefloss.registry.unregister("root_of_margin")


@pytest.mark.parametrize("weighted", [False, True])
def test_a_gradient_that_is_not_finite_stops_training(root, weighted):
    loss = f"0.5*dpo + 0.5*{root}" if weighted else root
    feedback = pairs([1.0, 0.0, 2.0], [0.0, 0.0, 0.0])
    with pytest.raises(
        FloatingPointError,
        match=r"gradient of root_of_margin in the log-prob of the chosen of example 1 .*is (-inf|nan)",
    ):
        feed(watch(loss), feedback)
    feed(watch(loss, non_finite=False), feedback)


def test_every_switch():
    off = watch(falling=None, saturated=None, length=None, kl=None, zero=None)
    feed(off, pairs([-90.0] * 9, [-900.0] * 9, ([9] * 9, list(range(9, 18)))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert off.judge(1) == []
    assert "saturated" not in off.shown()


def test_too_few_examples_say_nothing():
    diagnosis = watch(examples=5)
    feed(diagnosis, pairs(*FALLEN))
    assert diagnosis.judge(1) == []


def test_old_examples_fade():
    diagnosis = watch(memory=8)
    feed(diagnosis, pairs(*FALLEN), 10)
    feed(diagnosis, pairs(*HEALTHY), 10)
    assert diagnosis.shown()["falling_pairs"] < 0.01


def test_gradients_are_those_of_each_example():
    feedback = pairs(*HEALTHY)
    loss = prefloss.get("2.0*dpo(beta=0.1) + 1.0*hinge(beta=0.5)")
    evaluation = loss.evaluate(feedback)
    found = gradients(loss, evaluation, feedback)
    margin = torch.tensor(HEALTHY[0]) - torch.tensor(HEALTHY[1])
    expected = 0.2 * torch.sigmoid(-0.1 * margin) + 0.5 * (0.5 * margin < 1)
    torch.testing.assert_close(found.sizes, expected)
    # The backward pass of the trainer still works, and a state would not have moved.
    evaluation.mean.backward()
    torch.testing.assert_close(sizes_at_start(loss, feedback), torch.full((4,), 0.6))


@pytest.mark.parametrize("name", ["ld_dpo", "sampo", "simpo", "orpo", "dpo_pl", "bco", "aot", "nll"])
def test_losses_of_every_kind_are_watched(name):
    if name not in prefloss.specs:
        pytest.skip("no such loss")
    mask = torch.ones(3, 5, dtype=torch.bool)
    sides = [
        LogRatios.from_token_logps(
            -torch.rand(3, 5).requires_grad_(), mask, -torch.rand(3, 5), keep_per_token=True
        )
        for _ in range(2)
    ]
    feedback = Pairs(*sides)
    loss = prefloss.get(name)
    seen = {Pairs: lambda: feedback, Labels: feedback.to_labels, Rankings: feedback.to_rankings}[
        loss.spec.feedback
    ]()
    if loss.needs - {"tokens", "per_token", "scores"}:
        pytest.skip("needs more than log-probs")
    evaluation = loss.train().evaluate(seen)
    state = loss.state_dict()
    found = Diagnosis(loss).figures(feedback, seen, evaluation)
    assert {"zero_gradient", "saturated", "falling_pairs"} <= found.keys()
    assert found["saturated"].mean == 0
    assert loss.state_dict() == state
    assert all(value.training for value in loss.state.values())


def test_without_a_reference_only_gradients_are_watched():
    feedback = Pairs(side(HEALTHY[0], reference=False), side(HEALTHY[1], reference=False))
    diagnosis = watch("simpo")
    feed(diagnosis, feedback)
    assert diagnosis.shown().keys() == {"zero_gradient", "batch_without_gradient", "saturated"}
    assert diagnosis.judge(1) == []


def test_resistance_is_read_off_the_gradient():
    assert {"dpop", "apo_zero", "nca_pair"} <= set(resisting())
    assert all(prefloss.specs[name].holds_chosen for name in resisting())
    assert resisting(["dpo", "ipo", "hinge", "robust_dpo", "apo_down", "cal_dpo", "sppo_hard"]) == []
    assert resists_falling(prefloss.get("1.0*dpo + 1.0*nll"))
    stateful = prefloss.get("bco")
    resists_falling(stateful.train())
    assert stateful.state_dict() == prefloss.get("bco").state_dict()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"falling": 0}, ValueError, r"falling: got 0, expected a number in \(0, 1\]"),
        ({"saturated": 1.5}, ValueError, "saturated: got 1.5"),
        ({"gone": None}, TypeError, "gone: got None, expected a number"),
        ({"kl": "far"}, TypeError, "kl: got 'far'"),
        ({"fall": -1.0}, ValueError, "fall: got -1.0"),
        ({"examples": 0}, ValueError, "examples: got 0"),
    ],
)
def test_thresholds_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        Thresholds(**given)


def test_what_a_trainer_is_given():
    loss = prefloss.get("dpo")
    assert Diagnosis.of(loss, None) is Diagnosis.of(loss, False) is None
    assert Diagnosis.of(loss, True).thresholds == Thresholds()
    own = Diagnosis.of(loss, Thresholds(kl=None))
    assert Diagnosis.of(loss, config_of(own)).thresholds == own.thresholds
    assert config_of(None) is False
    with pytest.raises(TypeError, match="diagnose: got 'yes', expected"):
        Diagnosis.of(loss, "yes")
    assert math.isnan(own._correlation())
