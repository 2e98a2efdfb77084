"""What trains: the model and tokenizer of a run, and one of TRL's own trainers with the loss in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

import prefloss
from prefloss.cli.command_options import TrainOptions
from prefloss.cli.console import CliError, loading
from prefloss.cli.pretrained import check_model_folder, saved_model, saved_tokenizer
from prefloss.cli.task import Task
from prefloss.data.row_file import rows_in
from prefloss.data.tokens import pad_id
from prefloss.demo.model import CHAT_TEMPLATE, END, tiny_llama, train_tokenizer, word_tokenizer
from prefloss.feedback import Pairs, columns_of
from prefloss.integrations.token_loader import SetEpoch, sampler_for, token_loader
from prefloss.integrations.trl import FeedbackCollator, PreferenceLossCallback
from prefloss.integrations.trl.options import resolve
from prefloss.training import Lengths
from prefloss.training.fingerprint import template_hash, tokenizer_fingerprint, weights_fingerprint

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_UNTRAINED_RATE, _WHOLE_RATE, _LORA_RATE = 2e-4, 1e-6, 1e-5
_WORLD_STEPS = 400


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        model: Causal language model.
        tokenizer: Its tokenizer, with an end token.
        untrained: Whether its weights are random.
        facts: Sentences about it.
    """

    model: Any
    tokenizer: Any
    untrained: bool
    facts: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Hashes by which a run's record tells it from another."""
        return {
            "weights of --model": weights_fingerprint(self.model),
            "tokenizer of --model": tokenizer_fingerprint(self.tokenizer),
            "chat template of --model": template_hash(self.tokenizer),
        }


def start_of(options: TrainOptions, task: Task) -> Start:
    """The model that the options name, or the built-in one; a `CliError` if it cannot be loaded."""
    return _built_in(options, task) if options.model is None else _saved(options, task, options.model)


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
    return Start(model, tokenizer, untrained=True, facts=facts)


def _saved(options: TrainOptions, task: Task, name: str) -> Start:
    """A model with its weights, or with random ones if the folder holds a configuration only."""
    path = Path(name)
    check_model_folder(name, "merge it into its model first (peft: merge_and_unload)")
    if path.is_dir() and not (path / "config.json").exists():
        raise CliError(
            f"--model: {name} is a folder without config.json; expected a saved model, or a configuration"
        )
    untrained = path.is_dir() and not any(next(path.glob(pattern), None) for pattern in _WEIGHTS)
    if untrained:
        with loading(f"--model: {name}"), torch.random.fork_rng():
            torch.manual_seed(options.seed)
            config = AutoConfig.from_pretrained(name)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = saved_model(name, dtype=torch.float32)
        broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise CliError(
                f"--model: {name} has weights that are NaN or infinite, as {broken[0]}; expected none"
            )
    weights = "random weights, for the folder holds a configuration only" if untrained else "its own weights"
    size = f"{model.num_parameters() / 1e6:.1f} million parameters"
    tokenizer, *facts = _tokenizer(name, task, model, untrained)
    facts = (f"{name}: {type(model).__name__}, {size}, {weights}", *facts)
    return Start(model, tokenizer, untrained, facts)


def _tokenizer(name: str, task: Task, model: Any, untrained: bool) -> tuple[Any, ...]:
    """The model's tokenizer, or one trained on the data if there is none, and facts about it."""
    facts = []
    vocabulary = model.get_input_embeddings().num_embeddings
    try:
        tokenizer = saved_tokenizer(name)
    except CliError as error:
        if not untrained:
            raise
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


