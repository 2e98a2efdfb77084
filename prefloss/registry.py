"""Losses by name: look one up, register one, ask what it is and needs."""

from prefloss.losses._core.capabilities import capabilities as capabilities
from prefloss.losses._core.expression import parse as parse
from prefloss.losses._core.loss import Evaluation as Evaluation
from prefloss.losses._core.loss import Loss as Loss
from prefloss.losses._core.loss import Term as Term
from prefloss.losses._core.modifiers import MODIFIERS as MODIFIERS
from prefloss.losses._core.modifiers import admitted as admitted
from prefloss.losses._core.needs import NEEDS as NEEDS
from prefloss.losses._core.registry import Alias as Alias
from prefloss.losses._core.registry import LossSpec as LossSpec
from prefloss.losses._core.registry import get as get
from prefloss.losses._core.registry import register as register
from prefloss.losses._core.registry import spec_of as spec_of
from prefloss.losses._core.registry import specs as specs
from prefloss.losses._core.registry import unregister as unregister
from prefloss.losses._core.sum import Composite as Composite
from prefloss.losses._core.sum import from_terms as from_terms
