"""Train one policy for each loss and seed, all in one program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from prefloss.registry import Loss, WeightedSum, get
from prefloss.worlds.data import Data
from prefloss.worlds.feeding import asked, fixed_values, moving_values
from prefloss.worlds.objective import Objective
from prefloss.worlds.policies import Policy


@dataclass(frozen=True, eq=False)
class Runs:
    """Trained policies, [losses, seeds].

    Attributes:
        policy: Their family.
        losses: One a row.
        seeds: One a column.
        theta: Parameters after each step that was kept, [losses, seeds, *shape]; the last is that of the end.
        final: Mean loss of each run on its last batch, [losses, seeds].
    """

    policy: Policy
    losses: tuple[Loss, ...]
    seeds: tuple[int, ...]
    theta: dict[int, Tensor]
    final: Tensor

    def log_probs(self, step: int | None = None) -> Tensor:
        """Log-probs of all completions at the end or after a kept step, [losses, seeds, prompts, C], nats."""
        step = max(self.theta) if step is None else step
        if step not in self.theta:
            raise ValueError(f"step: got {step}, expected one that was kept: {sorted(self.theta)}")
        return self.policy.log_probs(self.theta[step])


def sweep(loss: str | Loss, strengths: Iterable[float]) -> list[Loss]:
    """The loss at several KL strengths, whatever its hyperparameter is called; in a sum, all terms that have one.

    Raises:
        ValueError: If it has no KL strength.

    Example:
        >>> sweep("ipo", [0.1, 1.0])
        [ipo(tau=0.1, per_token=True), ipo(tau=1.0, per_token=True)]
        >>> sweep("0.8*dpo + 0.2*nll", [0.5])
        [0.8*dpo(beta=0.5) + 0.2*nll(average='sequence')]
    """
    return [_with_strength(_strong(loss), lambda _, value=value: float(value)) for value in strengths]


def scaled(loss: str | Loss, factors: Iterable[float]) -> list[Loss]:
    """The loss at multiples of its KL strength; in a sum, the terms keep their ratio.

    Raises:
        ValueError: If it has no KL strength, or one that moves with the steps.

    Example:
        >>> scaled("0.8*dpo + 0.2*simpo(beta=2.0)", [4.0])
        [0.8*dpo(beta=0.4) + 0.2*simpo(beta=8.0, gamma=1.375)]
    """
    return [_with_strength(_strong(loss), lambda now, factor=factor: now * factor) for factor in factors]


def _strong(loss: str | Loss) -> Loss:
    loss = get(loss) if isinstance(loss, str) else loss
    if all(term.spec.beta is None for _, term in loss.terms):
        raise ValueError(f"loss: got {loss.name!r}, which has no KL strength, expected one to sweep")
    return loss


def _with_strength(loss: Loss, change: Callable[[float], float]) -> Loss:
    if isinstance(loss, WeightedSum):
        return WeightedSum([(weight, _with_strength(term, change)) for weight, term in loss.terms])
    name = loss.spec.beta
    return loss if name is None else loss.replaced(**{name: change(loss.params[name])})


def train(
    policy: Policy,
    data: Data,
    losses: str | Loss | Sequence[str | Loss],
    *,
    steps: int = 300,
    learning_rate: float = 0.05,
    batch_size: int | None = None,
    start: Tensor | None = None,
    keep: Iterable[int] = (),
    optimizer: Callable[..., Optimizer] = Adam,
) -> Runs:
    """Minimise every loss on every seed's data; a run's result does not depend on what runs beside it.

    A seed means the same data, start and batches for all losses. The parameters of all runs are one tensor, so the
    optimizer must treat each number by itself, as Adam and SGD do.

    Args:
        policy: Family to train in.
        data: Feedback of the kind that the losses take.
        losses: Names, expressions or losses; `sweep` gives one at several strengths.
        steps: Optimizer steps, at least 1.
        learning_rate: Its step size.
        batch_size: Examples of a step, drawn without replacement from each pass over the data; None is all of them.
        start: Parameters to start from, broadcast to [losses, seeds, *shape]; None is the reference.
        keep: Steps after which to keep the parameters; 0 is before the first.
        optimizer: Takes parameters and `lr`.

    Raises:
        TypeError: If a loss takes another kind of feedback.
        ValueError: If a loss needs what the world does not have (the message names both), or a setting is out of range.
    """
    given = [losses] if isinstance(losses, str | Loss) else losses
    bound = tuple(get(loss) if isinstance(loss, str) else loss for loss in given)
    if not bound or steps < 1:
        raise ValueError(f"got {len(bound)} losses and {steps} steps, expected at least one of each")
    keep = {*keep, steps}
    if min(keep) < 0 or max(keep) > steps:
        raise ValueError(f"keep: got {sorted(keep)}, expected steps from 0 to {steps}")
    theta = _started((len(bound), len(data.seeds), *policy.shape), start).requires_grad_()
    adjust = optimizer([theta], lr=learning_rate)
    objective = Objective(bound, data.kind, len(data.seeds))
    wanted = objective.wanted
    data = asked(data, wanted)
    whole = fixed_values(policy, data, wanted)
    order = None if batch_size is None else _batches(data, steps, batch_size)
    kept = {0: theta.detach().clone()} if 0 in keep else {}
    means = theta.new_zeros(())
    for step in range(1, steps + 1):
        batch = data if order is None else data.at(order[:, step - 1])
        fixed = whole if order is None else fixed_values(policy, batch, wanted)
        means = objective(moving_values(policy, theta, batch, wanted), fixed)
        adjust.zero_grad()
        means.sum().backward()
        adjust.step()
        objective.step()
        if step in keep:
            kept[step] = theta.detach().clone()
    return Runs(policy, bound, data.seeds, kept, means.detach())


def _started(shape: tuple[int, ...], start: Tensor | None) -> Tensor:
    theta = torch.zeros(shape, dtype=torch.float64)
    if start is None:
        return theta
    try:
        return theta + start.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"start: got shape {list(start.shape)}, expected one that fits {list(shape)}"
        ) from None


def _batches(data: Data, steps: int, size: int) -> Tensor:
    """Examples of each step, [seeds, steps, size]."""
    if not 1 <= size <= len(data):
        raise ValueError(f"batch_size: got {size}, expected 1 to {len(data)}, the number of examples")
    passes = -(-steps * size // (len(data) // size * size))
    rows = []
    for seed in data.seeds:
        # Not the stream that drew the data; on a CPU, torch reads the low 32 bits of a seed.
        generator = torch.Generator().manual_seed(2**31 + seed)
        orders = [
            torch.randperm(len(data), generator=generator)[: len(data) // size * size] for _ in range(passes)
        ]
        rows.append(torch.cat(orders)[: steps * size].reshape(steps, size))
    return torch.stack(rows)
