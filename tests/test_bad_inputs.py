"""AUDIT A3, A5, A7, A8, A9, A10: bad arguments of every public function are refused by name, in one form."""

import decimal
import fractions
import json

import numpy as np
import pytest
import torch
from torch import nn

import prefloss
from prefloss import Labels, LogRatios, Pairs, PerToken, Rankings
from prefloss.diagnosis import Diagnosis, Thresholds
from prefloss.feedback import convert, required
from prefloss.hyperparameters import (
    Coerce,
    Cosine,
    Draws,
    Interval,
    Linear,
    Moments,
    Recent,
    RewardShift,
    RunningMean,
)
from prefloss.integrations import trl
from prefloss.integrations.four_tensor import FourTensorLoss, OpenRLHFLoss, TorchtuneLoss
from prefloss.logprobs import explain, token_stats
from prefloss.logratios import completion_targets
from prefloss.metrics import implicit_rewards, metrics
from prefloss.registry import WeightedSum, get, parse, register, spec_from, spec_of, unregister
from prefloss.training import (
    FeedbackObjective,
    PreferenceBatch,
    PreferenceCollator,
    PreferenceObjective,
    Reference,
    model_logps,
    score_rows,
)
from tests import tiny

TWO = torch.tensor([-2.0, -3.0])


def side(n=2):
    return LogRatios(TWO[:1].expand(n), TWO[:1].expand(n), [3] * n)


def endless():
    inner = []
    inner.append(inner)
    return inner


# What is no list of two numbers; made anew for each case.
NO_NUMBERS = {
    "text": lambda: "-1.0",
    "bytes": lambda: b"ab",
    "text in a list": lambda: ["a", "b"],
    "None in a list": lambda: [None, -1.0],
    "dict": lambda: {0: -1.0, 1: -2.0},
    "set": lambda: {-1.0, -2.0},
    "generator": lambda: (x for x in (-1.0, -2.0)),
    "object": object,
    "decimals": lambda: [decimal.Decimal(-1), decimal.Decimal(-2)],
    "ragged": lambda: [[-1.0], [-2.0, -3.0]],
    "ragged tensors": lambda: [torch.zeros(1), torch.zeros(2)],
    "a list within itself": endless,
    "complex": lambda: [1j, -1.0],
    "complex tensor": lambda: torch.zeros(2, dtype=torch.complex64),
    "sparse tensor": lambda: torch.zeros(2).to_sparse(),
    "nested tensor": lambda: torch.nested.nested_tensor(
        [torch.zeros(2), torch.zeros(1)], layout=torch.jagged
    ),
    "strided nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)]),
    "array of text": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, 1.0], dtype=object),
    "array of dates": lambda: np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]"),
    "400 digits": lambda: [10**400, 1],
    "5000 digits": lambda: [10**5000, 1],
}
# The same for what must have a certain shape and device.
NO_PLACE = {
    "column": lambda one: one.unsqueeze(-1),
    "row": lambda one: one.unsqueeze(0),
    "three": lambda one: torch.cat([one, one[:1]]),
    "scalar": lambda one: one[0],
    "other device": lambda one: one.to("meta"),
}
FIELDS = {
    "policy": lambda x: LogRatios(x),
    "reference": lambda x: LogRatios(TWO, x),
    "tokens": lambda x: LogRatios(TWO, tokens=x),
    "h": LogRatios.of,
    "weight": lambda x: Pairs(side(), side(), weight=x),
    "score_chosen": lambda x: Pairs(side(), side(), score_chosen=x, score_rejected=[1.0, 1.0]),
    "score_rejected": lambda x: Pairs(side(), side(), score_chosen=[1.0, 1.0], score_rejected=x),
    "embedding": lambda x: Pairs(side(), side(), embedding=x),
    "desirable": lambda x: Labels(side(), x),
    "scores": lambda x: Labels(side(), [True, False], scores=x),
    "baseline": lambda x: Labels(side(), [True, False], baseline=x),
    "kl": lambda x: Labels(side(), [True, False], kl=x),
    "mask": lambda x: LogRatios.from_token_logps(TWO, x),
}
PLACED = {
    "reference": TWO,
    "tokens": torch.tensor([1, 2]),
    "weight": TWO.abs(),
    "score_chosen": TWO,
    "desirable": torch.tensor([True, False]),
    "scores": TWO,
    "baseline": TWO,
    "mask": torch.tensor([True, False]),
}
GROUP = LogRatios([[-1.0, -2.0]], [[-1.0, -2.0]])
LOGITS, TARGETS = torch.zeros(2, 4), torch.tensor([0, 1])
HIDDEN, HEAD = torch.zeros(2, 3), torch.zeros(4, 3)


def pairs_loss(value):
    @prefloss.registry.register(name="bad_inputs_loss")
    def bad_inputs_loss(pairs: Pairs) -> torch.Tensor:
        return value(pairs)

    try:
        return get("bad_inputs_loss")(Pairs(side(), side()))
    finally:
        unregister("bad_inputs_loss")


