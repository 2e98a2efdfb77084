"""Every scheme of the linear op gives the same numbers, and those of float64."""

import itertools

import pytest
import torch

from prefloss.kernels import chunked, heads, kept, kl, linear, naive, native, rows
from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.paths import Path

PLAIN = LogitTransform()
CAPPED = LogitTransform(1.3, 3.0, 0.7)
TRANSFORMS = [LogitTransform(), CAPPED, LogitTransform(0.5, None, 2.0)]
# hidden, weight, bias: which of them get a gradient
TRAINED = {"frozen": (True, False, False), "all": (True, True, True), "head": (False, True, False)}
# kept tokens out of 27 that count
PATHS = {
    "unscaled": Path("unscaled", 8),
    "keep": Path("keep", 8, 40),
    "keep some": Path("keep", 8, 11),
    "recompute": Path("recompute", 8),
}


@pytest.fixture(params=["native", "torch"])
def row_passes(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif native._library() is None:
        pytest.skip("no C compiler")
    return request.param


def problem(dtype, trained, seed=0, n=40, width=24, vocabulary=301):
    torch.manual_seed(seed)
    hidden, weight, bias = torch.randn(n, width), torch.randn(vocabulary, width) / 3, torch.randn(vocabulary)
    inputs = [
        x.to(dtype).requires_grad_(need) for x, need in zip((hidden, weight, bias), trained, strict=True)
    ]
    targets = torch.randint(vocabulary, (n,))
    targets[torch.randperm(n)[:13]] = -100
    return inputs, targets


def run(op, inputs, targets, transform, upstream, **options):
    out = op(*inputs, targets, transform, -100, **options)
    wanted = [x for x in inputs if x.requires_grad]
    return out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), wanted)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_scheme_against_float64(dtype, trained, transform, row_passes):
    inputs, targets = problem(dtype, TRAINED[trained])
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    upstream = torch.randn(1, len(targets), dtype=torch.float64)
    want, wanted = run(naive.linear_token_stats, exact, targets, transform, upstream, outputs=1)
    # the sum is exact to float32; then the gradient of a logit and the result are rounded once each
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3.2e-3, torch.float16: 3.5e-4}[dtype]
    results = {}
    for name, path in PATHS.items():
        if name == "unscaled" and trained != "frozen":
            continue
        got, grads = run(
            chunked.linear_token_stats, inputs, targets, transform, upstream, choose=lambda n, path=path: path
        )
        assert (got - want).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
        for g, w in zip(grads, wanted, strict=True):
            assert g.dtype == dtype
            assert relative(g, w) < limit, (name, relative(g, w))
        results[name] = got, grads
    for (one, first), (other, second) in itertools.combinations(results.values(), 2):
        assert torch.equal(one, other) or (one - other).abs().max() < 2e-6
        for g, w in zip(first, second, strict=True):
            assert relative(g, w.double()) < limit


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_statistics_and_their_gradients(trained, transform, row_passes):
    inputs, targets = problem(torch.float32, TRAINED[trained])
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    upstream = torch.randn(5, len(targets), dtype=torch.float64)
    upstream[4] = 0
    want, wanted = run(naive.linear_token_stats, exact, targets, transform, upstream)
    for name, path in PATHS.items():
        if name == "unscaled":
            continue
        got, grads = run(
            chunked.linear_token_stats, inputs, targets, transform, upstream, choose=lambda n, path=path: path,
            outputs=5,
        )  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
        for g, w in zip(grads, wanted, strict=True):
            assert relative(g, w) < 5e-6, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_from_logits(transform, dtype, row_passes):
    logits = (3 * torch.randn(4, 5, 2053)).to(dtype).requires_grad_()
    targets = torch.randint(2053, (4, 5))
    targets[0, :3] = -100
    # a token that cannot occur, a row that begins with a block of them, and a sure thing
    with torch.no_grad():
        logits[1, 1, 7] = -torch.inf
        logits[1, 2, :1500] = -torch.inf
        logits[1, 3, 11] = 60
    targets[1, 2], targets[1, 3] = 1999, 11
    exact = logits.detach().double().requires_grad_()
    upstream = torch.randn(5, 4, 5, dtype=torch.float64)
    upstream[4] = 0
    want = naive.token_stats(exact, targets, transform, -100)
    got = chunked.token_stats(logits, targets, transform, -100, chunk_tokens=3, outputs=5)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=atol)
    (d_logits,) = torch.autograd.grad((got * upstream).sum(), logits)
    (wanted,) = torch.autograd.grad((want * upstream).sum(), exact)
    # one rounding, of 2^-8 or 2^-11 at most and half of that on average
    limits = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
    assert relative(d_logits, wanted) < limits[dtype]
    assert (d_logits[0, :3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_over_the_logits(dtype, row_passes):
    logits = torch.randn(6, 40).to(dtype).requires_grad_()
    targets = torch.tensor([1, -100, 3, 4, 39, 0])
    grads = []
    for inplace in (False, True):
        z = logits * 1
        out = chunked.token_stats(z, targets, LogitTransform(), -100, inplace_backward=inplace)
        (grad,) = torch.autograd.grad(out.square().sum(), z, retain_graph=True)
        grads.append(grad)
        assert (grad.data_ptr() == z.data_ptr()) == inplace
    assert torch.equal(*grads)
    # the logits are gone, and who saved them is told
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_backward_pass_recomputes_what_the_first_wrote_over(row_passes):
    for dtype in (torch.float32, torch.bfloat16):
        inputs, targets = problem(dtype, TRAINED["all"])
        out = chunked.linear_token_stats(*inputs, targets, LogitTransform(), -100, lambda n: PATHS["keep"])
        once = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        twice = torch.autograd.grad(out.sum(), inputs)
        for a, b in zip(once, twice, strict=True):
            assert relative(a, b.double()) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("scheme", ["keep", "keep some", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_head_is_never_summed_whole_in_float32(dtype, scheme, row_passes, monkeypatch):
    # tiles of 9 rows and 64 columns, in place of all 301
    monkeypatch.setattr(linear, "_LEAST_COLUMNS", 64)
    inputs, targets = problem(dtype, TRAINED["all"])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(1, len(targets), dtype=torch.float64)
    _, wanted = run(naive.linear_token_stats, exact, targets, PLAIN, upstream, outputs=1)
    sizes = []
    matmul = heads.matmul
    monkeypatch.setattr(
        heads, "matmul", lambda a, b, out, add=False: sizes.append(out.shape) or matmul(a, b, out, add)
    )
    path = PATHS[scheme]._replace(chunk_tokens=2)
    _, grads = run(chunked.linear_token_stats, inputs, targets, PLAIN, upstream, choose=lambda n: path)
    for g, w in zip(grads, wanted, strict=True):
        assert relative(g, w) < (3.2e-3 if dtype == torch.bfloat16 else 3.5e-4)
    # the products of width 24 are 9 tokens by the head, or rows of its gradient
    assert {rows for rows, width in sizes if width == 24} - {9} == {64, 301 % 64}


def test_kept_logits_lie_where_the_gradient_of_the_head_will(monkeypatch):
    weight = torch.randn(301, 24, requires_grad=True)
    spans = list(rows.slices(301, 64))
    for tokens, parts in ((5, [5]), (24, [24]), (30, [24, 6])):
        found = kept.room_to_keep(torch.randn(30, 24), weight, tokens, spans)
        assert [part.rows.stop - part.rows.start for part in found.parts] == parts
        for span, tile in zip(spans, found.parts[0].tiles, strict=True):
            assert tile.data_ptr() == found.home[span].data_ptr()
            assert tile.numel() <= found.home[span].numel()
    # ... and it is written there
    hidden, targets = torch.randn(30, 24), torch.randint(301, (30,))
    homes = []
    make = kept.room_to_keep
    monkeypatch.setattr(linear, "room_to_keep", lambda *a: homes.append(make(*a)) or homes[-1])
    out = chunked.linear_token_stats(
        hidden, weight, None, targets, PLAIN, -100, lambda n: Path("keep", 8, 30)
    )
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    assert gradient.data_ptr() == homes[0].home.data_ptr()
    # no gradient is wanted that could give its memory
    assert kept.room_to_keep(torch.randn(30, 24), weight.detach(), 30, spans).home is None
    # of the codes of a half-precision head a few fewer fit, for their references
    found = kept.room_to_keep(
        torch.randn(30, 24).bfloat16(), weight.detach().bfloat16().requires_grad_(), 24, spans
    )
    assert [part.rows.stop - part.rows.start for part in found.parts] == [22, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("most_rows", [7, 2048])
def test_many_tiles_give_the_numbers_of_one(most_rows, transform, dtype, row_passes, monkeypatch):
    (hidden, weight, bias), targets = problem(dtype, TRAINED["all"], vocabulary=1000)
    with torch.no_grad():
        # the maximum of a row rises from span to span, and the first span is impossible
        bias += torch.linspace(0, 8, 1000).to(dtype)
        bias[:70] = -torch.inf
    targets = torch.where(targets == -100, -100, 70 + targets % 930)
    upstream = torch.randn(len(targets))
    results = {}
    for tiles in ("one", "many"):
        monkeypatch.setattr(linear, "_LEAST_COLUMNS", 64 if tiles == "many" else 1024)
        monkeypatch.setattr(linear, "_MOST_ROWS", most_rows if tiles == "many" else 2048)
        for name, path in PATHS.items():
            path = path._replace(chunk_tokens=2 if tiles == "many" else 64)
            inputs = [hidden] if name == "unscaled" else [hidden, weight, bias]
            out = chunked.linear_token_stats(
                hidden, weight, bias, targets, transform, -100, lambda n, p=path: p
            )
            results[name, tiles] = out[0], torch.autograd.grad((out[0] * upstream).sum(), inputs)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for name in PATHS:
        (one, wanted), (many, grads) = results[name, "one"], results[name, "many"]
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-12 if dtype == torch.float64 else 1e-5)
        for g, w in zip(grads, wanted, strict=True):
            assert relative(g, w.double()) < limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 13])
def test_backward_leaves_the_inputs_as_they_are(dtype, ignored, row_passes):
    # gradients are written over what the op itself holds, and where no target is ignored that is the caller's
    inputs, targets = problem(dtype, TRAINED["all"])
    targets = torch.where(targets == -100, 5, targets)
    targets[:ignored] = -100
    before = [x.detach().clone() for x in inputs]
    for name in ("keep", "keep some", "recompute"):
        out = chunked.linear_token_stats(*inputs, targets, LogitTransform(), -100, lambda n, p=name: PATHS[p])
        torch.autograd.grad(out.sum(), inputs)
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_bfloat16_gradients_err_no_more_than_those_of_rounded_logit_gradients(row_passes):
    # the peers': log-probs in float32, each gradient of a logit rounded once, sums in float32, the result rounded
    inputs, targets = problem(torch.bfloat16, TRAINED["all"], n=100, width=48, vocabulary=1000)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(1, 100, dtype=torch.float64)
    _, wanted = run(naive.linear_token_stats, exact, targets, LogitTransform(), upstream, outputs=1)
    logits = exact[0].detach() @ exact[1].detach().T + exact[2].detach()
    logits.requires_grad_()
    out = naive.token_stats(logits, targets, LogitTransform(), -100, 1)
    (dz,) = torch.autograd.grad((out * upstream).sum(), logits)
    dz = dz.bfloat16().double()
    peers = [dz @ exact[1].detach(), dz.T @ exact[0].detach(), dz.sum(0)]
    for path in PATHS.values():
        head_is_frozen = path.scheme == "unscaled"
        frozen = [inputs[0], *(x.detach() if head_is_frozen else x for x in inputs[1:])]
        _, grads = run(
            chunked.linear_token_stats,
            frozen,
            targets,
            LogitTransform(),
            upstream,
            choose=lambda n, p=path: p,
        )
        for got, want, peer in zip(grads, wanted, peers, strict=False):
            assert relative(got, want) < 1.15 * relative(peer.bfloat16(), want)


def decoded(codes, vocabulary):
    references = rows.references_of(codes, vocabulary).repeat_interleave(native.PANEL, -1)[:, :vocabulary]
    codes = codes[:, :vocabulary]
    return torch.where(codes == -32768, -torch.inf, (codes - 32767.0) / 2048 + references)


def test_kept_logits_are_off_by_a_quarter_of_a_thousandth(row_passes):
    z = torch.randn(3, 4003) * 8
    lse = z.logsumexp(-1)
    codes = torch.empty(3, rows.code_columns(4003), dtype=torch.int16)
    rows.encode(z.clone(), LogitTransform(), lse, codes)
    logp = z - lse[:, None]
    large = logp > -31.9
    assert (decoded(codes, 4003) - z)[large].abs().max() < 2.5e-4
    assert (decoded(codes, 4003)[logp < -32.1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("n", "width", "vocabulary"), [(1, 2, 1), (7, 6, 64), (200, 2050, 131), (9, 64, 4003)]
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_projection_keeps_codes_and_statistics(n, width, vocabulary, transform):
    x, weight, bias = torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)
    x, weight, bias = x.bfloat16(), (weight * 2 / width**0.5).bfloat16(), bias.bfloat16()
    if not native.projects(x, weight):
        pytest.skip("no compiler, or no bfloat16 on this processor")
    targets = torch.randint(vocabulary, (n,))
    # one in another shard of the vocabulary, and one to leave out
    targets[-1] = vocabulary
    targets[0] = -1
    bias[: min(vocabulary - 1, 70)] = -torch.inf
    z = transform.apply((x.double() @ weight.double().T) + bias)
    want = naive.token_stats(z, targets.clamp(0, vocabulary - 1), LogitTransform(), -100)
    want[0, -1], want[4, -1], want[:, 0] = -torch.inf, 0, 0
    stats, sums = torch.full((5, n), torch.nan), rows.new_sums(n, x)
    codes = torch.empty(n, rows.code_columns(vocabulary), dtype=torch.int16)
    rows.project(x, weight, bias, targets, 0, transform, sums, True, codes)
    rows.finish(sums, targets, stats)
    torch.testing.assert_close(stats[:, 1:].double(), want[:, 1:], rtol=1e-6, atol=1e-5)
    assert not stats[:, 0].any()
    got, likely = decoded(codes, vocabulary), z - want[1, :, None] > -31
    likely[0] = False
    # besides half a step, float32 sums
    assert torch.where(likely, got - z, 0).abs().max() < 2.5e-4 + 1e-5
    # in any number of rows, on any number of threads, without codes: bit for bit the same
    again = rows.new_sums(n, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in rows.slices(n, 5):
            rows.project(x[part], weight, bias, targets[part], 0, transform, again[part], True, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, sums)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 2), (5, 70, 6), (7, 16, 1), (13, 130, 64), (100, 64, 2051), (256, 65, 1100)]
)
def test_native_matmul(sizes):
    if not native.multiplies(torch.bfloat16):
        pytest.skip("no compiler, or no bfloat16 on this processor")
    m, n, k = sizes
    for a_t, b_t, add in itertools.product((False, True), repeat=3):
        a = torch.randn(k, m).bfloat16().T if a_t else torch.randn(m, k).bfloat16()
        b = torch.randn(n, k).bfloat16().T if b_t else torch.randn(k, n).bfloat16()
        out = torch.full((m, n + 3), 3.0)
        assert native.multiply(a, b, out[:, :n], add)
        torch.testing.assert_close(
            out[:, :n].double(), a.double() @ b.double() + 3 * add, rtol=1e-5, atol=1e-4
        )
        assert (out[:, n:] == 3).all()


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_against_float64(dtype, transform, trained, row_passes):
    inputs, targets = problem(dtype, TRAINED[trained])
    reference, _ = problem(dtype, (False, False, False), seed=1, width=17)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact_reference = [x.double() for x in reference]
    upstream = torch.randn(3, len(targets), dtype=torch.float64)
    upstream[2] = 0
    results = []
    for op, policy, other, options in (
        (naive, exact, exact_reference, {}),
        (kl, inputs, reference, {"chunk_tokens": 8}),
    ):
        out = op.linear_token_kl(*policy, *other, targets, transform, -100, **options)
        wanted = [x for x in policy if x.requires_grad]
        results.append((out, torch.autograd.grad((out * upstream.to(out.dtype)).sum(), wanted)))
    (want, wanted), (got, grads) = results
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2.6e-3}[dtype]
    for g, w in zip(grads, wanted, strict=True):
        assert relative(g, w) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["frozen", "all"])
