"""How long an engine takes to start, by the size of its model."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from compare import System

from gpu_parts.machine import Context
from gpu_parts.shapes import save

COLUMNS = {"start": ["shape", "first", "second"]}


def start(context: Context) -> None:
    """From a process's start until its engine takes requests: imports, weights from files in memory, kernels.

    The first start of a shape finds Triton's cache empty, the second what the first compiled. A shape is left out where
    less time is left than the one before took.
    """
    took = 0.0
    for shape in context.options["shapes"]:
        begun = time.monotonic()
        if context.left() < took:
            context.row(shape=shape, error="no time was left")
            continue
        with context.case(shape=shape), tempfile.TemporaryDirectory() as folder:
            save(shape, Path(folder), context.dtype, context.device)
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
            os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
            first, second = (start_once(context, Path(folder)) for _ in range(2))
            context.row(shape=shape, first=f"{first:.1f} s", second=f"{second:.1f} s")
        took = time.monotonic() - begun


def start_once(context: Context, folder: Path) -> float:
    """Seconds.

    Raises:
        RuntimeError: It ended instead; with the last line it wrote.
    """
    options = ["--dtype", str(context.dtype)[6:], "--device", context.device.type]
    log = folder / "start.log"
    with log.open("wb") as errors:
        try:
            system = System("pagedllm", sys.executable, str(folder), options, 1 if context.smoke else 8, errors)
        except Exception as error:
            raise RuntimeError(f"{error}: {log.read_text(errors='replace').strip().splitlines()[-1:]}") from error
    system.kill()
    return system.started_s
