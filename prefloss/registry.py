"""Losses by name: look one up, register one, ask what it is and needs."""

from prefloss._deprecated import moved as _moved
from prefloss.feedback import NEEDS as NEEDS
from prefloss.losses._core.catalogue import register as register
from prefloss.losses._core.catalogue import registered as registered
from prefloss.losses._core.catalogue import spec_of as spec_of
from prefloss.losses._core.catalogue import specs as specs
from prefloss.losses._core.catalogue import unregister as unregister
from prefloss.losses._core.expression import as_loss as as_loss
from prefloss.losses._core.expression import get as get
from prefloss.losses._core.expression import parse as parse
from prefloss.losses._core.loss import Evaluation as Evaluation
from prefloss.losses._core.loss import Loss as Loss
from prefloss.losses._core.loss import Term as Term
from prefloss.losses._core.loss import quiet as quiet
from prefloss.losses._core.modifiers import MODIFIERS as MODIFIERS
from prefloss.losses._core.modifiers import admitted as admitted
from prefloss.losses._core.modifiers import capabilities as capabilities
from prefloss.losses._core.problems import PROBLEMS as PROBLEMS
from prefloss.losses._core.problems import Problem as Problem
from prefloss.losses._core.question import GIVEN as GIVEN
from prefloss.losses._core.rewards import LOG_RATIO as LOG_RATIO
from prefloss.losses._core.rewards import ImplicitReward as ImplicitReward
from prefloss.losses._core.rewards import Reward as Reward
from prefloss.losses._core.spec import FAMILIES as FAMILIES
from prefloss.losses._core.spec import Alias as Alias
from prefloss.losses._core.spec import LossSpec as LossSpec
from prefloss.losses._core.spec import spec_from as spec_from
from prefloss.losses._core.weighted_sum import WeightedSum as WeightedSum

__getattr__ = _moved(__name__, {"Composite": "prefloss.registry:WeightedSum"})
