"""All experiments, in the order in which `prefloss reproduce` lists them. Each is a module with one `EXPERIMENT`."""

from __future__ import annotations

from importlib import import_module

from prefloss.evidence.experiment import Experiment

# Modules of the papers' claims, then those of learners' questions.
PAPERS: tuple[str, ...] = (
    "dpo_frontier",
    "ipo_deterministic",
    "overoptimisation",
    "flipped_labels",
    "kto_unpaired",
    "kto_few_upvotes",
    "displacement",
    "length_bias",
    "k_wise",
    "graded_scores",
    "off_support",
    "several_judges",
    "chipo_coverage",
)
QUESTIONS: tuple[str, ...] = (
    "dpo_or_rlhf",
    "unjudged_prompts",
    "starting_model",
    "ten_values",
    "how_far",
)


def experiments() -> dict[str, Experiment]:
    """Every experiment by its name.

    Raises:
        ModuleNotFoundError: Without the extra `evidence`.
    """
    try:
        found = [import_module(f"{__name__}.{module}").EXPERIMENT for module in (*PAPERS, *QUESTIONS)]
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("scipy", "numpy", "matplotlib"):
            raise
        raise ModuleNotFoundError(
            f"the experiments need {missing}: pip install 'prefloss[evidence]'", name=missing
        ) from error
    return {experiment.name: experiment for experiment in found}
