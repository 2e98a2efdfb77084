"""Build hook of hatchling: compiles the CPU library, prefloss/kernels/cpu/native.c, into the wheel.

Where it cannot be compiled the wheel is pure Python, says so, and compiles when first needed. With
PREFLOSS_BUILD_NATIVE=1 that is an error; with 0 nothing is compiled. Editable installs compile when first needed.
"""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "prefloss/kernels/cpu"


class NativeLibrary(BuildHookInterface):
    """Adds the library and its digest to a wheel, and the platform to the wheel's name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        wanted = os.environ.get("PREFLOSS_BUILD_NATIVE", "").strip()
        if wanted not in ("", "0", "1"):
            raise ValueError(f"PREFLOSS_BUILD_NATIVE: got {wanted!r}, expected 0 or 1")
        if version == "editable" or wanted == "0":
            return
        # loaded by its path: an import of the package would import torch
        spec = importlib.util.spec_from_file_location("build_native", Path(self.root, FOLDER, "build.py"))
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        platform = sysconfig.get_platform()
        # removed when the builder is done with this object
        self._temporary = tempfile.TemporaryDirectory(prefix="prefloss-wheel-", ignore_cleanup_errors=True)
        library = Path(self._temporary.name, build.PREBUILT.name)
        try:
            build.build_for_wheel(build.compiler(), library, platform)
        except build.CannotBuild as error:
            if wanted == "1":
                raise
            self.app.display_warning(f"prefloss: a wheel without the CPU library: {error}")
            return
        digest = build.digest_file(library)
        digest.write_text(build.digest(library) + "\n")
        for file in (library, digest):
            build_data["force_include"][str(file)] = f"{FOLDER}/{file.name}"
        build_data["pure_python"] = False
        # C alone: any Python of this platform
        build_data["tag"] = f"py3-none-{platform.replace('-', '_').replace('.', '_')}"
