"""prefloss in TRL's trainers: any registered loss in `DPOTrainer` and `KTOTrainer`, chosen by name.

- `PreferenceLossCallback("ipo", tau=0.1)` among a trainer's callbacks: the trainer trains with that loss.
- `attach(trainer, "ipo", tau=0.1)`: the same, without touching a class.
- `enable()`: `DPOConfig(loss_type=["my_loss"])` works with every registered name that TRL does not know.
- `python -m prefloss.integrations.trl dpo --loss_type ...`: TRL's own command line with `enable()`.

TRL computes everything but the loss: forward passes, reference, adapters, metrics, saving.
"""

try:
    import trl as _trl  # noqa: F401
except ModuleNotFoundError as error:
    # A fault inside TRL is not a missing TRL.
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.trl needs TRL 1.16 or newer: pip install 'prefloss[trl]'", name="trl"
    ) from error

from prefloss.integrations.trl._callback import PreferenceLossCallback as PreferenceLossCallback
from prefloss.integrations.trl._callback import attach as attach
from prefloss.integrations.trl._callback import detach as detach
from prefloss.integrations.trl._collate import FeedbackCollator as FeedbackCollator
from prefloss.integrations.trl._enable import disable as disable
from prefloss.integrations.trl._enable import enable as enable
from prefloss.integrations.trl._options import resolve as resolve
from prefloss.integrations.trl._options import wants_mismatched as wants_mismatched
