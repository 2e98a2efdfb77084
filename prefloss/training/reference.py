"""The reference policy: a model, adapters off, another adapter, a table, cached sums, or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prefloss.arguments import instance, shown
from prefloss.data.table import ReferenceTable
from prefloss.training.batch import REFERENCE, PreferenceBatch, Rows
from prefloss.training.forward import evaluating, unwrapped
from prefloss.training.score import batch_logps
from prefloss.training.table_lookup import look_up

Autocast = Callable[[], AbstractContextManager[Any]]

CHOICES = (
    "Reference.model(copy.deepcopy(model)), Reference.adapter_off() for a PEFT model, Reference.adapter(name), "
    "Reference.table(path), Reference.cached() for ref_*logps columns, or Reference.none() with a loss that needs none"
)


# Each kind, with what its value is called, its class and what may be given.
_KINDS: Mapping[Any, tuple[str, type, str]] = {
    "model": ("model", nn.Module, "a causal language model of transformers"),
    "adapter_off": ("value", type(None), "None"),
    "adapter": ("name", str, "the name of an adapter"),
    "cached": ("value", type(None), "None"),
    "table": ("value", ReferenceTable, "a table as ReferenceTable.read(path) gives"),
    "none": ("value", type(None), "None"),
}


class Reference:
    """Where reference log-probs come from. Use one of the class methods to make it.

    A reference is computed in evaluation mode (no dropout), without gradient, in the precision of the policy.

    Example:
        >>> Reference.adapter("sft")
        Reference.adapter('sft')
    """

    def __init__(self, kind: str, value: Any = None) -> None:
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"reference: got the kind {shown(kind)}, expected {CHOICES}")
        name, expected_class, expected = _KINDS[kind]
        self.kind = kind
        self.value = instance(name, value, expected_class, expected)

    @classmethod
    def model(cls, model: nn.Module) -> Reference:
        """A separate model, frozen when training begins: `copy.deepcopy(policy)`, or one loaded a second time.

        It is moved to the device of the batches if it is on another.

        Raises:
            TypeError: If it is not a module.
        """
        if not isinstance(model, nn.Module):
            name = type(model).__name__
            raise TypeError(f"model: got {name}, expected a causal language model of transformers")
        return cls("model", model)

    @classmethod
    def adapter_off(cls) -> Reference:
        """The policy with its PEFT adapters switched off: the base model."""
        return cls("adapter_off")

    @classmethod
    def adapter(cls, name: str) -> Reference:
        """Another adapter of the policy, frozen: a copy of the one in training, loaded under this name.

        Raises:
            TypeError: If the name is not a string.
        """
        return cls("adapter", name)

    @classmethod
    def cached(cls) -> Reference:
        """Sums computed beforehand that come with the data as `ref_*logps` columns, nats."""
        return cls("cached")

    @classmethod
    def table(cls, path: str | os.PathLike[str]) -> Reference:
        """Sums that `prefloss reference` computed beforehand, looked up by the token ids of each completion.

        Raises:
            TypeError: If it is no path.
            TableError: If the file is absent, damaged or not such a table.
            ModuleNotFoundError: If pyarrow is missing.
        """
        instance("path", path, (str, os.PathLike), "the path of a table that `prefloss reference` wrote")
        return cls("table", ReferenceTable.read(path))

    @classmethod
    def none(cls) -> Reference:
        """No reference, for a loss that needs none; reward metrics are then absent."""
        return cls("none")

    @classmethod
    def of(cls, value: Any) -> Reference:
        """From a `Reference`, a module (a separate model), None (none), or `config()` of a checkpoint.

        Raises:
            TypeError: If it is something else.
        """
        if isinstance(value, Reference):
            return value
        if isinstance(value, nn.Module):
            return cls.model(value)
        if value is None:
            return cls.none()
        kind, kept = (value.get("kind"), value.get("value")) if isinstance(value, Mapping) else (None, None)
        if kind in ("adapter_off", "adapter", "cached", "none"):
            return cls(str(kind), kept)
        if kind == "table":
            return cls.table(kept)  # type: ignore[arg-type]
        if kind == "model":
            raise TypeError(
                "reference: got none from the checkpoint, which holds no reference model; leave "
                "restore_callback_states_from_checkpoint False: the loss's state is restored without it"
            )
        raise TypeError(f"reference: got {shown(value)}, expected {CHOICES}")

    def config(self) -> dict[str, Any]:
        """What a checkpoint keeps: the kind, an adapter's name, a table's path."""
        value = str(self.value.path) if self.kind == "table" else self.value
        return {"kind": self.kind, "value": value if self.kind in ("adapter", "table") else None}

    def bind(self, policy: nn.Module) -> None:
        """Check the reference against the unwrapped policy, and freeze a separate model; raises as `check` does."""
        self.check(policy)
        if self.kind == "model":
            self.value.requires_grad_(False).eval()

    def check(self, policy: nn.Module) -> None:
        """Check the reference against the unwrapped policy.

        Raises:
            ValueError: If it shares trainable weights with the policy, or is an adapter that is absent or in use.
            TypeError: If it names adapters and the policy has none.
        """
        if self.kind == "model":
            _check_apart(self.value, policy)
        if self.kind in ("adapter_off", "adapter"):
            _check_adapters(self, policy)

    def logps(
        self, model: nn.Module, batch: PreferenceBatch, autocast: Autocast = nullcontext
    ) -> Tensor | None:
        """Reference log-probs of a batch, without gradient.

        Args:
            model: The policy, wrapped as it is trained.
            batch: The batch.
            autocast: Makes the context that a separate model computes in.

        Returns:
            Log-prob of each target, [rows, T]; their sums, [rows], if cached or from a table; None without reference.

        Raises:
            ValueError: If cached sums are not in the batch, or a row is not in the table.
        """
        if self.kind == "none":
            return None
        if self.kind == "cached":
            if REFERENCE not in batch:
                raise ValueError(
                    "reference: got Reference.cached() and data without ref_chosen_logps and ref_rejected_logps "
                    "(pairs) or ref_logps; expected these columns, as sums of log-probs in nats"
                )
            return batch[REFERENCE]
        if self.kind == "table":
            return look_up(self.value, batch)
        return self.computed_logps(model, batch.rows, autocast)

    def computed_logps(self, model: nn.Module, rows: Rows, autocast: Autocast = nullcontext) -> Tensor:
        """Log-prob of each target, [rows, T], without gradient, from a reference that is a model or an adapter."""
        with torch.no_grad(), self._as_reference(autocast, model, rows.targets.device) as reference:
            return batch_logps(reference, rows).logps

    @contextmanager
    def _as_reference(
        self, autocast: Autocast, model: nn.Module, device: torch.device
    ) -> Iterator[nn.Module]:
        if self.kind == "model":
            _move(self.value, device)
            with autocast():
                yield self.value
            return
        # The value of adapter_off is None.
        with evaluating(model), _switched(unwrapped(model), self.value):
            yield model

    def __repr__(self) -> str:
        """As it is written."""
        shown = ""
        if self.kind == "model":
            shown = type(self.value).__name__
        elif self.kind in ("adapter", "table"):
            shown = repr(self.config()["value"])
        return f"Reference.{self.kind}({shown})"


def _check_apart(reference: nn.Module, policy: nn.Module) -> None:
    own = {id(parameter) for parameter in policy.parameters()}
    if any(id(parameter) in own for parameter in reference.parameters()):
        # get_peft_model works in place: its argument becomes the policy's base model.
        raise ValueError(
            "reference: got a model that shares its weights with the policy, so training would change it; expected "
            "copy.deepcopy(model), made before training, or Reference.adapter_off() for a PEFT model"
        )


def _check_adapters(reference: Reference, policy: Any) -> None:
    if not hasattr(policy, "disable_adapter") or not hasattr(policy, "peft_config"):
        raise TypeError(
            f"reference: got {reference!r}, but the policy is a {type(policy).__name__} without PEFT adapters; "
            "expected a PeftModel, or Reference.model(copy.deepcopy(model))"
        )
    if reference.kind == "adapter":
        name, there = reference.value, sorted(policy.peft_config)
        if name not in there:
            raise ValueError(f"reference: got the adapter {name!r}, expected one of {there}")
        if name in policy.active_adapters:
            raise ValueError(
                f"reference: got the adapter {name!r}, which is the one in training; expected a copy of it"
            )
        trained = [
            key for key, value in policy.named_parameters() if f".{name}." in key and value.requires_grad
        ]
        if trained:
            raise ValueError(
                f"reference: got the adapter {name!r}, whose {trained[0]} is trainable; expected it frozen"
            )


@contextmanager
def _switched(policy: Any, name: str | None) -> Iterator[None]:
    """Switch to another adapter, or (None) to no adapter; restore on exit.

    PEFT makes the whole active adapter trainable when it switches back; parameters that were frozen are frozen again.
    """
    before = policy.active_adapter
    trainable = {key: value.requires_grad for key, value in policy.named_parameters()}
    try:
        if name is None:
            with policy.disable_adapter():
                yield
        else:
            policy.set_adapter(name)
            yield
    finally:
        if name is not None:
            policy.set_adapter(before)
        for key, value in policy.named_parameters():
            value.requires_grad_(trainable[key])


def _move(model: Any, device: torch.device) -> None:
    """Move to the device of the batch, unless the model was loaded across several devices."""
    first = next(model.parameters(), None)
    if first is not None and first.device != device and not getattr(model, "hf_device_map", None):
        model.to(device)
