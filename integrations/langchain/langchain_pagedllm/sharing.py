"""Whose share of the engine a call counts against under `scheduling_policy="fair"`.

`share_key` or `thread_id` of the run's metadata, or of the chain's `configurable`, where somebody gave one; else one
key for each call of `batch`, `abatch` or `generate`, which is put into the metadata of its runs; else the parent run.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from langchain_core.callbacks import BaseRunManager
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, get_config_list

Result = TypeVar("Result")

_NAMES = ("share_key", "thread_id")


def share_key(run_manager: BaseRunManager | None, prompts: int = 1) -> str | None:
    """The key of a run that sends this many prompts; None where nothing says whose it is.

    LangChain gives streams no run manager; what is around them is in the configuration of the chain that runs.
    """
    around = ensure_config()
    metadata = None if run_manager is None else run_manager.metadata
    given = _given(metadata) or given_key(around)
    if given is not None:
        return given
    if prompts > 1:
        return new_share_key()
    parent = getattr(around.get("callbacks") if run_manager is None else run_manager, "parent_run_id", None)
    return None if parent is None else str(parent)


def given_key(config: RunnableConfig | None) -> str | None:
    """The key that a configuration names, or None."""
    config = config or {}
    return _given(config.get("metadata")) or _given(config.get("configurable"))


def new_share_key() -> str:
    """A key for what one call sends together."""
    return f"batch-{uuid.uuid4()}"


def with_one_share(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata that names a key: the one it has, or a new one."""
    return {**(metadata or {}), "share_key": _given(metadata) or new_share_key()}


def configs_of_one_share(config: Any, count: int, max_concurrency: int | None = None) -> list[RunnableConfig]:
    """The configurations of a batch's `count` runs, with one key for all that have none of their own.

    Args:
        config: What the caller gave: nothing, one, or one for each run.
        count: Number of runs.
        max_concurrency: Where the caller gave none.
    """
    configs = get_config_list(config, count) if count else []
    key = new_share_key()
    for number, one in enumerate(configs):
        configs[number] = {**one, "metadata": {**(one.get("metadata") or {}), "share_key": given_key(one) or key}}
    if configs and max_concurrency is not None and configs[0].get("max_concurrency") is None:
        configs[0] = {**configs[0], "max_concurrency": max_concurrency}
    return configs


def _given(metadata: Mapping[str, Any] | None) -> str | None:
    return next((str(metadata[name]) for name in _NAMES if metadata and metadata.get(name) is not None), None)


async def each_as_completed(
    run: Callable[[int], Coroutine[Any, Any, Result]], count: int, limit: int | None, return_exceptions: bool
) -> AsyncGenerator[tuple[int, Result | Exception], None]:
    """Results with their numbers, in the order in which they are ready; none outlives a reader that leaves.

    Args:
        run: Makes the run of a number.
        count: Runs.
        limit: Most runs at once; None: all.
        return_exceptions: Errors come as results instead of ending it all.
    """
    seats = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)

    async def one(number: int) -> tuple[int, Result | Exception]:
        async with seats:
            try:
                return number, await run(number)
            except Exception as error:
                if not return_exceptions:
                    raise
                return number, error

    tasks = [asyncio.ensure_future(one(number)) for number in range(count)]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()
