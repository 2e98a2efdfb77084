"""verl's SFT trainer with any registered loss of pairs: a loss function for its `set_loss_fn`.

`torchrun -m prefloss.integrations.verl --prefloss "dpo(beta=0.1)" data...` runs `verl.trainer.sft_trainer` with its own
options. A row of the data is a pair, so that no shuffling and no micro-batch can part it: prompt and chosen
completion, then prompt and rejected completion, with `position_ids` that start again at 0.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prefloss.feedback import Pairs
from prefloss.integrations.binding import replaced
from prefloss.logratios import LogRatios
from prefloss.registry import Loss, get


class PreferenceLoss:
    """A loss function for `TrainingWorker.set_loss_fn`.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed, or a `Loss`: of pairs, from sums of log-probs
            and token counts, that takes each pair alone and keeps no state, for micro-batches are small.

    Raises:
        ValueError: If the loss needs more, couples the batch, or keeps a state.
        TypeError: If it takes no pairs.
    """

    def __init__(self, loss: str | Loss) -> None:
        self.loss = get(loss) if isinstance(loss, str) else loss
        kind = self.loss.spec.feedback
        if kind is not Pairs:
            raise TypeError(
                f"loss: got {self.loss.name!r}, which takes {kind.__name__}, expected a loss of pairs"
            )
        missing = sorted(self.loss.needs - {"tokens"})
        if missing:
            raise ValueError(
                f"loss: got {self.loss!r}, which needs {missing[0]}; verl gives sums and token counts"
            )
        if self.loss.couples_batch or self.loss.state:
            raise ValueError(
                f"loss: got {self.loss!r}, expected one that takes each pair alone and keeps no state or schedule: "
                "verl calls it for each micro-batch"
            )

    def __call__(
        self,
        model_output: Mapping[str, Any],
        data: Mapping[str, Any],
        dp_group: Any = None,
        config: Any = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """This micro-batch's part of the mean over the step's pairs, times the data-parallel size; and no metrics.

        Args:
            model_output: `log_probs`, nested [pairs, tokens]: of the next token at each place, nats.
            data: `loss_mask`, `position_ids`, nested [pairs, tokens]; `reference_logps`, nested or dense [pairs, 2],
                sums of both completions under the reference, nats; `global_batch_size`, `dp_size`.
            dp_group: Not read.
            config: Not read.

        Raises:
            ValueError: If a row does not hold two sequences, or reference log-probs are absent.
        """
        pairs = self._pairs(model_output["log_probs"], data)
        values = self.loss(pairs)
        return values.sum() / data["global_batch_size"] * data["dp_size"], {}

    def _pairs(self, log_probs: Tensor, data: Mapping[str, Any]) -> Pairs:
        starts = (data["position_ids"].values() == 0).long()
        # torch declares no offsets() of nested tensors.
        ends: Tensor = log_probs.offsets()  # type: ignore[attr-defined]
        count, offsets = ends.numel() - 1, ends[:-1]
        if int(starts.sum()) != 2 * count or not bool((starts[offsets] == 1).all()):
            raise ValueError(
                f"position_ids: got {int(starts.sum())} sequences in {count} rows, expected two in each: prompt and "
                "chosen, prompt and rejected, each from position 0; set model.use_remove_padding=True and "
                "data.pad_mode=no_padding"
            )
        # A place predicts the next token; the last place of a sequence predicts the start of another.
        counted = torch.roll(data["loss_mask"].values(), -1, dims=0) * (1 - torch.roll(starts, -1, dims=0))
        sequence = starts.cumsum(0) - 1
        tokens = torch.zeros(2 * count, dtype=torch.long, device=sequence.device)
        tokens = tokens.index_add(0, sequence, (counted != 0).long())
        kept = torch.where(counted != 0, log_probs.values(), 0.0)
        sums = kept.new_zeros(2 * count).index_add(0, sequence, kept)
        reference = self._reference(data)
        sides = [
            LogRatios(sums[side::2], None if reference is None else reference[:, side], tokens[side::2])
            for side in (0, 1)
        ]
        return Pairs(chosen=sides[0], rejected=sides[1])

    def _reference(self, data: Mapping[str, Any]) -> Tensor | None:
        # A TensorDict refuses `in`.
        given = data.get("reference_logps", None)
        if given is None:
            if self.loss.spec.needs_reference:
                raise ValueError(
                    f"{self.loss.name}: reference_logps: got none in the batch, expected the sums of both completions "
                    "under the reference in each row"
                )
            return None
        return (given.values() if given.is_nested else given).reshape(-1, 2)


def with_loss(loss: str | Loss, base: Any) -> type:
    """A subclass of verl's `SFTTrainer` whose training worker has the loss.

    Args:
        loss: As for `PreferenceLoss`.
        base: `verl.trainer.sft_trainer.SFTTrainer`.
    """
    ours = PreferenceLoss(loss)

    class PreferenceTrainer(base):
        def _build_engine(self) -> None:
            super()._build_engine()
            self.loss_fn = ours
            self.training_client.set_loss_fn(loss_fn=ours)

    return PreferenceTrainer


def main(words: Sequence[str] | None = None) -> None:
    """Run `verl.trainer.sft_trainer` with a prefloss loss; further words are its own options."""
    parser = argparse.ArgumentParser(
        prog="python -m prefloss.integrations.verl", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--prefloss", required=True, help="the loss, as 'simpo(beta=2.0)'")
    given, rest = parser.parse_known_args(words)
    trainers = importlib.import_module("verl.trainer.sft_trainer")
    try:
        ours = {"SFTTrainer": with_loss(given.prefloss, trainers.SFTTrainer)}
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    with replaced(trainers, ours), replaced(sys, {"argv": ["verl.trainer.sft_trainer", *rest]}):
        trainers.main()


if __name__ == "__main__":
    main()
