"""Compiles the native code into wheels and editable installs, where a C++ compiler is found."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Without a compiler the package is pure Python, and runs on torch alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before a wheel is put together."""
        build = runpy.run_path(str(Path(self.root, "pagedllm_core", "native", "build.py")))["build"]
        if build():
            build_data["artifacts"].append("pagedllm_core/native/*.so")
            build_data["pure_python"] = False
            # Loaded with ctypes, so that one wheel serves every Python.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