def registering(aliases=None, **traits):
    def some_loss(pairs: Pairs, *, beta: float = 0.1) -> torch.Tensor:
        return beta * pairs.margin()

    return spec_from(some_loss, **({"aliases": aliases} if aliases is not None else {}), **traits)


def objective(**options):
    return PreferenceObjective("dpo", **{"reference": Reference.cached(), **options})


def collate(*rows, **options):
    return PreferenceCollator(**options)(list(rows))


def changed(layout="padded", **tensors):
    return PreferenceBatch({**collate(IDS, layout=layout), **tensors})


IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
LABEL = {"prompt_ids": [1], "completion_ids": [2], "label": True}
GROUPS = {"prompt_ids": [1], "completions_ids": [[2], [3]], "scores": [1.0, 2.0]}


def scored(ids, model=None, **options):
    ids = torch.tensor([ids])
    targets = completion_targets(ids, torch.ones_like(ids))
    return model_logps(tiny.model() if model is None else model, {"input_ids": ids}, targets, **options)


# name of the argument, and calls that give it a bad value
OTHERS = {
    "policy": [
        lambda: LogRatios(torch.tensor([-1, -2])),
        lambda: LogRatios(torch.tensor([True])),
        lambda: LogRatios([True, False]),
        lambda: LogRatios(TWO.to(torch.float8_e4m3fn)),
        lambda: LogRatios([-1e300]),
        lambda: LogRatios(None),
        lambda: LogRatios([3.0, 4.0], [2.0, 5.0]),
        lambda: LogRatios([3.0]),
        lambda: LogRatios.from_token_logps(torch.tensor([[0.5, -1.0]]), torch.tensor([[True, True]])),
        lambda: LogRatios.from_token_logps(None, torch.tensor([True])),
    ],
    "reference": [
        lambda: LogRatios(TWO, torch.tensor([-1, -2])),
        lambda: LogRatios.from_token_logps(TWO, torch.tensor([True, True]), -TWO),
        lambda: LogRatios(TWO).h,
        lambda: Reference("foo"),
        lambda: Reference.of("model"),
        lambda: Reference.of(3),
        lambda: Reference.of({"kind": "foo"}),
        lambda: Reference.of({}),
        lambda: PreferenceObjective("dpo"),
        lambda: objective(reference="model"),
    ],
    "tokens": [
        lambda: LogRatios(TWO, tokens=[3, -1]),
        lambda: LogRatios(TWO, tokens=torch.tensor([-3, 1])),
        lambda: LogRatios(TWO, tokens=np.array([-3, 1])),
        lambda: LogRatios(TWO, tokens=[1.0, 2.0]),
        lambda: LogRatios(TWO, tokens=[True, 2]),
        lambda: LogRatios(TWO, tokens=[2**70, 1]),
        lambda: LogRatios(TWO).policy_mean,
        lambda: required(LogRatios(TWO), "tokens"),
        lambda: explain(tokens=-1, vocabulary=10),
        lambda: explain(tokens=1.5, vocabulary=10),
        lambda: explain(tokens=True, vocabulary=10),
    ],
    "per_token": [
        lambda: LogRatios(TWO, per_token=TWO),
        lambda: Pairs(side(), side()).margin(per_token="no"),
        lambda: LogRatios(TWO, per_token=PerToken(torch.zeros(3, 4), None, torch.ones(3, 4).bool())),
    ],
    "per_token.mask": [
        lambda: PerToken(torch.zeros(2, 3), None, torch.ones(2, 3)),
        lambda: PerToken(torch.zeros(2, 3), None, [1]),
    ],
    "per_token.policy": [lambda: PerToken([0.0], None, torch.ones(1).bool())],
    "per_token.kl": [
        lambda: PerToken(torch.zeros(2, 3), None, torch.ones(2, 3).bool(), kl=torch.zeros(2)),
        lambda: PerToken(torch.zeros(2), None, torch.ones(2).bool(), kl=torch.ones(2).long()),
        lambda: PerToken(torch.zeros(2), None, torch.ones(2).bool(), kl=torch.zeros(2, device="meta")),
    ],
    "parts": [lambda: LogRatios.cat([]), lambda: LogRatios.cat([TWO]), lambda: LogRatios.cat(None)],
    "mask": [
        lambda: LogRatios.from_token_logps(TWO, torch.tensor([0.5, 1.0])),
        lambda: LogRatios.from_token_logps(TWO, torch.tensor([2, 1])),
        lambda: LogRatios.from_token_logps(TWO[0], torch.tensor(True)),
        lambda: Rankings(GROUP, [[1.0, 2.0]], mask=[[1, 0]]),
        lambda: Rankings(GROUP, [[1.0, 2.0]], mask=[True, False]),
        lambda: Rankings(GROUP, [[1.0, 2.0]], mask=torch.tensor([[True, True]], device="meta")),
    ],
    "input_ids": [
        lambda: completion_targets([[1, 2]], torch.ones(1, 2)),
        lambda: completion_targets(torch.ones(1, 2), torch.ones(1, 2)),
        lambda: completion_targets(torch.tensor(1), torch.tensor(1)),
        lambda: completion_targets(torch.tensor([1, -5]), torch.tensor([1, 1])),
        lambda: scored([1, 43]),
        lambda: scored([1, 10**9]),
        lambda: model_logps(tiny.model(), {"input_ids": [[1, 2]]}, TARGETS),
        lambda: model_logps(tiny.model(), {"input_ids": LOGITS}, TARGETS),
    ],
    "completion_mask": [
        lambda: completion_targets(torch.tensor([1, 2]), torch.tensor([0.3, 0.9])),
        lambda: completion_targets(torch.tensor([1, 2]), torch.tensor([[1], [1]])),
        lambda: completion_targets(torch.tensor([1, 2]), "11"),
    ],
    "segments": [
        lambda: completion_targets(torch.tensor([1, 2]), torch.tensor([1, 1]), torch.tensor([0.0, 1.0])),
        lambda: completion_targets(torch.tensor([1, 2]), torch.tensor([1, 1]), torch.tensor([0])),
        lambda: completion_targets(torch.tensor([1, 2]), torch.tensor([1, 1]), [0, 1]),
    ],
    "chosen": [lambda: Pairs(TWO, side()), lambda: Pairs(None, side()), lambda: Pairs({}, side())],
    "rejected": [lambda: Pairs(side(), TWO), lambda: Pairs(side(), side(3)), lambda: Pairs(side(), None)],
    "gold": [lambda: Pairs(side(), side(), gold=TWO), lambda: Pairs(side(), side(), gold=side(1))],
    "weight": [
        lambda: Pairs(side(), side(), weight=[-1.0, 1.0]),
        lambda: Pairs(side(), side(), weight=[float("nan"), 1.0]),
        lambda: Pairs(side(), side(), weight=[float("inf"), 1.0]),
        lambda: Labels(side(), [True, False], weight=[-1.0, 1.0]),
        lambda: Rankings(GROUP, [[1.0, 2.0]], weight=[-1.0]),
        lambda: Rankings(GROUP, [[1.0, 2.0]], weight=[[1.0, 1.0]]),
        lambda: collate({**IDS, "weight": -1}),
        lambda: collate({**IDS, "weight": 10**400}),
        lambda: collate({**IDS, "weight": "0.5"}),
        lambda: collate({**IDS, "weight": True}),
        lambda: collate({**IDS, "weight": 1e300}),
        lambda: parse("0*dpo"),
        lambda: parse(f"{10**400}*dpo"),
        lambda: prefloss.linear_token_logps(HIDDEN, HEAD.T, TARGETS),
        lambda: prefloss.linear_token_logps(HIDDEN, HEAD.double(), TARGETS),
    ],
    "mismatched": [
        lambda: Labels(side(), [True, False], mismatched=TWO),
        lambda: Labels(side(), [True, False], mismatched=LogRatios(TWO.to("meta"))),
        lambda: PreferenceCollator(mismatched="yes"),
        lambda: collate(IDS, IDS, mismatched=True),
    ],
    "completions": [
        lambda: Rankings(side(), [1.0, 2.0]),
        lambda: Rankings(None, [[1.0, 2.0]]),
        lambda: Labels(TWO, [True, False]),
        lambda: collate({"prompt_ids": [1], "completions_ids": [], "scores": []}),
        lambda: collate({"prompt_ids": [1], "completions_ids": "ab", "scores": [1.0, 2.0]}),
    ],
    "scores": [
        lambda: Rankings(GROUP, None),
        lambda: Rankings(GROUP, [1.0, 2.0]),
        lambda: Rankings(GROUP, [[float("nan"), 1.0]]),
        lambda: Rankings(GROUP, [[float("inf"), 1.0]]),
        lambda: Rankings(GROUP, [["a", "b"]]),
        lambda: collate({**GROUPS, "scores": [1.0]}),
        lambda: collate({**GROUPS, "scores": [1.0, None]}),
        lambda: collate({**GROUPS, "scores": 1.0}),
        lambda: get("odpo")(Pairs(side(), side())),
    ],
    "desirable": [
        lambda: Labels(side(), [1, 0]),
        lambda: Labels(side(), None),
        lambda: Labels(side(), [0.5, 1.0]),
    ],
    "how": [
        lambda: Rankings(GROUP, [[1.0, 2.0]]).to_pairs("worst"),
        lambda: Rankings(GROUP, [[1.0, 2.0]]).to_pairs(None),
    ],
    "name": [
        lambda: get(3),
        lambda: get(None),
        lambda: get("dpo(beta=0.1, beta=0.2)"),
        lambda: get("dpo(beta=linear(0.5, start=0.1, end=0.2, steps=3))"),
        lambda: get("dpo(**{})"),
        lambda: get("dpo(0.1)"),
        lambda: get("dpo(beta=0.1"),
        lambda: get("dpo(beta=__import__('os').getcwd())"),
        lambda: get("dpo(divergence={'a': 1, 'a': 2})"),
        lambda: get("dpo() - ipo()"),
        lambda: get("+".join(["dpo"] * 3000)),
        lambda: get("dpo(beta=" + "-" * 5000 + "1)"),
        lambda: get("dpo(beta=" + "-" * 100_000 + "1)"),
        lambda: get("dpo(beta=" + "(" * 5000 + "1" + ")" * 5000 + ")"),
        lambda: get("dpo(beta='\ud800')"),
        lambda: get("dpo(beta='\0')"),
        lambda: get("dpo(beta=1" + "0" * 5000 + ")"),
        lambda: get("dpo+" * 300_000 + "dpo"),
        lambda: parse("nan*dpo"),
        lambda: parse(None),
        lambda: parse(b"dpo"),
        lambda: spec_of(3),
        lambda: unregister(None),
        lambda: registering(name="not a name"),
        lambda: registering(name=3),
        lambda: Reference.adapter(3),
        lambda: Reference.adapter(None),
    ],
    "beta": [
        lambda: get("dpo", beta=10**400),
        lambda: get("dpo", beta=float("nan")),
        lambda: get("dpo", beta=float("inf")),
        lambda: get("dpo", beta=-1),
        lambda: get("dpo", beta="0.1"),
        lambda: get("dpo", beta=None),
        lambda: get("dpo", beta=[0.1]),
        lambda: get("dpo", beta=True),
        lambda: get("dpo", beta=torch.tensor(0.1)),
        lambda: get("dpo", beta=1j),
        lambda: get("dpo(beta=0.1)", beta=0.2),
        lambda: get("dpo(beta=1e999)"),
        lambda: get("dpo(beta=linear(0.5, 0.1))"),
        lambda: get("dpo(beta=linear(0.5, 0.1, step=3))"),
        lambda: get("dpo(beta=linear(0.5, 0.1, steps=0))"),
        lambda: get("dpo(beta=linear(0.5, -0.1, steps=10))"),
        lambda: get("dpo", beta={"name": "linear"}),
        lambda: get("dpo", beta=Draws()),
        lambda: registering(beta="gamma"),
        lambda: metrics(Pairs(side(), side()), beta="x"),
        lambda: metrics(Pairs(side(), side()), beta=float("nan")),
        lambda: FeedbackObjective("dpo", beta="x"),
        lambda: FourTensorLoss("dpo", beta=0),
        lambda: implicit_rewards(side(), "x"),
        lambda: implicit_rewards(side(), float("nan")),
    ],
    "gama": [lambda: get("dpo", gama=1.0), lambda: FeedbackObjective("dpo", gama=1.0)],
    "label_smoothing": [
        lambda: get("dpo", label_smoothing=0.7),
        lambda: get("dpo", label_smoothing=True),
        lambda: get("kto", label_smoothing=0.1),
    ],
    "divergence": [lambda: get("dpo", divergence="kl"), lambda: get("dpo", divergence=3)],
    "humanline": [
        lambda: get("dpo", humanline=(1.0, 0.0)),
        lambda: get("dpo", humanline=(float("nan"), 1.0)),
        lambda: get("dpo", humanline=(True, 3)),
        lambda: get("dpo", humanline="on"),
    ],
    "shift": [lambda: get("bco", shift=10**400), lambda: get("bco", shift="walking")],
    "moments": [lambda: get("beta_dpo", moments=(0.0, -1.0)), lambda: get("beta_dpo", moments={"name": "x"})],
    "draws": [lambda: get("beta_dpo", draws=1.5), lambda: get("beta_dpo", draws=True)],
    "queue": [lambda: get("gamma_po", queue=["a"]), lambda: get("gamma_po", queue={1.0})],
    "kl_baseline": [lambda: get("kto", kl_baseline="mean"), lambda: get("kto", kl_baseline=3)],
    "start": [lambda: Linear("a", 0.1, 3), lambda: Cosine(10**400, 1, 3), lambda: Linear(float("nan"), 1, 3)],
    "steps": [lambda: Linear(0.5, 0.1, 0), lambda: Linear(0.5, 0.1, 1.5), lambda: Linear(0.5, 0.1, None)],
    "decay": [lambda: Moments(1.0), lambda: RunningMean("a"), lambda: Moments(float("nan"))],
    "seed": [lambda: Draws(1.5), lambda: Draws(None), lambda: Recent(seed="a")],
    "size": [lambda: Recent(size=-1), lambda: Recent(size=1.5)],
    "state": [
        lambda: get("bco").load_state_dict({}),
        lambda: get("bco").load_state_dict(None),
        lambda: get("bco").load_state_dict({1: 2, "shift": 3}),
        lambda: RewardShift().load_state_dict({"total": "a", "count": 0.0}),
        lambda: Recent().load_state_dict({"values": [None], "drawn": 0}),
        lambda: RewardShift().load_state_dict([1]),
        lambda: RewardShift().load_state_dict({"total": float("nan"), "count": 1.0}),
        lambda: Linear(0.5, 0.1, 3).load_state_dict({"done": -5}),
        lambda: Linear(0.5, 0.1, 3).load_state_dict({"done": 1.5}),
        lambda: Linear(0.5, 0.1, 3).load_state_dict({"done": float("nan")}),
    ],
    "ge": [lambda: Interval(ge="a")],
    "function": [lambda: Coerce(3, "a number"), lambda: register(3), lambda: spec_from(None)],
    "needs": [
        lambda: registering(needs="tokens"),
        lambda: registering(needs=("x",)),
        lambda: registering(needs=3),
    ],
    "separable": [lambda: registering(separable="no"), lambda: registering(separable=1)],
    "valid": [lambda: registering(valid=3)],
    "alias": [
        lambda: registering(aliases={"bad_alias": ("TRL", {"bta": 0.1})}),
        lambda: registering(aliases={"bad_alias": 3}),
        lambda: registering(aliases=["bad_alias"]),
    ],
    "terms": [
        lambda: WeightedSum([]),
        lambda: WeightedSum(None),
        lambda: WeightedSum([("a", get("dpo"))]),
        lambda: WeightedSum([(0.0, get("dpo"))]),
        lambda: WeightedSum([(1.0, "dpo")]),
        lambda: WeightedSum([get("dpo")]),
        lambda: WeightedSum([(1.0, loss) for loss in [get("bco_pair")] * 2]),
    ],
    "bad_inputs_loss": [
        lambda: pairs_loss(lambda pairs: (pairs.margin(), pairs.margin(), pairs.margin())),
        lambda: pairs_loss(lambda pairs: None),
        lambda: pairs_loss(lambda pairs: 0.5),
        lambda: pairs_loss(lambda pairs: pairs.margin().tolist()),
        lambda: pairs_loss(lambda pairs: {"loss": pairs.margin()}),
        lambda: pairs_loss(lambda pairs: pairs.margin().mean()),
        lambda: pairs_loss(lambda pairs: pairs.margin().unsqueeze(-1)),
        lambda: pairs_loss(lambda pairs: pairs.margin().long()),
        lambda: pairs_loss(lambda pairs: pairs.margin() > 0),
        lambda: pairs_loss(lambda pairs: pairs.margin() * 1j),
        lambda: pairs_loss(lambda pairs: pairs.margin().to("meta")),
        lambda: pairs_loss(lambda pairs: pairs.margin().numpy()),
    ],
    "feedback": [
        lambda: get("dpo")(TWO),
        lambda: get("dpo")(None),
        lambda: get("kto")(Pairs(side(), side())),
        lambda: get("dpo").mean(None),
        lambda: get("dpo").evaluate("pairs"),
        lambda: metrics(TWO),
        lambda: FeedbackObjective("dpo").share(TWO, training=True),
        lambda: FeedbackObjective("dpo").share(None, training=True),
    ],
    "ratios": [lambda: implicit_rewards(TWO, 0.1)],
    "loss": [
        lambda: FeedbackObjective("dpo").replace_loss("ipo"),
        lambda: FeedbackObjective(3),
        lambda: FeedbackObjective(None),
        lambda: PreferenceObjective(torch.nn.Linear(1, 1)),
        lambda: FourTensorLoss(3),
        lambda: FourTensorLoss("kto"),
        lambda: OpenRLHFLoss(None),
        lambda: OpenRLHFLoss("odpo"),
        lambda: TorchtuneLoss(["dpo"]),
        lambda: Diagnosis("dpo"),
    ],
    "hyperparameters": [
        lambda: FourTensorLoss(get("dpo"), beta=0.1),
        lambda: FeedbackObjective(get("dpo"), beta=1),
    ],
    "training": [
        lambda: FeedbackObjective("dpo").metrics(training="x"),
        lambda: FeedbackObjective("dpo").share(Pairs(side(), side()), training="yes"),
    ],
    "rankings_as": [
        lambda: FeedbackObjective("dpo", rankings_as="best"),
        lambda: FeedbackObjective("dpo", rankings_as=["all"]),
    ],
    "diagnose": [
        lambda: FeedbackObjective("dpo", diagnose="no"),
        lambda: FeedbackObjective("dpo", diagnose=3),
        lambda: FeedbackObjective("dpo", diagnose={"fallen": 3}),
    ],
    "falling": [
        lambda: Thresholds(falling=2.0),
        lambda: Thresholds(falling="a"),
        lambda: Thresholds(falling=True),
    ],
    "non_finite": [lambda: Thresholds(non_finite="no")],
    "examples": [
        lambda: Thresholds(examples=0),
        lambda: PreferenceCollator()([]),
        lambda: PreferenceCollator()(None),
        lambda: PreferenceCollator()("abc"),
        lambda: PreferenceCollator()({"prompt_ids": [[1]]}),
        lambda: PreferenceCollator()(3),
        lambda: objective().__call__(tiny.model(), collate({**IDS}), examples=-1),
        lambda: objective().__call__(tiny.model(), collate({**IDS}), examples=2),
    ],
    "example 0": [
        lambda: collate("row"),
        lambda: collate(None),
        lambda: collate([1, 2]),
        lambda: collate({**IDS, "prompt_ids": [-1]}),
        lambda: collate({**IDS, "chosen_ids": [1.5]}),
        lambda: collate({**IDS, "chosen_ids": [True]}),
        lambda: collate({**IDS, "chosen_ids": "12"}),
        lambda: collate({"prompt": "a", "chosen": "b", "rejected": "c"}),
        lambda: collate({**LABEL, "label": 0.5}),
        lambda: collate({**LABEL, "label": "yes"}),
        lambda: collate({**LABEL, "ref_logps": 3.0}),
        lambda: collate({**LABEL, "score": float("nan")}),
        lambda: collate({**LABEL, "kl": 10**400}),
    ],
    "tokenizer": [lambda: PreferenceCollator("gpt2"), lambda: PreferenceCollator(3)],
    "pad_token_id": [
        lambda: PreferenceCollator(pad_token_id=-1),
        lambda: PreferenceCollator(pad_token_id=2**70),
        lambda: PreferenceCollator(pad_token_id=1.5),
        lambda: PreferenceCollator(pad_token_id=True),
    ],
    "max_length": [
        lambda: PreferenceCollator(max_length=1),
        lambda: PreferenceCollator(max_length="12"),
        lambda: PreferenceCollator(max_length=True),
        lambda: PreferenceCollator(max_length=2.5),
    ],
    "layout": [lambda: PreferenceCollator(layout="flat"), lambda: PreferenceCollator(layout=["packed"])],
    "check_step_zero": [lambda: objective(check_step_zero="no"), lambda: objective(check_step_zero=0)],
    "autocast": [lambda: objective(autocast="bf16")],
    "model": [
        lambda: Reference.model("gpt2"),
        lambda: objective().bind(None),
        lambda: objective()("gpt2", {}),
        lambda: scored([1, 2], model=nn.Linear(1, 1)),
        lambda: scored([1, 2], model="gpt2"),
    ],
    "path": [
        lambda: Reference.table(3),
        lambda: Reference.table(None),
        lambda: Reference.of({"kind": "table"}),
    ],
    "batch": [
        lambda: PreferenceBatch.of(None),
        lambda: PreferenceBatch.of([1]),
        lambda: PreferenceBatch.of({"input_ids": 3, 1: 2}),
        lambda: objective()(tiny.model(), None),
        lambda: objective().count([{"input_ids": torch.ones(1, 1)}]),
        lambda: PreferenceBatch.of(changed(input_ids=None)),
        lambda: PreferenceBatch.of(changed(input_ids=[[1]])),
        lambda: PreferenceBatch.of(changed(completion_mask=3)),
        lambda: PreferenceBatch.of(changed(chosen_rows=[0])),
        lambda: PreferenceBatch.of(changed(chosen_rows=None)),
        lambda: PreferenceBatch.of(changed(chosen_rows=torch.tensor([0.0]))),
        lambda: PreferenceBatch.of(changed(chosen_rows=torch.tensor([9]))),
        lambda: PreferenceBatch.of(changed(rejected_rows=torch.tensor([-1]))),
        lambda: PreferenceBatch.of(changed(layout="packed", position_ids=None)),
        lambda: PreferenceBatch.of(changed(layout="packed", row_ids="x")),
    ],
    "step_counts": [
        lambda: FeedbackObjective("dpo").share(Pairs(side(), side()), training=True, step_counts="x"),
        lambda: FeedbackObjective("dpo").share(Pairs(side(), side()), training=True, step_counts=TARGETS[:1]),
    ],
    "batch_size": [
        lambda: score_rows(nn.Identity(), [], batch_size=0),
        lambda: score_rows(nn.Identity(), [], batch_size=True),
    ],
    "positions": [
        lambda: model_logps(
            tiny.model(), {"input_ids": TARGETS[None]}, TARGETS[None], positions=TARGETS[None] + 9
        ),
        lambda: model_logps(
            tiny.model(), {"input_ids": TARGETS[None]}, TARGETS[None], positions=LOGITS[:1, :2]
        ),
    ],
    "mode": [lambda: get("bco").train("no")],
    "kind": [lambda: convert(Pairs(side(), side()), "Labels"), lambda: Reference(["model"])],
    "batches": [lambda: objective().count([]), lambda: objective().count(None), lambda: objective().count(3)],
    "inputs": [
        lambda: model_logps(tiny.model(), None, TARGETS),
        lambda: model_logps(tiny.model(), {"labels": TARGETS}, TARGETS),
    ],
    "targets": [
        lambda: model_logps(tiny.model(), {}, None),
        lambda: prefloss.token_logps(LOGITS, TARGETS.float()),
        lambda: prefloss.token_logps(LOGITS, torch.zeros(3).long()),
        lambda: prefloss.token_logps(LOGITS, [0, 1]),
        lambda: prefloss.token_logps(LOGITS, TARGETS.bool()),
        lambda: prefloss.linear_token_logps(HIDDEN, HEAD, TARGETS.unsqueeze(0)),
    ],
    "logits": [
        lambda: prefloss.token_logps(None, TARGETS),
        lambda: prefloss.token_logps(LOGITS.long(), TARGETS),
        lambda: prefloss.token_logps(torch.zeros(2, 0), TARGETS),
        lambda: prefloss.token_logps(LOGITS.to(torch.float8_e5m2), TARGETS),
    ],
    "hidden": [lambda: prefloss.linear_token_logps([[1.0]], HEAD, TARGETS)],
    "bias": [lambda: prefloss.linear_token_logps(HIDDEN, HEAD, TARGETS, bias=torch.zeros(3))],
    "temperature": [
        lambda: prefloss.token_logps(LOGITS, TARGETS, temperature=0.0),
        lambda: prefloss.token_logps(LOGITS, TARGETS, temperature="1"),
        lambda: prefloss.token_logps(LOGITS, TARGETS, temperature=float("nan")),
        lambda: scored([1, 2], temperature=-1.0),
    ],
    "softcap": [lambda: prefloss.token_logps(LOGITS, TARGETS, softcap=True)],
    "logit_scale": [lambda: prefloss.token_logps(LOGITS, TARGETS, logit_scale=-1.0)],
    "ignore_index": [
        lambda: prefloss.token_logps(LOGITS, TARGETS, ignore_index=None),
        lambda: prefloss.token_logps(LOGITS, TARGETS, ignore_index=True),
    ],
    "impl": [
        lambda: prefloss.token_logps(LOGITS, TARGETS, impl="fast"),
        lambda: prefloss.token_logps(LOGITS, TARGETS, impl=None),
        lambda: explain(tokens=1, vocabulary=10, impl="fast"),
    ],
    "chunk_tokens": [
        lambda: prefloss.token_logps(LOGITS, TARGETS, chunk_tokens=0),
        lambda: explain(tokens=1, vocabulary=10, chunk_tokens=-1),
    ],
    "budget_bytes": [
        lambda: prefloss.linear_token_logps(HIDDEN, HEAD, TARGETS, budget_bytes=-1),
        lambda: explain(tokens=1, vocabulary=10, width=4, budget_bytes=True),
    ],
    "strict": [lambda: prefloss.token_logps(LOGITS, TARGETS, strict="no")],
    "inplace_backward": [lambda: prefloss.token_logps(LOGITS, TARGETS, inplace_backward=1)],
    "stats_gradient": [
        lambda: token_stats(LOGITS, TARGETS, stats_gradient="no"),
        lambda: explain(tokens=1, vocabulary=10, stats_gradient=0),
    ],
    "vocabulary": [
        lambda: explain(tokens=1, vocabulary=0),
        lambda: explain(tokens=1, vocabulary="x"),
    ],
    "width": [lambda: explain(tokens=1, vocabulary=10, width=0)],
    "dtype": [
        lambda: explain(tokens=1, vocabulary=10, dtype="float32"),
        lambda: explain(tokens=1, vocabulary=10, dtype=torch.int64),
    ],
    "device": [
        lambda: explain(tokens=1, vocabulary=10, device="gpu"),
        lambda: explain(tokens=1, vocabulary=10, device=None),
    ],
    "trainer": [
        lambda: trl.attach(object(), "dpo"),
        lambda: trl.attach(None, "dpo"),
        lambda: trl.detach(object()),
        lambda: trl.detach(None),
        lambda: trl.trainer_with_table(3, "table"),
        lambda: trl.trainer_with_table(None, "table"),
    ],
    "kernel": [lambda: trl.PreferenceLossCallback("dpo", kernel="fast"), lambda: trl.enable(kernel=["trl"])],
    "collator": [lambda: trl.FeedbackCollator(None), lambda: trl.FeedbackCollator("padded")],
    "column 'weight'": [
        lambda: trl.FeedbackCollator(lambda rows: {})([{"weight": -1.0}]),
        lambda: trl.FeedbackCollator(lambda rows: {})([{"weight": 10**400}]),
        lambda: trl.FeedbackCollator(lambda rows: {})([{"weight": True}]),
    ],
    "trainable_head": [lambda: explain(tokens=1, vocabulary=10, trainable_head="no")],
}


