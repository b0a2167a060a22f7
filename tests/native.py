"""The tiers of native code that were compiled and that this processor runs."""

from __future__ import annotations

import ctypes

import torch

from pagedllm_core.native.library import load

RUNS_HERE = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(torch.backends.cpu.get_cpu_capability(), ())
LIBRARIES: dict[str, ctypes.CDLL] = {tier: library for tier in RUNS_HERE if (library := load(tier)) is not None}
