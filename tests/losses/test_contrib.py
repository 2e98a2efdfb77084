"""The losses of contrib: check values, hand-worked points, what is detached, extremes."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

import prefloss
from prefloss import Labels, LogRatios, Pairs, losses
from prefloss.hyperparameters import Recent
from prefloss.logratios import PerToken
from prefloss.losses import contrib

NAMES = tuple(sorted(name for name in vars(contrib) if name in prefloss.specs))
PAIRS = tuple(name for name in NAMES if prefloss.specs[name].feedback is Pairs)
LINKS = ("discopop_cell", "discopop_padll", "dpo_sigmoid_prob", "cauchy", "bregman_dpo", "focalpo")
POINT = Pairs(
    LogRatios(policy=[-20.0], reference=[-21.5], tokens=[10]),
    LogRatios(policy=[-24.0], reference=[-23.0], tokens=[8]),
)
Z = 0.25


def softplus(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rich(chosen, rejected):
    """Pairs of one token each with every column that a loss may read."""
    return Pairs(
        *map(row, (chosen, rejected)), gold=row(torch.zeros(len(chosen))), embedding=torch.eye(len(chosen))
    )


def row(policy, reference=0.0, **columns):
    policy = torch.as_tensor(policy).unsqueeze(-1)
    full = {
        "reference": reference,
        "kl": 1.0,
        "reverse_kl": 1.0,
        "reference_entropy": 0.5,
        "weight": 0.7,
        "log_sum_sq": -1.0,
        **columns,
    }
    made = {name: torch.full_like(policy, value).detach() for name, value in full.items()}
    return PerToken(policy, mask=torch.ones(policy.shape, dtype=torch.bool), **made).log_ratios()


def test_all_of_the_contract_are_here():
    assert len(NAMES) == 22
    assert all(getattr(losses, name) is getattr(contrib, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_standing_is_stated(name):
    note = prefloss.specs[name].note
    assert note.startswith(("Single source: ", "Low adoption: ", "Formula from third-party code only"))


@pytest.mark.parametrize(
    ("name", "parameters", "value"),
    [
        ("discopop_cell", {"beta": 0.1}, 0.677370),
        ("dpo_sigmoid_prob", {}, -0.562177),
        ("cauchy", {}, 0.548218),
        ("bregman_dpo", {"member": "lr"}, 0.575939),
        ("focalpo", {"gamma": 2.0}, 0.182021),
        ("c2dpo", {"constraint_weight": 2e-4}, 0.575989),
        ("minor_dpo", {}, 0.620957),
        ("balanced_bpo", {"alpha": 1.0}, 0.644397),
        ("asft", {}, 2.205107),
    ],
)
def test_check_values(name, parameters, value):
    assert prefloss.get(name, **parameters)(POINT).item() == pytest.approx(value, abs=1e-6)


def test_check_values_of_votes():
    made = LogRatios(policy=[-20.0, -24.0], reference=[-21.5, -23.0])
    labels = Labels(made, [True, False], scores=[1.0, 0.0], baseline=[0.3, 0.0], kl=0.2)
    assert prefloss.get("dro")(labels)[0].item() == pytest.approx(0.320000, abs=1e-6)
    assert prefloss.get("kto_logsigmoid")(labels).sum().item() == pytest.approx(1.265204, abs=1e-6)


@pytest.mark.parametrize("alias", ["CELL", "PADLL", "PFL", "DBAQL", "AQL", "AQFL"])
def test_discopop_names(alias):
    assert prefloss.get(alias).name == f"discopop_{alias.lower()}"


def test_other_trainers_names():
    assert prefloss.get("DPOSigmoid").name == "dpo_sigmoid_prob"
    assert prefloss.get("focal_po").name == "focalpo"
    assert prefloss.get("oxrl:bpo").params["alpha"] == 1.0
    assert prefloss.get("turbo:ASFT").name == "asft"


def test_equal_log_probs_are_no_preference():
    """AUDIT T1."""
    pairs = Pairs(LogRatios([-5.0], [-6.0]), LogRatios([-5.0], [-4.0]))
    assert losses.discopop_pfl(pairs, beta=0.1).item() == pytest.approx(2 * (1 - 0.1 * 2))


@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_one_step_of_the_search_for_margins(tau):
    """AUDIT T1: of size min(0.5 / tau, 1), from even margins."""
    pairs = Pairs(LogRatios([-2.0, -4.0], tokens=[2, 2]), LogRatios([-6.0, -4.0], tokens=[2, 2]))
    found = contrib.gamma_po(pairs, beta=1.0, gamma=1.0, tau=tau, steps=2, queue=())
    gaps = (2.0, 0.0)
    slopes = [1 / (1 + math.exp(gap - 1)) for gap in gaps]
    share = 1 / (1 + math.exp(min(0.5 / tau, 1) * (slopes[0] - slopes[1])))
    wanted = [
        math.log1p(math.exp(margin - gap))
        for gap, margin in zip(gaps, (2 * share, 2 - 2 * share), strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_padll_halves_wrong_pairs():
    found = losses.discopop_padll(Pairs.of([1.0, -1.0], [0.0, 0.0]), beta=0.5)
    assert found.tolist() == pytest.approx([0.9 * softplus(-0.5), 0.45 * softplus(0.5)])


def test_pfl_asks_the_policy_alone():
    # Equal margins; the policy prefers the chosen completion in the first pair only.
    chosen = LogRatios(policy=[-1.0, -5.0], reference=[-3.0, -7.0])
    pairs = Pairs(chosen, LogRatios(policy=[-2.0, -2.0], reference=[-2.0, -2.0]))
    found = losses.discopop_pfl(pairs, beta=0.1)
    assert found.tolist() == pytest.approx([0.5 * softplus(-0.2), 2 * 0.8])


def test_the_batch_statistics_of_discopop():
    margins = [2.5, -1.0, 0.5]
    pairs = Pairs.of(margins, [0.0] * 3)
    z = [0.1 * margin for margin in margins]
    u = [x / 0.05 for x in z]
    s = sigmoid(statistics.variance(u))
    wanted = [s * softplus(-x / 0.9) + (1 - s) * math.exp(-0.9 * x) for x in z]
    assert losses.discopop_dbaql(pairs, beta=0.1).tolist() == pytest.approx(wanted, rel=1e-5)
    q = 0.5 + 0.01 * (sigmoid(statistics.mean(u)) - 0.5)
    w = [sigmoid(-(x - q)) for x in u]
    wanted = [a * softplus(-x) + (1 - a) * max(0, 1 - x) for a, x in zip(w, z, strict=True)]
    assert losses.discopop_aql(pairs, beta=0.1).tolist() == pytest.approx(wanted, rel=1e-5)
    start = statistics.stdev(u) * statistics.mean(sigmoid(-x) for x in u)
    q = start + 0.05 * (sigmoid(statistics.mean(u)) - start)
    b = [sigmoid(0.1 * abs(x - q)) for x in u]
    wanted = [a * softplus(-x) + (1 - a) * max(0, 1 - x) for a, x in zip(b, z, strict=True)]
    assert losses.discopop_aqfl(pairs, beta=0.1).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["discopop_dbaql", "discopop_aql", "discopop_aqfl"])
def test_the_batch_statistics_have_a_gradient(name):
    margins = torch.tensor([0.7, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(3, dtype=torch.float64)

    def value(chosen):
        return getattr(losses, name)(Pairs.of(chosen, rejected), beta=0.1)[:1]

    assert torch.autograd.gradcheck(value, margins)
    # The first pair's loss depends on the others.
    (gradient,) = torch.autograd.grad(value(margins).sum(), margins)
    assert gradient[1:].abs().min() > 0


def test_a_batch_of_one_has_no_variance():
    for name in ("discopop_dbaql", "discopop_aqfl"):
        chosen = torch.tensor([1.0], requires_grad=True)
        value = prefloss.get(name)(Pairs.of(chosen, [0.0]))
        value.sum().backward()
        assert value.isfinite().all()
        assert chosen.grad.isfinite().all()


def test_cauchy_has_its_digits_in_both_tails():
    for z in (-1e6, -50.0, -1.0, 0.0, 1.0, 50.0, 1e6):
        small = math.atan(1 / abs(z)) / math.pi if z else 0.5
        wanted = -math.log1p(-small) if z > 0 else -math.log(small)
        value = losses.cauchy(Pairs.of([z], [0.0]), beta=1.0).item()
        assert value == pytest.approx(wanted, rel=1e-5)
    # What the equation itself makes of a right pair in float32.
    naive = -torch.log(torch.atan(torch.tensor(1e8)) / math.pi + 0.5)
    assert naive.item() == 0
    assert losses.cauchy(Pairs.of([1e8], [0.0]), beta=1.0).item() == pytest.approx(1 / (math.pi * 1e8))


def test_the_members_of_bregman_dpo():
    ratio, lam = math.exp(-Z), 0.3
    wanted = {
        "lr": math.log(1 + ratio),
        "kliep": ratio + math.log(ratio),
        "lsif": ratio**2 - 2 / ratio,
        "ba": ratio ** (lam + 1) - (lam + 1) / lam * ratio**-lam,
    }
    wanted["sba"] = wanted["ba"] / (4 * (lam + 1))
    for member, value in wanted.items():
        found = prefloss.get("bregman_dpo", member=member, lam=lam)(POINT).item()
        assert found == pytest.approx(value, rel=1e-5)
    lsif, ba = (prefloss.get("bregman_dpo", member=member, lam=1.0)(POINT) for member in ("lsif", "ba"))
    torch.testing.assert_close(lsif, ba)
    with pytest.raises(ValueError, match="member: got 'kl'"):
        prefloss.get("bregman_dpo", member="kl")


@pytest.mark.parametrize("detach", [True, False])
def test_focalpo_gradient(detach):
    chosen = torch.tensor([0.0], requires_grad=True)
    losses.focalpo(Pairs.of(chosen, [0.0]), beta=1.0, gamma=2.0, detach=detach).sum().backward()
    # d/dz of -p^2 log p: -p^2 (1 - p) with the stop, times 2 log p + 1 without.
    wanted = -(0.5**3) * (1.0 if detach else 2 * math.log(0.5) + 1)
    assert chosen.grad.item() == pytest.approx(wanted)
    assert losses.focalpo(POINT, gamma=0.0).item() == pytest.approx(softplus(-Z))


def test_minor_dpo_leaves_a_rejected_side_below_the_reference_alone():
    rejected = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    losses.minor_dpo(Pairs.of([0.0] * 3, rejected)).sum().backward()
    assert rejected.grad[:2].tolist() == [0.0, 0.0]
    assert rejected.grad[2] > 0


def test_balanced_bpo_pulls_the_worse_side():
    chosen = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, -5.0, 0.0], requires_grad=True)
    losses.balanced_bpo(Pairs.of(chosen, rejected), alpha=0.5).sum().backward()
    assert (chosen.grad < 0).tolist() == [False, True, True]
    assert (rejected.grad > 0).tolist() == [True, False, True]


def test_asft_is_nll_and_unlikelihood():
    wanted = 1.5 * 2.0 - 0.5 * math.log(1 - math.exp(-3.0))
    assert losses.asft(POINT, beta=0.5).item() == pytest.approx(wanted)
    sure = Pairs(LogRatios([-1.0], tokens=[1]), LogRatios([0.0], tokens=[1]))
    assert losses.asft(sure).isfinite().all()


def test_selm_by_hand():
    pairs = replace(POINT, gold=LogRatios(policy=[-30.0], reference=[-28.0]))
    assert losses.selm(pairs, beta=0.1, alpha=0.5).item() == pytest.approx(softplus(-Z) + 0.5 * 0.1 * -2)
    with pytest.raises(ValueError, match="selm: gold: got None"):
        prefloss.get("selm")(POINT)


def test_dro_trains_policy_and_baseline():
    policy, baseline, scores = (torch.tensor([x], requires_grad=True) for x in (0.5, 0.25, 2.0))
    labels = Labels(LogRatios(policy, torch.zeros(1)), [False], scores=scores, baseline=baseline)
    prefloss.get("dro", tau=0.5)(labels).sum().backward()
    residual = 2.0 - 0.25 - 0.5 * 0.5
    assert policy.grad.item() == pytest.approx(-0.5 * residual)
    assert baseline.grad.item() == pytest.approx(-residual)
    assert scores.grad is None
    assert prefloss.get("dro").beta == 1.0


def test_kto_logsigmoid_weights_and_baselines():
    labels = Labels(LogRatios.of([2.0, 2.0]), [True, False], kl=1.0)
    found = losses.kto_logsigmoid(labels, beta=0.5, desirable_weight=3.0, undesirable_weight=0.5)
    assert found.tolist() == pytest.approx([3 * softplus(-0.5), 0.5 * softplus(0.5)])
    assert losses.kto_logsigmoid(labels, beta=0.5, kl_baseline="zero")[0].item() == pytest.approx(
        softplus(-1.0)
    )


def test_mallows_by_hand():
    pairs = Pairs(row([2.0], reference_entropy=0.1), row([-1.0], reference_entropy=0.3))
    phi = -0.29 * math.log(0.2)
    assert losses.mallows_dpo(pairs, beta=0.1).item() == pytest.approx(softplus(-0.1 * phi * 3))
    certain = Pairs(row([2.0], reference_entropy=0.0), row([-1.0], reference_entropy=0.0))
    assert losses.mallows_dpo(certain).isfinite().all()


def test_rainbowpo_by_hand():
    chosen, rejected = row([-2.0], -3.0, reference_entropy=0.1), row([-4.0], -3.5, reference_entropy=0.3)
    phi = -0.5 * math.log(0.2)
    score = 2.0 - 0.25 * 0.5 - 0.75 * 0.2
    found = losses.rainbowpo(Pairs(chosen, rejected), beta=2.0, gamma=0.2, mixing=0.25, dispersion=0.5)
    assert found.item() == pytest.approx(softplus(-2 * phi * score))


def test_tis_dpo_by_hand():
    mask = torch.tensor([[True, True, False]])
    weight = torch.tensor([[2.0, 0.5, torch.nan]], requires_grad=True)
    policy = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    kl = torch.tensor([[1.0, 3.0, torch.nan]])
    chosen = PerToken(
        policy, torch.tensor([[-2.0, -4.0, 0.0]]), mask, weight=weight, reverse_kl=kl
    ).log_ratios()
    rejected = row([1.0], weight=0.5, reverse_kl=4.0)
    margin, kl_gap = (2.0 + 1.0) - 0.5, 3.5 - 2.0
    for alpha in (0.0, 0.5):
        value = losses.tis_dpo(Pairs(chosen, rejected), beta=0.1, alpha=alpha)
        u = 0.1 * (margin - alpha * kl_gap)
        assert value.item() == pytest.approx(softplus(-u))
        (gradient,) = torch.autograd.grad(value.sum(), policy)
        assert gradient.tolist() == [pytest.approx([-0.1 * w / (1 + math.exp(u)) for w in (2.0, 0.5, 0.0)])]
    assert weight.grad is None
    bare = replace(chosen.per_token, reverse_kl=None).log_ratios()
    assert losses.tis_dpo(Pairs(bare, bare)).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match=r"PerToken\.reverse_kl: got None"):
        losses.tis_dpo(Pairs(bare, bare), alpha=0.5)


def test_rpo_relative_by_hand():
    chosen, rejected = [1.0, -2.0], [0.5, 3.0]
    pairs = Pairs.of(chosen, rejected, embedding=torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    # Unlike prompts: weights 1 and e^(-1/0.5) before the softmax.
    own = 1 / (1 + math.exp(-2))
    omega = [[own, 1 - own], [1 - own, own]]
    wanted = [
        statistics.mean(softplus(-0.1 * omega[i][j] * (chosen[i] - rejected[j])) for j in range(2))
        for i in range(2)
    ]
    assert losses.rpo_relative(pairs, beta=0.1).tolist() == pytest.approx(wanted)
    one = Pairs.of([1.5], [-1.0], embedding=torch.tensor([[3.0, 1.0]]))
    assert losses.rpo_relative(one).item() == pytest.approx(softplus(-Z))


def made(gaps):
    """Pairs of one token each whose SimPO gap at beta 1 is as given, and whose log-ratio margin is twice that."""
    gaps = torch.as_tensor(gaps)
    zero = torch.zeros_like(gaps)
    ones = torch.ones(gaps.shape, dtype=torch.long)
    return Pairs(LogRatios(gaps, -gaps, ones), LogRatios(zero, zero, ones))


def margins(gaps, earlier, gamma, tau, steps):
    """The authors' search, one number at a time."""
    known = [*earlier, *gaps]
    n, rate = len(known), min(0.5 / tau, 1.0)
    share = [1 / n] * n
    for _ in range(steps - 1):
        slope = [
            tau * (1 + math.log(n * (p + 1e-10))) + gamma * sigmoid(gamma * n * p - g)
            for p, g in zip(share, known, strict=True)
        ]
        raw = [p * math.exp(-rate * d) for p, d in zip(share, slope, strict=True)]
        share = [p / sum(raw) for p in raw]
    return [gamma * n * p for p in share][len(earlier) :]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("earlier", [(), (0.5, -1.0, 3.0)])
