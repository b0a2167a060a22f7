"""Compiles the native code, once for each tier of instructions: `python -m pagedllm_core.native.build`.

Wheels and editable installs run this where a C++ compiler is found (`CXX` names another one, `CXXFLAGS` adds to its
flags). Nothing is ever compiled at import.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("pagedllm.native")

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "decoder.cpp"
# Division and square roots stay exact, and sums keep their order, so that rows do not depend on each other.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno"]
TIERS = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"]}


def library_path(tier: str) -> Path:
    """Where the library of a tier lies, or would lie."""
    return FOLDER / f"decoder_{tier}.so"


def compile_tier(tier: str, path: Path, *extra: str) -> bool:
    """Compile one tier.

    Args:
        tier: Which one.
        path: Where its library shall lie.
        extra: Flags besides its own, before those of `CXXFLAGS`.

    Returns:
        Whether it lies there now; there is no compiler otherwise, or the machine is none that the tiers are for.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or sys.platform != "linux":
        return False
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled = Path(folder, "decoder.so")
        flags = [*FLAGS, *TIERS[tier], *extra, *os.environ.get("CXXFLAGS", "").split()]
        command = [compiler, *flags, "-shared", str(SOURCE), "-o", str(compiled)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            logger.warning("%s was not compiled: %s", path.name, result.stderr.strip()[-500:])
            return False
        compiled.replace(path)
    return True


def build() -> list[Path]:
    """Compile every tier for this kind of machine.

    Returns:
        The libraries; none where there is no compiler, or where the machine is none that the tiers are for.
    """
    return [library_path(tier) for tier in TIERS if compile_tier(tier, library_path(tier))]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = build()
    logger.info("%s", "\n".join(map(str, found)) or "nothing was compiled: a C++ compiler on x86-64 Linux is needed")
    sys.exit(not found)
