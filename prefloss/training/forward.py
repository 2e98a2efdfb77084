"""One forward pass of a causal model that ends in log-probs instead of logits.

The model runs with all its wrappers and inputs, so that the hooks of DDP, FSDP and DeepSpeed fire. Only the forward of
its output head is replaced: it scores the completion tokens and returns a row of known numbers instead of logits
(`probe`). What the model makes of them shows its transform of the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prefloss.arguments import check_ids, check_integer, instance, readable, refuse
from prefloss.kernels import vocab_parallel
from prefloss.logprobs import linear_token_logps
from prefloss.logratios import IGNORE_INDEX
from prefloss.training import probe
from prefloss.training.head import HeadSpec, text_config

# The transform that a model's output showed, where its configuration suggests another one.
_shown: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


class ModelLogps(NamedTuple):
    """Results of a scored forward pass.

    Attributes:
        logps: Log-prob of each target, [rows, T], nats, float32; 0 where ignored.
        aux_loss: Router loss of a mixture of experts, a scalar, or None.
    """

    logps: Tensor
    aux_loss: Tensor | None


def model_logps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> ModelLogps:
    """Log-probs of targets under a causal language model, without its logits.

    Args:
        model: A causal language model of transformers, possibly wrapped by DDP, FSDP, an engine or PEFT.
        inputs: Keyword arguments of the model: input ids, attention mask, position ids, images. No labels.
        targets: Token that each position predicts, [rows, T], `IGNORE_INDEX` where nothing is scored:
            `prefloss.logratios.completion_targets`.
        positions: Position that predicts each target, as an index into the flattened inputs; `targets` may then have
            any shape, and `positions` has the same. None: `targets` have the shape of the inputs.
        temperature: Divides the logits, > 0.
        impl: As for `prefloss.linear_token_logps`.

    Returns:
        Log-probs, and the router loss if the model gave one.

    Raises:
        TypeError: If the model's head is not supported; the message says why.
        ValueError: If targets and hidden states (or positions) differ in shape, labels are among the inputs, or a token
            id is beyond the model's vocabulary (on the CPU).
    """
    instance("model", model, nn.Module, "a causal language model of transformers")
    instance("inputs", inputs, Mapping, "keyword arguments of the model, such as input_ids")
    instance("targets", targets, Tensor, "the token that each position predicts, [rows, T]")
    if inputs.get("input_ids") is not None:
        check_ids("input_ids", inputs["input_ids"])
    if "labels" in inputs:
        raise ValueError(
            "inputs: got labels, expected them as targets: the model would compute a loss without logits"
        )
    policy = unwrapped(model)

    def scored(spec: HeadSpec) -> _Pass:
        def score(hidden: Tensor) -> Tensor:
            logps = _head_logps(spec, *_at_targets(hidden, targets, positions), temperature, impl)
            return logps if positions is None else _spread(logps, targets)

        return _forward(model, spec, inputs, score)

    spec = replace(HeadSpec.of(policy), **_shown.get(policy, {}))
    done = scored(spec)
    if not probe.explains(spec, done.logits, done.vocabulary):
        spec = probe.fitting(HeadSpec.readings(policy), done.logits, done.vocabulary, type(policy).__name__)
        _shown[policy] = {name: getattr(spec, name) for name in ("logit_scale", "softcap", "vocabulary")}
        done = scored(spec)
    return ModelLogps(_Through.apply(done.result, done.logits), done.aux_loss)


@torch.no_grad()
def head_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states that the output head reads, [B, T, H], without gradient.

    Args:
        model: As for `model_logps`.
        inputs: Keyword arguments of the model.

    Raises:
        TypeError: If the model's head is not supported.
    """
    return _forward(model, HeadSpec.of(unwrapped(model)), inputs, lambda hidden: hidden).result


class _Pass(NamedTuple):
    """A forward pass: what was made of the hidden states, and what the model made of the probe.

    Attributes:
        result: From the hidden states.
        logits: The model's output for the probe.
        vocabulary: Width of the probe.
        aux_loss: Router loss, or None.
    """

    result: Tensor
    logits: Tensor
    vocabulary: int
    aux_loss: Tensor | None


def _forward(
    model: nn.Module, spec: HeadSpec, inputs: Mapping[str, Any], read: Callable[[Tensor], Tensor]
) -> _Pass:
    """One forward pass with `read` in place of the head's forward."""
    name = type(unwrapped(model)).__name__
    results: list[Tensor] = []
    widths: list[int] = []

    def head(hidden: Any) -> Any:
        whole = hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden
        results.append(read(_of_tokens(whole, inputs, name)))
        widths.append(spec.rows)
        return probe.in_place_of_logits(spec, hidden, results[-1])

    # In a compiled model, each of these functions would be another program.
    disabled: Any = torch.compiler.disable(head) if "torch._dynamo" in sys.modules else head
    try:
        with _replaced_forward(spec.module, disabled):
            outputs = model(**inputs, use_cache=False) if _takes_cache(model) else model(**inputs)
    except IndexError:
        # Not before: some models take ids beyond their vocabulary, for images, say.
        _check_within(model, inputs.get("input_ids"))
        raise
    logits = getattr(outputs, "logits", None)
    if len(results) != 1 or logits is None:
        raise TypeError(
            f"model: got {name}, which called its output head {len(results)} times in a forward pass and gave "
            f"{'no logits' if logits is None else 'logits'}, expected one call and logits. {probe.INSTEAD}"
        )
    return _Pass(results[0], logits, widths[0], getattr(outputs, "aux_loss", None))