def configuration(options: TrainOptions, start: Start, task: Task, loss: prefloss.Loss, folder: Path) -> Any:
    """TRL's configuration: the options, and defaults for the others; a `CliError` if the loss cannot run with it.

    Args:
        options: Of the command line.
        start: The model.
        task: The data.
        loss: The loss.
        folder: Where the trainer writes its checkpoints.
    """
    if options.max_tokens is not None and options.accumulate > 1:
        raise CliError(
            f"--accumulate: got {options.accumulate} with --max-tokens, expected 1: TRL's trainers average over "
            "forward passes, whose numbers of rows differ; prefloss.integrations.transformers averages over rows"
        )
    steps, epochs = options.steps, options.epochs
    if steps is None and epochs is None:
        steps = _WORLD_STEPS if options.data is None else None
        epochs = 3.0 if start.untrained else 1.0
    rate = _UNTRAINED_RATE if start.untrained else _LORA_RATE if options.lora else _WHOLE_RATE
    on_cpu = options.cpu or options.model is None or not torch.accelerator.is_available()
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": -1 if steps is None else steps,
        "num_train_epochs": epochs or 1.0,
        "per_device_train_batch_size": options.batch_size or (16 if options.data is None else 8),
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.learning_rate or rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_length": options.max_length,
        "gradient_checkpointing": options.gradient_checkpointing,
        # Forward passes only; the weights stay float32.
        "bf16": not on_cpu and has_bf16 if options.bf16 is None else options.bf16,
        "use_cpu": on_cpu,
        "logging_steps": 1,
        # A loss that is no number ends the run; transformers would log another in its place.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu and torch.cuda.is_available(),
        "seed": options.seed,
        # Weights and scores travel with the batch; TRL would take their columns out.
        "remove_unused_columns": not _feedback_columns(task, loss),
    }
    if loss.spec.feedback is Pairs:
        config = DPOConfig(**common, use_weighting="per_token.log_sum_sq" in loss.needs)
    elif not loss.reads_mismatched:
        # TRL takes its loss type here as "build mismatched completions or not".
        config = KTOConfig(**common, loss_type="apo_zero_unpaired", train_sampling_strategy="random")
    elif options.batch_size != 1:
        config = KTOConfig(**common)
    else:
        raise CliError(
            f"--batch-size: got 1, expected at least 2, because {loss.name} estimates its KL baseline from mismatched "
            "rows of a batch; use --accumulate for less memory, or --param kl_baseline=running_mean"
        )
    if config.n_gpu > 1:
        raise CliError(
            f"{config.n_gpu} GPUs are visible, and one process trains on one: set CUDA_VISIBLE_DEVICES=0, or start "
            f"torchrun --nproc-per-node {config.n_gpu} --no-python prefloss train ..."
        )
    try:
        resolve(config, loss)
    except (TypeError, ValueError) as error:
        raise CliError(str(error)) from error
    return config


def plan_text(config: Any, max_tokens: int | None) -> str:
    """How long, how fast and where a configuration trains, as one sentence."""
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    device = "cpu" if config.use_cpu else torch.accelerator.current_accelerator()
    bf16 = " in bfloat16" if config.bf16 else ""
    rate = f"learning rate {config.learning_rate:g} (AdamW, cosine)"
    batch = f"{config.per_device_train_batch_size} rows"
    if max_tokens is not None:
        batch = f"at most {max_tokens} tokens"
    return f"{length} of {batch}, {rate}, on {device}{bf16}"


def build(
    task: Task,
    start: Start,
    config: Any,
    loss: prefloss.Loss,
    options: TrainOptions,
    callbacks: Sequence[TrainerCallback],
) -> Any:
    """A trainer that is ready to train."""
    rank = options.adapter_rank
    paired = loss.spec.feedback is Pairs
    collator = None
    if _feedback_columns(task, loss):
        inner = DataCollatorForPreference if paired else DataCollatorForUnpairedPreference
        collator = FeedbackCollator(inner(pad_id(start.tokenizer), config.max_length))
    adapter = None
    if rank is not None:
        try:
            from peft import LoraConfig
        except ModuleNotFoundError as error:
            if error.name != "peft":
                raise
            raise CliError("--lora: peft is not installed: pip install 'prefloss[peft]'") from error
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = (DPOTrainer if paired else KTOTrainer)(
        model=start.model,
        ref_model=None if adapter is not None else copy.deepcopy(start.model),
        args=config,
        train_dataset=task.train,
        data_collator=collator,
        processing_class=start.tokenizer,
        peft_config=adapter,
        callbacks=[PreferenceLossCallback(loss), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    # TRL would write a model card into every checkpoint.
    trainer.create_model_card = lambda *args, **kwargs: None
    if options.max_tokens is not None:
        _make_batches(trainer, options.max_tokens)
    return trainer


def _make_batches(trainer: Any, max_tokens: int) -> None:
    """Let a trainer of TRL make its training batches by tokens."""
    rows, most = trainer.train_dataset, trainer.args.max_length
    sides = [name for name in rows.column_names if name.endswith("_ids") and name != "prompt_ids"]
    # Mismatched completions are rows of another block, of the same width.
    longest = [
        min(most, len(row["prompt_ids"]) + max(len(row[name]) for name in sides))
        for row in rows_in(rows, ["prompt_ids", *sides])
    ]
    paired = "chosen_ids" in sides
    lengths = Lengths(
        torch.tensor(longest, dtype=torch.int32)[:, None],
        torch.full((len(longest),), 2 if paired else 1, dtype=torch.int32),
    )
    try:
        sampler = sampler_for(trainer, lengths, max_tokens)
    except ValueError as error:
        raise CliError(f"--max-tokens: of the rows to train on, {error}") from error
    trainer.add_callback(SetEpoch(sampler))
    trainer.get_train_dataloader = lambda: token_loader(trainer, sampler)


def _feedback_columns(task: Task, loss: prefloss.Loss) -> set[str]:
    """Columns that only the loss reads."""
    return set(task.train.column_names) - set(columns_of(loss.spec.feedback))
