"""Preference files: read, checked row by row, converted.

Importing this package loads neither datasets nor pyarrow; `read` does.
"""

import warnings as _warnings
from types import SimpleNamespace as _SimpleNamespace

from prefloss import feedback as _feedback
from prefloss.data.convert import as_pairs as as_pairs
from prefloss.data.convert import label_counts as label_counts
from prefloss.data.convert import pairs_to_labels as pairs_to_labels
from prefloss.data.convert import ranked_to_pairs as ranked_to_pairs
from prefloss.data.convert import split as split
from prefloss.data.errors import DataError as DataError
from prefloss.data.read import Preferences as Preferences
from prefloss.data.read import read as read


def __getattr__(name: str) -> object:
    """`Kind`, which the classes of feedback replaced; goes in the next release."""
    if name != "Kind":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _warnings.warn(
        "prefloss.data.Kind: the kind of a row is now its class of feedback: prefloss.Pairs, prefloss.Labels or "
        "prefloss.Rankings; the old name goes in the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return _SimpleNamespace(PAIRED=_feedback.Pairs, LABELLED=_feedback.Labels, RANKED=_feedback.Rankings)
