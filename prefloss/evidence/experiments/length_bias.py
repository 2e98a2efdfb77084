"""A judge that likes long answers, and the losses made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from prefloss.evidence.drawing import draw_frontier, draw_means, panels
from prefloss.evidence.experiment import Experiment, Figure, Finding, Verdict
from prefloss.evidence.measures import over_seeds, rows_of, runs_at_kl
from prefloss.feedback import Pairs
from prefloss.worlds import (
    Judge,
    Runs,
    Tabular,
    TokenTable,
    World,
    draw,
    kl,
    length,
    optimum,
    population,
    reward,
    spelled,
    sweep,
    train,
)

WORLD = spelled(prompts=2, words=2, longest=5)
BIAS, KL = 0.5, 0.5
# The strengths of each loss; those of losses that divide by the length are on another scale.
ARMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "DPO": ("dpo", (0.25, 0.5, 1.0, 2.0)),
    f"R-DPO, alpha {BIAS}": (f"r_dpo(alpha={BIAS})", (0.25, 0.5, 1.0, 2.0)),
    "SamPO": ("sampo", (0.25, 0.5, 1.0, 2.0)),
    "LD-DPO, alpha 0.5": ("ld_dpo(alpha=0.5)", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
    "LN-DPO": ("ln_dpo", (1.0, 2.0, 4.0, 8.0, 16.0)),
    "SimPO": ("simpo(gamma=0.5)", (1.0, 4.0, 10.0, 25.0, 60.0)),
}


OTHERS = [name for name in ARMS if name != "DPO"]


def recovered() -> tuple[float, float]:
    """On all pairs at beta 1: distance of R-DPO and of DPO from the optimum of the true reward, in probabilities."""
    pairs = population(WORLD, Judge(length_bias=BIAS), Pairs)
    losses = [f"r_dpo(beta=1.0, alpha={BIAS})", "dpo(beta=1.0)"]
    got = train(Tabular(WORLD), pairs, losses, steps=400, learning_rate=0.1).log_probs()[:, 0]
    apart = (got.exp() - optimum(WORLD, 1.0).exp()).abs().amax((-1, -2))
    return apart[0].item(), apart[1].item()


def run(seeds: Sequence[int]) -> Finding:
    """All pairs for R-DPO; then 500 pairs of each seed over each loss's strengths."""
    error, biased = recovered()
    data = draw(WORLD, Judge(length_bias=BIAS), Pairs, 500, seeds=seeds)
    runs = {
        name: train(TokenTable(WORLD), data, sweep(*arm), steps=200, learning_rate=0.1)
        for name, arm in ARMS.items()
    }
    figures = [
        *figures_of(runs),
        Figure(
            "R-DPO, all pairs: distance of a probability from the optimum of the true reward",
            error,
            None,
            0.0,
        ),
        Figure("DPO, all pairs: the same", biased),
    ]
    plain, regularised, start = (
        *(runs_at_kl(runs[name], KL, length).mean() for name in list(ARMS)[:2]),
        length(WORLD, WORLD.reference),
    )
    words = ", ".join(f"{name} {figure.signed}" for name, figure in zip(OTHERS, figures, strict=False))
    return Finding(
        summary=(
            "With alpha equal to the judge's bias, R-DPO on all pairs is the optimum of the true reward to "
            f"{error:.0e}. On 500 pairs at a KL of {KL} nats, against DPO's true reward: {words}. DPO's "
            f"answers have {plain:.2f} tokens there, R-DPO's {regularised:.2f}, the reference's {start:.2f}."
        ),
        figures=figures,
        verdict=verdict(error, figures[0], figures[len(OTHERS)]),
        rows=[row for name, each in runs.items() for row in rows_of(each, arm=name)],
        draw=lambda figure: draw_picture(figure, runs),
        change="Exactly on all pairs; on few pairs the gain over DPO at the same KL is not clear of 0.",
    )


def figures_of(runs: dict[str, Runs]) -> list[Figure]:
    """Differences to DPO at the same KL: of the reward, then of the length."""
    quantities: dict[str, Callable[[World, Tensor], Tensor]] = {"reward": reward, "expected tokens": length}
    return [
        over_seeds(
            f"{quantity} at a KL of {KL} nats, {name} minus DPO",
            runs_at_kl(runs[name], KL, what) - runs_at_kl(runs["DPO"], KL, what),
        )
        for quantity, what in quantities.items()
        for name in OTHERS
    ]


def verdict(error: float, reward_gain: Figure, length_gain: Figure) -> Verdict:
    """R-DPO is exact on all pairs to 1e-3; on few pairs it has more reward than DPO and is shorter."""
    if error > 1e-3:
        return Verdict.DOES_NOT_APPEAR
    return Verdict.HOLDS if reward_gain.above(0) and length_gain.below(0) else Verdict.HOLDS_WITH_A_CHANGE


def draw_picture(figure: Any, runs: dict[str, Runs]) -> None:
    """True reward and expected length over KL."""
    left, right = panels(figure, 2)
    draw_frontier(left, WORLD)
    for which, (name, each) in enumerate(runs.items()):
        log_probs = each.log_probs()
        draw_means(left, kl(WORLD, log_probs), reward(WORLD, log_probs), name, which, dots=False)
        draw_means(right, kl(WORLD, log_probs), length(WORLD, log_probs), name, which, dots=False)
    right.axhline(length(WORLD, WORLD.reference), color="k", linestyle=":", label="reference")
    left.set(title=f"Judge likes a token by {BIAS}", xlim=(0, 3))
    right.set(title="Length", xlabel="KL(policy ‖ reference), nats", ylabel="expected tokens", xlim=(0, 3))
    left.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    name="length-bias",
    title="A judge that likes length, and the losses made for it",
    claim="DPO exploits the judge's liking for length; a term for the difference in length (R-DPO) removes "
    "it without loss of quality. SamPO, LD-DPO, LN-DPO and SimPO are made for the same.",
    source="Park et al. 2024, arXiv:2403.19159, abstract; Lu et al. 2024, arXiv:2406.10957; Liu et al. 2024, "
    "arXiv:2409.06411; Lambert et al. 2024, arXiv:2411.15124; Meng et al. 2024, arXiv:2405.14734",
    setup="All 63 sequences of at most 5 tokens over 2 words, 2 prompts, a free logit for each next token; a "
    f"Bradley-Terry judge that adds {BIAS} of reward for each token. All pairs at beta 1; 500 pairs over four "
    "strengths of each loss, Adam at 0.1, 200 steps; SimPO with gamma 0.5.",
    run=run,
    seeds=20,
)
