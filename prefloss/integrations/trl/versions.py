"""The TRL in use: its version, and the trainers and configurations under the names that every version has.

KTOTrainer lived in `trl.experimental` from 0.26 to 1.7, where `trl.KTOTrainer` was a subclass that only warned.
"""

from __future__ import annotations

from typing import Any

import trl
from packaging.version import Version

OLDEST, NEWEST = Version("0.18"), Version("1.16")
"""Versions that prefloss was tested with: `make trainers` proves releases from the oldest to the newest.

Not every release between them is proven; its structure is that of a proven one, and each step is checked. A patch of
the newest counts as tested.
"""

VERSION = Version(trl.__version__)


def _moved(kind: Any) -> type:
    """The class itself, where `trl` holds a subclass of the same name."""
    parent = kind.__mro__[1]
    return parent if parent.__name__ == kind.__name__ else kind


DPOTrainer: Any = trl.DPOTrainer
DPOConfig: Any = trl.DPOConfig
KTOTrainer: Any = _moved(trl.KTOTrainer)
KTOConfig: Any = _moved(trl.KTOConfig)


def before(version: str) -> bool:
    """Whether this TRL is older than a version."""
    return Version(version) > VERSION


def untested() -> bool:
    """Whether this TRL is newer than the newest that prefloss was tested with."""
    return VERSION.release[:2] > NEWEST.release[:2]


def check_in_place() -> None:
    """Refuse to train if TRL's trainers were replaced after prefloss was imported, as Unsloth does.

    Raises:
        RuntimeError: If they were.
    """
    for name, known in (("DPOTrainer", DPOTrainer), ("KTOTrainer", KTOTrainer)):
        found = _moved(getattr(trl, name))
        if found is not known:
            raise RuntimeError(
                f"trl.{name}: got {found.__module__}.{found.__name__}, which took the place of TRL's after prefloss "
                "was imported; import unsloth before prefloss.integrations.trl"
            )
