"""PagedLLM: a paged LLM engine inside your own Python process.

Importing this package brings in neither torch nor transformers; each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedllm_core.async_engine import AsyncEngine, RequestHandle
    from pagedllm_core.config import EngineConfig
    from pagedllm_core.engine import Engine
    from pagedllm_core.llm import LLM
    from pagedllm_core.metrics import EngineStats
    from pagedllm_core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from pagedllm_core.params import GuidedParams, SamplingParams
    from pagedllm_core.registry import get_engine, list_engines, shutdown

__version__ = "0.1.0"

# torch's operations run on OpenMP, whose default is to spin while it waits. As soon as anything else wants a core, a
# spinning thread takes it from the one it waits for, and a step takes ten times as long. OpenMP reads this when torch
# is first imported. Our native code has threads of its own (native/team.h).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

_HOMES = {
    "AsyncEngine": "async_engine",
    "RequestHandle": "async_engine",
    "EngineConfig": "config",
    "Engine": "engine",
    "LLM": "llm",
    "EngineStats": "metrics",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "GuidedParams": "params",
    "SamplingParams": "params",
    "get_engine": "registry",
    "list_engines": "registry",
    "shutdown": "registry",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "GuidedParams",
    "Logprob",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "get_engine",
    "list_engines",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pagedllm_core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
