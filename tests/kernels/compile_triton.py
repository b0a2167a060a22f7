"""Compiles every Triton kernel for the least GPU it is meant for, and for Hopper, without a GPU; prints what came out.

    TRITON_CACHE_DIR=/tmp/cache python -m tests.kernels.compile_triton             # what the tests look at: JSON lines
    TRITON_CACHE_DIR=/tmp/cache python -m tests.kernels.compile_triton prefill     # cases whose name holds "prefill"
    TRITON_CACHE_DIR=/tmp/cache python -m tests.kernels.compile_triton --more      # the whole matrix of attention

A case calls the real launcher with tensors on torch's "meta" device, which have shapes and no data; what the launcher
would launch is compiled instead, with the types, divisibility and options that it would be launched with. To add a
kernel, add a call of its launcher to tests/kernels/triton_cases.py.

It runs in a process of its own: TRITON_INTERPRET must not be set when triton is imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from tests.kernels.triton_cases import CASES, MORE_CASES, Case

HOPPER = 90
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoDevice(CudaDriver):
    """A driver for a device that is not there; its number is its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack (spilled registers, arrays with computed indices)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def compile_case(launch: Callable[[], Any], capability: int) -> Iterator[dict[str, Any]]:
    """Every kernel that a launcher launches, compiled."""
    compiled: list[Any] = []
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((self.__name__, grid, run(self, *arguments, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(NoDevice(capability))
    JITFunction.run = record
    try:
        launch()
    finally:
        JITFunction.run = run
    for name, grid, kernel in compiled:
        ptx = kernel.asm["ptx"]
        yield {
            "kernel": name,
            "target": capability,
            "grid": list(grid),
            "shared": kernel.metadata.shared,
            **resources(kernel.asm["cubin"]),
            "wgmma": "wgmma.mma_async" in ptx,
            "cp_async": "cp.async.c" in ptx,
        }


def compile_one(task: tuple[Sequence[Callable[[], Iterator[Case]]], str, int]) -> list[dict[str, Any]]:
    """A case for one target, by their names."""
    lists, wanted, target = task
    case = next(case for cases in lists for case in cases() if case.name == wanted)
    return [{"case": wanted, **result} for result in compile_case(case.launch, target)]


def main(part: str = "") -> None:
    """Compile the cases whose name holds `part`, two at a time."""
    lists = MORE_CASES if part == "--more" else CASES
    chosen = [case for cases in lists for case in cases() if part.removeprefix("--more") in case.name]
    tasks = [(lists, case.name, target) for case in chosen for target in (case.least, HOPPER)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for results in pool.imap(compile_one, tasks, chunksize=1):
            for result in results:
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
