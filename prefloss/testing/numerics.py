"""Checks of floating point: digits in float32, log-ratios at the ends of the range, NaN."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefloss.feedback import Feedback, Labels, Pairs, Rankings
from prefloss.logratios import LogRatios
from prefloss.testing.draws import log_probs
from prefloss.testing.fields import cast_to, map_parts, select, shifted, trainable, with_tensors
from prefloss.testing.run import check
from prefloss.testing.subject import Subject, shown

ENDS = (0.0, 1e-6, 1.0, 30.0, 90.0, 1e3, 1e4)
"""Log-ratios of the extreme draws, of both signs, nats."""

FLOAT32_ROUNDING = 2e-7
"""Relative error of a float32."""

FINITE_VALUES = (
    "write log(sigmoid(x)) as F.logsigmoid(x), 1 - sigmoid(x) as sigmoid(-x), log(sum(exp(x))) as logsumexp, "
    "and clamp the argument of an exp that may overflow"
)
FINITE_GRADIENTS = (
    "torch.where sends the gradient through the branch that it does not select too, so make the argument "
    "of both safe"
)


@check(
    change="a difference of nearly equal numbers loses digits, so write 1 - sigmoid(x) as sigmoid(-x), exp(x) - 1 as "
    "expm1(x), log(1 + x) as log1p(x)"
)
def check_precision(subject: Subject) -> None:
    """In float32 a value has the leading digit of float64, as far as the rounding of what goes into it allows."""
    measured = []
    for turn in range(max(subject.examples, 3)):
        options = {"magnitude": (20.0, 200.0, 2000.0)[turn % 3], "size": 4, "dtype": torch.float32}
        narrow = subject.seeded(600 + turn, subject.absence(turn), **options)
        wide = cast_to(narrow, torch.float64)
        exact = subject.settled_values(wide)
        errors = [subject.settled_values(_rounded(wide, pattern)) - exact for pattern in range(4)]
        allowed = 30 * torch.stack(errors).abs().amax(0) + 0.2 * exact.abs() + 1e-36
        measured.append((narrow, subject.settled_values(narrow).double(), exact, allowed))
    # A loss that adds up large terms rounds them; one that stays small everywhere does not.
    largest = max(float(exact.abs().max()) for _, _, exact, _ in measured)
    rounding = 3e-7 * largest if largest > 4 else 0.0
    for feedback, values, exact, allowed in measured:
        # `extremes` looks at numbers that are not finite.
        accurate = ((values - exact).abs() <= allowed + rounding) | ~values.isfinite()
        if not bool(accurate.all()):
            expected = f"the leading digits of {shown(exact)} in float64"
            raise subject.failed("values in float32", values, expected, feedback)


def _rounded(feedback: Feedback, pattern: int) -> Feedback:
    """The feedback with its log-probs off by about as much as float32 rounds them."""

    def off(part: LogRatios) -> LogRatios:
        signs = 1.0 - 2.0 * ((torch.arange(part.policy.numel()).reshape(part.shape) + pattern) % 2)
        sign = 1 - pattern // 2 * 2
        reference = 0.0 if part.reference is None else FLOAT32_ROUNDING * part.reference * sign
        return shifted(part, policy=FLOAT32_ROUNDING * part.policy * signs, reference=reference)

    return map_parts(feedback, off)


@check(change="hide no fault of the model with nan_to_num or with a comparison that is False for NaN")
def check_nan(subject: Subject) -> None:
    """A NaN among the policy's log-probs shows in the loss, wherever the loss reads it."""
    for turn in range(min(subject.examples, 6)):
        feedback = subject.seeded(700 + turn, subject.absence(turn), size=3)
        _, gradients = subject.gradient(subject.settled, feedback, mean=False)
        for path, slope in gradients.items():
            if not bool((slope != 0).any()):
                continue
            place = tuple((slope != 0).nonzero()[0].tolist())
            poisoned = trainable(feedback)[path].clone()
            poisoned[place] = torch.nan
            with_nan = with_tensors(feedback, {path: poisoned})
            values = subject.settled_values(with_nan)
            if not bool(torch.isnan(values).any()):
                raise subject.failed(f"values with NaN at {path}{list(place)}", values, "NaN", with_nan)


@check()
def check_extremes(subject: Subject) -> None:
    """Log-ratios from -1e4 to 1e4 nats, in float32, bfloat16 or float16, keep all numbers finite in float32."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Likely and unlikely, short and long completions.
        for below, tokens in ((0.0, 1), (1e-6, 2), (20.0, 2000)):
            narrow = cast_to(_extreme(subject, below, tokens), dtype)
            _check_finite(subject, "value", subject.settled_values(narrow), narrow, FINITE_VALUES)
            # A gradient in half precision overflows where the loss's own does not.
            wide = cast_to(narrow, torch.float32)
            for loss in subject.modes.values():
                for path, slope in subject.gradient(loss, wide, mean=False)[1].items():
                    _check_finite(subject, f"gradient of {path}", slope, wide, FINITE_GRADIENTS)


def _check_finite(subject: Subject, what: str, values: Tensor, feedback: Feedback, change: str) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        # One example shows the problem, if the loss looks at examples one by one.
        example = select(feedback, bad.nonzero()[:1, 0]) if subject.spec.separable else feedback
        raise subject.failed(f"{what} in float32", values[bad][:1], "a finite number", example, change)


def _extreme(subject: Subject, below: float, tokens: int) -> Feedback:
    """Every combination of extreme log-ratios, the likelier of policy and reference `below` nats under 0."""
    kind = subject.spec.feedback
    signed = torch.tensor([*(-end for end in reversed(ENDS)), *ENDS[1:]], dtype=torch.float64)
    completions = {Pairs: 2, Labels: 1, Rankings: 3}[kind]
    grid = torch.cartesian_prod(*[signed[:: 2 if kind is Rankings else 1]] * completions)
    grid = grid.reshape(-1, completions)
    drawn = subject.seeded(21, size=len(grid), places=3, dtype=torch.float32, masked=False)
    if isinstance(drawn, Pairs):
        chosen = _with_log_ratios(drawn.chosen, grid[:, 0], below, tokens)
        rejected = _with_log_ratios(drawn.rejected, grid[:, 1], below, tokens)
        return replace(drawn, chosen=chosen, rejected=rejected)
    ratios = grid if isinstance(drawn, Rankings) else grid[:, 0]
    drawn = replace(drawn, completions=_with_log_ratios(drawn.completions, ratios, below, tokens))
    if isinstance(drawn, Rankings):
        return drawn
    twice = select(drawn, torch.arange(len(grid)).repeat_interleave(2))
    return replace(twice, desirable=torch.arange(2 * len(grid)) % 2 == 0)  # type: ignore[call-arg]


def _with_log_ratios(like: LogRatios, log_ratios: Tensor, below: float, tokens: int) -> LogRatios:
    """Completions that carry what `like` carries, with these log-ratios, spread evenly over the tokens of rows."""
    policy, reference = (values.float() for values in log_probs(log_ratios, below))
    rows = like.per_token
    if rows is None:
        counts = torch.full(policy.shape, tokens)
        return LogRatios(policy, None if like.reference is None else reference, counts)
    share = rows.mask / rows.mask.sum(-1, keepdim=True)
    each = policy.unsqueeze(-1) * share
    return replace(
        rows,
        policy=each,
        reference=None if rows.reference is None else reference.unsqueeze(-1) * share,
        log_sum_sq=None if rows.log_sum_sq is None else each,
    ).log_ratios()
