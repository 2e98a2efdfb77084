"""prefloss in LLaMA-Factory: `prefloss: "simpo(beta=2.0)"` in the configuration of a DPO or KTO stage.

    python -m prefloss.integrations.llamafactory train config.yaml
    torchrun --nproc-per-node 2 -m prefloss.integrations.llamafactory train config.yaml

A configuration without `prefloss` is left to LLaMA-Factory, and so is every other command of its command line.
"""

from prefloss.integrations.llamafactory.command import main as main
from prefloss.integrations.llamafactory.command import run_exp as run_exp
