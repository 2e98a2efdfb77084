"""prefloss in LLaMA-Factory: `prefloss: "simpo(beta=2.0)"` in the configuration of a DPO or KTO stage.

    python -m prefloss.integrations.llamafactory train config.yaml
    torchrun --nproc-per-node 2 -m prefloss.integrations.llamafactory train config.yaml

A configuration without `prefloss` is left to LLaMA-Factory, and so is every other command of its command line.
"""

try:
    import llamafactory as _llamafactory  # noqa: F401
except ModuleNotFoundError as error:
    # An import error inside LLaMA-Factory does not mean that it is missing.
    if error.name != "llamafactory":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.llamafactory needs LLaMA-Factory: pip install llamafactory",
        name="llamafactory",
    ) from error

from prefloss.integrations.llamafactory.command import main as main
from prefloss.integrations.llamafactory.command import run_exp as run_exp
