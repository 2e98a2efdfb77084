"""All experiments, in the order in which `prefloss reproduce` lists them. Each is a module with one `EXPERIMENT`."""

from __future__ import annotations

from importlib import import_module

from prefloss.evidence.experiment import Experiment

# Modules of the papers' claims, then those of learners' questions.
PAPERS: tuple[str, ...] = ()
QUESTIONS: tuple[str, ...] = ()


def experiments() -> dict[str, Experiment]:
    """Every experiment by its name."""
    found = [import_module(f"{__name__}.{module}").EXPERIMENT for module in (*PAPERS, *QUESTIONS)]
    return {experiment.name: experiment for experiment in found}
