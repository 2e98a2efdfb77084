"""The registry: names, aliases, hyperparameters, entry points."""

import copy
import importlib.metadata
import inspect
import pickle
import sys
import types

import pytest
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs, Rankings, registry

PAIRS = Pairs.of(chosen=[1.5, 0.0], rejected=[-1.0, 0.0])


@pytest.fixture
def registered():
    """Register losses for the length of a test."""
    names = []

    def add(function=None, /, **traits):
        made = prefloss.register(function) if function else prefloss.register(**traits)

        def decorate(decorated):
            result = made(decorated)
            names.append(traits.get("name") or decorated.__name__)
            return result

        if function:
            names.append(function.__name__)
            return made
        return decorate

    yield add
    for name in names:
        registry.unregister(name)


def test_get_binds_and_names_everything():
    loss = prefloss.get("ipo", tau=0.2)
    assert loss.name == "ipo"
    assert loss.spec is prefloss.specs["ipo"]
    assert loss.params == {"tau": 0.2, "per_token": True}
    assert repr(loss) == "ipo(tau=0.2, per_token=True)"
    assert loss.beta == 0.2


def test_aliases_are_the_same_loss():
    assert prefloss.get("sigmoid").spec is prefloss.specs["dpo"]
    assert "sigmoid" not in prefloss.specs


def test_specs_are_read_only():
    with pytest.raises(TypeError):
        prefloss.specs["dpo"] = None
    with pytest.raises(TypeError):
        prefloss.get("dpo").params["beta"] = 1.0


def test_a_spec_says_what_the_loss_is():
    spec = prefloss.specs["ipo"]
    assert (spec.paper, spec.equation) == ("arXiv:2310.12036", "17")
    assert spec.reference.startswith("Azar et al. 2023")
    assert spec.summary == "Squared distance of the margin from a fixed target (IPO)."
    assert r"\frac{1}{2 \tau}" in spec.formula
    assert "OpenRLHF" in spec.note
    assert spec.parameters["tau"].description == "Strength of the pull towards the reference, in 1/nats."
    assert str(spec.parameters["tau"].constraint) == "> 0"
    assert spec.feedback is Pairs
    assert prefloss.specs["kto"].feedback is Labels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dppo", "did you mean 'dpo'"),
        ("DPO", "did you mean 'dpo'"),
        ("sigmoyd", "did you mean 'sigmoid'"),
        ("rpo", r"means several things:\n  dpo_nll: iterative reasoning"),
        ("R-DPO", "robust_dpo: provably robust DPO"),
        ("XPO", "exploratory PO"),
        ("zzzzzz", r"unknown loss 'zzzzzz'\. prefloss.specs holds all"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        prefloss.get(name)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bta": 0.1}, TypeError, r"dpo: unknown hyperparameter 'bta'; did you mean 'beta'"),
        ({"tau": 0.1}, TypeError, r"unknown hyperparameter 'tau'; it takes 'beta'; and the modifiers wpo, "),
        ({"beta": 0}, ValueError, r"dpo: beta: got 0, expected a number > 0"),
        ({"beta": -0.1}, ValueError, r"beta: got -0.1"),
        ({"beta": float("nan")}, ValueError, "beta: got nan"),
        ({"beta": float("inf")}, ValueError, "beta: got inf"),
        ({"beta": "0.1"}, TypeError, r"beta: got '0.1', expected a number > 0"),
        ({"beta": True}, TypeError, "beta: got True"),
        ({"beta": None}, TypeError, "beta: got None"),
        ({"label_smoothing": 0.5}, ValueError, r"label_smoothing: got 0.5, expected a number >= 0 and < 0.5"),
    ],
)
def test_bad_hyperparameters_are_refused_at_construction(given, error, message):
    with pytest.raises(error, match=message):
        prefloss.get("dpo", **given)


def test_an_integer_is_a_number():
    assert prefloss.get("dpo", beta=1)(PAIRS).shape == (2,)


def test_flags_are_flags():
    with pytest.raises(TypeError, match="per_token: got 1, expected True or False"):
        prefloss.get("ipo", per_token=1)


@pytest.mark.parametrize("name", ["ipo(tau=0.2)", " ipo( tau = 0.2 )"])
def test_hyperparameters_in_the_name(name):
    assert prefloss.get(name.strip(), per_token=False).params == {"tau": 0.2, "per_token": False}


@pytest.mark.parametrize("name", ["ipo(0.2)", "ipo(tau=-x)", "ipo(tau=0.1", "ipo()(tau=1)", "a.ipo(tau=1)"])
def test_names_that_are_no_call(name):
    with pytest.raises(ValueError, match=r"expected a loss name with literal hyperparameters"):
        prefloss.get(name)


def test_a_hyperparameter_given_twice():
    with pytest.raises(TypeError, match="tau: got it both in the name and as an argument"):
        prefloss.get("ipo(tau=0.2)", tau=0.3)


def exponential(pairs: Pairs, *, rate: float) -> torch.Tensor:
    """Exponential loss of the margin."""
    return torch.exp(-rate * pairs.margin())


def test_register_returns_the_function_unchanged(registered):
    assert registered(exponential) is exponential
    assert prefloss.get("exponential", rate=1.0)(PAIRS)[1].item() == 1
    with pytest.raises(TypeError, match="exponential: missing hyperparameter 'rate'"):
        prefloss.get("exponential")


