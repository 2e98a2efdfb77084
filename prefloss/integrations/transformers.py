"""prefloss in `transformers.Trainer`, on any feedback.

`PreferenceLossCallback("dpo", reference=...)` among a trainer's callbacks trains with that loss, on batches of a
`PreferenceCollator`. transformers hands a callback no trainer. So the first callback wraps five methods of the class,
once per process: `compute_loss`, `log`, `get_batch_samples`, which sees the batches of an optimizer step together,
`get_train_dataloader`, for batches by tokens, and `_remove_unused_columns`, to say what is wrong. Each wrapper looks
for a `PreferenceLossCallback` in the trainer's list of callbacks; without one it only calls the trainer's method.
Nothing is stored on the trainer. Subclasses that override `compute_loss`, as TRL's do, are unaffected.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    # An import error inside transformers does not mean that transformers is missing.
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.transformers needs transformers: pip install 'prefloss[transformers]'",
        name="transformers",
    ) from error

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.data.data_collator import DataCollatorWithPadding, default_data_collator
from transformers.trainer import Trainer
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils import logging

from prefloss._deprecated import moved
from prefloss.arguments import integer
from prefloss.integrations.binding import (
    LossCallback,
    attached,
    evaluation_prefix,
    own_examples,
    wrap_method,
)
from prefloss.integrations.token_loader import check_args as check_token_args
from prefloss.integrations.token_loader import sampler_for, sampler_of, token_loader
from prefloss.registry import Loss
from prefloss.training import HeadSpec as HeadSpec
from prefloss.training import ModelLogps as ModelLogps
from prefloss.training import PreferenceCollator as PreferenceCollator
from prefloss.training import PreferenceObjective as PreferenceObjective
from prefloss.training import Reference as Reference
from prefloss.training import model_logps as model_logps
from prefloss.training import token_lengths
from prefloss.training import with_reference_logps as with_reference_logps
from prefloss.training import write_reference_table as write_reference_table
from prefloss.training.batch import COUNTS

__getattr__ = moved(__name__, {"reads_table": "prefloss.integrations.trl:trainer_with_table"})

logger = logging.get_logger(__name__)


class PreferenceLossCallback(LossCallback):
    """Train `transformers.Trainer` with a prefloss loss, on any feedback.

    Give the trainer `data_collator=PreferenceCollator(tokenizer)` and `remove_unused_columns=False`. Pairs become
    labels for a loss of labels, and groups of two for a listwise one; rankings become pairs as `rankings_as` says. One
    callback serves one trainer. In TRL's trainers use the callback of `prefloss.integrations.trl`.

    With gradient accumulation and several processes, an optimizer step minimises the mean over all examples of the step
    that the loss counts, however they fall into micro-batches. A loss that couples the examples of its batch
    (`spec.separable` is False, such as `aot`) sees one micro-batch of all processes.

    `Trainer.evaluate` gives the loss and TRL's metrics (`eval_rewards/accuracies` and others) as means over the whole
    evaluation; `Trainer.predict` gives each completion's log-prob under policy and reference, nats.

    Args:
        loss: Name of a registered loss, with hyperparameters if needed (`"ipo(tau=0.1)"`), or a `Loss`.
        max_tokens: Make the training batches by tokens, see `TokenBatchSampler`: so many tokens at most, in place of
            `per_device_train_batch_size` rows. The data set is read once before the training, for its lengths.
        **options: `reference`, `check_step_zero`, `rankings_as`, `diagnose` and hyperparameters of the loss, as for
            `PreferenceObjective`.

    Raises:
        ValueError: If the loss is unknown, a hyperparameter out of range, or a reference missing.
        TypeError: If a hyperparameter is unknown or of the wrong type, or hyperparameters accompany a `Loss`.

    Example:
        >>> PreferenceLossCallback("dpo", beta=0.2, reference=Reference.adapter_off())
        PreferenceLossCallback(dpo(beta=0.2), reference=Reference.adapter_off())
    """

    compute_loss_of = "transformers'"
    objective: PreferenceObjective

    def __init__(self, loss: str | Loss, *, max_tokens: int | None = None, **options: Any) -> None:
        super().__init__(PreferenceObjective(loss, **options))
        self.max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        # What the batches of a checkpoint depend on.
        self.batch_plan: dict[str, int] | None = None
        self._lengths: tuple[Any, Any, Any] | None = None
        self._sampler: Any = None
        self._checked_trainer = False
        _install()

    @property
    def reference(self) -> Reference:
        """The reference."""
        return self.objective.reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the collator, and restore the loss's state from the checkpoint that training resumes from.

        Raises:
            ValueError: If the batches come from a collator of transformers, or lose their columns; if `max_tokens` is
                not used, or not that of the checkpoint.
        """
        super().on_train_begin(args, state, control, **kwargs)
        loader = kwargs.get("train_dataloader")
        _check_collator(getattr(loader, "collate_fn", None))
        self._begin_batches(loader, args, state)
        # A resumed policy has left its reference, and so has one that trains a second time.
        self.objective.fresh = self.objective.check_step_zero and not state.global_step and not self._used

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the epoch's batches: within a resumed epoch, accelerate hides the sampler from the trainer."""
        if self._sampler is not None:
            self._sampler.set_epoch(int(state.epoch or 0))

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the metrics of `Trainer.predict`."""
        self._add_metrics(metrics)

    def _settings(self) -> dict[str, Any]:
        return {
            "loss": repr(self.loss),
            "reference": self.reference.config(),
            "check_step_zero": self.objective.check_step_zero,
            "rankings_as": self.objective.rankings_as,
            "max_tokens": self.max_tokens,
            **super()._settings(),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (transformers' `ExportableState`)."""
        state = super().state()
        return {**state, "attributes": {**state["attributes"], "batch_plan": self.batch_plan}}

    def _check_args(self, args: Any) -> None:
        _check_args(args)
        if self.max_tokens is not None:
            check_token_args(args)
        logger.info(f"prefloss trains this model with {self!r}")
        if args.gradient_accumulation_steps > 1 and self.loss.couples_batch:
            size = f"{args.per_device_train_batch_size} examples"
            if self.max_tokens is not None:
                size = f"{self.max_tokens} tokens at most"
            warnings.warn(
                f"{self.loss.name}: an example's loss depends on its batch, one micro-batch of {size} on each process; "
                "accumulation does not enlarge it",
                UserWarning,
                stacklevel=2,
            )

    def _token_loader(self, trainer: Any) -> Any:
        """The training loader of `max_tokens`."""
        data, collator = trainer.train_dataset, trainer.data_collator
        if data is None:
            raise ValueError("train_dataset: got None, expected the rows to train on")
        if trainer.args.remove_unused_columns:
            raise _columns_lost()
        _check_collator(collator)
        assert self.max_tokens is not None
        # The trainer asks again if it trains again.
        if self._lengths is None or self._lengths[0] is not data or self._lengths[1] is not collator:
            self._lengths = data, collator, token_lengths(data, collator)
        return token_loader(trainer, sampler_for(trainer, self._lengths[2], self.max_tokens))

    def _begin_batches(self, loader: Any, args: Any, state: Any) -> None:
        """Find the sampler of `max_tokens`; within a resumed epoch its batches must be those of the checkpoint."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        goes_on = isinstance(saved, dict) and state.global_step and not args.ignore_data_skip
        plan = saved["attributes"].get("batch_plan") if saved and goes_on else None
        if self.max_tokens is None:
            if plan is not None:
                raise ValueError(
                    f"max_tokens: got None, but the checkpoint to go on with was trained with {plan['max_tokens']}"
                )
            return
        self._sampler = sampler_of(loader)
        if self._sampler is None:
            raise ValueError(
                f"max_tokens: got {self.max_tokens}, but the trainer's class makes its own training loader; expected "
                "one that calls super().get_train_dataloader(), or a TokenBatchSampler there and max_tokens=None"
            )
        if goes_on:
            self._sampler.check_plan(plan)
        self.batch_plan = self._sampler.plan

    def _count(self, batches: Sequence[dict[str, Any]]) -> None:
        # The last fetch of an epoch may be empty.
        if batches:
            self.objective.count(batches)

    def _compute(self, trainer: Any, model: Any, batch: Any, num_items: Any) -> dict[str, Tensor]:
        self._bind(trainer.args)
        self._check_trainer(trainer)
        counted = COUNTS in batch
        examples = None if model.training else own_examples(trainer, batch)
        result = self.objective(model, batch, examples=examples)
        if not model.training:
            return result.outputs
        self._used = True
        # A subclass that fetches its batches in its own way has not had them counted: then the step's loss is the mean
        # of the micro-batches' means.
        factor = 1.0 if counted else 1 / _micro_batches(trainer)
        if _divides(trainer, num_items):
            factor *= _micro_batches(trainer)
        return {**result.outputs, "loss": result.loss * factor}

    def _check_trainer(self, trainer: Any) -> None:
        if self._checked_trainer:
            return
        if trainer.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func: got one beside PreferenceLossCallback, expected None: it would not be used"
            )
        self.objective.autocast = trainer.accelerator.autocast
        self._checked_trainer = True

    def _add_metrics(self, logs: dict[str, float]) -> None:
        """Add to what the trainer logs; `evaluate` returns the same dictionary."""
        if not self._checked_trainer:
            return
        prefix = evaluation_prefix(logs)
        if prefix is not None:
            # `loss` replaces the trainer's, which is a mean of batch means.
            metrics = self.objective.metrics(training=False)
            logs.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        elif "loss" in logs:
            metrics = self.objective.metrics()
            logs.update({name: value for name, value in metrics.items() if name != "loss"})

    def __repr__(self) -> str:
        """The callback with its loss and reference."""
        return f"{type(self).__name__}({self.loss!r}, reference={self.reference!r})"


def _install() -> None:
    for name, wrapper in _WRAPPERS.items():
        wrap_method(Trainer, name, wrapper)


def _computing(method: Any) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        callback = attached(self, PreferenceLossCallback)
        if callback is None:
            return method(self, model, inputs, return_outputs, num_items_in_batch)
        outputs = callback._compute(self, model, inputs, num_items_in_batch)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    return compute_loss


def _logging(method: Any) -> Any:
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        callback = attached(self, PreferenceLossCallback)
        if callback is not None:
            callback._add_metrics(logs)
        return method(self, logs, *args, **kwargs)

    return log


def _counting(method: Any) -> Any:
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = method(self, *args, **kwargs)
        callback = attached(self, PreferenceLossCallback)
        if callback is not None:
            callback._count(batches)
        return batches, num_items

    return get_batch_samples


def _loading(method: Any) -> Any:
    def get_train_dataloader(self: Any) -> Any:
        callback = attached(self, PreferenceLossCallback)
        if callback is None or callback.max_tokens is None:
            return method(self)
        return callback._token_loader(self)

    return get_train_dataloader


def _removing(method: Any) -> Any:
    def _remove_unused_columns(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.remove_unused_columns and attached(self, PreferenceLossCallback) is not None:
            raise _columns_lost()
        return method(self, *args, **kwargs)

    return _remove_unused_columns


_WRAPPERS = {
    "compute_loss": _computing,
    "log": _logging,
    "get_batch_samples": _counting,
    "get_train_dataloader": _loading,
    # Trainer calls it for each data set, and would say that no column is an argument of the model.
    "_remove_unused_columns": _removing,
}


def _columns_lost() -> ValueError:
    return ValueError(
        "remove_unused_columns: got True, expected False: the trainer would take out every column that is no argument "
        "of the model, and PreferenceCollator reads those; set TrainingArguments(remove_unused_columns=False)"
    )


def _check_collator(collator: Any) -> None:
    """Refuse what makes no batches of preferences, before the first batch."""
    if isinstance(collator, RemoveColumnsCollator):
        raise _columns_lost()
    # The trainer chooses one of these if it is given none.
    if collator is default_data_collator or isinstance(collator, DataCollatorWithPadding):
        name = getattr(collator, "__name__", type(collator).__name__)
        raise ValueError(
            f"data_collator: got {name} of transformers, expected PreferenceCollator: give the trainer "
            "data_collator=PreferenceCollator(tokenizer)"
        )


def _check_args(args: Any) -> None:
    """Refuse training arguments that belong to another trainer, or that bypass the loss.

    Raises:
        TypeError: If they are those of a TRL trainer.
        ValueError: If they smooth labels, or use several devices in one process.
    """
    if any(kind.__module__.split(".")[0] == "trl" for kind in type(args).__mro__):
        raise TypeError(
            f"args: got {type(args).__name__}, the configuration of a TRL trainer, which makes its own batches; use "
            "PreferenceLossCallback of prefloss.integrations.trl there"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor}, expected 0: it smooths the next token; "
            "preferences are smoothed by the loss's own label_smoothing"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: got {args.n_gpu} devices in one process (DataParallel), expected one; start with torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )


def _micro_batches(trainer: Any) -> int:
    """Micro-batches of this optimizer step; the last step of an epoch may have fewer."""
    # The trainer sets the attribute when training begins.
    return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)


def _divides(trainer: Any, num_items: Any) -> bool:
    """Whether the trainer will divide the loss by the number of micro-batches, though it is a share of the step."""
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)
    return not (trainer.model_accepts_loss_kwargs and num_items is not None if stated is None else stated)
