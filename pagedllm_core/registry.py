"""One engine for each distinct configuration in the process."""

from __future__ import annotations

import threading
from typing import Any

from pagedllm_core.async_engine import AsyncEngine, open_engines
from pagedllm_core.config import EngineConfig

# The only state that belongs to the module: which engines `get_engine` made. Engines themselves share nothing.
_engines: dict[EngineConfig, AsyncEngine] = {}
_locks: dict[EngineConfig, threading.Lock] = {}
_guard = threading.Lock()


def get_engine(config: EngineConfig | None = None, **fields: Any) -> AsyncEngine:
    """The process's engine of this configuration; made, and its model loaded, at the first call.

    Callers that ask for the same configuration at once wait for one load; other configurations load beside it.

    Args:
        config: What the engine is; or give its fields as keyword arguments.
        **fields: Fields of `EngineConfig`.

    Raises:
        ModelLoadError: The model cannot be loaded.
        InvalidRequestError: A configuration field cannot be served.
    """
    if config is None:
        config = EngineConfig(**fields)
    elif fields:
        raise TypeError(f"give a config or its fields, not both: {', '.join(fields)}")
    with _guard:
        lock = _locks.setdefault(config, threading.Lock())
    with lock:
        engine = _engines.get(config)
        if engine is None or engine.closed:
            engine = _engines[config] = AsyncEngine(config)
        return engine


def list_engines() -> list[AsyncEngine]:
    """Every open engine of the process, whoever made it."""
    return open_engines()


def shutdown() -> None:
    """Close every engine of the process: running requests end with `EngineClosedError`, memory is freed.

    Blocking, from any thread. Later calls of `get_engine` build anew.
    """
    for engine in open_engines():
        engine.close()
    with _guard:
        for config in [config for config, engine in _engines.items() if engine.closed]:
            del _engines[config]
