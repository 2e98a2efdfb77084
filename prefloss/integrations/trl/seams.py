"""Where a trainer computes its log-probs: which of three seams it has.

| Seam | DPOTrainer | KTOTrainer |
|---|---|---|
| `dpo_loss` | 0.18 to 0.28 | |
| `token_logps` | 0.29 to 1.14 | 0.18 to 1.14 |
| `fused_head` | 1.15 and newer | 1.15 and newer |

The seam is found by what the trainer's class has, so that a fork or a newer TRL of the same structure works too; each
checks the passes that it sees at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import trl
from transformers.utils import logging

from prefloss.integrations.trl import dpo_loss, fused_head, token_logps
from prefloss.integrations.trl.passes import Passes
from prefloss.integrations.trl.versions import NEWEST, OLDEST, VERSION, untested

logger = logging.get_logger(__name__)

Recorder = Callable[[Any, Mapping[str, Any]], AbstractContextManager[Passes]]
_SEAMS = (fused_head, dpo_loss, token_logps)


def recorder_of(trainer: type) -> Recorder:
    """The function that records the log-probs of a trainer.

    Args:
        trainer: A class of trainers.

    Raises:
        RuntimeError: If this TRL is older than any that prefloss knows, or the class has none of the seams.
    """
    known = f"TRL {OLDEST} to {NEWEST}"
    if VERSION.release[:2] < OLDEST.release[:2]:
        raise RuntimeError(f"TRL {trl.__version__}: prefloss was tested with {known}; install one of these")
    for seam in _SEAMS:
        if seam.fits(trainer):
            if untested():
                logger.warning_once(
                    f"TRL {trl.__version__} is newer than {NEWEST}, the newest that prefloss was tested with; "
                    "it looks alike, and each step is checked"
                )
            return seam.recorded
    raise RuntimeError(
        f"TRL {trl.__version__}: {trainer.__name__} computes its loss in a way that prefloss does not know "
        f"(tested with {known}). Please report it, with the versions of both."
    )
