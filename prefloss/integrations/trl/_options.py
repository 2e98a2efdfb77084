"""A trainer's own loss options against a prefloss loss: each is taken over, or refused by name; none is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trl import DPOConfig, KTOConfig

from prefloss.feedback import Labels, Pairs
from prefloss.hyperparameters import RunningMean
from prefloss.registry import Loss, LossSpec, admitted, get, parse, spec_of
from prefloss.registry import WeightedSum as Composite

# Options of TRL's configurations that change its loss, and so must mean something to ours.
_LOSS_OPTIONS = {
    DPOConfig: (
        "beta",
        "label_smoothing",
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
# What each trainer can feed a loss with; scores and the like come with the batch.
_FEEDS = {
    DPOConfig: frozenset(("tokens", "scores", "per_token", "per_token.log_sum_sq")),
    KTOConfig: frozenset(("tokens", "scores", "per_token", "mismatched", "kl", "baseline")),
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
        f"trainer: got one with {type(args).__name__}, expected TRL's DPOTrainer (DPOConfig) or KTOTrainer (KTOConfig)"
    )


def known_to_trl(args: Any, name: str) -> bool:
    """Whether TRL itself has a loss of that name for this configuration."""
    return name in _OWN_LOSS_TYPES[config_class(args)]


def resolve(args: Any, name: str, given: Mapping[str, Any]) -> Loss:
    """The loss with its hyperparameters: those given, those the trainer's configuration sets, the loss's defaults.

    An option that the configuration leaves at TRL's default says nothing. In a sum of losses, an option goes to each
    term that has it.

    Args:
        args: The trainer's configuration.
        name: Name of the loss, or an expression.
        given: Hyperparameters given with the name.

    Raises:
        ValueError: If the configuration sets an option that no term of the loss has, or contradicts a given one,
            or the loss cannot be fed by this trainer.
        TypeError: If the loss takes a kind of feedback that this trainer cannot give.
    """
    kind = config_class(args)
    loss = get(name, **given)
    _check_feedback(kind, loss.spec)
    options = _set_options(args, kind)
    terms = parse(name)
    if isinstance(loss, Composite):
        stated = [(term.weight, term.name, dict(term.parameters)) for term in terms]
    else:
        stated = [(1.0, terms[0].name, {**terms[0].parameters, **given})]
    used: set[str] = set()
    for _, term, parameters in stated:
        used |= _inherit(kind, spec_of(term), parameters, options)
    unread = sorted(options.keys() - used)
    if unread:
        raise ValueError(
            f"{kind.__name__}.{unread[0]}: got {options[unread[0]]!r}, but {loss.name} does not read it; leave it at "
            "its default or choose a loss that does"
        )
    bound = [(weight, get(term, **parameters)) for weight, term, parameters in stated]
    loss = Composite(bound) if isinstance(loss, Composite) else bound[0][1]
    _check_loss_type(args, kind, loss)
    _check_fed(args, kind, loss)
    _check_baseline(args, kind, loss)
    return loss


def wants_mismatched(loss: Loss) -> bool:
    """Whether the loss reads completions under prompts they do not belong to."""
    if isinstance(loss, Composite):
        return any(wants_mismatched(term) for _, term in loss.terms)
    if "mismatched" not in loss.spec.reads:
        return False
    baseline = loss.params.get("kl_baseline", "mismatched")
    return not isinstance(baseline, RunningMean) and baseline not in ("zero", "column")


def _set_options(args: Any, kind: type) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    changed = {
        name: getattr(args, name) for name in _LOSS_OPTIONS[kind] if getattr(args, name) != defaults[name]
    }
    if "f_alpha_divergence_coef" in changed and args.f_divergence_type == "alpha_divergence":
        del changed["f_alpha_divergence_coef"]  # Read together with the type, in _parameter.
    if changed.get("f_divergence_type") == "alpha_divergence":
        changed["f_divergence_type"] = f"alpha({1 - args.f_alpha_divergence_coef:g})"
    return changed


def _inherit(kind: type, spec: LossSpec, parameters: dict[str, Any], options: Mapping[str, Any]) -> set[str]:
    """Give a loss the options that it has; returns which."""
    used = set()
    for option, value in options.items():
        parameter, meaning = _parameter(spec, option, value)
        if parameter is None:
            continue
        used.add(option)
        if parameter and parameters.setdefault(parameter, meaning) != meaning:
            raise ValueError(
                f"{kind.__name__}.{option}: got {value!r}, but {spec.name} was given "
                f"{parameter}={parameters[parameter]!r}; set it in one place"
            )
    return used


def _parameter(spec: LossSpec, option: str, value: Any) -> tuple[str | None, Any]:
    """What a TRL option is called here and its value; None if the loss has no such thing, "" if it needs no setting."""
    if option == "beta":
        return spec.beta, value
    if option == "label_smoothing" and "epsilon" in spec.parameters:
        return "epsilon", value
    if option == "discopop_tau":
        return ("tau" if spec.name == "discopop" else None), value
    if option == "use_weighting" and "per_token.log_sum_sq" in spec.needs:
        return "", value
    names = {"f_divergence_type": "divergence", "use_weighting": "wpo"}
    meanings = {"js_divergence": "js"}
    name = names.get(option, option)
    return (name if name in spec.parameters or name in admitted(spec) else None), meanings.get(value, value)


def _check_feedback(kind: type, spec: LossSpec) -> None:
    fed = (Pairs, Labels) if kind is DPOConfig else (Labels,)
    if spec.feedback not in fed:
        raise TypeError(
            f"loss: got {spec.name!r}, which takes {spec.feedback.__name__}, but "
            f"{kind.__name__.replace('Config', 'Trainer')} gives {' or '.join(item.__name__ for item in fed)}"
        )


def _check_fed(args: Any, kind: type, loss: Loss) -> None:
    trainer = kind.__name__.replace("Config", "Trainer")
    for need in sorted(loss.needs - _FEEDS[kind]):
        raise ValueError(
            f"{loss.name}: needs {need}, which {trainer} does not compute; use a loop of your own"
        )
    if "per_token.log_sum_sq" in loss.needs and not args.use_weighting:
        raise ValueError(
            f"{loss.name}: needs per_token.log_sum_sq; DPOConfig(use_weighting=True) makes DPOTrainer compute it"
        )
    if any(need.startswith("per_token") for need in loss.needs) and args.precompute_ref_log_probs:
        raise ValueError(
            f"{loss.name}: needs per_token, but with precompute_ref_log_probs=True {trainer} keeps only the "
            "reference's sums; leave it False"
        )


def _check_loss_type(args: Any, kind: type, loss: Loss) -> None:
    """A loss type set beside ours must mean the same loss; TRL's defaults say nothing."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    # KTO's two names tell TRL only whether to build mismatched completions.
    if names == ["sigmoid"] or (kind is KTOConfig and known_to_trl(args, names[0])):
        return
    meant = [term.name for term in parse(expression(names, getattr(args, "loss_weights", None)))]
    trained = [term.spec for _, term in loss.terms] if isinstance(loss, Composite) else [loss.spec]
    if [spec_of(name) for name in meant] != trained:
        raise ValueError(
            f"{kind.__name__}.loss_type: got {args.loss_type!r}, but the loss to train is {loss!r}"
        )


def expression(names: list[str], weights: list[float] | None) -> str:
    """TRL's list of loss types and weights as one expression."""
    if len(names) == 1 and weights in (None, [1.0]):
        return names[0]
    return " + ".join(
        f"{weight!r}*{name}" for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
    )


def _check_baseline(args: Any, kind: type, loss: Loss) -> None:
    if isinstance(loss, Composite):
        for _, term in loss.terms:
            _check_baseline(args, kind, term)
        return
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
