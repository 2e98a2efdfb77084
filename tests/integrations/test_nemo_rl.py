"""A loss of NeMo-RL's protocol, on micro-batches as its workers hand them over (commit 7ea279a)."""

import enum
import pickle
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefloss.integrations.nemo_rl import PreferenceLoss, loss_of


class LossType(enum.Enum):
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


@pytest.fixture(autouse=True)
def interfaces(monkeypatch):
    name = "nemo_rl.algorithms.loss.interfaces"
    for place in range(name.count(".") + 1):
        package = ".".join(name.split(".")[: place + 1])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[name].LossType, sys.modules[name].LossInputType = LossType, LossInputType


def micro_batch(rows, seed):
    torch.manual_seed(seed)
    places, lengths = torch.arange(8), torch.randint(1, 6, (rows, 1))
    data = {
        "token_mask": ((places >= 2) & (places < 2 + lengths)).double(),
        "reference_policy_logprobs": -3 * torch.rand(rows, 8, dtype=torch.float64),
        "sample_mask": torch.tensor([1.0] * (rows - 2) + [0.0, 0.0]),
    }
    return (-3 * torch.rand(rows, 7, dtype=torch.float64)).requires_grad_(), data


def expected(policy, data, value):
    mask = data["token_mask"][:, 1:]
    h = ((policy - data["reference_policy_logprobs"][:, :-1]) * mask).sum(-1)
    means = (policy * mask).sum(-1) / mask.sum(-1)
    return value(h[::2] - h[1::2], means[::2] - means[1::2])[:-1].sum()


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ("dpo(beta=0.3)", lambda margin, means: -logsigmoid(0.3 * margin)),
        ("simpo(beta=2.0, gamma=0.5)", lambda margin, means: -logsigmoid(2.0 * means - 0.5)),
    ],
)
def test_micro_batches_add_up_to_the_mean_of_the_step(loss, value):
    made = pickle.loads(pickle.dumps(PreferenceLoss(loss)))
    assert (made.loss_type, made.input_type) == (LossType.SEQUENCE_LEVEL, LossInputType.LOGPROB)
    # 6 + 4 rows, two of each fill the batch up.
    total = 0.0
    for rows in (6, 4):
        policy, data = micro_batch(rows, rows)
        got, metrics = made(policy, data=data, global_valid_seqs=torch.tensor(6.0), global_valid_toks=None)
        wanted = expected(policy, data, value) / 3
        torch.testing.assert_close(got, wanted)
        slopes = [torch.autograd.grad(each, policy, retain_graph=True)[0] for each in (got, wanted)]
        torch.testing.assert_close(*slopes)
        assert metrics["num_valid_samples"] == (rows - 2) / 2
        total += metrics["accuracy"]
    assert 0 <= total <= 1


def test_rows_that_fill_a_batch_up_may_hold_anything():
    policy, data = micro_batch(4, 0)
    data["reference_policy_logprobs"][-2:] = -torch.inf
    got, _ = PreferenceLoss("dpo")(policy, data, torch.tensor(2.0))
    assert torch.isfinite(got)
    assert torch.isfinite(torch.autograd.grad(got, policy)[0]).all()


def test_the_configuration_chooses():
    def own(config, use_fused_linear_logprobs):
        return "own", use_fused_linear_logprobs

    build = loss_of(own)
    assert build(SimpleNamespace(), use_fused_linear_logprobs=True) == ("own", True)
    ours = build(
        SimpleNamespace(prefloss="hinge", reference_policy_kl_penalty=0.2), use_fused_linear_logprobs=True
    )
    assert repr(ours.loss) == "hinge(beta=0.2)"
    assert ours.use_fused_linear_logprobs


@pytest.mark.parametrize(
    ("loss", "options", "error", "match"),
    [
        ("aot", {}, ValueError, "takes each pair alone"),
        ("dpo(beta=linear(0.5, 0.1, steps=2))", {}, ValueError, "keeps no state or schedule"),
        ("npo", {}, TypeError, "expected a loss of pairs"),
        ("odpo", {}, ValueError, "odpo: needs scores"),
        ("dpo", {"sft_loss_weight": 0.1}, ValueError, "add the term to the loss"),
        ("dpo(beta=0.3)", {"reference_policy_kl_penalty": 0.2}, ValueError, "set it in one place"),
    ],
)
def test_what_is_refused(loss, options, error, match):
    with pytest.raises(error, match=match):
        PreferenceLoss(loss, SimpleNamespace(**options))
