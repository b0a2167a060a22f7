"""The tiers of native code that were compiled and that this processor runs."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

import torch

from pagedllm_core.native.build import compile_tier
from pagedllm_core.native.library import load, open_library

RUNS_HERE = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(torch.backends.cpu.get_cpu_capability(), ())
LIBRARIES: dict[str, ctypes.CDLL] = {tier: library for tier in RUNS_HERE if (library := load(tier)) is not None}


@functools.cache
def emulated_bf16() -> ctypes.CDLL | None:
    """The avx512 tier as on a processor with AVX512-BF16, compiled here and now; None where it cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "emulated.so")
        if "avx512" in LIBRARIES and compile_tier("avx512", path, "-DEMULATE_BF16", "-O1"):  # -O3 takes 3 times as long
            return open_library(path)
    return None
