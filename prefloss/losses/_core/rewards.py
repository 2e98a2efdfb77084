"""The reward that a loss implies: what it compares between completions of one prompt, for one completion alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefloss.arguments import function as checked_function
from prefloss.feedback import required
from prefloss.logratios import LogRatios
from prefloss.losses._core import transforms


@dataclass(frozen=True)
class Reward:
    """A reward as a loss declares it.

    Attributes:
        function: ``(log-ratios, *, hyperparameters) -> rewards``, [...]. It gets those hyperparameters of the loss
            that it names; `beta` is the KL strength, whatever the loss calls it.
        formula: For people; y is the completion, ``|y|`` its number of tokens, h its log-ratio.
        additive: The reward is a sum over the completion's tokens.
        needs: What it reads besides the policy's sums: `reference`, `tokens`, `per_token`, `per_token.kl` ...
    """

    function: Callable[..., Tensor]
    formula: str
    additive: bool = True
    needs: frozenset[str] = frozenset(("reference",))

    @property
    def hyperparameters(self) -> list[str]:
        """Names of the hyperparameters that it reads."""
        _, *rest = inspect.signature(self.function).parameters
        return rest


@dataclass(frozen=True)
class Change:
    """What a modifier does to the log-ratios that a reward reads.

    Attributes:
        name: The modifier.
        value: Its value.
        beta: KL strength of the loss.
        apply: (log-ratios, value, KL strength) -> log-ratios.
    """

    name: str
    value: Any
    beta: float
    apply: Callable[[LogRatios, Any, float], LogRatios]


@dataclass(frozen=True)
class ImplicitReward:
    """The reward of a loss with its hyperparameters: call it with log-ratios.

    Attributes:
        declared: As the loss declares it.
        values: The hyperparameters that it reads.
        changes: What the loss's modifiers do to the log-ratios first.
        additive: The reward is a sum over the completion's tokens.
        needs: As in `Reward`, with what the modifiers need.

    Example:
        >>> reward = prefloss.get("dpo(beta=0.1)").reward
        >>> reward(LogRatios(policy=[-20.0], reference=[-21.5]))
        tensor([0.1500])
        >>> reward
        β h, beta=0.1
    """

    declared: Reward
    values: Mapping[str, Any]
    changes: tuple[Change, ...]
    additive: bool
    needs: frozenset[str]

    def __call__(self, ratios: LogRatios) -> Tensor:
        """Rewards of completions, [...]; ValueError if the log-ratios lack something that the reward needs."""
        for change in self.changes:
            ratios = change.apply(ratios, change.value, change.beta)
        return self.declared.function(ratios, **self.values)

    def of_tokens(self, ratios: LogRatios) -> Tensor:
        """Reward of each token, [..., T]; the tokens of a completion add up to its reward.

        Where the reward is a sum over tokens, these are its terms; a part that belongs to no token, such as a length
        term, is shared out equally. Where the reward bends the sum (odds, divergences), a token counts with the
        reward's slope times its log-ratio (its log-prob, without a reference), and what is left is shared out equally.

        Args:
            ratios: With their token counts and `per_token` rows.
        """
        rows, tokens = required(ratios, "per_token"), required(ratios, "tokens")
        if self.additive:
            # Each token as a completion, except that means divide by the whole one's length.
            alone = LogRatios(
                rows.policy, rows.reference, tokens.unsqueeze(-1).expand_as(rows.mask), rows[..., None]
            )
            values = self(alone)
        else:
            own = rows.policy - required(rows, "reference") if "reference" in self.needs else rows.policy
            values = self._slope(ratios).unsqueeze(-1) * own
        values = torch.where(rows.mask, values, 0.0)
        left = (self(ratios) - values.sum(-1)) / tokens.clamp(min=1)
        return torch.where(rows.mask, values + left.unsqueeze(-1), 0.0)

    def _slope(self, ratios: LogRatios) -> Tensor:
        """Derivative of each reward by the policy's log-prob, [...]."""
        with torch.enable_grad():
            policy = ratios.policy.detach().requires_grad_()
            return torch.autograd.grad(self(replace(ratios, policy=policy)).sum(), policy)[0]

    def __repr__(self) -> str:
        """The formula, and what its symbols are."""
        values = {**self.values, **{change.name: change.value for change in self.changes}}
        return ", ".join([self.declared.formula, *(f"{name}={value!r}" for name, value in values.items())])


def declared(
    name: str, trait: Any, parameters: Mapping[str, Any], beta: str | None, reference: bool
) -> Reward | str:
    """The reward that a loss declares, or the reason why it has none.

    Args:
        name: The loss.
        trait: A `Reward`, a function as it takes, the reason why there is none, or None: beta h if the loss reads a
            reference and has a KL strength.
        parameters: Hyperparameters of the loss.
        beta: Which of them is the KL strength, or None.
        reference: Whether the loss needs a reference.
    """
    if trait is None:
        return (
            LOG_RATIO if reference and beta is not None else "the loss declares none (register(reward=...))"
        )
    if isinstance(trait, str):
        return trait
    if not isinstance(trait, Reward):
        checked_function(
            f"{name}: reward", trait, "a function of log-ratios, or the reason why there is none"
        )
        needs = frozenset(("reference", "tokens") if reference else ("tokens",))
        trait = Reward(trait, (inspect.getdoc(trait) or name).partition("\n")[0], needs=needs)
    known = {*parameters, "beta"} if beta else {*parameters}
    unknown = sorted(set(trait.hyperparameters) - known)
    if unknown:
        raise TypeError(
            f"{name}: reward: got the hyperparameter {unknown[0]!r}, expected some of {sorted(known)}"
        )
    return trait


def bent(score: Callable[[Tensor], Tensor], formula: str) -> Reward:
    """KL strength times a score of the log-ratio, as f-divergences give."""
    return Reward(lambda ratios, *, beta: beta * score(ratios.h), formula, additive=False)


_REFERENCE, _MEAN = frozenset(("reference",)), frozenset(("tokens",))

LOG_RATIO = Reward(lambda ratios, *, beta: beta * ratios.h, "β h")
MEAN_LOG_RATIO = Reward(lambda ratios, *, beta: beta * ratios.h_mean, "β h / |y|", needs=_REFERENCE | _MEAN)
LOG_PROB = Reward(lambda ratios, *, beta: beta * ratios.policy, "β log π(y)", needs=frozenset())
MEAN_LOG_PROB = Reward(lambda ratios, *, beta: beta * ratios.policy_mean, "β log π(y) / |y|", needs=_MEAN)
UNSCALED_MEAN_LOG_PROB = Reward(lambda ratios: ratios.policy_mean, "log π(y) / |y|", needs=_MEAN)
LOG_ODDS = Reward(
    transforms.log_odds,
    "log(p / (1 - p)) with p = π(y)^(1 / |y|)",
    additive=False,
    needs=_MEAN,
)
