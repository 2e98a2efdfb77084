"""What a file of losses imports: registration, types of hyperparameters, states and shared maths."""

from prefloss.losses._core import maths as maths
from prefloss.losses._core import rewards as rewards
from prefloss.losses._core import running as running
from prefloss.losses._core import transforms as transforms
from prefloss.losses._core.catalogue import register as register
from prefloss.losses._core.modifiers import smoothed as smoothed
from prefloss.losses._core.parameters import FlipProbability as FlipProbability
from prefloss.losses._core.parameters import Interval as Interval
from prefloss.losses._core.parameters import NonNegative as NonNegative
from prefloss.losses._core.parameters import Positive as Positive
from prefloss.losses._core.parameters import Share as Share
from prefloss.losses._core.rewards import Reward as Reward
from prefloss.losses._core.state import resolve as resolve
