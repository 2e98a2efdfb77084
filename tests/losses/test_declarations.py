"""What each loss declares, number by number: a default or a name that changes unseen changes a training.

Change an entry only with a line in the changelog.
"""

import pytest

import prefloss
from prefloss.registry import LossSpec

DEFAULTS = {
    "aot": {"beta": 0.01},
    "aot_unpaired": {"beta": 0.01},
    "dr_dpo": {"beta": 0.1, "beta_prime": 1.0},
    "kto_pair": {"beta": 0.1},
    "beta_dpo": {"beta": 0.1, "alpha": 0.6, "keep": 0.8, "moments": "running", "draws": 0},
    "alpha_dpo": {"beta": 2.5, "gamma": 1.5, "alpha": 0.2, "moments": "running"},
    "f_dpo_forward_kl": {"beta": 0.1},
    "f_dpo_js": {"beta": 0.1},
    "f_dpo_alpha": {"beta": 0.1, "alpha": 0.5},
    "chipo": {"beta": 0.1, "r_max": 1.0},
    "soft_label_dpo": {"beta": 0.1, "eta": 1.0},
    "margin_dpo": {"beta": 0.1, "margin_weight": 1.0},
    "odpo": {"beta": 0.1, "alpha": 1.0, "scale": "log"},
    "rpo_bwd_kl": {"beta": 0.1, "eta": 1.0},
    "rpo_fwd_kl": {"beta": 0.1, "eta": 1.0},
    "rpo_sq": {"beta": 0.1, "eta": 1.0},
    "rebel": {"eta": 1.0},
    "sppo": {"beta": 0.001},
    "dpo_pl": {"beta": 0.1},
    "s_dpo": {"beta": 1.0},
    "infonca": {"beta": 0.01, "alpha": 1.0},
    "nca": {"beta": 0.01, "alpha": 1.0},
    "exo": {"beta": 0.1, "beta_r": 0.1},
    "rrhf": {"rank_weight": 1.0, "nll_weight": 1.0},
    "pro": {"nll_weight": 0.05},
    "lipo_lambda": {"beta": 0.05},
    "cdpo": {"beta": 0.1, "epsilon": 0.1},
    "robust_dpo": {"beta": 0.1, "epsilon": 0.1},
    "exo_pair": {"beta": 0.1, "epsilon": 0.001},
    "discopop": {"beta": 0.05, "tau": 0.05},
    "gpo_exponential": {"beta": 0.1},
    "gpo_truncated_quadratic": {"beta": 0.1},
    "gpo_savage": {"beta": 0.1},
    "dpo": {"beta": 0.1},
    "ipo": {"tau": 0.1, "per_token": True},
    "hinge": {"beta": 0.1},
    "ln_dpo": {"beta": 5.0},
    "r_dpo": {"beta": 0.1, "alpha": 0.01},
    "hdpo": {"beta": 0.1, "alpha": 0.9},
    "dpo_nll": {"beta": 0.1, "nll_weight": 1.0},
    "xpo": {"beta": 0.1, "alpha": 1e-05},
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    "sampo": {"beta": 0.1, "subset": 0},
    "wpo": {"beta": 0.01},
    "tdpo1": {"beta": 0.1},
    "tdpo2": {"beta": 0.1, "alpha": 0.5},
    "humanline_dpo": {"beta": 0.1, "log_epsilon_p": -1.0, "log_epsilon_r": 1.5},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "kl_baseline": "auto"},
    "kto_zero": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {"beta": 0.1, "shift": "running"},
    "npo": {"beta": 0.1},
    "simnpo": {"beta": 2.5, "gamma": 0.0},
    "a2po": {"beta": 0.001},
    "slic_hf": {"delta": 1.0, "nll_weight": 0.1},
    "simpo": {"beta": 2.5, "gamma": 1.375},
    "cpo": {"beta": 0.1, "nll_weight": 1.0},
    "cpo_simpo": {"beta": 10.0, "gamma": 5.4, "nll_weight": 0.05},
    "orpo": {"odds_weight": 0.1},
    "alphapo": {"alpha": 0.25, "beta": 2.5, "gamma": 0.1},
    "simper": {},
    "tpo": {"beta": 0.01, "nll_weight": 1.0},
    "tpo_l": {"beta": 0.01, "gamma": 0.5, "nll_weight": 1.0},
    "nll": {"average": "sequence"},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "nca_pair": {"beta": 0.01},
    "bco_pair": {"beta": 0.01, "shift": "running"},
    "sppo_hard": {"beta": 0.001},
    "dpop": {"beta": 0.1, "penalty": 50.0},
    "bdpo": {"beta": 0.1, "mixture": 0.5},
    "cal_dpo": {"beta": 0.001, "calibration_weight": 0.5},
    "dpo_shift": {"beta": 0.1, "rejected_weight": 0.7},
    "gamma_po": {
        "beta": 10.0,
        "gamma": 4.0,
        "tau": 10.0,
        "steps": 20,
        "queue": "running",
        "reference": False,
    },
    "rpo_relative": {"beta": 0.1, "temperature": 0.5},
    "discopop_cell": {"beta": 0.05},
    "discopop_padll": {"beta": 0.05},
    "discopop_pfl": {"beta": 0.05},
    "discopop_dbaql": {"beta": 0.05},
    "discopop_aql": {"beta": 0.05},
    "discopop_aqfl": {"beta": 0.05},
    "dro": {"tau": 1.0},
    "kto_logsigmoid": {
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "kl_baseline": "auto",
    },
    "dpo_sigmoid_prob": {"beta": 0.1},
    "cauchy": {"beta": 0.1},
    "bregman_dpo": {"beta": 0.1, "member": "sba", "lam": 0.2, "scale": 4.0},
    "focalpo": {"beta": 0.1, "gamma": 2.0, "detach": True},
    "c2dpo": {"beta": 0.1, "constraint_weight": 0.0002},
    "minor_dpo": {"beta": 0.1},
    "balanced_bpo": {"beta": 0.1, "alpha": 0.3},
    "asft": {"beta": 0.1},
    "selm": {"beta": 0.01, "alpha": 0.001},
    "mallows_dpo": {"beta": 0.1, "dispersion": 0.29},
    "rainbowpo": {"beta": 10.0, "gamma": 0.1, "mixing": 0.25, "dispersion": 0.29},
    "tis_dpo": {"beta": 0.1, "alpha": 0.0},
}
# What differs from the defaults of `LossSpec`; the KL strength is `beta` where there is one.
TRAITS = {
    "aot": {"separable": False, "monotone": True},
    "aot_unpaired": {"separable": False, "monotone": True},
    "dr_dpo": {"separable": False, "monotone": True},
    "kto_pair": {"separable": False, "monotone": True, "holds_chosen": True},
    "beta_dpo": {"separable": False, "stateful": True},
    "alpha_dpo": {"separable": False, "stateful": True, "needs": ["tokens"]},
    "f_dpo_forward_kl": {"monotone": True},
    "f_dpo_js": {"monotone": True},
    "f_dpo_alpha": {"monotone": True},
    "chipo": {"monotone": True},
    "soft_label_dpo": {"difference_only": True, "needs": ["scores"]},
    "margin_dpo": {"difference_only": True, "monotone": True, "needs": ["scores"]},
    "odpo": {"difference_only": True, "monotone": True, "needs": ["scores"]},
    "rpo_bwd_kl": {"difference_only": True, "needs": ["scores"]},
    "rpo_fwd_kl": {"difference_only": True, "needs": ["scores"]},
    "rpo_sq": {"difference_only": True, "needs": ["scores"]},
    "rebel": {"difference_only": True, "needs": ["scores"]},
    "sppo": {"needs": ["scores"]},
    "dpo_pl": {"monotone": True},
    "s_dpo": {"monotone": True},
    "rrhf": {"needs_reference": False, "monotone": True, "needs": ["tokens"]},
    "pro": {"needs_reference": False, "monotone": True, "needs": ["tokens"]},
    "cdpo": {"difference_only": True},
    "robust_dpo": {"difference_only": True, "monotone": True},
    "exo_pair": {"difference_only": True},
    "discopop": {"difference_only": True},
    "gpo_exponential": {"difference_only": True, "monotone": True},
    "gpo_truncated_quadratic": {"difference_only": True, "monotone": True},
    "gpo_savage": {"difference_only": True, "monotone": True},
    "dpo": {"difference_only": True, "monotone": True},
    "ipo": {"beta": "tau", "difference_only": True, "reads": ["tokens"]},
    "hinge": {"difference_only": True, "monotone": True},
    "ln_dpo": {"difference_only": True, "monotone": True, "needs": ["tokens"]},
    "r_dpo": {"difference_only": True, "monotone": True, "needs": ["tokens"]},
    "hdpo": {"monotone": True},
    "dpo_nll": {"monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "xpo": {"monotone": True, "needs": ["gold"]},
    "ld_dpo": {"monotone": True, "needs": ["per_token"]},
    "sampo": {"monotone": True, "stateful": True, "needs": ["per_token"]},
    "wpo": {"needs": ["per_token.log_sum_sq"]},
    "tdpo1": {"monotone": True, "needs": ["per_token.kl"]},
    "tdpo2": {"monotone": True, "needs": ["per_token.kl"]},
    "humanline_dpo": {"monotone": True, "needs": ["per_token"]},
    "kto": {"separable": False, "monotone": True, "holds_chosen": True, "reads": ["kl", "mismatched"]},
    "kto_zero": {"monotone": True, "holds_chosen": True},
    "bco": {"separable": False, "stateful": True, "holds_chosen": True},
    "simnpo": {"needs_reference": False, "needs": ["tokens"]},
    "a2po": {"needs": ["baseline", "scores"]},
    "slic_hf": {"needs_reference": False, "monotone": True, "holds_chosen": True, "reads": ["gold"]},
    "simpo": {"needs_reference": False, "monotone": True, "needs": ["tokens"]},
    "cpo": {"needs_reference": False, "monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "cpo_simpo": {"needs_reference": False, "monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "orpo": {"needs_reference": False, "monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "alphapo": {"needs_reference": False, "monotone": True, "needs": ["tokens"]},
    "simper": {"needs_reference": False, "monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "tpo": {"needs_reference": False, "monotone": True, "needs": ["gold", "tokens"]},
    "tpo_l": {"needs_reference": False, "monotone": True, "needs": ["gold", "tokens"]},
    "nll": {"needs_reference": False, "monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "apo_zero": {"monotone": True, "holds_chosen": True},
    "nca_pair": {"holds_chosen": True},
    "bco_pair": {"separable": False, "stateful": True},
    "dpop": {"monotone": True, "holds_chosen": True},
    "bdpo": {"monotone": True, "holds_chosen": True},
    "dpo_shift": {"monotone": True},
    "gamma_po": {
        "needs_reference": False,
        "separable": False,
        "monotone": True,
        "stateful": True,
        "needs": ["tokens"],
    },
    "rpo_relative": {"separable": False, "monotone": True, "needs": ["embedding"]},
    "discopop_cell": {"difference_only": True, "monotone": True},
    "discopop_padll": {"difference_only": True},
    "discopop_dbaql": {"separable": False},
    "discopop_aql": {"separable": False},
    "discopop_aqfl": {"separable": False},
    "dro": {"beta": "tau", "needs": ["baseline", "scores"], "holds_chosen": True},
    "kto_logsigmoid": {
        "separable": False,
        "monotone": True,
        "holds_chosen": True,
        "reads": ["kl", "mismatched"],
    },
    "dpo_sigmoid_prob": {"difference_only": True, "monotone": True},
    "cauchy": {"difference_only": True, "monotone": True},
    "bregman_dpo": {"difference_only": True, "monotone": True},
    "focalpo": {"difference_only": True},
    "c2dpo": {"holds_chosen": True},
    "minor_dpo": {"monotone": True, "holds_chosen": True},
    "balanced_bpo": {"monotone": True, "holds_chosen": True},
    "asft": {"needs_reference": False, "monotone": True, "holds_chosen": True, "needs": ["tokens"]},
    "selm": {"monotone": True, "needs": ["gold"]},
    "mallows_dpo": {"monotone": True, "needs": ["per_token.reference_entropy"]},
    "rainbowpo": {"monotone": True, "needs": ["per_token.reference_entropy", "tokens"]},
    "tis_dpo": {"monotone": True, "needs": ["per_token.weight"], "reads": ["per_token.reverse_kl"]},
}
# Other names, with the hyperparameters that they set.
ALIASES = {
    "aot_unpaired": {"aot_pair": {}, "oxrl:aot": {}},
    "f_dpo_forward_kl": {"forward_kl": {}},
    "f_dpo_js": {"js_divergence": {}},
    "f_dpo_alpha": {"ms-swift:alpha_divergence": {}},
    "margin_dpo": {"sigmoid_with_margin": {}},
    "robust_dpo": {"robust": {}},
    "discopop": {"lrml": {}},
    "gpo_exponential": {"gpo_exp": {}},
    "gpo_truncated_quadratic": {"gpo_trunc_quad": {}},
    "dpo": {"sigmoid": {}},
    "ipo": {
        "openrlhf:ipo": {"per_token": False},
        "oxrl:ipo": {"per_token": False},
        "turbo:ipo": {"per_token": False},
    },
    "hinge": {"RSOLoss": {}, "hinge-norm": {}},
    "ln_dpo": {"sigmoid_norm": {}, "dpo_norm": {}},
    "kto_zero": {"apo_zero_unpaired": {}, "KTOZero": {}},
    "slic_hf": {"slic": {}, "SLIC_HF": {}},
    "cpo_simpo": {
        "trl:simpo": {"nll_weight": 1.0},
        "ms-swift:simpo": {"nll_weight": 1.0},
        "axolotl:simpo": {"nll_weight": 1.0},
        "liger:simpo": {"nll_weight": 1.0},
    },
    "tpo_l": {"tpo-l": {}},
    "nll": {"sft": {"average": "batch"}},
    "bco_pair": {
        "trl:bco_pair": {"shift": 0.0},
        "liger:bco_pair": {"shift": 0.0},
        "axolotl:bco_pair": {"shift": 0.0},
        "oxrl:bco_pair": {"shift": 0.0},
        "biasedNCA": {"shift": 0.0},
    },
    "cal_dpo": {"caldpo": {}},
    "discopop_cell": {"CELL": {}},
    "discopop_padll": {"PADLL": {}},
    "discopop_pfl": {"PFL": {}},
    "discopop_dbaql": {"DBAQL": {}},
    "discopop_aql": {"AQL": {}},
    "discopop_aqfl": {"AQFL": {}},
    "dpo_sigmoid_prob": {"DPOSigmoid": {}},
    "focalpo": {"focal_po": {}},
    "balanced_bpo": {"oxrl:bpo": {"alpha": 1.0}},
    "asft": {"turbo:ASFT": {}},
}

DECLARED = ("needs_reference", "separable", "difference_only", "monotone", "holds_chosen", "stateful")


def plain(name):
    """What `LossSpec` takes where a loss declares nothing."""
    return LossSpec.__dataclass_fields__[name].default


def test_every_loss_is_listed():
    own = {
        name
        for name, spec in prefloss.specs.items()
        if spec.function.__module__.startswith("prefloss.losses")
    }
    assert set(DEFAULTS) == own


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    """AUDIT T1."""
    parameters = prefloss.specs[name].parameters
    assert {parameter.name: parameter.default for parameter in parameters.values()} == DEFAULTS[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_traits(name):
    """AUDIT T1."""
    spec, declared = prefloss.specs[name], TRAITS.get(name, {})
    for trait in DECLARED:
        assert getattr(spec, trait) == declared.get(trait, plain(trait)), trait
    for trait in ("needs", "reads"):
        assert sorted(getattr(spec, trait)) == declared.get(trait, []), trait
    assert spec.beta == declared.get("beta", "beta" if "beta" in DEFAULTS[name] else None)


@pytest.mark.parametrize("name", DEFAULTS)
def test_aliases(name):
    """AUDIT T1."""
    found = {alias: dict(entry.parameters) for alias, entry in prefloss.specs[name].aliases.items()}
    assert found == ALIASES.get(name, {})
