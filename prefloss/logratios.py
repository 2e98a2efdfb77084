"""Log-ratios: token log-probs of policy and reference -> one record per completion.

Targets are shifted, completions masked, tokens summed and counted here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefloss import arguments

IGNORE_INDEX = -100
"""Target of a position that predicts no completion token."""

# Rounding may lift the log-prob of a certain token a little above 0, nats.
_ABOVE = 1e-2


def completion_targets(input_ids: Tensor, completion_mask: Tensor, segments: Tensor | None = None) -> Tensor:
    """Targets aligned with the logits: position t predicts token t + 1, if that is a completion token.

    Args:
        input_ids: Token ids, [..., T].
        completion_mask: True (or 1) at completion tokens, [..., T]; prompt and padding are False.
        segments: Id of the sequence that each token of a packed row belongs to, [..., T]. No position predicts
            the first token of the next sequence.

    Returns:
        Integer targets, [..., T], `IGNORE_INDEX` where nothing is to be scored; the last position never is.

    Raises:
        TypeError: If the ids are not integer tensors.
        ValueError: If the shapes differ, a mask holds other numbers than 0 and 1, or a completion token has an id
            below 0.

    Example:
        >>> completion_targets(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]]))
        tensor([[-100,    7,    8, -100]])
    """
    arguments.check_ids("input_ids", input_ids)
    completion_mask = arguments.mask("completion_mask", completion_mask)
    arguments.check_like("completion_mask", completion_mask, "input_ids", input_ids)
    scored = completion_mask[..., 1:]
    if segments is not None:
        arguments.instance("segments", segments, Tensor, "an integer tensor [..., T]")
        arguments.check_like("segments", segments, "input_ids", input_ids)
        arguments.check_integer("segments", segments, "an integer tensor [..., T]")
        scored = scored & (segments[..., 1:] == segments[..., :-1])
    if arguments.readable(input_ids):
        ids = input_ids[..., 1:]
        arguments.refuse("input_ids", ids, scored & (ids < 0), "token ids >= 0 in completions")
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    targets[..., :-1] = torch.where(scored, input_ids[..., 1:], IGNORE_INDEX)
    return targets


@dataclass(frozen=True, eq=False)
class PerToken:
    """Per-token log-probs of the completions, for the losses that read more than sums.

    All tensors are [..., T]; nothing outside the mask counts, and `policy` and `reference` are 0 there.

    Raises:
        TypeError: If a field is no tensor, `mask` is not boolean, or another field is not floating point.
        ValueError: If shapes or devices differ.

    Attributes:
        policy: Log-probs of the completion's tokens under the policy, nats.
        reference: The same under the reference, or None.
        mask: True at completion tokens.
        log_sum_sq: Log of the sum over the vocabulary of the policy's squared probabilities, nats; without gradient
            (WPO).
        kl: KL(reference || policy) over the vocabulary, nats, with gradient (TDPO).
        reverse_kl: KL(policy || reference) over the vocabulary, nats, with gradient (TIS-DPO).
        reference_entropy: Entropy of the reference over the vocabulary divided by log V, in [0, 1] (Mallows-DPO).
        weight: Importance of each token (TIS-DPO).
    """

    policy: Tensor
    reference: Tensor | None
    mask: Tensor
    log_sum_sq: Tensor | None = None
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    reference_entropy: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the fields; values that do not depend on the policy carry no gradient."""
        for name, value in self._present().items():
            _check_row(f"per_token.{name}", value)
            arguments.check_like(f"per_token.{name}", value, "per_token.policy", self.policy)
            if name in ("reference", "log_sum_sq", "reference_entropy", "weight"):
                object.__setattr__(self, name, value.detach())

    def __getitem__(self, index: Any) -> PerToken:
        """The tokens of some completions; `index` addresses the leading dimensions."""
        return self._map(lambda value: value[index])

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the completion's tokens, [...]; values outside the mask are not read."""
        return torch.where(self.mask, values, 0.0).sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the completion's tokens, [...]; 0 for an empty completion."""
        return self.sum(values) / self.mask.sum(-1).clamp(min=1)

    def log_ratios(self, mask: Tensor | None = None) -> LogRatios:
        """Sums of these rows, over the tokens of `mask` if it is given; keeps the rows."""
        mask = self.mask if mask is None else arguments.mask("mask", mask)
        policy = torch.where(mask, self.policy, 0.0).sum(-1)
        reference = None if self.reference is None else torch.where(mask, self.reference, 0.0).sum(-1)
        return LogRatios(policy, reference, mask.sum(-1), replace(self, mask=mask))

    def _present(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> PerToken:
        changed = {name: change(value) for name, value in self._present().items()}
        return PerToken(**{"reference": None, **changed})


@dataclass(frozen=True, eq=False)
class LogRatios:
    r"""Log-probs of completions under policy and reference, summed over completion tokens.

    Half precision is upcast to float32 (float64 stays). The reference is detached: no loss trains it. A
    completion without tokens (truncated away) has log-probs 0 and no gradient, and the losses leave it out.

    Attributes:
        policy: :math:`\log \pi(y \mid x)`, any leading shape [...], nats.
        reference: :math:`\log \pi_\mathrm{ref}(y \mid x)`, [...], nats; None for reference-free losses.
        tokens: Number of completion tokens, [...], integer; None if unknown, then no per-token mean exists.
        per_token: The per-token log-probs behind the sums, where they were kept.

    Each field may also be a number, nested lists, an array or a list of tensors, whose gradient is kept. On the CPU the
    values are checked too.

    Raises:
        TypeError: If log-probs are not floating point or counts not integer.
        ValueError: If shapes or devices differ, a count is below 0, or every log-prob is above 0: a negative
            log-likelihood has the other sign.

    Example:
        >>> ratios = LogRatios(policy=[-20.0, -24.0], reference=[-21.5, -23.0], tokens=[10, 8])
        >>> ratios.h
        tensor([ 1.5000, -1.0000])
    """

    policy: Tensor
    reference: Tensor | None = None
    tokens: Tensor | None = None
    per_token: PerToken | None = None

    def __post_init__(self) -> None:
        """Check and convert the fields."""
        policy = arguments.log_probs("policy", self.policy)
        reference, tokens = self.reference, self.tokens
        if reference is not None:
            reference = arguments.log_probs("reference", reference, policy.device).detach()
            arguments.check_like("reference", reference, "policy", policy)
        if self.per_token is not None:
            _check_rows_beside(self.per_token, policy)
        _check_sign(policy, reference)
        if tokens is not None:
            tokens = arguments.counts("tokens", tokens, policy.device)
            arguments.check_like("tokens", tokens, "policy", policy)
            fewest = arguments.least(tokens)
            if fewest < 0:
                raise ValueError(f"tokens: got {fewest}, expected token counts >= 0")
            if not fewest > 0:
                present = tokens > 0
                policy = torch.where(present, policy, 0.0)
                reference = None if reference is None else torch.where(present, reference, 0.0)
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "reference", reference)
        object.__setattr__(self, "tokens", tokens)

    @classmethod
    def of(
        cls, h: Tensor | Sequence[float] | float, tokens: Tensor | Sequence[int] | int | None = None
    ) -> LogRatios:
        """Log-ratios given directly: policy = h against a reference of 0.

        Args:
            h: Log-ratios, [...], nats.
            tokens: Completion tokens, [...].

        Example:
            >>> LogRatios.of([1.5, -1.0]).h
            tensor([ 1.5000, -1.0000])
        """
        policy = arguments.log_probs("h", h)
        return cls(policy=policy, reference=torch.zeros_like(policy), tokens=tokens)  # type: ignore[arg-type]

    @classmethod
    def from_token_logps(
        cls,
        policy: Tensor,
        mask: Tensor,
        reference: Tensor | None = None,
        *,
        keep_per_token: bool = False,
    ) -> LogRatios:
        """Sum per-token log-probs over each completion.

        Values outside the mask are never read, not even NaN. Left and right padding give the same sums up to rounding.

        Args:
            policy: Log-probs of the target tokens, [..., T], nats, aligned with `mask`.
            mask: True at completion tokens, [..., T]: `completion_targets(...) != IGNORE_INDEX`.
            reference: The same under the reference, [..., T].
            keep_per_token: Keep the per-token values in `per_token`.

        Returns:
            LogRatios of shape [...].

        Raises:
            TypeError: If log-probs are not floating point.
            ValueError: If shapes or devices differ, a mask holds other numbers than 0 and 1, or a log-prob is above 0.

        Example:
            >>> logps = torch.tensor([[-1.0, -2.0, float("nan")]])
            >>> LogRatios.from_token_logps(logps, torch.tensor([[True, True, False]])).policy
            tensor([-3.])
        """
        policy, mask = arguments.log_probs("policy", policy), arguments.mask("mask", mask)
        arguments.check_like("mask", mask, "policy", policy)
        if mask.ndim == 0:
            raise ValueError("mask: got shape [], expected [..., T]: the log-probs of tokens")

        def masked(name: str, value: Tensor) -> Tensor:
            value = arguments.log_probs(name, value)
            arguments.check_like(name, value, "mask", mask)
            if arguments.readable(value):
                arguments.refuse(name, value, mask & (value > _ABOVE), "log-probs in nats, at most 0")
            return torch.where(mask, value, 0.0)

        policy = masked("policy", policy)
        reference = None if reference is None else masked("reference", reference)
        return cls(
            policy=policy.sum(-1),
            reference=None if reference is None else reference.sum(-1),
            tokens=mask.sum(-1),
            per_token=PerToken(policy, reference, mask) if keep_per_token else None,
        )

    @classmethod
    def cat(cls, parts: Sequence[LogRatios]) -> LogRatios:
        """Concatenate along the first dimension; parts must agree on which fields they carry.

        Raises:
            TypeError: If a part is not a LogRatios.
            ValueError: If there is no part, if some parts lack a field that others have, or shapes do not fit.
        """
        if not isinstance(parts, list | tuple) or not all(isinstance(part, LogRatios) for part in parts):
            raise TypeError(f"parts: got {arguments.shown(parts)}, expected a list of LogRatios")
        if not parts:
            raise ValueError("parts: got no LogRatios, expected at least one")
        names = ("policy", "reference", "tokens")
        joined: dict[str, Any] = {name: _cat(name, [getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, per_token=_cat_per_token([part.per_token for part in parts]))

    @property
    def h(self) -> Tensor:
        r"""Log-ratio :math:`h = \log \pi(y) - \log \pi_\mathrm{ref}(y)`, [...], nats."""
        return self.policy - self._needed_reference()

    @property
    def h_mean(self) -> Tensor:
        """Log-ratio per completion token, [...], nats per token."""
        return self.h / self._divisor()

    @property
    def policy_mean(self) -> Tensor:
        """Policy log-prob per completion token, [...], nats per token."""
        return self.policy / self._divisor()

    @property
    def reference_mean(self) -> Tensor:
        """Reference log-prob per completion token, [...], nats per token."""
        return self._needed_reference() / self._divisor()

    @property
    def empty(self) -> Tensor:
        """True where the completion has no tokens, [...]; False everywhere if the counts are unknown."""
        if self.tokens is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return self.tokens == 0

    @property
    def shape(self) -> torch.Size:
        """Leading shape, one entry per completion."""
        return self.policy.shape

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.policy.device

    def __len__(self) -> int:
        """Size of the first dimension."""
        return len(self.policy)

    def __getitem__(self, index: Any) -> LogRatios:
        """Some of the completions; `index` is anything that indexes a tensor of this shape."""
        values = (self.policy, self.reference, self.tokens, self.per_token)
        return LogRatios(*(None if value is None else value[index] for value in values))  # type: ignore[arg-type]

    def flatten(self) -> LogRatios:
        """The same completions in one dimension, [n]; drops no field."""
        values = (self.policy, self.reference, self.tokens)
        rows = self.per_token
        if rows is not None:
            rows = rows._map(lambda value: value.reshape(-1, value.shape[-1]))
        return LogRatios(*(None if value is None else value.reshape(-1) for value in values), rows)  # type: ignore[arg-type]

    def detach(self) -> LogRatios:
        """The same values without gradient."""
        rows = None if self.per_token is None else self.per_token._map(Tensor.detach)
        return replace(self, policy=self.policy.detach(), per_token=rows)

    def _needed_reference(self) -> Tensor:
        if self.reference is None:
            expected = "reference log-probs [...] in nats: a log-ratio needs them"
            raise ValueError(f"reference: got None, expected {expected}")
        return self.reference

    def _divisor(self) -> Tensor:
        if self.tokens is None:
            expected = "completion token counts [...]: a per-token mean needs them"
            raise ValueError(f"tokens: got None, expected {expected}")
        # An empty completion has sum 0, so its mean is 0 and not 0/0.
        return self.tokens.clamp(min=1)


def _check_sign(policy: Tensor, reference: Tensor | None) -> None:
    # Some losses work on log-ratios alone, so single numbers above 0 are taken; a sign that is wrong throughout is not.
    if not arguments.readable(policy):
        return
    lowest = arguments.least(policy)
    if lowest > _ABOVE and (reference is None or arguments.least(reference) > _ABOVE):
        raise ValueError(
            f"policy: got {lowest:g} or more everywhere, expected log-probs in nats, at most 0; a negative "
            "log-likelihood has the other sign"
        )


def _check_row(name: str, value: Any) -> None:
    arguments.instance(name, value, Tensor, "a tensor [..., T]")
    is_mask = name == "per_token.mask"
    expected = "torch.bool (True at completion tokens)" if is_mask else "floating-point numbers"
    if not (value.dtype == torch.bool if is_mask else value.is_floating_point()):
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")


def _check_rows_beside(rows: Any, policy: Tensor) -> None:
    arguments.instance("per_token", rows, PerToken, "PerToken(policy=, reference=, mask=)")
    if rows.policy.shape[:-1] != policy.shape:
        raise ValueError(
            f"per_token: got shape {list(rows.policy.shape)}, expected {[*policy.shape, 'T']} as policy has"
        )
    arguments.check_device("per_token.policy", rows.policy, "policy", policy.device)


def _in_all(name: str, values: Sequence[Any]) -> bool:
    """Whether all parts have a field; False if none has it, ValueError if some have."""
    count = sum(value is not None for value in values)
    if 0 < count < len(values):
        raise ValueError(f"{name}: got it in {count} of {len(values)} parts, expected it in all or none")
    return count > 0


def _cat(name: str, values: Sequence[Any]) -> Tensor | None:
    if not _in_all(name, values):
        return None
    try:
        return torch.cat(values)  # type: ignore[arg-type]
    except RuntimeError as error:
        shapes = ", ".join(str(list(value.shape)) for value in values[:4])
        raise ValueError(f"{name}: got shapes {shapes}, expected parts that fit ({error})") from error


def _cat_per_token(rows: Sequence[Any]) -> PerToken | None:
    if not _in_all("per_token", rows):
        return None
    width = max(row.mask.shape[-1] for row in rows)
    padded = [row._map(lambda value: F.pad(value, (0, width - value.shape[-1]))) for row in rows]
    joined: dict[str, Any] = {
        field.name: _cat(f"per_token.{field.name}", [getattr(row, field.name) for row in padded])
        for field in fields(PerToken)
    }
    return PerToken(**joined)
