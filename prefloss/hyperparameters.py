"""Types, ranges, states and schedules for the hyperparameters of a loss."""

from prefloss.losses._core.parameters import Coerce as Coerce
from prefloss.losses._core.parameters import FlipProbability as FlipProbability
from prefloss.losses._core.parameters import Interval as Interval
from prefloss.losses._core.parameters import NonNegative as NonNegative
from prefloss.losses._core.parameters import Parameter as Parameter
from prefloss.losses._core.parameters import Positive as Positive
from prefloss.losses._core.parameters import plain_type as plain_type
from prefloss.losses._core.running import Draws as Draws
from prefloss.losses._core.running import Moments as Moments
from prefloss.losses._core.running import Recent as Recent
from prefloss.losses._core.running import RewardShift as RewardShift
from prefloss.losses._core.running import RunningMean as RunningMean
from prefloss.losses._core.running import stateful as stateful
from prefloss.losses._core.state import Cosine as Cosine
from prefloss.losses._core.state import Linear as Linear
from prefloss.losses._core.state import Schedule as Schedule
from prefloss.losses._core.state import State as State
