"""Losses kept for comparison: they have few users, or a formula from a single source or from third-party code only.

The note of each begins with its standing. They pass the same tests as the others.
"""

from prefloss.losses.contrib.batches import gamma_po as gamma_po
from prefloss.losses.contrib.batches import rpo_relative as rpo_relative
from prefloss.losses.contrib.discovered import discopop_aqfl as discopop_aqfl
from prefloss.losses.contrib.discovered import discopop_aql as discopop_aql
from prefloss.losses.contrib.discovered import discopop_cell as discopop_cell
from prefloss.losses.contrib.discovered import discopop_dbaql as discopop_dbaql
from prefloss.losses.contrib.discovered import discopop_padll as discopop_padll
from prefloss.losses.contrib.discovered import discopop_pfl as discopop_pfl
from prefloss.losses.contrib.labels import dro as dro
from prefloss.losses.contrib.labels import kto_logsigmoid as kto_logsigmoid
from prefloss.losses.contrib.pairs import asft as asft
from prefloss.losses.contrib.pairs import balanced_bpo as balanced_bpo
from prefloss.losses.contrib.pairs import bregman_dpo as bregman_dpo
from prefloss.losses.contrib.pairs import c2dpo as c2dpo
from prefloss.losses.contrib.pairs import cauchy as cauchy
from prefloss.losses.contrib.pairs import dpo_sigmoid_prob as dpo_sigmoid_prob
from prefloss.losses.contrib.pairs import focalpo as focalpo
from prefloss.losses.contrib.pairs import minor_dpo as minor_dpo
from prefloss.losses.contrib.pairs import selm as selm
from prefloss.losses.contrib.token_weights import mallows_dpo as mallows_dpo
from prefloss.losses.contrib.token_weights import rainbowpo as rainbowpo
from prefloss.losses.contrib.token_weights import tis_dpo as tis_dpo
