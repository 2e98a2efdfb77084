"""LogRatios and the one place that owns shift, mask, sum and count."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from prefloss import LogRatios, token_logps
from prefloss.logratios import IGNORE_INDEX, PerToken, completion_targets

VOCABULARY = 11


def ratios(**changes):
    fields = {"policy": torch.tensor([-20.0, -24.0]), "reference": torch.tensor([-21.5, -23.0])}
    return LogRatios(**{**fields, "tokens": torch.tensor([10, 8]), **changes})


def test_derived_values():
    found = ratios()
    torch.testing.assert_close(found.h, torch.tensor([1.5, -1.0]))
    torch.testing.assert_close(found.h_mean, torch.tensor([0.15, -0.125]))
    torch.testing.assert_close(found.policy_mean, torch.tensor([-2.0, -3.0]))
    torch.testing.assert_close(found.reference_mean, torch.tensor([-2.15, -2.875]))
    assert found.shape == (2,)
    assert len(found) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_upcast(dtype):
    wanted = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    found = ratios(
        policy=torch.tensor([-20.0, -24.0], dtype=dtype), reference=torch.tensor([-21.5, -23.0], dtype=dtype)
    )
    assert found.policy.dtype == found.reference.dtype == found.h.dtype == wanted


def test_the_reference_gets_no_gradient():
    policy, reference = torch.tensor([-2.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    LogRatios(policy, reference).h.sum().backward()
    assert policy.grad.item() == 1
    assert reference.grad is None


def test_an_empty_completion_is_zero_without_gradient():
    policy = torch.tensor([-2.0, float("nan")], requires_grad=True)
    found = LogRatios(policy, torch.tensor([-1.0, -5.0]), torch.tensor([3, 0]))
    assert found.empty.tolist() == [False, True]
    assert found.h.tolist() == [-1.0, 0.0]
    assert found.h_mean.tolist()[1] == 0
    found.h_mean.sum().backward()
    assert policy.grad.tolist() == pytest.approx([1 / 3, 0.0])


def test_indexing_and_concatenation():
    rows = PerToken(torch.zeros(2, 3), None, torch.ones(2, 3, dtype=torch.bool))
    first = ratios(per_token=rows)
    wide = PerToken(torch.ones(1, 5), None, torch.ones(1, 5, dtype=torch.bool))
    second = LogRatios([-1.0], [-1.0], [4], per_token=wide)
    both = LogRatios.cat([first, second])
    assert both.policy.tolist() == [-20.0, -24.0, -1.0]
    assert both.per_token.mask.shape == (3, 5)
    assert both.per_token.mask[0].tolist() == [True, True, True, False, False]
    assert both[2].policy.item() == -1
    assert both[torch.tensor([True, False, True])].tokens.tolist() == [10, 4]
    assert both[1:].per_token.policy.shape == (2, 5)
    grid = LogRatios(
        torch.zeros(2, 3), per_token=PerToken(torch.zeros(2, 3, 4), None, torch.ones(2, 3, 4).bool())
    )
    assert grid.flatten().shape == (6,)
    assert grid.flatten().per_token.policy.shape == (6, 4)


def test_detached():
    policy = torch.tensor([-2.0], requires_grad=True)
    assert not LogRatios(policy).detach().policy.requires_grad
    rows = token_rows(2, 3)[0].log_ratios()
    assert rows.policy.requires_grad
    # AUDIT T1: the values of single tokens too.
    assert not any(value.requires_grad for value in rows.detach().per_token._present().values())


def token_rows(*shape):
    """Per-token values of every kind, each other numbers, with gradient; the last token is outside the mask."""
    names = ("policy", "reference", "log_sum_sq", "kl", "reverse_kl", "reference_entropy", "weight")
    values = {name: torch.randn(shape, requires_grad=True) for name in names}
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., -1] = False
    return PerToken(**values, mask=mask), values


def test_which_tokens_values_carry_a_gradient():
    """AUDIT T1: what does not depend on the policy has none."""
    rows, _ = token_rows(2, 3)
    assert {name for name, value in rows._present().items() if value.requires_grad} == {
        "policy",
        "kl",
        "reverse_kl",
    }


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_sums_of_tokens_in_any_shape(shape):
    """AUDIT T1."""
    rows, values = token_rows(*shape)
    found = rows.log_ratios()
    torch.testing.assert_close(found.policy, values["policy"][..., :-1].sum(-1))
    torch.testing.assert_close(found.reference, values["reference"][..., :-1].sum(-1).detach())
    assert (found.tokens == shape[-1] - 1).all()
    assert torch.equal(found.per_token.mask, rows.mask)
    first = torch.zeros(shape, dtype=torch.bool)
    first[..., 0] = True
    part = rows.log_ratios(first)
    torch.testing.assert_close(part.h, (values["policy"] - values["reference"])[..., 0])
    assert (part.tokens == 1).all()
    assert torch.equal(part.per_token.mask, first)
    torch.testing.assert_close(rows.sum(values["kl"]), values["kl"][..., :-1].sum(-1))
    torch.testing.assert_close(rows.mean(values["kl"]), values["kl"][..., :-1].mean(-1))
    assert PerToken(torch.ones(2), None, torch.zeros(2).bool()).mean(torch.ones(2)).item() == 0


def test_sums_of_token_log_probs_keep_both_models():
    """AUDIT T1: the reference is summed as the policy is, and per-token values are kept if asked for."""
    policy, reference = -torch.rand(2, 2, 3), -torch.rand(2, 2, 3)
    mask = torch.tensor([True, False, True]).expand(2, 2, 3)
    found = LogRatios.from_token_logps(policy, mask, reference, keep_per_token=True)
    torch.testing.assert_close(found.policy, policy[..., [0, 2]].sum(-1))
    torch.testing.assert_close(found.reference, reference[..., [0, 2]].sum(-1))
    assert found.tokens.tolist() == [[2, 2], [2, 2]]
    assert torch.equal(found.per_token.policy, torch.where(mask, policy, 0.0))
    assert torch.equal(found.per_token.reference, torch.where(mask, reference, 0.0))
    assert LogRatios.from_token_logps(policy, mask).per_token is None
    assert LogRatios.from_token_logps(policy, mask).reference is None
    with pytest.raises(ValueError, match=r"reference: got shape \[2, 2, 2\], expected \[2, 2, 3\]"):
        LogRatios.from_token_logps(policy, mask, reference[..., :2])


def test_concatenation_keeps_every_field():
    """AUDIT T1: of parts of different widths, the shorter is padded outside its mask."""
    short, _ = token_rows(1, 2)
    wide, _ = token_rows(2, 4)
    both = LogRatios.cat([short.log_ratios(), wide.log_ratios()])
    assert both.per_token._present().keys() == short._present().keys()
    for name, value in both.per_token._present().items():
        assert torch.equal(value[:1, :2], getattr(short, name))
        assert torch.equal(value[1:], getattr(wide, name))
        assert not value[0, 2:].any()
    assert torch.equal(both.reference[1:], wide.log_ratios().reference)
    bare = LogRatios.cat([LogRatios([-1.0]), LogRatios([-2.0])])
    assert (bare.reference, bare.tokens, bare.per_token) == (None, None, None)
    with pytest.raises(ValueError, match=r"per_token: got it in 1 of 2 parts"):
        LogRatios.cat([short.log_ratios(), LogRatios([-1.0], [-1.0], [1])])


def test_flat_completions_keep_every_field():
    rows, _ = token_rows(2, 3, 4)
    flat, whole = rows.log_ratios().flatten(), rows.log_ratios()
    assert torch.equal(flat.h, whole.h.reshape(6))
    assert torch.equal(flat.tokens, whole.tokens.reshape(6))
    assert torch.equal(flat.per_token.kl, rows.kl.reshape(6, 4))


def test_log_ratios_given_directly():
    found = LogRatios.of([1.5, -1.0], tokens=[2, 4])
    assert found.h_mean.tolist() == [0.75, -0.25]
    assert not LogRatios.of([1.5]).empty.any()
    assert LogRatios.of(torch.zeros(2, device="meta")).empty.device.type == "meta"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ratios(policy=torch.tensor([-20, -24])), TypeError, r"policy: got dtype torch.int64"),
        (
            lambda: ratios(tokens=torch.tensor([1.0, 2.0])),
            TypeError,
            r"tokens: got dtype torch.float32, expected integer",
        ),
        (lambda: ratios(tokens=torch.tensor([True, True])), TypeError, r"tokens: got dtype torch.bool"),
        (lambda: ratios(reference=torch.zeros(3)), ValueError, r"reference: got shape \[3\], expected \[2\]"),
        (lambda: ratios(tokens=torch.tensor([1])), ValueError, r"tokens: got shape \[1\], expected \[2\]"),
        (lambda: ratios(reference=torch.zeros(2, device="meta")), ValueError, r"reference: got device meta"),
        (lambda: ratios(reference=None).h, ValueError, r"reference: got None"),
        (lambda: ratios(tokens=None).h_mean, ValueError, r"tokens: got None"),
        (lambda: LogRatios.cat([]), ValueError, r"parts: got no LogRatios"),
        (
            lambda: LogRatios.cat([ratios(), ratios(tokens=None)]),
            ValueError,
            r"tokens: got it in 1 of 2 parts",
        ),
        (
            lambda: LogRatios.from_token_logps(torch.zeros(2, 3), torch.ones(2, 4).bool()),
            ValueError,
            r"mask: got shape \[2, 4\], expected \[2, 3\]",
        ),
        (
            lambda: completion_targets(torch.zeros(2, 3).long(), torch.zeros(2, 2)),
            ValueError,
            r"completion_mask: got shape \[2, 2\]",
        ),
        (
            lambda: completion_targets(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(3)),
            ValueError,
            r"segments: got shape \[3\], expected \[2, 3\]",
        ),
    ],
)
def test_bad_inputs_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@st.composite
def completions(draw):
    """Prompts and completions as lists of token ids; a completion may be empty, a prompt may not."""
    token = st.integers(0, VOCABULARY - 1)
    return draw(
        st.lists(
            st.tuples(st.lists(token, min_size=1, max_size=4), st.lists(token, max_size=4)),
            min_size=1,
            max_size=4,
        )
    )


def scores_of(position_ids, input_ids):
    """Stand-in for a causal model: the logits at a position depend on that token and its position alone."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(64, VOCABULARY, VOCABULARY, generator=generator)
    return table[position_ids, input_ids]


