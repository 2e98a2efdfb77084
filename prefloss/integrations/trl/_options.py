"""A trainer's own loss options against a prefloss loss: each is taken over, or refused by name; none is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl import DPOConfig, KTOConfig

from prefloss.feedback import Labels, Pairs
from prefloss.losses import Loss, LossSpec, RunningMean, get, spec_of, split_name

# Options of TRL's configurations that change its loss, and so must mean something to ours.
_LOSS_OPTIONS = {
    DPOConfig: (
        "beta",
        "label_smoothing",
        "loss_weights",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "use_weighting",
        "discopop_tau",
    ),
    KTOConfig: ("beta", "desirable_weight", "undesirable_weight"),
}
_OWN_LOSS_TYPES = {
    DPOConfig: frozenset(
        (
            "sigmoid",
            "sigmoid_norm",
            "hinge",
            "ipo",
            "exo_pair",
            "nca_pair",
            "robust",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
        )
    ),
    KTOConfig: frozenset(("kto", "apo_zero_unpaired")),
}
_UNSTATED = ("auto", "mismatched")


def config_class(args: Any) -> type:
    """Which of TRL's two configurations `args` is.

    Raises:
        TypeError: If it is neither.
    """
    for kind in _LOSS_OPTIONS:
        if isinstance(args, kind):
            return kind
    raise TypeError(
        f"trainer: got one with {type(args).__name__}, wanted TRL's DPOTrainer (DPOConfig) or KTOTrainer (KTOConfig)"
    )


def known_to_trl(args: Any, name: str) -> bool:
    """Whether TRL itself has a loss of that name for this configuration."""
    return name in _OWN_LOSS_TYPES[config_class(args)]


def resolve(args: Any, name: str, given: Mapping[str, Any]) -> Loss:
    """The loss with its hyperparameters: those given, those the trainer's configuration sets, the loss's defaults.

    An option that the configuration leaves at TRL's default says nothing.

    Args:
        args: The trainer's configuration.
        name: Name of the loss.
        given: Hyperparameters given with the name.

    Raises:
        ValueError: If the configuration sets an option that the loss does not have, or contradicts a given one,
            or the loss cannot be fed by this trainer.
        TypeError: If the loss takes a kind of feedback that this trainer cannot give.
    """
    name, parameters = split_name(name, given)
    spec = get(name, **parameters).spec
    kind = config_class(args)
    _check_feedback(kind, spec)
    for option, value in _set_options(args, kind).items():
        parameter = spec.beta if option == "beta" else option
        if parameter is None or parameter not in spec.parameters:
            raise ValueError(
                f"{kind.__name__}.{option}: got {value!r}, but {spec.name} does not read it; leave it at its default "
                "or choose a loss that does"
            )
        if parameters.setdefault(parameter, value) != value:
            raise ValueError(
                f"{kind.__name__}.{option}: got {value!r}, but {spec.name} was given "
                f"{parameter}={parameters[parameter]!r}; set it in one place"
            )
    loss = get(name, **parameters)
    _check_loss_type(args, kind, loss)
    _check_baseline(args, kind, loss)
    return loss


def wants_mismatched(loss: Loss) -> bool:
    """Whether the loss reads completions under prompts they do not belong to."""
    if "mismatched" not in loss.spec.reads:
        return False
    baseline = loss.params.get("kl_baseline", "mismatched")
    return not isinstance(baseline, RunningMean) and baseline not in ("zero", "column")


def _set_options(args: Any, kind: type) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    return {
        name: getattr(args, name) for name in _LOSS_OPTIONS[kind] if getattr(args, name) != defaults[name]
    }


def _check_feedback(kind: type, spec: LossSpec) -> None:
    fed = (Pairs, Labels) if kind is DPOConfig else (Labels,)
    if spec.feedback not in fed:
        raise TypeError(
            f"loss: got {spec.name!r}, which takes {spec.feedback.__name__}, but "
            f"{kind.__name__.replace('Config', 'Trainer')} gives {' or '.join(item.__name__ for item in fed)}"
        )


def _check_loss_type(args: Any, kind: type, loss: Loss) -> None:
    """A loss type set beside ours must mean the same loss; TRL's defaults say nothing."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    # KTO's two names tell TRL only whether to build mismatched completions.
    if names == ["sigmoid"] or (kind is KTOConfig and known_to_trl(args, names[0])):
        return
    if len(names) != 1 or spec_of(split_name(names[0], {})[0]) is not loss.spec:
        raise ValueError(
            f"{kind.__name__}.loss_type: got {args.loss_type!r}, but the loss to train is {loss!r}"
        )


def _check_baseline(args: Any, kind: type, loss: Loss) -> None:
    if not wants_mismatched(loss) or loss.params.get("kl_baseline") not in _UNSTATED:
        return
    if kind is DPOConfig:
        raise ValueError(
            f"{loss.name}: kl_baseline: got {loss.params['kl_baseline']!r}, but DPOTrainer scores no mismatched "
            "completions; choose 'running_mean' or 'zero', or train it with KTOTrainer"
        )
    if args.loss_type == "apo_zero_unpaired":
        raise ValueError(
            f"{loss.name}: kl_baseline: got {loss.params['kl_baseline']!r}, but with loss_type='apo_zero_unpaired' "
            "KTOTrainer builds no mismatched completions; choose 'running_mean' or 'zero', or leave loss_type='kto'"
        )
