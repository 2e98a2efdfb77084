"""One loss in one world: trained at several strengths on several seeds, one strength chosen on held-out pairs."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prefloss.diagnosis import Diagnosis, Thresholds
from prefloss.feedback import NEEDS, Labels, Pairs
from prefloss.registry import Loss, get
from prefloss.worlds import (
    Data,
    Runs,
    Setting,
    TokenTable,
    World,
    fed,
    measure,
    scaled,
    settings,
    sweep,
    train,
)
from prefloss.worlds.data import taken
from prefloss.worlds.feeding import feedback_of, fixed_values, moving_values
from prefloss.worlds.settings import shared_world

# Multiples of a loss's own strength: its default in the middle, a factor of 4 from one to the next.
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
# Names of what `measure` gives -> columns of results.csv.
COLUMNS = {
    "reward": "reward",
    "kl": "kl",
    "accuracy": "accuracy",
    "length": "length",
    "chosen": "chosen_drift",
    "rejected": "rejected_drift",
    "win_rate": "win_rate",
    "validation": "validation_win_rate",
}
_LIKELIEST = 3


@dataclass(frozen=True)
class Budget:
    """What every loss gets.

    Attributes:
        seeds: Data sets, at least 2; the same for all losses.
        betas: KL strengths to try; None for `FACTORS` times the loss's own. A loss without a strength is trained once.
        steps: Optimizer steps (Adam).
        batch: Pairs a step; twice as many votes.
        learning_rate: Its step size.
    """

    seeds: int = 10
    betas: tuple[float, ...] | None = None
    steps: int = 150
    batch: int = 48
    learning_rate: float = 0.05

    def strengths(self, loss: Loss) -> list[Loss]:
        """The loss at each strength that is tried.

        Raises:
            ValueError: If a strength is out of the loss's range.
        """
        if all(term.spec.beta is None for _, term in loss.terms):
            return [loss]
        return scaled(loss, FACTORS) if self.betas is None else sweep(loss, self.betas)

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps after which a run is measured."""
        return tuple(sorted({round(self.steps * share) for share in (0, 0.03, 0.1, 0.2, 0.4, 0.7, 1)}))


def is_baseline(loss: str) -> bool:
    """Whether a loss, as written, is DPO, with whatever strength."""
    return get(loss).name == "dpo"


def not_fed(losses: Iterable[str]) -> dict[str, list[str]]:
    """Losses that the shared world cannot feed, with the fields of the feedback that they lack there."""
    lacking = fed(TokenTable(shared_world()))
    missing = {
        text: sorted({need for _, term in get(text).terms for need in lacking[term.name]}) for text in losses
    }
    return {text: names for text, names in missing.items() if names}


def data_hash(worlds: Iterable[str], seeds: int) -> str:
    """Of all training pairs of these worlds and seeds, from which everything else is made."""
    digest = hashlib.blake2b(digest_size=8)
    for world in worlds:
        pairs = settings()[world].feedback(Pairs, range(seeds))
        for values in (pairs.prompt, pairs.completions):
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def run_sweep(text: str, world: str, budget: Budget) -> dict[str, Any]:
    """Train and measure one loss in one world; plain values, fit for JSON.

    Args:
        text: The loss, as `prefloss.get` takes it.
        world: Name of the setting.
        budget: Strengths, seeds and steps.

    Returns:
        `loss`, `world`, `strengths` (betas), `rows` (one a run, columns as in results.csv), `chosen` (number of the
        strength that each seed's held-out pairs choose), `prompts` (true reward of the chosen runs, [seeds, prompts]),
        `steps` and `curves` (means over the seeds of the chosen runs after each kept step), `samples`, `seconds`.
    """
    loss, setting, seeds = get(text), settings()[world], range(budget.seeds)
    policy, losses = TokenTable(setting.world), budget.strengths(loss)
    data, held_out = setting.feedback(loss.spec.feedback, seeds), setting.validation(seeds)
    batch = budget.batch * (2 if loss.spec.feedback is Labels else 1)
    began = time.process_time()
    options = {"steps": budget.steps, "learning_rate": budget.learning_rate, "keep": budget.kept}
    runs = train(policy, data, losses, batch_size=min(batch, len(data)), **options)
    seconds = time.process_time() - began
    figures = {step: measure(setting.world, runs.log_probs(step), held_out) for step in budget.kept}
    final = figures[budget.steps]
    default = min(range(len(losses)), key=lambda row: abs((losses[row].beta or 0.0) - (loss.beta or 0.0)))
    for step in budget.kept:
        figures[step]["validation"] = validated_win_rate(setting.world, runs.log_probs(step), held_out)
    chosen = choose(final["validation"], default)
    at = (chosen, torch.arange(len(seeds)))
    return {
        "loss": text,
        "world": world,
        "strengths": [one.beta for one in losses],
        "rows": _rows(text, world, losses, final, chosen, _findings(runs, data, chosen)),
        "chosen": chosen.tolist(),
        "prompts": _by_prompt(setting, runs.log_probs()[at]),
        "steps": list(budget.kept),
        "curves": {
            name: [_plain(figures[step][name][at].mean()) for step in budget.kept] for name in COLUMNS
        },
        "samples": _likeliest(setting, runs.log_probs()[at][0]),
        "seconds": round(seconds, 2),
        "budget": asdict(budget),
    }


