"""What the rewards of a file are worth: accuracy, margins, calibration, length. Counted part by part."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats
from scipy.special import expit

from prefloss.cli.scoring.rows import Kind
from prefloss.cli.scoring.ties import Group, prompt_of, ties_score
from prefloss.feedback import Labels, Pairs, Rankings

BINS = 10
"""Bins of the confidence, from 0.5 to 1."""

# Subsets of a benchmark that are told apart; a file could have another in each row.
_MOST_SUBSETS = 200


@dataclass
class Moments:
    """Means, variances and the covariance of two quantities, updated batch by batch."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(2))
    squares: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))

    def add(self, x: Any, y: Any) -> None:
        """Count values of both, [n]."""
        values = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)])
        count = values.shape[1]
        if not count:
            return
        mean = values.mean(1)
        apart, centred = mean - self.mean, values - mean[:, None]
        total = self.count + count
        # Chan, Golub and LeVeque 1983: no difference of large sums.
        self.squares += centred @ centred.T + np.outer(apart, apart) * self.count * count / total
        self.mean = self.mean + apart * count / total
        self.count = total

    @property
    def correlation(self) -> float | None:
        """Pearson's; None if one of the two does not vary."""
        (xx, xy), (_, yy) = self.squares
        # Rounding of equal values leaves a little.
        least = 1e-24 * self.count * np.maximum(self.mean**2, 1e-300)
        return None if xx <= least[0] or yy <= least[1] else float(xy / math.sqrt(xx * yy))

    def interval(self) -> tuple[float, float] | None:
        """Student's 95% interval of the first mean; None of fewer than two values."""
        if self.count < 2:
            return None
        error = math.sqrt(self.squares[0, 0] / (self.count - 1) / self.count)
        low, high = self.mean[0] + np.array([-1, 1]) * stats.t.ppf(0.975, self.count - 1) * error
        return float(low), float(high)


@dataclass
class Comparisons:
    """Comparisons of a better completion with a worse one of the same prompt."""

    count: int = 0
    wins: int = 0
    ties: int = 0
    longer_won: int = 0
    longer_better: int = 0
    differ_in_length: int = 0
    # Margin and difference in tokens.
    moments: Moments = field(default_factory=Moments)
    # Comparisons, sum of confidence and sum of correctness, of each bin.
    bins: np.ndarray = field(default_factory=lambda: np.zeros((3, BINS)))

    def add(self, margins: np.ndarray, longer: np.ndarray) -> None:
        """Count comparisons: reward and tokens of the better completion minus those of the worse one."""
        self.count += len(margins)
        self.wins += int((margins > 0).sum())
        self.ties += int((margins == 0).sum())
        self.longer_won += int((margins * longer > 0).sum())
        self.longer_better += int((longer > 0).sum())
        self.differ_in_length += int((longer != 0).sum())
        self.moments.add(margins, longer)
        confidence = expit(np.abs(margins))
        correct = (np.sign(margins) + 1) / 2
        places = np.minimum((confidence * 2 - 1) * BINS, BINS - 1).astype(int)
        for row, weights in zip(self.bins, (np.ones_like(margins), confidence, correct), strict=True):
            row += np.bincount(places, weights, BINS)

    def result(self) -> dict[str, Any]:
        """Counts, margin, calibration and length."""
        confidence, correct = self.bins[1:]
        return {
            "comparisons": self.count,
            "ties": self.ties,
            "margin": {"mean": float(self.moments.mean[0]), "interval": self.moments.interval()},
            "calibration": {
                "ece": float(np.abs(confidence - correct).sum() / self.count),
                "bins": [
                    {"count": int(n), "confidence": c / n, "accuracy": a / n}
                    for n, c, a in self.bins.T.tolist()
                    if n
                ],
            },
            "length": {
                "correlation": self.moments.correlation,
                "differ": self.differ_in_length,
                "longer_has_higher_reward": self.longer_won,
                "longer_is_better": self.longer_better,
            },
        }


