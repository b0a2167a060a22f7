"""One engine of the bundled model for each test module, whole after every test."""

from __future__ import annotations

import pytest

import pagedllm_core


def settled(engine) -> bool:
    """True when nothing runs and no block is in use; waits for the step in flight."""
    for _ in range(1000):
        stats = engine.stats()
        if not (stats.running or stats.waiting or stats.kv_blocks_used):
            return True
    return False


@pytest.fixture(name="settled")
def _settled():
    return settled


@pytest.fixture(autouse=True)
def _whole_pool():
    yield
    for engine in pagedllm_core.list_engines():
        assert settled(engine), engine.stats()


@pytest.fixture
def fresh_engines():
    """Close every engine before and after, where a test counts what an engine has done."""
    pagedllm_core.shutdown()
    yield
    pagedllm_core.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _no_engines_left():
    yield
    pagedllm_core.shutdown()
