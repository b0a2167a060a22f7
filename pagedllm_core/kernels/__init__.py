"""Triton kernels and their launchers. They import triton at their top: import them only where they run."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """True where triton is installed, as it is wherever torch is built for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None


def triton_version() -> tuple[int, ...]:
    """Major and minor number of the installed triton."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))
