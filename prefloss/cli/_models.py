"""The policy and its tokenizer: built in, loaded, or built from a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefloss.cli._errors import CliError
from prefloss.cli._settings import Settings
from prefloss.cli._task import Task
from prefloss.demo.model import CHAT_TEMPLATE, END, tiny_llama, train_tokenizer, word_tokenizer

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        model: Causal language model.
        tokenizer: Its tokenizer, with an end token.
        built_in: Whether it is the small built-in one.
        untrained: Whether its weights are random.
        facts: What to tell the user.
    """

    model: Any
    tokenizer: Any
    built_in: bool
    untrained: bool
    facts: tuple[str, ...]


def start(settings: Settings, task: Task) -> Start:
    """The model that the options name.

    Raises:
        CliError: If it cannot be loaded.
    """
    return _built_in(settings, task) if settings.model is None else _given(settings, task, settings.model)


def _built_in(settings: Settings, task: Task) -> Start:
    demo = settings.data is None
    tokenizer = word_tokenizer(_texts(task)) if demo else train_tokenizer(_texts(task), vocab_size=2048)
    # The world's sentences are short; other people's are not.
    size = {} if demo else {"hidden": 96}
    model = tiny_llama(tokenizer, max_length=max(512, settings.max_length), seed=settings.seed, **size)
    tokens = (
        f"{len(tokenizer)} words"
        if demo
        else f"{len(tokenizer)} tokens, byte-level BPE trained on the data's text"
    )
    fact = (
        f"built-in Llama, {model.num_parameters() / 1e6:.2f} million random weights; vocabulary of {tokens}"
    )
    return Start(model, tokenizer, built_in=True, untrained=True, facts=(fact,))


def _given(settings: Settings, task: Task, name: str) -> Start:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise CliError(
            f"--model: {name} is an adapter; merge it into its model first (peft: merge_and_unload)"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise CliError(
            f"--model: {name} is a folder without config.json; expected a saved model, or a configuration"
        )
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise CliError(f"--model: no such folder: {name}")
    untrained = path.is_dir() and not any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
    try:
        if untrained:
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                model = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(name), dtype=torch.float32
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CliError(f"--model: {name} cannot be loaded: {_first_line(error)}") from error
    weights = "random weights, for the folder holds a configuration only" if untrained else "its own weights"
    facts = [
        f"{name}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} million parameters, {weights}"
    ]
    tokenizer = _tokenizer(AutoTokenizer, name, task, model, untrained, facts)
    return Start(model, tokenizer, built_in=False, untrained=untrained, facts=tuple(facts))


def _tokenizer(loader: Any, name: str, task: Task, model: Any, untrained: bool, facts: list[str]) -> Any:
    vocabulary = model.get_input_embeddings().num_embeddings
    try:
        tokenizer = loader.from_pretrained(name)
    except (OSError, ValueError) as error:
        if not untrained:
            raise CliError(
                f"--model: {name} has no tokenizer that can be loaded: {_first_line(error)}"
            ) from error
        if vocabulary < 258:
            raise CliError(
                f"--model: {name} has no tokenizer, and a byte-level one needs a vocab_size of at least 258, "
                f"got {vocabulary}"
            ) from error
        tokenizer = train_tokenizer(_texts(task), vocab_size=min(vocabulary, 4096))
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        facts.append(
            f"no tokenizer there: trained a byte-level BPE of {len(tokenizer)} tokens on the text of the data"
        )
    if len(tokenizer) > vocabulary:
        raise CliError(f"--model: {name} embeds {vocabulary} tokens, but its tokenizer has {len(tokenizer)}")
    if tokenizer.eos_token is None:
        raise CliError(
            f"--model: the tokenizer of {name} has no end token (eos_token), which ends a completion"
        )
    if task.conversational and not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE.replace(END, str(tokenizer.eos_token))
        facts.append("the tokenizer has no chat template: messages are written as <|role|>, text, end token")
    return tokenizer


def _texts(task: Task) -> Iterator[str]:
    for row in (*task.spoken, *task.better, *task.worse):
        for text in (row["prompt"], row["completion"]):
            if isinstance(text, str):
                yield text
            else:
                yield from (f"<|{message['role']}|>\n{message['content']}" for message in text)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