class _Through(torch.autograd.Function):
    """Identity that makes the model's output a parent of the log-probs in the graph.

    FSDP and DeepSpeed re-gather a module's weights when its output receives a gradient. The log-probs left the head by
    another path, so the backward pass must reach the output, with gradient 0, before the head.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor, logits: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.zeros((), dtype=ctx.dtype, device=grad.device).expand(ctx.shape)


def _head_logps(spec: HeadSpec, hidden: Tensor, targets: Tensor, temperature: float, impl: str) -> Tensor:
    """Log-probs of targets from hidden states, by the whole head or by this process's shard of it."""
    transform: dict[str, Any] = {
        "temperature": temperature,
        "logit_scale": spec.logit_scale,
        "softcap": spec.softcap,
    }
    shard = spec.shard()
    if shard is not None:
        weight, bias = shard
        return vocab_parallel.linear_token_logps(
            hidden.to(weight.dtype), weight, targets.to(hidden.device), bias=bias, **transform
        )
    weight, bias = spec.weight_and_bias()
    return linear_token_logps(
        hidden.to(weight.dtype),
        weight,
        targets.to(weight.device),
        bias=bias,
        impl=impl,  # type: ignore[arg-type]
        **transform,
    )


def _check_within(model: nn.Module, ids: Any) -> None:
    """ValueError if a token id is beyond the vocabulary of a model, or a row beyond its positions."""
    policy: Any = unwrapped(model)
    name = type(policy).__name__
    rows = getattr(policy.get_input_embeddings(), "num_embeddings", None)
    if not isinstance(ids, Tensor) or not ids.numel() or rows is None:
        return
    worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
    if not 0 <= worst < rows:
        raise ValueError(
            f"input_ids: got the token id {worst}, expected 0 to {rows - 1}, the vocabulary of {name}; the data was "
            "made with another tokenizer, or tokens were added: model.resize_token_embeddings(len(tokenizer))"
        )
    longest = getattr(text_config(policy), "max_position_embeddings", None)
    if longest is not None and ids.shape[-1] > longest:
        raise ValueError(
            f"input_ids: got rows of {ids.shape[-1]} tokens, expected at most the {longest} positions of {name}; cut "
            "longer rows with PreferenceCollator(max_length=)"
        )


def _of_tokens(hidden: Tensor, inputs: Mapping[str, Any], name: str) -> Tensor:
    """Hidden states of the input tokens: prompt-learning adapters prepend virtual ones."""
    ids = inputs.get("input_ids")
    if ids is None:
        return hidden
    own = hidden[:, -ids.shape[1] :] if hidden.ndim == 3 else hidden
    if own.shape[:-1] != ids.shape:
        raise TypeError(
            f"model: got {name}, whose output head reads hidden states of shape {list(hidden.shape)}, expected one per "
            f"token of {list(ids.shape)} tokens. {probe.INSTEAD}"
        )
    return own


def _at_targets(hidden: Tensor, targets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states that predict something, [..., H], and the tokens they predict, [...]."""
    if positions is None:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"targets: got shape {list(targets.shape)}, expected {list(hidden.shape[:-1])} as hidden states have"
            )
        return hidden, targets
    if positions.shape != targets.shape:
        raise ValueError(
            f"positions: got shape {list(positions.shape)}, expected {list(targets.shape)} as targets have"
        )
    check_integer("positions", positions, "indices of positions")
    scored = targets != IGNORE_INDEX
    if readable(positions):
        outside = (positions < 0) | (positions >= hidden.shape[:-1].numel())
        refuse("positions", positions, scored & outside, f"indices of {hidden.shape[:-1].numel()} positions")
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions[scored]), targets[scored]


def _spread(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of scored targets, [n], at their places in the shape of `targets`; 0 elsewhere."""
    return logps.new_zeros(targets.shape).masked_scatter(targets != IGNORE_INDEX, logps)


@contextmanager
def _replaced_forward(head: nn.Module, score: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run `score` as the head's forward; the head's hooks still fire."""
    own = head.__dict__.get("forward")
    head.forward = lambda hidden, *args, **kwargs: score(hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; on exit, each module is in the mode that it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _takes_cache(model: nn.Module) -> bool:
    return hasattr(getattr(unwrapped(model), "config", None), "use_cache")


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, an engine, a compiled module or PEFT."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
