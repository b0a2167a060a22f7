"""Resident memory of a loaded engine above an idle process that imported torch and transformers.

    python benchmarks/memory.py FOLDER [--quantization int8]

The bound is 1.15 times the weights and one packed copy of a tied head (with int8: of what is left of them), and the
pool; the pool's pages are not touched before they are used.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto  # noqa: F401 (a part of the idle process)

from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.params import SamplingParams


def resident() -> int:
    """Bytes of this process that are in memory now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) << 10


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization")
    arguments = parser.parse_args()
    torch.ones(8, 8) @ torch.ones(8, 8)
    idle = resident()
    fields: dict[str, Any] = {"kv_cache_memory": "64MiB", "quantization": arguments.quantization}
    engine = Engine(EngineConfig(model=str(arguments.folder), **fields))
    gc.collect()
    loaded = resident() - idle
    engine.add([7] * 100, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    weights = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    mebi = 1 << 20
    print(
        f"idle {idle / mebi:.0f} MiB; loaded + {loaded / mebi:.0f} MiB, after a request + "
        f"{(resident() - idle) / mebi:.0f} MiB; the weights' files are {weights / mebi:.0f} MiB"
    )


if __name__ == "__main__":
    main()
