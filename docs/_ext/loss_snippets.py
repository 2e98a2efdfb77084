"""The lines that train with a loss, for each trainer that can: from the checks that the integrations make."""

from __future__ import annotations

from functools import cache
from typing import Any

from trl import DPOConfig, KTOConfig

import prefloss
from prefloss import Labels, Pairs
from prefloss.integrations.trl.options import resolve
from prefloss.registry import LossSpec
from prefloss.training.checks import check_computable


def snippets(spec: LossSpec) -> str:
    """A set of tabs, one for each trainer that can train with the loss; then why the others cannot."""
    tabs, refusals = {}, {}
    for trainer, (write, refuse) in _TRAINERS.items():
        reason = refuse(spec).removeprefix(f"{spec.name}: ")
        if reason:
            refusals.setdefault(reason.split(";")[0], []).append(trainer)
        else:
            tabs[trainer] = write(spec)
    items = "\n\n".join(
        f":::{{tab-item}} {name}\n:sync: {name}\n\n{text}\n:::" for name, text in tabs.items()
    )
    text = f"::::{{tab-set}}\n:sync-group: trainer\n\n{items}\n::::"
    reasons = "".join(f"\n- {'; '.join(names)}: {reason}" for reason, names in refusals.items())
    return f"{text}\n\nTrainers that cannot train with it:\n{reasons}" if reasons else text


def expression(spec: LossSpec) -> str:
    """The loss with its numbers, as every trainer and `prefloss.get` take it."""
    given = ", ".join(f"{name}={value!r}" for name, value in _defaults(spec).items())
    return f"{spec.name}({given})"


def _defaults(spec: LossSpec) -> dict[str, Any]:
    values = {name: item.default for name, item in spec.parameters.items()}
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def _arguments(spec: LossSpec) -> str:
    return ", ".join([repr(spec.name).replace("'", '"'), *(f"{k}={v!r}" for k, v in _defaults(spec).items())])


def _trl(spec: LossSpec) -> str:
    trainer = "KTOTrainer" if spec.feedback is Labels else "DPOTrainer"
    return (
        f"```python\nfrom prefloss.integrations.trl import PreferenceLossCallback\n\n"
        f"trainer = {trainer}(..., callbacks=[PreferenceLossCallback({_arguments(spec)})])\n```"
    )


def _transformers(spec: LossSpec) -> str:
    names, reference = "PreferenceCollator", ""
    if spec.needs_reference:
        names, reference = (
            "PreferenceCollator, Reference",
            ", reference=Reference.model(copy.deepcopy(model))",
        )
    return (
        "```python\nfrom prefloss.integrations.transformers import PreferenceLossCallback\n"
        f"from prefloss.training import {names}\n\n"
        "trainer = Trainer(\n    model,\n    ...,\n    data_collator=PreferenceCollator(tokenizer),\n"
        f"    callbacks=[PreferenceLossCallback({_arguments(spec)}{reference})],\n)\n```"
    )


def _loop(spec: LossSpec) -> str:
    field = {"Pairs": "pairs", "Labels": "labels", "Rankings": "rankings"}[spec.feedback.__name__]
    return f"```python\nloss = prefloss.get({_arguments(spec)})\nloss.mean({field}).backward()\n```"


def _string(spec: LossSpec) -> str:
    return (
        f'LLaMA-Factory and axolotl, in the YAML:\n\n```yaml\nprefloss: "{expression(spec)}"\n```\n\n'
        f'ms-swift:\n\n```text\nswift rlhf ... --loss_type "{expression(spec)}"\n```'
    )


def _command(spec: LossSpec) -> str:
    return f"```bash\nprefloss train --loss '{expression(spec)}'\n```"


def _trl_refuses(spec: LossSpec) -> str:
    return _refused(
        resolve, _configuration(Labels if spec.feedback is Labels else Pairs), prefloss.get(spec.name)
    )


def _wrappers_refuse(spec: LossSpec) -> str:
    kept = {"tokens", "per_token", "mismatched"}
    lost = sorted(need for need in spec.needs - kept if not _trl_refuses(spec))
    return _trl_refuses(spec) or (f"they drop what the loss needs: {', '.join(lost)}" if lost else "")


def _own_loop_refuses(spec: LossSpec) -> str:
    return _refused(check_computable, prefloss.get(spec.name))


def _refused(check: Any, *arguments: Any) -> str:
    try:
        check(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@cache
def _configuration(kind: type) -> Any:
    settings = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
    return KTOConfig(**settings) if kind is Labels else DPOConfig(**settings, use_weighting=False)


_TRAINERS = {
    "TRL": (_trl, _trl_refuses),
    "transformers": (_transformers, _own_loop_refuses),
    "Frameworks": (_string, _wrappers_refuse),
    "Command line": (_command, _own_loop_refuses),
    "Loop": (_loop, lambda spec: ""),
}
