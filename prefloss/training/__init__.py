"""The training core: batches, forward passes, references and one step, for every trainer; it imports none.

- `PreferenceCollator(tokenizer)`: rows of a data set -> a `PreferenceBatch`.
- `TokenBatchSampler.of(data, collator, max_tokens)`: batches of a fixed budget of tokens.
- `PreferenceObjective("dpo", reference=...)`: called with a model and a batch, gives the loss to differentiate.
- `FeedbackObjective("dpo")`: the same from log-ratios, for trainers that compute log-probs themselves.
- `Reference`: a frozen model, adapters off, another adapter, a table, cached sums, or none.
- `Scorer`: the reward that a loss implies, for any completions; `prefloss.Scorer` is the same.
- `model_logps`: completion log-probs of a model without its logits.
- `write_reference_table`, `with_reference_logps`: what `prefloss reference` does, and its tables as columns of data.
"""

from prefloss.training.auto_layout import Choice as Choice
from prefloss.training.batch import PreferenceBatch as PreferenceBatch
from prefloss.training.build_table import Built as Built
from prefloss.training.build_table import ReferenceBuilder as ReferenceBuilder
from prefloss.training.build_table import claimed as claimed
from prefloss.training.build_table import parts_folder as parts_folder
from prefloss.training.build_table import write_reference_table as write_reference_table
from prefloss.training.collator import PreferenceCollator as PreferenceCollator
from prefloss.training.forward import ModelLogps as ModelLogps
from prefloss.training.forward import model_logps as model_logps
from prefloss.training.head import HeadSpec as HeadSpec
from prefloss.training.lengths import Lengths as Lengths
from prefloss.training.lengths import token_lengths as token_lengths
from prefloss.training.objective import PreferenceObjective as PreferenceObjective
from prefloss.training.objective import Result as Result
from prefloss.training.reference import Reference as Reference
from prefloss.training.score import Score as Score
from prefloss.training.score import batch_logps as batch_logps
from prefloss.training.score import explain_layout as explain_layout
from prefloss.training.score import score_rows as score_rows
from prefloss.training.scorer import Best as Best
from prefloss.training.scorer import Scorer as Scorer
from prefloss.training.scorer import Scores as Scores
from prefloss.training.step import FeedbackObjective as FeedbackObjective
from prefloss.training.step import Router as Router
from prefloss.training.table_lookup import header_of as header_of
from prefloss.training.table_lookup import with_reference_logps as with_reference_logps
from prefloss.training.token_batches import TokenBatchSampler as TokenBatchSampler
