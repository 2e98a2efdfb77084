"""The kit is tested by what it lets through: a broken loss for each check, and losses that are right."""

from typing import Annotated

import pytest
import torch
import torch.nn.functional as F

from prefloss import Labels, Pairs, Rankings, testing
from prefloss.hyperparameters import Coerce, NonNegative, Positive, State
from prefloss.testing import CheckFailed, checks

CASES = {}


def broken(check, *words, **traits):
    """A loss that this check, and no other before it, must refuse with these words in its message."""

    def decorate(function):
        CASES[function.__name__] = (function, traits, check, words)
        return function

    return decorate


LIKE_DPO = {"difference_only": True, "monotone": True}


@broken("shape_and_dtype", "values of shape []", "not reduced", **LIKE_DPO)
def mean_over_the_batch(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()).mean()


@broken("shape_and_dtype", "torch.float64 from torch.float32", "expected torch.float32", **LIKE_DPO)
def in_double(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin().double())


@broken("shape_and_dtype", "raised AttributeError", **LIKE_DPO)
def misspelt(pairs: Pairs, *, beta: Positive = 0.1):
    return pairs.margins()  # pyright: ignore


@broken("shape_and_dtype", "raised AttributeError", "'float' object")
def no_tensor(pairs: Pairs, *, beta: Positive = 0.1):
    return 0.5


@broken("no_mutation", "chosen.policy was", "in-place")
def mutates_its_input(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.chosen.policy.sub_(pairs.rejected.policy))


@broken("no_mutation", "score_chosen was")
def clamps_scores_in_place(pairs: Pairs, *, beta: Positive = 0.1):
    assert pairs.score_chosen is not None
    return -F.logsigmoid(beta * pairs.margin() - pairs.score_chosen.clamp_(max=0.1).detach())


@broken("determinism", "the same call gave", "draw random numbers from a state")
def adds_noise(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin() + torch.randn(pairs.shape).to(pairs.margin()))


@broken("data_gradient", "mismatched.policy has gradient", needs=["mismatched"], separable=False)
def trains_the_baseline(labels: Labels, *, beta: Positive = 0.1):
    gain = beta * (labels.completions.h - labels.mismatched.h.mean().clamp(min=0))
    return torch.where(labels.desirable, torch.sigmoid(-gain), torch.sigmoid(gain))


@broken("batch_permutation", "in the order", "a value belongs to its example", separable=False, monotone=True)
def counts_the_first_pair_twice(pairs: Pairs, *, beta: Positive = 0.1):
    first = torch.arange(len(pairs.margin())) == 0
    return -F.logsigmoid(beta * pairs.margin()) * torch.where(first, 2.0, 1.0)


@broken("batch_permutation", "in the order", "put sorted", separable=False, monotone=True)
def sorts_and_forgets_the_places(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin().sort().values)


@broken("batch_permutation", "completions of each group in the order", "rank by the scores", monotone=True)
def takes_the_first_for_the_best(rankings: Rankings, *, beta: Positive = 0.1):
    h = rankings.completions.h.masked_fill(~rankings.present, -1e30)
    return torch.logsumexp(beta * h, -1) - beta * rankings.completions.h[:, 0]


@broken("separability", "alone they are", "declare separable=False", monotone=True)
def falsely_separable(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.margin() - pairs.margin().mean().detach()))