def test_gamma_po_by_hand(reference, earlier):
    gaps = [2.0, 0.0, -1.0]
    found = losses.gamma_po(
        made(gaps), beta=1.0, gamma=1.5, tau=2.0, queue=earlier, reference=reference
    ).tolist()
    seen = [2 * gap for gap in gaps] if reference else gaps
    held = margins(seen, earlier, 1.5, 2.0, 20)
    off = 1.5 if reference else 0.0
    assert found == pytest.approx(
        [softplus(-(g - (m - off))) for g, m in zip(seen, held, strict=True)], rel=1e-5
    )
    assert held[0] > held[1] > held[2]


def test_gamma_po_margins_average_gamma_and_have_no_gradient():
    gaps = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    held = margins(gaps.tolist(), (), 1.5, 2.0, 20)
    assert statistics.mean(held) == pytest.approx(1.5)
    losses.gamma_po(made(gaps), beta=1.0, gamma=1.5, tau=2.0, queue=()).sum().backward()
    # The reference of `made` follows the policy, but is detached.
    assert gaps.grad.tolist() == pytest.approx(
        [-1 / (1 + math.exp(g - m)) for g, m in zip(gaps.tolist(), held, strict=True)]
    )


def test_gamma_po_keeps_a_queue():
    loss = prefloss.get("gamma_po", beta=1.0)
    loss(made([2.0, 0.0]))
    assert loss.params["queue"].values == [2.0, 0.0]
    found = loss(made([1.0]))
    assert loss.params["queue"].values == [2.0, 0.0, 1.0]
    assert found.item() == pytest.approx(
        losses.gamma_po(made([1.0]), beta=1.0, queue=(2.0, 0.0)).item(), rel=1e-5
    )
    loss.eval()(made([5.0]))
    assert len(loss.params["queue"].values) == 3
    small = prefloss.get("gamma_po", queue=Recent(size=2))
    small(made([1.0, 2.0, 3.0]))
    assert len(small.params["queue"].values) == 2
    twin = prefloss.get(repr(small))
    assert twin.params["queue"] == Recent(size=2)
    assert prefloss.get("gamma_po", queue=[1, 2]).params["queue"] == (1.0, 2.0)
    with pytest.raises(ValueError, match="queue: got 'running', expected the object that keeps the state"):
        losses.gamma_po(made([1.0]))


