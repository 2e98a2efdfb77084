"""prefloss in Lightning, on any feedback.

- `PreferenceModule(model, "dpo", reference=...)`: a LightningModule, for `trainer.fit(module, loader)`.
- `PreferenceLossCallback("dpo", reference=...)`: the same for a LightningModule of your own.

Batches come from a `PreferenceCollator`, models from transformers.
"""

try:
    import lightning as _lightning  # noqa: F401
except ModuleNotFoundError as error:
    # A fault inside lightning is not a missing lightning.
    if error.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.lightning needs Lightning: pip install 'prefloss[lightning]'", name="lightning"
    ) from error

from prefloss.integrations.lightning._callback import PreferenceLossCallback as PreferenceLossCallback
from prefloss.integrations.lightning._module import PreferenceModule as PreferenceModule
