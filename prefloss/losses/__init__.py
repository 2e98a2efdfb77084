"""Preference losses: pure functions, feedback -> one value per example. `prefloss.get` finds each by its name."""

from typing import TYPE_CHECKING
from typing import Any as _Any

from prefloss._deprecated import moved as _moved
from prefloss.losses.batch_coupled import alpha_dpo as alpha_dpo
from prefloss.losses.batch_coupled import aot as aot
from prefloss.losses.batch_coupled import aot_unpaired as aot_unpaired
from prefloss.losses.batch_coupled import beta_dpo as beta_dpo
from prefloss.losses.batch_coupled import dr_dpo as dr_dpo
from prefloss.losses.batch_coupled import kto_pair as kto_pair
from prefloss.losses.contrib import asft as asft
from prefloss.losses.contrib import balanced_bpo as balanced_bpo
from prefloss.losses.contrib import bregman_dpo as bregman_dpo
from prefloss.losses.contrib import c2dpo as c2dpo
from prefloss.losses.contrib import cauchy as cauchy
from prefloss.losses.contrib import discopop_aqfl as discopop_aqfl
from prefloss.losses.contrib import discopop_aql as discopop_aql
from prefloss.losses.contrib import discopop_cell as discopop_cell
from prefloss.losses.contrib import discopop_dbaql as discopop_dbaql
from prefloss.losses.contrib import discopop_padll as discopop_padll
from prefloss.losses.contrib import discopop_pfl as discopop_pfl
from prefloss.losses.contrib import dpo_sigmoid_prob as dpo_sigmoid_prob
from prefloss.losses.contrib import dro as dro
from prefloss.losses.contrib import focalpo as focalpo
from prefloss.losses.contrib import gamma_po as gamma_po
from prefloss.losses.contrib import kto_logsigmoid as kto_logsigmoid
from prefloss.losses.contrib import mallows_dpo as mallows_dpo
from prefloss.losses.contrib import minor_dpo as minor_dpo
from prefloss.losses.contrib import rainbowpo as rainbowpo
from prefloss.losses.contrib import rpo_relative as rpo_relative
from prefloss.losses.contrib import selm as selm
from prefloss.losses.contrib import tis_dpo as tis_dpo
from prefloss.losses.divergences import chipo as chipo
from prefloss.losses.divergences import f_dpo_alpha as f_dpo_alpha
from prefloss.losses.divergences import f_dpo_forward_kl as f_dpo_forward_kl
from prefloss.losses.divergences import f_dpo_js as f_dpo_js
from prefloss.losses.graded import margin_dpo as margin_dpo
from prefloss.losses.graded import odpo as odpo
from prefloss.losses.graded import rebel as rebel
from prefloss.losses.graded import rpo_bwd_kl as rpo_bwd_kl
from prefloss.losses.graded import rpo_fwd_kl as rpo_fwd_kl
from prefloss.losses.graded import rpo_sq as rpo_sq
from prefloss.losses.graded import soft_label_dpo as soft_label_dpo
from prefloss.losses.graded import sppo as sppo
from prefloss.losses.listwise import dpo_pl as dpo_pl
from prefloss.losses.listwise import exo as exo
from prefloss.losses.listwise import infonca as infonca
from prefloss.losses.listwise import lipo_lambda as lipo_lambda
from prefloss.losses.listwise import nca as nca
from prefloss.losses.listwise import pro as pro
from prefloss.losses.listwise import rrhf as rrhf
from prefloss.losses.listwise import s_dpo as s_dpo
from prefloss.losses.margin import cdpo as cdpo
from prefloss.losses.margin import discopop as discopop
from prefloss.losses.margin import exo_pair as exo_pair
from prefloss.losses.margin import gpo_exponential as gpo_exponential
from prefloss.losses.margin import gpo_savage as gpo_savage
from prefloss.losses.margin import gpo_truncated_quadratic as gpo_truncated_quadratic
from prefloss.losses.margin import robust_dpo as robust_dpo
from prefloss.losses.pairwise import dpo as dpo
from prefloss.losses.pairwise import dpo_nll as dpo_nll
from prefloss.losses.pairwise import hdpo as hdpo
from prefloss.losses.pairwise import hinge as hinge
from prefloss.losses.pairwise import ipo as ipo
from prefloss.losses.pairwise import ln_dpo as ln_dpo
from prefloss.losses.pairwise import r_dpo as r_dpo
from prefloss.losses.pairwise import xpo as xpo
from prefloss.losses.per_token import humanline_dpo as humanline_dpo
from prefloss.losses.per_token import ld_dpo as ld_dpo
from prefloss.losses.per_token import sampo as sampo
from prefloss.losses.per_token import tdpo1 as tdpo1
from prefloss.losses.per_token import tdpo2 as tdpo2
from prefloss.losses.per_token import wpo as wpo
from prefloss.losses.pointwise import a2po as a2po
from prefloss.losses.pointwise import bco as bco
from prefloss.losses.pointwise import kto as kto
from prefloss.losses.pointwise import kto_zero as kto_zero
from prefloss.losses.pointwise import npo as npo
from prefloss.losses.pointwise import simnpo as simnpo
from prefloss.losses.reference_free import alphapo as alphapo
from prefloss.losses.reference_free import cpo as cpo
from prefloss.losses.reference_free import cpo_simpo as cpo_simpo
from prefloss.losses.reference_free import nll as nll
from prefloss.losses.reference_free import orpo as orpo
from prefloss.losses.reference_free import simper as simper
from prefloss.losses.reference_free import simpo as simpo
from prefloss.losses.reference_free import slic_hf as slic_hf
from prefloss.losses.reference_free import tpo as tpo
from prefloss.losses.reference_free import tpo_l as tpo_l
from prefloss.losses.two_sided import apo_down as apo_down
from prefloss.losses.two_sided import apo_zero as apo_zero
from prefloss.losses.two_sided import bco_pair as bco_pair
from prefloss.losses.two_sided import bdpo as bdpo
from prefloss.losses.two_sided import cal_dpo as cal_dpo
from prefloss.losses.two_sided import dpo_shift as dpo_shift
from prefloss.losses.two_sided import dpop as dpop
from prefloss.losses.two_sided import nca_pair as nca_pair
from prefloss.losses.two_sided import sppo_hard as sppo_hard

if TYPE_CHECKING:
    from prefloss.losses._core.chooser import Suggestion as Suggestion
    from prefloss.losses._core.chooser import Suggestions as Suggestions
    from prefloss.losses._core.chooser import suggest as suggest

_CHOOSER = ("Suggestion", "Suggestions", "suggest")

_OLD_NAMES = {
    "registry": "Alias Evaluation Loss LossSpec MODIFIERS admitted capabilities get parse register spec_of specs "
    "unregister",
    "hyperparameters": "Cosine Draws FlipProbability Interval Linear Moments NonNegative Parameter Positive Recent "
    "RewardShift RunningMean State",
}
_old_name = _moved(
    __name__,
    {
        "Composite": "prefloss.registry:WeightedSum",
        **{
            name: f"prefloss.{module}:{name}"
            for module, names in _OLD_NAMES.items()
            for name in names.split()
        },
    },
)


def __getattr__(name: str) -> _Any:
    """`suggest` and its types, loaded when they are first used (the functions here are losses), or an old name."""
    if name not in _CHOOSER:
        return _old_name(name)
    from prefloss.losses._core import chooser

    return getattr(chooser, name)
