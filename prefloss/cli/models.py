"""Models and tokenizers: built in, loaded, or built from a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefloss.cli.console import CliError
from prefloss.cli.options import TrainOptions
from prefloss.cli.task import Task
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
        facts: Sentences about it.
    """

    model: Any
    tokenizer: Any
    built_in: bool
    untrained: bool
    facts: tuple[str, ...]


def start(options: TrainOptions, task: Task) -> Start:
    """The model that the options name.

    Raises:
        CliError: If it cannot be loaded.
    """
    return _built_in(options, task) if options.model is None else _saved(options, task, options.model)


def check_folder(name: str, adapter_advice: str) -> None:
    """Refuse a model's name that is a missing folder, or the folder of an adapter.

    Raises:
        CliError: If it is.
    """
    path = Path(name)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise CliError(f"--model: {name} is an adapter; {adapter_advice}")
    if not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise CliError(f"--model: no such folder: {name}")


def first_line(error: Exception) -> str:
    """The first line of another package's error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _built_in(options: TrainOptions, task: Task) -> Start:
    if options.data is None:
        tokenizer = word_tokenizer(_texts(task))
        vocabulary, hidden = f"{len(tokenizer)} words", 64
    else:
        tokenizer = train_tokenizer(_texts(task), vocab_size=2048)
        # The world's sentences are short; other texts need a wider model.
        vocabulary, hidden = f"{len(tokenizer)} tokens, byte-level BPE trained on the data's text", 96
    length = max(512, options.max_length)
    model = tiny_llama(tokenizer, hidden=hidden, max_length=length, seed=options.seed)
    size = f"{model.num_parameters() / 1e6:.2f} million random weights"
    facts = (f"built-in Llama, {size}; vocabulary of {vocabulary}",)
    return Start(model, tokenizer, built_in=True, untrained=True, facts=facts)


def _saved(options: TrainOptions, task: Task, name: str) -> Start:
    """A model with its weights, or with random ones if the folder holds a configuration only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(name)
    check_folder(name, "merge it into its model first (peft: merge_and_unload)")
    if path.is_dir() and not (path / "config.json").exists():
        raise CliError(
            f"--model: {name} is a folder without config.json; expected a saved model, or a configuration"
        )
    untrained = path.is_dir() and not any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
    try:
        if untrained:
            with torch.random.fork_rng():
                torch.manual_seed(options.seed)
                config = AutoConfig.from_pretrained(name)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CliError(f"--model: {name} cannot be loaded: {first_line(error)}") from error
    weights = "random weights, for the folder holds a configuration only" if untrained else "its own weights"
    size = f"{model.num_parameters() / 1e6:.1f} million parameters"
    tokenizer, *facts = _tokenizer(name, task, model, untrained)
    facts = (f"{name}: {type(model).__name__}, {size}, {weights}", *facts)
    return Start(model, tokenizer, built_in=False, untrained=untrained, facts=facts)


def _tokenizer(name: str, task: Task, model: Any, untrained: bool) -> tuple[Any, ...]:
    """The model's tokenizer, or one trained on the data if there is none, and facts about it."""
    from transformers import AutoTokenizer

    facts = []
    vocabulary = model.get_input_embeddings().num_embeddings
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if not untrained:
            raise CliError(
                f"--model: {name} has no tokenizer that can be loaded: {first_line(error)}"
            ) from error
        if vocabulary < 258:
            raise CliError(
                f"--model: {name} has no tokenizer and a vocab_size of {vocabulary}, expected at least 258, which a "
                "byte-level tokenizer needs"
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
    return tokenizer, *facts


def _texts(task: Task) -> Iterator[str]:
    for row in (*task.spoken, *task.better, *task.worse):
        for text in (row["prompt"], row["completion"]):
            if isinstance(text, str):
                yield text
            else:
                yield from (f"<|{message['role']}|>\n{message['content']}" for message in text)
