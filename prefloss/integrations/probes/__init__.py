"""Trainers of other packages as functions of log-probs: what does one train under each loss name that it accepts?

A real trainer of the installed package runs its own `compute_loss` on a model whose log-probs are given. `prefloss
probe` compares the result with the loss that the name means.
"""

from collections.abc import Mapping

from prefloss.integrations.probes import others, trl_trainers
from prefloss.integrations.probes.known import KnownModel, Rows
from prefloss.integrations.probes.prober import Prober

__all__ = ["FRAMEWORKS", "KnownModel", "Prober", "Rows"]

FRAMEWORKS: Mapping[str, Prober] = {
    one.framework: one
    for module in (trl_trainers, others)
    for one in vars(module).values()
    if isinstance(one, Prober)
}
"""What `prefloss probe` knows, by the name on the command line."""
