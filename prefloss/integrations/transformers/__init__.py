"""prefloss in `transformers.Trainer`, and on the causal language models of transformers.

- `PreferenceLossCallback("dpo", reference=...)` among a trainer's callbacks: it trains with that loss.
- `PreferenceCollator(tokenizer)`: batches of pairs, labelled completions or rankings.
- `Reference`: a frozen model, adapters off, another adapter, a table, cached sums, or none.
- `write_reference_table`: what `prefloss reference` does.
- `with_reference_logps`, `reads_table`: a table of `prefloss reference` for other trainers, as columns or in TRL's own.
- `PreferenceObjective`: the same for a loop of your own, under accelerate or without.
- `model_logps`: completion log-probs of a model without its logits, for loops of your own.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    # A fault inside transformers is not a missing transformers.
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.transformers needs transformers: pip install 'prefloss[transformers]'",
        name="transformers",
    ) from error

from prefloss.integrations.transformers._callback import PreferenceLossCallback as PreferenceLossCallback
from prefloss.training.build_table import write_reference_table as write_reference_table
from prefloss.training.collator import PreferenceCollator as PreferenceCollator
from prefloss.training.forward import ModelLogps as ModelLogps
from prefloss.training.forward import model_logps as model_logps
from prefloss.training.head import HeadSpec as HeadSpec
from prefloss.training.objective import PreferenceObjective as PreferenceObjective
from prefloss.training.reference import Reference as Reference
from prefloss.training.table import reads_table as reads_table
from prefloss.training.table import with_reference_logps as with_reference_logps
