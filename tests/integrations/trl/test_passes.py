"""The passes of TRL's `compute_loss` are named after their labels were checked."""

import pytest
import torch

from prefloss.integrations.trl.passes import Pass, assign, log_ratios
from prefloss.logratios import IGNORE_INDEX


def passed(labels):
    labels = torch.tensor(labels)
    return Pass(labels, torch.zeros_like(labels[:, 1:], dtype=torch.float32), None, None)


POLICY, MISMATCHED = [[1, 2, 3]], [[1, 4, 3]]
EXPECTED = [("mismatched policy", torch.tensor(MISMATCHED)), ("policy", torch.tensor(POLICY))]


def test_passes_are_named_in_trls_order():
    passes = [passed(MISMATCHED), passed(POLICY)]
    assert assign(passes, EXPECTED) == dict(zip(("mismatched policy", "policy"), passes, strict=True))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([MISMATCHED], r"got 1 forward passes, expected 2: \['mismatched policy', 'policy'\]"),
        # AUDIT T1: other tokens of the same shape.
        ([POLICY, MISMATCHED], "got other tokens in pass 0, expected those of 'mismatched policy'"),
        ([MISMATCHED, [[1, 2, 9]]], "got other tokens in pass 1, expected those of 'policy'"),
        ([MISMATCHED, [[1, 2]]], "got other tokens in pass 1, expected those of 'policy'"),
    ],
)
def test_other_passes_than_expected_are_refused(found, message):
    with pytest.raises(RuntimeError, match=message):
        assign([passed(labels) for labels in found], EXPECTED)


def test_log_ratios_of_a_pass_read_completion_tokens_alone():
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, 6], [IGNORE_INDEX, 7, 8, IGNORE_INDEX]])
    policy = Pass(
        labels, torch.tensor([[9.0, -1.0, -2.0], [-3.0, -4.0, 9.0]]), None, torch.full((2, 3), -0.5)
    )
    reference = Pass(labels, torch.tensor([[9.0, -1.5, -1.5], [-1.0, -2.0, 9.0]]), None, None)
    found = log_ratios(policy, reference)
    assert found.h.tolist() == [0.0, -4.0]
    assert found.tokens.tolist() == [2, 2]
    assert found.per_token.log_sum_sq.tolist() == [[-0.5] * 3] * 2
    summed = log_ratios(policy, torch.tensor([-3.0, -3.0]))
    assert summed.h.tolist() == [0.0, -4.0]
    assert summed.tokens.tolist() == [2, 2]
