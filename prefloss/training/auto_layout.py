"""Which layout of a batch takes the least time: an estimate from the lengths of its rows and the model's shape.

The time is that of the products of the layers, of attention, and of the calls that it takes. It is the same function on
every process, and several processes add up what their batches would take, so that all of them choose the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.training import attention, distributed
from prefloss.training.attention import Way
from prefloss.training.forward import unwrapped
from prefloss.training.head import text_config
from prefloss.training.layouts import bins
from prefloss.training.split_attention import alike
from prefloss.training.trial import Verdict

Layout = Literal["padded", "packed", "shared_prefix"]
LAYOUT_OF: dict[bool, Layout] = {False: "packed", True: "shared_prefix"}
"""Layouts without padding, by whether rows share prompts."""

# Another layout than padded rows must take at most this part of their estimated time.
_ENOUGH = 0.97


class Machine(NamedTuple):
    """How fast a device is, in training.

    Attributes:
        rate: Floating-point operations of products, 1/s; of one thread of a CPU.
        weights: Tokens whose products take as long as what a layer takes for no token.
        attention: Time of an operation of attention over that of one of a product.
        call: Time of one attention call of a layer beyond its operations, s.
        batch: Time to arrange a batch, s.
    """

    rate: float
    weights: int
    attention: float
    call: float
    batch: float


# Fitted to one thread of an EPYC, 12 to 8,192 tokens, 4 layers of H 256 and 2 of H 1,024, float32. A forecast for all
# accelerators.
_CPU, _OTHER = Machine(5e10, 64, 1.5, 1e-3, 4e-3), Machine(3e14, 256, 2.0, 2e-4, 4e-3)


class Work(NamedTuple):
    """What a layout of a batch computes.

    Attributes:
        tokens: Rows times their width.
        pairs: Pairs of a query and a key that attention computes, in each layer.
        calls: Attention calls of a layer.
    """

    tokens: int
    pairs: float
    calls: int


class Lengths(NamedTuple):
    """Lengths of the rows of a batch, tokens.

    Attributes:
        families: What rows share, and each of those rows as a whole.
    """

    families: list[tuple[int, list[int]]]

    @classmethod
    def of(cls, mask: Tensor, prompts: Tensor) -> Lengths:
        """From the attention mask of padded rows, [rows, T], and what they share (`layouts.PROMPTS`)."""
        rows = torch.cat([prompts, mask.sum(1, keepdim=True)], 1).tolist()
        by_number: dict[tuple[int, int], list[int]] = {}
        for number, shared, whole in rows:
            by_number.setdefault((number, shared), []).append(whole)
        return cls([(shared, wholes) for (_, shared), wholes in by_number.items()])

    @property
    def rows(self) -> list[int]:
        """Of every row."""
        return [whole for _, wholes in self.families for whole in wholes]

    def sequences(self, share: bool) -> list[int]:
        """Of every sequence, where rows share what they can or nothing."""
        if not share:
            return self.rows
        return [shared + sum(whole - shared for whole in wholes) for shared, wholes in self.families]


class Kernel(NamedTuple):
    """What an attention function computes.

    Attributes:
        skips: Nothing in padding, and nothing between the sequences of a row.
        causal: Half of the pairs of sequences without a prompt, and without padding.
        after_prompt: Half of those within a completion that follows a shared prompt.
    """

    skips: bool
    causal: bool
    after_prompt: bool

    @classmethod
    def of(cls, policy: nn.Module, device: torch.device) -> Kernel:
        """That of a model on a device."""
        name = attention.attention_of(text_config(policy))
        skips = name not in ("sdpa", "eager")
        return cls(skips, name != "eager", skips or (name == "sdpa" and device.type == "cpu"))


def padded_work(lengths: Lengths, kernel: Kernel) -> Work:
    """What padded rows compute."""
    rows = lengths.rows
    width = max(rows)
    if kernel.skips:
        pairs = sum(row * row for row in rows) / 2
    else:
        pairs = len(rows) * width * width / (2 if kernel.causal and min(rows) == width else 1)
    return Work(len(rows) * width, pairs, 1)


def packed_work(lengths: Lengths, share: bool, way: Way, kernel: Kernel) -> Work:
    """What rows without padding compute.

    Args:
        lengths: Of the rows.
        share: Whether each prompt is there once.
        way: How attention is kept within a sequence.
        kernel: Of the model.
    """
    if way.by == "split":
        return _split_work(lengths, share, kernel)
    sequences = lengths.sequences(share)
    if kernel.skips:
        return Work(sum(sequences), sum(length * length for length in sequences) / 2, 1)
    width = max(sequences)
    count, _ = bins(sequences, width)
    return Work(count * width, count * width * width, 1)


def _split_work(lengths: Lengths, share: bool, kernel: Kernel) -> Work:
    alone, blocks = [], []
    for shared, wholes in lengths.families:
        if share and len(wholes) > 1:
            alone.append(shared)
            blocks.append((shared, [whole - shared for whole in wholes]))
        else:
            alone += wholes
    pairs, calls = 0.0, 0
    for before, own in ((0, alone), *blocks):
        part = 0.5 if (kernel.after_prompt if before else kernel.causal) else 1.0
        for call in alike([range(length) for length in own if length]):
            longest = len(call[0])
            pairs += len(call) * longest * (part * longest + before)
            calls += 1
    return Work(sum(lengths.sequences(share)), pairs, calls)


class Shape(NamedTuple):
    """Sizes of a model's layers.

    Attributes:
        layers: Number of layers.
        token: Floating-point operations of the products of a layer, for each token, forward.
        pair: Those of attention, for each pair of a query and a key, forward.
    """

    layers: int
    token: float
    pair: float

    @classmethod
    def of(cls, policy: nn.Module) -> Shape:
        """From a model's configuration; what it does not name is as in most models."""
        config = text_config(policy)

        def size(name: str, otherwise: int) -> int:
            value = getattr(config, name, None)
            return value if isinstance(value, int) and value > 0 else otherwise

        width = size("hidden_size", 1024)
        heads = size("num_attention_heads", max(1, width // 64))
        head = size("head_dim", max(1, width // heads))
        queries, keys = heads * head, size("num_key_value_heads", heads) * head
        inner = size("moe_intermediate_size", size("intermediate_size", 4 * width)) * size(
            "num_experts_per_tok", 1
        )
        products = 2 * width * (queries + keys) + 3 * width * inner
        return cls(size("num_hidden_layers", 1), 2.0 * products, 4.0 * queries)


def _seconds(work: Work, shape: Shape, device: torch.device, arranged: bool) -> float:
    """Estimated time of forward and backward pass of the layers."""
    machine = _CPU if device.type == "cpu" else _OTHER
    rate = machine.rate * (torch.get_num_threads() if device.type == "cpu" else 1)
    # The backward pass takes two products for each one; attention computes its scores again.
    operations = (
        3 * shape.token * (work.tokens + machine.weights) + 3.5 * shape.pair * work.pairs * machine.attention
    )
    layers = shape.layers * (operations / rate + machine.call * work.calls)
    return layers + (machine.batch if arranged else 0.0)


class Choice(NamedTuple):
    """A layout, and why.

    Attributes:
        layout: The one chosen.
        tokens: Tokens that it computes over those of padded rows.
        time: Its estimated time over that of padded rows.
        reason: What speaks for it, or against the others.
    """

    layout: Layout
    tokens: float
    time: float
    reason: str

    def __str__(self) -> str:
        """One line."""
        return f"layout: {self.layout}, {self.reason}"


def choose(
    model: nn.Module, lengths: Lengths, device: torch.device, tried: Callable[[bool], Verdict]
) -> Choice:
    """The layout of the least estimated time; every process must call this, and all get the same one.

    Args:
        model: A causal language model, wrapped as it is trained.
        lengths: Of this process's batch.
        device: Of the batch.
        tried: Whether the model takes packed batches, by whether they share prompts. Called only where that may gain.
    """
    if _compiled(model):
        return Choice(
            "padded", 1.0, 1.0, "because the model is compiled: other layouts would cut it at each layer"
        )
    policy = unwrapped(model)
    kernel, shape = Kernel.of(policy, device), Shape.of(policy)
    padded = padded_work(lengths, kernel)

    def compared(share: bool, way: Way) -> tuple[float, float]:
        """Time and tokens over those of padded rows, on all processes."""
        work = packed_work(lengths, share, way, kernel)
        values = [work.tokens, padded.tokens]
        values += [_seconds(work, shape, device, True), _seconds(padded, shape, device, False)]
        on_device = torch.tensor(values, device=device if distributed.size() > 1 else None)
        tokens, all_tokens, time, all_time = distributed.all_sum(on_device).tolist()
        return time / all_time, tokens / all_tokens

    candidates = []
    against = []
    for share in (False, True):
        refusal = attention.unsupported(policy, share)
        if refusal is None:
            way = attention.ways(policy, share)[0]
            candidates.append((compared(share, way), share, way))
        else:
            against.append(f"{LAYOUT_OF[share]} is not possible: {refusal}")
    for (time, tokens), share, way in sorted(candidates):
        layout = LAYOUT_OF[share]
        if time <= _ENOUGH:
            verdict = tried(share)
            if verdict.way is None:
                against.append(f"{layout} is not possible: {verdict.reason}")
                continue
            if verdict.way != way:
                time, tokens = compared(share, verdict.way)
        if time <= _ENOUGH:
            saved = f"{tokens:.2f} of the tokens of padded rows in an estimated {time:.2f} of their time"
            return Choice(layout, tokens, time, f"which computes {saved}")
        against.append(f"{layout} would take an estimated {time:.2f} of the time")
    return Choice("padded", 1.0, 1.0, f"because {'; '.join(against)}")


def _compiled(model: nn.Module) -> bool:
    """Whether torch.compile compiles the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
