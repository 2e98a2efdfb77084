"""A loss for verl's SFT trainer: rows are pairs, log-probs come as nested tensors."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from prefloss.integrations.verl import PreferenceLoss, with_loss

PROMPT, LENGTHS = 2, ((3, 5), (4, 1), (2, 2))


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(pairs, seed=0):
    """As verl's engine hands it over (verl 0.9.1, workers/engine/fsdp): all rows without padding."""
    torch.manual_seed(seed)
    rows = [[PROMPT + count for count in pair] for pair in pairs]
    mask = [torch.cat([(torch.arange(n) >= PROMPT).long() for n in row]) for row in rows]
    places = [torch.cat([torch.arange(n) for n in row]) for row in rows]
    flat = (-3 * torch.rand(sum(map(sum, rows)), dtype=torch.float64)).requires_grad_()
    offsets = torch.tensor([0, *(sum(row) for row in rows)]).cumsum(0)
    data = {
        "loss_mask": nested(mask),
        "position_ids": nested(places),
        "reference_logps": nested([-5 * torch.rand(2, dtype=torch.float64) for _ in rows]),
        "global_batch_size": 6,
        "dp_size": 2,
    }
    return flat, {"log_probs": torch.nested.nested_tensor_from_jagged(flat, offsets)}, data


def sums_by_hand(flat, pairs):
    """Sums of the completions: the place before a token predicts it."""
    start, sums = 0, []
    for pair in pairs:
        for count in pair:
            sums.append(flat[start + PROMPT - 1 : start + PROMPT - 1 + count].sum())
            start += PROMPT + count
    return torch.stack(sums).reshape(-1, 2)


@pytest.mark.parametrize(
    "loss", ["dpo(beta=0.3)", "simpo(beta=2.0, gamma=0.5)", "0.8*hinge(beta=0.3) + 0.2*nll"]
)
def test_value_and_gradient_are_those_by_hand(loss):
    flat, output, data = micro_batch(LENGTHS)
    sums, counts = sums_by_hand(flat, LENGTHS), torch.tensor(LENGTHS)
    reference = data["reference_logps"].values().reshape(-1, 2)
    h, means = sums - reference, sums / counts
    margin = h[:, 0] - h[:, 1]
    expected = (
        {
            "dpo": lambda: -logsigmoid(0.3 * margin),
            "simpo": lambda: -logsigmoid(2.0 * (means[:, 0] - means[:, 1]) - 0.5),
            "0.8*hinge": lambda: 0.8 * torch.relu(1 - 0.3 * margin) - 0.2 * means[:, 0],
        }[loss.split("(")[0]]().sum()
        / 6
        * 2
    )
    value, metrics = PreferenceLoss(loss)(model_output=output, data=data, dp_group=None)
    torch.testing.assert_close(value, expected)
    assert metrics == {}
    found, wanted = (torch.autograd.grad(each, flat, retain_graph=True)[0] for each in (value, expected))
    torch.testing.assert_close(found, wanted)


def test_micro_batches_add_up_to_the_batch():
    loss = PreferenceLoss("dpo")
    flat, output, data = micro_batch(LENGTHS)
    whole, _ = loss(output, data)
    split = sum(PROMPT * 2 + sum(pair) for pair in LENGTHS[:2])
    parts = 0.0
    for rows, values in ((slice(0, 2), flat[:split]), (slice(2, 3), flat[split:])):
        pieces = {
            name: nested(list(data[name].unbind())[rows])
            for name in ("loss_mask", "position_ids", "reference_logps")
        }
        logps = torch.nested.nested_tensor_from_jagged(values, pieces["loss_mask"].offsets())
        parts += loss({"log_probs": logps}, {**data, **pieces})[0]
    torch.testing.assert_close(parts, whole)


def test_what_is_refused():
    for name, error, match in (
        ("kto", TypeError, "'kto', which takes Labels"),
        ("aot", ValueError, "takes each pair alone"),
        ("odpo", ValueError, "which needs scores"),
    ):
        with pytest.raises(error, match=match):
            PreferenceLoss(name)
    _, output, data = micro_batch(LENGTHS)
    with pytest.raises(ValueError, match="dpo: reference_logps: got none"):
        PreferenceLoss("dpo")(output, {k: v for k, v in data.items() if k != "reference_logps"})
    data["position_ids"] = nested([torch.arange(len(row)) for row in data["position_ids"].unbind()])
    with pytest.raises(ValueError, match="position_ids: got 3 sequences in 3 rows"):
        PreferenceLoss("dpo")(output, data)


def test_the_trainer_gives_it_to_its_worker():
    class Worker:
        def set_loss_fn(self, loss_fn):
            self.loss_fn = loss_fn

    class SFTTrainer:
        """As verl's, which sets its own loss while it builds the engine."""

        def __init__(self):
            self.training_client = Worker()
            self._build_engine()

        def _build_engine(self):
            self.training_client.set_loss_fn("sft")

    assert SFTTrainer().training_client.loss_fn == "sft"
    assert repr(with_loss("dpo", SFTTrainer)().training_client.loss_fn.loss) == "dpo(beta=0.1)"
