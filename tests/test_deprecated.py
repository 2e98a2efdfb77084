"""Names of the last release still work, each with a warning that gives the new one."""

import importlib

import pytest

import prefloss
from prefloss.training import PreferenceObjective, Reference
from prefloss.worlds import language

MOVED = {
    "prefloss": {"explain": "prefloss.logprobs"},
    "prefloss.plan": {"explain": "prefloss.logprobs", "Plan": "prefloss.kernels.plan"},
    "prefloss.diagnostics": dict.fromkeys(("Stat", "implicit_rewards", "metrics"), "prefloss.metrics"),
    "prefloss.demo.world": dict.fromkeys(("TOPICS", "true_reward"), "prefloss.worlds.language"),
    "prefloss.losses": {
        **dict.fromkeys(
            ("get", "register", "specs", "Loss", "LossSpec", "capabilities"), "prefloss.registry"
        ),
        **dict.fromkeys(("Positive", "Interval", "State", "Linear", "Moments"), "prefloss.hyperparameters"),
    },
}


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [(module, name, home) for module, names in MOVED.items() for name, home in names.items()],
)
def test_an_old_name_leads_to_the_new_place(module, name, home):
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{name} is now {home}\.{name}"):
        value = getattr(importlib.import_module(module), name)
    assert value is getattr(importlib.import_module(home), name)


def test_names_that_changed():
    with pytest.warns(DeprecationWarning, match="prefloss.registry.WeightedSum"):
        assert prefloss.losses.Composite is prefloss.registry.WeightedSum
    with pytest.warns(DeprecationWarning, match="sync_with"):
        prefloss.get("bco").reduce_over(lambda sums: sums)
    with pytest.warns(DeprecationWarning, match="rankings_as"):
        objective = PreferenceObjective("dpo", reference=Reference.cached(), pairs="all")
    assert objective.rankings_as == "all"


def test_names_of_the_generated_world():
    with pytest.warns(DeprecationWarning, match="prefloss.worlds.language.LanguageWorld"):
        assert importlib.import_module("prefloss.demo.world").World is language.LanguageWorld


def test_names_of_the_trl_integration():
    trl = importlib.import_module("prefloss.integrations.trl")
    transformers = importlib.import_module("prefloss.integrations.transformers")
    with pytest.warns(DeprecationWarning, match="trainer_with_table"):
        assert transformers.reads_table is trl.trainer_with_table
    with pytest.warns(DeprecationWarning, match="options.reads_mismatched"):
        assert trl.wants_mismatched(prefloss.get("kto"))
    with pytest.warns(DeprecationWarning, match="options.resolve_named"):
        assert callable(trl.resolve)


def test_an_unknown_name_is_unknown():
    with pytest.raises(AttributeError, match="module 'prefloss' has no attribute 'nothing'"):
        prefloss.nothing  # noqa: B018
