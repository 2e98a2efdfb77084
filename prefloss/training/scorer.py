"""A trained model as a reward model: the reward that its loss implies, for any completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloss.arguments import flag, function, instance, integer, shown
from prefloss.data.examples import read_example
from prefloss.data.table import ReferenceTable, as_scored
from prefloss.data.tokens import Encoded, Text, encode, encode_prompt, pad_id
from prefloss.logratios import LogRatios, PerToken
from prefloss.registry import Loss, as_loss
from prefloss.training.batch import Rows
from prefloss.training.forward import evaluating, unwrapped
from prefloss.training.head import HeadSpec, text_config
from prefloss.training.reference import Reference
from prefloss.training.score import batch_logps
from prefloss.training.sharing import token_logps
from prefloss.training.table_lookup import find

# What a reward may need: forward passes give it.
_COMPUTED = frozenset(("reference", "tokens", "per_token"))


@dataclass(frozen=True)
class Scores:
    """Rewards of N completions, in the order in which they were given; on the CPU, sums in float64.

    Attributes:
        reward: Reward of each completion in the sense of the loss, [N].
        logp: Its log-prob under the policy, a sum over tokens, [N], nats.
        ref_logp: The same under the reference, [N], nats; None without a reference.
        tokens: Number of tokens scored, [N].
        truncated: True where its end was cut off, [N].
        token_rewards: Reward of each token, [T] per completion; None unless asked for. They add up to the reward.
        token_ids: Ids of these tokens, [T] per completion; None unless asked for.
    """

    reward: Tensor
    logp: Tensor
    ref_logp: Tensor | None
    tokens: Tensor
    truncated: Tensor
    token_rewards: list[Tensor] | None = None
    token_ids: list[Tensor] | None = None

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.reward)


class Best(NamedTuple):
    """The best of several samples for each prompt.

    Attributes:
        completions: The sample with the highest reward, for each prompt; the first of several.
        rewards: Its reward, [prompts].
        samples: All samples of each prompt.
        sample_rewards: Their rewards, [prompts, n].
    """

    completions: list[Text]
    rewards: Tensor
    samples: list[list[Text]]
    sample_rewards: Tensor


class Scorer:
    """The reward that a policy implies, in the sense of the loss that it was trained with.

    A reward means something only beside another one of the same prompt: each prompt adds a constant of its own, which
    nobody knows.

    Args:
        model: The policy: a causal language model of transformers, or one with PEFT adapters, on its device.
        tokenizer: For text and messages; None if only `encoded` is used.
        reference: What the policy started from: a model, "adapter" (the policy with its adapters switched off), a
            `ReferenceTable`, or a `Reference`. None only for a loss whose reward reads none.
        loss: The loss of the training with its hyperparameters, as a string or a `Loss`.
        max_length: Tokens of prompt and completion together, at most, as in training; by default as many as the model
            has positions.
        allow_truncation: Cut the end off longer ones, as training does, and mark them. False: an error.
        batch_tokens: Tokens of a forward pass, at most.

    Raises:
        ValueError: If the loss implies no reward of a completion, its reward needs a reference and there is none, or
            the reference is part of the policy.
        TypeError: If an argument is of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        reference: Any = None,
        *,
        loss: str | Loss = "dpo(beta=0.1)",
        max_length: int | None = None,
        allow_truncation: bool = False,
        batch_tokens: int = 4096,
    ) -> None:
        self.model = instance("model", model, nn.Module, "a causal language model of transformers")
        HeadSpec.of(unwrapped(model))  # Raises for a model without a head that can be read.
        self.tokenizer = tokenizer
        if tokenizer is not None:
            function("tokenizer", tokenizer, "a tokenizer, or None for token ids")
        self.loss = as_loss(loss, {})
        self.reward = self.loss.reward
        self.reference = _reference(reference, self.loss, unwrapped(model))
        self.max_length = None if max_length is None else integer("max_length", max_length, 2)
        self.allow_truncation = flag("allow_truncation", allow_truncation)
        self.batch_tokens = integer("batch_tokens", batch_tokens, 1)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Any], *, per_token: bool = False
    ) -> Scores:
        """Rewards of completions.

        Args:
            prompts: Plain text, or lists of messages.
            completions: For each prompt a completion in the same form, or a list of several completions. They are
                tokenised as in training: plain text gets an end token, messages go through the chat template.
            per_token: Also the reward of each token.

        Returns:
            The scores of all completions, flat, in order.

        Raises:
            TypeError: If the lists hold something else.
            ValueError: If they differ in length, a text is empty, or a row is too long.
            FloatingPointError: If a log-prob is not finite.
        """
        names, rows = [], list[Encoded]()
        for i, prompt, sides in _paired(prompts, completions):
            encoded = _encoded(self.tokenizer, i, prompt, [completions[i]] if sides is None else sides)
            names += [
                f"completions[{i}]" if sides is None else f"completions[{i}][{j}]"
                for j in range(len(encoded))
            ]
            rows += encoded
        return self.encoded(rows, names=names, per_token=per_token)

    def encoded(
        self, rows: Sequence[Encoded], *, names: Sequence[str] | None = None, per_token: bool = False
    ) -> Scores:
        """Rewards of completions that are token ids.

        Args:
            rows: Token ids of prompt and completion, as `prefloss.data.tokens.encode` gives.
            names: What error messages call each row.
            per_token: Also the reward of each token.

        Raises:
            ValueError: If a row is too long, or none of its tokens is left to score.
            TypeError: If a row is something else.
            FloatingPointError: If a log-prob is not finite.
        """
        flag("per_token", per_token)
        keep = per_token or "per_token" in self.reward.needs
        if keep and self.reference.kind == "table" and "reference" in self.reward.needs:
            raise ValueError(
                f"reference: got {self.reference!r}, which holds sums; expected a model or 'adapter' for rewards of "
                "tokens"
            )
        names = [f"rows[{i}]" for i in range(len(rows))] if names is None else names
        for name, row in zip(names, rows, strict=True):
            _check_ids(name, row)
        scored, truncated = self._cut(rows, names)
        policy, reference = self._logps(scored, names)
        ratios = _ratios(scored, policy, reference, keep)
        scores = Scores(self.reward(ratios), ratios.policy, ratios.reference, _counts(scored), truncated)
        if not per_token:
            return scores
        values = self.reward.of_tokens(ratios)
        return replace(
            scores,
            token_rewards=[value[:count] for value, count in zip(values, scores.tokens, strict=True)],
            token_ids=[torch.tensor(completion) for _, completion in scored],
        )

    def reward_func(self, name: str = "implicit_reward") -> Callable[..., list[float]]:
        """The rewards as a reward function of TRL's GRPO, RLOO and online DPO trainers.

        Called with `prompts` and `completions`, texts or messages; other columns are not read. A sample that is empty
        counts with its end token. Texts are tokenised anew, so the policy in training may have another tokenizer.

        Args:
            name: Its `__name__`, under which TRL logs it.
        """
        instance("name", name, str, "a name to log under")

        def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
            _check_beside(prompts, completions)
            return self._of_samples(prompts, [[completion] for completion in completions]).tolist()

        reward.__name__ = name
        return reward

    def best_of(self, prompts: Sequence[Text], n: int, **generation: Any) -> Best:
        """Sample n completions of each prompt from the policy, and pick the one with the highest reward.

        Args:
            prompts: Plain text, or lists of messages.
            n: Samples of each prompt.
            **generation: For the model's `generate`, such as `max_new_tokens=64` or `temperature=0.7`.
        """
        integer("n", n, 1)
        if self.tokenizer is None:
            raise TypeError("tokenizer: got None, expected one to write and read text")
        if "num_return_sequences" in generation or (n > 1 and not generation.get("do_sample", True)):
            raise ValueError(
                f"n: got {n} with {generation}, expected sampling, and n alone as the number of samples"
            )
        samples = [self._sampled(prompt, n, generation) for prompt in _listed("prompts", prompts)]
        rewards = self._of_samples(prompts, samples).reshape(-1, n)
        best = rewards.argmax(-1).tolist()
        picked = [texts[i] for texts, i in zip(samples, best, strict=True)]
        return Best(picked, rewards.amax(-1), samples, rewards)

    @torch.no_grad()
    def _sampled(self, prompt: Text, n: int, generation: dict[str, Any]) -> list[Text]:
        ids = torch.tensor(
            [encode_prompt(self.tokenizer, prompt)], device=next(self.model.parameters()).device
        )
        own = {"do_sample": True, "num_return_sequences": n, "pad_token_id": pad_id(self.tokenizer)}
        with evaluating(self.model):
            made = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **own | generation)  # type: ignore[operator]
        texts = self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        if isinstance(prompt, str):
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _of_samples(self, prompts: Sequence[Text], samples: Sequence[list[Text]]) -> Tensor:
        """Rewards of samples, [N]; one without text has its end token."""
        names, rows = [], list[Encoded]()
        for i, (prompt, texts) in enumerate(zip(prompts, samples, strict=True)):
            rows += [
                row if row[1] else encode(self.tokenizer, prompt, text)
                for text, row in zip(
                    texts, _encoded(self.tokenizer, i, prompt, texts, empty=True), strict=True
                )
            ]
            names += [f"a sample of prompts[{i}]"] * len(texts)
        return self.encoded(rows, names=names).reward

    def _cut(self, rows: Sequence[Encoded], names: Sequence[str]) -> tuple[list[Encoded], Tensor]:
        """Prompt and scored completion of each row, and whether it was cut."""
        limit = self.max_length or getattr(
            text_config(unwrapped(self.model)), "max_position_embeddings", None
        )
        scored = [as_scored(row, limit) for row in rows]
        cut = [limit is not None and len(prompt) + len(completion) > limit for prompt, completion in rows]
        for name, (prompt, completion), (_, left), too_long in zip(names, rows, scored, cut, strict=True):
            lengths = f"{len(prompt)} tokens of prompt and {len(completion)} of completion"
            if too_long and not self.allow_truncation:
                raise ValueError(
                    f"{name}: got {lengths}, expected at most {limit} together; set max_length=, or "
                    "allow_truncation=True to cut the end off, as training does"
                )
            if not left:
                most = f" within the first {limit} tokens" if too_long else ""
                raise ValueError(f"{name}: got {lengths}, expected at least one token to score{most}")
        return scored, torch.tensor(cut, dtype=torch.bool)

    def _logps(
        self, rows: list[Encoded], names: Sequence[str]
    ) -> tuple[list[Tensor], list[Tensor] | Tensor | None]:
        """Log-probs of each row's tokens under the policy, and under the reference; of a table, their sums."""

        def scored(whose: str, compute: Callable[[Rows], Tensor]) -> list[Tensor]:
            device = next(self.model.parameters()).device
            return token_logps(rows, lambda batch: compute(batch.to(device)), self.batch_tokens, names, whose)

        reference = self.reference
        with torch.no_grad(), evaluating(self.model):
            policy = scored("the policy", lambda batch: batch_logps(self.model, batch).logps)
            if reference.kind == "none":
                return policy, None
            if reference.kind == "table":
                return policy, torch.tensor(
                    find(reference.value, rows, names, self.tokenizer), dtype=torch.float64
                )
            with evaluating(reference.value if reference.kind == "model" else self.model):
                return policy, scored(
                    "the reference", lambda batch: reference.computed_logps(self.model, batch)
                )

    def __repr__(self) -> str:
        """Model, loss and reference."""
        return f"Scorer({type(self.model).__name__}, loss={self.loss!r}, reference={self.reference!r})"


