"""The training core: batches, forward passes, references and one step, for every trainer; it imports none."""

from prefloss.training.build_table import Built as Built
from prefloss.training.build_table import ReferenceBuilder as ReferenceBuilder
from prefloss.training.build_table import parts_folder as parts_folder
from prefloss.training.build_table import write_reference_table as write_reference_table
from prefloss.training.collator import PreferenceCollator as PreferenceCollator
from prefloss.training.forward import ModelLogps as ModelLogps
from prefloss.training.forward import model_logps as model_logps
from prefloss.training.head import HeadSpec as HeadSpec
from prefloss.training.objective import PreferenceObjective as PreferenceObjective
from prefloss.training.reference import Reference as Reference
from prefloss.training.score import Score as Score
from prefloss.training.score import score_rows as score_rows
from prefloss.training.table import header_of as header_of
from prefloss.training.table import reads_table as reads_table
from prefloss.training.table import with_reference_logps as with_reference_logps
