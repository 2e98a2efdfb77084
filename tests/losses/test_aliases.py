"""Names that other trainers use: each is found, and means what that trainer means by it."""

import pytest

import prefloss

PEERS = {
    "TRL 1.16 DPO": "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft sigmoid_norm",
    "TRL 1.16 KTO": "kto apo_zero_unpaired",
    "TRL before": "kto_pair aot_pair bco",
    "TRL's CPO and ORPO": "cpo orpo simpo alphapo",
    "LLaMA-Factory": "sigmoid hinge ipo kto_pair orpo simpo bco_pair",
    "ms-swift": "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot apo_zero apo_down discopop kto cpo "
    "orpo simpo",
    "HALOs": "dpo cdpo ipo slic simpo kto orpo KTOZero",
    "torchtune": "RSOLoss",
    "open-instruct": "dpo dpo_norm simpo wpo",
    "NeMo-Aligner": "dpo ipo rpo_bwd_kl rpo_fwd_kl rpo_sq kto",
    "Axolotl": "dpo ipo orpo kto simpo",
}


@pytest.mark.parametrize(
    ("peer", "name"), [(peer, name) for peer, names in PEERS.items() for name in names.split()]
)
def test_a_peers_name_is_found(peer, name):
    assert prefloss.get(name).spec in prefloss.specs.values()


ALIASES = [(alias, name) for name, spec in prefloss.specs.items() for alias in spec.aliases]


@pytest.mark.parametrize(("alias", "name"), ALIASES)
def test_an_alias_builds_its_loss_with_what_it_sets(alias, name):
    loss, spec = prefloss.get(alias), prefloss.specs[name]
    assert loss.spec is spec
    assert alias not in prefloss.specs
    assert spec.aliases[alias].peers
    for parameter, value in spec.aliases[alias].parameters.items():
        assert loss.params[parameter] == value
