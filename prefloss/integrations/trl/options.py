"""Loss options of TRL's configurations: each is taken over by the loss, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prefloss.feedback import Labels, Pairs
from prefloss.integrations.inherited import expression, inherit
from prefloss.integrations.trl.versions import VERSION, DPOConfig, KTOConfig, before
from prefloss.registry import Loss, LossSpec, admitted, get, parse, spec_of

# Options of TRL's configurations that change its loss, in any version.
_LOSS_OPTIONS = {
    DPOConfig: (
        "beta",
        "label_smoothing",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "use_weighting",
        "discopop_tau",
        "rpo_alpha",
        "reference_free",
        "use_liger_loss",
    ),
    KTOConfig: ("beta", "desirable_weight", "undesirable_weight", "use_liger_loss"),
}
_HINTS = {
    "rpo_alpha": "; add the term to the loss: 'dpo + 1.0*nll(average=\"batch\")'",
    "use_liger_loss": "; the loss is inside Liger's kernel then",
    "use_liger_kernel": "; the loss is inside Liger's kernel then",
}
_OWN_LOSS_TYPES = {
    DPOConfig: frozenset(
        (
            "sigmoid",
            "hinge",
            "ipo",
            "exo_pair",
            "nca_pair",
            "robust",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_pair" if before("0.28") else "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            *(() if before("0.20") else ("sft",)),
            *(() if before("1.4") else ("sigmoid_norm",)),
        )
    ),
    KTOConfig: frozenset(("kto", "apo_zero_unpaired")),
}
# From TRL 0.25 (until then `use_liger_loss`) to 1.13; then it scores completions in chunks, which is a seam.
_LIGER_COMPUTES_THE_LOSS = before("1.14") and not before("0.25")
# What each trainer supplies to a loss; scores and the like come with the batch.
_SUPPLIES = {
    DPOConfig: frozenset(("tokens", "scores", "per_token", "per_token.log_sum_sq")),
    KTOConfig: frozenset(("tokens", "scores", "per_token", "mismatched", "kl", "baseline")),
}


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


def resolve(args: Any, loss: Loss) -> Loss:
    """The loss with its hyperparameters: those stated, those the trainer's configuration sets, the loss's defaults.

    An option at TRL's default counts as unset. In a sum of losses, an option goes to each term that has it.

    Args:
        args: The trainer's configuration.
        loss: The loss that the user asked for.

    Raises:
        ValueError: If the configuration sets an option that no term of the loss has, or contradicts a stated one,
            or the trainer cannot supply what the loss needs.
        TypeError: If the loss takes a kind of feedback that this trainer cannot give.
    """
    kind = config_class(args)
    _check_feedback(kind, loss.spec)
    options = _set_options(args, kind)
    loss = inherit(loss, options, _parameter, owner=f"{kind.__name__}.", hints=_HINTS)
    _check_loss_type(args, kind, loss)
    _check_supplied(args, kind, loss)
    _check_baseline(args, kind, loss)
    return loss


def resolve_named(args: Any, name: str, given: Mapping[str, Any]) -> Loss:
    """Former form of `resolve`, with name and hyperparameters."""
    return resolve(args, get(name, **given))


def reads_mismatched(loss: Loss) -> bool:
    """Former form of `Loss.reads_mismatched`."""
    return loss.reads_mismatched


def _set_options(args: Any, kind: type) -> dict[str, Any]:
    fields = {
        field.name: field.default for field in dataclasses.fields(kind) if field.name in _LOSS_OPTIONS[kind]
    }
    set_to = {name: (_plain(getattr(args, name)), _plain(default)) for name, default in fields.items()}
    # TRL 0.28 turns an unset `reference_free` from None into False.
    same = {
        name
        for name, (value, default) in set_to.items()
        if value == default or (value is False and not default)
    }
    changed = {name: value for name, (value, _) in set_to.items() if name not in same}
    if args.use_liger_kernel and _LIGER_COMPUTES_THE_LOSS:
        changed["use_liger_kernel"] = True
    alpha = getattr(args, "f_alpha_divergence_coef", None)
    if "f_alpha_divergence_coef" in changed and set_to["f_divergence_type"][0] == "alpha_divergence":
        del changed["f_alpha_divergence_coef"]  # Becomes part of the type below.
    if alpha is not None and changed.get("f_divergence_type") == "alpha_divergence":
        # Up to TRL 0.28 it is the paper's, since then 1 - the paper's.
        changed["f_divergence_type"] = f"alpha({alpha if before('0.29') else 1 - alpha:g})"
    return changed


def _plain(value: Any) -> Any:
    """The text of an enumeration's member, in which older versions state a divergence."""
    return getattr(value, "value", value)


