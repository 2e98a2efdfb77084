"""Old place of `prefloss.logprobs.explain` and of `Plan`, for one release."""

from prefloss._deprecated import moved

__getattr__ = moved(__name__, {"explain": "prefloss.logprobs:explain", "Plan": "prefloss.kernels.plan:Plan"})
