"""A loss on a batch whose examples are spread over processes: who sees what, and who counts for how much."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefloss.feedback import Feedback
from prefloss.registry import Evaluation, Loss
from prefloss.training import distributed
from prefloss.training.batch import counts, looks_across, terms_of
from prefloss.training.gather import gathered


class Seen(NamedTuple):
    """A loss on a batch.

    Attributes:
        feedback: What the loss saw: this process's examples, or those of all.
        evaluated: The loss.
        counted: Examples that each term counted of those, [terms].
        own: Examples that each term counts of this process's, [terms].
        copies: How many processes saw the same.
    """

    feedback: Feedback
    evaluated: Evaluation
    counted: Tensor
    own: Tensor
    copies: int


def evaluate(loss: Loss, feedback: Feedback, training: bool) -> Seen:
    """The loss of this process's examples, or of all where it looks across its batch.

    Args:
        loss: The loss.
        feedback: This process's, of the kind that the loss takes.
        training: Whether states of the loss move.
    """
    own = counts(loss, feedback)
    across = looks_across(loss)
    if across:
        # Then every process holds all examples, and states need not be summed over them.
        feedback = gathered(feedback)
        loss.sync_with(torch.clone)
    else:
        loss.sync_with(distributed.all_sum)
    evaluated = loss.train(training).evaluate(feedback)
    return Seen(feedback, evaluated, counts(loss, feedback), own, distributed.size() if across else 1)


def share(loss: Loss, seen: Seen, whole: Tensor) -> Tensor:
    """This process's share of the mean of an optimizer step, scaled for gradients that are averaged over processes.

    Args:
        loss: The loss.
        seen: What it was on this batch.
        whole: Examples that each term counts in the whole step, on all processes, [terms].
    """
    # Gradients are averaged, so each process gives its share as many times as there are processes.
    shares = seen.counted.clamp(min=1) / whole.clamp(min=1) * distributed.size()
    weighted = [
        weight * mean * part
        for (weight, _), mean, part in zip(terms_of(loss), seen.evaluated.means.values(), shares, strict=True)
    ]
    total = torch.stack(weighted).sum()
    # Where all of them hold all examples, the mean of what they return is to be logged, too: it counts each once.
    return total if seen.copies == 1 else total - total.detach() * (1 - 1 / seen.copies)