def test_skipped_blocks_of_the_vocabulary_keep_the_stated_bound(trained, dtype, row_passes, monkeypatch):
    found, likely_columns = [], heads.likely_columns
    monkeypatch.setattr(heads, "likely_columns", lambda *a: found.append(likely_columns(*a)) or found[-1])
    (hidden, weight, bias), targets = problem(dtype, TRAINED[trained], vocabulary=2000)
    with torch.no_grad():
        # all but some blocks of the vocabulary are unlikely, as after training
        bias[300:1600] -= 20
    targets = torch.where(targets == -100, -100, targets % 300)
    upstream, eps = torch.randn(len(targets)), 1e-6
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    for path in PATHS.values():
        if (path.scheme == "unscaled") != (trained == "frozen"):
            continue
        grads = []
        for skip_below in (0.0, eps):
            here = path._replace(skip_below=skip_below)
            out = chunked.linear_token_stats(
                hidden, weight, bias, targets, LogitTransform(), -100, lambda n, here=here: here
            )
            grads.append(torch.autograd.grad((out[0] * upstream).sum(), inputs))
        limit = eps * upstream.abs().max()
        kept = targets != -100
        for name, exact, got in zip(("hidden", "weight"), *grads, strict=False):
            error = (exact - got).float().norm(dim=-1)
            norms = (weight if name == "hidden" else hidden[kept]).float().norm(dim=-1).sum()
            rounding = torch.finfo(dtype).eps * exact.float().norm(dim=-1)
            assert (error <= limit * norms + rounding).all()
        # of every tile
        assert found
        assert all(columns is not None for columns in found)
        if trained == "all":
            assert (grads[1][1][512:1536] == 0).all()
            assert (grads[0][1][512:1536] != 0).any()
