"""Mistakes that people make when they write a loss: one loss for each, and what the kit says about it.

Each row: name, the check that must fail (alone), words of its message, the loss, traits. Rows are functions of the
feedback and beta; those with other hyperparameters stand below the table.
"""

import random
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from prefloss import Labels, Pairs, Rankings
from prefloss.hyperparameters import Coerce, NonNegative, Positive, State, stateful

L = F.logsigmoid
ROWS = {"needs": ["per_token"], "difference_only": False}
COUPLED = {"separable": False}
GRADED = {"needs": ["scores"]}


def up_or_down(labels, up, down):
    return torch.where(labels.desirable, up, down)


def plackett_luce(rankings, merit, beta):
    """-log of the probability of the order of the merits."""
    merit = merit.masked_fill(~rankings.present, -torch.inf)
    z = (beta * rankings.completions.h).masked_fill(~rankings.present, -1e9)
    order = merit.argsort(-1, descending=True)
    z, present = z.gather(-1, order), rankings.present.gather(-1, order)
    rest = z.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(present, rest - z, 0.0).sum(-1)


def with_no_grad(make):
    with torch.no_grad():
        return make()


def hard_clamp(z):
    p = torch.sigmoid(z)
    p.clamp_(1e-6, 1 - 1e-6)
    return -p.log()


def written(p):
    p.chosen.per_token.mask[..., 0] = True
    return p.margin()


def seeded_noise(z):
    torch.manual_seed(0)
    return z + torch.rand(1).to(z)


CALLS, MEAN = [], [0.0]


def counted(z):
    CALLS.append(None)
    return z * (1 + len(CALLS) % 7)


def remembered(z):
    MEAN[0] = 0.9 * MEAN[0] + 0.1 * float(z.detach().mean())
    return z - MEAN[0]


class HalfGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return -L(z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * torch.sigmoid(-ctx.saved_tensors[0]) * grad


class Reversed(HalfGradient):
    @staticmethod
    def backward(ctx, grad):
        return torch.sigmoid(-ctx.saved_tensors[0]) * grad


class Broken(HalfGradient):
    @staticmethod
    def backward(ctx, grad):
        return ctx.no_such_tensor * grad


def hooked(z):
    if z.requires_grad:
        z.register_hook(lambda grad: grad.clamp(-0.02, 0.02))
    return -L(z)


CONSTANT = torch.tensor([0.1], dtype=torch.float64)

PAIRS = [
    # Directions.
    ("flipped", "direction", ["rejected"], lambda p, b: -L(-b * p.margin())),
    ("maximised", "direction", ["look at the signs"], lambda p, b: L(b * p.margin())),
    ("flipped_declared", "direction", [], lambda p, b: -L(-b * p.margin()), {"difference_only": True}),
    ("flipped_monotone", "direction", [], lambda p, b: -L(-b * p.margin()), {"monotone": True}),
    ("sides_swapped", "direction", [], lambda p, b: -L(b * (p.rejected.h - p.chosen.h))),
    ("reference_minus_policy", "direction", [],
     lambda p, b: -L(b * ((p.chosen.reference - p.chosen.policy) - (p.rejected.reference - p.rejected.policy)))),
    ("chosen_flipped", "preference", ["signs of both sides"], lambda p, b: -L(b * (-p.chosen.h - p.rejected.h))),
    ("rejected_flipped", "preference", ["signs of both sides"], lambda p, b: -L(b * (p.chosen.h + p.rejected.h))),
    ("rejected_raised_a_little", "direction", [], lambda p, b: -L(b * p.chosen.h) - 0.2 * L(b * p.rejected.h)),
    ("ipo_target_flipped", "direction", [], lambda p, b: (p.margin() + 1 / (2 * b)) ** 2),
    ("hinge_flipped", "direction", [], lambda p, b: torch.relu(1 + b * p.margin())),
    ("likely_is_bad", "direction", [], lambda p, b: p.chosen.policy.exp() + b * p.rejected.h),
    ("odds_flipped", "direction", [], lambda p, b: -L(b * (p.rejected.policy - p.chosen.policy)),
     {"needs_reference": False}),
    ("centred_away", "direction", [], lambda p, b: -L(b * (p.margin() - 3 * p.margin().mean())), COUPLED),
    ("backward_flipped", "direction", [], lambda p, b: Reversed.apply(b * p.margin())),
    ("wrong_from_two_on", "direction", ["2 example(s)"],
     lambda p, b: -L(b * p.margin() * (1 if len(p.margin()) < 2 else -1)), COUPLED),
    ("both_sides_alike", "preference", ["exchanged"], lambda p, b: (b * p.margin()) ** 2),
    # Sides without a gradient.
    ("chosen_detached", "sides", ["chosen"], lambda p, b: -L(b * (p.chosen.h.detach() - p.rejected.h))),
    ("rejected_without_grad", "sides", ["rejected"],
     lambda p, b: -L(b * (p.chosen.h - with_no_grad(lambda: p.rejected.h * 1.0)))),
    ("gold_detached", "sides", ["gold"], lambda p, b: -L(b * (p.margin() + 0.1 * p.gold.h.detach())),
     {"needs": ["gold"]}),
    ("rejected_data", "sides", ["rejected"], lambda p, b: -L(b * (p.chosen.h - p.rejected.h.data))),
    ("chosen_rows_detached", "sides", ["chosen"],
     lambda p, b: -L(b * (by_place(p.chosen).detach() - by_place(p.rejected))), ROWS),
    ("all_detached", "gradient_nonzero", ["trains nothing"], lambda p, b: -L(b * p.margin().detach())),
    ("under_no_grad", "gradient_nonzero", ["trains nothing"],
     lambda p, b: with_no_grad(lambda: -L(b * p.margin()))),
    ("counts_errors", "gradient_nonzero", ["comparison"], lambda p, b: (p.margin() < 1 / b).to(p.margin())),
    ("rounded", "gradient_nonzero", ["rounding"], lambda p, b: (-b * p.margin()).round()),
    ("through_numpy", "gradient_nonzero", [],
     lambda p, b: torch.from_numpy(-b * p.margin().detach().numpy()).to(p.margin().dtype)),
    # Reference and fields.
    ("forgets_the_reference", "needs_reference", ["read h or margin()"],
     lambda p, b: -L(b * (p.chosen.policy - p.rejected.policy))),
    ("forgets_the_reference_of_one_side", "needs_reference", ["rejected.h in place of"],
     lambda p, b: -L(b * (p.chosen.h - p.rejected.policy))),
    ("hidden_reference", "needs_reference", ["needs_reference=True"],
     lambda p, b: -L(b * (p.chosen.policy - p.rejected.policy - (p.chosen.reference - p.rejected.reference
                          if p.chosen.reference is not None else 0))), {"needs_reference": False}),
    ("hidden_tokens", "needs", ["'tokens'"], lambda p, b: -L(50 * b * p.margin(per_token=True))),
    ("hidden_scores", "needs", ["'scores'"],
     lambda p, b: -L(b * p.margin() - (0 if p.score_chosen is None else p.score_chosen.detach()))),
    ("unread_tokens", "needs", ["leave 'tokens' out"], lambda p, b: -L(b * p.margin()), {"needs": ["tokens"]}),
    ("unread_scores", "needs", ["leave 'scores' out"], lambda p, b: -L(b * p.margin()), {"reads": ["scores"]}),
    ("not_of_the_difference", "difference_only", ["difference_only=False"],
     lambda p, b: -L(b * p.chosen.h) - L(-b * p.rejected.h), {"difference_only": True}),
    ("with_sft", "difference_only", ["declare difference_only=False"],
     lambda p, b: -L(b * p.margin()) - 0.1 * p.chosen.policy, {"difference_only": True}),
    ("not_monotone", "monotone", ["monotone=False"], lambda p, b: (p.margin() - 1 / b) ** 2, {"monotone": True}),
    # Shapes and types.
    ("mean", "shape_and_dtype", ["not reduced"], lambda p, b: -L(b * p.margin()).mean()),
    ("column", "shape_and_dtype", ["not reduced"], lambda p, b: -L(b * p.margin()).unsqueeze(-1)),
    ("every_with_every", "shape_and_dtype", ["not reduced"],
     lambda p, b: -L(b * (p.chosen.h - p.rejected.h.unsqueeze(-1)))),
    ("pair_of_values", "shape_and_dtype", ["call: got"], lambda p, b: (-L(b * p.margin()), p.margin())),
    ("nothing", "shape_and_dtype", ["call: got"], lambda p, b: None),
    ("misspelt", "shape_and_dtype", ["AttributeError"], lambda p, b: p.margn() * b),
    ("even_batches_only", "shape_and_dtype", ["call: got"],
     lambda p, b: -L(b * p.margin()).view(-1, 2).mean(-1).repeat_interleave(2)),
    ("in_double", "shape_and_dtype", ["torch.float64"], lambda p, b: -L(b * p.margin().double())),
    ("in_single", "shape_and_dtype", ["torch.float32"], lambda p, b: -L(b * p.margin().float())),
    ("in_half", "shape_and_dtype", ["torch.bfloat16"], lambda p, b: -L(b * p.margin().bfloat16())),
    ("double_constant", "shape_and_dtype", ["new_tensor"], lambda p, b: -L(b * p.margin() - CONSTANT)),
    ("log_of_margin", "shape_and_dtype", ["number below 0"], lambda p, b: -b * p.margin().log()),
    ("sign_by_division", "shape_and_dtype", ["division by 0"],
     lambda p, b: -L(b * p.margin()) * p.margin().detach().abs() / p.margin().detach().abs()),
    ("squeezed", "single_example", ["squeeze()"],
     lambda p, b: -L(b * p.margin()).unsqueeze(-1).squeeze()),
    ("standardised", "single_example", ["standard deviation"],
     lambda p, b: -L(b * p.margin() / (1e-3 + p.margin().detach().std())), COUPLED),
    # The batch.
    ("mean_for_all", "separability", ["separable=False"],
     lambda p, b: (-L(b * p.margin())).mean().expand(p.margin().shape)),
    ("divided_by_the_batch", "separability", [], lambda p, b: -L(b * p.margin()) / len(p.margin())),
    ("centred", "separability", [], lambda p, b: -L(b * (p.margin() - 0.5 * p.margin().mean()))),
    ("softmax_of_the_batch", "separability", [], lambda p, b: -L(b * p.margin()) * p.margin().detach().softmax(0)),
    ("scaled_by_the_largest", "separability", [],
     lambda p, b: -L(b * p.margin() / (1 + p.margin().detach().abs().max()))),
    ("with_the_row_before", "separability", [], lambda p, b: -L(b * (p.margin() - 0.1 * p.margin().roll(1)))),
    ("running_sum", "batch_permutation", ["belongs to its example"],
     lambda p, b: -L(0.5 * b * p.margin().cumsum(0)), COUPLED),
    ("sorted", "batch_permutation", [], lambda p, b: -L(b * p.margin()).sort().values, COUPLED),
    ("first_row_counts_more", "batch_permutation", [],
     lambda p, b: -L(b * p.margin()) * torch.where(torch.arange(len(p.margin()), device=p.margin().device) == 0, 2, 1),
     COUPLED),
    ("empty_rows_in_the_mean", "empty_examples", ["feedback.valid"],
     lambda p, b: -L(b * (p.margin() - 0.5 * p.margin().detach().mean())), COUPLED),
    ("over_no_tokens", "empty_examples", ["clamp(min=1)"],
     lambda p, b: -L(50 * b * (p.chosen.h / p.chosen.tokens - p.rejected.h / p.rejected.tokens)),
     {"needs": ["tokens"]}),
    ("weighs_again", "weights", ["leave the weights"],
     lambda p, b: -L(b * p.margin()) * (1 if p.weight is None else p.weight.detach())),
    # Numbers.
    ("log_sigmoid_by_hand", "extremes", ["F.logsigmoid"], lambda p, b: -torch.sigmoid(b * p.margin()).log()),
    ("softplus_by_hand", "extremes", ["overflow"], lambda p, b: torch.log(1 + torch.exp(-b * p.margin()))),
    ("exponential", "extremes", ["clamp"], lambda p, b: torch.exp(-b * p.margin())),
    ("single_where", "extremes", ["does not select"],
     lambda p, b: torch.where(b * p.margin() > 0, torch.log1p(torch.exp(-b * p.margin())),
                              torch.log1p(torch.exp(b * p.margin())) - b * p.margin())),
    ("log_odds_by_hand", "extremes", [],
     lambda p, b: -L(b * ((p.chosen.policy - (1 - p.chosen.policy.exp()).log())
                          - (p.rejected.policy - (1 - p.rejected.policy.exp()).log()))),
     {"needs_reference": False}),
    ("ratio_of_probabilities", "extremes", [],
     lambda p, b: -L(b * (torch.exp(p.chosen.h) - torch.exp(p.rejected.h)))),
    ("one_minus_sigmoid", "precision", ["sigmoid(-x)"], lambda p, b: 1 - torch.sigmoid(9 * b * p.margin())),
    ("infinite_slope", "gradient_nonzero", ["infinite"],
     lambda p, b: -L(b * p.margin()) + p.margin().abs().sqrt() * 0.01),
    ("hides_nan", "nan", ["nan_to_num"], lambda p, b: (-L(b * p.margin())).nan_to_num()),
    # In place, random, remembered, on another device.
    ("subtracts_in_place", "no_mutation", ["in-place"], lambda p, b: -L(b * p.chosen.policy.sub_(p.rejected.h))),
    ("writes_into_the_mask", "no_mutation", ["mask"], lambda p, b: -L(b * written(p)), ROWS),
    ("makes_leaves", "no_mutation", ["requires_grad"], lambda p, b: -L(b * p.margin()) + 0 * (
        p.chosen.policy if p.chosen.policy.requires_grad else p.chosen.policy.requires_grad_())),
    ("clamps_a_saved_tensor", "gradient_nonzero", ["backward: got RuntimeError", "in-place"],
     lambda p, b: hard_clamp(b * p.margin())),
    ("backward_raises", "gradient_nonzero", ["backward: got AttributeError"],
     lambda p, b: Broken.apply(b * p.margin())),
    ("noise", "determinism", ["Draws"], lambda p, b: -L(b * p.margin() + torch.randn_like(p.margin()))),
    ("dropout", "determinism", ["Draws"], lambda p, b: -L(b * F.dropout(p.margin(), 0.1))),
    ("python_noise", "determinism", ["Draws"], lambda p, b: -L(b * p.margin() + random.random())),
    ("seeds_torch", "determinism", ["random numbers"], lambda p, b: -L(seeded_noise(b * p.margin()))),
    ("counts_calls", "determinism", [], lambda p, b: -L(counted(b * p.margin()))),
    ("remembers_in_the_module", "determinism", ["state"], lambda p, b: -L(remembered(b * p.margin()))),
    ("zeros_on_the_cpu", "device", ["new_zeros"],
     lambda p, b: -L(b * p.margin() + torch.zeros(len(p.margin()), dtype=p.margin().dtype))),
    ("maximum_with_the_cpu", "device", ["two devices"],
     lambda p, b: torch.maximum(1 - b * p.margin(), torch.zeros(1, dtype=p.margin().dtype))),
    ("moves_to_the_cpu", "device", ["returned values on cpu"], lambda p, b: -L(b * p.margin().cpu())),
    # Gradients.
    ("half_gradient", "gradients", ["backward()"], lambda p, b: HalfGradient.apply(b * p.margin())),
    ("clipped_by_a_hook", "gradients", ["slope of the values"], lambda p, b: hooked(b * p.margin())),
    ("branches_on_a_value", "torch_compile", [".item()"],
     lambda p, b: -L(b * p.margin()) if p.margin().abs().max().item() < 1e9 else -b * p.margin()),
    # Tokens.
    ("sums_padding", "padding", ["outside the mask"],
     lambda p, b: -L(b * (p.margin() - p.rejected.per_token.kl.sum(-1))), {"needs": ["per_token.kl"]}),
    ("mask_from_the_left", "padding", ["left"], lambda p, b: -L(b * (
        first_tokens(p.chosen) - first_tokens(p.rejected))), ROWS),
    ("weighs_by_column", "padding", ["left"], lambda p, b: -L(b * (by_column(p.chosen) - by_column(p.rejected))), ROWS),
    ("mean_over_the_width", "padding", ["more places"],
     lambda p, b: -L(9 * b * (bent(p.chosen).mean(-1) - bent(p.rejected).mean(-1))), ROWS),
    ("first_column_is_first", "padding", ["left"],
     lambda p, b: -L(b * (p.margin() + inside(p.chosen)[:, 0] - inside(p.rejected)[:, 0])), ROWS),
    ("neighbours_by_column", "padding", [],
     lambda p, b: -L(b * (p.margin() + neighbours(p.chosen) - neighbours(p.rejected))), ROWS),
    # Scores.
    ("log_of_the_gap", "scores", ["no log"],
     lambda p, b: -L(b * p.margin() - (p.score_chosen - p.score_rejected + 1e-3).log().detach()), GRADED),
    ("root_of_a_score", "scores", ["refuse"], lambda p, b: -L(b * p.margin() * p.score_chosen.sqrt().detach()), GRADED),
    ("exp_of_scores", "scores", ["clamp"],
     lambda p, b: -L(b * p.margin()) * torch.exp(p.score_chosen - p.score_rejected).detach(), GRADED),
    ("over_the_gap", "ties", ["difference of 0"],
     lambda p, b: -L(b * p.margin()) / (p.score_chosen - p.score_rejected).abs().detach(), GRADED),
]  # fmt: skip


def inside(part):
    rows = part.per_token
    return torch.where(rows.mask, rows.policy - rows.reference, 0.0)


def bent(part):
    return torch.tanh(inside(part))


def by_place(part):
    """Early tokens count more, wherever the row starts."""
    return (inside(part) * 0.9 ** part.per_token.mask.cumsum(-1)).sum(-1)


def first_tokens(part):
    columns = torch.arange(part.per_token.mask.shape[-1], device=part.tokens.device)
    return torch.where(columns < part.tokens.unsqueeze(-1), inside(part), 0.0).sum(-1)


def by_column(part):
    return (inside(part) * 0.9 ** torch.arange(part.per_token.mask.shape[-1], device=part.tokens.device)).sum(
        -1
    )


def neighbours(part):
    return (inside(part)[:, 1:] * inside(part)[:, :-1]).sum(-1) * 0.01


LABELS = [
    ("votes_flipped", "direction", ["upvoted"],
     lambda f, b: up_or_down(f, -L(-b * f.completions.h), -L(b * f.completions.h))),
    ("downvotes_raised", "direction", ["downvoted"],
     lambda f, b: up_or_down(f, -L(b * f.completions.h), -0.3 * L(b * f.completions.h))),
    ("upvotes_lowered", "direction", [],
     lambda f, b: up_or_down(f, -L(-b * f.completions.h), -3 * L(-b * f.completions.h))),
    ("kto_flipped", "direction", [],
     lambda f, b: up_or_down(f, torch.sigmoid(b * f.completions.h), torch.sigmoid(-b * f.completions.h))),
    ("votes_forgotten", "preference", ["opposite labels"], lambda f, b: -L(b * f.completions.h)),
    ("downvotes_detached", "sides", ["downvoted"],
     lambda f, b: up_or_down(f, -L(b * f.completions.h), -L(-b * f.completions.h.detach()))),
    ("upvotes_detached", "sides", ["upvoted"],
     lambda f, b: up_or_down(f, -L(b * f.completions.h.detach()), -L(-b * f.completions.h))),
    ("baseline_trained", "data_gradient", ["mismatched"],
     lambda f, b: torch.sigmoid((1 - 2.0 * f.desirable) * b * (f.completions.h - f.mismatched.h.mean().clamp(min=0))),
     {"needs": ["mismatched"], "separable": False}),
    ("hidden_kl", "needs", ["'kl'"],
     lambda f, b: -L((2.0 * f.desirable - 1) * b * (f.completions.h - (0 if f.kl is None else f.kl.detach())))),
    ("log_of_a_grade", "scores", [],
     lambda f, b: -L((2.0 * f.desirable - 1) * b * f.completions.h) * (1 - f.scores.log().detach()), GRADED),
    ("mean_of_upvotes", "separability", [],
     lambda f, b: -L((2.0 * f.desirable - 1) * b * (f.completions.h - 0.3 * f.completions.h.mean().detach()))),
]  # fmt: skip

RANKINGS = [
    ("worst_first", "direction", ["the worst"], lambda r, b: plackett_luce(r, -r.scores, b)),
    ("worst_raised_too", "direction", [],
     lambda r, b: plackett_luce(r, r.scores, b) + plackett_luce(r, -r.scores, 2 * b)),
    ("best_lowered", "direction", [], lambda r, b: -plackett_luce(r, r.scores, b)),
    ("best_detached", "sides", ["the best"], lambda r, b: -L(b * (best(r).detach() - worst(r)))),
    ("worst_detached", "sides", ["the worst"], lambda r, b: -L(b * (best(r) - worst(r).detach()))),
    ("reads_absent", "empty_examples", ["feedback.present"],
     lambda r, b: torch.logsumexp(b * r.completions.h, -1) - b * best(r)),
    ("mean_over_the_places", "empty_examples", ["one more place"],
     lambda r, b: -L(b * (best(r) - r.completions.h.masked_fill(~r.present, 0.0).mean(-1)))),
    ("four_places_only", "shape_and_dtype", ["IndexError"],
     lambda r, b: -L(b * (best(r) - r.completions.h[:, 3]))),
    ("first_is_best", "preference", ["scores reversed"],
     lambda r, b: -L(b * (r.completions.h * (torch.arange(r.present.shape[1]) == 0) * 2
                          - r.completions.h).masked_fill(~r.present, 0.0).sum(-1))),
    ("place_matters", "batch_permutation", ["rank by the scores"],
     lambda r, b: -L(b * (best(r) - worst(r)) * torch.where(r.present[:, 0], 1.0, 2.0))),
    ("root_of_grades", "scores", [],
     lambda r, b: plackett_luce(r, r.scores, b) * (1 + r.scores.sqrt().masked_fill(~r.present, 0.0).sum(-1).detach())),
]  # fmt: skip


def best(r):
    return r.completions.h.gather(-1, r.scores.masked_fill(~r.present, -torch.inf).argmax(-1, True)).squeeze(
        -1
    )


def worst(r):
    return r.completions.h.gather(-1, r.scores.masked_fill(~r.present, torch.inf).argmin(-1, True)).squeeze(
        -1
    )


# Hyperparameters and states.


def ignored_margin(pairs: Pairs, *, beta: Positive = 0.1, target: NonNegative = 0.0):
    return -L(beta * pairs.margin())


def ignored_optional(pairs: Pairs, *, beta: Positive = 0.1, clip: float | None = None):
    return -L(beta * pairs.margin())


def ignored_optional_number(pairs: Pairs, *, beta: Positive = 0.1, clip: Positive | None = 2.0):
    return -L(beta * pairs.margin())


def ignored_switch(pairs: Pairs, *, beta: Positive = 0.1, average: bool = False):
    return -L(beta * pairs.margin())


def ignored_choice(pairs: Pairs, *, beta: Positive = 0.1, link: Literal["logistic", "hinge"] = "logistic"):
    return -L(beta * pairs.margin())


def ignored_beta(pairs: Pairs, *, beta: Positive = 0.1):
    return -L(0.1 * pairs.margin())


def unchecked_string(pairs: Pairs, *, beta: Positive = 0.1, link: str = "logistic"):
    z = beta * pairs.margin()
    return torch.relu(1 - z) if link == "hinge" else -L(z)


def checked_string_without_effect(pairs: Pairs, *, beta: Positive = 0.1, link: str = "logistic"):
    if link not in ("logistic", "hinge"):
        raise ValueError(f"link: got {link!r}, expected 'logistic' or 'hinge'")
    return -L(beta * pairs.margin())


def ignored_pair(pairs: Pairs, *, beta: Positive = 0.1, clip: tuple[float, float] = (-1.0, 1.0)):
    return -L(beta * pairs.margin())


def ignored_without_annotation(pairs: Pairs, *, beta: Positive = 0.1, target=1.0):
    return -L(beta * pairs.margin())


def takes_anything(pairs: Pairs, *, beta: Annotated[float, Coerce(lambda value: value, "anything")] = 0.1):
    return -L(beta * pairs.margin())


class Mean(State):
    name, saved, settings = "mean", ("total", "count"), ()

    def __init__(self):
        super().__init__()
        self.total, self.count = 0.0, 0.0

    def __call__(self, values, counted):
        if self.training:
            count, total, _ = self.totals(values, counted)
            self.total, self.count = self.total + total, self.count + count
        return self.total / self.count if self.count else 0.0


class Unsaved(Mean):
    name, saved = "unsaved", ("count",)


def state_not_saved(
    pairs: Pairs, *, beta: Positive = 0.1, shift: Annotated[str | Unsaved, stateful(Unsaved)] = "running"
):
    return -L(beta * (pairs.margin() - shift(pairs.margin(), pairs.valid)))


def state_moved_twice(
    pairs: Pairs, *, beta: Positive = 0.1, shift: Annotated[str | Mean, stateful(Mean)] = "running"
):
    up = beta * (pairs.chosen.h - shift(pairs.margin(), pairs.valid))
    return -L(up) - L(-beta * (pairs.rejected.h - shift(pairs.margin(), pairs.valid)))


def state_undeclared(
    pairs: Pairs, *, beta: Positive = 0.1, shift: Annotated[str | Mean, stateful(Mean)] = "running"
):
    return -L(beta * (pairs.margin() - shift(pairs.margin(), pairs.valid)))


def state_declared_only(pairs: Pairs, *, beta: Positive = 0.1):
    return -L(beta * pairs.margin())


def state_never_used(
    pairs: Pairs, *, beta: Positive = 0.1, shift: Annotated[str | Mean, stateful(Mean)] = "running"
):
    return -L(beta * pairs.margin())


STATEFUL = {"stateful": True, "separable": False}

OTHERS = [
    (ignored_margin, "hyperparameter_effect", ["take it out"]),
    (ignored_optional, "hyperparameter_effect", ["clip="]),
    (ignored_optional_number, "hyperparameter_effect", ["clip="]),
    (ignored_switch, "hyperparameter_effect", ["average="]),
    (ignored_choice, "hyperparameter_effect", ["link='hinge'"]),
    (ignored_beta, "beta", ["use beta"]),
    (unchecked_string, "hyperparameters", ["Literal"]),
    (checked_string_without_effect, "hyperparameter_effect", ["link='hinge'"]),
    (ignored_pair, "hyperparameter_effect", ["clip="]),
    (ignored_without_annotation, "hyperparameter_effect", ["target="]),
    (takes_anything, "hyperparameters", ["Coerce raise"]),
    (state_not_saved, "state", ["saved"], STATEFUL),
    (state_moved_twice, "state", ["twice"], STATEFUL),
    (state_undeclared, "state", ["stateful=True"], COUPLED),
    (state_declared_only, "state", ["stateful=False"], {"stateful": True}),
    (state_never_used, "state", [], {"stateful": True}),
]


def functions():
    """Every broken loss: function, check, words, traits."""
    for kind, rows in ((Pairs, PAIRS), (Labels, LABELS), (Rankings, RANKINGS)):
        for name, check, words, body, *traits in rows:
            yield of(kind, name, body), check, words, *(traits or [{}])
    for function, check, words, *traits in OTHERS:
        yield function, check, words, *(traits or [{}])


def of(kind, name, body):
    """A loss of this kind from a function of feedback and beta."""

    def loss(feedback, *, beta=0.1):
        return body(feedback, beta)

    loss.__name__ = loss.__qualname__ = name
    loss.__annotations__ = {"feedback": kind, "beta": Positive}
    return loss