class Summary:
    """Counts the parts of a file's scores.

    Args:
        kind: What the rows are.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.rows = self.truncated = 0
        self.all = Moments()
        self.within = Moments()
        self.compared = Comparisons()
        # Accuracy of each row that compares something.
        self.accuracy = Moments()
        self.picks = np.zeros(5)
        self.votes = {False: array("d"), True: array("d")}
        self.subsets: dict[str, list[float]] | None = {}
        self.tied: dict[tuple[str, int], Group] = {}

    def add(self, part: pa.Table) -> None:
        """Count the completions of a part, which holds whole rows."""
        column = {name: part[name].to_numpy() for name in ("row", "reward", "tokens", "given", "truncated")}
        reward, tokens, given = column["reward"], column["tokens"].astype(np.float64), column["given"]
        self.truncated += int(column["truncated"].sum())
        self.all.add(reward, tokens)
        starts = np.flatnonzero(np.diff(column["row"], prepend=-1))
        self.rows += len(starts)
        if self.kind.feedback is Pairs:
            margins, longer = reward[::2] - reward[1::2], tokens[::2] - tokens[1::2]
            self.compared.add(margins, longer)
            self._add_accuracy(margins > 0, part["subset"].take(pa.array(starts)).to_pylist())
        elif self.kind.feedback is Labels and self.kind.judged:
            for label, rewards in self.votes.items():
                rewards.frombytes(reward[(given > 0.5) == label].tobytes())
        elif self.kind.feedback is Rankings:
            for start, end in itertools.pairwise([*starts.tolist(), len(reward)]):
                self._add_group(part, start, reward[start:end], tokens[start:end], given[start:end])

    def _add_accuracy(self, values: Any, subsets: Sequence[str | None]) -> None:
        values = np.asarray(values, np.float64)
        self.accuracy.add(values, np.zeros_like(values))
        for name, value in zip(subsets, values.tolist(), strict=True):
            self._add_subset(name, value)

    def _add_subset(self, name: str | None, value: float) -> None:
        if name is None or self.subsets is None:
            return
        if name not in self.subsets and len(self.subsets) == _MOST_SUBSETS:
            self.subsets = None
            return
        known = self.subsets.setdefault(name, [0, 0.0])
        known[0] += 1
        known[1] += value

    def _add_group(
        self, part: pa.Table, start: int, reward: np.ndarray, tokens: np.ndarray, given: np.ndarray
    ) -> None:
        """Count a ranking."""
        self.within.add(reward - reward.mean(), tokens - tokens.mean())
        top = reward == reward.max()
        self.picks[3:] += reward.max() - reward.mean(), len(reward)
        if not self.kind.judged:
            return
        subset, name = part["subset"][start].as_py(), part["id"][start].as_py()
        prompt = prompt_of(name) if (subset or "").lower() == "ties" else None
        if prompt is not None:
            self.tied[prompt] = Group(reward[given > 0.5].tolist(), reward[given <= 0.5].tolist())
        # Equal rewards share the pick, as in RewardBench 2.
        best = given == given.max()
        picked = best[top].mean()
        self.picks[:3] += picked, best.mean(), given[top].mean() - given.mean()
        self._add_subset(subset, picked)
        better, worse = np.nonzero(given[:, None] > given[None, :])
        if len(better):
            margins = reward[better] - reward[worse]
            self.compared.add(margins, tokens[better] - tokens[worse])
            self._add_accuracy([(margins > 0).mean()], [None])

    def result(self) -> dict[str, Any]:
        """Every number, as JSON."""
        found: dict[str, Any] = {
            "kind": self.kind.words,
            "rows": self.rows,
            "completions": self.all.count,
            "tokens": round(self.all.mean[1] * self.all.count),
            "truncated": self.truncated,
            "mean_reward": float(self.all.mean[0]),
            "correlation_of_reward_and_tokens": self.all.correlation,
        }
        if self.compared.count:
            found |= {"accuracy": self._accuracy(), **self.compared.result()}
        if self.kind.feedback is Rankings:
            found |= {"best_of": self._best_of()}
            found["correlation_of_reward_and_tokens"] = self.within.correlation
        if all(self.votes.values()):
            found["accuracy"] = _above(*(np.frombuffer(self.votes[label]) for label in (True, False)))
        elif any(self.votes.values()):
            found["votes"] = {"up": len(self.votes[True]), "down": len(self.votes[False])}
        if self.subsets:
            found["subsets"] = self._subsets()
        return found

    def _accuracy(self) -> dict[str, Any]:
        share, rows = float(self.accuracy.mean[0]), self.accuracy.count
        # Comparisons of one ranking depend on each other, so a row counts once.
        variance = self.accuracy.squares[0, 0] / max(rows - 1, 1) / rows
        of = "pairs" if self.kind.feedback is Pairs else "rankings"
        count = rows if self.kind.feedback is Pairs else _as_draws(share, variance, rows)
        return {"share": share, "interval": wilson(share, count), "of": of}

    def _best_of(self) -> dict[str, Any]:
        best, chance, gain, height, size = (self.picks / self.rows).tolist()
        found = {"mean_size": size, "reward_above_mean": height}
        if self.kind.judged:
            found |= {"picks_the_best": best, "by_chance": chance, "score_above_mean": gain}
        return found

    def _subsets(self) -> dict[str, Any]:
        shares = {
            name: {"rows": int(n), "share": total / n} for name, (n, total) in (self.subsets or {}).items()
        }
        for name in shares:
            # Another benchmark may have a subset of this name.
            if name.lower() == "ties" and len(self.tied) == shares[name]["rows"]:
                shares[name]["share"] = ties_score(self.tied)
        mean = float(np.mean([subset["share"] for subset in shares.values()]))
        return {"mean": mean, "of": dict(sorted(shares.items()))}


def _above(up: np.ndarray, down: np.ndarray) -> dict[str, Any]:
    """How often an upvoted completion has a higher reward than a downvoted one, ties half; Hanley and McNeil 1982."""
    n, m = len(up), len(down)
    ranks = stats.rankdata(np.concatenate([up, down]))[:n]
    share = (ranks.sum() - n * (n + 1) / 2) / (n * m)
    one, other = share / (2 - share), 2 * share**2 / (1 + share)
    variance = share * (1 - share) + (n - 1) * (one - share**2) + (m - 1) * (other - share**2)
    interval = wilson(share, _as_draws(share, variance / (n * m), min(n, m)))
    return {"share": float(share), "interval": interval, "of": "votes", "up": n, "down": m}


def _as_draws(share: float, variance: float, least: int) -> float:
    """The number of independent draws whose share has this variance; `least` if that is 0."""
    return share * (1 - share) / variance if variance > 0 and 0 < share < 1 else least


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share, right for few draws and for shares near 0 and 1.

    Example:
        >>> low, high = wilson(1.0, 10)
        >>> round(low, 3), round(high, 3)
        (0.722, 1.0)
    """
    z = float(stats.norm.ppf(0.975))
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((middle + side * half) / (1 + z * z / count) for side in (-1, 1))
    return max(float(low), 0.0), min(float(high), 1.0)
