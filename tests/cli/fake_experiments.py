"""Two experiments: one that finds something at once, one that fails. Other processes import this, so it is light."""

from prefloss.evidence import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds


def drawn(figure):
    figure.subplots().plot([0, 1], [0, 1])


def found(seeds):
    rows = [{"loss": "dpo", "seed": seed, "reward": seed / 3} for seed in seeds]
    figures = [over_seeds("mean seed", list(seeds)), Figure("a KL too far", float("nan"), None, 1.0)]
    return Finding("The mean was found.", figures, Verdict.HOLDS_WITH_A_CHANGE, rows, drawn, "Other seeds.")


def broken(seeds):
    raise ZeroDivisionError("nothing to divide by")


def experiment(name, run):
    return Experiment(name, f"Title of {name}", "Claim.", "Source 2023.", "Set-up.", run, seeds=4)


GOOD_AND_BAD = {"good": experiment("good", found), "bad": experiment("bad", broken)}
