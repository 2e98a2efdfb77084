"""prefloss: the preference-loss layer for PyTorch.

Losses are pure functions of log-ratios, chosen by name::

    loss = prefloss.get("ipo", tau=0.1)
    loss(prefloss.Pairs(chosen=..., rejected=...))  # one value per pair

Importing this package loads torch and nothing heavier; kernels, trainers and command line load where they are used.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

from prefloss import hyperparameters as hyperparameters
from prefloss._deprecated import moved as _moved
from prefloss.feedback import Labels as Labels
from prefloss.feedback import Pairs as Pairs
from prefloss.feedback import Rankings as Rankings
from prefloss.logratios import IGNORE_INDEX as IGNORE_INDEX
from prefloss.logratios import LogRatios as LogRatios
from prefloss.logratios import PerToken as PerToken
from prefloss.logratios import completion_targets as completion_targets
from prefloss.registry import Loss as Loss
from prefloss.registry import LossSpec as LossSpec
from prefloss.registry import get as get
from prefloss.registry import register as register
from prefloss.registry import specs as specs

if TYPE_CHECKING:
    from prefloss import logprobs as logprobs
    from prefloss import metrics as metrics
    from prefloss.logprobs import linear_token_logps as linear_token_logps
    from prefloss.logprobs import token_logps as token_logps
    from prefloss.training.scorer import Scorer as Scorer

# Loaded when they are first used: the kernels register their operators with torch, which takes time.
_LATER = {
    "Scorer": "prefloss.training.scorer",
    "linear_token_logps": "prefloss.logprobs",
    "logprobs": "prefloss.logprobs",
    "metrics": "prefloss.metrics",
    "token_logps": "prefloss.logprobs",
}
_old_name = _moved(__name__, {"explain": "prefloss.logprobs:explain"})


def __getattr__(name: str) -> _Any:
    """A name that is loaded when it is first used, or an old one."""
    if name not in _LATER:
        return _old_name(name)
    module = _importlib.import_module(_LATER[name])
    return globals().setdefault(name, getattr(module, name, module))


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__version__ = "0.2.0"
