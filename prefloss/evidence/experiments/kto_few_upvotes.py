"""KTO with a tenth of the upvotes, weighted as the paper advises and otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from prefloss.evidence.experiment import Experiment, Finding
from prefloss.evidence.experiments import kto_unpaired
from prefloss.evidence.experiments.kto_unpaired import BETAS, KLS, MARGIN, WORLD, N
from prefloss.evidence.measures import numbers, rows_of
from prefloss.worlds import Tabular, sweep, train

SHARE = 0.1
# With these the upvotes weigh a tenth of the downvotes, as much, and 4/3 as much.
WEIGHTS = (1.0, 10.0, 13.3)
# The paper's advice.
ADVISED = 10.0


def run(seeds: Sequence[int]) -> Finding:
    """Sweep beta for DPO on all pairs and for KTO at each weight of the upvotes."""
    pairs = kto_unpaired.pairs_of(seeds)
    few = kto_unpaired.votes_of(pairs, upvotes=SHARE)
    dpo = train(Tabular(WORLD), pairs, sweep("dpo", BETAS))
    arms = {w: train(Tabular(WORLD), few, sweep(kto_unpaired.kto(w), BETAS)) for w in WEIGHTS}
    differences = {
        w: kto_unpaired.against_dpo(f"KTO, {SHARE:.0%} of upvotes at weight {w:g},", runs, dpo)
        for w, runs in arms.items()
    }
    advised = differences[ADVISED]
    figures = [*advised, *(figure for w in WEIGHTS if w != ADVISED for figure in differences[w])]
    possible = kto_unpaired.gain(dpo, KLS[0])
    pictured = {"DPO, all pairs": dpo} | {f"KTO, upvotes weigh {w:g}": runs for w, runs in arms.items()}
    words = ", ".join(f"{differences[w][0].signed} at weight {w:g}" for w in WEIGHTS)
    return Finding(
        summary=(
            f"With {SHARE:.0%} of the upvotes KTO's reward against DPO with all pairs, at a KL of {KLS[0]} nats, is "
            f"{words}; DPO gains {possible:.2f} over the reference."
        ),
        figures=figures,
        verdict=kto_unpaired.verdict(advised[0], possible),
        rows=[row for name, runs in pictured.items() for row in rows_of(runs, arm=name)],
        draw=lambda figure: kto_unpaired.draw_picture(figure, pictured),
        change=f"Somewhat worse than DPO, by less than {MARGIN:.0%} of its gain.",
    )


EXPERIMENT = Experiment(
    name="kto-few-upvotes",
    title="KTO with a tenth of the upvotes",
    claim="KTO still matches DPO with up to 90 % of the upvotes taken away, if the weight of an upvote rises "
    "so that the weights' sums stay in proportion.",
    source="Ethayarajh et al. 2024, arXiv:2402.01306, section 4 (lambda_D n_D / (lambda_U n_U) "
    "from 1 to 4/3)",
    setup=f"As kto-unpaired: {N} pairs of each seed for DPO; for KTO {round(SHARE * N)} of their chosen sides "
    f"as upvotes and all rejected ones as downvotes, upvotes weighted {numbers(WEIGHTS)}. Beta in "
    f"{numbers(BETAS)} for both.",
    run=run,
    seeds=20,
)
