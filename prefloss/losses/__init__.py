"""Preference losses: pure functions, feedback -> one value per example, in a registry by name."""

from prefloss.losses._kl import RunningMean as RunningMean
from prefloss.losses._loss import Loss as Loss
from prefloss.losses._pairwise import dpo as dpo
from prefloss.losses._pairwise import hinge as hinge
from prefloss.losses._pairwise import ipo as ipo
from prefloss.losses._parameters import FlipProbability as FlipProbability
from prefloss.losses._parameters import Interval as Interval
from prefloss.losses._parameters import NonNegative as NonNegative
from prefloss.losses._parameters import Parameter as Parameter
from prefloss.losses._parameters import Positive as Positive
from prefloss.losses._pointwise import kto as kto
from prefloss.losses._registry import LossSpec as LossSpec
from prefloss.losses._registry import get as get
from prefloss.losses._registry import register as register
from prefloss.losses._registry import spec_of as spec_of
from prefloss.losses._registry import specs as specs
from prefloss.losses._registry import split_name as split_name
from prefloss.losses._registry import unregister as unregister