def test_gamma_po_without_a_reference():
    policy = LogRatios([-3.0], tokens=[2])
    assert losses.gamma_po(Pairs(policy, policy), queue=()).item() == pytest.approx(softplus(4.0))
    with pytest.raises(ValueError, match="reference: got None"):
        losses.gamma_po(Pairs(policy, policy), queue=(), reference=True)


@pytest.mark.filterwarnings("ignore:.*without tokens")
@pytest.mark.parametrize(
    "name", ["discopop_dbaql", "discopop_aql", "discopop_aqfl", "gamma_po", "rpo_relative"]
)
def test_pairs_with_an_empty_side_take_no_part(name):
    def cut(columns, tokens):
        sides = [LogRatios(policy, torch.zeros(len(policy)), tokens) for policy in columns]
        return Pairs(
            *sides, embedding=torch.randn(len(tokens), 4, generator=torch.Generator().manual_seed(0))
        )

    columns = [torch.randn(4, requires_grad=True) for _ in range(2)]
    whole = cut(columns, torch.tensor([1, 1, 0, 0]))
    loss = prefloss.get(name)
    found = loss(whole)
    first = Pairs(whole.chosen[:2], whole.rejected[:2], embedding=whole.embedding[:2])
    torch.testing.assert_close(found[:2], prefloss.get(name)(first))
    found.sum().backward()
    for column in columns:
        assert column.grad.isfinite().all()
        assert (column.grad[2:] == 0).all()
    nothing = cut([column.detach() for column in columns], torch.tensor([0, 0, 0, 0]))
    assert loss(nothing).tolist() == [0.0] * 4
    empty = cut([torch.zeros(0)] * 2, torch.zeros(0, dtype=torch.long))
    assert loss(empty).shape == (0,)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_extremes(name, h):
    chosen = torch.tensor([h, h, 0.0], requires_grad=True)
    rejected = torch.tensor([-h, 0.0, 0.0], requires_grad=True)
    values = prefloss.get(name)(rich(chosen, rejected))
    values.sum().backward()
    assert values.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("member", ["lr", "kliep", "lsif", "ba", "sba"])