def batch(rows, left, extra):
    """The rows padded on one side to a common width plus `extra`."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + extra
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        size = len(prompt) + len(completion)
        start = width - size if left else 0
        ids[row, start : start + size] = torch.tensor(prompt + completion)
        mask[row, start + len(prompt) : start + size] = True
        positions[row, start : start + size] = torch.arange(size)
    return ids, mask, positions


def summed(ids, mask, positions, **kwargs):
    targets = completion_targets(ids, mask)
    logps = token_logps(scores_of(positions, ids), targets)
    # Values outside the mask must never be read.
    logps = torch.where(targets == IGNORE_INDEX, float("nan"), logps)
    return LogRatios.from_token_logps(logps, targets != IGNORE_INDEX, logps, **kwargs)


@given(rows=completions(), extra=st.integers(0, 3))
def test_padding_does_not_change_the_numbers(rows, extra):
    wanted = summed(*batch(rows, left=False, extra=0))
    for left in (False, True):
        found = summed(*batch(rows, left=left, extra=extra), keep_per_token=True)
        torch.testing.assert_close(found.policy, wanted.policy)
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(found.per_token.policy.sum(-1), wanted.policy)
        assert torch.equal(found.per_token.mask.sum(-1), wanted.tokens)
    assert wanted.tokens.tolist() == [len(completion) for _, completion in rows]


def test_no_position_predicts_the_next_sequence_of_a_packed_row():
    ids, mask = torch.tensor([1, 2, 3, 4]), torch.tensor([False, True, True, True])
    segments = torch.tensor([0, 0, 1, 1])
    assert completion_targets(ids, mask, segments).tolist() == [2, IGNORE_INDEX, 4, IGNORE_INDEX]


def test_segments_are_gone():
    with pytest.raises(TypeError, match="unexpected keyword argument 'segments'"):
        LogRatios.from_token_logps(torch.zeros(3), torch.ones(3).bool(), segments=torch.zeros(3).long())
