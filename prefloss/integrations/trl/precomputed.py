"""TRL trainers that read reference log-probs from a table instead of computing them."""

from __future__ import annotations

import os
from typing import Any

from prefloss.data.table import ReferenceTable, TableError
from prefloss.integrations.trl.versions import VERSION
from prefloss.training import with_reference_logps


def trainer_with_table(trainer: type, table: str | os.PathLike[str] | ReferenceTable) -> type:
    """A subclass of a TRL trainer that reads reference log-probs from a table where TRL computes them beforehand.

    Build it with `precompute_ref_log_probs=True`; no reference model is loaded, and no forward pass is made.

    Args:
        trainer: `DPOTrainer`, `KTOTrainer`, or a subclass.
        table: A table that `prefloss reference` wrote, or its path.

    Raises:
        TypeError: If the class does not precompute reference log-probs.
        TableError: If the table cannot be read.
    """
    if not hasattr(trainer, "_precompute_ref_logps") or hasattr(trainer, "kto_loss"):
        raise TypeError(
            f"trainer: got {trainer!r} of TRL {VERSION}, whose precomputed reference log-probs a table cannot replace, "
            "expected DPOTrainer of TRL 0.29 or newer, or KTOTrainer of TRL 1.6 or newer"
        )
    references = table if isinstance(table, ReferenceTable) else ReferenceTable.read(table)

    def precompute(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        if getattr(self.args, "truncation_mode", "keep_start") != "keep_start":
            raise TableError(
                f"truncation_mode: got {self.args.truncation_mode!r}, expected 'keep_start' as {references.path} was "
                "scored"
            )
        if getattr(self, "calculate_KL", False):
            raise TableError(
                f"{references.path}: tables hold no mismatched completions of KTO; leave them out with "
                "loss_type='apo_zero_unpaired', which beside PreferenceLossCallback has no other effect"
            )
        # The data holds token ids by now; the tokenizer is for the message about a missing row.
        return with_reference_logps(
            dataset, references, self.processing_class, max_length=self.args.max_length
        )

    return type(f"{trainer.__name__}WithTable", (trainer,), {"_precompute_ref_logps": precompute})