def _reference(value: Any, loss: Loss, policy: nn.Module) -> Reference:
    """The reference, checked against what the reward needs and against the policy."""
    unknown = sorted(loss.reward.needs - _COMPUTED)
    if unknown:
        raise ValueError(
            f"loss: got {loss.name}, whose reward needs {unknown[0]}, which a Scorer does not compute"
        )
    if isinstance(value, ReferenceTable):
        value = Reference("table", value)
    if isinstance(value, str) and value == "adapter":
        value = Reference.adapter_off()
    reference = Reference.of(value)
    if reference.kind == "cached":
        raise ValueError(f"reference: got {reference!r}, expected a model, 'adapter' or a ReferenceTable")
    if reference.kind == "none" and "reference" in loss.reward.needs:
        raise ValueError(
            f"reference: got None with {loss.name}, whose reward reads log-ratios; expected the model that training "
            "started from, 'adapter', or a ReferenceTable"
        )
    reference.check(policy)
    return reference


def _paired(prompts: Any, completions: Any) -> Iterator[tuple[int, Text, list[Text] | None]]:
    """Each prompt with its completions; None for a single one."""
    _check_beside(prompts, completions)
    for i, (prompt, side) in enumerate(zip(prompts, completions, strict=True)):
        several = isinstance(side, list | tuple) and not (side and isinstance(side[0], dict))
        yield i, prompt, list(side) if several else None