@broken("separability", "declares separable=False", "declare separable=True", separable=False, **LIKE_DPO)
def falsely_coupled(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken(
    "difference_only", "added to the log-ratios of both sides", "declare difference_only=False", **LIKE_DPO
)
def falsely_of_the_difference(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.sigmoid(-beta * pairs.chosen.h) + torch.sigmoid(beta * pairs.rejected.h)


@broken("difference_only", "added to policy and reference", "declare difference_only=False", **LIKE_DPO)
def reads_the_policy_alone(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()) - 0.01 * (pairs.chosen.policy - pairs.rejected.policy)


@broken("difference_only", "declares difference_only=False", "declare difference_only=True", monotone=True)
def hides_its_difference(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("monotone", "the value rose from", "declare monotone=False", **LIKE_DPO)
def falsely_monotone(pairs: Pairs, *, tau: Positive = 0.1):
    return (pairs.margin() - 1 / (2 * tau)) ** 2


@broken("monotone", "the value rose from", **LIKE_DPO)
def wrong_sign(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(-beta * pairs.margin())


@broken("monotone", "declares monotone=False", "declare monotone=True", difference_only=True)
def hides_that_it_is_monotone(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("needs", "without scores", "declare 'scores' in needs or in reads", **LIKE_DPO)
def reads_scores_undeclared(pairs: Pairs, *, beta: Positive = 0.1):
    margin = 0.0 if pairs.score_chosen is None else (pairs.score_chosen - pairs.score_rejected).detach()
    return -F.logsigmoid(beta * pairs.margin() - margin)


@broken("needs", "without tokens it raised ValueError", "declare 'tokens' in needs or in reads", **LIKE_DPO)
def reads_tokens_undeclared(pairs: Pairs, *, beta: Positive = 5.0):
    return -F.logsigmoid(beta * pairs.margin(per_token=True))


@broken("needs", "declares needs='tokens'", "leave it out", needs=["tokens"], **LIKE_DPO)
def needs_what_it_does_not_read(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("needs_reference", "declare needs_reference=False", monotone=True)
def needs_no_reference(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.chosen.policy - pairs.rejected.policy))


@broken("needs_reference", "declare needs_reference=True", needs_reference=False, monotone=True)
def reads_a_reference_undeclared(pairs: Pairs, *, beta: Positive = 0.1):
    margin = pairs.chosen.policy - pairs.rejected.policy
    if pairs.chosen.reference is not None and pairs.rejected.reference is not None:
        margin = margin - (pairs.chosen.reference - pairs.rejected.reference)
    return -F.logsigmoid(beta * margin)


@broken("beta", "beta=0.2 gave the values of beta=0.1", **LIKE_DPO)
def ignores_its_beta(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(0.1 * pairs.margin())


@broken("hyperparameter_effect", "label_noise=", "take it out of the signature", **LIKE_DPO)
def ignores_a_hyperparameter(pairs: Pairs, *, beta: Positive = 0.1, label_noise: NonNegative = 0.0):
    return -F.logsigmoid(beta * pairs.margin())


@broken("hyperparameters", "was accepted", "beta", **LIKE_DPO)
def accepts_any_beta(pairs: Pairs, *, beta: Annotated[float, Coerce(lambda value: value, "anything")] = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


class Remembered(State):
    """Mean margin, kept in the object or, wrongly, in the class; moved always or, rightly, in training."""

    name = "remembered"
    saved = ("total",)
    settings = ()

    def __init__(self, kept_by=None, always=False):
        super().__init__()
        self.owner, self.always = kept_by or self, always
        self.owner.total = 0.0

    def __deepcopy__(self, memo):
        copied = Remembered(None if self.owner is self else self.owner, self.always)
        copied.owner.total, copied.training = self.owner.total, self.training
        return copied

    def __call__(self, margin):
        if self.training or self.always:
            self.owner.total += float(margin.detach().sum())
        return self.owner.total

    def state_dict(self):
        return {"total": self.owner.total}

    def load_state_dict(self, state):
        self.owner.total = state["total"]


class Forgetful(Remembered):
    """Saves nothing of what moves."""

    def __deepcopy__(self, memo):
        copied = Forgetful()
        copied.total, copied.training = self.total, self.training
        return copied

    def load_state_dict(self, state):
        pass


def state_of(make):
    return Annotated[object, Coerce(lambda value: make() if isinstance(value, str) else value, "'new'")]


Everywhere = type("Everywhere", (), {"total": 0.0})
ONE_FOR_ALL = Remembered()
STATEFUL = {"stateful": True, "separable": False, "difference_only": True}


def remembering(pairs: Pairs, shift, beta):
    return -F.logsigmoid(beta * (pairs.margin() - 0.01 * shift(pairs.margin())))


@broken("state", "declares no state", "declare stateful=True", **LIKE_DPO)
def keeps_a_hidden_count(pairs: Pairs, *, beta: Positive = 0.1):
    CALLS.append(None)
    return -F.logsigmoid(beta * pairs.margin()) * len(CALLS)


CALLS = []


@broken("state", "declares stateful=True", "or declare stateful=False", stateful=True, **LIKE_DPO)
def has_no_state(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin())


@broken("state", "a batch in evaluation moved the state", "self.training", **STATEFUL)
def moves_in_evaluation(
    pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(lambda: Remembered(always=True)) = "new"
):
    return remembering(pairs, shift, beta)


@broken("state", "never in the module or class", **STATEFUL)
def shares_its_numbers(
    pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(lambda: Remembered(kept_by=Everywhere)) = "new"
):
    return remembering(pairs, shift, beta)


@broken("state", "gave the same shift twice", "let Coerce make it", **STATEFUL)
def shares_its_object(pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(lambda: ONE_FOR_ALL) = "new"):
    return remembering(pairs, shift, beta)


@broken("state", "restored from state_dict", "not interrupted", **STATEFUL)
def restores_nothing(pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(Forgetful) = "new"):
    return remembering(pairs, shift, beta)


@broken("state", "declares stateful=False", separable=False, difference_only=True)
def keeps_a_state_undeclared(pairs: Pairs, *, beta: Positive = 0.1, shift: state_of(Remembered) = "new"):
    return remembering(pairs, shift, beta)


class WrongBackward(torch.autograd.Function):
    """Its gradient is half of what it should be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return -F.logsigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -0.5 * torch.sigmoid(-x) * grad


class OldStyle(torch.autograd.Function):
    """Right, but in the form that torch.func cannot use."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return -F.logsigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -torch.sigmoid(-x) * grad


@broken("gradients", "the slope of the values there is", "backward()", **LIKE_DPO)
def wrong_backward(pairs: Pairs, *, beta: Positive = 0.1):
    return WrongBackward.apply(beta * pairs.margin())


@broken("torch_func", "torch.func.vmap raised", "setup_context", **LIKE_DPO)
def old_style_function(pairs: Pairs, *, beta: Positive = 0.1):
    return OldStyle.apply(beta * pairs.margin())


@broken("gradient_nonzero", "trains nothing", ".detach()", **LIKE_DPO)
def detaches_all(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin().detach())


@broken("gradient_nonzero", "trains nothing", monotone=True)
def counts_right_orders(pairs: Pairs, *, beta: Positive = 0.1):
    return (pairs.margin() < 1 / beta).to(pairs.margin())


@broken("extremes", "F.logsigmoid", **LIKE_DPO)
def log_of_sigmoid(pairs: Pairs, *, beta: Positive = 0.1):
    return -torch.log(torch.sigmoid(beta * pairs.margin()))


@broken("extremes", "clamp the argument", **LIKE_DPO)
def overflows(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.exp(-beta * pairs.margin())


@broken("extremes", "the gradient of", "the branch that it does not select", **LIKE_DPO)
def single_where(pairs: Pairs, *, beta: Positive = 0.1):
    z = beta * pairs.margin()
    return torch.where(z > 0, torch.log1p(torch.exp(-z)), torch.log1p(torch.exp(z)) - z)


@broken("precision", "in float32 and", "sigmoid(-x)", **LIKE_DPO)
def one_minus_sigmoid(pairs: Pairs, *, beta: Positive = 0.1):
    return 1 - torch.sigmoid(beta * pairs.margin())


@broken("nan", "chosen.policy[", "nan_to_num", **LIKE_DPO)
def hides_nan(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()).nan_to_num()


@broken("preference", "exchanging chosen and rejected", monotone=False)
def treats_both_sides_alike(pairs: Pairs, *, beta: Positive = 0.1):
    return (beta * pairs.margin()) ** 2


@broken("preference", "turning votes and scores", monotone=True)
def forgets_the_votes(labels: Labels, *, beta: Positive = 0.1):
    return torch.sigmoid(-beta * labels.completions.h)


@broken("empty_examples", "tokens.clamp(min=1)", monotone=True, difference_only=True, needs=["tokens"])
def divides_by_no_tokens(pairs: Pairs, *, beta: Positive = 5.0):
    means = [side.h / side.tokens for side in (pairs.chosen, pairs.rejected)]
    return -F.logsigmoid(beta * (means[0] - means[1]))


@broken("empty_examples", "the others' values", "feedback.valid", separable=False, monotone=True)
def counts_empty_examples(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.margin() - pairs.margin().detach().mean()))


@broken("ties", "with equal scores the mean is inf", needs=["scores"], monotone=True, difference_only=True)
def divides_by_the_score_gap(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin()) / (pairs.score_chosen - pairs.score_rejected)


@broken("empty_examples", "absent completions", "feedback.present", monotone=True)
def reads_absent_completions(rankings: Rankings, *, beta: Positive = 0.1):
    h = rankings.completions.h
    best = rankings.scores.masked_fill(~rankings.present, -1.0).argmax(-1, keepdim=True)
    return torch.logsumexp(beta * h, -1) - beta * h.gather(-1, best).squeeze(-1)


@broken("padding", "outside the mask", "PerToken.sum", needs=["per_token.kl"])
def sums_over_padding(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * (pairs.margin() - pairs.rejected.per_token.kl.sum(-1)))


@broken("single_example", "one example", separable=False, monotone=True)
def standardises(pairs: Pairs, *, beta: Positive = 0.1):
    return -F.logsigmoid(beta * pairs.margin() / pairs.margin().std().detach())


@broken("weights", "leave the weights to prefloss", **LIKE_DPO)
def weighs_twice(pairs: Pairs, *, beta: Positive = 0.1):
    values = -F.logsigmoid(beta * pairs.margin())
    return values if pairs.weight is None else values * pairs.weight.detach()


@broken("torch_compile", "fullgraph=True", ".item()", **LIKE_DPO)
def asks_for_a_number(pairs: Pairs, *, beta: Positive = 0.1):
    margin = pairs.margin()
    return -F.logsigmoid(beta * margin) if margin.abs().max().item() < 1e9 else -beta * margin


@broken("torch_compile", "graphs, expected at most", **LIKE_DPO)
def compiles_for_every_size(pairs: Pairs, *, beta: Positive = 0.1):
    return torch.stack([-F.logsigmoid(beta * margin) for margin in pairs.margin()])


class Slope:
    """A hyperparameter whose repr is no literal."""

    value = 0.1

    def __eq__(self, other):
        return isinstance(other, Slope)

    __hash__ = None


@broken("repr", "get(repr(loss))", "expected hyperparameters that are literals", **LIKE_DPO)
def has_an_unreadable_setting(
    pairs: Pairs, *, slope: Annotated[object, Coerce(lambda value: _slope(value), "0.1")] = 0.1
):
    return -F.logsigmoid(slope.value * pairs.margin())


def _slope(value):
    if value == 0.1 or isinstance(value, Slope):
        return Slope()
    raise ValueError(f"got {value!r}")


class Link:
    """A hyperparameter that pickle refuses."""

    def __init__(self):
        self.function = lambda x: -F.logsigmoid(x)

    def __repr__(self):
        return "'logistic'"

    def __deepcopy__(self, memo):
        return self


@broken("pickle", "pickle.loads", "pickle local object", **LIKE_DPO)
def has_a_setting_that_is_code(
    pairs: Pairs,
    *,
    beta: Positive = 0.1,
    link: Annotated[object, Coerce(lambda value: _link(value), "'logistic'")] = "logistic",
):
    return link.function(beta * pairs.margin())


def _link(value):
    if value == "logistic" or isinstance(value, Link):
        return Link()
    raise ValueError(f"got {value!r}")


@broken("documentation", "a `.. math::` block", "`beta: ...`", **LIKE_DPO)
def half_documented(pairs: Pairs, *, beta: Positive = 0.1):
    """Logistic loss.

    Args:
        pairs: Reads the log-ratios of both sides.
    """
    return -F.logsigmoid(beta * pairs.margin())


NEEDS = {"clamps_scores_in_place": ["scores"]}


def bound(name):
    function, traits, _, _ = CASES[name]
    if name in NEEDS:
        traits = {**traits, "needs": NEEDS[name]}
    return testing.as_loss(function, **traits)


@pytest.mark.parametrize("name", CASES)
def test_broken_loss_is_caught_by_its_check(name):
    _, _, check, words = CASES[name]
    with pytest.raises(CheckFailed) as caught:
        dict(checks.loss_checks(bound(name), max_examples=10))[check](bound(name))
    message = str(caught.value)
    assert message.startswith(f"{name}: {check}: ")
    for word in words:
        assert word in message


def test_every_check_has_a_broken_loss():
    assert {check for _, _, check, _ in CASES.values()} == set(checks.names())


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "kto", "bco", "dpo_pl", "wpo", "orpo"])
def test_right_loss_passes(name):
    report = testing.check_loss(name, max_examples=5)
    assert len(report.passed) + len(report.skipped) == len(checks.names())
    assert not report.failed
    assert all(reason.strip() for reason in report.skipped.values())