def _parameter(spec: LossSpec, option: str, value: Any) -> tuple[str | None, Any]:
    """The loss's name and value for a TRL option; None if it has no such hyperparameter, "" if nothing is to be set."""
    if option == "beta":
        return spec.beta, value
    if option == "label_smoothing" and "epsilon" in spec.parameters:
        return "epsilon", value
    if option == "discopop_tau":
        return ("tau" if spec.name == "discopop" else None), value
    if option == "reference_free":
        return (None if spec.needs_reference else ""), value
    if option == "use_weighting" and "per_token.log_sum_sq" in spec.needs:
        return "", value
    names = {"f_divergence_type": "divergence", "use_weighting": "wpo"}
    meanings = {"js_divergence": "js"}
    name = names.get(option, option)
    return (name if name in spec.parameters or name in admitted(spec) else None), meanings.get(value, value)


def _check_feedback(kind: type, spec: LossSpec) -> None:
    kinds = (Pairs, Labels) if kind is DPOConfig else (Labels,)
    if spec.feedback not in kinds:
        raise TypeError(
            f"loss: got {spec.name!r}, which takes {spec.feedback.__name__}, but "
            f"{kind.__name__.replace('Config', 'Trainer')} gives {' or '.join(item.__name__ for item in kinds)}"
        )


def _check_supplied(args: Any, kind: type, loss: Loss) -> None:
    trainer = kind.__name__.replace("Config", "Trainer")
    for need in sorted(loss.needs - _SUPPLIES[kind]):
        raise ValueError(
            f"{loss.name}: needs {need}, which {trainer} does not compute; use a loop of your own"
        )
    lost = sorted(need for need in loss.needs if need.split(".")[0] in ("tokens", "per_token"))
    if lost and before("0.29") and getattr(args, "padding_free", False):
        raise ValueError(
            f"{kind.__name__}.padding_free: got True, but {loss.name} needs {lost[0]}, which {trainer} of TRL "
            f"{VERSION} keeps for padded rows only; leave it False"
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
    """Refuse a `loss_type` beside ours that means another loss; TRL's defaults count as unset."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    # KTO's two names only decide whether TRL builds mismatched completions.
    if names == ["sigmoid"] or (kind is KTOConfig and known_to_trl(args, names[0])):
        return
    meant = [term.name for term in parse(expression(names, getattr(args, "loss_weights", None)))]
    trained = [term.spec for _, term in loss.terms]
    if [spec_of(name) for name in meant] != trained:
        raise ValueError(
            f"{kind.__name__}.loss_type: got {args.loss_type!r}, but the loss to train is {loss!r}"
        )


def _check_baseline(args: Any, kind: type, loss: Loss) -> None:
    for _, term in loss.terms:
        if not term.reads_mismatched:
            continue
        got = f"{term.name}: kl_baseline: got {term.params['kl_baseline']!r}"
        if kind is DPOConfig:
            raise ValueError(
                f"{got}, but DPOTrainer scores no mismatched completions; choose 'running_mean' or 'zero', or train it "
                "with KTOTrainer"
            )
        if args.loss_type == "apo_zero_unpaired":
            raise ValueError(
                f"{got}, but with loss_type='apo_zero_unpaired' KTOTrainer builds no mismatched completions; choose "
                "'running_mean' or 'zero', or leave loss_type='kto'"
            )
