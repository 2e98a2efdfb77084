"""Types, ranges, states and schedules for the hyperparameters of a loss."""

from prefloss.losses._core.baselines import RunningMean as RunningMean
from prefloss.losses._core.parameters import Coerce as Coerce
from prefloss.losses._core.parameters import FlipProbability as FlipProbability
from prefloss.losses._core.parameters import Interval as Interval
from prefloss.losses._core.parameters import NonNegative as NonNegative
from prefloss.losses._core.parameters import Parameter as Parameter
from prefloss.losses._core.parameters import Positive as Positive
from prefloss.losses._core.parameters import _plain_type as plain_type  # noqa: F401
from prefloss.losses._core.schedules import Cosine as Cosine
from prefloss.losses._core.schedules import Linear as Linear
from prefloss.losses._core.schedules import Schedule as Schedule
from prefloss.losses._core.state import Draws as Draws
from prefloss.losses._core.state import Moments as Moments
from prefloss.losses._core.state import Recent as Recent
from prefloss.losses._core.state import RewardShift as RewardShift
from prefloss.losses._core.state import State as State
