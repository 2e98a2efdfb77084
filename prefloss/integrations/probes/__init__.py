"""Trainers of other packages as functions of log-probs: what does one train under each loss name that it accepts?

A real trainer of the installed package runs its own `compute_loss` on a model whose log-probs are given. `prefloss
probe` compares the result with the loss that the name means.
"""

from prefloss.integrations.probes.known import KnownModel, Rows
from prefloss.integrations.probes.trainers import FRAMEWORKS, Prober

__all__ = ["FRAMEWORKS", "KnownModel", "Prober", "Rows"]