def _check_beside(prompts: Any, completions: Any) -> None:
    count, expected = len(_listed("completions", completions)), len(_listed("prompts", prompts))
    if count != expected:
        raise ValueError(f"completions: got {count}, expected one for each of {expected} prompts")


def _check_ids(name: str, row: Any) -> None:
    lists = row if isinstance(row, tuple | list) and len(row) == 2 else (None,)
    if not all(isinstance(ids, list) and set(map(type, ids)) <= {int} for ids in lists):
        raise TypeError(f"{name}: got {shown(row)}, expected two lists of token ids: prompt and completion")


def _listed(name: str, value: Any) -> Any:
    if isinstance(value, str | bytes | dict) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: got {shown(value)}, expected a list of texts or of message lists")
    if value and isinstance(value[0], dict):
        raise TypeError(f"{name}: got one list of messages, expected a list of such lists")
    return value


def _encoded(
    tokenizer: Any, place: int, prompt: Text, sides: list[Text], *, empty: bool = False
) -> list[Encoded]:
    """Token ids, as training makes them."""
    if tokenizer is None:
        raise TypeError("tokenizer: got None, expected one for text; or score token ids with Scorer.encoded")
    row = {"prompt": prompt, "completions": sides, "scores": [0.0] * len(sides)}
    return read_example(place, row, tokenizer, place=f"prompts[{place}]", allow_empty=empty).rows


def _ratios(
    rows: list[Encoded], policy: list[Tensor], reference: list[Tensor] | Tensor | None, keep: bool
) -> LogRatios:
    """Sums of the log-probs, [N], and with `keep` their tokens, [N, T]."""
    counts = _counts(rows)
    sums = reference if isinstance(reference, Tensor) else _sums(reference)
    if not keep:
        return LogRatios(_sums(policy), sums, counts)
    tokens = reference if isinstance(reference, list) else None
    mask = torch.arange(int(counts.max()) if rows else 0) < counts.unsqueeze(-1)
    return LogRatios(
        _sums(policy), sums, counts, PerToken(_padded(policy, mask), _padded(tokens, mask), mask)
    )


def _counts(rows: list[Encoded]) -> Tensor:
    return torch.tensor([len(completion) for _, completion in rows], dtype=torch.long)


def _sums(values: list[Tensor] | None) -> Any:
    return (
        None
        if values is None
        else torch.tensor([float(value.sum()) for value in values], dtype=torch.float64)
    )


def _padded(values: list[Tensor] | None, mask: Tensor) -> Any:
    if values is None:
        return None
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(
        mask, torch.cat(values or [torch.zeros(0).double()])
    )
