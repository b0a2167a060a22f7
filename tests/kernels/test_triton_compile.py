"""Every Triton kernel compiles for sm_80 (fp8: sm_89) and sm_90, fits and spills nothing. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of an RTX card: an A100 gives 163 KiB
# Known and harmless: (case, kernel) and the bytes it may spill.
SPILLS = {("prefill in one loop fp8 256", "prefill_kernel"): 16}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One entry for each case, target and kernel; see compile_triton.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_triton"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_fit(compiled: list[dict[str, Any]]) -> None:
    assert {one["target"] for one in compiled} == SHARED.keys()
    assert [one for one in compiled if one["shared"] > SHARED[one["target"]]] == []
    spills = {(one["case"], one["kernel"]): one["stack"] for one in compiled if one["stack"]}
    assert {name: stack for name, stack in spills.items() if stack > SPILLS.get(name, 0)} == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_attention_and_products_use_the_tensor_cores_and_load_ahead(compiled: list[dict[str, Any]]) -> None:
    """In half precision, prefill and products on Hopper multiply with wgmma; what comes next is copied meanwhile."""
    half = [one for one in compiled if "float32" not in one["case"].split()]
    for kernel in ("prefill_kernel", "_linear"):
        multiply = [one for one in half if one["kernel"] == kernel]
        assert multiply
        assert all(one["wgmma"] == (one["target"] == 90) for one in multiply)
    aligned = [one for one in compiled if one["kernel"] == "_linear" and not one["case"].endswith("331")]
    assert aligned
    assert all(one["cp_async"] for one in aligned)
    assert all(one["cp_async"] for one in compiled if one["kernel"] in ("decode_kernel", "prefill_kernel"))
