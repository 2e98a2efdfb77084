"""Preference files: read, checked row by row, converted.

Importing this package loads neither datasets nor pyarrow; `read` does.
"""

from prefloss.data.convert import as_pairs as as_pairs
from prefloss.data.convert import label_counts as label_counts
from prefloss.data.convert import pairs_to_labels as pairs_to_labels
from prefloss.data.convert import ranked_to_pairs as ranked_to_pairs
from prefloss.data.convert import split as split
from prefloss.data.errors import DataError as DataError
from prefloss.data.kinds import Kind as Kind
from prefloss.data.read import Preferences as Preferences
from prefloss.data.read import read as read
