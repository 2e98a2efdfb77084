"""prefloss in axolotl: a plugin that reads `prefloss` from the YAML of an `rl: dpo` or `rl: kto` training.

    plugins:
      - prefloss.integrations.axolotl.PreflossPlugin
    prefloss: "simpo(beta=2.0)"

A configuration without `prefloss` is left to axolotl.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from prefloss.integrations.trl import PreferenceLossCallback
from prefloss.registry import get

_KINDS = ("dpo", "kto")


class PreflossArgs(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        prefloss: The loss, with hyperparameters if needed.
    """

    prefloss: str | None = None

    @field_validator("prefloss")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                get(value)
        except TypeError as error:
            # pydantic reports only ValueError as a fault of the configuration.
            raise ValueError(str(error)) from error
        return value


class PreflossPlugin(BasePlugin):
    """Gives axolotl's trainer a `PreferenceLossCallback`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that the plugin reads."""
        return f"{__name__}.{PreflossArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback, if the configuration names a loss.

        Raises:
            ValueError: If the training is neither DPO nor KTO.
        """
        if cfg.prefloss is None:
            return []
        if cfg.rl not in _KINDS:
            raise ValueError(
                f"rl: got {cfg.rl!r} beside prefloss, expected one of {', '.join(map(repr, _KINDS))}"
            )
        return [PreferenceLossCallback(cfg.prefloss)]
