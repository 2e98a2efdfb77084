"""prefloss in TRL's trainers: any registered loss in `DPOTrainer` and `KTOTrainer`, chosen by name.

- `PreferenceLossCallback("ipo", tau=0.1)` among a trainer's callbacks: the trainer trains with that loss.
- `attach(trainer, "ipo", tau=0.1)`: the same, without touching a class.
- `enable()`: `DPOConfig(loss_type=["my_loss"])` works with every registered name that TRL does not know.
- `python -m prefloss.integrations.trl dpo --loss_type ...`: TRL's own command line with `enable()`.
- `trainer_with_table(DPOTrainer, path)`: reference log-probs from a table of `prefloss reference`.

TRL computes everything but the loss: forward passes, reference, adapters, metrics, saving.
"""

try:
    import trl as _trl  # noqa: F401
except ModuleNotFoundError as error:
    # An import error inside TRL does not mean that TRL is missing.
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.trl needs TRL 0.18 or newer: pip install 'prefloss[trl]'", name="trl"
    ) from error

from prefloss._deprecated import moved
from prefloss.integrations.trl.callback import PreferenceLossCallback as PreferenceLossCallback
from prefloss.integrations.trl.callback import attach as attach
from prefloss.integrations.trl.callback import detach as detach
from prefloss.integrations.trl.collate import FeedbackCollator as FeedbackCollator
from prefloss.integrations.trl.enable import disable as disable
from prefloss.integrations.trl.enable import enable as enable
from prefloss.integrations.trl.precomputed import trainer_with_table as trainer_with_table

__getattr__ = moved(
    __name__,
    {
        "resolve": "prefloss.integrations.trl.options:resolve_named",
        "wants_mismatched": "prefloss.integrations.trl.options:reads_mismatched",
    },
)
