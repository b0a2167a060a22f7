"""The collector is paused while an engine loads, and goes on afterwards whatever happened."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from pagedllm_core import Engine, EngineConfig
from pagedllm_core.loading import paused_collector


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Each test starts and ends with it on."""
    gc.enable()
    yield
    gc.enable()


def test_a_load_that_fails_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(config: EngineConfig) -> Any:
        seen.append(gc.isenabled())
        raise OSError("no such weights")

    monkeypatch.setattr("pagedllm_core.model.runner.ModelRunner", load)
    with pytest.raises(OSError, match="no such weights"):
        Engine(EngineConfig(model="tiny"))
    assert seen == [False]
    assert gc.isenabled()


def test_a_collector_that_the_user_turned_off_stays_off() -> None:
    gc.disable()
    with paused_collector():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_two_loads_at_once_leave_it_on() -> None:
    first, second = paused_collector(), paused_collector()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.isenabled()
