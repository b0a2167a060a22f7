"""Every Triton kernel compiles for sm_80 and sm_90, fits their shared memory and spills nothing. No GPU is needed."""

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
SHARED = {80: 163 << 10, 90: 227 << 10}
# Known and harmless: (case, kernel) and the bytes it may spill.
SPILLS: dict[tuple[str, str], int] = {}


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
    assert {one["target"] for one in compiled} == {80, 90}
    assert [one for one in compiled if one["shared"] > SHARED[one["target"]]] == []
    spills = {(one["case"], one["kernel"]): one["stack"] for one in compiled if one["stack"]}
    assert {name: stack for name, stack in spills.items() if stack > SPILLS.get(name, 0)} == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_attention_uses_the_tensor_cores_and_loads_ahead(compiled: list[dict[str, Any]]) -> None:
    """In half precision, prefill on Hopper multiplies with wgmma; keys and values are copied while others are used."""
    prefill = [one for one in compiled if one["kernel"] == "prefill_kernel" and "float32" not in one["case"].split()]
    assert prefill
    assert all(one["wgmma"] == (one["target"] == 90) for one in prefill)
    assert all(one["cp_async"] for one in compiled if one["kernel"] in ("decode_kernel", "prefill_kernel"))
