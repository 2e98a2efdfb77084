"""Launchers of the Triton kernels: the ops from logits, and the passes over one tile of logits.

`token_forward` and `token_backward` have the arguments and results of their namesakes in `chunked`, for half precision
and float32; `chunk_tokens` has no effect here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from ctypes import c_float
from math import e, log2
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from prefloss.kernels.naive import LogitTransform
from prefloss.kernels.softmax import coefficients
from prefloss.kernels.tiles import TILE_COLUMNS, TileSpec
from prefloss.kernels.triton import gather, kernels


class Launch(NamedTuple):
    """How many logits a program works on at a time, and on how many warps."""

    block: int
    warps: int


# 32 logits per thread (where a warp has 32): four loads of 16 bytes each in bfloat16, at 32 registers
FORWARD = Launch(4096, 4)
BACKWARD = Launch(4096, 4)
# For fewer rows than an accelerator runs programs of FORWARD at a time, about 16 on each of 132 multiprocessors; then
# some 500 programs fill it.
FEW_ROWS = 1024
FORWARD_FEW = Launch(16384, 16)
# a whole row of a tile, so that it is read once
TILE = Launch(TILE_COLUMNS, 16)

# Bits by which the logsumexp of a row may rise above the reference of its numerators before it gets a new one.
_HEADROOM, _FLOAT16_HEADROOM = 64.0, 4.0


class Numerators(NamedTuple):
    """Where `fold_tile` writes softmax numerators, [m, w], and the references of rows before and after it, [m]."""

    values: Tensor | None
    before: Tensor | None
    after: Tensor | None
    sloped: bool


class Kept(NamedTuple):
    """Numerators of rows over a whole vocabulary, [spans, m, width], and whether p - 1 of the target is to be added."""

    tiles: Tensor | None
    width: int
    vocabulary: int
    target: bool


def token_forward(
    logits: Tensor, targets: Tensor, transform: LogitTransform, chunk_tokens: int, outputs: int
) -> Tensor:
    """Statistics [2 or 5, N] of logits [..., V] and N targets, negative at those to leave out.

    A target of V, as in another shard of the vocabulary, has log-prob -inf and no gradient of its own. One above V is a
    mistake that a device cannot report without being waited for: its log-prob is NaN.
    """
    x, vocabulary = _rows(logits), logits.shape[-1]
    inner, outer, _ = factors(transform)
    stats = torch.empty(max(2, outputs), len(targets), dtype=torch.float32, device=logits.device)
    block, warps = _launch(FORWARD_FEW if len(targets) < FEW_ROWS else FORWARD, vocabulary)
    _run(
        gather.gather_fwd_kernel, len(targets), warps, x.data, targets, stats, *x.strides, stats.stride(0),
        x.per_batch, vocabulary, inner, *_base_2(outer), SOFTCAP=transform.softcap is not None,
        STATS=outputs > 2, BLOCK=block, LANE=_lane(logits),
    )  # fmt: skip
    return stats


def token_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    transform: LogitTransform,
    chunk_tokens: int,
    over_logits: bool = False,
) -> Tensor:
    """Gradient of logits [..., V]; `over_logits` writes it over them unless some of them share memory."""
    x, vocabulary = _rows(logits), logits.shape[-1]
    inner, outer, slope = factors(transform)
    shared = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    over_logits = over_logits and not shared and x.data.data_ptr() == logits.data_ptr()
    if over_logits:
        d_logits, d_strides = logits.detach(), x.strides
    else:
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        d_strides = (x.per_batch * vocabulary, vocabulary)
    block, warps = _launch(BACKWARD, vocabulary)
    _run(
        gather.gather_bwd_kernel, len(targets) * triton.cdiv(vocabulary, block), warps, x.data, targets, stats,
        coefficients(grad, stats), d_logits, *x.strides, *d_strides, stats.stride(0), x.per_batch, vocabulary, inner,
        outer, slope, SOFTCAP=transform.softcap is not None, PLAIN=len(grad) == 1,
        ALIKE=_alike(x.data, x.strides, d_logits, d_strides), BLOCK=block, LANE=_lane(logits),
    )  # fmt: skip
    if over_logits:
        # autograd then raises for any op that saved the logits for its own backward pass
        torch.autograd.graph.increment_version(logits)
    return d_logits


def fold_tile(
    logits: Tensor, bias: Tensor | None, spec: TileSpec, sums: Tensor, more: bool, out: Numerators | None
) -> None:
    """Add raw logits [m, w], w at most `TILE.block`, to the sums of their rows, [5, m]."""
    inner, outer, _ = factors(spec.transform)
    block, warps = _launch(TILE, logits.shape[1])
    numerators, before, after, sloped = out or Numerators(None, None, None, False)
    float16 = numerators is not None and numerators.dtype == torch.float16
    headroom = _FLOAT16_HEADROOM if float16 else _HEADROOM
    bias = None if bias is None else bias.contiguous()
    _run(
        kernels.tile_stats_kernel, len(logits), warps, logits, bias, spec.targets, sums, numerators, before, after,
        logits.stride(0), 0 if numerators is None else numerators.stride(0), sums.stride(0), spec.first,
        logits.shape[1], inner, outer * log2(e), headroom, SOFTCAP=spec.transform.softcap is not None,
        BIAS=bias is not None, STATS=more, KEEP=numerators is not None, SLOPED=sloped, BLOCK=block,
    )  # fmt: skip


def finish_tiles(
    sums: Tensor, spec: TileSpec, stats: Tensor, references: Tensor, scales: Tensor | None, kept: Kept | None
) -> None:
    """Sums of rows whose tiles have all been added, [5, m] -> statistics [2 or 5, m].

    `scales`, [m], are written if given. `references`: [spans + 1, m], as `fold_tile` left them.
    """
    _, outer, _ = factors(spec.transform)
    tiles, width, vocabulary, target = kept or Kept(None, 1, 1, False)
    block, warps = _launch(FORWARD, width)
    _run(
        kernels.tile_finish_kernel, sums.shape[1], 1 if tiles is None else warps, sums, spec.targets, stats,
        references, scales, tiles, sums.stride(0), stats.stride(0), references.stride(0),
        0 if scales is None else scales.stride(0), 0 if tiles is None else tiles.stride(1),
        0 if tiles is None else tiles.stride(0), len(references) - 1, width, vocabulary, outer, outer * log2(e),
        SOFTCAP=spec.transform.softcap is not None, STATS=len(stats) > 2, SCALE=scales is not None,
        KEEP=tiles is not None, TARGET=target, BLOCK=block,
    )  # fmt: skip


def scale_rows(rows: Tensor, by: Tensor) -> None:
    """Multiply rows [m, H] by a number each; those by 1 are not touched."""
    block, warps = _launch(FORWARD, rows.shape[1])
    _run(
        kernels.scale_rows_kernel, len(rows), warps, rows, by, None, None, None, rows.stride(0), 0, 0, rows.shape[1],
        TARGET=False, BLOCK=block,
    )  # fmt: skip


def scale_and_add_targets(rows: Tensor, by: Tensor, weight: Tensor, targets: Tensor, rates: Tensor) -> None:
    """The same, and add the rows of the weight [V, H] of the targets, [m], times `rates`; nothing for others."""
    block, warps = _launch(FORWARD, rows.shape[1])
    _run(
        kernels.scale_rows_kernel, len(rows), warps, rows, by, weight, targets, rates, rows.stride(0),
        weight.stride(0), len(weight), rows.shape[1], TARGET=True, BLOCK=block,
    )  # fmt: skip


def differentiate_tile(
    tile: Tensor,
    out: Tensor,
    bias: Tensor | None,
    spec: TileSpec,
    stats: Tensor,
    rates: Tensor,
    plain: bool,
    scales: Tensor | None,
) -> None:
    """Raw logits [m, w] -> their gradient, in `out`, by `coefficients` in `rates`.

    With `scales`, [m], the tile has kept numerators and they are their scale.
    """
    inner, outer, slope = factors(spec.transform)
    block, warps = _launch(BACKWARD, tile.shape[1])
    bias = None if bias is None else bias.contiguous()
    _run(
        kernels.tile_grad_kernel, len(tile) * triton.cdiv(tile.shape[1], block), warps, tile, bias, spec.targets,
        stats, rates, scales, out, tile.stride(0), out.stride(0), stats.stride(0),
        0 if scales is None else scales.stride(0), spec.first, tile.shape[1], inner, outer, slope,
        SOFTCAP=spec.transform.softcap is not None, BIAS=bias is not None and scales is None, PLAIN=plain,
        KEPT=scales is not None, BLOCK=block,
    )  # fmt: skip


class _Rows(NamedTuple):
    """[..., V] as rows: `per_batch` of them strides[1] apart, the next so many strides[0] away; elements adjacent."""

    data: Tensor
    strides: tuple[int, int]
    per_batch: int


def _rows(x: Tensor) -> _Rows:
    if x.stride(-1) != 1:
        x = x.contiguous()
    try:
        matrix = x.view(-1, x.shape[-1])
    except RuntimeError:
        if x.dim() == 3:
            return _Rows(x, (x.stride(0), x.stride(1)), x.shape[1])
        matrix = x.reshape(-1, x.shape[-1])
    return _Rows(matrix, (0, matrix.stride(0)), max(1, len(matrix)))


def _alike(a: Tensor, a_strides: tuple[int, int], b: Tensor, b_strides: tuple[int, int]) -> bool:
    """Whether the same rows of two tensors of a dtype begin in the same place among 16 bytes."""
    bytes_apart = [(x - y) * a.element_size() for x, y in zip(a_strides, b_strides, strict=True)]
    return not any(apart % 16 for apart in (a.data_ptr() - b.data_ptr(), *bytes_apart))


def factors(transform: LogitTransform) -> tuple[float, float, float]:
    """Inner, outer, and the slope of z at x = 0; see `kernels`."""
    if transform.softcap is None:
        return 1.0, transform.factor, transform.factor
    inner, outer = transform.logit_scale / transform.softcap, transform.softcap / transform.temperature
    return inner, outer, transform.factor


def _base_2(outer: float) -> tuple[float, float, float]:
    """The factor that makes nats exponents of 2, and the one back, in two parts.

    Back to what float32 makes of `outer`, which the backward pass multiplies by.
    """
    outer2 = c_float(outer * log2(e)).value
    nats = c_float(outer).value / outer2
    return outer2, c_float(nats).value, nats - c_float(nats).value


def _launch(launch: Launch, columns: int) -> Launch:
    """A smaller block for few columns, in powers of two, so that few variants are compiled."""
    block = min(launch.block, max(128, triton.next_power_of_2(columns)))
    return Launch(block, max(1, min(launch.warps, block // 256)))


def _lane(x: Tensor) -> int:
    """How many logits one thread loads at a time: 16 bytes, the widest load."""
    return 16 // x.element_size()


def _run(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    device = arguments[0].device
    # Triton launches on the current device, which may not be that of the tensors
    context: AbstractContextManager[object] = nullcontext()
    if device.type != "cpu":
        context = torch.xpu.device(device) if device.type == "xpu" else torch.cuda.device(device)
    if programs:
        with context:
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)