def cases():
    for field, give in FIELDS.items():
        for what, value in NO_NUMBERS.items():
            yield pytest.param(field, lambda give=give, value=value: give(value()), id=f"{field}: {what}")
    for field, good in PLACED.items():
        for what, moved in NO_PLACE.items():
            call = FIELDS[field]
            yield pytest.param(field, lambda c=call, m=moved, g=good: c(m(g)), id=f"{field}: {what}")
    for name, calls in OTHERS.items():
        for place, call in enumerate(calls):
            yield pytest.param(name, call, id=f"{name} {place}")


CASES = list(cases())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("name", "call"), CASES)
def test_a_bad_argument_is_refused_by_name(name, call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert name in message
    assert any(word in message for word in ("expected", "unknown", "missing", ", but "))
    # A message is for reading: it quotes no value at length.
    assert len(message) < 900


def test_there_are_many_cases():
    assert len(CASES) >= 200


def test_what_is_good_is_taken():
    """The same arguments in their other good forms."""
    for value in (
        [-2.0, -3.0],
        (-2, -3),
        range(-3, -1),
        np.array([-2, -3]),
        np.float32([-2, -3]),
        TWO.half(),
    ):
        assert LogRatios(value).policy.tolist() == torch.as_tensor(list(value)).float().tolist()
    assert LogRatios(-2.0).policy.shape == ()
    assert LogRatios([]).policy.shape == (0,)
    assert LogRatios([], [], []).tokens.dtype == torch.int64
    assert Labels(LogRatios([]), []).valid.shape == (0,)
    assert LogRatios.of([1.5, 2.0]).h.tolist() == [1.5, 2.0]
    assert LogRatios([float("nan"), -1.0]).policy.isnan().tolist() == [True, False]
    assert LogRatios.from_token_logps(TWO, torch.tensor([1.0, 0.0])).policy.item() == -2.0
    assert LogRatios.from_token_logps(TWO, [0, 1]).policy.item() == -3.0
    assert get("dpo(beta=linear(0.5, 0.1, steps=10))").params["beta"].steps == 10


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dpo", {"beta": np.float64(0.5)}),
        ("dpo", {"beta": np.float32(0.5)}),
        ("dpo", {"beta": np.int64(1)}),
        ("dpo", {"beta": fractions.Fraction(1, 2)}),
        ("dpo", {"beta": Linear(np.float64(0.5), np.float32(0.25), np.int64(3))}),
        ("dpo", {"label_smoothing": np.float32(0.25)}),
        ("bco", {"shift": np.float32(0.5)}),
        ("beta_dpo", {"moments": Moments(np.float32(0.5)), "draws": np.int64(3)}),
        ("gamma_po", {"queue": Recent(np.int64(8), np.int32(4), np.uint8(1))}),
    ],
)
def test_numbers_of_other_types_become_pythons(name, parameters):
    """So that a loss can be read back from its text and its configuration is JSON."""
    loss = get(name, **parameters)
    assert repr(get(repr(loss))) == repr(loss)
    json.dumps(loss.config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_of_tensors_keeps_its_gradient(dtype):
    """AUDIT A4."""
    first = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
    rows = [first, torch.tensor(-3.0, dtype=dtype)]
    ratios = LogRatios(policy=rows, reference=[-2.0, -3.0])
    assert ratios.policy.dtype == dtype
    get("dpo")(Pairs(ratios, LogRatios.of([0.0, 0.0]))).sum().backward()
    assert first.grad.item() != 0
    nested = LogRatios([[first, torch.tensor(-1.0, dtype=dtype)], [first, first]])
    nested.policy.sum().backward()
    assert nested.shape == (2, 2)
    with pytest.raises(
        ValueError, match=r"policy: got 3 or more everywhere, expected log-probs .* other sign"
    ):
        LogRatios([3.0, 4.0])


def test_checks_of_values_leave_compilers_and_vmap_alone():
    """What cannot be read is not checked, and does not fail."""
    loss = get("dpo")

    def value(chosen, rejected):
        sides = [LogRatios(x, x - 1.0, torch.ones_like(x).long()) for x in (chosen, rejected)]
        return loss(Pairs(*sides, weight=torch.ones_like(chosen)))

    wanted = value(TWO, TWO)
    torch.testing.assert_close(torch.vmap(value)(TWO.reshape(2, 1), TWO.reshape(2, 1)).reshape(2), wanted)
    compiled = torch.compile(value, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TWO, TWO), wanted)
    assert value(TWO.to("meta"), TWO.to("meta")).shape == (2,)
    with torch._subclasses.FakeTensorMode() as mode:
        assert value(mode.from_tensor(TWO), mode.from_tensor(TWO)).shape == (2,)
