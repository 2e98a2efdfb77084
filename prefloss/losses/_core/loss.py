"""A loss with its hyperparameters bound: what `prefloss.get` returns."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefloss.arguments import flag, instance, shown
from prefloss.feedback import Feedback, Labels, Pairs, Rankings, convert, has, meaning_of
from prefloss.losses._core import parameters
from prefloss.losses._core.catalogue import spec_of
from prefloss.losses._core.modifiers import MODIFIERS, admitted, refusal, smoothed
from prefloss.losses._core.rewards import Change, ImplicitReward
from prefloss.losses._core.running import RunningMean
from prefloss.losses._core.spec import LossSpec
from prefloss.losses._core.state import Schedule, State

_CONVERSIONS = {
    (Rankings, Pairs): "; convert with rankings.to_pairs('best_worst' | 'adjacent' | 'all')",
    (Rankings, Labels): "; convert with rankings.to_pairs(...).to_labels()",
    (Pairs, Labels): "; convert with pairs.to_labels()",
    (Pairs, Rankings): "; convert with pairs.to_rankings()",
}


class Evaluation(NamedTuple):
    """A loss on a batch.

    Attributes:
        mean: What to minimise, a scalar.
        terms: Loss of each example by term, [n]; one term unless the loss is a sum of several.
        means: Mean of each term over the examples that it counts, before its weight, scalars.
    """

    mean: Tensor
    terms: dict[str, Tensor]
    means: dict[str, Tensor]


class Term(NamedTuple):
    """One loss of a weighted sum."""

    weight: float
    loss: Loss


class Loss:
    """A registered loss with checked hyperparameters.

    Attributes:
        spec: What the loss is and needs.
        params: Its hyperparameters, and the modifiers that were given; read-only.
        stated: Those of them that the caller gave; the others are defaults. Read-only.

    Example:
        >>> dpo = prefloss.get("dpo", beta=0.1)
        >>> pairs = prefloss.Pairs.of(chosen=[1.5], rejected=[-1.0])
        >>> dpo(pairs)
        tensor([0.5759])
        >>> dpo.mean(pairs)
        tensor(0.5759)
    """

    def __init__(self, spec: LossSpec, params: Mapping[str, Any], stated: Iterable[str] = ()) -> None:
        self.spec = spec
        self.params: Mapping[str, Any] = types.MappingProxyType(dict(params))
        self.stated: Mapping[str, Any] = types.MappingProxyType({name: params[name] for name in stated})

    @classmethod
    def bind(cls, name: str, stated: Mapping[str, Any]) -> Loss:
        """The loss of that name or alias with these hyperparameters and modifiers; raises as `get` does."""
        spec = spec_of(name)
        preset = spec.aliases[name].parameters if name in spec.aliases else {}
        values = {**preset, **stated}
        modifiers = [key for key in values if key not in spec.parameters and key in MODIFIERS]
        plain = {key: value for key, value in values.items() if key not in modifiers}
        params = parameters.check(spec.name, spec.parameters, plain, admitted(spec))
        for key in modifiers:
            reason = refusal(spec, key)
            if reason:
                raise TypeError(f"{spec.name}: {key}: got {values[key]!r}, but the loss {reason}")
            params[key] = MODIFIERS[key].parameter.checked(spec.name, values[key])
        return Loss(spec, params, stated=stated)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Weight and loss of each term of a sum; a plain loss is a sum of one."""
        return (Term(1.0, self),)

    @property
    def term_names(self) -> tuple[str, ...]:
        """A name for each term, all different; the keys of `Evaluation.terms`."""
        return (self.name,)

    def replaced(self, **changes: Any) -> Loss:
        """A copy with these hyperparameters in place of its own; raises as `get` does.

        Example:
            >>> prefloss.get("dpo").replaced(beta=0.5)
            dpo(beta=0.5)
        """
        bound = Loss.bind(self.name, {**copy.deepcopy(dict(self.params)), **changes})
        return Loss(bound.spec, bound.params, stated=[*self.stated, *changes])

    @property
    def name(self) -> str:
        """The loss's id in the registry."""
        return self.spec.name

    @property
    def beta(self) -> float | None:
        """The KL strength that trainers call beta, whatever the paper calls it; None if the loss has none."""
        return None if self.spec.beta is None else _now(self.params[self.spec.beta])

    @property
    def reward(self) -> ImplicitReward:
        """The reward that the policy implies in the sense of this loss: what it compares, for one completion alone.

        Only differences between completions of one prompt mean something.

        Raises:
            ValueError: If the loss has no such reward; the message says why.

        Example:
            >>> completion = LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10])
            >>> prefloss.get("dpo(beta=0.1)").reward(completion)
            tensor([0.1500])
            >>> prefloss.get("simpo(beta=2.0)").reward(completion)
            tensor([-4.])
        """
        declared, changes = self.spec.reward, list[Change]()
        if isinstance(declared, str):
            raise ValueError(f"loss: got {self.name}, which implies no reward of a completion: {declared}")
        for name in self.modifiers:
            change = MODIFIERS[name].reward
            if isinstance(change, str):
                raise ValueError(f"loss: got {name}, which implies no reward of a completion: {change}")
            if change is not None:
                changes.append(Change(name, _now(self.params[name]), self.beta or 1.0, change))
        values = {
            name: self.beta if name == "beta" else _now(self.params[name])
            for name in declared.hyperparameters
        }
        needs = declared.needs.union(*(MODIFIERS[change.name].needs for change in changes))
        additive = declared.additive and all(MODIFIERS[change.name].additive for change in changes)
        return ImplicitReward(declared, values, tuple(changes), additive, needs)

    @property
    def modifiers(self) -> list[str]:
        """Names of the modifiers that change it, in the order in which they apply."""
        return [name for name in MODIFIERS if name in self.params and name not in self.spec.parameters]

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the feedback that must be there, those of its modifiers included."""
        return self.spec.needs.union(*(MODIFIERS[name].needs for name in self.modifiers))

    @property
    def couples_batch(self) -> bool:
        """Whether an example's loss depends on the others of its batch, with these hyperparameters.

        Example:
            >>> [prefloss.get("kto", kl_baseline=name).couples_batch for name in ("mismatched", "zero")]
            [True, False]
        """
        # KTO's other baselines come from earlier batches, from a column, or are 0.
        return not self.spec.separable and self._baseline in ("auto", "mismatched")

    @property
    def reads_mismatched(self) -> bool:
        """Whether it reads completions under prompts they do not belong to, with these hyperparameters.

        Example:
            >>> [prefloss.get("kto", kl_baseline=name).reads_mismatched for name in ("auto", "running_mean")]
            [True, False]
        """
        if "mismatched" not in self.spec.reads or isinstance(self._baseline, RunningMean):
            return False
        return self._baseline not in ("zero", "column")

    def __call__(self, feedback: Feedback) -> Tensor:
        """Loss of each example, [n]: times its weight, and 0 where it does not count.

        Raises:
            TypeError: If the feedback is not of the kind `spec.feedback`; the message names the conversion.
            ValueError: If the loss needs something that the feedback lacks, or does not return one value per example.
        """
        self._check(feedback)
        for name in self.modifiers:
            apply = MODIFIERS[name].apply
            if apply is not None:
                feedback = apply(feedback, _now(self.params[name]), self.beta or 1.0)
        values = self._values(feedback)
        if "label_smoothing" in self.modifiers:
            assert isinstance(feedback, Pairs)
            flip = _now(self.params["label_smoothing"])
            # The first evaluation took the batch into the state; the reversed pairs are no further data.
            with self.held_still():
                reversed_values = self._values(feedback.swapped())
            values = smoothed(values, reversed_values, flip)
        if feedback.weight is not None:
            values = values * feedback.weight
        # where, not a product: NaN * 0 is NaN.
        return torch.where(self.counted(feedback), values, 0.0)

    def counted(self, feedback: Feedback) -> Tensor:
        """True at the examples that the loss and its mean count, [n]."""
        if self.spec.valid is None:
            return feedback.valid
        counted = self.spec.valid(feedback)
        if not isinstance(counted, Tensor) or counted.dtype != torch.bool or counted.shape != feedback.shape:
            raise TypeError(
                f"{self.name}: valid: got {shown(counted)}, expected a boolean tensor of shape {list(feedback.shape)}"
            )
        return counted

    def counts(self, feedback: Feedback) -> Tensor:
        """How many examples each term counts, [terms], integer.

        Terms that take labels count both sides of a pair. TypeError if a term takes a kind of feedback that does not
        follow from this one.

        Example:
            >>> pairs = prefloss.Pairs.of(chosen=[1.5], rejected=[-1.0])
            >>> prefloss.get("dpo + 0.5*npo + 0.5*kto_zero").counts(pairs)
            tensor([1, 1, 2])
        """
        counted = [loss.counted(convert(feedback, loss.spec.feedback)) for _, loss in self.terms]
        return torch.stack([each.sum() for each in counted])

    def evaluate(self, feedback: Feedback) -> Evaluation:
        """The loss of a batch, its terms and what to minimise; warns once if some completion is empty.

        The mean is the sum of the weighted values over the number of examples that count, so a weight means the same
        in every batch. A batch where none counts gives 0 with zero gradient. Raises as calling the loss does.
        """
        values = self(feedback)
        _warn_if_empty(feedback)
        mean = values.sum() / self.counted(feedback).sum().clamp(min=1)
        return Evaluation(mean, {self.name: values}, {self.name: mean})

    def mean(self, feedback: Feedback) -> Tensor:
        """Mean loss over the examples that count, a scalar; as `evaluate`."""
        return self.evaluate(feedback).mean

    @property
    def state(self) -> dict[str, State]:
        """The hyperparameters that keep a state between calls."""
        return {name: value for name, value in self.params.items() if isinstance(value, State)}

    def state_dict(self) -> dict[str, Any]:
        """State kept between calls; empty for a stateless loss."""
        return {name: value.state_dict() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError if that loss keeps other things, TypeError if it is no mapping."""
        instance("state", state, Mapping, "what state_dict() gave")
        if state.keys() != self.state.keys():
            raise ValueError(
                f"state: got {sorted(map(str, state))}, expected {sorted(self.state)} for {self!r}"
            )
        for name, value in self.state.items():
            value.load_state_dict(state[name])

    def train(self, mode: bool = True) -> Loss:
        """Let the state move (training) or hold it still (evaluation)."""
        flag("mode", mode)
        for value in self.state.values():
            value.train(mode)
        return self

    def eval(self) -> Loss:
        """Hold the state still, as `torch.nn.Module.eval` does."""
        return self.train(False)

    @contextmanager
    def held_still(self) -> Iterator[None]:
        """Inside a `with` block, calls neither move the state nor communicate with other processes."""
        kept = [(state, state.training, state.all_sum) for state in self.state.values()]
        try:
            for state, *_ in kept:
                state.train(False)
                state.all_sum = torch.clone
            yield
        finally:
            for state, training, all_sum in kept:
                state.train(training)
                state.all_sum = all_sum

    def step(self) -> None:
        """Move the schedules on; call it after each optimizer step."""
        for value in self.state.values():
            value.step()

    def sync_with(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Keep one state over all ranks: `all_sum` sums a tensor over them."""
        for value in self.state.values():
            value.all_sum = all_sum

    def reduce_over(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Former name of `sync_with`."""
        warnings.warn(
            "Loss.reduce_over is now Loss.sync_with; the old name goes in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        self.sync_with(all_sum)

    def config(self) -> dict[str, Any]:
        """Name and hyperparameters as a configuration file holds them; `get(config.pop("name"), **config)` reads it."""
        return {"name": self.name, **{name: _plain(value) for name, value in self.params.items()}}

    def __repr__(self) -> str:
        """Name and every hyperparameter; `get(repr(loss))` gives the loss back."""
        written = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        return f"{self.name}({written})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: the registry, not the file, holds the function."""
        return _rebuilt, (self.name, dict(self.params), tuple(self.stated), self.state_dict())

    @property
    def _baseline(self) -> Any:
        """Source of the KL baseline; a loss of the KTO family without the choice has the paper's."""
        return self.params.get("kl_baseline", "mismatched")

    def _check(self, feedback: Any) -> None:
        kind = self.spec.feedback
        if not isinstance(feedback, kind):
            hint = _CONVERSIONS.get((type(feedback), kind), "")
            raise TypeError(
                f"{self.name}: feedback: got {type(feedback).__name__}, expected {kind.__name__}{hint}"
            )
        if self.spec.needs_reference and any(part.reference is None for part in feedback.parts):
            raise ValueError(
                f"{self.name}: reference: got None, expected reference log-probs: the loss reads log-ratios"
            )
        for need in self.needs:
            if not has(feedback, need):
                raise ValueError(f"{self.name}: {need}: got None, expected {meaning_of(need, kind)}")

    def _values(self, feedback: Feedback) -> Tensor:
        now = {name: _now(self.params[name]) for name in self.spec.parameters}
        values = self.spec.function(feedback, **now)
        _check_values(self.name, values, feedback)
        return values


def _check_values(name: str, values: Any, feedback: Feedback) -> None:
    """Refuse what a loss returned unless it is one real number for each example."""
    shape, device = feedback.shape, feedback.parts[0].device
    real_numbers = isinstance(values, Tensor) and values.is_floating_point()
    if real_numbers and values.shape == shape and values.device == device:
        return
    wanted = f"one loss for each example: a floating-point tensor of shape {list(shape)}"
    if isinstance(values, tuple | list):
        kinds = ", ".join(type(value).__name__ for value in values[:4])
        raise TypeError(
            f"{name}: returned a {type(values).__name__} ({kinds}), expected {wanted}; rewards and metrics are not "
            "part of a loss: prefloss.metrics computes them"
        )
    if not real_numbers:
        raise TypeError(f"{name}: returned {shown(values)}, expected {wanted}")
    if values.shape != shape:
        raise ValueError(
            f"{name}: got values of shape {list(values.shape)}, expected {list(shape)}: one per example, not reduced"
        )
    raise ValueError(f"{name}: returned values on {values.device}, expected {device} as the log-probs have")


class _Warned:
    empty = False


def _warn_if_empty(feedback: Feedback) -> None:
    """Warn, once per process, that some examples have a completion without tokens and are left out."""
    if torch.compiler.is_compiling() or _Warned.empty:
        return
    try:
        empty = int((~feedback.valid).sum())
    except RuntimeError:
        # vmap refuses to turn a mapped tensor into a number.
        return
    if empty:
        _Warned.empty = True
        warnings.warn(
            f"{empty} of {feedback.valid.numel()} examples have a completion without tokens (truncated away?); "
            "they are left out of the loss and of its mean. This warning is shown once.",
            UserWarning,
            stacklevel=4,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings inside a `with` block; a warning that is shown once per process is still shown later."""
    warned = _Warned.empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            _Warned.empty = warned


def _now(value: Any) -> Any:
    return value.value if isinstance(value, Schedule) else value


def _plain(value: Any) -> Any:
    """A hyperparameter as JSON keeps it; code is kept as its repr, and refused when read back."""
    if isinstance(value, State):
        return value.config()
    if isinstance(value, str | int | float | bool | types.NoneType):
        return value
    return list(value) if isinstance(value, tuple) else getattr(value, "name", repr(value))


def _rebuilt(name: str, params: dict[str, Any], stated: tuple[str, ...], state: dict[str, Any]) -> Loss:
    bound = Loss.bind(name, params)
    loss = Loss(bound.spec, bound.params, stated)
    loss.load_state_dict(state)
    return loss