def test_extremes_of_bregman_dpo(member):
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    values = losses.bregman_dpo(Pairs.of(chosen, -chosen.detach()), member=member)
    values.sum().backward()
    assert values.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert torch.exp(torch.tensor(2e3)).isinf()


def test_extremes_where_plain_forms_fail():
    # DBAQL as written: 0 * infinity.
    variance, z = torch.tensor(1e4), torch.tensor(-1e3)
    assert ((1 - torch.sigmoid(variance)) * torch.exp(-0.9 * z)).isnan()
    # Logsigmoid KTO from the sigmoid.
    assert torch.log(torch.sigmoid(torch.tensor(-1e3))).isinf()


@pytest.mark.parametrize("h", [1e4, -1e4])
@pytest.mark.parametrize("name", ["dro", "kto_logsigmoid"])
def test_extremes_of_votes(name, h):
    policy = torch.tensor([h, h], requires_grad=True)
    labels = Labels(
        LogRatios(policy, torch.zeros(2)), [True, False], scores=[0.0, 1.0], baseline=[0.0, 0.0], kl=0.0
    )
    values = prefloss.get(name)(labels)
    values.sum().backward()
    assert values.isfinite().all()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIRS)
def test_double_precision_stays(name):
    pairs = rich(torch.randn(3).double(), torch.randn(3).double())
    assert prefloss.get(name)(pairs).dtype == torch.float64


@pytest.mark.parametrize("name", LINKS)
def test_the_links_see_the_margin_alone(name):
    h = torch.randn(5, dtype=torch.float64)
    loss = prefloss.get(name)
    torch.testing.assert_close(loss(Pairs.of(h + 7, h)), loss(Pairs.of(h * 0 + 7, h * 0)))
    assert prefloss.specs[name].difference_only
