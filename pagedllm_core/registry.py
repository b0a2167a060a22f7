"""One engine for each distinct configuration in the process."""

from __future__ import annotations

import logging
import threading
from typing import Any

from pagedllm_core.async_engine import AsyncEngine, open_engines
from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import CapacityError, ModelLoadError, is_out_of_memory

logger = logging.getLogger("pagedllm")

# The only state that belongs to the module: which engines `get_engine` made. Engines themselves share nothing.
_engines: dict[EngineConfig, AsyncEngine] = {}
_locks: dict[EngineConfig, threading.Lock] = {}
_guard = threading.Lock()


def get_engine(config: EngineConfig | str | None = None, **fields: Any) -> AsyncEngine:
    """The process's engine of this configuration; made, and its model loaded, at the first call.

    Callers that ask for the same configuration at once wait for one load; other configurations load beside it.

    Args:
        config: What the engine is, or the model's name; or give its fields as keyword arguments.
        **fields: Fields of `EngineConfig`.

    Raises:
        ModelLoadError: The model cannot be loaded.
        InvalidRequestError: A configuration field cannot be served.
    """
    config = EngineConfig.of(config, fields)
    with _guard:
        lock = _locks.setdefault(config, threading.Lock())
    with lock:
        engine = _engines.get(config)
        if engine is None or engine.closed or not engine.touch():
            engine = _engines[config] = _load(config)
        return engine


def _load(config: EngineConfig) -> AsyncEngine:
    """A new engine; where memory is short, idle ones make room, the least recently used first."""
    while True:
        try:
            return AsyncEngine(config)
        except (CapacityError, ModelLoadError) as error:
            if not is_out_of_memory(error.__cause__) or not _evict_idle():
                raise


def _evict_idle() -> bool:
    """Close the engine of the registry that has been idle longest; False where none is idle."""
    with _guard:
        idle = [(since, engine) for engine in _engines.values() if (since := engine.idle_since) and not engine.closed]
    if not idle:
        return False
    engine = min(idle, key=lambda entry: entry[0])[1]
    logger.warning("memory is short: the idle engine of %r makes room", engine.config.model)
    engine.close()
    return True


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
