"""Registered names in TRL's own configurations: `DPOConfig(loss_type=["my_loss"])`, also on TRL's command line."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from prefloss.integrations.inherited import expression
from prefloss.integrations.trl import kernel as kernels
from prefloss.integrations.trl import options
from prefloss.integrations.trl.callback import attach, attached
from prefloss.integrations.trl.versions import DPOTrainer, KTOConfig, KTOTrainer
from prefloss.registry import Loss, get

_originals: dict[type, Any] = {}
_kto_metadata: list[Any] = []
_enabled: dict[str, str] = {}


def enable(*, kernel: str = "trl") -> None:
    """From now on, look up a `loss_type` that TRL does not know in prefloss's registry.

    Wraps the constructors of TRL's DPOTrainer and KTOTrainer; names that TRL knows stay TRL's. `disable()` undoes it. A
    second call does nothing.

    Args:
        kernel: As for `PreferenceLossCallback`, for the trainers whose loss is looked up here.

    Raises:
        ValueError: If the kernel is unknown, or another one is enabled.
        RuntimeError: If `kernel` is "prefloss" and this TRL scores completions in an unknown way.
    """
    kernels.check_kernel(kernel)
    if _originals:
        if kernel != _enabled["kernel"]:
            raise ValueError(
                f"kernel: got {kernel!r}, but enabled with {_enabled['kernel']!r}; disable() first"
            )
        return
    _enabled["kernel"] = kernel
    for trainer_class in (DPOTrainer, KTOTrainer):
        _originals[trainer_class] = trainer_class.__init__
        trainer_class.__init__ = _looking_up_the_loss(trainer_class.__init__)
    # TRL's parser would refuse every name but its own two before a trainer sees it.
    loss_type = KTOConfig.__dataclass_fields__["loss_type"]
    _kto_metadata.append(loss_type.metadata)
    loss_type.metadata = types.MappingProxyType(
        {k: v for k, v in loss_type.metadata.items() if k != "choices"}
    )


def disable() -> None:
    """Undo `enable()`; trainers built in between keep their loss."""
    while _originals:
        trainer_class, original = _originals.popitem()
        trainer_class.__init__ = original
    while _kto_metadata:
        KTOConfig.__dataclass_fields__["loss_type"].metadata = _kto_metadata.pop()


def _looking_up_the_loss(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config: Any = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("args")
        loss = None if config is None else _loss_named_in(config)
        if config is None or loss is None:
            original(self, *args, **kwargs)
            return
        name = config.loss_type
        # TRL accepts only its own names; KTO's decides whether to build mismatched completions.
        if isinstance(config, KTOConfig):
            config.loss_type = "kto" if loss.reads_mismatched else "apo_zero_unpaired"
        # Since 0.29, TRL computes references while it builds the trainer, before anything can be attached to it.
        kernel = _enabled["kernel"]
        own = getattr(type(self), "_precompute_ref_logps", None)
        if own is not None:
            self._precompute_ref_logps = types.MethodType(kernels.references_by(own, lambda _: kernel), self)
        try:
            original(self, *args, **kwargs)
        finally:
            config.loss_type = name
            self.__dict__.pop("_precompute_ref_logps", None)
        if attached(self) is None:
            attach(self, loss, kernel=kernel)._scored_references = True

    return __init__


def _loss_named_in(config: Any) -> Loss | None:
    """The prefloss loss that a configuration names; None if all names are TRL's.

    Raises:
        ValueError: If a name is unknown, or the configuration sets an option that no loss reads.
    """
    names = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    if all(options.known_to_trl(config, name) for name in names):
        return None
    return options.resolve(config, get(expression(names, getattr(config, "loss_weights", None))))
