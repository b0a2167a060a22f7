"""One engine of the bundled model for each test module, whole after every test."""

from __future__ import annotations

import pytest

import pagedllm_core
from pagedllm_core.streams import Mailbox


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


@pytest.fixture
def every_output(monkeypatch):
    """Give a stream's reader each output on its own, as if it were never slower than the engine."""

    def take(mailbox):
        with mailbox._condition:
            found = mailbox._deltas[mailbox._read : mailbox._read + 1]
            mailbox._read += len(found)
        if not found and mailbox._error is not None:
            raise mailbox._error
        return found[0] if found else None

    monkeypatch.setattr(Mailbox, "take", take)


@pytest.fixture(scope="module", autouse=True)
def _no_engines_left():
    yield
    pagedllm_core.shutdown()