def validated_win_rate(world: World, log_probs: Tensor, held_out: Data) -> Tensor:
    r"""Win rate against the reference by the judge of the held-out pairs, estimated from those pairs alone, [...].

    .. math::
        \frac{\sum e^{h_w}}{\sum e^{h_w} + e^{h_l}}, \quad e^h = \frac{\pi}{\pi_\mathrm{ref}}

    Held-out completions are samples of the reference, so weights of e^h make them samples of the policy. Accuracy on
    the same pairs would not do: it is the same for a policy that barely moved and one that moved far the same way.

    Args:
        world: Gives the reference.
        log_probs: Of the policies, [..., seeds, prompts, C], nats.
        held_out: Pairs of as many seeds.
    """
    weight = taken(log_probs - world.reference, held_out)[..., :2].exp().sum(-2)
    return weight[..., 0] / weight.sum(-1)


def choose(validation: Tensor, default: int) -> Tensor:
    """Which strength each seed's held-out pairs choose, [seeds], from their figures [strengths, seeds].

    The highest figure; of equal ones, that of the strength nearest to the default. A run that broke is not chosen.
    """
    rows = torch.arange(len(validation))
    nearness = -(rows - default).abs().double() / (1e9 * len(rows))
    return (validation.nan_to_num(-1.0) + nearness.unsqueeze(-1)).argmax(0)


def _rows(
    text: str,
    world: str,
    losses: Sequence[Loss],
    final: dict[str, Tensor],
    chosen: Tensor,
    findings: list[str],
) -> list[dict[str, Any]]:
    rows = []
    for row, loss in enumerate(losses):
        for seed in range(len(chosen)):
            used = int(chosen[seed]) == row
            figures = {column: _plain(final[name][row, seed]) for name, column in COLUMNS.items()}
            rows.append(
                {"loss": text, "world": world, "beta": loss.beta, "seed": seed, **figures}
                | {"chosen_by_validation": used, "findings": findings[seed] if used else ""}
            )
    return rows


def _findings(runs: Runs, data: Data, chosen: Tensor) -> list[str]:
    """Names of what the diagnosis finds in each seed's chosen run, on its training data."""
    found = []
    fixed = fixed_values(runs.policy, data, NEEDS)
    for seed, row in enumerate(chosen.tolist()):
        loss, theta = runs.losses[row], runs.theta[max(runs.theta)][row].clone().requires_grad_()
        values = {**fixed, **moving_values(runs.policy, theta, data, NEEDS)}
        feedback = feedback_of(data.kind, {name: value[seed] for name, value in values.items()})
        diagnosis = Diagnosis(loss, Thresholds(examples=32, non_finite=False))
        with warnings.catch_warnings(), loss.held_still():
            warnings.simplefilter("ignore")
            figures = diagnosis.figures(feedback, evaluation=loss.evaluate(feedback))
            diagnosis.add({name: (float(total), float(count)) for name, (total, count) in figures.items()})
            diagnosis.judge(max(runs.theta))
        found.append(" ".join(finding.name for finding in diagnosis.findings))
    return found


def _by_prompt(setting: Setting, log_probs: Tensor) -> list[list[float | None]]:
    rewards = (log_probs.exp() * setting.world.reward).sum(-1)
    return [[_plain(value) for value in row] for row in rewards]


def _likeliest(setting: Setting, log_probs: Tensor) -> list[dict[str, Any]]:
    """The likeliest completions of the first two prompts: text, probability, true reward."""
    world = setting.world
    listed = []
    for prompt in range(min(2, world.prompts)):
        for completion in log_probs[prompt].topk(_LIKELIEST).indices.tolist():
            probability = _plain(log_probs[prompt, completion].exp())
            reward = _plain(world.reward[prompt, completion])
            listed.append(
                {
                    "prompt": prompt,
                    "text": _spelled(setting, completion),
                    "probability": probability,
                    "reward": reward,
                }
            )
    return listed


def _spelled(setting: Setting, completion: int) -> str:
    """A completion as letters: "a b ." ends after two words, "a b a b a" was cut."""
    sequences = setting.world.sequences
    assert sequences is not None
    tokens, mask = sequences.tokens[completion], sequences.mask[completion]
    end = int(sequences.previous[0])
    return " ".join("." if token == end else chr(ord("a") + token) for token in tokens[mask].tolist())


def _plain(value: Tensor) -> float | None:
    """A number for JSON; None if it is not finite."""
    return round(value.item(), 6) if bool(value.isfinite()) else None
