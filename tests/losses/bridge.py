"""The same numbers for both sides: feedback for prefloss, plain records for the oracle.

Log-probs are drawn token by token and summed, so that every loss, of sums or of tokens, sees one consistent batch.
The oracle is given the exact binary values of the tensors that prefloss is given.
"""

import random

import torch

import prefloss
from prefloss import Labels, Pairs, Rankings
from prefloss.hyperparameters import Interval
from prefloss.logratios import PerToken
from tests.oracle.numbers import Group, Pair, Side, Vote

LONGEST = 4


class Batch:
    """A batch of feedback whose policy log-probs are leaves.

    Attributes:
        feedback: For prefloss.
        leaves: Tensors that require grad, each [completions, T], by name: "policy", "kl", "reverse_kl".
        sides: Rows of the leaves that each place of the oracle's record stands for, by its path.
    """

    def __init__(self, kind, needs, rng, dtype, size, spread=1.0):
        self.rng, self.dtype, self.needs, self.spread = rng, dtype, needs, spread
        self.size = size
        make = {Pairs: self._pairs, Labels: self._labels, Rankings: self._rankings}[kind]
        make()

    def _rows(self, count):
        rng = self.rng

        def drawn(low, high):
            values = [[rng.uniform(low, high) for _ in range(LONGEST)] for _ in range(count)]
            return torch.tensor(values, dtype=torch.float64).to(self.dtype)

        lengths = torch.tensor([rng.randint(1, LONGEST) for _ in range(count)])
        mask = torch.arange(LONGEST) < lengths.unsqueeze(-1)
        scale = self.spread
        self.rows = PerToken(
            policy=(torch.where(mask, scale * drawn(-3.0, -0.05), 0.0)).requires_grad_(),
            reference=torch.where(mask, scale * drawn(-3.0, -0.05), 0.0),
            mask=mask,
            log_sum_sq=drawn(-2.0, -0.05),
            kl=drawn(0.0, 1.0).requires_grad_(),
            reverse_kl=drawn(0.0, 1.0).requires_grad_(),
            reference_entropy=drawn(0.1, 0.9),
            weight=drawn(0.5, 1.5),
        )
        self.all = self.rows.log_ratios()
        if not any(need.startswith("per_token") for need in self.needs):
            self.all = prefloss.LogRatios(self.all.policy, self.all.reference, self.all.tokens)

    def _numbers(self, low, high, count):
        values = [self.rng.uniform(low, high) for _ in range(count)]
        return torch.tensor(values, dtype=torch.float64).to(self.dtype)

    def _pairs(self):
        n = self.size
        self._rows(3 * n)
        gap = self._numbers(0.05, 0.4, n)
        worse = self._numbers(0.0, 0.5, n)
        scored = "scores" in self.needs
        self.feedback = Pairs(
            chosen=self.all[:n],
            rejected=self.all[n : 2 * n],
            gold=self.all[2 * n :] if "gold" in self.needs else None,
            score_chosen=worse + gap if scored else None,
            score_rejected=worse if scored else None,
            embedding=self._numbers(-1, 1, 3 * n).reshape(n, 3) if "embedding" in self.needs else None,
        )
        self.records = [
            Pair(
                chosen=self._side(i),
                rejected=self._side(n + i),
                gold=self._side(2 * n + i) if "gold" in self.needs else None,
                score_chosen=self.feedback.score_chosen[i].item() if scored else None,
                score_rejected=self.feedback.score_rejected[i].item() if scored else None,
                embedding=self.feedback.embedding[i].tolist() if "embedding" in self.needs else None,
            )
            for i in range(n)
        ]
        self.row_of = {"chosen": 0, "rejected": n, "gold": 2 * n}

    def _labels(self):
        n = self.size
        self._rows(n)
        desirable = torch.tensor([self.rng.random() < 0.5 for _ in range(n)])
        scores, baseline = self._numbers(0, 2, n), self._numbers(0, 1, n)
        scored = "scores" in self.needs
        self.feedback = Labels(
            completions=self.all,
            desirable=desirable,
            scores=scores if scored else None,
            baseline=baseline if "baseline" in self.needs else None,
            kl=torch.tensor(self.rng.uniform(0, 1), dtype=self.dtype),
        )
        self.records = [
            Vote(
                self._side(i),
                bool(desirable[i]),
                score=scores[i].item() if scored else None,
                baseline=baseline[i].item() if "baseline" in self.needs else None,
            )
            for i in range(n)
        ]
        self.row_of = {"side": 0}

    def _rankings(self):
        n, k = self.size, 3
        self._rows(n * k)
        order = torch.arange(n * k).reshape(n, k)
        scores = torch.stack(
            [torch.tensor(self.rng.sample(range(8), k), dtype=self.dtype) / 4 for _ in range(n)]
        )
        self.feedback = Rankings(completions=self.all[order], scores=scores)
        self.records = [
            Group([self._side(k * i + j) for j in range(k)], scores[i].tolist()) for i in range(n)
        ]
        self.row_of = {j: j for j in range(k)}
        self.width = k

    def _side(self, row):
        count = int(self.rows.mask[row].sum())
        side = {
            "policy": self.all.policy[row].item(),
            "reference": self.all.reference[row].item(),
            "tokens": count,
        }
        if any(need.startswith("per_token") for need in self.needs):
            rows = {name: getattr(self.rows, name)[row, :count].tolist() for name in ("policy", "reference")}
            side |= {f"per_token_{name}": values for name, values in rows.items()}
            if "per_token.log_sum_sq" in self.needs:
                side["per_token_log_sum_sq"] = self.rows.log_sum_sq[row, :count].tolist()
            if "per_token.kl" in self.needs:
                side["per_token_kl"] = self.rows.kl[row, :count].tolist()
            if "per_token.reverse_kl" in self.needs:
                side["per_token_kl_policy"] = self.rows.reverse_kl[row, :count].tolist()
            if "per_token.weight" in self.needs:
                side["per_token_weight"] = self.rows.weight[row, :count].tolist()
            if "per_token.reference_entropy" in self.needs:
                entropy = self.rows.reference_entropy[row, :count]
                side["reference_entropy"] = entropy.double().mean().item()
        return Side(**side)

    def wanted_gradient(self, oracle_gradient):
        """The oracle's derivatives as [completions, T] tensors of the leaves.

        A path ends in "policy" (the sum: the same for each token), or in the name of a list and a place.
        """
        found = {
            name: torch.zeros(self.rows.policy.shape, dtype=torch.float64)
            for name in ("policy", "kl", "reverse_kl")
        }
        names = {"per_token_policy": "policy", "per_token_kl": "kl", "per_token_kl_policy": "reverse_kl"}
        for path, value in oracle_gradient.items():
            row = self._row(path)
            if path[-1] == "policy":
                found["policy"][row] += float(value) * self.rows.mask[row].double()
            elif path[-2] in names:
                found[names[path[-2]]][row, path[-1]] += float(value)
        return found

    def _row(self, path):
        if isinstance(path[1], int):
            return path[0] * self.width + path[1]
        return self.row_of[path[1]] + path[0]

    def gradients(self, total):
        """d total / d leaf for each leaf; zeros where the loss does not read it."""
        leaves = {"policy": self.rows.policy, "kl": self.rows.kl, "reverse_kl": self.rows.reverse_kl}
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else torch.where(self.rows.mask, grad, 0.0)
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }


def hyperparameters(spec, rng):
    """Drawn hyperparameters of a loss: numbers around their defaults where the range allows, choices at random."""
    drawn = {}
    for name, parameter in spec.parameters.items():
        default = parameter.default
        if isinstance(default, bool):
            drawn[name] = rng.random() < 0.5
        elif isinstance(default, int | float):
            candidate = default * rng.choice((0.5, 1.0, 1.7)) or rng.choice((0.0, 0.1))
            bounds = parameter.constraint if isinstance(parameter.constraint, Interval) else None
            inside = bounds is None or candidate in bounds
            drawn[name] = type(default)(candidate) if inside else default
        elif (
            hasattr(parameter.type, "__args__") and isinstance(default, str) and parameter.constraint is None
        ):
            drawn[name] = rng.choice(parameter.type.__args__)
    return drawn


def seeded(seed):
    """Random numbers of a hypothesis-drawn seed."""
    return random.Random(seed)
