"""Triton kernels and their launchers. They import triton at their top: import them only where they run."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_triton(least: tuple[int, int] = (0, 0)) -> bool:
    """True where triton is installed, of this version or newer, as it is wherever torch is built for CUDA on Linux."""
    if importlib.util.find_spec("triton") is None:
        return False
    if least == (0, 0):
        return True
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= least
