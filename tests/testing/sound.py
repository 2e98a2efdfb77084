"""Losses that are right and unusual: the kit must find no fault in any of them.

Each row: name, the loss as a function of the feedback and beta, traits. Most declare only what they must.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from prefloss import Labels, Pairs, Rankings
from prefloss.hyperparameters import Draws, Interval, NonNegative, Positive, RunningMean, State, stateful
from tests.testing.mistakes import HalfGradient, best, inside, of, plackett_luce, worst

L = F.logsigmoid
COUPLED = {"separable": False}
NO_REFERENCE = {"needs_reference": False}
GRADED = {"needs": ["scores"]}


def tokens(part):
    return part.tokens.clamp(min=1)


def counted_mean(values, valid):
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)


def signed(labels):
    return torch.where(labels.desirable, 1.0, -1.0).to(labels.completions.h)


def last_token(part):
    """The last token of each completion, wherever its row ends."""
    mask = part.per_token.mask
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    return torch.where(last, inside(part), 0.0).sum(-1)


def aligned(pairs, beta):
    """Distributional: the sorted margins of the valid pairs, each written back to its own place."""
    h = torch.where(pairs.valid, pairs.margin(), torch.inf)
    order = h.argsort()
    place = order.argsort().to(h)
    return -L(beta * pairs.margin() - 0.01 * torch.where(pairs.valid, place, 0.0))


class Logistic(HalfGradient):
    @staticmethod
    def backward(ctx, grad):
        return -torch.sigmoid(-ctx.saved_tensors[0]) * grad


PAIRS = [
    ("logistic", lambda p, b: -L(b * p.margin())),
    ("squared_hinge", lambda p, b: torch.relu(1 - b * p.margin()) ** 2),
    ("hinge_far_below", lambda p, b: torch.relu(-1 - b * p.margin())),
    ("squared_target", lambda p, b: (p.margin() - 1 / (2 * b)) ** 2),
    ("squared_target_per_token", lambda p, b: (p.margin(per_token=True) - 1 / (2 * b)) ** 2, {"needs": ["tokens"]}),
    ("bounded", lambda p, b: torch.sigmoid(-b * p.margin())),
    ("tangent", lambda p, b: (2 * torch.atan(b * p.margin()) - 1) ** 2),
    ("rational", lambda p, b: torch.log1p((b * p.margin() - 2) ** 2)),
    ("softened_huber", lambda p, b: F.huber_loss(b * p.margin(), torch.ones_like(p.margin()), reduction="none")),
    ("ramp", lambda p, b: (1 - b * p.margin()).clamp(0, 2)),
    ("negative_values", lambda p, b: -torch.tanh(b * p.margin()) - 3),
    ("not_convex", lambda p, b: -L(b * p.margin()) + 0.1 * torch.sin(b * p.margin())),
    ("focal", lambda p, b: -torch.sigmoid(-b * p.margin()).detach() ** 2 * L(b * p.margin())),
    ("two_sigmoids", lambda p, b: torch.sigmoid(-b * p.chosen.h) + torch.sigmoid(b * p.rejected.h)),
    ("two_squares", lambda p, b: (b * p.chosen.h - 0.5) ** 2 + (b * p.rejected.h + 0.5) ** 2),
    ("both_down", lambda p, b: torch.sigmoid(b * p.chosen.h) + torch.sigmoid(-b * p.margin())),
    ("keeps_the_chosen", lambda p, b: -L(b * p.margin() - 5 * b * torch.relu(-p.chosen.h))),
    ("with_sft", lambda p, b: -L(b * p.margin()) - 0.1 * p.chosen.policy),
    ("only_the_rejected", lambda p, b: -L(-b * p.rejected.h)),
    ("only_the_chosen", lambda p, b: -b * p.chosen.policy, NO_REFERENCE),
    ("reference_free", lambda p, b: -L(b * (p.chosen.policy_mean - p.rejected.policy_mean) - 0.5),
     {**NO_REFERENCE, "needs": ["tokens"]}),
    ("reference_free_hinge", lambda p, b: torch.relu(1 - b * (p.chosen.policy - p.rejected.policy)), NO_REFERENCE),
    ("length_target", lambda p, b: -L(b * p.margin() - 0.01 * (p.chosen.tokens - p.rejected.tokens)),
     {"needs": ["tokens"]}),
    ("weighted_by_the_policy", lambda p, b: -L(b * p.margin()) * p.chosen.policy_mean.detach().exp(),
     {"needs": ["tokens"]}),
    ("clipped_ratio", lambda p, b: -torch.minimum(p.chosen.h.clamp(max=2), p.chosen.h) + b * p.rejected.h.clamp(-5, 5)),
    ("straight_through", lambda p, b: -L(b * p.margin()) + (0.1 * (p.margin() < 0) - 0.1 * p.margin()
                                                            + 0.1 * p.margin()).detach()),
    ("own_backward", lambda p, b: Logistic.apply(b * p.margin())),
    ("own_constants", lambda p, b: torch.maximum(1 - b * p.margin(), p.margin().new_zeros(1))
     * torch.tensor([0.5]).to(p.margin())),
    ("grade_margin", lambda p, b: -L(b * p.margin() - (p.score_chosen - p.score_rejected).detach()), GRADED),
    ("soft_label", lambda p, b: F.binary_cross_entropy_with_logits(
        b * p.margin(), torch.sigmoid(p.score_chosen - p.score_rejected).to(p.margin()).detach(), reduction="none"),
     GRADED),
    ("regression_to_grades", lambda p, b: (b * p.margin() - (p.score_chosen - p.score_rejected).detach()) ** 2, GRADED),
    ("grades_if_there", lambda p, b: -L(b * p.margin() - (
        0 if p.score_chosen is None else torch.tanh(p.score_chosen - p.score_rejected).detach())),
     {"reads": ["scores"]}),
    ("with_gold", lambda p, b: -L(b * p.margin()) - 0.1 * p.gold.policy, {"needs": ["gold"]}),
    ("centred", lambda p, b: -L(b * (p.margin() - 0.5 * counted_mean(p.margin().detach(), p.valid))), COUPLED),
    ("worst_weigh_more", lambda p, b: -L(b * p.margin()) * p.valid.sum() * torch.softmax(
        torch.where(p.valid, -0.1 * p.margin().detach(), -1e4), 0), COUPLED),
    ("aligned", aligned, COUPLED),
    ("token_sigmoids",
     lambda p, b: (torch.tanh(b * inside(p.rejected)).sum(-1) - torch.tanh(b * inside(p.chosen)).sum(-1)),
     {"needs": ["per_token"]}),
    ("last_tokens", lambda p, b: -L(b * (p.margin() + last_token(p.chosen) - last_token(p.rejected))),
     {"needs": ["per_token"]}),
    ("held_divergence", lambda p, b: -L(b * (p.margin() - (
        p.rejected.per_token.sum(p.rejected.per_token.kl) - p.chosen.per_token.sum(p.chosen.per_token.kl).detach()))),
     {"needs": ["per_token.kl"]}),
]  # fmt: skip

LABELS = [
    ("logistic_votes", lambda f, b: -L(signed(f) * b * f.completions.h)),
    ("only_downvotes", lambda f, b: torch.where(f.desirable, 0.0, -2 / b * L(-b * f.completions.h))),
    ("only_upvotes", lambda f, b: torch.where(f.desirable, -b * f.completions.policy, 0.0), NO_REFERENCE),
    ("weighted_votes",
     lambda f, b: torch.where(f.desirable, 1.0, 4.0) * torch.sigmoid(-signed(f) * b * f.completions.h)),
    ("with_a_baseline", lambda f, b: torch.sigmoid(-signed(f) * b * (f.completions.h - f.kl.detach())),
     {"needs": ["kl"]}),
    ("against_mismatched", lambda f, b: torch.sigmoid(-signed(f) * b * (
        f.completions.h - (f.mismatched.h.detach().sum() / (~f.mismatched.empty).sum().clamp(min=1)).clamp(min=0))),
     {"needs": ["mismatched"], **COUPLED}),
    ("regression_of_grades", lambda f, b: (f.scores.detach() - f.baseline.detach() - b * f.completions.h) ** 2,
     {"needs": ["scores", "baseline"]}),
]  # fmt: skip

RANKINGS = [
    ("whole_order", lambda r, b: plackett_luce(r, r.scores, b)),
    ("best_against_worst", lambda r, b: -L(b * (best(r) - worst(r)))),
    ("best_of_all", lambda r, b: torch.logsumexp((b * r.completions.h).masked_fill(~r.present, -torch.inf), -1)
     - b * best(r)),
    ("cross_entropy_to_grades", lambda r, b: -(torch.softmax(r.scores.detach().masked_fill(~r.present, -1e9), -1)
     * torch.log_softmax((b * r.completions.h).masked_fill(~r.present, -1e9), -1)).sum(-1)),
]  # fmt: skip


def mixed(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    reading: Literal["sum", "per_token"] = "sum",
):
    z = beta * pairs.margin(per_token=reading == "per_token")
    return -share * L(z) + (1 - share) * torch.relu(1 - z)


def with_an_optional_clip(pairs: Pairs, *, beta: Positive = 0.1, clip: float | None = None):
    z = beta * pairs.margin()
    return -L(z if clip is None else z.clamp(max=abs(clip)))


def with_a_string(pairs: Pairs, *, beta: Positive = 0.1, link: str = "logistic"):
    if link not in ("logistic", "hinge"):
        raise ValueError(f"link: got {link!r}, expected 'logistic' or 'hinge'")
    z = beta * pairs.margin()
    return torch.relu(1 - z) if link == "hinge" else -L(z)


def without_hyperparameters(pairs: Pairs):
    return -L(pairs.margin())


def off_by_default(
    pairs: Pairs, *, beta: Positive = 0.1, nll_weight: NonNegative = 0.0, squared: bool = False
):
    z = torch.relu(1 - beta * pairs.margin())
    return (z**2 if squared else z) - nll_weight * pairs.chosen.policy


class Largest(State):
    """Largest margin so far, without gradient."""

    name, saved, settings = "largest", ("value",), ("start",)

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.start = self.value = start

    def __call__(self, margin, valid):
        if self.training:
            seen = torch.where(valid, margin.detach(), -torch.inf)
            self.value = max([self.value, *seen[seen.isfinite()].tolist()])
        return self.value


def remembering(
    pairs: Pairs, *, beta: Positive = 0.1, largest: Annotated[str | Largest, stateful(Largest)] = "running"
):
    return -L(beta * pairs.margin() - 0.01 * abs(largest(pairs.margin(), pairs.valid)) ** 0.5)


def noisy(
    pairs: Pairs, *, beta: Positive = 0.1, draws: Annotated[int | Draws, stateful(Draws, Draws, "a seed")] = 0
):
    h = pairs.margin()
    noise = torch.rand(h.shape, generator=draws(), dtype=torch.float64).to(h)
    return -L(beta * h + 0.1 * noise)


def with_a_running_baseline(
    labels: Labels,
    *,
    beta: Positive = 0.1,
    baseline: Annotated[str | RunningMean, stateful(RunningMean)] = "running",
):
    return torch.sigmoid(-signed(labels) * beta * (labels.completions.h - baseline(labels)))


STATEFUL = {"stateful": True, "separable": False}

OTHERS = [
    (mixed, {}),
    (mixed, {"needs": ["tokens"], "difference_only": True, "monotone": True}),
    (with_an_optional_clip, {}),
    (with_a_string, {}),
    (without_hyperparameters, {}),
    (off_by_default, {}),
    (remembering, STATEFUL),
    (noisy, STATEFUL),
    (with_a_running_baseline, STATEFUL),
]


def functions():
    """Every sound loss with its traits."""
    for kind, rows in ((Pairs, PAIRS), (Labels, LABELS), (Rankings, RANKINGS)):
        for name, body, *traits in rows:
            yield of(kind, name, body), *(traits or [{}])
    yield from OTHERS
