"""Former name of `prefloss.metrics`; goes in the next release."""

from prefloss._deprecated import moved

__getattr__ = moved(
    __name__,
    {name: f"prefloss.metrics:{name}" for name in ("Stat", "implicit_rewards", "metrics")},
)