def test_register_refuses_a_taken_name(registered):
    registered(name="mine", aliases={"own": "me"})(exponential)
    for name in ("dpo", "sigmoid", "mine", "own"):
        with pytest.raises(ValueError, match=f"name: got '{name}', which another loss has"):
            prefloss.register(name=name)(exponential)
    with pytest.raises(
        ValueError, match=r"'sigmoid', which another loss has \(prefloss\.losses\.pairwise\.dpo\)"
    ):
        prefloss.register(name="new", aliases={"sigmoid": ""})(exponential)
    assert "new" not in prefloss.specs


@pytest.mark.parametrize(
    ("function", "traits", "error", "message"),
    [
        (lambda pairs: pairs, {"name": "a"}, TypeError, "first parameter: got annotation None"),
        (exponential, {"name": "not a name"}, ValueError, "expected an identifier"),
        (
            exponential,
            {"monoton": True},
            TypeError,
            "got the unknown trait 'monoton', expected aliases, beta",
        ),
        (
            exponential,
            {"beta": "tau"},
            TypeError,
            r"beta: got 'tau', expected one of its hyperparameters \['rate'\]",
        ),
        (3, {"name": "a"}, TypeError, "function: got 3"),
    ],
)
def test_register_refuses_what_is_no_loss(function, traits, error, message):
    with pytest.raises(error, match=message):
        prefloss.register(**traits)(function)


def test_hyperparameters_are_keyword_only():
    def positional(pairs: Pairs, beta: float = 0.1) -> torch.Tensor:
        return pairs.margin()

    with pytest.raises(
        TypeError, match=r"beta: got a positional or keyword parameter, expected keyword-only"
    ):
        prefloss.register(positional)


def test_a_loss_that_reduces_is_told_so(registered):
    @registered(name="reduced")
    def reduced(pairs: Pairs) -> torch.Tensor:
        return pairs.margin().mean()

    with pytest.raises(
        ValueError, match=r"reduced: got values of shape \[\], expected \[2\]: one per example"
    ):
        prefloss.get("reduced")(PAIRS)


@pytest.mark.parametrize(
    ("name", "feedback", "message"),
    [
        ("kto", PAIRS, r"kto: feedback: got Pairs, expected Labels; convert with pairs.to_labels\(\)"),
        ("dpo", PAIRS.to_labels(), "dpo: feedback: got Labels, expected Pairs"),
        ("dpo", Rankings(LogRatios.of([[1.0, 2.0]]), [[1.0, 2.0]]), r"convert with rankings.to_pairs\("),
        ("dpo", torch.zeros(2), "got Tensor, expected Pairs"),
    ],
)
def test_another_kind_of_feedback_names_the_conversion(name, feedback, message):
    with pytest.raises(TypeError, match=message):
        prefloss.get(name)(feedback)


def test_a_missing_reference_is_named():
    bare = LogRatios([-1.0])
    with pytest.raises(ValueError, match="dpo: reference: got None"):
        prefloss.get("dpo")(Pairs(bare, bare))


def test_a_loss_is_copied_and_pickled():
    loss = prefloss.get("hinge", beta=0.2)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert torch.equal(twin(PAIRS), loss(PAIRS))


def test_entry_points_are_asked_only_for_a_missing_name(monkeypatch):
    module = types.ModuleType("their_package")
    module.their_loss = exponential
    monkeypatch.setitem(sys.modules, "their_package", module)
    asked = []
    point = importlib.metadata.EntryPoint("their_loss", "their_package:their_loss", "prefloss.losses")

    def entry_points(*, group, name):
        asked.append((group, name))
        return [point] if name == "their_loss" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    prefloss.get("dpo")
    assert not asked
    try:
        assert prefloss.get("their_loss", rate=2.0).spec.function is exponential
        assert asked == [("prefloss.losses", "their_loss")]
        prefloss.get("their_loss", rate=2.0)
        assert len(asked) == 1
    finally:
        registry.unregister("their_loss")


def test_the_registered_functions_read_like_the_template():
    for spec in prefloss.specs.values():
        assert spec.summary, spec.name
        assert spec.formula, spec.name
        assert spec.paper, spec.name
        assert spec.note, spec.name
        assert all(parameter.description for parameter in spec.parameters.values()), spec.name
        assert inspect.getdoc(spec.function).count("Example:") == 1, spec.name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_has_state_and_what_was_stated(copied):
    loss = prefloss.get("bco", beta=0.3).train()
    loss(prefloss.Labels(prefloss.LogRatios.of([1.0, -2.0]), [True, False]))
    other = copied(loss)
    assert dict(other.stated) == {"beta": 0.3}
    assert other.params == loss.params
    assert other.state_dict() == loss.state_dict()


def test_the_mean_runs_under_vmap():
    """Token counts that differ between runs: the warning about empty completions cannot look at them."""
    policy, tokens = torch.randn(3, 2, 4), torch.tensor([[[5, 2, 7, 1], [3, 3, 0, 2]]] * 3)
    loss = prefloss.get("0.5*ln_dpo + 0.5*kto_zero")

    def mean(policy, tokens):
        chosen, rejected = (LogRatios(policy[i], torch.zeros(4), tokens[i]) for i in (0, 1))
        return loss.mean(Pairs(chosen, rejected))

    means = torch.func.vmap(mean)(policy, tokens)
    with registry.quiet():
        torch.testing.assert_close(
            means, torch.stack([mean(*run) for run in zip(policy, tokens, strict=True)])
        )
