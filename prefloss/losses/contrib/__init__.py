"""Losses that are here for comparison: few use them, or their formula has one source, or none by the authors.

Each says so in the first sentence of its note. They are held to the same tests as the others.
"""

from prefloss.losses.contrib._batch import gamma_po as gamma_po
from prefloss.losses.contrib._batch import rpo_relative as rpo_relative
from prefloss.losses.contrib._discopop import discopop_aqfl as discopop_aqfl
from prefloss.losses.contrib._discopop import discopop_aql as discopop_aql
from prefloss.losses.contrib._discopop import discopop_cell as discopop_cell
from prefloss.losses.contrib._discopop import discopop_dbaql as discopop_dbaql
from prefloss.losses.contrib._discopop import discopop_padll as discopop_padll
from prefloss.losses.contrib._discopop import discopop_pfl as discopop_pfl
from prefloss.losses.contrib._labels import dro as dro
from prefloss.losses.contrib._labels import kto_logsigmoid as kto_logsigmoid
from prefloss.losses.contrib._pairs import asft as asft
from prefloss.losses.contrib._pairs import balanced_bpo as balanced_bpo
from prefloss.losses.contrib._pairs import bregman_dpo as bregman_dpo
from prefloss.losses.contrib._pairs import c2dpo as c2dpo
from prefloss.losses.contrib._pairs import cauchy as cauchy
from prefloss.losses.contrib._pairs import dpo_sigmoid_prob as dpo_sigmoid_prob
from prefloss.losses.contrib._pairs import focalpo as focalpo
from prefloss.losses.contrib._pairs import minor_dpo as minor_dpo
from prefloss.losses.contrib._pairs import selm as selm
from prefloss.losses.contrib._tokens import mallows_dpo as mallows_dpo
from prefloss.losses.contrib._tokens import rainbowpo as rainbowpo
from prefloss.losses.contrib._tokens import tis_dpo as tis_dpo
